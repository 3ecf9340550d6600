/* What the rooms of adamw_exact.c share: exact_rows.c, the two passes over the rows; exact_hidden.c, the hidden path between
 * them; exact_plan.c, what lies where. Internal. */
#ifndef OPLORA_EXACT_H
#define OPLORA_EXACT_H

#include "../shared/tasks.h"
#include "dispatch.h"
#include "number.h"
#include "workspace.h"

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

/* ---- exact_rows.c ---- */

void TY(oplora_exact_run_tasks)(const TY(exact_job) *job, int64_t begin, int64_t end,
                                void (*body)(const TY(exact_task) *));
void TY(oplora_exact_task_range)(int64_t begin, int64_t end, void *context);
void TY(oplora_exact_square_task)(const TY(exact_task) *t);
void TY(oplora_exact_reduce_task)(const TY(exact_task) *t);
void TY(oplora_exact_update_task)(const TY(exact_task) *t);
void TY(oplora_exact_generate_task)(const TY(exact_task) *t);

/* ---- exact_hidden.c ---- */

void TY(oplora_exact_find_hidden)(TY(exact_plan) *p);
void TY(oplora_exact_report_squares)(const TY(exact_plan) *p);
void TY(oplora_exact_report_hidden)(const TY(exact_plan) *p);
void TY(oplora_exact_report_norm)(const TY(exact_plan) *p);
void TY(oplora_exact_step_hidden)(TY(exact_plan) *p, int measured_before);
void TY(oplora_exact_settle_columns)(const TY(exact_plan) *p);

/* ---- exact_plan.c ---- */

oplora_status TY(oplora_exact_prepare)(const TY(oplora_exact) *layers, int64_t n_layers, int steps, int gradients,
                                       void *workspace, TY(exact_job) *job);

#endif
