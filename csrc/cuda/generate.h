/* generate and its backward on a GPU: csrc/core/generate.c and generate_backward.c, with the arguments of
 * oplora_core.h as device addresses. Nothing allocates, waits for the device or keeps a pointer; a cudaError_t returns.
 *
 * The bits are the core's but for one sum: W2^T g of a row-major W2, which the core takes row by row in chunks of 16384.
 * Here chunks are smaller, as a GPU needs more of them, and always the same. */
#ifndef OPLORA_CUDA_GENERATE_H
#define OPLORA_CUDA_GENERATE_H

#include "../core/oplora_core.h"
#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

OPLORA_CUDA_API int oplora_cuda_generate_f32(const float *z, const float *W1, const float *c1, const float *W2,
                                             const float *c2, oplora_layout layout, int64_t H, int64_t Z, int64_t N,
                                             float *h, float *v, void *stream);
OPLORA_CUDA_API int oplora_cuda_generate_f64(const double *z, const double *W1, const double *c1, const double *W2,
                                             const double *c2, oplora_layout layout, int64_t H, int64_t Z, int64_t N,
                                             double *h, double *v, void *stream);

/* workspace: this many bytes on the device, aligned for double; -1 for sizes that do not fit. */
OPLORA_CUDA_API int64_t oplora_cuda_generate_backward_workspace_bytes(oplora_layout layout, int64_t H, int64_t Z,
                                                                      int64_t N);
OPLORA_CUDA_API int oplora_cuda_generate_backward_f32(const float *g, const float *z, const float *W1, const float *c1,
                                                      const float *W2, oplora_layout layout, int64_t H, int64_t Z,
                                                      int64_t N, float *dz, float *dW1, float *dc1, float *h,
                                                      void *workspace, void *stream);
OPLORA_CUDA_API int oplora_cuda_generate_backward_f64(const double *g, const double *z, const double *W1,
                                                      const double *c1, const double *W2, oplora_layout layout,
                                                      int64_t H, int64_t Z, int64_t N, double *dz, double *dW1,
                                                      double *dc1, double *h, void *workspace, void *stream);

#ifdef __cplusplus
}
#endif
#endif
