/* What the rooms of adamw_lean.cu share, as csrc/core/lean.h: the layers as kernels see them. */
#ifndef OPLORA_LEAN_CUH
#define OPLORA_LEAN_CUH

#include "../shared/lean_layout.h"
#include "../shared/lean_map.h"
#include "adamw_lean.h"
#include "lowrank.cuh"
#include "model.cuh"
#include "random.cuh"

namespace lean {

constexpr int LANES = 16, GROUPS = 8, THREADS = LANES * GROUPS;
constexpr int64_t BLOCK = LEAN_BLOCK, CHUNK = LEAN_CHUNK;
static_assert(CHUNK == GROUPS * BLOCK, "a block of threads takes a chunk");
constexpr int RANK = OPLORA_MOST_RANK, BASIS = OPLORA_MOST_BASIS;
constexpr int SUB = 128, ROWS = SUB / LANES; /* rows that a group, and that a thread, has in registers */
constexpr int SQUARE_CHUNKS = 16;            /* chunks a block of the squares */
constexpr int COLLECT_THREADS = 64;          /* a part each at a time */

using Lowrank = lowrank<THREADS>;

/* One step of a map's rows: its constants, without a factor's own keep and rate, and once it is solved what the second pass
 * multiplies the basis with, and [A, g]. */
struct MapStep {
    oplora_lean_constants_f32 constants;
    uint32_t round_key[RANK];
    float weight[BASIS], rotate_U[RANK][BASIS], rotate_A[RANK][RANK + 1];
};

/* What a factor's rows have of their own: how much of the map's largest keep and rate theirs are, and their step with this in
 * it. At the default ranks that is `defaults`, which kernels hold in registers. */
struct Share {
    double kappa, rho;
    oplora_lean_constants_f32 constants;
    float weight[BASIS], rotate_U[RANK][BASIS];
    oplora_lean_turn21_f32 defaults;
};

struct Rows {
    int64_t rows;
    int d, k;
    float *U;
    uint16_t *A, *m, *S, *R;
    MapStep *step;
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

struct Layer : PlannedLayer {
    int64_t H, Z, N;
    uint64_t seed;
    uint32_t layer;
    oplora_start_kind start;
    Map outer, hidden;
    float *pre, *z, *z_avg, *z_avg_sq;
    float *h, *h_next, *d, *z_next, *change; /* scratch */
    double *dh, *report, *squares, *part_sums;
    double *corrections; /* scratch: 1 - beta1^step, 1 - beta2^step */
    double bound, w1_bound;
};

using Table = Model<Layer>;

struct Chunk {
    const Factor *factor;
    const Share *share;
    int64_t range, row, entry, rows;
};

__device__ inline int64_t part_size(const Layer &l) { return oplora_lean_sums(l.outer.rows.d, l.outer.rows.k) + l.H; }

__device__ inline Chunk chunk_at(const Table &t, const Layer &l, int64_t chunk) {
    const Factor &f = t.factor_of(chunk);
    const int64_t entry = (chunk - f.first_chunk) * CHUNK, left = f.rows - entry;
    return {&f, l.outer.rows.shares + f.index, f.range, f.first_row + entry, entry, left < CHUNK ? left : CHUNK};
}

__device__ inline oplora_stream w2_stream(const Layer &l, int64_t range) {
    return oplora_w2_stream(l.seed, l.layer, l.start, range);
}
__device__ inline oplora_stream w1_stream(const Layer &l) {
    return oplora_stream_of(l.seed, l.layer, OPLORA_W1_TENSOR);
}

} // namespace lean

#endif
