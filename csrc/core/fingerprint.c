/* fingerprint: a hash of a tensor's bytes, by which it is known that nobody wrote into it.
 *
 * A piece of PIECE bytes goes through LANES lanes, word l of a block of 64 bytes through lane l (kernels.h, hash_blocks,
 * after XXH3 by Collet): a product of the word's halves under a key of the block's place, and the word itself into the
 * neighbour's lane. A word that changes alone always changes the result, more of them with all but certainty. What a
 * piece, and then a tensor, is hashed to is made of its lanes (its pieces) in order. Bytes are read once, at the speed of
 * memory; pieces of all tensors are spread over the threads. */
#include "dispatch.h"
#include "oplora_core.h"

#include <string.h>

enum { LANES = 8, BLOCK = 8 * LANES, PIECE = 1 << 18, WAKING = 1 << 21 };
static const uint64_t MULTIPLIER_1 = 0x9E3779B185EBCA87u, MULTIPLIER_2 = 0xC2B2AE3D27D4EB4Fu;
static const uint64_t MULTIPLIER_3 = 0x165667B19E3779F9u, ADDEND = 0x85EBCA77C2B2AE63u;

static uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }

static uint64_t merge(uint64_t hash, uint64_t part) {
    return rotate(hash ^ rotate(part * MULTIPLIER_2, 31) * MULTIPLIER_1, 27) * MULTIPLIER_1 + ADDEND;
}

/* Every bit of x in every bit of the result. */
static uint64_t spread(uint64_t x) {
    x = (x ^ x >> 33) * MULTIPLIER_2;
    x = (x ^ x >> 29) * MULTIPLIER_3;
    return x ^ x >> 32;
}

static uint64_t hash_piece(const char *data, int64_t bytes) {
    const oplora_kernels_f32 *const kernels = oplora_dispatch_f32();
    uint64_t lanes[LANES], keys[LANES], hash = (uint64_t)bytes;
    const int64_t whole = bytes / BLOCK;
    for (int l = 0; l < LANES; l++) {
        lanes[l] = (uint64_t)(l + 1) * MULTIPLIER_3;
        keys[l] = spread(lanes[l]);
    }
    kernels->hash_blocks(lanes, keys, data, whole);
    if (whole * BLOCK < bytes) {
        char rest[BLOCK] = {0};
        memcpy(rest, data + whole * BLOCK, (size_t)(bytes - whole * BLOCK));
        kernels->hash_blocks(lanes, keys, rest, 1);
    }
    for (int l = 0; l < LANES; l++) hash = merge(hash, lanes[l]);
    return hash;
}

typedef struct {
    const oplora_bytes *tensors;
    int64_t *first; /* piece of each tensor, and behind the last */
    uint64_t *hashes;
    int64_t n;
} job;

static int64_t pieces_of(int64_t bytes) { return bytes / PIECE + (bytes % PIECE != 0); }

static void hash_pieces(int64_t begin, int64_t end, void *context) {
    const job *const j = context;
    int64_t low = 0, high = j->n;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (j->first[middle] <= begin)
            low = middle;
        else
            high = middle;
    }
    for (int64_t p = begin; p < end; p++) {
        while (p >= j->first[low + 1]) low++;
        const int64_t at = (p - j->first[low]) * PIECE, left = j->tensors[low].bytes - at;
        j->hashes[p] = hash_piece((const char *)j->tensors[low].data + at, left < PIECE ? left : PIECE);
    }
}

static int64_t count_pieces(const oplora_bytes *tensors, int64_t n) {
    int64_t count = 0;
    if (n < 0 || n > INT64_MAX / 64 || (n > 0 && !tensors)) return -1;
    for (int64_t i = 0; i < n; i++)
        if (tensors[i].bytes < 0 || __builtin_add_overflow(count, pieces_of(tensors[i].bytes), &count)) return -1;
    return count > INT64_MAX / 64 ? -1 : count;
}

int64_t oplora_fingerprint_workspace_bytes(const oplora_bytes *tensors, int64_t n) {
    const int64_t pieces = count_pieces(tensors, n);
    return pieces < 0 ? -1 : (int64_t)sizeof(int64_t) * (n + 1 + pieces);
}

oplora_status oplora_fingerprint(const oplora_bytes *tensors, int64_t n, uint64_t *out, void *workspace,
                                 oplora_parallel_fn par) {
    const int64_t pieces = count_pieces(tensors, n);
    OPLORA_RETURN_IF(n > 0 && (!tensors || !out || !workspace), OPLORA_ENULL);
    OPLORA_RETURN_IF(pieces < 0, OPLORA_ESIZE);
    if (n == 0) return OPLORA_OK;
    job j = {tensors, workspace, NULL, n};
    double bytes = 0;
    j.hashes = (uint64_t *)(j.first + n + 1);
    j.first[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        OPLORA_RETURN_IF(tensors[i].bytes > 0 && !tensors[i].data, OPLORA_ENULL);
        j.first[i + 1] = j.first[i] + pieces_of(tensors[i].bytes);
        bytes += (double)tensors[i].bytes;
    }
    /* by the handful: a thread is not woken for less than it takes to wake it */
    const int64_t grain = 1 + (int64_t)(WAKING * (double)pieces / (bytes + 1));
    OPLORA_FORWARD(oplora_parallel(par, pieces, grain, hash_pieces, &j));
    for (int64_t i = 0; i < n; i++) {
        uint64_t hash = (uint64_t)tensors[i].bytes;
        for (int64_t p = j.first[i]; p < j.first[i + 1]; p++) hash = merge(hash, j.hashes[p]);
        out[i] = spread(hash);
    }
    return OPLORA_OK;
}
