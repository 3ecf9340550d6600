/* lean_solve: what lies between the two passes of adamw_lean.c: the averages that no single row is needed for, the
 * truncations, and what the second pass multiplies the basis with. */
#include "lean.h"

#include <math.h>
#include <string.h>

double TY(oplora_lean_square)(const T *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

/* ---- one linear map ---- */

/* The averages that do not depend on single rows, and with them the step's numbers. square_g is ||g||^2. */
void TY(oplora_lean_prepare_map)(TY(lean_map) *map, const T *x, double square_g, const oplora_adamw *a,
                                 double corrected2, oplora_words key) {
    const double mean_x = TY(oplora_lean_square)(x, map->inputs) / (double)map->inputs, most = TY(oplora_most_gradient);
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
    map->rows.constants =
        (TY(oplora_lean_constants)){.beta1_rest = (T)(1 - a->beta1),
                                    .beta2 = (T)a->beta2,
                                    .beta2_rest = (T)(1 - a->beta2),
                                    .second = (T)((1 - a->beta2) * mean_x),
                                    .eps = (T)fmax(a->eps, LEAST_EPS),
                                    .eps_row = (T)fmax(live ? a->eps * (double)live / root : a->eps, LEAST_EPS),
                                    .inverse_root = (T)(1 / sqrt(corrected2)),
                                    .key = key.a};
    /* the first column of A has the bits that R leaves of lean_second's other hash */
    map->rows.round_key[0] = oplora_other_key(key.a);
    for (int i = 1; i < map->rows.k; i++) map->rows.round_key[i] = key.b + (uint32_t)i * key.c;
}

/* After all sums and with the next input: the truncations, and what the second pass multiplies the basis with. */
void TY(oplora_lean_solve_map)(TY(lean_map) *map, const T *x) {
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
void TY(oplora_lean_finish_map)(TY(lean_map) *map, const T *x, const T *x_next) {
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

/* ---- the factors' rates ---- */

double TY(oplora_lean_keep_of)(const TY(oplora_factor) *f) { return 1 - f->lr * f->weight_decay; }

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
        if (fabs(TY(oplora_lean_keep_of)(f)) > fabs(map->keep)) map->keep = TY(oplora_lean_keep_of)(f);
        if (f->random && !random) random = f;
    }
    map->rate = lr * l->adamw.weight_ratio / p->corrected1;
    map->start_keep = random ? TY(oplora_lean_keep_of)(random) : map->keep;
    for (int64_t f = 0; f < l->n_factors; f++) {
        const double keep = TY(oplora_lean_keep_of)(&l->factors[f]);
        p->shares[f] = (TY(lean_share)){.keep = keep,
                                        .rate = l->factors[f].lr / p->corrected1,
                                        .kappa = map->keep != 0 ? keep / map->keep : 1,
                                        .rho = lr != 0 ? l->factors[f].lr / lr : 1};
    }
}

/* ---- one layer ---- */

void TY(oplora_lean_begin_layer)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    TY(oplora_lean_find_hidden)(p, p->h);
    memset(p->outer.sums, 0, (size_t)TY(lean_part_size)(l) * sizeof(double));
    if (!(p->wants & WANTS_GRAM)) return;
    TY(lean_find_rates)(p);
    TY(oplora_lean_prepare_map)(&p->outer, p->h, l->report[0], &l->adamw, p->corrected2,
                                oplora_rounding_key(l->seed, l->layer, l->adamw.step, 0));
}

void TY(oplora_lean_add_part)(TY(lean_plan) *p, const double *sums) {
    for (int64_t i = 0; i < TY(lean_part_size)(p->layer); i++) p->outer.sums[i] += sums[i];
}

/* dh = s W0^T g + Q (U^T g) where the unit is on, from the sums of all parts. */
void TY(oplora_lean_find_dh)(TY(lean_plan) *p) {
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

/* Between the passes. */
void TY(oplora_lean_solve_layer)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    TY(lean_map) *const map = &p->outer;
    TY(oplora_lean_find_dh)(p);
    TY(oplora_lean_step_hidden)(p);
    TY(oplora_lean_solve_map)(map, p->h);
    TY(oplora_lean_finish_map)(map, p->h, p->h_next);
    const double bound = p->bound * map->start_keep * *map->scale;
    for (int64_t j = 0; j < l->H; j++) p->change[j] = (T)(bound * ((double)p->h_next[j] - p->h[j]));
    *map->scale *= map->start_keep;
    l->report[5] = map->dropped_moment;
    l->report[6] = map->dropped_weight;
    l->report[7] = p->hidden.dropped_moment;
    l->report[8] = p->hidden.dropped_weight;
}

void TY(oplora_lean_measure_dh)(TY(lean_plan) *p) {
    TY(oplora_lean_find_dh)(p);
    TY(oplora_lean_report_hidden)(p);
}
