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

#endif
