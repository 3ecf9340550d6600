/* lean_map: the scalar maths of a lean map between the passes over its rows; core/adamw_lean.c has the formulas.
 * each_lean_map.h has what depends on the number type. */
#ifndef OPLORA_LEAN_MAP_H
#define OPLORA_LEAN_MAP_H

#include "lowrank.h"
#include "random.h"
#include "rows.h"

/* What a step adds to the mean of R. mean_x is the mean of x^2, square_g is ||g||^2. */
OPLORA_SHARED double oplora_lean_fresh(double beta2, double mean_x, double square_g, int64_t rows, double most) {
    return (1 - beta2) * mean_x * fmin(square_g / (double)rows, most * most);
}

/* The keep and rate of a map, the largest of its factors', and the keep of its start, that of the first random factor. */
typedef struct {
    double lr, keep, start_keep;
    int has_random;
} oplora_lean_rates;

OPLORA_SHARED double oplora_lean_keep(double lr, double weight_decay) { return 1 - lr * weight_decay; }

OPLORA_SHARED oplora_lean_rates oplora_lean_rates_with(oplora_lean_rates r, double lr, double weight_decay,
                                                       int is_random) {
    const double keep = oplora_lean_keep(lr, weight_decay);
    if (fabs(lr) > fabs(r.lr)) r.lr = lr;
    if (fabs(keep) > fabs(r.keep)) r.keep = keep;
    if (is_random && !r.has_random) r.has_random = 1, r.start_keep = keep;
    return r;
}

/* By how much a factor's keep and rate are smaller than the map's. */
OPLORA_SHARED double oplora_lean_kappa(oplora_lean_rates r, double keep) { return r.keep != 0 ? keep / r.keep : 1; }
OPLORA_SHARED double oplora_lean_rho(oplora_lean_rates r, double lr) { return r.lr != 0 ? lr / r.lr : 1; }

/* ---- the second truncation, of W: change (p, d + k) makes [U, row A'] of the basis ---- */

/* Entry (i, j) of the Gram matrix of [U, row A']. */
OPLORA_SHARED double oplora_lean_changed_entry(const double *gram, oplora_matrix change, int p, int i, int j) {
    double sum = 0;
    for (int a = 0; a < p; a++)
        for (int b = 0; b < p; b++) sum += change[a][i] * gram[a * p + b] * change[b][j];
    return sum;
}

/* By which vector a of the basis counts in column i of the next U. */
OPLORA_SHARED double oplora_lean_rotation(oplora_matrix change, const double *rotate_W, int d, int k, int a, int i) {
    double sum = 0;
    for (int b = 0; b < d + k; b++) sum += change[a][b] * rotate_W[b * d + i];
    return sum;
}

#define OPLORA_TEMPLATE "each_lean_map.h"
#include "each_type.h"

#endif
