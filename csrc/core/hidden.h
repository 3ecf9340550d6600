/* The hidden layer, shared by every operation on a generator, and how those walk W2's columns. Internal; see hidden.c. */
#ifndef OPLORA_HIDDEN_H
#define OPLORA_HIDDEN_H

#include <stdint.h>

enum {
    COLUMN_BLOCK = 2048,   /* rows of W2 at a time: their part of v or g stays in the first-level cache */
    COLUMN_GROUP = 64,     /* columns pointed at from the stack at a time */
    BACKWARD_CHUNK = 16384 /* rows whose sums generate_backward keeps apart */
};

static inline int64_t backward_chunks(int64_t N) { return (N + BACKWARD_CHUNK - 1) / BACKWARD_CHUNK; }

void oplora_hidden_f32(const float *z, const float *W1, const float *c1, int64_t H, int64_t Z, float *h);
void oplora_hidden_f64(const double *z, const double *W1, const double *c1, int64_t H, int64_t Z, double *h);
void oplora_hidden_latent_gradient_f32(const double *d, const float *W1, int64_t H, int64_t Z, double *dz);
void oplora_hidden_latent_gradient_f64(const double *d, const double *W1, int64_t H, int64_t Z, double *dz);

#endif
