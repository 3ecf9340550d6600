/* Which random number is whose; see random.c. Internal. */
#ifndef OPLORA_RANDOM_H
#define OPLORA_RANDOM_H

#include "oplora_core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The stream of one tensor of one layer. W2 has one for each range of its rows that starts at random, as the entries of
 * a stream count from 0: OPLORA_W2_TENSOR + OPLORA_RANGE_TENSORS * i for the i-th. */
typedef struct {
    uint64_t seed;
    uint32_t layer, tensor;
} oplora_stream;

enum { OPLORA_W2_TENSOR = 0, OPLORA_W1_TENSOR = 1, OPLORA_Z_TENSOR = 2, OPLORA_SIGN_TENSOR = 3, OPLORA_ROUNDING = 4 };
enum { OPLORA_RANGE_TENSORS = 8 };
static const double OPLORA_UNIFORM_UNIT = 0x1p-16; /* a uniform number is an odd multiple of this */

double oplora_start_bound(oplora_start_kind kind, int64_t fan_in);
oplora_stream oplora_w2_stream(uint64_t seed, uint32_t layer, oplora_start_kind kind, int64_t range);
void oplora_start_latent_f32(uint64_t seed, uint32_t layer, int64_t Z, double deviation, float *z);
void oplora_start_latent_f64(uint64_t seed, uint32_t layer, int64_t Z, double deviation, double *z);

#ifdef __cplusplus
}
#endif

#endif
