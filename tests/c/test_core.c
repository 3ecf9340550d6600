/* The core without Python: random numbers against published vectors, every kernel against a scalar reference written
 * from the formulas, results that do not depend on how the work is split, and refusals.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#include "check.h"
#include "core_check.h"
#include "oplora_core.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Random123's kat_vectors for philox4x32, 10 rounds. */
static void test_philox_published_vectors(void) {
    static const uint32_t vectors[][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
         0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
         0x24126ea1},
    };
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        uint32_t out[4];
        oplora_philox4x32_10(vectors[i], vectors[i] + 4, out);
        CHECK(!memcmp(out, vectors[i] + 6, sizeof out));
    }
}

static void test_sizes(void) {
    CHECK(oplora_size(2, 3, 5) == 2 * 5 + 5 + 2 * 3 + 2 + 3);
    CHECK(oplora_size(1, 1, 1) == 5);
    CHECK(oplora_size(1 << 20, 1, (int64_t)1 << 40) > (int64_t)1 << 59);
    CHECK(oplora_size((int64_t)1 << 32, 1, (int64_t)1 << 32) == -1);
    CHECK(oplora_size(0, 1, 1) == -1 && oplora_size(1, 0, 1) == -1 && oplora_size(1, 1, 0) == -1);
    CHECK(oplora_generate_backward_workspace_bytes(0, 1, 1) == -1);
}

static void test_every_status_has_a_sentence(void) {
    static const oplora_status all[] = {OPLORA_OK,        OPLORA_ENULL,     OPLORA_ESIZE,
                                        OPLORA_EOVERFLOW, OPLORA_EVALUE,    OPLORA_EDTYPE,
                                        OPLORA_ERANGES,   OPLORA_EPARALLEL, OPLORA_ENONFINITE};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) CHECK(strcmp(oplora_strerror(all[i]), "unknown status"));
    CHECK(!strcmp(oplora_strerror((oplora_status)99), "unknown status"));
}

/* ---- the start's numbers one at a time, by random.c's description ---- */

static const uint64_t start_seed = 0xfedcba9876543210u;
enum { START_LAYER = 77 };

static void start_words(int64_t index, uint32_t tensor, uint32_t vector, uint32_t word[4]) {
    oplora_philox4x32_10(
        (const uint32_t[]){(uint32_t)index, (uint32_t)(index >> 32) | tensor << 24, vector, START_LAYER},
        (const uint32_t[]){(uint32_t)start_seed, (uint32_t)(start_seed >> 32)}, word);
}

static double uniform_entry(uint32_t tensor, uint32_t vector, int64_t entry) { /* in (-1, 1) */
    const int64_t q = entry / 16 % 8;
    uint32_t word[4];
    start_words(entry / 128 * 16 + entry % 16, tensor, vector, word);
    return (2.0 * (word[q / 2] >> 16 * (q % 2) & 0xffff) + 1 - 65536) / 65536;
}

static double sign_entry(uint32_t tensor, int64_t column, int64_t row) {
    uint32_t word[4];
    start_words(row / 64 * 16 + row % 16, tensor, (uint32_t)(column / 32), word);
    return word[row / 16 % 4] >> column % 32 & 1 ? -1 : 1;
}

static double normal_entry(int64_t i) {
    uint32_t word[4];
    start_words(i / 4, 2, 0, word);
    const uint32_t *const pair = word + i % 4 / 2 * 2;
    const double radius = sqrt(-2 * log((pair[0] + 0.5) / 4294967296.0)), angle = 2 * acos(-1) * pair[1] / 4294967296.0;
    return radius * (i % 2 ? sin(angle) : cos(angle));
}

#define OPLORA_TEMPLATE "../../tests/c/test_core.c"
#include "each_type.h"

int main(void) {
    test_philox_published_vectors();
    test_sizes();
    test_every_status_has_a_sentence();
    test_type_f32();
    test_type_f64();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

static const double TY(epsilon) = sizeof(T) == sizeof(float) ? 0x1p-23 : 0x1p-52;

static int TY(near)(double a, double b, double scale) { return fabs(a - b) <= 64 * TY(epsilon) *scale; }

static void TY(test_start)(void) {
    enum { H = 6, Z = 9, N = 40000 };
    const int64_t size = oplora_size(H, Z, N);
    const oplora_rows rows[] = {{3, 20003}, {30000, 30001}};
    T *const first = zeros(size, sizeof(T));
    CHECK(TY(oplora_start)(first, H, Z, N, 5, 2, 0.01, OPLORA_UNIFORM, rows, 2, NULL) == OPLORA_OK);
    for (int s = 1; s < SPLITS; s++) {
        T *const again = zeros(size, sizeof(T));
        CHECK(TY(oplora_start)(again, H, Z, N, 5, 2, 0.01, OPLORA_UNIFORM, rows, 2, splits[s]) == OPLORA_OK);
        CHECK(!memcmp(first, again, (size_t)size * sizeof(T)));
        free(again);
    }
    double square = 0, largest = 0;
    for (int64_t j = 0; j < H; j++)
        for (int64_t n = 0; n < N; n++) {
            const double w = first[j * N + n];
            const int uniform = (n >= 3 && n < 20003) || n == 30000;
            CHECK((w != 0) == uniform);
            square += w * w;
            largest = fmax(largest, fabs(w));
        }
    CHECK(fabs(square / (20001 * H) * 3 * H - 1) < 0.02);
    CHECK(largest <= 1 / sqrt(H) * (1 + TY(epsilon)) && largest > 0.99 / sqrt(H));
    /* entries made by hand: 1234 of the first range, 128 * 9 + 16 * 5 + 2, is the high half of word 2 of counter
     * 16 * 9 + 2; the second range has a stream of its own, and W1's vectors are its rows */
    uint32_t word[4];
    oplora_philox4x32_10((const uint32_t[]){16 * 9 + 2, 0, 5, 2}, (const uint32_t[]){5, 0}, word);
    const double expected = (2.0 * (word[2] >> 16) + 1 - 65536) / 65536 / sqrt(H);
    CHECK(TY(near)(first[5 * N + 3 + 1234], expected, 1));
    oplora_philox4x32_10((const uint32_t[]){0, 8 << 24, 1, 2}, (const uint32_t[]){5, 0}, word);
    CHECK(TY(near)(first[N + 30000], (2.0 * (word[0] & 0xffff) + 1 - 65536) / 65536 / sqrt(H), 1));
    oplora_philox4x32_10((const uint32_t[]){8, 1 << 24, 4, 2}, (const uint32_t[]){5, 0}, word);
    CHECK(TY(near)(first[H * N + N + 4 * Z + 8], (2.0 * (word[0] & 0xffff) + 1 - 65536) / 65536 / sqrt(Z), 1));
    for (int64_t i = 0; i < N; i++) CHECK(first[H * N + i] == 0);
    add_to_digest(first, (size_t)(size - Z) * sizeof(T)); /* z goes through libm */

    T *const signs = zeros(size, sizeof(T));
    CHECK(TY(oplora_start)(signs, H, Z, N, 5, 2, 0.01, OPLORA_SIGN, rows, 2, split_in_sevens) == OPLORA_OK);
    for (int64_t j = 0; j < H; j++)
        for (int64_t n = 0; n < N; n++) CHECK((signs[j * N + n] != 0) == (first[j * N + n] != 0));
    for (int64_t j = 0; j < H; j++) { /* 1234 = 64 * 19 + 16 * 1 + 2 */
        oplora_philox4x32_10((const uint32_t[]){16 * 19 + 2, 3 << 24, 0, 2}, (const uint32_t[]){5, 0}, word);
        CHECK(TY(near)(signs[j * N + 3 + 1234], (word[1] >> j & 1 ? -1 : 1) / sqrt(3.0 * H), 1));
    }
    CHECK(!memcmp(signs + H * N, first + H * N, (size_t)(size - H * N) * sizeof(T))); /* the rest is the same */
    add_to_digest(signs, (size_t)(H * N) * sizeof(T));
    free(signs);

    const oplora_rows wrong[] = {{5, 4}, {-1, 3}, {0, N + 1}};
    for (int i = 0; i < 3; i++)
        CHECK(TY(oplora_start)(first, H, Z, N, 0, 0, 0.01, OPLORA_UNIFORM, &wrong[i], 1, NULL) == OPLORA_ESIZE);
    CHECK(TY(oplora_start)(first, H, Z, N, 0, 0, NAN, OPLORA_UNIFORM, rows, 1, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_start)(NULL, H, Z, N, 0, 0, 0.01, OPLORA_UNIFORM, rows, 1, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_start)(first, H, Z, N, 0, 0, 0.01, OPLORA_UNIFORM, rows, 1, failing) == OPLORA_EPARALLEL);
    CHECK(TY(oplora_start)(first, H, Z, N, 0, 0, 0.01, (oplora_start_kind)2, rows, 1, NULL) == OPLORA_EVALUE);
    free(first);
}

/* Every number of a start: each range counts from its own first row, in a stream of its own, empty ranges too. */
static void TY(test_start_entries)(int64_t H, int64_t Z, int64_t N, const oplora_rows *rows, int64_t n_rows,
                                   oplora_start_kind kind) {
    const int64_t size = oplora_size(H, Z, N);
    T *const p = zeros(size, sizeof(T)), *const W1 = p + H * N + N, *const z = W1 + H * Z + H;
    double *const expected = zeros(size, sizeof(double));
    const double bound = 1 / sqrt((double)H), bound1 = 1 / sqrt((double)Z);
    double square = 0;
    int64_t count = 0, wrong = 0;
    for (int64_t r = 0; r < n_rows; r++)
        for (int64_t j = 0; j < H; j++)
            for (int64_t n = rows[r].begin; n < rows[r].end; n++, count++)
                expected[j * N + n] = kind == OPLORA_UNIFORM
                                          ? bound * uniform_entry((uint32_t)(8 * r), (uint32_t)j, n - rows[r].begin)
                                          : bound / sqrt(3) * sign_entry((uint32_t)(8 * r) + 3, j, n - rows[r].begin);
    for (int64_t j = 0; j < H; j++)
        for (int64_t i = 0; i < Z; i++) expected[H * N + N + j * Z + i] = bound1 * uniform_entry(1, (uint32_t)j, i);
    for (int64_t i = 0; i < Z; i++) expected[size - Z + i] = 0.02 * normal_entry(i);

    CHECK(TY(oplora_start)(p, H, Z, N, start_seed, START_LAYER, 0.02, kind, rows, n_rows, split_backwards) ==
          OPLORA_OK);
    for (int64_t i = 0; i < H * N + N + H * Z + H; i++)
        wrong += fabs(p[i] - expected[i]) > TY(epsilon) *fabs(expected[i]);
    CHECK(wrong == 0);
    for (int64_t i = 0; i < Z; i++) CHECK(TY(near)(z[i], expected[size - Z + i], 0.1));
    for (int64_t i = 0; i < H * N; i++) square += (double)p[i] * p[i];
    if (count > 1000) CHECK(fabs(square / (double)count * 3 * (double)H - 1) < (kind == OPLORA_SIGN ? 1e-5 : 0.05));
    add_to_digest(p, (size_t)(size - Z) * sizeof(T));
    free(p);
    free(expected);
}

static void TY(test_starts)(void) {
    static const oplora_rows whole[] = {{0, 129}}, one[] = {{0, 1}}, tasks[] = {{5, 16384 + 5}, {16389, 40000}};
    static const oplora_rows some[] = {{0, 1}, {1, 66}, {66, 66}, {100, 163}, {163, 300}};
    static const struct {
        int64_t H, Z, N;
        const oplora_rows *rows;
        int64_t n_rows;
    } starts[] = {{1, 1, 1, one, 1},        {33, 130, 300, some, 5}, {70, 1, 129, whole, 1},
                  {64, 257, 129, whole, 1}, {2, 3, 40000, tasks, 2}, {3, 4, 50, NULL, 0}};
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++)
        for (int kind = OPLORA_UNIFORM; kind <= OPLORA_SIGN; kind++)
            TY(test_start_entries)(starts[i].H, starts[i].Z, starts[i].N, starts[i].rows, starts[i].n_rows,
                                   (oplora_start_kind)kind);
    oplora_rows many[32]; /* one more than there are streams */
    for (int i = 0; i < 32; i++) many[i] = (oplora_rows){2 * i, 2 * i + 1};
    for (int kind = OPLORA_UNIFORM; kind <= OPLORA_SIGN; kind++)
        TY(test_start_entries)(34, 2, 64, many, 31, (oplora_start_kind)kind);
    T p[2 * 64 + 64 + 2 + 2 + 1] = {0};
    CHECK(TY(oplora_start)(p, 2, 1, 64, 0, 0, 0.01, OPLORA_SIGN, many, 32, NULL) == OPLORA_ERANGES);
    CHECK(TY(oplora_start)(p, 2, 1, 64, 0, 0, 0.01, OPLORA_SIGN, many, -1, NULL) == OPLORA_ESIZE);
    CHECK(TY(oplora_start)(p, 2, 1, 64, 0, 0, 0.01, OPLORA_SIGN, NULL, 1, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_start)(p, 2, 1, 64, 0, 0, -0.01, OPLORA_SIGN, many, 1, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_start)(p, 2, 1, 64, 0, 0, INFINITY, OPLORA_SIGN, many, 1, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_start)(p, 0, 1, 64, 0, 0, 0.01, OPLORA_SIGN, many, 1, NULL) == OPLORA_ESIZE);
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) CHECK(p[i] == 0);
}

/* A generator with its gradients, by the formulas, in double. */
typedef struct {
    int64_t H, Z, N;
    double *p; /* flat, as in oplora_core.h */
    double *h, *v, *dh;
    double hidden_square; /* of the gradients of z, W1 and c1 */
} TY(truth);

static double TY(w2)(const TY(truth) *t, int64_t n, int64_t j) { return t->p[j * t->N + n]; }

static void TY(truth_generate)(TY(truth) *t) {
    const double *const c2 = t->p + t->H * t->N, *const W1 = c2 + t->N, *const c1 = W1 + t->H * t->Z,
                        *const z = c1 + t->H;
    for (int64_t j = 0; j < t->H; j++) {
        double pre = c1[j];
        for (int64_t i = 0; i < t->Z; i++) pre += W1[j * t->Z + i] * z[i];
        t->h[j] = pre > 0 ? pre : 0;
    }
    for (int64_t n = 0; n < t->N; n++) {
        t->v[n] = c2[n];
        for (int64_t j = 0; j < t->H; j++) t->v[n] += TY(w2)(t, n, j) * t->h[j];
    }
}

static void TY(test_generate)(int64_t H, int64_t Z, int64_t N) {
    const int64_t size = oplora_size(H, Z, N);
    T *const p = zeros(size, sizeof(T)), *const rows = zeros(H * N, sizeof(T));
    TY(truth) t = {H, Z, N, zeros(size, sizeof(double)), zeros(H, 8), zeros(N, 8), zeros(H, 8), 0};
    for (int64_t i = 0; i < size; i++) t.p[i] = p[i] = (T)noise();
    for (int64_t j = 0; j < H; j++)
        for (int64_t n = 0; n < N; n++) rows[n * H + j] = p[j * N + n];
    const T *const c2 = p + H * N, *const W1 = c2 + N, *const c1 = W1 + H * Z, *const z = c1 + H;
    TY(truth_generate)(&t);
    T *const h = zeros(H, sizeof(T)), *const v = zeros(N, sizeof(T)), *const g = zeros(N, sizeof(T));
    T *const dz = zeros(Z, sizeof(T)), *const dW1 = zeros(H * Z, sizeof(T)), *const dc1 = zeros(H, sizeof(T));
    T *const first = zeros(N, sizeof(T)), *const first_d = zeros(H, sizeof(T));
    for (int64_t n = 0; n < N; n++) g[n] = (T)noise();
    void *const workspace = zeros(oplora_generate_backward_workspace_bytes(H, Z, N), 1);
    for (int layout = OPLORA_COLUMNS; layout <= OPLORA_ROWS; layout++)
        for (int s = 0; s < SPLITS; s++) {
            const T *const W2 = layout == OPLORA_COLUMNS ? p : rows;
            CHECK(TY(oplora_generate)(z, W1, c1, W2, c2, layout, H, Z, N, h, v, splits[s]) == OPLORA_OK);
            CHECK(TY(oplora_generate_backward)(g, z, W1, c1, W2, layout, H, Z, N, dz, dW1, dc1, h, workspace,
                                               splits[s]) == OPLORA_OK);
            if (s == 0) {
                memcpy(first, v, (size_t)N * sizeof(T));
                memcpy(first_d, dc1, (size_t)H * sizeof(T));
                add_to_digest(v, (size_t)N * sizeof(T));
                add_to_digest(dz, (size_t)Z * sizeof(T));
            }
            CHECK(!memcmp(first, v, (size_t)N * sizeof(T)) && !memcmp(first_d, dc1, (size_t)H * sizeof(T)));
            for (int64_t n = 0; n < N; n++) CHECK(TY(near)(v[n], t.v[n], 1 + (double)H));
            for (int64_t j = 0; j < H; j++) {
                double d = 0;
                for (int64_t n = 0; t.h[j] > 0 && n < N; n++) d += TY(w2)(&t, n, j) * g[n];
                CHECK(TY(near)(h[j], t.h[j], (double)Z) && TY(near)(dc1[j], d, sqrt((double)N) + 4));
                for (int64_t i = 0; i < Z; i++) CHECK(TY(near)(dW1[j * Z + i], dc1[j] * (double)z[i], 1 + fabs(d)));
            }
            for (int64_t i = 0; i < Z; i++) {
                double sum = 0, scale = 1;
                for (int64_t j = 0; j < H; j++) {
                    sum += (double)W1[j * Z + i] * dc1[j];
                    scale += fabs((double)dc1[j]);
                }
                CHECK(TY(near)(dz[i], sum, scale));
            }
        }
    CHECK(TY(oplora_generate)(z, W1, c1, p, NULL, OPLORA_COLUMNS, H, Z, N, h, v, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_generate)(z, W1, c1, p, c2, (oplora_layout)7, H, Z, N, h, v, NULL) == OPLORA_EVALUE);
    CHECK(TY(oplora_generate)(z, W1, c1, p, c2, OPLORA_COLUMNS, 0, Z, N, h, v, NULL) == OPLORA_ESIZE);
    void *const all[] = {p, rows, t.p, t.h, t.v, t.dh, h, v, g, dz, dW1, dc1, first, first_d, workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* torch.optim.AdamW on one number, in double. */
static void TY(reference_adamw)(double *p, double *m, double *s, double g, double lr, double decay,
                                const oplora_adamw *a) {
    *m = a->beta1 * *m + (1 - a->beta1) * g;
    *s = a->beta2 * *s + (1 - a->beta2) * g * g;
    const double m_hat = *m / (1 - pow(a->beta1, (double)a->step)), s_hat = *s / (1 - pow(a->beta2, (double)a->step));
    *p = *p * (1 - decay) - lr * m_hat / (sqrt(s_hat) + a->eps);
}

/* The reference of the exact step: dW2 = g h^T entry by entry, every column touched. */
static void TY(reference_step)(TY(truth) *t, double *m, double *s, const T *g, const TY(oplora_exact) *l) {
    const int64_t H = t->H, Z = t->Z, N = t->N, c2 = H * N, W1 = c2 + N, c1 = W1 + H * Z, z = c1 + H;
    const oplora_adamw *const a = &l->adamw;
    const double hidden = a->hidden_lr * a->weight_decay;
    double *const old = zeros(Z + H * Z, 8);
    memcpy(old, t->p + z, (size_t)Z * 8);
    memcpy(old + Z, t->p + W1, (size_t)(H * Z) * 8);
    for (int64_t j = 0; j < H; j++) {
        t->dh[j] = 0;
        for (int64_t n = 0; t->h[j] > 0 && n < N; n++) t->dh[j] += TY(w2)(t, n, j) * g[n];
    }
    t->hidden_square = 0;
    for (int64_t n = 0; n < N; n++) {
        const TY(oplora_factor) *const f = &l->factors[n >= l->factors[0].rows];
        const double decay = f->lr * f->weight_decay;
        for (int64_t j = 0; j < H; j++) {
            const int64_t at = j * N + n;
            TY(reference_adamw)(&t->p[at], &m[at], &s[at], g[n] * t->h[j], f->lr * a->weight_ratio, decay, a);
        }
        TY(reference_adamw)(&t->p[c2 + n], &m[c2 + n], &s[c2 + n], g[n], f->lr, decay, a);
    }
    for (int64_t j = 0; j < H; j++) {
        for (int64_t i = 0; i < Z; i++) {
            const int64_t at = W1 + j * Z + i;
            TY(reference_adamw)(&t->p[at], &m[at], &s[at], t->dh[j] * old[i], a->hidden_lr, hidden, a);
            t->hidden_square += t->dh[j] * old[i] * t->dh[j] * old[i];
        }
        t->hidden_square += t->dh[j] * t->dh[j];
        TY(reference_adamw)(&t->p[c1 + j], &m[c1 + j], &s[c1 + j], t->dh[j], a->hidden_lr, hidden, a);
    }
    for (int64_t i = 0; i < Z; i++) {
        double dz = 0;
        for (int64_t j = 0; j < H; j++) dz += old[Z + j * Z + i] * t->dh[j];
        t->hidden_square += dz * dz;
        TY(reference_adamw)(&t->p[z + i], &m[z + i], &s[z + i], dz, a->hidden_lr, hidden, a);
    }
    free(old);
    TY(truth_generate)(t);
}

/* One layer of the fast side, with memory of its own. */
typedef struct {
    TY(oplora_exact) layer;
    TY(oplora_factor) factors[2];
} TY(fast);

static void TY(make_fast)(TY(fast) *f, int64_t H, int64_t Z, int64_t rows_a, int64_t rows_b, uint32_t index) {
    const int64_t N = rows_a + rows_b, size = oplora_size(H, Z, N);
    *f = (TY(fast)){.layer = {H,
                              Z,
                              N,
                              zeros(size, sizeof(T)),
                              zeros(size, sizeof(T)),
                              zeros(size, sizeof(T)),
                              zeros(2 * H, 8),
                              zeros(H, 1),
                              NULL,
                              rows_b ? 2 : 1,
                              {0},
                              zeros(oplora_exact_report_size(H), 8)}};
    TY(oplora_start)(f->layer.parameters, H, Z, N, 1, index, 0.3, OPLORA_UNIFORM, &(oplora_rows){0, rows_a}, 1, NULL);
    for (int64_t j = 0; j < 2 * H; j++) f->layer.decay[j] = 1;
    for (int k = 0; k < f->layer.n_factors; k++) {
        const int64_t rows = k ? rows_b : rows_a;
        T *const base = zeros(rows, sizeof(T));
        for (int64_t i = 0; i < rows; i++) base[i] = (T)noise();
        f->factors[k] = (TY(oplora_factor)){rows, zeros(rows, sizeof(T)), k ? base : NULL, zeros(rows, sizeof(T)),
                                            .weight_decay = 0.7};
        if (!k) free(base);
    }
    f->layer.factors = f->factors;
}

static void TY(free_fast)(TY(fast) *f) {
    for (int k = 0; k < f->layer.n_factors; k++) {
        free((void *)f->factors[k].g);
        free((void *)f->factors[k].base);
        free(f->factors[k].out);
    }
    void *const all[] = {f->layer.parameters, f->layer.exp_avg, f->layer.exp_avg_sq,
                         f->layer.decay,      f->layer.moving,  f->layer.report};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Gradients that come and go, and rates that push units over zero and back. */
static void TY(set_step)(TY(fast) *f, int64_t step, int rates_differ) {
    f->layer.adamw = (oplora_adamw){0.3, 0.2, 0.9, 0.999, 1e-8, 0.7, step};
    for (int k = 0; k < f->layer.n_factors; k++) f->factors[k].lr = step % 5 == 3 ? 0 : 1e-2;
    if (rates_differ) { /* also in what moves at all */
        f->factors[1].lr *= step % 7 == 2 ? 0 : 4;
        f->factors[0].lr *= step % 7 != 5;
        f->factors[1].weight_decay = 0.05;
    }
    for (int k = 0; k < f->layer.n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++) ((T *)f->factors[k].g)[i] = (T)(step % 4 ? noise() : 0);
}

/* Columns that move though their unit is off now. */
static int64_t TY(count_still)(const TY(oplora_exact) *l) {
    int64_t count = 0;
    for (int64_t j = 0; j < l->H; j++) count += l->moving[j] && l->report[3 + j] == 0;
    return count;
}

/* All layers in one call, small and large ones mixed, against the reference; the same bits for every split. */
static void TY(test_exact)(const int64_t (*sizes)[4], int64_t n_layers, int64_t steps, int rates_differ) {
    enum { MOST = 4 };
    TY(fast) fast[SPLITS][MOST];
    TY(truth) truth[MOST];
    double *moments[MOST][2];
    int64_t deaths = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        const uint32_t seed = noise_state;
        for (int s = 0; s < SPLITS; s++) {
            noise_state = seed;
            TY(make_fast)(&fast[s][i], sizes[i][0], sizes[i][1], sizes[i][2], sizes[i][3], (uint32_t)i);
        }
        const TY(oplora_exact) *const l = &fast[0][i].layer;
        const int64_t size = oplora_size(l->H, l->Z, l->N);
        truth[i] = (TY(truth)){l->H, l->Z, l->N, zeros(size, 8), zeros(l->H, 8), zeros(l->N, 8), zeros(l->H, 8), 0};
        for (int64_t k = 0; k < size; k++) truth[i].p[k] = l->parameters[k];
        for (int k = 0; k < 2; k++) moments[i][k] = zeros(size, 8);
        TY(truth_generate)(&truth[i]);
    }
    for (int64_t step = 1; step <= steps; step++) {
        const uint32_t seed = noise_state;
        for (int s = 0; s < SPLITS; s++) {
            TY(oplora_exact) layers[MOST];
            noise_state = seed;
            for (int64_t i = 0; i < n_layers; i++) {
                TY(set_step)(&fast[s][i], step, rates_differ);
                layers[i] = fast[s][i].layer;
            }
            void *const workspace = zeros(TY(oplora_exact_workspace_bytes)(layers, n_layers), 1);
            if (s == 1) CHECK(TY(oplora_exact_measure)(layers, n_layers, workspace, splits[s]) == OPLORA_OK);
            CHECK(TY(oplora_exact_step)(layers, n_layers, s == 1, workspace, splits[s]) == OPLORA_OK);
            free(workspace);
        }
        for (int64_t i = 0; i < n_layers; i++) {
            const TY(fast) *const f = &fast[0][i];
            T *const g = zeros(f->layer.N, sizeof(T));
            memcpy(g, f->factors[0].g, (size_t)f->factors[0].rows * sizeof(T));
            if (f->layer.n_factors == 2)
                memcpy(g + f->factors[0].rows, f->factors[1].g, (size_t)f->factors[1].rows * sizeof(T));
            TY(reference_step)(&truth[i], moments[i][0], moments[i][1], g, &f->layer);
            double scale = 0, error = 0;
            for (int64_t n = 0; n < f->layer.N; n++) {
                const int k = n >= f->factors[0].rows;
                const int64_t at = n - (k ? f->factors[0].rows : 0);
                const double expected = truth[i].v[n] + (f->factors[k].base ? f->factors[k].base[at] : 0);
                scale = fmax(scale, fabs(expected));
                error = fmax(error, fabs(f->factors[k].out[at] - expected));
            }
            /* in float the path drifts with the steps, as any float training does */
            CHECK(error <= scale * (sizeof(T) == sizeof(float) ? 1e-4 : 1e-11));
            double squares = 0;
            for (int64_t n = 0; n < f->layer.N; n++) squares += (double)g[n] * g[n];
            const double square = f->layer.report[2], expected = truth[i].hidden_square;
            CHECK(fabs(square - expected) <= expected * (sizeof(T) == sizeof(float) ? 1e-2 : 1e-9));
            for (int64_t j = 0; j < f->layer.H; j++) { /* what a still column is worth, paid or owed */
                const int64_t last = f->layer.N - 1, owed = j + (f->layer.n_factors - 1) * f->layer.H;
                const double worth = f->layer.decay[j] * f->layer.parameters[j * f->layer.N];
                const double worth_last = f->layer.decay[owed] * f->layer.parameters[j * f->layer.N + last];
                CHECK(f->layer.moving[j] || TY(near)(worth, TY(w2)(&truth[i], 0, j), 1));
                CHECK(f->layer.moving[j] || TY(near)(worth_last, TY(w2)(&truth[i], last, j), 1));
            }
            deaths += TY(count_still)(&f->layer);
            CHECK(fabs(f->layer.report[0] - squares) <= 1e-12 * squares && f->layer.report[1] == 0);
            free(g);
        }
        for (int64_t i = 0; i < n_layers; i++)
            for (int k = 0; k < fast[0][i].layer.n_factors; k++) {
                const size_t bytes = (size_t)fast[0][i].factors[k].rows * sizeof(T);
                add_to_digest(fast[0][i].factors[k].out, bytes);
                for (int s = 1; s < SPLITS; s++)
                    CHECK(!memcmp(fast[s][i].factors[k].out, fast[0][i].factors[k].out, bytes));
            }
    }
    CHECK(deaths > 0 || steps < 10);
    /* regenerating gives the step's own bits */
    TY(oplora_exact) layers[MOST];
    for (int64_t i = 0; i < n_layers; i++) {
        layers[i] = fast[1][i].layer;
        for (int k = 0; k < fast[1][i].layer.n_factors; k++)
            memset(fast[1][i].factors[k].out, 0, (size_t)fast[1][i].factors[k].rows * sizeof(T));
    }
    void *const workspace = zeros(TY(oplora_exact_workspace_bytes)(layers, n_layers), 1);
    CHECK(TY(oplora_exact_generate)(layers, n_layers, workspace, split_in_sevens) == OPLORA_OK);
    for (int64_t i = 0; i < n_layers; i++)
        for (int k = 0; k < fast[0][i].layer.n_factors; k++)
            CHECK(!memcmp(fast[1][i].factors[k].out, fast[0][i].factors[k].out,
                          (size_t)fast[0][i].factors[k].rows * sizeof(T)));
    free(workspace);
    for (int64_t i = 0; i < n_layers; i++) {
        for (int s = 0; s < SPLITS; s++) TY(free_fast)(&fast[s][i]);
        void *const all[] = {truth[i].p, truth[i].h, truth[i].v, truth[i].dh, moments[i][0], moments[i][1]};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
    }
}

static void TY(test_refusals)(void) {
    TY(fast) f;
    TY(make_fast)(&f, 4, 3, 50, 20, 0);
    TY(set_step)(&f, 1, 0);
    TY(oplora_exact) layer = f.layer;
    void *const workspace = zeros(TY(oplora_exact_workspace_bytes)(&layer, 1), 1);
    const int64_t size = oplora_size(4, 3, 70);
    T *const before = zeros(size, sizeof(T));
    memcpy(before, layer.parameters, (size_t)size * sizeof(T));
    const T values[] = {(T)NAN, (T)INFINITY, (T)-INFINITY};
    for (int i = 0; i < 3; i++) {
        T *const g = (T *)f.factors[1].g;
        const T kept = g[19];
        g[19] = values[i];
        CHECK(TY(oplora_exact_step)(&layer, 1, 0, workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(layer.report[1] == 1);
        CHECK(TY(oplora_exact_measure)(&layer, 1, workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(TY(oplora_exact_step)(&layer, 1, 1, workspace, NULL) == OPLORA_ENONFINITE);
        CHECK(!memcmp(before, layer.parameters, (size_t)size * sizeof(T)));
        for (int64_t k = 0; k < size; k++) CHECK(layer.exp_avg[k] == 0 && layer.exp_avg_sq[k] == 0);
        g[19] = kept;
    }
    CHECK(TY(oplora_exact_step)(NULL, 1, 0, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_exact_step)(NULL, 0, 0, NULL, NULL) == OPLORA_OK);
    CHECK(TY(oplora_exact_step)(&layer, 1, 0, NULL, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_exact_step)(&layer, -1, 0, workspace, NULL) == OPLORA_ESIZE);
    const oplora_adamw wrong[] = {{NAN, 0, 0.9, 0.999, 1e-8, 0, 1}, {INFINITY, 0, 0.9, 0.999, 1e-8, 0, 1},
                                  {0, NAN, 0.9, 0.999, 1e-8, 0, 1}, {0, 0, 0.9, 0.999, 1e-8, NAN, 1},
                                  {0, 0, 1, 0.999, 1e-8, 0, 1},     {0, 0, 0.9, -1, 1e-8, 0, 1},
                                  {0, 0, 0.9, 0.999, -1, 0, 1},     {0, 0, 0.9, 0.999, 1e-8, 0, 0}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        layer.adamw = wrong[i];
        CHECK(TY(oplora_exact_step)(&layer, 1, 0, workspace, NULL) == OPLORA_EVALUE);
    }
    layer = f.layer;
    for (int i = 0; i < 2; i++) {
        double *const number = i ? &f.factors[1].lr : &f.factors[0].weight_decay, kept = *number;
        *number = i ? INFINITY : NAN;
        CHECK(TY(oplora_exact_step)(&layer, 1, 0, workspace, NULL) == OPLORA_EVALUE);
        *number = kept;
    }
    layer.N = 71;
    CHECK(TY(oplora_exact_step)(&layer, 1, 0, workspace, NULL) == OPLORA_ESIZE);
    CHECK(TY(oplora_exact_workspace_bytes)(&layer, 1) == -1);
    layer = f.layer;
    layer.exp_avg = NULL;
    CHECK(TY(oplora_exact_step)(&layer, 1, 0, workspace, NULL) == OPLORA_ENULL);
    CHECK(TY(oplora_exact_step)(&f.layer, 1, 0, workspace, failing) == OPLORA_EPARALLEL);
    free(before);
    free(workspace);
    TY(free_fast)(&f);
}

static void TY(test_type)(void) {
    noise_state = 1;
    TY(test_start)();
    TY(test_starts)();
    static const int64_t sizes[][3] = {{1, 1, 1},     {3, 5, 7},     {32, 128, 2049},
                                       {5, 3, 20001}, {70, 16, 300}, {130, 2, 33}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) TY(test_generate)(sizes[i][0], sizes[i][1], sizes[i][2]);
    /* H, Z, rows of A, rows of B */
    static const int64_t small[][4] = {{32, 16, 2048, 333}, {1, 1, 1, 0}, {70, 3, 31, 33}, {5, 128, 4097, 2047}};
    TY(test_exact)(small, 4, 24, 0);
    TY(test_exact)(small, 4, 24, 1);
    static const int64_t mixed[][4] = {{4, 8, 100, 60}, {120, 4, 12000, 7000}, {3, 5, 17, 1}, {7, 9, 5, 5}};
    for (int rates_differ = 0; rates_differ < 2; rates_differ++)
        TY(test_exact)(mixed, 4, 4, rates_differ); /* the second is too large for one thread */
    TY(test_refusals)();
}

#endif
