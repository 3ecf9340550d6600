/* lean_solve: what lies between the two passes of adamw_lean.cu, as csrc/core/lean_solve.c: the averages that no single row
 * is needed for, the truncations, and what the second pass multiplies the basis with. By all THREADS threads of a block. */
#ifndef OPLORA_LEAN_SOLVE_CUH
#define OPLORA_LEAN_SOLVE_CUH

#include "lean_rows.cuh"

#include <math.h>

namespace lean {

template <class Term, class Out>
__device__ void sum_terms(double *room, int count, int64_t n, const Term &term, const Out &out) {
    sum_in_order<THREADS>(room, count, n, term, out);
}
__device__ inline double square(float x) { return static_cast<double>(x) * x; }

/* What prepare_map and step_hidden say to each other through shared memory. */
struct Small {
    Lowrank::Shared lowrank;
    double gram[BASIS * BASIS], all[BASIS * BASIS];
    oplora_matrix change;
    double rotate_A[BASIS * RANK], rotate_W[BASIS * RANK];
    double now[RANK], next[RANK], number[4], room[SUM_ROOM<2 * RANK>];
};

/* The averages that do not depend on single rows, and with them the step's numbers. square_g is ||g||^2. */
__device__ inline void prepare_map(const Map &map, const float *x, double square_g, const oplora_adamw &a,
                                   oplora_words key, const double corrections[2], double number[4], double *room) {
    const int t = static_cast<int>(threadIdx.x);
    sum_terms(
        room, 1, map.inputs, [&](int, int64_t j) { return square(x[j]); },
        [&](int, double sum) {
            const double mean_x = sum / static_cast<double>(map.inputs);
            const double fresh = oplora_lean_fresh(a.beta2, mean_x, square_g, map.rows.rows, oplora_most_gradient_f32);
            *map.mean = a.beta2 * *map.mean + fresh;
            number[0] = mean_x;
            number[1] = *map.mean > 0 ? fresh / *map.mean : 0;
        });
    const double mean_x = number[0], turn = number[1];
    for (int64_t j = t; j < map.inputs; j += THREADS) {
        map.r[j] = oplora_lean_next_r_f32(map.r[j], turn, x[j], mean_x);
        const double c = map.r[j] > 0 ? sqrt(static_cast<double>(map.r[j])) : 0;
        map.K[j] = c; /* scratch until solve_map fills it */
        map.col[j] = c > 0 ? 1 / c : 0;
    }
    __syncthreads();
    sum_terms(
        room, 2, map.inputs, [&](int which, int64_t j) { return which == 0 ? map.K[j] : map.K[j] > 0; },
        [&](int which, double sum) { number[2 + which] = sum; });
    if (t == 0) {
        const double root = number[2];
        const int64_t live = static_cast<int64_t>(number[3]);
        map.steps[2] = a.beta1;
        MapStep &step = *map.rows.step;
        step.constants = oplora_lean_constants_of_f32(&a, mean_x, live, root, corrections[1], key.a);
        step.round_key[0] = oplora_other_key(key.a);
        for (int i = 1; i < map.rows.k; i++) step.round_key[i] = key.b + static_cast<uint32_t>(i) * key.c;
    }
    __syncthreads();
}

/* The map's keep and rate, and each factor's share of them. */
__device__ inline void find_rates(const Table &t, const Layer &l) {
    const Map &map = l.outer;
    const double corrected1 = l.corrections[0];
    oplora_lean_rates rates = {};
    for (int64_t f = 0; f < l.n_factors; f++)
        rates = oplora_lean_rates_with(rates, l.rates[2 * f], l.rates[2 * f + 1], t.factors[l.first_factor + f].random);
    map.steps[0] = rates.keep;
    map.steps[1] = rates.lr * l.adamw->weight_ratio / corrected1;
    map.steps[3] = rates.has_random ? rates.start_keep : rates.keep;
    for (int64_t f = 0; f < l.n_factors; f++) {
        const double own_lr = l.rates[2 * f], own_keep = oplora_lean_keep(own_lr, l.rates[2 * f + 1]);
        Share &share = map.rows.shares[f];
        share.kappa = oplora_lean_kappa(rates, own_keep);
        share.rho = oplora_lean_rho(rates, own_lr);
        share.constants.keep = static_cast<float>(own_keep);
        share.constants.rate = static_cast<float>(own_lr / corrected1);
    }
}

/* ---- between the passes ---- */

/* After all sums and with the next input: the truncations, and what the second pass multiplies the basis with. */
__device__ inline void solve_map(const Map &map, const float *x, Small &s, double dropped[2]) {
    const Rows &r = map.rows;
    const int d = r.d, k = r.k, p = oplora_lean_basis(d, k), t = static_cast<int>(threadIdx.x);
    const int64_t n = map.inputs;
    const double keep = map.steps[0], rate = map.steps[1], beta1 = map.steps[2];
    for (int e = t; e < p * p; e += THREADS) {
        const int i = e / p, j = e % p;
        s.all[e] = map.sums[i >= j ? e : j * p + i];
        s.change[i][j] = i == j && i < d;
    }
    __syncthreads();

#pragma unroll 1
    for (int stage = 0; stage < 2; stage++) {
        if (stage == 0) { /* the first moment: [A, g] K in the step's scale */
            for (int e = t; e < (k + 1) * (k + 1); e += THREADS)
                s.gram[e] = s.all[(d + e / (k + 1)) * p + d + e % (k + 1)];
            for (int64_t j = t; j < n; j += THREADS) {
                for (int i = 0; i < k; i++) map.K[i * n + j] = beta1 * map.B[i * n + j] * map.col[j];
                map.K[k * n + j] = (1 - beta1) * x[j] * map.col[j];
            }
        } else { /* W: [U, row A'] with A' = [A, g] rotate_A; the same for the whole basis: change (p, d + k) */
            for (int64_t j = t; j < n; j += THREADS)
                for (int i = 0; i < k; i++)
                    map.B[i * n + j] = static_cast<float>(map.col[j] > 0 ? map.directions[i * n + j] / map.col[j] : 0);
            for (int e = t; e < (k + 1) * k; e += THREADS) s.change[d + e / k][d + e % k] = s.rotate_A[e];
            __syncthreads();
            for (int e = t; e < (d + k) * (d + k); e += THREADS) {
                const int i = e / (d + k), j = e % (d + k);
                s.gram[e] = oplora_lean_changed_entry(s.all, s.change, p, i, j);
            }
            for (int64_t j = t; j < n; j += THREADS) {
                for (int i = 0; i < d; i++) map.K[i * n + j] = keep * map.Q[i * n + j];
                for (int i = 0; i < k; i++) map.K[(d + i) * n + j] = -rate * map.directions[i * n + j];
            }
        }
        if (stage == 1 && rate == 0 && keep == 1) { /* nothing moves, not even by rounding */
            for (int e = t; e < (d + k) * d; e += THREADS) s.rotate_W[e] = e / d == e % d;
            for (int64_t j = t; j < d * n; j += THREADS) map.Q_next[j] = map.Q[j];
            dropped[stage] = 0;
        } else
            dropped[stage] = Lowrank::truncate(s.lowrank, s.gram, stage ? d + k : k + 1, map.K, n, stage ? d : k,
                                               stage ? s.rotate_W : s.rotate_A, stage ? map.Q_next : map.directions);
        __syncthreads();
    }

    MapStep &step = *r.step;
    for (int e = t; e < k * (k + 1); e += THREADS)
        step.rotate_A[e / (k + 1)][e % (k + 1)] = static_cast<float>(s.rotate_A[(e % (k + 1)) * k + e / (k + 1)]);
    for (int e = t; e < d * p; e += THREADS) {
        const int i = e / p, a = e % p;
        step.rotate_U[i][a] = static_cast<float>(oplora_lean_rotation(s.change, s.rotate_W, d, k, a, i));
    }
    __syncthreads();
}

/* The output's share of the basis: U' Q'^T x' - keep U Q^T x. Then Q' takes Q's place. */
__device__ inline void finish_map(const Map &map, const float *x, const float *x_next, Small &s) {
    const Rows &r = map.rows;
    const int t = static_cast<int>(threadIdx.x), d = r.d;
    const int64_t n = map.inputs;
    sum_terms(
        s.room, 2 * d, n,
        [&](int which, int64_t j) {
            if (which < d) return static_cast<double>(map.Q[which * n + j]) * x[j];
            return static_cast<double>(static_cast<float>(map.Q_next[(which - d) * n + j])) * x_next[j];
        },
        [&](int which, double sum) { (which < d ? s.now : s.next - d)[which] = sum; });
    for (int64_t j = t; j < d * n; j += THREADS) map.Q[j] = static_cast<float>(map.Q_next[j]);
    MapStep &step = *r.step;
    if (t < oplora_lean_basis(d, r.k)) {
        double weight = 0;
        for (int i = 0; i < d; i++) {
            weight += step.rotate_U[i][t] * s.next[i];
            if (i == t) weight -= map.steps[0] * s.now[i];
        }
        step.weight[t] = static_cast<float>(weight);
    }
    __syncthreads();
    const int p = oplora_lean_basis(d, r.k);
    for (int64_t e = t; e < r.n_shares; e += THREADS) {
        Share &share = r.shares[e];
        const float keep = share.constants.keep, rate = share.constants.rate;
        share.constants = step.constants;
        share.constants.keep = keep, share.constants.rate = rate;
        share.defaults.constants = share.constants;
        for (int i = 0; i < 2; i++) share.defaults.A[i] = step.rotate_A[0][i];
    }
    for (int64_t e = t; e < r.n_shares * (d + 1) * p; e += THREADS) {
        Share &share = r.shares[e / ((d + 1) * p)];
        const int i = static_cast<int>(e / p % (d + 1)), a = static_cast<int>(e % p);
        const float value = (i < d ? step.rotate_U[i][a] : step.weight[a]) * static_cast<float>(scale_of(share, a, d));
        (i < d ? share.rotate_U[i] : share.weight)[a] = value;
        if (d == 2 && r.k == 1)
            (i == 0 ? share.defaults.u0 : i < d ? share.defaults.u1 : share.defaults.weight)[a] = value;
    }
    __syncthreads();
}

/* dh = s W0^T g + Q (U^T g) where the unit is on, from the sums of all parts. */
__device__ inline void find_dh(const Layer &l) {
    const Rows &r = l.outer.rows;
    const int own = oplora_lean_sums(r.d, r.k), p = oplora_lean_basis(r.d, r.k);
    const double *const along = l.outer.sums + p * p;
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS) {
        double sum = *l.outer.scale * l.bound * l.outer.sums[own + j];
        for (int i = 0; i < r.d; i++) sum += static_cast<double>(l.outer.Q[i * l.H + j]) * along[i];
        l.dh[j] = l.h[j] != 0 ? sum : 0;
    }
    __syncthreads();
}

/* W2's map: what W0 adds to the factors. */
__device__ inline void finish_outer(const Layer &l) {
    const Map &map = l.outer;
    const double keep = map.steps[3], bound = l.bound * keep * *map.scale;
    for (int64_t j = threadIdx.x; j < l.H; j += THREADS)
        l.change[j] = static_cast<float>(bound * (static_cast<double>(l.h_next[j]) - l.h[j]));
    __syncthreads();
    if (threadIdx.x == 0) *map.scale *= keep;
}

__device__ inline void add_parts(const Layer &l) {
    const int64_t size = part_size(l);
    for (int64_t i = threadIdx.x; i < size; i += THREADS) {
        double sum = 0;
        for (int64_t part = 0; part < l.parts; part++) sum += l.part_sums[part * size + i];
        l.outer.sums[i] = sum;
    }
    __syncthreads();
}

} // namespace lean

#endif
