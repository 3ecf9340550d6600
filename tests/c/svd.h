/* A singular value decomposition that shares nothing with the core's, for its tests. */
#ifndef OPLORA_SVD_H
#define OPLORA_SVD_H

#include "lowrank.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline double dot(const double *a, const double *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline void turn(double *a, double *b, int64_t n, double c, double s) {
    for (int64_t i = 0; i < n; i++) {
        const double x = a[i], y = b[i];
        a[i] = c * x - s * y;
        b[i] = s * x + c * y;
    }
}

/* Hestenes: turns the rows of M (count, n) among each other until they are orthogonal. turned (count, count), or NULL,
 * becomes what M was multiplied with. */
static inline void make_orthogonal(double *M, int count, int64_t n, double *turned) {
    for (int i = 0; turned && i < count * count; i++) turned[i] = i % (count + 1) == 0;
    for (int sweep = 0, busy = 1; busy && sweep < 60; sweep++) {
        busy = 0;
        for (int i = 0; i < count; i++)
            for (int j = 0; j < i; j++) {
                double *const a = M + i * n, *const b = M + j * n;
                const double aa = dot(a, a, n), bb = dot(b, b, n), ab = dot(a, b, n);
                if (fabs(ab) <= 1e-15 * sqrt(aa) * sqrt(bb)) continue;
                busy = 1;
                const double theta = (bb - aa) / (2 * ab);
                const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(1 + theta * theta)),
                             c = 1 / sqrt(1 + t * t);
                turn(a, b, n, c, t * c);
                if (turned) turn(turned + i * count, turned + j * count, count, c, t * c);
            }
    }
}

/* The best X K ~= left right of rank `rank`, for X as p columns of `rows` and K (p, n), by way of orthonormal columns
 * that take X's place; right is orthonormal. Returns the share of ||X K||^2 that is dropped. */
static inline double truncated(double *X, int p, int64_t rows, const double *K, int64_t n, int rank, double *left,
                               double *right) {
    double triangle[OPLORA_MOST_BASIS][OPLORA_MOST_BASIS] = {{0}}, turned[OPLORA_MOST_BASIS * OPLORA_MOST_BASIS];
    double total = 0, kept = 0, largest = 0, *const C = zeros(p * n, sizeof(double));
    for (int i = 0; i < p; i++) { /* Gram and Schmidt, twice */
        double *const column = X + i * rows;
        for (int pass = 0; pass < 2; pass++)
            for (int o = 0; o < i; o++) {
                const double along = dot(X + o * rows, column, rows);
                triangle[o][i] += along;
                for (int64_t r = 0; r < rows; r++) column[r] -= along * X[o * rows + r];
            }
        triangle[i][i] = sqrt(dot(column, column, rows));
        for (int64_t r = 0; r < rows && triangle[i][i] > 0; r++) column[r] /= triangle[i][i];
    }
    for (int a = 0; a < p; a++)
        for (int b = a; b < p; b++)
            for (int64_t j = 0; j < n; j++) C[a * n + j] += triangle[a][b] * K[b * n + j];
    make_orthogonal(C, p, n, turned);
    memset(left, 0, (size_t)(rank * rows) * sizeof *left);
    memset(right, 0, (size_t)(rank * n) * sizeof *right);
    for (int i = 0; i < p; i++) total += dot(C + i * n, C + i * n, n);
    for (int r = 0; r < rank; r++) {
        int best = 0;
        for (int i = 1; i < p; i++)
            if (dot(C + i * n, C + i * n, n) > dot(C + best * n, C + best * n, n)) best = i;
        const double square = dot(C + best * n, C + best * n, n), length = sqrt(square);
        if (r == 0) largest = square;
        if (square <= 1e-26 * largest) break; /* rounding, whose direction may be one that is there already */
        for (int a = 0; a < p; a++)
            for (int64_t i = 0; i < rows; i++) left[r * rows + i] += length * turned[best * p + a] * X[a * rows + i];
        for (int64_t j = 0; j < n; j++) right[r * n + j] = C[best * n + j] / length;
        memset(C + best * n, 0, (size_t)n * sizeof *C);
        kept += square;
    }
    free(C);
    return total > 0 ? fmax(0, 1 - kept / total) : 0;
}

#endif
