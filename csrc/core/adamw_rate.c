/* adamw_rate: AdamW with one hidden unit for all layers, which learns the rate of them all; the factors are averages.
 *
 * Every generator is v = start + W2 h with one h for the model (docs/rate.md). AdamW on W2 moves v by h lr u, whatever h
 * is, with u the gradient over the root of its second moment. So h is a learning rate, and its own gradient, in the scale
 * of h, is <g, v - start>. For every entry of a factor p, its gradient g and the generated v,
 *
 *     s' = (1 - m) s + m g^2,          u = g / (sqrt(s') + eps) + weight_decay p
 *     v' = v - eta u,                  eta = rate lr
 *     x' = (1 - c) x + c v',           c = 9 / (t + 8):  the average that weighs the latest ninth of all steps most
 *     p' = (1 - beta1) v' + beta1 x'
 *
 * m is 1 / t, the plain mean's, and 1 - beta2 from where that is larger. But the gradient of a factor that is not listened
 * to, A's, grows from nothing with the factors that start at zero: up to step 20 its mean of squares remembers the
 * latest quarter of the steps, m = 4 / (t + 3), and from there on forgets nothing more.
 *
 * x, being (p - (1 - beta1) v) / beta1, is not kept: p' = p + c (v - p) - eta (1 - beta1 (1 - c)) u.
 *
 * Two passes. The first reads g, and of the factors that are listened to p, v and s: ||g||^2, what is not finite,
 * <g, v - start>, <g, u> and <g, v - p>, from which the caller finds the rate. The second reads g and moves p, v and s:
 * 28 bytes an entry (float), 4 to 16 in the first. Work is cut into tasks of TASK_ROWS rows of one factor; sums over tasks run
 * in order, so nothing depends on who does a task. */
#include "../shared/tasks.h"
#include "dispatch.h"
#include "number.h"
#include "workspace.h"

#include <math.h>
#include <string.h>

enum {
    RATE_GRAIN = 16, /* tasks that a thread is woken for */
    RATE_SUMS = OPLORA_RATE_REPORT
};

typedef struct TY(rate_job) {
    const TY(oplora_rate) *layers;
    oplora_span *spans;                   /* n_spans, and one behind the last */
    TY(oplora_rate_constants) *constants; /* of every span */
    double *partial;                      /* (tasks, RATE_SUMS) */
    int64_t n_spans, tasks;
    void (*each_task)(const struct TY(rate_job) *, int64_t span, int64_t task);
} TY(rate_job);

/* ---- what is where ---- */

static oplora_status TY(rate_check)(const TY(oplora_rate) *layers, int64_t n_layers) {
    OPLORA_RETURN_IF(n_layers < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(n_layers > 0 && !layers, OPLORA_ENULL);
    for (const TY(oplora_rate) *l = layers; l < layers + n_layers; l++) {
        int64_t rows = 0;
        OPLORA_RETURN_IF(l->n_factors < 1 || l->N < 1, OPLORA_ESIZE);
        OPLORA_RETURN_IF(!l->factors || !l->generated || !l->exp_avg_sq || !l->report, OPLORA_ENULL);
        OPLORA_RETURN_IF(!oplora_adamw_is_valid(&l->adamw) || !isfinite(l->rate), OPLORA_EVALUE);
        for (int64_t f = 0; f < l->n_factors; f++) {
            const TY(oplora_factor) *const factor = &l->factors[f];
            OPLORA_RETURN_IF(factor->rows < 1 || factor->rows > l->N - rows, OPLORA_ESIZE);
            OPLORA_RETURN_IF(!factor->g || !factor->out, OPLORA_ENULL);
            OPLORA_RETURN_IF(!(isfinite(factor->lr) && isfinite(factor->weight_decay)), OPLORA_EVALUE);
            rows += factor->rows;
        }
        OPLORA_RETURN_IF(rows != l->N, OPLORA_ESIZE);
    }
    return OPLORA_OK;
}

/* Lays the job out in the workspace; the same walk counts its bytes. */
static TY(rate_job) TY(rate_plan)(const TY(oplora_rate) *layers, int64_t n_layers, arena *a) {
    TY(rate_job) job = {.layers = layers};
    for (int64_t i = 0; i < n_layers; i++) job.n_spans += layers[i].n_factors;
    job.spans = take(a, job.n_spans + 1, sizeof(oplora_span));
    job.constants = take(a, job.n_spans, sizeof(TY(oplora_rate_constants)));
    int64_t s = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        const TY(oplora_rate) *const l = &layers[i];
        for (int64_t f = 0, row = 0; f < l->n_factors; row += l->factors[f++].rows, s++) {
            const TY(oplora_factor) *const factor = &l->factors[f];
            if (a->memory) {
                job.spans[s] = (oplora_span){job.tasks, i, f, row};
                job.constants[s] = TY(oplora_rate_constants_of)(&l->adamw, l->adamw.step, l->rate, factor->lr,
                                                                factor->weight_decay, !factor->listens);
            }
            job.tasks += tasks_in(factor->rows);
        }
    }
    if (a->memory) job.spans[s].first_task = job.tasks;
    job.partial = take(a, job.tasks, RATE_SUMS * sizeof(double));
    return job;
}

int64_t TY(oplora_rate_workspace_bytes)(const TY(oplora_rate) *layers, int64_t n_layers) {
    arena a = {NULL, 0};
    if (TY(rate_check)(layers, n_layers) != OPLORA_OK) return -1;
    TY(rate_plan)(layers, n_layers, &a);
    return a.used;
}

/* ---- the first pass ---- */

static void TY(rate_measure_task)(const TY(rate_job) *job, int64_t s, int64_t task) {
    const TY(oplora_kernels) *const k = TY(oplora_dispatch)();
    const oplora_span *const span = &job->spans[s];
    const TY(oplora_rate) *const l = &job->layers[span->layer];
    const TY(oplora_factor) *const factor = &l->factors[span->factor];
    const int64_t at = (task - span->first_task) * TASK_ROWS, left = factor->rows - at,
                  n = left < TASK_ROWS ? left : TASK_ROWS;
    const T *const v = l->generated + span->row + at;
    double *const sums = job->partial + RATE_SUMS * task;
    T u[TASK_ROWS], room[TASK_ROWS];
    const T *const raw = factor->g + at;
    const T *const column[] = {raw, v, factor->out + at, u, factor->base ? factor->base + at : NULL};
    const int64_t columns = factor->base ? 5 : 4;
    double dot[5] = {0};
    if (factor->listens) k->rate_direction(raw, l->exp_avg_sq + span->row + at, n, &job->constants[s], u);
    k->dot_double(column, factor->listens ? columns : 1, raw, n, dot);
    sums[0] = dot[0];
    sums[1] = TY(oplora_nonfinite_in)(raw, n, dot[0]);
    const T *const g = TY(oplora_bounded_gradient)(raw, n, dot[0], room);
    if (factor->listens && g != raw) { /* some do not count as they are */
        k->rate_direction(g, l->exp_avg_sq + span->row + at, n, &job->constants[s], u);
        k->dot_double(column + 1, columns - 1, g, n, dot + 1);
    }
    sums[2] = dot[1] - dot[4];
    sums[3] = dot[3];
    sums[4] = dot[1] - dot[2];
}

/* Tasks as a range for the caller's threads. */
static void TY(rate_task_range)(int64_t begin, int64_t end, void *context) {
    const TY(rate_job) *const job = context;
    for (int64_t task = begin, s = span_of(job->spans, job->n_spans, begin); task < end; task++) {
        while (task >= job->spans[s + 1].first_task) s++;
        job->each_task(job, s, task);
    }
}

/* Sums of the tasks of every layer, in their order. */
static int TY(rate_report)(const TY(rate_job) *job) {
    int finite = 1;
    for (int64_t s = 0; s < job->n_spans; s++) {
        const oplora_span *const span = &job->spans[s];
        double *const report = job->layers[span->layer].report;
        if (span->factor == 0)
            for (int i = 0; i < RATE_SUMS; i++) report[i] = 0;
        for (int64_t task = span->first_task; task < job->spans[s + 1].first_task; task++)
            for (int i = 0; i < RATE_SUMS; i++) report[i] += job->partial[RATE_SUMS * task + i];
        finite &= report[1] == 0;
    }
    return finite;
}

/* ---- the second ---- */

static void TY(rate_update_task)(const TY(rate_job) *job, int64_t s, int64_t task) {
    const oplora_span *const span = &job->spans[s];
    const TY(oplora_rate) *const l = &job->layers[span->layer];
    const TY(oplora_factor) *const factor = &l->factors[span->factor];
    const int64_t at = (task - span->first_task) * TASK_ROWS, left = factor->rows - at, row = span->row + at;
    const int64_t n = left < TASK_ROWS ? left : TASK_ROWS;
    T room[TASK_ROWS];
    const T *const g = TY(oplora_bounded_gradient)(factor->g + at, n, l->report[0], room);
    TY(oplora_dispatch)()->rate_update(factor->out + at, l->generated + row, l->exp_avg_sq + row, g, n,
                                       &job->constants[s]);
}

/* ---- entry points ---- */

static oplora_status TY(rate_prepare)(const TY(oplora_rate) *layers, int64_t n_layers, void *workspace,
                                      TY(rate_job) *job) {
    OPLORA_FORWARD(TY(rate_check)(layers, n_layers));
    OPLORA_RETURN_IF(n_layers > 0 && !workspace, OPLORA_ENULL);
    arena a = {workspace, 0};
    *job = TY(rate_plan)(layers, n_layers, &a);
    return a.used < 0 ? OPLORA_EOVERFLOW : OPLORA_OK;
}

static OPLORA_BODY oplora_status TY(rate_measure)(const TY(oplora_rate) *layers, int64_t n_layers, void *workspace,
                                                  oplora_parallel_fn par) {
    TY(rate_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(rate_prepare)(layers, n_layers, workspace, &job));
    job.each_task = TY(rate_measure_task);
    OPLORA_FORWARD(oplora_parallel(par, job.tasks, RATE_GRAIN, TY(rate_task_range), &job));
    return TY(rate_report)(&job) ? OPLORA_OK : OPLORA_ENONFINITE;
}

oplora_status TY(oplora_rate_measure)(const TY(oplora_rate) *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(rate_measure)(layers, n_layers, workspace, par));
}

static OPLORA_BODY oplora_status TY(rate_step)(const TY(oplora_rate) *layers, int64_t n_layers, void *workspace,
                                               oplora_parallel_fn par) {
    TY(rate_job) job;
    if (n_layers == 0) return OPLORA_OK;
    OPLORA_FORWARD(TY(rate_prepare)(layers, n_layers, workspace, &job));
    for (int64_t i = 0; i < n_layers; i++) OPLORA_RETURN_IF(layers[i].report[1] != 0, OPLORA_ENONFINITE);
    job.each_task = TY(rate_update_task);
    return oplora_parallel(par, job.tasks, RATE_GRAIN, TY(rate_task_range), &job);
}

oplora_status TY(oplora_rate_step)(const TY(oplora_rate) *layers, int64_t n_layers, void *workspace,
                                   oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(rate_step)(layers, n_layers, workspace, par));
}
