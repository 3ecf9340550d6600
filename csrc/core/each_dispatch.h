/* What dispatch.h declares for each number type. Included by each_type.h. */

/* n entries of a gradient as steps take them: g itself or, if `squares`, the sum over g or more, tells of entries that are
 * too large, a copy in `room`. */
static inline const T *TY(oplora_bounded_gradient)(const T *g, int64_t n, double squares, T *room) {
    const double most = TY(oplora_most_gradient);
    if (squares <= most * most) return g;
    for (int64_t i = 0; i < n; i++) room[i] = TY(oplora_bounded)(g[i]);
    return room;
}

typedef struct {
    const char *name;
    void (*axpy)(const T *const *column, const T *h, int64_t count, T *restrict v, int64_t n);
    void (*dot)(const T *const *column, int64_t count, const T *g, int64_t n, double *out);
    void (*dot_double)(const T *const *column, int64_t count, const T *g, int64_t n, double *out);
    int64_t (*count_nonfinite)(const T *g, int64_t n);
    void (*adamw)(T *p, T *m, T *s, const T *g, T h, T h_next, T *v, int64_t n,
                  const TY(oplora_adamw_constants) *constants);
    double (*uniform_dot)(const oplora_stream *s, uint32_t vector, int64_t first, const T *x, int64_t n);
    void (*uniform_axpy)(const oplora_stream *s, uint32_t vector, int64_t first, T coefficient, T *y, int64_t n);
    void (*sign_words)(const oplora_stream *s, uint32_t group, int64_t first, int64_t n, uint32_t *words);
    void (*sign_dot)(const uint32_t *words, const int *bit, int64_t count, const T *x, int64_t n, double *out);
    void (*sign_axpy)(const uint32_t *words, const T *coefficient, T *y, int64_t n);
    void (*lean_scale)(const TY(oplora_moment) *R, const T *g, int64_t n, const TY(oplora_lean_constants) *constants,
                       T *row, T *scaled);
    void (*lean_second)(TY(oplora_moment) *m, TY(oplora_moment) *S, TY(oplora_moment) *R, const T *g, const T *base,
                        int64_t first, int64_t n, const TY(oplora_lean_constants) *constants, T *row, T *scaled,
                        T *out);
    void (*lean_widen)(const TY(oplora_moment) *A, const T *row, int64_t n, T *wide, T *scaled);
    void (*lean_round)(const T *v, int64_t first, uint32_t key, int shift, int64_t n, TY(oplora_moment) *A);
    void (*lean_reduce21)(const TY(oplora_moment) *A, const TY(oplora_moment) *R, const T *U0, const T *U1, const T *g,
                          int64_t n, const TY(oplora_lean_constants) *constants, double kappa, double rho,
                          double *sums);
    void (*lean_update21)(T *U0, T *U1, TY(oplora_moment) *A, TY(oplora_moment) *m, TY(oplora_moment) *S,
                          TY(oplora_moment) *R, const T *g, const T *base, int64_t first, int64_t n,
                          const TY(oplora_lean_turn21) *turn, T *out);
    void (*rate_direction)(const T *g, const T *s, int64_t n, const TY(oplora_rate_constants) *constants, T *u);
    void (*rate_update)(T *p, T *v, T *s, const T *g, int64_t n, const TY(oplora_rate_constants) *constants);
    void (*hash_blocks)(uint64_t *lanes, uint64_t *keys, const char *data, int64_t n);
} TY(oplora_kernels);

const TY(oplora_kernels) *TY(oplora_dispatch)(void);

static inline double TY(oplora_dot_double)(const T *a, const T *b, int64_t n) {
    double sum;
    TY(oplora_dispatch)()->dot_double(&a, 1, b, n, &sum);
    return sum;
}

/* How many of n numbers are NaN or infinite, of which the sum of squares is known: only if it isn't finite are there any. */
static inline double TY(oplora_nonfinite_in)(const T *g, int64_t n, double squares) {
    return isfinite(squares) ? 0 : (double)TY(oplora_dispatch)()->count_nonfinite(g, n);
}
