/* Which random number is whose: Philox, and the streams of a generator's start. core/random.c says how numbers are laid
 * out. */
#ifndef OPLORA_RANDOM_H
#define OPLORA_RANDOM_H

#include "../core/oplora_core.h"
#include "shared.h"

#include <math.h>

/* The stream of one tensor of one layer. W2 has one for each range of its rows that starts at random, as the entries of
 * a stream count from 0: OPLORA_W2_TENSOR + OPLORA_RANGE_TENSORS * i for the i-th. */
typedef struct {
    uint64_t seed;
    uint32_t layer, tensor;
} oplora_stream;

enum { OPLORA_W2_TENSOR = 0, OPLORA_W1_TENSOR = 1, OPLORA_Z_TENSOR = 2, OPLORA_SIGN_TENSOR = 3, OPLORA_ROUNDING = 4 };
enum { OPLORA_RANGE_TENSORS = 8 };
enum { OPLORA_SIGNS = 32 };                        /* units whose signs share a word */
static const double OPLORA_UNIFORM_UNIT = 0x1p-16; /* a uniform number is an odd multiple of this */

/* Philox 4x32's multipliers, and what its keys grow by from round to round. */
static const uint32_t OPLORA_PHILOX_A = 0xD2511F53u, OPLORA_PHILOX_B = 0xCD9E8D57u;
static const uint32_t OPLORA_PHILOX_K0 = 0x9E3779B9u, OPLORA_PHILOX_K1 = 0xBB67AE85u;

typedef struct {
    uint32_t a, b, c, d;
} oplora_words;

/* Philox 4x32-10 of one counter. */
OPLORA_SHARED oplora_words oplora_philox(oplora_words counter, uint32_t k0, uint32_t k1) {
    oplora_words w = counter;
    OPLORA_UNROLL
    for (int round = 0; round < 10; round++) {
        const uint64_t p = (uint64_t)w.a * OPLORA_PHILOX_A, q = (uint64_t)w.c * OPLORA_PHILOX_B;
        w.a = (uint32_t)(q >> 32) ^ w.b ^ k0;
        w.c = (uint32_t)(p >> 32) ^ w.d ^ k1;
        w.b = (uint32_t)q;
        w.d = (uint32_t)p;
        k0 += OPLORA_PHILOX_K0, k1 += OPLORA_PHILOX_K1;
    }
    return w;
}

/* The words of counter (index, tensor, vector, layer). */
OPLORA_SHARED oplora_words oplora_stream_words(oplora_stream s, uint64_t index, uint32_t vector) {
    oplora_words counter;
    counter.a = (uint32_t)index;
    counter.b = (uint32_t)(index >> 32) | s.tensor << 24;
    counter.c = vector;
    counter.d = s.layer;
    return oplora_philox(counter, (uint32_t)s.seed, (uint32_t)(s.seed >> 32));
}

OPLORA_SHARED oplora_stream oplora_stream_of(uint64_t seed, uint32_t layer, uint32_t tensor) {
    oplora_stream s;
    s.seed = seed;
    s.layer = layer;
    s.tensor = tensor;
    return s;
}

/* Of the i-th range of W2's rows that starts at random. */
OPLORA_SHARED oplora_stream oplora_w2_stream(uint64_t seed, uint32_t layer, oplora_start_kind kind, int64_t range) {
    const uint32_t tensor = kind == OPLORA_UNIFORM ? OPLORA_W2_TENSOR : OPLORA_SIGN_TENSOR;
    return oplora_stream_of(seed, layer, tensor + OPLORA_RANGE_TENSORS * (uint32_t)range);
}

/* Entry i of z, N(0, deviation^2), by Box and Muller. In double, so that float and double starts agree. */
OPLORA_SHARED double oplora_latent_entry(uint64_t seed, uint32_t layer, int64_t i, double deviation) {
    const oplora_words w = oplora_stream_words(oplora_stream_of(seed, layer, OPLORA_Z_TENSOR), (uint64_t)(i / 4), 0);
    const uint32_t first = i % 4 < 2 ? w.a : w.c, second = i % 4 < 2 ? w.b : w.d;
    const double radius = sqrt(-2 * log((first + 0.5) * 0x1p-32)), angle = 0x1.921fb54442d18p+2 * (second * 0x1p-32);
    return deviation * (radius * (i % 2 ? sin(angle) : cos(angle)));
}

/* The keys of a step's rounding noise (rounding.h), of which the first three words are used; map is 0 for W2, 1 for W1. */
OPLORA_SHARED oplora_words oplora_rounding_key(uint64_t seed, uint32_t layer, int64_t step, uint32_t map) {
    return oplora_stream_words(oplora_stream_of(seed, layer, OPLORA_ROUNDING), (uint64_t)step, map);
}

#ifdef __cplusplus
extern "C" {
#endif

double oplora_start_bound(oplora_start_kind kind, int64_t fan_in);

#ifdef __cplusplus
}
#endif

#endif
