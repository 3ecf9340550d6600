/* Low-rank truncation of a product known by its small side; see lowrank.c. Internal. */
#ifndef OPLORA_LOWRANK_H
#define OPLORA_LOWRANK_H

#include "oplora_core.h"

enum { OPLORA_MOST_BASIS = 2 * OPLORA_MOST_RANK + 1 };

double oplora_truncate(const double *gram, int p, const double *K, int64_t n, int rank, double *rotation,
                       double *directions);

#endif
