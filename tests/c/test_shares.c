/* Factors that processes divide: a layer's rows as those of several, whose sums are added up, against the whole layer.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "lean_shapes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SHARES = 3 };

/* Rows of a factor that one process has. */
typedef struct {
    int64_t first, run, stride, runs;
    int counts;
} share_of_factor;

/* Of three factors of a layer the rows of each process: runs at places where no random number's block begins, columns of
 * a matrix (several runs), rows that two processes have (one counts them), one row that stands for none. */
static const struct {
    shape like;
    int n;
    share_of_factor shares[MOST_SHARES][3];
} divided[] = {
    {{32, 16, {2048, 333, 0}, 1, 2, 2, 1, OPLORA_SIGN},
     2,
     {{{0, 1027, 0, 1, 1}, {0, 200, 0, 1, 1}}, {{1027, 1021, 0, 1, 1}, {200, 133, 0, 1, 1}}}},
    {{70, 3, {5000, 600, 90}, 5, 1, 3, 2, OPLORA_SIGN},
     3,
     {{{0, 250, 1000, 5, 1}, {0, 600, 0, 1, 1}, {0, 45, 0, 1, 1}},
      {{250, 250, 1000, 5, 1}, {0, 1, 0, 1, 0}, {45, 45, 0, 1, 1}},
      {{500, 500, 1000, 5, 1}, {0, 600, 0, 1, 0}, {0, 1, 0, 1, 0}}}},
    {{33, 40, {700, 1300, 0}, 3, 3, 2, 1, OPLORA_UNIFORM},
     2,
     {{{0, 65, 0, 1, 1}, {0, 129, 130, 10, 1}}, {{65, 635, 0, 1, 1}, {129, 1, 130, 10, 1}}}},
    {{40, 4, {200000, 640, 0}, 1, 0, 2, 1, OPLORA_UNIFORM}, /* spread over threads */
     2,
     {{{0, 99999, 0, 1, 1}, {0, 640, 0, 1, 1}}, {{99999, 100001, 0, 1, 1}, {0, 1, 0, 1, 0}}}},
};
enum { DIVIDED = sizeof divided / sizeof *divided };

static int64_t whole_entry(const share_of_factor *s, int64_t i) {
    return s->first + i / s->run * s->stride + i % s->run;
}

#define OPLORA_TEMPLATE "../../tests/c/test_shares.c"
#include "each_type.h"

int main(void) {
    noise_state = 1;
    test_type_f32();
    test_type_f64();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

typedef struct {
    TY(made) made;
    oplora_place places[3];
    const share_of_factor *shares;
} TY(share);

/* A process' share of a layer, begun as it would. */
static void TY(make_share)(TY(share) *to, const TY(made) *whole, const shape *like, const share_of_factor *shares,
                           uint32_t index) {
    shape own = *like;
    for (int f = 0; f < whole->layer.n_factors; f++) own.rows[f] = shares[f].run * shares[f].runs;
    own.based = 0;
    TY(make)(&to->made, &own, index);
    to->shares = shares;
    for (int f = 0; f < whole->layer.n_factors; f++) {
        const share_of_factor *const s = &shares[f];
        to->places[f] = (oplora_place){like->rows[f], s->first, s->run, s->stride, s->counts};
        to->made.factors[f].place = &to->places[f];
        if (whole->factors[f].base) {
            T *const base = zeros(own.rows[f], sizeof(T));
            for (int64_t i = 0; i < own.rows[f]; i++) base[i] = whole->factors[f].base[whole_entry(s, i)];
            to->made.factors[f].base = base;
        }
    }
    CHECK(TY(oplora_lean_start)(&to->made.layer, 0.3, NULL) == OPLORA_OK);
    for (int f = 0; f < whole->layer.n_factors; f++)
        for (int64_t i = 0; to->made.factors[f].base && i < own.rows[f]; i++)
            to->made.factors[f].out[i] += to->made.factors[f].base[i];
}

static void TY(share_gradients)(TY(share) *to, const TY(made) *whole) {
    to->made.layer.adamw = whole->layer.adamw;
    for (int f = 0; f < whole->layer.n_factors; f++) {
        const TY(oplora_factor) *const factor = &whole->factors[f];
        to->made.factors[f].lr = factor->lr, to->made.factors[f].weight_decay = factor->weight_decay;
        for (int64_t i = 0; i < to->made.factors[f].rows; i++)
            ((T *)to->made.factors[f].g)[i] = factor->g[whole_entry(&to->shares[f], i)];
    }
}

/* Whether entry i of a share's factor is one row that stands for none. */
static int TY(stands_for_none)(const TY(share) *share, int64_t f) {
    return !share->shares[f].counts && share->shares[f].run == 1;
}

/* How far a share's factors are from the whole layer's. */
static double TY(factors_apart)(const TY(share) *share, const TY(made) *whole) {
    double most = 0;
    for (int64_t f = 0; f < whole->layer.n_factors; f++)
        for (int64_t i = 0; !TY(stands_for_none)(share, f) && i < share->made.factors[f].rows; i++) {
            const int64_t at = whole_entry(&share->shares[f], i);
            most = fmax(most, fabs((double)share->made.factors[f].out[i] - whole->factors[f].out[at]));
        }
    return most;
}

/* Whether a share's rows, and all that every process has, have the bits of the whole layer's. */
static int TY(has_bits)(const TY(share) *share, const TY(made) *whole) {
    const TY(oplora_lean) *const a = &share->made.layer, *const b = &whole->layer;
    const TY(view) mine = TY(view_of)(a), theirs = TY(view_of)(b);
    const int64_t rest = share->made.n_numbers - a->weight_rank * a->N;
    const int64_t rest_moments = share->made.n_moments - (a->moment_rank + 3) * a->N;
    int same = TY(factors_apart)(share, whole) == 0;
    for (int64_t f = 0, row = 0, whole_row = 0; f < a->n_factors; f++) {
        for (int64_t i = 0; !TY(stands_for_none)(share, f) && i < a->factors[f].rows; i++) {
            const int64_t here = row + i, there = whole_row + whole_entry(&share->shares[f], i);
            for (int64_t c = 0; c < a->weight_rank; c++) same &= mine.U[c * a->N + here] == theirs.U[c * b->N + there];
            for (int64_t c = 0; c < a->moment_rank + 3; c++) /* A, m, S, R */
                same &= mine.A[c * a->N + here] == theirs.A[c * b->N + there];
        }
        row += a->factors[f].rows, whole_row += b->factors[f].rows;
    }
    return same && !memcmp(mine.U1, theirs.U1, (size_t)rest * sizeof(T)) &&
           !memcmp(mine.A1, theirs.A1, (size_t)rest_moments * sizeof *mine.A1) &&
           !memcmp(a->scalars, b->scalars, OPLORA_LEAN_SCALARS * sizeof(double));
}

typedef struct {
    TY(oplora_lean) layer;
    void *workspace;
    double *sums;
    int64_t n_sums;
} TY(call);

static TY(call) TY(begin_call)(const TY(made) *f) {
    const int64_t n = oplora_lean_sums_size(f->layer.H, f->layer.weight_rank, f->layer.moment_rank);
    return (TY(call)){f->layer, zeros(TY(oplora_lean_workspace_bytes)(&f->layer, 1), 1), zeros(n, 8), n};
}

static void TY(end_call)(TY(call) *call) {
    free(call->workspace);
    free(call->sums);
}

/* One step of the shares. The sums are theirs or, with `given`, the whole layer's. */
static void TY(step_shares)(TY(share) *shares, int n, const TY(made) *whole, int given) {
    TY(call) calls[MOST_SHARES], all = TY(begin_call)(whole);
    const int64_t p = all.layer.weight_rank + all.layer.moment_rank + 1;
    for (int s = 0; s < n; s++) calls[s] = TY(begin_call)(&shares[s].made);
    for (int steps = 0; steps < 2; steps++) {
        double *const sums = zeros(all.n_sums, 8), report[2] = {0};
        CHECK(TY(oplora_lean_reduce)(&all.layer, 1, steps, all.sums, all.workspace, splits[1]) == OPLORA_OK);
        for (int s = 0; s < n; s++) {
            CHECK(TY(oplora_lean_reduce)(&calls[s].layer, 1, steps, calls[s].sums, calls[s].workspace, splits[s]) ==
                  OPLORA_OK);
            for (int64_t i = 0; i < all.n_sums; i++) sums[i] += calls[s].sums[i];
            for (int i = 0; i < 2; i++) report[i] += calls[s].layer.report[i];
        }
        double largest = 0;
        for (int64_t i = 0; i < all.n_sums; i++) largest = fmax(largest, fabs(all.sums[i]));
        for (int64_t i = steps ? 0 : p * p; given && i < (steps ? p * p : all.n_sums); i++)
            CHECK(fabs(sums[i] - all.sums[i]) <= (TY(is_float) ? 1e-6 : 1e-14) * largest);
        if (!steps) CHECK(fabs(report[0] - all.layer.report[0]) <= 1e-14 * all.layer.report[0]);
        for (int s = 0; s < n; s++) {
            memcpy(calls[s].sums, given ? all.sums : sums, (size_t)all.n_sums * 8);
            if (!steps) memcpy(calls[s].layer.report, given ? all.layer.report : report, sizeof report);
            CHECK(TY(oplora_lean_finish)(&calls[s].layer, 1, steps, calls[s].sums, calls[s].workspace, splits[s]) ==
                  OPLORA_OK);
        }
        if (!steps) /* which the whole layer's second half is to find */
            CHECK(TY(oplora_lean_finish)(&all.layer, 1, 0, all.sums, all.workspace, NULL) == OPLORA_OK);
        free(sums);
    }
    for (int s = 0; s < n; s++) TY(end_call)(&calls[s]);
    TY(end_call)(&all);
}

/* A whole layer's halves are its measurement and its step to the bit; and given its sums, shares of its rows are. */
static void TY(test_shares)(int which, int given) {
    const shape *const like = &divided[which].like;
    const int n = divided[which].n;
    TY(made) whole;
    TY(share) shares[MOST_SHARES];
    TY(make)(&whole, like, (uint32_t)which);
    for (int s = 0; s < n; s++) {
        TY(make_share)(&shares[s], &whole, like, divided[which].shares[s], (uint32_t)which);
        CHECK(TY(has_bits)(&shares[s], &whole));
    }
    for (int64_t step = 1; step <= 9; step++) {
        TY(set_gradients)(&whole, step, 1);
        for (int s = 0; s < n; s++) TY(share_gradients)(&shares[s], &whole);
        TY(step_shares)(shares, n, &whole, given);
        TY(call) call = TY(begin_call)(&whole);
        CHECK(TY(oplora_lean_step)(&call.layer, 1, step % 2, call.workspace, NULL) == OPLORA_OK);
        TY(end_call)(&call);
        for (int s = 0; s < n; s++) {
            CHECK(TY(factors_apart)(&shares[s], &whole) <= (TY(is_float) ? 1e-3 : 1e-13));
            if (given) CHECK(TY(has_bits)(&shares[s], &whole));
            if (given)
                CHECK(!memcmp(shares[s].made.layer.report, whole.layer.report, OPLORA_LEAN_REPORT * sizeof(double)));
            add_to_digest(shares[s].made.layer.numbers, (size_t)shares[s].made.n_numbers * sizeof(T));
        }
    }
    TY(unmake)(&whole);
    for (int s = 0; s < n; s++) TY(unmake)(&shares[s].made);
}

/* The first half changes nothing, and neither does a second that is refused. */
static void TY(test_first_half_changes_nothing)(void) {
    TY(made) f, twin;
    const uint32_t seed = noise_state;
    TY(make)(&f, &divided[0].like, 0);
    noise_state = seed;
    TY(make)(&twin, &divided[0].like, 0);
    for (int64_t step = 1; step <= 2; step++) { /* the second with a past */
        const uint32_t now = noise_state;
        TY(set_gradients)(&f, step, 1);
        noise_state = now;
        TY(set_gradients)(&twin, step, 1);
        TY(call) call = TY(begin_call)(&f);
        for (int steps = 0; steps < 2; steps++) {
            CHECK(TY(oplora_lean_reduce)(&call.layer, 1, steps, call.sums, call.workspace, NULL) == OPLORA_OK);
            CHECK(TY(same_state)(&f, &twin));
        }
        call.layer.report[1] = 1; /* as another process found */
        CHECK(TY(oplora_lean_reduce)(&call.layer, 1, 1, call.sums, call.workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(TY(oplora_lean_finish)(&call.layer, 1, 1, call.sums, call.workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(TY(oplora_lean_finish)(&call.layer, 1, 0, call.sums, call.workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(TY(same_state)(&f, &twin));
        TY(end_call)(&call);
        TY(step_alone)(&f, OPLORA_OK);
        TY(step_alone)(&twin, OPLORA_OK);
    }
    TY(unmake)(&f);
    TY(unmake)(&twin);
}

static void TY(test_places_are_refused)(void) {
    static const oplora_place wrong[] = {
        {2047, 0, 2048, 0, 1},      {2048, 1, 2048, 0, 1},         {2048, -1, 2048, 0, 1}, {2048, 0, 0, 0, 1},
        {2048, 0, 1000, 5000, 1},   {4096, 0, 1024, 3073, 1},      {4096, 0, 1024, -1, 1}, {INT64_MAX, 0, 2048, 0, 1},
        {4096, 0, 1, INT64_MAX, 1}, {4096, INT64_MAX, 2048, 0, 1},
    };
    TY(made) f;
    TY(make)(&f, &divided[0].like, 0);
    TY(set_gradients)(&f, 1, 1);
    TY(call) call = TY(begin_call)(&f);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        f.factors[0].place = &wrong[i];
        CHECK(TY(oplora_lean_reduce)(&call.layer, 1, 0, call.sums, call.workspace, NULL) == OPLORA_ESIZE);
        CHECK(TY(oplora_lean_workspace_bytes)(&call.layer, 1) == -1);
    }
    f.factors[0].place = NULL;
    CHECK(TY(oplora_lean_reduce)(&call.layer, 1, 0, NULL, call.workspace, NULL) == OPLORA_ENULL);
    CHECK(oplora_lean_sums_size(0, 2, 1) == -1 && oplora_lean_sums_size(32, 9, 1) == -1);
    TY(end_call)(&call);
    TY(unmake)(&f);
}

static void TY(test_type)(void) {
    for (int which = 0; which < DIVIDED; which++)
        for (int given = 0; given < 2; given++) TY(test_shares)(which, given);
    TY(test_first_half_changes_nothing)();
    TY(test_places_are_refused)();
}

#endif
