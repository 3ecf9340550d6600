/* What lean_shapes.h has for each number type: a layer with all of its memory. Included by each_type.h. */

static const int TY(is_float) = sizeof(T) == sizeof(float);

static inline double TY(number)(TY(oplora_moment) stored) {
    if (!TY(is_float)) return (double)stored;
    const uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline TY(oplora_moment) TY(stored)(double value) {
    if (!TY(is_float)) return (TY(oplora_moment))value;
    const float single = (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    return (TY(oplora_moment))(bits >> 16);
}

typedef struct {
    TY(oplora_lean) layer;
    TY(oplora_factor) factors[3];
    int64_t n_numbers, n_moments;
} TY(made);

static inline void TY(make)(TY(made) *f, const shape *like, uint32_t index) {
    const int64_t H = like->H, Z = like->Z, N = like->rows[0] + like->rows[1] + like->rows[2];
    const int d = like->d, k = like->k;
    memset(f, 0, sizeof *f);
    f->n_numbers = oplora_lean_numbers(H, Z, N, d, k);
    f->n_moments = oplora_lean_moments(H, Z, N, d, k);
    f->layer = (TY(oplora_lean)){.H = H,
                                 .Z = Z,
                                 .N = N,
                                 .weight_rank = d,
                                 .moment_rank = k,
                                 .seed = SEED,
                                 .layer = index,
                                 .start = like->start,
                                 .numbers = zeros(f->n_numbers, sizeof(T)),
                                 .moments = zeros(f->n_moments, sizeof(TY(oplora_moment))),
                                 .scalars = zeros(OPLORA_LEAN_SCALARS, 8),
                                 .factors = f->factors,
                                 .report = zeros(OPLORA_LEAN_REPORT, 8),
                                 .dh = zeros(H, 8)};
    for (int i = 0; i < 3 && like->rows[i]; i++, f->layer.n_factors++) {
        const int64_t rows = like->rows[i];
        T *const base = like->based >> i & 1 ? zeros(rows, sizeof(T)) : NULL;
        for (int64_t n = 0; base && n < rows; n++) base[n] = (T)noise();
        f->factors[i] = (TY(oplora_factor)){rows, zeros(rows, sizeof(T)), base, zeros(rows, sizeof(T)),
                                            .random = like->random >> i & 1};
    }
    CHECK(TY(oplora_lean_start)(&f->layer, 0.3, splits[index % SPLITS]) == OPLORA_OK);
    for (int i = 0; i < f->layer.n_factors; i++)
        for (int64_t n = 0; f->factors[i].base && n < f->factors[i].rows; n++)
            f->factors[i].out[n] += f->factors[i].base[n];
}

static inline void TY(unmake)(TY(made) *f) {
    for (int i = 0; i < f->layer.n_factors; i++) {
        free((void *)f->factors[i].g);
        free((void *)f->factors[i].base);
        free(f->factors[i].out);
    }
    void *const all[] = {f->layer.numbers, f->layer.moments, f->layer.scalars, f->layer.report, f->layer.dh};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static inline void TY(set_gradients)(TY(made) *f, int64_t step, double scale) {
    f->layer.adamw = (oplora_adamw){0.5, 2e-2, 0.9, 0.999, 1e-8, 0.5, step};
    for (int i = 0; i < f->layer.n_factors; i++) f->factors[i].lr = 1e-2, f->factors[i].weight_decay = 0.5;
    for (int i = 0; i < f->layer.n_factors; i++)
        for (int64_t n = 0; n < f->factors[i].rows; n++)
            ((T *)f->factors[i].g)[n] = (T)(scale * (step % 4 && !(step == 1 && !i) ? noise() + 0.2 : 0));
}

static inline int TY(same_state)(const TY(made) *a, const TY(made) *b) {
    for (int i = 0; i < a->layer.n_factors; i++)
        if (memcmp(a->factors[i].out, b->factors[i].out, (size_t)a->factors[i].rows * sizeof(T))) return 0;
    return !memcmp(a->layer.numbers, b->layer.numbers, (size_t)a->n_numbers * sizeof(T)) &&
           !memcmp(a->layer.moments, b->layer.moments, (size_t)a->n_moments * sizeof(TY(oplora_moment))) &&
           !memcmp(a->layer.scalars, b->layer.scalars, OPLORA_LEAN_SCALARS * sizeof(double));
}

static inline void TY(step_alone)(TY(made) *f, oplora_status expected) {
    void *const workspace = zeros(TY(oplora_lean_workspace_bytes)(&f->layer, 1), 1);
    CHECK(TY(oplora_lean_step)(&f->layer, 1, 0, workspace, NULL) == expected);
    free(workspace);
}

/* Where oplora_core.h says that a layer's numbers and moments lie. */
typedef struct {
    T *U, *U1, *pre, *Q, *B, *r, *Q1, *B1, *r1, *z, *z_avg, *z_avg_sq;
    TY(oplora_moment) *A, *m, *S, *R, *A1, *m1, *S1, *R1;
} TY(view);

static inline TY(view) TY(view_of)(const TY(oplora_lean) *l) {
    const int64_t H = l->H, Z = l->Z, N = l->N, d = l->weight_rank, k = l->moment_rank;
    TY(view) v;
    v.U = l->numbers, v.U1 = v.U + d * N, v.pre = v.U1 + d * H;
    v.Q = v.pre + H, v.B = v.Q + d * H, v.r = v.B + k * H;
    v.Q1 = v.r + H, v.B1 = v.Q1 + d * Z, v.r1 = v.B1 + k * Z;
    v.z = v.r1 + Z, v.z_avg = v.z + Z, v.z_avg_sq = v.z_avg + Z;
    v.A = l->moments, v.m = v.A + k * N, v.S = v.m + N, v.R = v.S + N;
    v.A1 = v.R + N, v.m1 = v.A1 + k * H, v.S1 = v.m1 + H, v.R1 = v.S1 + H;
    return v;
}

/* Finite factors and a finite state. */
static inline int TY(is_finite)(const TY(made) *f) {
    for (int64_t i = 0; i < f->n_numbers; i++)
        if (!isfinite(f->layer.numbers[i])) return 0;
    for (int64_t i = 0; i < f->n_moments; i++)
        if (!isfinite(TY(number)(f->layer.moments[i]))) return 0;
    for (int i = 0; i < OPLORA_LEAN_SCALARS; i++)
        if (!isfinite(f->layer.scalars[i])) return 0;
    for (int k = 0; k < f->layer.n_factors; k++)
        for (int64_t i = 0; i < f->factors[k].rows; i++)
            if (!isfinite(f->factors[k].out[i])) return 0;
    return 1;
}
