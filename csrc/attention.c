/* Scaled dot-product attention, its gradients, and what stands around it.
 *
 * Scores are made for ROWS queries against a tile of KEYS keys at a time and never stored as a whole. Keys and values are
 * packed once per tile for all queries. Nothing of a hidden key or value may reach a result, not even a NaN: products with
 * weights that are 0 would let it through, so a result that is not finite where keys are hidden is made again, key by key. */
#include "gemm.h"
#include "random.h"
#include "vmath.h"

enum {
    ROWS = 48,
    KEYS = 192
}; /* multiples of every register tile; one tile with its keys and values fills a third of 1 MiB */

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
    real *packed_k; /* of all heads, tile by tile */
} job;

static int64_t tiles(const job *j) { return (j->S + KEYS - 1) / KEYS; }
static int64_t tile_keys(const job *j, int64_t s0) { return min64(KEYS, j->S - s0); }
static int hides(const job *j) { return j->bias || j->allowed || j->left < j->L || j->right < j->S; }
static int64_t key_head(const job *j, int64_t b, int64_t h) { return b * j->G + h / (j->H / j->G); }

static int has_nonfinite(const real *x, int64_t n)
{
    vreal sum = splat((real)0);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(x + i) * splat((real)0);
    if (i < n) sum += load_part(x + i, n - i, (real)0) * splat((real)0);
    return lane_bits(sum != sum) != 0;
}

/* ---- scores ---- */

/* The rows of the masks for query l of head (b, h); NULL where there is none. */
static const real *bias_row(const job *j, int64_t b, int64_t h, int64_t l)
{
    return j->bias
               ? j->bias + (((j->MB > 1 ? b : 0) * j->MH + (j->MH > 1 ? h : 0)) * j->ML + (j->ML > 1 ? l : 0)) * j->S
               : NULL;
}
static const uint8_t *allowed_row(const job *j, int64_t b, int64_t h, int64_t l)
{
    return j->allowed
               ? j->allowed + (((j->MB > 1 ? b : 0) * j->MH + (j->MH > 1 ? h : 0)) * j->ML + (j->ML > 1 ? l : 0)) * j->S
               : NULL;
}

/* Products of query l with keys [s0, s0 + n) become scores: scaled, capped, with their bias; -inf where hidden. `capped`, when
 * there is a cap and it is not NULL, gets them without the bias. */
static void finish_scores(const job *j, int64_t b, int64_t h, int64_t l, int64_t s0, int64_t n, real *row, real *capped)
{
    const real *bias = bias_row(j, b, h, l), low = (real)-INFINITY, scale = j->scale, limit = j->softcap;
    const uint8_t *allowed = allowed_row(j, b, h, l);
    if (limit > 0) {
        for (int64_t s = 0; s < n; s += LANES) {
            int64_t lanes = min64(LANES, n - s);
            vreal x = lanes == LANES ? load(row + s) : load_part(row + s, lanes, (real)0);
            x = vtanh(x * splat(scale / limit)) * splat(limit);
            if (lanes == LANES) store(row + s, x);
            else store_part(row + s, lanes, x);
        }
        if (capped) memcpy(capped, row, (size_t)n * sizeof(real));
    } else {
        for (int64_t s = 0; s < n; s++) row[s] *= scale;
    }
    if (bias)
        for (int64_t s = 0; s < n; s++) {
            real add = bias[s0 + s], sum = row[s] + add;
            row[s] = add == low ? low : sum;
        }
    if (allowed)
        for (int64_t s = 0; s < n; s++) row[s] = allowed[s0 + s] ? row[s] : low;
    int64_t first = min64(max64(l - j->left - s0, 0), n), last = max64(min64(l + j->right + 1 - s0, n), 0);
    for (int64_t s = 0; s < first; s++) row[s] = low;
    for (int64_t s = last; s < n; s++) row[s] = low;
}

static real row_max(const real *row, int64_t n)
{
    vreal m = splat((real)-INFINITY);
    int64_t s = 0;
    for (; s + LANES <= n; s += LANES) m = vmax(m, load(row + s));
    if (s < n) m = vmax(m, load_part(row + s, n - s, (real)-INFINITY));
    return max_lanes(m);
}

/* row = exp(row - base); the sum. */
static real row_exp(real *row, int64_t n, real base)
{
    vreal sum = splat((real)0);
    int64_t s = 0;
    for (; s + LANES <= n; s += LANES) {
        vreal e = vexp_below(load(row + s) - splat(base));
        store(row + s, e);
        sum += e;
    }
    if (s < n) {
        vreal e = vexp_below(load_part(row + s, n - s, (real)-INFINITY) - splat(base));
        store_part(row + s, n - s, e);
        sum += e; /* the lanes beyond hold exp(-inf) = 0 */
    }
    return sum_lanes(sum);
}

/* Weights of query l dropped, from key s0 on. */
static void drop_weights(const job *j, int64_t b, int64_t h, int64_t l, int64_t s0, int64_t n, real *row)
{
    if (!j->drop) return;
    uint32_t bits[KEYS];
    int64_t at = ((b * j->H + h) * j->L + l) * j->S + s0;
    for (int64_t s = 0, m; s < n; s += m) {
        m = min64(KEYS, n - s);
        random24(at + s, m, j->seed, bits);
        for (int64_t i = 0; i < m; i++) {
            real kept = row[s + i] * j->keep_scale;
            row[s + i] = (int64_t)bits[i] >= j->drop ? kept : (real)0;
        }
    }
}

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

/* Query l of head (b, h) key by key, without the values of hidden keys. row[S] is scratch. */
static void careful_query(const job *j, int64_t b, int64_t h, int64_t l, real *row)
{
    int64_t query = (b * j->H + h) * j->L + l;
    const real *k = j->k + key_head(j, b, h) * j->S * j->D, *v = j->v + key_head(j, b, h) * j->S * j->E;
    real *y = j->y + query * j->E;
    for (int64_t s = 0; s < j->S; s++) row[s] = dot(j->q + query * j->D, k + s * j->D, j->D);
    finish_scores(j, b, h, l, 0, j->S, row, NULL);
    real top = row_max(row, j->S), total = 0;
    if (top == (real)-INFINITY) top = 0;
    for (int64_t i = 0; i < j->E; i++) y[i] = 0;
    for (int64_t s = 0; s < j->S; s++) {
        if (row[s] == (real)-INFINITY) continue;
        real weight = vexp_below(splat(row[s] - top))[0];
        total += weight;
        drop_weights(j, b, h, l, s, 1, &weight);
        add_scaled(y, weight, v + s * j->E, j->E);
    }
    if (total != 0)
        for (int64_t i = 0; i < j->E; i++) y[i] /= total;
}

/* y[rows] are unnormalised sums; divides them, writes lse, and makes rows again where something hidden may have come in. */
static int finish_queries(const job *j, int64_t b, int64_t h, int64_t first, int64_t rows, const real *top,
                          const real *total)
{
    real *careful = NULL;
    for (int64_t i = 0; i < rows; i++) {
        int64_t query = (b * j->H + h) * j->L + first + i;
        real *y = j->y + query * j->E, share = total[i] == 0 ? 0 : 1 / total[i];
        j->lse[query] = total[i] == 0 ? (real)-INFINITY : top[i] + vlog(splat(total[i]))[0];
        for (int64_t e = 0; e < j->E; e++) y[e] *= share;
        if (hides(j) && has_nonfinite(y, j->E)) {
            if (!careful && !(careful = hl_take((size_t)j->S * sizeof(real)))) return HL_NOMEM;
            careful_query(j, b, h, first + i, careful);
        }
    }
    hl_give(careful);
    return HL_OK;
}

/* ---- forward, many queries ---- */

static int64_t packed_size(const job *j)
{
    int64_t last = j->S - (tiles(j) - 1) * KEYS;
    return j->S ? j->D * ((tiles(j) - 1) * KEYS + round_up(last, LANES)) : 0;
}
static int pack_tiles(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    for (int64_t i = begin; i < end; i++) {
        int64_t head = i / tiles(j), s0 = i % tiles(j) * KEYS;
        gemm_pack_b(j->D, tile_keys(j, s0), j->k + (head * j->S + s0) * j->D, 1, j->D,
                    j->packed_k + head * packed_size(j) + s0 * j->D);
    }
    return HL_OK;
}
/* Packs the keys of all heads; parallel over tiles. */
static int pack_keys(job *j)
{
    j->packed_k = hl_take((size_t)max64(j->B * j->G * packed_size(j), 1) * sizeof(real));
    if (!j->packed_k) return HL_NOMEM;
    return hl_parallel_for(j->B * j->G * tiles(j), hl_grain((double)j->D * KEYS), pack_tiles, j);
}

/* scores[rows][KEYS] = q k^T for `rows` queries from `first` on. */
static int products(const job *j, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t s0, real *scores)
{
    gemm_call g = {.M = rows,
                   .N = tile_keys(j, s0),
                   .K = j->D,
                   .a = j->q + ((b * j->H + h) * j->L + first) * j->D,
                   .a_row = j->D,
                   .a_col = 1,
                   .packed_b = j->packed_k + key_head(j, b, h) * packed_size(j) + s0 * j->D,
                   .c = scores,
                   .c_row = KEYS};
    return gemm(&g);
}

static int query_blocks(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t blocks = (j->L + ROWS - 1) / ROWS;
    real *scores = hl_take((size_t)(ROWS * KEYS) * sizeof(real));
    if (!scores) return HL_NOMEM;
    int status = HL_OK;
    for (int64_t task = begin; task < end && status == HL_OK; task++) {
        int64_t b = task / (blocks * j->H), h = task / blocks % j->H, first = task % blocks * ROWS,
                rows = min64(ROWS, j->L - first);
        real top[ROWS], total[ROWS], *y = j->y + ((b * j->H + h) * j->L + first) * j->E;
        const real *v = j->v + key_head(j, b, h) * j->S * j->E;
        for (int64_t i = 0; i < rows; i++) top[i] = (real)-INFINITY, total[i] = 0;
        int64_t s0 = max64(first - j->left, 0) / KEYS * KEYS, stop = min64(first + rows + j->right, j->S), start = s0;
        if (s0 >= stop) memset(y, 0, (size_t)(rows * j->E) * sizeof(real));
        for (; s0 < stop && status == HL_OK; s0 += KEYS) {
            int64_t n = tile_keys(j, s0);
            status = products(j, b, h, first, rows, s0, scores);
            for (int64_t i = 0; i < rows; i++) {
                real *row = scores + i * KEYS;
                finish_scores(j, b, h, first + i, s0, n, row, NULL);
                real high = row_max(row, n);
                if (high < top[i]) high = top[i];
                real base = high == (real)-INFINITY ? 0 : high, shrink = vexp_below(splat(top[i] - base))[0];
                total[i] = total[i] * shrink + row_exp(row, n, base);
                top[i] = high;
                if (s0 > start && shrink != 1)
                    for (int64_t e = 0; e < j->E; e++) y[i * j->E + e] *= shrink;
                drop_weights(j, b, h, first + i, s0, n, row);
            }
            gemm_call g = {.M = rows,
                           .N = j->E,
                           .K = n,
                           .a = scores,
                           .a_row = KEYS,
                           .a_col = 1,
                           .b = v + s0 * j->E,
                           .b_row = j->E,
                           .b_col = 1,
                           .c = y,
                           .c_row = j->E,
                           .accumulate = s0 > start};
            if (status == HL_OK) status = gemm(&g);
        }
        if (status == HL_OK) status = finish_queries(j, b, h, first, rows, top, total);
    }
    hl_give(scores);
    return status;
}

/* ---- forward, few queries ---- */

enum { FEW = 4 };

/* LANES dot products of q with neighbouring keys: each sums in its own vector, then all vectors are turned and added. */
static inline vreal dots(const real *q, const real *k, int64_t D)
{
    real parts[LANES * LANES] __attribute__((aligned(64))), turned[LANES * LANES] __attribute__((aligned(64)));
    for (int s = 0; s < LANES; s++) {
        vreal sum = splat((real)0);
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) sum += load(q + d) * load(k + s * D + d);
        if (d < D) sum += load_part(q + d, D - d, (real)0) * load_part(k + s * D + d, D - d, (real)0);
        store(parts + s * LANES, sum);
    }
    gemm_transpose(LANES, LANES, parts, LANES, turned, LANES);
    vreal sum = load(turned);
    for (int i = 1; i < LANES; i++) sum += load(turned + i * LANES);
    return sum;
}

static int few_queries(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    real *row = hl_take((size_t)max64(j->S, 1) * sizeof(real));
    if (!row) return HL_NOMEM;
    int status = HL_OK;
    for (int64_t task = begin; task < end && status == HL_OK; task++) {
        int64_t b = task / (j->H * j->L), h = task / j->L % j->H, l = task % j->L, s = 0;
        const real *q = j->q + task * j->D, *k = j->k + key_head(j, b, h) * j->S * j->D;
        for (; s + LANES <= j->S; s += LANES) store(row + s, dots(q, k + s * j->D, j->D));
        for (; s < j->S; s++) row[s] = dot(q, k + s * j->D, j->D);
        finish_scores(j, b, h, l, 0, j->S, row, NULL);
        real top = row_max(row, j->S), total = row_exp(row, j->S, top == (real)-INFINITY ? 0 : top);
        drop_weights(j, b, h, l, 0, j->S, row);
        gemm_call g = {.M = 1,
                       .N = j->E,
                       .K = j->S,
                       .a = row,
                       .a_row = j->S,
                       .a_col = 1,
                       .b = j->v + key_head(j, b, h) * j->S * j->E,
                       .b_row = j->E,
                       .b_col = 1,
                       .c = j->y + task * j->E,
                       .c_row = j->E};
        status = gemm(&g);
        if (status == HL_OK) status = finish_queries(j, b, h, l, 1, &top, &total);
    }
    hl_give(row);
    return status;
}

static job forward_job(const hl_attention_plan *p)
{
    return (job){.B = p->B,
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
                 .seed = p->seed};
}

/* Parallel over blocks of ROWS queries (or, of few queries, over queries). q and y move once, packed keys and values once per
 * block, from cache; the maximum so far and the sum below it are carried from tile to tile. Tiles that the window hides from
 * all queries of a block are skipped.
 * Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Dao et al., FlashAttention (2022). */
int HL(attention)(const hl_attention_plan *p, const real *q, const real *k, const real *v, const real *bias,
                  const uint8_t *allowed, real *y, real *lse)
{
    job j = forward_job(p);
    j.q = q, j.k = k, j.v = v, j.bias = bias, j.allowed = allowed, j.y = y, j.lse = lse;
    double work = (double)j.S * (double)(j.D + j.E + 16);
    if (j.L <= FEW) return hl_parallel_for(j.B * j.H * j.L, hl_grain(work / 2), few_queries, &j);
    int status = pack_keys(&j);
    if (status == HL_OK)
        status = hl_parallel_for(j.B * j.H * ((j.L + ROWS - 1) / ROWS), hl_grain(work * ROWS / 16), query_blocks, &j);
    hl_give(j.packed_k);
    return status;
}

/* ---- weights ---- */

static int weight_blocks(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t blocks = (j->L + ROWS - 1) / ROWS;
    real *scores = hl_take((size_t)(ROWS * KEYS) * sizeof(real));
    if (!scores) return HL_NOMEM;
    int status = HL_OK;
    for (int64_t task = begin; task < end && status == HL_OK; task++) {
        int64_t b = task / (blocks * j->H), h = task / blocks % j->H, first = task % blocks * ROWS,
                rows = min64(ROWS, j->L - first);
        for (int64_t s0 = 0; s0 < j->S && status == HL_OK; s0 += KEYS) {
            int64_t n = tile_keys(j, s0);
            status = products(j, b, h, first, rows, s0, scores);
            for (int64_t i = 0; i < rows; i++) {
                int64_t query = (b * j->H + h) * j->L + first + i;
                real *row = scores + i * KEYS, lse = j->lse_in[query], *w = j->w + query * j->S + s0;
                finish_scores(j, b, h, first + i, s0, n, row, NULL);
                for (int64_t s = 0; s < n; s += LANES) {
                    int64_t lanes = min64(LANES, n - s);
                    vreal e = vexp(load_part(row + s, lanes, (real)0) - splat(lse));
                    store_part(w + s, lanes, lse == (real)-INFINITY ? splat((real)0) : e);
                }
            }
        }
    }
    hl_give(scores);
    return status;
}

/* Parallel over blocks of ROWS queries. Writes w once. */
int HL(attention_weights)(const hl_attention_weights_plan *p, const real *q, const real *k, const real *bias,
                          const uint8_t *allowed, const real *lse, real *w)
{
    job j = {.B = p->B,
             .H = p->H,
             .L = p->L,
             .D = p->D,
             .G = p->G,
             .S = p->S,
             .MB = p->MB,
             .MH = p->MH,
             .ML = p->ML,
             .scale = (real)p->scale,
             .softcap = (real)p->softcap,
             .left = p->left,
             .right = p->right,
             .q = q,
             .k = k,
             .bias = bias,
             .allowed = allowed,
             .lse_in = lse,
             .w = w};
    int status = pack_keys(&j);
    if (status == HL_OK)
        status = hl_parallel_for(j.B * j.H * ((j.L + ROWS - 1) / ROWS),
                                 hl_grain((double)(j.S * (j.D + 32)) * ROWS / 16), weight_blocks, &j);
    hl_give(j.packed_k);
    return status;
}

/* ---- gradients ---- */

/* Scratch of one task of the gradients. */
typedef struct {
    real *weights, *ds, *capped; /* [ROWS][KEYS] each */
    real *packed_v;              /* one tile of values */
} workspace;

static int take_workspace(const job *j, workspace *w)
{
    real *all = hl_take((size_t)(3 * ROWS * KEYS + j->E * KEYS) * sizeof(real));
    if (!all) return HL_NOMEM;
    *w = (workspace){all, all + ROWS * KEYS, all + 2 * ROWS * KEYS, all + 3 * ROWS * KEYS};
    return HL_OK;
}

/* For `rows` queries and the tile at s0, whose values are packed: the weights after dropout, and the gradient of the scores
 * with their bias. Hidden pairs get 0 whatever the products are. */
static int score_gradient(const job *j, const workspace *w, int64_t b, int64_t h, int64_t first, int64_t rows,
                          int64_t s0)
{
    int64_t n = tile_keys(j, s0), query = (b * j->H + h) * j->L + first;
    gemm_call g = {.M = rows,
                   .N = n,
                   .K = j->E,
                   .a = j->gy + query * j->E,
                   .a_row = j->E,
                   .a_col = 1,
                   .packed_b = w->packed_v,
                   .c = w->ds,
                   .c_row = KEYS};
    int status = products(j, b, h, first, rows, s0, w->weights);
    if (status == HL_OK) status = gemm(&g);
    if (status != HL_OK) return status;
    for (int64_t i = 0; i < rows; i++) {
        real *weights = w->weights + i * KEYS, *ds = w->ds + i * KEYS, lse = j->lse_in[query + i];
        real kept[KEYS], delta = dot(j->gy + (query + i) * j->E, j->y_in + (query + i) * j->E, j->E);
        finish_scores(j, b, h, first + i, s0, n, weights, w->capped + i * KEYS);
        if (j->drop) {
            for (int64_t s = 0; s < KEYS; s++) kept[s] = 1;
            drop_weights(j, b, h, first + i, s0, n, kept);
        }
        /* Whole vectors: what lies beyond n is scratch too, and nobody reads it. No score is above lse. */
        const vreal low = splat((real)-INFINITY), below = splat(lse);
        for (int64_t s = 0; s < n; s += LANES) {
            vreal score = load(weights + s), weight = vexp_below(score - below);
            vreal factor = j->drop ? load(kept + s) : splat((real)1);
            vint seen = (score > low) | (score != score);
            if (lse == (real)-INFINITY) seen = (vint){0};
            vreal gradient = weight * (load(ds + s) * factor - splat(delta));
            store(weights + s, blend(seen, weight * factor, splat((real)0)));
            store(ds + s, blend(seen, gradient, splat((real)0)));
        }
    }
    return HL_OK;
}

/* c[m] += sum of w[m, k] x[k] without the products of weights 0. */
static void product_of_seen(int64_t M, int64_t K, int64_t N, const real *w, int64_t w_row, int64_t w_col, const real *x,
                            real *c)
{
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++)
            if (w[m * w_row + k * w_col] != 0) add_scaled(c + m * N, w[m * w_row + k * w_col], x + k * N, N);
}
static int add_product(int careful, int64_t M, int64_t K, int64_t N, const real *w, int64_t w_row, int64_t w_col,
                       const real *x, real *c)
{
    if (careful) return product_of_seen(M, K, N, w, w_row, w_col, x, c), HL_OK;
    gemm_call g = {.M = M,
                   .N = N,
                   .K = K,
                   .a = w,
                   .a_row = w_row,
                   .a_col = w_col,
                   .b = x,
                   .b_row = N,
                   .b_col = 1,
                   .c = c,
                   .c_row = N,
                   .accumulate = 1};
    return gemm(&g);
}

static int key_heads(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    int64_t L = j->L, D = j->D, E = j->E, S = j->S, repeat = j->H / j->G;
    workspace w;
    int status = take_workspace(j, &w);
    if (status != HL_OK) return status;
    for (int64_t head = begin; head < end && status == HL_OK; head++) {
        int64_t b = head / j->G, h0 = head % j->G * repeat;
        const real *k = j->k + head * S * D, *v = j->v + head * S * E, *q = j->q + (b * j->H + h0) * L * D;
        const real *gy = j->gy + (b * j->H + h0) * L * E;
        real *gk = j->gk + head * S * D, *gv = j->gv + head * S * E, *gq = j->gq + (b * j->H + h0) * L * D;
        memset(gk, 0, (size_t)(S * D) * sizeof(real));
        memset(gv, 0, (size_t)(S * E) * sizeof(real));
        memset(gq, 0, (size_t)(repeat * L * D) * sizeof(real));
        int careful = hides(j) && (has_nonfinite(k, S * D) || has_nonfinite(q, repeat * L * D) ||
                                   has_nonfinite(gy, repeat * L * E));
        for (int64_t s0 = 0; s0 < S && status == HL_OK; s0 += KEYS) {
            int64_t n = tile_keys(j, s0);
            gemm_pack_b(E, n, v + s0 * E, 1, E, w.packed_v);
            int64_t from = max64(s0 - j->right, 0) / ROWS * ROWS, to = min64(s0 + n + j->left, L);
            for (int64_t h = 0; h < repeat; h++)
                for (int64_t first = from; first < to && status == HL_OK; first += ROWS) {
                    int64_t rows = min64(ROWS, L - first);
                    status = score_gradient(j, &w, b, h0 + h, first, rows, s0);
                    if (status != HL_OK) break;
                    for (int64_t i = 0; i < rows; i++)
                        for (int64_t s = 0; s < n; s++) {
                            real *ds = w.ds + i * KEYS + s, slope = j->scale;
                            if (j->softcap > 0) {
                                real t = w.capped[i * KEYS + s] / j->softcap;
                                slope *= 1 - t * t;
                            }
                            *ds = *ds == 0 ? 0 : *ds * slope;
                        }
                    const real *qs = q + (h * L + first) * D, *gs = gy + (h * L + first) * E;
                    status = add_product(careful, rows, n, D, w.ds, KEYS, 1, k + s0 * D, gq + (h * L + first) * D);
                    if (status == HL_OK) status = add_product(careful, n, rows, D, w.ds, 1, KEYS, qs, gk + s0 * D);
                    if (status == HL_OK) status = add_product(careful, n, rows, E, w.weights, 1, KEYS, gs, gv + s0 * E);
                }
        }
    }
    hl_give(w.weights);
    return status;
}

/* Parallel over key heads; a task takes the query heads of its group one after the other, so that no one else adds to its
 * gradients. Packed keys and values move once per head, queries once per tile of keys. The weights are made again from lse.
 * Source: Dao et al., FlashAttention (2022), appendix B. */
int HL(attention_backward)(const hl_attention_backward_plan *p, const real *q, const real *k, const real *v,
                           const real *bias, const uint8_t *allowed, const real *y, const real *lse, const real *gy,
                           real *gq, real *gk, real *gv)
{
    hl_attention_plan forward;
    memcpy(&forward, p, sizeof forward);
    job j = forward_job(&forward);
    j.q = q, j.k = k, j.v = v, j.bias = bias, j.allowed = allowed, j.y_in = y, j.lse_in = lse, j.gy = gy;
    j.gq = gq, j.gk = gk, j.gv = gv;
    int status = pack_keys(&j);
    if (status == HL_OK) status = hl_parallel_for(j.B * j.G, 1, key_heads, &j);
    hl_give(j.packed_k);
    return status;
}

static int mask_tiles(int64_t begin, int64_t end, void *context)
{
    const job *j = context;
    workspace w;
    int status = take_workspace(j, &w);
    if (status != HL_OK) return status;
    for (int64_t task = begin; task < end && status == HL_OK; task++) {
        int64_t mask = task / tiles(j), s0 = task % tiles(j) * KEYS, n = tile_keys(j, s0);
        real *gbias = j->gbias + mask * j->ML * j->S + s0;
        for (int64_t l = 0; l < j->ML; l++) memset(gbias + l * j->S, 0, (size_t)n * sizeof(real));
        for (int64_t pair = 0; pair < j->B * j->H; pair++) {
            int64_t b = pair / j->H, h = pair % j->H;
            if ((j->MB > 1 && b != mask / j->MH) || (j->MH > 1 && h != mask % j->MH)) continue;
            gemm_pack_b(j->E, n, j->v + (key_head(j, b, h) * j->S + s0) * j->E, 1, j->E, w.packed_v);
            for (int64_t first = 0; first < j->L && status == HL_OK; first += ROWS) {
                int64_t rows = min64(ROWS, j->L - first);
                status = score_gradient(j, &w, b, h, first, rows, s0);
                for (int64_t i = 0; i < rows && status == HL_OK; i++)
                    add_scaled(gbias + (j->ML > 1 ? first + i : 0) * j->S, 1, w.ds + i * KEYS, n);
            }
        }
    }
    hl_give(w.weights);
    return status;
}

/* Parallel over tiles of keys of the mask; a task adds up all batches, heads and queries that share its elements. */
int HL(attention_grad_bias)(const hl_attention_grad_bias_plan *p, const real *q, const real *k, const real *v,
                            const real *bias, const real *y, const real *lse, const real *gy, real *gbias)
{
    hl_attention_plan forward;
    memcpy(&forward, p, sizeof forward);
    job j = forward_job(&forward);
    j.q = q, j.k = k, j.v = v, j.bias = bias, j.y_in = y, j.lse_in = lse, j.gy = gy, j.gbias = gbias;
    int status = pack_keys(&j);
    if (status == HL_OK) status = hl_parallel_for(j.MB * j.MH * tiles(&j), 1, mask_tiles, &j);
    hl_give(j.packed_k);
    return status;
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
