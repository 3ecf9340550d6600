/* What the steps of all states share: pieces of the caller's workspace, and the check of AdamW's numbers. Internal. */
#ifndef OPLORA_WORKSPACE_H
#define OPLORA_WORKSPACE_H

#include "oplora_core.h"

#include <math.h>

/* Hands out pieces of the caller's workspace; with memory NULL it only counts. */
typedef struct {
    char *memory;
    int64_t used; /* -1 once the count passes 2^63 */
} arena;

static inline void *take(arena *a, int64_t count, int64_t size) {
    int64_t bytes;
    if (a->used < 0 || count < 0 || __builtin_mul_overflow(count, size, &bytes) ||
        __builtin_add_overflow(bytes, 63, &bytes) || __builtin_add_overflow(a->used, bytes & ~(int64_t)63, &bytes)) {
        a->used = -1;
        return NULL;
    }
    void *const piece = a->memory ? a->memory + a->used : NULL;
    a->used = bytes;
    return piece;
}

static inline int oplora_adamw_is_valid(const oplora_adamw *a) {
    return isfinite(a->weight_ratio) && isfinite(a->hidden_lr) && a->beta1 >= 0 && a->beta1 < 1 && a->beta2 >= 0 &&
           a->beta2 < 1 && a->eps >= 0 && isfinite(a->eps) && isfinite(a->weight_decay) && a->step >= 1;
}

#endif
