/* lean_plan: where the state and the scratch of adamw_lean.cu's layers lie, as csrc/core/lean_plan.c; on the host. */
#include "lean.cuh"

using namespace lean;

namespace {

int sums_of(const oplora_lean_f32 &l) {
    return oplora_lean_sums(static_cast<int>(l.weight_rank), static_cast<int>(l.moment_rank));
}

/* Lays a layer's scratch out; the same walk counts its bytes. */
void take_scratch(const oplora_lean_f32 &l, arena *a, Layer *to) {
    const int64_t d = l.weight_rank, k = l.moment_rank, p = oplora_lean_basis(static_cast<int>(d), static_cast<int>(k));
    const int sums = sums_of(l);
    int64_t chunks = 0;
    for (int64_t f = 0; f < l.n_factors; f++) chunks += oplora_lean_chunks(l.factors[f].rows);
    const auto floats = [&](int64_t count) { return static_cast<float *>(take(a, count, sizeof(float))); };
    const auto doubles = [&](int64_t count) { return static_cast<double *>(take(a, count, sizeof(double))); };
    to->h = floats(l.H);
    to->h_next = floats(l.H);
    to->d = floats(l.H);
    to->z_next = floats(l.Z);
    to->change = floats(l.H > l.Z ? l.H : l.Z);
    double *const dh = doubles(l.H);
    to->dh = l.dh ? l.dh : dh;
    to->corrections = doubles(2);
    to->squares = doubles(2 * chunks);
    to->part_sums = doubles(oplora_lean_parts(chunks, sums, l.H) * (sums + l.H));
    for (Map *map : {&to->outer, &to->hidden}) {
        const int64_t inputs = map == &to->outer ? l.H : l.Z;
        map->rows.step = static_cast<MapStep *>(take(a, 1, sizeof(MapStep)));
        map->rows.n_shares = map == &to->outer ? l.n_factors : 1;
        map->rows.shares = static_cast<Share *>(take(a, map->rows.n_shares, sizeof(Share)));
        map->steps = doubles(4);
        map->K = doubles(p * inputs);
        map->col = doubles(inputs);
        map->Q_next = doubles(d * inputs);
        map->directions = doubles(k * inputs);
        map->sums = doubles(sums + l.H);
    }
}

/* The layer's state, cut as oplora_core.h says. */
void take_state(const oplora_lean_f32 &l, Layer *to) {
    const int d = static_cast<int>(l.weight_rank), k = static_cast<int>(l.moment_rank);
    oplora_lean_layout at;
    if (!oplora_lean_lay_out(l.H, l.Z, l.N, d, k, &at)) return; /* sizes are checked before */
    const auto map = [&](Map *m, int64_t rows, int64_t inputs, int64_t Q, int64_t B, int64_t r, double *scalars) {
        m->rows.rows = rows, m->rows.d = d, m->rows.k = k;
        m->inputs = inputs;
        m->Q = l.numbers + Q, m->B = l.numbers + B, m->r = l.numbers + r;
        m->scale = scalars, m->mean = scalars + 1;
    };
    map(&to->outer, l.N, l.H, at.Q, at.B, at.r, l.scalars);
    map(&to->hidden, l.H, l.Z, at.Q1, at.B1, at.r1, l.scalars + 2);
    const auto rows = [&](Rows *r, int64_t U, int64_t A, int64_t m, int64_t S, int64_t R) {
        r->U = l.numbers + U;
        r->A = l.moments + A, r->m = l.moments + m, r->S = l.moments + S, r->R = l.moments + R;
    };
    rows(&to->outer.rows, at.U, at.A, at.m, at.S, at.R);
    rows(&to->hidden.rows, at.U1, at.A1, at.m1, at.S1, at.R1);
    to->pre = l.numbers + at.pre;
    to->z = l.numbers + at.z, to->z_avg = l.numbers + at.z_avg, to->z_avg_sq = l.numbers + at.z_avg_sq;
}

struct State {
    using Core = oplora_lean_f32;
    using Layer = lean::Layer;

    bool fits(const Core *layers, int64_t n) const { return oplora_lean_workspace_bytes_f32(layers, n) >= 0; }
    bool is_whole(const Core &l) const { return l.numbers && l.moments && l.scalars && l.report; }

    int64_t chunks_in(int64_t rows) const { return oplora_lean_chunks(rows); }
    int64_t parts_of(const Core &l, int64_t chunks) const { return oplora_lean_parts(chunks, sums_of(l), l.H); }

    Layer lay_out(const Core &l, arena *a) const {
        Layer layer = {};
        take_scratch(l, a, &layer);
        take_state(l, &layer);
        layer.H = l.H, layer.Z = l.Z, layer.N = l.N;
        layer.seed = l.seed, layer.layer = l.layer, layer.start = l.start;
        layer.report = l.report;
        layer.bound = oplora_start_bound(l.start, l.H);
        layer.w1_bound = oplora_start_bound(OPLORA_UNIFORM, l.Z);
        return layer;
    }
};

} // namespace

int64_t oplora_cuda_lean_table_bytes(const oplora_lean_f32 *layers, int64_t n_layers) {
    return table_bytes(State{}, layers, n_layers);
}

int64_t oplora_cuda_lean_workspace_bytes(const oplora_lean_f32 *layers, int64_t n_layers) {
    return workspace_bytes(State{}, layers, n_layers);
}

oplora_status oplora_cuda_lean_plan_layers(const oplora_lean_f32 *layers, int64_t n_layers, oplora_adamw *const *adamw,
                                           const double *const *rates, const oplora_cuda_half *halves,
                                           oplora_cuda_verdict *verdict, void *workspace, void *table,
                                           oplora_cuda_plan *plan) {
    const oplora_status status =
        plan_layers(State{}, layers, n_layers, adamw, rates, halves, verdict, workspace, table, plan);
    if (status != OPLORA_OK) return status;
    plan->only_defaults = 1;
    for (int64_t i = 0; i < n_layers; i++)
        plan->only_defaults &= layers[i].weight_rank == 2 && layers[i].moment_rank == 1;
    return OPLORA_OK;
}
