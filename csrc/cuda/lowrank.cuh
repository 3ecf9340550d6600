/* lowrank: the truncation of csrc/core/lowrank.c by one block of threads, with its bits. The formulas are there.
 *
 * The small matrices lie in shared memory; the eigenvalues are one thread's work (p is 4 at the default ranks), what runs
 * along n is everyone's. Every function but eigen is called by all THREADS threads of a block. Loops that could be two calls
 * keep the code short: each is inlined, as a call would spill registers. */
#ifndef OPLORA_LOWRANK_CUH
#define OPLORA_LOWRANK_CUH

#include "device.h"

enum { MOST = 2 * OPLORA_MOST_RANK + 1 };

template <int THREADS> struct lowrank {
    struct Shared {
        double scaled[MOST][MOST], value[MOST], vector[MOST][MOST], F[MOST][MOST], KK[MOST][MOST], length[MOST];
        double lanes[THREADS], result, total;
        int order[MOST];
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

    /* Eigenvalues and eigenvectors of s.scaled, by one thread; cyclic Jacobi. */
    static __device__ void eigen(Shared &s, int p) {
        double (*const a)[MOST] = s.scaled, (*const vector)[MOST] = s.vector;
        for (int i = 0; i < p; i++)
            for (int j = 0; j < p; j++) vector[i][j] = i == j;
        for (int sweep = 0; sweep < 30; sweep++) {
            double off = 0, diagonal = 0;
            for (int i = 0; i < p; i++) {
                diagonal += a[i][i] * a[i][i];
                for (int j = 0; j < i; j++) off += a[i][j] * a[i][j];
            }
            if (off <= 1e-32 * diagonal) break;
            for (int i = 0; i < p; i++)
                for (int j = 0; j < i; j++) {
                    if (a[i][j] == 0) continue;
                    const double theta = (a[i][i] - a[j][j]) / (2 * a[i][j]);
                    const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                    const double c = 1 / sqrt(t * t + 1), sine = t * c;
                    for (int m = 0; m < p; m++) {
                        const double x = a[m][j], y = a[m][i];
                        a[m][j] = c * x - sine * y;
                        a[m][i] = sine * x + c * y;
                    }
                    for (int m = 0; m < p; m++) {
                        const double x = a[j][m], y = a[i][m];
                        a[j][m] = c * x - sine * y;
                        a[i][m] = sine * x + c * y;
                    }
                    for (int m = 0; m < p; m++) {
                        const double x = vector[m][j], y = vector[m][i];
                        vector[m][j] = c * x - sine * y;
                        vector[m][i] = sine * x + c * y;
                    }
                }
        }
        for (int i = 0; i < p; i++) s.value[i] = a[i][i];
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
        const bool some = length > 1e-8 * before;
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
        if (t < p) s.length[t] = gram[t * p + t] > 0 ? sqrt(gram[t * p + t]) : 0;
        __syncthreads();
#pragma unroll 1
        for (int stage = 0; stage < 2; stage++) { /* of the scaled Gram matrix, then of F K K^T F^T */
            for (int e = t; e < p * p; e += THREADS) {
                const int i = e / p, j = e % p;
                double sum = 0;
                if (stage == 0) {
                    const double scale = s.length[i] * s.length[j];
                    sum = i == j ? scale > 0 : scale > 0 ? gram[e] / scale : 0;
                } else
                    for (int a = 0; a < p; a++)
                        for (int b = 0; b < p; b++) sum += s.F[i][a] * s.KK[a][b] * s.F[j][b];
                s.scaled[i][j] = sum;
            }
            __syncthreads();
            if (t == 0) eigen(s, p);
            __syncthreads();
            if (stage == 1) break;
            for (int e = t; e < p * p; e += THREADS) {
                const int i = e / p, j = e % p;
                s.F[i][j] = sqrt(fmax(s.value[i], 0.0)) * s.vector[j][i] * s.length[j];
            }
            dots(
                s, p * p, n,
                [&](int q, const double *&a, const double *&b) { a = K + (q / p) * n, b = K + (q % p) * n; },
                [&](int q, double sum) { s.KK[q / p][q % p] = sum; });
        }
        if (t == 0) {
            s.total = 0;
            for (int i = 0; i < p; i++) {
                int at = i;
                for (; at > 0 && s.value[s.order[at - 1]] < s.value[i]; at--) s.order[at] = s.order[at - 1];
                s.order[at] = i;
                s.total += fmax(s.value[i], 0.0);
            }
        }
        for (int64_t j = t; j < rank * n; j += THREADS) directions[j] = 0;
        __syncthreads();
        double kept = 0;
        for (int i = 0; i < rank && i < p; i++) {
            const int best = s.order[i];
            if (!(s.value[best] > 1e-14 * s.value[s.order[0]])) break;
            double *const row = directions + i * n;
            for (int a = 0; a < p; a++) {
                double weight = 0;
                for (int m = 0; m < p; m++) weight += s.vector[m][best] * s.F[m][a];
                weight = weight / sqrt(s.value[best]);
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
        return s.total > 0 ? fmax(0.0, 1 - kept / s.total) : 0;
    }
};

#endif
