/* Shapes of layers for the tests of lean state, the start's random numbers one at a time, and layers of them. */
#ifndef OPLORA_LEAN_SHAPES_H
#define OPLORA_LEAN_SHAPES_H

#include "check.h"
#include "core_check.h"
#include "dispatch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int64_t H, Z, rows[3]; /* of up to three factors */
    int random, based;     /* a bit for each factor: starts at random, has a base */
    int d, k;
    oplora_start_kind start;
} shape;

/* The fourth and the seventh are spread over the threads; others are longer than a block or a part, or have more units
 * than a block has rows, more inputs than rows, no random row at all. */
static const shape mixed[] = {
    {32, 16, {2048, 333, 0}, 1, 2, 2, 1, OPLORA_SIGN},    {1, 1, {1, 0, 0}, 1, 0, 2, 1, OPLORA_UNIFORM},
    {70, 3, {31, 33, 100}, 5, 1, 3, 2, OPLORA_SIGN},      {200, 8, {4500, 4800, 0}, 3, 2, 2, 1, OPLORA_SIGN},
    {33, 40, {129, 500, 0}, 2, 3, 1, 1, OPLORA_UNIFORM},  {600, 5, {700, 30, 0}, 1, 0, 2, 1, OPLORA_UNIFORM},
    {90, 8, {20000, 777, 0}, 1, 1, 3, 2, OPLORA_UNIFORM}, {520, 300, {64, 513, 0}, 3, 2, 1, 3, OPLORA_SIGN},
    {5, 128, {700, 9, 0}, 1, 0, 8, 8, OPLORA_SIGN},       {4, 2, {50, 60, 0}, 0, 0, 2, 1, OPLORA_SIGN},
};
enum { MIXED = sizeof mixed / sizeof *mixed };
/* The first has more chunks than a layer of many units has parts. */
static const shape large[] = {{2, 3, {270000, 1001, 0}, 1, 2, 2, 1, OPLORA_UNIFORM},
                              {2, 3, {99, 66000, 0}, 3, 2, 1, 1, OPLORA_SIGN}};
enum { LARGE = sizeof large / sizeof *large };
/* Of these the fourth is spread. */
static const shape few[] = {
    {32, 16, {2048, 333, 0}, 1, 2, 2, 1, OPLORA_SIGN}, {70, 3, {1031, 633, 5}, 3, 2, 3, 2, OPLORA_SIGN},
    {1, 1, {1, 0, 0}, 1, 0, 2, 1, OPLORA_UNIFORM},     {2000, 8, {3000, 5100, 0}, 1, 2, 2, 1, OPLORA_UNIFORM},
    {5, 128, {700, 9, 0}, 1, 2, 8, 8, OPLORA_SIGN},
};
enum { FEW = sizeof few / sizeof *few };
static const shape edge_shapes[] = {{33, 7, {2000, 100, 0}, 1, 2, 2, 1, OPLORA_SIGN},
                                    {1, 1, {1, 0, 0}, 1, 0, 2, 1, OPLORA_SIGN},
                                    {33, 2, {17, 1, 0}, 1, 2, 3, 2, OPLORA_UNIFORM},
                                    {3, 5, {40, 2, 0}, 0, 0, 1, 1, OPLORA_SIGN}};
enum { EDGE_SHAPES = sizeof edge_shapes / sizeof *edge_shapes };

static inline void stream_words(const oplora_stream *s, int64_t counter, uint32_t vector, uint32_t word[4]) {
    oplora_philox4x32_10(
        (const uint32_t[]){(uint32_t)counter, (uint32_t)(counter >> 32) | s->tensor << 24, vector, s->layer},
        (const uint32_t[]){(uint32_t)s->seed, (uint32_t)(s->seed >> 32)}, word);
}

static inline double uniform_entry(const oplora_stream *s, uint32_t vector, int64_t entry) { /* in units of 2^-16 */
    const int64_t number = entry % 128 / 16;
    uint32_t word[4];
    stream_words(s, entry / 128 * 16 + entry % 16, vector, word);
    return 2.0 * (word[number / 2] >> (number % 2 ? 16 : 0) & 0xffff) + 1 - 65536;
}

static inline uint32_t sign_word(const oplora_stream *s, uint32_t group, int64_t row) {
    uint32_t word[4];
    stream_words(s, row / 64 * 16 + row % 16, group, word);
    return word[row % 64 / 16];
}

static inline int sign_entry(const oplora_stream *s, int64_t column, int64_t row) {
    return sign_word(s, (uint32_t)(column / 32), row) >> column % 32 & 1 ? -1 : 1;
}

enum { SEED = 5 };

static inline void fill_start(const shape *like, uint32_t layer, double *W2, int64_t N, double *W1) {
    const int64_t H = like->H, Z = like->Z;
    uint32_t range = 0;
    for (int64_t f = 0, row = 0; f < 3; row += like->rows[f++]) {
        if (!(like->random >> f & 1)) continue;
        const oplora_stream s = {SEED, layer, 8 * range++ + (like->start == OPLORA_SIGN ? 3 : 0)};
        for (int64_t j = 0; j < H; j++)
            for (int64_t i = 0; i < like->rows[f]; i++)
                W2[j * N + row + i] = like->start == OPLORA_SIGN
                                          ? sign_entry(&s, j, i) / sqrt(3.0 * (double)H)
                                          : uniform_entry(&s, (uint32_t)j, i) / 65536 / sqrt((double)H);
    }
    const oplora_stream s = {SEED, layer, 1};
    for (int64_t j = 0; j < H; j++)
        for (int64_t i = 0; i < Z; i++) W1[i * H + j] = uniform_entry(&s, (uint32_t)j, i) / 65536 / sqrt((double)Z);
}

/* The documented noise of the rounding: lowbias32 of the row and a key. */
static inline uint32_t row_noise(uint32_t row, uint32_t key) {
    uint32_t x = row ^ key;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

#define OPLORA_TEMPLATE "../../tests/c/each_made.h"
#include "each_type.h"

#endif
