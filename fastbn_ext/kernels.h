/* The kernels of one value type and one instruction set: the twins of those in fastbn/backends/numba_.py, where the
   design is written down. `dispatch.h` includes this file once for each pair. */

#include "vectors.h"

/* --- channel arithmetic ------------------------------------------------------------------------------------------- */

/* HIGH, LOW, SCALE of channels c0 to c1 in REAL, at their first columns. */
static void NAME(round_affine)(const Job *job, Index c0, Index c1) {
    const Index width = width_of(job), length = columns_of_channel(job);
    const double *center = job->affine, *scale = center + job->channels, *shift = scale + job->channels;
    REAL *restrict high = (REAL *)job->coef + HIGH * width, *restrict low = (REAL *)job->coef + LOW * width;
    REAL *restrict rounded = (REAL *)job->coef + SCALE * width;
    for (Index c = c0; c < c1; c++) {
        high[c * length] = (REAL)center[c];
        low[c * length] = (REAL)(shift[c] - (center[c] - (REAL)center[c]) * scale[c]);
        rounded[c * length] = (REAL)scale[c];
    }
}

/* A and B of channels c0 to c1 in REAL, at their first columns. */
static void NAME(round_gradient)(const Job *job, Index c0, Index c1) {
    const Index width = width_of(job), length = columns_of_channel(job);
    const double *grads = job->grads + 2 * job->channels;
    REAL *restrict a = (REAL *)job->coef + A * width, *restrict b = (REAL *)job->coef + B * width;
    for (Index c = c0; c < c1; c++) {
        a[c * length] = (REAL)grads[c];
        b[c * length] = (REAL)grads[c + job->channels];
    }
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

/* Signs of the vector from value i on in a row whose words are these. */
point M NAME(mask_at)(const uint16_t *sign, Index i) {
    const size_t word = (size_t)i / LANES, bit = (size_t)i % LANES;
    return NAME(mask_of)((sign[word] | (uint32_t)sign[word + 1] << LANES) >> bit);
}

/* Signs without a residual, computed again exactly as in `output`. */
point M NAME(signs_of)(V x, V high, V scale, V low) { return NAME(positive)(NAME(fma)(x - high, scale, low)); }

/* dy behind the activation, whose sign is read or computed again. */
point V NAME(gated)(V dy, V x, V high, V scale, V low, REAL slope, const uint16_t *sign) {
    if (slope == 1) return dy;
    return NAME(activated)(dy, sign ? NAME(mask_of)(*sign) : NAME(signs_of)(x, high, scale, low), slope);
}

/* Where the activation of the vector at x is open, from sign i of its row or computed again. */
point M NAME(open_at)(const REAL *x, V high, V scale, V low, const uint16_t *sign, Index i) {
    return sign ? NAME(mask_at)(sign, i) : NAME(signs_of)(NAME(load)(x), high, scale, low);
}

/* `gated` as W, from x and dy in memory. A ReLU chooses what becomes float64 as it is loaded (design, J). */
point W NAME(wide_gated)(const REAL *x, const REAL *dy, V high, V scale, V low, REAL slope, const uint16_t *sign, Index i,
                         const int kind) {
    if (kind == PLAIN) return NAME(load_widened)(dy);
    const M open = NAME(open_at)(x, high, scale, low, sign, i);
    if (kind == RELU || kind == SIGNED) return NAME(load_widened_where)(dy, open);
    return NAME(widen)(NAME(activated)(NAME(load)(dy), open, slope));
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

/* One value of each of so many rows, and `rest` in the lanes left. */
point V NAME(gathered)(const REAL *x, Index stride, const Index streams, V rest) {
    for (Index r = 0; r < streams; r++) rest[r] = x[r * stride];
    return rest;
}

/* Add so many rows of a channel at a time, `stride` apart, to the sums of x - around and of its square. */
point void NAME(row_moments)(const REAL *x, Index stride, const Index streams, Index length, Ahead far, REAL shift, W *sum1,
                             W *sum2) {
    const Index whole = length - length % (2 * LANES);
    const V beyond = NAME(splat)(shift); /* stands in lanes that count no more */
    const W around = NAME(splat_wide)(shift), one = NAME(ones)(); /* in one register: `beyond` widened takes two, and a sum
                                                                     would go through the stack: 2.2 ns for 1.6 */
    W s1 = *sum1, s2 = *sum2, t1 = NAME(splat_wide)(0), t2 = t1; /* two sums each: one would wait for its last addition */
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
    if (i <= length - LANES) {
        for (Index r = 0; r < streams; r++) {
            W d = NAME(minus)(NAME(load_widened)(x + r * stride + i), around);
            s1 = NAME(added)(s1, d, one);
            s2 = NAME(fused)(d, d, s2);
        }
        i += LANES;
    }
    if (i == length - 1 && LANES >= STREAMS) { /* as odd squares leave it */
        W d = NAME(minus)(NAME(widen)(NAME(gathered)(x + i, stride, streams, beyond)), around);
        s1 = NAME(plus)(s1, d);
        s2 = NAME(fused)(d, d, s2);
    } else if (i < length) {
        const M tail = NAME(last)(length - i);
        for (Index r = 0; r < streams; r++) {
            const V value = NAME(load)(x + r * stride + length - LANES);
            W d = NAME(minus)(NAME(widen)(NAME(where)(tail, value, beyond)), around);
            s1 = NAME(plus)(s1, d);
            s2 = NAME(fused)(d, d, s2);
        }
    }
    *sum1 = NAME(plus)(s1, t1);
    *sum2 = NAME(plus)(s2, t2);
}

/* Add so many rows of a channel at a time, `stride` apart and their signs `words`, to the sums of gated dy and of
   dy * (x - mean); their first sign is number `bit`. `kind` is known when this is compiled. */
point void NAME(row_gradients)(const REAL *x, const REAL *dy, const uint16_t *sign, Index stride, Index words, Index bit,
                               const Index streams, Index length, Ahead far, REAL mean, const REAL *coef, Index pitch,
                               REAL slope, W *sum_dy, W *dot, const int kind) {
    if (kind == SIGNED && !sign) __builtin_unreachable();
    const Index whole = length - length % (2 * LANES);
    const V high = NAME(splat)(coef[HIGH * pitch]), scale = NAME(splat)(coef[SCALE * pitch]);
    const V low = NAME(splat)(coef[LOW * pitch]);
    const W around = NAME(splat_wide)(mean), one = NAME(ones)();
    W dys = *sum_dy, dots = *dot, dys2 = NAME(splat_wide)(0), dots2 = dys2;
    Index i = 0;
#define SIGN(i, r) sign ? sign + r * words : 0, bit + i
#define GATED(at, i, r) NAME(wide_gated)(x + at, dy + at, high, scale, low, slope, SIGN(i, r), kind)
    for (int turned = 0; turned < 2; turned++) {
        const Index stop = turned ? whole : min(far.turn, whole), ahead = turned ? far.after : AHEAD;
        for (; i < stop; i += 2 * LANES)
            for (Index r = 0, at = i; r < streams; r++, at += stride) {
                NAME(prefetch_two)(x + at + ahead);
                NAME(prefetch_two)(dy + at + ahead);
                W g = GATED(at, i, r), g2 = GATED(at + LANES, i + LANES, r);
                dys = NAME(added)(dys, g, one);
                dys2 = NAME(added)(dys2, g2, one);
                dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + at), around), dots);
                dots2 = NAME(fused)(g2, NAME(minus)(NAME(load_widened)(x + at + LANES), around), dots2);
            }
    }
    if (i <= length - LANES) {
        for (Index r = 0, at = i; r < streams; r++, at += stride) {
            const W g = GATED(at, i, r);
            dys = NAME(added)(dys, g, one);
            dots = NAME(fused)(g, NAME(minus)(NAME(load_widened)(x + at), around), dots);
        }
        i += LANES;
    }
    if (i == length - 1 && LANES >= STREAMS) {
        const V none = {0}, value = NAME(gathered)(x + i, stride, streams, none);
        V g = NAME(gathered)(dy + i, stride, streams, none);
        if (kind != PLAIN) {
            const uint16_t signs = sign ? gathered_bits(sign, words, streams, bit + i, LANES) : 0;
            g = NAME(gated)(g, value, high, scale, low, slope, sign ? &signs : 0);
        }
        dys = NAME(plus)(dys, NAME(widen)(g));
        dots = NAME(fused)(NAME(widen)(g), NAME(minus)(NAME(widen)(value), around), dots);
    } else if (i < length) {
        const Index from = length - LANES;
        const M tail = NAME(last)(length - i);
        for (Index r = 0, at = from; r < streams; r++, at += stride) {
            const V value = NAME(where)(tail, NAME(load)(x + at), NAME(splat)(mean)); /* 0 times infinity would be NaN */
            V gate = NAME(load)(dy + at);
            if (kind != PLAIN)
                gate = NAME(activated)(gate, NAME(open_at)(x + at, high, scale, low, SIGN(from, r)), slope);
            const W g = NAME(widen)(NAME(where)(tail, gate, (V){0}));
            dys = NAME(plus)(dys, g);
            dots = NAME(fused)(g, NAME(minus)(NAME(widen)(value), around), dots);
        }
    }
#undef SIGN
#undef GATED
    *sum_dy = NAME(plus)(dys, dys2);
    *dot = NAME(plus)(dots, dots2);
}

/* Two sums over block b for every channel of a run, where x is taken around a value: of moments or, in a backward pass, of
   gradients. Rows are added STREAMS at a time; one that is left over by its quarters, and then what is left of it. Both are
   known when this is compiled, `backward` and the kind. */
point void NAME(sum_run)(const Job *job, Run run, Index b, const REAL *around, W *sum1, W *sum2, const int backward,
                         const int kind) {
    const Block k = block_to_reduce(job, b);
    const Slab slab = slab_of(job, run.c0, k.first, LANES);
    const Index s = job->s, channels = run.c1 - run.c0;
    const REAL *coef = (const REAL *)job->coef + run.c0, slope = slope_of(job, kind);
    for (Index q = 0; q < channels; q++) sum1[q] = sum2[q] = NAME(splat_wide)(0);
#define ADD(streams, i, stride, words, length, far) \
    (backward ? NAME(row_gradients)(x + i, dy + i, sign, stride, words, q * s + k.column + i, streams, length, far, \
                                    around[q], coef + q, job->channels, slope, sum1 + q, sum2 + q, kind) \
              : NAME(row_moments)(x + i, stride, streams, length, far, around[q], sum1 + q, sum2 + q))
    for (Index row = 0; row < k.rows;) {
        const Index bundle = row + STREAMS <= k.rows, each = bundle ? k.length : quarter_of(k.length);
        const Index stride = bundle ? slab.stride : each, words = bundle ? slab.words : each / LANES;
        const Index left = bundle ? 0 : k.length - STREAMS * each;
        const uint16_t *sign = kind >= SIGNED && job->signs ? job->signs + slab.word + row * slab.words : 0;
        for (Index q = 0, at = slab.at + row * slab.stride + k.column; q < channels; q++, at += s) {
            const REAL *x = (const REAL *)job->x + at, *dy = backward ? (const REAL *)job->dy + at : 0;
            if (each) ADD(STREAMS, 0, stride, words, each, ahead_in(job, run, k, row, q));
            if (left) ADD(1, STREAMS * each, 0, 0, left, ((Ahead){left, AHEAD}));
        }
        row += bundle ? STREAMS : 1;
    }
#undef ADD
}

/* Mean and m2 of block b of a run of channels, into `part`. */
static void NAME(block_moments)(const Job *job, Run run, Index b) {
    const Block k = block_to_reduce(job, b);
    const REAL *x = (const REAL *)job->x + slab_of(job, run.c0, k.first, LANES).at + k.column;
    double *part = job->part + 2 * b * job->channels + run.c0;
    REAL shifts[MOST_CHANNELS];
    W s1[MOST_CHANNELS], s2[MOST_CHANNELS];
    for (Index q = 0; q < run.c1 - run.c0; q++) shifts[q] = NAME(shift_of)(x + q * job->s);
    NAME(sum_run)(job, run, b, shifts, s1, s2, 0, PLAIN);
    for (Index q = 0; q < run.c1 - run.c0; q++, part++)
        moments_of(shifts[q], k.rows * k.length, NAME(total)(s1[q]), NAME(total)(s2[q]), part, part + job->channels);
}

/* Sums of gated dy and of dy * (x - MEAN) over block b of a run of channels, into `part`. */
static void NAME(block_gradients)(const Job *job, Run run, Index b) {
    const REAL *mean = (const REAL *)job->coef + MEAN * job->channels + run.c0;
    double *part = job->part + 2 * b * job->channels + run.c0;
    W dys[MOST_CHANNELS], dots[MOST_CHANNELS];
    switch (gradient_kind(job)) {
    case PLAIN: NAME(sum_run)(job, run, b, mean, dys, dots, 1, PLAIN); break;
    case RELU: NAME(sum_run)(job, run, b, mean, dys, dots, 1, RELU); break;
    case ACTIVATED: NAME(sum_run)(job, run, b, mean, dys, dots, 1, ACTIVATED); break;
    case SIGNED: NAME(sum_run)(job, run, b, mean, dys, dots, 1, SIGNED); break;
    default: NAME(sum_run)(job, run, b, mean, dys, dots, 1, ANY);
    }
    for (Index q = 0; q < run.c1 - run.c0; q++, part++)
        part[0] = NAME(total)(dys[q]), part[job->channels] = NAME(total)(dots[q]);
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
    switch (gradient_kind(job)) {
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

/* --- output ------------------------------------------------------------------------------------------------------- */

typedef struct { V high, low, scale, mean, a, b; } NAME(Coefs); /* in every lane: see `coef` */
#define Coefs NAME(Coefs)

/* Coefficients of a vector: of column j, or of a channel in every lane. What is not used is not loaded. */
point Coefs NAME(coefs_at)(const REAL *coef, Index pitch, Index j, const int columns) {
#define ROW(r) (columns ? NAME(load)(coef + r * pitch + j) : NAME(splat)(coef[r * pitch + j]))
    return (Coefs){ROW(HIGH), ROW(LOW), ROW(SCALE), ROW(MEAN), ROW(A), ROW(B)};
#undef ROW
}

/* Those of `first` in the foremost k lanes, and of `second` in the others. */
point Coefs NAME(joined)(Coefs first, Coefs second, Index k) {
    const M mask = NAME(foremost)(k);
#define BOTH(row) NAME(where)(mask, first.row, second.row)
    return (Coefs){BOTH(high), BOTH(low), BOTH(scale), BOTH(mean), BOTH(a), BOTH(b)};
#undef BOTH
}

/* A vector of y, dx or dresidual, from x and the residual or dy. */
point V NAME(value_of)(V x, V other, Coefs k, REAL slope, uint16_t *sign, int training, const int what) {
    if (what == OUTPUT) return NAME(output)(x, other, k.high, k.scale, k.low, slope, sign);
    const V dy = NAME(gated)(other, x, k.high, k.scale, k.low, slope, sign);
    return what == GRADIENT ? NAME(gradient)(dy, x, training, k.scale, k.mean, k.a, k.b) : dy;
}

/* A row of y, dx or dresidual: of columns, or of neighbouring channels of `length` values each. A vector that two of them
   share takes its coefficients from both. `what`, `kind` and whether there are columns is known when this is compiled. */
point void NAME(write_row)(const Job *job, Index at, Index width, const REAL *coef, Index pitch, Index length, Index word,
                           Index ahead, Index beyond, int fused, const int what, const int kind, const int columns) {
    const int any = kind == ANY, added = what == OUTPUT && (any || kind >= ADDED), signs = any || kind == SIGNED;
    const REAL *x = (const REAL *)job->x + at;
    const REAL *other = what != OUTPUT ? (const REAL *)job->dy + at
                        : added && job->residual ? (const REAL *)job->residual + at : 0;
    REAL *out = (REAL *)(what == OUTPUT ? job->y : what == GRADIENT ? job->dx : job->dresidual) + at;
    uint16_t *sign = signs && job->signs ? job->signs + word : 0;
    const REAL slope = slope_of(job, kind);
    const int training = any ? job->training : 1;
    if (!any && ((added && !other) || (signs && !sign))) __builtin_unreachable();
    const Index end = width - LANES, head = job->streaming ? to_line(out, sizeof(REAL)) : 0;
    const int streaming = job->streaming && !(sign && head);
    const V none = -(V){0}; /* x + -0 is x */
    Coefs k = NAME(coefs_at)(coef, pitch, 0, columns);
    Index i = streaming ? head : 0, edge = columns || what == RESIDUAL ? width : length; /* of what has the coefficients k */
#define VALUE(i, coefs, sign) \
    NAME(value_of)(NAME(load)(x + i), other ? NAME(load)(other + i) : none, coefs, slope, sign, training, what)
    for (Index j = 0; j < i; j += LANES)
        NAME(store_where)(out + j, NAME(foremost)(i - j), VALUE(j, columns ? NAME(coefs_at)(coef, pitch, j, 1) : k, 0));
    for (int past = streaming; past >= 0; past--) /* whole lines past the cache, then what is left */
        for (const Index stop = past ? i + whole_lines(width - i, sizeof(REAL)) : end + 1; i < stop;) {
            for (const Index within = min(stop, edge - LANES + 1); i < within; i += LANES) {
                prefetch_onward(x + i, ahead * sizeof(REAL), fused);
                if (other) prefetch_onward(other + i, beyond * sizeof(REAL), fused);
                NAME(put)(out + i, VALUE(i, columns ? NAME(coefs_at)(coef, pitch, i, 1) : k, sign), past);
                if (sign) sign++;
            }
            if (columns || i >= stop) continue;
            const Coefs next = NAME(coefs_at)(++coef, pitch, 0, 0);
            if (i < edge) {
                NAME(put)(out + i, VALUE(i, NAME(joined)(k, next, edge - i), sign), past);
                if (sign) sign++;
                i += LANES;
            }
            k = next, edge += length;
        }
    if (i < width) { /* what is left, by lanes */
        const M rest = NAME(foremost)(width - i);
        const V added = other ? NAME(load_where)(other + i, rest) : none;
        if (columns) k = NAME(coefs_at)(coef, pitch, i, 1);
        const V z = NAME(value_of)(NAME(load_where)(x + i, rest), added, k, slope, sign, training, what);
        NAME(store_where)(out + i, rest, z);
    }
#undef VALUE
}

/* Output, or dx and dresidual, of rows of columns, or of channels of `length` values, each `stride` behind the one before
   it, or ahead of it if that is negative; what lies `ahead` is prefetched. */
point void NAME(write_rows)(const Job *job, Index at, Index stride, Index rows, Index width, const REAL *coef, Index pitch,
                            Index length, Index word, Index words, Index ahead, int fused, int backward,
                            const int columns) {
    const int kind = kind_to_write(job, backward);
    const Index beyond = ahead && fused ? stride : ahead; /* the residual has not been read yet */
    const REAL *out = (const REAL *)(backward ? job->dx : job->y);
#define WRITE(beyond, what, kind) \
    NAME(write_row)(job, at, width, coef, pitch, length, word, ahead, beyond, fused, what, kind, columns)
    for (Index r = 0; r < rows; r++, at += stride, word += words) {
        if (job->streaming) { /* a store that waits for its line holds up all behind it */
            prefetch_part(out + at + width);
            if (r + 1 < rows) prefetch_part(out + at + stride);
        }
        if (backward && job->dresidual) /* first: dx may lie over dy */
            switch (kind) {
            case PLAIN: WRITE(0, RESIDUAL, PLAIN); break;
            case SIGNED: WRITE(0, RESIDUAL, SIGNED); break;
            default: WRITE(0, RESIDUAL, ANY);
            }
        if (backward)
            switch (kind) {
            case PLAIN: WRITE(ahead, GRADIENT, PLAIN); break;
            case RELU: WRITE(ahead, GRADIENT, RELU); break;
            case ACTIVATED: WRITE(ahead, GRADIENT, ACTIVATED); break;
            case SIGNED: WRITE(ahead, GRADIENT, SIGNED); break;
            default: WRITE(ahead, GRADIENT, ANY);
            }
        else
            switch (kind) {
            case PLAIN: WRITE(0, OUTPUT, PLAIN); break;
            case RELU: WRITE(0, OUTPUT, RELU); break;
            case ACTIVATED: WRITE(0, OUTPUT, ACTIVATED); break;
            case ADDED: WRITE(beyond, OUTPUT, ADDED); break;
            case SIGNED: WRITE(beyond, OUTPUT, SIGNED); break;
            default: WRITE(beyond, OUTPUT, ANY);
            }
    }
#undef WRITE
}

/* Output, or dx and dresidual, of a block of a run of channels: after their reduction from the last row to the first. */
static void NAME(apply_run)(const Job *job, Run run, Block k, int backward, int fused) {
    const Slab slab = slab_of(job, run.c0, k.first + (fused ? k.rows - 1 : 0), LANES);
    const Index on = fused ? -1 : 1, channels = run.c1 - run.c0;
    const Index ahead = fused && job->ahead ? channels * job->s : job->ahead; /* design, I */
    NAME(write_rows)(job, slab.at + k.column, on * slab.stride, k.rows, channels * k.length,
                     (const REAL *)job->coef + run.c0, job->channels, k.length, slab.word + k.column / LANES,
                     on * slab.words, ahead, fused, backward, 0);
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
    NAME(write_rows)(job, first * columns, columns, rows, columns, coef, columns, 0, first * words, words, job->ahead,
                     0, backward, 1);
}

/* --- phases ------------------------------------------------------------------------------------------------------- */

/* Mean and m2 of so many channels from c0 on in part b; or sums of dy and dy * (x - MEAN). */
point void NAME(part_of)(const Job *job, Index c0, Index count, Index b, int backward, double *first, double *second) {
    sums_of(job, c0, count, b, first, second);
    if (backward || !job->columns) return;
    const REAL *x = (const REAL *)job->x + min(b * job->block, job->rows) * job->columns + c0 * job->s;
    for (Index k = 0, size = size_of(job, b); k < count; k++, x += job->s)
        moments_of(NAME(shift_of)(x), size, first[k], second[k], first + k, second + k);
}

/* The parts of so many channels from c0 on together, in order, and what follows from them if output is wanted. */
point void NAME(finish_together)(const Job *job, Index c0, Index count, int backward, int apply) {
    double first[TOGETHER], second[TOGETHER], one[TOGETHER], two[TOGETHER], low[TOGETHER];
    NAME(part_of)(job, c0, count, 0, backward, first, second);
    for (Index b = 1, size = size_of(job, 0); b < number_of_parts(job); size += size_of(job, b++)) {
        NAME(part_of)(job, c0, count, b, backward, one, two);
        if (!backward) merge(count, size, first, second, size_of(job, b), one, two);
        else
            for (Index k = 0; k < count; k++) first[k] += one[k], second[k] += two[k];
    }
    for (Index k = 0; k < count && backward; k++) low[k] = job->stats[c0 + k] - (REAL)job->stats[c0 + k];
    if (apply) {
        if (backward) finish_gradients(job, c0, count, low, first, second);
        else finish_statistics(job, c0, count, first, second);
        return;
    }
    double *sums = (backward ? job->grads : job->stats) + c0;
    for (Index k = 0; k < count; k++, sums++) {
        sums[0] = first[k];
        sums[job->channels] = backward ? second[k] - low[k] * first[k] : second[k];
    }
}

/* `finish_together` for channels c0 to c1. One alone has no loops (1x64x56x56, training and backward: 4 % less). */
static void NAME(finish_channels)(const Job *job, Index c0, Index c1, int backward, int apply) {
    if (c1 - c0 == 1) NAME(finish_together)(job, c0, 1, backward, apply);
    else
        for (Index c = c0; c < c1; c += TOGETHER) NAME(finish_together)(job, c, min(TOGETHER, c1 - c), backward, apply);
}

/* Mean and m2, or sums of gradients, of block b of a run of channels, into `part` (blocks, 2, channels). */
static void NAME(reduce_run)(const Job *job, Run run, Index b, int backward) {
    (backward ? NAME(block_gradients) : NAME(block_moments))(job, run, b);
}

/* Reduction and output of run t. */
static void NAME(run_at_once)(const Job *job, Index t, int backward) {
    const Run run = run_of(job, t, job->run);
    for (Index b = 0; b < job->blocks; b++) NAME(reduce_run)(job, run, b, backward);
    NAME(finish_channels)(job, run.c0, run.c1, backward, 1);
    (backward ? NAME(round_gradient) : NAME(round_affine))(job, run.c0, run.c1);
    const int turns = job->turns && job->streaming;
    const Index height = max(1, min(BLOCK / job->s, turns ? job->n / 8 : job->n));
    const Index blocks = blocks_of(job->n, job->s, height, BLOCK);
    const int mine = turns && take_turn(job);
    for (Index b = blocks - 1; b >= 0; b--) { /* the last first: it is in the cache */
        NAME(apply_run)(job, run, block_of(b, job->n, job->s, height, BLOCK), backward, 1);
        if (mine && b == blocks / 8) end_turn(job); /* the next one may begin before this one ends */
    }
}

/* Task t of a phase. */
static void NAME(task)(const Job *job, int backward, int phase, Index t) {
    switch (phase) {
    case FUSED: NAME(run_at_once)(job, t, backward); break;
    case REDUCE: NAME(reduce_run)(job, run_of(job, t / job->blocks, job->run), t % job->blocks, backward); break;
    case APPLY: {
        const Index runs = runs_of(job, spread_of(job)); /* in the order of memory */
        const Block block = block_of(t / runs, job->n, job->s, 1, BLOCK);
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
    const Index width = width_of(job), length = columns_of_channel(job), channels = job->channels;
    const Index pixel = channels * length;
    const int apply = phase == APPLY || phase == APPLY_COLUMNS;
    REAL *coef = (REAL *)job->coef;
    if (backward != apply) NAME(round_affine)(job, 0, channels);
    if (backward && apply) NAME(round_gradient)(job, 0, channels);
    for (Index c = 0; c < channels && backward && !apply; c++) coef[MEAN * width + c * length] = (REAL)job->stats[c];
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
    const Index begin = job->rows * job->columns, rest = rest_of(job);
    for (Index j = 0; j < job->columns && values; j++) row[j] = j < rest ? ((const REAL *)values)[begin + j] : 0;
    return values ? row : 0;
}

/* Copy the values that fill no row from their padded row. */
static void NAME(unpadded)(const Job *job, const void *row, void *values) {
    const Index begin = job->rows * job->columns, rest = rest_of(job);
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

static const Kernels NAME(kernels) = {LANES, NAME(prepare), NAME(task), NAME(last_row), NAME(finish_channels)};

#undef V
#undef I
#undef M
#undef W
#undef D
#undef WIDE
#undef Coefs
#undef OF
#undef LANES
