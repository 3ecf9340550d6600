/* Exact state on a GPU, in float: csrc/core/adamw_exact.c's step for all layers of a model. plan.h says how. */
#ifndef OPLORA_CUDA_ADAMW_EXACT_H
#define OPLORA_CUDA_ADAMW_EXACT_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of the table, and of scratch on the device, aligned to 64; -1 for sizes that do not fit. */
OPLORA_CUDA_API int64_t oplora_cuda_exact_table_bytes(const oplora_exact_f32 *layers, int64_t n_layers);
OPLORA_CUDA_API int64_t oplora_cuda_exact_workspace_bytes(const oplora_exact_f32 *layers, int64_t n_layers);

/* adamw: where on the device each layer's numbers are, and rates: where those of its factors, lr and weight_decay one
 * after another; the layers' own are not looked at. halves: NULL, or of every factor of every layer in order. */
OPLORA_CUDA_API oplora_status oplora_cuda_exact_plan_layers(const oplora_exact_f32 *layers, int64_t n_layers,
                                                            oplora_adamw *const *adamw, const double *const *rates,
                                                            const oplora_cuda_half *halves,
                                                            oplora_cuda_verdict *verdict, void *workspace, void *table,
                                                            oplora_cuda_plan *plan);

/* oplora_exact_measure, oplora_exact_step and oplora_exact_generate. */
OPLORA_CUDA_API int oplora_cuda_exact_measure(const oplora_cuda_plan *plan, const void *table, void *stream);
OPLORA_CUDA_API int oplora_cuda_exact_step(const oplora_cuda_plan *plan, const void *table, int measured,
                                           const int *veto, void *stream);
OPLORA_CUDA_API int oplora_cuda_exact_generate(const oplora_cuda_plan *plan, const void *table, void *stream);

#ifdef __cplusplus
}
#endif
#endif
