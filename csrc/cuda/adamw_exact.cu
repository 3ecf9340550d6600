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

#include "exact_hidden.cuh"
#include "exact_rows.cuh"

#include <math.h>

using namespace exact;

namespace {

/* ---- kernels ---- */

/* UNITS tasks a block. */
__global__ void __launch_bounds__(THREADS) squares_kernel(Table t) {
    SHARED_ARRAY(double, lanes, THREADS);
    SHARED_ARRAY(int, bad, THREADS);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * UNITS + threadIdx.x / SQUARE_LANES;
    Gradient g = {};
    double *to = nullptr;
    int64_t n = 0;
    if (index < t.n_chunks) {
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
            for (int64_t task = 0; task < l.parts; task++) sum += l.partial[task * (l.H + 2) + l.H + which];
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

__global__ void __launch_bounds__(THREADS, 1) report_kernel(Table t, int steps, int measured) {
    SHARED_ARRAY(double, lanes, REPORT_ROOM);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    if (!measured) report_hidden(l, lanes);
    __syncthreads();
    if (steps) step_hidden(l, measured, lanes);
}

__global__ void __launch_bounds__(THREADS, 8) update_kernel(Table t) {
    SHARED_ARRAY(Column, columns, COLUMNS);
    if (t.refused()) return;
    const Task task = task_at(t, blockIdx.x);
    if (is_aligned(task))
        update_rows<4>(task, columns);
    else
        update_rows<1>(task, columns);
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

/* ---- launches ---- */

/* What measurements and steps begin with. */
cudaError_t first_passes(const oplora_cuda_plan *plan, const Table &t, int measured, const int *veto,
                         cudaStream_t stream) {
    const unsigned layers = grid_of(plan->n_layers), tasks = grid_of(plan->n_parts);
    const unsigned squares = grid_of((plan->n_parts + UNITS - 1) / UNITS);
    CUDA_FORWARD(begin_verdict(plan, veto, stream));
    if (!measured) CUDA_FORWARD(cuda_launch(squares_kernel, squares, THREADS, 0, stream, t));
    CUDA_FORWARD(cuda_launch(collect_kernel, layers, 32, 0, stream, t, measured));
    if (measured) return cudaSuccess;
    CUDA_FORWARD(cuda_launch(hidden_kernel, layers, THREADS, 0, stream, t));
    return cuda_launch(reduce_kernel, tasks, THREADS, 0, stream, t);
}

} // namespace

int oplora_cuda_exact_measure(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, 0, nullptr, on));
    return cuda_launch(report_kernel, grid_of(plan->n_layers), THREADS, 0, on, t, 0, 0);
}

int oplora_cuda_exact_step(const oplora_cuda_plan *plan, const void *table, int measured, const int *veto,
                           void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    const unsigned layers = grid_of(plan->n_layers);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, measured, veto, on));
    CUDA_FORWARD(cuda_launch(report_kernel, layers, THREADS, 0, on, t, 1, measured));
    CUDA_FORWARD(cuda_launch(update_kernel, grid_of(plan->n_parts), THREADS, 0, on, t));
    return cuda_launch(settle_kernel, layers, THREADS, 0, on, t);
}

int oplora_cuda_exact_generate(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(begin_verdict(plan, nullptr, on));
    CUDA_FORWARD(cuda_launch(hidden_kernel, grid_of(plan->n_layers), THREADS, 0, on, t));
    return cuda_launch(generate_kernel, grid_of(plan->n_parts), THREADS, 0, on, t);
}
