/* oplora_rate: a step is its formula, sums are of what listens, refusals change nothing, no bit depends on threads; and the
 * rule that finds the rate. */
#include "../../csrc/shared/find_rate.h"
#include "check.h"
#include "core_check.h"
#include "oplora_core.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_A = 40 * 2048 + 3, ROWS_B = 129, N = ROWS_A + ROWS_B };

typedef struct {
    double g[N], p[N], v[N], s[N], report[OPLORA_RATE_REPORT];
    oplora_factor_f64 factors[2];
    oplora_rate_f64 layer;
} problem;

static void begin(problem *x) {
    memset(x, 0, sizeof *x);
    noise_state = 1;
    for (int i = 0; i < N; i++) {
        x->g[i] = noise();
        x->p[i] = noise();
        x->v[i] = noise();
        x->s[i] = 0.5 + 0.25 * noise();
    }
    x->factors[0] = (oplora_factor_f64){.rows = ROWS_A, .g = x->g, .out = x->p, .lr = 0.5, .weight_decay = 0.1};
    x->factors[1] = (oplora_factor_f64){.rows = ROWS_B, .g = x->g + ROWS_A, .out = x->p + ROWS_A, .lr = 1};
    x->factors[1].listens = 1;
    x->layer = (oplora_rate_f64){.N = N, .generated = x->v, .exp_avg_sq = x->s, .factors = x->factors, .n_factors = 2};
    x->layer.adamw = (oplora_adamw){.weight_ratio = 1, .beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8, .step = 7};
    x->layer.rate = 0.01;
    x->layer.report = x->report;
}

static oplora_status call(problem *x, int steps, oplora_parallel_fn par) {
    void *const workspace = malloc((size_t)oplora_rate_workspace_bytes_f64(&x->layer, 1));
    oplora_status status = oplora_rate_measure_f64(&x->layer, 1, workspace, par);
    if (steps && status == OPLORA_OK) status = oplora_rate_step_f64(&x->layer, 1, workspace, par);
    free(workspace);
    return status;
}

static double direction(const problem *x, int i) {
    const double newest =
        i < ROWS_A ? 4.0 / (7 + 3) : 1.0 / 7; /* of a gradient that grows, of one that is listened to */
    const double s = (1 - newest) * x->s[i] + newest * (x->g[i] * x->g[i]);
    return x->g[i] / (sqrt(s) + 1e-8);
}

static void test_sums(void) {
    static problem x;
    double squares = 0, signal = 0, scale = 0, recent = 0;
    begin(&x);
    for (int i = 0; i < N; i++) squares += x.g[i] * x.g[i];
    for (int i = ROWS_A; i < N; i++) {
        signal += x.g[i] * x.v[i];
        scale += x.g[i] * direction(&x, i);
        recent += x.g[i] * (x.v[i] - x.p[i]);
    }
    CHECK(call(&x, 0, NULL) == OPLORA_OK);
    CHECK(fabs(x.report[0] - squares) < 1e-12 * squares && x.report[1] == 0);
    CHECK(fabs(x.report[2] - signal) < 1e-9 && fabs(x.report[3] - scale) < 1e-9);
    CHECK(fabs(x.report[4] - recent) < 1e-9);
}

static void test_base_is_taken_off(void) {
    static problem x;
    static double base[ROWS_B];
    begin(&x);
    memcpy(base, x.v + ROWS_A, sizeof base);
    x.factors[1].base = base;
    CHECK(call(&x, 0, NULL) == OPLORA_OK);
    CHECK(fabs(x.report[2]) < 1e-12);
}

static void test_step(void) {
    static problem x, before;
    begin(&x);
    begin(&before);
    CHECK(call(&x, 1, NULL) == OPLORA_OK);
    for (int i = 0; i < N; i++) {
        const int f = i >= ROWS_A;
        const double eta = 0.01 * before.factors[f].lr, c = 9.0 / 15;
        const double u = direction(&before, i) + before.factors[f].weight_decay * before.p[i];
        const double v = before.v[i] - eta * u, average = (before.p[i] - 0.1 * before.v[i]) / 0.9;
        const double p = 0.1 * v + 0.9 * (average + c * (v - average));
        CHECK(fabs(x.v[i] - v) < 1e-14 && fabs(x.p[i] - p) < 1e-13);
    }
}

static void test_refusal_changes_nothing(void) {
    static problem x, before;
    begin(&x);
    x.g[ROWS_A + 5] = NAN;
    memcpy(&before, &x, sizeof x);
    CHECK(call(&x, 1, NULL) == OPLORA_ENONFINITE);
    CHECK(x.report[1] == 1);
    CHECK(!memcmp(x.p, before.p, sizeof x.p) && !memcmp(x.v, before.v, sizeof x.v));
    CHECK(!memcmp(x.s, before.s, sizeof x.s));
}

static void test_arguments(void) {
    static problem x;
    begin(&x);
    x.layer.N = N - 1;
    CHECK(oplora_rate_workspace_bytes_f64(&x.layer, 1) == -1);
    begin(&x);
    x.factors[0].out = NULL;
    CHECK(oplora_rate_measure_f64(&x.layer, 1, &x, NULL) == OPLORA_ENULL);
    begin(&x);
    x.layer.rate = INFINITY;
    CHECK(oplora_rate_step_f64(&x.layer, 1, &x, NULL) == OPLORA_EVALUE);
}

static oplora_found found(double rate) { return (oplora_found){.rate = rate, .pace = 0.7}; }

static void find(oplora_found *f, double signal, double gain, double recent) {
    double numbers[OPLORA_FOUND];
    const double heard[] = {0.25 * signal, gain, 0.5 * recent, 0.75 * signal, 0, 0.5 * recent}; /* of two layers */
    memcpy(numbers, f, sizeof numbers);
    CHECK(oplora_find_rate(numbers, heard, 2) == OPLORA_OK);
    memcpy(f, numbers, sizeof numbers);
}

static void test_exp(void) {
    for (int i = -100; i <= 100; i++) CHECK(fabs(oplora_exp_of_small(i / 100.0) / exp(i / 100.0) - 1) < 1e-15);
}

static void test_rate_grows_while_the_signal_is_below_zero(void) {
    oplora_found f = found(1e-4);
    find(&f, 0, 1, 0); /* the first step tells nothing: v is the start */
    CHECK(f.rate == 1e-4 && f.steps == 1);
    for (int i = 1; i <= 5; i++) {
        find(&f, -1, 1, -1);
        CHECK(fabs(f.rate / (1e-4 * exp(0.7 * i)) - 1) < 1e-14 && f.pace == 0.7 && f.turned == 0);
    }
}

static void test_rate_is_bounded_and_stays_a_number(void) {
    oplora_found f = found(9);
    for (int i = 0; i < 3; i++) find(&f, -1, 1, -1);
    CHECK(f.rate == 10);
    find(&f, -INFINITY, INFINITY, -1); /* sums beyond double's range tell no way */
    CHECK(f.rate == 10);
}

static void test_turn_halves_the_pace_and_is_remembered(void) {
    oplora_found f = found(1e-2);
    for (int i = 0; i < 9; i++) find(&f, -1, 1, -1);
    const double before = f.rate;
    find(&f, 100, 1, 100);
    CHECK(f.pace == 0.35 && f.turned == 10 && f.steps == 10);
    CHECK(fabs(f.rate / (before * exp(-2.0 / 9)) - 1) < 1e-14); /* downwards at 2 / t */
}

static void test_rate_does_not_fall_while_the_latest_steps_lead_down(void) {
    oplora_found f = found(1e-2);
    for (int i = 0; i < 9; i++) find(&f, 1, 1, -1);
    CHECK(f.rate == 1e-2);
}

static void test_aim_of_a_long_run_is_four_tenths_of_the_scale(void) {
    for (int i = -1; i <= 1; i++) {
        oplora_found early = found(1e-2), late = found(1e-2);
        early.steps = 200, late.steps = 400; /* half of the aim is there at 400 */
        find(&early, i * 1e-4, 1, 1);
        find(&late, i * 1e-4 + 0.2e-2, 1, 1);
        const double falls = 2 * i * 1e-2 * (i < 0 ? 0.7 : 2.0 / 200), of_late = i < 0 ? 1 : 0.5;
        CHECK(fabs(log(early.rate / 1e-2) + falls) < 1e-14);
        CHECK(fabs(log(late.rate / 1e-2) + falls * of_late) < 1e-14);
    }
}

static void test_arguments_of_find(void) {
    double numbers[OPLORA_FOUND] = {1e-4};
    CHECK(oplora_find_rate(NULL, numbers, 0) == OPLORA_ENULL);
    CHECK(oplora_find_rate(numbers, NULL, 1) == OPLORA_ENULL);
    CHECK(oplora_find_rate(numbers, NULL, -1) == OPLORA_ESIZE);
    CHECK(oplora_find_rate(numbers, NULL, 0) == OPLORA_OK && numbers[0] == 1e-4);
}

static void test_threads(void) {
    static problem x, y;
    begin(&x);
    CHECK(call(&x, 1, NULL) == OPLORA_OK);
    for (int i = 1; i < SPLITS; i++) {
        begin(&y);
        CHECK(call(&y, 1, splits[i]) == OPLORA_OK);
        CHECK(!memcmp(x.p, y.p, sizeof x.p) && !memcmp(x.report, y.report, sizeof x.report));
    }
    CHECK(call(&y, 0, failing) == OPLORA_EPARALLEL);
    add_to_digest(x.p, sizeof x.p);
    add_to_digest(x.report, sizeof x.report);
}

int main(void) {
    test_sums();
    test_base_is_taken_off();
    test_step();
    test_refusal_changes_nothing();
    test_arguments();
    test_exp();
    test_rate_grows_while_the_signal_is_below_zero();
    test_rate_is_bounded_and_stays_a_number();
    test_turn_halves_the_pace_and_is_remembered();
    test_rate_does_not_fall_while_the_latest_steps_lead_down();
    test_aim_of_a_long_run_is_four_tenths_of_the_scale();
    test_arguments_of_find();
    test_threads();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}
