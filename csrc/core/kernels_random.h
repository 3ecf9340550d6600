/* The inner loops that make the start's random numbers where they are used. Included by kernels.h, with its names. */

typedef uint64_t FN(wide) __attribute__((vector_size(WIDE)));
typedef uint32_t FN(wide_words) __attribute__((vector_size(WIDE), aligned(4), may_alias));
typedef uint32_t FN(words) __attribute__((vector_size(4 * FN(PIECE)), aligned(4), may_alias));
typedef int32_t FN(ints) __attribute__((vector_size(4 * FN(PIECE))));
typedef __typeof__(__builtin_choose_expr(sizeof(T) == 4, (uint32_t)0, (uint64_t)0)) FN(bit_word);
typedef FN(bit_word) FN(bit_words) __attribute__((vector_size(WIDE)));
#define WORDS(p) (*(const FN(words) *)(p))
/* of sums over random numbers, in sixteen lanes for every T */
#define SUM_PIECES (16 / FN(PIECE))

/* The four words of the counters first .. first + 15, word by word: random.c has the counter. Two registers of 64-bit
 * lanes, even and odd counters, go through the rounds side by side; the garbage in their upper halves never matters. */
static inline __attribute__((always_inline)) void FN(philox16)(const oplora_stream *s, uint64_t first, uint32_t third,
                                                               uint32_t out[4][16]) {
    enum { PAIR = 2 * WIDE / 8 };
    const FN(wide) zero = {0}, low = zero + 0xffffffffu;
    const FN(wide) multiplier_a = zero + OPLORA_PHILOX_A, multiplier_b = zero + OPLORA_PHILOX_B;
    FN(wide) lane;
    for (int l = 0; l < PAIR / 2; l++) lane[l] = 2 * (uint64_t)l;
    for (int i = 0; i < 16 / PAIR; i++) {
        const uint64_t tensor = (uint64_t)s->tensor << 24;
        FN(wide) a = lane + (first + (uint64_t)(i * PAIR)), a_odd = a + 1;
        FN(wide) b = a >> 32 | tensor, b_odd = a_odd >> 32 | tensor;
        FN(wide) c = zero + third, c_odd = c, d = zero + s->layer, d_odd = d;
        uint32_t k0 = (uint32_t)s->seed, k1 = (uint32_t)(s->seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            const FN(wide) p = WIDE_MULTIPLY(a, multiplier_a), q = WIDE_MULTIPLY(c, multiplier_b);
            const FN(wide) p_odd = WIDE_MULTIPLY(a_odd, multiplier_a), q_odd = WIDE_MULTIPLY(c_odd, multiplier_b);
            a = q >> 32 ^ b ^ (uint64_t)k0, a_odd = q_odd >> 32 ^ b_odd ^ (uint64_t)k0;
            c = p >> 32 ^ d ^ (uint64_t)k1, c_odd = p_odd >> 32 ^ d_odd ^ (uint64_t)k1;
            b = q, b_odd = q_odd, d = p, d_odd = p_odd;
            k0 += OPLORA_PHILOX_K0, k1 += OPLORA_PHILOX_K1;
        }
        *(FN(wide_words) *)&out[0][i * PAIR] = (FN(wide_words))((a & low) | a_odd << 32);
        *(FN(wide_words) *)&out[1][i * PAIR] = (FN(wide_words))((b & low) | b_odd << 32);
        *(FN(wide_words) *)&out[2][i * PAIR] = (FN(wide_words))((c & low) | c_odd << 32);
        *(FN(wide_words) *)&out[3][i * PAIR] = (FN(wide_words))((d & low) | d_odd << 32);
    }
}

/* The numbers that one half of each of some words makes, in units of 2^-16. */
#define UNIFORM(words, high) \
    __builtin_convertvector((FN(ints))((WORDS(words) << ((high) ? 0 : 16) >> 16) * 2) - 65535, FN(piece))

/* sum of x[i] times the vector's numbers first + i; `first` is a multiple of 128. */
static double FN(uniform_dot)(const oplora_stream *s, uint32_t vector, int64_t first, const T *x, int64_t n) {
    FN(piece) sums[SUM_PIECES] = {{0}};
    for (int64_t i = 0; i < n; i += 128) {
        uint32_t words[4][16];
        T padded[128] = {0};
        const T *block = x + i;
        FN(philox16)(s, (uint64_t)(first + i) / 8, vector, words);
        if (n - i < 128) memcpy(padded, block, (size_t)(n - i) * sizeof(T)), block = padded;
#pragma GCC unroll 4
        for (int w = 0; w < 4; w++) {
#pragma GCC unroll 8
            for (int q = 0; q < SUM_PIECES; q++) {
                const int at = q * FN(PIECE);
                sums[q] += UNIFORM(words[w] + at, 0) * VECTOR(block + 32 * w + at);
                sums[q] += UNIFORM(words[w] + at, 1) * VECTOR(block + 32 * w + 16 + at);
            }
        }
    }
    T lanes[16];
    double sum = 0;
    memcpy(lanes, sums, sizeof lanes);
    for (int l = 0; l < 16; l++) sum += lanes[l];
    return sum;
}

/* y[i] += coefficient times the vector's numbers first + i. */
static void FN(uniform_axpy)(const oplora_stream *s, uint32_t vector, int64_t first, T coefficient, T *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 128) {
        uint32_t words[4][16];
        T padded[128];
        T *block = y + i;
        const int64_t left = n - i;
        FN(philox16)(s, (uint64_t)(first + i) / 8, vector, words);
        if (left < 128) memcpy(padded, block, (size_t)left * sizeof(T)), block = padded;
#pragma GCC unroll 4
        for (int w = 0; w < 4; w++) {
#pragma GCC unroll 8
            for (int q = 0; q < SUM_PIECES; q++) {
                T *const low = block + 32 * w + q * FN(PIECE);
                *(FN(piece) *)low += coefficient * UNIFORM(words[w] + q * FN(PIECE), 0);
                *(FN(piece) *)(low + 16) += coefficient * UNIFORM(words[w] + q * FN(PIECE), 1);
            }
        }
        if (left < 128) memcpy(y + i, padded, (size_t)left * sizeof(T));
    }
}

/* words[i]: the signs of row first + i in columns 32 group .. 32 group + 31. `first` is a multiple of 64, and words has
 * room for n rounded up to one. */
static void FN(sign_words)(const oplora_stream *s, uint32_t group, int64_t first, int64_t n, uint32_t *words) {
    for (int64_t i = 0; i < n; i += 64) {
        uint32_t block[4][16];
        FN(philox16)(s, (uint64_t)(first + i) / 4, group, block);
        memcpy(words + i, block, sizeof block);
    }
}

/* x with its sign changed where a bit of the words is set; `shift` brings the bit to the top. */
#define SIGNED(words, shift, x) \
    ((FN(piece))((FN(bit_words))(x) ^ __builtin_convertvector((words) << (shift) & 0x80000000u, FN(bit_words)) \
                                          << (8 * sizeof(T) - 32)))

/* out[k] = sum of +-x, the signs of column bit[k]. Four columns at a time read x and the words once. */
static void FN(sign_dot)(const uint32_t *words, const int *bit, int64_t count, const T *x, int64_t n, double *out) {
    T padded[16] = {0};
    const int64_t whole = n & ~(int64_t)15;
    memcpy(padded, x + whole, (size_t)(n - whole) * sizeof(T));
    for (int64_t k = 0; k < count; k += 4) {
        FN(piece) sums[4][SUM_PIECES] = {{{0}}};
        const int last = (int)(count - 1);
        const int shift0 = 31 - bit[k], shift1 = 31 - bit[k + 1 < count ? k + 1 : last];
        const int shift2 = 31 - bit[k + 2 < count ? k + 2 : last], shift3 = 31 - bit[k + 3 < count ? k + 3 : last];
        for (int64_t i = 0; i < n; i += 16) {
            const T *const block = i < whole ? x + i : padded;
#pragma GCC unroll 8
            for (int q = 0; q < SUM_PIECES; q++) {
                const FN(piece) some = VECTOR(block + q * FN(PIECE));
                const FN(words) word = WORDS(words + i + q * FN(PIECE));
                sums[0][q] += SIGNED(word, shift0, some);
                sums[1][q] += SIGNED(word, shift1, some);
                sums[2][q] += SIGNED(word, shift2, some);
                sums[3][q] += SIGNED(word, shift3, some);
            }
        }
        for (int w = 0; w < 4 && k + w < count; w++) {
            T lanes[16];
            memcpy(lanes, sums[w], sizeof lanes);
            out[k + w] = 0;
            for (int l = 0; l < 16; l++) out[k + w] += lanes[l];
        }
    }
}

static inline __attribute__((always_inline)) void FN(sign_axpy_block)(const uint32_t *words, const int *bit,
                                                                      const T *coefficient, int64_t count, T *block) {
    const FN(piece) zero = {0};
#pragma GCC unroll 8
    for (int q = 0; q < SUM_PIECES; q++) {
        const FN(words) word = WORDS(words + q * FN(PIECE));
        FN(piece) v = VECTOR(block + q * FN(PIECE));
        for (int64_t k = 0; k < count; k++) v += SIGNED(word, 31 - bit[k], zero + coefficient[k]);
        *(FN(piece) *)(block + q * FN(PIECE)) = v;
    }
}

/* y[i] += sum over k of +-coefficient[k], added in the order of k. */
static void FN(sign_axpy)(const uint32_t *words, const int *bit, const T *coefficient, int64_t count, T *y, int64_t n) {
    const int64_t whole = n & ~(int64_t)15;
    T padded[16] = {0};
    for (int64_t i = 0; i < whole; i += 16) FN(sign_axpy_block)(words + i, bit, coefficient, count, y + i);
    if (whole == n) return;
    memcpy(padded, y + whole, (size_t)(n - whole) * sizeof(T));
    FN(sign_axpy_block)(words + whole, bit, coefficient, count, padded);
    memcpy(y + whole, padded, (size_t)(n - whole) * sizeof(T));
}

#undef WORDS
#undef SUM_PIECES
#undef UNIFORM
#undef SIGNED
