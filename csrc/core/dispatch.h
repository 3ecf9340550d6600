/* The table of inner loops for the processor at hand; see kernels.h for what each computes. Internal. */
#ifndef OPLORA_DISPATCH_H
#define OPLORA_DISPATCH_H

#include "../shared/random.h"
#include "../shared/rows.h"
#include "mode.h"
#include "workspace.h"

#include <math.h>

#define OPLORA_TEMPLATE "../core/each_dispatch.h"
#include "../shared/each_type.h"

#define OPLORA_KEY_STEP 0x9E3779B185EBCA87u /* between the keys of blocks that follow each other in a fingerprint */

#endif
