/* oplora_merge and oplora_round against scalar references: the merge one entry at a time, the rounding in double
 * arithmetic instead of on bits. */
#include "check.h"
#include "oplora_core.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- references ---- */

/* x to the nearest number with `digits` binary digits, multiples of 2^least at the finest, ties to even. */
static double nearest(double x, int digits, int least, double largest) {
    if (isnan(x) || isinf(x) || x == 0) return x;
    const int unit = ilogb(x) - digits + 1;
    const double rounded = ldexp(nearbyint(ldexp(x, -(unit > least ? unit : least))), unit > least ? unit : least);
    return fabs(rounded) > largest ? copysign(INFINITY, x) : rounded;
}

static double nearest_as(double x, oplora_dtype dtype) {
    switch (dtype) {
    case OPLORA_F16:
        return nearest(x, 11, -24, 65504);
    case OPLORA_BF16:
        return nearest(x, 8, -133, 0x1.FEp127);
    case OPLORA_F32:
        return (float)x;
    default:
        return x;
    }
}

static double half(uint16_t bits, oplora_dtype dtype) {
    const int fraction_bits = dtype == OPLORA_F16 ? 10 : 7, bias = dtype == OPLORA_F16 ? 15 : 127;
    const int exponent = (bits & 0x7FFF) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 2 * bias + 1) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexp(fraction, 1 - bias - fraction_bits);
    return sign * ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

/* The number at these bytes, aligned or not. */
static double widened(const unsigned char *bytes, oplora_dtype dtype) {
    float f32;
    double f64;
    uint16_t bits;
    switch (dtype) {
    case OPLORA_F32:
        return memcpy(&f32, bytes, sizeof f32), f32;
    case OPLORA_F64:
        return memcpy(&f64, bytes, sizeof f64), f64;
    default:
        return memcpy(&bits, bytes, sizeof bits), half(bits, dtype);
    }
}

static int same(double a, double b) { return (isnan(a) && isnan(b)) || (a == b && signbit(a) == signbit(b)); }

static size_t size_of(oplora_dtype dtype) { return dtype == OPLORA_F64 ? 8 : dtype == OPLORA_F32 ? 4 : 2; }

/* W + scaling * (B A) for one entry, with the sums, products and the one rounding that oplora_merge promises.
 */
static double merged_entry(double w, const float *A, const float *B, double scaling, int64_t in_features, int64_t r,
                           int64_t out, int64_t in, oplora_dtype dtype) {
    if (dtype == OPLORA_F64) {
        double sum = 0;
        for (int64_t k = 0; k < r; k++) sum += (double)B[out * r + k] * A[k * in_features + in];
        return w + scaling * sum;
    }
    float sum = 0;
    for (int64_t k = 0; k < r; k++) sum += B[out * r + k] * A[k * in_features + in];
    return nearest_as((float)w + (float)scaling * sum, dtype);
}

/* ---- rounding ---- */

static int rounds_right(uint32_t bits, oplora_dtype dtype) {
    float value;
    uint16_t got;
    memcpy(&value, &bits, sizeof value);
    CHECK(oplora_round(&value, 1, dtype, &got) == OPLORA_OK);
    return same(half(got, dtype), nearest_as(value, dtype));
}

/* Every number of the dtype, the middle between it and the next, and the floats just beside both. */
static void test_round_neighbourhoods(oplora_dtype dtype) {
    const int dropped = dtype == OPLORA_F16 ? 13 : 16;
    int wrong = 0;
    for (uint32_t bits = 0; bits < 0x8000; bits++) {
        const uint16_t stored = (uint16_t)bits;
        const float value = (float)half(stored, dtype);
        uint32_t centre;
        memcpy(&centre, &value, sizeof centre);
        for (int step = -1; step <= 1; step++) {
            wrong += !rounds_right(centre + (uint32_t)step, dtype);
            wrong += !rounds_right((centre + (1u << (dropped - 1)) + (uint32_t)step) | 0x80000000, dtype);
        }
    }
    CHECK(wrong == 0);
}

/* Floats spread over all 2^32: subnormals, infinities and NaN among them. */
static void test_round_everywhere(oplora_dtype dtype) {
    int wrong = 0;
    uint32_t bits = 1;
    for (int i = 0; i < 1 << 20; i++) {
        bits = bits * 1664525 + 1013904223;
        wrong += !rounds_right(bits, dtype);
    }
    const uint32_t edges[] = {0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x00000001,
                              0x33000000, 0x33000001, 0x387FF000, 0x387FEFFF, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF};
    for (size_t i = 0; i < sizeof edges / sizeof *edges; i++) wrong += !rounds_right(edges[i], dtype);
    CHECK(wrong == 0);
}

static void test_round_keeps_every_half(oplora_dtype dtype) {
    int wrong = 0;
    for (uint32_t bits = 0; bits <= 0xFFFF; bits++) {
        const uint16_t stored = (uint16_t)bits;
        const float value = (float)half(stored, dtype);
        uint16_t back;
        oplora_round(&value, 1, dtype, &back);
        wrong += isnan(value) ? !isnan(half(back, dtype)) : back != stored;
    }
    CHECK(wrong == 0);
}

static void test_round_statuses(void) {
    const float value = 1;
    double out = 0;
    CHECK(oplora_round(NULL, 1, OPLORA_F16, &out) == OPLORA_ENULL);
    CHECK(oplora_round(&value, 1, OPLORA_F16, NULL) == OPLORA_ENULL);
    CHECK(oplora_round(&value, -1, OPLORA_F16, &out) == OPLORA_ESIZE);
    CHECK(oplora_round(&value, 1, (oplora_dtype)9, &out) == OPLORA_EDTYPE);
    CHECK(oplora_round(&value, INT64_MAX, OPLORA_F64, &out) == OPLORA_EOVERFLOW);
    CHECK(oplora_round(&value, 0, OPLORA_BF16, &out) == OPLORA_OK && out == 0);
    CHECK(oplora_round(&value, 1, OPLORA_F64, &out) == OPLORA_OK && out == 1);
}

/* ---- merging ---- */

static float random_number(uint32_t *state) {
    *state = *state * 1664525 + 1013904223;
    return (float)((int32_t)*state) * 0x1p-31f;
}

/* malloc of exactly these bytes: the sanitizers see any access beyond them. */
static void *bytes(size_t n) {
    void *const p = malloc(n);
    if (!p) exit(2);
    return p;
}

static float *random_numbers(int64_t n, uint32_t seed) {
    float *const numbers = bytes((size_t)n * sizeof *numbers);
    for (int64_t i = 0; i < n; i++) numbers[i] = random_number(&seed);
    return numbers;
}

/* `offset` bytes from an aligned address: checkpoints align nothing. */
static void test_merge_equals_reference(oplora_dtype dtype, int64_t out_features, int64_t in_features, int64_t r,
                                        int transposed, size_t offset) {
    const size_t item = size_of(dtype), count = (size_t)(out_features * in_features);
    float *const A = random_numbers(r * in_features, 1), *const B = random_numbers(out_features * r, 2);
    float *const start = random_numbers((int64_t)count, 3);
    unsigned char *const W = bytes(offset + count * item), *const before = bytes(count * item);
    void *const workspace = bytes((size_t)oplora_merge_workspace_bytes(transposed ? out_features : in_features));
    CHECK(oplora_round(start, (int64_t)count, dtype, before) == OPLORA_OK);
    memcpy(W + offset, before, count * item);
    CHECK(oplora_merge(W + offset, dtype, A, B, 0.7, out_features, in_features, r, transposed, workspace) == OPLORA_OK);
    int wrong = 0;
    for (int64_t out = 0; out < out_features; out++)
        for (int64_t in = 0; in < in_features; in++) {
            const size_t at = (size_t)(transposed ? in * out_features + out : out * in_features + in) * item;
            const double want = merged_entry(widened(before + at, dtype), A, B, 0.7, in_features, r, out, in, dtype);
            wrong += !same(widened(W + offset + at, dtype), want);
        }
    if (wrong)
        fprintf(stderr, "dtype %d, W (%lld, %lld), r %lld, transposed %d, offset %zu: %d entries differ\n", (int)dtype,
                (long long)out_features, (long long)in_features, (long long)r, transposed, offset, wrong);
    CHECK(wrong == 0);
    free(A), free(B), free(start), free(W), free(before), free(workspace);
}

static void test_merge_sizes(oplora_dtype dtype, int transposed) {
    /* one tile and several, r in one piece and in two (above 1024), single rows, columns and ranks */
    const int64_t sizes[][3] = {{1, 1, 1},     {1, 129, 3},  {129, 1, 1},   {7, 1134, 16},
                                {65, 130, 65}, {5, 2100, 5}, {33, 40, 1030}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t offset = 0; offset < 4; offset += 1 + 2 * (i % 2))
            test_merge_equals_reference(dtype, sizes[i][0], sizes[i][1], sizes[i][2], transposed, offset);
}

static void test_merge_statuses(void) {
    float W = 1, A = 2, B = 3;
    double *const space = bytes((size_t)oplora_merge_workspace_bytes(1));
    const int64_t huge = INT64_C(1) << 40;
    CHECK(oplora_merge(NULL, OPLORA_F32, &A, &B, 1, 1, 1, 1, 0, space) == OPLORA_ENULL);
    CHECK(oplora_merge(&W, OPLORA_F32, NULL, &B, 1, 1, 1, 1, 0, space) == OPLORA_ENULL);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, NULL, 1, 1, 1, 1, 0, space) == OPLORA_ENULL);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 1, 1, 1, 1, 0, NULL) == OPLORA_ENULL);
    CHECK(oplora_merge(&W, (oplora_dtype)-1, &A, &B, 1, 1, 1, 1, 0, space) == OPLORA_EDTYPE);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 1, 0, 1, 1, 0, space) == OPLORA_ESIZE);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 1, 1, -1, 1, 0, space) == OPLORA_ESIZE);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 1, 1, 1, 0, 0, space) == OPLORA_ESIZE);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 1, huge, huge, 1, 0, space) == OPLORA_EOVERFLOW);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 1, 1, huge, huge, 0, space) == OPLORA_EOVERFLOW);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, NAN, 1, 1, 1, 0, space) == OPLORA_EVALUE);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, INFINITY, 1, 1, 1, 0, space) == OPLORA_EVALUE);
    CHECK(W == 1);
    CHECK(oplora_merge(&W, OPLORA_F32, &A, &B, 0.5, 1, 1, 1, 0, space) == OPLORA_OK && W == 4);
    CHECK(oplora_merge_workspace_bytes(0) == -1);
    CHECK(oplora_merge_workspace_bytes(INT64_MAX) > 0);
    free(space);
}

int main(void) {
    const oplora_dtype halves[] = {OPLORA_F16, OPLORA_BF16};
    const oplora_dtype all[] = {OPLORA_F32, OPLORA_F16, OPLORA_BF16, OPLORA_F64};
    for (int i = 0; i < 2; i++) {
        test_round_neighbourhoods(halves[i]);
        test_round_everywhere(halves[i]);
        test_round_keeps_every_half(halves[i]);
    }
    test_round_statuses();
    for (int i = 0; i < 4; i++) {
        test_merge_sizes(all[i], 0);
        test_merge_sizes(all[i], 1);
    }
    test_merge_statuses();
    return check_report();
}
