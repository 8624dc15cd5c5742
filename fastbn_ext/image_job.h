/* What the statistics of image data share over value types and instruction sets. */

#ifndef FASTBN_IMAGE_JOB_H
#define FASTBN_IMAGE_JOB_H

#include "common.h"

enum { IMAGE_COLUMN = 32 }; /* the widest column */

/* How the work is cut, as fastbn/backends/_images.py does it, and the arrays. */
typedef struct {
    Index length, pieces, piece, width, tile;
    int whole;
    const void *x;
    void *part;
    Shares *shares;
} ImageJob;

typedef void (*ImageWork)(const ImageJob *, Index k);
typedef uint16_t Half; /* a float16's bits */

/* A float16's value; arithmetic on its bits alone would be spoilt where a process lets denormals be zero. */
static inline double half_value(Half x) {
    const int exponent = x >> 10 & 31, digits = x & 1023;
    const uint64_t bits = (uint64_t)(exponent == 31 ? 2047 : exponent + 1008) << 52 | (uint64_t)digits << 42;
    double value = digits * 0x1p-24;
    if (exponent) __builtin_memcpy(&value, &bits, sizeof value);
    return x >> 15 ? -value : value;
}

#endif
