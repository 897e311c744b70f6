/* Vectors, once: GCC/clang vector extensions at the width of the instruction set that a file is compiled for.
 *
 * meson defines  HL_ISA (baseline, avx2, avx512, neon), HL_VLEN (bytes; never more than the set has: a wider vector is
 * ten times slower), HL_TYPE (f32, f64), real (float, double) and HL_F32. A family file is written once in terms of
 * `real` and `vreal`; HL(name) gives each exported kernel its own symbol per type and set. */
#ifndef HL_SIMD_H
#define HL_SIMD_H
#include "hotloops.h"
#include "parallel.h"
#include <math.h>
#include <string.h>

#define HL_PASTE_(a, b, c) hl_##a##_##b##_##c
#define HL_PASTE(a, b, c) HL_PASTE_(a, b, c)
#define HL(name) HL_PASTE(name, HL_TYPE, HL_ISA)

#if HL_F32
typedef int32_t ireal; /* the integer as wide as real */
typedef uint32_t ureal;
#define REAL_MAX 3.402823466e38f
#else
typedef int64_t ireal;
typedef uint64_t ureal;
#define REAL_MAX 1.7976931348623157e308
#endif

typedef real vreal __attribute__((vector_size(HL_VLEN)));
typedef real vreal_u __attribute__((vector_size(HL_VLEN), aligned(sizeof(real)), may_alias));
typedef ireal vint __attribute__((vector_size(HL_VLEN)));
typedef ureal vuint __attribute__((vector_size(HL_VLEN))); /* for sums of bits, which may wrap */
enum { LANES = HL_VLEN / (int)sizeof(real) };

#if defined(__AVX512F__)
#define HL_REGISTERS 32
_Static_assert(HL_VLEN <= 64, "vectors wider than the instruction set");
#elif defined(__AVX2__)
#define HL_REGISTERS 16
_Static_assert(HL_VLEN <= 32, "vectors wider than the instruction set");
#elif defined(__aarch64__)
#define HL_REGISTERS 32
_Static_assert(HL_VLEN <= 16, "vectors wider than the instruction set");
#else
#define HL_REGISTERS 16
_Static_assert(HL_VLEN <= 16, "vectors wider than the instruction set");
#endif

static inline __attribute__((always_inline)) vreal load(const real *p) { return *(const vreal_u *)p; }
static inline __attribute__((always_inline)) void store(real *p, vreal v) { *(vreal_u *)p = v; }
static inline __attribute__((always_inline)) vreal splat(real a) { return a - (vreal){0}; }

/* A value that is used twice, loaded once: the compiler would rather make both uses read memory. */
static inline __attribute__((always_inline)) vreal kept(vreal v)
{
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

/* -1 in the first n lanes. */
static inline __attribute__((always_inline)) vint lanes_before(int64_t n)
{
    static const ireal steps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vint lane, limit = (ireal)n - (vint){0};
    memcpy(&lane, steps, sizeof lane);
    return lane < limit;
}

/* The first n < LANES elements, the others `fill`: nothing past p[n) is touched. Sets that mask lanes do it in one
 * instruction, but for AVX2's masked stores, which on AMD are slower than these few bytes through memory. */
static inline __attribute__((always_inline)) vreal load_part(const real *p, int64_t n, real fill)
{
#if defined(__AVX512F__) && HL_F32
    return __builtin_ia32_loadups512_mask((const void *)p, splat(fill), (unsigned short)((1u << n) - 1));
#elif defined(__AVX512F__)
    return __builtin_ia32_loadupd512_mask((const void *)p, splat(fill), (unsigned char)((1u << n) - 1));
#elif defined(__AVX2__) && HL_F32
    const vint first = lanes_before(n);
    vint v = (vint)__builtin_ia32_maskloadps256((const void *)p, first);
    return (vreal)((first & v) | (~first & (vint)splat(fill)));
#elif defined(__AVX2__)
    const vint first = lanes_before(n);
    vint v = (vint)__builtin_ia32_maskloadpd256((const void *)p, (__attribute__((vector_size(32))) long long)first);
    return (vreal)((first & v) | (~first & (vint)splat(fill)));
#else
    union {
        vreal v;
        real a[LANES];
    } u = {.v = splat(fill)};
    memcpy(u.a, p, (size_t)n * sizeof(real));
    return u.v;
#endif
}
/* The first n <= LANES, the others 0. */
static inline vreal load_n(const real *p, int64_t n) { return n == LANES ? load(p) : load_part(p, n, (real)0); }
static inline __attribute__((always_inline)) void store_part(real *p, int64_t n, vreal v)
{
#if defined(__AVX512F__) && HL_F32
    __builtin_ia32_storeups512_mask((void *)p, v, (unsigned short)((1u << n) - 1));
#elif defined(__AVX512F__)
    __builtin_ia32_storeupd512_mask((void *)p, v, (unsigned char)((1u << n) - 1));
#else
    union {
        vreal v;
        real a[LANES];
    } u = {.v = v};
    const real *from = u.a;
    /* n <= LANES, in pieces whose sizes are constants: around a call the compiler keeps all vectors in memory. */
#pragma GCC unroll 4
    for (int size = LANES; size > 0; size /= 2)
        if (n & size) {
            memcpy(p, from, size * sizeof(real));
            p += size, from += size;
        }
#endif
}

/* Lanes of a where the mask is -1, of b where it is 0 (C has no vector ?:). */
static inline __attribute__((always_inline)) vreal blend(vint mask, vreal a, vreal b)
{
    return (vreal)((mask & (vint)a) | (~mask & (vint)b));
}
/* b where a < b, else a: a NaN in a stays, a NaN in b is dropped. x86 has just this as one instruction, operands reversed. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__) && HL_F32
#define HL_MAX(a, b) __builtin_ia32_maxps512_mask(b, a, a, (short)-1, 4)
#define HL_MIN(a, b) __builtin_ia32_minps512_mask(b, a, a, (short)-1, 4)
#elif defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
#define HL_MAX(a, b) __builtin_ia32_maxpd512_mask(b, a, a, (char)-1, 4)
#define HL_MIN(a, b) __builtin_ia32_minpd512_mask(b, a, a, (char)-1, 4)
#elif defined(__AVX2__) && !defined(__AVX512F__) && HL_F32
#define HL_MAX(a, b) __builtin_ia32_maxps256(b, a)
#define HL_MIN(a, b) __builtin_ia32_minps256(b, a)
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define HL_MAX(a, b) __builtin_ia32_maxpd256(b, a)
#define HL_MIN(a, b) __builtin_ia32_minpd256(b, a)
#elif defined(__SSE2__) && !defined(__AVX2__) && HL_F32
#define HL_MAX(a, b) __builtin_ia32_maxps(b, a)
#define HL_MIN(a, b) __builtin_ia32_minps(b, a)
#elif defined(__SSE2__) && !defined(__AVX2__)
#define HL_MAX(a, b) __builtin_ia32_maxpd(b, a)
#define HL_MIN(a, b) __builtin_ia32_minpd(b, a)
#else
#define HL_MAX(a, b) blend((a) < (b), b, a)
#define HL_MIN(a, b) blend((b) < (a), b, a)
#endif
static inline __attribute__((always_inline)) vreal vmax(vreal a, vreal b) { return HL_MAX(a, b); }
static inline __attribute__((always_inline)) vreal vmin(vreal a, vreal b) { return HL_MIN(a, b); }

/* One bit per lane of a mask. */
static inline __attribute__((always_inline)) unsigned lane_bits(vint mask)
{
#if defined(__AVX512F__) && HL_F32
    return (unsigned short)__builtin_ia32_cvtd2mask512((__attribute__((vector_size(64))) int)mask);
#elif defined(__AVX512F__)
    return (unsigned char)__builtin_ia32_cvtq2mask512((__attribute__((vector_size(64))) long long)mask);
#elif defined(__AVX2__) && HL_F32
    return (unsigned)__builtin_ia32_movmskps256((vreal)mask);
#elif defined(__AVX2__)
    return (unsigned)__builtin_ia32_movmskpd256((vreal)mask);
#elif defined(__SSE2__) && HL_F32
    return (unsigned)__builtin_ia32_movmskps((vreal)mask);
#elif defined(__SSE2__)
    return (unsigned)__builtin_ia32_movmskpd((vreal)mask);
#else
    unsigned bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (unsigned)(mask[i] != 0) << i;
    return bits;
#endif
}

/* Pairs of vectors taken apart and put together: the elements 0, 2, 4 ... of a then b; 1, 3, 5 ...; a0 b0 a1 b1 ... of the
 * lower halves; of the upper halves. */
#if defined(__clang__)
#define HL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif
#if HL_VLEN / (HL_F32 ? 4 : 8) == 16
#define HL_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define HL_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define HL_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HL_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif HL_VLEN / (HL_F32 ? 4 : 8) == 8
#define HL_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define HL_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define HL_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HL_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif HL_VLEN / (HL_F32 ? 4 : 8) == 4
#define HL_EVENS 0, 2, 4, 6
#define HL_ODDS 1, 3, 5, 7
#define HL_LOW 0, 4, 1, 5
#define HL_HIGH 2, 6, 3, 7
#elif HL_VLEN / (HL_F32 ? 4 : 8) == 2
#define HL_EVENS 0, 2
#define HL_ODDS 1, 3
#define HL_LOW 0, 2
#define HL_HIGH 1, 3
#endif
#if HL_F32 && HL_VLEN == 32
/* Each half by itself, then the quarters in order: in one step the compiler needs six instructions for both, and four vectors of
 * lane numbers. */
typedef double quarters __attribute__((vector_size(32)));
typedef int64_t quarter_numbers __attribute__((vector_size(32)));
static inline __attribute__((always_inline)) vreal quarters_in_order(vreal v)
{
#if defined(__clang__)
    return (vreal)__builtin_shufflevector((quarters)v, (quarters)v, 0, 2, 1, 3);
#else
    return (vreal)__builtin_shuffle((quarters)v, (quarter_numbers){0, 2, 1, 3});
#endif
}
static inline __attribute__((always_inline)) vreal evens(vreal a, vreal b)
{
    return quarters_in_order(HL_SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14));
}
static inline __attribute__((always_inline)) vreal odds(vreal a, vreal b)
{
    return quarters_in_order(HL_SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15));
}
#else
static inline __attribute__((always_inline)) vreal evens(vreal a, vreal b) { return HL_SHUFFLE(a, b, HL_EVENS); }
static inline __attribute__((always_inline)) vreal odds(vreal a, vreal b) { return HL_SHUFFLE(a, b, HL_ODDS); }
#endif
static inline __attribute__((always_inline)) vreal zip_low(vreal a, vreal b) { return HL_SHUFFLE(a, b, HL_LOW); }
static inline __attribute__((always_inline)) vreal zip_high(vreal a, vreal b) { return HL_SHUFFLE(a, b, HL_HIGH); }

/* All lanes in a fixed tree (each half with the other), so that every call adds in the same order. */
#if HL_VLEN / (HL_F32 ? 4 : 8) == 16
#define HL_TREE(v, OP) \
    v = OP(v, HL_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    v = OP(v, HL_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    v = OP(v, HL_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    v = OP(v, HL_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#elif HL_VLEN / (HL_F32 ? 4 : 8) == 8
#define HL_TREE(v, OP) \
    v = OP(v, HL_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3)); \
    v = OP(v, HL_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5)); \
    v = OP(v, HL_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6))
#elif HL_VLEN / (HL_F32 ? 4 : 8) == 4
#define HL_TREE(v, OP) \
    v = OP(v, HL_SHUFFLE(v, v, 2, 3, 0, 1)); \
    v = OP(v, HL_SHUFFLE(v, v, 1, 0, 3, 2))
#elif HL_VLEN / (HL_F32 ? 4 : 8) == 2
#define HL_TREE(v, OP) v = OP(v, HL_SHUFFLE(v, v, 1, 0))
#endif
static inline __attribute__((always_inline)) vreal vadd(vreal a, vreal b) { return a + b; }
static inline __attribute__((always_inline)) real sum_lanes(vreal v)
{
    HL_TREE(v, vadd);
    return v[0];
}
/* A NaN among them may be passed over. */
static inline __attribute__((always_inline)) real max_lanes(vreal v)
{
    HL_TREE(v, vmax);
    return v[0];
}

/* A store past the cache where the set has one; p aligned to HL_VLEN. Fence with stream_end() before a result is read. */
static inline __attribute__((always_inline)) void stream(real *p, vreal v)
{
#if defined(__SSE2__) && defined(__clang__)
    __builtin_nontemporal_store(v, (vreal *)p);
#elif defined(__AVX512F__) && HL_F32
    __builtin_ia32_movntps512(p, v);
#elif defined(__AVX512F__)
    __builtin_ia32_movntpd512(p, v);
#elif defined(__AVX2__) && HL_F32
    __builtin_ia32_movntps256(p, v);
#elif defined(__AVX2__)
    __builtin_ia32_movntpd256(p, v);
#elif defined(__SSE2__) && HL_F32
    __builtin_ia32_movntps(p, v);
#elif defined(__SSE2__)
    __builtin_ia32_movntpd(p, v);
#else
    *(vreal *)p = v;
#endif
}
static inline void stream_end(void)
{
#if defined(__SSE2__)
    __builtin_ia32_sfence();
#endif
}

/* Asks for the line so many bytes ahead of p (hl_ahead), to read or to write it; 0: asks for nothing. */
static inline __attribute__((always_inline)) void fetch(const real *p, int64_t ahead)
{
    if (ahead) __builtin_prefetch((const char *)p + ahead);
}
static inline __attribute__((always_inline)) void fetch_to_write(real *p, int64_t ahead)
{
    if (ahead) __builtin_prefetch((char *)p + ahead, 1);
}

/* Elements of a line of the cache. */
enum { LINE = 64 / (int)sizeof(real) };

/* Results beyond this many bytes leave the cache before they are read again: they are written past it, from a buffer of so
 * many elements: few enough that memory takes them in while the next are made. */
enum { CACHE_BYTES = 8 << 20, BUFFER = 256 };

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline int has_nonfinite(const real *x, int64_t n)
{
    vreal sum = splat((real)0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(x + i) * splat((real)0);
    if (i < n) sum += load_part(x + i, n - i, (real)0) * splat((real)0);
    return lane_bits(sum != sum) != 0;
}

/* Copies past the cache, but for the ends that are no whole aligned vector. */
static inline void copy_past_cache(real *to, const real *from, int64_t n)
{
    int64_t head = min64((int64_t)(-(uintptr_t)to % HL_VLEN / sizeof(real)), n), i = head;
    for (int64_t k = 0; k < head; k++) to[k] = from[k];
    for (; i + LANES <= n; i += LANES) stream(to + i, load(from + i));
    for (; i < n; i++) to[i] = from[i];
}

/* A result written from its beginning to its end, straight or past the cache: what comes next goes to place(), and added()
 * tells how much it was, at most `most` elements. Pieces end with a line of the cache; the rest waits at the front of the
 * buffer. */
typedef struct {
    real *to, *buffer;
    int64_t have; /* in the buffer */
} outflow;

static inline int outflow_begin(outflow *f, real *to, int64_t most, int past_cache)
{
    *f = (outflow){to, past_cache ? hl_take((size_t)(BUFFER + most + LINE + LANES) * sizeof(real)) : NULL, 0};
    return past_cache && !f->buffer ? HL_NOMEM : HL_OK;
}
static inline real *outflow_place(const outflow *f) { return f->buffer ? f->buffer + f->have : f->to; }
static inline void outflow_added(outflow *f, int64_t n)
{
    if (!f->buffer) {
        f->to += n;
        return;
    }
    f->have += n;
    if (f->have < BUFFER) return;
    int64_t rest = (int64_t)((uintptr_t)(f->to + f->have) % 64 / sizeof(real)), whole = f->have - rest;
    copy_past_cache(f->to, f->buffer, whole);
    for (int64_t i = 0; i < rest; i += LANES) store(f->buffer + i, load(f->buffer + whole + i));
    f->to += whole, f->have = rest;
}
static inline void outflow_end(outflow *f)
{
    if (!f->buffer) return;
    copy_past_cache(f->to, f->buffer, f->have);
    stream_end();
    hl_give(f->buffer);
}
#endif
