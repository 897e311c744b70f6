/* Scaled dot-product attention, its gradients, and what stands around it.
 *
 * Everything stands turned: a block of QUERIES queries lies across the vectors, keys go down. The scores k q^T and the sums
 * v^T w then read keys and values where they lie, an element at a time for all queries of the block; only the queries are
 * turned when a block begins, and the results when it ends. Maxima and sums of the softmax need no step across lanes, and
 * a tile of at most KEYS x QUERIES scores is all that is ever stored. Scores are kept in units of ln 2.
 *
 * Nothing of a hidden key or value may reach a result, not even a NaN: products with weights that are 0 would let it
 * through, so a result that is not finite where keys are hidden is made again, key by key. */
#include "gemm.h"
#include "random.h"
#include "vmath.h"

/* Three vectors of 16 across, a multiple of every register tile. A tile of scores with the values it meets takes 3/4 of a
 * first-level cache of 32 KiB. */
enum { QUERIES = 48, KEYS = 1024 / (int)sizeof(real) };

#define LOG2E ((real)1.4426950408889634)
#define LN2 ((real)0.6931471805599453)

typedef struct {
    int64_t B, H, L, D, G, S, E, MB, MH, ML;
    real scale, softcap;
    int64_t left, right, drop;
    real keep_scale;
    int64_t seed;
    const real *q, *k, *v, *bias;
    const uint8_t *allowed;
    const real *y_in, *lse_in, *gy;
    real *y, *lse, *w, *gq, *gk, *gv, *gbias;
    hl_strides qs, ks, vs, ys; /* of q, k, v, y */
    int64_t strip; /* queries in a row that blocks are cut from */
    int64_t parts; /* of the keys, in the gradients */
} job;

static int hides(const job *j) { return j->bias || j->allowed || j->left < j->L || j->right < j->S; }

/* Where query `row` of all B H L, or the keys of a head, begin; arrays without strides of their own are contiguous. */
static hl_strides contiguous(int64_t heads, int64_t rows, int64_t width)
{
    return (hl_strides){heads * rows * width, rows * width, width};
}
static int64_t query_at(const job *j, hl_strides s, int64_t row)
{
    return row / j->L / j->H * s.batch + row / j->L % j->H * s.head + row % j->L * s.row;
}
static int64_t keys_at(const job *j, hl_strides s, int64_t head)
{
    return head / j->G * s.batch + head % j->G * s.head;
}
/* As many of `rows` queries of heads that share keys as lie s.row apart. */
static int64_t even_rows(const job *j, hl_strides s, int64_t row, int64_t rows)
{
    return s.head == j->L * s.row ? rows : min64(rows, j->L - row % j->L);
}

/* ---- products ---- */

/* What is read or written after a product and is on its way to the second cache while that is summed, a share with each
 * register tile. All at once its lines would wait for each other, and the processor for them. */
typedef struct {
    const real *x;
    int64_t rows, stride, width, at; /* x is at column `at` of the first row */
} soon;

static inline void fetch_line(soon *s)
{
    __builtin_prefetch(s->x + s->at, 0, 2);
    s->at += LINE;
    if (s->at < s->width) return;
    s->at = 0, s->x += s->stride, s->rows--;
}

/* c[m * c_row + n] = (add ? c : 0) + the sum over k < depth of a[m * a_row + k * a_step] b[k * b_row + n]. */
typedef struct {
    int64_t depth;
    const real *a;
    int64_t a_row, a_step;
    const real *b;
    int64_t b_row;
    real *c;
    int64_t c_row;
    int add;
    soon soon;
} operands;

static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const operands *o)
{
    vreal sum[GEMM_ROWS][GEMM_VECTORS];
    const real *a = o->a, *b = o->b;
    const int64_t a_row = o->a_row, a_step = o->a_step, b_row = o->b_row;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = splat((real)0);
    const int last = o->depth >= GEMM_LAST ? GEMM_LAST : 0;
    int64_t depth = o->depth - last;
    if (b_row == QUERIES && (a_step == 1 || a_row == 1)) {
        int64_t most = depth / GEMM_STEPS * GEMM_STEPS;
        if (a_step == 1) /* scores: keys as they lie */
            gemm_multiply(GEMM_STEPS, rows, vectors, most, a, a_row, 1, b, QUERIES, NULL, NULL, 0, sum, NULL);
        else /* sums: values as they lie */
            gemm_multiply(GEMM_STEPS, rows, vectors, most, a, 1, a_step, b, QUERIES, NULL, NULL, 0, sum, NULL);
        a += most * a_step, b += most * QUERIES, depth -= most;
    }
    if (a_row == 1) gemm_multiply(1, rows, vectors, depth, a, 1, a_step, b, b_row, NULL, NULL, 0, sum, NULL);
    else gemm_multiply(1, rows, vectors, depth, a, a_row, a_step, b, b_row, NULL, NULL, 0, sum, NULL);
    a += depth * a_step, b += depth * b_row;
#define FINISH(last, put) \
    gemm_finish(last, rows, vectors, a, a_row, a_step, b, b_row, NULL, sum, put, o->c, o->c_row, o->c, o->c_row)
    if (last < GEMM_LAST) o->add ? FINISH(0, GEMM_ADD) : FINISH(0, GEMM_STORE);
    else o->add ? FINISH(GEMM_LAST, GEMM_ADD) : FINISH(GEMM_LAST, GEMM_STORE);
}

typedef void (*tile_fn)(const operands *o);
#define TILE(r, v) \
    static void tile_##r##_##v(const operands *o) { tile(r, v, o); }
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
#else
#define ROW(v) {tile_1_##v, tile_2_##v, tile_3_##v, tile_4_##v, tile_5_##v, tile_6_##v}
static const tile_fn tiles[GEMM_VECTORS][GEMM_ROWS] = {ROW(1), ROW(2)};
#endif

/* M x N results, N whole vectors. A panel of b stays in the first cache while a goes by. */
static void product(int64_t M, int64_t N, operands o)
{
    int64_t share = o.soon.rows * ((o.soon.width + LINE - 1) / LINE) * GEMM_ROWS / max64(M, 1) + 1;
    for (int64_t n = 0, columns; n < N; n += columns) {
        columns = gemm_columns(N - n);
        operands t = o;
        t.b += n, t.c += n;
        for (int64_t m = 0, rows; m < M; m += rows) {
            rows = gemm_rows(M - m);
            for (int64_t i = 0; i < share && o.soon.rows > 0; i++) fetch_line(&o.soon);
            tiles[columns / LANES - 1][rows - 1](&t);
            t.a += rows * o.a_row, t.c += rows * o.c_row;
        }
    }
}

/* ---- blocks of queries ---- */

/* Queries [row, row + rows) of all B H L; the heads that share keys lie side by side. */
typedef struct {
    int64_t row, rows, width;    /* width: rows rounded up to whole vectors; queries beyond are 0 and lead nowhere */
    int64_t low, high;           /* the places l in [0, L) that they cover */
    int64_t head, begin, end;    /* of keys; those outside [begin, end) are hidden by the window */
    soon next;                   /* the queries of the next block */
} block;

static block block_at(const job *j, int64_t row, int64_t rows)
{
    block b = {.row = row,
               .rows = rows,
               .width = round_up(rows, LANES),
               .low = row % j->L,
               .head = row / (j->H / j->G * j->L)};
    b.high = b.low + rows;
    if (b.high > j->L) b.low = 0, b.high = j->L;
    b.begin = max64(b.low - j->left, 0);
    b.end = min64(b.high + j->right, j->S);
    return b;
}
static soon fetched(const job *j, const real *x, hl_strides s, int64_t row, int64_t rows, int64_t width)
{
    return (soon){x + query_at(j, s, row), even_rows(j, s, row, rows), s.row, width, 0};
}
static int64_t blocks_per_strip(const job *j) { return (j->strip + QUERIES - 1) / QUERIES; }
static block block_of_task(const job *j, int64_t task)
{
    int64_t strip = task / blocks_per_strip(j), first = task % blocks_per_strip(j) * QUERIES;
    return block_at(j, strip * j->strip + first, min64(QUERIES, j->strip - first));
}
/* Short heads that share keys make one strip. */
static void choose_strip(job *j) { j->strip = j->L < QUERIES ? j->H / j->G * j->L : j->L; }
static int64_t block_count(const job *j) { return j->B * j->H * j->L / j->strip * blocks_per_strip(j); }

/* Keys [begin, end) are cut in even tiles of at most KEYS. */
static int64_t tile_keys(int64_t begin, int64_t end)
{
    int64_t count = (end - begin + KEYS - 1) / KEYS;
    return count ? min64(round_up((end - begin + count - 1) / count, GEMM_ROWS), KEYS) : 0;
}

/* turned[d][i] = x[row i][d] factor, 0 for the queries that are not there. */
static void turn(const job *j, const block *b, const real *x, hl_strides s, int64_t D, real factor, real *turned)
{
    for (int64_t i = 0, n; i < b->rows; i += n) {
        n = even_rows(j, s, b->row + i, b->rows - i);
        gemm_transpose(n, D, x + query_at(j, s, b->row + i), s.row, turned + i, QUERIES);
    }
    for (int64_t d = 0; d < D; d++) {
        real *t = turned + d * QUERIES;
        for (int64_t i = b->rows; i < b->width; i++) t[i] = 0;
        for (int64_t i = 0; i < b->width; i += LANES) store(t + i, load(t + i) * splat(factor));
    }
}
/* What queries are turned with so that products are scores in units of ln 2, or what is capped. */
static real query_factor(const job *j) { return j->softcap > 0 ? j->scale / j->softcap : j->scale * LOG2E; }

/* What is added to the scores of query `row` with keys [s0, s0 + n): its bias, -inf where the key is hidden. */
static void mask_row(const job *j, int64_t row, int64_t s0, int64_t n, real *mask)
{
    const real low = (real)-INFINITY;
    int64_t l = row % j->L, h = row / j->L % j->H, b = row / j->L / j->H;
    int64_t at = (((j->MB > 1 ? b : 0) * j->MH + (j->MH > 1 ? h : 0)) * j->ML + (j->ML > 1 ? l : 0)) * j->S + s0;
    if (j->bias) memcpy(mask, j->bias + at, (size_t)n * sizeof(real));
    else
        for (int64_t s = 0; s < n; s++) mask[s] = 0;
    if (j->allowed)
        for (int64_t s = 0; s < n; s++) mask[s] = j->allowed[at + s] ? mask[s] : low;
    int64_t first = min64(max64(l - j->left - s0, 0), n), last = max64(min64(l + j->right + 1 - s0, n), 0);
    for (int64_t s = 0; s < first; s++) mask[s] = low;
    for (int64_t s = last; s < n; s++) mask[s] = low;
}

/* Scratch of a task, from one hl_take: tiles [KEYS][QUERIES], and what masks and dropout are made in. */
typedef struct { real *scores, *extra, *rows; } workspace;
enum { TILE_SIZE = KEYS * QUERIES };

/* extra[s][i] = what `fill` says of query i and key s0 + s. */
static void turned_rows(const job *j, const block *b, int64_t s0, int64_t n, const workspace *w,
                        void (*fill)(const job *, int64_t, int64_t, int64_t, real *))
{
    for (int64_t i = 0; i < b->width; i++)
        if (i < b->rows) fill(j, b->row + i, s0, n, w->rows + i * KEYS);
        else memset(w->rows + i * KEYS, 0, (size_t)n * sizeof(real));
    gemm_transpose(b->width, n, w->rows, KEYS, w->extra, QUERIES);
}

/* -inf where the window, and no mask, hides a key: query i sees the keys s0 + s with first[i] <= s < last[i]. */
static void hide(const job *j, const block *b, int64_t s0, int64_t n, real *scores)
{
    if (s0 >= b->high - 1 - j->left && s0 + n <= b->low + j->right + 1) return;
    ireal first[QUERIES] = {0}, last[QUERIES];
    int64_t all_from = 0, all_to = n; /* keys that all queries see */
    for (int64_t i = 0; i < QUERIES; i++) last[i] = (ireal)n;
    for (int64_t i = 0; i < b->rows; i++) {
        int64_t l = (b->row + i) % j->L - s0;
        first[i] = (ireal)min64(max64(l - j->left, 0), n), last[i] = (ireal)max64(min64(l + j->right + 1, n), 0);
        all_from = max64(all_from, first[i]), all_to = min64(all_to, last[i]);
    }
    const int64_t ranges[2][2] = {{0, all_from}, {max64(all_from, all_to), n}};
    const vreal low = splat((real)-INFINITY);
    for (int r = 0; r < 2; r++)
        for (int64_t s = ranges[r][0]; s < ranges[r][1]; s++)
            for (int64_t i = 0; i < b->width; i += LANES) {
                vint from, to, key = (ireal)s - (vint){0};
                memcpy(&from, first + i, sizeof from);
                memcpy(&to, last + i, sizeof to);
                real *score = scores + s * QUERIES + i;
                store(score, blend((from > key) | (to <= key), low, load(score)));
            }
}

/* Scores [n][QUERIES] in units of ln 2 of the queries that were turned, -inf where hidden; `slopes`, when not NULL, gets the
 * derivative of the soft cap. */
static void make_scores(const job *j, const block *b, const real *turned, int64_t s0, int64_t n, const workspace *w,
                        real *slopes)
{
    const vreal low = splat((real)-INFINITY), one = splat((real)1);
    soon next = s0 == b->begin ? b->next : (soon){0};
    if (b->low == 0 && j->v) /* the first block of a head finds the values in no cache */
        next = (soon){j->v + keys_at(j, j->vs, b->head) + s0 * j->vs.row, n, j->vs.row, j->E, 0};
    product(n, b->width,
            (operands){.depth = j->D,
                       .a = j->k + keys_at(j, j->ks, b->head) + s0 * j->ks.row,
                       .a_row = j->ks.row,
                       .a_step = 1,
                       .b = turned,
                       .b_row = QUERIES,
                       .c = w->scores,
                       .c_row = QUERIES,
                       .soon = next});
    if (j->softcap > 0)
        for (int64_t s = 0; s < n; s++)
            for (int64_t i = s * QUERIES; i < s * QUERIES + b->width; i += LANES) {
                vreal t = vtanh(load(w->scores + i));
                store(w->scores + i, t * splat(j->softcap * LOG2E));
                if (slopes) store(slopes + i, one - t * t);
            }
    if (j->bias || j->allowed) {
        turned_rows(j, b, s0, n, w, mask_row);
        for (int64_t s = 0; s < n; s++)
            for (int64_t i = s * QUERIES; i < s * QUERIES + b->width; i += LANES) {
                vreal mask = load(w->extra + i);
                store(w->scores + i, blend(mask == low, low, load(w->scores + i) + mask * splat(LOG2E)));
            }
    } else hide(j, b, s0, n, w->scores);
}

/* What the weights of query `row` are multiplied with. */
static void kept_row(const job *j, int64_t row, int64_t s0, int64_t n, real *kept)
{
    uint32_t bits[KEYS];
    for (int64_t s = 0, m; s < n; s += m) {
        m = min64(KEYS, n - s);
        random24(row * j->S + s0 + s, m, j->seed, bits);
        for (int64_t i = 0; i < m; i++) kept[s + i] = (int64_t)bits[i] >= j->drop ? j->keep_scale : (real)0;
    }
}

/* ---- forward, key by key ---- */

static real dot(const real *a, const real *b, int64_t n)
{
    vreal sum = splat((real)0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(a + i) * load(b + i);
    if (i < n) sum += load_part(a + i, n - i, (real)0) * load_part(b + i, n - i, (real)0);
    return sum_lanes(sum);
}

/* y += a x */
static void add_scaled(real *y, real a, const real *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

/* Products of one query with keys [s0, s0 + n) become scores in units of ln 2; mask[n] is scratch. */
static void finish_row(const job *j, int64_t row, int64_t s0, int64_t length, real *scores, real *mask)
{
    const vreal low = splat((real)-INFINITY);
    mask_row(j, row, s0, length, mask);
    for (int64_t s = 0; s < length; s += LANES) {
        int64_t n = min64(LANES, length - s);
        vreal x = load_part(scores + s, n, (real)0) * splat(query_factor(j)), m = load_part(mask + s, n, (real)0);
        if (j->softcap > 0) x = vtanh(x) * splat(j->softcap * LOG2E);
        store_part(scores + s, n, blend(m == low, low, x + m * splat(LOG2E)));
    }
}

static real row_max(const real *row, int64_t n)
{
    vreal m = splat((real)-INFINITY);
    int64_t s = 0;
    for (; s + LANES <= n; s += LANES) m = vmax(m, load(row + s));
    if (s < n) m = vmax(m, load_part(row + s, n - s, (real)-INFINITY));
    return max_lanes(m);
}

/* One query without the values of hidden keys. scores[2 S] is scratch. */
static void careful_query(const job *j, int64_t row, real *scores)
{
    int64_t head = row / (j->H / j->G * j->L);
    const real *q = j->q + query_at(j, j->qs, row), *k = j->k + keys_at(j, j->ks, head),
               *v = j->v + keys_at(j, j->vs, head);
    real *y = j->y + query_at(j, j->ys, row), *kept = scores + j->S;
    for (int64_t s = 0; s < j->S; s++) scores[s] = dot(q, k + s * j->ks.row, j->D);
    finish_row(j, row, 0, j->S, scores, kept);
    real top = row_max(scores, j->S), total = 0;
    if (top == (real)-INFINITY) top = 0;
    if (j->drop) kept_row(j, row, 0, j->S, kept);
    for (int64_t i = 0; i < j->E; i++) y[i] = 0;
    for (int64_t s = 0; s < j->S; s++) {
        if (scores[s] == (real)-INFINITY) continue;
        real weight = vexp2(splat(scores[s] - top))[0];
        total += weight;
        add_scaled(y, j->drop ? weight * kept[s] : weight, v + s * j->vs.row, j->E);
    }
    if (total != 0)
        for (int64_t i = 0; i < j->E; i++) y[i] /= total;
}

/* Makes those of the queries again where something hidden may have come in. */
static int check_queries(const job *j, int64_t row, int64_t rows)
{
    real *careful = NULL;
    for (int64_t i = row; i < row + rows && hides(j); i++)
        if (has_nonfinite(j->y + query_at(j, j->ys, i), j->E)) {
            if (!careful && !(careful = hl_take((size_t)(2 * j->S) * sizeof(real)))) return HL_NOMEM;
            careful_query(j, i, careful);
        }
    hl_give(careful);
    return HL_OK;
}

/* ---- forward, few queries ---- */

/* Up to FEW queries: of more, half-empty vectors cost less than a pass over the keys for each PAIR, which shares what is
 * loaded. */
enum { FEW = LANES > 8 ? 5 : LANES / 2, PAIR = 2, DOTS = LANES < 4 ? LANES : 4 };

/* Neighbours among n vectors are added lane by lane until one vector is left: for n = LANES, their sums in order. */
static inline __attribute__((always_inline)) vreal fold(const int n, vreal *x)
{
#pragma GCC unroll 4
    for (int m = n / 2; m > 0; m /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) x[i] = evens(x[2 * i], x[2 * i + 1]) + odds(x[2 * i], x[2 * i + 1]);
    return x[0];
}

/* The products of `rows` queries with LANES neighbouring keys, DOTS of them side by side. */
static inline __attribute__((always_inline)) void dots(const int rows, const real *const *q, const real *k,
                                                       int64_t k_row, int64_t D, int64_t ahead, real *const *scores)
{
    vreal group[PAIR][LANES / DOTS];
    int64_t body = D / LANES * LANES;
#pragma GCC unroll 4
    for (int g = 0; g < LANES / DOTS; g++, k += DOTS * k_row) {
        vreal sum[PAIR][DOTS];
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < DOTS; i++) sum[r][i] = splat((real)0);
        for (int64_t d = 0; d < body; d += LANES)
#pragma GCC unroll 4
            for (int i = 0; i < DOTS; i++) {
                fetch(k + i * k_row + d, ahead);
                vreal key = load(k + i * k_row + d);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) sum[r][i] += load(q[r] + d) * key;
            }
        if (body < D)
#pragma GCC unroll 4
            for (int i = 0; i < DOTS; i++) {
                vreal key = load_part(k + i * k_row + body, D - body, (real)0);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) sum[r][i] += load_part(q[r] + body, D - body, (real)0) * key;
            }
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) group[r][g] = fold(DOTS, sum[r]);
    }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++) store(scores[r], fold(LANES / DOTS, group[r]));
}
static __attribute__((noinline)) void dots_of_one(const real *const *q, const real *k, int64_t k_row, int64_t D,
                                                  int64_t ahead, real *const *scores)
{
    dots(1, q, k, k_row, D, ahead, scores);
}
static __attribute__((noinline)) void dots_of_two(const real *const *q, const real *k, int64_t k_row, int64_t D,
                                                  int64_t ahead, real *const *scores)
{
    dots(2, q, k, k_row, D, ahead, scores);
}

/* row = 2^(row - base); the sum. */
static real row_exp(real *row, int64_t n, real base)
{
    vreal sum = splat((real)0);
    int64_t s = 0;
    for (; s + LANES <= n; s += LANES) {
        vreal e = vexp2(load(row + s) - splat(base));
        store(row + s, e);
        sum += e;
    }
    if (s < n) {
        vreal e = vexp2(load_part(row + s, n - s, (real)-INFINITY) - splat(base));
        store_part(row + s, n - s, e);
        sum += e; /* the lanes beyond hold 2^-inf = 0 */
    }
    return sum_lanes(sum);
}

/* y[r][e ...] += the sum of w[r][s] v[s * v_row], `vectors` wide, for `rows` queries. */
static inline __attribute__((always_inline)) void weighted_columns(const int rows, const int vectors,
                                                                   const real *const *w, int64_t n, const real *v,
                                                                   int64_t v_row, int64_t ahead, real *const *y,
                                                                   int64_t e)
{
    vreal sum[PAIR][8];
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) sum[r][i] = load(y[r] + e + i * LANES);
    v += e;
    for (int64_t s = 0; s < n; s++, v += v_row)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) {
            fetch(v + i * LANES, ahead);
            vreal value = load(v + i * LANES);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) sum[r][i] += splat(w[r][s]) * value;
        }
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < vectors; i++) store(y[r] + e + i * LANES, sum[r][i]);
}

/* y[r][E] += the sum of w[r][s] v[s][E] over n keys. */
static void weighted_sum(int rows, const real *const *w, int64_t n, const real *v, int64_t v_row, int64_t E,
                         int64_t ahead, real *const *y)
{
    const int wide = rows == 1 ? 8 : 4; /* so many sums are under way, and stay in registers */
    int64_t e = 0;
    for (int64_t vectors; e + LANES <= E; e += vectors * LANES) {
        vectors = min64((E - e) / LANES, wide);
#define COLUMNS(r, n_vectors) \
    case r * 16 + n_vectors: weighted_columns(r, n_vectors, w, n, v, v_row, ahead, y, e); break;
        switch (rows * 16 + vectors) {
            COLUMNS(1, 1)
            COLUMNS(1, 2)
            COLUMNS(1, 3)
            COLUMNS(1, 4)
            COLUMNS(1, 5)
            COLUMNS(1, 6)
            COLUMNS(1, 7)
            COLUMNS(1, 8)
            COLUMNS(2, 1)
            COLUMNS(2, 2)
            COLUMNS(2, 3)
            COLUMNS(2, 4)
        }
    }
    for (int r = 0; r < rows && e < E; r++) {
        vreal sum = load_part(y[r] + e, E - e, (real)0);
        for (int64_t s = 0; s < n; s++) sum += splat(w[r][s]) * load_part(v + s * v_row + e, E - e, (real)0);
        store_part(y[r] + e, E - e, sum);
    }
}

/* Queries [row, row + rows) that read the same keys, each along its keys: they would leave half of a vector empty. They take
 * turns at a tile of keys, then of values. scratch: (rows + 1) S. */
static int few_queries(const job *j, int64_t row, int64_t rows, real *scratch)
{
    int64_t D = j->D, E = j->E, k_row = j->ks.row, v_row = j->vs.row;
    block b = block_at(j, row, rows);
    int64_t n = max64(b.end - b.begin, 0);
    const real *k = j->k + keys_at(j, j->ks, b.head) + b.begin * k_row,
               *v = j->v + keys_at(j, j->vs, b.head) + b.begin * v_row;
    real *extra = scratch + rows * n;
    for (int64_t s0 = 0; s0 < n; s0 += KEYS)
        for (int64_t i = 0; i < rows; i += PAIR) {
            const int two = i + 1 < rows;
            const real *q[PAIR] = {j->q + query_at(j, j->qs, row + i), j->q + query_at(j, j->qs, row + i + two)};
            int64_t s = s0, end = min64(s0 + KEYS, n), ahead = i ? 0 : hl_ahead;
            for (; s < end; s += LANES) {
                real *scores[PAIR] = {scratch + i * n + s, scratch + (i + two) * n + s};
                if (s + LANES <= end) (two ? dots_of_two : dots_of_one)(q, k + s * k_row, k_row, D, ahead, scores);
                else
                    for (int r = 0; r <= two; r++)
                        for (int64_t t = 0; s + t < end; t++) scores[r][t] = dot(q[r], k + (s + t) * k_row, D);
            }
        }
    for (int64_t i = 0; i < rows; i++) {
        real *scores = scratch + i * n;
        finish_row(j, row + i, b.begin, n, scores, extra);
        real top = row_max(scores, n), total = row_exp(scores, n, top == (real)-INFINITY ? 0 : top);
        j->lse[row + i] = total == 0 ? (real)-INFINITY : top * LN2 + vlog(splat(total))[0];
        real share = total == 0 ? 0 : 1 / total;
        if (j->drop) kept_row(j, row + i, b.begin, n, extra);
        for (int64_t s = 0; s < n; s++) scores[s] *= j->drop ? share * extra[s] : share;
        memset(j->y + query_at(j, j->ys, row + i), 0, (size_t)E * sizeof(real));
    }
    for (int64_t s0 = 0; s0 < n; s0 += KEYS)
        for (int64_t i = 0; i < rows; i += PAIR) {
            const int two = i + 1 < rows;
            const real *weights[PAIR] = {scratch + i * n + s0, scratch + (i + two) * n + s0};
            real *y[PAIR] = {j->y + query_at(j, j->ys, row + i), j->y + query_at(j, j->ys, row + i + two)};
            weighted_sum(1 + two, weights, min64(KEYS, n - s0), v + s0 * v_row, v_row, E, i ? 0 : hl_ahead, y);
        }
    return check_queries(j, row, rows);
}

/* ---- forward, many queries ---- */

/* Weights may be so many powers of two above 1 before the maximum that they are relative to is raised. */
enum { SLACK = 8 };

/* Scores [n][QUERIES] of LANES queries become weights relative to `top`, their maximum or not far below it; returns what
 * the weights so far shrink by, mostly 1. */
static vreal weigh(real *scores, int64_t n, real *top, real *total)
{
    vreal before = load(top), high = before, other = before, sum = splat((real)0);
    int64_t s = 0;
    for (; s + 2 <= n; s += 2) {
        high = vmax(high, load(scores + s * QUERIES));
        other = vmax(other, load(scores + (s + 1) * QUERIES));
    }
    if (s < n) high = vmax(high, load(scores + s * QUERIES));
    high = vmax(high, other);
    vreal base = blend(high == splat((real)-INFINITY), splat((real)0), high), shrink = vexp2(before - base);
    for (s = 0; s < n; s++) {
        vreal e = vexp2(load(scores + s * QUERIES) - base);
        store(scores + s * QUERIES, e);
        sum += e;
    }
    store(total, load(total) * shrink + sum);
    store(top, high);
    return shrink;
}

static int query_blocks(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t D = j->D, E = j->E;
    int64_t size = max64(3 * TILE_SIZE + (D + E) * QUERIES, (FEW + 1) * j->S);
    real *scratch = hl_take((size_t)size * sizeof(real));
    if (!scratch) return HL_NOMEM;
    workspace w = {scratch, scratch + TILE_SIZE, scratch + 2 * TILE_SIZE};
    real *turned = scratch + 3 * TILE_SIZE, *sums = turned + D * QUERIES;
    int status = HL_OK;
    for (int64_t task = begin; task < end && status == HL_OK; task++) {
        block b = block_of_task(j, task);
        int64_t few = b.rows % LANES <= FEW ? b.rows % LANES : 0;
        if (few) status = few_queries(j, b.row + b.rows - few, few, scratch);
        if (few == b.rows) continue;
        b = block_at(j, b.row, b.rows - few);
        if (task + 1 < block_count(j)) {
            block next = block_of_task(j, task + 1);
            b.next = fetched(j, j->q, j->qs, next.row, next.rows, D);
        }
        real top[QUERIES], total[QUERIES];
        for (int64_t i = 0; i < QUERIES; i++) top[i] = (real)-INFINITY, total[i] = 0;
        if (b.begin >= b.end) memset(sums, 0, (size_t)(E * QUERIES) * sizeof(real));
        else turn(j, &b, j->q, j->qs, D, query_factor(j), turned);
        int64_t step = tile_keys(b.begin, b.end);
        for (int64_t s0 = b.begin, n; s0 < b.end; s0 += n) {
            n = min64(step, b.end - s0);
            make_scores(j, &b, turned, s0, n, &w, NULL);
            for (int64_t i = 0; i < b.width; i += LANES) {
                vreal shrink = weigh(w.scores + i, n, top + i, total + i);
                if (s0 > b.begin && lane_bits(shrink != splat((real)1)))
                    for (int64_t e = i; e < E * QUERIES; e += QUERIES) store(sums + e, load(sums + e) * shrink);
            }
            if (j->drop) {
                turned_rows(j, &b, s0, n, &w, kept_row);
                for (int64_t i = 0; i < n * QUERIES; i += LANES)
                    store(w.scores + i, load(w.scores + i) * load(w.extra + i));
            }
            product(E, b.width,
                    (operands){.depth = n,
                               .a = j->v + keys_at(j, j->vs, b.head) + s0 * j->vs.row,
                               .a_row = 1,
                               .a_step = j->vs.row,
                               .b = w.scores,
                               .b_row = QUERIES,
                               .c = sums,
                               .c_row = QUERIES,
                               .add = s0 > b.begin,
                               .soon = s0 + n < b.end ? (soon){0} : fetched(j, j->y, j->ys, b.row, b.rows, E)});
        }
        for (int64_t i = 0; i < b.width; i += LANES) {
            vreal sum = load(total + i), zero = splat((real)0), share = blend(sum == zero, zero, splat((real)1) / sum);
            for (int64_t e = i; e < E * QUERIES; e += QUERIES) store(sums + e, load(sums + e) * share);
            vreal lse = load(top + i) * splat(LN2) + vlog(sum);
            store(total + i, blend(sum == zero, splat((real)-INFINITY), lse));
        }
        memcpy(j->lse + b.row, total, (size_t)b.rows * sizeof(real));
        for (int64_t i = 0, n; i < b.rows; i += n) {
            n = even_rows(j, j->ys, b.row + i, b.rows - i);
            gemm_transpose(E, n, sums + i, QUERIES, j->y + query_at(j, j->ys, b.row + i), j->ys.row);
        }
        if (status == HL_OK) status = check_queries(j, b.row, b.rows);
    }
    hl_give(scratch);
    return status;
}

/* From the plan of attention or of one of its gradients, which begins with the same members; all arrays contiguous. */
static job job_of(const void *plan)
{
    hl_attention_backward_plan copy, *p = &copy;
    memcpy(p, plan, sizeof copy);
    job j = {.B = p->B,
             .H = p->H,
             .L = p->L,
             .D = p->D,
             .G = p->G,
             .S = p->S,
             .E = p->E,
             .MB = p->MB,
             .MH = p->MH,
             .ML = p->ML,
             .scale = (real)p->scale,
             .softcap = (real)p->softcap,
             .left = p->left,
             .right = p->right,
             .drop = p->drop,
             .keep_scale = (real)p->keep_scale,
             .seed = p->seed,
             .qs = contiguous(p->H, p->L, p->D),
             .ks = contiguous(p->G, p->S, p->D),
             .vs = contiguous(p->G, p->S, p->E),
             .ys = contiguous(p->H, p->L, p->E)};
    choose_strip(&j);
    return j;
}
static int is_empty(const job *j) { return j->B * j->H * j->L == 0; }
/* A multiplication in a tile costs a sixteenth of what hl_grain counts as an operation. */
static int64_t block_grain(const job *j, int64_t depth)
{
    return hl_grain((double)(j->S * (depth + 16)) * QUERIES / 16);
}

/* Parallel over blocks of QUERIES queries. Keys and values move once per block, from the
 * second-level cache where a head fits it; the maximum so far and the sum below it are carried from tile to tile, and so are
 * the sums of values, in cache. What the window hides from all queries of a block is skipped.
 * Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Dao et al., FlashAttention (2022). */
int HL(attention)(const hl_attention_plan *p, const real *q, const real *k, const real *v, const real *bias,
                  const uint8_t *allowed, real *y, real *lse)
{
    job j = job_of(p);
    j.q = q, j.k = k, j.v = v, j.bias = bias, j.allowed = allowed, j.y = y, j.lse = lse;
    j.qs = p->q, j.ks = p->k, j.vs = p->v, j.ys = p->y;
    if (is_empty(&j)) return HL_OK;
    return hl_parallel_for(block_count(&j), block_grain(&j, j.D + j.E), query_blocks, &j);
}

/* ---- weights ---- */

/* e^(score - lse), both in units of ln 2; 0 where the score or lse is -inf: there `seen` is 0. */
static inline vreal weight_below(vreal score, vreal lse, vint *seen)
{
    const vreal low = splat((real)-INFINITY);
    *seen = (score != low) & (lse != low);
    return (vreal)((vint)vexp2(score - lse) & *seen);
}

static int weight_blocks(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    real *scratch = hl_take((size_t)(3 * TILE_SIZE + j->D * QUERIES) * sizeof(real));
    if (!scratch) return HL_NOMEM;
    workspace w = {scratch, scratch + TILE_SIZE, scratch + 2 * TILE_SIZE};
    real *turned = scratch + 3 * TILE_SIZE;
    for (int64_t task = begin; task < end; task++) {
        block b = block_of_task(j, task);
        real lse[QUERIES] = {0};
        for (int64_t i = 0; i < b.rows; i++) lse[i] = j->lse_in[b.row + i] * LOG2E;
        turn(j, &b, j->q, j->qs, j->D, query_factor(j), turned);
        for (int64_t s0 = 0, n; s0 < j->S; s0 += n) {
            n = min64(KEYS, j->S - s0);
            make_scores(j, &b, turned, s0, n, &w, NULL);
            for (int64_t s = 0; s < n; s++)
                for (int64_t i = 0; i < b.width; i += LANES) {
                    vint seen;
                    real *score = w.scores + s * QUERIES + i;
                    store(score, weight_below(load(score), load(lse + i), &seen));
                }
            gemm_transpose(n, b.rows, w.scores, QUERIES, j->w + b.row * j->S + s0, j->S);
        }
    }
    hl_give(scratch);
    return HL_OK;
}

/* Parallel over blocks of QUERIES queries. Writes w once. */
int HL(attention_weights)(const hl_attention_weights_plan *p, const real *q, const real *k, const real *bias,
                          const uint8_t *allowed, const real *lse, real *w)
{
    job j = job_of(&(hl_attention_backward_plan){p->B, p->H, p->L, p->D, p->G, p->S, 0, p->MB, p->MH, p->ML, p->scale,
                                                 p->softcap, p->left, p->right, 0, 1, 0});
    j.q = q, j.k = k, j.bias = bias, j.allowed = allowed, j.lse_in = lse, j.w = w;
    if (is_empty(&j)) return HL_OK;
    return hl_parallel_for(block_count(&j), block_grain(&j, j.D + 32), weight_blocks, &j);
}

/* ---- gradients ---- */

/* Scratch of one task of the gradients, and the block of queries that it is at. */
typedef struct {
    workspace w;
    real *ds, *slopes;    /* [KEYS][QUERIES] */
    real *q, *gy, *gq;    /* turned */
    real *lse, *delta;    /* [QUERIES]; lse in units of ln 2 */
    real *rest;
} gradient_workspace;

static int take_workspace(const job *j, int64_t more, gradient_workspace *g)
{
    real *at = hl_take((size_t)(5 * TILE_SIZE + (2 * j->D + j->E + 2) * QUERIES + more) * sizeof(real));
    if (!at) return HL_NOMEM;
    g->w = (workspace){at, at + TILE_SIZE, at + 2 * TILE_SIZE};
    g->ds = at + 3 * TILE_SIZE, g->slopes = at + 4 * TILE_SIZE, at += 5 * TILE_SIZE;
    g->q = at, g->gq = at + j->D * QUERIES, g->gy = at + 2 * j->D * QUERIES, at += (2 * j->D + j->E) * QUERIES;
    g->lse = at, g->delta = at + QUERIES, g->rest = at + 2 * QUERIES;
    return HL_OK;
}

/* Gets the queries of a block ready; the gradient of their scores will be multiplied with `factor`. */
static void begin_block(const job *j, const block *b, real factor, const gradient_workspace *g)
{
    turn(j, b, j->q, j->qs, j->D, query_factor(j), g->q);
    turn(j, b, j->gy, contiguous(j->H, j->L, j->E), j->E, factor, g->gy);
    for (int64_t i = 0; i < b->width; i++) {
        int64_t row = b->row + i;
        g->lse[i] = i < b->rows ? j->lse_in[row] * LOG2E : (real)-INFINITY;
        g->delta[i] = i < b->rows ? factor * dot(j->gy + row * j->E, j->y_in + row * j->E, j->E) : 0;
    }
}

/* a *= b in the n rows of a tile; what is 0 stays 0. */
static void multiply_tile(int64_t n, real *a, const real *b)
{
    const vreal zero = splat((real)0);
    for (int64_t i = 0; i < n * QUERIES; i += LANES) {
        vreal x = load(a + i);
        store(a + i, blend(x == zero, zero, x * load(b + i)));
    }
}

/* For the keys [s0, s0 + n): the weights after dropout in w.scores, and in ds the gradient of the scores with their bias.
 * Hidden pairs get 0 whatever the products are. */
static void score_gradient(const job *j, const block *b, int64_t s0, int64_t n, const gradient_workspace *g)
{
    make_scores(j, b, g->q, s0, n, &g->w, j->softcap > 0 ? g->slopes : NULL);
    product(n, b->width,
            (operands){.depth = j->E,
                       .a = j->v + (b->head * j->S + s0) * j->E,
                       .a_row = j->E,
                       .a_step = 1,
                       .b = g->gy,
                       .b_row = QUERIES,
                       .c = g->ds,
                       .c_row = QUERIES});
    if (j->drop) {
        turned_rows(j, b, s0, n, &g->w, kept_row);
        multiply_tile(n, g->ds, g->w.extra);
    }
    for (int64_t s = 0; s < n; s++)
        for (int64_t i = 0; i < b->width; i += LANES) {
            vint seen;
            real *score = g->w.scores + s * QUERIES + i, *ds = g->ds + s * QUERIES + i;
            vreal weight = weight_below(load(score), load(g->lse + i), &seen);
            store(score, weight);
            store(ds, (vreal)((vint)(weight * (load(ds) - load(g->delta + i))) & seen));
        }
    if (j->drop) multiply_tile(n, g->w.scores, g->w.extra);
}

/* product() without the products of elements of a, or of b, that are 0. */
static void product_of_seen(int64_t M, int64_t N, const operands *o, int in_b)
{
    for (int64_t m = 0; m < M; m++) {
        for (int64_t n = 0; n < N && !o->add; n++) o->c[m * o->c_row + n] = 0;
        for (int64_t k = 0; k < o->depth; k++) {
            real a = o->a[m * o->a_row + k * o->a_step];
            for (int64_t n = 0; n < N; n++) {
                real b = o->b[k * o->b_row + n];
                if ((in_b ? b : a) != 0) o->c[m * o->c_row + n] += a * b;
            }
        }
    }
}

/* Rows of x, as they lie or, where a row is not of whole vectors, in `padded`. */
static const real *whole_rows(int64_t rows, int64_t D, const real *x, real *padded)
{
    int64_t wide = round_up(D, LANES);
    if (wide == D) return x;
    for (int64_t i = 0; i < rows; i++) {
        memcpy(padded + i * wide, x + i * D, (size_t)D * sizeof(real));
        for (int64_t d = D; d < wide; d++) padded[i * wide + d] = 0;
    }
    return padded;
}

/* Tasks: a part of the keys of one head. */
static int key_parts(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t D = j->D, E = j->E, S = j->S, DW = round_up(D, LANES), EW = round_up(E, LANES), rows = j->H / j->G * j->L;
    int64_t longest = (S + j->parts - 1) / j->parts;
    gradient_workspace g;
    int status = take_workspace(j, (QUERIES + longest) * (DW + EW), &g);
    if (status != HL_OK) return status;
    real *padded_q = g.rest, *padded_gy = padded_q + QUERIES * DW, *padded_gk = padded_gy + QUERIES * EW,
         *padded_gv = padded_gk + longest * DW;
    for (int64_t task = begin; task < end; task++) {
        int64_t head = task / j->parts, part = task % j->parts, from = S * part / j->parts,
                to = S * (part + 1) / j->parts;
        real *gk = D == DW ? j->gk + (head * S + from) * D : padded_gk,
             *gv = E == EW ? j->gv + (head * S + from) * E : padded_gv;
        real *gq = j->gq + part * (j->B * j->H * j->L * D);
        memset(gk, 0, (size_t)((to - from) * DW) * sizeof(real));
        memset(gv, 0, (size_t)((to - from) * EW) * sizeof(real));
        int careful = hides(j) && (has_nonfinite(j->k + (head * S + from) * D, (to - from) * D) ||
                                   has_nonfinite(j->q + head * rows * D, rows * D) ||
                                   has_nonfinite(j->gy + head * rows * E, rows * E));
        int64_t blocks = rows / j->strip * blocks_per_strip(j);
        for (int64_t i = 0; i < blocks; i++) {
            block b = block_of_task(j, head * blocks + i);
            int64_t first = max64(b.begin, from), last = min64(b.end, to), step = tile_keys(first, max64(first, last));
            if (first >= last) {
                memset(gq + b.row * D, 0, (size_t)(b.rows * D) * sizeof(real));
                continue;
            }
            begin_block(j, &b, j->scale, &g);
            const real *q = whole_rows(b.rows, D, j->q + b.row * D, padded_q),
                       *gy = whole_rows(b.rows, E, j->gy + b.row * E, padded_gy);
            for (int64_t s0 = first, n; s0 < last; s0 += n) {
                n = min64(step, last - s0);
                score_gradient(j, &b, s0, n, &g);
                if (j->softcap > 0) multiply_tile(n, g.ds, g.slopes);
                operands of_v = {b.rows, g.w.scores, QUERIES, 1, gy, EW, gv + (s0 - from) * EW, EW, 1, {0}};
                operands of_k = {b.rows, g.ds, QUERIES, 1, q, DW, gk + (s0 - from) * DW, DW, 1, {0}};
                operands of_q = {n, j->k + (head * S + s0) * D, 1, D, g.ds, QUERIES, g.gq, QUERIES, s0 > first, {0}};
                if (careful) {
                    product_of_seen(n, EW, &of_v, 0);
                    product_of_seen(n, DW, &of_k, 0);
                    product_of_seen(D, b.width, &of_q, 1);
                } else {
                    product(n, EW, of_v);
                    product(n, DW, of_k);
                    product(D, b.width, of_q);
                }
            }
            gemm_transpose(D, b.rows, g.gq, QUERIES, gq + b.row * D, D);
        }
        for (int64_t s = from; s < to && gk == padded_gk; s++)
            memcpy(j->gk + (head * S + s) * D, gk + (s - from) * DW, (size_t)D * sizeof(real));
        for (int64_t s = from; s < to && gv == padded_gv; s++)
            memcpy(j->gv + (head * S + s) * E, gv + (s - from) * EW, (size_t)E * sizeof(real));
    }
    hl_give(g.w.scores);
    return HL_OK;
}

typedef struct {
    int64_t parts, size;
    const real *x;
    real *y;
} parts_job;

static int add_parts(int64_t begin, int64_t end, void *context)
{
    const parts_job *p = context;
    for (int64_t i = begin; i < end; i++) {
        real sum = p->x[i];
        for (int64_t part = 1; part < p->parts; part++) sum += p->x[part * p->size + i];
        p->y[i] = sum;
    }
    return HL_OK;
}

/* Parallel over key heads and, when those are few, over parts of their keys, each with its own share of gq. A task takes the
 * blocks of queries one after the other, so that no one else adds to its gradients of keys and values, which stay in cache
 * with the keys. The weights are made again from lse. Source: Dao et al., FlashAttention (2022), appendix B. */
int HL(attention_backward)(const hl_attention_backward_plan *p, const real *q, const real *k, const real *v,
                           const real *bias, const uint8_t *allowed, const real *y, const real *lse, const real *gy,
                           real *gq, real *gk, real *gv)
{
    job j = job_of(p);
    j.q = q, j.k = k, j.v = v, j.bias = bias, j.allowed = allowed, j.y_in = y, j.lse_in = lse, j.gy = gy;
    j.gq = gq, j.gk = gk, j.gv = gv;
    int64_t heads = j.B * j.G, size = j.B * j.H * j.L * j.D;
    if (is_empty(&j)) {
        if (heads)
            memset(gk, 0, (size_t)(heads * j.S * j.D) * sizeof(real)),
                memset(gv, 0, (size_t)(heads * j.S * j.E) * sizeof(real));
        return HL_OK;
    }
    j.parts = max64(min64((15 + heads) / heads, j.S / (2 * KEYS)), 1); /* 16 tasks, if the parts are not too small */
    real *shares = NULL;
    if (j.parts > 1) {
        shares = hl_take((size_t)(j.parts * size) * sizeof(real));
        if (!shares) return HL_NOMEM;
        j.gq = shares;
    }
    int status = hl_parallel_for(heads * j.parts, 1, key_parts, &j);
    parts_job all = {j.parts, size, shares, gq};
    if (shares && status == HL_OK) status = hl_parallel_for(size, hl_grain((double)j.parts), add_parts, &all);
    hl_give(shares);
    return status;
}

static int mask_tiles(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t count = (j->S + KEYS - 1) / KEYS;
    gradient_workspace g;
    int status = take_workspace(j, 0, &g);
    if (status != HL_OK) return status;
    for (int64_t task = begin; task < end; task++) {
        int64_t mask = task / count, s0 = task % count * KEYS, n = min64(KEYS, j->S - s0);
        real *gbias = j->gbias + mask * j->ML * j->S + s0;
        for (int64_t l = 0; l < j->ML; l++) memset(gbias + l * j->S, 0, (size_t)n * sizeof(real));
        for (int64_t pair = 0; pair < j->B * j->H; pair++) {
            if ((j->MB > 1 && pair / j->H != mask / j->MH) || (j->MH > 1 && pair % j->H != mask % j->MH)) continue;
            for (int64_t first = 0; first < j->L; first += QUERIES) {
                block b = block_at(j, pair * j->L + first, min64(QUERIES, j->L - first));
                begin_block(j, &b, 1, &g);
                score_gradient(j, &b, s0, n, &g);
                gemm_transpose(n, b.rows, g.ds, QUERIES, g.w.rows, KEYS);
                for (int64_t i = 0; i < b.rows; i++)
                    add_scaled(gbias + (j->ML > 1 ? first + i : 0) * j->S, 1, g.w.rows + i * KEYS, n);
            }
        }
    }
    hl_give(g.w.scores);
    return HL_OK;
}

/* Parallel over tiles of keys of the mask; a task adds up all batches, heads and queries that share its elements. */
int HL(attention_grad_bias)(const hl_attention_grad_bias_plan *p, const real *q, const real *k, const real *v,
                            const real *bias, const real *y, const real *lse, const real *gy, real *gbias)
{
    job j = job_of(p);
    j.q = q, j.k = k, j.v = v, j.bias = bias, j.y_in = y, j.lse_in = lse, j.gy = gy, j.gbias = gbias;
    return hl_parallel_for(j.MB * j.MH * ((j.S + KEYS - 1) / KEYS), 1, mask_tiles, &j);
}

/* ---- around it ---- */

typedef struct {
    const hl_move_heads_plan *p;
    const real *x;
    real *y;
} move_job;

static int move_pieces(int64_t begin, int64_t end, void *context)
{
    const move_job *m = context;
    int64_t A = m->p->A, B = m->p->B, P = m->p->P, C = m->p->C, D = m->p->D;
    for (int64_t i = begin; i < end; i++) { /* piece y[p, a, c] */
        int64_t p = i / (A * C), a = i / C % A, c = i % C;
        const real *x = m->x + ((a * B * P + p) * C + c) * D;
        real *y = m->y + i * B * D;
        for (int64_t b = 0; b < B; b++) memcpy(y + b * D, x + b * P * C * D, (size_t)D * sizeof(real));
    }
    return HL_OK;
}

/* Parallel over pieces y[p, a, c], which are written in order. Reads x once in runs of D, writes y once. */
int HL(move_heads)(const hl_move_heads_plan *p, const real *x, real *y)
{
    move_job job = {p, x, y};
    return hl_parallel_for(p->P * p->A * p->C, hl_grain(2.0 * (double)(p->B * p->D)), move_pieces, &job);
}

typedef struct {
    const hl_rotary_plan *p;
    const real *x, *cos, *sin;
    real *y;
} rotary_job;

static int rotary_rows(int64_t begin, int64_t end, void *context)
{
    const rotary_job *j = context;
    const int64_t C = j->p->C;
    const real sign = j->p->inverse ? -1 : 1;
    for (int64_t row = begin; row < end; row++) {
        const real *restrict x = j->x + row * 2 * C, *restrict cos = j->cos + row % j->p->L * C,
                             *restrict sin = j->sin + row % j->p->L * C;
        real *restrict y = j->y + row * 2 * C;
        if (j->p->interleaved) {
            for (int64_t c = 0; c < C; c++) {
                real a = x[2 * c], b = x[2 * c + 1], s = sign * sin[c];
                y[2 * c] = a * cos[c] - b * s;
                y[2 * c + 1] = a * s + b * cos[c];
            }
        } else {
            for (int64_t c = 0; c < C; c++) {
                real a = x[c], b = x[C + c], s = sign * sin[c];
                y[c] = a * cos[c] - b * s;
                y[C + c] = a * s + b * cos[c];
            }
        }
    }
    return HL_OK;
}

/* Parallel over rows of all positions. Reads x once and the tables from cache, writes y once. */
int HL(rotary)(const hl_rotary_plan *p, const real *x, const real *cos, const real *sin, real *y)
{
    rotary_job job = {p, x, cos, sin, y};
    return hl_parallel_for(p->M * p->L, hl_grain(6.0 * (double)p->C), rotary_rows, &job);
}
