/* random: the seeded start of a generator, from a counter-based random number generator.
 *
 * Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter
 * of four words and a key of two into four random words. Here
 *
 *     key     = seed (low word, high word)
 *     counter = (index low, index high | tensor << 24, vector, layer)
 *
 * so that any entry can be made alone, in any order, on any device: lean state never stores W0. A tensor is cut into
 * vectors: W1 into its rows, a range of W2's rows that starts at random into its columns (or, for signs, into groups of
 * 32 columns), with entries counted from the range's first row. The index lays 16 consecutive counters, which the
 * vector unit makes together, side by side:
 *
 *     uniform   eight 16-bit numbers a counter: entry 128 b + 16 q + l is half q % 2 (0 the low one) of word q / 2 of
 *               counter 16 b + l; the number u means (2 u + 1 - 65536) 2^-16, an odd multiple of 2^-16 in (-1, 1)
 *     sign      a word a row for 32 columns: row 64 b + 16 w + l is word w of counter 16 b + l; a set bit is a minus
 *     normal    z: four words a counter, two normals a pair of words */
#ifndef T

#include "oplora_core.h"

#include "dispatch.h"

#include <math.h>
#include <string.h>

enum { START_ROWS = 16384 }; /* rows of W2 that one task fills */

static inline void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
    const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = (uint32_t)(b >> 32) ^ c1 ^ k0;
    c[1] = (uint32_t)b;
    c[2] = (uint32_t)(a >> 32) ^ c3 ^ k1;
    c[3] = (uint32_t)a;
}

static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++)
        philox_round(c, k0 + (uint32_t)round * 0x9E3779B9u, k1 + (uint32_t)round * 0xBB67AE85u);
}

void oplora_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    memmove(out, counter, 4 * sizeof *out);
    philox(out, key[0], key[1]);
}

/* Two words to two normals (Box and Muller). In double, so that float and double starts agree. */
static void normal_pair(const uint32_t word[2], double out[2]) {
    const double radius = sqrt(-2 * log((word[0] + 0.5) * 0x1p-32)), angle = 0x1.921fb54442d18p+2 * (word[1] * 0x1p-32);
    out[0] = radius * cos(angle);
    out[1] = radius * sin(angle);
}

int64_t oplora_size(int64_t H, int64_t Z, int64_t N) {
    int64_t w2, w1, total;
    if (H < 1 || Z < 1 || N < 1) return -1;
    if (__builtin_mul_overflow(H, N, &w2) || __builtin_mul_overflow(H, Z, &w1) ||
        __builtin_add_overflow(w2, w1, &total) || __builtin_add_overflow(total, N, &total) ||
        __builtin_add_overflow(total, H, &total) || __builtin_add_overflow(total, Z, &total))
        return -1;
    return total;
}

/* What the kernels' numbers are multiplied with: U(-1/sqrt(n), 1/sqrt(n)), and signs of the same variance. */
double oplora_start_bound(oplora_start_kind kind, int64_t fan_in) {
    return kind == OPLORA_UNIFORM ? OPLORA_UNIFORM_UNIT / sqrt((double)fan_in) : 1 / sqrt(3 * (double)fan_in);
}

oplora_stream oplora_w2_stream(uint64_t seed, uint32_t layer, oplora_start_kind kind, int64_t range) {
    const uint32_t tensor = kind == OPLORA_UNIFORM ? OPLORA_W2_TENSOR : OPLORA_SIGN_TENSOR;
    return (oplora_stream){seed, layer, tensor + OPLORA_RANGE_TENSORS * (uint32_t)range};
}

#define OPLORA_TEMPLATE "random.c"
#include "each_type.h"

#else

/* entries of z, N(0, deviation^2) */
void TY(oplora_start_latent)(uint64_t seed, uint32_t layer, int64_t Z, double deviation, T *z) {
    for (int64_t i = 0; i < Z; i += 4) {
        uint32_t word[4] = {(uint32_t)(i / 4), (uint32_t)(i / 4 >> 32) | OPLORA_Z_TENSOR << 24, 0, layer};
        double normal[4];
        philox(word, (uint32_t)seed, (uint32_t)(seed >> 32));
        normal_pair(word, normal);
        normal_pair(word + 2, normal + 2);
        for (int64_t k = 0; k < 4 && i + k < Z; k++) z[i + k] = (T)(deviation * normal[k]);
    }
}

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
            if (j % 32 == 0) kernels->sign_words(&job->s, (uint32_t)(j / 32), entry, n, words);
            kernels->sign_axpy(words, (const int[]){(int)(j % 32)}, (const T[]){(T)bound}, 1, column, n);
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
    const oplora_stream w1 = {seed, layer, OPLORA_W1_TENSOR};
    const T bound = (T)oplora_start_bound(OPLORA_UNIFORM, Z);
    for (int64_t j = 0; j < H; j++) kernels->uniform_axpy(&w1, (uint32_t)j, 0, bound, W1 + j * Z, Z);
    TY(oplora_start_latent)(seed, layer, Z, latent_std, z);
    return OPLORA_OK;
}

oplora_status TY(oplora_start)(T *parameters, int64_t H, int64_t Z, int64_t N, uint64_t seed, uint32_t layer,
                               double latent_std, oplora_start_kind kind, const oplora_rows *random, int64_t n_random,
                               oplora_parallel_fn par) {
    OPLORA_IN_MODE(OPLORA_FLUSHED,
                   TY(start)(parameters, H, Z, N, seed, layer, latent_std, kind, random, n_random, par));
}

#endif
