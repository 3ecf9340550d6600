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
 * Where processes divide the factors, each has some rows and all have everything else. A call is then cut in two at the
 * sums, which the caller adds up between the halves: what the second makes of them is alike everywhere. ||g||^2 of all
 * rows moves r, and so the eps of row, before the Gram matrix can be summed: a step has two such cuts, its measurement's
 * and its own.
 *
 * Rows are cut into blocks that stay in the first-level cache, blocks into parts that do not depend on who does them,
 * and sums run in the order of blocks and parts. Layers are one thread's work each; one so large that the others would
 * wait for it is spread over all of them. */
#include "lean.h"

#include <math.h>
#include <string.h>

/* ---- the job: all layers, on the caller's threads ---- */

/* Ranges of layers run one after another on their thread, so that a range needs one slot: that of its first layer. The
 * others are never touched and, in fresh memory, never resident. */
static void TY(lean_use_slot)(const TY(lean_job) *job, int64_t slot, TY(lean_plan) *p) {
    arena a = {job->slots + slot * job->slot_bytes, 0};
    TY(oplora_lean_take_scratch)(p, p->layer, &a);
}

/* Parts of all layers, by one index. */
static void TY(lean_square_parts)(int64_t begin, int64_t end, void *context) {
    const TY(lean_job) *const job = context;
    for (int64_t i = begin; i < end; i++) {
        const TY(lean_plan) *const p = &job->plans[job->part_plan[i]];
        TY(oplora_lean_square_part)(p, i - p->first_part, job->squares + 2 * i);
    }
}

/* Parts of the layer that is spread. */
static void TY(lean_reduce_parts)(int64_t begin, int64_t end, void *context) {
    const TY(lean_job) *const job = context;
    const TY(lean_plan) *const p = job->current;
    for (int64_t i = begin; i < end; i++)
        TY(oplora_lean_reduce_part)(p, i, job->part_sums + i * TY(lean_part_size)(p->layer));
}

static void TY(lean_update_parts)(int64_t begin, int64_t end, void *context) {
    const TY(lean_job) *const job = context;
    for (int64_t i = begin; i < end; i++) TY(oplora_lean_update_part)(job->current, i);
}

/* What comes before the sums. A first half changes nothing of the layer: it turns copies of r and of the mean of R. */
static void TY(lean_begin)(const TY(lean_job) *job, TY(lean_plan) *p) {
    TY(lean_map) *const map = &p->outer;
    if (job->half == LEAN_FIRST_HALF) {
        map->r = memcpy(p->h_next, map->r, (size_t)p->layer->H * sizeof(T));
        p->mean = *map->mean;
        map->mean = &p->mean;
    }
    TY(oplora_lean_begin_layer)(p);
    if (job->half == LEAN_SECOND_HALF) TY(oplora_lean_add_part)(p, p->sums);
}

/* What comes between the sums and the second pass; whether there is one. */
static int TY(lean_use_sums)(const TY(lean_job) *job, TY(lean_plan) *p) {
    if (job->half == LEAN_FIRST_HALF) {
        memcpy(p->sums, p->outer.sums, (size_t)TY(lean_part_size)(p->layer) * sizeof(double));
        return 0;
    }
    if (job->steps)
        TY(oplora_lean_solve_layer)(p);
    else
        TY(oplora_lean_measure_dh)(p);
    return job->steps;
}

/* A whole layer by one thread. */
static void TY(lean_do_small)(const TY(lean_job) *job, TY(lean_plan) *p) {
    TY(lean_begin)(job, p);
    for (int64_t part = 0; job->half & LEAN_FIRST_HALF && part < p->parts; part++) {
        TY(oplora_lean_reduce_part)(p, part, p->part_sums);
        TY(oplora_lean_add_part)(p, p->part_sums);
    }
    if (!TY(lean_use_sums)(job, p)) return;
    for (int64_t part = 0; part < p->parts; part++) TY(oplora_lean_update_part)(p, part);
}

static void TY(lean_layers)(int64_t begin, int64_t end, void *context) {
    TY(lean_job) *const job = context;
    for (int64_t i = begin; i < end; i++) {
        TY(lean_plan) *const p = &job->plans[job->first_plan + i];
        TY(lean_use_slot)(job, job->first_plan + begin, p);
        TY(lean_do_small)(job, p);
    }
}

/* A layer whose parts are spread over the threads. */
static oplora_status TY(lean_do_large)(TY(lean_job) *job, TY(lean_plan) *p, oplora_parallel_fn par) {
    job->current = p;
    TY(lean_use_slot)(job, 0, p);
    TY(lean_begin)(job, p);
    if (job->half & LEAN_FIRST_HALF) OPLORA_FORWARD(oplora_parallel(par, p->parts, 1, TY(lean_reduce_parts), job));
    for (int64_t part = 0; job->half & LEAN_FIRST_HALF && part < p->parts; part++)
        TY(oplora_lean_add_part)(p, job->part_sums + part * TY(lean_part_size)(p->layer));
    return TY(lean_use_sums)(job, p) ? oplora_parallel(par, p->parts, 1, TY(lean_update_parts), job) : OPLORA_OK;
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

static OPLORA_BODY oplora_status TY(lean_measure)(const TY(oplora_lean) *layers, int64_t n_layers, void *workspace,
                                                  oplora_parallel_fn par) {
    TY(lean_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(oplora_lean_prepare)(layers, n_layers, LEAN_NEEDS_DH, workspace, &job));
    OPLORA_FORWARD(TY(lean_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) job.plans[i].wants = LEAN_WANTS_DH;
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
    const int needs = LEAN_NEEDS_RATES | LEAN_NEEDS_OUT | (measured ? LEAN_NEEDS_DH : 0);
    OPLORA_FORWARD(TY(oplora_lean_prepare)(layers, n_layers, needs, workspace, &job));
    if (!measured) OPLORA_FORWARD(TY(lean_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) {
        OPLORA_RETURN_IF(layers[i].report[1] != 0, OPLORA_ENONFINITE);
        job.plans[i].wants = measured ? LEAN_WANTS_GRAM : LEAN_WANTS_GRAM | LEAN_WANTS_DH;
    }
    return TY(lean_for_layers)(&job, 1, par);
}

oplora_status TY(oplora_lean_step)(const TY(oplora_lean) *layers, int64_t n_layers, int measured, void *workspace,
                                   oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(lean_step)(layers, n_layers, measured, workspace, par));
}

/* Half of a measurement, or of a step that was measured. */
static OPLORA_BODY oplora_status TY(lean_half)(const TY(oplora_lean) *layers, int64_t n_layers, int half, int steps,
                                               double *sums, void *workspace, oplora_parallel_fn par) {
    const int rates = steps ? LEAN_NEEDS_RATES : 0, finishes = half == LEAN_SECOND_HALF;
    const int needs = finishes ? LEAN_NEEDS_DH | (steps ? LEAN_NEEDS_OUT : 0) : 0;
    TY(lean_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_RETURN_IF(!sums, OPLORA_ENULL);
    OPLORA_FORWARD(TY(oplora_lean_prepare)(layers, n_layers, needs | rates, workspace, &job));
    if (!steps && !finishes) OPLORA_FORWARD(TY(lean_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) {
        OPLORA_RETURN_IF(layers[i].report[1] != 0, OPLORA_ENONFINITE);
        job.plans[i].wants = steps ? LEAN_WANTS_GRAM : LEAN_WANTS_DH;
        job.plans[i].sums = sums;
        sums += TY(lean_part_size)(&layers[i]);
    }
    job.half = half;
    return TY(lean_for_layers)(&job, steps, par);
}

oplora_status TY(oplora_lean_reduce)(const TY(oplora_lean) *layers, int64_t n_layers, int steps, double *sums,
                                     void *workspace, oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(lean_half)(layers, n_layers, LEAN_FIRST_HALF, steps, sums, workspace, par));
}

oplora_status TY(oplora_lean_finish)(const TY(oplora_lean) *layers, int64_t n_layers, int steps, double *sums,
                                     void *workspace, oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(lean_half)(layers, n_layers, LEAN_SECOND_HALF, steps, sums, workspace, par));
}

typedef struct {
    const TY(oplora_lean) *layer;
    const T *x; /* h times W0's bound */
} TY(lean_start_work);

static void TY(lean_start_chunks)(int64_t begin, int64_t end, void *context) {
    const TY(lean_start_work) *const work = context;
    for (int64_t c = begin; c < end; c++) {
        const TY(lean_chunk) chunk = TY(oplora_lean_chunk_at)(work->layer, c);
        for (int64_t at = 0, n; at < chunk.rows; at += n) {
            const TY(lean_block) block = TY(oplora_lean_block_at)(&chunk, at);
            T *const out = chunk.factor->out + chunk.entry + at;
            n = block.n;
            memset(out, 0, (size_t)n * sizeof(T));
            if (chunk.factor->random)
                TY(oplora_lean_random_update)(work->layer, chunk.range, work->x, block.entry, n, NULL, out);
        }
    }
}

static OPLORA_BODY oplora_status TY(lean_start)(const TY(oplora_lean) *l, double latent_std, oplora_parallel_fn par) {
    OPLORA_RETURN_IF(!l, OPLORA_ENULL);
    OPLORA_FORWARD(TY(oplora_lean_check_layer)(l));
    OPLORA_RETURN_IF(!l->numbers || !l->moments || !l->scalars, OPLORA_ENULL);
    OPLORA_RETURN_IF(!(latent_std >= 0 && latent_std < INFINITY), OPLORA_EVALUE);
    for (int64_t f = 0; f < l->n_factors; f++) OPLORA_RETURN_IF(!l->factors[f].out, OPLORA_ENULL);
    const TY(lean_plan) p = TY(oplora_lean_plan_of)(l);
    const oplora_stream s = oplora_stream_of(l->seed, l->layer, OPLORA_W1_TENSOR);
    const double w1_bound = oplora_start_bound(OPLORA_UNIFORM, l->Z);
    l->scalars[0] = l->scalars[2] = 1;
    l->scalars[1] = l->scalars[3] = 0;
    for (int64_t i = 0; i < l->Z; i++) p.z[i] = (T)oplora_latent_entry(l->seed, l->layer, i, latent_std);
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
