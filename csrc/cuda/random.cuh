/* random: what a thread takes of the words of csrc/shared/random.h; csrc/core/random.c says how they are laid out.
 *
 * Sixteen consecutive counters make the words of 128 uniform entries or of 64 rows of signs, laid out so that a group of
 * sixteen threads that takes entries (rows) l, l + 16, ... for its thread l needs the words of counter l alone. */
#ifndef OPLORA_RANDOM_CUH
#define OPLORA_RANDOM_CUH

#include "../shared/random.h"
#include "device.h"

static __device__ __forceinline__ uint32_t word_of(const oplora_words &words, int i) {
    return i == 0 ? words.a : i == 1 ? words.b : i == 2 ? words.c : words.d;
}

/* The q-th of the eight numbers of a counter, in units of 2^-16. */
static __device__ __forceinline__ float uniform_of(const oplora_words &words, int q) {
    const uint32_t word = word_of(words, q / 2);
    return static_cast<float>(static_cast<int>((q % 2 ? word >> 16 : word & 0xffffu) * 2) - 65535);
}

/* x with its sign changed where bit `bit` of the word is set. */
static __device__ __forceinline__ float signed_by(uint32_t word, int bit, float x) {
    return __uint_as_float(__float_as_uint(x) ^ (word << (31 - bit) & 0x80000000u));
}

/* out[q] += the sum of +-x[unit] over the units from `first` to `end`, four at most, by the signs in word q: the core's sums
 * of four. Units that are off are left out. */
static __device__ __forceinline__ void add_four(const oplora_words &words, const float *x, int first, int end,
                                                float *out) {
    float sum[4] = {};
    bool on = false;
#pragma unroll 1
    for (int unit = first; unit < end; unit++) {
        const float some = x[unit];
        if (some == 0) continue;
        on = true;
#pragma unroll
        for (int q = 0; q < 4; q++) sum[q] += signed_by(word_of(words, q), unit, some);
    }
#pragma unroll
    for (int q = 0; on && q < 4; q++) out[q] += sum[q];
}

#endif
