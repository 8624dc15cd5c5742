/* The kernels of one value type and one instruction set: the twins of those in fastbn/backends/numba_.py, where the
   design is written down. `dispatch.h` includes this file once for each pair. */

#include "vectors.h"

/* --- channel arithmetic ------------------------------------------------------------------------------------------- */

/* HIGH, LOW, SCALE of channel c in REAL, at column j. */
static void NAME(round_affine)(const Job *job, Index j, Index c) {
    const Index width = job->columns ? job->columns : job->channels;
    const double center = job->affine[c], scale = job->affine[job->channels + c];
    const double shift = job->affine[2 * job->channels + c];
    REAL *coef = (REAL *)job->coef + j, high = (REAL)center;
    coef[HIGH * width] = high;
    coef[LOW * width] = (REAL)(shift - (center - high) * scale);
    coef[SCALE * width] = (REAL)scale;
}

/* A and B of channel c in REAL, at column j. */
static void NAME(round_gradient)(const Job *job, Index j, Index c) {
    const Index width = job->columns ? job->columns : job->channels;
    REAL *coef = (REAL *)job->coef + j;
    coef[A * width] = (REAL)job->grads[2 * job->channels + c];
    coef[B * width] = (REAL)job->grads[3 * job->channels + c];
}

/* --- points: one vector ------------------------------------------------------------------------------------------- */

/* z where the activation is open, slope * z elsewhere; a slope of 0 gives zero even for an infinite z. */
point V NAME(activated)(V z, M open, REAL slope) { return NAME(where)(open, z, NAME(scaled)(z, slope)); }

/* activation((x - center) * scale + shift + residual) */
point V NAME(output)(V x, V added, V high, V scale, V low, REAL slope, uint16_t *sign) {
    V z = NAME(fma)(x - high, scale, low) + added;
    if (slope != 1) {
        M open = NAME(positive)(z);
        if (sign) *sign = NAME(bits)(open);
        z = NAME(activated)(z, open, slope);
    }
    return z;
}

/* dy behind the activation, whose sign is read or, without a residual, computed again exactly as in `output`. */
point V NAME(gated)(V dy, V x, V high, V scale, V low, REAL slope, const uint16_t *sign) {
    if (slope != 1) {
        M open = sign ? NAME(mask_of)(*sign) : NAME(positive)(NAME(fma)(x - high, scale, low));
        dy = NAME(activated)(dy, open, slope);
    }
    return dy;
}

/* dx of a gated dy */
point V NAME(gradient)(V dy, V x, int training, V scale, V mean, V a, V b) {
    return training ? NAME(fma)(scale, dy, NAME(fma)(a, x - mean, b)) : (V)(scale * dy);
}

/* --- row nest ----------------------------------------------------------------------------------------------------- */

/* x[0], or zero where it is not finite */
point REAL NAME(shift_of)(const REAL *x) { return isfinite(*x) ? *x : 0; }

/* Prefetch all lines of two vectors. */
point void NAME(prefetch_two)(const REAL *x) {
    for (Index i = 0; i < 2 * LANES; i += LINE / (Index)sizeof(REAL)) prefetch(x + i);
}

/* Mean and m2 of block b of channel c. */
static void NAME(block_moments)(const Job *job, Index c, Index b, double *mean, double *m2) {
    const Block k = block_to_reduce(job, b);
    const Index stride = job->channels * job->s, whole = k.length - k.length % (2 * LANES);
    const REAL *x = (const REAL *)job->x + k.first * stride + c * job->s + k.column;
    const REAL shift = NAME(shift_of)(x);
    const V beyond = NAME(splat)(shift); /* stands in lanes that count no more */
    const W around = NAME(widen)(beyond), one = NAME(ones)();
    W s1 = NAME(splat_wide)(0), s2 = s1, t1 = s1, t2 = s1; /* two sums each: one would wait for its last addition */
    for (Index row = 0; row < k.rows; row += STREAMS, x += STREAMS * stride) {
        const Index streams = min(STREAMS, k.rows - row);
        const Ahead far = ahead_in(job, k, row);
        Index i = 0;
        for (int turned = 0; turned < 2; turned++) {
            const Index stop = turned ? whole : min(far.turn, whole), ahead = turned ? far.after : AHEAD;
            for (; i < stop; i += 2 * LANES)
                for (Index r = 0; r < streams; r++) {
                    const REAL *at = x + r * stride + i;
                    NAME(prefetch_two)(at + ahead);
                    W d = NAME(minus)(NAME(load_widened)(at), around);
                    W e = NAME(minus)(NAME(load_widened)(at + LANES), around);
                    s1 = NAME(added)(s1, d, one);
                    t1 = NAME(added)(t1, e, one);
                    s2 = NAME(fused)(d, d, s2);
                    t2 = NAME(fused)(e, e, t2);
                }
        }
        for (; i < k.length; i += LANES)
            for (Index r = 0; r < streams; r++) {
                const V value = NAME(load)(x + r * stride + min(i, k.length - LANES));
                W d = NAME(minus)(NAME(widen)(NAME(where)(NAME(last)(k.length - i), value, beyond)), around);
                s1 = NAME(plus)(s1, d);
                s2 = NAME(fused)(d, d, s2);
            }
    }
    moments_of(shift, k.rows * k.length, NAME(total)(NAME(plus)(s1, t1)), NAME(total)(NAME(plus)(s2, t2)), mean, m2);
}

/* Sums of gated dy and of dy * (x - MEAN) over block b of channel c; `kind` is known when this is compiled. */
point void NAME(gradients_of_kind)(const Job *job, Index c, Index b, double *sum_dy, double *dot, const int kind) {
    const Block k = block_to_reduce(job, b);
    const Index words = words_of(job->s, LANES), stride = job->channels * job->s, whole = k.length - k.length % (2 * LANES);
    const REAL *coef = (const REAL *)job->coef + c, slope = job->slope;
    const V high = NAME(splat)(coef[HIGH * job->channels]), scale = NAME(splat)(coef[SCALE * job->channels]);
    const V low = NAME(splat)(coef[LOW * job->channels]);
    const W around = NAME(splat_wide)(coef[MEAN * job->channels]), one = NAME(ones)();
    W dys = NAME(splat_wide)(0), dots = dys, dys2 = dys, dots2 = dys;
    for (Index row = 0; row < k.rows; row += STREAMS) {
        const Index first = (k.first + row) * job->channels + c, begin = first * job->s + k.column;
        const Index streams = min(STREAMS, k.rows - row), apart = job->channels * words; /* signs of neighbouring rows */
        const Ahead far = ahead_in(job, k, row);
        const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
        const uint16_t *sign = kind == SIGNED ? job->signs + first * words + k.column / LANES : 0;
        Index i = 0;
#define OPEN(at, word) \
    (kind == SIGNED ? NAME(mask_of)(sign[word]) : NAME(positive)(NAME(fma)(NAME(load)(x + at) - high, scale, low)))
#define GATED(at, word) \
    (kind == PLAIN ? NAME(load)(dy + at) : NAME(activated)(NAME(load)(dy + at), OPEN(at, word), slope))
#define WIDE_GATED(at, word) (kind == PLAIN ? NAME(load_widened)(dy + at) : NAME(widen)(GATED(at, word)))
        for (int turned = 0; turned < 2; turned++) {
            const Index stop = turned ? whole : min(far.turn, whole), ahead = turned ? far.after : AHEAD;
            for (; i < stop; i += 2 * LANES)
                for (Index r = 0, at = i, word = i / LANES; r < streams; r++, at += stride, word += apart) {
                    NAME(prefetch_two)(x + at + ahead);
                    NAME(prefetch_two)(dy + at + ahead);
                    W g = WIDE_GATED(at, word), g2 = WIDE_GATED(at + LANES, word + 1);
                    dys = NAME(added)(dys, g, one);
                    dys2 = NAME(added)(dys2, g2, one);
                    dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + at), around), dots);
                    dots2 = NAME(fused)(g2, NAME(minus)(NAME(load_widened)(x + at + LANES), around), dots2);
                }
        }
        for (; i < k.length; i += LANES)
            for (Index r = 0, at = min(i, k.length - LANES); r < streams; r++, at += stride) {
                const V g = GATED(at, i / LANES + r * apart);
                const W counted = NAME(widen)((V)((M)g & NAME(last)(k.length - i)));
                dys = NAME(plus)(dys, counted);
                dots = NAME(fused)(counted, NAME(minus)(NAME(load_widened)(x + at), around), dots);
            }
#undef OPEN
#undef GATED
#undef WIDE_GATED
    }
    *sum_dy = NAME(total)(NAME(plus)(dys, dys2));
    *dot = NAME(total)(NAME(plus)(dots, dots2));
}

/* Sums of gated dy and of dy * (x - MEAN) over block b of channel c. */
static void NAME(block_gradients)(const Job *job, Index c, Index b, double *sum_dy, double *dot) {
    if (job->slope == 1) NAME(gradients_of_kind)(job, c, b, sum_dy, dot, PLAIN);
    else if (job->signs) NAME(gradients_of_kind)(job, c, b, sum_dy, dot, SIGNED);
    else NAME(gradients_of_kind)(job, c, b, sum_dy, dot, ACTIVATED);
}

/* --- columns ------------------------------------------------------------------------------------------------------ */

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

/* `sum_gradients` of a kind that is known when this is compiled. */
point void NAME(column_sums)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef, Index pitch,
                             Index word, Index words, double *s1, double *s2, const int kind) {
    const W zero = NAME(splat_wide)(0), one = NAME(ones)();
    const REAL slope = kind == PLAIN ? 1 : job->slope;
    for (Index b = 0; b < bundles_of(rows, COLUMN_STREAMS / 2); b++) {
        const Bundle rs = bundle_at(b, rows, COLUMN_STREAMS / 2);
        for (Index j = 0; j < width; j += LANES) {
            const Index k = min(j, width - LANES), begin = at + rs.first * stride + k, on = rs.apart * stride;
            const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
            const W around = NAME(load_widened)(coef + MEAN * pitch + k);
            W sum_dy = b ? NAME(load_wide)(s1 + j) : zero, dot = b ? NAME(load_wide)(s2 + j) : zero;
            if (kind == PLAIN)
                for (Index r = 0; r < rs.rows; r++, x += on, dy += on) {
                    W g = NAME(load_widened)(dy);
                    sum_dy = NAME(added)(sum_dy, g, one);
                    dot = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x), around), dot);
                }
            else {
                const V high = NAME(load)(coef + HIGH * pitch + k), scale = NAME(load)(coef + SCALE * pitch + k);
                const V low = NAME(load)(coef + LOW * pitch + k);
                const uint16_t *sign = kind == SIGNED ? job->signs + word + rs.first * words + j / LANES : 0;
                for (Index r = 0; r < rs.rows; r++, x += on, dy += on, sign += kind == SIGNED ? rs.apart * words : 0) {
                    const M open = kind == SIGNED ? NAME(mask_of)(*sign)
                                                  : NAME(positive)(NAME(fma)(NAME(load)(x) - high, scale, low));
                    W g = NAME(widen)(NAME(activated)(NAME(load)(dy), open, slope));
                    sum_dy = NAME(added)(sum_dy, g, one);
                    dot = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x), around), dot);
                }
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
#define SUMS(kind) NAME(column_sums)(job, at, stride, rows, width, coef, pitch, word, words, s1, s2, kind)
    if (job->slope == 1) SUMS(PLAIN);
    else if (job->signs) SUMS(SIGNED);
    else SUMS(ACTIVATED);
#undef SUMS
}

/* Store a row's last vector, of which `rest` values are new. A streamed line is not touched again: see `finish_row` of
   the twin. */
point void NAME(finish_row)(REAL *x, V value, Index rest, int streaming) {
    if (streaming) NAME(store_where)(x, NAME(last)(rest), value);
    else NAME(store)(x, value);
}

/* Output of a row. `kind` is known when this is compiled, and spares loops what they need not ask for. */
point void NAME(apply_columns)(const Job *job, Index at, Index width, const REAL *coef, Index pitch, Index step,
                               Index word, Index ahead, Index beyond, const int kind) {
    const REAL *x = (const REAL *)job->x + at;
    const REAL *residual = kind >= ADDED && job->residual ? (const REAL *)job->residual + at : 0;
    REAL *y = (REAL *)job->y + at;
    uint16_t *sign = kind >= SIGNED && job->signs ? job->signs + word : 0;
    const REAL slope = kind == PLAIN || kind == ADDED ? 1 : job->slope;
    if (((kind == ADDED || kind == SIGNED) && !residual) || (kind == SIGNED && !sign)) __builtin_unreachable();
    const Index end = width - LANES, head = job->streaming ? to_line(y, sizeof(REAL)) : 0;
    const int streaming = job->streaming && !(sign && head);
    const V none = {0}, last = NAME(load)(x + end), last_added = residual ? NAME(load)(residual + end) : none;
    const REAL *high = coef + HIGH * pitch, *scale = coef + SCALE * pitch, *low = coef + LOW * pitch;
    Index i = streaming ? head : 0;
#define OUTPUT(value, added, j, sign) \
    NAME(output)(value, added, NAME(load)(high + (j)), NAME(load)(scale + (j)), NAME(load)(low + (j)), slope, sign)
    for (Index j = 0; j < i; j += LANES) {
        V z = OUTPUT(NAME(load)(x + j), residual ? NAME(load)(residual + j) : none, j * step, 0);
        NAME(store_where)(y + j, NAME(foremost)(i - j), z);
    }
    for (int past = streaming; past >= 0; past--) /* whole lines past the cache, then what is left */
        for (const Index stop = past ? i + whole_lines(width - i, sizeof(REAL)) : end + 1; i < stop; i += LANES) {
            if (ahead) prefetch(x + i + ahead);
            if (residual && beyond) prefetch(residual + i + beyond);
            V z = OUTPUT(NAME(load)(x + i), residual ? NAME(load)(residual + i) : none, i * step, sign);
            NAME(put)(y + i, z, past);
            if (sign) sign++;
        }
    if (i < width) NAME(finish_row)(y + end, OUTPUT(last, last_added, end * step, sign), width - i, streaming);
#undef OUTPUT
}

/* dx of the vector at a column. */
point V NAME(gradient_column)(V dy, V x, const REAL *coef, Index pitch, REAL slope, const uint16_t *sign, int training) {
    V high = NAME(load)(coef + HIGH * pitch), scale = NAME(load)(coef + SCALE * pitch);
    V low = NAME(load)(coef + LOW * pitch), mean = NAME(load)(coef + MEAN * pitch);
    V a = NAME(load)(coef + A * pitch), b = NAME(load)(coef + B * pitch);
    V g = NAME(gated)(dy, x, high, scale, low, slope, sign);
    return NAME(gradient)(g, x, training, scale, mean, a, b);
}

/* dx of a row. */
point void NAME(gradient_columns)(const Job *job, Index at, Index width, const REAL *coef, Index pitch, Index step,
                                  Index word, Index ahead, const int kind) {
    const REAL *x = (const REAL *)job->x + at, *dy = (const REAL *)job->dy + at;
    REAL *dx = (REAL *)job->dx + at;
    const uint16_t *sign = kind >= SIGNED && job->signs ? job->signs + word : 0;
    const REAL slope = kind == PLAIN ? 1 : job->slope;
    const int training = kind == ANY ? job->training : 1;
    if (kind == SIGNED && !sign) __builtin_unreachable();
    const Index end = width - LANES, head = job->streaming ? to_line(dx, sizeof(REAL)) : 0;
    const int streaming = job->streaming && !(sign && head);
    const V last = NAME(load)(x + end), last_dy = NAME(load)(dy + end);
    Index i = streaming ? head : 0;
#define GRADIENT(g, value, j, sign) NAME(gradient_column)(g, value, coef + (j), pitch, slope, sign, training)
    for (Index j = 0; j < i; j += LANES)
        NAME(store_where)(dx + j, NAME(foremost)(i - j), GRADIENT(NAME(load)(dy + j), NAME(load)(x + j), j * step, 0));
    for (int past = streaming; past >= 0; past--) /* whole lines past the cache, then what is left */
        for (const Index stop = past ? i + whole_lines(width - i, sizeof(REAL)) : end + 1; i < stop; i += LANES) {
            if (ahead) {
                prefetch(x + i + ahead);
                prefetch(dy + i + ahead);
            }
            NAME(put)(dx + i, GRADIENT(NAME(load)(dy + i), NAME(load)(x + i), i * step, sign), past);
            if (sign) sign++;
        }
    if (i < width) NAME(finish_row)(dx + end, GRADIENT(last_dy, last, end * step, sign), width - i, streaming);
#undef GRADIENT
}

/* dresidual of a row: the gated dy, whose signs are there if it has an activation. */
point void NAME(residual_columns)(const Job *job, Index at, Index width, Index word, const int kind) {
    const REAL *dy = (const REAL *)job->dy + at;
    REAL *dresidual = (REAL *)job->dresidual + at;
    const uint16_t *sign = kind == SIGNED ? job->signs + word : 0;
    const Index end = width - LANES, head = job->streaming ? to_line(dresidual, sizeof(REAL)) : 0;
    const REAL slope = job->slope;
    const int streaming = job->streaming && !(sign && head);
    const V last = NAME(load)(dy + end);
    Index i = streaming ? head : 0;
#define GATED(g) (kind == SIGNED ? NAME(activated)(g, NAME(mask_of)(*sign), slope) : (g))
    for (Index j = 0; j < i; j += LANES)
        NAME(store_where)(dresidual + j, NAME(foremost)(i - j), NAME(load)(dy + j));
    for (int past = streaming; past >= 0; past--)
        for (const Index stop = past ? i + whole_lines(width - i, sizeof(REAL)) : end + 1; i < stop; i += LANES) {
            NAME(put)(dresidual + i, GATED(NAME(load)(dy + i)), past);
            if (kind == SIGNED) sign++;
        }
    if (i < width) NAME(finish_row)(dresidual + end, GATED(last), width - i, streaming);
#undef GATED
}

/* Output, or dx and dresidual, of rows of columns, each `stride` behind the one before it, or ahead of it if that is
   negative; what lies `ahead` is prefetched. */
static void NAME(apply_rows)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef, Index pitch,
                             Index step, Index word, Index words, Index ahead, int backward) {
    const int added = job->residual != 0, activated = job->slope != 1, signs = job->signs != 0;
    const int kind = job->training ? kind_of(backward ? signs : added, activated, signs) : ANY;
    const Index beyond = ahead || !job->ahead ? ahead : stride; /* after a reduction only the residual is out of the cache */
    const REAL *out = (const REAL *)(backward ? job->dx : job->y);
    for (Index r = 0; r < rows; r++, at += stride, word += words) {
        if (job->streaming) { /* a store that waits for its line holds up all behind it */
            prefetch_part(out + at + width);
            if (r + 1 < rows) prefetch_part(out + at + stride);
        }
        if (backward && job->dresidual) { /* first: dx may lie over dy */
            if (signs) NAME(residual_columns)(job, at, width, word, SIGNED);
            else NAME(residual_columns)(job, at, width, word, PLAIN);
        }
        if (backward)
            if (kind == PLAIN) NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, PLAIN);
            else if (kind == ACTIVATED) NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, ACTIVATED);
            else if (kind == SIGNED) NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, SIGNED);
            else NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, ANY);
        else if (kind == PLAIN) NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, 0, PLAIN);
        else if (kind == ACTIVATED) NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, 0, ACTIVATED);
        else if (kind == ADDED) NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, beyond, ADDED);
        else if (kind == SIGNED) NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, beyond, SIGNED);
        else NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, beyond, ANY);
    }
}

/* Output, or dx and dresidual, of a block of a run of channels, whose coefficients are the same in every column: after
   their reduction from the last row to the first. */
static void NAME(apply_block)(const Job *job, Run run, Block k, int backward, int fused) {
    const Index words = words_of(job->s, LANES), channels = job->channels, on = fused ? -channels : channels;
    const Index first = k.first + (fused ? k.rows - 1 : 0), ahead = fused ? 0 : job->ahead;
    REAL coef[6 * LANES];
    for (Index c = run.c0; c < run.c1; c++) {
        const Index row = first * channels + c;
        for (Index r = 0; r <= (backward ? B : SCALE); r++)
            NAME(store)(coef + r * LANES, NAME(splat)(((const REAL *)job->coef)[r * channels + c]));
        NAME(apply_rows)(job, row * job->s + k.column, on * job->s, k.rows, k.length, coef, LANES, 0,
                         row * words + k.column / LANES, on * words, ahead, backward);
    }
}

/* --- slabs -------------------------------------------------------------------------------------------------------- */

/* row[0 : length] = value, of at least a vector */
point void NAME(repeat)(REAL value, Index length, REAL *row) {
    const V all = NAME(splat)(value);
    for (Index i = 0; i < length - LANES; i += LANES) NAME(store)(row + i, all);
    NAME(store)(row + length - LANES, all);
}

/* Sum of sums[0 : length], at least a vector of them. */
point double NAME(total_of)(const double *sums, Index length) {
    const Index rest = length % LANES;
    W both = NAME(splat_wide)(0);
    for (Index i = 0; i + LANES <= length; i += LANES) both = NAME(plus)(both, NAME(load_wide)(sums + i));
    double sum = NAME(total)(both);
    for (Index i = length - rest; i < length; i++) sum += sums[i];
    return sum;
}

/* Mean and m2 of block b of a run of channels, into `part`. */
static void NAME(slab_moments)(const Job *job, Run run, Index b) {
    const Block k = block_to_reduce(job, b);
    const Slab slab = slab_of(job, run, k.first, LANES);
    const Index s = job->s, width = slab.width;
    double *part = job->part + 2 * b * job->channels + run.c0;
    REAL shifts[WIDEST];
    double s1[WIDEST], s2[WIDEST];
    Index j = 0;
    do NAME(repeat)(NAME(shift_of)((const REAL *)job->x + slab.at + j), s, shifts + j);
    while ((j += s) < width);
    NAME(sum_moments)(job, slab.at, slab.stride, k.rows, width, shifts, s1, s2);
    for (j = 0; j < width; j += s, part++)
        moments_of(shifts[j], k.rows * s, NAME(total_of)(s1 + j, s), NAME(total_of)(s2 + j, s), part, part + job->channels);
}

/* Rows `first` to `end` of the coefficients of a run of channels, for every column. */
point void NAME(slab_coef)(const Job *job, Run run, REAL *coef, Index first, Index end) {
    for (Index r = first; r < end; r++)
        for (Index c = run.c0; c < run.c1; c++)
            NAME(repeat)(((const REAL *)job->coef)[r * job->channels + c], job->s, coef + r * SLAB + (c - run.c0) * job->s);
}

/* Sums of gated dy and of dy * (x - MEAN) over block b of a run of channels, into `part`. */
static void NAME(slab_gradients)(const Job *job, Run run, Index b) {
    const Block k = block_to_reduce(job, b);
    const Slab slab = slab_of(job, run, k.first, LANES);
    const Index s = job->s, width = slab.width;
    double *part = job->part + 2 * b * job->channels + run.c0;
    REAL coef[SLAB_COEF];
    double s1[WIDEST], s2[WIDEST];
    NAME(slab_coef)(job, run, coef, signs_again(job) ? HIGH : MEAN, MEAN + 1);
    NAME(sum_gradients)(job, slab.at, slab.stride, k.rows, width, coef, SLAB, slab.word, slab.words, s1, s2);
    for (Index j = 0; j < width; j += s, part++)
        part[0] = NAME(total_of)(s1 + j, s), part[job->channels] = NAME(total_of)(s2 + j, s);
}

/* Output, or dx and dresidual, of a run of channels in the samples of a block: after their reduction the last first. */
static void NAME(apply_slab)(const Job *job, Run run, Block k, int backward, int fused) {
    const Slab slab = slab_of(job, run, k.first + (fused ? k.rows - 1 : 0), LANES);
    const Index on = fused ? -1 : 1, ahead = fused ? 0 : job->ahead;
    REAL coef[SLAB_COEF];
    NAME(slab_coef)(job, run, coef, backward && !signs_again(job) ? SCALE : HIGH, backward ? B + 1 : SCALE + 1);
    NAME(apply_rows)(job, slab.at, on * slab.stride, k.rows, slab.width, coef, SLAB, 1, slab.word, on * slab.words, ahead,
                     backward);
}

/* --- column nest -------------------------------------------------------------------------------------------------- */

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

/* Output, or dx and dresidual, of the t-th group of rows. */
static void NAME(apply_group)(const Job *job, Index t, int backward) {
    const Index columns = job->columns, first = t * group_of(columns), rows = min(group_of(columns), job->rows - first);
    const Index words = words_of(columns, LANES);
    const REAL *coef = (const REAL *)job->coef;
    NAME(apply_rows)(job, first * columns, columns, rows, columns, coef, columns, 1, first * words, words, job->ahead,
                     backward);
}

/* --- phases ------------------------------------------------------------------------------------------------------- */

/* The parts of channel c together, in order, and what follows from them if output is wanted. */
static void NAME(finish_channel)(const Job *job, Index c, int backward, int apply) {
    const Index columns = job->columns, channels = job->channels, s = job->s;
    const Index rest = columns ? job->n * channels * s - job->rows * columns : 0;
    Moments total = {0};
    double sum_dy = 0, dot = 0;
    for (Index b = 0; b < job->blocks + (c * s < rest); b++) {
        Moments one = sums_of(job, c, b); /* or sums of dy and dy * (x - MEAN) */
        if (backward) sum_dy += one.mean, dot += one.m2;
        else {
            const REAL *first = (const REAL *)job->x + min(b * job->block, job->rows) * columns + c * s;
            if (columns) moments_of(NAME(shift_of)(first), one.count, one.mean, one.m2, &one.mean, &one.m2);
            merge(&total, one);
        }
    }
    if (apply && backward) finish_gradient(job, c, (REAL)job->stats[c], sum_dy, dot);
    else if (apply) finish_statistics(job, c, total.mean, total.m2);
    else if (backward) {
        const double mean = job->stats[c];
        job->grads[c] = sum_dy;
        job->grads[channels + c] = dot - (mean - (REAL)mean) * sum_dy;
    } else {
        job->stats[c] = total.mean;
        job->stats[channels + c] = total.m2;
    }
}

/* Mean and m2, or sums of gradients, of block b of a run of channels, into `part` (blocks, 2, channels). */
static void NAME(reduce_run)(const Job *job, Run run, Index b, int backward) {
    if (job->s < SHORT) (backward ? NAME(slab_gradients) : NAME(slab_moments))(job, run, b);
    else
        for (Index c = run.c0; c < run.c1; c++) {
            double *part = job->part + 2 * b * job->channels + c;
            (backward ? NAME(block_gradients) : NAME(block_moments))(job, c, b, part, part + job->channels);
        }
}

/* Output, or dx and dresidual, of a block of a run of channels. */
static void NAME(apply_run)(const Job *job, Run run, Block k, int backward, int fused) {
    (job->s < SHORT ? NAME(apply_slab) : NAME(apply_block))(job, run, k, backward, fused);
}

/* Reduction and output of run t. */
static void NAME(run_at_once)(const Job *job, Index t, int backward) {
    const Run run = run_of(job, t, job->run);
    for (Index b = 0; b < job->blocks; b++) NAME(reduce_run)(job, run, b, backward);
    for (Index c = run.c0; c < run.c1; c++) {
        NAME(finish_channel)(job, c, backward, 1);
        (backward ? NAME(round_gradient) : NAME(round_affine))(job, c, c);
    }
    const Index height = job->s < SHORT ? BLOCK / job->s : 1;
    for (Index b = blocks_of(job->n, job->s, height, BLOCK) - 1; b >= 0; b--) /* the last first: it is in the cache */
        NAME(apply_run)(job, run, block_of(b, job->n, job->s, height, BLOCK), backward, 1);
}

/* Task t of a phase. */
static void NAME(task)(const Job *job, int backward, int phase, Index t) {
    switch (phase) {
    case FUSED: NAME(run_at_once)(job, t, backward); break;
    case REDUCE: NAME(reduce_run)(job, run_of(job, t / job->blocks, job->run), t % job->blocks, backward); break;
    case APPLY: {
        const Index runs = runs_of(job, spread_of(job)); /* in the order of memory */
        const Block block = block_of(t / runs, job->n, job->s, samples_of(job), BLOCK);
        NAME(apply_run)(job, run_of(job, t % runs, spread_of(job)), block, backward, 0);
        break;
    }
    case REDUCE_COLUMNS: (backward ? NAME(column_gradients) : NAME(column_moments))(job, t); break;
    case APPLY_COLUMNS: NAME(apply_group)(job, t, backward); break;
    }
    if (job->streaming) fence();
}

/* --- between phases ----------------------------------------------------------------------------------------------- */

/* What comes before a phase: coefficients for every channel or, repeated as the channels are, every column. */
static void NAME(prepare)(const Job *job, int backward, int phase) {
    const Index width = job->columns ? job->columns : job->channels, length = job->columns ? job->s : 1;
    const Index channels = job->channels, pixel = channels * length;
    const int apply = phase == APPLY || phase == APPLY_COLUMNS;
    REAL *coef = (REAL *)job->coef;
    for (Index c = 0; c < channels; c++) {
        if (backward != apply) NAME(round_affine)(job, c * length, c);
        if (backward && !apply) coef[MEAN * width + c * length] = (REAL)job->stats[c];
        if (backward && apply) NAME(round_gradient)(job, c * length, c);
    }
    const int first = backward && apply ? A : HIGH, end = !backward ? SCALE + 1 : apply ? B + 1 : MEAN + 1;
    for (int r = first; r < end; r++) {
        REAL *row = coef + r * width;
        for (Index c = 0; c < channels && length > 1; c++)
            for (Index j = c * length + 1; j < c * length + length; j++) row[j] = row[c * length];
        for (Index j = pixel; j < width; j++) row[j] = row[j - pixel];
    }
}

/* The values that fill no row, in a row padded with zeros; NULL if there are no values at all. */
static REAL *NAME(padded)(const Job *job, const void *values, REAL *row) {
    const Index begin = job->rows * job->columns, rest = job->n * job->channels * job->s - begin;
    for (Index j = 0; j < job->columns && values; j++) row[j] = j < rest ? ((const REAL *)values)[begin + j] : 0;
    return values ? row : 0;
}

/* Copy the values that fill no row from their padded row. */
static void NAME(unpadded)(const Job *job, const void *row, void *values) {
    const Index begin = job->rows * job->columns, rest = job->n * job->channels * job->s - begin;
    for (Index j = 0; j < rest && values; j++) ((REAL *)values)[begin + j] = ((const REAL *)row)[j];
}

/* A phase of the column nest for the values that fill no row: a job of one row, and its parts are the last. */
static void NAME(last_row)(const Job *job, int backward, int phase) {
    REAL x[LONGEST_FOLD], dy[LONGEST_FOLD], residual[LONGEST_FOLD];
    REAL y[LONGEST_FOLD], dx[LONGEST_FOLD], dresidual[LONGEST_FOLD];
    Job row = *job;
    row.rows = row.block = 1, row.streaming = 0, row.part = job->part + 2 * job->blocks * job->columns;
    row.x = NAME(padded)(job, job->x, x), row.dy = NAME(padded)(job, job->dy, dy);
    if (job->signs) row.signs = job->signs + job->rows * words_of(job->columns, LANES);
    if (phase == REDUCE_COLUMNS) {
        for (Index t = 0; t < chunks_of(job->columns); t++)
            (backward ? NAME(column_gradients) : NAME(column_moments))(&row, t);
        return;
    }
    row.residual = NAME(padded)(job, job->residual, residual), row.y = NAME(padded)(job, job->y, y);
    row.dx = NAME(padded)(job, job->dx, dx), row.dresidual = NAME(padded)(job, job->dresidual, dresidual);
    NAME(apply_group)(&row, 0, backward);
    NAME(unpadded)(job, row.y, job->y);
    NAME(unpadded)(job, row.dx, job->dx);
    NAME(unpadded)(job, row.dresidual, job->dresidual);
}

static const Kernels NAME(kernels) = {LANES, NAME(prepare), NAME(task), NAME(last_row), NAME(finish_channel)};

#undef V
#undef M
#undef W
#undef D
#undef WIDE
#undef LANES
