/* Lean state on a GPU, in float: csrc/core/adamw_lean.c's step for all layers of a model, in one launch a pass.
 *
 * A step is planned once and made many times. The layers handed to a plan are the core's own structs, in host memory, but
 * their pointers (numbers, moments, scalars, report, dh, and of the factors g, base, out) are device addresses. The plan
 * writes a table; the caller copies it to the device, and plans anew when a pointer or a size changes.
 *
 * Nothing here allocates, waits for the device or keeps a pointer. The functions that launch return a cudaError_t. */
#ifndef OPLORA_CUDA_ADAMW_LEAN_H
#define OPLORA_CUDA_ADAMW_LEAN_H

#include "../core/oplora_core.h"
#include "export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What launches need of a plan, in host memory. */
typedef struct {
    int64_t n_layers, n_parts, n_chunks;
    int64_t factors, first_part, first_chunk; /* bytes from the table's beginning */
    void *workspace;
    int only_defaults; /* every layer has weight_rank 2 and moment_rank 1 */
} oplora_cuda_lean_plan;

/* Bytes of the table, and of scratch on the device, aligned to 64; -1 for sizes that do not fit. */
OPLORA_CUDA_API int64_t oplora_cuda_lean_table_bytes(const oplora_lean_f32 *layers, int64_t n_layers);
OPLORA_CUDA_API int64_t oplora_cuda_lean_workspace_bytes(const oplora_lean_f32 *layers, int64_t n_layers);

/* `adamw`: on the device, the numbers of each layer's next step; the layers' own are not looked at. A step reads them
 * when it runs, and adds 1 to `step` of every layer if it was done: so it can be captured in a CUDA graph, and rates
 * change without a new plan. */
OPLORA_CUDA_API oplora_status oplora_cuda_lean_plan_layers(const oplora_lean_f32 *layers, int64_t n_layers,
                                                           oplora_adamw *adamw, void *workspace, void *table,
                                                           oplora_cuda_lean_plan *plan);

/* oplora_lean_start of every layer. */
OPLORA_CUDA_API int oplora_cuda_lean_start(const oplora_cuda_lean_plan *plan, const void *table, double latent_std,
                                           void *stream);

/* oplora_lean_measure and oplora_lean_step. Whether all gradients are finite is known on the device alone: if one is not,
 * every report's [0] and [1] say so and nothing else is changed, adamw.step included. */
OPLORA_CUDA_API int oplora_cuda_lean_measure(const oplora_cuda_lean_plan *plan, const void *table, void *stream);
OPLORA_CUDA_API int oplora_cuda_lean_step(const oplora_cuda_lean_plan *plan, const void *table, int measured,
                                          void *stream);

#ifdef __cplusplus
}
#endif
#endif
