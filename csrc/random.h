/* 24 random bits for each index of a stream: two rounds of an integer hash, the same on every backend.
 * Source of the hash: C. Wellons, Prospecting for Hash Functions (2018), lowbias32. */
#ifndef HL_RANDOM_H
#define HL_RANDOM_H
#include <stdint.h>

static inline uint32_t random_mix(uint32_t h)
{
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return h ^ (h >> 16);
}

/* bits[k] for the index first + k of the stream `seed`, k < n. */
static inline void random24(int64_t first, int64_t n, int64_t seed, uint32_t *bits)
{
    const uint32_t key = (uint32_t)seed, high_key = (uint32_t)((uint64_t)seed >> 32);
    while (n > 0) { /* up to where the upper half of the index changes */
        const uint32_t low = (uint32_t)first, high = (uint32_t)((uint64_t)first >> 32) * 0x9E3779B9u + high_key;
        const int64_t left = ((int64_t)1 << 32) - low, count = n < left ? n : left;
        for (int64_t k = 0; k < count; k++) bits[k] = random_mix(random_mix((low + (uint32_t)k) ^ key) ^ high) >> 8;
        bits += count;
        first += count;
        n -= count;
    }
}
#endif
