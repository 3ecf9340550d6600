/* lean_rows: the two passes of adamw_lean.cu over the rows of a map, as csrc/core/lean_rows.c.
 *
 * A group of LANES threads takes BLOCK rows, thread l of it the rows l, l + LANES, ...: those are the lanes of the
 * core's sums and the rows whose random numbers one counter makes. GROUPS groups make a block of threads, which so takes a
 * chunk of the core's. Groups read 64 bytes at a time (32 of a bfloat16 column), whole sectors. */
#ifndef OPLORA_LEAN_ROWS_CUH
#define OPLORA_LEAN_ROWS_CUH

#include "lean.cuh"

namespace lean {

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % LANES; }
__device__ inline int group() { return static_cast<int>(threadIdx.x) / LANES; }

/* ---- sums over rows ---- */

/* Float sums of the LANES lanes of each group, for LANES columns at a time, and what becomes of them. */
struct Tile {
    float lanes[GROUPS][LANES][LANES + 1];
    double sums[GROUPS][LANES + 1];
};

/* Adds the groups' sums of `count` columns, which lie in tile.lanes[group][column], to where(column), times scale(column):
 * lanes in order, then blocks in order. All threads call it; the tile is free again afterwards. */
template <class Where, class Scale>
__device__ void add_tile(Tile &tile, int count, int blocks, const Where &where, const Scale &scale) {
    __syncthreads();
    double sum = 0;
    for (int l = 0; l < LANES && lane() < count; l++) sum += tile.lanes[group()][lane()][l];
    tile.sums[group()][lane()] = sum;
    __syncthreads();
    if (group() == 0 && lane() < count) {
        double *const total = where(lane());
        const double times = scale(lane());
        for (int block = 0; block < blocks; block++) *total += times * tile.sums[block][lane()];
    }
    __syncthreads();
}

__device__ inline int blocks_in(int64_t rows) { return static_cast<int>((rows + BLOCK - 1) / BLOCK); }

/* The rows of this thread in a chunk of n rows: i-th of BLOCK / LANES. */
__device__ inline int64_t row_of(int i) { return group() * BLOCK + i * LANES + lane(); }

/* row = 1 / (sqrt of the second moment's next row factor + eps); see lean_scale in csrc/core/kernels.h. */
__device__ inline float next_R(const Numbers &a, float R, float g) {
    return a.beta2 * R + (a.second > 0 ? a.second * (g * g) : 0.f);
}
__device__ inline float row_scale(const Numbers &a, float r) { return 1.f / (sqrtf(r) * a.inverse_root + a.eps_row); }

/* What a thread reads of one row. */
template <int D, int K> struct Row {
    float u[D], g;
    uint16_t A[K], R;

    __device__ void load(const Rows &r, float gradient, int64_t at, bool valid) {
        g = gradient;
        R = valid ? r.R[at] : uint16_t{0};
#pragma unroll
        for (int c = 0; c < D; c++) u[c] = valid && c < r.d ? r.U[c * r.rows + at] : 0.f;
#pragma unroll
        for (int c = 0; c < K; c++) A[c] = valid && c < r.k ? r.A[c * r.rows + at] : uint16_t{0};
    }

    /* [U, row A, row g] with the slots of ranks that are not used left zero */
    __device__ void basis(const Numbers &a, float row, float out[D + K + 1]) const {
#pragma unroll
        for (int c = 0; c < D; c++) out[c] = u[c];
#pragma unroll
        for (int c = 0; c < K; c++) out[D + c] = row * get_moment(A[c]);
        out[D + K] = a.second > 0 ? row * g : 0.f;
    }
};

/* Of vector a of the basis, d of which are U's. */
__device__ inline double scale_of(const Share &share, int a, int d) { return a < d ? share.kappa : share.rho; }

/* A pair's place among the sums, and its columns: of the Gram matrix, then U^T g, whose second column is p. */
struct Pair {
    int a, b, place;
};
__device__ inline Pair pair_at(int index, int p) {
    if (index >= p * (p + 1) / 2) {
        const int i = index - p * (p + 1) / 2;
        return {i, p, p * p + i};
    }
    int a = 0;
    for (; index > a; a++) index -= a + 1;
    return {a, index, a * p + index};
}

/* By which a factor's sums of a pair count. */
__device__ inline double scale_of_pair(const Share &share, int index, int p, int d) {
    const Pair pair = pair_at(index, p);
    return pair.b == p ? 1 : scale_of(share, pair.a, d) * scale_of(share, pair.b, d);
}

/* The Gram matrix's lower half and U^T g of a chunk, at the default ranks: twelve sums in one walk. */
__device__ inline void reduce_defaults(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n,
                                       Tile &tile, double *sums) {
    constexpr int SUMS = 12, BATCH = 4; /* of rows whose loads are under way together */
    const Numbers &a = *r.numbers;
    float s[SUMS] = {};
#pragma unroll 1
    for (int begin = 0; begin < BLOCK / LANES; begin += BATCH) {
        Row<2, 1> rows[BATCH];
        float x[BATCH];
        g.load_bounded(row_of(begin), LANES, n, x);
#pragma unroll
        for (int i = 0; i < BATCH; i++) rows[i].load(r, x[i], first + row_of(begin + i), row_of(begin + i) < n);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            float c[4];
            rows[i].basis(a, row_scale(a, next_R(a, get_moment(rows[i].R), rows[i].g)), c);
            s[0] += c[0] * c[0];
            s[1] += c[0] * c[1];
            s[2] += c[1] * c[1];
            s[3] += c[0] * c[2];
            s[4] += c[1] * c[2];
            s[5] += c[2] * c[2];
            s[6] += c[0] * c[3];
            s[7] += c[1] * c[3];
            s[8] += c[2] * c[3];
            s[9] += c[3] * c[3];
            s[10] += c[0] * rows[i].g;
            s[11] += c[1] * rows[i].g;
        }
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) tile.lanes[group()][i][lane()] = s[i];
    /* places 0, 4, 5, 8, 9, 10, 12 .. 17: the lower half of a matrix (4, 4), and two behind it */
    add_tile(
        tile, SUMS, blocks_in(n),
        [&](int i) {
            return sums + (i < 1 ? 0 : i < 3 ? i + 3 : i < 6 ? i + 5 : i + 6);
        },
        [&](int i) { return scale_of_pair(share, i, 4, 2); });
}

/* The same at any ranks, a pair of columns after the other: rows are read again for each. Column p stands for g. */
__device__ inline float basis_at(const Rows &r, const Numbers &a, const Gradient &g, int column, int64_t at,
                                 int64_t i) {
    const int p = basis_size(r.d, r.k);
    if (column < r.d) return r.U[column * r.rows + at];
    if (column == p) return g[i];
    const float row = row_scale(a, next_R(a, get_moment(r.R[at]), g[i]));
    if (column < r.d + r.k) return row * get_moment(r.A[(column - r.d) * r.rows + at]);
    return a.second > 0 ? row * g[i] : 0.f;
}

__device__ inline void reduce_pairs(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n,
                                    int begin, int end, Tile &tile, double *sums) {
    const Numbers &a = *r.numbers;
    const int p = basis_size(r.d, r.k);
    for (int base = begin; base < end; base += LANES) {
        const int count = end - base < LANES ? end - base : LANES;
        for (int c = 0; c < count; c++) {
            const Pair pair = pair_at(base + c, p);
            float sum = 0;
            for (int i = 0; i < BLOCK / LANES; i++) {
                const int64_t at = row_of(i);
                if (at < n)
                    sum += basis_at(r, a, g, pair.b, first + at, at) * basis_at(r, a, g, pair.a, first + at, at);
            }
            tile.lanes[group()][c][lane()] = sum;
        }
        add_tile(
            tile, count, blocks_in(n), [&](int c) { return sums + pair_at(base + c, p).place; },
            [&](int c) { return scale_of_pair(share, base + c, p, r.d); });
    }
}

template <bool DEFAULTS>
__device__ void reduce_chunk(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n, Tile &tile,
                             double *sums) {
    const int p = basis_size(r.d, r.k);
    if (DEFAULTS)
        reduce_defaults(r, share, g, first, n, tile, sums);
    else
        reduce_pairs(r, share, g, first, n, 0, p * (p + 1) / 2 + r.d, tile, sums);
}

/* U^T g alone. */
__device__ inline void reduce_along(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n,
                                    Tile &tile, double *sums) {
    const int p = basis_size(r.d, r.k);
    reduce_pairs(r, share, g, first, n, p * (p + 1) / 2, p * (p + 1) / 2 + r.d, tile, sums);
}

/* sums[j] += W0_j^T g over a chunk, in units of the bound, for units that are on: LANES units at a time. */
__device__ inline void random_reduce(const Layer &l, const Chunk &chunk, Tile &tile, double *sums) {
    const oplora_stream s = w2_stream(l, chunk.range);
    const Gradient gradient = gradient_of(*chunk.factor, chunk.entry);
    const uint64_t begin = static_cast<uint64_t>(chunk.entry + group() * BLOCK);
    const bool uniform = l.start == OPLORA_UNIFORM;
    constexpr int HALF = BLOCK / LANES / 2; /* rows at a time, as all of them are too many registers */
    for (int64_t base = 0; base < l.H; base += LANES) {
        const int count = l.H - base < LANES ? static_cast<int>(l.H - base) : LANES;
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            const uint64_t first = begin + static_cast<uint64_t>(half * HALF * LANES);
            uint4 words[HALF / 4];
            float g[HALF];
            gradient.load_bounded(row_of(half * HALF), LANES, chunk.rows, g);
            if (!uniform) {
#pragma unroll
                for (int b = 0; b < HALF / 4; b++)
                    words[b] = philox(s, first / 4 + static_cast<uint64_t>(b * LANES + lane()),
                                      static_cast<uint32_t>(base / 32));
            }
            for (int c = 0; c < count; c++) {
                float sum = half ? tile.lanes[group()][c][lane()] : 0.f;
                if (l.h[base + c] == 0) {
                    /* off: its sum is zero, and its numbers are not made */
                } else if (uniform) {
#pragma unroll
                    for (int b = 0; b < HALF / ROWS; b++) {
                        const uint4 eight = philox(s, first / 8 + static_cast<uint64_t>(b * LANES + lane()),
                                                   static_cast<uint32_t>(base + c));
#pragma unroll
                        for (int q = 0; q < ROWS; q++) sum += uniform_of(eight, q) * g[b * ROWS + q];
                    }
                } else {
                    const int bit = static_cast<int>((base + c) % 32);
#pragma unroll
                    for (int i = 0; i < HALF; i++) sum += signed_by(word_of(words[i / 4], i % 4), bit, g[i]);
                }
                tile.lanes[group()][c][lane()] = sum;
            }
        }
        add_tile(tile, count, blocks_in(chunk.rows), [&](int c) { return sums + base + c; }, [](int) { return 1.0; });
    }
}

/* ---- rows, one by one ---- */

/* out[i] += W0 x for the ROWS rows of this thread from `entry` (of its group) on; x (H) holds the bound. */
__device__ inline void random_update(const Layer &l, const oplora_stream &s, const float *x, uint64_t entry,
                                     float out[ROWS]) {
    if (l.start == OPLORA_UNIFORM) {
        for (int64_t j = 0; j < l.H; j++) {
            const float some = x[j];
            if (some == 0) continue;
            const uint4 eight = philox(s, entry / 8 + static_cast<uint64_t>(lane()), static_cast<uint32_t>(j));
#pragma unroll
            for (int q = 0; q < ROWS; q++) out[q] += some * uniform_of(eight, q);
        }
        return;
    }
    for (int64_t base = 0; base < l.H; base += 32) {
        const int count = l.H - base < 32 ? static_cast<int>(l.H - base) : 32;
        uint4 words[ROWS / 4];
#pragma unroll
        for (int b = 0; b < ROWS / 4; b++)
            words[b] =
                philox(s, entry / 4 + static_cast<uint64_t>(b * LANES + lane()), static_cast<uint32_t>(base / 32));
        for (int c = 0; c < count; c++) {
            const float some = x[base + c];
            if (some == 0) continue;
#pragma unroll
            for (int q = 0; q < ROWS; q++) out[q] += signed_by(word_of(words[q / 4], q % 4), c, some);
        }
    }
}

/* One row's step: the bias's AdamW on `out`, its moments, R, A and U; lean_update21 in csrc/core/kernels.h. */
template <int D, int K>
__device__ float update_row(const Rows &r, const Numbers &a, const Share &share, const Row<D, K> &old, float m_old,
                            float S_old, float out, float kept_part, int64_t at) {
    constexpr bool all = D == 2 && K == 1; /* every slot is used */
    const uint32_t noise = noise_of(static_cast<uint32_t>(at), a.key);
    const uint32_t other_noise = noise_of(static_cast<uint32_t>(at), a.round_key[0]);
    const float x = old.g, square = x * x, beta1 = 1 - a.beta1_rest;
    const float m_next = beta1 * m_old + a.beta1_rest * x;
    const float s_next = a.beta2 * S_old + a.beta2_rest * square;
    const float r_next = next_R(a, get_moment(old.R), x);
    const float step = share.rate * m_next / (sqrtf(s_next) * a.inverse_root + a.eps);
    float basis[D + K + 1];
    old.basis(a, row_scale(a, r_next), basis);
    float value = out - (1 - share.keep) * kept_part - step;
#pragma unroll
    for (int c = 0; c < D; c++)
        if (all || c < r.d) value += share.weight[c] * basis[c];
#pragma unroll
    for (int c = 0; c < K; c++)
        if (all || c < r.k) value += share.weight[r.d + c] * basis[D + c];
    value += share.weight[r.d + r.k] * basis[D + K];
#pragma unroll
    for (int i = 0; i < D; i++) {
        if (!all && i >= r.d) continue;
        float turned = all ? share.rotate_U[i][0] * basis[0] : 0.f;
#pragma unroll
        for (int c = all; c < D; c++)
            if (all || c < r.d) turned += share.rotate_U[i][c] * basis[c];
#pragma unroll
        for (int c = 0; c < K; c++)
            if (all || c < r.k) turned += share.rotate_U[i][r.d + c] * basis[D + c];
        turned += share.rotate_U[i][r.d + r.k] * basis[D + K];
        r.U[i * r.rows + at] = turned;
    }
#pragma unroll
    for (int i = 0; i < K; i++) {
        if (!all && i >= r.k) continue;
        float turned = all ? a.rotate_A[i][0] * get_moment(old.A[0]) : 0.f;
#pragma unroll
        for (int c = all; c < K; c++)
            if (all || c < r.k) turned += a.rotate_A[i][c] * get_moment(old.A[c]);
        turned += a.rotate_A[i][r.k] * x;
        const uint32_t bits = i ? noise_of(static_cast<uint32_t>(at), a.round_key[i]) : other_noise >> 16;
        r.A[i * r.rows + at] = put_moment(turned, bits);
    }
    r.m[at] = put_moment(m_next, noise);
    r.S[at] = put_moment(s_next, noise >> 16);
    r.R[at] = put_moment(r_next, other_noise);
    return value;
}

/* What a map's rows put out, from the first row on: also rounded, and with the base that they do not owe decay for. */
struct Output {
    float *out;
    const float *base;
    uint16_t *rounded;
    oplora_dtype dtype;
};
__device__ inline Output output_of(const Factor &f, int64_t entry) {
    return {f.out + entry, f.base ? f.base + entry : nullptr, f.rounded ? f.rounded + entry : nullptr, f.dtype};
}
/* What the step goes on from: of 16 bits the value before rounding, unless somebody wrote into the factor itself. */
__device__ inline float take(const Output &o, int64_t at) {
    const float value = o.out[at];
    if (!o.rounded) return value;
    const uint16_t bits = o.rounded[at];
    return to_half(value, o.dtype) == bits ? value : from_half(bits, o.dtype);
}
__device__ inline void put(const Output &o, int64_t at, float value) {
    o.out[at] = value;
    if (o.rounded) o.rounded[at] = to_half(value, o.dtype);
}

/* The rows first .. first + n of a map, n at most PART, by all threads. With x, what W0 adds to the rows' output too. */
template <bool DEFAULTS>
__device__ void update_chunk(const Rows &r, const Share &share, const Gradient &g, const Output &o, int64_t first,
                             int64_t n, const Layer &l, const oplora_stream *s, int64_t entry, const float *x) {
    constexpr int D = DEFAULTS ? 2 : RANK, K = DEFAULTS ? 1 : RANK;
    const Numbers &a = *r.numbers;
#pragma unroll 1
    for (int part = 0; part < BLOCK / SUB; part++) {
        float value[ROWS];
        if (group() * BLOCK + part * SUB >= n) break;
        if (DEFAULTS) { /* all loads of a thread's rows before its first store */
            Row<D, K> old[ROWS];
            float m[ROWS], S[ROWS], kept[ROWS], gradient[ROWS];
            g.load_bounded(row_of(part * ROWS), LANES, n, gradient);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = row_of(part * ROWS + i);
                const bool valid = at < n;
                old[i].load(r, gradient[i], first + at, valid);
                m[i] = valid ? get_moment(r.m[first + at]) : 0.f;
                S[i] = valid ? get_moment(r.S[first + at]) : 0.f;
                value[i] = valid ? take(o, at) : 0.f;
                kept[i] = valid && o.base ? value[i] - o.base[at] : value[i];
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = row_of(part * ROWS + i);
                if (at < n) value[i] = update_row(r, a, share, old[i], m[i], S[i], value[i], kept[i], first + at);
            }
        } else {
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = row_of(part * ROWS + i);
                value[i] = 0;
                if (at >= n) continue;
                Row<D, K> old;
                old.load(r, g[at], first + at, true);
                const float m = get_moment(r.m[first + at]), S = get_moment(r.S[first + at]), now = take(o, at);
                value[i] = update_row(r, a, share, old, m, S, now, o.base ? now - o.base[at] : now, first + at);
            }
        }
        if (x) random_update(l, *s, x, static_cast<uint64_t>(entry + group() * BLOCK + part * SUB), value);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int64_t at = row_of(part * ROWS + i);
            if (at < n) put(o, at, value[i]);
        }
    }
}

} // namespace lean

#endif
