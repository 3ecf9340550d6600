/* averages: what share the newest number has in the averages of state rate. Scalar maths that both compilers see, in
 * double and with nothing fused. */
#ifndef OPLORA_AVERAGES_H
#define OPLORA_AVERAGES_H

#include "shared.h"

/* c: x <- (1 - c) x + c v, the average of v that weighs the latest ninth of all steps most. */
OPLORA_SHARED double oplora_newest_of_factors(double step) { return 9 / (step + 8); }

/* m: s <- (1 - m) s + m g^2. The plain mean's, 1 / step, and 1 - beta2 from where that is larger. While a gradient may
 * grow from nothing, in the first `early` steps, its mean remembers the latest quarter; then it forgets nothing more. */
OPLORA_SHARED double oplora_newest_of_squares(double beta2, double step, int grows) {
    const double early = 20, of_grown = step < early ? (step + 3) / 4 : step - early + (early + 3) / 4;
    const double share = 1 / (grows ? of_grown : step);
    return share > 1 - beta2 ? share : 1 - beta2;
}

#endif
