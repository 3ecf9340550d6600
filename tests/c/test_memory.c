/* That calls stay in their memory: every array, the workspace too, ends at a page that nobody may touch; and a layer of more
 * than 2^31 entries, in memory of which only what is touched is there.
 *
 * Prints a digest of the results' bits: equal for every OPLORA_ISA. */
#ifndef T

#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include "check.h"
#include "core_check.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

/* Zeros whose last byte is the last before a page that nobody may touch. They are never given back. */
static void *guarded(int64_t count, size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = count > 0 ? (size_t)count * size : 1;
    const size_t room = (bytes + page - 1) / page * page;
    char *const memory =
        mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + room, page, PROT_NONE)) {
        perror("test_memory");
        exit(1);
    }
    return memory + room - bytes;
}

#define zeros guarded
#define free(memory) ((void)(memory))
#include "lean_shapes.h"

#define OPLORA_TEMPLATE "../../tests/c/test_memory.c"
#include "each_type.h"

static void test_others_end_in_their_workspace(void) {
    enum { ROWS = 5, COLUMNS = 1001, R = 3 };
    float *const A = zeros(R * COLUMNS, 4), *const B = zeros(ROWS * R, 4), *const W = zeros(ROWS * COLUMNS, 4);
    const oplora_bytes tensors[] = {{A, R * COLUMNS * 4}, {B, 7}, {W, 4 * ROWS * COLUMNS}};
    uint64_t *const hashes = zeros(3, sizeof *hashes);
    void *const workspace = zeros(oplora_merge_workspace_bytes(COLUMNS), 1);
    CHECK(oplora_merge(W, OPLORA_F32, A, B, 2, ROWS, COLUMNS, R, 0, workspace) == OPLORA_OK);
    CHECK(oplora_merge(W, OPLORA_BF16, B, A, 2, COLUMNS, ROWS, R, 1, workspace) == OPLORA_OK);
    CHECK(oplora_fingerprint(tensors, 3, hashes, zeros(oplora_fingerprint_workspace_bytes(tensors, 3), 1), NULL) ==
          OPLORA_OK);
}

/* H N is above 2^31, and all units but the last are off: the layer of that unit alone makes the same step. */
static void test_layer_of_more_than_2_31_entries(void) {
    enum { N = 70000, Z = 2, STEPS = 2 };
    const int64_t widths[] = {1, 1 << 15};
    float *out[2], *last[2];
    float *const g = zeros(N, 4);
    noise_state = 11;
    for (int64_t n = 0; n < N; n++) g[n] = (float)noise();
    for (int which = 0; which < 2; which++) {
        const int64_t H = widths[which], size = oplora_size(H, Z, N);
        float *const p = zeros(size, 4), *const c1 = p + H * N + N + H * Z, *const z = c1 + H;
        CHECK(which == 0 || H * N > INT64_C(1) << 31);
        for (int64_t j = 0; j < H; j++) c1[j] = j == H - 1 ? 0.5f : -0.5f;
        z[0] = 0.25f, z[1] = -0.25f;
        p[H * N + N + H * Z - 1] = 0.125f; /* the last unit's weight of z[1] */
        last[which] = p + (H - 1) * N, out[which] = zeros(N, 4);
        for (int64_t n = 0; n < N; n++) last[which][n] = 1e-3f * (float)(n % 7);
        double *const decay = zeros(H, 8);
        for (int64_t j = 0; j < H; j++) decay[j] = 1;
        oplora_factor_f32 factor = {.rows = N, .g = g, .out = out[which], .lr = 1e-2, .weight_decay = 0.1};
        oplora_exact_f32 l = {
            .H = H, .Z = Z, .N = N, .parameters = p, .decay = decay, .factors = &factor, .n_factors = 1};
        l.exp_avg = zeros(size, 4), l.exp_avg_sq = zeros(size, 4);
        l.moving = zeros(H, 1), l.report = zeros(oplora_exact_report_size(H), 8);
        void *const workspace = zeros(oplora_exact_workspace_bytes_f32(&l, 1), 1);
        for (int step = 1; step <= STEPS; step++) {
            l.adamw = (oplora_adamw){1, 1e-3, 0.9, 0.999, 1e-8, 0.1, step};
            CHECK(oplora_exact_step_f32(&l, 1, 0, workspace, NULL) == OPLORA_OK);
        }
        CHECK(l.report[3 + H - 1] > 0 && (which == 0 || l.report[3] == 0));
    }
    CHECK(!memcmp(out[0], out[1], N * 4) && !memcmp(last[0], last[1], N * 4) && out[0][1] != out[0][2]);
    add_to_digest(out[1], N * 4);
}

int main(void) {
    noise_state = 3;
    test_type_f32();
    test_type_f64();
    test_others_end_in_their_workspace();
    test_layer_of_more_than_2_31_entries();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}

#else

static T *TY(filled)(int64_t n) {
    T *const x = zeros(n, sizeof(T));
    for (int64_t i = 0; i < n; i++) x[i] = (T)noise();
    return x;
}

static void TY(test_lean)(void) {
    for (int i = 0; i < MIXED; i++) {
        TY(made) f;
        TY(make)(&f, &mixed[i], (uint32_t)i);
        void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f.layer, 1), 1);
        for (int step = 1; step <= 2; step++) {
            TY(set_gradients)(&f, step, 1);
            CHECK(TY(oplora_lean_measure)(&f.layer, 1, workspace, splits[i % SPLITS]) == OPLORA_OK);
            CHECK(TY(oplora_lean_step)(&f.layer, 1, step == 2, workspace, splits[i % SPLITS]) == OPLORA_OK);
        }
        add_to_digest(f.layer.numbers, (size_t)f.n_numbers * sizeof(T));
    }
}

/* A factor of `rows`, which has a base, listens and starts at random. */
static TY(oplora_factor) TY(factor_of)(int64_t rows) {
    return (TY(oplora_factor)){.rows = rows,
                               .g = TY(filled)(rows),
                               .base = TY(filled)(rows),
                               .out = TY(filled)(rows),
                               .random = 1,
                               .listens = 1,
                               .lr = 1e-2,
                               .weight_decay = 0.1};
}

static void TY(test_exact)(int64_t H, int64_t Z, int64_t rows, int64_t others, oplora_parallel_fn par) {
    const int64_t N = rows + others, size = oplora_size(H, Z, N);
    TY(oplora_factor) *const factors = zeros(2, sizeof *factors);
    factors[0] = TY(factor_of)(rows);
    factors[1] = TY(factor_of)(others);
    TY(oplora_exact)
    l = {H,
         Z,
         N,
         TY(filled)(size),
         zeros(size, sizeof(T)),
         zeros(size, sizeof(T)),
         zeros(2 * H, 8),
         zeros(H, 1),
         factors,
         2,
         {1, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1},
         zeros(oplora_exact_report_size(H), 8)};
    void *const workspace = zeros(TY(oplora_exact_workspace_bytes)(&l, 1), 1);
    CHECK(TY(oplora_exact_generate)(&l, 1, workspace, par) == OPLORA_OK);
    CHECK(TY(oplora_exact_measure)(&l, 1, workspace, par) == OPLORA_OK);
    CHECK(TY(oplora_exact_step)(&l, 1, 1, workspace, par) == OPLORA_OK);
    l.adamw.step = 2;
    CHECK(TY(oplora_exact_step)(&l, 1, 0, workspace, par) == OPLORA_OK);
    add_to_digest(l.parameters, (size_t)size * sizeof(T));

    T *const dz = zeros(Z, sizeof(T)), *const dW1 = zeros(H * Z, sizeof(T)), *const dc1 = zeros(H, sizeof(T));
    T *const W1 = TY(filled)(H * Z), *const W2 = TY(filled)(H * N), *const z = TY(filled)(Z);
    void *const backward = zeros(oplora_generate_backward_workspace_bytes(H, Z, N), 1);
    CHECK(TY(oplora_generate_backward)(TY(filled)(N), z, W1, TY(filled)(H), W2, OPLORA_COLUMNS, H, Z, N, dz, dW1, dc1,
                                       zeros(H, sizeof(T)), backward, par) == OPLORA_OK);
}

static void TY(test_rate)(int64_t rows, int64_t others, oplora_parallel_fn par) {
    const int64_t N = rows + others;
    TY(oplora_factor) *const factors = zeros(2, sizeof *factors);
    factors[0] = TY(factor_of)(rows);
    factors[1] = TY(factor_of)(others);
    TY(oplora_rate)
    l = {N,
         TY(filled)(N),
         zeros(N, sizeof(T)),
         factors,
         2,
         {1, 0, 0.9, 0.99, 1e-8, 0.1, 1},
         1e-3,
         zeros(OPLORA_RATE_REPORT, 8)};
    void *const workspace = zeros(TY(oplora_rate_workspace_bytes)(&l, 1), 1);
    CHECK(TY(oplora_rate_measure)(&l, 1, workspace, par) == OPLORA_OK);
    CHECK(TY(oplora_rate_step)(&l, 1, workspace, par) == OPLORA_OK);
    add_to_digest(l.generated, (size_t)N * sizeof(T));
}

static void TY(test_type)(void) {
    TY(test_lean)();
    for (int s = 0; s < SPLITS; s++) {
        TY(test_exact)(1, 1, 1, 2, splits[s]);
        TY(test_exact)(33, 7, 2047, 2051, splits[s]);
        TY(test_exact)(5, 130, 31, 33, splits[s]);
        TY(test_rate)(1, 2, splits[s]);
        TY(test_rate)(2047, 2051, splits[s]);
    }
}

#endif
