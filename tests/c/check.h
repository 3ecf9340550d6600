/* CHECK(condition): counts and prints a failure with its place. End main with `return check_report();`. */
#ifndef OPLORA_CHECK_H
#define OPLORA_CHECK_H

#include <stdio.h>

static int check_failures, check_count;

#define CHECK(condition) \
    do { \
        check_count++; \
        if (!(condition)) { \
            if (check_failures++ < 20) fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
        } \
    } while (0)

static inline int check_report(void) {
    printf("%d checks, %d failed\n", check_count, check_failures);
    return check_failures != 0;
}

#endif
