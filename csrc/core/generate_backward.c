/* generate_backward: from g = dL/dv to the gradients of one generator.
 *
 *     dh  = W2^T g           W2 (N, H), g (N)
 *     d   = dh where h > 0, else 0
 *     dz  = W1^T d,   dW1 = d z^T,   dc1 = d
 *     dW2 = g h^T (rank one: handed back as h, never stored),   dc2 = g
 *
 * Memory-bound: reads W2 once; as columns, only those of units that are on, as d is zero elsewhere. Rows are summed in
 * fixed chunks and the chunks in order, in double: the number of threads does not matter. */
#include "dispatch.h"
#include "hidden.h"
#include "number.h"

typedef struct {
    const T *W2, *g, *h;
    double *partial; /* (chunks, H) */
    int64_t H, N;
} TY(backward_job);

static void TY(backward_rows)(const TY(backward_job) *job, int64_t begin, int64_t end, double *sum) {
    for (int64_t j = 0; j < job->H; j++) sum[j] = 0;
    for (int64_t n = begin; n < end; n++)
        for (int64_t j = 0; j < job->H; j++) sum[j] += (double)job->g[n] * job->W2[n * job->H + j];
}

static void TY(backward_columns)(const TY(backward_job) *job, int64_t begin, int64_t end, double *sum) {
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    for (int64_t j = 0; j < job->H; j++) sum[j] = 0;
    for (int64_t n = begin; n < end; n += COLUMN_BLOCK) {
        const int64_t count = end - n < COLUMN_BLOCK ? end - n : COLUMN_BLOCK;
        const T *column[COLUMN_GROUP];
        int64_t unit[COLUMN_GROUP], k = 0;
        double part[COLUMN_GROUP];
        for (int64_t j = 0; j < job->H; j++) {
            if (job->h[j] != 0) {
                column[k] = job->W2 + j * job->N + n;
                unit[k++] = j;
            }
            if (k == COLUMN_GROUP || j == job->H - 1) {
                kernels->dot(column, k, job->g + n, count, part);
                while (k > 0) k--, sum[unit[k]] += part[k];
            }
        }
    }
}

typedef struct {
    TY(backward_job) job;
    oplora_layout layout;
} TY(backward_context);

static void TY(backward_chunks)(int64_t first, int64_t last, void *context) {
    const TY(backward_context) *const c = context;
    for (int64_t chunk = first; chunk < last; chunk++) {
        const int64_t begin = chunk * BACKWARD_CHUNK,
                      end = begin + BACKWARD_CHUNK < c->job.N ? begin + BACKWARD_CHUNK : c->job.N;
        double *const sum = c->job.partial + chunk * c->job.H;
        if (c->layout == OPLORA_ROWS)
            TY(backward_rows)(&c->job, begin, end, sum);
        else
            TY(backward_columns)(&c->job, begin, end, sum);
    }
}

static OPLORA_BODY oplora_status TY(generate_backward)(const T *g, const T *z, const T *W1, const T *c1, const T *W2,
                                                       oplora_layout layout, int64_t H, int64_t Z, int64_t N, T *dz,
                                                       T *dW1, T *dc1, T *h, void *workspace, oplora_parallel_fn par) {
    OPLORA_RETURN_IF(!g || !z || !W1 || !c1 || !W2 || !dz || !dW1 || !dc1 || !h || !workspace, OPLORA_ENULL);
    OPLORA_RETURN_IF(oplora_size(H, Z, N) < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(layout != OPLORA_COLUMNS && layout != OPLORA_ROWS, OPLORA_EVALUE);
    TY(oplora_hidden)(z, W1, c1, H, Z, h);
    TY(backward_context) context = {{W2, g, h, workspace, H, N}, layout};
    OPLORA_FORWARD(oplora_parallel(par, backward_chunks(N), 1, TY(backward_chunks), &context));

    double *const d = context.job.partial + backward_chunks(N) * H, *const latent = d + H;
    for (int64_t j = 0; j < H; j++) {
        d[j] = 0;
        for (int64_t chunk = 0; h[j] > 0 && chunk < backward_chunks(N); chunk++)
            d[j] += context.job.partial[chunk * H + j];
        dc1[j] = (T)d[j];
        for (int64_t i = 0; i < Z; i++) dW1[j * Z + i] = (T)(d[j] * z[i]);
    }
    TY(oplora_hidden_latent_gradient)(d, W1, H, Z, latent);
    for (int64_t i = 0; i < Z; i++) dz[i] = (T)latent[i];
    return OPLORA_OK;
}

oplora_status TY(oplora_generate_backward)(const T *g, const T *z, const T *W1, const T *c1, const T *W2,
                                           oplora_layout layout, int64_t H, int64_t Z, int64_t N, T *dz, T *dW1, T *dc1,
                                           T *h, void *workspace, oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED,
                   TY(generate_backward)(g, z, W1, c1, W2, layout, H, Z, N, dz, dW1, dc1, h, workspace, par));
}
