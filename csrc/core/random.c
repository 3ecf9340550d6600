/* random: the seeded start of a generator, from a counter-based random number generator.
 *
 * Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter
 * of four words and a key of two into four random words. Here
 *
 *     key     = seed (low word, high word)
 *     counter = (index low, index high | tensor << 24, vector, layer)
 *
 * so that any entry can be made alone, in any order, on any device: lean state never stores W0. A tensor is cut into
 * vectors: W1 into its rows, a range of W2's rows that starts at random into its columns (or, for signs, into groups of
 * 32 columns), with entries counted from the range's first row. The index lays 16 consecutive counters, which the
 * vector unit makes together, side by side:
 *
 *     uniform   eight 16-bit numbers a counter: entry 128 b + 16 q + l is half q % 2 (0 the low one) of word q / 2 of
 *               counter 16 b + l; the number u means (2 u + 1 - 65536) 2^-16, an odd multiple of 2^-16 in (-1, 1)
 *     sign      a word a row for 32 columns: row 64 b + 16 w + l is word w of counter 16 b + l; a set bit is a minus
 *     normal    z: four words a counter, two normals a pair of words */
#include "random.h"

#include <math.h>
#include <string.h>

static inline void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = (uint32_t)(b >> 32) ^ c1 ^ k0;
    c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c[3] = (uint32_t)a;
}

static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++)
        philox_round(c, k0 + (uint32_t)round * 0x9E3779B9u, k1 + (uint32_t)round * 0xBB67AE85u);
}

void oplora_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    memmove(out, counter, 4 * sizeof *out);
    philox(out, key[0], key[1]);
}

/* What the kernels' numbers are multiplied with: U(-1/sqrt(n), 1/sqrt(n)), and signs of the same variance. */
double oplora_start_bound(oplora_start_kind kind, int64_t fan_in) {
    return kind == OPLORA_UNIFORM ? OPLORA_UNIFORM_UNIT / sqrt((double)fan_in) : 1 / sqrt(3 * (double)fan_in);
}

oplora_stream oplora_w2_stream(uint64_t seed, uint32_t layer, oplora_start_kind kind, int64_t range) {
    const uint32_t tensor = kind == OPLORA_UNIFORM ? OPLORA_W2_TENSOR : OPLORA_SIGN_TENSOR;
    return (oplora_stream){seed, layer, tensor + OPLORA_RANGE_TENSORS * (uint32_t)range};
}
