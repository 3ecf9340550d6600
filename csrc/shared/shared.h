/* OPLORA_SHARED: a function that the C core and the CUDA kernels both compile. */
#ifndef OPLORA_SHARED_H
#define OPLORA_SHARED_H

#ifdef __CUDACC__
#define OPLORA_SHARED static __host__ __device__ inline
#else
#define OPLORA_SHARED static inline
#endif

#endif
