/* generate and generate_backward on a GPU. The formulas are in csrc/core/generate.c and generate_backward.c; sums run
 * in the core's lanes (64 bytes of numbers), blocks and chunks, and nothing is fused, so that the bits are the core's.
 *
 * All passes over W2 are memory-bound: it is read once, columns of units that are off not at all. */
#include "generate.h"

#include "../core/hidden.h"
#include "hidden.cuh"

#include <initializer_list>

namespace {

constexpr int THREADS = 256;
constexpr int64_t CHUNK = BACKWARD_CHUNK, BLOCK = COLUMN_BLOCK; /* of W2's columns */
constexpr int BLOCKS = CHUNK / BLOCK;
constexpr int ROW_CHUNK = 256, ROW_WIDTH = 32, ROW_LANES = 8; /* of a row-major W2 */

template <class T> __host__ __device__ constexpr int lanes_of() { return 64 / static_cast<int>(sizeof(T)); }

unsigned blocks_for(int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); }

template <class T>
__global__ void __launch_bounds__(THREADS) hidden_kernel(const T *__restrict__ z, const T *__restrict__ W1,
                                                         const T *__restrict__ c1, int64_t H, int64_t Z, T *h) {
    SHARED_ARRAY(double, lanes, THREADS);
    find_units<THREADS>(z, W1, c1, H, Z, static_cast<int64_t>(blockIdx.x) * (THREADS / HIDDEN_LANES), lanes, h);
}

/* v = W2 h + c2 for W2 as columns: COUNT neighbouring entries a thread, added in the order of columns. */
template <class T, int COUNT> struct alignas(COUNT * sizeof(T)) Some {
    T value[COUNT];
};
template <class T, int COUNT>
__global__ void __launch_bounds__(THREADS)
    columns_kernel(const T *__restrict__ W2, const T *__restrict__ c2, const T *__restrict__ h, int64_t H, int64_t N,
                   T *__restrict__ v) {
    const int64_t n = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * COUNT;
    if (n >= N) return;
    auto sum = *reinterpret_cast<const Some<T, COUNT> *>(c2 + n);
    for (int64_t j = 0; j < H; j++) {
        const T weight = h[j];
        if (weight == 0) continue;
        const auto column = *reinterpret_cast<const Some<T, COUNT> *>(W2 + j * N + n);
#pragma unroll
        for (int k = 0; k < COUNT; k++) sum.value[k] += weight * column.value[k];
    }
    *reinterpret_cast<Some<T, COUNT> *>(v + n) = sum;
}

/* The same for a row-major W2: a dot product in lanes_of<T>() lanes a row. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    rows_kernel(const T *__restrict__ W2, const T *__restrict__ c2, const T *__restrict__ h, int64_t H, int64_t N,
                T *__restrict__ v) {
    constexpr int LANES = lanes_of<T>();
    SHARED_ARRAY(T, lanes, THREADS);
    const int t = static_cast<int>(threadIdx.x), l = t % LANES;
    const int64_t n = static_cast<int64_t>(blockIdx.x) * (THREADS / LANES) + t / LANES;
    T sum = 0;
    for (int64_t j = l; j < H && n < N; j += LANES) sum += W2[n * H + j] * h[j];
    lanes[t] = sum;
    __syncthreads();
    if (l != 0 || n >= N) return;
    double total = 0;
    for (int k = 0; k < LANES; k++) total += lanes[t + k];
    v[n] = static_cast<T>(total) + c2[n];
}

/* partial[chunk, j] = W2_j . g over a chunk, for units that are on: a tile of LANES columns of one chunk a block, and a
 * group of LANES threads a block of rows. */
template <class T>
__global__ void __launch_bounds__(BLOCKS *lanes_of<T>())
    reduce_columns_kernel(const T *__restrict__ W2, const T *__restrict__ g, const T *__restrict__ h, int64_t H,
                          int64_t N, int64_t tiles, double *partial) {
    constexpr int LANES = lanes_of<T>();
    SHARED_ARRAY(T, lanes, BLOCKS * LANES * (LANES + 1));
    SHARED_ARRAY(double, sums, BLOCKS *LANES);
    const int t = static_cast<int>(threadIdx.x), l = t % LANES, block = t / LANES;
    const int64_t chunk = blockIdx.x / tiles, base = blockIdx.x % tiles * LANES;
    const int64_t begin = chunk * CHUNK + block * BLOCK, end = begin + BLOCK < N ? begin + BLOCK : N;
    const int count = H - base < LANES ? static_cast<int>(H - base) : LANES;
    for (int c = 0; c < count; c++) {
        T sum = 0;
        if (h[base + c] != 0) {
            const T *const column = W2 + (base + c) * N;
#pragma unroll 4
            for (int64_t n = begin + l; n < end; n += LANES) sum += column[n] * g[n];
        }
        lanes[(block * LANES + c) * (LANES + 1) + l] = sum;
    }
    __syncthreads();
    if (l < count) {
        double sum = 0;
        for (int k = 0; k < LANES; k++) sum += lanes[(block * LANES + l) * (LANES + 1) + k];
        sums[block * LANES + l] = sum;
    }
    __syncthreads();
    if (block != 0 || l >= count) return;
    double total = 0;
    for (int k = 0; k < BLOCKS && chunk * CHUNK + k * BLOCK < N; k++) total += sums[k * LANES + l];
    partial[chunk * H + base + l] = total;
}

/* The same for a row-major W2, in double: ROW_WIDTH columns of ROW_CHUNK rows a block. */
template <class T>
__global__ void __launch_bounds__(ROW_WIDTH *ROW_LANES)
    reduce_rows_kernel(const T *__restrict__ W2, const T *__restrict__ g, int64_t H, int64_t N, int64_t tiles,
                       double *partial) {
    SHARED_ARRAY(double, lanes, ROW_WIDTH *ROW_LANES);
    const int t = static_cast<int>(threadIdx.x), l = t / ROW_WIDTH;
    const int64_t chunk = blockIdx.x / tiles, j = blockIdx.x % tiles * ROW_WIDTH + t % ROW_WIDTH;
    const int64_t begin = chunk * ROW_CHUNK, end = begin + ROW_CHUNK < N ? begin + ROW_CHUNK : N;
    double sum = 0;
    for (int64_t n = begin + l; n < end && j < H; n += ROW_LANES) sum += static_cast<double>(g[n]) * W2[n * H + j];
    lanes[t] = sum;
    __syncthreads();
    if (l != 0 || j >= H) return;
    sum = 0;
    for (int k = 0; k < ROW_LANES; k++) sum += lanes[k * ROW_WIDTH + t];
    partial[chunk * H + j] = sum;
}

/* d = dh where the unit is on, dc1 = d, dW1 = d z^T: a unit a block. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    units_kernel(const double *partial, int64_t chunks, const T *__restrict__ z, const T *__restrict__ h, int64_t H,
                 int64_t Z, double *d, T *dW1, T *dc1) {
    SHARED_ARRAY(double, shared, 1);
    const int64_t j = blockIdx.x;
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int64_t chunk = 0; h[j] > 0 && chunk < chunks; chunk++) sum += partial[chunk * H + j];
        d[j] = shared[0] = sum;
        dc1[j] = static_cast<T>(sum);
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < Z; i += THREADS) dW1[j * Z + i] = static_cast<T>(shared[0] * z[i]);
}

/* dz = W1^T d, in double and in the order of units. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    latent_kernel(const double *__restrict__ d, const T *__restrict__ W1, int64_t H, int64_t Z, T *dz) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= Z) return;
    double sum = 0;
    for (int64_t j = 0; j < H; j++)
        if (d[j] != 0) sum += d[j] * W1[j * Z + i];
    dz[i] = static_cast<T>(sum);
}

template <class T>
cudaError_t find_hidden(const T *z, const T *W1, const T *c1, int64_t H, int64_t Z, T *h, cudaStream_t stream) {
    return cuda_launch(hidden_kernel<T>, blocks_for(H, THREADS / HIDDEN_LANES), THREADS, 0, stream, z, W1, c1, H, Z, h);
}

/* Whether every column's entries can be read COUNT at a time. */
template <class T, int COUNT> bool aligned(std::initializer_list<const T *> pointers, int64_t N) {
    bool good = N % COUNT == 0;
    for (const T *p : pointers) good = good && reinterpret_cast<uintptr_t>(p) % (COUNT * sizeof(T)) == 0;
    return good;
}

template <class T>
cudaError_t generate(const T *z, const T *W1, const T *c1, const T *W2, const T *c2, oplora_layout layout, int64_t H,
                     int64_t Z, int64_t N, T *h, T *v, cudaStream_t stream) {
    constexpr int COUNT = 16 / sizeof(T), LANES = lanes_of<T>();
    if (oplora_size(H, Z, N) < 0) return cudaErrorInvalidValue;
    CUDA_FORWARD(find_hidden(z, W1, c1, H, Z, h, stream));
    if (layout == OPLORA_ROWS)
        return cuda_launch(rows_kernel<T>, blocks_for(N, THREADS / LANES), THREADS, 0, stream, W2, c2, h, H, N, v);
    if (aligned<T, COUNT>({W2, c2, v}, N))
        return cuda_launch(columns_kernel<T, COUNT>, blocks_for(N, THREADS * COUNT), THREADS, 0, stream, W2, c2, h, H,
                           N, v);
    return cuda_launch(columns_kernel<T, 1>, blocks_for(N, THREADS), THREADS, 0, stream, W2, c2, h, H, N, v);
}

int64_t chunks_of(oplora_layout layout, int64_t N) {
    const int64_t chunk = layout == OPLORA_ROWS ? ROW_CHUNK : CHUNK;
    return (N + chunk - 1) / chunk;
}

/* workspace: partial (chunks, H), then d (H) */
template <class T>
cudaError_t generate_backward(const T *g, const T *z, const T *W1, const T *c1, const T *W2, oplora_layout layout,
                              int64_t H, int64_t Z, int64_t N, T *dz, T *dW1, T *dc1, T *h, double *workspace,
                              cudaStream_t stream) {
    constexpr int LANES = lanes_of<T>();
    const int64_t chunks = chunks_of(layout, N), width = layout == OPLORA_ROWS ? ROW_WIDTH : LANES;
    const int64_t tiles = (H + width - 1) / width;
    double *const d = workspace + chunks * H;
    if (oplora_size(H, Z, N) < 0 || H > INT32_MAX || chunks > INT32_MAX / tiles) return cudaErrorInvalidValue;
    CUDA_FORWARD(find_hidden(z, W1, c1, H, Z, h, stream));
    if (layout == OPLORA_ROWS)
        CUDA_FORWARD(cuda_launch(reduce_rows_kernel<T>, blocks_for(chunks * tiles, 1), ROW_WIDTH * ROW_LANES, 0, stream,
                                 W2, g, H, N, tiles, workspace));
    else
        CUDA_FORWARD(cuda_launch(reduce_columns_kernel<T>, blocks_for(chunks * tiles, 1), BLOCKS * LANES, 0, stream, W2,
                                 g, h, H, N, tiles, workspace));
    CUDA_FORWARD(
        cuda_launch(units_kernel<T>, blocks_for(H, 1), THREADS, 0, stream, workspace, chunks, z, h, H, Z, d, dW1, dc1));
    return cuda_launch(latent_kernel<T>, blocks_for(Z, THREADS), THREADS, 0, stream, d, W1, H, Z, dz);
}

} // namespace

int64_t oplora_cuda_generate_backward_workspace_bytes(oplora_layout layout, int64_t H, int64_t Z, int64_t N) {
    if (oplora_size(H, Z, N) < 0 || H > INT32_MAX) return -1;
    return (chunks_of(layout, N) + 1) * H * static_cast<int64_t>(sizeof(double));
}

#define ENTRY_POINTS(T, suffix) \
    int oplora_cuda_generate_##suffix(const T *z, const T *W1, const T *c1, const T *W2, const T *c2, \
                                      oplora_layout layout, int64_t H, int64_t Z, int64_t N, T *h, T *v, \
                                      void *stream) { \
        return generate(z, W1, c1, W2, c2, layout, H, Z, N, h, v, static_cast<cudaStream_t>(stream)); \
    } \
    int oplora_cuda_generate_backward_##suffix(const T *g, const T *z, const T *W1, const T *c1, const T *W2, \
                                               oplora_layout layout, int64_t H, int64_t Z, int64_t N, T *dz, T *dW1, \
                                               T *dc1, T *h, void *workspace, void *stream) { \
        return generate_backward(g, z, W1, c1, W2, layout, H, Z, N, dz, dW1, dc1, h, static_cast<double *>(workspace), \
                                 static_cast<cudaStream_t>(stream)); \
    }
ENTRY_POINTS(float, f32)
ENTRY_POINTS(double, f64)
#undef ENTRY_POINTS
