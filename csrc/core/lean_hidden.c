/* lean_hidden: the hidden path of adamw_lean.c, whose W1 is a map as W2 is: z, W1 z + c1, and the next h. */
#include "lean.h"

#include <string.h>

void TY(oplora_lean_find_hidden)(const TY(lean_plan) *p, T *h) {
    for (int64_t j = 0; j < p->layer->H; j++) h[j] = p->pre[j] > 0 ? p->pre[j] : 0;
}

/* p->d = dh in T, and dz = W1^T d into p->change; the report's numbers of the hidden path. */
void TY(oplora_lean_report_hidden)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_stream s = oplora_stream_of(l->seed, l->layer, OPLORA_W1_TENSOR);
    const TY(lean_rows) *const r = &p->hidden.rows;
    const double bound = oplora_start_bound(OPLORA_UNIFORM, l->Z) * *p->hidden.scale;
    double along[RANK] = {0}, d2 = 0, dz2 = 0;
    T *const dz = p->change;
    memset(dz, 0, (size_t)l->Z * sizeof(T));
    l->report[4] = 0;
    for (int64_t j = 0; j < l->H; j++) {
        p->d[j] = TY(oplora_narrowed)(p->dh[j]);
        d2 += p->dh[j] * p->dh[j];
        l->report[4] += p->h[j] != 0;
        if (p->dh[j] == 0) continue;
        kernels->uniform_axpy(&s, (uint32_t)j, 0, TY(oplora_narrowed)(bound * p->dh[j]), dz, l->Z);
        for (int i = 0; i < r->d; i++) along[i] += (double)r->U[i * l->H + j] * p->dh[j];
    }
    for (int64_t i = 0; i < l->Z; i++) {
        double sum = dz[i];
        for (int a = 0; a < r->d; a++) sum += (double)p->hidden.Q[a * l->Z + i] * along[a];
        dz[i] = TY(oplora_narrowed)(sum);
        dz2 += sum * sum;
    }
    l->report[2] = dz2 + d2 * (TY(oplora_lean_square)(p->z, l->Z) + 1);
    l->report[3] = TY(oplora_lean_square)(p->h, l->H);
}

void TY(oplora_lean_step_hidden)(TY(lean_plan) *p) {
    const TY(oplora_lean) *const l = p->layer;
    const TY(oplora_kernels) *const kernels = TY(oplora_dispatch)();
    const oplora_adamw *const a = &l->adamw;
    const oplora_stream s = oplora_stream_of(l->seed, l->layer, OPLORA_W1_TENSOR);
    TY(lean_map) *const map = &p->hidden;
    TY(oplora_lean_report_hidden)(p);
    map->keep = map->start_keep = 1 - a->hidden_lr * a->weight_decay;
    map->rate = a->hidden_lr / p->corrected1;
    const TY(lean_share) share = {map->keep, map->rate, 1, 1};
    TY(lean_turn) turn;
    TY(oplora_lean_prepare_map)(map, p->z, TY(oplora_lean_square)(p->d, l->H), a, p->corrected2,
                                oplora_rounding_key(l->seed, l->layer, a->step, 1));
    memset(map->sums, 0, (size_t)TY(lean_sums_size)(&map->rows) * sizeof(double));
    for (int64_t j = 0; j < l->H; j += LEAN_BLOCK)
        TY(oplora_lean_reduce_block)(&map->rows, &share, p->d + j, j, l->H - j < LEAN_BLOCK ? l->H - j : LEAN_BLOCK,
                                     map->sums);
    TY(oplora_lean_solve_map)(map, p->z);

    const TY(oplora_adamw_constants) constants =
        TY(oplora_adamw_constants_of)(a, p->corrected1, p->corrected2, a->hidden_lr, a->hidden_lr * a->weight_decay);
    memcpy(p->z_next, p->z, (size_t)l->Z * sizeof(T));
    kernels->adamw(p->z_next, p->z_avg, p->z_avg_sq, p->change, 1, 0, NULL, l->Z, &constants);
    TY(oplora_lean_finish_map)(map, p->z, p->z_next);
    const double bound = oplora_start_bound(OPLORA_UNIFORM, l->Z) * map->start_keep * *map->scale;
    for (int64_t i = 0; i < l->Z; i++) p->change[i] = (T)(bound * ((double)p->z_next[i] - p->z[i]));
    TY(oplora_lean_turn_of)(&map->rows, &share, &turn);
    for (int64_t j = 0; j < l->H; j += LEAN_BLOCK)
        TY(oplora_lean_update_block)(&map->rows, &turn, p->d + j, NULL, j, j,
                                     l->H - j < LEAN_BLOCK ? l->H - j : LEAN_BLOCK, p->pre + j);
    for (int64_t j = 0; j < l->H; j++) p->pre[j] += (T)kernels->uniform_dot(&s, (uint32_t)j, 0, p->change, l->Z);
    memcpy(p->z, p->z_next, (size_t)l->Z * sizeof(T));
    *map->scale *= map->start_keep;
    TY(oplora_lean_find_hidden)(p, p->h_next);
}
