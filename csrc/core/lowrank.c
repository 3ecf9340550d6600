/* lowrank: the best approximation of rank `rank` to X K, for a tall X (rows, p) known by its Gram matrix X^T X alone and
 * K (p, n).
 *
 *     X K ~= (X rotation) directions      rotation (p, rank), directions (rank, n) with orthonormal rows
 *
 * p is at most 17, so everything is small: with X^T X = F^T F the singular vectors of X K are those of F K, whose Gram
 * matrix F K K^T F^T is (p, p). Whatever directions are chosen, rotation = K directions^T is the exact projection, so an
 * error in a Gram matrix makes the choice slightly worse and the result never wrong. */
#include "lowrank.h"
#include "dispatch.h"

#include <math.h>
#include <string.h>

enum { MOST = OPLORA_MOST_BASIS };

/* Eigenvalues of a symmetric matrix, and its eigenvectors as columns; cyclic Jacobi. a is destroyed. */
static void eigen(double a[MOST][MOST], int p, double value[MOST], double vector[MOST][MOST]) {
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
            for (int j = 0; j < i; j++) {
                if (a[i][j] == 0) continue;
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
    }
    for (int i = 0; i < p; i++) value[i] = a[i][i];
}

static double dot(const double *a, const double *b, int64_t n) { return oplora_dispatch_f64()->dot_double(a, b, n); }

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
    if (!(length > 1e-8 * before)) {
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
    double scaled[MOST][MOST], value[MOST], vector[MOST][MOST], F[MOST][MOST], KK[MOST][MOST], length[MOST];
    /* columns of X at length one, so that small ones are not lost beside large ones */
    for (int i = 0; i < p; i++) length[i] = gram[i * p + i] > 0 ? sqrt(gram[i * p + i]) : 0;
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) {
            const double scale = length[i] * length[j];
            scaled[i][j] = i == j ? scale > 0 : scale > 0 ? gram[i * p + j] / scale : 0;
        }
    eigen(scaled, p, value, vector);
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) F[i][j] = sqrt(fmax(value[i], 0)) * vector[j][i] * length[j];
    for (int i = 0; i < p; i++)
        for (int j = 0; j <= i; j++) KK[i][j] = KK[j][i] = dot(K + i * n, K + j * n, n);
    for (int i = 0; i < p; i++)
        for (int j = 0; j < p; j++) {
            scaled[i][j] = 0;
            for (int a = 0; a < p; a++)
                for (int b = 0; b < p; b++) scaled[i][j] += F[i][a] * KK[a][b] * F[j][b];
        }
    eigen(scaled, p, value, vector);

    double total = 0, kept = 0;
    int order[MOST];
    for (int i = 0; i < p; i++) {
        int at = i;
        for (; at > 0 && value[order[at - 1]] < value[i]; at--) order[at] = order[at - 1];
        order[at] = i;
        total += fmax(value[i], 0);
    }
    memset(directions, 0, (size_t)rank * (size_t)n * sizeof *directions);
    for (int i = 0; i < rank && i < p; i++) {
        const int best = order[i];
        if (!(value[best] > 1e-14 * value[order[0]])) break;
        double *const row = directions + i * n;
        for (int a = 0; a < p; a++) {
            double weight = 0;
            for (int m = 0; m < p; m++) weight += vector[m][best] * F[m][a];
            axpy(weight / sqrt(value[best]), K + a * n, row, n);
        }
        if (!orthonormalise(directions, i, n)) break;
        kept += value[best];
    }
    for (int a = 0; a < p; a++)
        for (int i = 0; i < rank; i++) rotation[a * rank + i] = dot(K + a * n, directions + i * n, n);
    return total > 0 ? fmax(0, 1 - kept / total) : 0;
}
