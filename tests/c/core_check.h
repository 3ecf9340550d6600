/* What the tests of the core share: a digest of results' bits, numbers that are the same on every machine, and ways to
 * split the work. */
#ifndef OPLORA_CORE_CHECK_H
#define OPLORA_CORE_CHECK_H

#include "oplora_core.h"

#include <stddef.h>
#include <stdlib.h>
#if defined(__APPLE__) || (defined(__GLIBC__) && __GLIBC__ * 100 + __GLIBC_MINOR__ >= 234)
#include <pthread.h>
#endif

static uint64_t digest = 14695981039346656037u;

static void add_to_digest(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) digest = (digest ^ ((const unsigned char *)data)[i]) * 1099511628211u;
}

static uint32_t noise_state;

static double noise(void) { /* in (-1, 1), the same on every machine */
    noise_state = noise_state * 1664525u + 1013904223u;
    return ((double)(noise_state >> 8) + 0.5) / (1 << 23) - 1;
}

static inline void *zeros(int64_t count, size_t size) {
    void *const memory = calloc(count ? (size_t)count : 1, size);
    if (!memory) abort();
    return memory;
}

/* Ways to split the work: odd ranges; backwards, one at a time; on two threads. */
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
/* Two threads at once, one index at a time: scratch that they shared would show. Only where libc itself has threads. */
#if defined(__APPLE__) || (defined(__GLIBC__) && __GLIBC__ * 100 + __GLIBC_MINOR__ >= 234)
typedef struct {
    int64_t begin, end;
    oplora_range_fn fn;
    void *context;
    int *here; /* how many threads have begun */
} half;
static inline void *every_second(void *argument) {
    const half *const work = argument;
    __atomic_add_fetch(work->here, 1, __ATOMIC_ACQ_REL);
    while (__atomic_load_n(work->here, __ATOMIC_ACQUIRE) < 2) {
    }
    for (int64_t at = work->begin; at < work->end; at += 2) work->fn(at, at + 1, work->context);
    return NULL;
}
static inline int32_t split_on_threads(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)grain;
    int here = 0;
    half odd = {begin + 1, end, fn, context, &here}, even = {begin, end, fn, context, &here};
    pthread_t thread;
    if (pthread_create(&thread, NULL, every_second, &odd)) return 1;
    every_second(&even);
    return pthread_join(thread, NULL);
}
#else
#define split_on_threads split_in_sevens
#endif

static const oplora_parallel_fn splits[] = {NULL, split_in_sevens, split_backwards, split_on_threads};
enum { SPLITS = sizeof splits / sizeof *splits };

static inline int32_t failing(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context) {
    (void)begin, (void)end, (void)grain, (void)fn, (void)context;
    return 1;
}

#endif
