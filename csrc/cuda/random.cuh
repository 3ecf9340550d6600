/* random: the start's random numbers and the rounding noise on the device, with the bits of csrc/core/random.c.
 *
 * Sixteen consecutive counters make the words of 128 uniform entries or of 64 rows of signs, laid out so that a group of
 * sixteen threads that takes entries (rows) l, l + 16, ... for its thread l needs the words of counter l alone. */
#ifndef OPLORA_RANDOM_CUH
#define OPLORA_RANDOM_CUH

#include "device.h"

#include "../core/random.h"

/* Philox 4x32-10: the words of counter (index, tensor, vector, layer). */
static __device__ __forceinline__ uint4 philox(const oplora_stream &s, uint64_t index, uint32_t vector) {
    uint32_t a = static_cast<uint32_t>(index), b = static_cast<uint32_t>(index >> 32) | s.tensor << 24, c = vector;
    uint32_t d = s.layer, k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t p = static_cast<uint64_t>(a) * 0xD2511F53u, q = static_cast<uint64_t>(c) * 0xCD9E8D57u;
        a = static_cast<uint32_t>(q >> 32) ^ b ^ k0;
        c = static_cast<uint32_t>(p >> 32) ^ d ^ k1;
        b = static_cast<uint32_t>(q);
        d = static_cast<uint32_t>(p);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(a, b, c, d);
}

static __device__ __forceinline__ uint32_t word_of(const uint4 &words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

/* The q-th of the eight numbers of a counter, in units of 2^-16. */
static __device__ __forceinline__ float uniform_of(const uint4 &words, int q) {
    const uint32_t word = word_of(words, q / 2);
    return static_cast<float>(static_cast<int>((q % 2 ? word >> 16 : word & 0xffffu) * 2) - 65535);
}

/* x with its sign changed where bit `bit` of the word is set. */
static __device__ __forceinline__ float signed_by(uint32_t word, int bit, float x) {
    return __uint_as_float(__float_as_uint(x) ^ (word << (31 - bit) & 0x80000000u));
}

/* A row's bits for stochastic rounding: Wellons' lowbias32 hash, as dispatch.c has it. */
static __device__ __forceinline__ uint32_t noise_of(uint32_t row, uint32_t key) {
    uint32_t x = row ^ key;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* bfloat16 moments, rounded up with the probability that the dropped bits say. */
static __device__ __forceinline__ float get_moment(uint16_t stored) {
    return __uint_as_float(static_cast<uint32_t>(stored) << 16);
}
static __device__ __forceinline__ uint16_t put_moment(float value, uint32_t noise) {
    return static_cast<uint16_t>((__float_as_uint(value) + (noise & 0xffffu)) >> 16);
}

/* Entry i of z: as normal_pair in random.c makes it. */
static __device__ __forceinline__ float latent_entry(uint64_t seed, uint32_t layer, int64_t i, double deviation) {
    const oplora_stream s = {seed, layer, OPLORA_Z_TENSOR};
    const uint4 words = philox(s, static_cast<uint64_t>(i / 4), 0);
    const uint32_t first = i % 4 < 2 ? words.x : words.z, second = i % 4 < 2 ? words.y : words.w;
    const double radius = sqrt(-2 * log((first + 0.5) * 0x1p-32)), angle = 0x1.921fb54442d18p+2 * (second * 0x1p-32);
    return static_cast<float>(deviation * (radius * (i % 2 ? sin(angle) : cos(angle))));
}

#endif
