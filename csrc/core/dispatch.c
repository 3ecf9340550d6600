/* dispatch: the inner loops of kernels.h compiled for each instruction set, and the choice between them, made once.
 *
 * A target pragma sets the instruction set per function, so the build needs no per-file flags and a wheel carries no
 * flag of the machine that built it. NEON belongs to aarch64's baseline: there "base" is the NEON build. */
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FN_JOIN_(name, type, isa) name##_##type##_##isa
#define FN_JOIN(name, type, isa) FN_JOIN_(name, type, isa)
#define FN(name) FN_JOIN(name, TNAME, ISA)

/* WIDE is the width of a register in bytes. WIDE_MULTIPLY: the 64-bit products of the low halves of 64-bit lanes, which
 * GCC does not see in (a & low) * b. NEIGHBOURS: the 64-bit lanes, each pair the other way round. */
#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (__typeof__(x)){__VA_ARGS__})
#endif
#define WIDE 16
#define NEIGHBOURS(x) SHUFFLE(x, 1, 0)
#if defined(__x86_64__)
#define WIDE_MULTIPLY(a, b) ((__typeof__(a))_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#else
#define WIDE_MULTIPLY(a, b) (((a) & 0xffffffffu) * (b))
#endif
#define ISA base
#define OPLORA_TEMPLATE "../core/kernels.h"
#include "../shared/each_type.h"
#undef ISA

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_X86 1

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#undef WIDE
#undef NEIGHBOURS
#define WIDE 32
#define NEIGHBOURS(x) SHUFFLE(x, 1, 0, 3, 2)
#undef WIDE_MULTIPLY
#define WIDE_MULTIPLY(a, b) ((__typeof__(a))_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#define ISA avx2
#define OPLORA_TEMPLATE "../core/kernels.h"
#include "../shared/each_type.h"
#undef ISA
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,prefer-vector-width=512")
#endif
#undef WIDE
#undef NEIGHBOURS
#define WIDE 64
#define NEIGHBOURS(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6)
#undef WIDE_MULTIPLY
#define WIDE_MULTIPLY(a, b) ((__typeof__(a))_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#define ISA avx512
#define OPLORA_TEMPLATE "../core/kernels.h"
#include "../shared/each_type.h"
#undef ISA
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#define ROW(type, isa) \
    {#isa, \
     axpy_##type##_##isa, \
     dot_##type##_##isa, \
     dot_double_##type##_##isa, \
     count_nonfinite_##type##_##isa, \
     adamw_##type##_##isa, \
     uniform_dot_##type##_##isa, \
     uniform_axpy_##type##_##isa, \
     sign_words_##type##_##isa, \
     sign_dot_##type##_##isa, \
     sign_axpy_##type##_##isa, \
     lean_scale_##type##_##isa, \
     lean_second_##type##_##isa, \
     lean_widen_##type##_##isa, \
     lean_round_##type##_##isa, \
     lean_reduce21_##type##_##isa, \
     lean_update21_##type##_##isa, \
     rate_direction_##type##_##isa, \
     rate_update_##type##_##isa, \
     hash_blocks_##type##_##isa}
#ifdef HAVE_X86
#define ROWS(type) {ROW(type, base), ROW(type, avx2), ROW(type, avx512)}
#else
#define ROWS(type) {ROW(type, base)}
#endif
static const oplora_kernels_f32 kernels_f32[] = ROWS(f32);
static const oplora_kernels_f64 kernels_f64[] = ROWS(f64);

static int choose(void) {
    int best = 0;
#ifdef HAVE_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) best = 1;
    if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        best = 2;
#endif
    const char *const want = getenv("OPLORA_ISA");
    for (int i = 0; want && i < best; i++)
        if (!strcmp(want, kernels_f32[i].name)) return i;
    return best;
}

static int chosen(void) {
    static int known = -1; /* idempotent: a race only repeats the choice */
    int index = __atomic_load_n(&known, __ATOMIC_ACQUIRE);
    if (index < 0) {
        index = choose();
        __atomic_store_n(&known, index, __ATOMIC_RELEASE);
    }
    return index;
}

const oplora_kernels_f32 *oplora_dispatch_f32(void) { return &kernels_f32[chosen()]; }
const oplora_kernels_f64 *oplora_dispatch_f64(void) { return &kernels_f64[chosen()]; }
const char *oplora_isa(void) { return kernels_f32[chosen()].name; }
