/* random: the seeded start of a generator, from a counter-based random number generator.
 *
 * Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter
 * of four words and a key of two into four random words. Here
 *
 *     key     = seed (low word, high word)
 *     counter = (row low, row high | tensor << 24, column / 4, layer), and column % 4 chooses the word
 *
 * so that any entry can be made alone, in any order, on any device: state that never stores W0 needs just that.
 * Ten rounds of two multiplications for four numbers; only the start pays for it. */
#ifndef T

#include "oplora_core.h"

#include <math.h>
#include <string.h>

enum { W2_TENSOR = 0, W1_TENSOR = 1, Z_TENSOR = 2 };
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

/* The stream of one tensor of one layer. */
typedef struct {
    uint64_t seed;
    uint32_t layer, tensor;
} stream;

static inline void four_words(stream s, int64_t row, int64_t column_group, uint32_t out[4]) {
    out[0] = (uint32_t)row;
    out[1] = (uint32_t)(row >> 32) | s.tensor << 24;
    out[2] = (uint32_t)column_group;
    out[3] = s.layer;
    philox(out, (uint32_t)s.seed, (uint32_t)(s.seed >> 32));
}

/* 24 bits of a word as one of the odd multiples of 2^-24 in (-1, 1): symmetric, never 0, and exact in float. */
static inline float symmetric(uint32_t word) { return (float)(2 * ((int32_t)(word >> 8) - (1 << 23)) + 1) * 0x1p-24f; }

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

#define OPLORA_TEMPLATE "random.c"
#include "each_type.h"

#else

/* out[i * stride] for columns 4 group .. 4 group + 3 of one row, bound * U(-1, 1). */
static void TY(uniform_row)(stream s, int64_t row, int64_t columns, T bound, T *out) {
    for (int64_t column = 0; column < columns; column += 4) {
        uint32_t word[4];
        four_words(s, row, column / 4, word);
        for (int64_t k = 0; k < 4 && column + k < columns; k++) out[column + k] = symmetric(word[k]) * bound;
    }
}

static void TY(normal_row)(stream s, int64_t columns, double deviation, T *out) {
    for (int64_t column = 0; column < columns; column += 4) {
        uint32_t word[4];
        double normal[4];
        four_words(s, 0, column / 4, word);
        normal_pair(word, normal);
        normal_pair(word + 2, normal + 2);
        for (int64_t k = 0; k < 4 && column + k < columns; k++) out[column + k] = (T)(deviation * normal[k]);
    }
}

typedef struct {
    T *W2;
    int64_t H, N;
    stream s;
    oplora_rows rows;
} TY(start_job);

/* Column by column inside a block of rows: W2 is stored so, and the rows go through the vector unit together. */
static void TY(uniform_columns)(int64_t first, int64_t last, void *context) {
    const TY(start_job) *job = context;
    const T bound = (T)(1 / sqrt((double)job->H));
    const int64_t begin = job->rows.begin + first * START_ROWS;
    const int64_t end =
        job->rows.begin + last * START_ROWS < job->rows.end ? job->rows.begin + last * START_ROWS : job->rows.end;
    for (int64_t group = 0; 4 * group < job->H; group++) {
        T *const column = job->W2 + 4 * group * job->N;
        const int64_t width = job->H - 4 * group < 4 ? job->H - 4 * group : 4;
        for (int64_t n = begin; n < end; n++) {
            uint32_t word[4];
            four_words(job->s, n, group, word);
            for (int64_t k = 0; k < width; k++) column[k * job->N + n] = symmetric(word[k]) * bound;
        }
    }
}

oplora_status TY(oplora_start)(T *parameters, int64_t H, int64_t Z, int64_t N, uint64_t seed, uint32_t layer,
                               double latent_std, const oplora_rows *uniform, int64_t n_uniform,
                               oplora_parallel_fn par) {
    if (!parameters || (n_uniform > 0 && !uniform)) return OPLORA_ENULL;
    if (oplora_size(H, Z, N) < 0 || n_uniform < 0) return OPLORA_ESIZE;
    if (!(latent_std >= 0 && latent_std < INFINITY)) return OPLORA_EVALUE;
    for (int64_t i = 0; i < n_uniform; i++)
        if (uniform[i].begin < 0 || uniform[i].begin > uniform[i].end || uniform[i].end > N) return OPLORA_ESIZE;

    for (int64_t i = 0; i < n_uniform; i++) {
        TY(start_job) job = {parameters, H, N, {seed, layer, W2_TENSOR}, uniform[i]};
        const int64_t tasks = (uniform[i].end - uniform[i].begin + START_ROWS - 1) / START_ROWS;
        if (!par || tasks < 2)
            TY(uniform_columns)(0, tasks, &job);
        else if (par(0, tasks, 1, TY(uniform_columns), &job))
            return OPLORA_EPARALLEL;
    }
    T *const W1 = parameters + H * N + N, *const z = W1 + H * Z + H;
    const T bound = (T)(1 / sqrt((double)Z));
    for (int64_t j = 0; j < H; j++) TY(uniform_row)((stream){seed, layer, W1_TENSOR}, j, Z, bound, W1 + j * Z);
    TY(normal_row)((stream){seed, layer, Z_TENSOR}, Z, latent_std, z);
    return OPLORA_OK;
}

#endif
