/* What the tests of the core share: a digest of results' bits, numbers that are the same on every machine, and ways to
 * split the work. */
#ifndef OPLORA_CORE_CHECK_H
#define OPLORA_CORE_CHECK_H

#include "oplora_core.h"

static uint64_t digest = 14695981039346656037u;

static void add_to_digest(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ ((const unsigned char *)data)[i]) * 1099511628211u;
}

static uint32_t noise_state;

static double noise(void) { /* in (-1, 1), the same on every machine */
    noise_state = noise_state * 1664525u + 1013904223u;
    return ((double)(noise_state >> 8) + 0.5) / (1 << 23) - 1;
}

/* Three ways to split the work: odd ranges, backwards, one at a time. */
static inline int32_t split_in_sevens(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)grain;
    for (int64_t at = begin; at < end; at += 7) fn(at, at + 7 < end ? at + 7 : end, context);
    return 0;
}
static inline int32_t split_backwards(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)grain;
    for (int64_t at = end; at > begin; at--) fn(at - 1, at, context);
    return 0;
}
static inline int32_t failing(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)begin, (void)end, (void)grain, (void)fn, (void)context;
    return 1;
}

#endif
