/* exact_hidden: the hidden path of adamw_exact.cu, as csrc/core/exact_hidden.c. By all THREADS threads of a block. */
#ifndef OPLORA_EXACT_HIDDEN_CUH
#define OPLORA_EXACT_HIDDEN_CUH

#include "exact.cuh"

namespace exact {

/* h by all threads, and a barrier. */
__device__ inline void find_hidden(const Layer &l, float *h, double *lanes) {
    for (int64_t base = 0; base < l.H; base += UNITS) {
        find_units<THREADS>(z_of(l), W1_of(l), c1_of(l), l.H, l.Z, base, lanes, h);
        __syncthreads();
    }
}

/* dz = W1^T d, in double and in the order of units. */
__device__ inline void find_latent(const Layer &l) {
    const double *const d = l.report + 3 + l.H;
    const float *const W1 = W1_of(l);
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) {
        double sum = 0;
        for (int64_t j = 0; j < l.H; j++)
            if (d[j] != 0) sum += d[j] * W1[j * l.Z + i];
        l.latent[i] = sum;
    }
    __syncthreads();
}

/* room: REPORT_ROOM numbers. */
constexpr int REPORT_ROOM = SUM_ROOM<2> + 3;
static_assert(REPORT_ROOM >= THREADS, "step_hidden takes it too");
__device__ inline void report_hidden(const Layer &l, double *room) {
    double *const h = l.report + 3, *const d = h + l.H;
    const int t = static_cast<int>(threadIdx.x);
    for (int64_t j = t; j < l.H; j += THREADS) {
        double sum = 0;
        h[j] = l.h[j];
        for (int64_t task = 0; l.h[j] != 0 && task < l.parts; task++) sum += l.partial[task * (l.H + 2) + j];
        d[j] = sum;
    }
    __syncthreads();
    find_latent(l);
    const float *const z = z_of(l);
    double *const sums = room + SUM_ROOM<2>;
    sum_in_order<THREADS>(
        room, 1, l.H, [&](int, int64_t j) { return d[j] * d[j]; }, [&](int, double sum) { sums[0] = sum; });
    sum_in_order<THREADS>(
        room, 2, l.Z,
        [&](int which, int64_t i) { return which ? l.latent[i] * l.latent[i] : static_cast<double>(z[i]) * z[i]; },
        [&](int which, double sum) { sums[1 + which] = sum; });
    if (t == 0) l.report[2] = sums[2] + sums[0] * (sums[1] + 1);
}

__device__ inline void adamw_at(const Layer &l, int64_t at, float gradient) {
    const oplora_adamw_entry_f32 next =
        oplora_adamw_step_f32(*l.hidden, gradient, l.parameters[at], l.exp_avg[at], l.exp_avg_sq[at]);
    l.exp_avg[at] = next.m;
    l.exp_avg_sq[at] = next.s;
    l.parameters[at] = next.p;
}

/* AdamW on z, W1 and c1 from the report's d, and the next h. */
__device__ inline void step_hidden(const Layer &l, int measured, double *lanes) {
    const double *const d = l.report + 3 + l.H;
    const int64_t W1 = W1_of(l) - l.parameters, c1 = c1_of(l) - l.parameters, z = z_of(l) - l.parameters;
    if (measured) find_latent(l);
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) l.dz[i] = oplora_narrowed_f32(l.latent[i]);
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) {
        l.h[j] = static_cast<float>(l.report[3 + j]);
        l.d[j] = oplora_narrowed_f32(d[j]);
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < l.H * l.Z; e += THREADS)
        adamw_at(l, W1 + e, l.d[e / l.Z] * l.parameters[z + e % l.Z]);
    __syncthreads(); /* W1's gradient is of the old z */
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) adamw_at(l, c1 + j, l.d[j]);
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) adamw_at(l, z + i, l.dz[i]);
    __syncthreads();
    find_hidden(l, l.h_next, lanes);
}

} // namespace exact

#endif
