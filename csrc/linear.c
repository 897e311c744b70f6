/* Matrix products: the core that gemm.h offers to the other families, and the kernels linear, matmul and the gradients.
 *
 * Source of the blocking: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008); Van Zee and
 * van de Geijn, BLIS (2015). */
#include "activate.h"
#include "gemm.h"
#include "prepack.h"
#include "random.h"

/* ---- packing ---- */

/* Lanes of 16 bytes: the widest square that every instruction set transposes in registers in a few steps. */
typedef real quad __attribute__((vector_size(16), aligned(sizeof(real)), may_alias));
enum { QUAD = 16 / (int)sizeof(real) };

/* to[k * step + i] = from[i * stride + k] for a square of QUAD. */
static inline void transpose_quad(const real *from, int64_t stride, real *to, int64_t step)
{
#if HL_F32
    quad r0 = *(const quad *)from, r1 = *(const quad *)(from + stride), r2 = *(const quad *)(from + 2 * stride),
         r3 = *(const quad *)(from + 3 * stride);
    quad a = SHUFFLE(r0, r1, 0, 4, 1, 5), b = SHUFFLE(r2, r3, 0, 4, 1, 5);
    quad c = SHUFFLE(r0, r1, 2, 6, 3, 7), d = SHUFFLE(r2, r3, 2, 6, 3, 7);
    *(quad *)to = SHUFFLE(a, b, 0, 1, 4, 5);
    *(quad *)(to + step) = SHUFFLE(a, b, 2, 3, 6, 7);
    *(quad *)(to + 2 * step) = SHUFFLE(c, d, 0, 1, 4, 5);
    *(quad *)(to + 3 * step) = SHUFFLE(c, d, 2, 3, 6, 7);
#else
    quad r0 = *(const quad *)from, r1 = *(const quad *)(from + stride);
    *(quad *)to = SHUFFLE(r0, r1, 0, 2);
    *(quad *)(to + step) = SHUFFLE(r0, r1, 1, 3);
#endif
}

static void transpose_rim(int64_t width, int64_t depth, const real *from, int64_t stride, real *to, int64_t step)
{
    int64_t wide = width / QUAD * QUAD, deep = depth / QUAD * QUAD;
    /* A cache line is used whole before rows that fall into its place come. */
    for (int64_t line = 0; line < deep; line += LINE)
        for (int64_t i = 0; i < wide; i += QUAD)
            for (int64_t k = line; k < min64(line + LINE, deep); k += QUAD)
                transpose_quad(from + i * stride + k, stride, to + k * step + i, step);
    for (int64_t i = wide; i < width; i++)
        for (int64_t k = 0; k < deep; k++) to[k * step + i] = from[i * stride + k];
    for (int64_t k = deep; k < depth; k++)
        for (int64_t i = 0; i < width; i++) to[k * step + i] = from[i * stride + k];
}

/* Rows i and i + LANES / 2 zipped: as often as LANES can be halved, and rows are columns. */
static inline __attribute__((always_inline)) void zip_rows(vreal *rows)
{
    vreal zipped[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
        zipped[2 * i] = zip_low(rows[i], rows[i + LANES / 2]);
        zipped[2 * i + 1] = zip_high(rows[i], rows[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = zipped[i];
}
/* The same for a square of LANES. */
static void transpose_square(const real *from, int64_t stride, real *to, int64_t step)
{
    vreal rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * stride);
    zip_rows(rows);
    if (LANES > 2) zip_rows(rows);
    if (LANES > 4) zip_rows(rows);
    if (LANES > 8) zip_rows(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * step, rows[i]);
}

void gemm_transpose(int64_t width, int64_t depth, const real *from, int64_t stride, real *to, int64_t step)
{
    int64_t wide = width / LANES * LANES, deep = depth / LANES * LANES;
    enum { TOGETHER = 16 }; /* of 48 rows memory loses track when it looks ahead, of 8 it has too few */
    for (int64_t first = 0; first < wide; first += TOGETHER)
        for (int64_t k = 0; k < deep; k += LANES)
            for (int64_t i = first; i < min64(first + TOGETHER, wide); i += LANES)
                transpose_square(from + i * stride + k, stride, to + k * step + i, step);
    if (wide < width) transpose_rim(width - wide, deep, from + wide * stride, stride, to + wide, step);
    if (deep < depth) transpose_rim(width, depth - deep, from + deep, stride, to + deep * step, step);
}

void gemm_pack_panel(int64_t width, int64_t step, int64_t depth, const real *source, int64_t stride, int64_t k_stride,
                     real *panel)
{
    if (stride == 1) { /* a row of the panel lies in a row of the source */
        int64_t body = width / LANES * LANES, quads = width / QUAD * QUAD;
        for (int64_t k = 0; k < depth; k++, source += k_stride, panel += step) {
            for (int64_t i = 0; i < body; i += LANES) store(panel + i, load(source + i));
            for (int64_t i = body; i < quads; i += QUAD) *(quad *)(panel + i) = *(const quad *)(source + i);
            for (int64_t i = quads; i < width; i++) panel[i] = source[i];
            for (int64_t i = width; i < step; i++) panel[i] = 0;
        }
        return;
    }
    if (k_stride == 1) gemm_transpose(width, depth, source, stride, panel, step);
    else
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = 0; i < width; i++) panel[k * step + i] = source[i * stride + k * k_stride];
    for (int64_t k = 0; k < depth; k++)
        for (int64_t i = width; i < step; i++) panel[k * step + i] = 0;
}

static void pack_rows(int64_t rows, int64_t depth, const real *a, int64_t a_row, int64_t a_col, real *packed)
{
    for (int64_t m = 0, n; m < rows; m += n) {
        n = gemm_rows(rows - m);
        gemm_pack_panel(n, n, depth, a + m * a_row, a_row, a_col, packed + m * depth);
    }
}
static void pack_columns(int64_t columns, int64_t depth, const real *b, int64_t b_row, int64_t b_col, real *packed)
{
    for (int64_t n = 0, step; n < columns; n += step) {
        step = gemm_columns(columns - n);
        gemm_pack_panel(min64(step, columns - n), step, depth, b + n * b_col, b_col, b_row, packed + n * depth);
    }
}

void gemm_pack_b(int64_t K, int64_t N, const real *b, int64_t b_row, int64_t b_col, real *packed)
{
    int64_t depth = gemm_depth(K);
    for (int64_t k = 0; k < K; k += depth)
        pack_columns(N, min64(depth, K - k), b + k * b_row, b_row, b_col, packed + k * round_up(N, LANES));
}

/* ---- the register tile ---- */

/* The last vector of a row of C holds fewer than LANES columns. */
static void store_edge(int rows, int64_t columns, const real *tile, int64_t tile_row, const gemm_out *o)
{
    for (int i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j += LANES) {
            int64_t n = columns - j;
            vreal s = load(tile + i * tile_row + j);
            if (o->add) {
                const real *add = o->add + i * o->add_row + j;
                s += n < LANES ? load_part(add, n, (real)0) : load(add);
            }
            if (n < LANES) store_part(o->c + i * o->c_row + j, n, s);
            else store(o->c + i * o->c_row + j, s);
        }
}

/* What a tile fetches: rows `row` apart, for `steps` steps each of which goes `step` on (gemm_multiply). */
typedef struct {
    const real *first;
    int64_t row, steps, step;
} tile_ahead;

/* Columns of A side by side: of two tiles, which fill a line of float32, so that it is read once. Fetched 16 or 32 rows ahead
 * lines come too late, where rows are pages apart; 96 gain nothing more. */
enum { TURN_TILES = 2, TURN_AHEAD = 64 };
static inline __attribute__((always_inline)) void turn_columns(const real *a, int64_t a_col, int64_t panel_size,
                                                               real *panel)
{
    /* Each k may lie on another page, where nothing but this looks ahead. */
    __builtin_prefetch(a + TURN_AHEAD * a_col, 0, 2);
    __builtin_prefetch(a + TURN_AHEAD * a_col + TURN_TILES * GEMM_ROWS - 1, 0, 2);
#pragma GCC unroll 2
    for (int t = 0; t < TURN_TILES; t++) memcpy(panel + t * panel_size, a + t * GEMM_ROWS, GEMM_ROWS * sizeof(real));
}

/* `packs`: the columns of B are packed into `panel` on the way; `turns`: those of A, which are a_row apart, for this tile
 * and the next; `fetches`: what `ahead` names is fetched; `half`: of the last vector, columns are in its first half alone. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const int packs,
                                                       const int turns, const int fetches, const int half,
                                                       int64_t columns, int64_t K, const real *a, int64_t a_row,
                                                       const real *b, int64_t b_row, real *panel,
                                                       const tile_ahead *ahead, const gemm_out *o)
{
    const int full = half ? vectors - 1 : vectors;
    const int whole = !half && columns == vectors * LANES && K >= GEMM_LAST;
    vreal sum[GEMM_ROWS][GEMM_VECTORS];
    vhalf last[GEMM_ROWS], *halves = half ? last : NULL;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        real first = o->row_bias ? o->row_bias[i] : (real)0;
#pragma GCC unroll 3
        for (int v = 0; v < full; v++) sum[i][v] = splat(first);
        if (half) last[i] = first - (vhalf){0};
    }
    /* The lines of C are on their way while the products are summed. */
    if (!o->past_cache)
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) __builtin_prefetch(o->c + i * o->c_row + v * LANES, 1);
    int64_t a_col = turns ? a_row : a_row ? 1 : rows, panel_size = GEMM_ROWS * K;
    if (turns || !a_row) a_row = 1;
    if (!b_row) b_row = vectors * LANES;
    if (whole) K -= GEMM_LAST;
    const int steps = rows == GEMM_ROWS && !packs && !turns && b_row == vectors * LANES ? GEMM_STEPS : 1;
    const real *line = fetches ? ahead->first : NULL;
    int64_t step = fetches ? ahead->step : 0, most = K / steps * steps;
    for (int64_t k = 0, n; k < most; k += n) {
        n = turns ? 1 : fetches ? min64(ahead->steps, most - k) : most;
#define WHOLE_STEPS(row, col) \
    gemm_multiply(GEMM_STEPS, rows, vectors, n, a, row, col, b, vectors *LANES, NULL, line, step, sum, halves)
        if (steps == 1)
            gemm_multiply(1, rows, vectors, n, a, a_row, a_col, b, b_row, packs ? panel : NULL, line, step, sum,
                          halves);
        else a_col == 1 ? WHOLE_STEPS(a_row, 1) : WHOLE_STEPS(1, rows);
        if (turns) {
            turn_columns(a, a_col, panel_size, panel);
            panel += GEMM_ROWS;
        }
        a += n * a_col, b += n * b_row;
        if (packs) panel += n * vectors * LANES;
        if (fetches) line += ahead->row;
    }
    if (steps > 1) {
        gemm_multiply(1, rows, vectors, K - most, a, a_row, a_col, b, b_row, NULL, NULL, 0, sum, halves);
        a += (K - most) * a_col, b += (K - most) * b_row;
    }
    if (whole) {
        for (int k = 0; turns && k < GEMM_LAST; k++)
            turn_columns(a + k * a_col, a_col, panel_size, panel + k * GEMM_ROWS);
#define FINISH(put) \
    gemm_finish(GEMM_LAST, rows, vectors, a, a_row, a_col, b, b_row, packs ? panel : NULL, sum, put, o->add, \
                o->add_row, o->c, o->c_row)
        if (o->add) FINISH(GEMM_ADD);
        else if (o->past_cache) FINISH(GEMM_PAST_CACHE);
        else FINISH(GEMM_STORE);
        return;
    }
    real edge[GEMM_ROWS * GEMM_COLUMNS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 3
        for (int v = 0; v < full; v++) store(edge + (i * vectors + v) * LANES, sum[i][v]);
        if (half) {
            vhalf_u *end = (vhalf_u *)(edge + (i * vectors + full) * LANES);
            end[0] = last[i];
            end[1] = (vhalf){0};
        }
    }
    store_edge(rows, columns, edge, vectors * LANES, o);
}

typedef void (*tile_fn)(int64_t columns, int64_t K, const real *a, int64_t a_row, const real *b, int64_t b_row,
                        real *panel, const tile_ahead *ahead, const gemm_out *o);
#define TILE_AS(name, r, v, packs, turns, fetches, half) \
    static void name##_##r##_##v(int64_t columns, int64_t K, const real *a, int64_t a_row, const real *b, \
                                 int64_t b_row, real *panel, const tile_ahead *ahead, const gemm_out *o) \
    { \
        tile(r, v, packs, turns, fetches, half, columns, K, a, a_row, b, b_row, panel, ahead, o); \
    }
#define TILE(r, v) TILE_AS(tile, r, v, 0, 0, 0, 0)
#define TILES(v) TILE(1, v) TILE(2, v) TILE(3, v) TILE(4, v) TILE(5, v) TILE(6, v)
TILES(1)
TILES(2)
#if HL_REGISTERS == 32
TILES(3)
TILE(7, 1)
TILE(8, 1)
TILE(7, 2)
TILE(8, 2)
TILE(7, 3)
TILE(8, 3)
#define ROW(v) {tile_1_##v, tile_2_##v, tile_3_##v, tile_4_##v, tile_5_##v, tile_6_##v, tile_7_##v, tile_8_##v}
static const tile_fn tiles[GEMM_VECTORS][GEMM_ROWS] = {ROW(1), ROW(2), ROW(3)};
#define WHOLE_TILES(name, packs, turns, fetches, half) \
    TILE_AS(name, 8, 1, packs, turns, fetches, half) \
    TILE_AS(name, 8, 2, packs, turns, fetches, half) \
    TILE_AS(name, 8, 3, packs, turns, fetches, half) \
    static const tile_fn name##_tiles[GEMM_VECTORS] = {name##_8_1, name##_8_2, name##_8_3};
#else
#define ROW(v) {tile_1_##v, tile_2_##v, tile_3_##v, tile_4_##v, tile_5_##v, tile_6_##v}
static const tile_fn tiles[GEMM_VECTORS][GEMM_ROWS] = {ROW(1), ROW(2)};
#define WHOLE_TILES(name, packs, turns, fetches, half) \
    TILE_AS(name, 6, 1, packs, turns, fetches, half) \
    TILE_AS(name, 6, 2, packs, turns, fetches, half) \
    static const tile_fn name##_tiles[GEMM_VECTORS] = {name##_6_1, name##_6_2};
#endif
/* Tiles of GEMM_ROWS rows that do more than multiply, or multiply less. */
WHOLE_TILES(packing, 1, 0, 0, 0)
WHOLE_TILES(turning, 0, 1, 0, 0)
WHOLE_TILES(fetching, 0, 0, 1, 0)
WHOLE_TILES(packing_fetching, 1, 0, 1, 0)
#if HL_VLEN == 64
WHOLE_TILES(half_fetching, 0, 0, 1, 1)
#endif

/* What tile t of the `tiles` that fetch fetches. A line each other step leaves the ways to the caches free for the products;
 * where the tiles are too few, each step fetches one. */
static tile_ahead fetched(const gemm_ahead *next, int64_t t, int64_t tiles, int64_t depth)
{
    int64_t lines = max64((next->run + LINE - 1) / LINE, 1), pace = 2 * lines * next->rows <= tiles * depth ? 2 : 1;
    int64_t steps = min64(round_up(pace * lines, GEMM_STEPS), depth), rows = depth / max64(steps, 1);
    if (t * rows >= next->rows) return (tile_ahead){0};
    int64_t first = max64(min64(t * rows, next->rows - rows), 0);
    return (tile_ahead){next->first + first * next->row, next->row, steps, (next->run + steps - 1) / steps};
}

void gemm_block(int64_t rows, int64_t columns, int64_t depth, const real *a, int64_t a_row, const real *b,
                int64_t b_row, real *panels, const gemm_out *out)
{
    /* Where the processor fetches little by itself, tiles fetch the panel that comes next, if the panels may not all be in
     * the second cache. */
    enum { NEAR = (128 << 10) / (int)sizeof(real) };
    const int fetches_panels = hl_ahead && !out->ahead.first && columns * depth >= NEAR;
    for (int64_t n = 0, step; n < columns;
         n += step) { /* a panel of B stays in the first cache, A streams from the second */
        step = gemm_columns(columns - n);
        int64_t vectors = step / LANES;
        real *panel = panels ? panels + n * depth : NULL;
        int packs = b_row && panels;
        if (packs && gemm_rows(rows) < GEMM_ROWS) {
            gemm_pack_panel(step, step, depth, b + n, 1, b_row, panel);
            packs = 0;
        }
        const real *bn = b_row ? b + n : b + n * depth;
        gemm_ahead next = out->ahead;
        int64_t share = fetches_panels && !b_row && n + step < columns ? step * GEMM_ROWS / max64(rows, GEMM_ROWS) : 0;
        int64_t strip = gemm_next_strip(n);
        if (fetches_panels && packs && strip < columns)
            next = gemm_fetch_strip(b + strip, columns - strip, b_row, depth, n, columns);
        /* The tiles that pack fetch only if the others are too few. */
        int64_t many = rows / GEMM_ROWS, rest = packs && many > 4;
        int64_t turned = out->turn && n == 0 ? 0 : rows; /* of A, so many rows are in panels */
        for (int64_t m = 0, t = 0, height; m < rows; m += height, t++) {
            height = gemm_rows(rows - m);
            gemm_out o = {.c = out->c + m * out->c_row + n,
                          .c_row = out->c_row,
                          .add = out->add ? out->add + m * out->add_row + n : NULL,
                          .add_row = out->add_row,
                          .past_cache = out->past_cache,
                          .row_bias = out->row_bias ? out->row_bias + m : NULL};
            tile_ahead ahead = {0};
            if (share) ahead = (tile_ahead){bn + depth * (step + t * share), 0, depth, share};
            else if (next.first && height == GEMM_ROWS && t >= rest)
                ahead = fetched(&next, next.panel * (many - rest) + t - rest, next.panels * (many - rest), depth);
            tile_fn fn = tiles[vectors - 1][height - 1];
            if (packs && !m) fn = ahead.first ? packing_fetching_tiles[vectors - 1] : packing_tiles[vectors - 1];
            else if (ahead.first && height == GEMM_ROWS) fn = fetching_tiles[vectors - 1];
            int lies = b_row && (!panels || (packs && !m));
#if HL_VLEN == 64
            if (height == GEMM_ROWS && columns - n <= step - LANES / 2 && !(packs && !m)) {
                fn = half_fetching_tiles[vectors - 1];
                if (!ahead.first) ahead = (tile_ahead){a, 0, depth, 0}; /* what is there */
            }
#endif
            const real *am = a + m * (a_row ? a_row : depth);
            if (m >= turned) {
                enum { TOGETHER = TURN_TILES * GEMM_ROWS };
                int together = rows - m == TOGETHER || rows - m >= TOGETHER + GEMM_ROWS;
                int64_t count = together ? TOGETHER : height;
                turned = m + count;
                if (together && !(packs && !m)) {
                    turning_tiles[vectors - 1](min64(step, columns - n), depth, out->turn + m, out->turn_row,
                                               lies || !b_row ? bn : panel, lies ? b_row : 0, (real *)am, NULL, &o);
                    continue;
                }
                pack_rows(count, depth, out->turn + m, 1, out->turn_row, (real *)am);
            }
            fn(min64(step, columns - n), depth, am, a_row, lies || !b_row ? bn : panel, lies ? b_row : 0, panel, &ahead,
               &o);
        }
    }
}

/* ---- few rows ---- */

/* Up to GEMM_DOT_ROWS rows against a B whose columns are contiguous: dot products, B is read once and never packed. */
enum { DOT_COLUMNS = 4 };
static inline __attribute__((always_inline)) void dot_tile(const int rows, const gemm_call *g, int64_t m, int64_t n,
                                                           real (*sums)[DOT_COLUMNS])
{
    const real *a = g->a + m * g->a_row, *b = g->b + n * g->b_col;
    vreal sum[GEMM_DOT_ROWS][DOT_COLUMNS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < DOT_COLUMNS; j++) sum[i][j] = splat((real)0);
    int64_t k = 0, tail = g->K % LANES;
    for (; k < g->K - tail; k += LANES)
#pragma GCC unroll 4
        for (int j = 0; j < DOT_COLUMNS; j++) {
            vreal bj = load(b + j * g->b_col + k);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) sum[i][j] += load(a + i * g->a_row + k) * bj;
        }
    if (tail)
        for (int j = 0; j < DOT_COLUMNS; j++) {
            vreal bj = load_part(b + j * g->b_col + k, tail, (real)0);
            for (int i = 0; i < rows; i++) sum[i][j] += load_part(a + i * g->a_row + k, tail, (real)0) * bj;
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < DOT_COLUMNS; j++) sums[i][j] = sum_lanes(sum[i][j]);
}

/* LANES columns from n on for one row: every step of the trees that sum their lanes is taken for two columns at a time. */
static void dot_lanes(const gemm_call *g, int64_t n, real *c)
{
    const real *a = g->a, *b = g->b + n * g->b_col;
    vreal sum[LANES];
    int64_t tail = g->K % LANES;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) sum[j] = splat((real)0);
#pragma GCC unroll 4
    for (int first = 0; first < LANES; first += DOT_COLUMNS, b += DOT_COLUMNS * g->b_col) {
        int64_t k = 0;
        for (; k < g->K - tail; k += LANES) {
            vreal ak = load(a + k);
#pragma GCC unroll 4
            for (int j = 0; j < DOT_COLUMNS; j++) sum[first + j] += ak * load(b + j * g->b_col + k);
        }
        if (tail)
#pragma GCC unroll 4
            for (int j = 0; j < DOT_COLUMNS; j++)
                sum[first + j] += load_part(a + k, tail, (real)0) * load_part(b + j * g->b_col + k, tail, (real)0);
    }
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) sum[i] = zip_low(sum[i], sum[i + half]) + zip_high(sum[i], sum[i + half]);
    vreal total = sum[0];
    if (g->accumulate) total += load(c);
    if (g->row_bias) total += splat(g->row_bias[0]);
    if (g->column_bias) total += load(g->column_bias + n);
    store(c, total);
}

static void dot_range(const gemm_call *g, int64_t begin, int64_t end)
{
    for (; g->M == 1 && LANES % (int)DOT_COLUMNS == 0 && begin + LANES <= end; begin += LANES)
        dot_lanes(g, begin, g->c + begin);
    for (int64_t n = begin; n < end; n += DOT_COLUMNS) {
        /* Too few columns left: repeat the ones before (of the same range or not, they are there to be read). */
        int64_t first = min64(n, g->N - DOT_COLUMNS);
        real sums[GEMM_DOT_ROWS][DOT_COLUMNS];
        switch (g->M) {
        case 1: dot_tile(1, g, 0, first, sums); break;
        case 2: dot_tile(2, g, 0, first, sums); break;
        case 3: dot_tile(3, g, 0, first, sums); break;
        default: dot_tile(4, g, 0, first, sums);
        }
        for (int64_t i = 0; i < g->M; i++)
            for (int64_t j = n; j < min64(n + DOT_COLUMNS, end); j++) {
                real s = sums[i][j - first], *c = g->c + i * g->c_row + j;
                if (g->accumulate) s += *c;
                else {
                    if (g->row_bias) s += g->row_bias[i];
                    if (g->column_bias) s += g->column_bias[j];
                }
                *c = s;
            }
    }
}

/* One row against a B whose rows are contiguous: C gathers AXPY_ROWS rows of B a pass and stays in the first cache. */
enum { AXPY_ROWS = 4 };
static void axpy_range(const gemm_call *g, int64_t begin, int64_t end)
{
    for (int64_t j = begin; j < end && !g->accumulate; j++)
        g->c[j] = (g->row_bias ? g->row_bias[0] : 0) + (g->column_bias ? g->column_bias[j] : 0);
    real *c = g->c;
    int64_t k = 0, n = end - begin, body = n / LANES * LANES;
    for (; k + AXPY_ROWS <= g->K; k += AXPY_ROWS) {
        const real *b = g->b + k * g->b_row + begin;
        real a[AXPY_ROWS];
        for (int i = 0; i < AXPY_ROWS; i++) a[i] = g->a[(k + i) * g->a_col];
        for (int64_t j = 0; j < body; j += LANES) {
            vreal s = load(c + begin + j);
#pragma GCC unroll 8
            for (int i = 0; i < AXPY_ROWS; i++) {
                s += splat(a[i]) * load(b + i * g->b_row + j);
            }
            store(c + begin + j, s);
        }
        for (int64_t j = body; j < n; j++)
            for (int i = 0; i < AXPY_ROWS; i++) c[begin + j] += a[i] * b[i * g->b_row + j];
    }
    for (; k < g->K; k++)
        for (int64_t j = begin; j < end; j++) c[j] += g->a[k * g->a_col] * g->b[k * g->b_row + j];
}

static int is_dot(const gemm_call *g)
{
    return !g->packed_b && g->M <= GEMM_DOT_ROWS && g->N >= DOT_COLUMNS && g->a_col == 1 && g->b_row == 1 &&
           g->b_col != 1 && g->K >= (g->M == 1 ? GEMM_DOT_DEPTH / 2 : GEMM_DOT_DEPTH);
}
static int is_axpy(const gemm_call *g) { return !g->packed_b && g->M == 1 && g->b_col == 1; }

/* One row against panels, several in one pass over k: the processor waits where a pass ends. */
enum { ROW_PANELS = 3, ROW_VECTORS = ROW_PANELS * GEMM_VECTORS };

/* total[...] += a[1, K] times `panels` panels, the last of `last` vectors. The sums of every other k are apart. */
static inline __attribute__((always_inline)) void row_pass(const int panels, const int last, int64_t K, const real *a,
                                                           int64_t a_col, const real *b, vreal total[ROW_VECTORS])
{
    vreal sum[2][ROW_VECTORS];
    for (int v = 0; v < ROW_VECTORS; v++) sum[0][v] = sum[1][v] = splat((real)0);
#define ROW_STEP(s) \
    { \
        vreal ak = splat(a[(k + s) * a_col]); \
        _Pragma("GCC unroll 3") for (int p = 0; p < panels; p++) \
        { \
            const int vectors = p + 1 < panels ? GEMM_VECTORS : last; \
            const real *bk = b + p * GEMM_COLUMNS * K + (k + s) * vectors * LANES; \
            _Pragma("GCC unroll 3") for (int v = 0; v < vectors; v++) sum[s][p * GEMM_VECTORS + v] += \
                ak * load(bk + v * LANES); \
        } \
    }
    int64_t k = 0;
    for (; k + 2 <= K; k += 2) {
        ROW_STEP(0)
        ROW_STEP(1)
    }
    if (k < K) ROW_STEP(0)
    for (int v = 0; v < (panels - 1) * GEMM_VECTORS + last; v++) total[v] += sum[0][v] + sum[1][v];
}

static void row_range(const gemm_call *g, int64_t n0, int64_t n1)
{
    int64_t depth_max = gemm_depth(g->K);
    for (int64_t n = n0, columns; n < n1; n += columns) {
        int panels = 0, last;
        columns = 0;
        do {
            int64_t step = gemm_columns(n1 - n - columns);
            last = (int)(step / LANES), columns += step, panels++;
        } while (last == GEMM_VECTORS && panels < ROW_PANELS && n + columns < n1);
        vreal total[ROW_VECTORS];
        for (int v = 0; v < ROW_VECTORS; v++) total[v] = splat((real)0);
        for (int64_t k = 0, depth; k < g->K; k += depth) {
            depth = min64(depth_max, g->K - k);
            const real *a = g->a + k * g->a_col, *b = g->packed_b + k * round_up(g->N, LANES) + n * depth;
            switch (panels * 4 + last) {
#define PASS(p, l) \
    case p * 4 + l: row_pass(p, l, depth, a, g->a_col, b, total); break;
                PASS(1, 1)
                PASS(1, 2)
                PASS(2, 1)
                PASS(2, 2)
                PASS(3, 1)
                PASS(3, 2)
#if HL_REGISTERS == 32
                PASS(1, 3)
                PASS(2, 3)
                PASS(3, 3)
#endif
            }
        }
        for (int64_t i = 0; n + i < n1 && i < columns; i += LANES) {
            int64_t count = min64(LANES, n1 - n - i);
            real *c = g->c + n + i;
            vreal sum = total[i / LANES];
            const real *add = g->accumulate ? c : g->column_bias ? g->column_bias + n + i : NULL;
            if (add) sum += count < LANES ? load_part(add, count, (real)0) : load(add);
            if (g->row_bias) sum += splat(g->row_bias[0]);
            if (count < LANES) store_part(c, count, sum);
            else store(c, sum);
        }
    }
}

/* ---- small products ---- */

/* So few vectors that finding blocks for them costs more than multiplying them. Sums are in the order of the tiles. */
enum { SMALL_VECTORS = 2, SMALL_ROWS = 4, SMALL_PRODUCTS = 512 };

static int is_small(const gemm_call *g)
{
    int64_t vectors = (g->N + LANES - 1) / LANES;
    return !g->packed_b && g->M > 1 && vectors <= SMALL_VECTORS && g->M * g->K * vectors <= SMALL_PRODUCTS &&
           !is_dot(g);
}

/* `rows` rows of C from row m on; the last vector of B has `last` columns that may be read, of C as many as there are. */
static inline __attribute__((always_inline)) void small_rows(const int rows, const int vectors, const gemm_call *g,
                                                             int64_t m, const real *b, int64_t b_row, int64_t last)
{
    const real *a = g->a + m * g->a_row;
    vreal sum[SMALL_ROWS][SMALL_VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = splat(g->row_bias ? g->row_bias[m + i] : (real)0);
    for (int64_t k = 0; k < g->K; k++, b += b_row)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            vreal bk = v + 1 < vectors ? load(b + v * LANES) : load_part(b + v * LANES, last, (real)0);
#pragma GCC unroll 4
            for (int i = 0; i < rows; i++) sum[i][v] = add_splat(sum[i][v], a + i * g->a_row + k * g->a_col, bk);
        }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            int64_t n = v * LANES, count = min64(LANES, g->N - n);
            real *c = g->c + (m + i) * g->c_row + n;
            const real *add = g->accumulate ? c : g->column_bias ? g->column_bias + n : NULL;
            if (add) sum[i][v] += load_part(add, count, (real)0);
            store_part(c, count, sum[i][v]);
        }
}

static void small_product(const gemm_call *g)
{
    int64_t vectors = (g->N + LANES - 1) / LANES, b_row = g->b_row, last = g->N - (vectors - 1) * LANES;
    const real *b = g->b;
    real panel[SMALL_PRODUCTS / 2 * LANES] __attribute__((aligned(64)));
    if (g->b_col != 1 || HL_VLEN < 32) {
        b_row = vectors * LANES, last = LANES;
        gemm_pack_panel(g->N, b_row, g->K, g->b, g->b_col, g->b_row, panel);
        b = panel;
    }
    for (int64_t m = 0, rows; m < g->M; m += rows) {
        rows = min64(g->M - m, SMALL_ROWS);
        switch (rows * SMALL_VECTORS + vectors - 1) {
#define SMALL(r) \
    case r *SMALL_VECTORS: small_rows(r, 1, g, m, b, b_row, last); break; \
    case r *SMALL_VECTORS + 1: small_rows(r, 2, g, m, b, b_row, last); break;
            SMALL(1)
            SMALL(2)
            SMALL(3)
            SMALL(4)
        }
    }
    activate_rows(g->activation, g->M, g->N, g->c, g->c_row);
}

/* ---- blocks ---- */

/* In float32 a block of A (96 x 512) fills a fifth of a second-level cache of 1 MiB, a panel of B beside it a tenth; the
 * panels of a block of B (512 x about 768) come by turns. 96 is a multiple of both tile heights. */
enum { BLOCK_ROWS = 96, BLOCK_COLUMNS = 768 / GEMM_COLUMNS * GEMM_COLUMNS };

/* Few rows do not repay packing a B whose rows are contiguous. Of a B that is not near, some rows at a time, each from end to
 * end: so many streams the processor follows and fetches ahead. */
enum { IN_PLACE_ROWS = 2 * GEMM_ROWS, STREAMS = 16 };
static int is_in_place(const gemm_call *g) { return !g->packed_b && g->b_col == 1 && g->M <= IN_PLACE_ROWS; }
static int is_far(const gemm_call *g) { return g->K * g->b_row > (8 << 20) / (int64_t)sizeof(real); }

/* C[m0:m1, n0:n1], cut as gemm_rows and gemm_columns allow. */
static int gemm_range(const gemm_call *g, int64_t m0, int64_t m1, int64_t n0, int64_t n1)
{
    if (m0 >= m1 || n0 >= n1) return HL_OK;
    int is_row = g->packed_b && g->M == 1;
    if (is_row || is_dot(g) || is_axpy(g)) { /* all rows */
        is_row ? row_range(g, n0, n1) : is_dot(g) ? dot_range(g, n0, n1) : axpy_range(g, n0, n1);
        activate_rows(g->activation, g->M, n1 - n0, g->c + n0, g->c_row);
        return HL_OK;
    }
    int64_t depth_max = gemm_depth(g->K), rows_max = min64(m1 - m0, BLOCK_ROWS + 2 * GEMM_ROWS),
            columns_max = min64(n1 - n0, BLOCK_COLUMNS + 2 * GEMM_COLUMNS);
    int in_place = is_in_place(g);
    if (in_place && is_far(g)) depth_max = min64(depth_max, STREAMS);
    int packs = !g->packed_b && g->b_col == 1 && !in_place; /* tiles, on the way */
    /* Rows of A are read where they lie: a tile's 8 streams are no slower than a panel. Columns are packed. */
    int64_t a_row = g->a_col == 1 ? g->a_row : 0;
    int64_t a_size = a_row ? 0 : round_up(rows_max * depth_max, LANES);
    int64_t b_size = g->packed_b ? 0 : depth_max * (in_place ? LANES : round_up(columns_max, LANES));
    real *pack_a = NULL;
    if (a_size + b_size > 0 && !(pack_a = hl_take((size_t)(a_size + b_size) * sizeof(real)))) return HL_NOMEM;
    real *pack_b = pack_a ? pack_a + a_size : NULL;
    for (int64_t n = n0, columns; n < n1; n += columns) {
        columns = n1 - n < BLOCK_COLUMNS + 2 * GEMM_COLUMNS ? n1 - n : BLOCK_COLUMNS; /* no small last block */
        int64_t body = packs || in_place ? columns / LANES * LANES : 0; /* no panels of it, or none yet */
        int64_t k = 0;
        do { /* once for K = 0 */
            int64_t depth = min64(depth_max, g->K - k);
            const real *b = g->packed_b ? g->packed_b + k * round_up(g->N, LANES) + n * depth : pack_b;
            if (!g->packed_b)
                pack_columns(columns - body, depth, g->b + k * g->b_row + (n + body) * g->b_col, g->b_row, g->b_col,
                             packs ? pack_b + body * depth : pack_b);
            for (int64_t m = m0, rows; m < m1; m += rows) {
                rows = m1 - m < BLOCK_ROWS + 2 * GEMM_ROWS ? m1 - m : BLOCK_ROWS;
                const real *a = g->a + m * g->a_row + k * g->a_col;
                gemm_out out = {.c = g->c + m * g->c_row + n, .c_row = g->c_row};
                if (!a_row && g->a_row == 1) out.turn = a, out.turn_row = g->a_col;
                else if (!a_row) pack_rows(rows, depth, a, g->a_row, g->a_col, pack_a);
                if (!a_row) a = pack_a;
                if (k || g->accumulate) {
                    out.add = out.c;
                    out.add_row = g->c_row;
                } else {
                    if (g->column_bias) out.add = g->column_bias + n;
                    if (g->row_bias) out.row_bias = g->row_bias + m;
                }
                if (packs && m > m0) gemm_block(rows, body, depth, a, a_row, pack_b, 0, NULL, &out);
                else if (body)
                    gemm_block(rows, body, depth, a, a_row, g->b + k * g->b_row + n, g->b_row, packs ? pack_b : NULL,
                               &out);
                if (out.add) out.add += body;
                out.c += body;
                if (body) out.turn = NULL;
                gemm_block(rows, columns - body, depth, a, a_row, packs ? b + body * depth : b, 0, NULL, &out);
                if (k + depth >= g->K) activate_rows(g->activation, rows, columns, g->c + m * g->c_row + n, g->c_row);
            }
            k += depth;
        } while (k < g->K);
    }
    hl_give(pack_a);
    return HL_OK;
}

int gemm(const gemm_call *call)
{
    if (is_small(call)) return small_product(call), HL_OK;
    return gemm_range(call, 0, call->M, 0, call->N);
}

/* ---- over the pool ---- */

typedef struct {
    const gemm_call *call;
    int64_t batches, a_batch, b_batch, c_batch; /* `call` is the first of so many, these elements apart */
    int64_t row_blocks, column_blocks;
    real *packed; /* where B is packed first */
} gemm_job;

/* Block i of `blocks` begins here; the last one takes what the unit leaves over. */
static int64_t cut(int64_t n, int64_t blocks, int64_t unit, int64_t i)
{
    return i == blocks ? n : n / blocks * i / unit * unit;
}

/* Blocks of about 192 x 384 repay their packing; smaller ones, so that there are 16 for the threads, or 32 of a large
 * product, as long as a block stays above two million operations (20 us). Columns of A are packed once per block: for as
 * many columns of C as one packing serves, by whole cache lines, and four blocks for each thread are enough. Few rows are
 * not cut, as long as there are columns for all threads: a block packs its part of B on the way or into the second cache,
 * rows cut in two need it packed in a pass of its own. */
static void choose_blocks(gemm_job *j)
{
    enum { ROWS = 192 };
    const gemm_call *g = j->call;
    const int threads = hl_num_threads(0);
    /* Each column has its own sum, however they are cut; B is best read in long pieces of rows. */
    if (is_axpy(g) || (is_in_place(g) && is_far(g))) {
        j->row_blocks = 1;
        j->column_blocks = max64(min64(g->N / 256, threads), 1);
        return;
    }
    int packs = g->a_col != 1, few = !packs && g->M <= 2 * ROWS;
    int64_t least = (packs ? 8 : 2) * GEMM_ROWS;
    double work = 2.0 * (double)g->M * (double)g->N * (double)(g->K + 1) * (double)j->batches;
    j->row_blocks = few ? 1 : max64(g->M / ROWS, 1);
    j->column_blocks = max64(g->N / (packs ? BLOCK_COLUMNS : 384), 1);
    for (;;) {
        double tasks = (double)j->row_blocks * (double)j->column_blocks * (double)j->batches;
        if (tasks >= (packs && threads < 8 ? 4 * threads : 32) || work / tasks < (tasks < 16 ? 4e6 : 32e6)) return;
        int64_t rows = g->M / j->row_blocks, columns = g->N / j->column_blocks;
        int idle = tasks < threads;
        if (columns >= (few && idle ? 2 : 4) * GEMM_COLUMNS &&
            (packs ? rows < 2 * least && idle : few || columns >= rows))
            j->column_blocks *= 2;
        else if (rows >= 2 * least && (!few || idle)) j->row_blocks *= 2;
        else return;
    }
}

static int gemm_blocks(int64_t begin, int64_t end, void *context)
{
    const gemm_job *j = context;
    int64_t per_batch = j->row_blocks * j->column_blocks;
    const int small = per_batch == 1 && is_small(j->call);
    for (int64_t i = begin; i < end; i++) {
        gemm_call g = *j->call;
        int64_t batch = i / per_batch, row = i % per_batch % j->row_blocks, column = i % per_batch / j->row_blocks;
        g.a += batch * j->a_batch;
        g.b += batch * j->b_batch;
        g.c += batch * j->c_batch;
        if (small) {
            small_product(&g);
            continue;
        }
        int status = gemm_range(
            &g, cut(g.M, j->row_blocks, GEMM_ROWS, row), cut(g.M, j->row_blocks, GEMM_ROWS, row + 1),
            cut(g.N, j->column_blocks, GEMM_COLUMNS, column), cut(g.N, j->column_blocks, GEMM_COLUMNS, column + 1));
        if (status != HL_OK) return status;
    }
    return HL_OK;
}

/* One part of K of the columns of one block. */
static int pack_blocks(int64_t begin, int64_t end, void *context)
{
    const gemm_job *j = context;
    const gemm_call *g = j->call;
    int64_t depth_max = gemm_depth(g->K);
    for (int64_t i = begin; i < end; i++) {
        int64_t k = i / j->column_blocks * depth_max, depth = min64(depth_max, g->K - k);
        int64_t n0 = cut(g->N, j->column_blocks, GEMM_COLUMNS, i % j->column_blocks);
        int64_t n1 = cut(g->N, j->column_blocks, GEMM_COLUMNS, i % j->column_blocks + 1);
        pack_columns(n1 - n0, depth, g->b + k * g->b_row + n0 * g->b_col, g->b_row, g->b_col,
                     j->packed + k * round_up(g->N, LANES) + n0 * depth);
    }
    return HL_OK;
}

/* Parallel over blocks of C. Blocks in the same columns share one packed B where it fits 32 MiB, made in a first pass;
 * that of a B which is prepacked is made once for all calls.
 * A and B are read once per block row and column (from panels), C is written once per GEMM_DEPTH of K. */
static int gemm_batched(gemm_job *j)
{
    gemm_call g = *j->call;
    if (g.M <= 0 || g.N <= 0 || j->batches <= 0) return HL_OK;
    j->call = &g;
    choose_blocks(j);
    int64_t size = gemm_packed_b_size(g.K, g.N);
    int pays = j->row_blocks > 1 && size <= (32 << 20) / (int64_t)sizeof(real);
    hl_pack pack = {0};
    if (j->batches == 1 && g.K && !g.packed_b && (pays || (hl_is_prepacked(g.b) && !is_dot(&g) && !is_axpy(&g)))) {
        const int64_t key[] = {HL_PACK_PRODUCT, sizeof(real), LANES, g.K, g.N, g.b_row, g.b_col};
        pack = hl_pack_begin(g.b, (size_t)size * sizeof(real), key, sizeof key / sizeof *key);
        if (!pack.data) return HL_NOMEM;
        if (!pack.ready) {
            int64_t parts = (g.K - 1) / gemm_depth(g.K) + 1;
            j->packed = pack.data;
            int status = parallel_even(parts * j->column_blocks, (double)size / (double)(parts * j->column_blocks),
                                       pack_blocks, j);
            if (status != HL_OK) return hl_pack_end(&pack), status;
            hl_pack_ready(&pack);
        }
        g.packed_b = pack.data;
    }
    int64_t tasks = j->batches * j->row_blocks * j->column_blocks;
    /* 16 multiplications cost what hl_grain counts as one operation; 2, where each waits for its element of B. */
    double each = is_dot(&g) || is_axpy(&g) ? 2 : 16;
    double work = (double)g.M * (double)g.N * (double)(g.K + 1) * (double)j->batches / (double)tasks / each;
    int status = parallel_even(tasks, work, gemm_blocks, j);
    hl_pack_end(&pack);
    return status;
}

int gemm_parallel(const gemm_call *call)
{
    gemm_job job = {.call = call, .batches = 1};
    return gemm_batched(&job);
}

/* ---- kernels ---- */

/* Blocks and order as in gemm_batched: y = x w^T + b, with w read where it lies. */
int HL(linear)(const hl_linear_plan *p, const real *x, const real *w, const real *b, real *y)
{
    gemm_call g = {.M = p->M,
                   .N = p->N,
                   .K = p->K,
                   .a = x,
                   .a_row = p->K,
                   .a_col = 1,
                   .b = w,
                   .b_row = 1,
                   .b_col = p->K,
                   .c = y,
                   .c_row = p->N,
                   .column_bias = b,
                   .activation = p->activation};
    return gemm_parallel(&g);
}

/* gw = gy^T x. */
int HL(linear_grad_weight)(const hl_linear_grad_weight_plan *p, const real *gy, const real *x, real *gw)
{
    gemm_call g = {.M = p->N,
                   .N = p->K,
                   .K = p->M,
                   .a = gy,
                   .a_row = 1,
                   .a_col = p->N,
                   .b = x,
                   .b_row = p->K,
                   .b_col = 1,
                   .c = gw,
                   .c_row = p->K};
    return gemm_parallel(&g);
}

/* gx = gy w. */
int HL(linear_grad_input)(const hl_linear_grad_input_plan *p, const real *gy, const real *w, real *gx)
{
    gemm_call g = {.M = p->M,
                   .N = p->K,
                   .K = p->N,
                   .a = gy,
                   .a_row = p->N,
                   .a_col = 1,
                   .b = w,
                   .b_row = p->K,
                   .b_col = 1,
                   .c = gx,
                   .c_row = p->K};
    return gemm_parallel(&g);
}

/* One product per b; blocks of all of them are tasks side by side. */
int HL(matmul)(const hl_matmul_plan *p, const real *a, const real *b, real *y)
{
    gemm_call g = {.M = p->M,
                   .N = p->N,
                   .K = p->K,
                   .a = a,
                   .a_row = p->K,
                   .a_col = 1,
                   .b = b,
                   .b_row = p->N,
                   .b_col = 1,
                   .c = y,
                   .c_row = p->N};
    gemm_job job = {
        .call = &g, .batches = p->B, .a_batch = p->M * p->K, .b_batch = p->K * p->N, .c_batch = p->M * p->N};
    return gemm_batched(&job);
}

/* ga = gy b^T for every b. */
int HL(matmul_grad_a)(const hl_matmul_grad_a_plan *p, const real *gy, const real *b, real *ga)
{
    gemm_call g = {.M = p->M,
                   .N = p->K,
                   .K = p->N,
                   .a = gy,
                   .a_row = p->N,
                   .a_col = 1,
                   .b = b,
                   .b_row = 1,
                   .b_col = p->N,
                   .c = ga,
                   .c_row = p->K};
    gemm_job job = {
        .call = &g, .batches = p->B, .a_batch = p->M * p->N, .b_batch = p->K * p->N, .c_batch = p->M * p->K};
    return gemm_batched(&job);
}

/* gb = a^T gy for every b. */
int HL(matmul_grad_b)(const hl_matmul_grad_b_plan *p, const real *a, const real *gy, real *gb)
{
    gemm_call g = {.M = p->K,
                   .N = p->N,
                   .K = p->M,
                   .a = a,
                   .a_row = 1,
                   .a_col = p->K,
                   .b = gy,
                   .b_row = p->N,
                   .b_col = 1,
                   .c = gb,
                   .c_row = p->N};
    gemm_job job = {
        .call = &g, .batches = p->B, .a_batch = p->M * p->K, .b_batch = p->M * p->N, .c_batch = p->K * p->N};
    return gemm_batched(&job);
}

typedef struct {
    const hl_linear_grad_bias_plan *p;
    const real *gy;
    real *gb;
} grad_bias_job;

enum { BIAS_COLUMNS = 4 * LANES };

static int grad_bias_columns(int64_t begin, int64_t end, void *context)
{
    const grad_bias_job *j = context;
    int64_t M = j->p->M, N = j->p->N;
    for (int64_t n = begin * BIAS_COLUMNS; n < min64(end * BIAS_COLUMNS, N); n += BIAS_COLUMNS) {
        const real *gy = j->gy + n;
        int64_t width = min64(BIAS_COLUMNS, N - n);
        vreal sum[4] = {splat((real)0), splat((real)0), splat((real)0), splat((real)0)};
        if (width == BIAS_COLUMNS) {
            for (int64_t m = 0; m < M; m++)
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) sum[v] += load(gy + m * N + v * LANES);
            for (int v = 0; v < 4; v++) store(j->gb + n + v * LANES, sum[v]);
            continue;
        }
        for (int64_t i = 0; i < width; i += LANES) {
            int64_t lanes = min64(LANES, width - i);
            vreal s = splat((real)0);
            for (int64_t m = 0; m < M; m++) s += load_part(gy + m * N + i, lanes, (real)0);
            store_part(j->gb + n + i, lanes, s);
        }
    }
    return HL_OK;
}

/* Parallel over blocks of columns, whose sums stay in registers. Reads gy once. */
int HL(linear_grad_bias)(const hl_linear_grad_bias_plan *p, const real *gy, real *gb)
{
    grad_bias_job job = {p, gy, gb};
    return hl_parallel_for((p->N + BIAS_COLUMNS - 1) / BIAS_COLUMNS, hl_grain((double)p->M * BIAS_COLUMNS / 4),
                           grad_bias_columns, &job);
}

/* ---- dropout ---- */

typedef struct {
    const hl_dropout_plan *p;
    const real *x;
    real *y;
} dropout_job;

static int dropout_range(int64_t begin, int64_t end, void *context)
{
    const dropout_job *j = context;
    const hl_dropout_plan *p = j->p;
    const real scale = (real)p->scale;
    enum { PIECE = 256 };
    uint32_t bits[PIECE];
    for (int64_t i = begin; i < end; i += PIECE) {
        int64_t n = min64(PIECE, end - i);
        random24(i, n, p->seed, bits);
        for (int64_t k = 0; k < n; k++) {
            real kept = j->x[i + k] * scale;
            j->y[i + k] = (int64_t)bits[k] >= p->drop ? kept : (real)0;
        }
    }
    return HL_OK;
}

/* Parallel over elements. Reads x once, writes y once. */
int HL(dropout)(const hl_dropout_plan *p, const real *x, real *y)
{
    dropout_job job = {p, x, y};
    return hl_parallel_for(p->N, hl_grain(4), dropout_range, &job);
}
