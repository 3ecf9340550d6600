/* tasks: the tasks of exact state and state rate, TASK_ROWS rows of one factor, and how their entries are loaded. A plan's
 * chunks and parts are its tasks. */
#ifndef OPLORA_TASKS_CUH
#define OPLORA_TASKS_CUH

#include "../shared/tasks.h"
#include "model.cuh"

template <class Layer> struct FactorTask {
    const Layer *layer;
    const Factor *factor;
    int64_t index, of_layer;    /* of the factor in its layer; of the task in its layer */
    int64_t row, offset, count; /* first row in the layer, first entry in the factor, entries */
};

template <class Layer> __device__ FactorTask<Layer> task_at(const Model<Layer> &t, int64_t task) {
    const Factor &f = t.factor_of(task);
    const Layer &l = t.layers[f.layer];
    const int64_t most = TASK_ROWS, offset = (task - f.first_chunk) * most, left = f.rows - offset;
    return {&l, &f, f.index, task - l.first_chunk, f.first_row + offset, offset, left < most ? left : most};
}

/* On the host, of a layer of the core's. */
template <class CoreLayer> int64_t tasks_of(const CoreLayer &l) {
    int64_t tasks = 0;
    for (int64_t f = 0; f < l.n_factors; f++) tasks += tasks_in(l.factors[f].rows);
    return tasks;
}

/* COUNT neighbouring entries, which one load brings. */
template <int COUNT> struct alignas(COUNT * sizeof(float)) Some {
    float value[COUNT];
};
template <int COUNT> struct alignas(COUNT * sizeof(uint16_t)) Halves {
    uint16_t value[COUNT];
};
template <int COUNT> __device__ Some<COUNT> &at(float *p) { return *reinterpret_cast<Some<COUNT> *>(p); }
template <int COUNT> __device__ const Some<COUNT> &at(const float *p) {
    return *reinterpret_cast<const Some<COUNT> *>(p);
}
template <int COUNT> __device__ Halves<COUNT> &at(uint16_t *p) { return *reinterpret_cast<Halves<COUNT> *>(p); }
template <int COUNT> __device__ const Halves<COUNT> &at(const uint16_t *p) {
    return *reinterpret_cast<const Halves<COUNT> *>(p);
}

/* COUNT entries of a gradient, as steps take them. */
template <int COUNT> __device__ Some<COUNT> gradient_at(const Gradient &from, uint32_t n) {
    Some<COUNT> g;
    if (from.dtype == OPLORA_F32) {
        g = at<COUNT>(static_cast<const float *>(from.at) + n);
    } else {
        const Halves<COUNT> bits = at<COUNT>(static_cast<const uint16_t *>(from.at) + n);
#pragma unroll
        for (int k = 0; k < COUNT; k++) g.value[k] = from_half(bits.value[k], from.dtype);
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) g.value[k] = oplora_bounded_f32(g.value[k]);
    return g;
}

/* COUNT entries of a factor of 16 bits, rounded from their values. */
template <int COUNT> __device__ void write_rounded(uint16_t *to, oplora_dtype dtype, const Some<COUNT> &value) {
    Halves<COUNT> rounded;
#pragma unroll
    for (int k = 0; k < COUNT; k++) rounded.value[k] = to_half(value.value[k], dtype);
    at<COUNT>(to) = rounded;
}

/* Bits that are 0 modulo 16 where vectors of four entries from `entry` on are aligned, of a factor's tensors. */
static __device__ __forceinline__ uintptr_t alignment_of(const Factor &f, int64_t entry) {
    uintptr_t bits = 0;
    for (const float *p : {static_cast<const float *>(f.out), f.base})
        if (p) bits |= reinterpret_cast<uintptr_t>(p + entry);
    const uintptr_t g = reinterpret_cast<uintptr_t>(gradient_of(f, entry).at);
    return bits | (f.dtype == OPLORA_F32 ? g : 2 * g | 2 * reinterpret_cast<uintptr_t>(f.rounded + entry));
}

#endif
