/* Exact state on a GPU, in float: csrc/core/adamw_exact.c's step for all layers of a model, in one launch a pass.
 *
 * As adamw_lean.h: the layers are the core's structs in host memory with device addresses in them (parameters, exp_avg,
 * exp_avg_sq, decay, moving, report, and of the factors g, base, out). The plan writes a table, which the caller copies to
 * the device. Nothing here allocates, waits for the device or keeps a pointer. */
#ifndef OPLORA_CUDA_ADAMW_EXACT_H
#define OPLORA_CUDA_ADAMW_EXACT_H

#include "../core/oplora_core.h"
#include "export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What launches need of a plan, in host memory. */
typedef struct {
    int64_t n_layers, n_tasks;
    int64_t factors, first_task; /* bytes from the table's beginning */
    void *workspace;
} oplora_cuda_exact_plan;

/* Bytes of the table, and of scratch on the device, aligned to 64; -1 for sizes that do not fit. */
OPLORA_CUDA_API int64_t oplora_cuda_exact_table_bytes(const oplora_exact_f32 *layers, int64_t n_layers);
OPLORA_CUDA_API int64_t oplora_cuda_exact_workspace_bytes(const oplora_exact_f32 *layers, int64_t n_layers);

/* `adamw`: on the device, as in oplora_cuda_lean_plan_layers. */
OPLORA_CUDA_API oplora_status oplora_cuda_exact_plan_layers(const oplora_exact_f32 *layers, int64_t n_layers,
                                                            oplora_adamw *adamw, void *workspace, void *table,
                                                            oplora_cuda_exact_plan *plan);

/* oplora_exact_measure, oplora_exact_step and oplora_exact_generate; a cudaError_t returns. If a gradient is not finite,
 * every report's [0] and [1] say so and nothing else is changed, adamw.step included. */
OPLORA_CUDA_API int oplora_cuda_exact_measure(const oplora_cuda_exact_plan *plan, const void *table, void *stream);
OPLORA_CUDA_API int oplora_cuda_exact_step(const oplora_cuda_exact_plan *plan, const void *table, int measured,
                                           void *stream);
OPLORA_CUDA_API int oplora_cuda_exact_generate(const oplora_cuda_exact_plan *plan, const void *table, void *stream);

#ifdef __cplusplus
}
#endif
#endif
