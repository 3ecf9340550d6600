/* Lean state on a GPU, in float: csrc/core/adamw_lean.c's step for all layers of a model. plan.h says how. */
#ifndef OPLORA_CUDA_ADAMW_LEAN_H
#define OPLORA_CUDA_ADAMW_LEAN_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of the table, and of scratch on the device, aligned to 64; -1 for sizes that do not fit. */
OPLORA_CUDA_API int64_t oplora_cuda_lean_table_bytes(const oplora_lean_f32 *layers, int64_t n_layers);
OPLORA_CUDA_API int64_t oplora_cuda_lean_workspace_bytes(const oplora_lean_f32 *layers, int64_t n_layers);

/* adamw, rates, halves: as in oplora_cuda_exact_plan_layers. A layer's dh may be NULL. */
OPLORA_CUDA_API oplora_status oplora_cuda_lean_plan_layers(const oplora_lean_f32 *layers, int64_t n_layers,
                                                           oplora_adamw *const *adamw, const double *const *rates,
                                                           const oplora_cuda_half *halves, oplora_cuda_verdict *verdict,
                                                           void *workspace, void *table, oplora_cuda_plan *plan);

/* oplora_lean_start of every layer, oplora_lean_measure and oplora_lean_step. */
OPLORA_CUDA_API int oplora_cuda_lean_start(const oplora_cuda_plan *plan, const void *table, double latent_std,
                                           void *stream);
OPLORA_CUDA_API int oplora_cuda_lean_measure(const oplora_cuda_plan *plan, const void *table, void *stream);
OPLORA_CUDA_API int oplora_cuda_lean_step(const oplora_cuda_plan *plan, const void *table, int measured,
                                          const int *veto, void *stream);

#ifdef __cplusplus
}
#endif
#endif
