/* lowrank: the truncation of csrc/core/lowrank.c by one block of threads, with its bits. The formulas are there.
 *
 * The small matrices lie in shared memory; the eigenvalues are one thread's work (p is 4 at the default ranks), what runs
 * along n is everyone's. Every function is called by all THREADS threads of a block. Loops that could be two calls
 * keep the code short: each is inlined, as a call would spill registers. */
#ifndef OPLORA_LOWRANK_CUH
#define OPLORA_LOWRANK_CUH

#include "../shared/lowrank.h"
#include "device.h"

template <int THREADS> struct lowrank {
    struct Shared {
        oplora_matrix scaled, vector, F, KK;
        double value[OPLORA_MOST_BASIS], length[OPLORA_MOST_BASIS];
        double lanes[THREADS], result, total;
        int order[OPLORA_MOST_BASIS];
    };

    /* a . b in eight lanes of double, as dot_double in kernels.h; out(q) for the q-th of `count` pairs. */
    template <class Pair, class Out>
    static __device__ void dots(Shared &s, int count, int64_t n, const Pair &pair, const Out &out) {
        const int t = static_cast<int>(threadIdx.x);
        for (int first = 0; first < count; first += THREADS / 8) {
            const int q = first + t / 8;
            double sum = 0;
            if (q < count) {
                const double *a, *b;
                pair(q, a, b);
                for (int64_t i = t % 8; i < n; i += 8) sum += a[i] * b[i];
            }
            s.lanes[t] = sum;
            __syncthreads();
            if (q < count && t % 8 == 0) {
                sum = 0;
                for (int l = 0; l < 8; l++) sum += s.lanes[t + l];
                out(q, sum);
            }
            __syncthreads();
        }
    }

    static __device__ double dot(Shared &s, const double *x, const double *y, int64_t n) {
        dots(
            s, 1, n, [&](int, const double *&a, const double *&b) { a = x, b = y; },
            [&](int, double sum) { s.result = sum; });
        return s.result; /* written again behind the next call's first barrier only */
    }

    /* Makes row i of the directions orthogonal to those before it and of length one; 0 if nothing is left of it. */
    static __device__ int orthonormalise(Shared &s, double *directions, int i, int64_t n) {
        double *const row = directions + i * n;
        const int t = static_cast<int>(threadIdx.x);
        const double before = sqrt(dot(s, row, row, n));
        for (int pass = 0; pass < 2; pass++)
            for (int other = 0; other < i; other++) {
                const double *const unit = directions + other * n;
                const double along = -dot(s, row, unit, n);
                for (int64_t j = t; j < n; j += THREADS) row[j] += along * unit[j];
                __syncthreads();
            }
        const double length = sqrt(dot(s, row, row, n));
        const bool some = oplora_remains(length, before);
        const double shorter = 1 / length;
        for (int64_t j = t; j < n; j += THREADS) row[j] = some ? row[j] * shorter : 0;
        __syncthreads();
        return some;
    }

    /* gram (p, p) and rotation (p, rank) in shared memory, K (p, n) and directions (rank, n) in global memory. Returns the
     * share of ||X K||^2 that is dropped. */
    static __device__ double truncate(Shared &s, const double *gram, int p, const double *K, int64_t n, int rank,
                                      double *rotation, double *directions) {
        const int t = static_cast<int>(threadIdx.x);
        __syncthreads(); /* gram and K are written */
        if (t < p) s.length[t] = oplora_length(gram, p, t);
        __syncthreads();
#pragma unroll 1
        for (int stage = 0; stage < 2; stage++) { /* of the scaled Gram matrix, then of F K K^T F^T */
            for (int e = t; e < p * p; e += THREADS) {
                const int i = e / p, j = e % p;
                s.scaled[i][j] = stage == 0 ? oplora_scaled_entry(gram, p, s.length, i, j)
                                            : oplora_product_entry(s.F, s.KK, p, i, j);
            }
            __syncthreads();
            if (t == 0) oplora_eigen(s.scaled, p, s.value, s.vector);
            __syncthreads();
            if (stage == 1) break;
            for (int e = t; e < p * p; e += THREADS) {
                const int i = e / p, j = e % p;
                s.F[i][j] = oplora_root_entry(s.value, s.vector, s.length, i, j);
            }
            dots(
                s, p * p, n,
                [&](int q, const double *&a, const double *&b) { a = K + (q / p) * n, b = K + (q % p) * n; },
                [&](int q, double sum) { s.KK[q / p][q % p] = sum; });
        }
        if (t == 0) s.total = oplora_order(s.value, p, s.order);
        for (int64_t j = t; j < rank * n; j += THREADS) directions[j] = 0;
        __syncthreads();
        double kept = 0;
        for (int i = 0; i < rank && i < p; i++) {
            const int best = s.order[i];
            if (!oplora_carries(s.value[best], s.value[s.order[0]])) break;
            double *const row = directions + i * n;
            for (int a = 0; a < p; a++) {
                const double weight = oplora_direction_weight(s.value[best], s.vector, s.F, p, best, a);
                for (int64_t j = t; j < n; j += THREADS) row[j] += weight * K[a * n + j];
            }
            __syncthreads();
            if (!orthonormalise(s, directions, i, n)) break;
            kept += s.value[best];
        }
        dots(
            s, p * rank, n,
            [&](int q, const double *&a, const double *&b) { a = K + (q / rank) * n, b = directions + (q % rank) * n; },
            [&](int q, double sum) { rotation[q] = sum; });
        return oplora_dropped(kept, s.total);
    }
};

#endif
