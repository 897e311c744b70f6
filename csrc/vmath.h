/* Elementary functions on vectors: exp, log, tanh, the logistic sigmoid, erf. At most 2 units in the last place over the
 * whole range, results below the smallest normal number included; NaN stays NaN. */
#ifndef HL_VMATH_H
#define HL_VMATH_H
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* c[0] x^(n-1) + ... + c[n-1]. */
static inline __attribute__((always_inline)) vreal polynomial(vreal x, const real *c, const int n)
{
    vreal p = splat(c[0]);
#pragma GCC unroll 16
    for (int i = 1; i < n; i++) p = p * x + splat(c[i]);
    return p;
}
#define POLYNOMIAL(x, c) polynomial(x, c, (int)(sizeof(c) / sizeof(c[0])))

/* exp(x): n = round(x / ln 2), a polynomial on [-ln 2 / 2, ln 2 / 2], then two exact scalings by powers of two, so that
 * results below the smallest normal number are right too. NaN stays NaN. */
static inline __attribute__((always_inline)) vreal vexp(vreal x)
{
#if HL_F32
    const vreal top = splat(88.7228394f), bottom = splat(-103.972084f), magic = splat(12582912.0f);
    const vreal log2e = splat(1.44269504f), ln2_hi = splat(0.693145752f), ln2_lo = splat(1.42860677e-6f);
    enum { BIAS = 127, SHIFT = 23 };
    static const real p[] = {1.381454e-3f, 8.3687453e-3f, 4.1668391e-2f, 1.666652e-1f, 4.9999993e-1f};
#else
    const vreal top = splat(709.782712893384), bottom = splat(-745.1332191019412), magic = splat(6755399441055744.0);
    const vreal log2e = splat(1.4426950408889634), ln2_hi = splat(6.93147180369123816490e-01),
                ln2_lo = splat(1.90821492927058770002e-10);
    enum { BIAS = 1023, SHIFT = 52 };
    static const real p[] = {2.5094914365955804e-08, 2.761990152718373e-07,  2.7557296740265913e-06,
                             2.4801521540010823e-05, 0.00019841269835901192, 0.0013888888917619354,
                             0.00833333333333538,    0.04166666666661971,    0.16666666666666655,
                             0.5000000000000001};
#endif
    vint high = x > top, low = x < bottom;
    vreal c = blend(high, top, blend(low, bottom, x));
    vreal shifted = c * log2e + magic;
    vreal n = shifted - magic;
    vint k = (vint)((vuint)shifted - (vuint)magic);
    vreal r = c - n * ln2_hi - n * ln2_lo;
    vreal e = (r * r * POLYNOMIAL(r, p) + r) + splat((real)1);
    vint half = k >> 1;
    vreal scale1 = (vreal)((half + BIAS) << SHIFT), scale2 = (vreal)((k - half + BIAS) << SHIFT);
    vreal y = e * scale1 * scale2;
    y = blend(high, splat((real)INFINITY), y);
    return blend(low, splat((real)0), y);
}

#if HL_F32
/* Where a set looks lanes up in registers, 2^(n / PARTS) comes from a table of PARTS entries: what is left of an argument is so
 * small that two or three terms do. Elsewhere PARTS is 1. The terms are (e^r - 1) / r and (2^r - 1) / r, fitted so that e^r
 * and 2^r err alike over the rest's range. */
#if HL_VLEN == 64
enum { PARTS = 32, EXPONENT_SHIFT = 18 };
#define EXP_TERMS 0.5f, 1.0000147f
#define EXP2_TERMS 0.2402265f, 0.69315735f
#elif HL_VLEN == 32
enum { PARTS = 8, EXPONENT_SHIFT = 20 };
#define EXP_TERMS 0.16664294f, 0.50006491f, 1.0f
#define EXP2_TERMS 0.055496206f, 0.24025769f, 0.69314721f
#else
enum { PARTS = 1, EXPONENT_SHIFT = 23 };
#define EXP_TERMS 8.24512169e-3f, 4.19046097e-2f, 1.66684821e-1f, 4.99990791e-1f, 9.99999344e-1f
#define EXP2_TERMS 1.31727569e-3f, 9.67274327e-3f, 5.55106737e-2f, 2.40222156e-1f, 6.93146706e-1f
#endif
/* 2^(n / PARTS) for the n that `bits` end in, as those of x + magic do: entry n % PARTS, and n shifted to the exponent. That
 * brings n % PARTS along into the fraction; the entries are less by as much. */
static inline __attribute__((always_inline)) vreal power_of_2(vuint bits)
{
#if HL_VLEN == 64
    const vuint low = {0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
                       0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6};
    const vuint high = {0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
                        0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
    const vuint entry = (vuint)_mm512_permutex2var_epi32((__m512i)low, (__m512i)bits, (__m512i)high);
#elif HL_VLEN == 32
    const vuint all = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    const vuint entry = (vuint)_mm256_permutevar8x32_epi32((__m256i)all, (__m256i)bits);
#else
    const vuint entry = (vuint)splat(1.0f);
#endif
    return (vreal)((bits << EXPONENT_SHIFT) + entry);
}
#endif

/* exp for an x of at most 0, or NaN, for weights that are normalised by their sum: no overflow to look for, what is below the
 * smallest normal number is 0. */
static inline __attribute__((always_inline)) vreal vexp_below(vreal x)
{
#if HL_F32
    const vreal bottom = splat(-87.33654f), magic = splat(12582912.0f), parts = splat(1.44269504f * PARTS);
    const vreal part_hi = splat(0.693145752f / PARTS), part_lo = splat(1.42860677e-6f / PARTS);
    static const real c[] = {EXP_TERMS};
    vreal shifted = x * parts + magic, n = shifted - magic, r = x - n * part_hi - n * part_lo;
    vreal p = power_of_2((vuint)shifted);
    return (vreal)((vint)(p + p * (r * POLYNOMIAL(r, c))) & ~(x < bottom));
#else
    return vexp(x);
#endif
}

/* 2^x for an x below 127, or NaN; what is below the smallest normal number may be 0. For weights that are normalised by
 * their sum: the factor ln 2 goes into what x is made from. */
static inline __attribute__((always_inline)) vreal vexp2(vreal x)
{
#if HL_F32
    const vreal bottom = splat(-126.0f), magic = splat(12582912.0f / PARTS);
    static const real c[] = {EXP2_TERMS};
    vreal shifted = x + magic, r = x - (shifted - magic), p = power_of_2((vuint)shifted);
    return (vreal)((vint)(p + p * (r * POLYNOMIAL(r, c))) & ~(x < bottom));
#else
    enum { BIAS = 1023, SHIFT = 52 };
    const vreal magic = splat(6755399441055744.0 + BIAS);
    static const real c[] = {4.435280703192546e-10, 7.0741055798305342e-9, 1.0178198035371477e-7, 1.3215433089906127e-6,
                             1.5252733489955561e-5, 1.5403530462513906e-4, 1.3333558146789955e-3, 9.6181291075883357e-3,
                             5.5504108664819921e-2, 2.4022650695910156e-1, 6.9314718055994533e-1, 1.0};
    x = vmax(x, splat((real)-BIAS)); /* where the scale is 0 */
    vreal shifted = x + magic;
    return POLYNOMIAL(x - (shifted - magic), c) * (vreal)((vuint)shifted << SHIFT);
#endif
}

static inline __attribute__((always_inline)) vreal vabs(vreal x) { return (vreal)((vint)x & ~(vint)splat((real)-0.0)); }
/* The magnitude of x with the sign of y. */
static inline __attribute__((always_inline)) vreal vcopysign(vreal x, vreal y)
{
    const vint sign = (vint)splat((real)-0.0);
    return (vreal)(((vint)x & ~sign) | ((vint)y & sign));
}

/* log(x): x = 2^k m with sqrt(1/2) < m < sqrt(2), then log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)), s = f / (2 + f).
 * log(0) = -inf, log of a negative number is NaN. Source: fdlibm, e_log.c (Sun Microsystems, 1993). */
static inline __attribute__((always_inline)) vreal vlog(vreal x)
{
#if HL_F32
    enum { SHIFT = 23, BIAS = 127 };
    const vreal tiny = splat(1.17549435e-38f), up = splat(8388608.0f), ln2_hi = splat(6.9313812256e-01f),
                ln2_lo = splat(9.0580006145e-06f);
    static const real c[] = {0.24279078841f, 0.28498786688f, 0.40000972152f, 0.66666662693f};
    const vint half_root = (vint)splat(0.707106781f);
#else
    enum { SHIFT = 52, BIAS = 1023 };
    const vreal tiny = splat(2.2250738585072014e-308), up = splat(4503599627370496.0),
                ln2_hi = splat(6.93147180369123816490e-01), ln2_lo = splat(1.90821492927058770002e-10);
    static const real c[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                             2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                             6.666666666666735130e-01};
    const vint half_root = (vint)splat(0.7071067811865476);
#endif
    const vint one = (vint)splat((real)1);
    vint small = x < tiny;
    vreal scaled = blend(small, x * up, x);
    vint bits = (vint)((vuint)scaled - (vuint)half_root);
    vint k = (bits >> SHIFT) - (small & SHIFT);
    vreal m = (vreal)((vuint)bits - ((vuint)(bits >> SHIFT) << SHIFT) + (vuint)half_root);
    vreal f = m - (vreal)one, kr = __builtin_convertvector(k, vreal);
    vreal s = f / (f + splat((real)2)), z = s * s, half = f * f * splat((real)0.5);
    vreal r = z * POLYNOMIAL(z, c);
    vreal y = kr * ln2_hi - ((half - (s * (half + r) + kr * ln2_lo)) - f);
    const vreal inf = splat((real)INFINITY), zero = splat((real)0);
    y = blend(x == zero, -inf, blend(x == inf, inf, y));
    return blend((vint)(x >= zero), y, blend(x < zero, splat((real)NAN), blend((vint)(x == x), y, x)));
}

/* tanh(x): x + x^3 P(x^2) up to 0.625, beyond it 1 - 2 / (exp(2 |x|) + 1), which reaches 1 without overflow.
 * Source: Cephes, tanhf.c and tanh.c (Moshier, 1989). */
static inline __attribute__((always_inline)) vreal vtanh(vreal x)
{
    vreal a = vabs(x), z = x * x, one = splat((real)1);
#if HL_F32
    static const real c[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                             -3.33332819422e-1f};
    vreal r = POLYNOMIAL(z, c);
#else
    static const real p[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3};
    static const real q[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3};
    vreal r = POLYNOMIAL(z, p) / POLYNOMIAL(z, q);
#endif
    vreal small = x + x * z * r;
    vreal large = vcopysign(one - splat((real)2) / (vexp(a + a) + one), x);
    return blend(a < splat((real)0.625), small, blend((vint)(x == x), large, x));
}

/* 1 / (1 + exp(-x)), from e = exp(-|x|) so that nothing overflows and small results keep their digits; one correction of
 * the quotient takes out the rounding of 1 + e and of the division (1 - e / 2 stands for 1 / (1 + e) there). */
static inline __attribute__((always_inline)) vreal vsigmoid(vreal x)
{
    const vreal one = splat((real)1);
    vreal e = vexp(-vabs(x)), sum = one + e, lost = e - (sum - one);
    vreal top = blend((vint)(x < splat((real)0)), e, one), q = top / sum;
    return q + ((top - q * sum) - q * lost) * (one - e * splat((real)0.5));
}

/* a / b for a b in [1, 2]: where the set approximates 1 / b to 14 bits, one Newton step costs a third of a division. */
static inline __attribute__((always_inline)) vreal vquotient(vreal a, vreal b)
{
#if defined(__AVX512F__) && HL_F32
    vreal r = __builtin_ia32_rcp14ps512_mask(b, b, (short)-1);
    return a * (r + r * (splat(1.0f) - b * r));
#else
    return a / b;
#endif
}

/* tanh and the sigmoid for the gates of recurrent layers: as above but for less, 4 units in the last place; what is below
 * the smallest normal number counts as 0.
 *
 * tanh(|x|) = -m / (2 + m) with m = exp(-2 |x|) - 1, which keeps its digits near 0: m = 2^n (e^r - 1) + (2^n - 1). */
static inline __attribute__((always_inline)) vreal vtanh_gate(vreal x)
{
#if HL_F32
    const vreal bottom = splat(-20.0f), magic = splat(12582912.0f + 127); /* tanh(10) is 1 */
    const vreal log2e = splat(1.44269504f), ln2_hi = splat(0.693145752f), ln2_lo = splat(1.42860677e-6f);
    vreal c = vmax(vabs(x) * splat(-2.0f), bottom), shifted = c * log2e + magic, n = shifted - magic;
    vreal r = c - n * ln2_hi - n * ln2_lo, scale = (vreal)((vuint)shifted << 23);
    vreal p = splat(1.0f / 720) + r * splat(1.0f / 5040);
    p = splat(1.0f / 120) + r * p;
    p = splat(1.0f / 24) + r * p;
    p = splat(1.0f / 6) + r * p;
    p = splat(0.5f) + r * p;
    vreal m = (r * r * p + r) * scale + (scale - splat(1.0f));
    return vcopysign(vquotient(m, m + splat(2.0f)), x);
#else
    return vtanh(x);
#endif
}
static inline __attribute__((always_inline)) vreal vsigmoid_gate(vreal x)
{
#if HL_F32
    const vreal one = splat(1.0f);
    vreal e = vexp_below(-vabs(x));
    return vquotient(blend(x < splat(0.0f), e, one), one + e);
#else
    return vsigmoid(x);
#endif
}

/* erf(x): x + x P(x^2) up to about 1, beyond it 1 - erfc, which reaches 1.
 * Source: the float32 polynomials are N. Juffa's; the float64 ones interpolate erf(x) / x - 1 in x^2, and
 * exp(x^2) erfc(x) / u in u = 2 / (2 + x) on [1, 6], at Chebyshev points. */
static inline __attribute__((always_inline)) vreal verf(vreal x)
{
    vreal a = vabs(x), z = x * x, one = splat((real)1);
#if HL_F32
    static const real p[] = {-5.96761703e-4f, 4.99119423e-3f,  -2.67681349e-2f,
                             1.12819925e-1f,  -3.76125336e-1f, 1.28379166e-1f};
    static const real q[] = {-1.72853470e-5f, 3.83197126e-4f,  -3.88396438e-3f, 2.42546219e-2f,
                             -1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f};
    const vreal edge = splat(0.927734375f), top = splat(4.0f);
    vreal t = vmin(a, top), rest = vexp(POLYNOMIAL(t, q) * t - t);
#else
    static const real p[] = {5.957176147748911e-11,   -1.1372848856791674e-09, 1.4659775274047436e-08,
                             -1.6350312701054695e-07, 1.6461000484121368e-06,  -1.4925595266831182e-05,
                             0.0001205533111164271,   -0.000854832698083379,   0.0052239776248180145,
                             -0.026866170645076792,   0.11283791670954879,     -0.3761263890318375,
                             0.1283791670955126};
    static const real q[] = {0.04559895852433957,  -0.24931574028485695, 0.5342175123273363,  -0.45406137533255087,
                             -0.18288075743107893, 0.7465088052131192,   -0.6615164960837367, 0.3295731308560355,
                             -0.21178563709466616, 0.04085718634605833,  0.0741772786059143,  0.1777448065629659,
                             0.24668761289801153,  0.2821037120358275,   0.28209454072850343};
    const vreal edge = one, top = splat(6.0);
    vreal t = vmin(a, top), u = splat(2.0) / (t + splat(2.0)), rest = vexp(-t * t) * u * POLYNOMIAL(u, q);
#endif
    vreal small = x + x * POLYNOMIAL(z, p);
    vreal large = vcopysign(one - rest, x);
    return blend(a < edge, small, blend((vint)(x == x), large, x));
}
#endif
