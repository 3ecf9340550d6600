/* What every .cu file here includes: CUDA when nvcc compiles it for a GPU, tests/cuda_on_cpu when a plain C++17 compiler
 * compiles it for the tests, which run each thread of a block as a fibre on the CPU.
 *
 *     SHARED_ARRAY(type, name, count)   __shared__ type name[count]
 *     cuda_launch(kernel, grid, block, shared_bytes, stream, arguments...)
 *
 * Compile with -fmad=false -ftz=true: then arithmetic in float has the bits of the C core, which fuses nothing and
 * counts subnormals as zero. */
#ifndef OPLORA_DEVICE_H
#define OPLORA_DEVICE_H

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

template <typename... P, typename... A>
static cudaError_t cuda_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                               A &&...arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<A &&>(arguments)...);
}

#else
#include "cuda_on_cpu.h"
#endif

#include "../core/oplora_core.h"

/* Stops at the first launch that fails and returns its error. */
#define CUDA_FORWARD(call) \
    do { \
        const cudaError_t error_ = (call); \
        if (error_ != cudaSuccess) return error_; \
    } while (0)

#endif
