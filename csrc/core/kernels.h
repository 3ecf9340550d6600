/* The inner loops, included by dispatch.c once for every number type and instruction set.
 *
 * T is float or double, FN(name) is name_<type>_<instruction set>. All loops are plain C that the compiler
 * vectorises. Elementwise loops give the same bits on every instruction set, as contraction is off and sqrt and
 * division are exact; sums do because they run in a fixed number of lanes, 64 bytes wide, whatever the registers: a row
 * of PIECES registers, written as such because compilers lower wider vectors through memory. */

enum { FN(LANES) = 64 / sizeof(T), FN(PIECE) = WIDE / sizeof(T), FN(DOUBLES) = WIDE / 8 };
#define PIECES (64 / WIDE)
typedef T FN(piece) __attribute__((vector_size(WIDE), aligned(sizeof(T)), may_alias));
typedef T FN(few) __attribute__((vector_size(FN(DOUBLES) *sizeof(T)), aligned(sizeof(T)), may_alias));
typedef double FN(doubles) __attribute__((vector_size(WIDE), aligned(8), may_alias));
#define VECTOR(p) (*(const FN(piece) *)(p))
#define WIDENED(p) __builtin_convertvector(*(const FN(few) *)(p), FN(doubles))

#include "kernels_sums.h"

#include "kernels_random.h"
#include "kernels_rows.h"

/* Eight lanes of fingerprint.c over n blocks of 64 bytes, which take part under the keys of their places. The product is
 * of the word's halves, scrambled by the key; the neighbour's word itself goes to each lane, so that a word that changes
 * alone always shows. */
static void FN(hash_blocks)(uint64_t *lanes, uint64_t *keys, const char *data, int64_t n) {
    typedef uint64_t words __attribute__((vector_size(WIDE), aligned(1), may_alias));
    enum { EACH = WIDE / 8 };
    words lane[PIECES], key[PIECES];
    memcpy(lane, lanes, 64);
    memcpy(key, keys, 64);
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int q = 0; q < PIECES; q++) {
            const words word = *(const words *)(data + 64 * i + WIDE * q), mixed = word ^ key[q];
            lane[q] += WIDE_MULTIPLY(mixed, mixed >> 32) + NEIGHBOURS(word);
            key[q] += OPLORA_KEY_STEP;
        }
    memcpy(lanes, lane, 64);
    memcpy(keys, key, 64);
}

#undef PIECES
#undef VECTOR
#undef WIDENED
