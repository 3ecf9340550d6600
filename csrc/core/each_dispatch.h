/* What dispatch.h declares for each number type. Included by each_type.h. */

/* x, the largest gradient that counts where it is beyond it. */
static inline T TY(oplora_bounded)(T x) {
    const T most = TY(oplora_most_gradient);
    const T low = x < most ? x : most;
    return low > -most ? low : -most;
}

/* A number of the hidden path likewise; NaN, of sums beyond double's range, is no direction. */
static inline T TY(oplora_narrowed)(double x) {
    const T most = TY(oplora_most_gradient);
    return x < most ? x > -most ? (T)x : -most : x >= most ? most : 0;
}

/* n entries of a gradient as steps take them: g itself or, if `squares`, the sum over g or more, tells of entries that are
 * too large, a copy in `room`. */
static inline const T *TY(oplora_bounded_gradient)(const T *g, int64_t n, double squares, T *room) {
    const double most = TY(oplora_most_gradient);
    if (squares <= most * most) return g;
    for (int64_t i = 0; i < n; i++) room[i] = TY(oplora_bounded)(g[i]);
    return room;
}

/* AdamW's numbers for one step, in the type of the loop: rate = lr / (1 - beta1^t), keep = 1 - lr weight_decay,
 * inverse_root = 1 / sqrt(1 - beta2^t), *_rest = 1 - beta. */
typedef struct {
    T beta1_rest, beta2, beta2_rest, keep, rate, eps, inverse_root;
} TY(adamw_numbers);

/* One lean step's numbers for the rows of one linear map: rate = lr / (1 - beta1^t) is the bias's, eps_row is eps in the
 * row factor's scale, second = (1 - beta2) mean(x^2) for the map's input x, key makes the rounding noise. */
typedef struct {
    T beta1_rest, beta2, beta2_rest, second, keep, rate, eps, eps_row, inverse_root;
    uint32_t key;
} TY(lean_numbers);

/* One step's numbers for a factor in adamw_rate.c: newest = m, kept = 1 - m, rate = eta, average = c,
 * rate_of_average = eta (1 - beta1 (1 - c)). */
typedef struct {
    T kept, newest, eps, weight_decay, rate, average, rate_of_average;
} TY(oplora_rate_numbers);

typedef struct {
    const char *name;
    void (*axpy)(const T *const *column, const T *h, int64_t count, T *restrict v, int64_t n);
    void (*dot)(const T *const *column, int64_t count, const T *g, int64_t n, double *out);
    double (*dot_double)(const T *a, const T *b, int64_t n);
    double (*square_sum)(const T *g, int64_t n, int64_t *nonfinite);
    void (*adamw)(T *p, T *m, T *s, const T *g, T h, T h_next, T *v, int64_t n, const TY(adamw_numbers) *numbers);
    double (*uniform_dot)(const oplora_stream *s, uint32_t vector, int64_t first, const T *x, int64_t n);
    void (*uniform_axpy)(const oplora_stream *s, uint32_t vector, int64_t first, T coefficient, T *y, int64_t n);
    void (*sign_words)(const oplora_stream *s, uint32_t group, int64_t first, int64_t n, uint32_t *words);
    void (*sign_dot)(const uint32_t *words, const int *bit, int64_t count, const T *x, int64_t n, double *out);
    void (*sign_axpy)(const uint32_t *words, const int *bit, const T *coefficient, int64_t count, T *y, int64_t n);
    void (*lean_scale)(const TY(oplora_moment) *R, const T *g, int64_t n, const TY(lean_numbers) *numbers, T *row,
                       T *scaled);
    void (*lean_second)(TY(oplora_moment) *m, TY(oplora_moment) *S, TY(oplora_moment) *R, const T *g, const T *base,
                        int64_t first, int64_t n, const TY(lean_numbers) *numbers, T *row, T *scaled, T *out);
    void (*lean_widen)(const TY(oplora_moment) *A, const T *row, int64_t n, T *wide, T *scaled);
    void (*lean_round)(const T *v, int64_t first, uint32_t key, int shift, int64_t n, TY(oplora_moment) *A);
    void (*lean_reduce21)(const TY(oplora_moment) *A, const TY(oplora_moment) *R, const T *U0, const T *U1, const T *g,
                          int64_t n, const TY(lean_numbers) *numbers, double kappa, double rho, double *sums);
    void (*lean_update21)(T *U0, T *U1, TY(oplora_moment) *A, TY(oplora_moment) *m, TY(oplora_moment) *S,
                          TY(oplora_moment) *R, const T *g, const T *base, int64_t first, int64_t n,
                          const TY(lean_numbers) *numbers, const T *weight, const T *turn0, const T *turn1,
                          const T *turn_A, T *out);
    void (*rate_direction)(const T *g, const T *s, int64_t n, const TY(oplora_rate_numbers) *numbers, T *u);
    void (*rate_update)(T *p, T *v, T *s, const T *g, int64_t n, const TY(oplora_rate_numbers) *numbers);
    void (*hash_blocks)(uint64_t *lanes, uint64_t *keys, const char *data, int64_t n);
} TY(oplora_kernels);

const TY(oplora_kernels) *TY(oplora_dispatch)(void);
