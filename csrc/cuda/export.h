/* The names that liboplora_cuda.so offers; everything else in it is hidden. */
#ifndef OPLORA_CUDA_EXPORT_H
#define OPLORA_CUDA_EXPORT_H

#define OPLORA_CUDA_API __attribute__((visibility("default")))

#endif
