/* tasks: how exact state and state rate cut a model's rows into pieces of work, TASK_ROWS rows of one factor. */
#ifndef OPLORA_TASKS_H
#define OPLORA_TASKS_H

#include "shared.h"

#include <stdint.h>

enum { TASK_ROWS = 2048 }; /* what is made of them stays in the first-level cache */

/* A factor's place in the list of all tasks: its first task, and its first row in its layer. */
typedef struct {
    int64_t first_task, layer, factor, row;
} oplora_span;

OPLORA_SHARED int64_t tasks_in(int64_t rows) { return (rows + TASK_ROWS - 1) / TASK_ROWS; }

/* The span that a task belongs to. */
static inline int64_t span_of(const oplora_span *spans, int64_t n_spans, int64_t task) {
    int64_t low = 0, high = n_spans;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (spans[middle].first_task <= task)
            low = middle;
        else
            high = middle;
    }
    return low;
}

#endif
