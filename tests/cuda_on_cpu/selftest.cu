// Tests of cuda_on_cpu itself: right kernels give right answers, and each kind of fault is found.
// README.md has the three builds to run it in; only the one for races sees the last six kernels' faults.
#include "cuda_on_cpu.h"

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#if defined(__SANITIZE_THREAD__)
constexpr bool races_seen = true;
#else
constexpr bool races_seen = false;
#endif

// ---- right kernels ----
__global__ void collectives(int *out) {
    const int t = threadIdx.x + blockDim.x * threadIdx.y, l = t % 32;
    int s = l;
    for (int d = 16; d; d >>= 1) s += __shfl_down_sync(0xffffffffu, s, d);
    s = __shfl_sync(0xffffffffu, s, 0);                  // 496 in each lane
    const int x = __shfl_xor_sync(0xffffffffu, l, 5, 8); // within groups of 8
    const int u = __shfl_up_sync(0xffffffffu, l, 3, 16);
    const unsigned odd = __ballot_sync(0xffffffffu, l & 1);
    const unsigned half = l < 16 ? 0x0000ffffu : 0xffff0000u; // two halves at once
    const int h = __shfl_sync(half, l, l < 16 ? 2 : 30);
    const int many = __syncthreads_count(t < 40);
    out[t] = s == 496 && x == (l ^ 5) && u == (l % 16 < 3 ? l : l - 3) && odd == 0xaaaaaaaau &&
             h == (l < 16 ? 2 : 30) && many == 40 && __all_sync(0xffffffffu, 1) && !__any_sync(0xffffffffu, 0);
}
template <int Steps> __global__ void scan(const float *in, float *out) { // inclusive sum over the block
    SHARED_ARRAY(float, a, 256);
    const int t = threadIdx.x;
    a[t] = in[blockIdx.x * 256 + t];
    __syncthreads();
    for (int d = 1, i = 0; i < Steps; i++, d *= 2) {
        const float v = t >= d ? a[t - d] : 0.f;
        __syncthreads();
        a[t] += v;
        __syncthreads();
    }
    out[blockIdx.x * 256 + t] = a[t];
}
__global__ void count(int *n) { atomicAdd(n, 1); }
__global__ void within_warp(int *out) {
    SHARED_ARRAY(int, a, 64);
    a[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = a[threadIdx.x ^ 1];
}

// ---- wrong kernels ----
__global__ void barrier_in_branch(int) {
    if (threadIdx.x < 7)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void returns_early(int) {
    if (threadIdx.x == 3) return;
    __syncthreads();
}
__global__ void warp_deadlock(int) {
    if (threadIdx.x % 32 != 9) __syncwarp();
}
__global__ void bad_mask(int) {
    if (threadIdx.x % 2) __shfl_sync(0x55555555u, 1, 0);
}
__global__ void reads_inactive_lane(int) {
    if (threadIdx.x % 32 < 16) __shfl_sync(0x0000ffffu, 1, 20);
}
__global__ void mixed_collectives(int) {
    if (threadIdx.x % 2)
        __ballot_sync(0xffffffffu, 1);
    else
        __syncwarp();
}
__global__ void too_much_shared(int) {
    SHARED_ARRAY(float, big, 12289);
    big[0] = 0;
}
__global__ void no_barrier(float *out) {
    SHARED_ARRAY(float, a, 64);
    a[threadIdx.x] = 1.f;
    out[threadIdx.x] = a[63 - threadIdx.x];
}
__global__ void no_syncwarp(int *out) {
    SHARED_ARRAY(int, a, 64);
    a[threadIdx.x] = 1;
    __shfl_sync(0xffffffffu, 1, 0); // does not order memory
    out[threadIdx.x] = a[threadIdx.x ^ 31];
}
__global__ void write_after_read(int *out) {
    SHARED_ARRAY(int, a, 64);
    a[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = a[(threadIdx.x + 33) % 64];
    a[threadIdx.x] = 2;
}
__global__ void uninitialised(float *out) {
    SHARED_ARRAY(float, a, 64);
    if (threadIdx.x < 32) a[threadIdx.x] = 0.f;
    __syncthreads();
    out[threadIdx.x] = a[threadIdx.x];
}
__global__ void blocks_collide(float *out) { out[threadIdx.x] = 1.f; }
__global__ void plain_against_atomic(int *n) {
    if (threadIdx.x == 0 && blockIdx.x == 0) *n = 0;
    atomicAdd(n, 1);
}

static int failures = 0, checks = 0;
static void check(bool good, const char *what) {
    checks++;
    if (!good) failures++, printf("FAILED: %s\n", what);
}
template <typename T>
static void catches(const char *what, const char *words, void (*kernel)(T), T argument, int blocks) {
    const bool failed = cuda_launch(kernel, blocks, 64, 0, nullptr, argument) != cudaSuccess;
    check(failed && cuda_on_cpu::take_report().find(words) != std::string::npos, what);
    cudaGetLastError();
}

// All finite float16 numbers, of both signs: there and back, and to even half-way between neighbours.
static bool float16_rounds() {
    bool good = true;
    const auto back = [](double x) { return __half_as_ushort(__float2half_rn(static_cast<float>(x))); };
    for (unsigned bits = 0; bits < 0x7c00; bits++)
        for (const unsigned sign : {0u, 0x8000u}) {
            const double now = __half2float({static_cast<unsigned short>(bits | sign)});
            const double next = bits + 1 < 0x7c00 ? __half2float({static_cast<unsigned short>((bits + 1) | sign)})
                                                  : (sign ? -65536. : 65536.);
            const double half_way = (now + next) / 2, close = now + (next - now) * 0.499;
            good = good && back(now) == (bits | sign) && back(half_way) == ((bits + bits % 2) | sign) &&
                   back(close) == (bits | sign);
        }
    return good && back(1e30) == 0x7c00 && back(-1e30) == 0xfc00 && back(1.0) == 0x3c00 && back(0x1p-24) == 1 &&
           back(0x1p-26) == 0 && __half2float({0x7c00}) > 1e38f && back(std::nan("")) == 0x7fff;
}

int main() {
    using cuda_on_cpu::Order;
    std::vector<int> flags(1024);
    std::vector<float> in(512, 1.f), out(512);
    for (Order order : {Order::forward, Order::reverse, Order::random}) {
        cuda_on_cpu::options.order = order;
        flags.assign(1024, 0);
        check(cuda_launch(collectives, 1, dim3(32, 4), 0, nullptr, flags.data()) == cudaSuccess, "collectives run");
        int right = 0;
        for (int t = 0; t < 128; t++) right += flags[t];
        check(right == 128, "collectives");
        check(cuda_launch(scan<8>, 2, 256, 0, nullptr, in.data(), out.data()) == cudaSuccess, "scan runs");
        check(out[0] == 1 && out[255] == 256 && out[256] == 1 && out[511] == 256, "scan");
        int n = 0;
        check(cuda_launch(count, dim3(2, 3, 4), dim3(4, 8, 2), 0, nullptr, &n) == cudaSuccess, "atomics run");
        check(n == 24 * 64, "atomics");
        check(cuda_launch(within_warp, 1, 64, 0, nullptr, flags.data()) == cudaSuccess && flags[6] == 7, "__syncwarp");
        catches("barrier in a branch", "divergent barrier", barrier_in_branch, 0, 2);
        catches("a thread returns before a barrier", "deadlock: 1 of 64", returns_early, 0, 2);
        catches("a lane misses __syncwarp", "names a lane that has returned", warp_deadlock, 0, 2);
        catches("mask without the caller", "leaves out the calling lane", bad_mask, 0, 1);
        catches("shuffle from outside the mask", "outside the mask", reads_inactive_lane, 0, 1);
        catches("different collectives meet", "mismatched warp collective", mixed_collectives, 0, 1);
        catches("too much shared memory", "bytes of shared memory", too_much_shared, 0, 1);
        check(cuda_launch(count, 1, 1025, 0, nullptr, &n) == cudaErrorInvalidConfiguration, "1025 threads");
        cuda_on_cpu::take_report();
        if (!races_seen) {
            cuda_launch(uninitialised, 1, 64, 0, nullptr, out.data());
            check(out[31] == 0.f && out[32] != out[32], "uninitialised shared memory reads as NaN");
            continue;
        }
        catches("missing __syncthreads", "race", no_barrier, out.data(), 1);
        catches("missing __syncwarp", "race", no_syncwarp, flags.data(), 1);
        catches("write after read", "shared array a", write_after_read, flags.data(), 1);
        catches("uninitialised shared memory", "uninitialised", uninitialised, out.data(), 1);
        catches("two blocks write one place", "another block", blocks_collide, out.data(), 2);
        catches("plain access against an atomic", "atomic", plain_against_atomic, &n, 2);
    }
    check(float16_rounds(), "float16 rounds to nearest, ties to even");
    printf("%d passed, %d failed\n", checks - failures, failures);
    return failures != 0;
}
