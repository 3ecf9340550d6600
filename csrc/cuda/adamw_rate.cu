/* adamw_rate on a GPU. The formulas are in csrc/core/adamw_rate.c, whose bits these kernels give: sums run in the core's
 * lanes and tasks, and nothing is fused. A task is TASK_ROWS rows of one factor.
 *
 *     begin     a step's numbers, a layer a block; in a step also what the reports say of the gradients
 *     measure   a task's sums, a task eight lanes: 4 bytes an entry, and 12 more where it listens
 *     report    their sums, a layer a block; the verdict
 *     find      the rate, from all layers' reports: one thread
 *     update    p, v, s, a task a block: 28 bytes an entry; the step count
 *
 * A measurement is begin, measure and report, a step begin and update; between them is find. measure and update are
 * memory-bound. */
#include "adamw_rate.h"

#include "../shared/find_rate.h"
#include "tasks.cuh"

#include <math.h>

namespace {

constexpr int THREADS = 128, SUMS = OPLORA_RATE_REPORT;
constexpr int TASKS = THREADS / SQUARE_LANES; /* a block of the measurement */

/* Of a factor in a step. */
using Constants = oplora_rate_constants_f32;

struct Layer : PlannedLayer {
    int64_t N;
    float *generated, *exp_avg_sq;
    double *report;
    const double *found;   /* the rate */
    double *partial;       /* scratch: (tasks, SUMS) */
    Constants *of_factors; /* scratch: (factors) */
};

using Table = Model<Layer>;
using Task = FactorTask<Layer>;

/* ---- begin ---- */

__global__ void __launch_bounds__(32) begin_kernel(Table t, int steps) {
    const Layer &l = t.layers[blockIdx.x];
    for (int64_t f = threadIdx.x; f < l.n_factors; f += 32)
        l.of_factors[f] = oplora_rate_constants_of_f32(l.adamw, l.adamw->step + 1, *l.found, l.rates[2 * f],
                                                       l.rates[2 * f + 1], !t.factors[l.first_factor + f].listens);
    if (steps && threadIdx.x == 0 && l.report[1] != 0) atomicOr(&t.verdict->nonfinite, 1);
}

/* ---- measure, report ---- */

/* x[k] = entry first + k SQUARE_LANES, 0 from n on. */
template <int COUNT> __device__ void load(const float *from, int64_t first, int64_t n, float (&x)[COUNT]) {
    Gradient{from, OPLORA_F32}.load(first, SQUARE_LANES, n, x);
}

/* What was written into a factor of 16 bits is its value, and what is generated. */
__device__ void adopt(oplora_dtype dtype, uint16_t bits, float &p, float &v) {
    if (to_half(p, dtype) != bits) p = v = from_half(bits, dtype);
}

/* p and v of a factor's entries first + k SQUARE_LANES. */
template <int COUNT>
__device__ void load_values(const Task &task, int64_t first, float (&p)[COUNT], float (&v)[COUNT]) {
    const Factor &f = *task.factor;
    load(f.out + task.offset, first, task.count, p);
    load(task.layer->generated + task.row, first, task.count, v);
    if (!f.rounded) return;
#pragma unroll
    for (int k = 0; k < COUNT; k++)
        if (first + k * SQUARE_LANES < task.count)
            adopt(f.dtype, f.rounded[task.offset + first + k * SQUARE_LANES], p[k], v[k]);
}

/* What a lane sums over a task. */
enum { SQUARE, BAD, SIGNAL, SCALE, OF_P, OF_BASE, LANE_SUMS };

/* ||g||^2, how many are not finite, and of a factor that listens <g, v>, <g, u>, <g, p>, <g, base>. BATCH entries are
 * loaded at once: of one number each, or of five. */
template <bool LISTENS> __device__ void measure_lane(const Task &task, int lane, double (&sums)[LANE_SUMS]) {
    constexpr int BATCH = LISTENS ? 4 : 8;
    const Factor &f = *task.factor;
    const Constants a = task.layer->of_factors[task.index];
    const Gradient g = gradient_of(f, task.offset);
    for (int64_t i = lane; i < task.count; i += BATCH * SQUARE_LANES) {
        float x[BATCH], p[BATCH], v[BATCH], s[BATCH], base[BATCH];
        g.load(i, SQUARE_LANES, task.count, x);
        if (LISTENS) {
            load(task.layer->exp_avg_sq + task.row, i, task.count, s);
            if (f.base) load(f.base + task.offset, i, task.count, base);
            load_values(task, i, p, v);
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (i + k * SQUARE_LANES >= task.count) break;
            const double wide = x[k];
            sums[SQUARE] += wide * wide;
            sums[BAD] += !(x[k] <= 0x1.fffffep127f && x[k] >= -0x1.fffffep127f);
            if (!LISTENS) continue;
            const float taken = oplora_bounded_f32(x[k]);
            const double gradient = taken;
            sums[SIGNAL] += gradient * v[k];
            sums[SCALE] += gradient * oplora_rate_direction_f32(a, oplora_rate_next_s_f32(a, s[k], taken), taken);
            sums[OF_P] += gradient * p[k];
            if (f.base) sums[OF_BASE] += gradient * base[k];
        }
    }
}

/* TASKS tasks a block. */
__global__ void __launch_bounds__(THREADS) measure_kernel(Table t) {
    SHARED_ARRAY(double, lanes, LANE_SUMS *THREADS);
    const int id = static_cast<int>(threadIdx.x), lane = id % SQUARE_LANES;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * TASKS + id / SQUARE_LANES;
    const bool is_there = index < t.n_chunks;
    double sums[LANE_SUMS] = {};
    if (is_there) {
        const Task task = task_at(t, index);
        if (task.factor->listens)
            measure_lane<true>(task, lane, sums);
        else
            measure_lane<false>(task, lane, sums);
    }
    for (int i = 0; i < LANE_SUMS; i++) lanes[i * THREADS + id] = sums[i];
    __syncthreads();
    if (!is_there || lane >= SUMS) return;
    const auto sum_of = [&](int which) {
        double sum = 0;
        for (int k = 0; k < SQUARE_LANES; k++) sum += lanes[which * THREADS + id - lane + k];
        return sum;
    };
    double sum = sum_of(lane);
    if (lane == SIGNAL) sum -= sum_of(OF_BASE);
    if (lane == OF_P) sum = sum_of(SIGNAL) - sum;
    const Task task = task_at(t, index);
    task.layer->partial[task.of_layer * SUMS + lane] = sum;
}

/* A layer's sums in the order of tasks. */
__global__ void __launch_bounds__(32) report_kernel(Table t) {
    const Layer &l = t.layers[blockIdx.x];
    const int which = static_cast<int>(threadIdx.x);
    if (which >= SUMS) return;
    double sum = 0;
    for (int64_t task = 0; task < l.parts; task++) sum += l.partial[task * SUMS + which];
    l.report[which] = sum;
    if (which == 1 && sum != 0) atomicOr(&t.verdict->nonfinite, 1);
}

/* ---- update ---- */

/* Whether a task's entries are aligned to their vectors wherever they lie, and whole. */
__device__ bool is_aligned(const Task &task) {
    const Layer &l = *task.layer;
    uintptr_t bits = alignment_of(*task.factor, task.offset);
    for (const float *p : {l.generated, l.exp_avg_sq}) bits |= reinterpret_cast<uintptr_t>(p + task.row);
    return bits % 16 == 0 && task.count % 4 == 0;
}

template <int COUNT> __device__ void update_rows(const Task &task) {
    const Factor &f = *task.factor;
    const Gradient gradient = gradient_of(f, task.offset);
    const Constants a = task.layer->of_factors[task.index];
    /* held here: stores would have them read again for every entry */
    float *const out = f.out + task.offset, *const generated = task.layer->generated + task.row;
    float *const exp_avg_sq = task.layer->exp_avg_sq + task.row;
    uint16_t *const rounded = f.rounded ? f.rounded + task.offset : nullptr;
    const uint32_t rows = static_cast<uint32_t>(task.count);
#pragma unroll 1
    for (uint32_t n = threadIdx.x * COUNT; n < rows; n += THREADS * COUNT) {
        const Some<COUNT> g = gradient_at<COUNT>(gradient, n);
        Some<COUNT> p = at<COUNT>(out + n), v = at<COUNT>(generated + n), s = at<COUNT>(exp_avg_sq + n);
        if (rounded) {
            const Halves<COUNT> bits = at<COUNT>(static_cast<const uint16_t *>(rounded) + n);
#pragma unroll
            for (int k = 0; k < COUNT; k++) adopt(gradient.dtype, bits.value[k], p.value[k], v.value[k]);
        }
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const oplora_rate_entry_f32 next =
                oplora_rate_entry_step_f32(a, g.value[k], p.value[k], v.value[k], s.value[k]);
            p.value[k] = next.p, v.value[k] = next.v, s.value[k] = next.s;
        }
        at<COUNT>(generated + n) = v;
        at<COUNT>(exp_avg_sq + n) = s;
        at<COUNT>(out + n) = p;
        if (rounded) write_rounded<COUNT>(rounded + n, gradient.dtype, p);
    }
}

__global__ void __launch_bounds__(THREADS, 1) update_kernel(Table t) {
    if (t.refused()) {
        if (blockIdx.x == 0 && threadIdx.x == 0) t.verdict->refused++;
        return;
    }
    const Task task = task_at(t, blockIdx.x);
    if (is_aligned(task))
        update_rows<4>(task);
    else
        update_rows<1>(task);
    if (task.of_layer == 0 && threadIdx.x == 0) task.layer->adamw->step++;
}

/* ---- hear, find ---- */

__global__ void __launch_bounds__(32)
    heard_kernel(const double *reports, int64_t n_layers, const double *rates, int64_t n_rates,
                 const int64_t *listening, const double *groups, int64_t n_groups, double *heard) {
    const int64_t layer = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
    if (layer >= n_layers) return;
    const int64_t row = listening[layer];
    const double lr = row >= 0 && row < n_rates ? rates[2 * row] : 0; /* a table that is wrong reads nothing else */
    const double highest = oplora_highest_lr(groups, n_groups);
    oplora_hear(reports + layer * SUMS, lr, highest, heard + 3 * layer);
}

__global__ void __launch_bounds__(32)
    find_kernel(oplora_found *found, const double *heard, int64_t n, const int *veto) {
    SHARED_ARRAY(double, sums, 3);
    const unsigned i = threadIdx.x;
    if (i < 3) {
        double sum = 0;
        for (int64_t layer = 0; layer < n; layer++) sum += heard[3 * layer + i];
        sums[i] = sum;
    }
    __syncthreads();
    if (i != 0 || (veto && *veto)) return;
    oplora_found f = *found;
    oplora_find(&f, sums[0], sums[1], sums[2]);
    *found = f;
}

/* ---- the plan, on the host ---- */

bool sizes_fit(const oplora_rate_f32 *layers, int64_t n_layers) {
    if (n_layers < 0 || (n_layers > 0 && !layers)) return false;
    for (const oplora_rate_f32 *l = layers; l < layers + n_layers; l++) {
        int64_t rows = 0;
        if (l->N < 1 || l->n_factors < 1 || !l->factors) return false;
        for (int64_t f = 0; f < l->n_factors; rows += l->factors[f++].rows)
            if (l->factors[f].rows < 1 || l->factors[f].rows > l->N - rows) return false;
        if (rows != l->N) return false;
    }
    return true;
}

struct State {
    using Core = oplora_rate_f32;
    using Layer = ::Layer;
    const double *found;

    bool fits(const Core *layers, int64_t n) const { return sizes_fit(layers, n); }
    bool is_whole(const Core &l) const {
        for (int64_t f = 0; l.factors && f < l.n_factors; f++)
            if (!l.factors[f].out) return false;
        return l.generated && l.exp_avg_sq && l.report;
    }

    int64_t chunks_in(int64_t rows) const { return tasks_in(rows); }
    int64_t parts_of(const Core &, int64_t chunks) const { return chunks; }

    Layer lay_out(const Core &l, arena *a) const {
        Layer layer = {};
        layer.N = l.N;
        layer.generated = l.generated, layer.exp_avg_sq = l.exp_avg_sq, layer.report = l.report;
        layer.found = found;
        layer.partial = static_cast<double *>(take(a, tasks_of(l) * SUMS, sizeof(double)));
        layer.of_factors = static_cast<Constants *>(take(a, l.n_factors, sizeof(Constants)));
        return layer;
    }
};

} // namespace

int64_t oplora_cuda_rate_table_bytes(const oplora_rate_f32 *layers, int64_t n_layers) {
    return table_bytes(State{nullptr}, layers, n_layers);
}

int64_t oplora_cuda_rate_workspace_bytes(const oplora_rate_f32 *layers, int64_t n_layers) {
    return workspace_bytes(State{nullptr}, layers, n_layers);
}

oplora_status oplora_cuda_rate_plan_layers(const oplora_rate_f32 *layers, int64_t n_layers, oplora_adamw *const *adamw,
                                           const double *const *rates, const double *found,
                                           const oplora_cuda_half *halves, oplora_cuda_verdict *verdict,
                                           void *workspace, void *table, oplora_cuda_plan *plan) {
    if (n_layers > 0 && !found) return OPLORA_ENULL;
    return plan_layers(State{found}, layers, n_layers, adamw, rates, halves, verdict, workspace, table, plan);
}

int oplora_cuda_rate_measure(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    const unsigned layers = grid_of(plan->n_layers);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(begin_verdict(plan, nullptr, on));
    CUDA_FORWARD(cuda_launch(begin_kernel, layers, 32, 0, on, t, 0));
    CUDA_FORWARD(cuda_launch(measure_kernel, grid_of((plan->n_parts + TASKS - 1) / TASKS), THREADS, 0, on, t));
    return cuda_launch(report_kernel, layers, 32, 0, on, t);
}

int oplora_cuda_rate_heard(const double *reports, int64_t n_layers, const double *rates, int64_t n_rates,
                           const int64_t *listening, const double *groups, int64_t n_groups, double *heard,
                           void *stream) {
    if (n_layers == 0) return cudaSuccess;
    return cuda_launch(heard_kernel, grid_of((n_layers + 31) / 32), 32, 0, static_cast<cudaStream_t>(stream), reports,
                       n_layers, rates, n_rates, listening, groups, n_groups, heard);
}

int oplora_cuda_find_rate(double *found, const double *heard, int64_t n_layers, const int *veto, void *stream) {
    return cuda_launch(find_kernel, 1, 32, 0, static_cast<cudaStream_t>(stream),
                       reinterpret_cast<oplora_found *>(found), heard, n_layers, veto);
}

int oplora_cuda_rate_step(const oplora_cuda_plan *plan, const void *table, const int *veto, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(begin_verdict(plan, veto, on));
    CUDA_FORWARD(cuda_launch(begin_kernel, grid_of(plan->n_layers), 32, 0, on, t, 1));
    return cuda_launch(update_kernel, grid_of(plan->n_parts), THREADS, 0, on, t);
}
