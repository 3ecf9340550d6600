/* lowrank: the scalar maths of truncations, core/lowrank.c, and their sizes. Matrices have room for MOST rows. */
#ifndef OPLORA_LOWRANK_H
#define OPLORA_LOWRANK_H

#include "../core/oplora_core.h"
#include "shared.h"

#include <math.h>

enum { OPLORA_MOST_BASIS = 2 * OPLORA_MOST_RANK + 1 };
typedef double oplora_matrix[OPLORA_MOST_BASIS][OPLORA_MOST_BASIS];

/* One rotation of cyclic Jacobi: makes a[i][j] zero for j < i, and turns the vectors. */
OPLORA_SHARED void oplora_rotate(oplora_matrix a, oplora_matrix vector, int p, int i, int j) {
    const double theta = (a[i][i] - a[j][j]) / (2 * a[i][j]);
    const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
    const double c = 1 / sqrt(t * t + 1), s = t * c;
    for (int m = 0; m < p; m++) {
        const double x = a[m][j], y = a[m][i];
        a[m][j] = c * x - s * y;
        a[m][i] = s * x + c * y;
    }
    for (int m = 0; m < p; m++) {
        const double x = a[j][m], y = a[i][m];
        a[j][m] = c * x - s * y;
        a[i][m] = s * x + c * y;
    }
    for (int m = 0; m < p; m++) {
        const double x = vector[m][j], y = vector[m][i];
        vector[m][j] = c * x - s * y;
        vector[m][i] = s * x + c * y;
    }
}

/* Eigenvalues of a symmetric matrix, and its eigenvectors as columns; cyclic Jacobi. a is destroyed. */
OPLORA_SHARED void oplora_eigen(oplora_matrix a, int p, double *value, oplora_matrix vector) {
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) vector[i][j] = i == j;
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, diagonal = 0;
        for (int i = 0; i < p; i++) {
            diagonal += a[i][i] * a[i][i];
            for (int j = 0; j < i; j++) off += a[i][j] * a[i][j];
        }
        if (off <= 1e-32 * diagonal) break;
        for (int i = 0; i < p; i++)
            for (int j = 0; j < i; j++)
                if (a[i][j] != 0) oplora_rotate(a, vector, p, i, j);
    }
    for (int i = 0; i < p; i++) value[i] = a[i][i];
}

/* The length of column i of X, by its Gram matrix. */
OPLORA_SHARED double oplora_length(const double *gram, int p, int i) {
    return gram[i * p + i] > 0 ? sqrt(gram[i * p + i]) : 0;
}

/* Entry (i, j) of the Gram matrix of X with columns of length one, so that small ones are not lost beside large ones. */
OPLORA_SHARED double oplora_scaled_entry(const double *gram, int p, const double *length, int i, int j) {
    const double scale = length[i] * length[j];
    return i == j ? scale > 0 : scale > 0 ? gram[i * p + j] / scale : 0;
}

/* Entry (i, j) of F, with F^T F = X^T X: from the eigenvalues and -vectors of the scaled Gram matrix. */
OPLORA_SHARED double oplora_root_entry(const double *value, oplora_matrix vector, const double *length, int i, int j) {
    return sqrt(fmax(value[i], 0.0)) * vector[j][i] * length[j];
}

/* Entry (i, j) of F K K^T F^T. */
OPLORA_SHARED double oplora_product_entry(oplora_matrix F, oplora_matrix KK, int p, int i, int j) {
    double sum = 0;
    for (int a = 0; a < p; a++)
        for (int b = 0; b < p; b++) sum += F[i][a] * KK[a][b] * F[j][b];
    return sum;
}

/* The order of the eigenvalues, largest first; returns their sum. */
OPLORA_SHARED double oplora_order(const double *value, int p, int *order) {
    double total = 0;
    for (int i = 0; i < p; i++) {
        int at = i;
        for (; at > 0 && value[order[at - 1]] < value[i]; at--) order[at] = order[at - 1];
        order[at] = i;
        total += fmax(value[i], 0.0);
    }
    return total;
}

/* Whether a direction of this eigenvalue is one, or only rounding beside the largest. */
OPLORA_SHARED int oplora_carries(double value, double largest) { return value > 1e-14 * largest; }

/* By which row a of K counts in the direction of an eigenvector. */
OPLORA_SHARED double oplora_direction_weight(double value, oplora_matrix vector, oplora_matrix F, int p, int which,
                                             int a) {
    double weight = 0;
    for (int m = 0; m < p; m++) weight += vector[m][which] * F[m][a];
    return weight / sqrt(value);
}

/* Whether anything is left of a direction that was made orthogonal to others. */
OPLORA_SHARED int oplora_remains(double length, double before) { return length > 1e-8 * before; }

OPLORA_SHARED double oplora_dropped(double kept, double total) { return total > 0 ? fmax(0.0, 1 - kept / total) : 0; }

#ifdef __cplusplus
extern "C" {
#endif

double oplora_truncate(const double *gram, int p, const double *K, int64_t n, int rank, double *rotation,
                       double *directions);

#ifdef __cplusplus
}
#endif

#endif
