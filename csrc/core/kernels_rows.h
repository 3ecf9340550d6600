/* The inner loops of rows: ../shared/rows.h has one entry's maths. Included by kernels.h, with its names. */

/* AdamW on one column whose gradient is h g, and v += h_next p if the column takes part in v. */
static inline __attribute__((always_inline)) void FN(adamw_body)(T *restrict p, T *restrict m, T *restrict s,
                                                                 const T *restrict g, T h, T h_next, T *restrict v,
                                                                 int64_t n, const TY(oplora_adamw_constants) *constants,
                                                                 const int generates) {
    const TY(oplora_adamw_constants) a = *constants;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const TY(oplora_adamw_entry) next = TY(oplora_adamw_step)(a, h * g[i], p[i], m[i], s[i]);
        m[i] = next.m;
        s[i] = next.s;
        p[i] = next.p;
        if (generates) v[i] += h_next * next.p;
    }
}

static void FN(adamw)(T *p, T *m, T *s, const T *g, T h, T h_next, T *v, int64_t n,
                      const TY(oplora_adamw_constants) *constants) {
    if (h_next != 0)
        FN(adamw_body)(p, m, s, g, h, h_next, v, n, constants, 1);
    else
        FN(adamw_body)(p, m, s, g, h, 0, NULL, n, constants, 0);
}

/* ---- lean state ---- */

/* row: what scales the rows of the first moment, by the second moment's next row factor; scaled = row g. Nothing is stored
 * in the state. */
static void FN(lean_scale)(const TY(oplora_moment) *restrict R, const T *restrict g, int64_t n,
                           const TY(oplora_lean_constants) *constants, T *restrict row, T *restrict scaled) {
    const TY(oplora_lean_constants) a = *constants;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        row[i] = TY(oplora_lean_scale)(a, TY(oplora_lean_next_R)(a, TY(oplora_get)(R[i]), g[i] * g[i]));
        scaled[i] = TY(oplora_lean_scaled)(a, row[i], g[i]);
    }
}

static inline __attribute__((always_inline)) void FN(lean_second_body)(
    TY(oplora_moment) *restrict m, TY(oplora_moment) *restrict S, TY(oplora_moment) *restrict R, const T *restrict g,
    const T *restrict base, int64_t first, int64_t n, const TY(oplora_lean_constants) *constants, T *restrict row,
    T *restrict scaled, T *restrict out, const int has_base) {
    const TY(oplora_lean_constants) a = *constants;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const uint32_t at = (uint32_t)(first + i), noise = oplora_noise(at, a.key);
        const TY(oplora_lean_bias) next =
            TY(oplora_lean_bias_step)(a, g[i], TY(oplora_get)(m[i]), TY(oplora_get)(S[i]), TY(oplora_get)(R[i]), out[i],
                                      has_base ? out[i] - base[i] : out[i]);
        row[i] = TY(oplora_lean_scale)(a, next.R);
        scaled[i] = TY(oplora_lean_scaled)(a, row[i], g[i]);
        out[i] = next.out;
        m[i] = TY(oplora_put)(next.m, noise);
        S[i] = TY(oplora_put)(next.S, noise >> 16);
        R[i] = TY(oplora_put)(next.R, oplora_noise(at, oplora_other_key(a.key)));
    }
}

/* The bias's AdamW on what lies in out, the row factor's next value, and row and scaled with the bits of lean_scale. */
static void FN(lean_second)(TY(oplora_moment) *m, TY(oplora_moment) *S, TY(oplora_moment) *R, const T *g, const T *base,
                            int64_t first, int64_t n, const TY(oplora_lean_constants) *constants, T *row, T *scaled,
                            T *out) {
    if (base)
        FN(lean_second_body)(m, S, R, g, base, first, n, constants, row, scaled, out, 1);
    else
        FN(lean_second_body)(m, S, R, g, NULL, first, n, constants, row, scaled, out, 0);
}

/* A stored column of the first moment as numbers, and the same times row. */
static void FN(lean_widen)(const TY(oplora_moment) *restrict A, const T *restrict row, int64_t n, T *restrict wide,
                           T *restrict scaled) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        wide[i] = TY(oplora_get)(A[i]);
        scaled[i] = row[i] * wide[i];
    }
}

static void FN(lean_round)(const T *restrict v, int64_t first, uint32_t key, int shift, int64_t n,
                           TY(oplora_moment) *restrict A) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) A[i] = TY(oplora_put)(v[i], oplora_noise((uint32_t)(first + i), key) >> shift);
}

/* The first pass at the default ranks, d = 2 and k = 1, with the bits of lean_scale, lean_widen and dot: adds to the lower
 * half of the Gram matrix (4, 4) of [U0, U1, row A, row g], whose vectors count kappa, kappa, rho and rho times, and to
 * U0^T g, U1^T g behind it. n is at most 512. */
static void FN(lean_reduce21)(const TY(oplora_moment) *restrict A, const TY(oplora_moment) *restrict R,
                              const T *restrict U0, const T *restrict U1, const T *restrict g, int64_t n,
                              const TY(oplora_lean_constants) *constants, double kappa, double rho, double *sums) {
    enum { TILE = 64, SUMS = 12 };
    const TY(oplora_lean_constants) a = *constants;
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
            const T square = g[at + i] * g[at + i];
            const T row = TY(oplora_lean_scale)(a, TY(oplora_lean_next_R)(a, TY(oplora_get)(R[at + i]), square));
            ra[i] = row * TY(oplora_get)(A[at + i]);
            rg[i] = TY(oplora_lean_scaled)(a, row, g[at + i]);
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
    T lanes[SUMS][FN(LANES)];
    double sum[SUMS];
    memcpy(lanes, s, sizeof lanes);
    for (int k = 0; k < SUMS; k += 4) FN(sum_lanes)(lanes[k], FN(LANES), sum + k);
    for (int k = 0; k < SUMS; k++) sums[place[k]] += scale[k] * sum[k];
}

static inline __attribute__((always_inline)) void FN(lean_update21_body)(
    T *restrict U0, T *restrict U1, TY(oplora_moment) *restrict A, TY(oplora_moment) *restrict m,
    TY(oplora_moment) *restrict S, TY(oplora_moment) *restrict R, const T *restrict g, const T *restrict base,
    int64_t first, int64_t n, const TY(oplora_lean_turn21) *turn, T *restrict out, const int has_base) {
    const TY(oplora_lean_turn21) t = *turn;
    const uint32_t key = t.constants.key, other_key = oplora_other_key(key);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const uint32_t noise = oplora_noise((uint32_t)(first + i), key);
        const uint32_t other_noise = oplora_noise((uint32_t)(first + i), other_key);
        const TY(oplora_lean_bias) bias = {TY(oplora_get)(m[i]), TY(oplora_get)(S[i]), TY(oplora_get)(R[i]), out[i]};
        const TY(oplora_lean_row21) old = {U0[i], U1[i], TY(oplora_get)(A[i]), bias};
        const TY(oplora_lean_row21) next = TY(oplora_lean_step21)(t, g[i], old, has_base ? out[i] - base[i] : out[i]);
        out[i] = next.bias.out;
        U0[i] = next.u0;
        U1[i] = next.u1;
        A[i] = TY(oplora_put)(next.A, other_noise >> 16);
        m[i] = TY(oplora_put)(next.bias.m, noise);
        S[i] = TY(oplora_put)(next.bias.S, noise >> 16);
        R[i] = TY(oplora_put)(next.bias.R, other_noise);
    }
}

/* The second pass at the default ranks, with the bits of lean_second, lean_widen, axpy and lean_round. */
static void FN(lean_update21)(T *U0, T *U1, TY(oplora_moment) *A, TY(oplora_moment) *m, TY(oplora_moment) *S,
                              TY(oplora_moment) *R, const T *g, const T *base, int64_t first, int64_t n,
                              const TY(oplora_lean_turn21) *turn, T *out) {
    if (base)
        FN(lean_update21_body)(U0, U1, A, m, S, R, g, base, first, n, turn, out, 1);
    else
        FN(lean_update21_body)(U0, U1, A, m, S, R, g, NULL, first, n, turn, out, 0);
}

/* ---- state rate ---- */

/* u of adamw_rate.c for a second moment that is still to take in g, without weight decay. */
static void FN(rate_direction)(const T *restrict g, const T *restrict s, int64_t n,
                               const TY(oplora_rate_constants) *constants, T *restrict u) {
    const TY(oplora_rate_constants) a = *constants;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) u[i] = TY(oplora_rate_direction)(a, TY(oplora_rate_next_s)(a, s[i], g[i]), g[i]);
}

/* One step of adamw_rate.c: the factor p, what is generated v, the second moment s. */
static void FN(rate_update)(T *restrict p, T *restrict v, T *restrict s, const T *restrict g, int64_t n,
                            const TY(oplora_rate_constants) *constants) {
    const TY(oplora_rate_constants) a = *constants;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const TY(oplora_rate_entry) next = TY(oplora_rate_entry_step)(a, g[i], p[i], v[i], s[i]);
        p[i] = next.p;
        v[i] = next.v;
        s[i] = next.s;
    }
}
