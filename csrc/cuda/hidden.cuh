/* hidden: h = ReLU(W1 z + c1) on the device, with the bits of csrc/core/hidden.c: every product and sum in double, in
 * dot_double's eight lanes. */
#ifndef OPLORA_HIDDEN_CUH
#define OPLORA_HIDDEN_CUH

#include "device.h"

constexpr int HIDDEN_LANES = 8;

/* The units from `base` on, one for every HIDDEN_LANES of the THREADS threads, all of which call it.
 * lanes: THREADS numbers of shared memory, free again after the next barrier. */
template <int THREADS, class T>
__device__ void find_units(const T *z, const T *W1, const T *c1, int64_t H, int64_t Z, int64_t base, double *lanes,
                           T *h) {
    const int t = static_cast<int>(threadIdx.x), l = t % HIDDEN_LANES;
    const int64_t j = base + t / HIDDEN_LANES;
    double sum = 0;
    for (int64_t i = l; i < Z && j < H; i += HIDDEN_LANES) sum += static_cast<double>(W1[j * Z + i]) * z[i];
    lanes[t] = sum;
    __syncthreads();
    if (l != 0 || j >= H) return;
    sum = 0;
    for (int k = 0; k < HIDDEN_LANES; k++) sum += lanes[t + k];
    const T pre = static_cast<T>(sum + c1[j]);
    h[j] = pre <= 0 ? 0 : pre; /* NaN stays */
}

#endif
