/* lean_plan: where the state and the scratch of adamw_lean.cu's layers lie, as csrc/core/lean_plan.c; on the host. */
#include "lean.cuh"

#include <string.h>

using namespace lean;

namespace {

/* Lays a layer's scratch out; the same walk counts its bytes. */
void take_scratch(const oplora_lean_f32 &l, arena *a, Layer *to) {
    const int64_t d = l.weight_rank, k = l.moment_rank, p = oplora_lean_basis(static_cast<int>(d), static_cast<int>(k));
    const int64_t sums = oplora_lean_sums(static_cast<int>(d), static_cast<int>(k)) + l.H;
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
    to->squares = doubles(2 * to->chunks);
    to->part_sums = doubles(to->parts * sums);
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
        map->sums = doubles(sums);
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

int64_t chunks_in(const oplora_lean_f32 &l) {
    int64_t chunks = 0;
    for (int64_t f = 0; f < l.n_factors; f++) chunks += oplora_lean_chunks(l.factors[f].rows);
    return chunks;
}

/* The workspace: the verdict, then every layer's scratch. */
Layer plan_layer(const oplora_lean_f32 &l, arena *a) {
    Layer layer = {};
    layer.chunks = chunks_in(l);
    layer.parts = layer.chunks < MOST_PARTS ? layer.chunks : MOST_PARTS;
    take_scratch(l, a, &layer);
    return layer;
}

} // namespace

int64_t oplora_cuda_lean_table_bytes(const oplora_lean_f32 *layers, int64_t n_layers) {
    if (oplora_lean_workspace_bytes_f32(layers, n_layers) < 0) return -1;
    return Sections<Layer>(layers, n_layers, nullptr).memory.used;
}

int64_t oplora_cuda_lean_workspace_bytes(const oplora_lean_f32 *layers, int64_t n_layers) {
    if (oplora_lean_workspace_bytes_f32(layers, n_layers) < 0) return -1;
    arena a = {nullptr, 0};
    for (int64_t i = 0; i < n_layers; i++) plan_layer(layers[i], &a);
    return a.used;
}

oplora_status oplora_cuda_lean_plan_layers(const oplora_lean_f32 *layers, int64_t n_layers, oplora_adamw *const *adamw,
                                           const double *const *rates, const oplora_cuda_half *halves,
                                           oplora_cuda_verdict *verdict, void *workspace, void *table,
                                           oplora_cuda_plan *plan) {
    if (!plan || (n_layers > 0 && (!layers || !adamw || !rates || !verdict || !workspace || !table)))
        return OPLORA_ENULL;
    if (oplora_lean_workspace_bytes_f32(layers, n_layers) < 0) return OPLORA_ESIZE;
    const Sections<Layer> to(layers, n_layers, table);
    int64_t part = 0, chunk = 0;
    int only_defaults = 1;
    Factor *factor = to.factors;
    arena a = {static_cast<char *>(workspace), 0};
    for (int64_t i = 0; i < n_layers; i++) {
        const oplora_lean_f32 &l = layers[i];
        if (!l.numbers || !l.moments || !l.scalars || !l.report) return OPLORA_ENULL;
        Layer layer = plan_layer(l, &a);
        take_state(l, &layer);
        layer.H = l.H, layer.Z = l.Z, layer.N = l.N;
        layer.seed = l.seed, layer.layer = l.layer, layer.start = l.start;
        layer.report = l.report;
        layer.adamw = adamw[i];
        layer.rates = rates[i];
        layer.bound = oplora_start_bound(l.start, l.H);
        layer.w1_bound = oplora_start_bound(OPLORA_UNIFORM, l.Z);
        layer.first_factor = factor - to.factors, layer.n_factors = l.n_factors;
        layer.first_part = to.first_part[i] = part;
        layer.first_chunk = to.first_chunk[i] = chunk;
        factor = plan_factors(l.factors, l.n_factors, halves ? halves + layer.first_factor : nullptr, factor);
        part += layer.parts;
        chunk += layer.chunks;
        only_defaults &= l.weight_rank == 2 && l.moment_rank == 1;
        memcpy(&to.layers[i], &layer, sizeof layer);
    }
    to.first_part[n_layers] = part;
    to.first_chunk[n_layers] = chunk;
    *plan = {n_layers, part,         chunk, to.offset(to.factors), to.offset(to.first_part), to.offset(to.first_chunk),
             verdict,  only_defaults};
    return part > INT32_MAX || chunk > INT32_MAX ? OPLORA_EOVERFLOW : OPLORA_OK;
}
