/* oplora_fingerprint: changes with every bit and every place, does not change with the threads, and refuses. */
#include "check.h"
#include "core_check.h"
#include "oplora_core.h"

#include <stdlib.h>
#include <string.h>

enum { LONGEST = 3 * (1 << 18) + 77 };
static unsigned char data[LONGEST + 1];

static uint64_t hash_of(const void *bytes, int64_t count) {
    const oplora_bytes tensor = {bytes, count};
    uint64_t out = 0;
    void *const workspace = malloc((size_t)oplora_fingerprint_workspace_bytes(&tensor, 1));
    CHECK(oplora_fingerprint(&tensor, 1, &out, workspace, NULL) == OPLORA_OK);
    free(workspace);
    return out;
}

static void test_every_bit_counts(int64_t bytes, int64_t stride) {
    const uint64_t before = hash_of(data, bytes);
    for (int64_t bit = 0; bit < 8 * bytes; bit += stride) {
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        CHECK(hash_of(data, bytes) != before);
        data[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    CHECK(hash_of(data, bytes) == before);
    add_to_digest(&before, sizeof before);
}

static void test_places_count(void) {
    enum { COUNT = 4096 };
    static uint64_t seen[COUNT];
    static double zeros[COUNT], numbers[COUNT];
    for (int i = 0; i < COUNT; i++) { /* a one among zeros */
        zeros[i] = 1;
        seen[i] = hash_of(zeros, sizeof zeros);
        zeros[i] = 0;
    }
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < i; j++) CHECK(seen[i] != seen[j]);
    for (int64_t i = 0; i < 64; i++) /* the length alone */
        for (int64_t j = 0; j < i; j++) CHECK(hash_of(zeros, i) != hash_of(zeros, j));
    for (int i = 0; i < COUNT; i++) numbers[i] = noise();
    const uint64_t before = hash_of(numbers, sizeof numbers);
    for (int i = 1; i < COUNT; i++) { /* two that change places */
        const double first = numbers[0];
        numbers[0] = numbers[i], numbers[i] = first;
        CHECK(hash_of(numbers, sizeof numbers) != before);
        numbers[i] = numbers[0], numbers[0] = first;
    }
}

/* What optimizers and clipping do to all numbers at once, and no sum would notice. */
static void test_changes_of_all_numbers(void) {
    enum { COUNT = 1024 };
    static float numbers[COUNT], changed[COUNT];
    for (int i = 0; i < COUNT; i++) numbers[i] = (float)noise();
    const uint64_t before = hash_of(numbers, sizeof numbers);
    for (int step = 1; step <= COUNT / 2; step++) { /* signs of some, always an even number */
        memcpy(changed, numbers, sizeof numbers);
        for (int i = 0; i + step < COUNT; i += 2 * step)
            changed[i] = -changed[i], changed[i + step] = -changed[i + step];
        CHECK(hash_of(changed, sizeof changed) != before);
    }
    for (int i = 0; i < COUNT; i++) changed[i] = 0.5f * numbers[i];
    CHECK(hash_of(changed, sizeof changed) != before);
    for (int i = 0; i < COUNT; i++) changed[i] = numbers[COUNT - 1 - i];
    CHECK(hash_of(changed, sizeof changed) != before);
}

static void test_threads_and_neighbours_do_not_count(void) {
    static const int64_t sizes[] = {LONGEST,       0,   1, 63,      64,      65,     1 << 18,
                                    (1 << 18) + 1, 300, 8, 2 << 18, LONGEST, LONGEST};
    enum { COUNT = sizeof sizes / sizeof *sizes };
    oplora_bytes tensors[COUNT];
    uint64_t out[COUNT];
    for (int i = 0; i < COUNT; i++) tensors[i] = (oplora_bytes){sizes[i] ? data + i % 2 : NULL, sizes[i]};
    tensors[0].data = data;
    void *const workspace = malloc((size_t)oplora_fingerprint_workspace_bytes(tensors, COUNT));
    for (size_t s = 0; s < SPLITS; s++) {
        memset(out, 0, sizeof out);
        CHECK(oplora_fingerprint(tensors, COUNT, out, workspace, splits[s]) == OPLORA_OK);
        for (int i = 0; i < COUNT; i++) CHECK(out[i] == hash_of(tensors[i].data, tensors[i].bytes));
    }
    CHECK(oplora_fingerprint(tensors, COUNT, out, workspace, failing) == OPLORA_EPARALLEL);
    free(workspace);
}

static void test_refusals(void) {
    uint64_t out[2], workspace[8];
    oplora_bytes tensor = {data, -1};
    CHECK(oplora_fingerprint_workspace_bytes(&tensor, 1) == -1);
    CHECK(oplora_fingerprint_workspace_bytes(&tensor, -1) == -1);
    CHECK(oplora_fingerprint(&tensor, 1, out, workspace, NULL) == OPLORA_ESIZE);
    CHECK(oplora_fingerprint(NULL, 0, NULL, NULL, NULL) == OPLORA_OK);
    CHECK(oplora_fingerprint(&tensor, -1, out, workspace, NULL) == OPLORA_ESIZE);
    tensor.bytes = 8;
    CHECK(oplora_fingerprint(&tensor, 1, NULL, workspace, NULL) == OPLORA_ENULL);
    CHECK(oplora_fingerprint(&tensor, 1, out, NULL, NULL) == OPLORA_ENULL);
    CHECK(oplora_fingerprint(NULL, 1, out, workspace, NULL) == OPLORA_ENULL);
    tensor.data = NULL;
    CHECK(oplora_fingerprint(&tensor, 1, out, workspace, NULL) == OPLORA_ENULL);
}

int main(void) {
    noise_state = 1;
    for (int i = 0; i <= LONGEST; i++) data[i] = (unsigned char)(128 * noise() + 128);
    for (int64_t bytes = 1; bytes < 200; bytes++) test_every_bit_counts(bytes, 1);
    test_every_bit_counts(LONGEST, 8 * 9973 + 1);
    test_places_count();
    test_changes_of_all_numbers();
    test_threads_and_neighbours_do_not_count();
    test_refusals();
    printf("digest %016llx on %s\n", (unsigned long long)digest, oplora_isa());
    return check_report();
}
