/* What rows.h has for each number type, T. Included by each_type.h. */

/* x, the largest gradient that counts where it is beyond it. */
OPLORA_SHARED T TY(oplora_bounded)(T x) {
    const T most = TY(oplora_most_gradient);
    const T low = x < most ? x : most;
    return low > -most ? low : -most;
}

/* A number of the hidden path likewise; NaN, of sums beyond double's range, is no direction. */
OPLORA_SHARED T TY(oplora_narrowed)(double x) {
    const T most = TY(oplora_most_gradient);
    return x < most ? x > -most ? (T)x : -most : x >= most ? most : 0;
}

/* ---- AdamW ---- */

/* One step's constants for a tensor: rate = lr / (1 - beta1^t), keep = 1 - lr weight_decay, inverse_root =
 * 1 / sqrt(1 - beta2^t), *_rest = 1 - beta. */
typedef struct {
    T beta1_rest, beta2, beta2_rest, keep, rate, eps, inverse_root;
} TY(oplora_adamw_constants);

/* Of a tensor that moves at the rate lr and shrinks by decay a step. corrected1 = 1 - beta1^t, corrected2 likewise. */
OPLORA_SHARED TY(oplora_adamw_constants) TY(oplora_adamw_constants_of)(const oplora_adamw *a, double corrected1,
                                                                       double corrected2, double lr, double decay) {
    TY(oplora_adamw_constants) c;
    c.beta1_rest = (T)(1 - a->beta1);
    c.beta2 = (T)a->beta2;
    c.beta2_rest = (T)(1 - a->beta2);
    c.keep = (T)(1 - decay);
    c.rate = (T)(lr / corrected1);
    c.eps = (T)fmax(a->eps, TY(oplora_least_eps));
    c.inverse_root = (T)(1 / sqrt(corrected2));
    return c;
}

/* An entry and its moments. */
typedef struct {
    T p, m, s;
} TY(oplora_adamw_entry);

/* torch.optim.AdamW on one entry whose gradient is x, as far as that counts. */
OPLORA_SHARED TY(oplora_adamw_entry) TY(oplora_adamw_step)(TY(oplora_adamw_constants) a, T x, T p, T m, T s) {
    TY(oplora_adamw_entry) next;
    const T g = TY(oplora_bounded)(x);
    next.m = m + a.beta1_rest * (g - m);
    next.s = a.beta2 * s + a.beta2_rest * (g * g);
    next.p = a.keep * p - a.rate * next.m / (TY(oplora_root)(next.s) * a.inverse_root + a.eps);
    return next;
}

/* ---- lean state; core/adamw_lean.c has the formulas ---- */

/* One step's constants for the rows of one linear map: rate = lr / (1 - beta1^t) is the bias's, eps_row is eps in the
 * row factor's scale, second = (1 - beta2) mean(x^2) for the map's input x, key makes the rounding noise. */
typedef struct {
    T beta1_rest, beta2, beta2_rest, second, keep, rate, eps, eps_row, inverse_root;
    uint32_t key;
} TY(oplora_lean_constants);

/* The second moment's next row factor. Where all units are off `second` is 0, and g^2 may have overflowed: their product is
 * 0 here, not NaN. */
OPLORA_SHARED T TY(oplora_lean_next_R)(TY(oplora_lean_constants) a, T R, T square) {
    return a.beta2 * R + (a.second > 0 ? a.second * square : 0);
}

/* What scales a row of the first moment, by the next row factor; and the gradient in that scale. */
OPLORA_SHARED T TY(oplora_lean_scale)(TY(oplora_lean_constants) a, T next_R) {
    return 1 / (TY(oplora_root)(next_R) * a.inverse_root + a.eps_row);
}
OPLORA_SHARED T TY(oplora_lean_scaled)(TY(oplora_lean_constants) a, T scale, T g) {
    return a.second > 0 ? scale * g : 0;
}

/* The next moments of the bias, m and S, and of the row, R; and the output after the bias's own step. */
typedef struct {
    T m, S, R, out;
} TY(oplora_lean_bias);

/* `grown` is what decay shrinks: the output beyond its base. Decay is written so that keep = 1 changes no bit, and m without
 * a difference, which could overflow. */
OPLORA_SHARED TY(oplora_lean_bias)
    TY(oplora_lean_bias_step)(TY(oplora_lean_constants) a, T g, T m, T S, T R, T out, T grown) {
    TY(oplora_lean_bias) next;
    const T beta1 = 1 - a.beta1_rest, square = g * g;
    next.m = beta1 * m + a.beta1_rest * g;
    next.S = a.beta2 * S + a.beta2_rest * square;
    next.R = TY(oplora_lean_next_R)(a, R, square);
    const T step = a.rate * next.m / (TY(oplora_root)(next.S) * a.inverse_root + a.eps);
    next.out = out - (1 - a.keep) * grown - step;
    return next;
}

/* At the default ranks, d = 2 and k = 1, all that the second pass multiplies with: the constants, and what the truncations
 * found for the basis [u0, u1, scale A, scale g] and for [A, g]. */
typedef struct {
    TY(oplora_lean_constants) constants;
    T weight[4], u0[4], u1[4], A[2];
} TY(oplora_lean_turn21);

/* A row in numbers: its two of U, A, the bias's moments, R and the output. */
typedef struct {
    T u0, u1, A;
    TY(oplora_lean_bias) bias;
} TY(oplora_lean_row21);

OPLORA_SHARED TY(oplora_lean_row21)
    TY(oplora_lean_step21)(TY(oplora_lean_turn21) t, T g, TY(oplora_lean_row21) old, T grown) {
    TY(oplora_lean_row21) next;
    const T u0 = old.u0, u1 = old.u1;
    next.bias = TY(oplora_lean_bias_step)(t.constants, g, old.bias.m, old.bias.S, old.bias.R, old.bias.out, grown);
    const T scale = TY(oplora_lean_scale)(t.constants, next.bias.R), scaled_A = scale * old.A;
    const T scaled_g = TY(oplora_lean_scaled)(t.constants, scale, g);
    next.bias.out =
        (((next.bias.out + t.weight[0] * u0) + t.weight[1] * u1) + t.weight[2] * scaled_A) + t.weight[3] * scaled_g;
    next.u0 = ((t.u0[0] * u0 + t.u0[1] * u1) + t.u0[2] * scaled_A) + t.u0[3] * scaled_g;
    next.u1 = ((t.u1[0] * u0 + t.u1[1] * u1) + t.u1[2] * scaled_A) + t.u1[3] * scaled_g;
    next.A = t.A[0] * old.A + t.A[1] * g;
    return next;
}

/* ---- state rate; core/adamw_rate.c has the formulas ---- */

/* One step's constants for a factor: newest = m, kept = 1 - m, rate = eta, average = c, rate_of_average =
 * eta (1 - beta1 (1 - c)). */
typedef struct {
    T kept, newest, eps, weight_decay, rate, average, rate_of_average;
} TY(oplora_rate_constants);

/* Of a factor whose gradient may grow from nothing, or not, in this step. */
OPLORA_SHARED TY(oplora_rate_constants) TY(oplora_rate_constants_of)(const oplora_adamw *a, int64_t step, double rate,
                                                                     double lr, double weight_decay, int grows) {
    TY(oplora_rate_constants) n;
    const double m = oplora_newest_of_squares(a->beta2, (double)step, grows);
    const double eta = rate * lr, c = oplora_newest_of_factors((double)step);
    n.kept = (T)(1 - m);
    n.newest = (T)m;
    n.eps = (T)fmax(a->eps, TY(oplora_least_eps));
    n.weight_decay = (T)weight_decay;
    n.rate = (T)eta;
    n.average = (T)c;
    n.rate_of_average = (T)(eta * (1 - a->beta1 * (1 - c)));
    return n;
}

OPLORA_SHARED T TY(oplora_rate_next_s)(TY(oplora_rate_constants) a, T s, T g) {
    return a.kept * s + a.newest * (g * g);
}

/* u without weight decay, by the next second moment. */
OPLORA_SHARED T TY(oplora_rate_direction)(TY(oplora_rate_constants) a, T next_s, T g) {
    return g / (TY(oplora_root)(next_s) + a.eps);
}

/* A factor's entry p, what is generated v, the second moment s. */
typedef struct {
    T p, v, s;
} TY(oplora_rate_entry);

OPLORA_SHARED TY(oplora_rate_entry) TY(oplora_rate_entry_step)(TY(oplora_rate_constants) a, T g, T p, T v, T s) {
    TY(oplora_rate_entry) next;
    next.s = TY(oplora_rate_next_s)(a, s, g);
    const T u = TY(oplora_rate_direction)(a, next.s, g) + a.weight_decay * p;
    next.p = (p + a.average * (v - p)) - a.rate_of_average * u;
    next.v = v - a.rate * u;
    return next;
}
