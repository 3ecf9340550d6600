/* exact_plan: where the scratch of adamw_exact.cu's layers lies, as csrc/core/exact_plan.c; on the host. */
#include "exact.cuh"

#include <string.h>

using namespace exact;

namespace {

/* A layer with its scratch in the workspace; the same walk counts the bytes. */
Layer plan_layer(const oplora_exact_f32 &l, arena *a) {
    Layer layer = {};
    layer.H = l.H, layer.Z = l.Z, layer.N = l.N, layer.n_factors = l.n_factors;
    layer.parameters = l.parameters, layer.exp_avg = l.exp_avg, layer.exp_avg_sq = l.exp_avg_sq;
    layer.decay = l.decay, layer.moving = l.moving, layer.report = l.report;
    layer.tasks = tasks_of(l);
    for (float **piece : {&layer.h, &layer.h_next, &layer.d})
        *piece = static_cast<float *>(take(a, l.H, sizeof(float)));
    layer.dz = static_cast<float *>(take(a, l.Z, sizeof(float)));
    layer.latent = static_cast<double *>(take(a, l.Z, sizeof(double)));
    layer.partial = static_cast<double *>(take(a, layer.tasks * (l.H + 2), sizeof(double)));
    layer.hidden = static_cast<Constants *>(take(a, 1, sizeof(Constants)));
    layer.of_factors = static_cast<Rates *>(take(a, l.n_factors, sizeof(Rates)));
    return layer;
}

} // namespace

int64_t oplora_cuda_exact_table_bytes(const oplora_exact_f32 *layers, int64_t n_layers) {
    if (oplora_exact_workspace_bytes_f32(layers, n_layers) < 0) return -1;
    return Sections<Layer>(layers, n_layers, nullptr).memory.used;
}

int64_t oplora_cuda_exact_workspace_bytes(const oplora_exact_f32 *layers, int64_t n_layers) {
    if (oplora_exact_workspace_bytes_f32(layers, n_layers) < 0) return -1;
    arena a = {nullptr, 0};
    for (int64_t i = 0; i < n_layers; i++) plan_layer(layers[i], &a);
    return a.used;
}

oplora_status oplora_cuda_exact_plan_layers(const oplora_exact_f32 *layers, int64_t n_layers,
                                            oplora_adamw *const *adamw, const double *const *rates,
                                            const oplora_cuda_half *halves, oplora_cuda_verdict *verdict,
                                            void *workspace, void *table, oplora_cuda_plan *plan) {
    if (!plan || (n_layers > 0 && (!layers || !adamw || !rates || !verdict || !workspace || !table)))
        return OPLORA_ENULL;
    for (int64_t i = 0; i < n_layers; i++) {
        const oplora_exact_f32 &l = layers[i];
        if (!l.parameters || !l.exp_avg || !l.exp_avg_sq || !l.decay || !l.moving || !l.report) return OPLORA_ENULL;
    }
    if (oplora_exact_workspace_bytes_f32(layers, n_layers) < 0) return OPLORA_ESIZE;
    const Sections<Layer> to(layers, n_layers, table);
    int64_t task = 0;
    Factor *factor = to.factors;
    arena a = {static_cast<char *>(workspace), 0};
    for (int64_t i = 0; i < n_layers; i++) {
        Layer layer = plan_layer(layers[i], &a);
        layer.adamw = adamw[i];
        layer.rates = rates[i];
        layer.first_factor = factor - to.factors;
        to.first_part[i] = to.first_chunk[i] = task;
        factor = plan_factors(layers[i].factors, layers[i].n_factors, halves ? halves + layer.first_factor : nullptr,
                              factor);
        task += layer.tasks;
        memcpy(&to.layers[i], &layer, sizeof layer);
    }
    to.first_part[n_layers] = to.first_chunk[n_layers] = task;
    *plan = {n_layers, task, task, to.offset(to.factors), to.offset(to.first_part), to.offset(to.first_chunk),
             verdict,  0};
    return task > INT32_MAX ? OPLORA_EOVERFLOW : OPLORA_OK;
}
