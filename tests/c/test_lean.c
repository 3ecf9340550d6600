/* The lean state's core without Python: truncations against the best that there is, random numbers and row loops
 * against scalar ones, whole steps against a dense reference, the same bits for every split and both ways of a step,
 * edges, and refusals.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "dispatch.h"
#include "lowrank.h"
#include "oplora_core.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void *zeros(int64_t count, size_t size) {
    void *const memory = calloc((size_t)count + 1, size);
    if (!memory) abort();
    return memory;
}

static double dot(const double *a, const double *b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* ---- a singular value decomposition that shares nothing with the core's ---- */

static void turn(double *a, double *b, int64_t n, double c, double s) {
    for (int64_t i = 0; i < n; i++) {
        const double x = a[i], y = b[i];
        a[i] = c * x - s * y;
        b[i] = s * x + c * y;
    }
}

/* Hestenes: turns the rows of M (count, n) among each other until they are orthogonal. turned (count, count), or NULL,
 * becomes what M was multiplied with. */
static void make_orthogonal(double *M, int count, int64_t n, double *turned) {
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
static double truncated(double *X, int p, int64_t rows, const double *K, int64_t n, int rank, double *left,
                        double *right) {
    double triangle[OPLORA_MOST_BASIS][OPLORA_MOST_BASIS] = {{0}}, turned[OPLORA_MOST_BASIS * OPLORA_MOST_BASIS];
    double total = 0, kept = 0, *const C = zeros(p * n, sizeof(double));
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
        if (length == 0) break;
        for (int a = 0; a < p; a++)
            for (int64_t i = 0; i < rows; i++) left[r * rows + i] += length * turned[best * p + a] * X[a * rows + i];
        for (int64_t j = 0; j < n; j++) right[r * n + j] = C[best * n + j] / length;
        memset(C + best * n, 0, (size_t)n * sizeof *C);
        kept += square;
    }
    free(C);
    return total > 0 ? fmax(0, 1 - kept / total) : 0;
}

/* ---- oplora_truncate ---- */

enum { ROWS = 40, COLUMNS = 30, MOST = OPLORA_MOST_BASIS };

/* ||M||^2 less the `rank` largest squared singular values; M is destroyed. */
static double best_residual(double *M, int columns, int rank) {
    double square[COLUMNS], sum = 0;
    make_orthogonal(M, columns, ROWS, NULL);
    for (int j = 0; j < columns; j++) {
        int at = j;
        const double new = dot(M + j * ROWS, M + j * ROWS, ROWS);
        for (; at > 0 && square[at - 1] < new; at--) square[at] = square[at - 1];
        square[at] = new;
    }
    for (int j = rank; j < columns; j++) sum += square[j];
    return sum;
}

/* X (ROWS, p), K (p, n), both columns and rows scaled; X of rank x_rank, the rows of K apart by `apart`. */
static void test_truncate(int p, int n, int rank, const double *x_scale, const double *k_scale, int x_rank,
                          double apart) {
    double X[MOST][ROWS], K[MOST * COLUMNS] = {0}, M[COLUMNS][ROWS], gram[MOST * MOST] = {0};
    double rotation[MOST * OPLORA_MOST_RANK], directions[OPLORA_MOST_RANK * COLUMNS], common[COLUMNS];
    double total = 0, residual = 0;
    for (int j = 0; j < n; j++) common[j] = noise() * (1 - apart);
    for (int a = 0; a < p; a++) {
        for (int i = 0; i < ROWS; i++) X[a][i] = a < x_rank ? noise() * x_scale[a] : X[a % x_rank][i] * (a + 1);
        for (int j = 0; j < n; j++) K[a * n + j] = (common[j] + apart * noise()) * k_scale[a];
    }
    for (int a = 0; a < p; a++)
        for (int b = 0; b < p; b++) gram[a * p + b] = dot(X[a], X[b], ROWS);
    const double dropped = oplora_truncate(gram, p, K, n, rank, rotation, directions);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < ROWS; i++) {
            double kept = 0;
            M[j][i] = 0;
            for (int a = 0; a < p; a++) {
                M[j][i] += X[a][i] * K[a * n + j];
                for (int r = 0; r < rank; r++) kept += X[a][i] * rotation[a * rank + r] * directions[r * n + j];
            }
            total += M[j][i] * M[j][i];
            residual += (M[j][i] - kept) * (M[j][i] - kept);
        }
    const double best = best_residual(&M[0][0], n, rank);
    CHECK(residual <= best + 1e-11 * total);
    CHECK(fabs(dropped * total - residual) <= 1e-11 * total && dropped >= 0);
    const int most = x_rank < n ? x_rank : n;
    for (int r = 0; r < rank; r++)
        for (int q = 0; q <= r; q++) {
            const double product = dot(directions + r * n, directions + q * n, n);
            CHECK(fabs(product - (q == r)) < 1e-12 || (q == r && product == 0 && r >= most));
        }
}

static void test_truncations(void) {
    static const double even[MOST] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    static const double graded[MOST] = {1e12, 1, 1e-12, 1e6, 1e-6, 1, 1, 1e3, 1e-9, 1e9, 1, 2, 3, 1e-3, 1e4, 1e-4, 7};
    static const int ps[] = {1, 2, 3, 4, 5, 7, 12, MOST}, ns[] = {1, 2, 7, COLUMNS};
    double inverse[MOST];
    for (int i = 0; i < MOST; i++) inverse[i] = 1 / graded[i];
    for (size_t i = 0; i < sizeof ps / sizeof *ps; i++)
        for (size_t j = 0; j < sizeof ns / sizeof *ns; j++)
            for (int rank = 1; rank <= ps[i] && rank <= OPLORA_MOST_RANK; rank++) {
                const int p = ps[i], n = ns[j];
                test_truncate(p, n, rank, even, even, p, 1);
                test_truncate(p, n, rank, graded, inverse, p, 1); /* all count, though X and K are scaled badly */
                test_truncate(p, n, rank, even, even, (p + 1) / 2, 1);
                test_truncate(p, n, rank, graded, inverse, 1, 1);
                test_truncate(p, n, rank, even, even, p, 1e-5); /* as while h hardly moves */
            }
    double gram[9] = {0}, K[3 * COLUMNS], rotation[6], directions[2 * COLUMNS];
    for (int i = 0; i < 3 * COLUMNS; i++) K[i] = noise();
    CHECK(oplora_truncate(gram, 3, K, COLUMNS, 2, rotation, directions) == 0); /* X is zero: nothing is kept, no NaN */
    for (int i = 0; i < 6; i++) CHECK(rotation[i] == 0);
    for (int i = 0; i < 2 * COLUMNS; i++) CHECK(directions[i] == 0);
    for (int i = 0; i < 3; i++) gram[4 * i] = 1;
    memset(K, 0, sizeof K); /* and K zero */
    CHECK(oplora_truncate(gram, 3, K, COLUMNS, 2, rotation, directions) == 0);
    for (int i = 0; i < 2 * COLUMNS; i++) CHECK(directions[i] == 0);
    /* one direction is much larger than the others, which are still found, and in the order of their size */
    for (int a = 0; a < 3; a++)
        for (int j = 0; j < 3; j++) K[a * 3 + j] = a == j ? pow(10, -2 * a) : 0;
    double three[9];
    const double dropped = oplora_truncate(gram, 3, K, 3, 2, rotation, three);
    CHECK(fabs(dropped - 1e-8 / (1 + 1e-4 + 1e-8)) < 1e-15);
    CHECK(fabs(fabs(three[0]) - 1) < 1e-15 && fabs(fabs(three[4]) - 1) < 1e-12);
}

/* ---- the dense reference: the formulas at the top of adamw_lean.c, in double, with W0 and c written out ---- */

typedef struct {
    int64_t rows, inputs;
    int d, k;
    double *W0, *U, *Q, *A, *B, *R, *r, *c, *m, *S; /* W0 as columns */
    double *lr, *decay; /* of each row's c: its rate, and what a step takes of it and of W */
    double scale, mean, dropped_moment, dropped_weight;
} dense_map;

static dense_map make_map(int64_t rows, int64_t inputs, int d, int k) {
    return (dense_map){.rows = rows,
                       .inputs = inputs,
                       .d = d,
                       .k = k,
                       .W0 = zeros(rows * inputs, 8),
                       .U = zeros(d * rows, 8),
                       .Q = zeros(d * inputs, 8),
                       .A = zeros(k * rows, 8),
                       .B = zeros(k * inputs, 8),
                       .R = zeros(rows, 8),
                       .r = zeros(inputs, 8),
                       .c = zeros(rows, 8),
                       .m = zeros(rows, 8),
                       .S = zeros(rows, 8),
                       .lr = zeros(rows, 8),
                       .decay = zeros(rows, 8),
                       .scale = 1};
}

static void free_map(dense_map *w) {
    double *const all[] = {w->W0, w->U, w->Q, w->A, w->B, w->R, w->r, w->c, w->m, w->S, w->lr, w->decay};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* out = (s W0 + U Q^T) x + c */
static void map_output(const dense_map *w, const double *x, double *out) {
    memcpy(out, w->c, (size_t)w->rows * sizeof *out);
    for (int64_t j = 0; j < w->inputs; j++)
        for (int64_t n = 0; n < w->rows && x[j] != 0; n++) out[n] += w->scale * w->W0[j * w->rows + n] * x[j];
    for (int i = 0; i < w->d; i++) {
        const double along = dot(w->Q + i * w->inputs, x, w->inputs);
        for (int64_t n = 0; n < w->rows; n++) out[n] += along * w->U[i * w->rows + n];
    }
}

/* dx = (s W0 + U Q^T)^T g */
static void map_back(const dense_map *w, const double *g, double *dx) {
    double along[OPLORA_MOST_RANK];
    for (int i = 0; i < w->d; i++) along[i] = dot(w->U + i * w->rows, g, w->rows);
    for (int64_t j = 0; j < w->inputs; j++) {
        dx[j] = w->scale * dot(w->W0 + j * w->rows, g, w->rows);
        for (int i = 0; i < w->d; i++) dx[j] += w->Q[i * w->inputs + j] * along[i];
    }
}

/* torch.optim.AdamW on numbers whose gradient is g. */
static void reference_adamw(double *p, double *m, double *s, const double *g, int64_t n, double lr, double decay,
                            const oplora_adamw *a) {
    const double first = 1 - pow(a->beta1, (double)a->step), second = 1 - pow(a->beta2, (double)a->step);
    for (int64_t i = 0; i < n; i++) {
        m[i] = a->beta1 * m[i] + (1 - a->beta1) * g[i];
        s[i] = a->beta2 * s[i] + (1 - a->beta2) * g[i] * g[i];
        p[i] = (1 - decay) * p[i] - lr * (m[i] / first) / (sqrt(s[i] / second) + a->eps);
    }
}

/* R, r, and from them row and the square roots of r. */
static void map_second_moment(dense_map *w, const double *g, const double *x, const oplora_adamw *a, double *row,
                              double *root) {
    const double mean_x = dot(x, x, w->inputs) / (double)w->inputs, mean_g = dot(g, g, w->rows) / (double)w->rows;
    const double fresh = (1 - a->beta2) * mean_x * mean_g, second = 1 - pow(a->beta2, (double)a->step);
    double sum = 0, live = 0;
    w->mean = a->beta2 * w->mean + fresh;
    for (int64_t j = 0; j < w->inputs; j++) {
        if (fresh > 0) w->r[j] += fresh / w->mean * (x[j] * x[j] / mean_x - w->r[j]);
        root[j] = sqrt(w->r[j]);
        sum += root[j];
        live += root[j] > 0;
    }
    for (int64_t n = 0; n < w->rows; n++) {
        w->R[n] = a->beta2 * w->R[n] + (1 - a->beta2) * mean_x * g[n] * g[n];
        row[n] = 1 / (sqrt(w->R[n] / second) + (live ? a->eps / (sum / live) : a->eps));
    }
}

/* weight_ratio: W's rate over c's. decay: of s. A row's part in a truncation is as large as its step. */
static void map_step(dense_map *w, const double *g, const double *x, double weight_ratio, double decay,
                     const oplora_adamw *a) {
    const int64_t rows = w->rows, n = w->inputs;
    const int d = w->d, k = w->k;
    const double first = 1 - pow(a->beta1, (double)a->step);
    double *const row = zeros(rows, 8), *const root = zeros(n, 8), *const left = zeros(k * rows, 8);
    double *const right = zeros(k * n, 8), *const X = zeros((d + k + 1) * rows, 8),
                  *const K = zeros((d + k + 1) * n, 8), *const A = zeros(k * rows, 8);
    double fastest = 0;
    map_second_moment(w, g, x, a, row, root);
    for (int64_t i = 0; i < rows; i++) fastest = fmax(fastest, w->lr[i]);
    for (int64_t i = 0; i < rows; i++) { /* rate row M col */
        const double rate = fastest > 0 ? w->lr[i] / fastest * row[i] : row[i];
        for (int b = 0; b < k; b++) X[b * rows + i] = rate * w->A[b * rows + i];
        X[k * rows + i] = rate * g[i];
    }
    for (int64_t j = 0; j < n; j++) {
        const double col = root[j] > 0 ? 1 / root[j] : 0;
        for (int b = 0; b < k; b++) K[b * n + j] = a->beta1 * w->B[b * n + j] * col;
        K[k * n + j] = (1 - a->beta1) * x[j] * col;
    }
    w->dropped_moment = truncated(X, k + 1, rows, K, n, k, left, right);
    for (int b = 0; b < k; b++) /* what is kept of M itself, also where the rate is 0: M's projection */
        for (int c = 0; c <= k; c++) {
            const double along = dot(K + c * n, right + b * n, n);
            for (int64_t i = 0; i < rows; i++) A[b * rows + i] += along * (c < k ? w->A[c * rows + i] : g[i]);
        }
    memcpy(w->A, A, (size_t)(k * rows) * 8);
    for (int b = 0; b < k; b++)
        for (int64_t j = 0; j < n; j++) w->B[b * n + j] = right[b * n + j] * root[j];
    for (int64_t i = 0; i < rows; i++) { /* keep U Q^T - rate (row A) (B col)^T */
        for (int b = 0; b < d; b++) X[b * rows + i] = (1 - w->decay[i]) * w->U[b * rows + i];
        for (int b = 0; b < k; b++) X[(d + b) * rows + i] = w->lr[i] * weight_ratio * row[i] * A[b * rows + i];
    }
    memcpy(K, w->Q, (size_t)(d * n) * 8);
    for (int64_t j = 0; j < k * n; j++) K[d * n + j] = -right[j] / first;
    w->dropped_weight = truncated(X, d + k, rows, K, n, d, w->U, w->Q);
    w->scale *= 1 - decay;
    for (int64_t i = 0; i < rows; i++)
        reference_adamw(w->c + i, w->m + i, w->S + i, g + i, 1, w->lr[i], w->decay[i], a);
    double *const all[] = {row, root, left, right, X, K, A};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

typedef struct {
    dense_map outer, hidden;
    double *z, *z_avg, *z_avg_sq, *pre, *h, *v, *dh, *dz;
    double report[OPLORA_LEAN_REPORT];
} dense;

static void dense_generate(dense *t) {
    map_output(&t->hidden, t->z, t->pre);
    for (int64_t j = 0; j < t->hidden.rows; j++) t->h[j] = fmax(t->pre[j], 0);
    map_output(&t->outer, t->h, t->v);
}

/* decay: of W2's start. Returns how many units went on or off. */
static int64_t dense_step(dense *t, const double *g, double decay, const oplora_adamw *a) {
    const int64_t H = t->hidden.rows, Z = t->hidden.inputs;
    int64_t toggled = 0;
    double *const was = zeros(H, 8);
    memcpy(was, t->h, (size_t)H * 8);
    map_back(&t->outer, g, t->dh);
    t->report[4] = 0;
    for (int64_t j = 0; j < H; j++) {
        if (t->h[j] == 0) t->dh[j] = 0;
        t->report[4] += t->h[j] > 0;
    }
    map_back(&t->hidden, t->dh, t->dz);
    t->report[0] = dot(g, g, t->outer.rows);
    t->report[2] = dot(t->dz, t->dz, Z) + dot(t->dh, t->dh, H) * (dot(t->z, t->z, Z) + 1);
    t->report[3] = dot(t->h, t->h, H);
    for (int64_t j = 0; j < H; j++) {
        t->hidden.lr[j] = a->hidden_lr;
        t->hidden.decay[j] = a->hidden_lr * a->weight_decay;
    }
    map_step(&t->outer, g, t->h, a->weight_ratio, decay, a);
    map_step(&t->hidden, t->dh, t->z, 1, a->hidden_lr * a->weight_decay, a);
    reference_adamw(t->z, t->z_avg, t->z_avg_sq, t->dz, Z, a->hidden_lr, a->hidden_lr * a->weight_decay, a);
    t->report[5] = t->outer.dropped_moment;
    t->report[6] = t->outer.dropped_weight;
    t->report[7] = t->hidden.dropped_moment;
    t->report[8] = t->hidden.dropped_weight;
    dense_generate(t);
    for (int64_t j = 0; j < H; j++) toggled += (was[j] > 0) != (t->h[j] > 0);
    free(was);
    return toggled;
}

/* ---- shapes of layers, and the start's random numbers one at a time ---- */

typedef struct {
    int64_t H, Z, rows[3]; /* of up to three factors */
    int random, based;     /* a bit for each factor: starts at random, has a base */
    int d, k;
    oplora_start_kind start;
} shape;

/* The fourth and the seventh are spread over the threads; others are longer than a block or a part, or have more units
 * than a block has rows, more inputs than rows, no random row at all. */
static const shape mixed[] = {
    {32, 16, {2048, 333, 0}, 1, 2, 2, 1, OPLORA_SIGN},    {1, 1, {1, 0, 0}, 1, 0, 2, 1, OPLORA_UNIFORM},
    {70, 3, {31, 33, 100}, 5, 1, 3, 2, OPLORA_SIGN},      {200, 8, {4500, 4800, 0}, 3, 2, 2, 1, OPLORA_SIGN},
    {33, 40, {129, 500, 0}, 2, 3, 1, 1, OPLORA_UNIFORM},  {600, 5, {700, 30, 0}, 1, 0, 2, 1, OPLORA_UNIFORM},
    {90, 8, {20000, 777, 0}, 1, 1, 3, 2, OPLORA_UNIFORM}, {520, 300, {64, 513, 0}, 3, 2, 1, 3, OPLORA_SIGN},
    {5, 128, {700, 9, 0}, 1, 0, 8, 8, OPLORA_SIGN},       {4, 2, {50, 60, 0}, 0, 0, 2, 1, OPLORA_SIGN},
};
enum { MIXED = sizeof mixed / sizeof *mixed };
/* The first has more chunks than parts. */
static const shape large[] = {{2, 3, {270000, 1001, 0}, 1, 2, 2, 1, OPLORA_UNIFORM},
                              {2, 3, {99, 66000, 0}, 3, 2, 1, 1, OPLORA_SIGN}};
enum { LARGE = sizeof large / sizeof *large };
/* Of these the fourth is spread. */
static const shape few[] = {
    {32, 16, {2048, 333, 0}, 1, 2, 2, 1, OPLORA_SIGN}, {70, 3, {1031, 633, 5}, 3, 2, 3, 2, OPLORA_SIGN},
    {1, 1, {1, 0, 0}, 1, 0, 2, 1, OPLORA_UNIFORM},     {2000, 8, {3000, 5100, 0}, 1, 2, 2, 1, OPLORA_UNIFORM},
    {5, 128, {700, 9, 0}, 1, 2, 8, 8, OPLORA_SIGN},
};
enum { FEW = sizeof few / sizeof *few };
static const shape edge_shapes[] = {{33, 7, {2000, 100, 0}, 1, 2, 2, 1, OPLORA_SIGN},
                                    {1, 1, {1, 0, 0}, 1, 0, 2, 1, OPLORA_SIGN},
                                    {33, 2, {17, 1, 0}, 1, 2, 3, 2, OPLORA_UNIFORM},
                                    {3, 5, {40, 2, 0}, 0, 0, 1, 1, OPLORA_SIGN}};
enum { EDGE_SHAPES = sizeof edge_shapes / sizeof *edge_shapes };

static void stream_words(const oplora_stream *s, int64_t counter, uint32_t vector, uint32_t word[4]) {
    oplora_philox4x32_10(
        (const uint32_t[]){(uint32_t)counter, (uint32_t)(counter >> 32) | s->tensor << 24, vector, s->layer},
        (const uint32_t[]){(uint32_t)s->seed, (uint32_t)(s->seed >> 32)}, word);
}

static double uniform_entry(const oplora_stream *s, uint32_t vector, int64_t entry) { /* in units of 2^-16 */
    const int64_t number = entry % 128 / 16;
    uint32_t word[4];
    stream_words(s, entry / 128 * 16 + entry % 16, vector, word);
    return 2.0 * (word[number / 2] >> (number % 2 ? 16 : 0) & 0xffff) + 1 - 65536;
}

static uint32_t sign_word(const oplora_stream *s, uint32_t group, int64_t row) {
    uint32_t word[4];
    stream_words(s, row / 64 * 16 + row % 16, group, word);
    return word[row % 64 / 16];
}

static int sign_entry(const oplora_stream *s, int64_t column, int64_t row) {
    return sign_word(s, (uint32_t)(column / 32), row) >> column % 32 & 1 ? -1 : 1;
}

enum { SEED = 5 };

static void fill_start(const shape *like, uint32_t layer, double *W2, int64_t N, double *W1) {
    const int64_t H = like->H, Z = like->Z;
    uint32_t range = 0;
    for (int64_t f = 0, row = 0; f < 3; row += like->rows[f++]) {
        if (!(like->random >> f & 1)) continue;
        const oplora_stream s = {SEED, layer, 8 * range++ + (like->start == OPLORA_SIGN ? 3 : 0)};
        for (int64_t j = 0; j < H; j++)
            for (int64_t i = 0; i < like->rows[f]; i++)
                W2[j * N + row + i] = like->start == OPLORA_SIGN
                                          ? sign_entry(&s, j, i) / sqrt(3.0 * (double)H)
                                          : uniform_entry(&s, (uint32_t)j, i) / 65536 / sqrt((double)H);
    }
    const oplora_stream s = {SEED, layer, 1};
    for (int64_t j = 0; j < H; j++)
        for (int64_t i = 0; i < Z; i++) W1[i * H + j] = uniform_entry(&s, (uint32_t)j, i) / 65536 / sqrt((double)Z);
}

/* The documented noise of the rounding: lowbias32 of the row and a key. */
static uint32_t row_noise(uint32_t row, uint32_t key) {
    uint32_t x = row ^ key;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

static void test_sizes(void) {
    CHECK(oplora_lean_numbers(5, 3, 100, 2, 1) == 2 * 100 + 5 * (2 + 1 + 2 + 1 + 1) + 3 * (2 + 1 + 1 + 3));
    CHECK(oplora_lean_moments(5, 3, 100, 2, 1) == 4 * 105);
    CHECK(oplora_lean_numbers(5, 3, 100, 0, 1) == -1 && oplora_lean_numbers(5, 3, 100, 2, 9) == -1);
    CHECK(oplora_lean_moments(0, 3, 100, 2, 1) == -1 && oplora_lean_moments(5, 3, 100, 9, 1) == -1);
    CHECK(oplora_lean_numbers(1, 1, (int64_t)1 << 62, 8, 1) == -1);
}

#define OPLORA_TEMPLATE "../../tests/c/test_lean.c"
#include "each_type.h"

/* No two moments, maps or steps share their rounding's noise. Both types step from the same state: what they then store
 * differs by the rounding, in units of whose step it is collected here. */
static void test_rounding_is_not_shared(void) {
    enum { H = 1200, N = 2000, COLUMNS_OF_MAP = 5, STEPS = 3 };
    static const shape like = {H, 16, {N, 0, 0}, 1, 0, 2, 2, OPLORA_SIGN};
    static double error[STEPS * 2 * COLUMNS_OF_MAP][N]; /* A twice, m, S, R; of W2 and W1; at each step */
    made_f32 f;
    made_f64 twin;
    make_f32(&f, &like, 9);
    make_f64(&twin, &like, 9);
    for (int64_t step = 1; step <= STEPS; step++) {
        set_gradients_f32(&f, step, 1);
        for (int64_t n = 0; n < N; n++) {
            if (step == 1) ((float *)f.factors[0].g)[n] = (float)noise();
            ((double *)twin.factors[0].g)[n] = f.factors[0].g[n];
            twin.factors[0].out[n] = f.factors[0].out[n];
        }
        for (int64_t i = 0; i < f.n_numbers; i++) twin.layer.numbers[i] = f.layer.numbers[i];
        for (int64_t i = 0; i < f.n_moments; i++) twin.layer.moments[i] = number_f32(f.layer.moments[i]);
        memcpy(twin.layer.scalars, f.layer.scalars, OPLORA_LEAN_SCALARS * sizeof(double));
        twin.layer.adamw = f.layer.adamw;
        step_alone_f32(&f, OPLORA_OK);
        step_alone_f64(&twin, OPLORA_OK);
        for (int column = 0; column < 2 * COLUMNS_OF_MAP; column++) {
            const int64_t rows = column < COLUMNS_OF_MAP ? N : H;
            const int64_t at =
                column < COLUMNS_OF_MAP ? column * N : COLUMNS_OF_MAP * N + (column - COLUMNS_OF_MAP) * H;
            double *const e = error[(step - 1) * 2 * COLUMNS_OF_MAP + column];
            for (int64_t n = 0; n < rows; n++) {
                const double exact = twin.layer.moments[at + n];
                const double sign = exact < 0 ? -1 : 1; /* noise makes magnitudes larger */
                e[n] = fabs(exact) < FLT_MIN ? 0 : sign * rounding_error_f32(f.layer.moments[at + n], exact);
            }
        }
    }
    for (int a = 0; a < STEPS * 2 * COLUMNS_OF_MAP; a++)
        for (int b = 0; b < a; b++) {
            double sum = 0, count = 0;
            for (int64_t n = 0; n < N; n++) {
                sum += error[a][n] * error[b][n];
                count += error[a][n] != 0 && error[b][n] != 0;
            }
            CHECK(fabs(sum) <= 6 * 0.25 * sqrt(count));
        }
    unmake_f32(&f);
    unmake_f64(&twin);
}

int main(void) {
    noise_state = 1;
    test_truncations();
    test_sizes();
    test_type_f32();
    test_type_f64();
    test_rounding_is_not_shared();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

static const int TY(is_float) = sizeof(T) == sizeof(float);

/* ---- the loops over random numbers ---- */

static void TY(test_random_loops)(int64_t n, int64_t first) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_stream s = {0x123456789abcdefu, 77, 3};
    T x[513], y[513], before[513]; /* one more than the loops may touch */
    double sum = 0, scale = 0;
    x[n] = (T)NAN;
    y[n] = before[n] = 12345;
    for (int64_t i = 0; i < n; i++) {
        x[i] = (T)noise();
        y[i] = before[i] = (T)noise();
        sum += uniform_entry(&s, 9, first + i) * x[i];
        scale += fabs(uniform_entry(&s, 9, first + i) * (double)x[i]);
    }
    const double eps = TY(is_float) ? FLT_EPSILON : DBL_EPSILON;
    CHECK(fabs(kernels->uniform_dot(&s, 9, first, x, n) - sum) <= 64 * eps * scale);
    kernels->uniform_axpy(&s, 9, first, (T)0.5, y, n);
    for (int64_t i = 0; i < n; i++) CHECK(y[i] == before[i] + (T)(0.5 * uniform_entry(&s, 9, first + i)));
    CHECK(y[n] == 12345);

    uint32_t words[512]; /* their room is a multiple of 64 */
    const int bit[] = {0, 31, 7, 8, 16, 3};
    const T coefficient[] = {(T)0.5, (T)-1.25, 3, (T)0.125, 7, (T)-0.75};
    double out[6];
    kernels->sign_words(&s, 2, first, n, words);
    for (int64_t i = 0; i < n; i++) CHECK(words[i] == sign_word(&s, 2, first + i));
    for (int count = 1; count <= 6; count++) {
        kernels->sign_dot(words, bit, count, x, n, out);
        memcpy(y, before, sizeof y);
        kernels->sign_axpy(words, bit, coefficient, count, y, n);
        for (int k = 0; k < count; k++) {
            sum = scale = 0;
            for (int64_t i = 0; i < n; i++) sum += sign_entry(&s, 64 + bit[k], first + i) * (double)x[i];
            for (int64_t i = 0; i < n; i++) scale += fabs((double)x[i]);
            CHECK(fabs(out[k] - sum) <= 64 * eps * scale);
        }
        for (int64_t i = 0; i < n; i++) {
            T expected = before[i];
            for (int k = 0; k < count; k++) expected += sign_entry(&s, 64 + bit[k], first + i) * coefficient[k];
            CHECK(y[i] == expected);
        }
        CHECK(y[n] == 12345);
        add_to_digest(y, (size_t)n * sizeof(T));
    }
}

/* ---- the loops over rows ---- */

static double TY(number)(TY(oplora_moment) stored) {
    if (!TY(is_float)) return (double)stored;
    const uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static TY(oplora_moment) TY(stored)(double value) {
    if (!TY(is_float)) return (TY(oplora_moment))value;
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return (TY(oplora_moment))(bits >> 16);
}

/* The fused loops of the default ranks give the bits of the general ones, and those the numbers of the formulas. */
static void TY(test_row_loops)(int64_t n, int with_base) {
    enum { MOST_ROWS = 512 };
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(oplora_lean_constants) a = {(T)0.1,  (T)0.999, (T)1e-3, (T)3e-3, (T)0.98,
                                         (T)0.05, (T)1e-8,  (T)1e-7, (T)3,    12345};
    TY(oplora_moment) A[2][MOST_ROWS], m[2][MOST_ROWS], S[2][MOST_ROWS], R[2][MOST_ROWS], before[4][MOST_ROWS];
    T U[2][2][MOST_ROWS], g[MOST_ROWS], base[MOST_ROWS], out[2][MOST_ROWS], start[MOST_ROWS];
    T row[MOST_ROWS], scaled[MOST_ROWS], first_row[MOST_ROWS], first_scaled[MOST_ROWS], wide[MOST_ROWS],
        scaled_A[MOST_ROWS], turned[3][MOST_ROWS];
    const TY(oplora_lean_turn21) turn = {a, .weight = {(T)0.3, (T)-0.2, (T)0.01, (T)0.02},
                                         .u0 = {(T)0.8, (T)0.1, (T)-0.02, (T)0.03},
                                         .u1 = {(T)-0.1, (T)0.7, (T)0.04, (T)0.01}, .A = {(T)0.9, (T)-0.1}};
    const uint32_t other_key = a.key ^ 0x9E3779B9u;
    for (int64_t i = 0; i < n; i++) {
        g[i] = i % 5 ? (T)noise() : 0;
        base[i] = (T)noise();
        start[i] = out[0][i] = out[1][i] = (T)noise();
        for (int k = 0; k < 2; k++) U[0][k][i] = U[1][k][i] = (T)noise();
        A[0][i] = A[1][i] = before[0][i] = TY(stored)(noise());
        m[0][i] = m[1][i] = before[1][i] = TY(stored)(noise());
        S[0][i] = S[1][i] = before[2][i] = TY(stored)(i % 10 ? fabs(noise()) : 0); /* with g zero: eps alone */
        R[0][i] = R[1][i] = before[3][i] = TY(stored)(i % 10 ? fabs(noise()) : 0);
    }
    /* first pass */
    double general[18] = {0}, fused[18] = {0}, sum[4];
    kernels->lean_scale(R[0], g, n, &a, row, scaled);
    kernels->lean_widen(A[0], row, n, wide, scaled_A);
    memcpy(first_row, row, sizeof row);
    memcpy(first_scaled, scaled, sizeof scaled);
    const T *const basis[] = {U[0][0], U[0][1], scaled_A, scaled};
    for (int i = 0; i < 4; i++) {
        kernels->dot(basis, i + 1, basis[i], n, sum);
        for (int j = 0; j <= i; j++) general[i * 4 + j] = sum[j];
    }
    kernels->dot(basis, 2, g, n, general + 16);
    kernels->lean_reduce21(A[0], R[0], U[0][0], U[0][1], g, n, &a, 1, 1, fused);
    CHECK(!memcmp(general, fused, sizeof fused));
    add_to_digest(fused, sizeof fused);
    /* second pass */
    const T *const kept = with_base ? base : NULL;
    kernels->lean_second(m[0], S[0], R[0], g, kept, 1000, n, &a, row, scaled, out[0]);
    CHECK(!memcmp(row, first_row, (size_t)n * sizeof(T)) && !memcmp(scaled, first_scaled, (size_t)n * sizeof(T)));
    kernels->axpy(basis, turn.weight, 4, out[0], n);
    for (int k = 0; k < 2; k++) {
        memset(turned[k], 0, sizeof turned[k]);
        kernels->axpy(basis, k ? turn.u1 : turn.u0, 4, turned[k], n);
    }
    memset(turned[2], 0, sizeof turned[2]);
    kernels->axpy((const T *const[]){wide, g}, turn.A, 2, turned[2], n);
    kernels->lean_round(turned[2], 1000, other_key, 16, n, A[0]);
    kernels->lean_update21(U[1][0], U[1][1], A[1], m[1], S[1], R[1], g, kept, 1000, n, &turn, out[1]);
    const size_t bytes = (size_t)n * sizeof(T), narrow = (size_t)n * sizeof(TY(oplora_moment));
    CHECK(!memcmp(out[0], out[1], bytes));
    CHECK(!memcmp(turned[0], U[1][0], bytes) && !memcmp(turned[1], U[1][1], bytes));
    CHECK(!memcmp(A[0], A[1], narrow) && !memcmp(m[0], m[1], narrow));
    CHECK(!memcmp(S[0], S[1], narrow) && !memcmp(R[0], R[1], narrow));
    add_to_digest(out[1], bytes);
    add_to_digest(m[1], narrow);

    const double eps = TY(is_float) ? FLT_EPSILON : DBL_EPSILON, rounding = TY(is_float) ? 1.0 / 128 : 0;
    for (int64_t i = 0; i < n; i++) {
        const double x = g[i], A_old = TY(number)(before[0][i]), m_old = TY(number)(before[1][i]);
        const double m_next = m_old + 0.1 * (x - m_old), s_next = 0.999 * TY(number)(before[2][i]) + 1e-3 * x * x;
        const double r_next = 0.999 * TY(number)(before[3][i]) + 3e-3 * x * x, factor = 1 / (sqrt(r_next) * 3 + 1e-7);
        const double ra = factor * A_old, rg = factor * x, from = with_base ? base[i] : 0;
        const double moved = from + 0.98 * (start[i] - from) - 0.05 * m_next / (sqrt(s_next) * 3 + 1e-8);
        const double v = moved + 0.3 * U[0][0][i] - 0.2 * U[0][1][i] + 0.01 * ra + 0.02 * rg;
        const double u0 = 0.8 * U[0][0][i] + 0.1 * U[0][1][i] - 0.02 * ra + 0.03 * rg;
        CHECK(fabs(out[0][i] - v) <= 64 * eps * (1 + fabs(ra) + fabs(rg) + fabs(moved)));
        CHECK(fabs(U[1][0][i] - u0) <= 64 * eps * (1 + fabs(ra) + fabs(rg)));
        CHECK(fabs(row[i] - factor) <= 16 * eps * factor && fabs(scaled[i] - rg) <= 16 * eps * fabs(rg));
        CHECK(wide[i] == A_old && fabs(scaled_A[i] - ra) <= 16 * eps * fabs(ra));
        const double expected[] = {0.9 * A_old - 0.1 * x, m_next, s_next, r_next};
        const TY(oplora_moment) found[] = {A[1][i], m[1][i], S[1][i], R[1][i]};
        for (int k = 0; k < 4; k++)
            CHECK(fabs(TY(number)(found[k]) - expected[k]) <= rounding * fabs(expected[k]) + 64 * eps);
    }
}

/* No loop over rows touches the row after its last, and what a row gets depends on its number alone. */
static void TY(test_rows_are_independent)(int64_t n) {
    enum { MOST_ROWS = 513 };
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const TY(oplora_lean_constants) a = {(T)0.1,  (T)0.999, (T)1e-3, (T)3e-3, (T)0.98,
                                         (T)0.05, (T)1e-8,  (T)1e-7, (T)3,    12345};
    const TY(oplora_lean_turn21) turn = {a, .weight = {(T)0.8, (T)0.1, (T)-0.02, (T)0.03},
                                         .u0 = {(T)0.8, (T)0.1, (T)-0.02, (T)0.03},
                                         .u1 = {(T)0.8, (T)0.1, (T)-0.02, (T)0.03}, .A = {(T)0.8, (T)0.1}};
    TY(oplora_moment) moment[2][4][MOST_ROWS];
    T x[2][6][MOST_ROWS], g[MOST_ROWS]; /* row, scaled, out, U0, U1, a second out */
    for (int64_t i = 0; i <= n; i++) {
        g[i] = (T)noise();
        for (int k = 0; k < 4; k++) moment[0][k][i] = moment[1][k][i] = TY(stored)(fabs(noise()));
        for (int k = 0; k < 6; k++) x[0][k][i] = x[1][k][i] = (T)noise();
    }
    const TY(oplora_moment) last[] = {moment[0][0][n], moment[0][1][n], moment[0][2][n], moment[0][3][n]};
    const T last_x[] = {x[0][0][n], x[0][1][n], x[0][2][n], x[0][3][n], x[0][4][n], x[0][5][n]};
    for (int w = 0; w < 2; w++) /* at once, and in two pieces */
        for (int64_t at = 0, end; at < n; at = end) {
            end = w == 0 || at > 0 || n < 3 ? n : n / 3;
            TY(oplora_moment) *const A = moment[w][0] + at, *const m = moment[w][1] + at, *const S = moment[w][2] + at;
            TY(oplora_moment) *const R = moment[w][3] + at;
            T *const row = x[w][0] + at, *const scaled = x[w][1] + at, *const out = x[w][2] + at;
            kernels->lean_scale(R, g + at, end - at, &a, row, scaled);
            kernels->lean_widen(A, row, end - at, x[w][5] + at, scaled);
            kernels->lean_second(m, S, R, g + at, NULL, 1000 + at, end - at, &a, row, scaled, out);
            kernels->lean_round(scaled, 1000 + at, 7, 16, end - at, A);
            kernels->lean_update21(x[w][3] + at, x[w][4] + at, A, m, S, R, g + at, g + at, 1000 + at, end - at, &turn,
                                   out);
        }
    for (int k = 0; k < 4; k++) {
        CHECK(!memcmp(moment[0][k], moment[1][k], (size_t)n * sizeof **moment[0]));
        CHECK(moment[0][k][n] == last[k] && moment[1][k][n] == last[k]);
    }
    for (int k = 0; k < 6; k++) {
        CHECK(!memcmp(x[0][k], x[1][k], (size_t)n * sizeof(T)));
        CHECK(x[0][k][n] == last_x[k] && x[1][k][n] == last_x[k]);
    }
}

/* Exactly the documented bits: the dropped half plus noise carries into the kept one. */
static void TY(test_rounding)(int64_t n) {
    T v[512];
    TY(oplora_moment) A[512];
    for (int64_t i = 0; i < n; i++) v[i] = (T)(noise() * pow(10, (double)(i % 60) - 30));
    for (int shift = 0; shift <= 16; shift += 16) {
        TY(oplora_dispatch)()->lean_round(v, 70000, 99, shift, n, A);
        for (int64_t i = 0; i < n; i++) {
            if (!TY(is_float)) {
                CHECK(A[i] == v[i]);
                continue;
            }
            const float single = (float)v[i];
            uint32_t bits;
            memcpy(&bits, &single, sizeof bits);
            CHECK(A[i] == (bits + (row_noise((uint32_t)(70000 + i), 99) >> shift & 0xffff)) >> 16);
        }
    }
}

/* In units of a bfloat16 step, how far a stored number is from the exact one. */
static double TY(rounding_error)(TY(oplora_moment) stored, double exact) {
    int exponent;
    frexp(exact, &exponent);
    const double error = (TY(number)(stored) - exact) / ldexp(1, exponent - 8);
    CHECK(fabs(error) < 1.0001);
    return error;
}

/* Stochastic rounding is right on average: over rows, over steps (keys), for each moment. */
static void TY(test_rounding_is_unbiased)(void) {
    enum { KEYS = 64, COUNT = 256 };
    T v[COUNT], g[COUNT], row[COUNT], scaled[COUNT], out[COUNT] = {0};
    TY(oplora_moment) A[COUNT], m[COUNT], S[COUNT], R[COUNT];
    double sum[5] = {0}, products[3] = {0};
    for (int64_t i = 0; i < COUNT; i++) v[i] = g[i] = (T)(noise() + 1.5);
    for (uint32_t key = 0; key < KEYS; key++) {
        const TY(oplora_lean_constants) a = {(T)0.125, (T)0.75, (T)0.25, (T)0.5,           1, 0,
                                             1,        1,       1,       row_noise(key, 1)}; /* exact in float */
        for (int shift = 0; shift <= 16; shift += 16) {
            TY(oplora_dispatch)()->lean_round(v, 0, a.key, shift, COUNT, A);
            for (int64_t i = 0; i < COUNT; i++) sum[shift / 16] += TY(rounding_error)(A[i], v[i]);
        }
        memset(m, 0, sizeof m);
        memset(S, 0, sizeof S);
        memset(R, 0, sizeof R);
        TY(oplora_dispatch)()->lean_second(m, S, R, g, NULL, 0, COUNT, &a, row, scaled, out);
        for (int64_t i = 0; i < COUNT; i++) {
            const double square = (double)(g[i] * g[i]);
            const double e[] = {TY(rounding_error)(m[i], 0.125 * (double)g[i]), TY(rounding_error)(S[i], 0.25 * square),
                                TY(rounding_error)(R[i], 0.5 * square)};
            for (int k = 0; k < 3; k++) {
                sum[2 + k] += e[k];
                products[k] += e[k] * e[(k + 1) % 3]; /* no two moments share their noise */
            }
        }
    }
    const double bound = 5 * sqrt(0.25 * KEYS * COUNT);
    for (int k = 0; k < 5; k++) CHECK(TY(is_float) ? fabs(sum[k]) < bound : sum[k] == 0);
    for (int k = 0; k < 3; k++) CHECK(fabs(products[k]) < bound);
}

/* ---- whole steps ---- */

typedef struct {
    TY(oplora_lean) layer;
    TY(oplora_factor) factors[3];
    int64_t n_numbers, n_moments;
} TY(made);

static void TY(make)(TY(made) *f, const shape *like, uint32_t index) {
    const int64_t H = like->H, Z = like->Z, N = like->rows[0] + like->rows[1] + like->rows[2];
    const int d = like->d, k = like->k;
    memset(f, 0, sizeof *f);
    f->n_numbers = oplora_lean_numbers(H, Z, N, d, k);
    f->n_moments = oplora_lean_moments(H, Z, N, d, k);
    f->layer = (TY(oplora_lean)){.H = H,
                                 .Z = Z,
                                 .N = N,
                                 .weight_rank = d,
                                 .moment_rank = k,
                                 .seed = SEED,
                                 .layer = index,
                                 .start = like->start,
                                 .numbers = zeros(f->n_numbers, sizeof(T)),
                                 .moments = zeros(f->n_moments, sizeof(TY(oplora_moment))),
                                 .scalars = zeros(OPLORA_LEAN_SCALARS, 8),
                                 .factors = f->factors,
                                 .report = zeros(OPLORA_LEAN_REPORT, 8),
                                 .dh = zeros(H, 8)};
    for (int i = 0; i < 3 && like->rows[i]; i++, f->layer.n_factors++) {
        const int64_t rows = like->rows[i];
        T *const base = like->based >> i & 1 ? zeros(rows, sizeof(T)) : NULL;
        for (int64_t n = 0; base && n < rows; n++) base[n] = (T)noise();
        f->factors[i] = (TY(oplora_factor)){rows, zeros(rows, sizeof(T)), base, zeros(rows, sizeof(T)),
                                            .random = like->random >> i & 1};
    }
    CHECK(TY(oplora_lean_start)(&f->layer, 0.3, splits[index % SPLITS]) == OPLORA_OK);
    for (int i = 0; i < f->layer.n_factors; i++)
        for (int64_t n = 0; f->factors[i].base && n < f->factors[i].rows; n++)
            f->factors[i].out[n] += f->factors[i].base[n];
}

static void TY(unmake)(TY(made) *f) {
    for (int i = 0; i < f->layer.n_factors; i++) {
        free((void *)f->factors[i].g);
        free((void *)f->factors[i].base);
        free(f->factors[i].out);
    }
    void *const all[] = {f->layer.numbers, f->layer.moments, f->layer.scalars, f->layer.report, f->layer.dh};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void TY(set_gradients)(TY(made) *f, int64_t step, double scale) {
    f->layer.adamw = (oplora_adamw){0.5, 2e-2, 0.9, 0.999, 1e-8, 0.5, step};
    for (int i = 0; i < f->layer.n_factors; i++) f->factors[i].lr = 1e-2, f->factors[i].weight_decay = 0.5;
    for (int i = 0; i < f->layer.n_factors; i++)
        for (int64_t n = 0; n < f->factors[i].rows; n++)
            ((T *)f->factors[i].g)[n] = (T)(scale * (step % 4 && !(step == 1 && !i) ? noise() + 0.2 : 0));
}

static int TY(same_state)(const TY(made) *a, const TY(made) *b) {
    for (int i = 0; i < a->layer.n_factors; i++)
        if (memcmp(a->factors[i].out, b->factors[i].out, (size_t)a->factors[i].rows * sizeof(T))) return 0;
    return !memcmp(a->layer.numbers, b->layer.numbers, (size_t)a->n_numbers * sizeof(T)) &&
           !memcmp(a->layer.moments, b->layer.moments, (size_t)a->n_moments * sizeof(TY(oplora_moment))) &&
           !memcmp(a->layer.scalars, b->layer.scalars, OPLORA_LEAN_SCALARS * sizeof(double));
}

static void TY(step_alone)(TY(made) *f, oplora_status expected) {
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f->layer, 1), 1);
    CHECK(TY(oplora_lean_step)(&f->layer, 1, 0, workspace, NULL) == expected);
    free(workspace);
}

/* ---- against the dense reference ---- */

/* Where oplora_core.h says that a layer's numbers and moments lie. */
typedef struct {
    T *U, *U1, *pre, *Q, *B, *r, *Q1, *B1, *r1, *z, *z_avg, *z_avg_sq;
    TY(oplora_moment) *A, *m, *S, *R, *A1, *m1, *S1, *R1;
} TY(view);

static TY(view) TY(view_of)(const TY(oplora_lean) *l) {
    const int64_t H = l->H, Z = l->Z, N = l->N, d = l->weight_rank, k = l->moment_rank;
    TY(view) v;
    v.U = l->numbers, v.U1 = v.U + d * N, v.pre = v.U1 + d * H;
    v.Q = v.pre + H, v.B = v.Q + d * H, v.r = v.B + k * H;
    v.Q1 = v.r + H, v.B1 = v.Q1 + d * Z, v.r1 = v.B1 + k * Z;
    v.z = v.r1 + Z, v.z_avg = v.z + Z, v.z_avg_sq = v.z_avg + Z;
    v.A = l->moments, v.m = v.A + k * N, v.S = v.m + N, v.R = v.S + N;
    v.A1 = v.R + N, v.m1 = v.A1 + k * H, v.S1 = v.m1 + H, v.R1 = v.S1 + H;
    return v;
}

/* A generator that starts as a layer does; c takes what its factors hold beyond W2 h. */
static void TY(make_dense)(dense *t, const TY(made) *f, const shape *like) {
    const TY(oplora_lean) *const l = &f->layer;
    const int64_t H = l->H, Z = l->Z, N = l->N;
    *t = (dense){make_map(N, H, like->d, like->k),
                 make_map(H, Z, like->d, like->k),
                 zeros(Z, 8),
                 zeros(Z, 8),
                 zeros(Z, 8),
                 zeros(H, 8),
                 zeros(H, 8),
                 zeros(N, 8),
                 zeros(H, 8),
                 zeros(Z, 8),
                 {0}};
    fill_start(like, l->layer, t->outer.W0, N, t->hidden.W0);
    T *const latent = zeros(oplora_size(1, Z, 1), sizeof(T)), *const z = latent + 1 + 1 + Z + 1;
    CHECK(TY(oplora_start)(latent, 1, Z, 1, SEED, l->layer, 0.3, OPLORA_SIGN, NULL, 0, NULL) == OPLORA_OK);
    CHECK(!memcmp(TY(view_of)(l).z, z, (size_t)Z * sizeof(T)));
    for (int64_t i = 0; i < Z; i++) t->z[i] = z[i];
    free(latent);
    dense_generate(t);
    double error = 0;
    for (int64_t j = 0; j < H; j++) error = fmax(error, fabs(TY(view_of)(l).pre[j] - t->pre[j]));
    for (int64_t k = 0, n = 0; k < l->n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++, n++) {
            const double c = f->factors[k].out[i] - (f->factors[k].base ? f->factors[k].base[i] : 0) - t->v[n];
            error = fmax(error, fabs(c));
            t->outer.c[n] = c;
        }
    CHECK(error <= (TY(is_float) ? 1e-6 : 1e-15)); /* the start itself */
    dense_generate(t);
}

static void TY(free_dense)(dense *t) {
    double *const all[] = {t->z, t->z_avg, t->z_avg_sq, t->pre, t->h, t->v, t->dh, t->dz};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free_map(&t->outer);
    free_map(&t->hidden);
}

/* largest |a - b| over the largest |b|, or 0 if both are zero */
static double TY(distance)(const T *a, const double *b, int64_t n) {
    double error = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        error = fmax(error, fabs(a[i] - b[i]));
        scale = fmax(scale, fabs(b[i]));
    }
    return error > 0 ? error / scale : 0;
}

/* The factors against base + v, over the way they went since the start. */
static double TY(factor_error)(const TY(made) *f, const dense *t, const double *start) {
    double error = 0, way = 0;
    for (int64_t k = 0, n = 0; k < f->layer.n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++, n++) {
            const double expected = t->v[n] + (f->factors[k].base ? f->factors[k].base[i] : 0);
            error = fmax(error, fabs(f->factors[k].out[i] - expected));
            way = fmax(way, fabs(expected - start[n]));
        }
    return error > 0 ? error / way : 0;
}

static double TY(product_error)(const T *X, int64_t rows, const T *Y, int64_t inputs, const double *x, const double *y,
                                int rank) {
    double error = 0, scale = 0;
    for (int64_t n = 0; n < rows; n += 1 + rows / 50)
        for (int64_t j = 0; j < inputs; j++) {
            double found = 0, expected = 0;
            for (int i = 0; i < rank; i++) {
                found += (double)X[i * rows + n] * Y[i * inputs + j];
                expected += x[i * rows + n] * y[i * inputs + j];
            }
            error = fmax(error, fabs(found - expected));
            scale = fmax(scale, fabs(expected));
        }
    return error > 0 ? error / scale : 0;
}

/* Everything that the state keeps; only in double, which stores moments as they are. */
static void TY(check_state)(const TY(made) *f, const dense *t, double bound) {
    const TY(oplora_lean) *const l = &f->layer;
    const TY(view) v = TY(view_of)(l);
    const int64_t H = l->H, Z = l->Z, N = l->N;
    if (TY(is_float)) return;
    CHECK(TY(product_error)(v.U, N, v.Q, H, t->outer.U, t->outer.Q, t->outer.d) <= bound);
    CHECK(TY(product_error)(v.U1, H, v.Q1, Z, t->hidden.U, t->hidden.Q, t->hidden.d) <= bound);
    CHECK(TY(product_error)((const T *)v.A, N, v.B, H, t->outer.A, t->outer.B, t->outer.k) <= bound);
    CHECK(TY(product_error)((const T *)v.A1, H, v.B1, Z, t->hidden.A, t->hidden.B, t->hidden.k) <= bound);
    CHECK(TY(distance)((const T *)v.m, t->outer.m, N) <= bound && TY(distance)((const T *)v.S, t->outer.S, N) <= bound);
    CHECK(TY(distance)((const T *)v.R, t->outer.R, N) <= bound && TY(distance)(v.r, t->outer.r, H) <= bound);
    CHECK(TY(distance)((const T *)v.m1, t->hidden.m, H) <= bound);
    CHECK(TY(distance)((const T *)v.S1, t->hidden.S, H) <= bound);
    CHECK(TY(distance)((const T *)v.R1, t->hidden.R, H) <= bound && TY(distance)(v.r1, t->hidden.r, Z) <= bound);
    CHECK(TY(distance)(v.pre, t->pre, H) <= bound && TY(distance)(v.z, t->z, Z) <= bound);
    CHECK(TY(distance)(v.z_avg, t->z_avg, Z) <= bound && TY(distance)(v.z_avg_sq, t->z_avg_sq, Z) <= bound);
    const double scalars[] = {t->outer.scale, t->outer.mean, t->hidden.scale, t->hidden.mean};
    for (int i = 0; i < 4; i++) CHECK(fabs(l->scalars[i] - scalars[i]) <= bound * scalars[i]);
}

/* The state keeps a scale also where no row starts at random. */
static double TY(least_decay)(const TY(oplora_lean) *l) {
    double least = INFINITY;
    for (int k = 0; k < l->n_factors; k++) least = fmin(least, l->factors[k].lr * l->factors[k].weight_decay);
    return least;
}

/* A rate and a decay to each factor; what starts at random decays alike. Some do not move at all. */
static void TY(set_rates)(TY(made) *f, int index) {
    int random = 0;
    for (int k = 0; k < f->layer.n_factors; k++) random += f->factors[k].random;
    for (int k = 0; k < f->layer.n_factors; k++) {
        f->factors[k].lr = ldexp(random > 1 ? 1e-2 : 4e-3, 2 * ((k + index) % 3));
        f->factors[k].weight_decay = random > 1 ? 5e-3 / f->factors[k].lr : 0.5 + 2 * k;
        if (random < 2 && k == 1 && index % 3 == 1) f->factors[k].lr = 0;
    }
}

/* All layers in one call, measured at every second step. */
static void TY(test_reference)(const shape *shapes, int n_layers, int64_t steps, int rates_differ) {
    enum { LAYERS = MIXED };
    TY(made) made[LAYERS];
    TY(oplora_lean) layers[LAYERS];
    dense truth[LAYERS];
    double *start[LAYERS];
    int64_t toggled = 0;
    for (int i = 0; i < n_layers; i++) {
        TY(make)(&made[i], &shapes[i], 100 + (uint32_t)i);
        TY(make_dense)(&truth[i], &made[i], &shapes[i]);
        start[i] = zeros(made[i].layer.N, 8);
        for (int64_t k = 0, n = 0; k < made[i].layer.n_factors; k++)
            for (int64_t row = 0; row < made[i].factors[k].rows; row++) start[i][n++] = made[i].factors[k].out[row];
        layers[i] = made[i].layer;
    }
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(layers, n_layers), 1);
    for (int64_t step = 1; step <= steps; step++) {
        const int measured = step % 2 == 0;
        for (int i = 0; i < n_layers; i++) {
            TY(set_gradients)(&made[i], step, pow(10, (double)(step % 3) - 1));
            if (rates_differ) TY(set_rates)(&made[i], i + (int)step / 8);
            layers[i] = made[i].layer;
        }
        if (measured) CHECK(TY(oplora_lean_measure)(layers, n_layers, workspace, splits[step % SPLITS]) == OPLORA_OK);
        CHECK(TY(oplora_lean_step)(layers, n_layers, measured, workspace, splits[step % SPLITS]) == OPLORA_OK);
        for (int i = 0; i < n_layers; i++) {
            const TY(oplora_lean) *const l = &layers[i];
            double *const g = zeros(l->N, 8), start_decay = TY(least_decay)(l);
            for (int64_t k = 0, n = 0; k < l->n_factors; k++) {
                const double lr = l->factors[k].lr, decay = lr * l->factors[k].weight_decay;
                if (l->factors[k].random) start_decay = decay;
                for (int64_t row = 0; row < l->factors[k].rows; row++, n++) {
                    g[n] = l->factors[k].g[row];
                    truth[i].outer.lr[n] = lr;
                    truth[i].outer.decay[n] = decay;
                }
            }
            toggled += dense_step(&truth[i], g, start_decay, &l->adamw);
            free(g);
            /* in float, moments are bfloat16 from the second step on */
            const double error = TY(factor_error)(&made[i], &truth[i], start[i]);
            CHECK(error <= (!TY(is_float) ? 1e-9 : step == 1 ? 5e-5 : 0.02) || (TY(is_float) &&step > 6));
            if (TY(is_float) &&step > 1) continue;
            /* oplora_truncate leaves out directions with less than 1e-14 of the square: 1e-7 of the product */
            const double bound = TY(is_float) ? 1e-5 : 2e-7;
            for (int k = 0; k < OPLORA_LEAN_REPORT; k++) {
                const double expected = truth[i].report[k];
                CHECK(fabs(l->report[k] - expected) <= (k < 5 ? bound * expected : TY(is_float) ? 1e-5 : 1e-9));
            }
            double scale = 0;
            for (int64_t j = 0; j < l->H; j++) scale = fmax(scale, fabs(truth[i].dh[j]));
            for (int64_t j = 0; j < l->H; j++) CHECK(fabs(l->dh[j] - truth[i].dh[j]) <= bound * scale);
            TY(check_state)(&made[i], &truth[i], bound);
        }
    }
    CHECK(toggled > 0 || steps < 10);
    free(workspace);
    for (int i = 0; i < n_layers; i++) {
        TY(unmake)(&made[i]);
        TY(free_dense)(&truth[i]);
        free(start[i]);
    }
}

static void TY(test_references)(void) {
    for (int rates_differ = 0; rates_differ < 2; rates_differ++) {
        TY(test_reference)(mixed, MIXED, 20, rates_differ);
        TY(test_reference)(large, LARGE, 3, rates_differ);
    }
}

/* Of one unit and one latent number the second moment R r^T and W are whole at rank one, so lean state is exact state,
 * whatever its factors' rates and decays are. */
static void TY(test_one_unit_is_exact)(void) {
    enum { A_ROWS = 70, B_ROWS = 33, N = A_ROWS + B_ROWS, SIZE = 2 * N + 3, STEPS = 40 };
    static const shape like = {1, 1, {A_ROWS, B_ROWS, 0}, 1, 0, 1, 1, OPLORA_UNIFORM};
    TY(made) f;
    T parameters[SIZE], exp_avg[SIZE] = {0}, exp_avg_sq[SIZE] = {0}, out[N];
    double decay[2] = {1, 1}, report[5], error = 0, way = 0;
    uint8_t moving = 0;
    const uint32_t seed = noise_state;   /* the other tests keep their gradients */
    for (uint32_t index = 0;; index++) { /* until the unit is on */
        TY(make)(&f, &like, index);
        memset(parameters, 0, sizeof parameters);
        CHECK(TY(oplora_start)(parameters, 1, 1, N, SEED, index, 0.3, OPLORA_UNIFORM, &(oplora_rows){0, A_ROWS}, 1,
                               NULL) == OPLORA_OK);
        if (TY(view_of)(&f.layer).pre[0] > 0) break;
        TY(unmake)(&f);
    }
    TY(oplora_factor) factors[2];
    TY(oplora_exact)
    exact = {1, 1, N, parameters, exp_avg, exp_avg_sq, decay, &moving, factors, 2, f.layer.adamw, report};
    for (int64_t step = 1; step <= STEPS; step++) {
        TY(set_gradients)(&f, step, 1);
        for (int k = 0; k < 2; k++) {
            f.factors[k].lr = step % 7 == 5 + k ? 0 : k ? 1.6e-2 : 1e-3;
            f.factors[k].weight_decay = k ? 0.1 : 3;
            factors[k] = f.factors[k];
            factors[k].out = out + k * A_ROWS;
        }
        f.layer.adamw.hidden_lr = 1e-4;
        exact.adamw = f.layer.adamw;
        void *const workspace = zeros(TY(oplora_exact_workspace_bytes)(&exact, 1), 1);
        CHECK(TY(oplora_exact_step)(&exact, 1, 0, workspace, NULL) == OPLORA_OK);
        free(workspace);
        TY(step_alone)(&f, OPLORA_OK);
        for (int n = 0; n < N; n++) {
            const double mine = n < A_ROWS ? f.factors[0].out[n] : f.factors[1].out[n - A_ROWS];
            error = fmax(error, fabs(mine - out[n]));
            way = fmax(way, fabs(mine));
        }
        if (!TY(is_float)) CHECK(error <= 1e-12 * way); /* in float, moments are bfloat16 */
    }
    TY(unmake)(&f);
    noise_state = seed;
}

/* ---- the same bits ---- */

static void TY(copy_state)(TY(made) *to, const TY(made) *from) {
    for (int i = 0; i < from->layer.n_factors; i++)
        memcpy(to->factors[i].out, from->factors[i].out, (size_t)from->factors[i].rows * sizeof(T));
    memcpy(to->layer.numbers, from->layer.numbers, (size_t)from->n_numbers * sizeof(T));
    memcpy(to->layer.moments, from->layer.moments, (size_t)from->n_moments * sizeof(TY(oplora_moment)));
    memcpy(to->layer.scalars, from->layer.scalars, OPLORA_LEAN_SCALARS * sizeof(double));
}

/* What clipping does between a measurement and its step. */
static void TY(clip)(TY(made) *f, double factor) {
    for (int k = 0; k < f->layer.n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++) ((T *)f->factors[k].g)[i] *= (T)factor;
    for (int64_t j = 0; j < f->layer.H; j++) f->layer.dh[j] *= factor;
    f->layer.report[0] *= factor * factor;
}

/* All layers in one call, small and spread ones mixed: the same bits for every split, and where a measurement came
 * before the step, which itself changes nothing. Halved gradients after a measurement, as clipping does, too. */
static void TY(test_steps)(int64_t steps) {
    TY(made) made[SPLITS][FEW], kept[FEW];
    const uint32_t seed = noise_state;
    for (int s = 0; s <= SPLITS; s++) {
        noise_state = seed;
        for (int i = 0; i < FEW; i++) TY(make)(s < SPLITS ? &made[s][i] : &kept[i], &few[i], (uint32_t)i);
    }
    for (int i = 0; i < FEW; i++) CHECK(TY(same_state)(&made[1][i], &kept[i]));
    for (int64_t step = 1; step <= steps; step++) {
        const uint32_t now = noise_state;
        const int clips = step % 3 == 0;
        for (int s = 0; s < SPLITS; s++) {
            const int measured = s == 1;
            TY(oplora_lean) layers[FEW];
            noise_state = now;
            for (int i = 0; i < FEW; i++) {
                TY(set_gradients)(&made[s][i], step, clips && !measured ? 0.5 : 1);
                layers[i] = made[s][i].layer;
                if (!measured) layers[i].dh = NULL;
                if (measured) TY(copy_state)(&kept[i], &made[s][i]);
            }
            void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(layers, FEW), 1);
            if (measured) CHECK(TY(oplora_lean_measure)(layers, FEW, workspace, splits[s]) == OPLORA_OK);
            for (int i = 0; measured && i < FEW; i++) {
                CHECK(TY(same_state)(&made[s][i], &kept[i]));
                if (clips) TY(clip)(&made[s][i], 0.5);
            }
            CHECK(TY(oplora_lean_step)(layers, FEW, measured, workspace, splits[s]) == OPLORA_OK);
            free(workspace);
        }
        for (int i = 0; i < FEW; i++) {
            for (int s = 1; s < SPLITS; s++) {
                CHECK(TY(same_state)(&made[s][i], &made[0][i]));
                CHECK(!memcmp(made[s][i].layer.report, made[0][i].layer.report, sizeof(double) * OPLORA_LEAN_REPORT));
            }
            const TY(oplora_lean) *const l = &made[0][i].layer;
            for (int k = 5; k < 9; k++) CHECK(l->report[k] >= 0 && l->report[k] <= 1);
            for (int k = 0; k < l->n_factors; k++)
                add_to_digest(l->factors[k].out, (size_t)l->factors[k].rows * sizeof(T));
            add_to_digest(l->numbers, (size_t)made[0][i].n_numbers * sizeof(T));
            add_to_digest(l->moments, (size_t)made[0][i].n_moments * sizeof *l->moments);
        }
    }
    volatile T least = TY(is_float) ? FLT_MIN : (T)DBL_MIN;
    CHECK(least / 2 > 0); /* the caller's subnormal numbers are as they were */
    for (int i = 0; i < FEW; i++) {
        for (int s = 0; s < SPLITS; s++) TY(unmake)(&made[s][i]);
        TY(unmake)(&kept[i]);
    }
}

/* A step that was measured takes dh as it finds it: the other layer's z goes the other way. */
static void TY(test_measured_step_reads_dh)(void) {
    static const shape like = {33, 7, {200, 100, 0}, 1, 0, 2, 1, OPLORA_SIGN};
    TY(made) f[2];
    double dh[33];
    T start[7];
    for (int s = 0; s < 2; s++) {
        TY(make)(&f[s], &like, 0);
        if (s == 0) TY(set_gradients)(&f[0], 2, 1);
        for (int k = 0; k < 2; k++)
            memcpy((T *)f[s].factors[k].g, f[0].factors[k].g, (size_t)f[0].factors[k].rows * sizeof(T));
        f[s].layer.adamw = (oplora_adamw){1, 1e-3, 0.9, 0.999, 1e-8, 0, 1};
        memcpy(start, TY(view_of)(&f[s].layer).z, sizeof start);
        void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f[s].layer, 1), 1);
        CHECK(TY(oplora_lean_measure)(&f[s].layer, 1, workspace, NULL) == OPLORA_OK);
        for (int j = 0; j < 33; j++) f[s].layer.dh[j] *= s ? -1 : 1;
        memcpy(dh, f[s].layer.dh, sizeof dh);
        CHECK(TY(oplora_lean_step)(&f[s].layer, 1, 1, workspace, NULL) == OPLORA_OK);
        CHECK(!memcmp(dh, f[s].layer.dh, sizeof dh));
        free(workspace);
    }
    for (int i = 0; i < 7; i++) {
        const double moved[] = {(double)TY(view_of)(&f[0].layer).z[i] - start[i],
                                (double)TY(view_of)(&f[1].layer).z[i] - start[i]};
        CHECK(fabs(moved[0]) > 5e-4 && fabs(moved[0] + moved[1]) < 1e-6);
    }
    for (int s = 0; s < 2; s++) TY(unmake)(&f[s]);
}

/* Finite factors and a finite state. */
static int TY(is_finite)(const TY(made) *f) {
    for (int64_t i = 0; i < f->n_numbers; i++)
        if (!isfinite(f->layer.numbers[i])) return 0;
    for (int64_t i = 0; i < f->n_moments; i++)
        if (!isfinite(TY(number)(f->layer.moments[i]))) return 0;
    for (int i = 0; i < OPLORA_LEAN_SCALARS; i++)
        if (!isfinite(f->layer.scalars[i])) return 0;
    for (int k = 0; k < f->layer.n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++)
            if (!isfinite(f->factors[k].out[i])) return 0;
    return 1;
}

/* Gradients of any size, all steps or now and then among others, with eps and without. */
static void TY(test_edges)(const shape *like) {
    static const double scales[] = {0, 1e-42, 1e-30, 1, 1e15, 1e30, TY(is_float) ? 2.8e38 : 1e150};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        for (int way = 0; way < 4; way++) {
            TY(made) f;
            TY(make)(&f, like, (uint32_t)way);
            for (int64_t step = 1; step <= 30; step++) {
                TY(set_gradients)(&f, step, way % 2 && step % 5 != 2 ? 1 : scales[i]);
                if (way >= 2) f.layer.adamw.eps = 0;
                TY(step_alone)(&f, OPLORA_OK);
            }
            CHECK(TY(is_finite)(&f));
            TY(unmake)(&f);
        }
    TY(made) f; /* decay until nothing is left of the start */
    TY(make)(&f, like, 0);
    for (int64_t step = 1; step <= 1200; step++) {
        TY(set_gradients)(&f, step, 1);
        f.layer.adamw.weight_decay = 50;
        for (int k = 0; k < f.layer.n_factors; k++) f.factors[k].weight_decay = 50;
        TY(step_alone)(&f, OPLORA_OK);
    }
    CHECK(f.layer.scalars[0] == 0 && TY(is_finite)(&f));
    TY(unmake)(&f);
}

/* Rates of zero: the moments move and nothing else, not by a bit; not at first and not after steps. */
static void TY(test_rate_zero)(const shape *like) {
    TY(made) f, kept;
    const uint32_t seed = noise_state;
    TY(make)(&f, like, 3);
    noise_state = seed;
    TY(make)(&kept, like, 3);
    for (int64_t step = 1; step <= 12; step++) {
        TY(set_gradients)(&f, step, 1);
        if (step % 6) f.layer.adamw.hidden_lr = 0;
        for (int k = 0; step % 6 && k < f.layer.n_factors; k++) f.factors[k].lr = 0;
        TY(copy_state)(&kept, &f);
        TY(step_alone)(&f, OPLORA_OK);
        if (step % 6 == 0) continue;
        const TY(view) a = TY(view_of)(&f.layer), b = TY(view_of)(&kept.layer);
        const size_t H = (size_t)like->H, Z = (size_t)like->Z, d = (size_t)like->d;
        CHECK(!memcmp(a.U, b.U, d * (size_t)f.layer.N * sizeof(T)) && !memcmp(a.U1, b.U1, d * H * sizeof(T)));
        CHECK(!memcmp(a.Q, b.Q, d * H * sizeof(T)) && !memcmp(a.Q1, b.Q1, d * Z * sizeof(T)));
        CHECK(!memcmp(a.pre, b.pre, H * sizeof(T)) && !memcmp(a.z, b.z, Z * sizeof(T)));
        CHECK(f.layer.scalars[0] == kept.layer.scalars[0] && f.layer.scalars[2] == kept.layer.scalars[2]);
        for (int k = 0; k < f.layer.n_factors; k++)
            CHECK(!memcmp(f.factors[k].out, kept.factors[k].out, (size_t)f.factors[k].rows * sizeof(T)));
    }
    TY(unmake)(&f);
    TY(unmake)(&kept);
}

static void TY(check_orthonormal)(const T *Q, int rank, int64_t n) {
    for (int a = 0; a < rank; a++)
        for (int b = 0; b <= a; b++) {
            double product = 0;
            for (int64_t j = 0; j < n; j++) product += (double)Q[a * n + j] * Q[b * n + j];
            CHECK(fabs(product - (a == b)) <= (TY(is_float) ? 1e-6 : 1e-12));
        }
}

/* Rounding does not add up: after many steps Q's rows are still orthonormal, and the factors, to which every step added
 * a difference, are still s W0 h + U Q^T h and the sum of c's steps. */
static void TY(test_drift)(void) {
    enum { H = 5, Z = 3, A_ROWS = 12, B_ROWS = 8, N = A_ROWS + B_ROWS, STEPS = 100000 };
    static const shape like = {H, Z, {A_ROWS, B_ROWS, 0}, 1, 2, 2, 1, OPLORA_SIGN};
    TY(made) f;
    dense t;
    TY(make)(&f, &like, 0);
    TY(make_dense)(&t, &f, &like);
    const TY(view) v = TY(view_of)(&f.layer);
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f.layer, 1), 1);
    double first = 1, second = 1;
    for (int64_t step = 1; step <= STEPS; step++) {
        f.layer.adamw = (oplora_adamw){1, 1e-4, 0.9, 0.999, 1e-8, 0.01, step};
        for (int k = 0; k < 2; k++) f.factors[k].lr = 1e-3, f.factors[k].weight_decay = 0.01;
        for (int k = 0; k < 2; k++) /* towards 1, with noise */
            for (int64_t n = 0; n < f.factors[k].rows; n++)
                ((T *)f.factors[k].g)[n] = f.factors[k].out[n] - 1 + (T)(0.1 * noise());
        TY(oplora_lean_step)(&f.layer, 1, 0, workspace, NULL);
        first *= 0.9, second *= 0.999;
        for (int n = 0; n < N; n++) {
            const double m = TY(number)(v.m[n]) / (1 - first), S = TY(number)(v.S[n]) / (1 - second);
            t.outer.c[n] = (1 - 1e-5) * t.outer.c[n] - 1e-3 * m / (sqrt(S) + 1e-8);
        }
    }
    free(workspace);
    TY(check_orthonormal)(v.Q, 2, H);
    TY(check_orthonormal)(v.Q1, 2, Z);
    CHECK(TY(is_finite)(&f));
    t.outer.scale = f.layer.scalars[0];
    for (int i = 0; i < 2 * N; i++) t.outer.U[i] = v.U[i];
    for (int i = 0; i < 2 * H; i++) t.outer.Q[i] = v.Q[i];
    for (int j = 0; j < H; j++) t.h[j] = v.pre[j] > 0 ? v.pre[j] : 0;
    map_output(&t.outer, t.h, t.v);
    double error = 0;
    for (int k = 0, n = 0; k < 2; k++)
        for (int64_t i = 0; i < f.factors[k].rows; i++, n++) {
            CHECK(fabs(f.factors[k].out[i] - 1) < 0.1);
            error = fmax(error, fabs(f.factors[k].out[i] - (f.factors[k].base ? f.factors[k].base[i] : 0) - t.v[n]));
        }
    CHECK(TY(is_float) || error < 1e-12); /* in float the stored m and S are not the ones of the step */
    TY(free_dense)(&t);
    TY(unmake)(&f);
}

static void TY(test_refusals)(void) {
    TY(made) f, twin;
    const uint32_t seed = noise_state;
    static const shape like = {4, 3, {50, 20, 0}, 1, 2, 2, 1, OPLORA_SIGN};
    TY(make)(&f, &like, 0);
    noise_state = seed;
    TY(make)(&twin, &like, 0);
    TY(set_gradients)(&f, 1, 1);
    TY(oplora_lean) layer = f.layer;
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&layer, 1), 1);
    const T values[] = {(T)NAN, (T)INFINITY, (T)-INFINITY};
    for (int i = 0; i < 3; i++) {
        T *const g = (T *)f.factors[1].g;
        const T kept = g[19];
        g[19] = values[i];
        CHECK(TY(oplora_lean_step)(&layer, 1, 0, workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(layer.report[1] == 1);
        CHECK(TY(oplora_lean_measure)(&layer, 1, workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(TY(oplora_lean_step)(&layer, 1, 1, workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(TY(same_state)(&f, &twin));
        g[19] = kept;
    }
#define REFUSED(change, status) \
    do { \
        layer = f.layer; \
        change; \
        CHECK(TY(oplora_lean_step)(&layer, 1, 0, workspace, NULL) == (status)); \
    } while (0)
    REFUSED(layer.N = 71, OPLORA_ESIZE);
    REFUSED(layer.H = 0, OPLORA_ESIZE);
    REFUSED(layer.weight_rank = 0, OPLORA_ESIZE);
    REFUSED(layer.weight_rank = 9, OPLORA_ESIZE);
    REFUSED(layer.moment_rank = 0, OPLORA_ESIZE);
    REFUSED(layer.moment_rank = 9, OPLORA_ESIZE);
    REFUSED(layer.Z = 0, OPLORA_ESIZE);
    REFUSED(layer.N = 69, OPLORA_ESIZE);
    REFUSED(layer.N = (int64_t)1 << 62, OPLORA_ESIZE);
    REFUSED(layer.n_factors = 1, OPLORA_ESIZE);
    REFUSED(layer.n_factors = 0, OPLORA_ESIZE);
    REFUSED(layer.start = (oplora_start_kind)2, OPLORA_EVALUE);
    REFUSED(layer.adamw.weight_ratio = NAN, OPLORA_EVALUE);
    REFUSED(layer.adamw.hidden_lr = -INFINITY, OPLORA_EVALUE);
    REFUSED(layer.adamw.beta1 = 1, OPLORA_EVALUE);
    REFUSED(layer.adamw.beta1 = NAN, OPLORA_EVALUE);
    REFUSED(layer.adamw.beta2 = -0.1, OPLORA_EVALUE);
    REFUSED(layer.adamw.eps = -1e-8, OPLORA_EVALUE);
    REFUSED(layer.adamw.eps = INFINITY, OPLORA_EVALUE);
    REFUSED(layer.adamw.weight_decay = NAN, OPLORA_EVALUE);
    REFUSED(layer.adamw.step = 0, OPLORA_EVALUE);
    REFUSED(layer.adamw.beta2 = 1, OPLORA_EVALUE);
    REFUSED(layer.numbers = NULL, OPLORA_ENULL);
    REFUSED(layer.moments = NULL, OPLORA_ENULL);
    REFUSED(layer.scalars = NULL, OPLORA_ENULL);
    REFUSED(layer.report = NULL, OPLORA_ENULL);
    REFUSED(layer.factors = NULL, OPLORA_ENULL);
    TY(oplora_factor) bad[2];
#define BAD_FACTOR(change, status) \
    do { \
        memcpy(bad, f.factors, sizeof bad); \
        change; \
        REFUSED(layer.factors = bad, status); \
    } while (0)
    BAD_FACTOR(bad[0].g = NULL, OPLORA_ENULL);
    BAD_FACTOR(bad[1].out = NULL, OPLORA_ENULL);
    BAD_FACTOR(bad[1].rows = 0, OPLORA_ESIZE);
    BAD_FACTOR(bad[1].rows = -20, OPLORA_ESIZE);
    BAD_FACTOR(bad[0].rows = INT64_MAX, OPLORA_ESIZE);
    BAD_FACTOR(bad[0].lr = NAN, OPLORA_EVALUE);
    BAD_FACTOR(bad[1].weight_decay = INFINITY, OPLORA_EVALUE);
    BAD_FACTOR((bad[1].random = 1, bad[1].lr *= 2), OPLORA_EVALUE); /* W2's start has one scale */
#undef BAD_FACTOR
#undef REFUSED
    T ones[33] = {0};
    TY(oplora_factor) many[33]; /* more random factors than there are streams */
    for (int i = 0; i < 33; i++) many[i] = (TY(oplora_factor)){1, ones + i, NULL, ones + i, i < 32, 0, 0, 0};
    layer = f.layer;
    layer.factors = many, layer.n_factors = layer.N = 33;
    CHECK(TY(oplora_lean_workspace_bytes)(&layer, 1) == -1);
    CHECK(TY(oplora_lean_step)(&layer, 1, 0, workspace, NULL) == OPLORA_ERANGES);
    many[7].random = 0;
    CHECK(TY(oplora_lean_workspace_bytes)(&layer, 1) > 0);
    layer = f.layer;
    layer.dh = NULL;
    CHECK(TY(oplora_lean_measure)(&layer, 1, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(&layer, 1, 1, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(&f.layer, 1, 0, NULL, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(NULL, 1, 0, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(NULL, 0, 0, NULL, NULL) == OPLORA_OK);
    CHECK(TY(oplora_lean_step)(&f.layer, -1, 0, workspace, NULL) == OPLORA_ESIZE);
    CHECK(TY(oplora_lean_start)(&f.layer, -1, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_lean_start)(&f.layer, NAN, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_lean_start)(&f.layer, INFINITY, NULL) == OPLORA_EVALUE);
    layer = f.layer;
    layer.start = (oplora_start_kind)2;
    CHECK(TY(oplora_lean_start)(&layer, 0.01, NULL) == OPLORA_EVALUE);
    layer = f.layer;
    layer.numbers = NULL;
    CHECK(TY(oplora_lean_start)(&layer, 0.01, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_start)(NULL, 0.01, NULL) == OPLORA_ENULL);
    CHECK(TY(same_state)(&f, &twin));
    TY(oplora_lean) two[] = {f.layer, f.layer};
    void *const room = zeros(TY(oplora_lean_workspace_bytes)(two, 2), 1);
    CHECK(TY(oplora_lean_step)(two, 2, 0, room, failing) == OPLORA_EPARALLEL);
    CHECK(TY(oplora_lean_measure)(two, 2, room, failing) == OPLORA_EPARALLEL);
    free(room);
    free(workspace);
    TY(unmake)(&f);
    TY(unmake)(&twin);
}

/* One bad number in one of several layers, small or spread, and none of them changes. */
static void TY(test_nonfinite_in_one_of_many)(void) {
    TY(made) made[FEW], kept[FEW];
    TY(oplora_lean) layers[FEW];
    for (int i = 0; i < FEW; i++) {
        TY(make)(&made[i], &few[i], (uint32_t)i);
        TY(make)(&kept[i], &few[i], (uint32_t)i);
        TY(copy_state)(&kept[i], &made[i]);
        TY(set_gradients)(&made[i], 1, 1);
        layers[i] = made[i].layer;
    }
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(layers, FEW), 1);
    for (int bad = 0; bad < FEW; bad++)
        for (int s = 0; s < SPLITS; s++) {
            const TY(oplora_factor) *const factor = &made[bad].factors[layers[bad].n_factors - 1];
            T *const last = (T *)factor->g + factor->rows - 1;
            *last = s % 2 ? (T)NAN : (T)INFINITY;
            CHECK(TY(oplora_lean_step)(layers, FEW, 0, workspace, splits[s]) == OPLORA_ENONFINITE);
            CHECK(TY(oplora_lean_measure)(layers, FEW, workspace, splits[s]) == OPLORA_ENONFINITE);
            for (int i = 0; i < FEW; i++) {
                CHECK(TY(same_state)(&made[i], &kept[i]));
                CHECK(layers[i].report[1] == (i == bad));
            }
            *last = (T)0.5;
        }
    /* reports that say so are believed */
    CHECK(TY(oplora_lean_measure)(layers, FEW, workspace, NULL) == OPLORA_OK);
    layers[2].report[1] = 1;
    CHECK(TY(oplora_lean_step)(layers, FEW, 1, workspace, NULL) == OPLORA_ENONFINITE);
    free(workspace);
    for (int i = 0; i < FEW; i++) {
        CHECK(TY(same_state)(&made[i], &kept[i]));
        TY(unmake)(&made[i]);
        TY(unmake)(&kept[i]);
    }
}

/* A start whose threads fail says so. */
static void TY(test_start_fails)(void) {
    static const shape like = {4, 3, {5000, 20, 0}, 1, 0, 2, 1, OPLORA_SIGN};
    TY(made) f;
    TY(make)(&f, &like, 0);
    CHECK(TY(oplora_lean_start)(&f.layer, 0.3, failing) == OPLORA_EPARALLEL);
    TY(unmake)(&f);
}

static void TY(test_type)(void) {
    static const int64_t counts[] = {1, 7, 15, 16, 17, 64, 127, 128, 129, 500, 512};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        TY(test_random_loops)(counts[i], 0);
        TY(test_random_loops)(counts[i], ((int64_t)1 << 36) + 1280);
        TY(test_row_loops)(counts[i], i % 2);
        TY(test_row_loops)(counts[i], (i + 1) % 2);
        TY(test_rows_are_independent)(counts[i]);
        TY(test_rounding)(counts[i]);
    }
    TY(test_rounding_is_unbiased)();
    TY(test_references)();
    TY(test_one_unit_is_exact)();
    TY(test_steps)(12);
    TY(test_measured_step_reads_dh)();
    for (int i = 0; i < EDGE_SHAPES; i++) {
        TY(test_edges)(&edge_shapes[i]);
        TY(test_rate_zero)(&edge_shapes[i]);
    }
    TY(test_drift)();
    TY(test_refusals)();
    TY(test_nonfinite_in_one_of_many)();
    TY(test_start_fails)();
}

#endif
