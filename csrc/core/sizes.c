/* sizes: how many numbers a generator and its states have, and whether they can be counted. */
#include "../shared/lean_layout.h"
#include "hidden.h"
#include "oplora_core.h"

int64_t oplora_size(int64_t H, int64_t Z, int64_t N) {
    int64_t w2, w1, total;
    if (H < 1 || Z < 1 || N < 1) return -1;
    if (__builtin_mul_overflow(H, N, &w2) || __builtin_mul_overflow(H, Z, &w1) ||
        __builtin_add_overflow(w2, w1, &total) || __builtin_add_overflow(total, N, &total) ||
        __builtin_add_overflow(total, H, &total) || __builtin_add_overflow(total, Z, &total))
        return -1;
    return total;
}

int64_t oplora_exact_report_size(int64_t H) { return 3 + 2 * H; }

int64_t oplora_lean_sums_size(int64_t H, int64_t d, int64_t k) {
    if (H < 1 || d < 1 || d > OPLORA_MOST_RANK || k < 1 || k > OPLORA_MOST_RANK) return -1;
    return H + oplora_lean_sums((int)d, (int)k);
}

/* One row of H partial sums for each chunk, and behind them d (H) and dz (Z). */
int64_t oplora_generate_backward_workspace_bytes(int64_t H, int64_t Z, int64_t N) {
    int64_t numbers;
    if (oplora_size(H, Z, N) < 0 || __builtin_mul_overflow(backward_chunks(N) + 1, H, &numbers) ||
        __builtin_add_overflow(numbers, Z, &numbers) ||
        __builtin_mul_overflow(numbers, (int64_t)sizeof(double), &numbers))
        return -1;
    return numbers;
}

int64_t oplora_lean_numbers(int64_t H, int64_t Z, int64_t N, int64_t d, int64_t k) {
    oplora_lean_layout layout;
    return oplora_lean_lay_out(H, Z, N, d, k, &layout) ? layout.numbers : -1;
}

int64_t oplora_lean_moments(int64_t H, int64_t Z, int64_t N, int64_t d, int64_t k) {
    oplora_lean_layout layout;
    return oplora_lean_lay_out(H, Z, N, d, k, &layout) ? layout.moments : -1;
}
