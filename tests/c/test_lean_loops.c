/* The inner loops of lean state: random numbers and rows against scalar ones, and how moments are rounded.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "lean_shapes.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define OPLORA_TEMPLATE "../../tests/c/test_lean_loops.c"
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
    test_type_f32();
    test_type_f64();
    test_rounding_is_not_shared();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

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
        T of_units[OPLORA_SIGNS] = {0};
        for (int k = 0; k < count; k++) of_units[bit[k]] = coefficient[k];
        kernels->sign_axpy(words, of_units, y, n);
        for (int k = 0; k < count; k++) {
            sum = scale = 0;
            for (int64_t i = 0; i < n; i++) sum += sign_entry(&s, 64 + bit[k], first + i) * (double)x[i];
            for (int64_t i = 0; i < n; i++) scale += fabs((double)x[i]);
            CHECK(fabs(out[k] - sum) <= 64 * eps * scale);
        }
        for (int64_t i = 0; i < n; i++) {
            T expected = before[i];
            for (int four = 0; four < OPLORA_SIGNS; four += 4) {
                T sum = 0;
                for (int u = four; u < four + 4; u++) sum += sign_entry(&s, 64 + u, first + i) * of_units[u];
                expected += sum;
            }
            CHECK(y[i] == expected);
        }
        CHECK(y[n] == 12345);
        add_to_digest(y, (size_t)n * sizeof(T));
    }
}

/* ---- the loops over rows ---- */

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
}

#endif
