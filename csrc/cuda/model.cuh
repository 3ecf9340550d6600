/* model: what the steps of all states share on the device: the table of a model's layers, its factors in whatever
 * precision the model keeps them, and the verdict on its gradients. */
#ifndef OPLORA_MODEL_CUH
#define OPLORA_MODEL_CUH

#include "../core/workspace.h"
#include "../shared/rows.h"
#include "device.h"
#include "plan.h"

#include <string.h>

/* One factor tensor. g is of `dtype`; where that is no OPLORA_F32, `rounded` takes the factor. */
struct Factor {
    int64_t rows;
    const void *g;
    const float *base;
    float *out;
    uint16_t *rounded;
    oplora_dtype dtype;
    int random, listens;
    int32_t layer, index, range;    /* its layer, its place there, how many random ones are before it there */
    int64_t first_row, first_chunk; /* of its rows in the layer, of its chunks in the model */
};

/* What every state's Layer begins with. A chunk is rows of one factor, a part chunks of one layer that follow each other: what
 * a block of threads takes. Both are counted over all layers. */
struct PlannedLayer {
    oplora_adamw *adamw;
    const double *rates; /* (factors, 2) */
    int64_t first_factor, n_factors, first_part, parts, first_chunk, chunks;
};

/* Where a part of a model begins; behind the last is one more. */
struct Part {
    int32_t layer, chunk;
};

/* The table as kernels see it. Layer is the state's own. */
template <class Layer> struct Model {
    const Layer *layers;
    const Factor *factors;
    const int32_t *chunk_factor; /* of every chunk; what is asked first takes one load */
    const Part *parts;
    int64_t n_layers, n_chunks;
    oplora_cuda_verdict *verdict;

    __device__ bool refused() const { return verdict->nonfinite != 0; }
    __device__ const Factor &factor_of(int64_t chunk) const { return factors[chunk_factor[chunk]]; }
};

/* ---- bfloat16 and float16: gradients are cast up, factors rounded to nearest even ---- */

static __device__ __forceinline__ float from_half(uint16_t bits, oplora_dtype dtype) {
    return dtype == OPLORA_BF16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16)
                                : __half2float(__ushort_as_half(bits));
}
static __device__ __forceinline__ uint16_t to_half(float x, oplora_dtype dtype) {
    return dtype == OPLORA_BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

/* A gradient, or a piece of it. */
struct Gradient {
    const void *at;
    oplora_dtype dtype;

    /* As steps take it. */
    __device__ float operator[](int64_t i) const {
        if (dtype == OPLORA_F32) return oplora_bounded_f32(static_cast<const float *>(at)[i]);
        return oplora_bounded_f32(from_half(static_cast<const uint16_t *>(at)[i], dtype));
    }

    template <int COUNT>
    __device__ void load_bounded(int64_t first, int64_t stride, int64_t n, float (&x)[COUNT]) const {
        load(first, stride, n, x);
#pragma unroll
        for (int k = 0; k < COUNT; k++) x[k] = oplora_bounded_f32(x[k]);
    }

    /* As it is: x[k] = entry first + k stride, 0 from n on; the loads are under way together */
    template <int COUNT> __device__ void load(int64_t first, int64_t stride, int64_t n, float (&x)[COUNT]) const {
        if (dtype == OPLORA_F32) {
#pragma unroll
            for (int k = 0; k < COUNT; k++)
                x[k] = first + k * stride < n ? static_cast<const float *>(at)[first + k * stride] : 0.f;
            return;
        }
        uint16_t bits[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            bits[k] = first + k * stride < n ? static_cast<const uint16_t *>(at)[first + k * stride] : uint16_t{0};
#pragma unroll
        for (int k = 0; k < COUNT; k++) x[k] = from_half(bits[k], dtype);
    }
};
static __device__ __forceinline__ Gradient gradient_of(const Factor &f, int64_t entry) {
    const int64_t bytes = entry * (f.dtype == OPLORA_F32 ? 4 : 2);
    return {static_cast<const char *>(f.g) + bytes, f.dtype};
}

/* ---- ||g||^2 ---- */

constexpr int SQUARE_LANES = 8; /* of dot_double */

/* to[0], to[1] = ||g||^2 in the core's eight lanes, and how many of the n entries are not finite. SQUARE_LANES threads a
 * gradient; all threads of a block call it, those without a gradient with to = NULL. lanes, bad: as many as threads. */
static __device__ __forceinline__ void find_squares(const Gradient &g, int64_t n, double *to, double *lanes, int *bad) {
    const int t = static_cast<int>(threadIdx.x), l = t % SQUARE_LANES;
    double sum = 0;
    int count = 0;
    constexpr int BATCH = 8;
    for (int64_t i = l; to && i < n; i += BATCH * SQUARE_LANES) {
        float x[BATCH];
        g.load(i, SQUARE_LANES, n, x);
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            sum += static_cast<double>(x[k]) * x[k];
            count += !(x[k] <= 0x1.fffffep127f && x[k] >= -0x1.fffffep127f);
        }
    }
    lanes[t] = sum;
    bad[t] = count;
    __syncthreads();
    if (l != 0 || !to) return;
    sum = 0;
    count = 0;
    for (int k = 0; k < SQUARE_LANES; k++) {
        sum += lanes[t + k];
        count += bad[t + k];
    }
    to[0] = sum;
    to[1] = count;
}

/* ---- sums in order ---- */

constexpr int SUM_SPAN = 64; /* terms of a sum at a time */
template <int COUNT> constexpr int SUM_ROOM = COUNT * (SUM_SPAN + 1);

/* out(i, the sum of term(i, j) over j < n), for i < count: added in the order of j, as the core's plain loops, by one thread
 * a sum; all threads of the block make the terms, as reading them takes longest. room: SUM_ROOM<count> numbers, free again
 * afterwards, when out has been called. */
template <int THREADS, class Term, class Out>
__device__ void sum_in_order(double *room, int count, int64_t n, const Term &term, const Out &out) {
    const int t = static_cast<int>(threadIdx.x);
    double sum = 0;
    for (int64_t first = 0; first < n; first += SUM_SPAN) {
        const int span = n - first < SUM_SPAN ? static_cast<int>(n - first) : SUM_SPAN;
        for (int e = t; e < count * SUM_SPAN; e += THREADS)
            if (e % SUM_SPAN < span)
                room[e / SUM_SPAN * (SUM_SPAN + 1) + e % SUM_SPAN] = term(e / SUM_SPAN, first + e % SUM_SPAN);
        __syncthreads();
        if (t < count)
            for (int k = 0; k < span; k++) sum += room[t * (SUM_SPAN + 1) + k];
        __syncthreads();
    }
    if (t < count) out(t, sum);
    __syncthreads();
}

/* ---- the plan, on the host ----
 *
 * What a State has of its own:
 *     Core, Layer                                   a layer as the core knows it, and as kernels see it
 *     bool fits(const Core *layers, int64_t n)      whether all sizes are in range
 *     bool is_whole(const Core &)                   whether no address is missing
 *     int64_t chunks_in(int64_t rows)               how a factor is cut,
 *     int64_t parts_of(const Core &, int64_t chunks)   and a layer
 *     Layer lay_out(const Core &, arena *)          what the core's layer tells; its scratch from the arena */

/* Where in the table what lies; with memory NULL it only counts. */
template <class Layer> struct Sections {
    arena memory;
    int64_t n_parts = 0, n_chunks = 0;
    Layer *layers;
    Factor *factors;
    int32_t *chunk_factor;
    Part *parts;

    template <class State>
    Sections(const State &state, const typename State::Core *from, int64_t n_layers, void *table) {
        int64_t n_factors = 0;
        for (int64_t i = 0; i < n_layers; i++) {
            int64_t chunks = 0;
            for (int64_t f = 0; f < from[i].n_factors; f++) chunks += state.chunks_in(from[i].factors[f].rows);
            n_factors += from[i].n_factors;
            n_chunks += chunks;
            n_parts += state.parts_of(from[i], chunks);
        }
        memory = {static_cast<char *>(table), 0};
        layers = static_cast<Layer *>(take(&memory, n_layers, sizeof(Layer)));
        factors = static_cast<Factor *>(take(&memory, n_factors, sizeof(Factor)));
        chunk_factor = static_cast<int32_t *>(take(&memory, n_chunks, sizeof(int32_t)));
        parts = static_cast<Part *>(take(&memory, n_parts + 1, sizeof(Part)));
    }

    int64_t offset(const void *piece) const { return static_cast<const char *>(piece) - memory.memory; }
};

/* Fills in layer `index`, of which the state has told its own: its head, its factors, chunks and parts. */
template <class State>
void plan_layer(const State &state, const typename State::Core &from, const oplora_cuda_half *halves, int32_t index,
                const Sections<typename State::Layer> &to, PlannedLayer *layer) {
    int64_t row = 0, chunk = layer->first_chunk;
    int32_t range = 0;
    for (int64_t i = 0; i < from.n_factors; i++) {
        const oplora_factor_f32 &f = from.factors[i];
        const int64_t at = layer->first_factor + i;
        Factor factor = {f.rows,     f.g,      f.base,    f.out, nullptr,
                         OPLORA_F32, f.random, f.listens, index, static_cast<int32_t>(i),
                         range,      row,      chunk};
        if (halves && (halves[at].dtype == OPLORA_BF16 || halves[at].dtype == OPLORA_F16)) {
            factor.g = halves[at].g;
            factor.rounded = halves[at].out;
            factor.dtype = halves[at].dtype;
        }
        to.factors[at] = factor;
        for (const int64_t end = chunk + state.chunks_in(f.rows); chunk < end; chunk++)
            to.chunk_factor[chunk] = static_cast<int32_t>(at);
        row += f.rows;
        range += f.random != 0;
    }
    layer->n_factors = from.n_factors;
    layer->chunks = chunk - layer->first_chunk;
    layer->parts = state.parts_of(from, layer->chunks);
    for (int64_t p = 0; p < layer->parts; p++)
        to.parts[layer->first_part + p] = {index,
                                           static_cast<int32_t>(layer->first_chunk + layer->chunks * p / layer->parts)};
}

template <class State> int64_t table_bytes(const State &state, const typename State::Core *layers, int64_t n_layers) {
    if (!state.fits(layers, n_layers)) return -1;
    return Sections<typename State::Layer>(state, layers, n_layers, nullptr).memory.used;
}

/* Lays every layer's scratch out, from the same walk that plans. */
template <class State>
int64_t workspace_bytes(const State &state, const typename State::Core *layers, int64_t n_layers) {
    if (!state.fits(layers, n_layers)) return -1;
    arena a = {nullptr, 0};
    for (int64_t i = 0; i < n_layers; i++) state.lay_out(layers[i], &a);
    return a.used;
}

template <class State>
oplora_status plan_layers(const State &state, const typename State::Core *layers, int64_t n_layers,
                          oplora_adamw *const *adamw, const double *const *rates, const oplora_cuda_half *halves,
                          oplora_cuda_verdict *verdict, void *workspace, void *table, oplora_cuda_plan *plan) {
    using Layer = typename State::Layer;
    if (!plan || (n_layers > 0 && (!layers || !adamw || !rates || !verdict || !workspace || !table)))
        return OPLORA_ENULL;
    for (int64_t i = 0; i < n_layers; i++)
        if (!state.is_whole(layers[i])) return OPLORA_ENULL;
    if (!state.fits(layers, n_layers)) return OPLORA_ESIZE;
    const Sections<Layer> to(state, layers, n_layers, table);
    if (to.n_parts > INT32_MAX || to.n_chunks > INT32_MAX) return OPLORA_EOVERFLOW;
    int64_t part = 0, chunk = 0, factor = 0;
    arena a = {static_cast<char *>(workspace), 0};
    for (int64_t i = 0; i < n_layers; i++) {
        Layer layer = state.lay_out(layers[i], &a);
        layer.adamw = adamw[i];
        layer.rates = rates[i];
        layer.first_factor = factor, layer.first_part = part, layer.first_chunk = chunk;
        plan_layer(state, layers[i], halves, static_cast<int32_t>(i), to, &layer);
        factor += layer.n_factors, part += layer.parts, chunk += layer.chunks;
        memcpy(&to.layers[i], &layer, sizeof layer);
    }
    to.parts[part] = {static_cast<int32_t>(n_layers), static_cast<int32_t>(chunk)};
    *plan = {n_layers, part, chunk, to.offset(to.factors), to.offset(to.chunk_factor), to.offset(to.parts), verdict, 0};
    return a.used < 0 ? OPLORA_EOVERFLOW : OPLORA_OK;
}

template <class Layer> Model<Layer> model_of(const oplora_cuda_plan *plan, const void *table) {
    const char *const at = static_cast<const char *>(table);
    return {reinterpret_cast<const Layer *>(at),
            reinterpret_cast<const Factor *>(at + plan->factors),
            reinterpret_cast<const int32_t *>(at + plan->chunk_factor),
            reinterpret_cast<const Part *>(at + plan->parts),
            plan->n_layers,
            plan->n_chunks,
            plan->verdict};
}

static inline unsigned grid_of(int64_t n) { return static_cast<unsigned>(n); }

/* The verdict of a step begins with what is known from elsewhere. */
static inline cudaError_t begin_verdict(const oplora_cuda_plan *plan, const int *veto, cudaStream_t stream) {
    int *const nonfinite = &plan->verdict->nonfinite;
    if (veto) return cudaMemcpyAsync(nonfinite, veto, sizeof *veto, cudaMemcpyDeviceToDevice, stream);
    return cudaMemsetAsync(nonfinite, 0, sizeof *nonfinite, stream);
}

#endif
