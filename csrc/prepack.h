/* Weights that do not change (hl.prepack): what a kernel makes of them, panels or transforms, is kept for the next call. */
#ifndef HL_PREPACK_H
#define HL_PREPACK_H
#include "hotloops.h"

/* Who made a pack, the first number of its key; then what its contents depend on besides the weights. */
enum hl_packer {
    HL_PACK_PRODUCT = 1,
    HL_PACK_CONV,
    HL_PACK_CONV_ROWS,
    HL_PACK_CONV_LANES,
    HL_PACK_CONV_FILTERS,
    HL_PACK_WINOGRAD,
    HL_PACK_GATES
};
enum { HL_PACK_KEY = 20 };

/* Memory that a kernel fills from weights: hl_pack_begin, then, unless it is `ready`, fill it and say hl_pack_ready; at
 * the end hl_pack_end. Of weights that hl_prepack does not know it is scratch memory like any other. */
typedef struct {
    void *data; /* NULL: no memory */
    int ready; /* it holds what an earlier call made */
    int kept; /* it stays when this call ends */
    const void *weights;
    size_t bytes;
    int64_t key[HL_PACK_KEY];
} hl_pack;

hl_pack hl_pack_begin(const void *weights, size_t bytes, const int64_t *key, int count);
void hl_pack_ready(hl_pack *pack);
void hl_pack_end(hl_pack *pack);

/* Whether hl_prepack knows them: then packing that one call alone does not repay is worth it. */
int hl_is_prepacked(const void *weights);
#endif
