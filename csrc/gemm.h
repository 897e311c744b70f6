/* Matrix products for the other families: C[M, N] = f(A[M, K] B[K, N] + (accumulate ? C : row_bias[m] + column_bias[n])).
 *
 * A and B may have any strides, so transposes are free. Every function returns HL_OK or HL_NOMEM. The order in which an
 * element of C is summed depends on M, K, the strides and what was packed, never on threads or on how C was split.
 * Nothing is read past the matrices; what pads a panel is zero and its products are never stored. */
#ifndef HL_GEMM_H
#define HL_GEMM_H
#include "simd.h"

/* Lanes picked from a and b, counted through both. */
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (__typeof__((a) < (b))){__VA_ARGS__})
#endif

/* The register tile: ROWS x VECTORS accumulators, VECTORS vectors of B and one broadcast of A fill the registers. */
#if HL_REGISTERS == 32
enum { GEMM_ROWS = 8, GEMM_VECTORS = 3 };
#else
enum { GEMM_ROWS = 6, GEMM_VECTORS = 2 };
#endif
enum { GEMM_COLUMNS = GEMM_VECTORS * LANES };

typedef struct {
    int64_t M, N, K;
    const real *a;
    int64_t a_row, a_col; /* A[m, k] = a[m * a_row + k * a_col] */
    const real *b;
    int64_t b_row, b_col; /* B[k, n] = b[k * b_row + n * b_col] */
    const real *packed_b; /* from gemm_pack_b, instead of b; or NULL */
    real *c;
    int64_t c_row; /* C[m, n] = c[m * c_row + n]; no overlap with A, B */
    int accumulate;
    const real *row_bias, *column_bias; /* [M], [N], not with accumulate; or NULL */
    int64_t activation; /* the number of f (activate.h), 0: none */
} gemm_call;

#define gemm HL(gemm)
#define gemm_parallel HL(gemm_parallel)
#define gemm_pack_b HL(gemm_pack_b)
#define gemm_pack_panel HL(gemm_pack_panel)
#define gemm_block HL(gemm_block)
#define gemm_transpose HL(gemm_transpose)

/* hl_parallel_for in even chunks: not 25 and 7 of 32 items. */
static inline int parallel_even(int64_t n, double work_per_item, hl_chunk fn, void *context)
{
    int64_t chunks = max64((n + hl_grain(work_per_item) - 1) / hl_grain(work_per_item), 1);
    return hl_parallel_for(n, (n + chunks - 1) / chunks, fn, context);
}

/* Up to so many rows read a B that is not packed where it lies, if its columns are contiguous and so long: a dot product ends
 * in a sum over lanes, which must be little beside it; for one row half as long, as its dot products end LANES at a time. */
enum { GEMM_DOT_ROWS = 4, GEMM_DOT_DEPTH = 4 * LANES };

/* On the calling thread: also inside a chunk of hl_parallel_for. */
int gemm(const gemm_call *call);
/* Over the pool, split by blocks of C. */
int gemm_parallel(const gemm_call *call);

/* Packs all of B once, for any number of products. `packed` holds gemm_packed_b_size elements, 64-byte aligned. */
static inline int64_t gemm_packed_b_size(int64_t K, int64_t N) { return K * round_up(N, LANES); }
void gemm_pack_b(int64_t K, int64_t N, const real *b, int64_t b_row, int64_t b_col, real *packed);

/* ---- the pieces, for a caller that makes its own panels ---- */

/* K is cut into equal parts of at most GEMM_DEPTH: a panel of B (depth x GEMM_COLUMNS) stays in the nearest two caches. C is
 * read and written once per part; parts half as long cost more on Zen 4, parts twice as long are no faster there.
 * Part i begins at gemm_depth(K) * i. */
enum { GEMM_DEPTH = 512 };
static inline int64_t gemm_depth(int64_t K)
{
    int64_t parts = (K + GEMM_DEPTH - 1) / GEMM_DEPTH;
    return parts ? (K + parts - 1) / parts : 0;
}

/* The rows or columns of the next panel when `left` remain. Two even panels instead of a full and a small one. A cut of
 * the rows (columns) at a multiple of GEMM_ROWS (GEMM_COLUMNS) leaves the panels as they are when as many remain. */
static inline int64_t gemm_rows(int64_t left)
{
    return left >= 2 * GEMM_ROWS || left == GEMM_ROWS ? GEMM_ROWS : left > GEMM_ROWS ? (left + 1) / 2 : left;
}
static inline int64_t gemm_columns(int64_t left)
{
    int64_t vectors = (left + LANES - 1) / LANES;
    return LANES * (vectors == GEMM_VECTORS + 1 ? (vectors + 1) / 2 : min64(vectors, GEMM_VECTORS));
}

/* panel[k * step + i] = source[i * stride + k * k_stride] for i < width, 0 for width <= i < step. */
void gemm_pack_panel(int64_t width, int64_t step, int64_t depth, const real *source, int64_t stride, int64_t k_stride,
                     real *panel);

/* to[k * step + i] = from[i * stride + k] for i < width, k < depth. */
void gemm_transpose(int64_t width, int64_t depth, const real *from, int64_t stride, real *to, int64_t step);

/* Half a vector: processors that multiply 512 bits in two turns need one for it. */
typedef real vhalf __attribute__((vector_size(HL_VLEN / 2)));
typedef real vhalf_u __attribute__((vector_size(HL_VLEN / 2), aligned(sizeof(real)), may_alias));

/* sum + *a b, of vectors and of halves. With 512 bits the instruction that multiplies splats an element of memory by itself, but
 * the compiler does not use it for an element that is needed twice: it costs a second read and saves an instruction. */
#if defined(__AVX512F__) && HL_F32
#define SUM_SPLAT(lanes) __asm__("vfmadd231ps %2%{1to" #lanes "%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a))
#elif defined(__AVX512F__)
#define SUM_SPLAT(lanes) __asm__("vfmadd231pd %2%{1to" #lanes "%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a))
#else
#define SUM_SPLAT(lanes) sum += *a * b
#endif
#define ADD_SPLAT(name, vector, lanes) \
    static inline __attribute__((always_inline)) vector name(vector sum, const real *a, vector b) \
    { \
        SUM_SPLAT(lanes); \
        return sum; \
    }
#if HL_F32
ADD_SPLAT(add_splat, vreal, 16)
ADD_SPLAT(add_splat_half, vhalf, 8)
#else
ADD_SPLAT(add_splat, vreal, 8)
ADD_SPLAT(add_splat_half, vhalf, 4)
#endif

/* sum + a b. In a large loop the compiler copies registers for other forms of the instruction than this one. */
static inline __attribute__((always_inline)) vreal add_product(vreal sum, vreal a, vreal b)
{
#if defined(__FMA__) && HL_F32
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
#elif defined(__FMA__)
    __asm__("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
#else
    return sum + a * b;
#endif
}

/* Row `row` of a register tile: sum[v] += *a b[v]. Every other row is splat by the instructions that multiply: all of them
 * would read too much, none would be too many instructions where a processor shares its core with another one. */
static inline __attribute__((always_inline)) void add_row(const int row, const int vectors, const real *a,
                                                          const vreal *b, vreal *sum)
{
    if (vectors == 1 || row % 2 == 0)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[v] = add_splat(sum[v], a, b[v]);
    else {
        vreal ak = splat(*a);
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[v] = add_product(sum[v], ak, b[v]);
    }
}

/* The sums of a register tile: sum[i][v] += A[i, k] B[k, v] for all k, `steps` of them at a time, which divide K. Several
 * pay where strides are constants: addresses are then part of the instructions; but only where registers are left over.
 * Even rows have addresses of their own: with two registers in its address `add_splat` would be two instructions inside.
 * `panel`: where B is packed on the way, or NULL. `ahead`: what is fetched at the first step, or NULL; each further step
 * fetches what lies `ahead_step` elements on. `half`: NULL, or the sums of the last of the vectors, of which only the first
 * half is there. */
#if defined(__AVX512F__)
enum { GEMM_STEPS = 4, GEMM_LAST = 2 };
#else
enum { GEMM_STEPS = 1, GEMM_LAST = 0 };
#endif
static inline __attribute__((always_inline)) void gemm_multiply(const int steps, const int rows, const int vectors,
                                                                int64_t K, const real *a, const int64_t a_row,
                                                                const int64_t a_col, const real *b, const int64_t b_row,
                                                                real *panel, const real *ahead, int64_t ahead_step,
                                                                vreal sum[GEMM_ROWS][GEMM_VECTORS], vhalf *half)
{
    const int whole = half ? vectors - 1 : vectors;
    const real *pair[GEMM_ROWS / 2]; /* of rows */
#pragma GCC unroll 4
    for (int i = 0; i < GEMM_ROWS / 2; i++) pair[i] = 2 * i < rows ? a + 2 * i * a_row : a;
    for (int64_t k = 0; k < K; k += steps) {
#pragma GCC unroll 4
        for (int s = 0; s < steps; s++) {
            if (ahead) __builtin_prefetch(ahead + s * ahead_step, 0, 2);
            vreal bk[GEMM_VECTORS];
            vhalf last;
            if (half) last = *(const vhalf_u *)(b + s * b_row + whole * LANES);
#pragma GCC unroll 3
            for (int v = 0; v < whole; v++) {
                bk[v] = load(b + s * b_row + v * LANES);
                if (panel) store(panel + (s * vectors + v) * LANES, bk[v] = kept(bk[v]));
            }
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const real *ak = pair[i / 2] + i % 2 * a_row + s * a_col;
                add_row(i, whole, ak, bk, sum[i]);
                if (half) half[i] = add_splat_half(half[i], ak, last);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < GEMM_ROWS / 2; i++) pair[i] += steps * a_col;
        b += steps * b_row;
        if (panel) panel += steps * vectors * LANES;
        if (ahead) ahead += steps * ahead_step;
    }
}

/* The last `steps` (GEMM_LAST or none) of a register tile, sum by sum: c[i][v] = sum[i][v] + these products, and what is added.
 * On Zen 4 a store of 512 bits takes two cycles, and many in a row keep the products of the next tile waiting; behind two
 * products each, they cost nothing. */
enum gemm_put { GEMM_STORE, GEMM_ADD, GEMM_PAST_CACHE };
static inline __attribute__((always_inline)) void
gemm_finish(const int steps, const int rows, const int vectors, const real *a, int64_t a_row, int64_t a_col,
            const real *b, int64_t b_row, real *panel, vreal sum[GEMM_ROWS][GEMM_VECTORS], const enum gemm_put put,
            const real *add, int64_t add_row, real *c, int64_t c_row)
{
    vreal bk[2][GEMM_VECTORS];
#pragma GCC unroll 2
    for (int s = 0; s < steps; s++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            bk[s][v] = kept(load(b + s * b_row + v * LANES));
            if (panel) store(panel + (s * vectors + v) * LANES, bk[s][v]);
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) {
            vreal total = sum[i][v];
#pragma GCC unroll 2
            for (int s = 0; s < steps; s++) total = add_splat(total, a + s * a_col, bk[s][v]);
            if (put == GEMM_ADD) total += load(add + v * LANES);
            if (put == GEMM_PAST_CACHE) stream(c + v * LANES, total);
            else store(c + v * LANES, total);
        }
        a += a_row, c += c_row;
        __asm__("" : "+r"(a), "+r"(c)); /* from row to row: all addresses at once are more than there are registers */
        if (put != GEMM_ADD) continue;
        add += add_row;
        __asm__("" : "+r"(add));
    }
}

/* What is read next and fetched while products are summed, as far as there are tiles to do it: rows of a matrix, `row` apart,
 * of which `run` elements, one row after the other. That way the processor sees where reading goes and is ahead of it; rows
 * by turns, a line of each, it can only wait for, and for so few at a time that the products wait too. */
typedef struct {
    const real *first; /* or NULL */
    int64_t rows, row, run;
    int64_t panel, panels; /* of the columns whose tiles share in this: the first is panel 0 */
} gemm_ahead;

/* What is added to the products, and where they go. */
typedef struct {
    real *c;
    int64_t c_row;
    const real *add; /* add[m * add_row + n]: C itself, a bias over n (add_row 0), or NULL */
    int64_t add_row;
    const real *row_bias; /* [rows] or NULL */
    int past_cache; /* whole vectors are written past the cache: c and c_row are multiples of HL_VLEN bytes */
    gemm_ahead ahead;
    /* A[m, k] = turn[m + k * turn_row], of which panels are made on the way, at a; or NULL: they are there. */
    const real *turn;
    int64_t turn_row;
} gemm_out;

/* While the panels of a strip of a matrix's columns are packed and multiplied, the next strip is fetched. Wide enough for
 * long runs, and narrow enough for two to stay in the second cache. */
enum { GEMM_STRIP = 192 * 4 / (int)sizeof(real) };

/* What the panel at column n fetches: the strip at column `next`, `run` columns of as many rows as its own strip. */
static inline gemm_ahead gemm_fetch_strip(const real *next, int64_t run, int64_t b_row, int64_t rows, int64_t n,
                                          int64_t columns)
{
    int64_t width = min64(GEMM_STRIP, columns - n / GEMM_STRIP * GEMM_STRIP);
    return (gemm_ahead){next,
                        rows,
                        b_row,
                        min64(run, GEMM_STRIP),
                        n % GEMM_STRIP / GEMM_COLUMNS,
                        (width + GEMM_COLUMNS - 1) / GEMM_COLUMNS};
}
static inline int64_t gemm_next_strip(int64_t n) { return n / GEMM_STRIP * GEMM_STRIP + GEMM_STRIP; }

/* One block of C from panels: a holds the row panels one after the other ([row][depth] in size), b the column panels
 * ([round_up(columns, LANES)][depth]). Where a_row is not 0, a is the matrix itself, a[m * a_row + k], and read where it
 * lies. Where b_row is not 0, b is the matrix itself, columns side by side, rows b_row apart, all vectors whole: its panels
 * are made on the way, in `panels`, by the first row panel, or without `panels` all read b where it lies. */
void gemm_block(int64_t rows, int64_t columns, int64_t depth, const real *a, int64_t a_row, const real *b,
                int64_t b_row, real *panels, const gemm_out *out);
#endif
