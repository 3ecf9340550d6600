/* exact_plan: where the scratch of adamw_exact.cu's layers lies, as csrc/core/exact_plan.c; on the host. */
#include "exact.cuh"

using namespace exact;

namespace {

struct State {
    using Core = oplora_exact_f32;
    using Layer = exact::Layer;

    bool fits(const Core *layers, int64_t n) const { return oplora_exact_workspace_bytes_f32(layers, n) >= 0; }
    bool is_whole(const Core &l) const {
        return l.parameters && l.exp_avg && l.exp_avg_sq && l.decay && l.moving && l.report;
    }

    int64_t chunks_in(int64_t rows) const { return tasks_in(rows); }
    int64_t parts_of(const Core &, int64_t chunks) const { return chunks; }

    Layer lay_out(const Core &l, arena *a) const {
        Layer layer = {};
        layer.H = l.H, layer.Z = l.Z, layer.N = l.N;
        layer.parameters = l.parameters, layer.exp_avg = l.exp_avg, layer.exp_avg_sq = l.exp_avg_sq;
        layer.decay = l.decay, layer.moving = l.moving, layer.report = l.report;
        for (float **piece : {&layer.h, &layer.h_next, &layer.d})
            *piece = static_cast<float *>(take(a, l.H, sizeof(float)));
        layer.dz = static_cast<float *>(take(a, l.Z, sizeof(float)));
        layer.latent = static_cast<double *>(take(a, l.Z, sizeof(double)));
        layer.partial = static_cast<double *>(take(a, tasks_of(l) * (l.H + 2), sizeof(double)));
        layer.hidden = static_cast<Constants *>(take(a, 1, sizeof(Constants)));
        layer.of_factors = static_cast<Rates *>(take(a, l.n_factors, sizeof(Rates)));
        return layer;
    }
};

} // namespace

int64_t oplora_cuda_exact_table_bytes(const oplora_exact_f32 *layers, int64_t n_layers) {
    return table_bytes(State{}, layers, n_layers);
}

int64_t oplora_cuda_exact_workspace_bytes(const oplora_exact_f32 *layers, int64_t n_layers) {
    return workspace_bytes(State{}, layers, n_layers);
}

oplora_status oplora_cuda_exact_plan_layers(const oplora_exact_f32 *layers, int64_t n_layers,
                                            oplora_adamw *const *adamw, const double *const *rates,
                                            const oplora_cuda_half *halves, oplora_cuda_verdict *verdict,
                                            void *workspace, void *table, oplora_cuda_plan *plan) {
    return plan_layers(State{}, layers, n_layers, adamw, rates, halves, verdict, workspace, table, plan);
}
