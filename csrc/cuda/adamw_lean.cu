/* adamw_lean on a GPU. The formulas, and what the tensors mean, are in csrc/core/adamw_lean.c, whose bits these kernels
 * give wherever the GPU's square roots, divisions and pow do: no multiplication is fused with an addition, and every sum
 * runs in the core's lanes, blocks and parts.
 *
 *     squares   ||g||^2 and non-finite entries, per chunk      reads 4 bytes a row
 *     collect   their sums, a layer a block; the verdict
 *     begin     the averages that no single row is needed for, a layer a block
 *     reduce    the basis' Gram matrix, U^T g and W0^T g, a part a block: reads 16 bytes a row (d = 2, k = 1)
 *     solve     the hidden path and the truncations, a layer a block
 *     update    A, U, moments and the factors: reads 24 and writes 20 bytes a row
 *
 * A group of LANES threads takes BLOCK rows, thread l of it the rows l, l + LANES, ...: those are the lanes of the
 * core's sums and the rows whose random numbers one counter makes. GROUPS groups make a block of threads, which so takes a
 * chunk of the core's. Groups read 64 bytes at a time (32 of a bfloat16 column), whole sectors. */
#include "adamw_lean.h"

#include "lowrank.cuh"
#include "model.cuh"
#include "random.cuh"

#include <math.h>

namespace {

constexpr int LANES = 16, GROUPS = 8, THREADS = LANES * GROUPS;
constexpr int64_t BLOCK = 512, PART = 4096, MOST_PARTS = 64; /* as in the core */
static_assert(PART == GROUPS * BLOCK, "a block of threads takes a chunk");
constexpr int RANK = OPLORA_MOST_RANK, BASIS = MOST;
constexpr int SUB = 128, ROWS = SUB / LANES; /* rows that a group, and that a thread, has in registers */
constexpr int SQUARE_CHUNKS = 16;            /* chunks a block of the squares */
enum { WANTS_DH = 1, WANTS_GRAM = 2 };       /* as in the core */
constexpr int COLLECT_THREADS = MOST_PARTS;  /* one thread a part */
constexpr double LEAST_EPS = 1e-30;

using Lowrank = lowrank<THREADS>;

/* The numbers of a step for the rows of a map; see lean_numbers in csrc/core/dispatch.h. */
struct Numbers {
    float beta1_rest, beta2, beta2_rest, second, eps, eps_row, inverse_root;
    uint32_t key, round_key[RANK];
    float weight[BASIS], rotate_U[RANK][BASIS], rotate_A[RANK][RANK + 1];
};

/* What a factor's rows have of their own: c's keep and rate, and how much of the map's largest keep and rate theirs are; the
 * second pass' numbers with these in them. */
struct Share {
    double kappa, rho;
    float keep, rate, weight[BASIS], rotate_U[RANK][BASIS];
};

struct Rows {
    int64_t rows;
    int d, k;
    float *U;
    uint16_t *A, *m, *S, *R;
    Numbers *numbers;
    Share *shares; /* of factors; the hidden map has one */
    int64_t n_shares;
};

struct Map {
    Rows rows;
    int64_t inputs;
    float *Q, *B, *r;
    double *scale, *mean;                         /* s, and the mean of R */
    double *steps;                                /* scratch: keep, rate, beta1, keep of s */
    double *K, *col, *Q_next, *directions, *sums; /* scratch */
};

struct Layer {
    int64_t H, Z, N;
    uint64_t seed;
    uint32_t layer;
    oplora_start_kind start;
    Map outer, hidden;
    float *pre, *z, *z_avg, *z_avg_sq;
    float *h, *h_next, *d, *z_next, *change; /* scratch */
    double *dh, *report, *squares, *part_sums;
    double *corrections; /* scratch: 1 - beta1^step, 1 - beta2^step */
    oplora_adamw *adamw;
    const double *rates; /* (factors, 2) */
    double bound, w1_bound;
    int64_t first_factor, n_factors, first_part, parts, first_chunk, chunks;
};

using Table = Model<Layer>;

struct Chunk {
    const Factor *factor;
    const Share *share;
    int64_t range, row, entry, rows;
};

__host__ __device__ int64_t chunks_of(int64_t rows) { return (rows + PART - 1) / PART; }
__host__ __device__ int basis_size(int d, int k) { return d + k + 1; }
__host__ __device__ int sums_size(int d, int k) { return basis_size(d, k) * basis_size(d, k) + d; }
__device__ int64_t part_size(const Layer &l) { return sums_size(l.outer.rows.d, l.outer.rows.k) + l.H; }
__device__ int64_t part_begin(const Layer &l, int64_t part) { return l.chunks * part / l.parts; }

__device__ Chunk chunk_at(const Table &t, const Layer &l, int64_t chunk) {
    int64_t range = 0, row = 0;
    const Factor *factor = t.factors + l.first_factor;
    for (; chunk >= chunks_of(factor->rows); factor++) {
        chunk -= chunks_of(factor->rows);
        row += factor->rows;
        range += factor->random != 0;
    }
    const int64_t left = factor->rows - chunk * PART;
    const Share *const share = l.outer.rows.shares + (factor - (t.factors + l.first_factor));
    return {factor, share, range, row + chunk * PART, chunk * PART, left < PART ? left : PART};
}

__device__ oplora_stream w2_stream(const Layer &l, int64_t range) {
    const uint32_t tensor = l.start == OPLORA_UNIFORM ? OPLORA_W2_TENSOR : OPLORA_SIGN_TENSOR;
    return {l.seed, l.layer, tensor + OPLORA_RANGE_TENSORS * static_cast<uint32_t>(range)};
}

__device__ oplora_stream w1_stream(const Layer &l) { return {l.seed, l.layer, OPLORA_W1_TENSOR}; }

__device__ int lane() { return static_cast<int>(threadIdx.x) % LANES; }
__device__ int group() { return static_cast<int>(threadIdx.x) / LANES; }

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

__device__ int blocks_in(int64_t rows) { return static_cast<int>((rows + BLOCK - 1) / BLOCK); }

/* The rows of this thread in a chunk of n rows: i-th of BLOCK / LANES. */
__device__ int64_t row_of(int i) { return group() * BLOCK + i * LANES + lane(); }

/* row = 1 / (sqrt of the second moment's next row factor + eps); see lean_scale in csrc/core/kernels.h. */
__device__ float next_R(const Numbers &a, float R, float g) {
    return a.beta2 * R + (a.second > 0 ? a.second * (g * g) : 0.f);
}
__device__ float row_scale(const Numbers &a, float r) { return 1.f / (sqrtf(r) * a.inverse_root + a.eps_row); }

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
__device__ double scale_of(const Share &share, int a, int d) { return a < d ? share.kappa : share.rho; }

/* A pair's place among the sums, and its columns: of the Gram matrix, then U^T g, whose second column is p. */
struct Pair {
    int a, b, place;
};
__device__ Pair pair_at(int index, int p) {
    if (index >= p * (p + 1) / 2) {
        const int i = index - p * (p + 1) / 2;
        return {i, p, p * p + i};
    }
    int a = 0;
    for (; index > a; a++) index -= a + 1;
    return {a, index, a * p + index};
}

/* By which a factor's sums of a pair count. */
__device__ double scale_of_pair(const Share &share, int index, int p, int d) {
    const Pair pair = pair_at(index, p);
    return pair.b == p ? 1 : scale_of(share, pair.a, d) * scale_of(share, pair.b, d);
}

/* The Gram matrix's lower half and U^T g of a chunk, at the default ranks: twelve sums in one walk. */
__device__ void reduce_defaults(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n,
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
__device__ float basis_at(const Rows &r, const Numbers &a, const Gradient &g, int column, int64_t at, int64_t i) {
    const int p = basis_size(r.d, r.k);
    if (column < r.d) return r.U[column * r.rows + at];
    if (column == p) return g[i];
    const float row = row_scale(a, next_R(a, get_moment(r.R[at]), g[i]));
    if (column < r.d + r.k) return row * get_moment(r.A[(column - r.d) * r.rows + at]);
    return a.second > 0 ? row * g[i] : 0.f;
}

__device__ void reduce_pairs(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n, int begin,
                             int end, Tile &tile, double *sums) {
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
__device__ void reduce_along(const Rows &r, const Share &share, const Gradient &g, int64_t first, int64_t n, Tile &tile,
                             double *sums) {
    const int p = basis_size(r.d, r.k);
    reduce_pairs(r, share, g, first, n, p * (p + 1) / 2, p * (p + 1) / 2 + r.d, tile, sums);
}

/* sums[j] += W0_j^T g over a chunk, in units of the bound, for units that are on: LANES units at a time. */
__device__ void random_reduce(const Layer &l, const Chunk &chunk, Tile &tile, double *sums) {
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
__device__ void random_update(const Layer &l, const oplora_stream &s, const float *x, uint64_t entry, float out[ROWS]) {
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
__device__ Output output_of(const Factor &f, int64_t entry) {
    return {f.out + entry, f.base ? f.base + entry : nullptr, f.rounded ? f.rounded + entry : nullptr, f.dtype};
}
/* What the step goes on from: of 16 bits the value before rounding, unless somebody wrote into the factor itself. */
__device__ float take(const Output &o, int64_t at) {
    const float value = o.out[at];
    if (!o.rounded) return value;
    const uint16_t bits = o.rounded[at];
    return to_half(value, o.dtype) == bits ? value : from_half(bits, o.dtype);
}
__device__ void put(const Output &o, int64_t at, float value) {
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

/* ---- squares, collect, begin ---- */

/* SQUARE_CHUNKS chunks a block. */
__global__ void __launch_bounds__(SQUARE_LANES *SQUARE_CHUNKS) squares_kernel(Table t) {
    SHARED_ARRAY(double, lanes, SQUARE_LANES *SQUARE_CHUNKS);
    SHARED_ARRAY(int, bad, SQUARE_LANES *SQUARE_CHUNKS);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * SQUARE_CHUNKS + threadIdx.x / SQUARE_LANES;
    Gradient g = {};
    double *to = nullptr;
    int64_t n = 0;
    if (index < t.first_chunk[t.n_layers]) {
        const Layer &l = t.layers[layer_of(t.first_chunk, t.n_layers, index)];
        const Chunk chunk = chunk_at(t, l, index - l.first_chunk);
        g = gradient_of(*chunk.factor, chunk.entry);
        to = l.squares + 2 * (index - l.first_chunk);
        n = chunk.rows;
    }
    find_squares(g, n, to, lanes, bad);
}

/* A layer's sums, chunks within a part and then parts in order. With `measured` they are in the report already. */
__global__ void __launch_bounds__(COLLECT_THREADS) collect_kernel(Table t, int measured) {
    SHARED_ARRAY(double, sums, MOST_PARTS);
    SHARED_ARRAY(double, bad, MOST_PARTS);
    const Layer &l = t.layers[blockIdx.x];
    const int part = static_cast<int>(threadIdx.x);
    if (!measured && part < l.parts) {
        double sum = 0, count = 0;
        for (int64_t c = part_begin(l, part); c < part_begin(l, part + 1); c++) {
            sum += l.squares[2 * c];
            count += l.squares[2 * c + 1];
        }
        sums[part] = sum;
        bad[part] = count;
    }
    __syncthreads();
    if (part != 0) return;
    if (!measured) {
        double sum = 0, count = 0;
        for (int i = 0; i < l.parts; i++) {
            sum += sums[i];
            count += bad[i];
        }
        l.report[0] = sum;
        l.report[1] = count;
    }
    if (l.report[1] != 0) atomicOr(&t.verdict->nonfinite, 1);
    /* here, as a kernel with few registers: pow is a call */
    const double step = static_cast<double>(l.adamw->step + 1);
    l.corrections[0] = 1 - pow(l.adamw->beta1, step);
    l.corrections[1] = 1 - pow(l.adamw->beta2, step);
}

/* Sums in order by one thread, as the core's plain loops. */
__device__ double square(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
    return sum;
}

/* This step's rounding keys; map is 0 for W2, 1 for W1. */
__device__ void rounding_key(const Layer &l, uint32_t map, uint32_t key[3]) {
    const oplora_stream s = {l.seed, l.layer, OPLORA_ROUNDING};
    const uint4 words = philox(s, static_cast<uint64_t>(l.adamw->step + 1), map);
    key[0] = words.x, key[1] = words.y, key[2] = words.z;
}

/* What prepare_map and step_hidden say to each other through shared memory. */
struct Small {
    Lowrank::Shared lowrank;
    double gram[MOST * MOST], all[MOST * MOST], change[MOST][MOST];
    double rotate_A[MOST * RANK], rotate_W[MOST * RANK];
    double now[RANK], next[RANK], number[4];
};

/* The averages that do not depend on single rows, and with them the step's numbers. square_g is ||g||^2. */
__device__ void prepare_map(const Map &map, const float *x, double square_g, const oplora_adamw &a,
                            const uint32_t key[3], const double corrections[2], double number[4]) {
    const int t = static_cast<int>(threadIdx.x);
    if (t == 0) {
        const double mean_x = square(x, map.inputs) / static_cast<double>(map.inputs);
        const double most = oplora_most_gradient_f32;
        const double fresh = (1 - a.beta2) * mean_x * fmin(square_g / static_cast<double>(map.rows.rows), most * most);
        *map.mean = a.beta2 * *map.mean + fresh;
        number[0] = mean_x;
        number[1] = *map.mean > 0 ? fresh / *map.mean : 0;
    }
    __syncthreads();
    const double mean_x = number[0], turn = number[1];
    for (int64_t j = t; j < map.inputs; j += THREADS) {
        const double part = turn > 0 ? static_cast<double>(x[j]) * x[j] / mean_x : 0;
        map.r[j] = static_cast<float>(map.r[j] + turn * (part - map.r[j]));
        const double c = map.r[j] > 0 ? sqrt(static_cast<double>(map.r[j])) : 0;
        map.K[j] = c; /* scratch until solve_map fills it */
        map.col[j] = c > 0 ? 1 / c : 0;
    }
    __syncthreads();
    if (t == 0) {
        double root = 0;
        int64_t live = 0;
        for (int64_t j = 0; j < map.inputs; j++) {
            root += map.K[j];
            live += map.K[j] > 0;
        }
        map.steps[2] = a.beta1;
        Numbers &numbers = *map.rows.numbers;
        numbers.beta1_rest = static_cast<float>(1 - a.beta1);
        numbers.beta2 = static_cast<float>(a.beta2);
        numbers.beta2_rest = static_cast<float>(1 - a.beta2);
        numbers.second = static_cast<float>((1 - a.beta2) * mean_x);
        numbers.eps = static_cast<float>(fmax(a.eps, LEAST_EPS));
        numbers.eps_row = static_cast<float>(fmax(live ? a.eps * static_cast<double>(live) / root : a.eps, LEAST_EPS));
        numbers.inverse_root = static_cast<float>(1 / sqrt(corrections[1]));
        numbers.key = key[0];
        numbers.round_key[0] = key[0] ^ 0x9E3779B9u;
        for (int i = 1; i < map.rows.k; i++) numbers.round_key[i] = key[1] + static_cast<uint32_t>(i) * key[2];
    }
    __syncthreads();
}

__device__ void find_hidden(const Layer &l, float *h) {
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) h[j] = l.pre[j] > 0 ? l.pre[j] : 0;
    __syncthreads();
}

/* The largest of the factors' rates and keeps, which are the map's, each factor's share of them, and the keep of the first
 * random one, which is W0's; as in the core. */
__device__ void find_rates(const Table &t, const Layer &l) {
    const Map &map = l.outer;
    const double corrected1 = l.corrections[0];
    double lr = 0, keep = 0, start_keep = 0;
    bool random = false;
    for (int64_t f = 0; f < l.n_factors; f++) {
        const double own_lr = l.rates[2 * f], own_keep = 1 - own_lr * l.rates[2 * f + 1];
        if (fabs(own_lr) > fabs(lr)) lr = own_lr;
        if (fabs(own_keep) > fabs(keep)) keep = own_keep;
        if (!random && t.factors[l.first_factor + f].random) {
            random = true;
            start_keep = own_keep;
        }
    }
    map.steps[0] = keep;
    map.steps[1] = lr * l.adamw->weight_ratio / corrected1;
    map.steps[3] = random ? start_keep : keep;
    for (int64_t f = 0; f < l.n_factors; f++) {
        const double own_lr = l.rates[2 * f], own_keep = 1 - own_lr * l.rates[2 * f + 1];
        Share &share = map.rows.shares[f];
        share.kappa = keep != 0 ? own_keep / keep : 1;
        share.rho = lr != 0 ? own_lr / lr : 1;
        share.keep = static_cast<float>(own_keep);
        share.rate = static_cast<float>(own_lr / corrected1);
    }
}

__global__ void __launch_bounds__(THREADS, 1) begin_kernel(Table t, int wants) {
    SHARED_ARRAY(double, number, 4);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    find_hidden(l, l.h);
    if (!(wants & WANTS_GRAM)) return;
    uint32_t key[3];
    if (threadIdx.x == 0) find_rates(t, l);
    rounding_key(l, 0, key);
    prepare_map(l.outer, l.h, l.report[0], *l.adamw, key, l.corrections, number);
}

/* ---- reduce ---- */

template <bool DEFAULTS> __global__ void __launch_bounds__(THREADS, 4) reduce_kernel(Table t, int wants) {
    SHARED_ARRAY(Tile, tile, 1);
    if (t.refused()) return;
    const int64_t index = blockIdx.x;
    const Layer &l = t.layers[layer_of(t.first_part, t.n_layers, index)];
    const Rows &r = l.outer.rows;
    const int64_t part = index - l.first_part;
    double *const sums = l.part_sums + part * part_size(l);
    for (int64_t i = threadIdx.x; i < part_size(l); i += THREADS) sums[i] = 0;
    __syncthreads();
    for (int64_t c = part_begin(l, part); c < part_begin(l, part + 1); c++) {
        const Chunk chunk = chunk_at(t, l, c);
        const Gradient g = gradient_of(*chunk.factor, chunk.entry);
        if (wants & WANTS_GRAM) reduce_chunk<DEFAULTS>(r, *chunk.share, g, chunk.row, chunk.rows, tile[0], sums);
        if (wants == WANTS_DH) reduce_along(r, *chunk.share, g, chunk.row, chunk.rows, tile[0], sums);
        if (wants & WANTS_DH && chunk.factor->random) random_reduce(l, chunk, tile[0], sums + sums_size(r.d, r.k));
    }
}

/* ---- solve ---- */

/* After all sums and with the next input: the truncations, and what the second pass multiplies the basis with. */
__device__ void solve_map(const Map &map, const float *x, Small &s, double dropped[2]) {
    const Rows &r = map.rows;
    const int d = r.d, k = r.k, p = basis_size(d, k), t = static_cast<int>(threadIdx.x);
    const int64_t n = map.inputs;
    const double keep = map.steps[0], rate = map.steps[1], beta1 = map.steps[2];
    for (int e = t; e < p * p; e += THREADS) {
        const int i = e / p, j = e % p;
        s.all[e] = map.sums[i >= j ? e : j * p + i];
        s.change[i][j] = i == j && i < d;
    }
    __syncthreads();

#pragma unroll 1
    for (int stage = 0; stage < 2; stage++) {
        if (stage == 0) { /* the first moment: [A, g] K in the step's scale */
            for (int e = t; e < (k + 1) * (k + 1); e += THREADS)
                s.gram[e] = s.all[(d + e / (k + 1)) * p + d + e % (k + 1)];
            for (int64_t j = t; j < n; j += THREADS) {
                for (int i = 0; i < k; i++) map.K[i * n + j] = beta1 * map.B[i * n + j] * map.col[j];
                map.K[k * n + j] = (1 - beta1) * x[j] * map.col[j];
            }
        } else { /* W: [U, row A'] with A' = [A, g] rotate_A; the same for the whole basis: change (p, d + k) */
            for (int64_t j = t; j < n; j += THREADS)
                for (int i = 0; i < k; i++)
                    map.B[i * n + j] = static_cast<float>(map.col[j] > 0 ? map.directions[i * n + j] / map.col[j] : 0);
            for (int e = t; e < (k + 1) * k; e += THREADS) s.change[d + e / k][d + e % k] = s.rotate_A[e];
            __syncthreads();
            for (int e = t; e < (d + k) * (d + k); e += THREADS) {
                const int i = e / (d + k), j = e % (d + k);
                double sum = 0;
                for (int a = 0; a < p; a++)
                    for (int b = 0; b < p; b++) sum += s.change[a][i] * s.all[a * p + b] * s.change[b][j];
                s.gram[e] = sum;
            }
            for (int64_t j = t; j < n; j += THREADS) {
                for (int i = 0; i < d; i++) map.K[i * n + j] = keep * map.Q[i * n + j];
                for (int i = 0; i < k; i++) map.K[(d + i) * n + j] = -rate * map.directions[i * n + j];
            }
        }
        if (stage == 1 && rate == 0 && keep == 1) { /* nothing moves, not even by rounding */
            for (int e = t; e < (d + k) * d; e += THREADS) s.rotate_W[e] = e / d == e % d;
            for (int64_t j = t; j < d * n; j += THREADS) map.Q_next[j] = map.Q[j];
            dropped[stage] = 0;
        } else
            dropped[stage] = Lowrank::truncate(s.lowrank, s.gram, stage ? d + k : k + 1, map.K, n, stage ? d : k,
                                               stage ? s.rotate_W : s.rotate_A, stage ? map.Q_next : map.directions);
        __syncthreads();
    }

    Numbers &numbers = *r.numbers;
    for (int e = t; e < k * (k + 1); e += THREADS)
        numbers.rotate_A[e / (k + 1)][e % (k + 1)] = static_cast<float>(s.rotate_A[(e % (k + 1)) * k + e / (k + 1)]);
    for (int e = t; e < d * p; e += THREADS) {
        const int i = e / p, a = e % p;
        double sum = 0;
        for (int b = 0; b < d + k; b++) sum += s.change[a][b] * s.rotate_W[b * d + i];
        numbers.rotate_U[i][a] = static_cast<float>(sum);
    }
    __syncthreads();
}

/* The output's share of the basis: U' Q'^T x' - keep U Q^T x. Then Q' takes Q's place. */
__device__ void finish_map(const Map &map, const float *x, const float *x_next, Small &s) {
    const Rows &r = map.rows;
    const int t = static_cast<int>(threadIdx.x), d = r.d;
    const int64_t n = map.inputs;
    if (t < 2 * d) { /* sums in order: one thread each */
        const int i = t % d;
        double sum = 0;
        if (t < d) {
            for (int64_t j = 0; j < n; j++) sum += static_cast<double>(map.Q[i * n + j]) * x[j];
            s.now[i] = sum;
        } else {
            for (int64_t j = 0; j < n; j++)
                sum += static_cast<double>(static_cast<float>(map.Q_next[i * n + j])) * x_next[j];
            s.next[i] = sum;
        }
    }
    __syncthreads();
    for (int64_t j = t; j < d * n; j += THREADS) map.Q[j] = static_cast<float>(map.Q_next[j]);
    Numbers &numbers = *r.numbers;
    if (t < basis_size(d, r.k)) {
        double weight = 0;
        for (int i = 0; i < d; i++) {
            weight += numbers.rotate_U[i][t] * s.next[i];
            if (i == t) weight -= map.steps[0] * s.now[i];
        }
        numbers.weight[t] = static_cast<float>(weight);
    }
    __syncthreads();
    const int p = basis_size(d, r.k);
    for (int64_t e = t; e < r.n_shares * (d + 1) * p; e += THREADS) {
        Share &share = r.shares[e / ((d + 1) * p)];
        const int i = static_cast<int>(e / p % (d + 1)), a = static_cast<int>(e % p);
        const float scale = static_cast<float>(scale_of(share, a, d));
        if (i < d)
            share.rotate_U[i][a] = numbers.rotate_U[i][a] * scale;
        else
            share.weight[a] = numbers.weight[a] * scale;
    }
    __syncthreads();
}

/* dh = s W0^T g + Q (U^T g) where the unit is on, from the sums of all parts. */
__device__ void find_dh(const Layer &l) {
    const Rows &r = l.outer.rows;
    const int own = sums_size(r.d, r.k), p = basis_size(r.d, r.k);
    const double *const along = l.outer.sums + p * p;
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) {
        double sum = *l.outer.scale * l.bound * l.outer.sums[own + j];
        for (int i = 0; i < r.d; i++) sum += static_cast<double>(l.outer.Q[i * l.H + j]) * along[i];
        l.dh[j] = l.h[j] != 0 ? sum : 0;
    }
    __syncthreads();
}

/* l.d = dh in float, and dz = W1^T d into l.change; the report's numbers of the hidden path. */
__device__ void report_hidden(const Layer &l, Small &s) {
    const oplora_stream stream = w1_stream(l);
    const Rows &r = l.hidden.rows;
    const double bound = l.w1_bound * *l.hidden.scale;
    const int t = static_cast<int>(threadIdx.x);
    for (int64_t j = t; j < l.H; j += THREADS) l.d[j] = narrowed(l.dh[j]);
    if (t < r.d) { /* sums in order: one thread each */
        double along = 0;
        for (int64_t j = 0; j < l.H; j++)
            if (l.dh[j] != 0) along += static_cast<double>(r.U[t * l.H + j]) * l.dh[j];
        s.now[t] = along;
    } else if (t == 32) {
        double sum = 0;
        for (int64_t j = 0; j < l.H; j++) sum += l.dh[j] * l.dh[j];
        s.number[0] = sum;
    } else if (t == 64) {
        double live = 0;
        for (int64_t j = 0; j < l.H; j++) live += l.h[j] != 0;
        l.report[4] = live;
        l.report[3] = square(l.h, l.H);
    } else if (t == 96)
        s.number[1] = square(l.z, l.Z);
    __syncthreads();
    for (int64_t first = static_cast<int64_t>(group()) * SUB; first < l.Z; first += GROUPS * SUB) {
        float dz[ROWS] = {};
        for (int64_t j = 0; j < l.H; j++) {
            if (l.dh[j] == 0) continue;
            const float coefficient = narrowed(bound * l.dh[j]);
            const uint4 eight = philox(stream, static_cast<uint64_t>(first / 8 + lane()), static_cast<uint32_t>(j));
#pragma unroll
            for (int q = 0; q < ROWS; q++) dz[q] += coefficient * uniform_of(eight, q);
        }
#pragma unroll
        for (int q = 0; q < ROWS; q++) {
            const int64_t i = first + q * LANES + lane();
            if (i >= l.Z) continue;
            double sum = dz[q];
            for (int a = 0; a < r.d; a++) sum += static_cast<double>(l.hidden.Q[a * l.Z + i]) * s.now[a];
            l.change[i] = narrowed(sum);
            l.hidden.K[i] = sum * sum; /* scratch until prepare_map fills it */
        }
    }
    __syncthreads();
    if (t == 0) {
        double dz2 = 0;
        for (int64_t i = 0; i < l.Z; i++) dz2 += l.hidden.K[i];
        l.report[2] = dz2 + s.number[0] * (s.number[1] + 1);
    }
    __syncthreads();
}

/* W1's start times x (Z), row j, by one group of threads; lanes[] holds LANES numbers of the group's own. */
__device__ void w1_dot(const Layer &l, int64_t j, const float *x, float *lanes) {
    const oplora_stream s = w1_stream(l);
    float sum = 0;
    for (int64_t first = 0; first < l.Z && j < l.H; first += SUB) {
        const uint4 eight = philox(s, static_cast<uint64_t>(first / 8 + lane()), static_cast<uint32_t>(j));
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
    uint32_t key[3];
    report_hidden(l, s);
    rounding_key(l, 1, key);
    if (t == 0) {
        Share &share = *map.rows.shares;
        s.number[2] = square(l.d, l.H);
        map.steps[0] = map.steps[3] = 1 - a.hidden_lr * a.weight_decay;
        map.steps[1] = a.hidden_lr / l.corrections[0];
        share.kappa = share.rho = 1;
        share.keep = static_cast<float>(map.steps[0]);
        share.rate = static_cast<float>(map.steps[1]);
    }
    __syncthreads();
    prepare_map(map, l.z, s.number[2], a, key, l.corrections, s.number);
    for (int i = t; i < sums_size(map.rows.d, map.rows.k); i += THREADS) map.sums[i] = 0;
    __syncthreads();
    for (int64_t j = 0; j < l.H; j += PART)
        reduce_chunk<DEFAULTS>(map.rows, *map.rows.shares, {l.d + j, OPLORA_F32}, j, l.H - j < PART ? l.H - j : PART,
                               tile, map.sums);
}

/* AdamW on z, from l.change: adamw in csrc/core/kernels.h. */
__device__ void step_latent(const Layer &l) {
    const Numbers &numbers = *l.hidden.rows.numbers;
    const Share &share = *l.hidden.rows.shares;
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) {
        const float gradient = l.change[i];
        const float m_next = l.z_avg[i] + numbers.beta1_rest * (gradient - l.z_avg[i]);
        const float s_next = numbers.beta2 * l.z_avg_sq[i] + numbers.beta2_rest * (gradient * gradient);
        l.z_next[i] = share.keep * l.z[i] - share.rate * m_next / (sqrtf(s_next) * numbers.inverse_root + numbers.eps);
        l.z_avg[i] = m_next;
        l.z_avg_sq[i] = s_next;
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
    for (int64_t j = 0; j < l.H; j += PART)
        update_chunk<DEFAULTS>(map.rows, *map.rows.shares, {l.d + j, OPLORA_F32},
                               {l.pre + j, nullptr, nullptr, OPLORA_F32}, j, l.H - j < PART ? l.H - j : PART, l,
                               nullptr, 0, nullptr);
    __syncthreads();
    for_w1_dots(l, l.change, tile, [&](int64_t j, double sum) { l.pre[j] += static_cast<float>(sum); });
    for (int64_t i = t; i < l.Z; i += THREADS) l.z[i] = l.z_next[i];
    if (t == 0) *map.scale *= map.steps[3];
    find_hidden(l, l.h_next);
}

/* W2's map: what W0 adds to the factors. */
__device__ void finish_outer(const Layer &l) {
    const Map &map = l.outer;
    const double keep = map.steps[3], bound = l.bound * keep * *map.scale;
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS)
        l.change[j] = static_cast<float>(bound * (static_cast<double>(l.h_next[j]) - l.h[j]));
    __syncthreads();
    if (threadIdx.x == 0) *map.scale *= keep;
}

__device__ void add_parts(const Layer &l) {
    const int64_t size = part_size(l);
    for (int64_t i = threadIdx.x; i < size; i += THREADS) {
        double sum = 0;
        for (int64_t part = 0; part < l.parts; part++) sum += l.part_sums[part * size + i];
        l.outer.sums[i] = sum;
    }
    __syncthreads();
}

/* A measurement ends here, with dh and the hidden path's norm. */
__global__ void __launch_bounds__(THREADS) finish_measure_kernel(Table t) {
    SHARED_ARRAY(Small, small, 1);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    add_parts(l);
    find_dh(l);
    report_hidden(l, small[0]);
}

template <bool DEFAULTS> __global__ void __launch_bounds__(THREADS, 1) solve_kernel(Table t, int wants) {
    SHARED_ARRAY(Small, small, 1);
    SHARED_ARRAY(Tile, tile, 1);
    if (t.refused()) {
        if (blockIdx.x == 0 && threadIdx.x == 0) t.verdict->refused++;
        return;
    }
    const Layer &l = t.layers[blockIdx.x];
    add_parts(l);
    if (wants & WANTS_DH) find_dh(l);
    begin_hidden<DEFAULTS>(l, small[0], tile[0]);
#pragma unroll 1
    for (int which = 0; which < 2; which++) { /* the hidden map, then W2's, which needs the next h */
        const Map &map = which ? l.outer : l.hidden;
        double dropped[2];
        solve_map(map, which ? l.h : l.z, small[0], dropped);
        if (threadIdx.x == 0) {
            l.report[which ? 5 : 7] = dropped[0];
            l.report[which ? 6 : 8] = dropped[1];
        }
        if (!which) step_latent(l);
        finish_map(map, which ? l.h : l.z, which ? l.h_next : l.z_next, small[0]);
        if (!which) finish_hidden<DEFAULTS>(l, tile[0]);
    }
    finish_outer(l);
    if (threadIdx.x == 0) l.adamw->step++;
}

/* ---- update ---- */

template <bool DEFAULTS> __global__ void __launch_bounds__(THREADS, 3) update_kernel(Table t) {
    if (t.refused()) return;
    const int64_t index = blockIdx.x;
    const Layer &l = t.layers[layer_of(t.first_part, t.n_layers, index)];
    const int64_t part = index - l.first_part;
    for (int64_t c = part_begin(l, part); c < part_begin(l, part + 1); c++) {
        const Chunk chunk = chunk_at(t, l, c);
        const Factor &f = *chunk.factor;
        const oplora_stream s = w2_stream(l, chunk.range);
        update_chunk<DEFAULTS>(l.outer.rows, *chunk.share, gradient_of(f, chunk.entry), output_of(f, chunk.entry),
                               chunk.row, chunk.rows, l, &s, chunk.entry, f.random ? l.change : nullptr);
    }
}

/* ---- the start ---- */

/* z, W1 z, and h times W0's bound into l.change. */
__global__ void __launch_bounds__(THREADS) start_kernel(Table t, double latent_std) {
    SHARED_ARRAY(Tile, tile, 1);
    const Layer &l = t.layers[blockIdx.x];
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) l.z[i] = latent_entry(l.seed, l.layer, i, latent_std);
    __syncthreads();
    for_w1_dots(l, l.z, tile[0], [&](int64_t j, double sum) {
        l.pre[j] = static_cast<float>(l.w1_bound * sum);
        l.change[j] = l.pre[j] > 0 ? static_cast<float>(l.bound * l.pre[j]) : 0;
    });
    if (threadIdx.x != 0) return;
    *l.outer.scale = *l.hidden.scale = 1;
    *l.outer.mean = *l.hidden.mean = 0;
}

__global__ void __launch_bounds__(THREADS) start_rows_kernel(Table t) {
    const int64_t index = blockIdx.x;
    const Layer &l = t.layers[layer_of(t.first_part, t.n_layers, index)];
    const int64_t part = index - l.first_part;
    for (int64_t c = part_begin(l, part); c < part_begin(l, part + 1); c++) {
        const Chunk chunk = chunk_at(t, l, c);
        const oplora_stream s = w2_stream(l, chunk.range);
        const Output o = output_of(*chunk.factor, chunk.entry);
        for (int sub = 0; sub < BLOCK / SUB; sub++) {
            float value[ROWS] = {};
            const int64_t begin = group() * BLOCK + sub * SUB;
            if (begin >= chunk.rows) break;
            if (chunk.factor->random) random_update(l, s, l.change, static_cast<uint64_t>(chunk.entry + begin), value);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = begin + i * LANES + lane();
                if (at < chunk.rows) put(o, at, value[i]);
            }
        }
    }
}

/* ---- the plan, on the host ---- */

/* Lays a layer's scratch out; the same walk counts its bytes. */
void take_scratch(const oplora_lean_f32 &l, arena *a, Layer *to) {
    const int64_t d = l.weight_rank, k = l.moment_rank, p = basis_size(static_cast<int>(d), static_cast<int>(k));
    const int64_t sums = sums_size(static_cast<int>(d), static_cast<int>(k)) + l.H;
    const auto floats = [&](int64_t count) { return static_cast<float *>(take(a, count, sizeof(float))); };
    const auto doubles = [&](int64_t count) { return static_cast<double *>(take(a, count, sizeof(double))); };
    to->h = floats(l.H);
    to->h_next = floats(l.H);
    to->d = floats(l.H);
    to->z_next = floats(l.Z);
    to->change = floats(l.H > l.Z ? l.H : l.Z);
    double *const dh = doubles(l.H);
    to->dh = l.dh ? l.dh : dh;
    to->corrections = doubles(2);
    to->squares = doubles(2 * to->chunks);
    to->part_sums = doubles(to->parts * sums);
    for (Map *map : {&to->outer, &to->hidden}) {
        const int64_t inputs = map == &to->outer ? l.H : l.Z;
        map->rows.numbers = static_cast<Numbers *>(take(a, 1, sizeof(Numbers)));
        map->rows.n_shares = map == &to->outer ? l.n_factors : 1;
        map->rows.shares = static_cast<Share *>(take(a, map->rows.n_shares, sizeof(Share)));
        map->steps = doubles(4);
        map->K = doubles(p * inputs);
        map->col = doubles(inputs);
        map->Q_next = doubles(d * inputs);
        map->directions = doubles(k * inputs);
        map->sums = doubles(sums);
    }
}

/* The layer's state, cut as oplora_core.h says. */
void take_state(const oplora_lean_f32 &l, Layer *to) {
    const int64_t H = l.H, Z = l.Z, N = l.N, d = l.weight_rank, k = l.moment_rank;
    float *at = l.numbers;
    uint16_t *moment = l.moments;
    const auto next = [&at](int64_t count) { return at += count, at - count; };
    const auto next_moment = [&moment](int64_t count) { return moment += count, moment - count; };
    to->outer.inputs = H;
    to->hidden.inputs = Z;
    for (Map *map : {&to->outer, &to->hidden}) {
        map->rows.rows = map == &to->outer ? N : H;
        map->rows.d = static_cast<int>(d);
        map->rows.k = static_cast<int>(k);
    }
    to->outer.rows.U = next(d * N);
    to->hidden.rows.U = next(d * H);
    to->pre = next(H);
    to->outer.Q = next(d * H);
    to->outer.B = next(k * H);
    to->outer.r = next(H);
    to->hidden.Q = next(d * Z);
    to->hidden.B = next(k * Z);
    to->hidden.r = next(Z);
    to->z = next(Z);
    to->z_avg = next(Z);
    to->z_avg_sq = next(Z);
    for (Map *map : {&to->outer, &to->hidden}) {
        Rows &rows = map->rows;
        rows.A = next_moment(k * rows.rows);
        rows.m = next_moment(rows.rows);
        rows.S = next_moment(rows.rows);
        rows.R = next_moment(rows.rows);
    }
    to->outer.scale = l.scalars;
    to->outer.mean = l.scalars + 1;
    to->hidden.scale = l.scalars + 2;
    to->hidden.mean = l.scalars + 3;
}

int64_t chunks_in(const oplora_lean_f32 &l) {
    int64_t chunks = 0;
    for (int64_t f = 0; f < l.n_factors; f++) chunks += chunks_of(l.factors[f].rows);
    return chunks;
}

/* The workspace: the verdict, then every layer's scratch. */
Layer plan_layer(const oplora_lean_f32 &l, arena *a) {
    Layer layer = {};
    layer.chunks = chunks_in(l);
    layer.parts = layer.chunks < MOST_PARTS ? layer.chunks : MOST_PARTS;
    take_scratch(l, a, &layer);
    return layer;
}

/* What measurements and steps begin with. */
cudaError_t first_passes(const oplora_cuda_plan *plan, const Table &t, int measured, const int *veto, int wants,
                         cudaStream_t stream) {
    const unsigned layers = count_of(plan->n_layers), parts = count_of(plan->n_parts);
    const unsigned squares = count_of((plan->n_chunks + SQUARE_CHUNKS - 1) / SQUARE_CHUNKS);
    CUDA_FORWARD(begin_verdict(plan, veto, stream));
    if (!measured) CUDA_FORWARD(cuda_launch(squares_kernel, squares, SQUARE_LANES * SQUARE_CHUNKS, 0, stream, t));
    CUDA_FORWARD(cuda_launch(collect_kernel, layers, COLLECT_THREADS, 0, stream, t, measured));
    CUDA_FORWARD(cuda_launch(begin_kernel, layers, THREADS, 0, stream, t, wants));
    return cuda_launch(plan->only_defaults ? reduce_kernel<true> : reduce_kernel<false>, parts, THREADS, 0, stream, t,
                       wants);
}

} // namespace

int64_t oplora_cuda_lean_table_bytes(const oplora_lean_f32 *layers, int64_t n_layers) {
    if (oplora_lean_workspace_bytes_f32(layers, n_layers) < 0) return -1;
    return Sections<Layer>(layers, n_layers, nullptr).memory.used;
}

int64_t oplora_cuda_lean_workspace_bytes(const oplora_lean_f32 *layers, int64_t n_layers) {
    if (oplora_lean_workspace_bytes_f32(layers, n_layers) < 0) return -1;
    arena a = {nullptr, 0};
    for (int64_t i = 0; i < n_layers; i++) plan_layer(layers[i], &a);
    return a.used;
}

oplora_status oplora_cuda_lean_plan_layers(const oplora_lean_f32 *layers, int64_t n_layers, oplora_adamw *const *adamw,
                                           const double *const *rates, const oplora_cuda_half *halves,
                                           oplora_cuda_verdict *verdict, void *workspace, void *table,
                                           oplora_cuda_plan *plan) {
    if (!plan || (n_layers > 0 && (!layers || !adamw || !rates || !verdict || !workspace || !table)))
        return OPLORA_ENULL;
    if (oplora_lean_workspace_bytes_f32(layers, n_layers) < 0) return OPLORA_ESIZE;
    const Sections<Layer> to(layers, n_layers, table);
    int64_t part = 0, chunk = 0;
    int only_defaults = 1;
    Factor *factor = to.factors;
    arena a = {static_cast<char *>(workspace), 0};
    for (int64_t i = 0; i < n_layers; i++) {
        const oplora_lean_f32 &l = layers[i];
        if (!l.numbers || !l.moments || !l.scalars || !l.report) return OPLORA_ENULL;
        Layer layer = plan_layer(l, &a);
        take_state(l, &layer);
        layer.H = l.H, layer.Z = l.Z, layer.N = l.N;
        layer.seed = l.seed, layer.layer = l.layer, layer.start = l.start;
        layer.report = l.report;
        layer.adamw = adamw[i];
        layer.rates = rates[i];
        layer.bound = oplora_start_bound(l.start, l.H);
        layer.w1_bound = oplora_start_bound(OPLORA_UNIFORM, l.Z);
        layer.first_factor = factor - to.factors, layer.n_factors = l.n_factors;
        layer.first_part = to.first_part[i] = part;
        layer.first_chunk = to.first_chunk[i] = chunk;
        factor = plan_factors(l.factors, l.n_factors, halves ? halves + layer.first_factor : nullptr, factor);
        part += layer.parts;
        chunk += layer.chunks;
        only_defaults &= l.weight_rank == 2 && l.moment_rank == 1;
        memcpy(&to.layers[i], &layer, sizeof layer);
    }
    to.first_part[n_layers] = part;
    to.first_chunk[n_layers] = chunk;
    *plan = {n_layers, part,         chunk, to.offset(to.factors), to.offset(to.first_part), to.offset(to.first_chunk),
             verdict,  only_defaults};
    return part > INT32_MAX || chunk > INT32_MAX ? OPLORA_EOVERFLOW : OPLORA_OK;
}

int oplora_cuda_lean_start(const oplora_cuda_plan *plan, const void *table, double latent_std, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(cuda_launch(start_kernel, count_of(plan->n_layers), THREADS, 0, on, t, latent_std));
    return cuda_launch(start_rows_kernel, count_of(plan->n_parts), THREADS, 0, on, t);
}

int oplora_cuda_lean_measure(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, 0, nullptr, WANTS_DH, on));
    return cuda_launch(finish_measure_kernel, count_of(plan->n_layers), THREADS, 0, on, t);
}

int oplora_cuda_lean_step(const oplora_cuda_plan *plan, const void *table, int measured, const int *veto,
                          void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    const int wants = measured ? WANTS_GRAM : WANTS_GRAM | WANTS_DH;
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, measured, veto, wants, on));
    CUDA_FORWARD(cuda_launch(plan->only_defaults ? solve_kernel<true> : solve_kernel<false>, count_of(plan->n_layers),
                             THREADS, 0, on, t, wants));
    return cuda_launch(plan->only_defaults ? update_kernel<true> : update_kernel<false>, count_of(plan->n_parts),
                       THREADS, 0, on, t);
}
