/* What the rooms of adamw_lean.c share: lean_rows.c, the two passes over the rows; lean_solve.c, what lies between them;
 * lean_hidden.c, the hidden path; lean_plan.c, what lies where. Internal. */
#ifndef OPLORA_LEAN_H
#define OPLORA_LEAN_H

#include "../shared/lean_layout.h"
#include "../shared/lean_map.h"
#include "dispatch.h"
#include "number.h"
#include "workspace.h"

enum {
    SMALL_WORK = 1 << 16, /* rows times (1 + H / 32): a layer up to this is one thread's work, */
    LARGE_WORK = 1 << 21, /* one above this is spread over the threads, and between them one that is much of all */
    MOST_WORDS = 1 << 17, /* that stay between the passes: half of a second-level cache */
    RANK = OPLORA_MOST_RANK,
    BASIS = OPLORA_MOST_BASIS
};

/* What the rows of a map need in both passes. */
typedef struct {
    int64_t rows;
    int d, k;
    T *U;
    TY(oplora_moment) *A, *m, *S, *R;
    TY(oplora_lean_constants) constants;
    uint32_t round_key[RANK];
    T weight[BASIS], rotate_U[RANK][BASIS], rotate_A[RANK][RANK + 1]; /* second pass: of the basis, and of [A, g] */
} TY(lean_rows);

/* What a factor's rows have of their own: c's keep and rate, kappa and rho. */
typedef struct {
    double keep, rate, kappa, rho;
} TY(lean_share);

typedef struct {
    TY(lean_rows) rows;
    int64_t inputs, all_rows;              /* rows of all processes */
    T *Q, *B, *r;                          /* (d, inputs), (k, inputs), (inputs) */
    double *scale, *mean;                  /* s, and the mean of R */
    double keep, rate, beta1, start_keep;  /* start_keep shrinks s */
    double *K, *col, *Q_next, *directions; /* scratch: (BASIS, inputs), (inputs), (d, inputs), (k, inputs) */
    double *sums;                          /* scratch: the basis' Gram matrix (p, p), then U^T g (d) */
    double dropped_moment, dropped_weight;
} TY(lean_map);

/* What the second pass multiplies a factor's rows with. */
typedef struct {
    TY(oplora_lean_constants) constants;
    T weight[BASIS], rotate_U[RANK][BASIS];
    TY(oplora_lean_turn21) defaults; /* the same at d = 2, k = 1 */
} TY(lean_turn);

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
    uint32_t *words; /* scratch: W0's signs between the passes, in the place of their chunk; or NULL */
    double bound;
    int spreads;  /* over the threads; who does the work changes no bit */
    int wants;    /* of the first pass: LEAN_WANTS_DH, LEAN_WANTS_GRAM */
    double *sums; /* the layer's part of those that processes add up */
    double mean;  /* scratch: what a first half has for *outer.mean */
} TY(lean_plan);

typedef struct {
    const TY(oplora_factor) *factor;
    int64_t range;            /* which of the layer's random factors; only if it is one */
    int64_t row, entry, rows; /* first row in W2, first entry in the factor, rows */
    int64_t whole_row;        /* first row of the factor in W2 with the rows of all processes */
} TY(lean_chunk);

/* Rows of a chunk that lie together also in the whole factor: the first's entry there, and its row in the whole W2. */
typedef struct {
    int64_t entry, row, n;
} TY(lean_block);

enum { LEAN_FIRST_HALF = 1, LEAN_SECOND_HALF = 2, LEAN_WHOLE = 3 };
/* What a call needs of a layer beside its state and gradients. */
enum { LEAN_NEEDS_RATES = 1, LEAN_NEEDS_OUT = 2, LEAN_NEEDS_DH = 4 };

typedef struct {
    TY(lean_plan) *plans;
    int64_t *part_plan; /* which plan a part belongs to */
    double *squares;    /* (all parts, 2) */
    int64_t n_plans, n_parts, first_plan;
    int steps;              /* or it measures */
    int half;               /* up to the sums, from them on, or all */
    TY(lean_plan) *current; /* the layer whose parts are spread over the threads */
    char *slots;            /* scratch of single layers; see TY(lean_use_slot) */
    int64_t slot_bytes;
    double *part_sums; /* of one spread layer */
} TY(lean_job);

static inline int TY(lean_basis_size)(const TY(lean_rows) *r) { return oplora_lean_basis(r->d, r->k); }

static inline int64_t TY(lean_sums_size)(const TY(lean_rows) *r) { return oplora_lean_sums(r->d, r->k); }

static inline int64_t TY(lean_part_size)(const TY(oplora_lean) *l) {
    return oplora_lean_sums((int)l->weight_rank, (int)l->moment_rank) + l->H;
}

/* ---- lean_rows.c ---- */

void TY(oplora_lean_turn_of)(const TY(lean_rows) *r, const TY(lean_share) *share, TY(lean_turn) *turn);
void TY(oplora_lean_reduce_block)(const TY(lean_rows) *r, const TY(lean_share) *share, const T *g, int64_t first,
                                  int64_t n, double *sums);
void TY(oplora_lean_update_block)(const TY(lean_rows) *r, const TY(lean_turn) *turn, const T *g, const T *base,
                                  int64_t first, int64_t row, int64_t n, T *out);
void TY(oplora_lean_random_update)(const TY(oplora_lean) *l, int64_t range, const T *x, int64_t entry, int64_t n,
                                   const uint32_t *kept, T *out);
TY(lean_chunk) TY(oplora_lean_chunk_at)(const TY(oplora_lean) *l, int64_t chunk);
TY(lean_block) TY(oplora_lean_block_at)(const TY(lean_chunk) *chunk, int64_t at);
void TY(oplora_lean_square_part)(const TY(lean_plan) *p, int64_t part, double squares[2]);
void TY(oplora_lean_reduce_part)(const TY(lean_plan) *p, int64_t part, double *sums);
void TY(oplora_lean_update_part)(const TY(lean_plan) *p, int64_t part);

/* ---- lean_solve.c ---- */

double TY(oplora_lean_square)(const T *x, int64_t n);
void TY(oplora_lean_prepare_map)(TY(lean_map) *map, const T *x, double square_g, const oplora_adamw *a,
                                 double corrected2, oplora_words key);
void TY(oplora_lean_solve_map)(TY(lean_map) *map, const T *x);
void TY(oplora_lean_finish_map)(TY(lean_map) *map, const T *x, const T *x_next);
void TY(oplora_lean_begin_layer)(TY(lean_plan) *p);
void TY(oplora_lean_add_part)(TY(lean_plan) *p, const double *sums);
void TY(oplora_lean_find_dh)(TY(lean_plan) *p);
void TY(oplora_lean_measure_dh)(TY(lean_plan) *p);
void TY(oplora_lean_solve_layer)(TY(lean_plan) *p);

/* ---- lean_hidden.c ---- */

void TY(oplora_lean_find_hidden)(const TY(lean_plan) *p, T *h);
void TY(oplora_lean_report_hidden)(TY(lean_plan) *p);
void TY(oplora_lean_step_hidden)(TY(lean_plan) *p);

/* ---- lean_plan.c ---- */

void TY(oplora_lean_take_scratch)(TY(lean_plan) *p, const TY(oplora_lean) *l, arena *a);
TY(lean_plan) TY(oplora_lean_plan_of)(const TY(oplora_lean) *l);
oplora_status TY(oplora_lean_check_layer)(const TY(oplora_lean) *l);
oplora_status TY(oplora_lean_prepare)(const TY(oplora_lean) *layers, int64_t n_layers, int needs, void *workspace,
                                      TY(lean_job) *job);

#endif
