/* start: the paper's start of a generator, appendix C.1, from the numbers of random.c. */
#include "dispatch.h"
#include "number.h"

#include <math.h>

enum { START_ROWS = 16384 }; /* rows of W2 that one task fills */

typedef struct {
    T *W2;
    int64_t H, N;
    oplora_stream s;
    oplora_rows rows;
    oplora_start_kind kind;
} TY(start_job);

/* Column by column inside a block of rows: W2 is stored so, and the rows go through the vector unit together. */
static void TY(start_rows)(int64_t first, int64_t last, void *context) {
    const TY(start_job) *job = context;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const double bound = oplora_start_bound(job->kind, job->H);
    for (int64_t entry = first * START_ROWS; entry < last * START_ROWS; entry += START_ROWS) {
        const int64_t row = job->rows.begin + entry, left = job->rows.end - row;
        const int64_t n = left < START_ROWS ? left : START_ROWS;
        uint32_t words[START_ROWS];
        for (int64_t j = 0; j < job->H; j++) {
            T *const column = job->W2 + j * job->N + row;
            if (job->kind == OPLORA_UNIFORM) {
                kernels->uniform_axpy(&job->s, (uint32_t)j, entry, (T)bound, column, n);
                continue;
            }
            T unit[OPLORA_SIGNS] = {0};
            unit[j % OPLORA_SIGNS] = (T)bound;
            if (j % OPLORA_SIGNS == 0) kernels->sign_words(&job->s, (uint32_t)(j / OPLORA_SIGNS), entry, n, words);
            kernels->sign_axpy(words, unit, column, n);
        }
    }
}

static OPLORA_BODY oplora_status TY(start)(T *parameters, int64_t H, int64_t Z, int64_t N, uint64_t seed,
                                           uint32_t layer, double latent_std, oplora_start_kind kind,
                                           const oplora_rows *random, int64_t n_random, oplora_parallel_fn par) {
    OPLORA_RETURN_IF(!parameters || (n_random > 0 && !random), OPLORA_ENULL);
    OPLORA_RETURN_IF(oplora_size(H, Z, N) < 0 || n_random < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(n_random > OPLORA_MOST_RANGES, OPLORA_ERANGES);
    OPLORA_RETURN_IF(!(latent_std >= 0 && latent_std < INFINITY), OPLORA_EVALUE);
    OPLORA_RETURN_IF(kind != OPLORA_UNIFORM && kind != OPLORA_SIGN, OPLORA_EVALUE);
    for (int64_t i = 0; i < n_random; i++)
        OPLORA_RETURN_IF(random[i].begin < 0 || random[i].begin > random[i].end || random[i].end > N, OPLORA_ESIZE);

    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    for (int64_t i = 0; i < n_random; i++) {
        TY(start_job) job = {parameters, H, N, oplora_w2_stream(seed, layer, kind, i), random[i], kind};
        const int64_t tasks = (random[i].end - random[i].begin + START_ROWS - 1) / START_ROWS;
        OPLORA_FORWARD(oplora_parallel(par, tasks, 1, TY(start_rows), &job));
    }
    T *const W1 = parameters + H * N + N, *const z = W1 + H * Z + H;
    const oplora_stream w1 = oplora_stream_of(seed, layer, OPLORA_W1_TENSOR);
    const T bound = (T)oplora_start_bound(OPLORA_UNIFORM, Z);
    for (int64_t j = 0; j < H; j++) kernels->uniform_axpy(&w1, (uint32_t)j, 0, bound, W1 + j * Z, Z);
    for (int64_t i = 0; i < Z; i++) z[i] = (T)oplora_latent_entry(seed, layer, i, latent_std);
    return OPLORA_OK;
}

oplora_status TY(oplora_start)(T *parameters, int64_t H, int64_t Z, int64_t N, uint64_t seed, uint32_t layer,
                               double latent_std, oplora_start_kind kind, const oplora_rows *random, int64_t n_random,
                               oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED,
                   TY(start)(parameters, H, Z, N, seed, layer, latent_std, kind, random, n_random, par));
}
