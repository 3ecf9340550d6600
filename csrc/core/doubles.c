/* The sources that are written for any number type, in double: see number.h. */
#define OPLORA_DOUBLES

#include "adamw_exact.c"
#include "adamw_lean.c"
#include "adamw_rate.c"
#include "exact_hidden.c"
#include "exact_plan.c"
#include "exact_rows.c"
#include "generate.c"
#include "generate_backward.c"
#include "hidden.c"
#include "lean_hidden.c"
#include "lean_plan.c"
#include "lean_rows.c"
#include "lean_solve.c"
#include "merge_tiles.c"
#include "start.c"
