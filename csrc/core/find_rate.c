/* find_rate: what all layers' gradients tell, added up in order, and the rate that follows: ../shared/find_rate.h. */
#include "../shared/find_rate.h"

#include "dispatch.h"

#include <string.h>

static OPLORA_BODY oplora_status find_rate(double *found, const double *heard, int64_t n_layers) {
    OPLORA_RETURN_IF(n_layers < 0, OPLORA_ESIZE);
    OPLORA_RETURN_IF(!found || (n_layers > 0 && !heard), OPLORA_ENULL);
    double sums[3] = {0};
    for (int64_t i = 0; i < 3 * n_layers; i++) sums[i % 3] += heard[i];
    oplora_found f;
    memcpy(&f, found, sizeof f);
    oplora_find(&f, sums[0], sums[1], sums[2]);
    memcpy(found, &f, sizeof f);
    return OPLORA_OK;
}

oplora_status oplora_find_rate(double *found, const double *heard, int64_t n_layers) {
    OPLORA_IN_MODE(OPLORA_GRADUAL, find_rate(found, heard, n_layers)); /* a GPU's doubles underflow gradually */
}
