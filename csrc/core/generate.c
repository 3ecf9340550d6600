/* generate: the factors of one layer, predicted by its generator (OP-LoRA, arXiv 2412.10362).
 *
 *     h = ReLU(W1 z + c1)   z (Z), W1 (H, Z), c1 (H)
 *     v = W2 h + c2         W2 (N, H) as H columns or row-major, c2 (N)
 *
 * Memory-bound: reads W2 once, writes N values. As columns, those of units that are off (about half at the paper's
 * start) are not read at all, and v stays in the first-level cache while they are added in order. */
#include "dispatch.h"
#include "hidden.h"
#include "number.h"

#include <string.h>

typedef struct {
    const T *W2, *c2, *h;
    T *v;
    int64_t H, N;
} TY(generate_job);

/* Row-major: one dot product an entry. */
static void TY(generate_rows)(int64_t first, int64_t last, void *context) {
    const TY(generate_job) *const job = context;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    for (int64_t n = first; n < last; n++) {
        double sum;
        const T *const row = job->W2 + n * job->H;
        kernels->dot(&row, 1, job->h, job->H, &sum);
        job->v[n] = (T)sum + job->c2[n];
    }
}

static void TY(generate_columns)(int64_t first, int64_t last, void *context) {
    const TY(generate_job) *const job = context;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    for (int64_t n = first * COLUMN_BLOCK; n < last * COLUMN_BLOCK && n < job->N; n += COLUMN_BLOCK) {
        const int64_t count = job->N - n < COLUMN_BLOCK ? job->N - n : COLUMN_BLOCK;
        const T *column[COLUMN_GROUP];
        T h[COLUMN_GROUP];
        int64_t k = 0;
        memcpy(job->v + n, job->c2 + n, (size_t)count * sizeof(T));
        for (int64_t j = 0; j < job->H; j++) {
            if (job->h[j] != 0) {
                column[k] = job->W2 + j * job->N + n;
                h[k++] = job->h[j];
            }
            if (k == COLUMN_GROUP || j == job->H - 1) {
                kernels->axpy(column, h, k, job->v + n, count);
                k = 0;
            }
        }
    }
}

static OPLORA_BODY oplora_status TY(generate)(const T *z, const T *W1, const T *c1, const T *W2, const T *c2,
                                              oplora_layout layout, int64_t H, int64_t Z, int64_t N, T *h, T *v,
                                              oplora_parallel_fn par) {
    OPLORA_RETURN_IF(!z || !W1 || !c1 || !W2 || !c2 || !h || !v, OPLORA_ENULL);
    OPLORA_RETURN_IF(oplora_size(H, Z, N) < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(layout != OPLORA_COLUMNS && layout != OPLORA_ROWS, OPLORA_EVALUE);
    TY(oplora_hidden)(z, W1, c1, H, Z, h);
    TY(generate_job) job = {W2, c2, h, v, H, N};
    if (layout == OPLORA_ROWS) return oplora_parallel(par, N, 1 + 65536 / H, TY(generate_rows), &job);
    return oplora_parallel(par, (N + COLUMN_BLOCK - 1) / COLUMN_BLOCK, 1 + 64 / H, TY(generate_columns), &job);
}

oplora_status TY(oplora_generate)(const T *z, const T *W1, const T *c1, const T *W2, const T *c2, oplora_layout layout,
                                  int64_t H, int64_t Z, int64_t N, T *h, T *v, oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED, TY(generate)(z, W1, c1, W2, c2, layout, H, Z, N, h, v, par));
}
