/* find_rate: the learning rate, from what a step's gradients tell. Scalar maths that both compilers see, in double and
 * with nothing fused, so that a CPU and a GPU find the same bits. docs/rate.md derives it. */
#ifndef OPLORA_FIND_RATE_H
#define OPLORA_FIND_RATE_H

#include "shared.h"

#include <stdint.h>

/* As the tensor `found` of OPLORA_FOUND numbers. signal, scale and recent are means that forget half at every step; pace is
 * the search's, in the logarithm of the rate; turned is the step at which the signal was first above 0, or 0. */
typedef struct {
    double rate, signal, scale, recent, steps, pace, turned;
} oplora_found;

/* exp(x) for |x| <= 1, to a few units in the last place: libraries differ in the last bit. */
OPLORA_SHARED double oplora_exp_of_small(double x) {
    double y = 1;
    for (int k = 20; k > 0; k--) y = 1 + x * y / k;
    return y;
}

enum { OPLORA_GROUP_NUMBERS = 7 }; /* of a parameter group, the first of which is its lr */

/* The highest lr of all groups, above 0. */
OPLORA_SHARED double oplora_highest_lr(const double *groups, int64_t n_groups) {
    double highest = 2.2250738585072014e-308;
    for (const double *lr = groups; lr < groups + n_groups * OPLORA_GROUP_NUMBERS; lr += OPLORA_GROUP_NUMBERS)
        if (!(*lr <= highest)) highest = *lr; /* NaN too */
    return highest;
}

/* What a layer tells of the rate: of its report <g, v - start>, <g, u> times its lr over the highest, and <g, v - p>. */
OPLORA_SHARED void oplora_hear(const double *report, double lr, double highest, double heard[3]) {
    heard[0] = report[2];
    heard[1] = report[3] * (lr / highest);
    heard[2] = report[4];
}

/* signal = <g, v - start>, the derivative of the loss in the logarithm of h: below 0 a higher rate would have led lower.
 * gain = <g, u>, by how much a step at rate 1 lowers the loss to first order. recent = <g, v - p>, the signal of the latest
 * steps alone: the rate falls where these lead uphill too. Where they lead down, what went too far is being mended, and that
 * takes steps. In a long run a signal of 0 asks for too little: then v strays from the start as a random walk does. At half
 * of the scale it gets no farther, whatever the rate. The aim is in between. */
OPLORA_SHARED void oplora_find(oplora_found *f, double signal, double gain, double recent) {
    const double fastest = 0.7, growth = 4, decay = 2, steepness = 2; /* docs/rate.md, "The rule" */
    const double search = 200, long_run = 0.4;                        /* "The long run" */
    const double most = 10; /* for a loss that falls without end: at higher rates weight decay swings */
    const double last = f->signal;
    f->signal = (last + signal) / 2;
    f->scale = (f->scale + f->rate * gain) / 2;
    f->recent = (f->recent + recent) / 2;
    if (last * f->signal < 0) f->pace /= 2;
    const double aim = f->steps > search ? long_run * (1 - search / f->steps) : 0;
    double slope = f->scale > 0 ? steepness * (f->signal / f->scale - aim) : 0;
    slope = slope > 1 ? 1 : slope < -1 ? -1 : slope == slope ? slope : 0; /* of sums beyond double's range: none */
    if (slope > 0 && f->recent < 0) slope = 0;
    if (f->steps > 0) { /* before, v is the start */
        const double upwards = f->pace > growth / f->steps ? f->pace : growth / f->steps;
        const double pace = slope < 0 ? upwards : decay / f->steps;
        f->rate *= oplora_exp_of_small(-slope * (pace < fastest ? pace : fastest));
        if (f->rate > most) f->rate = most;
    }
    f->steps += 1;
    if (f->turned == 0 && f->signal > 0) f->turned = f->steps;
}

#endif
