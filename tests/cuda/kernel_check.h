// What the tests of kernels share: checks that are counted, bits that are compared, and runs in every order of threads.
#pragma once

#include "cuda_on_cpu.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

inline int failures = 0, checks = 0;

inline void check(bool good, const std::string &what) {
    checks++;
    if (!good) failures++, printf("FAILED: %s\n", what.c_str());
}

// Whether two vectors have the same bits; else `where` tells the first place.
template <class T> bool same(const std::vector<T> &a, const std::vector<T> &b, const char *name, std::string *where) {
    for (size_t i = 0; i < a.size(); i++)
        if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0) {
            char text[200];
            snprintf(text, sizeof text, "%s[%zu of %zu] is %.9g, the core's %.9g", name, i, a.size(),
                     static_cast<double>(b[i]), static_cast<double>(a[i]));
            *where = text;
            return false;
        }
    return true;
}

// The rest of main: run(slow) in three orders of threads, then `others`, then the sum. argv[1] names the build; all but
// "values" are slow.
template <class Run, class Others> int in_every_order(int argc, char **argv, const char *name, Run run, Others others) {
    const std::string kind = argc > 1 ? argv[1] : "values";
#if defined(__x86_64__)
    _mm_setcsr(_mm_getcsr() | 0x8040); // nvcc -ftz=true, and what the core does around its own loops
#endif
    using cuda_on_cpu::Order;
    for (const Order order : {Order::forward, Order::reverse, Order::random}) {
        cuda_on_cpu::options.order = order;
        run(kind != "values");
    }
    others();
    printf("%s, %s: %d passed, %d failed\n", name, kind.c_str(), checks - failures, failures);
    return failures != 0;
}
