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
#include "../shared/random.h"

void oplora_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    const oplora_words w =
        oplora_philox((oplora_words){counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    out[0] = w.a, out[1] = w.b, out[2] = w.c, out[3] = w.d;
}

/* What the kernels' numbers are multiplied with: U(-1/sqrt(n), 1/sqrt(n)), and signs of the same variance. */
double oplora_start_bound(oplora_start_kind kind, int64_t fan_in) {
    return kind == OPLORA_UNIFORM ? OPLORA_UNIFORM_UNIT / sqrt((double)fan_in) : 1 / sqrt(3 * (double)fan_in);
}
