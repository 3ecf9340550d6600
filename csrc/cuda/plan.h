/* What the states' steps have in common: a step is planned once and made many times.
 *
 * The layers handed to a plan are the core's own structs, in host memory, but their pointers are device addresses. The
 * plan writes a table of them, which the caller copies to the device, and plans anew when a pointer or a size changes.
 * Launches take the plan, the table on the device and the caller's stream (a cudaStream_t); they allocate nothing, do not
 * wait for the device, keep no pointer and return a cudaError_t.
 *
 * Rates and step counts are read from the device when a step runs, and the step adds 1 to each layer's count: so it can be
 * captured in a CUDA graph, and rates change without a new plan. On the device oplora_adamw's `step` is how many steps
 * were done. W2's start of a layer in lean state shrinks as its first random factor does: let all of them decay alike.
 * Whether all gradients are finite is known on the device alone: if one is not, every report's [0] and [1] say so and
 * nothing else is changed. */
#ifndef OPLORA_CUDA_PLAN_H
#define OPLORA_CUDA_PLAN_H

#include "../core/oplora_core.h"

#define OPLORA_CUDA_API __attribute__((visibility("default"))) /* all else in liboplora_cuda.so is hidden */

#ifdef __cplusplus
extern "C" {
#endif

/* Of the headers that this library and its caller share a hash, for which the build defines OPLORA_CUDA_INTERFACE: a library
 * that was built from others is not called. */
#ifndef OPLORA_CUDA_INTERFACE
#error "define OPLORA_CUDA_INTERFACE as setup.py and the Makefile do"
#endif
#define OPLORA_STRING_(token) #token
#define OPLORA_STRING(token) OPLORA_STRING_(token)
#define OPLORA_CUDA_HASH OPLORA_STRING(OPLORA_CUDA_INTERFACE)
OPLORA_CUDA_API const char *oplora_cuda_interface(void);

/* Whether CUDA can be called at all, a cudaError_t, and which CUDA the driver serves (0: there is none) and the library
 * was built with, as 1000 * major + 10 * minor. */
OPLORA_CUDA_API int oplora_cuda_ready(int *driver, int *runtime);

/* CUDA's sentence for a cudaError_t. */
OPLORA_CUDA_API const char *oplora_cuda_strerror(int error);

/* A factor that the model keeps in OPLORA_BF16 or OPLORA_F16: its gradient, and itself, which takes what the step makes,
 * rounded once. The core's struct beside it holds no gradient then; its `out` is the value before rounding, which lean
 * state and state rate go on from, and may be NULL in exact state. Every other dtype: the core's struct holds all. */
typedef struct {
    const uint16_t *g;
    uint16_t *out;
    oplora_dtype dtype;
} oplora_cuda_half;

/* On the device. A step or measurement writes `nonfinite`: whether it found NaN or infinity, or its `veto` (an int on the
 * device, or NULL) was set, which stands for gradients elsewhere. A step that is refused adds 1 to `refused`. */
typedef struct {
    int nonfinite, refused;
} oplora_cuda_verdict;

/* What launches need of a plan, in host memory. */
typedef struct {
    int64_t n_layers, n_parts, n_chunks;
    int64_t factors, chunk_factor, parts; /* bytes from the table's beginning */
    oplora_cuda_verdict *verdict;
    int only_defaults; /* lean: every layer has weight_rank 2 and moment_rank 1 */
} oplora_cuda_plan;

#ifdef __cplusplus
}
#endif
#endif
