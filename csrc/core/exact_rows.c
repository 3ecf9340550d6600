/* exact_rows: the two passes of adamw_exact.c over the rows of W2, a task at a time. */
#include "exact.h"

#include "hidden.h"

#include <string.h>

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
void TY(oplora_exact_run_tasks)(const TY(exact_job) *job, int64_t begin, int64_t end,
                                void (*body)(const TY(exact_task) *)) {
    if (begin >= end) return;
    const oplora_span *span = job->spans + span_of(job->spans, job->n_spans, begin);
    for (int64_t t = begin; t < end; t++) {
        while (t >= span[1].first_task) span++;
        const TY(exact_task) task = TY(exact_task_at)(job, span, t);
        body(&task);
    }
}

static int TY(exact_counts)(const TY(exact_task) *t) { return !t->factor->place || t->factor->place->counts; }

void TY(oplora_exact_square_task)(const TY(exact_task) *t) {
    const T *const g = t->factor->g + t->offset;
    const double squares = TY(oplora_dot_double)(g, g, t->count);
    t->partial[t->plan->layer->H] = TY(exact_counts)(t) ? squares : 0;
    t->partial[t->plan->layer->H + 1] = TY(oplora_nonfinite_in)(g, t->count, squares);
}

/* First pass: this task's share of dh, for units that are on. */
void TY(oplora_exact_reduce_task)(const TY(exact_task) *t) {
    const TY(oplora_exact) *const l = t->plan->layer;
    T room[TASK_ROWS];
    const T *const g = TY(oplora_bounded_gradient)(t->factor->g + t->offset, t->count, l->report[0], room);
    const T *column[COLUMN_GROUP];
    int64_t unit[COLUMN_GROUP], k = 0;
    double sum[COLUMN_GROUP];
    for (int64_t j = 0; j < l->H; j++) {
        t->partial[j] = 0;
        if (t->plan->h[j] != 0 && TY(exact_counts)(t)) {
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
void TY(oplora_exact_update_task)(const TY(exact_task) *t) {
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

void TY(oplora_exact_generate_task)(const TY(exact_task) *t) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(exact_plan) *const p = t->plan;
    T v[TASK_ROWS] = {0};
    kernels->axpy((const T *const[]){p->c2 + t->row}, p->ones, 1, v, t->count);
    for (int64_t j = 0; j < p->layer->H; j++)
        if (p->h[j] != 0) kernels->axpy((const T *const[]){p->W2 + j * p->layer->N + t->row}, &p->h[j], 1, v, t->count);
    TY(exact_write_factor)(t, v);
}

/* The job's tasks as a range for the caller's threads, counted from its first. */
void TY(oplora_exact_task_range)(int64_t begin, int64_t end, void *context) {
    const TY(exact_job) *const job = context;
    TY(oplora_exact_run_tasks)(job, job->first_task + begin, job->first_task + end, job->each_task);
}
