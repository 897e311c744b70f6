/* Elementary functions on vectors, at most 2 units in the last place: exp (here for both widths). */
#ifndef HL_VMATH_H
#define HL_VMATH_H
#include "simd.h"

/* exp(x): n = round(x / ln 2), a polynomial on [-ln 2 / 2, ln 2 / 2], then two exact scalings by powers of two, so that
 * results below the smallest normal number are right too. NaN stays NaN. */
static inline __attribute__((always_inline)) vreal vexp(vreal x)
{
#if HL_F32
    const vreal top = splat(88.7228394f), bottom = splat(-103.972084f), magic = splat(12582912.0f);
    const vreal log2e = splat(1.44269504f), ln2_hi = splat(0.693145752f), ln2_lo = splat(1.42860677e-6f);
    enum { BIAS = 127, SHIFT = 23 };
#else
    const vreal top = splat(709.782712893384), bottom = splat(-745.1332191019412), magic = splat(6755399441055744.0);
    const vreal log2e = splat(1.4426950408889634), ln2_hi = splat(6.93147180369123816490e-01),
                ln2_lo = splat(1.90821492927058770002e-10);
    enum { BIAS = 1023, SHIFT = 52 };
#endif
    vint high = x > top, low = x < bottom;
    vreal c = blend(high, top, blend(low, bottom, x));
    vreal shifted = c * log2e + magic;
    vreal n = shifted - magic;
    vint k = (vint)shifted - (vint)magic;
    vreal r = c - n * ln2_hi - n * ln2_lo;
#if HL_F32
    vreal p = splat(1.0f / 720) + r * splat(1.0f / 5040);
    p = splat(1.0f / 120) + r * p;
    p = splat(1.0f / 24) + r * p;
    p = splat(1.0f / 6) + r * p;
    p = splat(0.5f) + r * p;
#else
    vreal p = splat(1.0 / 479001600) + r * splat(1.0 / 6227020800);
    p = splat(1.0 / 39916800) + r * p;
    p = splat(1.0 / 3628800) + r * p;
    p = splat(1.0 / 362880) + r * p;
    p = splat(1.0 / 40320) + r * p;
    p = splat(1.0 / 5040) + r * p;
    p = splat(1.0 / 720) + r * p;
    p = splat(1.0 / 120) + r * p;
    p = splat(1.0 / 24) + r * p;
    p = splat(1.0 / 6) + r * p;
    p = splat(0.5) + r * p;
#endif
    vreal e = (r * r * p + r) + splat((real)1);
    vint half = k >> 1;
    vreal scale1 = (vreal)((half + BIAS) << SHIFT), scale2 = (vreal)((k - half + BIAS) << SHIFT);
    vreal y = e * scale1 * scale2;
    y = blend(high, splat((real)INFINITY), y);
    return blend(low, splat((real)0), y);
}
#endif
