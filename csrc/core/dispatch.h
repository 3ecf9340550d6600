/* The table of inner loops for the processor at hand; see kernels.h for what each computes. Internal. */
#ifndef T
#ifndef OPLORA_DISPATCH_H
#define OPLORA_DISPATCH_H

#include "oplora_core.h"
#include "random.h"
#include "workspace.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define OPLORA_TEMPLATE "dispatch.h"
#include "each_type.h"

#define OPLORA_KEY_STEP 0x9E3779B185EBCA87u /* between the keys of blocks that follow each other in a fingerprint */

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
} oplora_range;

static inline void oplora_run_range(int64_t begin, int64_t end, void *range) {
    const oplora_range *const r = (const oplora_range *)range;
    const uint64_t mode = oplora_set_mode(OPLORA_FLUSHED);
    r->fn(begin, end, r->context);
    oplora_restore_mode(mode);
}

/* Calls fn over [0, n) on the caller's threads, in ranges of at least `grain`, in the core's mode; the caller of this is in
 * it already. */
static inline oplora_status oplora_parallel(oplora_parallel_fn par, int64_t n, int64_t grain, oplora_range_fn fn,
                                            void *context) {
    oplora_range range = {fn, context};
    if (n > 0 && (!par || n <= grain))
        fn(0, n, context);
    else if (n > 0 && par(0, n, grain, oplora_run_range, &range))
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
#else

/* x, the largest gradient that counts where it is beyond it. */
static inline T TY(oplora_bounded)(T x) {
    const T most = TY(oplora_most_gradient);
    const T low = x < most ? x : most;
    return low > -most ? low : -most;
}

/* A number of the hidden path likewise; NaN, of sums beyond double's range, is no direction. */
static inline T TY(oplora_narrowed)(double x) {
    const T most = TY(oplora_most_gradient);
    return x < most ? x > -most ? (T)x : -most : x >= most ? most : 0;
}

/* n entries of a gradient as steps take them: g itself or, if `squares`, the sum over g or more, tells of entries that are
 * too large, a copy in `room`. */
static inline const T *TY(oplora_bounded_gradient)(const T *g, int64_t n, double squares, T *room) {
    const double most = TY(oplora_most_gradient);
    if (squares <= most * most) return g;
    for (int64_t i = 0; i < n; i++) room[i] = TY(oplora_bounded)(g[i]);
    return room;
}

/* AdamW's numbers for one step, in the type of the loop: rate = lr / (1 - beta1^t), keep = 1 - lr weight_decay,
 * inverse_root = 1 / sqrt(1 - beta2^t), *_rest = 1 - beta. */
typedef struct {
    T beta1_rest, beta2, beta2_rest, keep, rate, eps, inverse_root;
} TY(adamw_numbers);

/* One lean step's numbers for the rows of one linear map: rate = lr / (1 - beta1^t) is the bias's, eps_row is eps in the
 * row factor's scale, second = (1 - beta2) mean(x^2) for the map's input x, key makes the rounding noise. */
typedef struct {
    T beta1_rest, beta2, beta2_rest, second, keep, rate, eps, eps_row, inverse_root;
    uint32_t key;
} TY(lean_numbers);

/* One step's numbers for a factor in adamw_rate.c: newest = m, kept = 1 - m, rate = eta, average = c,
 * rate_of_average = eta (1 - beta1 (1 - c)). */
typedef struct {
    T kept, newest, eps, weight_decay, rate, average, rate_of_average;
} TY(oplora_rate_numbers);

typedef struct {
    const char *name;
    void (*axpy)(const T *const *column, const T *h, int64_t count, T *restrict v, int64_t n);
    void (*dot)(const T *const *column, int64_t count, const T *g, int64_t n, double *out);
    double (*dot_double)(const T *a, const T *b, int64_t n);
    double (*square_sum)(const T *g, int64_t n, int64_t *nonfinite);
    void (*adamw)(T *p, T *m, T *s, const T *g, T h, T h_next, T *v, int64_t n, const TY(adamw_numbers) *numbers);
    double (*uniform_dot)(const oplora_stream *s, uint32_t vector, int64_t first, const T *x, int64_t n);
    void (*uniform_axpy)(const oplora_stream *s, uint32_t vector, int64_t first, T coefficient, T *y, int64_t n);
    void (*sign_words)(const oplora_stream *s, uint32_t group, int64_t first, int64_t n, uint32_t *words);
    void (*sign_dot)(const uint32_t *words, const int *bit, int64_t count, const T *x, int64_t n, double *out);
    void (*sign_axpy)(const uint32_t *words, const int *bit, const T *coefficient, int64_t count, T *y, int64_t n);
    void (*lean_scale)(const TY(oplora_moment) *R, const T *g, int64_t n, const TY(lean_numbers) *numbers, T *row,
                       T *scaled);
    void (*lean_second)(TY(oplora_moment) *m, TY(oplora_moment) *S, TY(oplora_moment) *R, const T *g, const T *base,
                        int64_t first, int64_t n, const TY(lean_numbers) *numbers, T *row, T *scaled, T *out);
    void (*lean_widen)(const TY(oplora_moment) *A, const T *row, int64_t n, T *wide, T *scaled);
    void (*lean_round)(const T *v, int64_t first, uint32_t key, int shift, int64_t n, TY(oplora_moment) *A);
    void (*lean_reduce21)(const TY(oplora_moment) *A, const TY(oplora_moment) *R, const T *U0, const T *U1, const T *g,
                          int64_t n, const TY(lean_numbers) *numbers, double kappa, double rho, double *sums);
    void (*lean_update21)(T *U0, T *U1, TY(oplora_moment) *A, TY(oplora_moment) *m, TY(oplora_moment) *S,
                          TY(oplora_moment) *R, const T *g, const T *base, int64_t first, int64_t n,
                          const TY(lean_numbers) *numbers, const T *weight, const T *turn0, const T *turn1,
                          const T *turn_A, T *out);
    void (*rate_direction)(const T *g, const T *s, int64_t n, const TY(oplora_rate_numbers) *numbers, T *u);
    void (*rate_update)(T *p, T *v, T *s, const T *g, int64_t n, const TY(oplora_rate_numbers) *numbers);
    void (*hash_blocks)(uint64_t *lanes, uint64_t *keys, const char *data, int64_t n);
} TY(oplora_kernels);

const TY(oplora_kernels) *TY(oplora_dispatch)(void);

#endif
