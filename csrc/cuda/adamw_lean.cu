/* adamw_lean on a GPU. The formulas, and what the tensors mean, are in csrc/core/adamw_lean.c, whose bits these kernels
 * give wherever the GPU's square roots, divisions and pow do: no multiplication is fused with an addition, and every sum
 * runs in the core's lanes, blocks and parts.
 *
 *     squares   ||g||^2 and non-finite entries, per chunk      reads 4 bytes a row
 *     collect   their sums, a layer a block; the verdict
 *     begin     the averages that no single row is needed for, a layer a block
 *     reduce    the basis' Gram matrix, U^T g and W0^T g, a part a block: reads 16 bytes a row (d = 2, k = 1)
 *     solve     the hidden path and the truncations, a layer a block
 *     update    A, U, moments and the factors: reads 24 and writes 20 bytes a row */
#include "adamw_lean.h"

#include "lean_hidden.cuh"

using namespace lean;

namespace {

/* ---- squares, collect, begin ---- */

/* SQUARE_CHUNKS chunks a block. */
__global__ void __launch_bounds__(SQUARE_LANES *SQUARE_CHUNKS) squares_kernel(Table t) {
    SHARED_ARRAY(double, lanes, SQUARE_LANES *SQUARE_CHUNKS);
    SHARED_ARRAY(int, bad, SQUARE_LANES *SQUARE_CHUNKS);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * SQUARE_CHUNKS + threadIdx.x / SQUARE_LANES;
    Gradient g = {};
    double *to = nullptr;
    int64_t n = 0;
    if (index < t.n_chunks) {
        const Layer &l = t.layers[t.factor_of(index).layer];
        const Chunk chunk = chunk_at(t, l, index);
        g = gradient_of(*chunk.factor, chunk.entry);
        to = l.squares + 2 * (index - l.first_chunk);
        n = chunk.rows;
    }
    find_squares(g, n, to, lanes, bad);
}

/* A layer's sums, chunks within a part and then parts in order. With `measured` they are in the report already. */
__global__ void __launch_bounds__(COLLECT_THREADS) collect_kernel(Table t, int measured) {
    SHARED_ARRAY(double, sums, LEAN_MOST_PARTS);
    SHARED_ARRAY(double, bad, LEAN_MOST_PARTS);
    const Layer &l = t.layers[blockIdx.x];
    const Part *const parts = t.parts + l.first_part;
    for (int part = static_cast<int>(threadIdx.x); !measured && part < l.parts; part += COLLECT_THREADS) {
        double sum = 0, count = 0;
        for (int64_t c = parts[part].chunk - l.first_chunk; c < parts[part + 1].chunk - l.first_chunk; c++) {
            sum += l.squares[2 * c];
            count += l.squares[2 * c + 1];
        }
        sums[part] = sum;
        bad[part] = count;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (!measured) {
        double sum = 0, count = 0;
        for (int i = 0; i < l.parts; i++) {
            sum += sums[i];
            count += bad[i];
        }
        l.report[0] = sum;
        l.report[1] = count;
    }
    if (l.report[1] != 0) atomicOr(&t.verdict->nonfinite, 1);
    /* here, as a kernel with few registers: pow is a call */
    const double step = static_cast<double>(l.adamw->step + 1);
    l.corrections[0] = 1 - pow(l.adamw->beta1, step);
    l.corrections[1] = 1 - pow(l.adamw->beta2, step);
}

__global__ void __launch_bounds__(THREADS, 1) begin_kernel(Table t, int wants) {
    SHARED_ARRAY(double, number, 4);
    SHARED_ARRAY(double, room, SUM_ROOM<2>);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    find_hidden(l, l.h);
    if (!(wants & LEAN_WANTS_GRAM)) return;
    if (threadIdx.x == 0) find_rates(t, l);
    prepare_map(l.outer, l.h, l.report[0], *l.adamw, oplora_rounding_key(l.seed, l.layer, l.adamw->step + 1, 0),
                l.corrections, number, room);
}

/* ---- reduce ---- */

template <bool DEFAULTS> __global__ void __launch_bounds__(THREADS, 4) reduce_kernel(Table t, int wants) {
    SHARED_ARRAY(Tile, tile, 1);
    if (t.refused()) return;
    const Part part = t.parts[blockIdx.x];
    const int32_t end = t.parts[blockIdx.x + 1].chunk;
    const Layer &l = t.layers[part.layer];
    const Rows &r = l.outer.rows;
    double *const sums = l.part_sums + (blockIdx.x - l.first_part) * part_size(l);
    for (int64_t i = threadIdx.x; i < part_size(l); i += THREADS) sums[i] = 0;
    __syncthreads();
    for (int32_t c = part.chunk; c < end; c++) {
        const Chunk chunk = chunk_at(t, l, c);
        const Gradient g = gradient_of(*chunk.factor, chunk.entry);
        if (wants & LEAN_WANTS_GRAM) reduce_chunk<DEFAULTS>(r, *chunk.share, g, chunk.row, chunk.rows, tile[0], sums);
        if (wants == LEAN_WANTS_DH) reduce_along(r, *chunk.share, g, chunk.row, chunk.rows, tile[0], sums);
        if (wants & LEAN_WANTS_DH && chunk.factor->random)
            random_reduce(l, chunk, tile[0], sums + oplora_lean_sums(r.d, r.k));
    }
}

/* ---- solve ---- */

/* A measurement ends here, with dh and the hidden path's norm. */
__global__ void __launch_bounds__(THREADS) finish_measure_kernel(Table t) {
    SHARED_ARRAY(Small, small, 1);
    if (t.refused()) return;
    const Layer &l = t.layers[blockIdx.x];
    add_parts(l);
    find_dh(l);
    report_hidden(l, small[0]);
}

template <bool DEFAULTS> __global__ void __launch_bounds__(THREADS, 1) solve_kernel(Table t, int wants) {
    SHARED_ARRAY(Small, small, 1);
    SHARED_ARRAY(Tile, tile, 1);
    if (t.refused()) {
        if (blockIdx.x == 0 && threadIdx.x == 0) t.verdict->refused++;
        return;
    }
    const Layer &l = t.layers[blockIdx.x];
    add_parts(l);
    if (wants & LEAN_WANTS_DH) find_dh(l);
    begin_hidden<DEFAULTS>(l, small[0], tile[0]);
#pragma unroll 1
    for (int which = 0; which < 2; which++) { /* the hidden map, then W2's, which needs the next h */
        const Map &map = which ? l.outer : l.hidden;
        double dropped[2];
        solve_map(map, which ? l.h : l.z, small[0], dropped);
        if (threadIdx.x == 0) {
            l.report[which ? 5 : 7] = dropped[0];
            l.report[which ? 6 : 8] = dropped[1];
        }
        if (!which) step_latent(l);
        finish_map(map, which ? l.h : l.z, which ? l.h_next : l.z_next, small[0]);
        if (!which) finish_hidden<DEFAULTS>(l, tile[0]);
    }
    finish_outer(l);
    if (threadIdx.x == 0) l.adamw->step++;
}

/* ---- update ---- */

template <bool DEFAULTS> __global__ void __launch_bounds__(THREADS, 3) update_kernel(Table t) {
    if (t.refused()) return;
    const Part part = t.parts[blockIdx.x];
    const int32_t end = t.parts[blockIdx.x + 1].chunk;
    const Layer &l = t.layers[part.layer];
    for (int32_t c = part.chunk; c < end; c++) {
        const Chunk chunk = chunk_at(t, l, c);
        const Factor &f = *chunk.factor;
        const oplora_stream s = w2_stream(l, chunk.range);
        update_chunk<DEFAULTS>(l.outer.rows, *chunk.share, gradient_of(f, chunk.entry), output_of(f, chunk.entry),
                               chunk.row, chunk.rows, l, &s, chunk.entry, f.random ? l.change : nullptr);
    }
}

/* ---- the start ---- */

/* z, W1 z, and h times W0's bound into l.change. */
__global__ void __launch_bounds__(THREADS) start_kernel(Table t, double latent_std) {
    SHARED_ARRAY(Tile, tile, 1);
    const Layer &l = t.layers[blockIdx.x];
    for (int64_t i = threadIdx.x; i < l.Z; i += THREADS)
        l.z[i] = static_cast<float>(oplora_latent_entry(l.seed, l.layer, i, latent_std));
    __syncthreads();
    for_w1_dots(l, l.z, tile[0], [&](int64_t j, double sum) {
        l.pre[j] = static_cast<float>(l.w1_bound * sum);
        l.change[j] = l.pre[j] > 0 ? static_cast<float>(l.bound * l.pre[j]) : 0;
    });
    if (threadIdx.x != 0) return;
    *l.outer.scale = *l.hidden.scale = 1;
    *l.outer.mean = *l.hidden.mean = 0;
}

__global__ void __launch_bounds__(THREADS, 1) start_rows_kernel(Table t) {
    const Part part = t.parts[blockIdx.x];
    const int32_t end = t.parts[blockIdx.x + 1].chunk;
    const Layer &l = t.layers[part.layer];
    for (int32_t c = part.chunk; c < end; c++) {
        const Chunk chunk = chunk_at(t, l, c);
        const oplora_stream s = w2_stream(l, chunk.range);
        const Output o = output_of(*chunk.factor, chunk.entry);
        for (int sub = 0; sub < BLOCK / SUB; sub++) {
            float value[ROWS] = {};
            const int64_t begin = group() * BLOCK + sub * SUB;
            if (begin >= chunk.rows) break;
            if (chunk.factor->random) random_update(l, s, l.change, static_cast<uint64_t>(chunk.entry + begin), value);
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const int64_t at = begin + i * LANES + lane();
                if (at < chunk.rows) put(o, at, value[i]);
            }
        }
    }
}

/* ---- launches ---- */

/* What measurements and steps begin with. */
cudaError_t first_passes(const oplora_cuda_plan *plan, const Table &t, int measured, const int *veto, int wants,
                         cudaStream_t stream) {
    const unsigned layers = grid_of(plan->n_layers), parts = grid_of(plan->n_parts);
    const unsigned squares = grid_of((plan->n_chunks + SQUARE_CHUNKS - 1) / SQUARE_CHUNKS);
    CUDA_FORWARD(begin_verdict(plan, veto, stream));
    if (!measured) CUDA_FORWARD(cuda_launch(squares_kernel, squares, SQUARE_LANES * SQUARE_CHUNKS, 0, stream, t));
    CUDA_FORWARD(cuda_launch(collect_kernel, layers, COLLECT_THREADS, 0, stream, t, measured));
    CUDA_FORWARD(cuda_launch(begin_kernel, layers, THREADS, 0, stream, t, wants));
    return cuda_launch(plan->only_defaults ? reduce_kernel<true> : reduce_kernel<false>, parts, THREADS, 0, stream, t,
                       wants);
}

} // namespace

int oplora_cuda_lean_start(const oplora_cuda_plan *plan, const void *table, double latent_std, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(cuda_launch(start_kernel, grid_of(plan->n_layers), THREADS, 0, on, t, latent_std));
    return cuda_launch(start_rows_kernel, grid_of(plan->n_parts), THREADS, 0, on, t);
}

int oplora_cuda_lean_measure(const oplora_cuda_plan *plan, const void *table, void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, 0, nullptr, LEAN_WANTS_DH, on));
    return cuda_launch(finish_measure_kernel, grid_of(plan->n_layers), THREADS, 0, on, t);
}

int oplora_cuda_lean_step(const oplora_cuda_plan *plan, const void *table, int measured, const int *veto,
                          void *stream) {
    const Table t = model_of<Layer>(plan, table);
    const auto on = static_cast<cudaStream_t>(stream);
    const int wants = measured ? LEAN_WANTS_GRAM : LEAN_WANTS_GRAM | LEAN_WANTS_DH;
    if (plan->n_layers == 0) return cudaSuccess;
    CUDA_FORWARD(first_passes(plan, t, measured, veto, wants, on));
    CUDA_FORWARD(cuda_launch(plan->only_defaults ? solve_kernel<true> : solve_kernel<false>, grid_of(plan->n_layers),
                             THREADS, 0, on, t, wants));
    return cuda_launch(plan->only_defaults ? update_kernel<true> : update_kernel<false>, grid_of(plan->n_parts),
                       THREADS, 0, on, t);
}
