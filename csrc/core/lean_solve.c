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
    const double mean_x = TY(oplora_lean_square)(x, map->inputs) / (double)map->inputs;
    const double fresh = oplora_lean_fresh(a->beta2, mean_x, square_g, map->all_rows, TY(oplora_most_gradient));
    *map->mean = a->beta2 * *map->mean + fresh;
    const double turn = *map->mean > 0 ? fresh / *map->mean : 0;
    double root = 0;
    int64_t live = 0;
    for (int64_t j = 0; j < map->inputs; j++) {
        map->r[j] = TY(oplora_lean_next_r)(map->r[j], turn, x[j], mean_x);
        const double c = map->r[j] > 0 ? sqrt((double)map->r[j]) : 0;
        map->col[j] = c > 0 ? 1 / c : 0;
        root += c;
        live += c > 0;
    }
    map->beta1 = a->beta1;
    map->rows.constants = TY(oplora_lean_constants_of)(a, mean_x, live, root, corrected2, key.a);
    /* the first column of A has the bits that R leaves of lean_second's other hash */
    map->rows.round_key[0] = oplora_other_key(key.a);
    for (int i = 1; i < map->rows.k; i++) map->rows.round_key[i] = key.b + (uint32_t)i * key.c;
}

/* The first moment: [A, g] K in the step's scale, gram (p, p) being the whole basis'. What the next A is of them comes into
 * rotate_A (k + 1, k), and B and map->directions, B in the step's scale, follow. */
static void TY(lean_truncate_moment)(TY(lean_map) *map, const T *x, const double *gram, double *rotate_A) {
    const int d = map->rows.d, k = map->rows.k, p = TY(lean_basis_size)(&map->rows);
    const int64_t n = map->inputs;
    double part[BASIS * BASIS];
    for (int i = 0; i <= k; i++)
        for (int j = 0; j <= k; j++) part[i * (k + 1) + j] = gram[(d + i) * p + d + j];
    for (int64_t j = 0; j < n; j++) {
        for (int i = 0; i < k; i++) map->K[i * n + j] = map->beta1 * map->B[i * n + j] * map->col[j];
        map->K[k * n + j] = (1 - map->beta1) * x[j] * map->col[j];
    }
    map->dropped_moment = oplora_truncate(part, k + 1, map->K, n, k, rotate_A, map->directions);
    for (int64_t j = 0; j < n; j++)
        for (int i = 0; i < k; i++)
            map->B[i * n + j] = (T)(map->col[j] > 0 ? map->directions[i * n + j] / map->col[j] : 0);
}

/* W: [U, row A'] with A' = [A, g] rotate_A, which is the basis times change. What the next U is of them comes into
 * rotate_W (d + k, d), and Q_next follows. */
static void TY(lean_truncate_weight)(TY(lean_map) *map, const double *gram, oplora_matrix change, double *rotate_W) {
    const int d = map->rows.d, k = map->rows.k, p = TY(lean_basis_size)(&map->rows);
    const int64_t n = map->inputs;
    double part[BASIS * BASIS];
    if (map->rate == 0 && map->keep == 1) { /* nothing moves, not even by rounding */
        map->dropped_weight = 0;
        for (int i = 0; i < d + k; i++)
            for (int j = 0; j < d; j++) rotate_W[i * d + j] = i == j;
        for (int64_t j = 0; j < d * n; j++) map->Q_next[j] = map->Q[j];
        return;
    }
    for (int i = 0; i < d + k; i++)
        for (int j = 0; j < d + k; j++) part[i * (d + k) + j] = oplora_lean_changed_entry(gram, change, p, i, j);
    for (int64_t j = 0; j < n; j++) {
        for (int i = 0; i < d; i++) map->K[i * n + j] = map->keep * map->Q[i * n + j];
        for (int i = 0; i < k; i++) map->K[(d + i) * n + j] = -map->rate * map->directions[i * n + j];
    }
    map->dropped_weight = oplora_truncate(part, d + k, map->K, n, d, rotate_W, map->Q_next);
}

/* After all sums and with the next input: the truncations, and what the second pass multiplies the basis with. */
void TY(oplora_lean_solve_map)(TY(lean_map) *map, const T *x) {
    TY(lean_rows) *const r = &map->rows;
    const int d = r->d, k = r->k, p = TY(lean_basis_size)(r);
    double gram[BASIS * BASIS], rotate_A[BASIS * RANK], rotate_W[BASIS * RANK];
    oplora_matrix change = {{0}};
    for (int i = 0; i < p; i++)
        for (int j = 0; j <= i; j++) gram[i * p + j] = gram[j * p + i] = map->sums[i * p + j];
    TY(lean_truncate_moment)(map, x, gram, rotate_A);
    for (int i = 0; i < d; i++) change[i][i] = 1;
    for (int i = 0; i <= k; i++)
        for (int j = 0; j < k; j++) change[d + i][d + j] = rotate_A[i * k + j];
    TY(lean_truncate_weight)(map, gram, change, rotate_W);
    for (int i = 0; i < k; i++)
        for (int a = 0; a <= k; a++) r->rotate_A[i][a] = (T)rotate_A[a * k + i];
    for (int i = 0; i < d; i++)
        for (int a = 0; a < p; a++) r->rotate_U[i][a] = (T)oplora_lean_rotation(change, rotate_W, d, k, a, i);
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

/* The map's keep and rate, and each factor's share of them. */
static void TY(lean_find_rates)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    TY(lean_map) *const map = &p->outer;
    oplora_lean_rates rates = {0};
    p->corrected1 = 1 - pow(l->adamw.beta1, (double)l->adamw.step);
    p->corrected2 = 1 - pow(l->adamw.beta2, (double)l->adamw.step);
    for (const TY(oplora_factor) *f = l->factors; f < l->factors + l->n_factors; f++)
        rates = oplora_lean_rates_with(rates, f->lr, f->weight_decay, f->random);
    map->keep = rates.keep;
    map->rate = rates.lr * l->adamw.weight_ratio / p->corrected1;
    map->start_keep = rates.has_random ? rates.start_keep : rates.keep;
    for (int64_t f = 0; f < l->n_factors; f++) {
        const double lr = l->factors[f].lr, keep = oplora_lean_keep(lr, l->factors[f].weight_decay);
        p->shares[f] = (TY(lean_share)){.keep = keep,
                                        .rate = lr / p->corrected1,
                                        .kappa = oplora_lean_kappa(rates, keep),
                                        .rho = oplora_lean_rho(rates, lr)};
    }
}

/* ---- one layer ---- */

void TY(oplora_lean_begin_layer)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    TY(oplora_lean_find_hidden)(p, p->h);
    memset(p->outer.sums, 0, (size_t)TY(lean_part_size)(l) * sizeof(double));
    if (!(p->wants & LEAN_WANTS_GRAM)) return;
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
    if (!(p->wants & LEAN_WANTS_DH)) return;
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
