// The part of CUDA that kernels use, for a plain C++17 compiler: csrc/cuda/device.h includes this where nvcc does not
// compile it. Every thread of a block is a fibre, so barriers and warp collectives really happen; blocks run one after
// another on the calling thread. See README.md.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>

// ---- qualifiers. __shared__ is left undefined on purpose: SHARED_ARRAY is what can be poisoned and checked ----
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// ---- vector types ----
struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define CUDA_ON_CPU_VECTOR(T, base) \
    struct alignas(2 * sizeof(base)) T##2 { base x, y; }; \
    struct alignas(4 * sizeof(base) > 16 ? 16 : 4 * sizeof(base)) T##4 { base x, y, z, w; }; \
    inline T##2 make_##T##2(base x, base y) { return {x, y}; } \
    inline T##4 make_##T##4(base x, base y, base z, base w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTOR(float, float)
CUDA_ON_CPU_VECTOR(double, double)
CUDA_ON_CPU_VECTOR(int, int)
CUDA_ON_CPU_VECTOR(uint, unsigned)
CUDA_ON_CPU_VECTOR(ushort, unsigned short)
#undef CUDA_ON_CPU_VECTOR

// ---- the part of the runtime API that launch code needs ----
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = 719
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
using cudaStream_t = struct CUstream_st *;
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
inline cudaError_t cudaGetDeviceCount(int *count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMalloc(void **out, size_t bytes) { // filled with NaNs; malloc's, so AddressSanitizer guards it
    *out = std::malloc(bytes);
    if (!*out) return cudaErrorMemoryAllocation;
    std::memset(*out, 0xff, bytes);
    return cudaSuccess;
}
template <typename T> cudaError_t cudaMalloc(T **out, size_t bytes) {
    return cudaMalloc(reinterpret_cast<void **>(out), bytes);
}
inline cudaError_t cudaFree(void *p) {
    std::free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind, cudaStream_t = nullptr) {
    std::memmove(to, from, n);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, n, kind);
}
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t = nullptr) {
    std::memset(p, value, n);
    return cudaSuccess;
}

// ---- what the kernels and cuda_on_cpu.cpp share ----
namespace cuda_on_cpu {

enum class Order { forward, reverse, random }; // in which order runnable threads, and blocks, are picked
struct Options {
    Order order = Order::forward;
    uint64_t seed = 1;
    size_t stack_bytes = 64 << 10;  // of each thread
    size_t shared_limit = 48 << 10; // of a block, static and dynamic; a GPU gives more only when asked to
    size_t max_reports = 8;         // races told per launch
};
extern Options options;
std::string take_report(); // what the last faulty launch did wrong; empties it

struct Builtins {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
};
extern Builtins self;

enum class WarpOp { sync, shuffle, vote };
cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const void *kernel, const std::function<void()> &body);
void *shared_array(const void *key, const char *name, size_t bytes);
void *dynamic_shared();
int block_barrier(bool predicate, const char *file, int line); // the number of threads whose predicate held
uint64_t warp_wait(WarpOp op, unsigned mask, uint64_t value, int source, const char *file, int line);
void note_atomic(const void *address, size_t bytes, const void *pc);
unsigned lane();

template <typename T> uint64_t pack(T v) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &v, sizeof v);
    return bits;
}
template <typename T> T unpack(uint64_t bits) {
    T v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

} // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::self.thread)
#define blockIdx (cuda_on_cpu::self.block)
#define blockDim (cuda_on_cpu::self.block_dim)
#define gridDim (cuda_on_cpu::self.grid_dim)
constexpr int warpSize = 32;

#define SHARED_ARRAY(type, name, count) \
    static const char name##_shared_ = 0; \
    auto &name = *static_cast<type(*)[count]>(cuda_on_cpu::shared_array(&name##_shared_, #name, sizeof(type[count])))
#define DYNAMIC_SHARED(type, name) type *name = static_cast<type *>(cuda_on_cpu::dynamic_shared())

template <typename... P, typename... A>
inline cudaError_t cuda_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                               A &&...args) {
    std::tuple<P...> parameters(static_cast<A &&>(args)...);
    return cuda_on_cpu::run(grid, block, shared_bytes, reinterpret_cast<const void *>(kernel),
                            [&] { std::apply(kernel, parameters); });
}

// ---- barriers and warp collectives; the defaulted arguments carry the caller's place for the checks ----
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(false, file, line); }
inline int __syncthreads_count(int p, CUDA_ON_CPU_SITE) { return cuda_on_cpu::block_barrier(p, file, line); }
inline int __syncthreads_or(int p, CUDA_ON_CPU_SITE) { return cuda_on_cpu::block_barrier(p, file, line) != 0; }
inline int __syncthreads_and(int p, CUDA_ON_CPU_SITE) { return cuda_on_cpu::block_barrier(!p, file, line) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
    cuda_on_cpu::warp_wait(cuda_on_cpu::WarpOp::sync, mask, 0, 0, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) {
    return static_cast<unsigned>(cuda_on_cpu::warp_wait(cuda_on_cpu::WarpOp::vote, mask, p != 0, 0, file, line));
}
inline int __any_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, CUDA_ON_CPU_SITE) { return __ballot_sync(mask, p, file, line) == mask; }

// `own` is kept where the source lane would leave the lane's segment of `width` lanes, as on the GPU.
#define CUDA_ON_CPU_SHUFFLE(name, argument, source, keeps_own) \
    template <typename T> T name(unsigned mask, T v, argument, int width = 32, CUDA_ON_CPU_SITE) { \
        const int own = static_cast<int>(cuda_on_cpu::lane()), first = own & ~(width - 1); \
        const int from = (source), end = first + width; \
        (void)end; \
        return cuda_on_cpu::unpack<T>(cuda_on_cpu::warp_wait(cuda_on_cpu::WarpOp::shuffle, mask, cuda_on_cpu::pack(v), \
                                                             (keeps_own) ? own : from, file, line)); \
    }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, int from_lane, first + (from_lane & (width - 1)), false)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, unsigned delta, own - static_cast<int>(delta), from < first)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, unsigned delta, own + static_cast<int>(delta), from >= end)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, int bits, own ^ bits, from >= end)
#undef CUDA_ON_CPU_SHUFFLE

// ---- fences and atomics (one operating-system thread runs everything, so plain code is atomic) ----
inline void __threadfence() {}
inline void __threadfence_block() {}
#define CUDA_ON_CPU_ATOMIC(name, expression) \
    template <typename T> __attribute__((noinline, no_sanitize("thread"))) T name(T *p, std::common_type_t<T> v) { \
        cuda_on_cpu::note_atomic(p, sizeof(T), __builtin_return_address(0)); \
        const T old = *p; \
        *p = (expression); \
        return old; \
    }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + v)
CUDA_ON_CPU_ATOMIC(atomicMax, old < v ? v : old)
CUDA_ON_CPU_ATOMIC(atomicMin, v < old ? v : old)
CUDA_ON_CPU_ATOMIC(atomicExch, v)
CUDA_ON_CPU_ATOMIC(atomicOr, old | v)
#undef CUDA_ON_CPU_ATOMIC
template <typename T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T *p, std::common_type_t<T> expected,
                                                             std::common_type_t<T> v) {
    cuda_on_cpu::note_atomic(p, sizeof(T), __builtin_return_address(0));
    const T old = *p;
    if (old == expected) *p = v;
    return old;
}

// ---- loads and stores with cache hints ----
template <typename T> __forceinline__ T __ldg(const T *p) { return *p; }
template <typename T> __forceinline__ T __ldcs(const T *p) { return *p; }
template <typename T> __forceinline__ T __ldcg(const T *p) { return *p; }
template <typename T> __forceinline__ void __stcs(T *p, std::common_type_t<T> v) { *p = v; }
template <typename T> __forceinline__ void __stcg(T *p, std::common_type_t<T> v) { *p = v; }

// ---- arithmetic. Compile with -ffp-contract=off: then only fmaf fuses, as under nvcc -fmad=false ----
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); } // GPU: 2 ulp
inline unsigned __float_as_uint(float a) { return cuda_on_cpu::unpack<unsigned>(cuda_on_cpu::pack(a)); }
inline float __uint_as_float(unsigned a) { return cuda_on_cpu::unpack<float>(cuda_on_cpu::pack(a)); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
template <typename T> constexpr T min(T a, std::common_type_t<T> b) { return b < a ? b : a; }
template <typename T> constexpr T max(T a, std::common_type_t<T> b) { return a < b ? b : a; }

// ---- bfloat16: storage and conversion only; kernels compute in float ----
struct __nv_bfloat16 {
    unsigned short bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float f) { // to nearest, ties to even; every NaN becomes 0x7fff
    if (f != f) return {0x7fff};
    const unsigned u = __float_as_uint(f);
    return {static_cast<unsigned short>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(static_cast<unsigned>(b.bits) << 16); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return {u}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }

// ---- float16, the same ----
struct __half {
    unsigned short bits;
};
inline float __half2float(__half h) {
    const unsigned sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31u, fraction = h.bits & 0x3ffu;
    if (exponent == 0) // subnormal: a multiple of 2^-24, which float holds as a normal number
        return __uint_as_float(__float_as_uint(static_cast<float>(fraction) * 0x1p-24f) | sign);
    return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}
inline __half __float2half_rn(float f) { // to nearest, ties to even; every NaN becomes 0x7fff
    const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000u, size = u & 0x7fffffffu;
    if (size > 0x7f800000u) return {0x7fff};
    if (size >= 0x477ff000u) return {static_cast<unsigned short>(sign | 0x7c00u)}; // 65520 and more
    if (size < 0x38800000u) // subnormal: nearbyint rounds to even
        return {static_cast<unsigned short>(
            sign | static_cast<unsigned>(std::nearbyint(static_cast<double>(__uint_as_float(size)) * 0x1p24)))};
    return {static_cast<unsigned short>(sign | ((size + 0xfffu + (size >> 13 & 1u) - (112u << 23)) >> 13))};
}
inline __half __ushort_as_half(unsigned short u) { return {u}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
