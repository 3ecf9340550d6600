/* The inner loops, included by dispatch.c once for every number type and instruction set.
 *
 * T is float or double, FN(name) is name_<type>_<instruction set>. All loops are plain C that the compiler
 * vectorises. Elementwise loops give the same bits on every instruction set, as contraction is off and sqrt and
 * division are exact; sums do because they run in a fixed number of lanes, 64 bytes wide, whatever the registers. */

enum { FN(LANES) = 64 / sizeof(T) };
typedef T FN(vector) __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
typedef T FN(eight) __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T)), may_alias));
typedef double FN(eight_doubles) __attribute__((vector_size(64), aligned(8), may_alias));
#define VECTOR(p) (*(const FN(vector) *)(p))
#define EIGHT(p) __builtin_convertvector(*(const FN(eight) *)(p), FN(eight_doubles))

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

static double FN(sum_lanes)(FN(vector) lanes) {
    double sum = 0;
    for (int l = 0; l < FN(LANES); l++) sum += lanes[l];
    return sum;
}

/* out[k] = column[k] . g. Four columns at a time read g once. */
static void FN(dot)(const T *const *column, int64_t count, const T *g, int64_t n, double *out) {
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const T *const a = column[k], *const b = column[k + 1], *const c = column[k + 2], *const d = column[k + 3];
        FN(vector) sa = {0}, sb = {0}, sc = {0}, sd = {0};
        int64_t i = 0;
        for (; i + FN(LANES) <= n; i += FN(LANES)) {
            const FN(vector) x = VECTOR(g + i);
            sa += VECTOR(a + i) * x;
            sb += VECTOR(b + i) * x;
            sc += VECTOR(c + i) * x;
            sd += VECTOR(d + i) * x;
        }
        for (int l = 0; i < n; i++, l++) {
            sa[l] += a[i] * g[i];
            sb[l] += b[i] * g[i];
            sc[l] += c[i] * g[i];
            sd[l] += d[i] * g[i];
        }
        out[k] = FN(sum_lanes)(sa);
        out[k + 1] = FN(sum_lanes)(sb);
        out[k + 2] = FN(sum_lanes)(sc);
        out[k + 3] = FN(sum_lanes)(sd);
    }
    for (; k < count; k++) {
        FN(vector) s = {0};
        int64_t i = 0;
        for (; i + FN(LANES) <= n; i += FN(LANES)) s += VECTOR(column[k] + i) * VECTOR(g + i);
        for (int l = 0; i < n; i++, l++) s[l] += column[k][i] * g[i];
        out[k] = FN(sum_lanes)(s);
    }
}

/* a . b with every product and sum in double: the hidden layer's short rows. */
static double FN(dot_double)(const T *a, const T *b, int64_t n) {
    FN(eight_doubles) lanes = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) lanes += EIGHT(a + i) * EIGHT(b + i);
    for (int l = 0; i < n; i++, l++) lanes[l] += (double)a[i] * b[i];
    double sum = 0;
    for (int l = 0; l < 8; l++) sum += lanes[l];
    return sum;
}

/* ||g||^2 in double, and how many entries are NaN or infinite. */
static double FN(square_sum)(const T *g, int64_t n, int64_t *nonfinite) {
    FN(eight_doubles) lanes = {0};
    int64_t i = 0, bad = 0;
    for (; i + 8 <= n; i += 8) {
        const FN(eight_doubles) x = EIGHT(g + i);
        lanes += x * x;
    }
    for (int l = 0; i < n; i++, l++) lanes[l] += (double)g[i] * g[i];
    const T largest = sizeof(T) == sizeof(float) ? (T)0x1.fffffep127 : (T)0x1.fffffffffffffp1023;
    for (i = 0; i < n; i++) bad += !(g[i] <= largest && g[i] >= -largest);
    *nonfinite = bad;
    double sum = 0;
    for (int l = 0; l < 8; l++) sum += lanes[l];
    return sum;
}

/* torch.optim.AdamW on one column whose gradient is h g, and v += h_next p if the column takes part in v. */
static inline
    __attribute__((always_inline)) void FN(adamw_body)(T *restrict p, T *restrict m, T *restrict s, const T *restrict g,
                                                       T h, T h_next, T *restrict v, int64_t n,
                                                       const TY(adamw_numbers) *a, const int generates) {
    const T beta1_rest = a->beta1_rest, beta2 = a->beta2, beta2_rest = a->beta2_rest;
    const T keep = a->keep, rate = a->rate, eps = a->eps, inverse_root = a->inverse_root;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T gradient = h * g[i];
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

#undef VECTOR
#undef EIGHT
