/* How every entry point runs: in the core's floating-point mode, on the caller's threads, and returning at the first
 * status that is not OPLORA_OK. Internal. */
#ifndef OPLORA_MODE_H
#define OPLORA_MODE_H

#include "oplora_core.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

/* ---- the floating-point mode: the core's own on every thread that works for it, so that no bit depends on the caller's
 *
 * Sums round to nearest. In all states subnormal numbers count as zero: moments of units that are off fade into the
 * subnormal range and would stay there, each operation on them costing a hundred cycles; zero is as right. A checkpoint's
 * own numbers (merge.c) stay what they are. ---- */

typedef enum { OPLORA_FLUSHED, OPLORA_GRADUAL } oplora_underflow;

/* Sets the mode of this thread and returns what it was, for oplora_restore_mode. */
static inline uint64_t oplora_set_mode(oplora_underflow underflow) {
#if defined(__x86_64__)
    const uint32_t state = _mm_getcsr(), flushes = 0x8040, rounding = 0x6000; /* of MXCSR */
    _mm_setcsr((state & ~(flushes | rounding)) | (underflow == OPLORA_FLUSHED ? flushes : 0));
    return state;
#elif defined(__aarch64__)
    const uint64_t flushes = (uint64_t)1 << 24, rounding = (uint64_t)3 << 22; /* of FPCR */
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state) : : "memory");
    __asm__ volatile("msr fpcr, %0"
                     :
                     : "r"((state & ~(flushes | rounding)) | (underflow == OPLORA_FLUSHED ? flushes : 0))
                     : "memory");
    return state;
#else
    (void)underflow;
    return 0;
#endif
}

static inline void oplora_restore_mode(uint64_t state) {
#if defined(__x86_64__)
    _mm_setcsr((uint32_t)state);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(state) : "memory");
#else
    (void)state;
#endif
}

/* All that an entry point does: the call, whose function is OPLORA_BODY, in the core's mode on the caller's thread. A body
 * is never inlined: the compiler knows nothing of the mode and would move arithmetic out of it. */
#define OPLORA_BODY __attribute__((noinline))
#define OPLORA_IN_MODE(underflow, call) \
    do { \
        const uint64_t mode_ = oplora_set_mode(underflow); \
        const oplora_status status_ = (call); \
        oplora_restore_mode(mode_); \
        return status_; \
    } while (0)

typedef struct {
    oplora_range_fn fn;
    void *context;
} oplora_work;

static inline void oplora_run_work(int64_t begin, int64_t end, void *work) {
    const oplora_work *const w = (const oplora_work *)work;
    const uint64_t mode = oplora_set_mode(OPLORA_FLUSHED);
    w->fn(begin, end, w->context);
    oplora_restore_mode(mode);
}

/* Calls fn over [0, n) on the caller's threads, in ranges of at least `grain`, in the core's mode; the caller of this is in
 * it already. */
static inline oplora_status oplora_parallel(oplora_parallel_fn par, int64_t n, int64_t grain, oplora_range_fn fn,
                                            void *context) {
    oplora_work work = {fn, context};
    if (n > 0 && (!par || n <= grain))
        fn(0, n, context);
    else if (n > 0 && par(0, n, grain, oplora_run_work, &work))
        return OPLORA_EPARALLEL;
    return OPLORA_OK;
}

#define OPLORA_RETURN_IF(condition, status) \
    do { \
        if (condition) return (status); \
    } while (0)
#define OPLORA_FORWARD(call) \
    do { \
        const oplora_status status_ = (call); \
        if (status_ != OPLORA_OK) return status_; \
    } while (0)

#endif
