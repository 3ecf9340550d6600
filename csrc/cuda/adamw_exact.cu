/* adamw_exact on a GPU. The formulas are in csrc/core/adamw_exact.c, whose bits these kernels give: sums run in the core's
 * lanes and tasks, and nothing is fused. A task is TASK_ROWS rows of one factor.
 *
 *     squares   ||g||^2 and non-finite entries, a task eight lanes     4 bytes a row
 *     collect   their sums, a layer a block; the verdict
 *     hidden    h, a layer a block
 *     reduce    dh's share of a task, a task a block                   4 bytes an entry of a column that is on
 *     report    dh and the hidden path's norm, a layer a block; in a step also AdamW on z, W1, c1 and the next h
 *     update    AdamW on W2 and c2 and the next factors, a task a block: 24 bytes an entry of a column that moves
 *     settle    what still columns owe, and the step count, a layer a block
 *
 * reduce and update are memory-bound: 13 and 5 operations to 24 and 4 bytes. */
#include "adamw_exact.h"

#include "hidden.cuh"
#include "tasks.cuh"

#include <math.h>

namespace {

constexpr int THREADS = 128, LANES = 16, GROUPS = THREADS / LANES; /* of dot in csrc/core/kernels.h */
constexpr int UNITS = THREADS / HIDDEN_LANES;
static_assert(HIDDEN_LANES == SQUARE_LANES, "units, and tasks of the squares, a block");

/* AdamW's constants for a tensor. */
using Constants = oplora_adamw_constants_f32;

/* For a factor's rows of W2 and of c2. */
struct Rates {
    Constants outer, bias;
};

struct Layer {
    int64_t H, Z, N;
    float *parameters, *exp_avg, *exp_avg_sq;
    double *decay;
    uint8_t *moving;
    double *report;
    oplora_adamw *adamw;
    const double *rates;        /* (factors, 2) */
    float *h, *h_next, *d, *dz; /* scratch: (H) three times, (Z) */
    double *latent, *partial;   /* scratch: (Z); (tasks, H + 2): dh, ||g||^2, how many are not finite */
    Constants *hidden;          /* scratch: for z, W1, c1 */
    Rates *of_factors;          /* scratch: (factors) */
    int64_t first_factor, n_factors, tasks;
};

using Table = Model<Layer>;

using Task = FactorTask<Layer>;

__device__ double *partial_of(const Task &task) { return task.layer->partial + task.of_layer * (task.layer->H + 2); }

__device__ float *W1_of(const Layer &l) { return l.parameters + l.H * l.N + l.N; }
__device__ float *c1_of(const Layer &l) { return W1_of(l) + l.H * l.Z; }
__device__ float *z_of(const Layer &l) { return c1_of(l) + l.H; }

/* ---- squares, collect, hidden, reduce ---- */

/* UNITS tasks a block. */
__global__ void __launch_bounds__(THREADS) squares_kernel(Table t) {
    SHARED_ARRAY(double, lanes, THREADS);
    SHARED_ARRAY(int, bad, THREADS);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * UNITS + threadIdx.x / SQUARE_LANES;
    Gradient g = {};
    double *to = nullptr;
    int64_t n = 0;
    if (index < t.first_part[t.n_layers]) {
        const Task task = task_at(t, index);
        g = gradient_of(*task.factor, task.offset);
        to = partial_of(task) + task.layer->H;
        n = task.count;
    }
    find_squares(g, n, to, lanes, bad);
}

/* A layer's sums in the order of tasks. With `measured` they are in the report already. */
__global__ void __launch_bounds__(32) collect_kernel(Table t, int measured) {
    const Layer &l = t.layers[blockIdx.x];
    const int which = static_cast<int>(threadIdx.x);
    if (which < 2) {
        if (!measured) {
            double sum = 0;
            for (int64_t task = 0; task < l.tasks; task++) sum += l.partial[task * (l.H + 2) + l.H + which];
            l.report[which] = sum;
        }
        if (which == 1 && l.report[1] != 0) atomicOr(&t.verdict->nonfinite, 1);
    } else if (which == 2) {
        const oplora_adamw &a = *l.adamw;
        const double step = static_cast<double>(a.step + 1);
        const double corrected1 = 1 - pow(a.beta1, step), corrected2 = 1 - pow(a.beta2, step);
        for (int64_t f = 0; f < l.n_factors; f++) {
            const double lr = l.rates[2 * f], decay = lr * l.rates[2 * f + 1];
            l.of_factors[f] = {oplora_adamw_constants_of_f32(&a, corrected1, corrected2, lr * a.weight_ratio, decay),
                               oplora_adamw_constants_of_f32(&a, corrected1, corrected2, lr, decay)};
        }
        *l.hidden =
            oplora_adamw_constants_of_f32(&a, corrected1, corrected2, a.hidden_lr, a.hidden_lr * a.weight_decay);
    }
}

/* h by all threads, and a barrier. */
__device__ void find_hidden(const Layer &l, float *h, double *lanes) {
    for (int64_t base = 0; base < l.H; base += UNITS) {
        find_units<THREADS>(z_of(l), W1_of(l), c1_of(l), l.H, l.Z, base, lanes, h);
        __syncthreads();
    }
}

__global__ void __launch_bounds__(THREADS) hidden_kernel(Table t) {
    SHARED_ARRAY(double, lanes, THREADS);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    find_hidden(l, l.h, lanes);
}

/* A group of LANES threads takes every GROUPS-th column of the task. */
__global__ void __launch_bounds__(THREADS) reduce_kernel(Table t) {
    constexpr int BATCH = 8;
    SHARED_ARRAY(float, lanes, THREADS);
    if (t.refused()) return;
    const Task task = task_at(t, blockIdx.x);
    const Layer &l = *task.layer;
    const Gradient g = gradient_of(*task.factor, task.offset);
    const int id = static_cast<int>(threadIdx.x), lane = id % LANES;
    for (int64_t base = 0; base < l.H; base += GROUPS) {
        const int64_t j = base + id / LANES;
        float sum = 0;
        if (j < l.H && l.h[j] != 0) {
            const float *const column = l.parameters + j * l.N + task.row;
            for (int64_t n = lane; n < task.count; n += BATCH * LANES) {
                float x[BATCH];
                g.load_bounded(n, LANES, task.count, x);
#pragma unroll
                for (int k = 0; k < BATCH; k++)
                    if (n + k * LANES < task.count) sum += column[n + k * LANES] * x[k];
            }
        }
        lanes[id] = sum;
        __syncthreads();
        if (lane == 0 && j < l.H) {
            double total = 0;
            for (int k = 0; k < LANES; k++) total += lanes[id + k];
            partial_of(task)[j] = total;
        }
        __syncthreads();
    }
}

/* ---- the hidden path ---- */

/* dz = W1^T d, in double and in the order of units. */
__device__ void find_latent(const Layer &l) {
    const double *const d = l.report + 3 + l.H;
    const float *const W1 = W1_of(l);
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) {
        double sum = 0;
        for (int64_t j = 0; j < l.H; j++)
            if (d[j] != 0) sum += d[j] * W1[j * l.Z + i];
        l.latent[i] = sum;
    }
    __syncthreads();
}

__device__ void report_hidden(const Layer &l, double *sums) {
    double *const h = l.report + 3, *const d = h + l.H;
    const int t = static_cast<int>(threadIdx.x);
    for (int64_t j = t; j < l.H; j += THREADS) {
        double sum = 0;
        h[j] = l.h[j];
        for (int64_t task = 0; l.h[j] != 0 && task < l.tasks; task++) sum += l.partial[task * (l.H + 2) + j];
        d[j] = sum;
    }
    __syncthreads();
    find_latent(l);
    if (t == 0) { /* sums in order: one thread each */
        sums[0] = 0;
        for (int64_t j = 0; j < l.H; j++) sums[0] += d[j] * d[j];
    } else if (t == 32) {
        const float *const z = z_of(l);
        sums[1] = 0;
        for (int64_t i = 0; i < l.Z; i++) sums[1] += static_cast<double>(z[i]) * z[i];
    } else if (t == 64) {
        sums[2] = 0;
        for (int64_t i = 0; i < l.Z; i++) sums[2] += l.latent[i] * l.latent[i];
    }
    __syncthreads();
    if (t == 0) l.report[2] = sums[2] + sums[0] * (sums[1] + 1);
}

__device__ void adamw_at(const Layer &l, int64_t at, float gradient) {
    const oplora_adamw_entry_f32 next =
        oplora_adamw_step_f32(*l.hidden, gradient, l.parameters[at], l.exp_avg[at], l.exp_avg_sq[at]);
    l.exp_avg[at] = next.m;
    l.exp_avg_sq[at] = next.s;
    l.parameters[at] = next.p;
}

/* AdamW on z, W1 and c1 from the report's d, and the next h. */
__device__ void step_hidden(const Layer &l, int measured, double *lanes) {
    const double *const d = l.report + 3 + l.H;
    const int64_t W1 = W1_of(l) - l.parameters, c1 = c1_of(l) - l.parameters, z = z_of(l) - l.parameters;
    if (measured) find_latent(l);
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) l.dz[i] = oplora_narrowed_f32(l.latent[i]);
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) {
        l.h[j] = static_cast<float>(l.report[3 + j]);
        l.d[j] = oplora_narrowed_f32(d[j]);
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < l.H * l.Z; e += THREADS)
        adamw_at(l, W1 + e, l.d[e / l.Z] * l.parameters[z + e % l.Z]);
    __syncthreads(); /* W1's gradient is of the old z */
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) adamw_at(l, c1 + j, l.d[j]);
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS) adamw_at(l, z + i, l.dz[i]);
    __syncthreads();
    find_hidden(l, l.h_next, lanes);
}

__global__ void __launch_bounds__(THREADS, 1) report_kernel(Table t, int steps, int measured) {
    SHARED_ARRAY(double, lanes, THREADS);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    if (!measured) report_hidden(l, lanes);
    __syncthreads();
    if (steps) step_hidden(l, measured, lanes);
}

/* ---- rows ---- */

/* Whether a task's rows are aligned to their vectors wherever they lie, and whole. */
__device__ bool is_aligned(const Task &task) {
    const Layer &l = *task.layer;
    uintptr_t bits = alignment_of(*task.factor, task.offset);
    for (const float *p : {l.parameters, l.exp_avg, l.exp_avg_sq}) bits |= reinterpret_cast<uintptr_t>(p + task.row);
    return bits % 16 == 0 && l.N % 4 == 0 && task.count % 4 == 0;
}

template <int COUNT> __device__ void write_factor(const Task &task, int64_t n, const Some<COUNT> &v) {
    const Factor &f = *task.factor;
    Some<COUNT> value = v;
    if (f.base) {
        const Some<COUNT> base = at<COUNT>(f.base + task.offset + n);
#pragma unroll
        for (int k = 0; k < COUNT; k++) value.value[k] = base.value[k] + v.value[k];
    }
    if (f.out) at<COUNT>(f.out + task.offset + n) = value;
    if (f.rounded) write_rounded<COUNT>(f, task.offset + n, value);
}

/* AdamW on COUNT entries of a column whose gradient is h g; v += h_next times what they become. */
template <int COUNT>
__device__ void update_entries(const Layer &l, const Constants &a, int64_t index, const Some<COUNT> &g, float h,
                               float h_next, Some<COUNT> &v) {
    Some<COUNT> p = at<COUNT>(l.parameters + index), m = at<COUNT>(l.exp_avg + index);
    Some<COUNT> s = at<COUNT>(l.exp_avg_sq + index);
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const oplora_adamw_entry_f32 next =
            oplora_adamw_step_f32(a, h * g.value[k], p.value[k], m.value[k], s.value[k]);
        p.value[k] = next.p, m.value[k] = next.m, s.value[k] = next.s;
        if (h_next != 0) v.value[k] += h_next * next.p;
    }
    at<COUNT>(l.exp_avg + index) = m;
    at<COUNT>(l.exp_avg_sq + index) = s;
    at<COUNT>(l.parameters + index) = p;
}

template <int COUNT> __device__ void update_rows(const Task &task) {
    const Layer l = *task.layer; /* stores would have it read again for every entry */
    const Constants outer = l.of_factors[task.index].outer, bias = l.of_factors[task.index].bias;
    const double *const decay = l.decay + task.index * l.H;
    for (int64_t n = static_cast<int64_t>(threadIdx.x) * COUNT; n < task.count; n += THREADS * COUNT) {
        const Some<COUNT> g = gradient_at<COUNT>(*task.factor, task.offset + n);
        Some<COUNT> v = {};
        update_entries<COUNT>(l, bias, l.H * l.N + task.row + n, g, 1, 1, v);
        for (int64_t j = 0; j < l.H; j++) {
            const int64_t index = j * l.N + task.row + n;
            const float h = l.h[j], h_next = l.h_next[j];
            if (h != 0 || l.moving[j]) {
                update_entries<COUNT>(l, outer, index, g, h, h_next, v);
            } else if (h_next != 0) { /* it wakes: what it owes to weight decay is paid now */
                const float owed = static_cast<float>(decay[j] * outer.keep);
                Some<COUNT> p = at<COUNT>(l.parameters + index);
#pragma unroll
                for (int k = 0; k < COUNT; k++) {
                    if (owed != 1) p.value[k] *= owed;
                    v.value[k] += h_next * p.value[k];
                }
                if (owed != 1) at<COUNT>(l.parameters + index) = p;
            }
        }
        write_factor<COUNT>(task, n, v);
    }
}

__global__ void __launch_bounds__(THREADS) update_kernel(Table t) {
    if (t.refused()) return;
    const Task task = task_at(t, blockIdx.x);
    if (is_aligned(task))
        update_rows<4>(task);
    else
        update_rows<1>(task);
}

template <int COUNT> __device__ void generate_rows(const Task &task) {
    const Layer &l = *task.layer;
    for (int64_t n = static_cast<int64_t>(threadIdx.x) * COUNT; n < task.count; n += THREADS * COUNT) {
        Some<COUNT> v = {};
        const Some<COUNT> c2 = at<COUNT>(l.parameters + l.H * l.N + task.row + n);
#pragma unroll
        for (int k = 0; k < COUNT; k++) v.value[k] += c2.value[k];
        for (int64_t j = 0; j < l.H; j++) {
            const float h = l.h[j];
            if (h == 0) continue;
            const Some<COUNT> column = at<COUNT>(l.parameters + j * l.N + task.row + n);
#pragma unroll
            for (int k = 0; k < COUNT; k++) v.value[k] += h * column.value[k];
        }
        write_factor<COUNT>(task, n, v);
    }
}

__global__ void __launch_bounds__(THREADS) generate_kernel(Table t) {
    const Task task = task_at(t, blockIdx.x);
    if (is_aligned(task))
        generate_rows<4>(task);
    else
        generate_rows<1>(task);
}

/* After the rows: which columns have moments now, and what the still ones owe. */
__global__ void __launch_bounds__(THREADS) settle_kernel(Table t) {
    if (t.refused()) {
        if (blockIdx.x == 0 && threadIdx.x == 0) t.verdict->refused++;
        return;
    }
    const Layer &l = t.layers[blockIdx.x];
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) {
        if (l.h[j] != 0) l.moving[j] = 1;
        if (l.moving[j]) continue;
        for (int64_t f = 0; f < l.n_factors; f++) {
            double &decay = l.decay[f * l.H + j];
            decay = l.h_next[j] != 0 ? 1 : decay * l.of_factors[f].outer.keep;
        }
    }
    if (threadIdx.x == 0) l.adamw->step++;
}

/* ---- the plan, on the host ---- */

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

/* What measurements and steps begin with. */
cudaError_t first_passes(const oplora_cuda_plan *plan, const Table &t, int measured, const int *veto,
                         cudaStream_t stream) {
    const unsigned layers = count_of(plan->n_layers), tasks = count_of(plan->n_parts);
    const unsigned squares = count_of((plan->n_parts + UNITS - 1) / UNITS);
    CUDA_FORWARD(begin_verdict(plan, veto, stream));
    if (!measured) CUDA_FORWARD(cuda_launch(squares_kernel, squares, THREADS, 0, stream, t));
    CUDA_FORWARD(cuda_launch(collect_kernel, layers, 32, 0, stream, t, measured));
    if (measured) return cudaSuccess;
    CUDA_FORWARD(cuda_launch(hidden_kernel, layers, THREADS, 0, stream, t));
    return cuda_launch(reduce_kernel, tasks, THREADS, 0, stream, t);
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

int oplora_cuda_exact_measure(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, 0, nullptr, on));
    return cuda_launch(report_kernel, count_of(plan->n_layers), THREADS, 0, on, t, 0, 0);
}

int oplora_cuda_exact_step(const oplora_cuda_plan *plan, const void *table, int measured, const int *veto,
                           void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    const unsigned layers = count_of(plan->n_layers);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, measured, veto, on));
    CUDA_FORWARD(cuda_launch(report_kernel, layers, THREADS, 0, on, t, 1, measured));
    CUDA_FORWARD(cuda_launch(update_kernel, count_of(plan->n_parts), THREADS, 0, on, t));
    return cuda_launch(settle_kernel, layers, THREADS, 0, on, t);
}

int oplora_cuda_exact_generate(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(begin_verdict(plan, nullptr, on));
    CUDA_FORWARD(cuda_launch(hidden_kernel, count_of(plan->n_layers), THREADS, 0, on, t));
    return cuda_launch(generate_kernel, count_of(plan->n_parts), THREADS, 0, on, t);
}
