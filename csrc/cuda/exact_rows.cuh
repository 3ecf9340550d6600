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
    if (f.rounded) write_rounded<COUNT>(f.rounded + task.offset + n, f.dtype, value);
}

/* What a column is in a step, for all rows of a task. */
enum Kind { MOVES, WAKES, STAYS };
struct Column {
    float h, h_next, owed; /* owed to weight decay where it wakes */
    int kind;
};
constexpr int COLUMNS = THREADS; /* in shared memory at a time */

__device__ inline Column column_at(const Task &task, const Constants &outer, int64_t j) {
    const Layer &l = *task.layer;
    const float h = l.h[j], h_next = l.h_next[j];
    if (h != 0 || l.moving[j]) return {h, h_next, 1, MOVES};
    const double decay = l.decay[task.index * l.H + j];
    return {h, h_next, static_cast<float>(decay * outer.keep), h_next != 0 ? WAKES : STAYS};
}

/* COUNT entries of the parameters and of their moments. */
struct Entries {
    float *p, *m, *s;
};

/* AdamW on COUNT entries whose gradient is h g; v += h_next times what they become. */
template <int COUNT>
__device__ void update_entries(const Entries &e, const Constants &a, const Some<COUNT> &g, float h, float h_next,
                               Some<COUNT> &v) {
    Some<COUNT> p = at<COUNT>(e.p), m = at<COUNT>(e.m), s = at<COUNT>(e.s);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const oplora_adamw_entry_f32 next =
            oplora_adamw_step_f32(a, h * g.value[k], p.value[k], m.value[k], s.value[k]);
        p.value[k] = next.p, m.value[k] = next.m, s.value[k] = next.s;
        if (h_next != 0) v.value[k] += h_next * next.p;
    }
    at<COUNT>(e.m) = m;
    at<COUNT>(e.s) = s;
    at<COUNT>(e.p) = p;
}

/* The same of a column that is on again: what it owes to weight decay is paid now. */
template <int COUNT> __device__ void wake_entries(float *at_p, const Column &column, Some<COUNT> &v) {
    Some<COUNT> p = at<COUNT>(at_p);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        if (column.owed != 1) p.value[k] *= column.owed;
        v.value[k] += column.h_next * p.value[k];
    }
    if (column.owed != 1) at<COUNT>(at_p) = p;
}

template <int COUNT> __device__ void update_rows(const Task &task, Column *columns) {
    const Layer &l = *task.layer;
    const Constants outer = l.of_factors[task.index].outer;
    const int64_t N = l.N, H = l.H;
    const uint32_t rows = static_cast<uint32_t>(task.count);
    for (uint32_t base = 0; base < rows; base += THREADS * COUNT) {
        const uint32_t n = base + threadIdx.x * COUNT;
        const bool is_there = n < rows;
        Some<COUNT> g = {}, v = {};
        if (is_there) {
            const int64_t c2 = H * N + task.row + n;
            g = gradient_at<COUNT>(gradient_of(*task.factor, task.offset), n);
            update_entries<COUNT>({l.parameters + c2, l.exp_avg + c2, l.exp_avg_sq + c2}, l.of_factors[task.index].bias,
                                  g, 1, 1, v);
        }
        Entries e = {l.parameters + task.row + n, l.exp_avg + task.row + n, l.exp_avg_sq + task.row + n};
        for (int64_t first = 0; first < H; first += COLUMNS) {
            const int count = H - first < COLUMNS ? static_cast<int>(H - first) : COLUMNS;
            if (base == 0 || H > COLUMNS) { /* else they are there */
                __syncthreads();
                if (static_cast<int>(threadIdx.x) < count)
                    columns[threadIdx.x] = column_at(task, outer, first + threadIdx.x);
                __syncthreads();
            }
            if (!is_there) continue;
#pragma unroll 1
            for (int j = 0; j < count; j++, e.p += N, e.m += N, e.s += N) {
                const Column column = columns[j];
                if (column.kind == MOVES)
                    update_entries<COUNT>(e, outer, g, column.h, column.h_next, v);
                else if (column.kind == WAKES)
                    wake_entries<COUNT>(e.p, column, v);
            }
        }
        if (is_there) write_factor<COUNT>(task, n, v);
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
