/* The inner loops of sums and of combined columns. Included by kernels.h, with its names. */

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

/* out[w]: the sum of row w's lanes (4, n), in their order. Lane by lane, so that the four sums run beside each other. */
static inline __attribute__((always_inline)) void FN(sum_lanes)(const T *lanes, const int n, double *out) {
    const T *const a = lanes, *const b = a + n, *const c = b + n, *const d = c + n;
    T turned[4 * 16];
    double sum[4] = {0};
#pragma omp simd
    for (int l = 0; l < n; l++)
        turned[4 * l] = a[l], turned[4 * l + 1] = b[l], turned[4 * l + 2] = c[l], turned[4 * l + 3] = d[l];
    for (int l = 0; l < n; l++)
        for (int w = 0; w < 4; w++) sum[w] += turned[4 * l + w];
    memcpy(out, sum, sizeof sum);
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
        FN(sum_lanes)(lanes[0], FN(LANES), out + k);
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
        out[k] = 0;
        for (int l = 0; l < FN(LANES); l++) out[k] += lanes[l];
    }
}

/* out[k] = column[k] . g with every product and sum in double, in eight lanes. Four columns at a time read g once. */
static inline __attribute__((always_inline)) void FN(dot_double_body)(const T *const *column, const int count,
                                                                      const T *g, int64_t n, double *out) {
    FN(doubles) s[4][PIECES] = {{{0}}};
    double lanes[8];
    const int64_t whole = n & ~(int64_t)7;
    for (int64_t i = 0; i < whole; i += 8) {
#pragma GCC unroll 4
        for (int q = 0; q < PIECES; q++) {
            const int64_t at = i + q * FN(DOUBLES);
            const FN(doubles) x = WIDENED(g + at);
#pragma GCC unroll 4
            for (int k = 0; k < count; k++) s[k][q] += WIDENED(column[k] + at) * x;
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) {
        memcpy(lanes, s[k], 64);
        for (int64_t i = whole; i < n; i++) lanes[i - whole] += (double)column[k][i] * g[i];
        out[k] = 0;
        for (int l = 0; l < 8; l++) out[k] += lanes[l];
    }
}

static void FN(dot_double)(const T *const *column, int64_t count, const T *g, int64_t n, double *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) FN(dot_double_body)(column + k, 4, g, n, out + k);
    for (; k + 2 <= count; k += 2) FN(dot_double_body)(column + k, 2, g, n, out + k);
    for (; k < count; k++) FN(dot_double_body)(column + k, 1, g, n, out + k);
}

/* How many of the numbers are NaN or infinite. */
static int64_t FN(count_nonfinite)(const T *g, int64_t n) {
    const T largest = sizeof(T) == sizeof(float) ? (T)0x1.fffffep127 : (T)0x1.fffffffffffffp1023;
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad += !(g[i] <= largest && g[i] >= -largest);
    return bad;
}
