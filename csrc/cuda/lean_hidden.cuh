/* lean_hidden: the hidden path of adamw_lean.cu, as csrc/core/lean_hidden.c. By all THREADS threads of a block. */
#ifndef OPLORA_LEAN_HIDDEN_CUH
#define OPLORA_LEAN_HIDDEN_CUH

#include "lean_solve.cuh"

namespace lean {

__device__ inline void find_hidden(const Layer &l, float *h) {
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) h[j] = l.pre[j] > 0 ? l.pre[j] : 0;
    __syncthreads();
}

/* l.d = dh in float, and dz = W1^T d into l.change; the report's numbers of the hidden path. */
__device__ inline void report_hidden(const Layer &l, Small &s) {
    const oplora_stream stream = w1_stream(l);
    const Rows &r = l.hidden.rows;
    const double bound = l.w1_bound * *l.hidden.scale;
    const int t = static_cast<int>(threadIdx.x);
    for (int64_t j = t; j < l.H; j += THREADS) l.d[j] = oplora_narrowed_f32(l.dh[j]);
    sum_terms(
        s.room, r.d, l.H,
        [&](int i, int64_t j) { return l.dh[j] != 0 ? static_cast<double>(r.U[i * l.H + j]) * l.dh[j] : 0; },
        [&](int i, double sum) { s.now[i] = sum; });
    sum_terms(
        s.room, 3, l.H,
        [&](int which, int64_t j) {
            return which == 0 ? l.dh[j] * l.dh[j] : which == 1 ? square(l.h[j]) : l.h[j] != 0;
        },
        [&](int which, double sum) { *(which == 0 ? s.number : l.report + 2 + which) = sum; });
    sum_terms(
        s.room, 1, l.Z, [&](int, int64_t i) { return square(l.z[i]); }, [&](int, double sum) { s.number[1] = sum; });
    for (int64_t first = static_cast<int64_t>(group()) * SUB; first < l.Z; first += GROUPS * SUB) {
        float dz[ROWS] = {};
        for (int64_t j = 0; j < l.H; j++) {
            if (l.dh[j] == 0) continue;
            const float coefficient = oplora_narrowed_f32(bound * l.dh[j]);
            const oplora_words eight =
                oplora_stream_words(stream, static_cast<uint64_t>(first / 8 + lane()), static_cast<uint32_t>(j));
#pragma unroll
            for (int q = 0; q < ROWS; q++) dz[q] += coefficient * uniform_of(eight, q);
        }
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            const int64_t i = first + q * LANES + lane();
            if (i >= l.Z) continue;
            double sum = dz[q];
            for (int a = 0; a < r.d; a++) sum += static_cast<double>(l.hidden.Q[a * l.Z + i]) * s.now[a];
            l.change[i] = oplora_narrowed_f32(sum);
            l.hidden.K[i] = sum * sum; /* scratch until prepare_map fills it */
        }
    }
    __syncthreads();
    sum_terms(
        s.room, 1, l.Z, [&](int, int64_t i) { return l.hidden.K[i]; },
        [&](int, double sum) { l.report[2] = sum + s.number[0] * (s.number[1] + 1); });
}

/* W1's start times x (Z), row j, by one group of threads; lanes[] holds LANES numbers of the group's own. */
__device__ inline void w1_dot(const Layer &l, int64_t j, const float *x, float *lanes) {
    const oplora_stream s = w1_stream(l);
    float sum = 0;
    for (int64_t first = 0; first < l.Z && j < l.H; first += SUB) {
        const oplora_words eight =
            oplora_stream_words(s, static_cast<uint64_t>(first / 8 + lane()), static_cast<uint32_t>(j));
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            const int64_t i = first + q * LANES + lane();
            sum += uniform_of(eight, q) * (i < l.Z ? x[i] : 0.f);
        }
    }
    lanes[lane()] = sum;
}

/* For every unit: use(j, W1's start times x), in double; by all threads. */
template <class Use> __device__ void for_w1_dots(const Layer &l, const float *x, Tile &tile, const Use &use) {
    for (int64_t base = 0; base < l.H; base += GROUPS) {
        const int64_t j = base + group();
        w1_dot(l, j, x, tile.lanes[group()][0]);
        __syncthreads();
        if (lane() == 0 && j < l.H) {
            double sum = 0;
            for (int i = 0; i < LANES; i++) sum += tile.lanes[group()][0][i];
            use(j, sum);
        }
        __syncthreads();
    }
}

/* The hidden path before its truncation ... */
template <bool DEFAULTS> __device__ void begin_hidden(const Layer &l, Small &s, Tile &tile) {
    const oplora_adamw &a = *l.adamw;
    const Map &map = l.hidden;
    const int t = static_cast<int>(threadIdx.x);
    report_hidden(l, s);
    sum_terms(
        s.room, 1, l.H, [&](int, int64_t j) { return square(l.d[j]); }, [&](int, double sum) { s.number[2] = sum; });
    const double square_d = s.number[2];
    if (t == 0) {
        Share &share = *map.rows.shares;
        map.steps[0] = map.steps[3] = 1 - a.hidden_lr * a.weight_decay;
        map.steps[1] = a.hidden_lr / l.corrections[0];
        share.kappa = share.rho = 1;
        share.constants.keep = static_cast<float>(map.steps[0]);
        share.constants.rate = static_cast<float>(map.steps[1]);
    }
    __syncthreads();
    prepare_map(map, l.z, square_d, a, oplora_rounding_key(l.seed, l.layer, a.step + 1, 1), l.corrections, s.number,
                s.room);
    for (int i = t; i < oplora_lean_sums(map.rows.d, map.rows.k); i += THREADS) map.sums[i] = 0;
    __syncthreads();
    for (int64_t j = 0; j < l.H; j += CHUNK)
        reduce_chunk<DEFAULTS>(map.rows, *map.rows.shares, {l.d + j, OPLORA_F32}, j, l.H - j < CHUNK ? l.H - j : CHUNK,
                               tile, map.sums);
}

/* AdamW on z, from l.change. */
__device__ inline void step_latent(const Layer &l) {
    const oplora_lean_constants_f32 &c = l.hidden.rows.step->constants;
    const oplora_lean_constants_f32 &own = l.hidden.rows.shares->constants;
    const oplora_adamw_constants_f32 a = {c.beta1_rest, c.beta2, c.beta2_rest,  own.keep,
                                          own.rate,     c.eps,   c.inverse_root};
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) {
        const oplora_adamw_entry_f32 next = oplora_adamw_step_f32(a, l.change[i], l.z[i], l.z_avg[i], l.z_avg_sq[i]);
        l.z_next[i] = next.p;
        l.z_avg[i] = next.m;
        l.z_avg_sq[i] = next.s;
    }
    __syncthreads();
}

/* ... and after it: W1 z + c1, z, and the next h. */
template <bool DEFAULTS> __device__ void finish_hidden(const Layer &l, Tile &tile) {
    const Map &map = l.hidden;
    const int t = static_cast<int>(threadIdx.x);
    const double bound = l.w1_bound * map.steps[3] * *map.scale;
    for (int64_t i = t; i < l.Z; i += THREADS)
        l.change[i] = static_cast<float>(bound * (static_cast<double>(l.z_next[i]) - l.z[i]));
    for (int64_t j = 0; j < l.H; j += CHUNK)
        update_chunk<DEFAULTS>(map.rows, *map.rows.shares, {l.d + j, OPLORA_F32},
                               {l.pre + j, nullptr, nullptr, OPLORA_F32}, j, l.H - j < CHUNK ? l.H - j : CHUNK, l,
                               nullptr, 0, nullptr);
    __syncthreads();
    for_w1_dots(l, l.change, tile, [&](int64_t j, double sum) { l.pre[j] += static_cast<float>(sum); });
    for (int64_t i = t; i < l.Z; i += THREADS) l.z[i] = l.z_next[i];
    if (t == 0) *map.scale *= map.steps[3];
    find_hidden(l, l.h_next);
}

} // namespace lean

#endif
