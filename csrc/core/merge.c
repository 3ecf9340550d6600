/* merge: a LoRA adapter folded into the weight that it adapts, on the checkpoint's own numbers.
 *
 *     W += scaling B A     W (out_features, in_features) or its transpose, in float32, float64, float16 or bfloat16;
 *                          A (r, in_features), B (out_features, r) in float32; all row-major
 *
 * 2 r products and sums an entry of W, which is read and written once. Row by row of W,
 *
 *     row i of the product = sum over k of left[i, k] * (row k of right)
 *
 * with left = B, right = A, or left = A^T, right = B^T where W is transposed: rows are added to rows, all contiguous,
 * by the same vectorised loop as in generate. A tile of the columns of `right`, packed once, stays in the cache while
 * all rows of W pass by. Sums run in the order of k, so the bits don't depend on the instruction set or the tiles.
 *
 * float16 and bfloat16 are converted in integer arithmetic, without the processor's own instructions: every build
 * rounds alike. Subnormal numbers count, also where the process flushes them to zero: a checkpoint may hold some. */
#include "merge.h"

#include "dispatch.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* ---- one number at a time: bits in, bits out ---- */

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of_bfloat16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* To nearest, ties to even: adds just under half a unit in the last place that stays, and that place itself.
 * A NaN keeps its sign and upper payload and becomes quiet. */
static inline uint16_t bfloat16_of(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

/* The exponent's bias grows by 127 - 15 = 112. Subnormals are multiples of 2^-24, which is the last place of
 * 0.5f. */
static inline float float_of_float16(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
    const uint32_t normal = (magnitude << 13) + (112u << 23), special = normal + (112u << 23);
    const uint32_t subnormal = bits_of(float_of(0x3F000000 + magnitude) - 0.5f);
    return float_of(sign | (magnitude < 0x0400 ? subnormal : magnitude < 0x7C00 ? normal : special));
}

/* As bfloat16_of, and below 2^-14 by the sum with 0.5, which rounds to multiples of 2^-24. A mantissa that
 * rounds up carries into the exponent, also into infinity. */
static inline uint16_t float16_of(float value) {
    const uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7FFFFFFF;
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
    const uint32_t large = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
    return (uint16_t)(sign | (magnitude < 0x38800000 ? subnormal : magnitude < 0x47800000 ? normal : large));
}

/* ---- one row: w[i] += scaling * sum[i], rounded once. w need not be aligned, so every access is a memcpy ---- */

#define DEFINE_ADD(name, T, STORED, WIDEN, NARROW) \
    static void name(unsigned char *restrict w, const T *restrict sum, T scaling, int64_t n) { \
        for (int64_t i = 0; i < n; i++) { \
            STORED stored; \
            memcpy(&stored, w + i * (int64_t)sizeof stored, sizeof stored); \
            stored = NARROW(WIDEN(stored) + scaling * sum[i]); \
            memcpy(w + i * (int64_t)sizeof stored, &stored, sizeof stored); \
        } \
    }
DEFINE_ADD(add_f32, float, float, , )
DEFINE_ADD(add_f64, double, double, , )
DEFINE_ADD(add_f16, float, uint16_t, float_of_float16, float16_of)
DEFINE_ADD(add_bf16, float, uint16_t, float_of_bfloat16, bfloat16_of)

/* ---- entry points ---- */

static int64_t itemsize_of(oplora_dtype dtype) {
    switch (dtype) {
    case OPLORA_F32:
        return 4;
    case OPLORA_F16:
    case OPLORA_BF16:
        return 2;
    case OPLORA_F64:
        return 8;
    }
    return 0;
}

/* Whether a * b numbers of `itemsize` bytes can be counted in 63 bits. */
static int fits(int64_t a, int64_t b, int64_t itemsize) {
    int64_t product;
    return !__builtin_mul_overflow(a, b, &product) && !__builtin_mul_overflow(product, itemsize, &product);
}

int64_t oplora_merge_workspace_bytes(int64_t columns) {
    if (columns < 1) return -1;
    return (PACK + (columns < TILE ? columns : TILE)) * (int64_t)sizeof(double);
}

static OPLORA_BODY oplora_status merge(void *W, oplora_dtype dtype, const float *A, const float *B, double scaling,
                                       int64_t out_features, int64_t in_features, int64_t r, int transposed,
                                       void *workspace) {
    const int64_t itemsize = itemsize_of(dtype);
    OPLORA_RETURN_IF(!W || !A || !B || !workspace, OPLORA_ENULL);
    OPLORA_RETURN_IF(!itemsize, OPLORA_EDTYPE);
    OPLORA_RETURN_IF(out_features < 1 || in_features < 1 || r < 1, OPLORA_ESIZE);
    OPLORA_RETURN_IF(!fits(out_features, in_features, itemsize), OPLORA_EOVERFLOW);
    OPLORA_RETURN_IF(!fits(r, in_features, sizeof *A) || !fits(out_features, r, sizeof *B), OPLORA_EOVERFLOW);
    OPLORA_RETURN_IF(!(fabs(scaling) <= FLT_MAX), OPLORA_EVALUE);

    merge_job job = {W, out_features, in_features, r, itemsize, {B, r, 1}, {A, in_features, 1}, scaling};
    if (transposed) {
        job.rows = in_features, job.columns = out_features;
        job.left = (matrix){A, 1, in_features}, job.right = (matrix){B, 1, r};
    }
    switch (dtype) {
    case OPLORA_F32:
        oplora_merge_columns_f32(&job, add_f32, workspace);
        break;
    case OPLORA_F16:
        oplora_merge_columns_f32(&job, add_f16, workspace);
        break;
    case OPLORA_BF16:
        oplora_merge_columns_f32(&job, add_bf16, workspace);
        break;
    case OPLORA_F64:
        oplora_merge_columns_f64(&job, add_f64, workspace);
        break;
    }
    return OPLORA_OK;
}

oplora_status oplora_merge(void *W, oplora_dtype dtype, const float *A, const float *B, double scaling,
                           int64_t out_features, int64_t in_features, int64_t r, int transposed, void *workspace) {
    OPLORA_IN_MODE(OPLORA_GRADUAL, merge(W, dtype, A, B, scaling, out_features, in_features, r, transposed, workspace));
}

static OPLORA_BODY oplora_status round_to(const float *values, int64_t n, oplora_dtype dtype, void *out) {
    const int64_t itemsize = itemsize_of(dtype);
    OPLORA_RETURN_IF(!values || !out, OPLORA_ENULL);
    OPLORA_RETURN_IF(!itemsize, OPLORA_EDTYPE);
    OPLORA_RETURN_IF(n < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(!fits(n, 1, itemsize), OPLORA_EOVERFLOW);
    uint16_t *const half = out;
    double *const wide = out;
    switch (dtype) {
    case OPLORA_F32:
        memcpy(out, values, (size_t)n * sizeof *values);
        break;
    case OPLORA_F16:
        for (int64_t i = 0; i < n; i++) half[i] = float16_of(values[i]);
        break;
    case OPLORA_BF16:
        for (int64_t i = 0; i < n; i++) half[i] = bfloat16_of(values[i]);
        break;
    case OPLORA_F64:
        for (int64_t i = 0; i < n; i++) wide[i] = values[i];
        break;
    }
    return OPLORA_OK;
}

oplora_status oplora_round(const float *values, int64_t n, oplora_dtype dtype, void *out) {
    OPLORA_IN_MODE(OPLORA_GRADUAL, round_to(values, n, dtype, out));
}
