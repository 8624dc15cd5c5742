/* The column nest: sums of every column; the twin of fastbn/backends/_numba/columns.py.
   kernels.h includes this file for each value type and instruction set. */

/* Put the sums of the last vector, which overlaps, where its columns belong. */
static void NAME(settle)(double *sums, Index width) {
    const Index rest = width % LANES;
    for (Index j = width - rest; j < width; j++) sums[j] = sums[j + LANES - rest];
}

/* Sums of x - shift and of its square for every column. */
static void NAME(sum_moments)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *shift, double *s1,
                              double *s2) {
    const W zero = NAME(splat_wide)(0), one = NAME(ones)();
    for (Index b = 0; b < bundles_of(rows, COLUMN_STREAMS); b++) {
        const Bundle rs = bundle_at(b, rows, COLUMN_STREAMS);
        for (Index j = 0; j < width; j += LANES) {
            const Index k = min(j, width - LANES); /* the last vector overlaps the one before it */
            const REAL *x = (const REAL *)job->x + at + rs.first * stride + k;
            const W around = NAME(widen)(NAME(finite)(NAME(load)(shift + k)));
            W sum1 = b ? NAME(load_wide)(s1 + j) : zero, sum2 = b ? NAME(load_wide)(s2 + j) : zero;
            for (Index r = 0; r < rs.rows; r++, x += rs.apart * stride) {
                W d = NAME(minus)(NAME(load_widened)(x), around);
                sum1 = NAME(added)(sum1, d, one);
                sum2 = NAME(fused)(d, d, sum2);
            }
            NAME(store_wide)(s1 + j, sum1);
            NAME(store_wide)(s2 + j, sum2);
        }
    }
    NAME(settle)(s1, width);
    NAME(settle)(s2, width);
}

/* `sum_gradients` of a kind that is known when this is compiled; prefetched where data lie far away. */
point void NAME(column_sums)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef, Index pitch,
                             Index word, Index words, double *s1, double *s2, const int kind, const int far) {
    const W zero = NAME(splat_wide)(0), one = NAME(ones)();
    const REAL slope = slope_of(job, kind);
    for (Index b = 0; b < bundles_of(rows, COLUMN_STREAMS / 2); b++) {
        const Bundle rs = bundle_at(b, rows, COLUMN_STREAMS / 2);
        for (Index j = 0; j < width; j += LANES) {
            const Index k = min(j, width - LANES), begin = at + rs.first * stride + k, on = rs.apart * stride;
            const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
            const W around = NAME(load_widened)(coef + MEAN * pitch + k);
            W sum_dy = b ? NAME(load_wide)(s1 + j) : zero, dot = b ? NAME(load_wide)(s2 + j) : zero;
            for (Index r = 0; r < (far ? rs.rows : 0); r++)
                prefetch(x + AHEAD + r * on), prefetch(dy + AHEAD + r * on);
            const V high = NAME(load)(coef + HIGH * pitch + k), scale = NAME(load)(coef + SCALE * pitch + k);
            const V low = NAME(load)(coef + LOW * pitch + k);
            const uint16_t *sign = kind >= SIGNED && job->signs ? job->signs + word + rs.first * words : 0;
            for (Index r = 0; r < rs.rows; r++, x += on, dy += on, sign += sign ? rs.apart * words : 0) {
                if (kind == SIGNED && !sign) __builtin_unreachable();
                const W g = NAME(wide_gated)(x, dy, high, scale, low, slope, sign, k, kind);
                sum_dy = NAME(added)(sum_dy, g, one);
                dot = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x), around), dot);
            }
            NAME(store_wide)(s1 + j, sum_dy);
            NAME(store_wide)(s2 + j, dot);
        }
    }
    NAME(settle)(s1, width);
    NAME(settle)(s2, width);
}

/* Sums of gated dy and of dy * (x - MEAN) for every column; signs of a row are `words`, the first at `word`. */
static void NAME(sum_gradients)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef,
                                Index pitch, Index word, Index words, double *s1, double *s2) {
#define SUMS(kind, far) NAME(column_sums)(job, at, stride, rows, width, coef, pitch, word, words, s1, s2, kind, far)
    const int far = job->ahead != 0;
    switch (kind_to_sum(job)) {
    case PLAIN:
        if (far) SUMS(PLAIN, 1);
        else SUMS(PLAIN, 0); /* one test a vector takes 7 % more */
        break;
    case RELU: SUMS(RELU, far); break;
    case ACTIVATED: SUMS(ACTIVATED, far); break;
    case SIGNED: SUMS(SIGNED, far); break;
    default: SUMS(ANY, far);
    }
#undef SUMS
}

/* The shifts of so many columns from j0 on, whose block begins at `row`. */
point void NAME(shifts_of)(const Job *job, const REAL *row, Index j0, Index width, REAL *shifts) {
    const Index length = job->s, pixel = job->channels * length;
    for (Index j = 0, c = j0 / length % job->channels, k = j0 % length; j < min(pixel, width); j++) {
        shifts[j] = row[c * length];
        if (++k == length) k = 0, c++;
        if (c == job->channels) c = 0;
    }
    for (Index j = pixel; j < width; j++) shifts[j] = shifts[j - pixel];
}

/* Sums of x - shift and of its square for every column of a chunk, into `part` (blocks, 2, columns). */
static void NAME(column_moments)(const Job *job, Index t) {
    const Chunk q = chunk_of(job, t);
    const Index columns = job->columns, at = q.first * columns + q.column;
    const REAL *x = (const REAL *)job->x + at;
    double s1[WIDEST], s2[WIDEST];
    REAL shifts[WIDEST];
    if (columns != job->channels) NAME(shifts_of)(job, x - q.column, q.column, q.width, shifts);
    NAME(sum_moments)(job, at, columns, q.rows, q.width, columns == job->channels ? x : shifts, s1, s2);
    for (Index j = 0; j < q.width; j++) q.part[j] = s1[j], q.part[j + columns] = s2[j];
}

/* Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns). */
static void NAME(column_gradients)(const Job *job, Index t) {
    const Chunk q = chunk_of(job, t);
    const Index columns = job->columns, words = words_of(columns, LANES), at = q.first * columns + q.column;
    const Index word = q.first * words + q.column / LANES;
    const REAL *coef = (const REAL *)job->coef + q.column;
    double s1[WIDEST], s2[WIDEST];
    NAME(sum_gradients)(job, at, columns, q.rows, q.width, coef, columns, word, words, s1, s2);
    for (Index j = 0; j < q.width; j++) q.part[j] = s1[j], q.part[j + columns] = s2[j];
}
