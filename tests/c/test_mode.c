/* The caller's floating-point mode: whether subnormal numbers count there and how sums round changes no bit of any result,
 * on no thread that works for the core, and is afterwards what it was. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "oplora_core.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

enum { GRADUAL, FLUSHED, UPWARD, FLUSHED_UPWARD, MODES };

#if defined(__x86_64__)
static uint64_t mode(void) { return __builtin_ia32_stmxcsr() & 0xffc0; } /* without the flags of what has happened */
static void set_mode(uint64_t value) { __builtin_ia32_ldmxcsr((uint32_t)value); }
static uint64_t mode_of(int which) { return 0x1f80u | (which & 1 ? 0x8040u : 0) | (which & 2 ? 0x4000u : 0); }
#elif defined(__aarch64__)
static uint64_t mode(void) {
    uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}
static void set_mode(uint64_t value) { __asm__ volatile("msr fpcr, %0" ::"r"(value)); }
static uint64_t mode_of(int which) { return (uint64_t)(which & 1) << 24 | (uint64_t)(which >> 1) << 22; }
#else
static uint64_t mode(void) { return 0; }
static void set_mode(uint64_t value) { (void)value; }
static uint64_t mode_of(int which) { return (uint64_t)(which & 0); }
#endif

static int restored = 1; /* whether every thread's mode was, whenever it was looked at */

/* Threads whose mode is another at each range, and none the caller's. */
static int32_t on_other_threads(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    const uint64_t caller = mode();
    (void)grain;
    for (int64_t at = begin; at < end; at++) {
        const uint64_t own = mode_of((int)(at % MODES));
        set_mode(own);
        fn(at, at + 1, context);
        restored &= mode() == own;
    }
    set_mode(caller);
    return 0;
}

static int current;                 /* which mode the calls are made in */
static oplora_parallel_fn splitter; /* and how their work is split */

/* The call in the current mode; all else of this file runs in the usual one. */
#define IN_MODE(call) \
    do { \
        const uint64_t usual = mode(); \
        set_mode(mode_of(current)); \
        const oplora_status status = (call); \
        restored &= mode() == mode_of(current); \
        set_mode(usual); \
        CHECK(status == OPLORA_OK); \
    } while (0)

#define OPLORA_TEMPLATE "../../tests/c/test_mode.c"
#include "each_type.h"

/* W, A and B in part subnormal, and values that are so in each dtype. */
static void merge_and_round(void) {
    enum { ROWS = 5, COLUMNS = 33, R = 3 };
    static const oplora_dtype dtypes[] = {OPLORA_F32, OPLORA_F16, OPLORA_BF16, OPLORA_F64};
    static float A[R * COLUMNS], B[ROWS * R], values[ROWS * COLUMNS];
    void *const workspace = zeros(oplora_merge_workspace_bytes(COLUMNS), 1);
    fill_f32(A, R * COLUMNS);
    fill_f32(B, ROWS * R);
    fill_f32(values, ROWS * COLUMNS);
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++) {
        double W[ROWS * COLUMNS] = {0};
        IN_MODE(oplora_round(values, ROWS * COLUMNS, dtypes[i], W));
        add_to_digest(W, sizeof W);
        IN_MODE(oplora_merge(W, dtypes[i], A, B, 0.7, ROWS, COLUMNS, R, 0, workspace));
        IN_MODE(oplora_merge(W, dtypes[i], B, A, 0.7, COLUMNS, ROWS, R, 1, workspace));
        add_to_digest(W, sizeof W);
    }
    free(workspace);
}

/* A checkpoint's numbers are kept also by a caller whose own subnormal numbers are zero. */
static void test_merge_keeps_subnormal_numbers(void) {
    const float zero = 0, kept = 0x1p-140f, other = 0x1.8p-127f;
    float W = kept;
    double wide = 0;
    void *const workspace = zeros(oplora_merge_workspace_bytes(1), 1);
    current = FLUSHED;
    IN_MODE(oplora_merge(&W, OPLORA_F32, &zero, &zero, 1, 1, 1, 1, 0, workspace));
    IN_MODE(oplora_round(&other, 1, OPLORA_F64, &wide));
    CHECK(W == kept && wide == 0x1.8p-127);
    free(workspace);
}

static void (*const works[])(void) = {generate_f32, generate_f64, start_f32, start_f64, exact_f32,      exact_f64,
                                      lean_f32,     lean_f64,     rate_f32,  rate_f64,  merge_and_round};

static void test_results_have_the_same_bits_in_every_mode(void) {
    uint64_t all = digest;
    for (size_t i = 0; i < sizeof works / sizeof *works; i++) {
        uint64_t first = 0;
        for (int run = 0; run < 2 * MODES; run++) {
            current = run / 2;
            splitter = run % 2 ? on_other_threads : NULL;
            noise_state = 7;
            digest = all;
            works[i]();
            if (run == 0) first = digest;
            if (digest != first) fprintf(stderr, "work %zu, mode %d, threads %d\n", i, current, run % 2);
            CHECK(digest == first);
        }
        all = first;
    }
    digest = all;
    CHECK(restored);
}

int main(void) {
    test_results_have_the_same_bits_in_every_mode();
    test_merge_keeps_subnormal_numbers();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

static T *TY(numbers)(int64_t n) { return zeros(n, sizeof(T)); }

/* Numbers whose products and squares are in part subnormal, and numbers that are so themselves. */
static void TY(fill)(T *x, int64_t n) {
    const T least = sizeof(T) == sizeof(float) ? (T)FLT_MIN : (T)DBL_MIN;
    const T root = sizeof(T) == sizeof(float) ? (T)0x1p-63 : (T)0x1p-511;
    for (int64_t i = 0; i < n; i++) {
        const double some = noise();
        x[i] = (T)(i % 7 == 3 ? some * least : i % 7 == 5 ? some * root : some);
    }
}

static T *TY(filled)(int64_t n) {
    T *const x = TY(numbers)(n);
    TY(fill)(x, n);
    return x;
}

static void TY(add)(const T *x, int64_t n) { add_to_digest(x, (size_t)n * sizeof(T)); }

static void TY(generate)(void) {
    enum { H = 9, Z = 5, N = 40000 };
    T *const z = TY(filled)(Z), *const W1 = TY(filled)(H * Z), *const c1 = TY(filled)(H), *const W2 = TY(filled)(H * N);
    T *const c2 = TY(filled)(N), *const g = TY(filled)(N), *const h = TY(numbers)(H), *const v = TY(numbers)(N);
    T *const dz = TY(numbers)(Z), *const dW1 = TY(numbers)(H * Z), *const dc1 = TY(numbers)(H);
    void *const workspace = zeros(oplora_generate_backward_workspace_bytes(H, Z, N), 1);
    for (int rows = 0; rows < 2; rows++) {
        const oplora_layout layout = rows ? OPLORA_ROWS : OPLORA_COLUMNS;
        IN_MODE(TY(oplora_generate)(z, W1, c1, W2, c2, layout, H, Z, N, h, v, splitter));
        TY(add)(h, H);
        TY(add)(v, N);
        IN_MODE(TY(oplora_generate_backward)(g, z, W1, c1, W2, layout, H, Z, N, dz, dW1, dc1, h, workspace, splitter));
        TY(add)(dz, Z);
        TY(add)(dW1, H * Z);
        TY(add)(dc1, H);
    }
    void *const all[] = {z, W1, c1, W2, c2, g, h, v, dz, dW1, dc1, workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void TY(start)(void) {
    enum { H = 3, Z = 5, N = 40000 };
    const oplora_rows rows[] = {{0, 20000}, {30000, N}};
    for (int kind = 0; kind < 2; kind++) {
        T *const parameters = TY(numbers)(oplora_size(H, Z, N));
        IN_MODE(TY(oplora_start)(parameters, H, Z, N, 5, 2, kind ? 1e-40 : 0.01, kind ? OPLORA_SIGN : OPLORA_UNIFORM,
                                 rows, 2, splitter));
        TY(add)(parameters, oplora_size(H, Z, N));
        free(parameters);
    }
}

static const oplora_adamw TY(adamw) = {2, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1};

/* A small layer and one that is too large for a single thread: measured, stepped twice, made anew. */
static void TY(exact)(void) {
    enum { LAYERS = 2, STEPS = 3 };
    static const int64_t sizes[LAYERS][3] = {{8, 5, 3000}, {17, 4, 131072}};
    TY(oplora_exact) layers[LAYERS];
    TY(oplora_factor) factors[LAYERS];
    T *g[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        const int64_t H = sizes[i][0], Z = sizes[i][1], N = sizes[i][2], size = oplora_size(H, Z, N);
        g[i] = TY(numbers)(N);
        factors[i] = (TY(oplora_factor)){.rows = N, .g = g[i], .out = TY(numbers)(N), .lr = 1e-3};
        factors[i].weight_decay = 0.1;
        layers[i] = (TY(oplora_exact)){.H = H, .Z = Z, .N = N, .parameters = TY(filled)(size)};
        layers[i].exp_avg = TY(numbers)(size), layers[i].exp_avg_sq = TY(numbers)(size);
        layers[i].decay = zeros(H, sizeof(double)), layers[i].moving = zeros(H, 1);
        for (int64_t j = 0; j < H; j++) layers[i].decay[j] = 1;
        layers[i].factors = &factors[i], layers[i].n_factors = 1;
        layers[i].report = zeros(oplora_exact_report_size(H), sizeof(double));
    }
    void *const workspace = zeros(TY(oplora_exact_workspace_bytes)(layers, LAYERS), 1);
    for (int step = 1; step <= STEPS; step++) {
        for (int i = 0; i < LAYERS; i++) {
            layers[i].adamw = TY(adamw);
            layers[i].adamw.step = step;
            TY(fill)(g[i], layers[i].N);
        }
        if (step % 2) IN_MODE(TY(oplora_exact_measure)(layers, LAYERS, workspace, splitter));
        IN_MODE(TY(oplora_exact_step)(layers, LAYERS, step % 2, workspace, splitter));
    }
    for (int i = 0; i < LAYERS; i++) TY(add)(factors[i].out, layers[i].N);
    IN_MODE(TY(oplora_exact_generate)(layers, LAYERS, workspace, splitter));
    for (int i = 0; i < LAYERS; i++) {
        const TY(oplora_exact) *const l = &layers[i];
        const int64_t size = oplora_size(l->H, l->Z, l->N);
        TY(add)(factors[i].out, l->N);
        TY(add)(l->parameters, size);
        TY(add)(l->exp_avg, size);
        TY(add)(l->exp_avg_sq, size);
        add_to_digest(l->report, (size_t)oplora_exact_report_size(l->H) * sizeof(double));
        void *const all[] = {g[i],          factors[i].out, l->parameters, l->exp_avg,
                             l->exp_avg_sq, l->decay,       l->moving,     l->report};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    }
    free(workspace);
}

/* A small layer, one of other ranks and one that is spread over the threads. */
static void TY(lean)(void) {
    enum { LAYERS = 3, STEPS = 3 };
    static const int64_t sizes[LAYERS][5] = {{8, 5, 3000, 2, 1}, {7, 3, 900, 3, 2}, {200, 8, 9300, 2, 1}};
    TY(oplora_lean) layers[LAYERS];
    TY(oplora_factor) factors[LAYERS];
    T *g[LAYERS];
    int64_t numbers[LAYERS], moments[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        const int64_t H = sizes[i][0], Z = sizes[i][1], N = sizes[i][2], d = sizes[i][3], k = sizes[i][4];
        g[i] = TY(numbers)(N);
        factors[i] = (TY(oplora_factor)){.rows = N, .g = g[i], .out = TY(numbers)(N), .random = 1, .lr = 1e-3};
        layers[i] = (TY(oplora_lean)){.H = H, .Z = Z, .N = N, .weight_rank = d, .moment_rank = k, .seed = 3};
        layers[i].layer = (uint32_t)i, layers[i].start = i % 2 ? OPLORA_SIGN : OPLORA_UNIFORM;
        numbers[i] = oplora_lean_numbers(H, Z, N, d, k), moments[i] = oplora_lean_moments(H, Z, N, d, k);
        layers[i].numbers = TY(numbers)(numbers[i]), layers[i].moments = zeros(moments[i], sizeof *layers[i].moments);
        layers[i].scalars = zeros(OPLORA_LEAN_SCALARS, sizeof(double));
        layers[i].factors = &factors[i], layers[i].n_factors = 1;
        layers[i].report = zeros(OPLORA_LEAN_REPORT, sizeof(double)), layers[i].dh = zeros(H, sizeof(double));
        IN_MODE(TY(oplora_lean_start)(&layers[i], 0.01, splitter));
    }
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(layers, LAYERS), 1);
    for (int step = 1; step <= STEPS; step++) {
        for (int i = 0; i < LAYERS; i++) {
            layers[i].adamw = TY(adamw);
            layers[i].adamw.step = step;
            TY(fill)(g[i], layers[i].N);
        }
        if (step % 2) IN_MODE(TY(oplora_lean_measure)(layers, LAYERS, workspace, splitter));
        IN_MODE(TY(oplora_lean_step)(layers, LAYERS, step % 2, workspace, splitter));
    }
    for (int i = 0; i < LAYERS; i++) {
        const TY(oplora_lean) *const l = &layers[i];
        TY(add)(factors[i].out, l->N);
        TY(add)(l->numbers, numbers[i]);
        add_to_digest(l->moments, (size_t)moments[i] * sizeof *l->moments);
        add_to_digest(l->scalars, OPLORA_LEAN_SCALARS * sizeof(double));
        add_to_digest(l->report, OPLORA_LEAN_REPORT * sizeof(double));
        void *const all[] = {g[i], factors[i].out, l->numbers, l->moments, l->scalars, l->report, l->dh};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    }
    free(workspace);
}

/* Of more tasks than a thread is woken for. */
static void TY(rate)(void) {
    enum { N = 40 * 2048 + 3, STEPS = 3 };
    T *const g = TY(numbers)(N), *const p = TY(filled)(N), *const base = TY(filled)(N);
    double report[OPLORA_RATE_REPORT];
    TY(oplora_factor) factor = {
        .rows = N, .g = g, .base = base, .out = p, .listens = 1, .lr = 0.3, .weight_decay = 0.1};
    TY(oplora_rate) l = {.N = N, .generated = TY(filled)(N), .exp_avg_sq = TY(numbers)(N), .factors = &factor};
    l.n_factors = 1, l.adamw = TY(adamw), l.rate = 1e-3, l.report = report;
    void *const workspace = zeros(TY(oplora_rate_workspace_bytes)(&l, 1), 1);
    for (int step = 1; step <= STEPS; step++) {
        l.adamw.step = step;
        TY(fill)(g, N);
        IN_MODE(TY(oplora_rate_measure)(&l, 1, workspace, splitter));
        IN_MODE(TY(oplora_rate_step)(&l, 1, workspace, splitter));
        add_to_digest(report, sizeof report);
    }
    TY(add)(p, N);
    TY(add)(l.generated, N);
    TY(add)(l.exp_avg_sq, N);
    void *const all[] = {g, p, base, l.generated, l.exp_avg_sq, workspace};
    for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
}

#endif
