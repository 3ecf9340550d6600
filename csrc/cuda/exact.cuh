/* What the rooms of adamw_exact.cu share, as csrc/core/exact.h: the layers as kernels see them. */
#ifndef OPLORA_EXACT_CUH
#define OPLORA_EXACT_CUH

#include "adamw_exact.h"
#include "hidden.cuh"
#include "tasks.cuh"

namespace exact {

constexpr int THREADS = 128, LANES = 16, GROUPS = THREADS / LANES; /* of dot in csrc/core/kernels.h */
constexpr int UNITS = THREADS / HIDDEN_LANES;
static_assert(HIDDEN_LANES == SQUARE_LANES, "units, and tasks of the squares, a block");

/* AdamW's constants for a tensor. */
using Constants = oplora_adamw_constants_f32;

/* For a factor's rows of W2 and of c2. */
struct Rates {
    Constants outer, bias;
};

struct Layer : PlannedLayer {
    int64_t H, Z, N;
    float *parameters, *exp_avg, *exp_avg_sq;
    double *decay;
    uint8_t *moving;
    double *report;
    float *h, *h_next, *d, *dz; /* scratch: (H) three times, (Z) */
    double *latent, *partial;   /* scratch: (Z); (tasks, H + 2): dh, ||g||^2, how many are not finite */
    Constants *hidden;          /* scratch: for z, W1, c1 */
    Rates *of_factors;          /* scratch: (factors) */
};

using Table = Model<Layer>;

using Task = FactorTask<Layer>;

__device__ inline double *partial_of(const Task &task) {
    return task.layer->partial + task.of_layer * (task.layer->H + 2);
}

__device__ inline float *W1_of(const Layer &l) { return l.parameters + l.H * l.N + l.N; }
__device__ inline float *c1_of(const Layer &l) { return W1_of(l) + l.H * l.Z; }
__device__ inline float *z_of(const Layer &l) { return c1_of(l) + l.H; }

} // namespace exact

#endif
