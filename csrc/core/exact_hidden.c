/* exact_hidden: what lies between the passes of adamw_exact.c: sums over a layer's tasks, the hidden path, and what still
 * columns owe. */
#include "exact.h"

#include "hidden.h"

void TY(oplora_exact_find_hidden)(TY(exact_plan) *p) {
    TY(oplora_hidden)(p->z, p->W1, p->c1, p->layer->H, p->layer->Z, p->h);
}

/* The sums over a layer's tasks, into its report. */
void TY(oplora_exact_report_squares)(const TY(exact_plan) *p) {
    const int64_t H = p->layer->H;
    p->layer->report[0] = p->layer->report[1] = 0;
    for (int64_t t = 0; t < p->tasks; t++)
        for (int64_t k = 0; k < 2; k++) p->layer->report[k] += p->partial[t * (H + 2) + H + k];
}

void TY(oplora_exact_report_hidden)(const TY(exact_plan) *p) {
    const int64_t H = p->layer->H;
    double *const h = p->layer->report + 3, *const d = h + H;
    for (int64_t j = 0; j < H; j++) {
        h[j] = p->h[j];
        d[j] = 0;
        for (int64_t t = 0; p->h[j] != 0 && t < p->tasks; t++) d[j] += p->partial[t * (H + 2) + j];
    }
    TY(oplora_exact_report_norm)(p);
}

/* What the report's d makes of the hidden path: dz, and the norm of its gradient. */
void TY(oplora_exact_report_norm)(const TY(exact_plan) *p) {
    const int64_t H = p->layer->H, Z = p->layer->Z;
    const double *const d = p->layer->report + 3 + H;
    double d2 = 0, z2 = 0, dz2 = 0;
    for (int64_t j = 0; j < H; j++) d2 += d[j] * d[j];
    TY(oplora_hidden_latent_gradient)(d, p->W1, H, Z, p->latent);
    for (int64_t i = 0; i < Z; i++) {
        z2 += (double)p->z[i] * p->z[i];
        dz2 += p->latent[i] * p->latent[i];
    }
    p->layer->report[2] = dz2 + d2 * (z2 + 1);
}

/* AdamW on z, W1 and c1 from the report's d, and the next h. dz is at hand unless the report is of an earlier call. */
void TY(oplora_exact_step_hidden)(TY(exact_plan) *p, int measured_before) {
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
void TY(oplora_exact_settle_columns)(const TY(exact_plan) *p) {
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
