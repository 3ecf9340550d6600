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
 * Where processes divide the factors, a layer's rows are here in part. Their dh and ||g||^2 are sums over rows, and
 * nothing else is: the caller adds up what a measurement of them reports, and steps by that.
 *
 * Work is cut into tasks of TASK_ROWS rows of one factor, and sums over tasks run in order, so nothing depends on who does
 * a task. Small layers are stepped whole, one a thread: no barriers, and the second pass finds W2 in the cache. Large
 * layers are stepped one after another, their tasks spread over the threads. */
#include "exact.h"

enum { EXACT_SMALL_BYTES = 8 << 20 }; /* of W2: a layer up to this size is one thread's work */

/* ---- layers ---- */

/* A whole layer by one thread. */
static void TY(exact_find_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    (void)job;
    TY(oplora_exact_find_hidden)(p);
}

static void TY(exact_measure_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    TY(oplora_exact_find_hidden)(p);
    TY(oplora_exact_run_tasks)(job, p->first_task, p->first_task + p->tasks, TY(oplora_exact_reduce_task));
    TY(oplora_exact_report_hidden)(p);
}

static void TY(exact_finish_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    (void)job;
    TY(oplora_exact_report_norm)(p);
}

static void TY(exact_step_layer)(const TY(exact_job) *job, TY(exact_plan) *p) {
    if (!job->measured) TY(exact_measure_layer)(job, p);
    TY(oplora_exact_step_hidden)(p, job->measured);
    TY(oplora_exact_run_tasks)(job, p->first_task, p->first_task + p->tasks, TY(oplora_exact_update_task));
    TY(oplora_exact_settle_columns)(p);
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
    return oplora_parallel(par, count, 1, TY(oplora_exact_task_range), job);
}

static oplora_status TY(exact_spread_layers)(TY(exact_job) *job, int64_t first, int64_t count,
                                             void (*each)(const TY(exact_job) *, TY(exact_plan) *),
                                             oplora_parallel_fn par) {
    job->first_plan = first;
    job->each_layer = each;
    return oplora_parallel(par, count, 1, TY(exact_layer_range), job);
}

static oplora_status TY(exact_measure_large)(TY(exact_job) *job, TY(exact_plan) *p, oplora_parallel_fn par) {
    TY(oplora_exact_find_hidden)(p);
    OPLORA_FORWARD(TY(exact_spread_tasks)(job, p->first_task, p->tasks, TY(oplora_exact_reduce_task), par));
    TY(oplora_exact_report_hidden)(p);
    return OPLORA_OK;
}

static oplora_status TY(exact_step_large)(TY(exact_job) *job, TY(exact_plan) *p, oplora_parallel_fn par) {
    if (!job->measured) OPLORA_FORWARD(TY(exact_measure_large)(job, p, par));
    TY(oplora_exact_step_hidden)(p, job->measured);
    OPLORA_FORWARD(TY(exact_spread_tasks)(job, p->first_task, p->tasks, TY(oplora_exact_update_task), par));
    TY(oplora_exact_settle_columns)(p);
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
    OPLORA_FORWARD(
        TY(exact_spread_tasks)(job, 0, job->spans[job->n_spans].first_task, TY(oplora_exact_square_task), par));
    for (const TY(exact_plan) *p = job->plans; p < job->plans + job->n_plans; p++) {
        TY(oplora_exact_report_squares)(p);
        finite &= p->layer->report[1] == 0;
    }
    return finite ? OPLORA_OK : OPLORA_ENONFINITE;
}

/* ---- entry points ---- */

static OPLORA_BODY oplora_status TY(exact_measure)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                                   oplora_parallel_fn par) {
    TY(exact_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(oplora_exact_prepare)(layers, n_layers, 0, 1, workspace, &job));
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
    OPLORA_FORWARD(TY(oplora_exact_prepare)(layers, n_layers, 1, 1, workspace, &job));
    job.measured = measured;
    if (!measured) OPLORA_FORWARD(TY(exact_measure_squares)(&job, par));
    for (int64_t i = 0; i < n_layers; i++) OPLORA_RETURN_IF(layers[i].report[1] != 0, OPLORA_ENONFINITE);
    return TY(exact_for_layers)(&job, TY(exact_step_layer), TY(exact_step_large), par);
}

oplora_status TY(oplora_exact_step)(const TY(oplora_exact) *layers, int64_t n_layers, int measured, void *workspace,
                                    oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(exact_step)(layers, n_layers, measured, workspace, par));
}

static OPLORA_BODY oplora_status TY(exact_finish)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                                  oplora_parallel_fn par) {
    TY(exact_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(oplora_exact_prepare)(layers, n_layers, 0, 1, workspace, &job));
    return TY(exact_spread_layers)(&job, 0, n_layers, TY(exact_finish_layer), par);
}

oplora_status TY(oplora_exact_finish)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(exact_finish)(layers, n_layers, workspace, par));
}

static OPLORA_BODY oplora_status TY(exact_generate)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                                    oplora_parallel_fn par) {
    TY(exact_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(oplora_exact_prepare)(layers, n_layers, 0, 0, workspace, &job));
    OPLORA_FORWARD(TY(exact_spread_layers)(&job, 0, n_layers, TY(exact_find_layer), par));
    return TY(exact_spread_tasks)(&job, 0, job.spans[job.n_spans].first_task, TY(oplora_exact_generate_task), par);
}

oplora_status TY(oplora_exact_generate)(const TY(oplora_exact) *layers, int64_t n_layers, void *workspace,
                                        oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(exact_generate)(layers, n_layers, workspace, par));
}
