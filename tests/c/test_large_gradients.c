/* Finite gradients of any size, in every state and also without eps: parameters, moments and factors stay finite, no step is
 * longer than one of ordinary gradients, what is beyond the largest gradient that counts counts as it, and later gradients are followed. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "oplora_core.h"
#include "rows.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Layers of each state: one thread's work, and spread over the threads; of lean also at ranks of no kernel's own. */
static const struct {
    char state;
    int64_t H, Z, N, d, k;
} kinds[] = {{'e', 8, 5, 300, 0, 0},          {'e', 17, 4, 131072, 0, 0}, {'l', 8, 5, 300, 2, 1},
             {'l', 7, 3, 90, 3, 2},           {'l', 200, 8, 9300, 2, 1},  {'r', 1, 1, 300, 0, 0},
             {'r', 1, 1, 40 * 2048 + 3, 0, 0}};
enum { KINDS = sizeof kinds / sizeof *kinds };
static const double LR = 1e-3;

#define OPLORA_TEMPLATE "../../tests/c/test_large_gradients.c"
#include "each_type.h"

int main(void) {
    test_type_f32();
    test_type_f64();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

/* One layer of one factor, of any state. Its moments forget within a few steps, the first before the second. */
typedef struct {
    char state;
    int64_t N, n_numbers, n_moments, report_size;
    T *g, *out, *numbers, *avg, *avg_sq; /* lean: all of `numbers`; rate: generated and avg_sq; exact: all three */
    TY(oplora_moment) *moments;
    double *report, *extra, *dh; /* decay, or scalars */
    uint8_t *moving;
    TY(oplora_factor) factor;
    oplora_adamw adamw;
    TY(oplora_exact) exact;
    TY(oplora_lean) lean;
    TY(oplora_rate) rate;
} TY(layer);

static void TY(make)(TY(layer) *l, int kind) {
    const int64_t H = kinds[kind].H, Z = kinds[kind].Z, N = kinds[kind].N, d = kinds[kind].d, k = kinds[kind].k;
    memset(l, 0, sizeof *l);
    l->state = kinds[kind].state, l->N = N;
    l->g = zeros(N, sizeof(T)), l->out = zeros(N, sizeof(T));
    l->adamw = (oplora_adamw){.weight_ratio = 1, .hidden_lr = LR / 10, .beta1 = 0.5, .beta2 = 0.5, .eps = 1e-8};
    l->factor = (TY(oplora_factor)){.rows = N, .g = l->g, .out = l->out, .random = 1, .listens = 1, .lr = LR};
    l->n_numbers = l->state == 'e' ? oplora_size(H, Z, N) : l->state == 'l' ? oplora_lean_numbers(H, Z, N, d, k) : N;
    l->n_moments = l->state == 'l' ? oplora_lean_moments(H, Z, N, d, k) : 0;
    l->report_size = l->state == 'e' ? oplora_exact_report_size(H) : OPLORA_LEAN_REPORT;
    l->numbers = zeros(l->n_numbers, sizeof(T));
    l->avg = zeros(l->n_numbers, sizeof(T)), l->avg_sq = zeros(l->n_numbers, sizeof(T));
    l->moments = zeros(l->n_moments + 1, sizeof *l->moments);
    l->report = zeros(l->report_size, sizeof(double)), l->dh = zeros(H, sizeof(double));
    l->extra = zeros(H + OPLORA_LEAN_SCALARS, sizeof(double)), l->moving = zeros(H, 1);
    if (l->state == 'e') {
        const oplora_rows rows = {0, N};
        l->exact = (TY(oplora_exact)){H,        Z,         N,          l->numbers, l->avg,   l->avg_sq,
                                      l->extra, l->moving, &l->factor, 1,          l->adamw, l->report};
        CHECK(TY(oplora_start)(l->numbers, H, Z, N, 5, 1, 0.5, OPLORA_UNIFORM, &rows, 1, NULL) == OPLORA_OK);
        for (int64_t j = 0; j < H; j++) l->extra[j] = 1;
    } else if (l->state == 'l') {
        l->lean = (TY(oplora_lean)){H,          Z,          N,        d,          k, 5,        1,         OPLORA_SIGN,
                                    l->numbers, l->moments, l->extra, &l->factor, 1, l->adamw, l->report, l->dh};
        CHECK(TY(oplora_lean_start)(&l->lean, 0.5, NULL) == OPLORA_OK);
    } else
        l->rate = (TY(oplora_rate)){N, l->numbers, l->avg_sq, &l->factor, 1, l->adamw, 1, l->report};
}

static void TY(unmake)(const TY(layer) *l) {
    void *const all[] = {l->g,       l->out,    l->numbers, l->avg,   l->avg_sq,
                         l->moments, l->report, l->dh,      l->extra, l->moving};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void TY(step)(TY(layer) *l, int measures) {
    const oplora_parallel_fn par = measures ? split_backwards : NULL;
    void *workspace;
    l->adamw.step++;
    if (l->state == 'e') {
        l->exact.adamw = l->adamw;
        workspace = zeros(TY(oplora_exact_workspace_bytes)(&l->exact, 1), 1);
        if (measures) CHECK(TY(oplora_exact_measure)(&l->exact, 1, workspace, par) == OPLORA_OK);
        CHECK(TY(oplora_exact_step)(&l->exact, 1, measures, workspace, par) == OPLORA_OK);
    } else if (l->state == 'l') {
        l->lean.adamw = l->adamw;
        workspace = zeros(TY(oplora_lean_workspace_bytes)(&l->lean, 1), 1);
        if (measures) CHECK(TY(oplora_lean_measure)(&l->lean, 1, workspace, par) == OPLORA_OK);
        CHECK(TY(oplora_lean_step)(&l->lean, 1, measures, workspace, par) == OPLORA_OK);
    } else {
        l->rate.adamw = l->adamw;
        workspace = zeros(TY(oplora_rate_workspace_bytes)(&l->rate, 1), 1);
        CHECK(TY(oplora_rate_measure)(&l->rate, 1, workspace, par) == OPLORA_OK);
        for (int i = 2; i < OPLORA_RATE_REPORT; i++) CHECK(isfinite(l->report[i])); /* by which the rate is found */
        CHECK(TY(oplora_rate_step)(&l->rate, 1, workspace, par) == OPLORA_OK);
    }
    free(workspace);
}

static double TY(moment)(TY(oplora_moment) stored) {
    if (sizeof stored == sizeof(double)) return (double)stored;
    const uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static int TY(is_finite)(const TY(layer) *l) {
    int finite = 1;
    for (int64_t i = 0; i < l->N; i++) finite &= isfinite(l->out[i]);
    for (int64_t i = 0; i < l->n_numbers; i++)
        finite &= isfinite(l->numbers[i]) && isfinite(l->avg[i]) && isfinite(l->avg_sq[i]);
    for (int64_t i = 0; i < l->n_moments; i++) finite &= isfinite(TY(moment)(l->moments[i]));
    for (int64_t i = 0; i < OPLORA_LEAN_SCALARS; i++) finite &= isfinite(l->extra[i]);
    return finite;
}

/* Entries of size `scale`: all, or one in a hundred among ordinary ones. */
static void TY(set_gradients)(TY(layer) *l, double scale, int few) {
    for (int64_t i = 0; i < l->N; i++) {
        const double some = noise(), sign = some < 0 ? -1 : 1;
        l->g[i] = (T)(few && i % 100 ? some : sign * scale);
    }
}

static void TY(test_finite_gradients_leave_all_finite)(int kind) {
    static const double scales[] = {1e15,  1e19,  7.5e36, FLT_MAX, 0,      1e-45,
                                    1e-30, 1e-19, 1e154,  DBL_MAX, 1e-320, 1e-154};
    for (size_t s = 0; s < (sizeof(T) == sizeof(float) ? 8 : 12); s++)
        for (int way = 0; way < 8; way++) {
            TY(layer) l;
            TY(make)(&l, kind);
            if (way / 4) l.adamw.eps = 0;
            T *const before = zeros(l.N, sizeof(T));
            for (int step = 1; step <= 3; step++) {
                double longest = 0;
                memcpy(before, l.out, (size_t)l.N * sizeof(T));
                TY(set_gradients)(&l, step == 2 ? 1 : scales[s], way % 2);
                TY(step)(&l, way / 2 % 2);
                for (int64_t i = 0; i < l.N; i++) longest = fmax(longest, fabs((double)l.out[i] - before[i]));
                CHECK(step == 1 ||
                      longest <= 1000 * LR); /* the first also brings exact state's start into the factor */
            }
            CHECK(TY(is_finite)(&l));
            add_to_digest(l.out, (size_t)l.N * sizeof(T));
            free(before);
            TY(unmake)(&l);
        }
}

/* Two steps of all that is beyond the largest gradient that counts, and of what counts: the same bits. */
static void TY(test_what_is_beyond_the_largest_counts_as_it)(int kind) {
    TY(layer) l[2];
    const uint32_t seed = noise_state;
    for (int i = 0; i < 2; i++) {
        noise_state = seed;
        TY(make)(&l[i], kind);
        for (int step = 0; step < 2; step++) {
            TY(set_gradients)(&l[i], TY(oplora_most_gradient), 0);
            for (int64_t k = 0; i && k < l[i].N; k++) l[i].g[k] *= (T)(k % 5 + 1);
            TY(step)(&l[i], step);
        }
    }
    CHECK(!memcmp(l[0].out, l[1].out, (size_t)l[0].N * sizeof(T)));
    CHECK(!memcmp(l[0].numbers, l[1].numbers, (size_t)l[0].n_numbers * sizeof(T)));
    CHECK(!memcmp(l[0].avg_sq, l[1].avg_sq, (size_t)l[0].n_numbers * sizeof(T)));
    CHECK(!memcmp(l[0].moments, l[1].moments, (size_t)l[0].n_moments * sizeof *l[0].moments));
    for (int i = 0; i < 2; i++) TY(unmake)(&l[i]);
}

/* Once the second moment of a very large gradient has faded, ordinary ones are followed at AdamW's pace. */
static void TY(test_later_gradients_are_followed)(int kind) {
    enum { FADES = sizeof(T) == sizeof(float) ? 250 : 1200, MORE = 10 };
    TY(layer) l;
    TY(make)(&l, kind);
    TY(set_gradients)(&l, sizeof(T) == sizeof(float) ? FLT_MAX : DBL_MAX, 0);
    TY(step)(&l, 0);
    double moved = 0;
    for (int step = 1; step <= FADES + MORE; step++) {
        for (int64_t i = 0; i < l.N; i++) {
            if (step > FADES) moved += l.out[i] / (double)l.N;
            l.g[i] = 1;
        }
        TY(step)(&l, 0);
        for (int64_t i = 0; step > FADES && i < l.N; i++) moved -= l.out[i] / (double)l.N;
    }
    CHECK(moved >= 0.3 * MORE * LR);
    CHECK(TY(is_finite)(&l));
    TY(unmake)(&l);
}

static void TY(test_type)(void) {
    for (int kind = 0; kind < KINDS; kind++) {
        noise_state = 1;
        TY(test_finite_gradients_leave_all_finite)(kind);
        TY(test_what_is_beyond_the_largest_counts_as_it)(kind);
        if (kinds[kind].N < 1000) TY(test_later_gradients_are_followed)(kind);
    }
}

#endif
