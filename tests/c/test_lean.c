/* The lean state's core without Python: truncations against the best that there is, random numbers and row loops against
 * scalar ones, the same bits for every split and both ways of a step, edges, and refusals. Its trajectory is compared
 * with a dense float64 oracle in tests/test_lean_trajectory.py.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "dispatch.h"
#include "lowrank.h"
#include "oplora_core.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint64_t digest = 14695981039346656037u;

static void add_to_digest(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ ((const unsigned char *)data)[i]) * 1099511628211u;
}

static uint32_t noise_state;

static double noise(void) { /* in (-1, 1), the same on every machine */
    noise_state = noise_state * 1664525u + 1013904223u;
    return ((double)(noise_state >> 8) + 0.5) / (1 << 23) - 1;
}

static int32_t split_in_sevens(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)grain;
    for (int64_t at = begin; at < end; at += 7) fn(at, at + 7 < end ? at + 7 : end, context);
    return 0;
}
static int32_t split_backwards(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)grain;
    for (int64_t at = end; at > begin; at--) fn(at - 1, at, context);
    return 0;
}
static int32_t failing(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)begin, (void)end, (void)grain, (void)fn, (void)context;
    return 1;
}
static const oplora_parallel_fn splits[] = {NULL, split_in_sevens, split_backwards};
enum { SPLITS = sizeof splits / sizeof *splits };

static void *zeros(int64_t count, size_t size) {
    void *const memory = calloc((size_t)count + 1, size);
    if (!memory) abort();
    return memory;
}

/* ---- oplora_truncate ---- */

enum { ROWS = 40, COLUMNS = 11, MOST = 7 };

/* ||M||^2 less the `rank` largest squared singular values, by power iteration and deflation. */
static double best_residual(const double M[ROWS][COLUMNS], int rank) {
    double left[ROWS][COLUMNS], total = 0;
    memcpy(left, M, sizeof left);
    for (int r = 0; r < rank; r++) {
        double v[COLUMNS], u[ROWS];
        for (int j = 0; j < COLUMNS; j++) v[j] = noise();
        for (int turn = 0; turn < 3000; turn++) {
            double length = 0;
            for (int i = 0; i < ROWS; i++) {
                u[i] = 0;
                for (int j = 0; j < COLUMNS; j++) u[i] += left[i][j] * v[j];
            }
            for (int j = 0; j < COLUMNS; j++) {
                v[j] = 0;
                for (int i = 0; i < ROWS; i++) v[j] += left[i][j] * u[i];
                length += v[j] * v[j];
            }
            for (int j = 0; j < COLUMNS && length > 0; j++) v[j] /= sqrt(length);
        }
        for (int i = 0; i < ROWS; i++) {
            u[i] = 0;
            for (int j = 0; j < COLUMNS; j++) u[i] += left[i][j] * v[j];
            for (int j = 0; j < COLUMNS; j++) left[i][j] -= u[i] * v[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) total += left[i][j] * left[i][j];
    return total;
}

static void test_truncate(int p, int rank, const double *column_scale, int true_rank) {
    double X[ROWS][MOST], K[MOST][COLUMNS], M[ROWS][COLUMNS], gram[MOST * MOST], rotation[MOST * MOST];
    double directions[MOST * COLUMNS], total = 0, residual = 0;
    for (int a = 0; a < p; a++) {
        for (int i = 0; i < ROWS; i++) X[i][a] = a < true_rank ? noise() * column_scale[a] : X[i][0];
        for (int j = 0; j < COLUMNS; j++) K[a][j] = noise() / column_scale[a];
    }
    for (int a = 0; a < p; a++)
        for (int b = 0; b < p; b++) {
            gram[a * p + b] = 0;
            for (int i = 0; i < ROWS; i++) gram[a * p + b] += X[i][a] * X[i][b];
        }
    const double dropped = oplora_truncate(gram, p, &K[0][0], COLUMNS, rank, rotation, directions);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) {
            double kept = 0;
            M[i][j] = 0;
            for (int a = 0; a < p; a++) {
                M[i][j] += X[i][a] * K[a][j];
                for (int r = 0; r < rank; r++) kept += X[i][a] * rotation[a * rank + r] * directions[r * COLUMNS + j];
            }
            total += M[i][j] * M[i][j];
            residual += (M[i][j] - kept) * (M[i][j] - kept);
        }
    const double best = best_residual((const double (*)[COLUMNS])M, rank);
    CHECK(residual <= best + 1e-9 * total);
    CHECK(fabs(dropped * total - residual) <= 1e-9 * total);
    for (int r = 0; r < rank; r++)
        for (int q = 0; q <= r; q++) {
            double product = 0;
            for (int j = 0; j < COLUMNS; j++) product += directions[r * COLUMNS + j] * directions[q * COLUMNS + j];
            CHECK(fabs(product - (q == r)) < 1e-12 || (q == r && product == 0 && r >= true_rank));
        }
}

static void test_truncations(void) {
    static const double even[MOST] = {1, 1, 1, 1, 1, 1, 1};
    static const double graded[MOST] = {1e12, 1, 1e-12, 1e6, 1e-6, 1, 1};
    for (int p = 1; p <= MOST; p++)
        for (int rank = 1; rank <= p; rank++) {
            test_truncate(p, rank, even, p);
            test_truncate(p, rank, graded, p);
        }
    test_truncate(4, 3, even, 2);
    test_truncate(5, 4, even, 1);
    double gram[9] = {0}, K[3 * COLUMNS], rotation[6], directions[2 * COLUMNS];
    for (int i = 0; i < 3 * COLUMNS; i++) K[i] = noise();
    CHECK(oplora_truncate(gram, 3, K, COLUMNS, 2, rotation, directions) == 0); /* X is zero: nothing is kept, no NaN */
    for (int i = 0; i < 6; i++) CHECK(rotation[i] == 0);
    for (int i = 0; i < 2 * COLUMNS; i++) CHECK(directions[i] == 0);
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

int main(void) {
    noise_state = 1;
    test_truncations();
    test_sizes();
    test_type_f32();
    test_type_f64();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

static const int TY(is_float) = sizeof(T) == sizeof(float);

/* ---- the loops over random numbers ---- */

static double TY(uniform_entry)(const oplora_stream *s, uint32_t vector, int64_t entry) {
    const int64_t counter = entry / 128 * 16 + entry % 16, number = entry % 128 / 16;
    uint32_t word[4];
    oplora_philox4x32_10(
        (const uint32_t[]){(uint32_t)counter, (uint32_t)(counter >> 32) | s->tensor << 24, vector, s->layer},
        (const uint32_t[]){(uint32_t)s->seed, (uint32_t)(s->seed >> 32)}, word);
    return 2.0 * (word[number / 2] >> (number % 2 ? 16 : 0) & 0xffff) + 1 - 65536;
}

static int TY(sign_entry)(const oplora_stream *s, int64_t column, int64_t entry) {
    const int64_t counter = entry / 64 * 16 + entry % 16;
    uint32_t word[4];
    oplora_philox4x32_10((const uint32_t[]){(uint32_t)counter, (uint32_t)(counter >> 32) | s->tensor << 24,
                                            (uint32_t)(column / 32), s->layer},
                         (const uint32_t[]){(uint32_t)s->seed, (uint32_t)(s->seed >> 32)}, word);
    return word[entry % 64 / 16] >> column % 32 & 1 ? -1 : 1;
}

static void TY(test_random_loops)(int64_t n, int64_t first) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_stream s = {0x123456789abcdefu, 77, 3};
    T x[512], y[512], before[512];
    double sum = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        x[i] = (T)noise();
        y[i] = before[i] = (T)noise();
        sum += TY(uniform_entry)(&s, 9, first + i) * x[i];
        scale += fabs(TY(uniform_entry)(&s, 9, first + i) * (double)x[i]);
    }
    const double eps = TY(is_float) ? FLT_EPSILON : DBL_EPSILON;
    CHECK(fabs(kernels->uniform_dot(&s, 9, first, x, n) - sum) <= 64 * eps * scale);
    kernels->uniform_axpy(&s, 9, first, (T)0.5, y, n);
    for (int64_t i = 0; i < n; i++) CHECK(y[i] == before[i] + (T)(0.5 * TY(uniform_entry)(&s, 9, first + i)));

    uint32_t words[512];
    const int bit[] = {0, 31, 7, 8, 16, 3};
    const T coefficient[] = {(T)0.5, (T)-1.25, 3, (T)0.125, 7, (T)-0.75};
    double out[6];
    kernels->sign_words(&s, 2, first, n, words);
    for (int count = 1; count <= 6; count++) {
        kernels->sign_dot(words, bit, count, x, n, out);
        memcpy(y, before, sizeof y);
        kernels->sign_axpy(words, bit, coefficient, count, y, n);
        for (int k = 0; k < count; k++) {
            sum = scale = 0;
            for (int64_t i = 0; i < n; i++) sum += TY(sign_entry)(&s, 64 + bit[k], first + i) * (double)x[i];
            for (int64_t i = 0; i < n; i++) scale += fabs((double)x[i]);
            CHECK(fabs(out[k] - sum) <= 64 * eps * scale);
        }
        for (int64_t i = 0; i < n; i++) {
            T expected = before[i];
            for (int k = 0; k < count; k++) expected += TY(sign_entry)(&s, 64 + bit[k], first + i) * coefficient[k];
            CHECK(y[i] == expected);
        }
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
    const TY(lean_numbers) a = {(T)0.1, (T)0.999, (T)1e-3, (T)3e-3, (T)0.98, (T)0.05, (T)1e-8, (T)1e-7, (T)3, 12345};
    TY(oplora_moment) A[2][MOST_ROWS], m[2][MOST_ROWS], S[2][MOST_ROWS], R[2][MOST_ROWS], before[4][MOST_ROWS];
    T U[2][2][MOST_ROWS], g[MOST_ROWS], base[MOST_ROWS], out[2][MOST_ROWS], start[MOST_ROWS];
    T row[MOST_ROWS], scaled[MOST_ROWS], wide[MOST_ROWS], scaled_A[MOST_ROWS], turned[3][MOST_ROWS];
    const T weight[] = {(T)0.3, (T)-0.2, (T)0.01, (T)0.02}, turn_A[] = {(T)0.9, (T)-0.1};
    const T turn[2][4] = {{(T)0.8, (T)0.1, (T)-0.02, (T)0.03}, {(T)-0.1, (T)0.7, (T)0.04, (T)0.01}};
    const uint32_t other_key = a.key ^ 0x9E3779B9u;
    for (int64_t i = 0; i < n; i++) {
        g[i] = i % 5 ? (T)noise() : 0;
        base[i] = (T)noise();
        start[i] = out[0][i] = out[1][i] = (T)noise();
        for (int k = 0; k < 2; k++) U[0][k][i] = U[1][k][i] = (T)noise();
        A[0][i] = A[1][i] = before[0][i] = TY(stored)(noise());
        m[0][i] = m[1][i] = before[1][i] = TY(stored)(noise());
        S[0][i] = S[1][i] = before[2][i] = TY(stored)(fabs(noise()));
        R[0][i] = R[1][i] = before[3][i] = TY(stored)(fabs(noise()));
    }
    /* first pass */
    double general[18] = {0}, fused[18] = {0}, sum[4];
    kernels->lean_scale(R[0], g, n, &a, row, scaled);
    kernels->lean_widen(A[0], row, n, wide, scaled_A);
    const T *const basis[] = {U[0][0], U[0][1], scaled_A, scaled};
    for (int i = 0; i < 4; i++) {
        kernels->dot(basis, i + 1, basis[i], n, sum);
        for (int j = 0; j <= i; j++) general[i * 4 + j] = sum[j];
    }
    kernels->dot(basis, 2, g, n, general + 16);
    kernels->lean_reduce21(A[0], R[0], U[0][0], U[0][1], g, n, &a, fused);
    CHECK(!memcmp(general, fused, sizeof fused));
    add_to_digest(fused, sizeof fused);
    /* second pass */
    const T *const kept = with_base ? base : NULL;
    kernels->lean_second(m[0], S[0], R[0], g, kept, 1000, n, &a, row, scaled, out[0]);
    kernels->axpy(basis, weight, 4, out[0], n);
    for (int k = 0; k < 2; k++) {
        memset(turned[k], 0, sizeof turned[k]);
        kernels->axpy(basis, turn[k], 4, turned[k], n);
    }
    memset(turned[2], 0, sizeof turned[2]);
    kernels->axpy((const T *const[]){wide, g}, turn_A, 2, turned[2], n);
    kernels->lean_round(turned[2], 1000, other_key, 16, n, A[0]);
    kernels->lean_update21(U[1][0], U[1][1], A[1], m[1], S[1], R[1], g, kept, 1000, n, &a, weight, turn[0], turn[1],
                           turn_A, out[1]);
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
        CHECK(fabs(row[i] - factor) <= 16 * eps * factor);
        const double expected[] = {0.9 * A_old - 0.1 * x, m_next, s_next, r_next};
        const TY(oplora_moment) found[] = {A[1][i], m[1][i], S[1][i], R[1][i]};
        for (int k = 0; k < 4; k++)
            CHECK(fabs(TY(number)(found[k]) - expected[k]) <= rounding * fabs(expected[k]) + 64 * eps);
    }
}

static void TY(test_rounding_is_unbiased)(void) {
    enum { TRIES = 1 << 14 };
    T *const v = zeros(TRIES, sizeof(T));
    TY(oplora_moment) *const A = zeros(TRIES, sizeof *A);
    for (int64_t i = 0; i < TRIES; i++) v[i] = (T)1.003;
    for (int shift = 0; shift <= 16; shift += 16) {
        double sum = 0;
        TY(oplora_dispatch)()->lean_round(v, 0, 99, shift, TRIES, A);
        for (int64_t i = 0; i < TRIES; i++) sum += TY(number)(A[i]);
        CHECK(fabs(sum / TRIES - 1.003) < 4 * 0.5 / 128 / sqrt(TRIES)); /* a step is 1/128 */
    }
    free(v);
    free(A);
}

/* ---- whole steps ---- */

typedef struct {
    TY(oplora_lean) layer;
    TY(oplora_factor) factors[2];
    int64_t n_numbers, n_moments;
} TY(made);

static void TY(make)(TY(made) *f, int64_t H, int64_t Z, int64_t rows_a, int64_t rows_b, int d, int k,
                     oplora_start_kind start, uint32_t index) {
    const int64_t N = rows_a + rows_b;
    memset(f, 0, sizeof *f);
    f->n_numbers = oplora_lean_numbers(H, Z, N, d, k);
    f->n_moments = oplora_lean_moments(H, Z, N, d, k);
    f->layer = (TY(oplora_lean)){.H = H,
                                 .Z = Z,
                                 .N = N,
                                 .weight_rank = d,
                                 .moment_rank = k,
                                 .seed = 5,
                                 .layer = index,
                                 .start = start,
                                 .numbers = zeros(f->n_numbers, sizeof(T)),
                                 .moments = zeros(f->n_moments, sizeof(TY(oplora_moment))),
                                 .scalars = zeros(OPLORA_LEAN_SCALARS, 8),
                                 .factors = f->factors,
                                 .n_factors = rows_b ? 2 : 1,
                                 .report = zeros(OPLORA_LEAN_REPORT, 8),
                                 .dh = zeros(H, 8)};
    for (int i = 0; i < f->layer.n_factors; i++) {
        const int64_t rows = i ? rows_b : rows_a;
        T *const base = zeros(rows, sizeof(T));
        for (int64_t n = 0; n < rows; n++) base[n] = (T)noise();
        f->factors[i] =
            (TY(oplora_factor)){rows, zeros(rows, sizeof(T)), i ? base : NULL, zeros(rows, sizeof(T)), .random = !i};
        if (!i) free(base);
    }
    CHECK(TY(oplora_lean_start)(&f->layer, 0.3, splits[index % SPLITS]) == OPLORA_OK);
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
    f->layer.adamw = (oplora_adamw){1e-2, 5e-3, 2e-2, 0.9, 0.999, 1e-8, 0.5, step};
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

/* All layers in one call, small and spread ones mixed: the same bits for every split, and where a measurement came
 * before the step, which itself changes nothing. */
static void TY(test_steps)(int64_t steps) {
    enum { LAYERS = 5 };
    static const int64_t sizes[LAYERS][6] = {
        {32, 16, 2048, 333, 2, 1},   {1, 1, 1, 0, 2, 1},     {70, 3, 31, 33, 3, 2},
        {2000, 8, 3000, 5100, 2, 1}, {5, 128, 700, 9, 8, 8},
    };
    TY(made) made[SPLITS][LAYERS], kept[LAYERS];
    const uint32_t seed = noise_state;
    for (int s = 0; s <= SPLITS; s++) {
        noise_state = seed;
        for (int i = 0; i < LAYERS; i++)
            TY(make)(s < SPLITS ? &made[s][i] : &kept[i], sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3],
                     (int)sizes[i][4], (int)sizes[i][5], i % 2 ? OPLORA_UNIFORM : OPLORA_SIGN, (uint32_t)i);
    }
    for (int64_t step = 1; step <= steps; step++) {
        const uint32_t now = noise_state;
        for (int s = 0; s < SPLITS; s++) {
            TY(oplora_lean) layers[LAYERS];
            noise_state = now;
            for (int i = 0; i < LAYERS; i++) {
                TY(set_gradients)(&made[s][i], step, 1);
                layers[i] = made[s][i].layer;
                if (s != 1) layers[i].dh = NULL;
            }
            void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(layers, LAYERS), 1);
            if (s == 1) {
                CHECK(TY(oplora_lean_measure)(layers, LAYERS, workspace, splits[s]) == OPLORA_OK);
                for (int i = 0; i < LAYERS; i++) CHECK(step > 1 || TY(same_state)(&made[1][i], &kept[i]));
            }
            CHECK(TY(oplora_lean_step)(layers, LAYERS, s == 1, workspace, splits[s]) == OPLORA_OK);
            free(workspace);
        }
        for (int i = 0; i < LAYERS; i++) {
            for (int s = 1; s < SPLITS; s++) {
                CHECK(TY(same_state)(&made[s][i], &made[0][i]));
                CHECK(!memcmp(made[s][i].layer.report, made[0][i].layer.report, sizeof(double) * OPLORA_LEAN_REPORT));
            }
            const TY(oplora_lean) *const l = &made[0][i].layer;
            for (int k = 5; k < 9; k++) CHECK(l->report[k] >= 0 && l->report[k] <= 1);
            for (int k = 0; k < l->n_factors; k++)
                add_to_digest(l->factors[k].out, (size_t)l->factors[k].rows * sizeof(T));
        }
    }
    for (int i = 0; i < LAYERS; i++) {
        CHECK(!TY(same_state)(&made[0][i], &kept[i]));
        for (int s = 0; s < SPLITS; s++) TY(unmake)(&made[s][i]);
        TY(unmake)(&kept[i]);
    }
}

/* Finite factors, and no NaN in the state; z's second moment may be infinite, as in any AdamW. */
static int TY(is_finite)(const TY(made) *f) {
    for (int64_t i = 0; i < f->n_numbers; i++)
        if (isnan(f->layer.numbers[i])) return 0;
    for (int k = 0; k < f->layer.n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++)
            if (!isfinite(f->factors[k].out[i])) return 0;
    return 1;
}

static void TY(step_alone)(TY(made) *f, oplora_status expected) {
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f->layer, 1), 1);
    CHECK(TY(oplora_lean_step)(&f->layer, 1, 0, workspace, NULL) == expected);
    free(workspace);
}

static void TY(test_edges)(void) {
    static const double scales[] = {0, 1e-42, 1e-30, 1, 1e15, TY(is_float) ? 1e38 : 1e150};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
        TY(made) f;
        TY(make)(&f, 33, 7, 200, 100, 2, 1, OPLORA_SIGN, 0);
        for (int64_t step = 1; step <= 30; step++) {
            TY(set_gradients)(&f, step, scales[i]);
            TY(step_alone)(&f, OPLORA_OK);
        }
        CHECK(TY(is_finite)(&f));
        TY(unmake)(&f);
    }
    TY(made) f; /* decay until nothing is left of the start */
    TY(make)(&f, 33, 7, 200, 100, 2, 1, OPLORA_UNIFORM, 0);
    for (int64_t step = 1; step <= 1200; step++) {
        TY(set_gradients)(&f, step, 1);
        f.layer.adamw.weight_decay = 50;
        TY(step_alone)(&f, OPLORA_OK);
    }
    CHECK(f.layer.scalars[0] == 0 && TY(is_finite)(&f));
    TY(unmake)(&f);
}

/* Rounding does not add up: after many steps Q's rows are still orthonormal. */
static void TY(test_drift)(void) {
    enum { H = 5, Z = 3, A_ROWS = 12, B_ROWS = 8, STEPS = 100000 };
    TY(made) f;
    TY(make)(&f, H, Z, A_ROWS, B_ROWS, 2, 1, OPLORA_SIGN, 0);
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f.layer, 1), 1);
    for (int64_t step = 1; step <= STEPS; step++) {
        f.layer.adamw = (oplora_adamw){1e-3, 1e-3, 1e-4, 0.9, 0.999, 1e-8, 0.01, step};
        for (int k = 0; k < 2; k++) /* towards 1, with noise */
            for (int64_t n = 0; n < f.factors[k].rows; n++)
                ((T *)f.factors[k].g)[n] = f.factors[k].out[n] - 1 + (T)(0.1 * noise());
        TY(oplora_lean_step)(&f.layer, 1, 0, workspace, NULL);
    }
    free(workspace);
    const T *const Q = f.layer.numbers + 2 * (A_ROWS + B_ROWS) + 3 * H;
    for (int a = 0; a < 2; a++)
        for (int b = 0; b <= a; b++) {
            double product = 0;
            for (int j = 0; j < H; j++) product += (double)Q[a * H + j] * Q[b * H + j];
            CHECK(fabs(product - (a == b)) <= (TY(is_float) ? 1e-6 : 1e-12));
        }
    for (int k = 0; k < 2; k++)
        for (int64_t n = 0; n < f.factors[k].rows; n++) CHECK(fabs(f.factors[k].out[n] - 1) < 0.1);
    TY(unmake)(&f);
}

static void TY(test_refusals)(void) {
    TY(made) f, twin;
    const uint32_t seed = noise_state;
    TY(make)(&f, 4, 3, 50, 20, 2, 1, OPLORA_SIGN, 0);
    noise_state = seed;
    TY(make)(&twin, 4, 3, 50, 20, 2, 1, OPLORA_SIGN, 0);
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
    REFUSED(layer.moment_rank = 9, OPLORA_ESIZE);
    REFUSED(layer.n_factors = 0, OPLORA_ESIZE);
    REFUSED(layer.start = (oplora_start_kind)2, OPLORA_EVALUE);
    REFUSED(layer.adamw.weight_lr = NAN, OPLORA_EVALUE);
    REFUSED(layer.adamw.step = 0, OPLORA_EVALUE);
    REFUSED(layer.adamw.beta2 = 1, OPLORA_EVALUE);
    REFUSED(layer.numbers = NULL, OPLORA_ENULL);
    REFUSED(layer.moments = NULL, OPLORA_ENULL);
    REFUSED(layer.scalars = NULL, OPLORA_ENULL);
    REFUSED(layer.report = NULL, OPLORA_ENULL);
    REFUSED(layer.factors = NULL, OPLORA_ENULL);
#undef REFUSED
    layer = f.layer;
    layer.dh = NULL;
    CHECK(TY(oplora_lean_measure)(&layer, 1, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(&layer, 1, 1, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(&f.layer, 1, 0, NULL, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(NULL, 1, 0, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_lean_step)(NULL, 0, 0, NULL, NULL) == OPLORA_OK);
    CHECK(TY(oplora_lean_step)(&f.layer, -1, 0, workspace, NULL) == OPLORA_ESIZE);
    CHECK(TY(oplora_lean_start)(&f.layer, -1, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_lean_start)(NULL, 0.01, NULL) == OPLORA_ENULL);
    CHECK(TY(same_state)(&f, &twin));
    TY(oplora_lean) two[] = {f.layer, f.layer};
    void *const room = zeros(TY(oplora_lean_workspace_bytes)(two, 2), 1);
    CHECK(TY(oplora_lean_step)(two, 2, 0, room, failing) == OPLORA_EPARALLEL);
    free(room);
    free(workspace);
    TY(unmake)(&f);
    TY(unmake)(&twin);
}

static void TY(test_type)(void) {
    static const int64_t counts[] = {1, 7, 15, 16, 17, 64, 127, 128, 129, 500, 512};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        TY(test_random_loops)(counts[i], 0);
        TY(test_random_loops)(counts[i], ((int64_t)1 << 36) + 1280);
        TY(test_row_loops)(counts[i], i % 2);
    }
    TY(test_rounding_is_unbiased)();
    TY(test_steps)(12);
    TY(test_edges)();
    TY(test_drift)();
    TY(test_refusals)();
}

#endif
