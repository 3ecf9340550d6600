/* The inner loops, included by dispatch.c once for every number type and instruction set.
 *
 * T is float or double, FN(name) is name_<type>_<instruction set>. All loops are plain C that the compiler
 * vectorises. Elementwise loops give the same bits on every instruction set, as contraction is off and sqrt and
 * division are exact; sums do because they run in a fixed number of lanes, 64 bytes wide, whatever the registers: a row
 * of PIECES registers, written as such because compilers lower wider vectors through memory. */

enum { FN(LANES) = 64 / sizeof(T), FN(PIECE) = WIDE / sizeof(T), FN(DOUBLES) = WIDE / 8 };
#define PIECES (64 / WIDE)
typedef T FN(piece) __attribute__((vector_size(WIDE), aligned(sizeof(T)), may_alias));
typedef T FN(few) __attribute__((vector_size(FN(DOUBLES) *sizeof(T)), aligned(sizeof(T)), may_alias));
typedef double FN(doubles) __attribute__((vector_size(WIDE), aligned(8), may_alias));
#define VECTOR(p) (*(const FN(piece) *)(p))
#define WIDENED(p) __builtin_convertvector(*(const FN(few) *)(p), FN(doubles))

/* v[n] += sum over k of h[k] column[k][n], added in the order of k. Four columns at a time keep v in registers. */
static void FN(axpy)(const T *const *column, const T *h, int64_t count, T *restrict v, int64_t n) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const T *const a = column[k], *const b = column[k + 1], *const c = column[k + 2], *const d = column[k + 3];
        const T ha = h[k], hb = h[k + 1], hc = h[k + 2], hd = h[k + 3];
#pragma omp simd
        for (int64_t i = 0; i < n; i++) v[i] = (((v[i] + ha * a[i]) + hb * b[i]) + hc * c[i]) + hd * d[i];
    }
    for (; k < count; k++) {
        const T *const a = column[k];
        const T ha = h[k];
#pragma omp simd
        for (int64_t i = 0; i < n; i++) v[i] += ha * a[i];
    }
}

static double FN(sum_lanes)(const T *lanes) {
    double sum = 0;
    for (int l = 0; l < FN(LANES); l++) sum += lanes[l];
    return sum;
}

/* out[k] = column[k] . g. Four columns at a time read g once. */
static void FN(dot)(const T *const *column, int64_t count, const T *g, int64_t n, double *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const T *const a = column[k], *const b = column[k + 1], *const c = column[k + 2], *const d = column[k + 3];
        FN(piece) sa[PIECES] = {{0}}, sb[PIECES] = {{0}}, sc[PIECES] = {{0}}, sd[PIECES] = {{0}};
        T lanes[4][FN(LANES)];
        int64_t i = 0;
        for (; i + FN(LANES) <= n; i += FN(LANES)) {
#pragma GCC unroll 4
            for (int q = 0; q < PIECES; q++) {
                const int64_t at = i + q * FN(PIECE);
                const FN(piece) x = VECTOR(g + at);
                sa[q] += VECTOR(a + at) * x;
                sb[q] += VECTOR(b + at) * x;
                sc[q] += VECTOR(c + at) * x;
                sd[q] += VECTOR(d + at) * x;
            }
        }
        memcpy(lanes[0], sa, 64);
        memcpy(lanes[1], sb, 64);
        memcpy(lanes[2], sc, 64);
        memcpy(lanes[3], sd, 64);
        for (int l = 0; i < n; i++, l++)
            for (int w = 0; w < 4; w++) lanes[w][l] += column[k + w][i] * g[i];
        for (int w = 0; w < 4; w++) out[k + w] = FN(sum_lanes)(lanes[w]);
    }
    for (; k < count; k++) {
        FN(piece) s[PIECES] = {{0}};
        T lanes[FN(LANES)];
        int64_t i = 0;
        for (; i + FN(LANES) <= n; i += FN(LANES)) {
#pragma GCC unroll 4
            for (int q = 0; q < PIECES; q++)
                s[q] += VECTOR(column[k] + i + q * FN(PIECE)) * VECTOR(g + i + q * FN(PIECE));
        }
        memcpy(lanes, s, 64);
        for (int l = 0; i < n; i++, l++) lanes[l] += column[k][i] * g[i];
        out[k] = FN(sum_lanes)(lanes);
    }
}

/* a . b with every product and sum in double, in eight lanes. */
static double FN(dot_double)(const T *a, const T *b, int64_t n) {
    FN(doubles) s[PIECES] = {{0}};
    double lanes[8], sum = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
#pragma GCC unroll 4
        for (int q = 0; q < PIECES; q++) s[q] += WIDENED(a + i + q * FN(DOUBLES)) * WIDENED(b + i + q * FN(DOUBLES));
    }
    memcpy(lanes, s, 64);
    for (int l = 0; i < n; i++, l++) lanes[l] += (double)a[i] * b[i];
    for (int l = 0; l < 8; l++) sum += lanes[l];
    return sum;
}

/* ||g||^2 in double, and how many entries are NaN or infinite. */
static double FN(square_sum)(const T *g, int64_t n, int64_t *nonfinite) {
    const T largest = sizeof(T) == sizeof(float) ? (T)0x1.fffffep127 : (T)0x1.fffffffffffffp1023;
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad += !(g[i] <= largest && g[i] >= -largest);
    *nonfinite = bad;
    return FN(dot_double)(g, g, n);
}

/* torch.optim.AdamW on one column whose gradient is h g, as far as that counts (workspace.h), and v += h_next p if the
 * column takes part in v. */
static inline
    __attribute__((always_inline)) void FN(adamw_body)(T *restrict p, T *restrict m, T *restrict s, const T *restrict g,
                                                       T h, T h_next, T *restrict v, int64_t n,
                                                       const TY(adamw_numbers) *a, const int generates) {
    const T beta1_rest = a->beta1_rest, beta2 = a->beta2, beta2_rest = a->beta2_rest;
    const T keep = a->keep, rate = a->rate, eps = a->eps, inverse_root = a->inverse_root;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T gradient = TY(oplora_bounded)(h * g[i]);
        const T m_next = m[i] + beta1_rest * (gradient - m[i]);
        const T s_next = beta2 * s[i] + beta2_rest * (gradient * gradient);
        const T p_next = keep * p[i] - rate * m_next / (SQRT(s_next) * inverse_root + eps);
        m[i] = m_next;
        s[i] = s_next;
        p[i] = p_next;
        if (generates) v[i] += h_next * p_next;
    }
}

static void FN(adamw)(T *p, T *m, T *s, const T *g, T h, T h_next, T *v, int64_t n, const TY(adamw_numbers) *a) {
    if (h_next != 0)
        FN(adamw_body)(p, m, s, g, h, h_next, v, n, a, 1);
    else
        FN(adamw_body)(p, m, s, g, h, 0, NULL, n, a, 0);
}

/* ---- the start's random numbers, made where they are used ---- */

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
    const FN(wide) multiplier_a = zero + 0xD2511F53u, multiplier_b = zero + 0xCD9E8D57u;
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
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
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

/* ---- the rows of lean state; adamw_lean.c has the formulas ---- */

/* row = 1 / (sqrt of the second moment's next row factor + eps), scaled = row g. Nothing is stored in the state. Where all
 * units are off `second` is 0, and g^2 may have overflowed: their product is 0 here, not NaN. Decay is written so that
 * keep = 1 changes no bit. */
static void FN(lean_scale)(const TY(oplora_moment) *restrict R, const T *restrict g, int64_t n,
                           const TY(lean_numbers) *a, T *restrict row, T *restrict scaled) {
    const T beta2 = a->beta2, second = a->second, inverse_root = a->inverse_root, eps_row = a->eps_row;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T r = beta2 * TY(get)(R[i]) + (second > 0 ? second * (g[i] * g[i]) : 0);
        row[i] = 1 / (SQRT(r) * inverse_root + eps_row);
        scaled[i] = second > 0 ? row[i] * g[i] : 0;
    }
}

static inline __attribute__((always_inline)) void FN(lean_second_body)(
    TY(oplora_moment) *restrict m, TY(oplora_moment) *restrict S, TY(oplora_moment) *restrict R, const T *restrict g,
    const T *restrict base, int64_t first, int64_t n, const TY(lean_numbers) *a, T *restrict row, T *restrict scaled,
    T *restrict out, const int has_base) {
    const T beta1_rest = a->beta1_rest, beta1 = 1 - beta1_rest, beta2 = a->beta2, beta2_rest = a->beta2_rest;
    const T second = a->second;
    const T keep = a->keep, rate = a->rate, eps = a->eps, eps_row = a->eps_row, inverse_root = a->inverse_root;
    const uint32_t key = a->key, other_key = a->key ^ 0x9E3779B9u;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const uint32_t noise = noise_of((uint32_t)(first + i), key);
        const T square = g[i] * g[i], m_old = TY(get)(m[i]);
        const T m_next = beta1 * m_old + beta1_rest * g[i]; /* no difference, which could overflow */
        const T s_next = beta2 * TY(get)(S[i]) + beta2_rest * square;
        const T r_next = beta2 * TY(get)(R[i]) + (second > 0 ? second * square : 0);
        const T step = rate * m_next / (SQRT(s_next) * inverse_root + eps);
        row[i] = 1 / (SQRT(r_next) * inverse_root + eps_row);
        scaled[i] = second > 0 ? row[i] * g[i] : 0;
        out[i] = out[i] - (1 - keep) * (has_base ? out[i] - base[i] : out[i]) - step;
        m[i] = TY(put)(m_next, noise);
        S[i] = TY(put)(s_next, noise >> 16);
        R[i] = TY(put)(r_next, noise_of((uint32_t)(first + i), other_key));
    }
}

/* The bias's AdamW on what lies in out, the row factor's next value, and row and scaled with the bits of lean_scale. */
static void FN(lean_second)(TY(oplora_moment) *m, TY(oplora_moment) *S, TY(oplora_moment) *R, const T *g, const T *base,
                            int64_t first, int64_t n, const TY(lean_numbers) *a, T *row, T *scaled, T *out) {
    if (base)
        FN(lean_second_body)(m, S, R, g, base, first, n, a, row, scaled, out, 1);
    else
        FN(lean_second_body)(m, S, R, g, NULL, first, n, a, row, scaled, out, 0);
}

/* A stored column of the first moment as numbers, and the same times row. */
static void FN(lean_widen)(const TY(oplora_moment) *restrict A, const T *restrict row, int64_t n, T *restrict wide,
                           T *restrict scaled) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        wide[i] = TY(get)(A[i]);
        scaled[i] = row[i] * wide[i];
    }
}

static void FN(lean_round)(const T *restrict v, int64_t first, uint32_t key, int shift, int64_t n,
                           TY(oplora_moment) *restrict A) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) A[i] = TY(put)(v[i], noise_of((uint32_t)(first + i), key) >> shift);
}

/* The first pass at the default ranks, d = 2 and k = 1, with the bits of lean_scale, lean_widen and dot: adds to the lower
 * half of the Gram matrix (4, 4) of [U0, U1, row A, row g], whose vectors count kappa, kappa, rho and rho times, and to
 * U0^T g, U1^T g behind it. n is at most 512. */
static void FN(lean_reduce21)(const TY(oplora_moment) *restrict A, const TY(oplora_moment) *restrict R,
                              const T *restrict U0, const T *restrict U1, const T *restrict g, int64_t n,
                              const TY(lean_numbers) *a, double kappa, double rho, double *sums) {
    enum { TILE = 64, SUMS = 12 };
    const T beta2 = a->beta2, second = a->second, inverse_root = a->inverse_root, eps_row = a->eps_row;
    static const int place[SUMS] = {0, 4, 5, 8, 9, 10, 12, 13, 14, 15, 16, 17};
    const double uu = kappa * kappa, ur = rho * kappa, rr = rho * rho;
    const double scale[SUMS] = {uu, uu, uu, ur, ur, rr, ur, ur, rr, rr, 1, 1};
    FN(piece) s[SUMS][PIECES] = {{{0}}};
    for (int64_t at = 0; at < n; at += TILE) {
        T padded[3][TILE], ra[TILE], rg[TILE];
        const int64_t count = n - at < TILE ? n - at : TILE;
        const T *u0 = U0 + at, *u1 = U1 + at, *x = g + at;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            const T r = beta2 * TY(get)(R[at + i]) + (second > 0 ? second * (g[at + i] * g[at + i]) : 0);
            const T row = 1 / (SQRT(r) * inverse_root + eps_row);
            ra[i] = row * TY(get)(A[at + i]);
            rg[i] = second > 0 ? row * g[at + i] : 0;
        }
        if (count < TILE) {
            memset(padded, 0, sizeof padded);
            memset(ra + count, 0, (size_t)(TILE - count) * sizeof(T));
            memset(rg + count, 0, (size_t)(TILE - count) * sizeof(T));
            u0 = memcpy(padded[0], u0, (size_t)count * sizeof(T));
            u1 = memcpy(padded[1], u1, (size_t)count * sizeof(T));
            x = memcpy(padded[2], x, (size_t)count * sizeof(T));
        }
#pragma GCC unroll 4
        for (int q = 0; q < PIECES; q++)
            for (int64_t i = q * FN(PIECE); i < count; i += FN(LANES)) {
                const FN(piece) c0 = VECTOR(u0 + i), c1 = VECTOR(u1 + i), c2 = VECTOR(ra + i), c3 = VECTOR(rg + i);
                const FN(piece) gradient = VECTOR(x + i);
                s[0][q] += c0 * c0;
                s[1][q] += c0 * c1;
                s[2][q] += c1 * c1;
                s[3][q] += c0 * c2;
                s[4][q] += c1 * c2;
                s[5][q] += c2 * c2;
                s[6][q] += c0 * c3;
                s[7][q] += c1 * c3;
                s[8][q] += c2 * c3;
                s[9][q] += c3 * c3;
                s[10][q] += c0 * gradient;
                s[11][q] += c1 * gradient;
            }
    }
    for (int k = 0; k < SUMS; k++) {
        T lanes[FN(LANES)];
        memcpy(lanes, s[k], 64);
        sums[place[k]] += scale[k] * FN(sum_lanes)(lanes);
    }
}

static inline __attribute__((always_inline)) void FN(lean_update21_body)(
    T *restrict U0, T *restrict U1, TY(oplora_moment) *restrict A, TY(oplora_moment) *restrict m,
    TY(oplora_moment) *restrict S, TY(oplora_moment) *restrict R, const T *restrict g, const T *restrict base,
    int64_t first, int64_t n, const TY(lean_numbers) *a, const T *weight, const T *turn0, const T *turn1,
    const T *turn_A, T *restrict out, const int has_base) {
    const T beta1_rest = a->beta1_rest, beta1 = 1 - beta1_rest, beta2 = a->beta2, beta2_rest = a->beta2_rest;
    const T second = a->second;
    const T keep = a->keep, rate = a->rate, eps = a->eps, eps_row = a->eps_row, inverse_root = a->inverse_root;
    const T w0 = weight[0], w1 = weight[1], w2 = weight[2], w3 = weight[3], a0 = turn_A[0], a1 = turn_A[1];
    const T p0 = turn0[0], p1 = turn0[1], p2 = turn0[2], p3 = turn0[3];
    const T q0 = turn1[0], q1 = turn1[1], q2 = turn1[2], q3 = turn1[3];
    const uint32_t key = a->key, other_key = a->key ^ 0x9E3779B9u;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const uint32_t noise = noise_of((uint32_t)(first + i), key);
        const uint32_t other_noise = noise_of((uint32_t)(first + i), other_key);
        const T x = g[i], square = x * x, m_old = TY(get)(m[i]), A_old = TY(get)(A[i]), u0 = U0[i], u1 = U1[i];
        const T m_next = beta1 * m_old + beta1_rest * x;
        const T s_next = beta2 * TY(get)(S[i]) + beta2_rest * square;
        const T r_next = beta2 * TY(get)(R[i]) + (second > 0 ? second * square : 0);
        const T row = 1 / (SQRT(r_next) * inverse_root + eps_row), ra = row * A_old, rg = second > 0 ? row * x : 0;
        const T step = rate * m_next / (SQRT(s_next) * inverse_root + eps);
        const T kept = out[i] - (1 - keep) * (has_base ? out[i] - base[i] : out[i]) - step;
        out[i] = (((kept + w0 * u0) + w1 * u1) + w2 * ra) + w3 * rg;
        U0[i] = ((p0 * u0 + p1 * u1) + p2 * ra) + p3 * rg;
        U1[i] = ((q0 * u0 + q1 * u1) + q2 * ra) + q3 * rg;
        A[i] = TY(put)(a0 * A_old + a1 * x, other_noise >> 16);
        m[i] = TY(put)(m_next, noise);
        S[i] = TY(put)(s_next, noise >> 16);
        R[i] = TY(put)(r_next, other_noise);
    }
}

/* The second pass at the default ranks, with the bits of lean_second, lean_widen, axpy and lean_round. */
static void FN(lean_update21)(T *U0, T *U1, TY(oplora_moment) *A, TY(oplora_moment) *m, TY(oplora_moment) *S,
                              TY(oplora_moment) *R, const T *g, const T *base, int64_t first, int64_t n,
                              const TY(lean_numbers) *a, const T *weight, const T *turn0, const T *turn1,
                              const T *turn_A, T *out) {
    if (base)
        FN(lean_update21_body)(U0, U1, A, m, S, R, g, base, first, n, a, weight, turn0, turn1, turn_A, out, 1);
    else
        FN(lean_update21_body)(U0, U1, A, m, S, R, g, NULL, first, n, a, weight, turn0, turn1, turn_A, out, 0);
}

/* u of adamw_rate.c for a second moment that is still to take in g, without weight decay. */
static void FN(rate_direction)(const T *restrict g, const T *restrict s, int64_t n, const TY(oplora_rate_numbers) *a,
                               T *restrict u) {
    const T kept = a->kept, newest = a->newest, eps = a->eps;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T s_next = kept * s[i] + newest * (g[i] * g[i]);
        u[i] = g[i] / (SQRT(s_next) + eps);
    }
}

/* One step of adamw_rate.c: the factor p, what is generated v, the second moment s. */
static void FN(rate_update)(T *restrict p, T *restrict v, T *restrict s, const T *restrict g, int64_t n,
                            const TY(oplora_rate_numbers) *a) {
    const T kept = a->kept, newest = a->newest, eps = a->eps;
    const T decay = a->weight_decay, rate = a->rate, average = a->average, rate_of_average = a->rate_of_average;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T s_next = kept * s[i] + newest * (g[i] * g[i]);
        const T u = g[i] / (SQRT(s_next) + eps) + decay * p[i];
        p[i] = (p[i] + average * (v[i] - p[i])) - rate_of_average * u;
        v[i] = v[i] - rate * u;
        s[i] = s_next;
    }
}

/* Eight lanes of fingerprint.c over n blocks of 64 bytes, which take part under the keys of their places. The product is
 * of the word's halves, scrambled by the key; the neighbour's word itself goes to each lane, so that a word that changes
 * alone always shows. */
static void FN(hash_blocks)(uint64_t *lanes, uint64_t *keys, const char *data, int64_t n) {
    typedef uint64_t words __attribute__((vector_size(WIDE), aligned(1), may_alias));
    enum { EACH = WIDE / 8 };
    words lane[PIECES], key[PIECES];
    memcpy(lane, lanes, 64);
    memcpy(key, keys, 64);
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
        for (int q = 0; q < PIECES; q++) {
            const words word = *(const words *)(data + 64 * i + WIDE * q), mixed = word ^ key[q];
            lane[q] += WIDE_MULTIPLY(mixed, mixed >> 32) + NEIGHBOURS(word);
            key[q] += OPLORA_KEY_STEP;
        }
    memcpy(lanes, lane, 64);
    memcpy(keys, key, 64);
}

#undef PIECES
#undef VECTOR
#undef WIDENED
#undef WORDS
#undef SUM_PIECES
#undef UNIFORM
#undef SIGNED
