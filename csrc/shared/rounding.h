/* rounding: moments as lean state keeps them. bfloat16, rounded up with the probability that the dropped bits say, so that
 * a moving average of many small steps stays unbiased; the double twin rounds nothing. */
#ifndef OPLORA_ROUNDING_H
#define OPLORA_ROUNDING_H

#include "../core/oplora_core.h"
#include "shared.h"

#include <string.h>

/* A row's random bits: Wellons' lowbias32 hash. Its halves round two moments; a second hash, under the other key, two
 * more. */
OPLORA_SHARED uint32_t oplora_noise(uint32_t row, uint32_t key) {
    uint32_t x = row ^ key;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}
OPLORA_SHARED uint32_t oplora_other_key(uint32_t key) { return key ^ 0x9E3779B9u; }

OPLORA_SHARED float oplora_get_f32(oplora_moment_f32 stored) {
    const uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
OPLORA_SHARED oplora_moment_f32 oplora_put_f32(float value, uint32_t noise) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (oplora_moment_f32)((bits + (noise & 0xffff)) >> 16);
}

OPLORA_SHARED double oplora_get_f64(oplora_moment_f64 stored) { return stored; }
OPLORA_SHARED oplora_moment_f64 oplora_put_f64(double value, uint32_t noise) {
    (void)noise;
    return value;
}

#endif
