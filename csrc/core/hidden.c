/* hidden: h = ReLU(W1 z + c1) for z (Z), W1 (H, Z), c1 (H), and the way back to z.
 *
 * H Z products, a few thousand: nothing beside the N H of W2. Sums in double for both types, so h is correctly
 * rounded but for the last step, and all operations that need h get the same bits. */
#include "hidden.h"

#include "dispatch.h"
#include "number.h"

void TY(oplora_hidden)(const T *z, const T *W1, const T *c1, int64_t H, int64_t Z, T *h) {
    for (int64_t j = 0; j < H; j++) {
        const T pre = (T)(TY(oplora_dot_double)(W1 + j * Z, z, Z) + c1[j]);
        h[j] = pre <= 0 ? 0 : pre; /* NaN stays, as in torch */
    }
}

/* dz = W1^T d for d = dL/d(W1 z + c1). */
void TY(oplora_hidden_latent_gradient)(const double *d, const T *W1, int64_t H, int64_t Z, double *restrict dz) {
    for (int64_t i = 0; i < Z; i++) dz[i] = 0;
    for (int64_t j = 0; j < H; j++) {
        if (d[j] == 0) continue; /* the unit is off */
        for (int64_t i = 0; i < Z; i++) dz[i] += d[j] * W1[j * Z + i];
    }
}
