/* The sources that are written for any number type, in double: see number.h. */
#define OPLORA_DOUBLES

#include "adamw_exact.c"
#include "adamw_lean.c"
#include "adamw_rate.c"
#include "generate.c"
#include "generate_backward.c"
#include "hidden.c"
#include "merge_tiles.c"
#include "start.c"
