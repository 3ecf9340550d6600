/* The core's truncations against the best that there is. Prints a digest of the results' bits: equal for every
 * OPLORA_ISA. */
#include "check.h"
#include "core_check.h"
#include "lowrank.h"
#include "svd.h"

enum { ROWS = 40, COLUMNS = 30, MOST = OPLORA_MOST_BASIS };

/* ||M||^2 less the `rank` largest squared singular values; M is destroyed. */
static double best_residual(double *M, int columns, int rank) {
    double square[COLUMNS], sum = 0;
    make_orthogonal(M, columns, ROWS, NULL);
    for (int j = 0; j < columns; j++) {
        int at = j;
        const double new = dot(M + j * ROWS, M + j * ROWS, ROWS);
        for (; at > 0 && square[at - 1] < new; at--) square[at] = square[at - 1];
        square[at] = new;
    }
    for (int j = rank; j < columns; j++) sum += square[j];
    return sum;
}

/* X (ROWS, p), K (p, n), both columns and rows scaled; X of rank x_rank, the rows of K apart by `apart`. */
static void test_truncate(int p, int n, int rank, const double *x_scale, const double *k_scale, int x_rank,
                          double apart) {
    double X[MOST][ROWS], K[MOST * COLUMNS] = {0}, M[COLUMNS][ROWS], gram[MOST * MOST] = {0};
    double rotation[MOST * OPLORA_MOST_RANK], directions[OPLORA_MOST_RANK * COLUMNS], common[COLUMNS];
    double total = 0, residual = 0;
    for (int j = 0; j < n; j++) common[j] = noise() * (1 - apart);
    for (int a = 0; a < p; a++) {
        for (int i = 0; i < ROWS; i++) X[a][i] = a < x_rank ? noise() * x_scale[a] : X[a % x_rank][i] * (a + 1);
        for (int j = 0; j < n; j++) K[a * n + j] = (common[j] + apart * noise()) * k_scale[a];
    }
    for (int a = 0; a < p; a++)
        for (int b = 0; b < p; b++) gram[a * p + b] = dot(X[a], X[b], ROWS);
    const double dropped = oplora_truncate(gram, p, K, n, rank, rotation, directions);
    add_to_digest(rotation, (size_t)(p * rank) * sizeof *rotation);
    add_to_digest(directions, (size_t)(rank * n) * sizeof *directions);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < ROWS; i++) {
            double kept = 0;
            M[j][i] = 0;
            for (int a = 0; a < p; a++) {
                M[j][i] += X[a][i] * K[a * n + j];
                for (int r = 0; r < rank; r++) kept += X[a][i] * rotation[a * rank + r] * directions[r * n + j];
            }
            total += M[j][i] * M[j][i];
            residual += (M[j][i] - kept) * (M[j][i] - kept);
        }
    const double best = best_residual(&M[0][0], n, rank);
    CHECK(residual <= best + 1e-11 * total);
    CHECK(fabs(dropped * total - residual) <= 1e-11 * total && dropped >= 0);
    const int most = x_rank < n ? x_rank : n;
    for (int r = 0; r < rank; r++)
        for (int q = 0; q <= r; q++) {
            const double product = dot(directions + r * n, directions + q * n, n);
            CHECK(fabs(product - (q == r)) < 1e-12 || (q == r && product == 0 && r >= most));
        }
}

static void test_truncations(void) {
    static const double even[MOST] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    static const double graded[MOST] = {1e12, 1, 1e-12, 1e6, 1e-6, 1, 1, 1e3, 1e-9, 1e9, 1, 2, 3, 1e-3, 1e4, 1e-4, 7};
    static const int ps[] = {1, 2, 3, 4, 5, 7, 12, MOST}, ns[] = {1, 2, 7, COLUMNS};
    double inverse[MOST];
    for (int i = 0; i < MOST; i++) inverse[i] = 1 / graded[i];
    for (size_t i = 0; i < sizeof ps / sizeof *ps; i++)
        for (size_t j = 0; j < sizeof ns / sizeof *ns; j++)
            for (int rank = 1; rank <= ps[i] && rank <= OPLORA_MOST_RANK; rank++) {
                const int p = ps[i], n = ns[j];
                test_truncate(p, n, rank, even, even, p, 1);
                test_truncate(p, n, rank, graded, inverse, p, 1); /* all count, though X and K are scaled badly */
                test_truncate(p, n, rank, even, even, (p + 1) / 2, 1);
                test_truncate(p, n, rank, graded, inverse, 1, 1);
                test_truncate(p, n, rank, even, even, p, 1e-5); /* as while h hardly moves */
            }
    double gram[9] = {0}, K[3 * COLUMNS], rotation[6], directions[2 * COLUMNS];
    for (int i = 0; i < 3 * COLUMNS; i++) K[i] = noise();
    CHECK(oplora_truncate(gram, 3, K, COLUMNS, 2, rotation, directions) == 0); /* X is zero: nothing is kept, no NaN */
    for (int i = 0; i < 6; i++) CHECK(rotation[i] == 0);
    for (int i = 0; i < 2 * COLUMNS; i++) CHECK(directions[i] == 0);
    for (int i = 0; i < 3; i++) gram[4 * i] = 1;
    memset(K, 0, sizeof K); /* and K zero */
    CHECK(oplora_truncate(gram, 3, K, COLUMNS, 2, rotation, directions) == 0);
    for (int i = 0; i < 2 * COLUMNS; i++) CHECK(directions[i] == 0);
    /* one direction is much larger than the others, which are still found, and in the order of their size */
    for (int a = 0; a < 3; a++)
        for (int j = 0; j < 3; j++) K[a * 3 + j] = a == j ? pow(10, -2 * a) : 0;
    double three[9];
    const double dropped = oplora_truncate(gram, 3, K, 3, 2, rotation, three);
    CHECK(fabs(dropped - 1e-8 / (1 + 1e-4 + 1e-8)) < 1e-15);
    CHECK(fabs(fabs(three[0]) - 1) < 1e-15 && fabs(fabs(three[4]) - 1) < 1e-12);
}

int main(void) {
    noise_state = 1;
    test_truncations();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}
