/* exact_rows: the second pass of adamw_exact.cu over the rows of W2, as csrc/core/exact_rows.c, and generating alone. */
#ifndef OPLORA_EXACT_ROWS_CUH
#define OPLORA_EXACT_ROWS_CUH

#include "exact.cuh"

namespace exact {

/* Whether a task's rows are aligned to their vectors wherever they lie, and whole. */
__device__ inline bool is_aligned(const Task &task) {
    const Layer &l = *task.layer;
    uintptr_t bits = alignment_of(*task.factor, task.offset);
    for (const float *p : {l.parameters, l.exp_avg, l.exp_avg_sq}) bits |= reinterpret_cast<uintptr_t>(p + task.row);
    return bits % 16 == 0 && l.N % 4 == 0 && task.count % 4 == 0;
}

template <int COUNT> __device__ void write_factor(const Task &task, int64_t n, const Some<COUNT> &v) {
    const Factor &f = *task.factor;
    Some<COUNT> value = v;
    if (f.base) {
        const Some<COUNT> base = at<COUNT>(f.base + task.offset + n);
#pragma unroll
        for (int k = 0; k < COUNT; k++) value.value[k] = base.value[k] + v.value[k];
    }
    if (f.out) at<COUNT>(f.out + task.offset + n) = value;
    if (f.rounded) write_rounded<COUNT>(f, task.offset + n, value);
}

/* AdamW on COUNT entries of a column whose gradient is h g; v += h_next times what they become. */
template <int COUNT>
__device__ void update_entries(const Layer &l, const Constants &a, int64_t index, const Some<COUNT> &g, float h,
                               float h_next, Some<COUNT> &v) {
    Some<COUNT> p = at<COUNT>(l.parameters + index), m = at<COUNT>(l.exp_avg + index);
    Some<COUNT> s = at<COUNT>(l.exp_avg_sq + index);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const oplora_adamw_entry_f32 next =
            oplora_adamw_step_f32(a, h * g.value[k], p.value[k], m.value[k], s.value[k]);
        p.value[k] = next.p, m.value[k] = next.m, s.value[k] = next.s;
        if (h_next != 0) v.value[k] += h_next * next.p;
    }
    at<COUNT>(l.exp_avg + index) = m;
    at<COUNT>(l.exp_avg_sq + index) = s;
    at<COUNT>(l.parameters + index) = p;
}

template <int COUNT> __device__ void update_rows(const Task &task) {
    const Layer &l = *task.layer; /* held by value it takes 88 registers for 72: 5 blocks under way, not 7 */
    const Constants outer = l.of_factors[task.index].outer, bias = l.of_factors[task.index].bias;
    const double *const decay = l.decay + task.index * l.H;
    for (int64_t n = static_cast<int64_t>(threadIdx.x) * COUNT; n < task.count; n += THREADS * COUNT) {
        const Some<COUNT> g = gradient_at<COUNT>(*task.factor, task.offset + n);
        Some<COUNT> v = {};
        update_entries<COUNT>(l, bias, l.H * l.N + task.row + n, g, 1, 1, v);
        for (int64_t j = 0; j < l.H; j++) {
            const int64_t index = j * l.N + task.row + n;
            const float h = l.h[j], h_next = l.h_next[j];
            if (h != 0 || l.moving[j]) {
                update_entries<COUNT>(l, outer, index, g, h, h_next, v);
            } else if (h_next != 0) { /* it wakes: what it owes to weight decay is paid now */
                const float owed = static_cast<float>(decay[j] * outer.keep);
                Some<COUNT> p = at<COUNT>(l.parameters + index);
#pragma unroll
                for (int k = 0; k < COUNT; k++) {
                    if (owed != 1) p.value[k] *= owed;
                    v.value[k] += h_next * p.value[k];
                }
                if (owed != 1) at<COUNT>(l.parameters + index) = p;
            }
        }
        write_factor<COUNT>(task, n, v);
    }
}

template <int COUNT> __device__ void generate_rows(const Task &task) {
    const Layer &l = *task.layer;
    for (int64_t n = static_cast<int64_t>(threadIdx.x) * COUNT; n < task.count; n += THREADS * COUNT) {
        Some<COUNT> v = {};
        const Some<COUNT> c2 = at<COUNT>(l.parameters + l.H * l.N + task.row + n);
#pragma unroll
        for (int k = 0; k < COUNT; k++) v.value[k] += c2.value[k];
        for (int64_t j = 0; j < l.H; j++) {
            const float h = l.h[j];
            if (h == 0) continue;
            const Some<COUNT> column = at<COUNT>(l.parameters + j * l.N + task.row + n);
#pragma unroll
            for (int k = 0; k < COUNT; k++) v.value[k] += h * column.value[k];
        }
        write_factor<COUNT>(task, n, v);
    }
}

} // namespace exact

#endif
