/* The hidden layer, shared by every operation on a generator. Internal; see hidden.c. */
#ifndef T
#ifndef OPLORA_HIDDEN_H
#define OPLORA_HIDDEN_H

#include "oplora_core.h"

#define OPLORA_TEMPLATE "hidden.h"
#include "each_type.h"

#endif
#else

void TY(oplora_hidden)(const T *z, const T *W1, const T *c1, int64_t H, int64_t Z, T *h);
void TY(oplora_hidden_latent_gradient)(const double *d, const T *W1, int64_t H, int64_t Z, double *dz);

#endif
