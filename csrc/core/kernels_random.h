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
        T lanes[4][16];
        double sum[4];
        memcpy(lanes, sums, sizeof lanes);
        FN(sum_lanes)(lanes[0], 16, sum);
        for (int w = 0; w < 4 && k + w < count; w++) out[k + w] = sum[w];
    }
}

/* ---- y += sums of signed coefficients, four units at a time: rows with the same four signs share their sum, of which there
 * are sixteen. Where that many fit into two registers they are looked up, else the sum is made for each row. ---- */

#if defined(__clang__) /* it shuffles by variable places lane by lane */
#define LOOKS_UP 0
#else
#define LOOKS_UP (SUM_PIECES <= 2)
#endif

/* Some fours of the units whose signs share a word, those with a unit that is on: which, where their units begin among the
 * ones that are on, and their sums if they are looked up. */
typedef struct {
    int count, place[OPLORA_SIGNS / 4], first[OPLORA_SIGNS / 4 + 1], bit[OPLORA_SIGNS];
    T coefficient[OPLORA_SIGNS];
    FN(piece) sums[OPLORA_SIGNS / 4][SUM_PIECES];
} FN(fours);

/* The sums of four coefficients under sixteen patterns of signs: bit b changes the b-th. */
static inline __attribute__((always_inline)) void FN(sign_sums)(const T *four, T *sums) {
    const T a = four[0], b = four[1], c = four[2], d = four[3];
#pragma omp simd
    for (int signs = 0; signs < 16; signs++)
        sums[signs] = (((signs & 1 ? -a : a) + (signs & 2 ? -b : b)) + (signs & 4 ? -c : c)) + (signs & 8 ? -d : d);
}

static inline __attribute__((always_inline)) void FN(find_fours)(const T *coefficient, FN(fours) *to) {
    int units = 0;
    to->count = 0;
    for (int four = 0; four < OPLORA_SIGNS / 4; four++) {
        const T *const c = coefficient + 4 * four;
        if (c[0] == 0 && c[1] == 0 && c[2] == 0 && c[3] == 0) continue;
        to->place[to->count] = four;
        to->first[to->count] = units;
        for (int b = 0; b < 4; b++)
            if (c[b] != 0) to->bit[units] = 4 * four + b, to->coefficient[units++] = c[b];
        T sums[16];
        if (LOOKS_UP) FN(sign_sums)(c, sums), memcpy(to->sums[to->count], sums, sizeof sums);
        to->count++;
    }
    to->first[to->count] = units;
}

/* Adds the i-th four's sums to sixteen rows. A unit that is off adds 0 to sums that are looked up, which changes none. */
static inline __attribute__((always_inline)) void FN(add_four)(const FN(words) *word, const FN(fours) *fours, int i,
                                                               FN(piece) *v) {
    const FN(piece) zero = {0};
    FN(piece) sum[SUM_PIECES] = {{0}};
#if !defined(__clang__)
    for (int q = 0; LOOKS_UP && q < SUM_PIECES; q++) {
        const FN(bit_words) signs = __builtin_convertvector(word[q] >> (4 * fours->place[i]), FN(bit_words));
        v[q] += SUM_PIECES == 1 ? __builtin_shuffle(fours->sums[i][0], signs)
                                : __builtin_shuffle(fours->sums[i][0], fours->sums[i][SUM_PIECES / 2], signs);
    }
    if (LOOKS_UP) return;
#endif
    for (int k = fours->first[i]; k < fours->first[i + 1]; k++)
#pragma GCC unroll 8
        for (int q = 0; q < SUM_PIECES; q++)
            sum[q] += SIGNED(word[q], 31 - fours->bit[k], zero + fours->coefficient[k]);
#pragma GCC unroll 8
    for (int q = 0; q < SUM_PIECES; q++) v[q] += sum[q];
}

static inline
    __attribute__((always_inline)) void FN(sign_axpy_rows)(const uint32_t *words, const FN(fours) *fours, T *block) {
    FN(words) word[SUM_PIECES];
    FN(piece) v[SUM_PIECES];
#pragma GCC unroll 8
    for (int q = 0; q < SUM_PIECES; q++) word[q] = WORDS(words + q * FN(PIECE)), v[q] = VECTOR(block + q * FN(PIECE));
    for (int i = 0; i < fours->count; i++) FN(add_four)(word, fours, i, v);
#pragma GCC unroll 8
    for (int q = 0; q < SUM_PIECES; q++) *(FN(piece) *)(block + q * FN(PIECE)) = v[q];
}

/* y[i] += +-coefficient[j] over the units j of the words, 0 where one is off; summed by fours of units, whose sums are added
 * in order. */
static void FN(sign_axpy)(const uint32_t *words, const T *coefficient, T *y, int64_t n) {
    const int64_t whole = n & ~(int64_t)15;
    T padded[16] = {0};
    FN(fours) fours;
    FN(find_fours)(coefficient, &fours);
    for (int64_t i = 0; i < whole; i += 16) FN(sign_axpy_rows)(words + i, &fours, y + i);
    if (whole == n) return;
    memcpy(padded, y + whole, (size_t)(n - whole) * sizeof(T));
    FN(sign_axpy_rows)(words + whole, &fours, padded);
    memcpy(y + whole, padded, (size_t)(n - whole) * sizeof(T));
}

#undef LOOKS_UP
#undef WORDS
#undef SUM_PIECES
#undef UNIFORM
#undef SIGNED
