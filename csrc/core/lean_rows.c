/* lean_rows: the two passes of adamw_lean.c over the rows of a map, a block at a time, and the parts that layers are cut
 * into. */
#include "lean.h"

#include <string.h>

/* ---- a block of any map ---- */

/* Of vector i of the basis, d of which are U's. */
static double TY(lean_scale_of)(const TY(lean_share) *share, int i, int d) { return i < d ? share->kappa : share->rho; }

/* Adds U^T g. */
static void TY(lean_reduce_along)(const TY(lean_rows) *r, const T *g, int64_t first, int64_t n, double *sums) {
    const T *column[RANK];
    double sum[RANK];
    for (int i = 0; i < r->d; i++) column[i] = r->U + i * r->rows + first;
    TY(oplora_dispatch)()->dot(column, r->d, g, n, sum);
    for (int i = 0; i < r->d; i++) sums[TY(lean_basis_size)(r) * TY(lean_basis_size)(r) + i] += sum[i];
}

/* First pass over the rows [first, first + n), n at most LEAN_BLOCK: adds to the sums. */
void TY(oplora_lean_reduce_block)(const TY(lean_rows) *r, const TY(lean_share) *share, const T *g, int64_t first,
                                  int64_t n, double *sums) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const int d = r->d, k = r->k, p = TY(lean_basis_size)(r);
    T row[LEAN_BLOCK], scaled_g[LEAN_BLOCK], wide[LEAN_BLOCK], scaled_A[RANK][LEAN_BLOCK];
    const T *basis[BASIS];
    double sum[BASIS];
    if (d == 2 && k == 1) {
        kernels->lean_reduce21(r->A + first, r->R + first, r->U + first, r->U + r->rows + first, g, n, &r->constants,
                               share->kappa, share->rho, sums);
        return;
    }
    kernels->lean_scale(r->R + first, g, n, &r->constants, row, scaled_g);
    for (int i = 0; i < d; i++) basis[i] = r->U + i * r->rows + first;
    for (int i = 0; i < k; i++) {
        kernels->lean_widen(r->A + i * r->rows + first, row, n, wide, scaled_A[i]);
        basis[d + i] = scaled_A[i];
    }
    basis[d + k] = scaled_g;
    for (int i = 0; i < p; i++) {
        kernels->dot(basis, i + 1, basis[i], n, sum);
        for (int j = 0; j <= i; j++)
            sums[i * p + j] += TY(lean_scale_of)(share, i, d) * TY(lean_scale_of)(share, j, d) * sum[j];
    }
    TY(lean_reduce_along)(r, g, first, n, sums);
}

void TY(oplora_lean_turn_of)(const TY(lean_rows) *r, const TY(lean_share) *share, TY(lean_turn) *turn) {
    turn->constants = r->constants;
    turn->constants.keep = (T)share->keep;
    turn->constants.rate = (T)share->rate;
    for (int a = 0; a < TY(lean_basis_size)(r); a++) {
        const T scale = (T)TY(lean_scale_of)(share, a, r->d);
        turn->weight[a] = r->weight[a] * scale;
        for (int i = 0; i < r->d; i++) turn->rotate_U[i][a] = r->rotate_U[i][a] * scale;
    }
    if (r->d != 2 || r->k != 1) return;
    turn->defaults.constants = turn->constants;
    memcpy(turn->defaults.weight, turn->weight, sizeof turn->defaults.weight);
    memcpy(turn->defaults.u0, turn->rotate_U[0], sizeof turn->defaults.u0);
    memcpy(turn->defaults.u1, turn->rotate_U[1], sizeof turn->defaults.u1);
    memcpy(turn->defaults.A, r->rotate_A[0], sizeof turn->defaults.A);
}

/* Second pass over the rows [first, first + n), which are `row` and on in the map with the rows of all processes: rounding
 * depends on those. */
void TY(oplora_lean_update_block)(const TY(lean_rows) *r, const TY(lean_turn) *turn, const T *g, const T *base,
                                  int64_t first, int64_t row, int64_t n, T *out) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const int d = r->d, k = r->k, p = TY(lean_basis_size)(r);
    T scale[LEAN_BLOCK], scaled_g[LEAN_BLOCK], wide[RANK][LEAN_BLOCK], scaled_A[RANK][LEAN_BLOCK],
        turned[RANK][LEAN_BLOCK];
    const T *basis[BASIS], *moment[RANK + 1];
    if (d == 2 && k == 1) {
        T *const U = r->U + first;
        kernels->lean_update21(U, U + r->rows, r->A + first, r->m + first, r->S + first, r->R + first, g, base, row, n,
                               &turn->defaults, out);
        return;
    }
    kernels->lean_second(r->m + first, r->S + first, r->R + first, g, base, row, n, &turn->constants, scale, scaled_g,
                         out);
    for (int i = 0; i < d; i++) basis[i] = r->U + i * r->rows + first;
    for (int i = 0; i < k; i++) {
        kernels->lean_widen(r->A + i * r->rows + first, scale, n, wide[i], scaled_A[i]);
        basis[d + i] = scaled_A[i];
        moment[i] = wide[i];
    }
    basis[d + k] = scaled_g;
    moment[k] = g;
    kernels->axpy(basis, turn->weight, p, out, n);
    for (int i = 0; i < d; i++) {
        memset(turned[i], 0, (size_t)n * sizeof(T));
        kernels->axpy(basis, turn->rotate_U[i], p, turned[i], n);
    }
    for (int i = 0; i < d; i++) memcpy(r->U + i * r->rows + first, turned[i], (size_t)n * sizeof(T));
    for (int i = 0; i < k; i++) {
        memset(scale, 0, (size_t)n * sizeof(T));
        kernels->axpy(moment, r->rotate_A[i], k + 1, scale, n);
        kernels->lean_round(scale, row, r->round_key[i], i ? 0 : 16, n, r->A + i * r->rows + first);
    }
}

/* ---- W0: the random rows of W2, a block at a time ---- */

/* The kernels make a vector's numbers from a multiple of ALIGNED entries on. A block of a whole factor begins with one;
 * one of a factor that processes divide may begin `shift` entries behind it, and then ends before the next LEAN_BLOCK. */
enum { ALIGNED = 128, SIGN_WORDS = LEAN_BLOCK + 64 };
#define WHOLE_LANES(n) (((n) + 15) & ~(int64_t)15) /* sign_dot reads so many words */

/* For each unit that is on: sums[j] += W0_j^T g over the block, in units of the bound. kept: takes the signs, or is NULL. */
static void TY(lean_random_reduce)(const TY(lean_plan) *p, int64_t range, const T *g, int64_t entry, int64_t n,
                                   double *sums, uint32_t *kept) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(oplora_lean) *const l = p->layer;
    const oplora_stream s = oplora_w2_stream(l->seed, l->layer, l->start, range);
    const int64_t shift = entry % ALIGNED;
    if (l->start == OPLORA_UNIFORM) {
        T shifted[LEAN_BLOCK];
        if (shift) {
            memset(shifted, 0, (size_t)shift * sizeof(T));
            memcpy(shifted + shift, g, (size_t)n * sizeof(T));
            g = shifted;
        }
        for (int64_t j = 0; j < l->H; j++)
            if (p->h[j] != 0) sums[j] += kernels->uniform_dot(&s, (uint32_t)j, entry - shift, g, shift + n);
        return;
    }
    for (int64_t group = 0; group * OPLORA_SIGNS < l->H; group++) {
        uint32_t room[SIGN_WORDS], *const words = kept ? kept + group * LEAN_BLOCK : room;
        int bit[OPLORA_SIGNS], count = 0;
        double sum[OPLORA_SIGNS];
        for (int64_t j = group * OPLORA_SIGNS; j < l->H && j < (group + 1) * OPLORA_SIGNS; j++)
            if (p->h[j] != 0) bit[count++] = (int)(j - group * OPLORA_SIGNS);
        if (!count && !kept) continue;
        kernels->sign_words(&s, (uint32_t)group, entry - shift, shift + WHOLE_LANES(n), words);
        kernels->sign_dot(words + shift, bit, count, g, n, sum);
        for (int i = 0; i < count; i++) sums[group * OPLORA_SIGNS + bit[i]] += sum[i];
    }
}

/* out += W0 x for the block; x (H) holds the bound already. */
void TY(oplora_lean_random_update)(const TY(oplora_lean) *l, int64_t range, const T *x, int64_t entry, int64_t n,
                                   const uint32_t *kept, T *out) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_stream s = oplora_w2_stream(l->seed, l->layer, l->start, range);
    const int64_t shift = entry % ALIGNED;
    if (l->start == OPLORA_UNIFORM) {
        T shifted[LEAN_BLOCK], *const to = shift ? shifted : out;
        if (shift) {
            memset(to, 0, (size_t)shift * sizeof(T));
            memcpy(to + shift, out, (size_t)n * sizeof(T));
        }
        for (int64_t j = 0; j < l->H; j++)
            if (x[j] != 0) kernels->uniform_axpy(&s, (uint32_t)j, entry - shift, x[j], to, shift + n);
        if (shift) memcpy(out, to + shift, (size_t)n * sizeof(T));
        return;
    }
    for (int64_t group = 0; group * OPLORA_SIGNS < l->H; group++) {
        uint32_t room[SIGN_WORDS];
        const uint32_t *const words = kept ? kept + group * LEAN_BLOCK : room + shift;
        T some[OPLORA_SIGNS] = {0};
        int live = 0;
        for (int64_t j = group * OPLORA_SIGNS; j < l->H && j < (group + 1) * OPLORA_SIGNS; j++) {
            some[j - group * OPLORA_SIGNS] = x[j];
            live |= x[j] != 0;
        }
        if (!live) continue;
        if (!kept) kernels->sign_words(&s, (uint32_t)group, entry - shift, shift + WHOLE_LANES(n), room);
        kernels->sign_axpy(words, some, out, n);
    }
}

/* ---- parts: chunks that follow each other ---- */

TY(lean_chunk) TY(oplora_lean_chunk_at)(const TY(oplora_lean) *l, int64_t chunk) {
    int64_t range = 0, row = 0, whole_row = 0;
    const TY(oplora_factor) *factor = l->factors;
    for (; chunk >= oplora_lean_chunks(factor->rows); factor++) {
        chunk -= oplora_lean_chunks(factor->rows);
        row += factor->rows;
        whole_row += factor->place ? factor->place->rows : factor->rows;
        range += factor->random != 0;
    }
    const int64_t left = factor->rows - chunk * LEAN_CHUNK;
    return (TY(lean_chunk)){
        factor, range, row + chunk * LEAN_CHUNK, chunk * LEAN_CHUNK, left < LEAN_CHUNK ? left : LEAN_CHUNK, whole_row};
}

/* The block that begins `at` rows behind a chunk's first. */
TY(lean_block) TY(oplora_lean_block_at)(const TY(lean_chunk) *chunk, int64_t at) {
    const oplora_place *const place = chunk->factor->place;
    const int64_t left = chunk->rows - at, here = chunk->entry + at;
    TY(lean_block) block = {here, chunk->whole_row + here, left < LEAN_BLOCK ? left : LEAN_BLOCK};
    if (!place) return block;
    const int64_t within = here % place->run;
    block.entry = place->first + here / place->run * place->stride + within;
    block.row = chunk->whole_row + block.entry;
    const int64_t of_run = place->run - within, of_block = LEAN_BLOCK - block.entry % LEAN_BLOCK;
    if (of_run < block.n) block.n = of_run;
    if (of_block < block.n) block.n = of_block;
    return block;
}

static int TY(lean_counts)(const TY(lean_chunk) *chunk) {
    return !chunk->factor->place || chunk->factor->place->counts;
}

static int64_t TY(lean_part_begin)(const TY(lean_plan) *p, int64_t part) { return p->chunks * part / p->parts; }

/* Where a block's words of signs stay between the passes; NULL: each pass makes them, as where blocks are no whole ones. */
static uint32_t *TY(lean_kept_words)(const TY(lean_plan) *p, const TY(lean_chunk) *chunk, int64_t index, int64_t at) {
    const int whole = p->wants == (LEAN_WANTS_DH | LEAN_WANTS_GRAM) && !chunk->factor->place;
    return whole && p->words ? p->words + (index * LEAN_CHUNK + at) * oplora_lean_words(p->layer->H) : NULL;
}

void TY(oplora_lean_square_part)(const TY(lean_plan) *p, int64_t part, double squares[2]) {
    squares[0] = squares[1] = 0;
    for (int64_t c = TY(lean_part_begin)(p, part); c < TY(lean_part_begin)(p, part + 1); c++) {
        const TY(lean_chunk) chunk = TY(oplora_lean_chunk_at)(p->layer, c);
        const T *const g = chunk.factor->g + chunk.entry;
        const double square = TY(oplora_dot_double)(g, g, chunk.rows);
        if (TY(lean_counts)(&chunk)) squares[0] += square;
        squares[1] += TY(oplora_nonfinite_in)(g, chunk.rows, square);
    }
}

/* First pass. */
void TY(oplora_lean_reduce_part)(const TY(lean_plan) *p, int64_t part, double *sums) {
    const TY(lean_rows) *const r = &p->outer.rows;
    double *const random_sums = sums + TY(lean_sums_size)(r);
    memset(sums, 0, (size_t)TY(lean_part_size)(p->layer) * sizeof *sums);
    for (int64_t c = TY(lean_part_begin)(p, part); c < TY(lean_part_begin)(p, part + 1); c++) {
        const TY(lean_chunk) chunk = TY(oplora_lean_chunk_at)(p->layer, c);
        const TY(lean_share) *const share = &p->shares[chunk.factor - p->layer->factors];
        for (int64_t at = 0, n; TY(lean_counts)(&chunk) && at < chunk.rows; at += n) {
            const TY(lean_block) block = TY(oplora_lean_block_at)(&chunk, at);
            T room[LEAN_BLOCK];
            n = block.n;
            const T *const g =
                TY(oplora_bounded_gradient)(chunk.factor->g + chunk.entry + at, n, p->layer->report[0], room);
            if (p->wants & LEAN_WANTS_GRAM) TY(oplora_lean_reduce_block)(r, share, g, chunk.row + at, n, sums);
            if (p->wants == LEAN_WANTS_DH) TY(lean_reduce_along)(r, g, chunk.row + at, n, sums);
            if (p->wants & LEAN_WANTS_DH && chunk.factor->random)
                TY(lean_random_reduce)(p, chunk.range, g, block.entry, n, random_sums,
                                       TY(lean_kept_words)(p, &chunk, c, at));
        }
    }
}

void TY(oplora_lean_update_part)(const TY(lean_plan) *p, int64_t part) {
    for (int64_t c = TY(lean_part_begin)(p, part); c < TY(lean_part_begin)(p, part + 1); c++) {
        const TY(lean_chunk) chunk = TY(oplora_lean_chunk_at)(p->layer, c);
        TY(lean_turn) turn;
        TY(oplora_lean_turn_of)(&p->outer.rows, &p->shares[chunk.factor - p->layer->factors], &turn);
        for (int64_t at = 0, n; at < chunk.rows; at += n) {
            const TY(lean_block) block = TY(oplora_lean_block_at)(&chunk, at);
            const int64_t entry = chunk.entry + at;
            const TY(oplora_factor) *const f = chunk.factor;
            T room[LEAN_BLOCK];
            n = block.n;
            const T *const g = TY(oplora_bounded_gradient)(f->g + entry, n, p->layer->report[0], room);
            TY(oplora_lean_update_block)(&p->outer.rows, &turn, g, f->base ? f->base + entry : NULL, chunk.row + at,
                                         block.row, n, f->out + entry);
            if (f->random)
                TY(oplora_lean_random_update)(p->layer, chunk.range, p->change, block.entry, n,
                                              TY(lean_kept_words)(p, &chunk, c, at), f->out + entry);
        }
    }
}
