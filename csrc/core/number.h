/* T, the type that a source's numbers have, and TY(name), name_f32 or name_f64. A source that includes this compiles as it
 * stands, in float; doubles.c compiles all of them once more, in double. Headers that need both types at once include
 * each_type.h. Internal. */
#ifndef OPLORA_NUMBER_H
#define OPLORA_NUMBER_H

#ifdef OPLORA_DOUBLES
#define T double
#define TY(name) name##_f64
#else
#define T float
#define TY(name) name##_f32
#endif

#endif
