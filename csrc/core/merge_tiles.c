/* merge_tiles: the sums of merge.c, in float or double. */
#include "merge.h"

#include "dispatch.h"
#include "number.h"

#include <string.h>

/* packed (count, width) = rows [k, k + count) and columns [column, column + width) of `right`. The inner loop
 * goes along the axis that is contiguous in memory. */
static void TY(merge_pack)(matrix right, int64_t k, int64_t count, int64_t column, int64_t width, T *packed) {
    const float *const from = right.data + k * right.row + column * right.column;
    if (right.column == 1) {
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < width; j++) packed[i * width + j] = from[i * right.row + j];
    } else {
        for (int64_t j = 0; j < width; j++)
            for (int64_t i = 0; i < count; i++) packed[i * width + j] = from[i + j * right.column];
    }
}

/* sum += left[row, k : k + count] packed, for packed (count, width). */
static void TY(merge_add_rows)(const merge_job *job, int64_t row, int64_t k, int64_t count, const T *packed,
                               int64_t width, T *sum) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    for (int64_t first = 0; first < count; first += ROW_GROUP) {
        const int64_t n = count - first < ROW_GROUP ? count - first : ROW_GROUP;
        const float *const left = job->left.data + row * job->left.row + (k + first) * job->left.column;
        const T *rows[ROW_GROUP];
        T factor[ROW_GROUP];
        for (int64_t i = 0; i < n; i++) {
            rows[i] = packed + (first + i) * width;
            factor[i] = left[i * job->left.column];
        }
        kernels->axpy(rows, factor, n, sum, width);
    }
}

/* Columns [column, column + width) of every row of W. `right` is packed once if its r rows fit, as they do up
 * to r = PACK / MIN_TILE = 1024; above that in pieces, again for each row. */
static void TY(merge_tile)(const merge_job *job, void (*add)(unsigned char *, const T *, T, int64_t), int64_t column,
                           int64_t width, T *packed, T *sum) {
    const int64_t r = job->r, most = PACK / width, piece = r < most ? r : most;
    for (int64_t row = 0; row < job->rows; row++) {
        memset(sum, 0, (size_t)width * sizeof *sum);
        for (int64_t k = 0; k < r; k += piece) {
            const int64_t count = r - k < piece ? r - k : piece;
            if (row == 0 || piece < r) TY(merge_pack)(job->right, k, count, column, width, packed);
            TY(merge_add_rows)(job, row, k, count, packed, width, sum);
        }
        add(job->W + (row * job->columns + column) * job->itemsize, sum, (T)job->scaling, width);
    }
}

void TY(oplora_merge_columns)(const merge_job *job, void (*add)(unsigned char *, const T *, T, int64_t),
                              void *workspace) {
    T *const packed = workspace, *const sum = packed + PACK;
    int64_t tile = job->r < PACK / MIN_TILE ? PACK / job->r : MIN_TILE;
    if (tile > TILE) tile = TILE;
    for (int64_t column = 0; column < job->columns; column += tile) {
        const int64_t left = job->columns - column;
        TY(merge_tile)(job, add, column, left < tile ? left : tile, packed, sum);
    }
}
