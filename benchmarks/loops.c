/* loops: nanoseconds a row of the core's inner loops, on one thread and rows that are in the first-level cache.
 *
 *     loops [turns]
 *
 * Prints a row of JSON a loop: ns, the best of all turns; bytes, what it reads and writes of a row; divider_ns, what the
 * row's square roots and divisions take alone. bench_loops.py builds and runs this. */
#include "../csrc/core/dispatch.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { ROWS = 512, UNITS = 16, CALLS = 64 };

static struct {
    float g[ROWS], out[ROWS], base[ROWS], U[2][ROWS], s[ROWS], u[ROWS], many[UNITS][ROWS];
    oplora_moment_f32 A[ROWS], m[ROWS], S[ROWS], R[ROWS];
    uint32_t words[ROWS];
} at;
static const float *columns[UNITS];
static int bits[UNITS];
static float coefficients[UNITS], of_units[OPLORA_SIGNS];
static double sums[64];
static oplora_lean_constants_f32 lean = {0.1f, 0.999f, 0.001f, 1e-4f, 1, 1e-3f, 1e-8f, 1e-8f, 1.5f, 12345};
static oplora_lean_turn21_f32 turn = {
    .weight = {1e-3f, 1e-3f, 1e-3f, 1e-3f}, .u0 = {1, 0, 0, 0}, .u1 = {0, 1, 0, 0}, .A = {0.9f, 0.1f}};
static const oplora_adamw_constants_f32 adamw = {0.1f, 0.999f, 0.001f, 1, 1e-6f, 1e-8f, 1.5f};
static const oplora_rate_constants_f32 rate = {0.99f, 0.01f, 1e-8f, 0, 1e-6f, 0.1f, 1e-7f};
static const oplora_stream stream = {1, 1, 3};
static const oplora_kernels_f32 *k;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void roots(void) {
    for (int i = 0; i < ROWS; i++) at.u[i] = sqrtf(at.s[i]);
}
static void divisions(void) {
    for (int i = 0; i < ROWS; i++) at.u[i] = at.g[i] / at.s[i];
}
static void squares(void) {
    const float *const g = at.g;
    k->dot_double(&g, 1, at.g, ROWS, sums);
}
static void dot_double(void) { k->dot_double(columns, 4, at.g, ROWS, sums); }
static void dot(void) { k->dot(columns, UNITS, at.g, ROWS, sums); }
static void axpy(void) { k->axpy(columns, coefficients, UNITS, at.out, ROWS); }
static void adamw_column(void) { k->adamw(at.U[0], at.U[1], at.s, at.g, 0.5f, 0.5f, at.out, ROWS, &adamw); }
static void sign_words(void) { k->sign_words(&stream, 0, 0, ROWS, at.words); }
static void sign_dot(void) { k->sign_dot(at.words, bits, UNITS, at.g, ROWS, sums); }
static void sign_axpy(void) { k->sign_axpy(at.words, of_units, at.out, ROWS); }
static void uniform_dot(void) { sums[0] += k->uniform_dot(&stream, 1, 0, at.g, ROWS); }
static void uniform_axpy(void) { k->uniform_axpy(&stream, 1, 0, 1e-6f, at.out, ROWS); }
static void lean_reduce21(void) { k->lean_reduce21(at.A, at.R, at.U[0], at.U[1], at.g, ROWS, &lean, 1, 1, sums); }
static void lean_update21(void) {
    k->lean_update21(at.U[0], at.U[1], at.A, at.m, at.S, at.R, at.g, NULL, 0, ROWS, &turn, at.out);
}
static void rate_direction(void) { k->rate_direction(at.g, at.s, ROWS, &rate, at.u); }
static void rate_update(void) { k->rate_update(at.out, at.base, at.s, at.g, ROWS, &rate); }

/* bytes, roots and divisions of a row */
static const struct {
    const char *name;
    void (*run)(void);
    int bytes, roots, divisions;
} loops[] = {{"square root", roots, 8, 1, 0},
             {"division", divisions, 12, 0, 1},
             {"all: squares", squares, 4, 0, 0},
             {"rate: dot_double of 4 columns", dot_double, 16, 0, 0},
             {"exact: dot of 16 columns", dot, 4 * UNITS + 4, 0, 0},
             {"exact: adamw of one column", adamw_column, 36, 1, 1},
             {"generate: axpy of 16 columns", axpy, 4 * UNITS + 8, 0, 0},
             {"lean: lean_reduce21", lean_reduce21, 16, 1, 1},
             {"lean: lean_update21", lean_update21, 44, 2, 2},
             {"lean, signs: sign_words", sign_words, 4, 0, 0},
             {"lean, signs: sign_dot of 16", sign_dot, 8, 0, 0},
             {"lean, signs: sign_axpy of 16", sign_axpy, 12, 0, 0},
             {"lean, uniform: uniform_dot of one", uniform_dot, 4, 0, 0},
             {"lean, uniform: uniform_axpy of one", uniform_axpy, 8, 0, 0},
             {"rate: rate_direction", rate_direction, 12, 1, 1},
             {"rate: rate_update", rate_update, 28, 1, 1}};
enum { LOOPS = sizeof loops / sizeof *loops };

static void fill(void) {
    uint32_t x = 1;
    for (int i = 0; i < ROWS; i++) {
        x = x * 1664525u + 1013904223u;
        const float some = (float)(x >> 8) / (1 << 24) - 0.5f;
        at.g[i] = 1e-3f * some;
        at.base[i] = at.out[i] = at.U[0][i] = some;
        at.U[1][i] = 0.5f - some;
        at.s[i] = 1e-6f + some * some;
        at.A[i] = at.m[i] = 0x3f00;
        at.S[i] = at.R[i] = 0x3c00;
        for (int j = 0; j < UNITS; j++) at.many[j][i] = some;
    }
    for (int j = 0; j < UNITS; j++) {
        columns[j] = at.many[j];
        bits[j] = 2 * j;
        coefficients[j] = of_units[bits[j]] = 1e-6f;
    }
    turn.constants = lean;
}

int main(int count, char **arguments) {
    const int turns = count > 1 ? atoi(arguments[1]) : 200;
    double best[LOOPS];
    k = oplora_dispatch_f32();
    const uint64_t mode = oplora_set_mode(OPLORA_FLUSHED);
    for (int i = 0; i < LOOPS; i++) best[i] = INFINITY;
    for (int t = 0; t < turns; t++)
        for (int i = 0; i < LOOPS; i++) {
            fill();
            loops[i].run();
            const double begin = now();
            for (int call = 0; call < CALLS; call++) loops[i].run();
            const double ns = (now() - begin) / CALLS / ROWS;
            if (ns < best[i]) best[i] = ns;
        }
    oplora_restore_mode(mode);
    for (int i = 0; i < LOOPS; i++)
        printf("{\"loop\": \"%s\", \"ns\": %.4f, \"bytes\": %d, \"divider_ns\": %.4f, \"isa\": \"%s\"}\n",
               loops[i].name, best[i], loops[i].bytes, loops[i].roots * best[0] + loops[i].divisions * best[1],
               oplora_isa());
    return 0;
}
