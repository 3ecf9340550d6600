/* Steps of lean state: the same bits for every split and both ways of a step, edges, and refusals.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "lean_layout.h"
#include "lean_shapes.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define OPLORA_TEMPLATE "../../tests/c/test_lean_steps.c"
#include "each_type.h"

int main(void) {
    noise_state = 1;
    test_type_f32();
    test_type_f64();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

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

/* With many units a layer has fewer parts than chunks. Every row has the same gradient here, and so takes the same step; one
 * entry that is not finite is counted wherever it stands, and nothing moves. */
static void TY(test_parts_of_several_chunks)(void) {
    static const shape like = {1000, 2, {70 * LEAN_CHUNK + 5, 3, 0}, 0, 0, 2, 1, OPLORA_SIGN};
    const int64_t rows = like.rows[0];
    const uint32_t seed = noise_state; /* the other tests keep their gradients */
    TY(made) f;
    CHECK(oplora_lean_parts(72, oplora_lean_sums(2, 1), like.H) == 64);
    TY(make)(&f, &like, 0);
    TY(set_gradients)(&f, 1, 1);
    T *const g = (T *)f.factors[0].g, *const out = f.factors[0].out;
    for (int64_t n = 0; n < rows; n++) g[n] = (T)0.5;
    for (int64_t at = 3; at < rows; at += 23 * LEAN_CHUNK) {
        g[at] = (T)NAN;
        TY(step_alone)(&f, OPLORA_ENONFINITE);
        CHECK(f.layer.report[1] == 1 && out[at] == 0);
        g[at] = (T)0.5;
    }
    for (int k = 0; k < 3; k++) ((T *)f.factors[1].g)[k] = (T)0.5;
    TY(step_alone)(&f, OPLORA_OK);
    CHECK(f.layer.report[0] == 0.25 * (double)(rows + 3));
    int64_t same = 0;
    for (int64_t n = 0; n < rows; n++) same += out[n] == out[0];
    CHECK(same == rows && out[0] != 0);
    TY(unmake)(&f);
    noise_state = seed;
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
    for (int i = 0; i < 33; i++)
        many[i] = (TY(oplora_factor)){.rows = 1, .g = ones + i, .out = ones + i, .random = i < 32};
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
    TY(test_steps)(12);
    TY(test_measured_step_reads_dh)();
    for (int i = 0; i < EDGE_SHAPES; i++) {
        TY(test_edges)(&edge_shapes[i]);
        TY(test_rate_zero)(&edge_shapes[i]);
    }
    TY(test_refusals)();
    TY(test_nonfinite_in_one_of_many)();
    TY(test_start_fails)();
    TY(test_parts_of_several_chunks)();
}

#endif
