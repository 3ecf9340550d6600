/* What the C core and the CUDA kernels both compile: scalar maths, in double or one number type, with nothing fused. C and
 * nvcc give it the same bits, so a kernel is tested against the core. */
#ifndef OPLORA_SHARED_H
#define OPLORA_SHARED_H

/* A function of both. Inlined always: most stand in loops that the C compiler vectorises, and a call would spill a kernel's
 * registers. */
#ifdef __CUDACC__
#define OPLORA_SHARED static __host__ __device__ __forceinline__
#define OPLORA_UNROLL _Pragma("unroll")
#else
#define OPLORA_SHARED static inline __attribute__((always_inline))
#define OPLORA_UNROLL
#endif

#endif
