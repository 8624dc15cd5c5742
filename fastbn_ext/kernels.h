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
    V z = (x - high) * scale + low + added;
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
        M open = sign ? NAME(mask_of)(*sign) : NAME(positive)((x - high) * scale + low);
        dy = NAME(activated)(dy, open, slope);
    }
    return dy;
}

/* dx of a gated dy */
point V NAME(gradient)(V dy, V x, int training, V scale, V mean, V a, V b) {
    return training ? scale * dy + (a * (x - mean) + b) : scale * dy;
}

/* Prefetch what lies AHEAD values behind x[i] in its channel, whose rows of `length` values lie `stride` apart. The rows
   and values that make AHEAD are divided once a block: GCC keeps a division that it need not do inside the loop. */
point void NAME(far_ahead)(const REAL *x, Index i, Index length, Index stride, Index skip, Index rest, const REAL *end) {
    i += rest;
    x += skip * stride + (i < length ? i : i + stride - length);
    if (x < end) prefetch(x);
}

/* --- row nest ----------------------------------------------------------------------------------------------------- */

/* Mean and m2 of block b of channel c; returns its count. */
static Index NAME(block_moments)(const Job *job, Index c, Index b, double *mean, double *m2) {
    const Block k = block_of(b, job->n, job->s);
    const REAL *x = (const REAL *)job->x + (k.first * job->channels + c) * job->s + k.column;
    const REAL shift = isfinite(x[0]) ? x[0] : 0;
    const V beyond = NAME(splat)(shift); /* stands in lanes that count no more */
    const W around = NAME(widen)(beyond);
    W s1 = NAME(splat_wide)(0), s2 = s1, t1 = s1, t2 = s1; /* two sums each: one would wait for its last addition */
    const Index rest = k.length % LANES, stride = job->channels * job->s;
    const REAL *limit = (const REAL *)job->x + job->n * stride;
    const Index skip = AHEAD / k.length, skipped = AHEAD % k.length;
    const int far = job->run == 1;
    const M tail = NAME(last)(rest);
    for (Index r = 0; r < k.rows; r++, x += stride) {
        Index i = 0;
        for (; i + 2 * LANES <= k.length; i += 2 * LANES) {
            if (far) NAME(far_ahead)(x, i, k.length, stride, skip, skipped, limit);
            W d = NAME(minus)(NAME(widen)(NAME(load)(x + i)), around);
            W e = NAME(minus)(NAME(widen)(NAME(load)(x + i + LANES)), around);
            s1 = NAME(plus)(s1, d);
            t1 = NAME(plus)(t1, e);
            s2 = NAME(fused)(d, d, s2);
            t2 = NAME(fused)(e, e, t2);
        }
        if (i + LANES <= k.length) {
            W d = NAME(minus)(NAME(widen)(NAME(load)(x + i)), around);
            s1 = NAME(plus)(s1, d);
            s2 = NAME(fused)(d, d, s2);
        }
        if (rest) {
            W d = NAME(minus)(NAME(widen)(NAME(where)(tail, NAME(load)(x + k.length - LANES), beyond)), around);
            s1 = NAME(plus)(s1, d);
            s2 = NAME(fused)(d, d, s2);
        }
    }
    const Index count = k.rows * k.length;
    const double sum = NAME(total)(NAME(plus)(s1, t1)), average = sum / count;
    const double squares = NAME(total)(NAME(plus)(s2, t2)) - sum * average;
    *mean = shift + average;
    *m2 = squares < 0 ? 0 : squares;
    return count;
}

/* Sums of gated dy and of dy * (x - MEAN) over block b of channel c, added to the given ones. */
static void NAME(block_gradients)(const Job *job, Index c, Index b, double *sum_dy, double *sum_dot) {
    const Block k = block_of(b, job->n, job->s);
    const Index words = words_of(job->s, LANES), rest = k.length % LANES, stride = job->channels * job->s;
    const REAL *coef = (const REAL *)job->coef + c, slope = job->slope;
    const V high = NAME(splat)(coef[HIGH * job->channels]), scale = NAME(splat)(coef[SCALE * job->channels]);
    const V low = NAME(splat)(coef[LOW * job->channels]), mean = NAME(splat)(coef[MEAN * job->channels]);
    const M tail = NAME(last)(rest);
    const REAL *limit = (const REAL *)job->x + job->n * stride, *dy_limit = (const REAL *)job->dy + job->n * stride;
    const Index skip = AHEAD / k.length, skipped = AHEAD % k.length;
    const int far = job->run == 1;
    W dys = NAME(splat_wide)(0), dots = dys, dys2 = dys, dots2 = dys;
    for (Index row = k.first; row < k.first + k.rows; row++) {
        const Index begin = (row * job->channels + c) * job->s + k.column;
        const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
        const uint16_t *sign = job->signs ? job->signs + (row * job->channels + c) * words + k.column / LANES : 0;
        Index i = 0;
        for (; i + 2 * LANES <= k.length; i += 2 * LANES, sign += sign ? 2 : 0) {
            if (far) {
                NAME(far_ahead)(x, i, k.length, stride, skip, skipped, limit);
                NAME(far_ahead)(dy, i, k.length, stride, skip, skipped, dy_limit);
            }
            V value = NAME(load)(x + i), value2 = NAME(load)(x + i + LANES);
            W g = NAME(widen)(NAME(gated)(NAME(load)(dy + i), value, high, scale, low, slope, sign));
            W g2 = NAME(widen)(NAME(gated)(NAME(load)(dy + i + LANES), value2, high, scale, low, slope, sign ? sign + 1 : 0));
            dys = NAME(plus)(dys, g);
            dys2 = NAME(plus)(dys2, g2);
            dots = NAME(fused)(g, NAME(widen)(value - mean), dots);
            dots2 = NAME(fused)(g2, NAME(widen)(value2 - mean), dots2);
        }
        if (i + LANES <= k.length) {
            V value = NAME(load)(x + i);
            W g = NAME(widen)(NAME(gated)(NAME(load)(dy + i), value, high, scale, low, slope, sign));
            dys = NAME(plus)(dys, g);
            dots = NAME(fused)(g, NAME(widen)(value - mean), dots);
            if (sign) sign++;
        }
        if (rest) {
            V value = NAME(load)(x + k.length - LANES);
            V gate = NAME(gated)(NAME(load)(dy + k.length - LANES), value, high, scale, low, slope, sign);
            W g = NAME(widen)((V)((M)gate & tail));
            dys = NAME(plus)(dys, g);
            dots = NAME(fused)(g, NAME(widen)(value - mean), dots);
        }
    }
    *sum_dy += NAME(total)(NAME(plus)(dys, dys2));
    *sum_dot += NAME(total)(NAME(plus)(dots, dots2));
}

/* Output of the `length` values of channel c from `at` on. */
point void NAME(apply_row)(const Job *job, Index at, Index length, Index c, Index word) {
    const REAL *x = (const REAL *)job->x + at, *residual = job->residual ? (const REAL *)job->residual + at : 0;
    REAL *y = (REAL *)job->y + at;
    uint16_t *sign = job->signs ? job->signs + word : 0;
    const REAL *coef = (const REAL *)job->coef + c, slope = job->slope;
    const V high = NAME(splat)(coef[HIGH * job->channels]), scale = NAME(splat)(coef[SCALE * job->channels]);
    const V low = NAME(splat)(coef[LOW * job->channels]), none = {0};
    const Index end = length - LANES, head = job->streaming ? to_line(y, sizeof(REAL)) : 0;
    const int streaming = job->streaming && !(sign && head);
    Index i = streaming ? head : 0;
    const V last = NAME(load)(x + end), last_added = residual ? NAME(load)(residual + end) : none;
    for (Index j = 0; j < i; j += LANES) {
        V added = residual ? NAME(load)(residual + j) : none;
        NAME(store)(y + j, NAME(output)(NAME(load)(x + j), added, high, scale, low, slope, 0));
    }
    if (slope == 1 && !residual)
        for (; i <= end; i += LANES) {
            if (job->ahead) prefetch(x + i + job->ahead);
            NAME(put)(y + i, (NAME(load)(x + i) - high) * scale + low, streaming);
        }
    else
        for (; i <= end; i += LANES, sign += sign != 0) {
            V added = residual ? NAME(load)(residual + i) : none;
            if (job->ahead) prefetch(x + i + job->ahead);
            NAME(put)(y + i, NAME(output)(NAME(load)(x + i), added, high, scale, low, slope, sign), streaming);
        }
    if (i < length) NAME(store)(y + end, NAME(output)(last, last_added, high, scale, low, slope, sign));
}

/* dx, and dresidual if wanted, of the `length` values of channel c from `at` on. */
point void NAME(gradient_row)(const Job *job, Index at, Index length, Index c, Index word) {
    const REAL *x = (const REAL *)job->x + at, *dy = (const REAL *)job->dy + at;
    REAL *dx = (REAL *)job->dx + at, *dresidual = job->dresidual ? (REAL *)job->dresidual + at : 0;
    const uint16_t *sign = job->signs ? job->signs + word : 0;
    const REAL *coef = (const REAL *)job->coef + c, slope = job->slope;
    const V high = NAME(splat)(coef[HIGH * job->channels]), scale = NAME(splat)(coef[SCALE * job->channels]);
    const V low = NAME(splat)(coef[LOW * job->channels]), mean = NAME(splat)(coef[MEAN * job->channels]);
    const V a = NAME(splat)(coef[A * job->channels]), b = NAME(splat)(coef[B * job->channels]);
    const Index end = length - LANES, head = job->streaming ? to_line(dx, sizeof(REAL)) : 0;
    const int streaming = job->streaming && !(sign && head) && !(dresidual && to_line(dresidual, sizeof(REAL)) != head);
    Index i = streaming ? head : 0;
    const V last = NAME(load)(x + end), last_dy = NAME(load)(dy + end);
    for (Index j = 0; j < i; j += LANES) {
        V value = NAME(load)(x + j), g = NAME(gated)(NAME(load)(dy + j), value, high, scale, low, slope, 0);
        NAME(store)(dx + j, NAME(gradient)(g, value, job->training, scale, mean, a, b));
        if (dresidual) NAME(store)(dresidual + j, g);
    }
    for (; i <= end; i += LANES, sign += sign != 0) {
        V value = NAME(load)(x + i);
        V g = NAME(gated)(NAME(load)(dy + i), value, high, scale, low, slope, sign);
        if (job->ahead) {
            prefetch(x + i + job->ahead);
            prefetch(dy + i + job->ahead);
        }
        NAME(put)(dx + i, NAME(gradient)(g, value, job->training, scale, mean, a, b), streaming);
        if (dresidual) NAME(put)(dresidual + i, g, streaming);
    }
    if (i < length) {
        V g = NAME(gated)(last_dy, last, high, scale, low, slope, sign);
        NAME(store)(dx + end, NAME(gradient)(g, last, job->training, scale, mean, a, b));
        if (dresidual) NAME(store)(dresidual + end, g);
    }
}

/* Output, or dx and dresidual, of a block of channels c0 to c1. */
static void NAME(apply_block)(const Job *job, Index c0, Index c1, Block k, int backward) {
    const Index words = words_of(job->s, LANES);
    for (Index row = k.first; row < k.first + k.rows; row++)
        for (Index c = c0; c < c1; c++) {
            const Index at = (row * job->channels + c) * job->s + k.column;
            const Index word = (row * job->channels + c) * words + k.column / LANES;
            (backward ? NAME(gradient_row) : NAME(apply_row))(job, at, k.length, c, word);
        }
}

/* --- column nest -------------------------------------------------------------------------------------------------- */

/* Mean and m2 of every column of a chunk of a block of rows, into `part` (blocks, 2, columns). */
static void NAME(column_moments)(const Job *job, Index t) {
    const Chunk q = chunk_of(job, t);
    const Index columns = job->columns;
    const REAL *origin = (const REAL *)job->x + q.first * columns + q.column, *x = origin;
    double *s1 = q.part, *s2 = s1 + columns;
    const M tail = NAME(last)(q.width % LANES);
    for (Index j = 0; j < q.width; j++) s1[j] = s2[j] = 0;
    for (Index row = q.first; row < q.end; row += DEPTH, x += DEPTH * columns)
        for (Index j = 0; j < q.width; j += LANES) {
            const Index k = min(j, q.width - LANES), depth = min(DEPTH, q.end - row);
            const V shift = NAME(finite)(NAME(load)(origin + k));
            W sum1 = NAME(load_wide)(s1 + k), sum2 = NAME(load_wide)(s2 + k);
            for (Index r = 0; r < depth; r++) {
                prefetch(x + r * columns + k + AHEAD);
                V value = NAME(load)(x + r * columns + k);
                if (k < j) value = NAME(where)(tail, value, shift);
                W d = NAME(minus)(NAME(widen)(value), NAME(widen)(shift));
                sum1 = NAME(plus)(sum1, d);
                sum2 = NAME(fused)(d, d, sum2);
            }
            NAME(store_wide)(s1 + k, sum1);
            NAME(store_wide)(s2 + k, sum2);
        }
    for (Index j = 0; j < q.width; j++) {
        const double mean = s1[j] / (q.end - q.first), m2 = s2[j] - s1[j] * mean;
        s1[j] = mean + (isfinite(origin[j]) ? origin[j] : 0);
        s2[j] = m2 < 0 ? 0 : m2;
    }
}

/* Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns). */
static void NAME(column_gradients)(const Job *job, Index t) {
    const Chunk q = chunk_of(job, t);
    const Index columns = job->columns, words = words_of(columns, LANES), begin = q.first * columns + q.column;
    const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
    const uint16_t *sign = job->signs ? job->signs + q.first * words + q.column / LANES : 0;
    const REAL *coef = (const REAL *)job->coef + q.column, slope = job->slope;
    double *s1 = q.part, *s2 = s1 + columns;
    const M tail = NAME(last)(q.width % LANES);
    for (Index j = 0; j < q.width; j++) s1[j] = s2[j] = 0;
    for (Index row = q.first; row < q.end; row += DEPTH, x += DEPTH * columns, dy += DEPTH * columns) {
        for (Index j = 0; j < q.width; j += LANES) {
            const Index k = min(j, q.width - LANES), depth = min(DEPTH, q.end - row);
            const V high = NAME(load)(coef + HIGH * columns + k), scale = NAME(load)(coef + SCALE * columns + k);
            const V low = NAME(load)(coef + LOW * columns + k), mean = NAME(load)(coef + MEAN * columns + k);
            W sum_dy = NAME(load_wide)(s1 + k), dot = NAME(load_wide)(s2 + k);
            for (Index r = 0; r < depth; r++) {
                prefetch(x + r * columns + k + AHEAD);
                prefetch(dy + r * columns + k + AHEAD);
                V value = NAME(load)(x + r * columns + k), g = NAME(load)(dy + r * columns + k);
                g = NAME(gated)(g, value, high, scale, low, slope, sign ? sign + r * words + j / LANES : 0);
                if (k < j) g = (V)((M)g & tail);
                sum_dy = NAME(plus)(sum_dy, NAME(widen)(g));
                dot = NAME(fused)(NAME(widen)(g), NAME(widen)(value - mean), dot);
            }
            NAME(store_wide)(s1 + k, sum_dy);
            NAME(store_wide)(s2 + k, dot);
        }
        if (sign) sign += DEPTH * words;
    }
}

/* Output of a row. */
point void NAME(apply_columns)(const Job *job, Index row) {
    const REAL *coef = (const REAL *)job->coef, slope = job->slope;
    const Index columns = job->columns, end = columns - LANES;
    const REAL *x = (const REAL *)job->x + row * columns;
    const REAL *residual = job->residual ? (const REAL *)job->residual + row * columns : 0;
    REAL *y = (REAL *)job->y + row * columns;
    uint16_t *sign = job->signs ? job->signs + row * words_of(columns, LANES) : 0;
    const V last = NAME(load)(x + end), last_added = residual ? NAME(load)(residual + end) : (V){0};
    for (Index j = 0; j < columns; j += LANES, sign += sign != 0) {
        const Index k = min(j, end);
        V value = k < j ? last : NAME(load)(x + k);
        V added = k < j || !residual ? last_added : NAME(load)(residual + k);
        V high = NAME(load)(coef + HIGH * columns + k), scale = NAME(load)(coef + SCALE * columns + k);
        V low = NAME(load)(coef + LOW * columns + k);
        NAME(put)(y + k, NAME(output)(value, added, high, scale, low, slope, sign), job->streaming);
    }
}

/* dx, and dresidual if wanted, of a row. */
point void NAME(gradient_columns)(const Job *job, Index row) {
    const REAL *coef = (const REAL *)job->coef, slope = job->slope;
    const Index columns = job->columns, end = columns - LANES;
    const REAL *x = (const REAL *)job->x + row * columns, *dy = (const REAL *)job->dy + row * columns;
    REAL *dx = (REAL *)job->dx + row * columns, *dresidual = job->dresidual ? (REAL *)job->dresidual + row * columns : 0;
    const uint16_t *sign = job->signs ? job->signs + row * words_of(columns, LANES) : 0;
    const V last = NAME(load)(x + end), last_dy = NAME(load)(dy + end);
    for (Index j = 0; j < columns; j += LANES, sign += sign != 0) {
        const Index k = min(j, end);
        V value = k < j ? last : NAME(load)(x + k), g = k < j ? last_dy : NAME(load)(dy + k);
        V high = NAME(load)(coef + HIGH * columns + k), scale = NAME(load)(coef + SCALE * columns + k);
        V low = NAME(load)(coef + LOW * columns + k), mean = NAME(load)(coef + MEAN * columns + k);
        V a = NAME(load)(coef + A * columns + k), b = NAME(load)(coef + B * columns + k);
        g = NAME(gated)(g, value, high, scale, low, slope, sign);
        NAME(put)(dx + k, NAME(gradient)(g, value, job->training, scale, mean, a, b), job->streaming);
        if (dresidual) NAME(put)(dresidual + k, g, job->streaming);
    }
}

/* Output, or dx and dresidual, of the t-th group of rows. */
static void NAME(apply_group)(const Job *job, Index t, int backward) {
    const Index group = group_of(job->columns);
    for (Index row = t * group; row < min((t + 1) * group, job->rows); row++)
        (backward ? NAME(gradient_columns) : NAME(apply_columns))(job, row);
}

/* --- phases ------------------------------------------------------------------------------------------------------- */

/* Statistics and coefficients of channel c, all its blocks. */
static void NAME(fused_moments)(const Job *job, Index c) {
    Moments total = {0}, part;
    for (Index b = 0; b < job->blocks; b++) {
        part.count = NAME(block_moments)(job, c, b, &part.mean, &part.m2);
        merge(&total, part);
    }
    finish_statistics(job, c, total.mean, total.m2);
    NAME(round_affine)(job, c, c);
}

/* Gradients of weight and bias and coefficients of channel c, all its blocks. */
static void NAME(fused_gradients)(const Job *job, Index c) {
    double sum_dy = 0, dot = 0;
    for (Index b = 0; b < job->blocks; b++) NAME(block_gradients)(job, c, b, &sum_dy, &dot);
    finish_gradient(job, c, (REAL)job->stats[c], sum_dy, dot);
    NAME(round_gradient)(job, c, c);
}

/* Task t of a phase. */
static void NAME(task)(const Job *job, int backward, int phase, Index t) {
    switch (phase) {
    case FUSED: {
        const Index c0 = t * job->run, c1 = min(c0 + job->run, job->channels);
        for (Index c = c0; c < c1; c++) (backward ? NAME(fused_gradients) : NAME(fused_moments))(job, c);
        for (Index b = job->blocks - 1; b >= 0; b--) /* backwards: the last ones are still in the nearest cache */
            NAME(apply_block)(job, c0, c1, block_of(b, job->n, job->s), backward);
        break;
    }
    case REDUCE: {
        const Index c = t / job->blocks, b = t % job->blocks;
        double *part = job->part + 2 * b * job->channels + c;
        part[0] = part[job->channels] = 0;
        if (backward) NAME(block_gradients)(job, c, b, part, part + job->channels);
        else NAME(block_moments)(job, c, b, part, part + job->channels);
        break;
    }
    case APPLY: {
        const Span a = span_of(t, job);
        NAME(apply_block)(job, a.c0, a.c1, a.block, backward);
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

/* What comes after a reduction: the parts of every channel together, in order, and what follows if it is wanted. */
static void NAME(finish)(const Job *job, int backward, int apply) {
    const Index columns = job->columns, channels = job->channels, length = columns ? job->s : 1;
    const Index width = columns ? columns : channels;
    const Index rest = columns ? job->n * channels * job->s - job->rows * columns : 0;
    for (Index c = 0; c < channels; c++) {
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

static const Kernels NAME(kernels) = {LANES, NAME(prepare), NAME(task), NAME(last_row), NAME(finish)};

#undef V
#undef M
#undef W
#undef D
#undef WIDE
#undef LANES
