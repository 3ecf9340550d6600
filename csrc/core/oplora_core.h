/* oplora core: the generator's maths in plain C11. No torch, no Python, no allocation, no threads of its own.
 *
 * A layer's generator (OP-LoRA, arXiv 2412.10362) predicts the entries v of the layer's factors:
 *
 *     h = ReLU(W1 z + c1)     z (Z), W1 (H, Z), c1 (H)
 *     v = W2 h + c2           W2 (N, H), c2 (N), N = the number of entries of all factors of the layer
 *     v = [lora_A (r, in_features) | lora_B (out_features, r)], each row-major
 *
 * The parameters of one generator lie in one flat array of oplora_size(H, Z, N) numbers, in this order:
 *
 *     W2 as H contiguous columns of N: W2[n, j] at [j * N + n];  c2;  W1 row-major;  c1;  z
 *
 * and so do AdamW's two moments. Every function exists for float (_f32) and double (_f64), checks its arguments,
 * returns a status and keeps no pointer. Results are the same bits for any number of threads and on every
 * instruction set: work is cut into fixed chunks, and sums run in fixed lanes. They are so whatever the caller's
 * floating-point mode is, which is restored: subnormal numbers count as zero, but for a checkpoint's (merge.c).
 *
 * Finite gradients of any size leave every state finite: to a step an entry counts as at most 2^63 (double: 2^480). */
#ifndef OPLORA_CORE_H
#define OPLORA_CORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grouped by tens, never renumbered. */
typedef enum {
    OPLORA_OK = 0,
    OPLORA_ENULL = 10,     /* a pointer that must be given is NULL */
    OPLORA_ESIZE = 11,     /* a size is below 1, or sizes do not add up */
    OPLORA_EOVERFLOW = 12, /* a product of sizes passes 2^63 */
    OPLORA_EVALUE = 13,    /* a number outside its range: a step count below 1, beta outside [0, 1), ... */
    OPLORA_EDTYPE = 14,    /* a dtype that the operation does not know */
    OPLORA_ERANGES = 15,   /* more than OPLORA_MOST_RANGES ranges of a layer's rows start at random */
    OPLORA_EPARALLEL = 20, /* the caller's parallel_for failed */
    OPLORA_ENONFINITE = 30 /* a gradient holds NaN or infinity; nothing was changed */
} oplora_status;

/* One sentence for a status. */
const char *oplora_strerror(oplora_status status);

/* Runs fn over [begin, end) in ranges of at least `grain`, on the caller's own threads, and returns 0.
 * torch_parallel_for has exactly this type. NULL means: serially. */
typedef void (*oplora_range_fn)(int64_t begin, int64_t end, void *context);
typedef int32_t (*oplora_parallel_fn)(int64_t begin, int64_t end, int64_t grain, oplora_range_fn fn, void *context);

/* "base", "avx2" or "avx512": chosen once from the processor. OPLORA_ISA=base|avx2|avx512 lowers it.
 * On aarch64 "base" is the NEON build. */
const char *oplora_isa(void);

/* ---- sizes ---- */

/* Numbers in one generator: H N + N + H Z + H + Z; -1 if a size is below 1 or the sum passes 2^63 - 1. */
int64_t oplora_size(int64_t H, int64_t Z, int64_t N);

/* ---- start.c: the seeded start ---- */

/* Philox 4x32-10 (Salmon et al., SC 2011): four random words from a counter and a key. */
void oplora_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* Rows [begin, end) of W2 that start at random; all other rows start at zero. */
enum { OPLORA_MOST_RANGES = 31 }; /* of one layer */
typedef struct {
    int64_t begin, end;
} oplora_rows;

/* How the rows of W2 that are random start: U(-1/sqrt(H), 1/sqrt(H)) as in the paper, or +-1/sqrt(3 H), which has the
 * same variance and takes one random bit. */
typedef enum { OPLORA_UNIFORM = 0, OPLORA_SIGN = 1 } oplora_start_kind;

/* Writes the paper's start (appendix C.1) into flat parameters that are all zero: the random rows of W2 as `kind` says,
 * W1 from U(-1/sqrt(Z), 1/sqrt(Z)), z from N(0, latent_std^2). The rest stays zero and untouched, so pages of it need
 * not be resident. The numbers depend on (seed, layer, tensor, row, column) alone: the same for every dtype up to
 * rounding, and for every state. */
oplora_status oplora_start_f32(float *parameters, int64_t H, int64_t Z, int64_t N, uint64_t seed, uint32_t layer,
                               double latent_std, oplora_start_kind kind, const oplora_rows *random, int64_t n_random,
                               oplora_parallel_fn par);
oplora_status oplora_start_f64(double *parameters, int64_t H, int64_t Z, int64_t N, uint64_t seed, uint32_t layer,
                               double latent_std, oplora_start_kind kind, const oplora_rows *random, int64_t n_random,
                               oplora_parallel_fn par);

/* ---- generate.c, generate_backward.c: one generator, in pieces where the caller has them ---- */

/* How W2 lies in memory: as H columns of N (as in the flat parameters), or row-major (N, H). */
typedef enum { OPLORA_COLUMNS = 0, OPLORA_ROWS = 1 } oplora_layout;

/* v = W2 h + c2, and h (H) itself, which the caller keeps or drops. Columns of units that are off are not read. */
oplora_status oplora_generate_f32(const float *z, const float *W1, const float *c1, const float *W2, const float *c2,
                                  oplora_layout layout, int64_t H, int64_t Z, int64_t N, float *h, float *v,
                                  oplora_parallel_fn par);
oplora_status oplora_generate_f64(const double *z, const double *W1, const double *c1, const double *W2,
                                  const double *c2, oplora_layout layout, int64_t H, int64_t Z, int64_t N, double *h,
                                  double *v, oplora_parallel_fn par);

/* From g = dL/dv: dz (Z), dW1 (H, Z), dc1 (H), and h (H), with which dW2 = g h^T is rank one; dc2 = g.
 * workspace: oplora_generate_backward_workspace_bytes(H, Z, N) bytes, aligned for double. */
int64_t oplora_generate_backward_workspace_bytes(int64_t H, int64_t Z, int64_t N);
oplora_status oplora_generate_backward_f32(const float *g, const float *z, const float *W1, const float *c1,
                                           const float *W2, oplora_layout layout, int64_t H, int64_t Z, int64_t N,
                                           float *dz, float *dW1, float *dc1, float *h, void *workspace,
                                           oplora_parallel_fn par);
oplora_status oplora_generate_backward_f64(const double *g, const double *z, const double *W1, const double *c1,
                                           const double *W2, oplora_layout layout, int64_t H, int64_t Z, int64_t N,
                                           double *dz, double *dW1, double *dc1, double *h, void *workspace,
                                           oplora_parallel_fn par);

/* ---- adamw_exact.c: AdamW on every generator of a model, fused with the next generation ---- */

/* AdamW's numbers for one layer's step, beside those that each of its factors has; `step` counts this layer's own steps
 * from 1. `weight_ratio` is the rate of W2's rows over that of the factor they make (its c2's), `hidden_lr` the rate of z,
 * W1 and c1. Weight decay is decoupled, as in torch.optim.AdamW: `weight_decay` is the hidden path's, which shrinks by
 * hidden_lr weight_decay. */
typedef struct {
    double weight_ratio, hidden_lr, beta1, beta2, eps, weight_decay;
    int64_t step;
} oplora_adamw;

/* Which rows of a factor are here, where processes divide it. Of the `rows` that it has as a whole these are runs of `run`
 * rows each: the first run begins with row `first`, and from one to the next are `stride` rows. Sums over rows leave out
 * a factor that does not `count`, as another process counts the same rows. */
typedef struct {
    int64_t rows, first, run, stride;
    int counts;
} oplora_place;

/* One factor tensor (lora_A or lora_B): its entries are the next `rows` rows of W2. `place` (or NULL: all are here) tells
 * which they are, where processes divide it. `g` is its gradient, `base` (or NULL) a kept start: the factor becomes
 * base + v. Its rows of c2 move at the rate `lr`, those of W2 at lr
 * weight_ratio, and both shrink by lr weight_decay a step. Lean state makes W2's start anew at every step, and needs to
 * know whether these rows are `random`: the i-th such factor of a layer is the i-th range of oplora_start. State rate
 * `listens` to some of the factors. */
typedef struct {
    int64_t rows;
    const float *g, *base;
    float *out;
    int random, listens;
    double lr, weight_decay;
    const oplora_place *place;
} oplora_factor_f32;
typedef struct {
    int64_t rows;
    const double *g, *base;
    double *out;
    int random, listens;
    double lr, weight_decay;
    const oplora_place *place;
} oplora_factor_f64;

/* One layer. decay (n_factors, H) and moving (H) keep what a column owes: while moving[j] is 0 column j of W2 has zero
 * moments and its true value is, in the rows of factor f, decay[f H + j] times the stored one, so weight decay on units
 * that never fired touches no memory. Start with all decay 1 and all moving 0.
 *
 * report (oplora_exact_report_size(H) numbers) is filled by each call:
 *     [0] ||g||^2   [1] how many entries of g are NaN or infinite   [2] ||dz||^2 + ||dW1||^2 + ||dc1||^2
 *     [3, 3 + H) h before the step   [3 + H, 3 + 2H) dL/dh, zero where the unit is off */
typedef struct {
    int64_t H, Z, N;
    float *parameters, *exp_avg, *exp_avg_sq;
    double *decay;
    uint8_t *moving;
    const oplora_factor_f32 *factors;
    int64_t n_factors;
    oplora_adamw adamw;
    double *report;
} oplora_exact_f32;
typedef struct {
    int64_t H, Z, N;
    double *parameters, *exp_avg, *exp_avg_sq;
    double *decay;
    uint8_t *moving;
    const oplora_factor_f64 *factors;
    int64_t n_factors;
    oplora_adamw adamw;
    double *report;
} oplora_exact_f64;

int64_t oplora_exact_report_size(int64_t H);

/* Bytes of scratch, aligned for double, that the calls below need for these layers; -1 for sizes that do not fit. */
int64_t oplora_exact_workspace_bytes_f32(const oplora_exact_f32 *layers, int64_t n_layers);
int64_t oplora_exact_workspace_bytes_f64(const oplora_exact_f64 *layers, int64_t n_layers);

/* Fills the reports and changes nothing else: what clipping and watching need. */
oplora_status oplora_exact_measure_f32(const oplora_exact_f32 *layers, int64_t n_layers, void *workspace,
                                       oplora_parallel_fn par);
oplora_status oplora_exact_measure_f64(const oplora_exact_f64 *layers, int64_t n_layers, void *workspace,
                                       oplora_parallel_fn par);

/* One step of all layers: AdamW on W2 and c2 straight from g and h, on z, W1 and c1 from dh = W2^T g, and the next
 * factors written to `out`. With `measured`, the reports hold what oplora_exact_measure found for these gradients
 * (perhaps times a clipping factor) and are not computed again. A gradient with NaN or infinity in any layer: every
 * report's [0] and [1] are filled, OPLORA_ENONFINITE is returned and nothing else is changed. */
oplora_status oplora_exact_step_f32(const oplora_exact_f32 *layers, int64_t n_layers, int measured, void *workspace,
                                    oplora_parallel_fn par);
oplora_status oplora_exact_step_f64(const oplora_exact_f64 *layers, int64_t n_layers, int measured, void *workspace,
                                    oplora_parallel_fn par);

/* Where processes divide the factors, a measurement is of the rows that are here. The caller adds [0], [1] and dL/dh of all
 * processes' reports up; this makes [2] of the sums, and the reports are those of the whole layers, for
 * oplora_exact_step with `measured`. Only whole layers may be stepped without. */
oplora_status oplora_exact_finish_f32(const oplora_exact_f32 *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par);
oplora_status oplora_exact_finish_f64(const oplora_exact_f64 *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par);

/* Writes the factors (base + v) from the parameters, with the bits that oplora_exact_step gave them. */
oplora_status oplora_exact_generate_f32(const oplora_exact_f32 *layers, int64_t n_layers, void *workspace,
                                        oplora_parallel_fn par);
oplora_status oplora_exact_generate_f64(const oplora_exact_f64 *layers, int64_t n_layers, void *workspace,
                                        oplora_parallel_fn par);

/* ---- adamw_lean.c: the same, with W2, its moments and W1's as low-rank factors ---- */

/* How lean state keeps moments: bfloat16, its bits; in the double twin double. */
typedef uint16_t oplora_moment_f32;
typedef double oplora_moment_f64;

/* One layer, with d = weight_rank and k = moment_rank, each in 1 .. 8. In this order,
 *
 *     numbers   U as d columns of N; U1 as d columns of H, W1 z + c1 (H); Q (d, H), B (k, H), r (H);
 *               Q1 (d, Z), B1 (k, Z), r1 (Z); z and its two moments (Z each)
 *     moments   A as k columns of N, m, S, R (N each); A1 as k columns of H, m1, S1, R1 (H each)
 *     scalars   s and the mean of R, for W2 and for W1
 *
 * adamw_lean.c says what they are. c2 is not stored: it is what the factors hold beyond the rest, so a factor is in-
 * and output, and whatever others add to it belongs to c2 from then on.
 *
 * report (OPLORA_LEAN_REPORT numbers) is filled by each call:
 *     [0] ||g||^2   [1] how many entries of g are NaN or infinite   [2] ||dz||^2 + ||dW1||^2 + ||dc1||^2
 *     [3] ||h||^2   [4] units that are on, both before the step
 *     [5] share of the first moment's energy that its truncation to rank k dropped, [6] of W2's change (rank d),
 *     [7], [8] the same of W1. A step writes these four, a measurement does not.
 * dh (H) is dL/dh, zero where the unit is off: written by a measurement, read by a step that was measured. */
enum { OPLORA_LEAN_REPORT = 9, OPLORA_MOST_RANK = 8 };
typedef struct {
    int64_t H, Z, N, weight_rank, moment_rank;
    uint64_t seed;
    uint32_t layer;
    oplora_start_kind start;
    float *numbers;
    oplora_moment_f32 *moments;
    double *scalars;
    const oplora_factor_f32 *factors;
    int64_t n_factors;
    oplora_adamw adamw;
    double *report, *dh;
} oplora_lean_f32;
typedef struct {
    int64_t H, Z, N, weight_rank, moment_rank;
    uint64_t seed;
    uint32_t layer;
    oplora_start_kind start;
    double *numbers;
    oplora_moment_f64 *moments;
    double *scalars;
    const oplora_factor_f64 *factors;
    int64_t n_factors;
    oplora_adamw adamw;
    double *report, *dh;
} oplora_lean_f64;

/* How many numbers and moments one layer has; -1 if a size or rank is out of range. */
int64_t oplora_lean_numbers(int64_t H, int64_t Z, int64_t N, int64_t weight_rank, int64_t moment_rank);
int64_t oplora_lean_moments(int64_t H, int64_t Z, int64_t N, int64_t weight_rank, int64_t moment_rank);
enum { OPLORA_LEAN_SCALARS = 4 };

/* The paper's start: z and W1 z into numbers that are all zero (as the moments must be), 1, 0, 1, 0 into the scalars, and
 * v into every factor's `out`: as the factors' values, or for the caller to find the base of those that keep theirs. */
oplora_status oplora_lean_start_f32(const oplora_lean_f32 *layer, double latent_std, oplora_parallel_fn par);
oplora_status oplora_lean_start_f64(const oplora_lean_f64 *layer, double latent_std, oplora_parallel_fn par);

/* Bytes of scratch, aligned for double, that the calls below need for these layers; -1 for sizes that do not fit. */
int64_t oplora_lean_workspace_bytes_f32(const oplora_lean_f32 *layers, int64_t n_layers);
int64_t oplora_lean_workspace_bytes_f64(const oplora_lean_f64 *layers, int64_t n_layers);

/* As oplora_exact_measure and oplora_exact_step. W2's start has one scale: random factors of a layer that shrink by
 * different lr weight_decay are OPLORA_EVALUE. */
oplora_status oplora_lean_measure_f32(const oplora_lean_f32 *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par);
oplora_status oplora_lean_measure_f64(const oplora_lean_f64 *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par);
oplora_status oplora_lean_step_f32(const oplora_lean_f32 *layers, int64_t n_layers, int measured, void *workspace,
                                   oplora_parallel_fn par);
oplora_status oplora_lean_step_f64(const oplora_lean_f64 *layers, int64_t n_layers, int measured, void *workspace,
                                   oplora_parallel_fn par);

/* The two halves of a measurement, or with `steps` of a step that was measured, for factors that processes divide. The first
 * changes nothing of a layer: it fills sums (oplora_lean_sums_size numbers a layer, one layer behind the other) over the
 * rows that are here, and those of a measurement [0] and [1] of the reports. The caller adds both up over all processes;
 * then all that the second makes of them, and of what every process has (all but U, A, m, S and R), is the same
 * everywhere. A measurement fills of a layer's sums the last weight_rank + H, a step all others. */
int64_t oplora_lean_sums_size(int64_t H, int64_t weight_rank, int64_t moment_rank); /* -1 if one is out of range */
oplora_status oplora_lean_reduce_f32(const oplora_lean_f32 *layers, int64_t n_layers, int steps, double *sums,
                                     void *workspace, oplora_parallel_fn par);
oplora_status oplora_lean_reduce_f64(const oplora_lean_f64 *layers, int64_t n_layers, int steps, double *sums,
                                     void *workspace, oplora_parallel_fn par);
oplora_status oplora_lean_finish_f32(const oplora_lean_f32 *layers, int64_t n_layers, int steps, double *sums,
                                     void *workspace, oplora_parallel_fn par);
oplora_status oplora_lean_finish_f64(const oplora_lean_f64 *layers, int64_t n_layers, int steps, double *sums,
                                     void *workspace, oplora_parallel_fn par);

/* ---- adamw_rate.c: one hidden unit for all layers, which learns their rate; the factors are averages ---- */

/* One layer of N entries. `generated` is v, `exp_avg_sq` the second moment of its gradient. A factor `out` is in- and
 * output, and moves at the rate `rate` times its lr; `base` (or NULL, for zero) is where a factor that `listens` started.
 * Of adamw, weight_ratio and hidden_lr mean nothing here.
 *
 * report (OPLORA_RATE_REPORT numbers) is filled by a measurement:
 *     [0] ||g||^2   [1] how many entries of g are NaN or infinite
 *     [2] <g, v - base>, [3] <g, u> and [4] <g, v - p> over the factors p that listen, u being the step's direction at
 *     rate 1 */
enum { OPLORA_RATE_REPORT = 5 };
typedef struct {
    int64_t N;
    float *generated, *exp_avg_sq;
    const oplora_factor_f32 *factors;
    int64_t n_factors;
    oplora_adamw adamw;
    double rate, *report;
} oplora_rate_f32;
typedef struct {
    int64_t N;
    double *generated, *exp_avg_sq;
    const oplora_factor_f64 *factors;
    int64_t n_factors;
    oplora_adamw adamw;
    double rate, *report;
} oplora_rate_f64;

/* Bytes of scratch, aligned for double, that the calls below need for these layers; -1 for what they would refuse. */
int64_t oplora_rate_workspace_bytes_f32(const oplora_rate_f32 *layers, int64_t n_layers);
int64_t oplora_rate_workspace_bytes_f64(const oplora_rate_f64 *layers, int64_t n_layers);

/* Fills the reports and changes nothing else: the caller finds the rate by them. A gradient with NaN or infinity in any
 * layer is OPLORA_ENONFINITE. */
oplora_status oplora_rate_measure_f32(const oplora_rate_f32 *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par);
oplora_status oplora_rate_measure_f64(const oplora_rate_f64 *layers, int64_t n_layers, void *workspace,
                                      oplora_parallel_fn par);

/* Moves the rate by what the layers' gradients tell: csrc/shared/find_rate.h.
 *     found (OPLORA_FOUND)   as oplora_found there
 *     heard (n_layers, 3)    of every layer <g, v - start>, <g, u> and <g, v - p>, which are added in order */
enum { OPLORA_FOUND = 7 };
oplora_status oplora_find_rate(double *found, const double *heard, int64_t n_layers);

/* One step of all layers, whose reports must have been measured. Where one tells of NaN or infinity nothing is changed. */
oplora_status oplora_rate_step_f32(const oplora_rate_f32 *layers, int64_t n_layers, void *workspace,
                                   oplora_parallel_fn par);
oplora_status oplora_rate_step_f64(const oplora_rate_f64 *layers, int64_t n_layers, void *workspace,
                                   oplora_parallel_fn par);

/* ---- merge.c: W <- W + scaling B A on a checkpoint's own numbers ---- */

typedef enum { OPLORA_F32 = 0, OPLORA_F16 = 1, OPLORA_BF16 = 2, OPLORA_F64 = 3 } oplora_dtype;

/* W (out_features, in_features), or with `transposed` (in_features, out_features) as GPT-2's Conv1D keeps it,
 * row-major, gets scaling * B A for A (r, in_features), B (out_features, r). Sums in float (double for OPLORA_F64),
 * one rounding to nearest even at the end. W need not be aligned.
 * workspace: oplora_merge_workspace_bytes(columns of W) bytes, aligned for double. */
int64_t oplora_merge_workspace_bytes(int64_t columns);
oplora_status oplora_merge(void *W, oplora_dtype dtype, const float *A, const float *B, double scaling,
                           int64_t out_features, int64_t in_features, int64_t r, int transposed, void *workspace);

/* values[i] rounded once to dtype, for whole tensors that an adapter replaces (biases, modules_to_save). */
oplora_status oplora_round(const float *values, int64_t n, oplora_dtype dtype, void *out);

/* ---- fingerprint.c: whether somebody wrote into a tensor ---- */

typedef struct {
    const void *data;
    int64_t bytes;
} oplora_bytes;

/* out[i]: a 64-bit hash of tensor i's bytes, which changes with the value and the place of every one of them. The same
 * for any number of threads; not for comparing machines of another byte order.
 * workspace: oplora_fingerprint_workspace_bytes(tensors, n) bytes, aligned for uint64_t; -1 for sizes below 0. */
int64_t oplora_fingerprint_workspace_bytes(const oplora_bytes *tensors, int64_t n);
oplora_status oplora_fingerprint(const oplora_bytes *tensors, int64_t n, uint64_t *out, void *workspace,
                                 oplora_parallel_fn par);

#ifdef __cplusplus
}
#endif
#endif
