/* lean_plan: where the state and the scratch of adamw_lean.c's layers lie, and what is refused. */
#include "lean.h"

#include <math.h>

static double TY(lean_work)(const TY(oplora_lean) *l) { return (double)l->N * (1 + (double)l->H / 32); }

static int64_t TY(lean_chunks_of)(const TY(oplora_lean) *l) {
    int64_t chunks = 0;
    for (int64_t f = 0; f < l->n_factors; f++) chunks += oplora_lean_chunks(l->factors[f].rows);
    return chunks;
}

static int64_t TY(lean_parts_of)(const TY(oplora_lean) *l) {
    return oplora_lean_parts(TY(lean_chunks_of)(l), oplora_lean_sums((int)l->weight_rank, (int)l->moment_rank), l->H);
}

/* Lays a layer's scratch out; the same walk counts its bytes. */
void TY(oplora_lean_take_scratch)(TY(lean_plan) *p, const TY(oplora_lean) *l, arena *a) {
    const int64_t basis = l->weight_rank + l->moment_rank + 1, wider = l->H > l->Z ? l->H : l->Z;
    p->h = take(a, l->H, sizeof(T));
    p->h_next = take(a, l->H, sizeof(T));
    p->d = take(a, l->H, sizeof(T));
    p->z_next = take(a, l->Z, sizeof(T));
    p->change = take(a, wider, sizeof(T));
    double *const dh = take(a, l->H, sizeof(double));
    p->dh = l->dh ? l->dh : dh;
    p->shares = take(a, l->n_factors, sizeof(TY(lean_share)));
    for (TY(lean_map) *map = &p->outer; map; map = map == &p->outer ? &p->hidden : NULL) {
        const int64_t inputs = map == &p->outer ? l->H : l->Z;
        map->K = take(a, basis * inputs, sizeof(double));
        map->col = take(a, inputs, sizeof(double));
        map->Q_next = take(a, l->weight_rank * inputs, sizeof(double));
        map->directions = take(a, l->moment_rank * inputs, sizeof(double));
        map->sums = take(a, TY(lean_part_size)(l), sizeof(double));
    }
    p->part_sums = take(a, TY(lean_part_size)(l), sizeof(double));
    const int64_t rows = TY(lean_chunks_of)(l) * LEAN_CHUNK, words = oplora_lean_words(l->H);
    const int stay = l->start == OPLORA_SIGN && words <= MOST_WORDS / rows;
    p->words = stay ? take(a, rows * words, sizeof(uint32_t)) : NULL;
}

TY(lean_plan) TY(oplora_lean_plan_of)(const TY(oplora_lean) *l) {
    const int64_t H = l->H, Z = l->Z, N = l->N, d = l->weight_rank, k = l->moment_rank;
    TY(lean_plan) p = {.layer = l, .parts = TY(lean_parts_of)(l), .bound = oplora_start_bound(l->start, H)};
    int64_t all_rows = 0;
    for (const TY(oplora_factor) *f = l->factors; f < l->factors + l->n_factors; f++)
        all_rows += f->place ? f->place->rows : f->rows;
    p.chunks = TY(lean_chunks_of)(l);
    oplora_lean_layout at;
    if (!oplora_lean_lay_out(H, Z, N, d, k, &at)) return p; /* sizes are checked before */
    p.outer = (TY(lean_map)){.inputs = H,
                             .all_rows = all_rows,
                             .rows = {.rows = N, .d = (int)d, .k = (int)k},
                             .Q = l->numbers + at.Q,
                             .B = l->numbers + at.B};
    p.hidden = (TY(lean_map)){.inputs = Z,
                              .all_rows = H,
                              .rows = {.rows = H, .d = (int)d, .k = (int)k},
                              .Q = l->numbers + at.Q1,
                              .B = l->numbers + at.B1};
    p.outer.r = l->numbers + at.r, p.hidden.r = l->numbers + at.r1;
    p.outer.rows.U = l->numbers + at.U, p.hidden.rows.U = l->numbers + at.U1;
    p.outer.rows.A = l->moments + at.A, p.hidden.rows.A = l->moments + at.A1;
    p.outer.rows.m = l->moments + at.m, p.hidden.rows.m = l->moments + at.m1;
    p.outer.rows.S = l->moments + at.S, p.hidden.rows.S = l->moments + at.S1;
    p.outer.rows.R = l->moments + at.R, p.hidden.rows.R = l->moments + at.R1;
    p.pre = l->numbers + at.pre;
    p.z = l->numbers + at.z, p.z_avg = l->numbers + at.z_avg, p.z_avg_sq = l->numbers + at.z_avg_sq;
    p.outer.scale = l->scalars;
    p.outer.mean = l->scalars + 1;
    p.hidden.scale = l->scalars + 2;
    p.hidden.mean = l->scalars + 3;
    return p;
}

/* ---- all layers ---- */

/* That the rows which are here are among those of the whole factor. */
static oplora_status TY(lean_check_place)(const oplora_place *p, int64_t rows) {
    int64_t behind;
    const int64_t most = INT64_MAX >> 24; /* so that the rows of a layer's factors can be added up */
    OPLORA_RETURN_IF(p->rows < rows || p->rows > most || p->run < 1 || rows % p->run, OPLORA_ESIZE);
    OPLORA_RETURN_IF(p->first < 0 || p->first > p->rows - p->run || p->stride < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(__builtin_mul_overflow(rows / p->run - 1, p->stride, &behind), OPLORA_ESIZE);
    return behind <= p->rows - p->run - p->first ? OPLORA_OK : OPLORA_ESIZE;
}

oplora_status TY(oplora_lean_check_layer)(const TY(oplora_lean) *l) {
    int64_t rows = 0, ranges = 0;
    OPLORA_RETURN_IF(oplora_lean_numbers(l->H, l->Z, l->N, l->weight_rank, l->moment_rank) < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(l->n_factors < 1, OPLORA_ESIZE);
    OPLORA_RETURN_IF(!l->factors, OPLORA_ENULL);
    OPLORA_RETURN_IF(l->start != OPLORA_UNIFORM && l->start != OPLORA_SIGN, OPLORA_EVALUE);
    for (int64_t f = 0; f < l->n_factors; f++) {
        OPLORA_RETURN_IF(l->factors[f].rows < 1 || l->factors[f].rows > l->N - rows, OPLORA_ESIZE);
        rows += l->factors[f].rows;
        ranges += l->factors[f].random != 0;
        if (l->factors[f].place) OPLORA_FORWARD(TY(lean_check_place)(l->factors[f].place, l->factors[f].rows));
    }
    OPLORA_RETURN_IF(rows != l->N, OPLORA_ESIZE);
    return ranges <= OPLORA_MOST_RANGES ? OPLORA_OK : OPLORA_ERANGES;
}

static oplora_status TY(lean_check)(const TY(oplora_lean) *layers, int64_t n_layers) {
    OPLORA_RETURN_IF(n_layers < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(n_layers > 0 && !layers, OPLORA_ENULL);
    for (int64_t i = 0; i < n_layers; i++) OPLORA_FORWARD(TY(oplora_lean_check_layer)(&layers[i]));
    return OPLORA_OK;
}

static oplora_status TY(lean_check_rates)(const TY(oplora_lean) *l) {
    const TY(oplora_factor) *random = NULL;
    OPLORA_RETURN_IF(!oplora_adamw_is_valid(&l->adamw), OPLORA_EVALUE);
    for (const TY(oplora_factor) *f = l->factors; f < l->factors + l->n_factors; f++) {
        OPLORA_RETURN_IF(!isfinite(f->lr) || !isfinite(f->weight_decay), OPLORA_EVALUE);
        OPLORA_RETURN_IF(f->random && random &&
                             oplora_lean_keep(f->lr, f->weight_decay) !=
                                 oplora_lean_keep(random->lr, random->weight_decay),
                         OPLORA_EVALUE);
        if (f->random) random = f;
    }
    return OPLORA_OK;
}

/* Lays everything out in the workspace; the same walk counts its bytes. */
static TY(lean_job) TY(lean_plan_layers)(const TY(oplora_lean) *layers, int64_t n_layers, arena *a) {
    TY(lean_job) job = {.n_plans = n_layers};
    int64_t sums = 0;
    for (int64_t i = 0; i < n_layers; i++) {
        TY(lean_plan) ignored;
        arena slot = {NULL, 0};
        TY(oplora_lean_take_scratch)(&ignored, &layers[i], &slot);
        if (slot.used < 0) a->used = -1;
        if (slot.used > job.slot_bytes) job.slot_bytes = slot.used;
        const int64_t parts = TY(lean_parts_of)(&layers[i]);
        job.n_parts += parts;
        if (parts * TY(lean_part_size)(&layers[i]) > sums) sums = parts * TY(lean_part_size)(&layers[i]);
    }
    job.plans = take(a, n_layers, sizeof(TY(lean_plan)));
    job.part_plan = take(a, job.n_parts, sizeof(int64_t));
    job.squares = take(a, 2 * job.n_parts, sizeof(double));
    job.part_sums = take(a, sums, sizeof(double));
    job.slots = take(a, n_layers, job.slot_bytes);
    if (!a->memory || a->used < 0) return job;
    double all = 0;
    for (int64_t i = 0; i < n_layers; i++) all += TY(lean_work)(&layers[i]);
    for (int64_t i = 0, part = 0; i < n_layers; i++) {
        const double work = TY(lean_work)(&layers[i]);
        job.plans[i] = TY(oplora_lean_plan_of)(&layers[i]);
        job.plans[i].spreads = work > LARGE_WORK || (work > SMALL_WORK && work > all / 4);
        job.plans[i].first_part = part;
        for (const int64_t end = part + job.plans[i].parts; part < end; part++) job.part_plan[part] = i;
    }
    return job;
}

int64_t TY(oplora_lean_workspace_bytes)(const TY(oplora_lean) *layers, int64_t n_layers) {
    if (TY(lean_check)(layers, n_layers) != OPLORA_OK) return -1;
    arena a = {NULL, 0};
    TY(lean_plan_layers)(layers, n_layers, &a);
    return a.used;
}

oplora_status TY(oplora_lean_prepare)(const TY(oplora_lean) *layers, int64_t n_layers, int needs, void *workspace,
                                      TY(lean_job) *job) {
    OPLORA_FORWARD(TY(lean_check)(layers, n_layers));
    OPLORA_RETURN_IF(n_layers > 0 && !workspace, OPLORA_ENULL);
    for (const TY(oplora_lean) *l = layers; l < layers + n_layers; l++) {
        OPLORA_RETURN_IF(!l->numbers || !l->moments || !l->scalars || !l->report, OPLORA_ENULL);
        OPLORA_RETURN_IF(needs & LEAN_NEEDS_DH && !l->dh, OPLORA_ENULL);
        if (needs & LEAN_NEEDS_RATES) OPLORA_FORWARD(TY(lean_check_rates)(l));
        for (int64_t f = 0; f < l->n_factors; f++) {
            OPLORA_RETURN_IF(!l->factors[f].g, OPLORA_ENULL);
            OPLORA_RETURN_IF(needs & LEAN_NEEDS_OUT && !l->factors[f].out, OPLORA_ENULL);
        }
    }
    arena a = {workspace, 0};
    *job = TY(lean_plan_layers)(layers, n_layers, &a);
    job->half = LEAN_WHOLE;
    return a.used < 0 ? OPLORA_EOVERFLOW : OPLORA_OK;
}
