/* Whole steps of lean state against a dense reference.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "lean_dense.h"
#include "lean_shapes.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void test_sizes(void) {
    CHECK(oplora_lean_numbers(5, 3, 100, 2, 1) == 2 * 100 + 5 * (2 + 1 + 2 + 1 + 1) + 3 * (2 + 1 + 1 + 3));
    CHECK(oplora_lean_moments(5, 3, 100, 2, 1) == 4 * 105);
    CHECK(oplora_lean_numbers(5, 3, 100, 0, 1) == -1 && oplora_lean_numbers(5, 3, 100, 2, 9) == -1);
    CHECK(oplora_lean_moments(0, 3, 100, 2, 1) == -1 && oplora_lean_moments(5, 3, 100, 9, 1) == -1);
    CHECK(oplora_lean_numbers(1, 1, (int64_t)1 << 62, 8, 1) == -1);
}

#define OPLORA_TEMPLATE "../../tests/c/test_lean.c"
#include "each_type.h"

int main(void) {
    noise_state = 1;
    test_sizes();
    test_type_f32();
    test_type_f64();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

/* ---- against the dense reference ---- */

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
    add_to_digest(f->layer.numbers, (size_t)f->n_numbers * sizeof(T));
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
    double *start[LAYERS], edge[LAYERS];
    int64_t toggled = 0;
    for (int i = 0; i < n_layers; i++) {
        TY(make)(&made[i], &shapes[i], 100 + (uint32_t)i);
        TY(make_dense)(&truth[i], &made[i], &shapes[i]);
        start[i] = zeros(made[i].layer.N, 8);
        for (int64_t k = 0, n = 0; k < made[i].layer.n_factors; k++)
            for (int64_t row = 0; row < made[i].factors[k].rows; row++) start[i][n++] = made[i].factors[k].out[row];
        layers[i] = made[i].layer;
        edge[i] = dense_edge(&truth[i]);
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
            edge[i] = fmin(edge[i], dense_edge(&truth[i]));
            if (edge[i] < (TY(is_float) ? step == 1 ? 1e-5 : 0 : 1e-6)) continue; /* from here on both may part */
            /* in float, moments are bfloat16 from the second step on. In double, oplora_truncate leaves out directions with
             * less than 1e-14 of the square: 1e-7 of the product */
            const double error = TY(factor_error)(&made[i], &truth[i], start[i]);
            const double rounded = edge[i] < 0x1p-8 ? 0.2 : 0.02;
            CHECK(error <= (!TY(is_float) ? 2e-7 : step == 1 ? 5e-5 : rounded) || (TY(is_float) &&step > 6));
            if (TY(is_float) &&step > 1) continue;
            const double bound = TY(is_float) ? 1e-5 : 1e-6;
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

static void TY(test_type)(void) {
    noise_state = TY(is_float) ? 3177070398u : 3387119395u;
    TY(test_references)();
    TY(test_one_unit_is_exact)();
    noise_state = TY(is_float) ? 510650310u : 3197619403u;
    TY(test_drift)();
}

#endif
