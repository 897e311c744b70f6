/* Pooling of small maps, included by pool.c: rows that fit in two vectors stay in registers. Their lines are reduced as longer
 * ones are; then each tap of all outputs of a row is picked from the result by one instruction, whatever stride, dilation and
 * padding are. The last lane, where no element is, holds what padding stands for. */

static int64_t vectors_of(int64_t W) { return W / LANES + 1; } /* one lane is left over */

/* Rows of outputs of a plane: where their lines are is listed once per call, and the list stays in the second cache. */
enum { LISTED = 4096 };

static int are_short(const windows *w)
{
    return CAN_PICK && (is_padded(w) || w->shared) && w->size[2] < 2 * LANES && w->out[2] <= 2 * LANES &&
           w->out[0] * w->out[1] <= LISTED;
}

/* Where the lines of a row of outputs are: the first and the last, from the plane's beginning. */
typedef struct {
    int64_t first, last;
    taps d, h;
} short_line;

/* at[k][o]: the lane of tap k of output o. lines: of the rows of a plane. */
typedef struct {
    ireal *at;
    short_line *lines;
} short_space;

static int take_short(short_space *space, const windows *w)
{
    int64_t H = w->size[1], W = w->size[2], outs = round_up(w->out[2], LANES), none = vectors_of(W) * LANES - 1;
    int64_t rows = w->out[0] * w->out[1], K = w->kernel[2];
    space->at = hl_take((size_t)(K * outs) * sizeof(ireal) + (size_t)rows * sizeof(short_line));
    if (!space->at) return HL_NOMEM;
    for (int64_t i = 0; i < K * outs; i++) space->at[i] = (ireal)none;
    for (int64_t o = 0; o < w->out[2]; o++) {
        taps t = taps_of(w, 2, o);
        for (int64_t k = 0; k < t.count; k++) space->at[(t.first + k) * outs + o] = (ireal)(t.at + k * w->dilation[2]);
    }
    space->lines = (short_line *)(space->at + K * outs);
    for (int64_t r = 0; r < rows; r++) {
        taps d = taps_of(w, 0, r / w->out[1]), h = taps_of(w, 1, r % w->out[1]);
        int64_t first = (d.at * H + h.at) * W;
        int64_t last = first + ((d.count - 1) * w->dilation[0] * H + (h.count - 1) * w->dilation[1]) * W;
        space->lines[r] = (short_line){first, last, d, h};
    }
    return HL_OK;
}
static void give_short(short_space *space) { hl_give(space->at); }

/* n rows of outputs from p on: maxima, with the numbers of their taps, as bytes too, or scaled sums. */
typedef struct {
    const windows *w;
    const short_space *space;
    const real *x, *limit;
    int64_t M, n;
    row_place p;
    scaling by;
    real *y;
    uint8_t *offsets;
    ireal *ids;
    int64_t ids_step; /* from row to row; 0: nobody reads them */
} short_job;

/* A maximum's result holds a NaN where one may be among the elements. `one`: outputs fill at most a vector. */
static inline __attribute__((always_inline)) vreal short_rows(int kind, const int vectors, const int one, int64_t K,
                                                              const short_job *j)
{
    const windows *w = j->w;
    const int64_t H = w->size[1], W = w->size[2], OW = w->out[2], in = w->size[0] * H * W, step = round_up(OW, LANES);
    const real *plane = j->x + j->p.plane * in, *picks = (const real *)j->space->at, *limit = j->limit;
    const short_line *row = j->space->lines + j->p.od * w->out[1] + j->p.oh,
                     *last = j->space->lines + w->out[0] * w->out[1] - 1;
    const vint inside = lanes_before(W - (vectors - 1) * LANES);
    const scaling by = j->by;
    vreal check[2] = {splat((real)0), splat((real)0)};
    lines l = {.step_d = w->dilation[0] * H * W, .step_h = w->dilation[1] * W, .end = j->x + j->M * in};
    real *y = j->y, *y_end = y + j->n * OW;
    ireal *ids = j->ids;
    uint8_t *offsets = j->offsets;
    for (; y < y_end; y += OW) {
        vreal v[PIECE];
        vint id[PIECE];
        l.first = plane + row->first, l.d = row->d, l.h = row->h;
        if (l.end - (plane + row->last) < vectors * LANES) down(kind, 1, w, &l, 0, vectors, 0, 0, v, id, check);
        else if (l.d.count == 1 && l.h.count == 3) {
            l.d.count = 1, l.h.count = 3;
            down(kind, 1, w, &l, 0, vectors, 1, 0, v, id, check);
        } else down(kind, 1, w, &l, 0, vectors, 1, 0, v, id, check);
        if (row++ == last) row = j->space->lines, plane += in;
        v[vectors - 1] = blend(inside, v[vectors - 1], identity(kind));
        id[vectors - 1] = (id[vectors - 1] & inside) | (NO_TAP & ~inside);
        for (int64_t o = 0; o < (one ? 1 : OW); o += LANES) {
            const real *at = picks + o;
            vreal best = pick(vectors, v, (vint)load(at));
            for (int64_t k = 1; k < K; k++) best = combined(kind, best, pick(vectors, v, (vint)load(at + k * step)));
            put(y + o, kind < SUM ? best : scaled(best, by, o), OW - o, limit);
            if (kind != PLACES) continue;
            vint least = (vint){0} + NO_TAP;
            for (int64_t k = 0; k < K; k++) {
                vint tap = (vint)pick(vectors, (const vreal *)id, (vint)load(at + k * step)) + (ireal)k;
                vint smaller = (pick(vectors, v, (vint)load(at + k * step)) == best) & (tap < least);
                least = (smaller & tap) | (~smaller & least);
            }
            store((real *)ids + o, (vreal)least);
            if (offsets) put_bytes(offsets + o, least, OW - o, limit - (y + o));
        }
        if (kind != PLACES) continue;
        ids += j->ids_step;
        if (offsets) offsets += OW;
    }
    return check[0] + check[1];
}

#define SHORT(name, kind, vectors) \
    static __attribute__((noinline)) vreal name##_##vectors(const short_job *j) \
    { \
        int64_t K = j->w->kernel[2]; \
        if (j->w->out[2] > LANES) return short_rows(kind, vectors, 0, K, j); \
        return K == 3 ? short_rows(kind, vectors, 1, 3, j) : short_rows(kind, vectors, 1, K, j); \
    }
SHORT(short_maxima, MAXIMUM, 1)
SHORT(short_maxima, MAXIMUM, 2)
SHORT(short_places, PLACES, 1)
SHORT(short_places, PLACES, 2)
SHORT(short_sums, SUM, 1)
SHORT(short_sums, SUM, 2)
SHORT(short_squares, SQUARES, 1)
SHORT(short_squares, SQUARES, 2)
#undef SHORT

static vreal pool_short(int kind, const short_job *j)
{
    int one = vectors_of(j->w->size[2]) == 1;
    switch (kind) {
    case MAXIMUM: return one ? short_maxima_1(j) : short_maxima_2(j);
    case PLACES: return one ? short_places_1(j) : short_places_2(j);
    case SUM: return one ? short_sums_1(j) : short_sums_2(j);
    default: return one ? short_squares_1(j) : short_squares_2(j);
    }
}
