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

/* Two moments as they are stored, in one register: a thread has eight rows under way. */
struct Two {
    uint32_t bits;

    __device__ float low() const { return oplora_get_f32(static_cast<uint16_t>(bits)); }
    __device__ float high() const { return oplora_get_f32(static_cast<uint16_t>(bits >> 16)); }
};
__device__ inline Two load_two(const uint16_t *low, const uint16_t *high, int64_t at, bool valid) {
    return {valid ? low[at] | static_cast<uint32_t>(high[at]) << 16 : 0u};
}

/* What a thread reads of one row in the first pass, at the default ranks: d = 2, k = 1. */
struct Row21 {
    float u0, u1, g;
    Two R_A;
};
__device__ inline Row21 load_row(const Rows &r, float g, int64_t at, bool valid) {
    return {valid ? r.U[at] : 0.f, valid ? r.U[r.rows + at] : 0.f, g, load_two(r.R, r.A, at, valid)};
}

__device__ inline float scale_at(const oplora_lean_constants_f32 &a, float R, float g) {
    return oplora_lean_scale_f32(a, oplora_lean_next_R_f32(a, R, g * g));
}

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
    const oplora_lean_constants_f32 a = r.step->constants;
    float s[SUMS] = {};
#pragma unroll 1
    for (int begin = 0; begin < BLOCK / LANES; begin += BATCH) {
        Row21 rows[BATCH];
        float x[BATCH];
        g.load_bounded(row_of(begin), LANES, n, x);
#pragma unroll
        for (int i = 0; i < BATCH; i++) rows[i] = load_row(r, x[i], first + row_of(begin + i), row_of(begin + i) < n);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const Row21 row = rows[i];
            const float scale = scale_at(a, row.R_A.low(), row.g), scaled_A = scale * row.R_A.high();
            const float scaled_g = oplora_lean_scaled_f32(a, scale, row.g);
            s[0] += row.u0 * row.u0;
            s[1] += row.u0 * row.u1;
            s[2] += row.u1 * row.u1;
            s[3] += row.u0 * scaled_A;
            s[4] += row.u1 * scaled_A;
            s[5] += scaled_A * scaled_A;
            s[6] += row.u0 * scaled_g;
            s[7] += row.u1 * scaled_g;
            s[8] += scaled_A * scaled_g;
            s[9] += scaled_g * scaled_g;
            s[10] += row.u0 * row.g;
            s[11] += row.u1 * row.g;
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
__device__ inline float basis_at(const Rows &r, const oplora_lean_constants_f32 &a, const Gradient &g, int column,
                                 int64_t at, int64_t i) {
    const int p = oplora_lean_basis(r.d, r.k);
    if (column < r.d) return r.U[column * r.rows + at];
    if (column == p) return g[i];
    const float scale = scale_at(a, oplora_get_f32(r.R[at]), g[i]);
    if (column < r.d + r.k) return scale * oplora_get_f32(r.A[(column - r.d) * r.rows + at]);
    return oplora_lean_scaled_f32(a, scale, g[i]);
}

__device__ inline void reduce_pairs(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n,
                                    int begin, int end, Tile &tile, double *sums) {
    const oplora_lean_constants_f32 a = r.step->constants;
    const int p = oplora_lean_basis(r.d, r.k);
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
    const int p = oplora_lean_basis(r.d, r.k);
    if (DEFAULTS)
        reduce_defaults(r, share, g, first, n, tile, sums);
    else
        reduce_pairs(r, share, g, first, n, 0, p * (p + 1) / 2 + r.d, tile, sums);
}

/* U^T g alone. */
__device__ inline void reduce_along(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n,
                                    Tile &tile, double *sums) {
    const int p = oplora_lean_basis(r.d, r.k);
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
            oplora_words words[HALF / 4];
            float g[HALF];
            gradient.load_bounded(row_of(half * HALF), LANES, chunk.rows, g);
            if (!uniform) {
#pragma unroll
                for (int b = 0; b < HALF / 4; b++)
                    words[b] = oplora_stream_words(s, first / 4 + static_cast<uint64_t>(b * LANES + lane()),
                                                   static_cast<uint32_t>(base / OPLORA_SIGNS));
            }
            for (int c = 0; c < count; c++) {
                float sum = half ? tile.lanes[group()][c][lane()] : 0.f;
                if (l.h[base + c] == 0) {
                    /* off: its sum is zero, and its numbers are not made */
                } else if (uniform) {
#pragma unroll
                    for (int b = 0; b < HALF / ROWS; b++) {
                        const oplora_words eight = oplora_stream_words(
                            s, first / 8 + static_cast<uint64_t>(b * LANES + lane()), static_cast<uint32_t>(base + c));
#pragma unroll
                        for (int q = 0; q < ROWS; q++) sum += uniform_of(eight, q) * g[b * ROWS + q];
                    }
                } else {
                    const int bit = static_cast<int>((base + c) % OPLORA_SIGNS);
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
            const oplora_words eight =
                oplora_stream_words(s, entry / 8 + static_cast<uint64_t>(lane()), static_cast<uint32_t>(j));
#pragma unroll
            for (int q = 0; q < ROWS; q++) out[q] += some * uniform_of(eight, q);
        }
        return;
    }
    for (int64_t base = 0; base < l.H; base += OPLORA_SIGNS) {
        const int count = l.H - base < OPLORA_SIGNS ? static_cast<int>(l.H - base) : OPLORA_SIGNS;
#pragma unroll
        for (int b = 0; b < ROWS / 4; b++) {
            const oplora_words words = oplora_stream_words(s, entry / 4 + static_cast<uint64_t>(b * LANES + lane()),
                                                           static_cast<uint32_t>(base / OPLORA_SIGNS));
#pragma unroll 1
            for (int four = 0; four < count; four += 4)
                add_four(words, x + base, four, four + 4 < count ? four + 4 : count, out + 4 * b);
        }
    }
}

/* One row's step at any ranks: all of it but the output, which it returns. `grown` is the output beyond its base. */
__device__ inline float update_row(const Rows &r, const MapStep &step, const Share &share, float g, float out,
                                   float grown, int64_t at) {
    const oplora_lean_constants_f32 a = share.constants;
    const oplora_lean_bias_f32 next = oplora_lean_bias_step_f32(a, g, oplora_get_f32(r.m[at]), oplora_get_f32(r.S[at]),
                                                                oplora_get_f32(r.R[at]), out, grown);
    const float scale = oplora_lean_scale_f32(a, next.R), scaled_g = oplora_lean_scaled_f32(a, scale, g);
    float u[RANK], A[RANK], value = next.out;
#pragma unroll
    for (int c = 0; c < RANK; c++) u[c] = c < r.d ? r.U[c * r.rows + at] : 0.f;
#pragma unroll
    for (int c = 0; c < RANK; c++) A[c] = c < r.k ? oplora_get_f32(r.A[c * r.rows + at]) : 0.f;
    const auto combined = [&](float sum, const float *weight) {
#pragma unroll
        for (int c = 0; c < RANK; c++)
            if (c < r.d) sum += weight[c] * u[c];
#pragma unroll
        for (int c = 0; c < RANK; c++)
            if (c < r.k) sum += weight[r.d + c] * (scale * A[c]);
        return sum + weight[r.d + r.k] * scaled_g;
    };
    value = combined(value, share.weight);
    for (int i = 0; i < r.d; i++) r.U[i * r.rows + at] = combined(0.f, share.rotate_U[i]);
    const uint32_t row = static_cast<uint32_t>(at), noise = oplora_noise(row, a.key);
    const uint32_t other_noise = oplora_noise(row, step.round_key[0]);
    for (int i = 0; i < r.k; i++) {
        float turned = 0.f;
#pragma unroll
        for (int c = 0; c < RANK; c++)
            if (c < r.k) turned += step.rotate_A[i][c] * A[c];
        turned += step.rotate_A[i][r.k] * g;
        r.A[i * r.rows + at] = oplora_put_f32(turned, i ? oplora_noise(row, step.round_key[i]) : other_noise >> 16);
    }
    r.m[at] = oplora_put_f32(next.m, noise);
    r.S[at] = oplora_put_f32(next.S, noise >> 16);
    r.R[at] = oplora_put_f32(next.R, other_noise);
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
__device__ inline float value_at(const Output &o, int64_t at) {
    const float value = o.out[at];
    if (!o.rounded) return value;
    const uint16_t bits = o.rounded[at];
    return to_half(value, o.dtype) == bits ? value : from_half(bits, o.dtype);
}
__device__ inline void put(const Output &o, int64_t at, float value) {
    o.out[at] = value;
    if (o.rounded) o.rounded[at] = to_half(value, o.dtype);
}

/* The rows of a thread in part `part` of a block, at most ROWS below n, at the default ranks. All that the step needs is
 * held in registers, and all loads go before the first store. Row 0 is the map's row `first`. */
__device__ inline void update_defaults(const Rows &r, const oplora_lean_turn21_f32 &turn, const Gradient &g,
                                       const Output &o, int64_t first, int64_t n, int part, float (&value)[ROWS]) {
    Row21 old[ROWS];
    Two m_S[ROWS];
    float x[ROWS], grown[ROWS];
    g.load_bounded(row_of(part * ROWS), LANES, n, x);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int64_t at = row_of(part * ROWS + i);
        const bool valid = at < n;
        old[i] = load_row(r, x[i], first + at, valid);
        m_S[i] = load_two(r.m, r.S, first + at, valid);
        value[i] = valid ? value_at(o, at) : 0.f;
        grown[i] = valid && o.base ? value[i] - o.base[at] : value[i];
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (row_of(part * ROWS + i) >= n) continue;
        const int64_t at = first + row_of(part * ROWS + i);
        const oplora_lean_bias_f32 bias = {m_S[i].low(), m_S[i].high(), old[i].R_A.low(), value[i]};
        const oplora_lean_row21_f32 row = {old[i].u0, old[i].u1, old[i].R_A.high(), bias};
        const oplora_lean_row21_f32 next = oplora_lean_step21_f32(turn, old[i].g, row, grown[i]);
        const uint32_t key = turn.constants.key, noise = oplora_noise(static_cast<uint32_t>(at), key);
        const uint32_t other_noise = oplora_noise(static_cast<uint32_t>(at), oplora_other_key(key));
        value[i] = next.bias.out;
        r.U[at] = next.u0;
        r.U[r.rows + at] = next.u1;
        r.A[at] = oplora_put_f32(next.A, other_noise >> 16);
        r.m[at] = oplora_put_f32(next.bias.m, noise);
        r.S[at] = oplora_put_f32(next.bias.S, noise >> 16);
        r.R[at] = oplora_put_f32(next.bias.R, other_noise);
    }
}

/* The rows first .. first + n of a map, n at most CHUNK, by all threads. With x, what W0 adds to the rows' output too. */
template <bool DEFAULTS>
__device__ void update_chunk(const Rows &rows, const Share &share, const Gradient &g, const Output &o, int64_t first,
                             int64_t n, const Layer &l, const oplora_stream *s, int64_t entry, const float *x) {
    const Rows r = rows; /* stores would have it read again for every row */
    const oplora_lean_turn21_f32 turn = share.defaults;
#pragma unroll 1
    for (int part = 0; part < BLOCK / SUB; part++) {
        float value[ROWS];
        if (group() * BLOCK + part * SUB >= n) break;
        if (DEFAULTS)
            update_defaults(r, turn, g, o, first, n, part, value);
        else {
#pragma unroll 1
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = row_of(part * ROWS + i);
                if (at >= n) break;
                const float now = value_at(o, at), grown = o.base ? now - o.base[at] : now;
                o.out[at] = update_row(r, *r.step, share, g[at], now, grown, first + at);
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = row_of(part * ROWS + i);
                value[i] = at < n ? o.out[at] : 0.f;
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
