/* rows: one entry's step in every state: AdamW, a row of lean state, state rate. each_rows.h has the maths, for float and
 * double. */
#ifndef OPLORA_SHARED_ROWS_H
#define OPLORA_SHARED_ROWS_H

#include "../core/oplora_core.h"
#include "averages.h"
#include "rounding.h"
#include "shared.h"

#include <math.h>

/* What an entry of a gradient, or of what a step makes of it, counts as at most: its square, and sums of such squares, lie
 * within the range of their type. So no finite gradient makes a second moment infinite, which would stay so for good. The
 * step is no shorter for it, as AdamW divides by the root of that moment. */
static const float oplora_most_gradient_f32 = 0x1p63f;
static const double oplora_most_gradient_f64 = 0x1p480;

/* What eps is at least. The square of a gradient below it is zero, and so is the second moment: by less, a step would be as
 * long as eps is small, and by 0 NaN where there was no gradient yet. Other second moments have larger roots. */
static const double oplora_least_eps_f32 = 0x1p-63;
static const double oplora_least_eps_f64 = 0x1p-511;

OPLORA_SHARED float oplora_root_f32(float x) { return sqrtf(x); }
OPLORA_SHARED double oplora_root_f64(double x) { return sqrt(x); }

#define OPLORA_TEMPLATE "each_rows.h"
#include "each_type.h"

#endif
