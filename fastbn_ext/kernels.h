/* The kernels of one value type and one instruction set: the twins of those in fastbn/backends/numba_.py, where the
   design is written down. `dispatch.h` includes this file once for each pair. */

#include "vectors.h"

/* --- channel arithmetic ------------------------------------------------------------------------------------------- */

/* HIGH, SCALE, LOW of channel c in REAL, at column j. */
static void NAME(round_affine)(const Job *job, Index j, Index c) {
    const Index width = job->columns ? job->columns : job->channels;
    const double center = job->affine[c], scale = job->affine[job->channels + c];
    const double shift = job->affine[2 * job->channels + c];
    REAL *coef = (REAL *)job->coef + j, high = (REAL)center;
    coef[HIGH * width] = high;
    coef[SCALE * width] = (REAL)scale;
    coef[LOW * width] = (REAL)(shift - (center - high) * scale);
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
point V NAME(activated)(V z, M open, REAL slope) { return NAME(where)(open, z, slope == 0 ? (V){0} : (V)(z * slope)); }

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
    const Block k = block_of(b, job->n, job->s);
    const Index stride = job->channels * job->s, rest = k.length % LANES, end = k.length - 2 * LANES + 1;
    const Ahead far = ahead_in(k.length, stride);
    const REAL *x = (const REAL *)job->x + k.first * stride + c * job->s + k.column;
    const REAL shift = NAME(shift_of)(x);
    const V beyond = NAME(splat)(shift); /* stands in lanes that count no more */
    const W around = NAME(widen)(beyond), one = NAME(ones)();
    const M tail = NAME(last)(rest);
    W s1 = NAME(splat_wide)(0), s2 = s1, t1 = s1, t2 = s1; /* two sums each: one would wait for its last addition */
    for (Index r = 0; r < k.rows; r++, x += stride) {
        Index i = 0;
        for (int turned = 0; turned < 2; turned++) {
            const Index stop = turned ? end : min(far.turn, end), ahead = turned ? far.after : far.before;
            for (; i < stop; i += 2 * LANES) {
                NAME(prefetch_two)(x + i + ahead);
                W d = NAME(minus)(NAME(load_widened)(x + i), around);
                W e = NAME(minus)(NAME(load_widened)(x + i + LANES), around);
                s1 = NAME(added)(s1, d, one);
                t1 = NAME(added)(t1, e, one);
                s2 = NAME(fused)(d, d, s2);
                t2 = NAME(fused)(e, e, t2);
            }
        }
        if (i + LANES <= k.length) {
            W d = NAME(minus)(NAME(load_widened)(x + i), around);
            s1 = NAME(plus)(s1, d);
            s2 = NAME(fused)(d, d, s2);
        }
        if (rest) {
            W d = NAME(minus)(NAME(widen)(NAME(where)(tail, NAME(load)(x + k.length - LANES), beyond)), around);
            s1 = NAME(plus)(s1, d);
            s2 = NAME(fused)(d, d, s2);
        }
    }
    moments_of(shift, k.rows * k.length, NAME(total)(NAME(plus)(s1, t1)), NAME(total)(NAME(plus)(s2, t2)), mean, m2);
}

/* Sums of gated dy and of dy * (x - MEAN) over block b of channel c. */
static void NAME(block_gradients)(const Job *job, Index c, Index b, double *sum_dy, double *dot) {
    const Block k = block_of(b, job->n, job->s);
    const Index words = words_of(job->s, LANES), rest = k.length % LANES, stride = job->channels * job->s;
    const Index end = k.length - 2 * LANES + 1;
    const Ahead far = ahead_in(k.length, stride);
    const REAL *coef = (const REAL *)job->coef + c, slope = job->slope;
    const V high = NAME(splat)(coef[HIGH * job->channels]), scale = NAME(splat)(coef[SCALE * job->channels]);
    const V low = NAME(splat)(coef[LOW * job->channels]);
    const W around = NAME(splat_wide)(coef[MEAN * job->channels]), one = NAME(ones)();
    const M tail = NAME(last)(rest);
    W dys = NAME(splat_wide)(0), dots = dys, dys2 = dys, dots2 = dys;
    for (Index row = k.first; row < k.first + k.rows; row++) {
        const Index at = row * stride + c * job->s + k.column;
        const REAL *x = (const REAL *)job->x + at, *dy = (const REAL *)job->dy + at;
        const uint16_t *sign = job->signs ? job->signs + (row * job->channels + c) * words + k.column / LANES : 0;
        Index i = 0;
        for (int turned = 0; turned < 2; turned++) {
            const Index stop = turned ? end : min(far.turn, end), ahead = turned ? far.after : far.before;
            if (slope == 1)
                for (; i < stop; i += 2 * LANES) {
                    NAME(prefetch_two)(x + i + ahead);
                    NAME(prefetch_two)(dy + i + ahead);
                    W g = NAME(load_widened)(dy + i), g2 = NAME(load_widened)(dy + i + LANES);
                    dys = NAME(added)(dys, g, one);
                    dys2 = NAME(added)(dys2, g2, one);
                    dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + i), around), dots);
                    dots2 = NAME(fused)(g2, NAME(minus)(NAME(load_widened)(x + i + LANES), around), dots2);
                }
            else
                for (; i < stop; i += 2 * LANES, sign += sign ? 2 : 0) {
                    NAME(prefetch_two)(x + i + ahead);
                    NAME(prefetch_two)(dy + i + ahead);
                    V value = NAME(load)(x + i), value2 = NAME(load)(x + i + LANES);
                    V gate = NAME(gated)(NAME(load)(dy + i), value, high, scale, low, slope, sign);
                    V gate2 = NAME(gated)(NAME(load)(dy + i + LANES), value2, high, scale, low, slope, sign ? sign + 1 : 0);
                    W g = NAME(widen)(gate), g2 = NAME(widen)(gate2);
                    dys = NAME(added)(dys, g, one);
                    dys2 = NAME(added)(dys2, g2, one);
                    dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + i), around), dots);
                    dots2 = NAME(fused)(g2, NAME(minus)(NAME(load_widened)(x + i + LANES), around), dots2);
                }
        }
        if (i + LANES <= k.length) {
            W g = NAME(widen)(NAME(gated)(NAME(load)(dy + i), NAME(load)(x + i), high, scale, low, slope, sign));
            dys = NAME(plus)(dys, g);
            dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + i), around), dots);
            if (sign) sign++;
        }
        if (rest) {
            const Index at_end = k.length - LANES;
            V gate = NAME(gated)(NAME(load)(dy + at_end), NAME(load)(x + at_end), high, scale, low, slope, sign);
            W g = NAME(widen)((V)((M)gate & tail));
            dys = NAME(plus)(dys, g);
            dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + at_end), around), dots);
        }
    }
    *sum_dy = NAME(total)(NAME(plus)(dys, dys2));
    *dot = NAME(total)(NAME(plus)(dots, dots2));
}

/* --- columns ------------------------------------------------------------------------------------------------------ */

/* Put the sums of the last vector, which overlaps, where its columns belong. */
static void NAME(settle)(double *sums, Index width) {
    const Index rest = width % LANES;
    for (Index j = width - rest; j < width; j++) sums[j] = sums[j + LANES - rest];
}

/* Sums of x - shift and of its square for every column. */
static void NAME(sum_moments)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *shift,
                              Index depth, Index ahead, double *s1, double *s2) {
    const W zero = NAME(splat_wide)(0), one = NAME(ones)();
    for (Index row = 0; row < rows; row += depth)
        for (Index j = 0; j < width; j += LANES) {
            const Index k = min(j, width - LANES); /* the last vector overlaps the one before it */
            const REAL *x = (const REAL *)job->x + at + row * stride + k;
            const W around = NAME(widen)(NAME(finite)(NAME(load)(shift + k)));
            W sum1 = row ? NAME(load_wide)(s1 + j) : zero, sum2 = row ? NAME(load_wide)(s2 + j) : zero;
            for (Index r = row; r < min(row + depth, rows); r++, x += stride) {
                if (ahead) prefetch(x + ahead);
                W d = NAME(minus)(NAME(load_widened)(x), around);
                sum1 = NAME(added)(sum1, d, one);
                sum2 = NAME(fused)(d, d, sum2);
            }
            NAME(store_wide)(s1 + j, sum1);
            NAME(store_wide)(s2 + j, sum2);
        }
    NAME(settle)(s1, width);
    NAME(settle)(s2, width);
}

/* Sums of gated dy and of dy * (x - MEAN) for every column; signs of a row are `words`, the first at `word`. */
static void NAME(sum_gradients)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef,
                                Index pitch, Index word, Index words, Index depth, Index ahead, double *s1, double *s2) {
    const W zero = NAME(splat_wide)(0), one = NAME(ones)();
    const REAL slope = job->slope;
    for (Index row = 0; row < rows; row += depth)
        for (Index j = 0; j < width; j += LANES) {
            const Index k = min(j, width - LANES), end = min(row + depth, rows), begin = at + row * stride + k;
            const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
            const W around = NAME(load_widened)(coef + MEAN * pitch + k);
            W sum_dy = row ? NAME(load_wide)(s1 + j) : zero, dot = row ? NAME(load_wide)(s2 + j) : zero;
            if (slope == 1)
                for (Index r = row; r < end; r++, x += stride, dy += stride) {
                    if (ahead) {
                        prefetch(x + ahead);
                        prefetch(dy + ahead);
                    }
                    W g = NAME(load_widened)(dy);
                    sum_dy = NAME(added)(sum_dy, g, one);
                    dot = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x), around), dot);
                }
            else {
                const V high = NAME(load)(coef + HIGH * pitch + k), scale = NAME(load)(coef + SCALE * pitch + k);
                const V low = NAME(load)(coef + LOW * pitch + k);
                const uint16_t *sign = job->signs ? job->signs + word + row * words + j / LANES : 0;
                for (Index r = row; r < end; r++, x += stride, dy += stride, sign += sign ? words : 0) {
                    if (ahead) {
                        prefetch(x + ahead);
                        prefetch(dy + ahead);
                    }
                    W g = NAME(widen)(NAME(gated)(NAME(load)(dy), NAME(load)(x), high, scale, low, slope, sign));
                    sum_dy = NAME(added)(sum_dy, g, one);
                    dot = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x), around), dot);
                }
            }
            NAME(store_wide)(s1 + j, sum_dy);
            NAME(store_wide)(s2 + j, dot);
        }
    NAME(settle)(s1, width);
    NAME(settle)(s2, width);
}

/* Store a row's last vector, of which `rest` values are new. A streamed line is not touched again: see `finish_row` of
   the twin. */
point void NAME(finish_row)(REAL *x, V value, Index rest, int streaming) {
    if (streaming) NAME(store_where)(x, NAME(last)(rest), value);
    else NAME(store)(x, value);
}

/* Output of a row. `kind` is known when this is compiled, and spares loops what they need not ask for. */
point void NAME(apply_columns)(const Job *job, Index at, Index width, const REAL *coef, Index pitch, Index step,
                               Index word, Index ahead, const int kind) {
    const REAL *x = (const REAL *)job->x + at, *residual = kind == ANY && job->residual ? (const REAL *)job->residual + at : 0;
    REAL *y = (REAL *)job->y + at;
    uint16_t *sign = kind == ANY && job->signs ? job->signs + word : 0;
    const REAL slope = kind == PLAIN ? 1 : job->slope;
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
            V z = OUTPUT(NAME(load)(x + i), residual ? NAME(load)(residual + i) : none, i * step, sign);
            NAME(put)(y + i, z, past);
            if (sign) sign++;
        }
    if (i < width) NAME(finish_row)(y + end, OUTPUT(last, last_added, end * step, sign), width - i, streaming);
#undef OUTPUT
}

/* dx of the vector at a column, and its gated dy. */
point V NAME(gradient_column)(V *g, V x, const REAL *coef, Index pitch, REAL slope, const uint16_t *sign, int training) {
    V high = NAME(load)(coef + HIGH * pitch), scale = NAME(load)(coef + SCALE * pitch);
    V low = NAME(load)(coef + LOW * pitch), mean = NAME(load)(coef + MEAN * pitch);
    V a = NAME(load)(coef + A * pitch), b = NAME(load)(coef + B * pitch);
    *g = NAME(gated)(*g, x, high, scale, low, slope, sign);
    return NAME(gradient)(*g, x, training, scale, mean, a, b);
}

/* dx, and dresidual if wanted, of a row. */
point void NAME(gradient_columns)(const Job *job, Index at, Index width, const REAL *coef, Index pitch, Index step,
                                  Index word, Index ahead, const int kind) {
    const REAL *x = (const REAL *)job->x + at, *dy = (const REAL *)job->dy + at;
    REAL *dx = (REAL *)job->dx + at, *dresidual = kind == ANY && job->dresidual ? (REAL *)job->dresidual + at : 0;
    const uint16_t *sign = kind == ANY && job->signs ? job->signs + word : 0;
    const REAL slope = kind == PLAIN ? 1 : job->slope;
    const int training = kind == ANY ? job->training : 1;
    const Index end = width - LANES, head = job->streaming ? to_line(dx, sizeof(REAL)) : 0;
    const int streaming = job->streaming && !(sign && head) && !(dresidual && to_line(dresidual, sizeof(REAL)) != head);
    const V last = NAME(load)(x + end), last_dy = NAME(load)(dy + end);
    V line[LINE / VECTOR_BYTES];
    Index i = streaming ? head : 0, held = 0;
    for (Index j = 0; j < i; j += LANES) {
        V g = NAME(load)(dy + j);
        V d = NAME(gradient_column)(&g, NAME(load)(x + j), coef + j * step, pitch, slope, 0, training);
        NAME(store_where)(dx + j, NAME(foremost)(i - j), d);
        if (dresidual) NAME(store_where)(dresidual + j, NAME(foremost)(i - j), g);
    }
    for (int past = streaming; past >= 0; past--) /* whole lines past the cache, then what is left */
        for (const Index stop = past ? i + whole_lines(width - i, sizeof(REAL)) : end + 1; i < stop; i += LANES) {
            if (ahead) {
                prefetch(x + i + ahead);
                prefetch(dy + i + ahead);
            }
            V g = NAME(load)(dy + i);
            V d = NAME(gradient_column)(&g, NAME(load)(x + i), coef + i * step, pitch, slope, sign, training);
            NAME(put)(dx + i, d, past);
            if (dresidual && past) { /* lines of one output at a time: two in turn, vector by vector, are slow */
                line[held++] = g;
                if (held == LINE / VECTOR_BYTES)
                    while (held) held--, NAME(stream)(dresidual + i - (LINE / VECTOR_BYTES - 1 - held) * LANES, line[held]);
            } else if (dresidual) NAME(store)(dresidual + i, g);
            if (sign) sign++;
        }
    if (i < width) {
        V g = last_dy, d = NAME(gradient_column)(&g, last, coef + end * step, pitch, slope, sign, training);
        NAME(finish_row)(dx + end, d, width - i, streaming);
        if (dresidual) NAME(finish_row)(dresidual + end, g, width - i, streaming);
    }
}

/* Output, or dx and dresidual, of rows of columns; what lies `ahead` is prefetched. */
static void NAME(apply_rows)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef, Index pitch,
                             Index step, Index word, Index words, Index ahead, int backward) {
    const int simple = !job->signs && !job->residual && !job->dresidual && job->training;
    const int kind = !simple ? ANY : job->slope == 1 ? PLAIN : ACTIVATED;
    const REAL *out = (const REAL *)(backward ? job->dx : job->y);
    for (Index r = 0; r < rows; r++, at += stride, word += words) {
        if (job->streaming) { /* a store that waits for its line holds up all behind it */
            prefetch_part(out + at + width);
            if (r + 1 < rows) prefetch_part(out + at + stride);
        }
        if (backward)
            if (kind == PLAIN) NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, PLAIN);
            else if (kind == ACTIVATED) NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, ACTIVATED);
            else NAME(gradient_columns)(job, at, width, coef, pitch, step, word, ahead, ANY);
        else if (kind == PLAIN) NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, PLAIN);
        else if (kind == ACTIVATED) NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, ACTIVATED);
        else NAME(apply_columns)(job, at, width, coef, pitch, step, word, ahead, ANY);
    }
}

/* Output, or dx and dresidual, of a block of a run of channels, whose coefficients are the same in every column. */
static void NAME(apply_block)(const Job *job, Run run, Block k, int backward) {
    const Index channels = job->channels, words = words_of(job->s, LANES), stride = channels * job->s;
    REAL coef[6 * LANES];
    for (Index c = run.c0; c < run.c1; c++) {
        const Index row = k.first * channels + c, word = row * words + k.column / LANES;
        for (Index r = 0; r <= (backward ? B : LOW); r++)
            NAME(store)(coef + r * LANES, NAME(splat)(((const REAL *)job->coef)[r * channels + c]));
        NAME(apply_rows)(job, row * job->s + k.column, stride, k.rows, k.length, coef, LANES, 0, word, channels * words,
                         job->ahead, backward);
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
    const Block k = block_of(b, job->n, job->s);
    const Slab slab = slab_of(job, run, k.first, LANES);
    const Index s = job->s, width = slab.width;
    double *part = job->part + 2 * b * job->channels + run.c0;
    REAL shifts[WIDEST];
    double s1[WIDEST], s2[WIDEST];
    Index j = 0;
    do NAME(repeat)(NAME(shift_of)((const REAL *)job->x + slab.at + j), s, shifts + j);
    while ((j += s) < width);
    NAME(sum_moments)(job, slab.at, slab.stride, k.rows, width, shifts, STREAMS, 0, s1, s2);
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
    const Block k = block_of(b, job->n, job->s);
    const Slab slab = slab_of(job, run, k.first, LANES);
    const Index s = job->s, width = slab.width;
    double *part = job->part + 2 * b * job->channels + run.c0;
    REAL coef[SLAB_COEF];
    double s1[WIDEST], s2[WIDEST];
    NAME(slab_coef)(job, run, coef, HIGH, MEAN + 1);
    NAME(sum_gradients)(job, slab.at, slab.stride, k.rows, width, coef, SLAB, slab.word, slab.words, STREAMS / 2, 0, s1, s2);
    for (Index j = 0; j < width; j += s, part++)
        part[0] = NAME(total_of)(s1 + j, s), part[job->channels] = NAME(total_of)(s2 + j, s);
}

/* Output, or dx and dresidual, of a run of channels in the samples of a block. */
static void NAME(apply_slab)(const Job *job, Run run, Block k, Index ahead, int backward) {
    const Slab slab = slab_of(job, run, k.first, LANES);
    REAL coef[SLAB_COEF];
    NAME(slab_coef)(job, run, coef, HIGH, backward ? B + 1 : LOW + 1);
    NAME(apply_rows)(job, slab.at, slab.stride, k.rows, slab.width, coef, SLAB, 1, slab.word, slab.words, ahead, backward);
}

/* --- column nest -------------------------------------------------------------------------------------------------- */

/* Mean and m2 of every column of a chunk of a block of rows, into `part` (blocks, 2, columns). */
static void NAME(column_moments)(const Job *job, Index t) {
    const Chunk q = chunk_of(job, t);
    const Index columns = job->columns, at = q.first * columns + q.column;
    const REAL *shifts = (const REAL *)job->x + at;
    double s1[WIDEST], s2[WIDEST];
    NAME(sum_moments)(job, at, columns, q.rows, q.width, shifts, DEPTH, AHEAD, s1, s2);
    for (Index j = 0; j < q.width; j++)
        moments_of(NAME(shift_of)(shifts + j), q.rows, s1[j], s2[j], q.part + j, q.part + j + columns);
}

/* Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns). */
static void NAME(column_gradients)(const Job *job, Index t) {
    const Chunk q = chunk_of(job, t);
    const Index columns = job->columns, words = words_of(columns, LANES), at = q.first * columns + q.column;
    const Index word = q.first * words + q.column / LANES;
    const REAL *coef = (const REAL *)job->coef + q.column;
    double s1[WIDEST], s2[WIDEST];
    NAME(sum_gradients)(job, at, columns, q.rows, q.width, coef, columns, word, words, DEPTH, AHEAD, s1, s2);
    for (Index j = 0; j < q.width; j++) q.part[j] = s1[j], q.part[j + columns] = s2[j];
}

/* Output, or dx and dresidual, of the t-th group of rows. */
static void NAME(apply_group)(const Job *job, Index t, int backward) {
    const Index columns = job->columns, first = t * group_of(columns), rows = min(group_of(columns), job->rows - first);
    const Index words = words_of(columns, LANES);
    const REAL *coef = (const REAL *)job->coef;
    NAME(apply_rows)(job, first * columns, columns, rows, columns, coef, columns, 1, first * words, words, job->ahead, backward);
}

/* --- phases ------------------------------------------------------------------------------------------------------- */

/* The parts of channel c together, in order, and what follows from them if output is wanted. */
static void NAME(finish_channel)(const Job *job, Index c, int backward, int apply) {
    const Index columns = job->columns, channels = job->channels, length = columns ? job->s : 1;
    const Index width = columns ? columns : channels;
    const Index rest = columns ? job->n * channels * job->s - job->rows * columns : 0;
    Moments total = {0};
    double sum_dy = 0, dot = 0;
    for (Index begin = c * length; begin < width; begin += channels * length)
        for (Index j = begin; j < begin + length; j++)
            for (Index b = 0; b < job->blocks + (j < rest); b++) {
                const double *part = job->part + 2 * b * width + j;
                if (backward) sum_dy += part[0], dot += part[width];
                else merge(&total, (Moments){size_of(job, b), part[0], part[width]});
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
    if (job->s < SHORT) NAME(apply_slab)(job, run, k, fused ? 0 : job->ahead, backward);
    else NAME(apply_block)(job, run, k, backward);
}

/* Reduction and output of run t. */
static void NAME(run_at_once)(const Job *job, Index t, int backward) {
    const Run run = run_of(job, t, job->run);
    for (Index b = 0; b < job->blocks; b++) NAME(reduce_run)(job, run, b, backward);
    for (Index c = run.c0; c < run.c1; c++) {
        NAME(finish_channel)(job, c, backward, 1);
        (backward ? NAME(round_gradient) : NAME(round_affine))(job, c, c);
    }
    for (Index b = job->blocks - 1; b >= 0; b--) /* backwards: the last ones are still in the nearest cache */
        NAME(apply_run)(job, run, block_of(b, job->n, job->s), backward, 1);
}

/* Task t of a phase. */
static void NAME(task)(const Job *job, int backward, int phase, Index t) {
    switch (phase) {
    case FUSED: NAME(run_at_once)(job, t, backward); break;
    case REDUCE: NAME(reduce_run)(job, run_of(job, t / job->blocks, job->run), t % job->blocks, backward); break;
    case APPLY: {
        const Index runs = runs_of(job, spread_of(job)), b = t / runs, first = b * group_of_rows(job);
        const Block rows = {first, min(group_of_rows(job), job->n - first), 0, job->s}; /* in the order of memory */
        const Block block = job->s > BLOCK ? block_of(b, job->n, job->s) : rows;
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
    const int apply = phase == APPLY || phase == APPLY_COLUMNS;
    for (Index j = 0, c = 0, k = 0; j < width; j++) {
        if (backward != apply) NAME(round_affine)(job, j, c);
        if (backward && !apply) ((REAL *)job->coef)[MEAN * width + j] = (REAL)job->stats[c];
        if (backward && apply) NAME(round_gradient)(job, j, c);
        if (++k == length) k = 0, c++;
        if (c == job->channels) c = 0;
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
