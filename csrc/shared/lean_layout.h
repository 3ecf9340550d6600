/* lean_layout: how lean state's rows are cut into work, and what lies where in a generator's state. */
#ifndef OPLORA_LEAN_LAYOUT_H
#define OPLORA_LEAN_LAYOUT_H

#include "../core/oplora_core.h"
#include "random.h"

/* Sums run within a block, then over the blocks of a chunk, the chunks of a part and the parts: nothing depends on who does
 * what. A chunk is rows of one factor; a part is chunks that follow each other. */
enum {
    LEAN_BLOCK = 512,      /* rows that are in the first-level cache together; a multiple of what the start asks for */
    LEAN_CHUNK = 4096,     /* rows of a chunk, at most */
    LEAN_MOST_PARTS = 512, /* of a layer: more than a GPU does at once */
    LEAN_FEW_PARTS = 64,   /* that a layer may have however much each of them sums, */
    LEAN_MOST_SUMS = 1 << 16 /* and how many numbers all parts sum beyond that: bounds the scratch */
};

/* What the first pass is to find: dh, the basis' Gram matrix. A measurement wants the one, a step that was measured the
 * other. */
enum { LEAN_WANTS_DH = 1, LEAN_WANTS_GRAM = 2 };

OPLORA_SHARED int64_t oplora_lean_chunks(int64_t rows) { return (rows + LEAN_CHUNK - 1) / LEAN_CHUNK; }

/* Words of signs a row. */
OPLORA_SHARED int64_t oplora_lean_words(int64_t H) { return (H + OPLORA_SIGNS - 1) / OPLORA_SIGNS; }

/* The basis [U, row A, row g], and the sums over a map's rows: its Gram matrix, then U^T g. */
OPLORA_SHARED int oplora_lean_basis(int d, int k) { return d + k + 1; }
OPLORA_SHARED int oplora_lean_sums(int d, int k) { return oplora_lean_basis(d, k) * oplora_lean_basis(d, k) + d; }

/* Into how many parts a layer's chunks are cut, each of which has as many sums and H more. */
OPLORA_SHARED int64_t oplora_lean_parts(int64_t chunks, int64_t sums, int64_t H) {
    int64_t most = H < LEAN_MOST_SUMS ? LEAN_MOST_SUMS / (sums + H) : 0;
    if (most > LEAN_MOST_PARTS) most = LEAN_MOST_PARTS;
    if (most < LEAN_FEW_PARTS) most = LEAN_FEW_PARTS;
    return chunks < most ? chunks : most;
}

/* Where each piece of a layer's numbers and moments begins, as oplora_core.h lists them, and how many there are. */
typedef struct {
    int64_t U, U1, pre, Q, B, r, Q1, B1, r1, z, z_avg, z_avg_sq, numbers;
    int64_t A, m, S, R, A1, m1, S1, R1, moments;
} oplora_lean_layout;

/* columns vectors of length numbers, from *begin on. */
typedef struct {
    int64_t *begin, columns, length;
} oplora_lean_piece;

static inline int oplora_lean_walk(const oplora_lean_piece *pieces, int n, int64_t *total) {
    *total = 0;
    for (int i = 0; i < n; i++) {
        int64_t size;
        *pieces[i].begin = *total;
        if (__builtin_mul_overflow(pieces[i].columns, pieces[i].length, &size) ||
            __builtin_add_overflow(*total, size, total))
            return 0;
    }
    return *total <= INT64_MAX / 64; /* so that bytes can be counted */
}

/* 0 if a size or rank is out of range. */
static inline int oplora_lean_lay_out(int64_t H, int64_t Z, int64_t N, int64_t d, int64_t k, oplora_lean_layout *to) {
    const oplora_lean_piece numbers[] = {{&to->U, d, N},  {&to->U1, d, H}, {&to->pre, 1, H},   {&to->Q, d, H},
                                         {&to->B, k, H},  {&to->r, 1, H},  {&to->Q1, d, Z},    {&to->B1, k, Z},
                                         {&to->r1, 1, Z}, {&to->z, 1, Z},  {&to->z_avg, 1, Z}, {&to->z_avg_sq, 1, Z}};
    const oplora_lean_piece moments[] = {{&to->A, k, N},  {&to->m, 1, N},  {&to->S, 1, N},  {&to->R, 1, N},
                                         {&to->A1, k, H}, {&to->m1, 1, H}, {&to->S1, 1, H}, {&to->R1, 1, H}};
    if (H < 1 || Z < 1 || N < 1 || d < 1 || d > OPLORA_MOST_RANK || k < 1 || k > OPLORA_MOST_RANK) return 0;
    return oplora_lean_walk(numbers, sizeof numbers / sizeof *numbers, &to->numbers) &&
           oplora_lean_walk(moments, sizeof moments / sizeof *moments, &to->moments);
}

#endif
