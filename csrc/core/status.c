/* One sentence for each status: what went wrong, to stand behind the name of the operation. */
#include "oplora_core.h"

static const struct {
    oplora_status status;
    const char *sentence;
} table[] = {
    {OPLORA_OK, "ok"},
    {OPLORA_ENULL, "a required pointer is NULL"},
    {OPLORA_ESIZE, "a size is below 1, or the sizes do not add up"},
    {OPLORA_EOVERFLOW, "a product of sizes passes 2^63"},
    {OPLORA_EVALUE, "a number is outside its range"},
    {OPLORA_EDTYPE, "the dtype is not float32, float16, bfloat16 or float64"},
    {OPLORA_ERANGES,
     "more than 31 ranges of a layer's rows start at random: join ranges that follow each other, or let some "
     "start at zero"},
    {OPLORA_EPARALLEL, "the thread pool failed"},
    {OPLORA_ENONFINITE, "a gradient holds NaN or infinity; nothing was changed"},
};

const char *oplora_strerror(oplora_status status) {
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].status == status) return table[i].sentence;
    return "unknown status";
}
