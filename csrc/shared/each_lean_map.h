/* What lean_map.h has for each number type, T. Included by each_type.h. */

/* The average of x^2 over its mean, r, after a step of which the mean of R turns by `turn`. */
OPLORA_SHARED T TY(oplora_lean_next_r)(T r, double turn, T x, double mean_x) {
    const double part = turn > 0 ? (double)x * x / mean_x : 0;
    return (T)(r + turn * (part - r));
}

/* A map's constants; keep and rate are a factor's own. live and root: how many r are above 0, and the sum of their roots. */
OPLORA_SHARED TY(oplora_lean_constants) TY(oplora_lean_constants_of)(const oplora_adamw *a, double mean_x, int64_t live,
                                                                     double root, double corrected2, uint32_t key) {
    TY(oplora_lean_constants) c;
    c.beta1_rest = (T)(1 - a->beta1);
    c.beta2 = (T)a->beta2;
    c.beta2_rest = (T)(1 - a->beta2);
    c.second = (T)((1 - a->beta2) * mean_x);
    c.keep = 1;
    c.rate = 0;
    c.eps = (T)fmax(a->eps, TY(oplora_least_eps));
    c.eps_row = (T)fmax(live ? a->eps * (double)live / root : a->eps, TY(oplora_least_eps));
    c.inverse_root = (T)(1 / sqrt(corrected2));
    c.key = key;
    return c;
}
