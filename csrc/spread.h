/* Gradients of means and norms, included by pool.c. Every line of gx is made once, from the first to the last: the rows of outputs
 * whose windows take it are scaled and added up, then each element picks the sums of the outputs that take it, a vector of
 * elements at a time. */

/* The outputs that take an element of an axis: `count` from `first` on, `step` apart. */
typedef struct { int64_t first, count, step; } takers;

static takers takers_of(const windows *w, int axis, int64_t i)
{
    int64_t size = w->size[axis], out = w->out[axis], stride = w->stride[axis], d = w->dilation[axis];
    if (w->shared) { /* those that end behind it and begin at it or before */
        int64_t first = i * out / size;
        return (takers){first, min64(ceil_div((i + 1) * out, size), out) - first, 1};
    }
    int64_t at = i + w->pad[axis], before = at - (w->kernel[axis] - 1) * d;
    takers t = {.first = before > 0 ? ceil_div(before, stride) : 0, .step = 1};
    int64_t last = min64(at / stride, out - 1);
    while (t.first <= last && (at - t.first * stride) % d) t.first++;
    while (t.step * stride % d) t.step++;
    t.count = last < t.first ? 0 : (last - t.first) / t.step + 1;
    return t;
}

/* How the elements of a line pick the sums of its outputs: element i of vector j takes as its q-th the sum base[s * most + q] +
 * at[s * most + q][i], where `inside` is -1, with s = j. Inside of a long line vectors are alike: `turn` of them from `head` on
 * stand for those before `tail`, each time LANES outputs further. Where more outputs than `most` take an element, or those of a
 * vector fill more than one, nothing is listed (most is 0) and each element adds up its own: with so many as 128 that costs little
 * more, and lists for wide windows would take more memory than the maps. */
enum { MOST_LISTED = 128 };
typedef struct {
    int64_t most, vectors, head, turn, tail;
    int64_t *base;
    vint *at, *inside;
} line_picks;

typedef struct {
    sum_job sum; /* whose gradient this is */
    const real *gy, *x, *y;
    real *gx;
    takers *lines[2]; /* of every element of the first two axes */
    int64_t span[2]; /* of all outputs that take an element, from the first to the last */
    line_picks across;
    int past_cache;
} spread_job;

static int64_t vectors_listed(const line_picks *p) { return p->head + p->turn + p->vectors - p->tail; }
static int64_t listed_vector(const line_picks *p, int64_t s)
{
    return s < p->head + p->turn ? s : p->tail + s - p->head - p->turn;
}

static line_picks plan_picks(const windows *w)
{
    int64_t W = w->size[2], stride = w->stride[2], pad = w->pad[2], span = (w->kernel[2] - 1) * w->dilation[2] + 1;
    line_picks p = {.vectors = (W + LANES - 1) / LANES, .turn = stride};
    p.head = max64((span - 1 - pad + LANES - 1) / LANES, 0);
    p.tail = min64((w->out[2] * stride - pad) / LANES, W / LANES);
    if (w->shared || p.tail - p.head <= 2 * stride) p.head = p.tail = p.vectors, p.turn = 0;
    for (int64_t s = 0; s < vectors_listed(&p); s++)
        for (int64_t i = listed_vector(&p, s) * LANES, end = min64(i + LANES, W); i < end; i++)
            p.most = max64(p.most, takers_of(w, 2, i).count);
    if (p.most > MOST_LISTED || (w->shared && w->out[2] > W)) p.most = 0;
    return p;
}
static void fill_picks(const windows *w, line_picks *p)
{
    for (int64_t s = 0; s < vectors_listed(p); s++) {
        takers of[LANES];
        int64_t begin = listed_vector(p, s) * LANES;
        for (int64_t lane = 0; lane < LANES; lane++)
            of[lane] = begin + lane < w->size[2] ? takers_of(w, 2, begin + lane) : (takers){0};
        for (int64_t q = 0; q < p->most; q++) {
            int64_t base = w->out[2], e = s * p->most + q;
            for (int64_t lane = 0; lane < LANES; lane++)
                if (q < of[lane].count) base = min64(base, of[lane].first + q * of[lane].step);
            p->base[e] = base;
            for (int64_t lane = 0; lane < LANES; lane++) {
                int there = q < of[lane].count;
                p->inside[e][lane] = there ? -1 : 0;
                p->at[e][lane] = (ireal)(there ? of[lane].first + q * of[lane].step - base : 0);
            }
        }
    }
}

/* Made once per call, read by all threads. */
static int take_spread(spread_job *j)
{
    const windows *w = &j->sum.w;
    line_picks p = plan_picks(w);
    int64_t picks = vectors_listed(&p) * p.most, lines = w->size[0] + w->size[1];
    p.at = hl_take((size_t)picks * (2 * sizeof(vint) + sizeof(int64_t)) + (size_t)lines * sizeof(takers));
    if (!p.at) return HL_NOMEM;
    p.inside = p.at + picks;
    p.base = (int64_t *)(p.inside + picks);
    fill_picks(w, &p);
    j->across = p;
    takers *t = (takers *)(p.base + picks);
    for (int axis = 0; axis < 2; axis++) {
        j->lines[axis] = t;
        j->span[axis] = 1;
        for (int64_t i = 0; i < w->size[axis]; i++, t++) {
            *t = takers_of(w, axis, i);
            j->span[axis] = max64(j->span[axis], (t->count - 1) * t->step + 1);
        }
    }
    return HL_OK;
}
static void give_spread(spread_job *j) { hl_give(j->across.at); }

/* v times the derivative of x ** norm by x, over norm, of n elements. */
static vreal times_power(vreal v, const real *x, int64_t n, real norm)
{
    vreal xs = load_n(x, min64(n, LANES));
    if (norm == 2) return v * xs;
    for (int64_t i = 0; i < LANES; i++) v[i] *= (real)pow((double)xs[i], (double)norm - 1);
    return v;
}

/* A line of gx from the sums of its outputs; x: the same line of what a norm was taken of, or NULL. Elements that no window
 * takes are 0 whatever is in x. */
enum { LINE_PIECE = 32 * LANES };
static inline __attribute__((always_inline)) void
spread_across(const int64_t most, const spread_job *j, const real *sums, const real *x, outflow *f, const real *limit)
{
    const line_picks p = j->across;
    int64_t W = j->sum.w.size[2], vector = 0, s = 0, further = 0;
    for (int64_t i = 0, n; i < W; i += n) {
        n = min64(W - i, LINE_PIECE);
        real *to = outflow_place(f);
        const real *end = f->buffer ? to + LINE_PIECE + LANES : limit;
        for (int64_t k = 0; k < n; k += LANES) {
            vreal v = splat((real)0);
#pragma GCC unroll 3
            for (int64_t q = s * most; q < (s + 1) * most; q++) {
                const real *from = sums + p.base[q] + further;
                vreal sum = {0};
                if (CAN_PICK) sum = load(from), sum = pick(1, &sum, p.at[q]);
                else
                    for (int lane = 0; lane < LANES; lane++) sum[lane] = from[p.at[q][lane]];
                v += (vreal)((vint)sum & p.inside[q]);
            }
            if (x) v = (vreal)((vint)times_power(v, x + i + k, n - k, j->sum.norm) & p.inside[s * most]);
            put(to + k, v, n - k, end);
            vector++, s++;
            if (vector == p.tail) s = p.head + p.turn, further = 0;
            else if (vector < p.tail && s == p.head + p.turn) s = p.head, further += LANES;
        }
        outflow_added(f, n);
    }
}

/* The same where nothing is listed. */
static void spread_each(const spread_job *j, const real *sums, const real *x, outflow *f)
{
    const windows *w = &j->sum.w;
    for (int64_t i = 0, n; i < w->size[2]; i += n) {
        n = min64(w->size[2] - i, LINE_PIECE);
        real *to = outflow_place(f);
        for (int64_t k = 0; k < n; k++) {
            takers t = takers_of(w, 2, i + k);
            to[k] = t.count > 0 ? reduced(SUM, sums + t.first, t.count, t.step) : 0;
            if (x && t.count > 0) to[k] *= (real)pow((double)x[i + k], (double)j->sum.norm - 1);
        }
        outflow_added(f, n);
    }
}

static __attribute__((noinline)) void spread_sums(const spread_job *j, const real *sums, const real *x, outflow *f,
                                                  const real *limit)
{
    switch (j->across.most) {
    case 0: spread_each(j, sums, x, f); break;
    case 1: spread_across(1, j, sums, x, f, limit); break;
    case 2: spread_across(2, j, sums, x, f, limit); break;
    case 3: spread_across(3, j, sums, x, f, limit); break;
    default: spread_across(j->across.most, j, sums, x, f, limit);
    }
}

/* The scaled rows of outputs that the next lines may take again. Vectors that are picked from may go on behind a row. */
typedef struct {
    int64_t pitch, *which; /* the row that each holds, counted from the first plane on; or -1 */
    real *rows, *total, *line;
    sum_space space;
} scaled_rows;

static int take_scaled(scaled_rows *s, const spread_job *j)
{
    int64_t rows = j->span[0] * j->span[1];
    s->pitch = round_up(j->sum.w.out[2], LANES) + LANES;
    int64_t line = round_up(j->sum.w.size[2], LANES);
    s->rows = hl_take((size_t)((rows + 1) * s->pitch + line) * sizeof(real) + (size_t)rows * sizeof(int64_t));
    if (!s->rows) return HL_NOMEM;
    if (take_sums(&s->space, &j->sum)) return hl_give(s->rows), HL_NOMEM;
    s->total = s->rows + rows * s->pitch;
    s->line = s->total + s->pitch;
    s->which = (int64_t *)(s->line + line);
    for (int64_t i = 0; i < rows; i++) s->which[i] = -1;
    return HL_OK;
}

/* What each output of a row passes on to every element of its window. `place`: where it is kept. */
static const real *scaled_row(scaled_rows *s, const spread_job *j, const row_place *p, int64_t place)
{
    const windows *w = &j->sum.w;
    int64_t OW = w->out[2], r = (p->plane * w->out[0] + p->od) * w->out[1] + p->oh;
    real *row = s->rows + place * s->pitch;
    if (s->which[place] == r) return row;
    s->which[place] = r;
    scale_row(&s->space, &j->sum, p);
    for (int64_t o = 0; o < OW; o += LANES) {
        int64_t n = min64(LANES, OW - o);
        vreal g = load_n(j->gy + r * OW + o, n);
        if (j->y) {
            vreal y = load_n(j->y + r * OW + o, n);
            if (j->sum.norm == 2) g /= y;
            else
                for (int64_t i = 0; i < LANES; i++)
                    g[i] = (real)((double)g[i] * pow((double)y[i], 1 - (double)j->sum.norm));
            g = blend(y == splat((real)0), splat((real)0), g);
        }
        store(row + o, scaled(g, s->space.by, o));
    }
    return row;
}

/* The sums of the rows of outputs that take a line, or NULL where none does. */
static inline const real *sums_of_line(scaled_rows *s, const spread_job *j, int64_t plane, takers deep, takers high)
{
    const real *sums = NULL;
    for (int64_t a = 0; a < deep.count; a++)
        for (int64_t b = 0; b < high.count; b++) {
            const row_place p = {plane, deep.first + a * deep.step, high.first + b * high.step};
            int64_t place = j->span[0] == 1 ? 0 : p.od % j->span[0] * j->span[1];
            if (j->span[1] > 1) place += p.oh % j->span[1];
            const real *row = scaled_row(s, j, &p, place);
            for (int64_t o = 0; o < j->sum.w.out[2] && sums; o += LANES)
                store(s->total + o, load(sums + o) + load(row + o));
            sums = sums ? s->total : row;
        }
    return sums;
}

/* How many lines, at most n, the same outputs take. */
static inline int64_t lines_alike(const takers *line, int64_t n)
{
    int64_t lines = 1;
    while (lines < n && line[lines].count == line->count && (!line->count || line[lines].first == line->first)) lines++;
    return lines;
}

static inline void copy_line(outflow *f, const real *line, int64_t W, const real *limit)
{
    for (int64_t i = 0, n; i < W; i += n) {
        n = min64(W - i, LINE_PIECE);
        real *to = outflow_place(f);
        const real *end = f->buffer ? to + LINE_PIECE + LANES : limit;
        for (int64_t k = 0; k < n; k += LANES) put(to + k, line ? load(line + i + k) : splat((real)0), n - k, end);
        outflow_added(f, n);
    }
}

static int spread_lines(int64_t begin, int64_t end, void *context)
{
    const spread_job *j = context;
    const windows *w = &j->sum.w;
    int64_t D = w->size[0], H = w->size[1], W = w->size[2];
    const real *limit = j->gx + end * W;
    scaled_rows s;
    outflow f;
    if (take_scaled(&s, j)) return HL_NOMEM;
    int status = outflow_begin(&f, j->gx + begin * W, LINE_PIECE, j->past_cache);
    int64_t plane = begin / H / D, d = begin / H % D, h = begin % H;
    for (int64_t line = begin, n; line < end && status == HL_OK; line += n) {
        const takers *high = j->lines[1] + h;
        const real *sums = sums_of_line(&s, j, plane, j->lines[0][d], *high);
        n = lines_alike(high, min64(H - h, end - line));
        if (sums && (j->x || n == 1)) {
            n = 1;
            spread_sums(j, sums, j->x ? j->x + line * W : NULL, &f, limit);
        } else {
            outflow once = {.to = s.line};
            if (sums) spread_sums(j, sums, NULL, &once, s.line + round_up(W, LANES));
            for (int64_t i = 0; i < n; i++) copy_line(&f, sums ? s.line : NULL, W, limit);
        }
        if ((h += n) < H) continue;
        h = 0;
        if (++d < D) continue;
        d = 0, plane++;
    }
    if (status == HL_OK) outflow_end(&f);
    hl_give(s.space.s.block);
    hl_give(s.rows);
    return status;
}
