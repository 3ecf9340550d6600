/* State rate on a GPU, in float: csrc/core/adamw_rate.c's step for all layers of a model. plan.h says how. */
#ifndef OPLORA_CUDA_ADAMW_RATE_H
#define OPLORA_CUDA_ADAMW_RATE_H

#include "plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of the table, and of scratch on the device, aligned to 64; -1 for sizes that do not fit. */
OPLORA_CUDA_API int64_t oplora_cuda_rate_table_bytes(const oplora_rate_f32 *layers, int64_t n_layers);
OPLORA_CUDA_API int64_t oplora_cuda_rate_workspace_bytes(const oplora_rate_f32 *layers, int64_t n_layers);

/* adamw, rates, halves: as in oplora_cuda_exact_plan_layers. found: where on the device the rate is that every lr is
 * multiplied by; the layers' own is not looked at. */
OPLORA_CUDA_API oplora_status oplora_cuda_rate_plan_layers(const oplora_rate_f32 *layers, int64_t n_layers,
                                                           oplora_adamw *const *adamw, const double *const *rates,
                                                           const double *found, const oplora_cuda_half *halves,
                                                           oplora_cuda_verdict *verdict, void *workspace, void *table,
                                                           oplora_cuda_plan *plan);

/* What find_rate hears: heard (n_layers, 3) of the layers' reports, each with the lr in row listening[layer] of rates
 * (n_rates, 2), by the highest in the first column of groups (n_groups, 7). */
OPLORA_CUDA_API int oplora_cuda_rate_heard(const double *reports, int64_t n_layers, const double *rates,
                                           int64_t n_rates, const int64_t *listening, const double *groups,
                                           int64_t n_groups, double *heard, void *stream);

/* oplora_find_rate; where *veto (or NULL) is not 0 nothing is changed. All pointers are the device's. */
OPLORA_CUDA_API int oplora_cuda_find_rate(double *found, const double *heard, int64_t n_layers, const int *veto,
                                          void *stream);

/* oplora_rate_measure and oplora_rate_step. Where a factor of 16 bits is not its value before rounding, rounded, somebody
 * wrote into it: both go on from what it holds, as what is generated too. */
OPLORA_CUDA_API int oplora_cuda_rate_measure(const oplora_cuda_plan *plan, const void *table, void *stream);
OPLORA_CUDA_API int oplora_cuda_rate_step(const oplora_cuda_plan *plan, const void *table, const int *veto,
                                          void *stream);

#ifdef __cplusplus
}
#endif
#endif
