/* adamw_lean: AdamW on generators whose W2, whose moments and whose W1 are kept as low-rank factors, whatever H is.
 *
 * The gradient of W2 is g h^T: rank one, and h moves slowly. So a linear map W (rows, inputs) with input x, bias c and
 * the gradients G = g x^T of W and g of c is kept as
 *
 *     W = s W0 + U Q^T            W0 random numbers made anew from the seed, U (rows, d), Q (inputs, d) orthonormal
 *     M = A B^T                   the first moment: A (rows, k), B (inputs, k)
 *     V = R r^T                   the second: R (rows) the average of g^2 mean(x^2), r (inputs) of x^2, of mean 1
 *     m, S                        c's own moments, in full; c itself is what the output holds beyond s W0 x + U Q^T x
 *
 * and both maps of a generator are: W2 with input h, whose output is the layer's factors, and W1 with input z, whose
 * output is W1 z + c1. One step of a map:
 *
 *     R, r      their averages; row = 1 / (sqrt(R / (1 - beta2^t)) + eps / mean(sqrt r)), col = 1 / sqrt(r),
 *               0 for an input that was never on. AdamW's step is row_n M_nj col_j / (1 - beta1^t)
 *     M         beta1 A B^T + (1 - beta1) g x^T, truncated to rank k in that scale (row M col), as it is the step's
 *     W         keep U Q^T - rate (row A) (B col)^T, truncated to rank d; s <- keep s
 *     output    + W0 (s' x' - keep s x) + U' Q'^T x' - keep U Q^T x + (keep - 1) c - c's step
 *
 * Truncations need the Gram matrix of [U, row A, row g] alone (lowrank.c). So there are two passes over the rows: one of
 * sums, W^T g and that matrix, and one that turns A and U and moves the output. The basis [U, row A, row g] is
 * everything that both truncations and the output combine; what multiplies it is a few numbers.
 *
 * keep and rate may differ from factor to factor. Those of the map are then the largest ones, a factor's are kappa keep and
 * rho rate, and its rows of the basis are [kappa U, rho row A, rho row g]: with these all of the above holds, and both
 * truncations weigh a row by the step it makes. kappa and rho multiply a block's sums and the few numbers, not its rows.
 *
 * Rows are cut into blocks that stay in the first-level cache, blocks into parts that do not depend on who does them,
 * and sums run in the order of blocks and parts. Layers are one thread's work each; one so large that the others would
 * wait for it is spread over all of them. */
#include "dispatch.h"
#include "lowrank.h"
#include "number.h"
#include "workspace.h"

#include <math.h>
#include <string.h>

enum {
    BLOCK = 512,          /* rows that are in the first-level cache together; a multiple of what the start asks for */
    PART = 4096,          /* least rows of a part */
    MOST_PARTS = 64,      /* of a layer: bounds the scratch */
    SMALL_WORK = 1 << 16, /* rows times (1 + H / 32): a layer up to this is one thread's work, */
    LARGE_WORK = 1 << 21, /* one above this is spread over the threads, and between them one that is much of all */
    RANK = OPLORA_MOST_RANK,
    BASIS = OPLORA_MOST_BASIS
};
enum { WANTS_DH = 1, WANTS_GRAM = 2 }; /* a measurement wants the one, a step that was measured the other */
static const double LEAST_EPS = 1e-30; /* so that a row without any gradient yet divides by something */

/* ---- one linear map ---- */

/* What the rows of a map need in both passes. */
typedef struct {
    int64_t rows;
    int d, k;
    T *U;
    TY(oplora_moment) *A, *m, *S, *R;
    TY(lean_numbers) numbers;
    uint32_t round_key[RANK];
    T weight[BASIS], rotate_U[RANK][BASIS], rotate_A[RANK][RANK + 1]; /* second pass: of the basis, and of [A, g] */
} TY(lean_rows);

/* What a factor's rows have of their own: c's keep and rate, kappa and rho. */
typedef struct {
    double keep, rate, kappa, rho;
} TY(lean_share);

typedef struct {
    TY(lean_rows) rows;
    int64_t inputs;
    T *Q, *B, *r;                          /* (d, inputs), (k, inputs), (inputs) */
    double *scale, *mean;                  /* s, and the mean of R */
    double keep, rate, beta1, start_keep;  /* start_keep shrinks s */
    double *K, *col, *Q_next, *directions; /* scratch: (BASIS, inputs), (inputs), (d, inputs), (k, inputs) */
    double *sums;                          /* scratch: the basis' Gram matrix (p, p), then U^T g (d) */
    double dropped_moment, dropped_weight;
} TY(lean_map);

static int TY(lean_basis_size)(const TY(lean_rows) *r) { return r->d + r->k + 1; }
static int64_t TY(lean_sums_size)(const TY(lean_rows) *r) {
    return TY(lean_basis_size)(r) * TY(lean_basis_size)(r) + r->d;
}

static double TY(lean_square)(const T *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

/* The averages that do not depend on single rows, and with them the step's numbers. square_g is ||g||^2. */
static void TY(lean_prepare_map)(TY(lean_map) *map, const T *x, double square_g, const oplora_adamw *a,
                                 double corrected2, const uint32_t key[4]) {
    const double mean_x = TY(lean_square)(x, map->inputs) / (double)map->inputs, most = TY(oplora_most_gradient);
    const double fresh = (1 - a->beta2) * mean_x * fmin(square_g / (double)map->rows.rows, most * most);
    *map->mean = a->beta2 * *map->mean + fresh;
    const double turn = *map->mean > 0 ? fresh / *map->mean : 0;
    double root = 0;
    int64_t live = 0;
    for (int64_t j = 0; j < map->inputs; j++) {
        const double part = turn > 0 ? (double)x[j] * x[j] / mean_x : 0;
        map->r[j] = (T)(map->r[j] + turn * (part - map->r[j]));
        const double c = map->r[j] > 0 ? sqrt((double)map->r[j]) : 0;
        map->col[j] = c > 0 ? 1 / c : 0;
        root += c;
        live += c > 0;
    }
    map->beta1 = a->beta1;
    map->rows.numbers = (TY(lean_numbers)){.beta1_rest = (T)(1 - a->beta1),
                                           .beta2 = (T)a->beta2,
                                           .beta2_rest = (T)(1 - a->beta2),
                                           .second = (T)((1 - a->beta2) * mean_x),
                                           .eps = (T)fmax(a->eps, LEAST_EPS),
                                           .eps_row = (T)fmax(live ? a->eps * (double)live / root : a->eps, LEAST_EPS),
                                           .inverse_root = (T)(1 / sqrt(corrected2)),
                                           .key = key[0]};
    /* the first column of A has the bits that R leaves of lean_second's other hash */
    map->rows.round_key[0] = key[0] ^ 0x9E3779B9u;
    for (int i = 1; i < map->rows.k; i++) map->rows.round_key[i] = key[1] + (uint32_t)i * key[2];
}

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

/* First pass over the rows [first, first + n), n at most BLOCK: adds to the sums. */
static void TY(lean_reduce_block)(const TY(lean_rows) *r, const TY(lean_share) *share, const T *g, int64_t first,
                                  int64_t n, double *sums) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const int d = r->d, k = r->k, p = TY(lean_basis_size)(r);
    T row[BLOCK], scaled_g[BLOCK], wide[BLOCK], scaled_A[RANK][BLOCK];
    const T *basis[BASIS];
    double sum[BASIS];
    if (d == 2 && k == 1) {
        kernels->lean_reduce21(r->A + first, r->R + first, r->U + first, r->U + r->rows + first, g, n, &r->numbers,
                               share->kappa, share->rho, sums);
        return;
    }
    kernels->lean_scale(r->R + first, g, n, &r->numbers, row, scaled_g);
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

/* After all sums and with the next input: the truncations, and what the second pass multiplies the basis with. */
static void TY(lean_solve_map)(TY(lean_map) *map, const T *x) {
    TY(lean_rows) *const r = &map->rows;
    const int d = r->d, k = r->k, p = TY(lean_basis_size)(r);
    const int64_t n = map->inputs;
    double gram[BASIS * BASIS], all[BASIS * BASIS], rotate_A[BASIS * RANK], rotate_W[BASIS * RANK];
    for (int i = 0; i < p; i++)
        for (int j = 0; j <= i; j++) all[i * p + j] = all[j * p + i] = map->sums[i * p + j];

    /* the first moment: [A, g] K in the step's scale */
    for (int i = 0; i <= k; i++)
        for (int j = 0; j <= k; j++) gram[i * (k + 1) + j] = all[(d + i) * p + d + j];
    for (int64_t j = 0; j < n; j++) {
        for (int i = 0; i < k; i++) map->K[i * n + j] = map->beta1 * map->B[i * n + j] * map->col[j];
        map->K[k * n + j] = (1 - map->beta1) * x[j] * map->col[j];
    }
    map->dropped_moment = oplora_truncate(gram, k + 1, map->K, n, k, rotate_A, map->directions);
    for (int64_t j = 0; j < n; j++)
        for (int i = 0; i < k; i++)
            map->B[i * n + j] = (T)(map->col[j] > 0 ? map->directions[i * n + j] / map->col[j] : 0);

    /* W: [U, row A'] with A' = [A, g] rotate_A; the same for the whole basis: change (p, d + k) */
    double change[BASIS][BASIS] = {{0}};
    for (int i = 0; i < d; i++) change[i][i] = 1;
    for (int i = 0; i <= k; i++)
        for (int j = 0; j < k; j++) change[d + i][d + j] = rotate_A[i * k + j];
    for (int i = 0; i < d + k; i++)
        for (int j = 0; j < d + k; j++) {
            double sum = 0;
            for (int a = 0; a < p; a++)
                for (int b = 0; b < p; b++) sum += change[a][i] * all[a * p + b] * change[b][j];
            gram[i * (d + k) + j] = sum;
        }
    for (int64_t j = 0; j < n; j++) {
        for (int i = 0; i < d; i++) map->K[i * n + j] = map->keep * map->Q[i * n + j];
        for (int i = 0; i < k; i++) map->K[(d + i) * n + j] = -map->rate * map->directions[i * n + j];
    }
    if (map->rate == 0 && map->keep == 1) { /* nothing moves, not even by rounding */
        map->dropped_weight = 0;
        memset(rotate_W, 0, sizeof rotate_W);
        for (int i = 0; i < d; i++) rotate_W[i * d + i] = 1;
        for (int64_t j = 0; j < d * n; j++) map->Q_next[j] = map->Q[j];
    } else
        map->dropped_weight = oplora_truncate(gram, d + k, map->K, n, d, rotate_W, map->Q_next);

    for (int i = 0; i < k; i++)
        for (int a = 0; a <= k; a++) r->rotate_A[i][a] = (T)rotate_A[a * k + i];
    for (int i = 0; i < d; i++)
        for (int a = 0; a < p; a++) {
            double sum = 0;
            for (int b = 0; b < d + k; b++) sum += change[a][b] * rotate_W[b * d + i];
            r->rotate_U[i][a] = (T)sum;
        }
}

/* The output's share of the basis: U' Q'^T x' - keep U Q^T x. Then Q' takes Q's place. */
static void TY(lean_finish_map)(TY(lean_map) *map, const T *x, const T *x_next) {
    TY(lean_rows) *const r = &map->rows;
    const int64_t n = map->inputs;
    double weight[BASIS] = {0};
    for (int i = 0; i < r->d; i++) {
        double now = 0, next = 0;
        for (int64_t j = 0; j < n; j++) {
            now += (double)map->Q[i * n + j] * x[j];
            map->Q[i * n + j] = (T)map->Q_next[i * n + j];
            next += (double)map->Q[i * n + j] * x_next[j];
        }
        for (int a = 0; a < TY(lean_basis_size)(r); a++) weight[a] += r->rotate_U[i][a] * next;
        weight[i] -= map->keep * now;
    }
    for (int a = 0; a < TY(lean_basis_size)(r); a++) r->weight[a] = (T)weight[a];
}

/* What the second pass multiplies a factor's rows with. */
typedef struct {
    TY(lean_numbers) numbers;
    T weight[BASIS], rotate_U[RANK][BASIS];
} TY(lean_turn);

static void TY(lean_turn_of)(const TY(lean_rows) *r, const TY(lean_share) *share, TY(lean_turn) *turn) {
    turn->numbers = r->numbers;
    turn->numbers.keep = (T)share->keep;
    turn->numbers.rate = (T)share->rate;
    for (int a = 0; a < TY(lean_basis_size)(r); a++) {
        const T scale = (T)TY(lean_scale_of)(share, a, r->d);
        turn->weight[a] = r->weight[a] * scale;
        for (int i = 0; i < r->d; i++) turn->rotate_U[i][a] = r->rotate_U[i][a] * scale;
    }
}

/* Second pass over the rows [first, first + n). */
static void TY(lean_update_block)(const TY(lean_rows) *r, const TY(lean_turn) *turn, const T *g, const T *base,
                                  int64_t first, int64_t n, T *out) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const int d = r->d, k = r->k, p = TY(lean_basis_size)(r);
    T row[BLOCK], scaled_g[BLOCK], wide[RANK][BLOCK], scaled_A[RANK][BLOCK], turned[RANK][BLOCK];
    const T *basis[BASIS], *moment[RANK + 1];
    if (d == 2 && k == 1) {
        T *const U = r->U + first;
        kernels->lean_update21(U, U + r->rows, r->A + first, r->m + first, r->S + first, r->R + first, g, base, first,
                               n, &turn->numbers, turn->weight, turn->rotate_U[0], turn->rotate_U[1], r->rotate_A[0],
                               out);
        return;
    }
    kernels->lean_second(r->m + first, r->S + first, r->R + first, g, base, first, n, &turn->numbers, row, scaled_g,
                         out);
    for (int i = 0; i < d; i++) basis[i] = r->U + i * r->rows + first;
    for (int i = 0; i < k; i++) {
        kernels->lean_widen(r->A + i * r->rows + first, row, n, wide[i], scaled_A[i]);
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
        memset(row, 0, (size_t)n * sizeof(T));
        kernels->axpy(moment, r->rotate_A[i], k + 1, row, n);
        kernels->lean_round(row, first, r->round_key[i], i ? 0 : 16, n, r->A + i * r->rows + first);
    }
}

/* ---- one layer ---- */

typedef struct {
    const TY(oplora_lean) *layer;
    TY(lean_map) outer, hidden;
    T *pre, *z, *z_avg, *z_avg_sq;
    T *h, *h_next, *d, *z_next, *change; /* scratch: (H) four times, Z, max(H, Z) */
    double *dh;
    double *part_sums;             /* (parts, sums of the outer map, H): the last is W0^T g over W0's bound */
    double corrected1, corrected2; /* 1 - beta^t */
    TY(lean_share) *shares;        /* scratch: of each factor */
    int64_t first_part, parts, chunks;
    double bound;
    int spreads; /* over the threads; who does the work changes no bit */
    int wants;   /* of the first pass: WANTS_DH, WANTS_GRAM */
} TY(lean_plan);

typedef struct {
    TY(lean_plan) *plans;
    int64_t *part_plan; /* which plan a part belongs to */
    double *squares;    /* (all parts, 2) */
    int64_t n_plans, n_parts, first_plan;
    int steps;              /* or it measures */
    TY(lean_plan) *current; /* the layer whose parts are spread over the threads */
    char *slots;            /* scratch of single layers; see TY(lean_use_slot) */
    int64_t slot_bytes;
    double *part_sums; /* of one spread layer */
} TY(lean_job);

static int64_t TY(lean_chunks)(int64_t rows) { return (rows + PART - 1) / PART; }

static double TY(lean_work)(const TY(oplora_lean) *l) { return (double)l->N * (1 + (double)l->H / 32); }

static int64_t TY(lean_parts_of)(const TY(oplora_lean) *l) {
    int64_t chunks = 0;
    for (int64_t f = 0; f < l->n_factors; f++) chunks += TY(lean_chunks)(l->factors[f].rows);
    return chunks < MOST_PARTS ? chunks : MOST_PARTS;
}

static int64_t TY(lean_part_size)(const TY(oplora_lean) *l) {
    const int64_t p = l->weight_rank + l->moment_rank + 1;
    return p * p + l->weight_rank + l->H;
}

/* Lays a layer's scratch out; the same walk counts its bytes. */
static void TY(lean_take_scratch)(TY(lean_plan) *p, const TY(oplora_lean) *l, arena *a) {
    const int64_t basis = l->weight_rank + l->moment_rank + 1, wider = l->H > l->Z ? l->H : l->Z;
    p->h = take(a, l->H, sizeof(T));
    p->h_next = take(a, l->H, sizeof(T));
    p->d = take(a, l->H, sizeof(T));
    p->z_next = take(a, l->Z, sizeof(T));
    p->change = take(a, wider, sizeof(T));
    double *const dh = take(a, l->H, sizeof(double));
    p->dh = l->dh ? l->dh : dh;
    p->shares = take(a, l->n_factors, sizeof(TY(lean_share)));
    for (TY(lean_map) *map = &p->outer; map; map = map == &p->outer ? &p->hidden : NULL) {
        const int64_t inputs = map == &p->outer ? l->H : l->Z;
        map->K = take(a, basis * inputs, sizeof(double));
        map->col = take(a, inputs, sizeof(double));
        map->Q_next = take(a, l->weight_rank * inputs, sizeof(double));
        map->directions = take(a, l->moment_rank * inputs, sizeof(double));
        map->sums = take(a, TY(lean_part_size)(l), sizeof(double));
    }
    p->part_sums = take(a, TY(lean_part_size)(l), sizeof(double));
}

static TY(lean_plan) TY(lean_plan_of)(const TY(oplora_lean) *l) {
    const int64_t H = l->H, Z = l->Z, N = l->N, d = l->weight_rank, k = l->moment_rank;
    TY(lean_plan) p = {.layer = l, .parts = TY(lean_parts_of)(l), .bound = oplora_start_bound(l->start, H)};
    for (int64_t f = 0; f < l->n_factors; f++) p.chunks += TY(lean_chunks)(l->factors[f].rows);
    T *at = l->numbers;
    TY(oplora_moment) *moment = l->moments;
#define NEXT(pointer, count) ((pointer) += (count), (pointer) - (count))
    p.outer = (TY(lean_map)){.inputs = H, .rows = {.rows = N, .d = (int)d, .k = (int)k}};
    p.hidden = (TY(lean_map)){.inputs = Z, .rows = {.rows = H, .d = (int)d, .k = (int)k}};
    p.outer.rows.U = NEXT(at, d * N);
    p.hidden.rows.U = NEXT(at, d * H);
    p.pre = NEXT(at, H);
    p.outer.Q = NEXT(at, d * H);
    p.outer.B = NEXT(at, k * H);
    p.outer.r = NEXT(at, H);
    p.hidden.Q = NEXT(at, d * Z);
    p.hidden.B = NEXT(at, k * Z);
    p.hidden.r = NEXT(at, Z);
    p.z = NEXT(at, Z);
    p.z_avg = NEXT(at, Z);
    p.z_avg_sq = NEXT(at, Z);
    p.outer.rows.A = NEXT(moment, k * N);
    p.outer.rows.m = NEXT(moment, N);
    p.outer.rows.S = NEXT(moment, N);
    p.outer.rows.R = NEXT(moment, N);
    p.hidden.rows.A = NEXT(moment, k * H);
    p.hidden.rows.m = NEXT(moment, H);
    p.hidden.rows.S = NEXT(moment, H);
    p.hidden.rows.R = NEXT(moment, H);
#undef NEXT
    p.outer.scale = l->scalars;
    p.outer.mean = l->scalars + 1;
    p.hidden.scale = l->scalars + 2;
    p.hidden.mean = l->scalars + 3;
    return p;
}

/* ---- the factors' rates ---- */

static double TY(lean_keep_of)(const TY(oplora_factor) *f) { return 1 - f->lr * f->weight_decay; }

/* The largest of the factors' rates and keeps, which are the map's; each factor's share of them; and the keep of the random
 * ones, which is W0's. */
static void TY(lean_find_rates)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    TY(lean_map) *const map = &p->outer;
    const TY(oplora_factor) *random = NULL;
    double lr = 0;
    p->corrected1 = 1 - pow(l->adamw.beta1, (double)l->adamw.step);
    p->corrected2 = 1 - pow(l->adamw.beta2, (double)l->adamw.step);
    map->keep = 0;
    for (const TY(oplora_factor) *f = l->factors; f < l->factors + l->n_factors; f++) {
        if (fabs(f->lr) > fabs(lr)) lr = f->lr;
        if (fabs(TY(lean_keep_of)(f)) > fabs(map->keep)) map->keep = TY(lean_keep_of)(f);
        if (f->random && !random) random = f;
    }
    map->rate = lr * l->adamw.weight_ratio / p->corrected1;
    map->start_keep = random ? TY(lean_keep_of)(random) : map->keep;
    for (int64_t f = 0; f < l->n_factors; f++) {
        const double keep = TY(lean_keep_of)(&l->factors[f]);
        p->shares[f] = (TY(lean_share)){.keep = keep,
                                        .rate = l->factors[f].lr / p->corrected1,
                                        .kappa = map->keep != 0 ? keep / map->keep : 1,
                                        .rho = lr != 0 ? l->factors[f].lr / lr : 1};
    }
}

/* ---- W0: the random rows of W2, a block at a time ---- */

enum { TY(lean_GROUP) = 32 };

/* For each unit that is on: sums[j] += W0_j^T g over the block, in units of the bound. */
static void TY(lean_random_reduce)(const TY(lean_plan) *p, int64_t range, const T *g, int64_t entry, int64_t n,
                                   double *sums) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(oplora_lean) *const l = p->layer;
    const oplora_stream s = oplora_w2_stream(l->seed, l->layer, l->start, range);
    if (l->start == OPLORA_UNIFORM) {
        for (int64_t j = 0; j < l->H; j++)
            if (p->h[j] != 0) sums[j] += kernels->uniform_dot(&s, (uint32_t)j, entry, g, n);
        return;
    }
    for (int64_t group = 0; group * TY(lean_GROUP) < l->H; group++) {
        uint32_t words[BLOCK];
        int bit[TY(lean_GROUP)], count = 0;
        double sum[TY(lean_GROUP)];
        for (int64_t j = group * TY(lean_GROUP); j < l->H && j < (group + 1) * TY(lean_GROUP); j++)
            if (p->h[j] != 0) bit[count++] = (int)(j - group * TY(lean_GROUP));
        if (!count) continue;
        kernels->sign_words(&s, (uint32_t)group, entry, n, words);
        kernels->sign_dot(words, bit, count, g, n, sum);
        for (int i = 0; i < count; i++) sums[group * TY(lean_GROUP) + bit[i]] += sum[i];
    }
}

/* out += W0 x for the block; x (H) holds the bound already. */
static void TY(lean_random_update)(const TY(oplora_lean) *l, int64_t range, const T *x, int64_t entry, int64_t n,
                                   T *out) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_stream s = oplora_w2_stream(l->seed, l->layer, l->start, range);
    if (l->start == OPLORA_UNIFORM) {
        for (int64_t j = 0; j < l->H; j++)
            if (x[j] != 0) kernels->uniform_axpy(&s, (uint32_t)j, entry, x[j], out, n);
        return;
    }
    for (int64_t group = 0; group * TY(lean_GROUP) < l->H; group++) {
        uint32_t words[BLOCK];
        int bit[TY(lean_GROUP)], count = 0;
        T some[TY(lean_GROUP)];
        for (int64_t j = group * TY(lean_GROUP); j < l->H && j < (group + 1) * TY(lean_GROUP); j++)
            if (x[j] != 0) {
                bit[count] = (int)(j - group * TY(lean_GROUP));
                some[count++] = x[j];
            }
        if (!count) continue;
        kernels->sign_words(&s, (uint32_t)group, entry, n, words);
        kernels->sign_axpy(words, bit, some, count, out, n);
    }
}

/* ---- parts: runs of PART rows, each of one factor ---- */

typedef struct {
    const TY(oplora_factor) *factor;
    int64_t range;            /* which of the layer's random factors; only if it is one */
    int64_t row, entry, rows; /* first row in W2, first entry in the factor, rows */
} TY(lean_chunk);

static TY(lean_chunk) TY(lean_chunk_at)(const TY(oplora_lean) *l, int64_t chunk) {
    int64_t range = 0, row = 0;
    const TY(oplora_factor) *factor = l->factors;
    for (; chunk >= TY(lean_chunks)(factor->rows); factor++) {
        chunk -= TY(lean_chunks)(factor->rows);
        row += factor->rows;
        range += factor->random != 0;
    }
    const int64_t left = factor->rows - chunk * PART;
    return (TY(lean_chunk)){factor, range, row + chunk * PART, chunk * PART, left < PART ? left : PART};
}

static int64_t TY(lean_part_begin)(const TY(lean_plan) *p, int64_t part) { return p->chunks * part / p->parts; }

static void TY(lean_square_part)(const TY(lean_plan) *p, int64_t part, double squares[2]) {
    squares[0] = squares[1] = 0;
    for (int64_t c = TY(lean_part_begin)(p, part); c < TY(lean_part_begin)(p, part + 1); c++) {
        const TY(lean_chunk) chunk = TY(lean_chunk_at)(p->layer, c);
        int64_t nonfinite;
        squares[0] += TY(oplora_dispatch)()->square_sum(chunk.factor->g + chunk.entry, chunk.rows, &nonfinite);
        squares[1] += (double)nonfinite;
    }
}

/* First pass. */
static void TY(lean_reduce_part)(const TY(lean_plan) *p, int64_t part, double *sums) {
    const TY(lean_rows) *const r = &p->outer.rows;
    double *const random_sums = sums + TY(lean_sums_size)(r);
    memset(sums, 0, (size_t)TY(lean_part_size)(p->layer) * sizeof *sums);
    for (int64_t c = TY(lean_part_begin)(p, part); c < TY(lean_part_begin)(p, part + 1); c++) {
        const TY(lean_chunk) chunk = TY(lean_chunk_at)(p->layer, c);
        const TY(lean_share) *const share = &p->shares[chunk.factor - p->layer->factors];
        for (int64_t at = 0; at < chunk.rows; at += BLOCK) {
            const int64_t n = chunk.rows - at < BLOCK ? chunk.rows - at : BLOCK;
            T room[BLOCK];
            const T *const g =
                TY(oplora_bounded_gradient)(chunk.factor->g + chunk.entry + at, n, p->layer->report[0], room);
            if (p->wants & WANTS_GRAM) TY(lean_reduce_block)(r, share, g, chunk.row + at, n, sums);
            if (p->wants == WANTS_DH) TY(lean_reduce_along)(r, g, chunk.row + at, n, sums);
            if (p->wants & WANTS_DH && chunk.factor->random)
                TY(lean_random_reduce)(p, chunk.range, g, chunk.entry + at, n, random_sums);
        }
    }
}

static void TY(lean_update_part)(const TY(lean_plan) *p, int64_t part) {
    for (int64_t c = TY(lean_part_begin)(p, part); c < TY(lean_part_begin)(p, part + 1); c++) {
        const TY(lean_chunk) chunk = TY(lean_chunk_at)(p->layer, c);
        TY(lean_turn) turn;
        TY(lean_turn_of)(&p->outer.rows, &p->shares[chunk.factor - p->layer->factors], &turn);
        for (int64_t at = 0; at < chunk.rows; at += BLOCK) {
            const int64_t entry = chunk.entry + at, n = chunk.rows - at < BLOCK ? chunk.rows - at : BLOCK;
            const TY(oplora_factor) *const f = chunk.factor;
            T room[BLOCK];
            const T *const g = TY(oplora_bounded_gradient)(f->g + entry, n, p->layer->report[0], room);
            TY(lean_update_block)(&p->outer.rows, &turn, g, f->base ? f->base + entry : NULL, chunk.row + at, n,
                                  f->out + entry);
            if (f->random) TY(lean_random_update)(p->layer, chunk.range, p->change, entry, n, f->out + entry);
        }
    }
}

/* ---- the hidden path of one layer ---- */

static oplora_stream TY(lean_w1_stream)(const TY(oplora_lean) *l) {
    return (oplora_stream){l->seed, l->layer, OPLORA_W1_TENSOR};
}

static void TY(lean_find_hidden)(const TY(lean_plan) *p, T *h) {
    for (int64_t j = 0; j < p->layer->H; j++) h[j] = p->pre[j] > 0 ? p->pre[j] : 0;
}

/* Of this step's rounding noise; map is 0 for W2, 1 for W1. */
static void TY(lean_rounding_key)(const TY(oplora_lean) *l, uint32_t map, uint32_t key[4]) {
    const uint64_t step = (uint64_t)l->adamw.step;
    oplora_philox4x32_10(
        (const uint32_t[]){(uint32_t)step, (uint32_t)(step >> 32) | OPLORA_ROUNDING << 24, map, l->layer},
        (const uint32_t[]){(uint32_t)l->seed, (uint32_t)(l->seed >> 32)}, key);
}

static void TY(lean_begin_layer)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    uint32_t key[4];
    TY(lean_find_hidden)(p, p->h);
    memset(p->outer.sums, 0, (size_t)TY(lean_part_size)(l) * sizeof(double));
    if (!(p->wants & WANTS_GRAM)) return;
    TY(lean_rounding_key)(l, 0, key);
    TY(lean_find_rates)(p);
    TY(lean_prepare_map)(&p->outer, p->h, l->report[0], &l->adamw, p->corrected2, key);
}

static void TY(lean_add_part)(TY(lean_plan) *p, const double *sums) {
    for (int64_t i = 0; i < TY(lean_part_size)(p->layer); i++) p->outer.sums[i] += sums[i];
}

/* dh = s W0^T g + Q (U^T g) where the unit is on, from the sums of all parts. */
static void TY(lean_find_dh)(TY(lean_plan) *p) {
    const TY(lean_rows) *const r = &p->outer.rows;
    const int64_t H = p->layer->H, own = TY(lean_sums_size)(r);
    const double *const along = p->outer.sums + TY(lean_basis_size)(r) * TY(lean_basis_size)(r);
    if (!(p->wants & WANTS_DH)) return;
    for (int64_t j = 0; j < H; j++) {
        double sum = *p->outer.scale * p->bound * p->outer.sums[own + j];
        for (int i = 0; i < r->d; i++) sum += (double)p->outer.Q[i * H + j] * along[i];
        p->dh[j] = p->h[j] != 0 ? sum : 0;
    }
}

/* p->d = dh in T, and dz = W1^T d into p->change; the report's numbers of the hidden path. */
static void TY(lean_report_hidden)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_stream s = TY(lean_w1_stream)(l);
    const TY(lean_rows) *const r = &p->hidden.rows;
    const double bound = oplora_start_bound(OPLORA_UNIFORM, l->Z) * *p->hidden.scale;
    double along[RANK] = {0}, d2 = 0, dz2 = 0;
    T *const dz = p->change;
    memset(dz, 0, (size_t)l->Z * sizeof(T));
    l->report[4] = 0;
    for (int64_t j = 0; j < l->H; j++) {
        p->d[j] = TY(oplora_narrowed)(p->dh[j]);
        d2 += p->dh[j] * p->dh[j];
        l->report[4] += p->h[j] != 0;
        if (p->dh[j] == 0) continue;
        kernels->uniform_axpy(&s, (uint32_t)j, 0, TY(oplora_narrowed)(bound * p->dh[j]), dz, l->Z);
        for (int i = 0; i < r->d; i++) along[i] += (double)r->U[i * l->H + j] * p->dh[j];
    }
    for (int64_t i = 0; i < l->Z; i++) {
        double sum = dz[i];
        for (int a = 0; a < r->d; a++) sum += (double)p->hidden.Q[a * l->Z + i] * along[a];
        dz[i] = TY(oplora_narrowed)(sum);
        dz2 += sum * sum;
    }
    l->report[2] = dz2 + d2 * (TY(lean_square)(p->z, l->Z) + 1);
    l->report[3] = TY(lean_square)(p->h, l->H);
}

static void TY(lean_step_hidden)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_adamw *const a = &l->adamw;
    const oplora_stream s = TY(lean_w1_stream)(l);
    TY(lean_map) *const map = &p->hidden;
    uint32_t key[4];
    TY(lean_report_hidden)(p);
    TY(lean_rounding_key)(l, 1, key);
    map->keep = map->start_keep = 1 - a->hidden_lr * a->weight_decay;
    map->rate = a->hidden_lr / p->corrected1;
    const TY(lean_share) share = {map->keep, map->rate, 1, 1};
    TY(lean_turn) turn;
    TY(lean_prepare_map)(map, p->z, TY(lean_square)(p->d, l->H), a, p->corrected2, key);
    memset(map->sums, 0, (size_t)TY(lean_sums_size)(&map->rows) * sizeof(double));
    for (int64_t j = 0; j < l->H; j += BLOCK)
        TY(lean_reduce_block)(&map->rows, &share, p->d + j, j, l->H - j < BLOCK ? l->H - j : BLOCK, map->sums);
    TY(lean_solve_map)(map, p->z);

    const TY(adamw_numbers) numbers = {.beta1_rest = (T)(1 - a->beta1),
                                       .beta2 = (T)a->beta2,
                                       .beta2_rest = (T)(1 - a->beta2),
                                       .keep = (T)map->keep,
                                       .rate = (T)map->rate,
                                       .eps = map->rows.numbers.eps,
                                       .inverse_root = map->rows.numbers.inverse_root};
    memcpy(p->z_next, p->z, (size_t)l->Z * sizeof(T));
    kernels->adamw(p->z_next, p->z_avg, p->z_avg_sq, p->change, 1, 0, NULL, l->Z, &numbers);
    TY(lean_finish_map)(map, p->z, p->z_next);
    const double bound = oplora_start_bound(OPLORA_UNIFORM, l->Z) * map->start_keep * *map->scale;
    for (int64_t i = 0; i < l->Z; i++) p->change[i] = (T)(bound * ((double)p->z_next[i] - p->z[i]));
    TY(lean_turn_of)(&map->rows, &share, &turn);
    for (int64_t j = 0; j < l->H; j += BLOCK)
        TY(lean_update_block)(&map->rows, &turn, p->d + j, NULL, j, l->H - j < BLOCK ? l->H - j : BLOCK, p->pre + j);
    for (int64_t j = 0; j < l->H; j++) p->pre[j] += (T)kernels->uniform_dot(&s, (uint32_t)j, 0, p->change, l->Z);
    memcpy(p->z, p->z_next, (size_t)l->Z * sizeof(T));
    *map->scale *= map->start_keep;
    TY(lean_find_hidden)(p, p->h_next);
}

/* Between the passes. */
static void TY(lean_solve_layer)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    TY(lean_map) *const map = &p->outer;
    TY(lean_find_dh)(p);
    TY(lean_step_hidden)(p);
    TY(lean_solve_map)(map, p->h);
    TY(lean_finish_map)(map, p->h, p->h_next);
    const double bound = p->bound * map->start_keep * *map->scale;
    for (int64_t j = 0; j < l->H; j++) p->change[j] = (T)(bound * ((double)p->h_next[j] - p->h[j]));
    *map->scale *= map->start_keep;
    l->report[5] = map->dropped_moment;
    l->report[6] = map->dropped_weight;
    l->report[7] = p->hidden.dropped_moment;
    l->report[8] = p->hidden.dropped_weight;
}

static void TY(lean_measure_dh)(TY(lean_plan) *p) {
    TY(lean_find_dh)(p);
    TY(lean_report_hidden)(p);
}

/* ---- the job: all layers, on the caller's threads ---- */

/* Ranges of layers run one after another on their thread, so that a range needs one slot: that of its first layer. The
 * others are never touched and, in fresh memory, never resident. */
static void TY(lean_use_slot)(const TY(lean_job) *job, int64_t slot, TY(lean_plan) *p) {
    arena a = {job->slots + slot * job->slot_bytes, 0};
    TY(lean_take_scratch)(p, p->layer, &a);
}

/* Parts of all layers, by one index. */
static void TY(lean_square_parts)(int64_t begin, int64_t end, void *context) {
    const TY(lean_job) *const job = context;
    for (int64_t i = begin; i < end; i++) {
        const TY(lean_plan) *const p = &job->plans[job->part_plan[i]];
        TY(lean_square_part)(p, i - p->first_part, job->squares + 2 * i);
    }
}

/* Parts of the layer that is spread. */
static void TY(lean_reduce_parts)(int64_t begin, int64_t end, void *context) {
    const TY(lean_job) *const job = context;
    const TY(lean_plan) *const p = job->current;
    for (int64_t i = begin; i < end; i++) TY(lean_reduce_part)(p, i, job->part_sums + i * TY(lean_part_size)(p->layer));
}
static void TY(lean_update_parts)(int64_t begin, int64_t end, void *context) {
    const TY(lean_job) *const job = context;
    for (int64_t i = begin; i < end; i++) TY(lean_update_part)(job->current, i);
}

/* A whole layer by one thread. */
static void TY(lean_do_small)(TY(lean_plan) *p, int steps) {
    for (int64_t part = 0; part < p->parts; part++) {
        TY(lean_reduce_part)(p, part, p->part_sums);
        TY(lean_add_part)(p, p->part_sums);
    }
    if (!steps) {
        TY(lean_measure_dh)(p);
        return;
    }
    TY(lean_solve_layer)(p);
    for (int64_t part = 0; part < p->parts; part++) TY(lean_update_part)(p, part);
}

static void TY(lean_layers)(int64_t begin, int64_t end, void *context) {
    TY(lean_job) *const job = context;
    for (int64_t i = begin; i < end; i++) {
        TY(lean_plan) *const p = &job->plans[job->first_plan + i];
        TY(lean_use_slot)(job, job->first_plan + begin, p);
        TY(lean_begin_layer)(p);
        TY(lean_do_small)(p, job->steps);
    }
}

/* A layer whose parts are spread over the threads. */
static oplora_status TY(lean_do_large)(TY(lean_job) *job, TY(lean_plan) *p, oplora_parallel_fn par) {
    job->current = p;
    TY(lean_use_slot)(job, 0, p);
    TY(lean_begin_layer)(p);
    oplora_status status = oplora_parallel(par, p->parts, 1, TY(lean_reduce_parts), job);
    for (int64_t part = 0; part < p->parts; part++)
        TY(lean_add_part)(p, job->part_sums + part * TY(lean_part_size)(p->layer));
    if (status == OPLORA_OK && job->steps) {
        TY(lean_solve_layer)(p);
        status = oplora_parallel(par, p->parts, 1, TY(lean_update_parts), job);
    } else if (status == OPLORA_OK)
        TY(lean_measure_dh)(p);
    return status;
}

/* Runs of layers a layer a thread, those that are spread one at a time. */
static oplora_status TY(lean_for_layers)(TY(lean_job) *job, int steps, oplora_parallel_fn par) {
    job->steps = steps;
    for (int64_t first = 0, last; first < job->n_plans; first = last) {
        for (last = first; last < job->n_plans && !job->plans[last].spreads; last++) {
        }
        if (last > first) {
            job->first_plan = first;
            OPLORA_FORWARD(oplora_parallel(par, last - first, 1, TY(lean_layers), job));
        } else
            OPLORA_FORWARD(TY(lean_do_large)(job, &job->plans[last++], par));
    }
    return OPLORA_OK;
}

/* ||g||^2 of every layer, and whether all of them are finite. */
static oplora_status TY(lean_measure_squares)(TY(lean_job) *job, oplora_parallel_fn par) {
    int finite = 1;
    OPLORA_FORWARD(oplora_parallel(par, job->n_parts, 1, TY(lean_square_parts), job));
    for (const TY(lean_plan) *p = job->plans; p < job->plans + job->n_plans; p++) {
        double *const report = p->layer->report;
        report[0] = report[1] = 0;
        for (int64_t part = p->first_part; part < p->first_part + p->parts; part++) {
            report[0] += job->squares[2 * part];
            report[1] += job->squares[2 * part + 1];
        }
        finite &= report[1] == 0;
    }
    return finite ? OPLORA_OK : OPLORA_ENONFINITE;
}

/* ---- entry points ---- */

static oplora_status TY(lean_check_layer)(const TY(oplora_lean) *l) {
    int64_t rows = 0, ranges = 0;
    OPLORA_RETURN_IF(oplora_lean_numbers(l->H, l->Z, l->N, l->weight_rank, l->moment_rank) < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(l->n_factors < 1, OPLORA_ESIZE);
    OPLORA_RETURN_IF(!l->factors, OPLORA_ENULL);
    OPLORA_RETURN_IF(l->start != OPLORA_UNIFORM && l->start != OPLORA_SIGN, OPLORA_EVALUE);
    for (int64_t f = 0; f < l->n_factors; f++) {
        OPLORA_RETURN_IF(l->factors[f].rows < 1 || l->factors[f].rows > l->N - rows, OPLORA_ESIZE);
        rows += l->factors[f].rows;
        ranges += l->factors[f].random != 0;
    }
    OPLORA_RETURN_IF(rows != l->N, OPLORA_ESIZE);
    return ranges <= OPLORA_MOST_RANGES ? OPLORA_OK : OPLORA_ERANGES;
}

static oplora_status TY(lean_check)(const TY(oplora_lean) *layers, int64_t n_layers) {
    OPLORA_RETURN_IF(n_layers < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(n_layers > 0 && !layers, OPLORA_ENULL);
    for (int64_t i = 0; i < n_layers; i++) OPLORA_FORWARD(TY(lean_check_layer)(&layers[i]));
    return OPLORA_OK;
}

/* Lays everything out in the workspace; the same walk counts its bytes. */
static TY(lean_job) TY(lean_plan_layers)(const TY(oplora_lean) *layers, int64_t n_layers, arena *a) {
    TY(lean_job) job = {.n_plans = n_layers};
    int64_t sums = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        TY(lean_plan) ignored;
        arena slot = {NULL, 0};
        TY(lean_take_scratch)(&ignored, &layers[i], &slot);
        if (slot.used < 0) a->used = -1;
        if (slot.used > job.slot_bytes) job.slot_bytes = slot.used;
        const int64_t parts = TY(lean_parts_of)(&layers[i]);
        job.n_parts += parts;
        if (parts * TY(lean_part_size)(&layers[i]) > sums) sums = parts * TY(lean_part_size)(&layers[i]);
    }
    job.plans = take(a, n_layers, sizeof(TY(lean_plan)));
    job.part_plan = take(a, job.n_parts, sizeof(int64_t));
    job.squares = take(a, 2 * job.n_parts, sizeof(double));
    job.part_sums = take(a, sums, sizeof(double));
    job.slots = take(a, n_layers, job.slot_bytes);
    if (!a->memory || a->used < 0) return job;
    double all = 0;
    for (int64_t i = 0; i < n_layers; i++) all += TY(lean_work)(&layers[i]);
    for (int64_t i = 0, part = 0; i < n_layers; i++) {
        const double work = TY(lean_work)(&layers[i]);
        job.plans[i] = TY(lean_plan_of)(&layers[i]);
        job.plans[i].spreads = work > LARGE_WORK || (work > SMALL_WORK && work > all / 4);
        job.plans[i].first_part = part;
        for (const int64_t end = part + job.plans[i].parts; part < end; part++) job.part_plan[part] = i;
    }
    return job;
}

int64_t TY(oplora_lean_workspace_bytes)(const TY(oplora_lean) *layers, int64_t n_layers) {
    if (TY(lean_check)(layers, n_layers) != OPLORA_OK) return -1;
    arena a = {NULL, 0};
    TY(lean_plan_layers)(layers, n_layers, &a);
    return a.used;
}

static oplora_status TY(lean_check_rates)(const TY(oplora_lean) *l) {
    const TY(oplora_factor) *random = NULL;
    OPLORA_RETURN_IF(!oplora_adamw_is_valid(&l->adamw), OPLORA_EVALUE);
    for (const TY(oplora_factor) *f = l->factors; f < l->factors + l->n_factors; f++) {
        OPLORA_RETURN_IF(!isfinite(f->lr) || !isfinite(f->weight_decay), OPLORA_EVALUE);
        OPLORA_RETURN_IF(f->random && random && TY(lean_keep_of)(f) != TY(lean_keep_of)(random), OPLORA_EVALUE);
        if (f->random) random = f;
    }
    return OPLORA_OK;
}

static oplora_status TY(lean_prepare)(const TY(oplora_lean) *layers, int64_t n_layers, int steps, int needs_dh,
                                      void *workspace, TY(lean_job) *job) {
    OPLORA_FORWARD(TY(lean_check)(layers, n_layers));
    OPLORA_RETURN_IF(n_layers > 0 && !workspace, OPLORA_ENULL);
    for (const TY(oplora_lean) *l = layers; l < layers + n_layers; l++) {
        OPLORA_RETURN_IF(!l->numbers || !l->moments || !l->scalars || !l->report, OPLORA_ENULL);
        OPLORA_RETURN_IF(needs_dh && !l->dh, OPLORA_ENULL);
        if (steps) OPLORA_FORWARD(TY(lean_check_rates)(l));
        for (int64_t f = 0; f < l->n_factors; f++) {
            OPLORA_RETURN_IF(!l->factors[f].g, OPLORA_ENULL);
            OPLORA_RETURN_IF(steps && !l->factors[f].out, OPLORA_ENULL);
        }
    }
    arena a = {workspace, 0};
    *job = TY(lean_plan_layers)(layers, n_layers, &a);
    return a.used < 0 ? OPLORA_EOVERFLOW : OPLORA_OK;
}

static OPLORA_BODY oplora_status TY(lean_measure)(const TY(oplora_lean) *layers, int64_t n_layers, void *workspace,
                                                  oplora_parallel_fn par) {
    TY(lean_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(lean_prepare)(layers, n_layers, 0, 1, workspace, &job));
    OPLORA_FORWARD(TY(lean_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) job.plans[i].wants = WANTS_DH;
    return TY(lean_for_layers)(&job, 0, par);
}

oplora_status TY(oplora_lean_measure)(const TY(oplora_lean) *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(lean_measure)(layers, n_layers, workspace, par));
}

static OPLORA_BODY oplora_status TY(lean_step)(const TY(oplora_lean) *layers, int64_t n_layers, int measured,
                                               void *workspace, oplora_parallel_fn par) {
    TY(lean_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(lean_prepare)(layers, n_layers, 1, measured, workspace, &job));
    if (!measured) OPLORA_FORWARD(TY(lean_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) {
        OPLORA_RETURN_IF(layers[i].report[1] != 0, OPLORA_ENONFINITE);
        job.plans[i].wants = measured ? WANTS_GRAM : WANTS_GRAM | WANTS_DH;
    }
    return TY(lean_for_layers)(&job, 1, par);
}

oplora_status TY(oplora_lean_step)(const TY(oplora_lean) *layers, int64_t n_layers, int measured, void *workspace,
                                   oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(lean_step)(layers, n_layers, measured, workspace, par));
}

typedef struct {
    const TY(oplora_lean) *layer;
    const T *x; /* h times W0's bound */
} TY(lean_start_work);

static void TY(lean_start_chunks)(int64_t begin, int64_t end, void *context) {
    const TY(lean_start_work) *const work = context;
    for (int64_t c = begin; c < end; c++) {
        const TY(lean_chunk) chunk = TY(lean_chunk_at)(work->layer, c);
        for (int64_t entry = chunk.entry; entry < chunk.entry + chunk.rows; entry += BLOCK) {
            const int64_t left = chunk.entry + chunk.rows - entry, n = left < BLOCK ? left : BLOCK;
            T *const out = chunk.factor->out + entry;
            memset(out, 0, (size_t)n * sizeof(T));
            if (chunk.factor->random) TY(lean_random_update)(work->layer, chunk.range, work->x, entry, n, out);
        }
    }
}

static OPLORA_BODY oplora_status TY(lean_start)(const TY(oplora_lean) *l, double latent_std, oplora_parallel_fn par) {
    OPLORA_RETURN_IF(!l, OPLORA_ENULL);
    OPLORA_FORWARD(TY(lean_check_layer)(l));
    OPLORA_RETURN_IF(!l->numbers || !l->moments || !l->scalars, OPLORA_ENULL);
    OPLORA_RETURN_IF(!(latent_std >= 0 && latent_std < INFINITY), OPLORA_EVALUE);
    for (int64_t f = 0; f < l->n_factors; f++) OPLORA_RETURN_IF(!l->factors[f].out, OPLORA_ENULL);
    const TY(lean_plan) p = TY(lean_plan_of)(l);
    const oplora_stream s = TY(lean_w1_stream)(l);
    const double w1_bound = oplora_start_bound(OPLORA_UNIFORM, l->Z);
    l->scalars[0] = l->scalars[2] = 1;
    l->scalars[1] = l->scalars[3] = 0;
    TY(oplora_start_latent)(l->seed, l->layer, l->Z, latent_std, p.z);
    /* h lies in the place of r until v is made; both start at zero */
    T *const x = p.outer.r;
    for (int64_t j = 0; j < l->H; j++) {
        p.pre[j] = (T)(w1_bound * TY(oplora_dispatch)()->uniform_dot(&s, (uint32_t)j, 0, p.z, l->Z));
        x[j] = p.pre[j] > 0 ? (T)(p.bound * p.pre[j]) : 0;
    }
    TY(lean_start_work) work = {l, x};
    OPLORA_FORWARD(oplora_parallel(par, p.chunks, 1, TY(lean_start_chunks), &work));
    memset(x, 0, (size_t)l->H * sizeof(T));
    return OPLORA_OK;
}

oplora_status TY(oplora_lean_start)(const TY(oplora_lean) *l, double latent_std, oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(lean_start)(l, latent_std, par));
}
