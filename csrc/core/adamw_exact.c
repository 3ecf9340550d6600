/* adamw_exact: AdamW on every generator of a model, fused with the next generation of its factors.
 *
 * For each layer, with h and the factors' gradient g = dL/dv (N) known:
 *
 *     dh = W2^T g; d = dh where the unit is on, else 0           first pass over W2
 *     AdamW on z, W1, c1 with dz = W1^T d, dW1 = d z^T, dc1 = d; then the next h
 *     AdamW on W2 with g h^T and on c2 with g; v = W2 h + c2     second pass over W2 and its moments
 *
 * dW2 = g h^T is formed one register at a time and never stored. Memory-bound: an entry of a column that is on costs
 * 4 bytes in the first pass and 24 in the second (float). A column that has never been on (h_j = 0, moments zero)
 * changes only by weight decay, kept as one factor until the unit wakes: it costs nothing.
 *
 * Work is cut into tasks of TASK_ROWS rows of one factor, and sums over tasks run in order, so nothing depends on who does
 * a task. Small layers are stepped whole, one a thread: no barriers, and the second pass finds W2 in the cache. Large
 * layers are stepped one after another, their tasks spread over the threads. */
#include "../shared/tasks.h"

#include "dispatch.h"
#include "hidden.h"
#include "number.h"
#include "workspace.h"

#include <math.h>
#include <string.h>

enum { EXACT_SMALL_BYTES = 8 << 20 }; /* of W2: a layer up to this size is one thread's work */

/* AdamW's constants for a factor's rows of W2 and of c2. */
typedef struct {
    TY(oplora_adamw_constants) outer, bias;
} TY(exact_rates);

/* What one layer needs during a call. */
typedef struct {
    const TY(oplora_exact) *layer;
    TY(oplora_adamw_constants) hidden; /* for z, W1, c1 */
    TY(exact_rates) *rates;            /* (factors) */
    T *W2, *c2, *W1, *c1, *z;
    T *h, *h_next, *d, *dz, *ones;
    double *latent;  /* dz in double */
    double *partial; /* (tasks, H + 2): dh, ||g||^2 and the count of non-finite entries */
    int64_t first_task, tasks;
} TY(exact_plan);

/* What one layer's tasks are. */
typedef struct {
    TY(exact_plan) *plan;
    const TY(oplora_factor) *factor;
    int64_t index; /* of the factor */
    double *partial;
    int64_t row, offset, count; /* first row in W2, first entry in the factor, entries */
} TY(exact_task);

typedef struct TY(exact_job) {
    TY(exact_plan) *plans;
    oplora_span *spans; /* n_spans, and one behind the last */
    int64_t n_plans, n_spans;
    int64_t first_task, first_plan; /* where the ranges at hand count from */
    int measured;
    void (*each_task)(const TY(exact_task) *);                          /* what is done with tasks, */
    void (*each_layer)(const struct TY(exact_job) *, TY(exact_plan) *); /* and with layers */
} TY(exact_job);

static void TY(exact_set_rates)(TY(exact_plan) *p) {
    const TY(oplora_exact) *const l = p->layer;
    const oplora_adamw *const a = &l->adamw;
    const double corrected1 = 1 - pow(a->beta1, (double)a->step), corrected2 = 1 - pow(a->beta2, (double)a->step);
    p->hidden = TY(oplora_adamw_constants_of)(a, corrected1, corrected2, a->hidden_lr, a->hidden_lr * a->weight_decay);
    for (int64_t f = 0; f < l->n_factors; f++) {
        const double lr = l->factors[f].lr, decay = lr * l->factors[f].weight_decay;
        p->rates[f] =
            (TY(exact_rates)){TY(oplora_adamw_constants_of)(a, corrected1, corrected2, lr * a->weight_ratio, decay),
                              TY(oplora_adamw_constants_of)(a, corrected1, corrected2, lr, decay)};
    }
}

static oplora_status TY(exact_check)(const TY(oplora_exact) *layers, int64_t n_layers, int steps) {
    OPLORA_RETURN_IF(n_layers < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(n_layers > 0 && !layers, OPLORA_ENULL);
    for (const TY(oplora_exact) *l = layers; l < layers + n_layers; l++) {
        int64_t rows = 0;
        OPLORA_RETURN_IF(oplora_size(l->H, l->Z, l->N) < 0 || l->n_factors < 1, OPLORA_ESIZE);
        OPLORA_RETURN_IF(!l->parameters || !l->factors, OPLORA_ENULL);
        OPLORA_RETURN_IF(steps && (!l->exp_avg || !l->exp_avg_sq || !l->decay || !l->moving), OPLORA_ENULL);
        OPLORA_RETURN_IF(steps && !oplora_adamw_is_valid(&l->adamw), OPLORA_EVALUE);
        for (int64_t f = 0; f < l->n_factors; f++) {
            OPLORA_RETURN_IF(l->factors[f].rows < 1 || l->factors[f].rows > l->N - rows, OPLORA_ESIZE);
            OPLORA_RETURN_IF(steps && !(isfinite(l->factors[f].lr) && isfinite(l->factors[f].weight_decay)),
                             OPLORA_EVALUE);
            rows += l->factors[f].rows;
        }
        OPLORA_RETURN_IF(rows != l->N, OPLORA_ESIZE);
    }
    return OPLORA_OK;
}

/* Lays the plans of all layers out in the workspace; the same walk counts its bytes. */
static TY(exact_job) TY(exact_plan_layers)(const TY(oplora_exact) *layers, int64_t n_layers, arena *a) {
    int64_t n_spans = 0;
    for (int64_t i = 0; i < n_layers; i++) n_spans += layers[i].n_factors;
    TY(exact_job) job = {.plans = take(a, n_layers, sizeof(TY(exact_plan))),
                         .spans = take(a, n_spans + 1, sizeof(oplora_span)),
                         .n_plans = n_layers,
                         .n_spans = n_spans};
    int64_t task = 0, s = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        const TY(oplora_exact) *const l = &layers[i];
        const int64_t first = task;
        for (int64_t f = 0, row = 0; f < l->n_factors; row += l->factors[f++].rows, s++) {
            if (a->memory) job.spans[s] = (oplora_span){task, i, f, row};
            task += tasks_in(l->factors[f].rows);
        }
        TY(exact_plan) p = {.layer = l, .first_task = first, .tasks = task - first};
        p.h = take(a, l->H, sizeof(T));
        p.h_next = take(a, l->H, sizeof(T));
        p.d = take(a, l->H, sizeof(T));
        p.ones = take(a, 1, sizeof(T));
        p.dz = take(a, l->Z, sizeof(T));
        p.latent = take(a, l->Z, sizeof(double));
        p.rates = take(a, l->n_factors, sizeof(TY(exact_rates)));
        p.partial = take(a, p.tasks * (l->H + 2), sizeof(double));
        if (!a->memory) continue;
        p.W2 = l->parameters;
        p.c2 = p.W2 + l->H * l->N;
        p.W1 = p.c2 + l->N;
        p.c1 = p.W1 + l->H * l->Z;
        p.z = p.c1 + l->H;
        p.ones[0] = 1;
        TY(exact_set_rates)(&p);
        job.plans[i] = p;
    }
    if (a->memory) job.spans[n_spans] = (oplora_span){.first_task = task, .layer = n_layers};
    return job;
}

int64_t TY(oplora_exact_workspace_bytes)(const TY(oplora_exact) *layers, int64_t n_layers) {
    if (TY(exact_check)(layers, n_layers, 0) != OPLORA_OK) return -1;
    arena a = {NULL, 0};
    TY(exact_plan_layers)(layers, n_layers, &a);
    return a.used;
}

/* ---- tasks: TASK_ROWS rows of one factor ---- */

static TY(exact_task) TY(exact_task_at)(const TY(exact_job) *job, const oplora_span *span, int64_t task) {
    TY(exact_plan) *const plan = &job->plans[span->layer];
    const TY(oplora_factor) *const factor = &plan->layer->factors[span->factor];
    const int64_t offset = (task - span->first_task) * TASK_ROWS, left = factor->rows - offset;
    return (TY(exact_task)){plan,
                            factor,
                            span->factor,
                            plan->partial + (task - plan->first_task) * (plan->layer->H + 2),
                            span->row + offset,
                            offset,
                            left < TASK_ROWS ? left : TASK_ROWS};
}

/* Calls body on the tasks [begin, end) of the whole job. */
static void TY(exact_run_tasks)(const TY(exact_job) *job, int64_t begin, int64_t end,
                                void (*body)(const TY(exact_task) *)) {
    if (begin >= end) return;
    const oplora_span *span = job->spans + span_of(job->spans, job->n_spans, begin);
    for (int64_t t = begin; t < end; t++) {
        while (t >= span[1].first_task) span++;
        const TY(exact_task) task = TY(exact_task_at)(job, span, t);
        body(&task);
    }
}

static void TY(exact_square_task)(const TY(exact_task) *t) {
    int64_t nonfinite;
    t->partial[t->plan->layer->H] = TY(oplora_dispatch)()->square_sum(t->factor->g + t->offset, t->count, &nonfinite);
    t->partial[t->plan->layer->H + 1] = (double)nonfinite;
}

/* First pass: this task's share of dh, for units that are on. */
static void TY(exact_reduce_task)(const TY(exact_task) *t) {
    const TY(oplora_exact) *const l = t->plan->layer;
    T room[TASK_ROWS];
    const T *const g = TY(oplora_bounded_gradient)(t->factor->g + t->offset, t->count, l->report[0], room);
    const T *column[COLUMN_GROUP];
    int64_t unit[COLUMN_GROUP], k = 0;
    double sum[COLUMN_GROUP];
    for (int64_t j = 0; j < l->H; j++) {
        t->partial[j] = 0;
        if (t->plan->h[j] != 0) {
            column[k] = t->plan->W2 + j * l->N + t->row;
            unit[k++] = j;
        }
        if (k == COLUMN_GROUP || j == l->H - 1) {
            TY(oplora_dispatch)()->dot(column, k, g, t->count, sum);
            while (k > 0) k--, t->partial[unit[k]] = sum[k];
        }
    }
}

static void TY(exact_write_factor)(const TY(exact_task) *t, const T *v) {
    T *const out = t->factor->out + t->offset;
    const T *const base = t->factor->base ? t->factor->base + t->offset : NULL;
    if (!base) {
        memcpy(out, v, (size_t)t->count * sizeof(T));
        return;
    }
    for (int64_t i = 0; i < t->count; i++) out[i] = base[i] + v[i];
}

/* Second pass: AdamW on c2 and on the columns that move, and v with the next h, in the order of columns. */
static void TY(exact_update_task)(const TY(exact_task) *t) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(exact_plan) *const p = t->plan;
    const TY(oplora_exact) *const l = p->layer;
    const TY(exact_rates) *const rates = &p->rates[t->index];
    const double *const decay = l->decay + t->index * l->H;
    T v[TASK_ROWS] = {0}, room[TASK_ROWS];
    const T *const g = TY(oplora_bounded_gradient)(t->factor->g + t->offset, t->count, l->report[0], room);
    const int64_t bias = l->H * l->N + t->row;
    kernels->adamw(l->parameters + bias, l->exp_avg + bias, l->exp_avg_sq + bias, g, 1, 1, v, t->count, &rates->bias);
    for (int64_t j = 0; j < l->H; j++) {
        const int64_t at = j * l->N + t->row;
        T *const column = l->parameters + at;
        if (p->h[j] != 0 || l->moving[j]) {
            kernels->adamw(column, l->exp_avg + at, l->exp_avg_sq + at, g, p->h[j], p->h_next[j], v, t->count,
                           &rates->outer);
        } else if (p->h_next[j] != 0) { /* it wakes: what it owes to weight decay is paid now */
            const T owed = (T)(decay[j] * rates->outer.keep);
            for (int64_t i = 0; owed != 1 && i < t->count; i++) column[i] *= owed;
            kernels->axpy((const T *const[]){column}, &p->h_next[j], 1, v, t->count);
        }
    }
    TY(exact_write_factor)(t, v);
}

static void TY(exact_generate_task)(const TY(exact_task) *t) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(exact_plan) *const p = t->plan;
    T v[TASK_ROWS] = {0};
    kernels->axpy((const T *const[]){p->c2 + t->row}, p->ones, 1, v, t->count);
    for (int64_t j = 0; j < p->layer->H; j++)
        if (p->h[j] != 0) kernels->axpy((const T *const[]){p->W2 + j * p->layer->N + t->row}, &p->h[j], 1, v, t->count);
    TY(exact_write_factor)(t, v);
}

/* The job's tasks as a range for the caller's threads, counted from its first. */
static void TY(exact_task_range)(int64_t begin, int64_t end, void *context) {
    const TY(exact_job) *const job = context;
    TY(exact_run_tasks)(job, job->first_task + begin, job->first_task + end, job->each_task);
}

/* ---- layers: the hidden path, one layer at a time ---- */

static void TY(exact_find_hidden)(TY(exact_plan) *p) {
    TY(oplora_hidden)(p->z, p->W1, p->c1, p->layer->H, p->layer->Z, p->h);
}

/* The sums over a layer's tasks, into its report. */
static void TY(exact_report_squares)(const TY(exact_plan) *p) {
    const int64_t H = p->layer->H;
    p->layer->report[0] = p->layer->report[1] = 0;
    for (int64_t t = 0; t < p->tasks; t++)
        for (int64_t k = 0; k < 2; k++) p->layer->report[k] += p->partial[t * (H + 2) + H + k];
}

static void TY(exact_report_hidden)(const TY(exact_plan) *p) {
    const int64_t H = p->layer->H, Z = p->layer->Z;
    double *const h = p->layer->report + 3, *const d = h + H;
    double d2 = 0, z2 = 0, dz2 = 0;
    for (int64_t j = 0; j < H; j++) {
        h[j] = p->h[j];
        d[j] = 0;
        for (int64_t t = 0; p->h[j] != 0 && t < p->tasks; t++) d[j] += p->partial[t * (H + 2) + j];
        d2 += d[j] * d[j];
    }
    TY(oplora_hidden_latent_gradient)(d, p->W1, H, Z, p->latent);
    for (int64_t i = 0; i < Z; i++) {
        z2 += (double)p->z[i] * p->z[i];
        dz2 += p->latent[i] * p->latent[i];
    }
    p->layer->report[2] = dz2 + d2 * (z2 + 1);
}

/* AdamW on z, W1 and c1 from the report's d, and the next h. dz is at hand unless the report is of an earlier call. */
static void TY(exact_step_hidden)(TY(exact_plan) *p, int measured_before) {
    const TY(oplora_exact) *const l = p->layer;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const double *const d = l->report + 3 + l->H;
    const int64_t W1 = p->W1 - l->parameters, c1 = p->c1 - l->parameters, z = p->z - l->parameters;
    if (measured_before) TY(oplora_hidden_latent_gradient)(d, p->W1, l->H, l->Z, p->latent);
    for (int64_t i = 0; i < l->Z; i++) p->dz[i] = TY(oplora_narrowed)(p->latent[i]);
    for (int64_t j = 0; j < l->H; j++) p->h[j] = (T)l->report[3 + j];
    for (int64_t j = 0; j < l->H; j++) {
        const int64_t row = W1 + j * l->Z;
        p->d[j] = TY(oplora_narrowed)(d[j]);
        kernels->adamw(l->parameters + row, l->exp_avg + row, l->exp_avg_sq + row, p->z, p->d[j], 0, NULL, l->Z,
                       &p->hidden);
    }
    kernels->adamw(p->c1, l->exp_avg + c1, l->exp_avg_sq + c1, p->d, 1, 0, NULL, l->H, &p->hidden);
    kernels->adamw(p->z, l->exp_avg + z, l->exp_avg_sq + z, p->dz, 1, 0, NULL, l->Z, &p->hidden);
    TY(oplora_hidden)(p->z, p->W1, p->c1, l->H, l->Z, p->h_next);
}

/* After the second pass: which columns have moments now, and what the still ones owe. */
static void TY(exact_settle_columns)(const TY(exact_plan) *p) {
    const TY(oplora_exact) *const l = p->layer;
    const int64_t H = l->H;
    const T *const h_next = p->h_next;
    uint8_t *restrict const moving = l->moving;
    for (int64_t j = 0; j < H; j++) moving[j] |= p->h[j] != 0;
    for (int64_t f = 0; f < l->n_factors; f++) {
        double *restrict const decay = l->decay + f * H;
        const double keep = p->rates[f].outer.keep;
        for (int64_t j = 0; j < H; j++) {
            const double owed = h_next[j] != 0 ? 1 : decay[j] * keep;
            decay[j] = moving[j] ? decay[j] : owed;
        }
    }
}

/* A whole layer by one thread. */
static void TY(exact_find_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    (void)job;
    TY(exact_find_hidden)(p);
}

static void TY(exact_measure_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    TY(exact_find_hidden)(p);
    TY(exact_run_tasks)(job, p->first_task, p->first_task + p->tasks, TY(exact_reduce_task));
    TY(exact_report_hidden)(p);
}

static void TY(exact_step_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    if (!job->measured) TY(exact_measure_layer)(job, p);
    TY(exact_step_hidden)(p, job->measured);
    TY(exact_run_tasks)(job, p->first_task, p->first_task + p->tasks, TY(exact_update_task));
    TY(exact_settle_columns)(p);
}

/* Whole layers as a range, counted from the job's first. */
static void TY(exact_layer_range)(int64_t begin, int64_t end, void *context) {
    TY(exact_job) *const job = context;
    for (TY(exact_plan) *p = job->plans + job->first_plan + begin; p < job->plans + job->first_plan + end; p++)
        job->each_layer(job, p);
}

/* ---- the job: all layers, on the caller's threads ---- */

static oplora_status TY(exact_spread_tasks)(TY(exact_job) *job, int64_t first, int64_t count,
                                            void (*each)(const TY(exact_task) *), oplora_parallel_fn par) {
    job->first_task = first;
    job->each_task = each;
    return oplora_parallel(par, count, 1, TY(exact_task_range), job);
}

static oplora_status TY(exact_spread_layers)(TY(exact_job) *job, int64_t first, int64_t count,
                                             void (*each)(const TY(exact_job) *, TY(exact_plan) *),
                                             oplora_parallel_fn par) {
    job->first_plan = first;
    job->each_layer = each;
    return oplora_parallel(par, count, 1, TY(exact_layer_range), job);
}

static oplora_status TY(exact_measure_large)(TY(exact_job) *job, TY(exact_plan) *p, oplora_parallel_fn par) {
    TY(exact_find_hidden)(p);
    OPLORA_FORWARD(TY(exact_spread_tasks)(job, p->first_task, p->tasks, TY(exact_reduce_task), par));
    TY(exact_report_hidden)(p);
    return OPLORA_OK;
}

static oplora_status TY(exact_step_large)(TY(exact_job) *job, TY(exact_plan) *p, oplora_parallel_fn par) {
    if (!job->measured) OPLORA_FORWARD(TY(exact_measure_large)(job, p, par));
    TY(exact_step_hidden)(p, job->measured);
    OPLORA_FORWARD(TY(exact_spread_tasks)(job, p->first_task, p->tasks, TY(exact_update_task), par));
    TY(exact_settle_columns)(p);
    return OPLORA_OK;
}

static int TY(exact_is_small)(const TY(exact_plan) *p) {
    return p->layer->H * p->layer->N <= EXACT_SMALL_BYTES / (int64_t)sizeof(T);
}

/* Runs of small layers a layer a thread, large layers one at a time. */
static oplora_status TY(exact_for_layers)(TY(exact_job) *job, void (*small)(const TY(exact_job) *, TY(exact_plan) *),
                                          oplora_status (*large)(TY(exact_job) *, TY(exact_plan) *, oplora_parallel_fn),
                                          oplora_parallel_fn par) {
    for (int64_t first = 0, last; first < job->n_plans; first = last) {
        for (last = first; last < job->n_plans && TY(exact_is_small)(&job->plans[last]); last++) {
        }
        if (last > first)
            OPLORA_FORWARD(TY(exact_spread_layers)(job, first, last - first, small, par));
        else
            OPLORA_FORWARD(large(job, &job->plans[last++], par));
    }
    return OPLORA_OK;
}

/* ||g||^2 of every layer, and whether all of them are finite. */
static oplora_status TY(exact_measure_squares)(TY(exact_job) *job, oplora_parallel_fn par) {
    int finite = 1;
    OPLORA_FORWARD(TY(exact_spread_tasks)(job, 0, job->spans[job->n_spans].first_task, TY(exact_square_task), par));
    for (const TY(exact_plan) *p = job->plans; p < job->plans + job->n_plans; p++) {
        TY(exact_report_squares)(p);
        finite &= p->layer->report[1] == 0;
    }
    return finite ? OPLORA_OK : OPLORA_ENONFINITE;
}

/* ---- entry points ---- */

static oplora_status TY(exact_prepare)(const TY(oplora_exact) *layers, int64_t n_layers, int steps, int gradients,
                                       void *workspace, TY(exact_job) *job) {
    OPLORA_FORWARD(TY(exact_check)(layers, n_layers, steps));
    OPLORA_RETURN_IF(n_layers > 0 && !workspace, OPLORA_ENULL);
    for (int64_t i = 0; i < n_layers; i++) {
        OPLORA_RETURN_IF(gradients && !layers[i].report, OPLORA_ENULL);
        for (int64_t f = 0; f < layers[i].n_factors; f++) {
            OPLORA_RETURN_IF(gradients && !layers[i].factors[f].g, OPLORA_ENULL);
            OPLORA_RETURN_IF((steps || !gradients) && !layers[i].factors[f].out, OPLORA_ENULL);
        }
    }
    arena a = {workspace, 0};
    *job = TY(exact_plan_layers)(layers, n_layers, &a);
    return a.used < 0 ? OPLORA_EOVERFLOW : OPLORA_OK;
}

static OPLORA_BODY oplora_status TY(exact_measure)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                                   oplora_parallel_fn par) {
    TY(exact_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(exact_prepare)(layers, n_layers, 0, 1, workspace, &job));
    OPLORA_FORWARD(TY(exact_measure_squares)(&job, par));
    return TY(exact_for_layers)(&job, TY(exact_measure_layer), TY(exact_measure_large), par);
}

oplora_status TY(oplora_exact_measure)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                       oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(exact_measure)(layers, n_layers, workspace, par));
}

static OPLORA_BODY oplora_status TY(exact_step)(const TY(oplora_exact) *layers, int64_t n_layers, int measured,
                                                void *workspace, oplora_parallel_fn par) {
    TY(exact_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(exact_prepare)(layers, n_layers, 1, 1, workspace, &job));
    job.measured = measured;
    if (!measured) OPLORA_FORWARD(TY(exact_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) OPLORA_RETURN_IF(layers[i].report[1] != 0, OPLORA_ENONFINITE);
    return TY(exact_for_layers)(&job, TY(exact_step_layer), TY(exact_step_large), par);
}

oplora_status TY(oplora_exact_step)(const TY(oplora_exact) *layers, int64_t n_layers, int measured, void *workspace,
                                    oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(exact_step)(layers, n_layers, measured, workspace, par));
}

static OPLORA_BODY oplora_status TY(exact_generate)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                                    oplora_parallel_fn par) {
    TY(exact_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(exact_prepare)(layers, n_layers, 0, 0, workspace, &job));
    OPLORA_FORWARD(TY(exact_spread_layers)(&job, 0, n_layers, TY(exact_find_layer), par));
    return TY(exact_spread_tasks)(&job, 0, job.spans[job.n_spans].first_task, TY(exact_generate_task), par);
}

oplora_status TY(oplora_exact_generate)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                        oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(exact_generate)(layers, n_layers, workspace, par));
}
