/* exact_plan: where the scratch of adamw_exact.c's layers lies, and what is refused. */
#include "exact.h"

#include <math.h>

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

oplora_status TY(oplora_exact_prepare)(const TY(oplora_exact) *layers, int64_t n_layers, int steps, int gradients,
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
