/* Includes OPLORA_TEMPLATE once for each number type, with
 *     T        float or double
 *     TY(name) name_f32 or name_f64
 * for headers that declare both types, and for the inner loops. A source of one type includes number.h. */
#pragma push_macro("T")
#pragma push_macro("TY")
#undef T
#undef TY
#define TY_JOIN_(name, suffix) name##_##suffix
#define TY_JOIN(name, suffix) TY_JOIN_(name, suffix)
#define TY(name) TY_JOIN(name, TNAME)

#define T float
#define TNAME f32
#include OPLORA_TEMPLATE
#undef T
#undef TNAME

#define T double
#define TNAME f64
#include OPLORA_TEMPLATE
#undef T
#undef TNAME

#undef TY
#undef TY_JOIN
#undef TY_JOIN_
#undef OPLORA_TEMPLATE
#pragma pop_macro("TY")
#pragma pop_macro("T")
