/* What merge.c, which knows dtypes, and merge_tiles.c, which adds, say to each other. Internal. */
#ifndef OPLORA_MERGE_H
#define OPLORA_MERGE_H

#include <stdint.h>

/* PACK numbers of `right` (64 KiB of float) and TILE sums lie in the workspace; ROW_GROUP rows of `right` are
 * pointed at from the stack at a time. MIN_TILE columns keep the vector unit busy, however large r is. */
enum { PACK = 16384, TILE = 1024, MIN_TILE = 16, ROW_GROUP = 64 };

/* Entry (i, j) of a float matrix at data[i * row + j * column]: A or B, as they are or transposed. */
typedef struct {
    const float *data;
    int64_t row, column;
} matrix;

typedef struct {
    unsigned char *W;
    int64_t rows, columns, r, itemsize;
    matrix left, right; /* (rows, r) and (r, columns) */
    double scaling;
} merge_job;

/* All columns of W, with `add` for the rows of its dtype. workspace: PACK + TILE numbers. */
void oplora_merge_columns_f32(const merge_job *job, void (*add)(unsigned char *, const float *, float, int64_t),
                              void *workspace);
void oplora_merge_columns_f64(const merge_job *job, void (*add)(unsigned char *, const double *, double, int64_t),
                              void *workspace);

#endif
