/* The dense reference of lean state: the formulas at the top of adamw_lean.c, in double, with W0 and c written out. */
#ifndef OPLORA_LEAN_DENSE_H
#define OPLORA_LEAN_DENSE_H

#include "core_check.h"
#include "oplora_core.h"
#include "svd.h"

typedef struct {
    int64_t rows, inputs;
    int d, k;
    double *W0, *U, *Q, *A, *B, *R, *r, *c, *m, *S; /* W0 as columns */
    double *lr, *decay; /* of each row's c: its rate, and what a step takes of it and of W */
    double scale, mean, dropped_moment, dropped_weight;
} dense_map;

static inline dense_map make_map(int64_t rows, int64_t inputs, int d, int k) {
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

static inline void free_map(dense_map *w) {
    double *const all[] = {w->W0, w->U, w->Q, w->A, w->B, w->R, w->r, w->c, w->m, w->S, w->lr, w->decay};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* out = (s W0 + U Q^T) x + c */
static inline void map_output(const dense_map *w, const double *x, double *out) {
    memcpy(out, w->c, (size_t)w->rows * sizeof *out);
    for (int64_t j = 0; j < w->inputs; j++)
        for (int64_t n = 0; n < w->rows && x[j] != 0; n++) out[n] += w->scale * w->W0[j * w->rows + n] * x[j];
    for (int i = 0; i < w->d; i++) {
        const double along = dot(w->Q + i * w->inputs, x, w->inputs);
        for (int64_t n = 0; n < w->rows; n++) out[n] += along * w->U[i * w->rows + n];
    }
}

/* dx = (s W0 + U Q^T)^T g */
static inline void map_back(const dense_map *w, const double *g, double *dx) {
    double along[OPLORA_MOST_RANK];
    for (int i = 0; i < w->d; i++) along[i] = dot(w->U + i * w->rows, g, w->rows);
    for (int64_t j = 0; j < w->inputs; j++) {
        dx[j] = w->scale * dot(w->W0 + j * w->rows, g, w->rows);
        for (int i = 0; i < w->d; i++) dx[j] += w->Q[i * w->inputs + j] * along[i];
    }
}

/* torch.optim.AdamW on numbers whose gradient is g. */
static inline void reference_adamw(double *p, double *m, double *s, const double *g, int64_t n, double lr, double decay,
                                   const oplora_adamw *a) {
    const double first = 1 - pow(a->beta1, (double)a->step), second = 1 - pow(a->beta2, (double)a->step);
    for (int64_t i = 0; i < n; i++) {
        m[i] = a->beta1 * m[i] + (1 - a->beta1) * g[i];
        s[i] = a->beta2 * s[i] + (1 - a->beta2) * g[i] * g[i];
        p[i] = (1 - decay) * p[i] - lr * (m[i] / first) / (sqrt(s[i] / second) + a->eps);
    }
}

/* R, r, and from them row and the square roots of r. */
static inline void map_second_moment(dense_map *w, const double *g, const double *x, const oplora_adamw *a, double *row,
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
static inline void map_step(dense_map *w, const double *g, const double *x, double weight_ratio, double decay,
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

static inline void dense_generate(dense *t) {
    map_output(&t->hidden, t->z, t->pre);
    for (int64_t j = 0; j < t->hidden.rows; j++) t->h[j] = fmax(t->pre[j], 0);
    map_output(&t->outer, t->h, t->v);
}

/* How near a unit is to the edge of its ReLU, over the largest: whoever computes less exactly may have it on the other side. */
static inline double dense_edge(const dense *t) {
    double nearest = INFINITY, largest = 0;
    for (int64_t j = 0; j < t->hidden.rows; j++) {
        nearest = fmin(nearest, fabs(t->pre[j]));
        largest = fmax(largest, fabs(t->pre[j]));
    }
    return nearest / largest;
}

/* decay: of W2's start. Returns how many units went on or off. */
static inline int64_t dense_step(dense *t, const double *g, double decay, const oplora_adamw *a) {
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

#endif
