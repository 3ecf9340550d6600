/* lowrank: the best approximation of rank `rank` to X K, for a tall X (rows, p) known by its Gram matrix X^T X alone and
 * K (p, n).
 *
 *     X K ~= (X rotation) directions      rotation (p, rank), directions (rank, n) with orthonormal rows
 *
 * p is at most 17, so everything is small: with X^T X = F^T F the singular vectors of X K are those of F K, whose Gram
 * matrix F K K^T F^T is (p, p). Whatever directions are chosen, rotation = K directions^T is the exact projection, so an
 * error in a Gram matrix makes the choice slightly worse and the result never wrong. */
#include "../shared/lowrank.h"

#include "dispatch.h"

#include <string.h>

static double dot(const double *a, const double *b, int64_t n) { return oplora_dot_double_f64(a, b, n); }

/* y += c x */
static void axpy(double c, const double *x, double *y, int64_t n) { oplora_dispatch_f64()->axpy(&x, &c, 1, y, n); }

/* Makes row i of the directions orthogonal to those before it and of length one; 0 if nothing is left of it. */
static int orthonormalise(double *directions, int i, int64_t n) {
    double *const row = directions + i * n;
    const double before = sqrt(dot(row, row, n));
    for (int pass = 0; pass < 2; pass++)
        for (int other = 0; other < i; other++) {
            const double *const unit = directions + other * n;
            axpy(-dot(row, unit, n), unit, row, n);
        }
    const double length = sqrt(dot(row, row, n));
    if (!oplora_remains(length, before)) {
        memset(row, 0, (size_t)n * sizeof *row);
        return 0;
    }
    const double shorter = 1 / length;
    for (int64_t j = 0; j < n; j++) row[j] *= shorter;
    return 1;
}

/* Returns the share of ||X K||^2 that is dropped. gram is (p, p), symmetric. Directions that carry nothing are zero. */
double oplora_truncate(const double *gram, int p, const double *K, int64_t n, int rank, double *rotation,
                       double *directions) {
    oplora_matrix scaled, vector, F, KK;
    double value[OPLORA_MOST_BASIS], length[OPLORA_MOST_BASIS], kept = 0;
    int order[OPLORA_MOST_BASIS];
    for (int i = 0; i < p; i++) length[i] = oplora_length(gram, p, i);
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) scaled[i][j] = oplora_scaled_entry(gram, p, length, i, j);
    oplora_eigen(scaled, p, value, vector);
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) F[i][j] = oplora_root_entry(value, vector, length, i, j);
    for (int i = 0; i < p; i++)
        for (int j = 0; j <= i; j++) KK[i][j] = KK[j][i] = dot(K + i * n, K + j * n, n);
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) scaled[i][j] = oplora_product_entry(F, KK, p, i, j);
    oplora_eigen(scaled, p, value, vector);

    const double total = oplora_order(value, p, order);
    memset(directions, 0, (size_t)rank * (size_t)n * sizeof *directions);
    for (int i = 0; i < rank && i < p; i++) {
        const int best = order[i];
        if (!oplora_carries(value[best], value[order[0]])) break;
        for (int a = 0; a < p; a++)
            axpy(oplora_direction_weight(value[best], vector, F, p, best, a), K + a * n, directions + i * n, n);
        if (!orthonormalise(directions, i, n)) break;
        kept += value[best];
    }
    for (int a = 0; a < p; a++)
        for (int i = 0; i < rank; i++) rotation[a * rank + i] = dot(K + a * n, directions + i * n, n);
    return oplora_dropped(kept, total);
}
