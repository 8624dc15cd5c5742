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
    const double shift = isfinite(x[0]) ? x[0] : 0;
    const W around = NAME(splat_wide)(shift);
    W s1 = {0}, s2 = {0};
    const Index rest = k.length % LANES, stride = job->channels * job->s;
    const REAL *limit = (const REAL *)job->x + job->n * stride;
    const Index skip = AHEAD / k.length, skipped = AHEAD % k.length;
    const int far = job->run == 1;
    const MW tail = NAME(wide_mask)(NAME(last)(rest));
    for (Index r = 0; r < k.rows; r++, x += stride) {
        for (Index i = 0; i + LANES <= k.length; i += LANES) {
            if (far) NAME(far_ahead)(x, i, k.length, stride, skip, skipped, limit);
            W d = NAME(widen)(NAME(load)(x + i)) - around;
            s1 += d;
            s2 += d * d;
        }
        if (rest) {
            W d = NAME(widen)(NAME(load)(x + k.length - LANES)) - around;
            d = (W)((MW)d & tail);
            s1 += d;
            s2 += d * d;
        }
    }
    const Index count = k.rows * k.length;
    const double sum = NAME(total)(s1), average = sum / count, squares = NAME(total)(s2) - sum * average;
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
    W dys = {0}, dots = {0};
    for (Index row = k.first; row < k.first + k.rows; row++) {
        const Index begin = (row * job->channels + c) * job->s + k.column;
        const REAL *x = (const REAL *)job->x + begin, *dy = (const REAL *)job->dy + begin;
        const uint16_t *sign = job->signs ? job->signs + (row * job->channels + c) * words + k.column / LANES : 0;
        for (Index i = 0; i + LANES <= k.length; i += LANES, sign += sign != 0) {
            if (far) {
                NAME(far_ahead)(x, i, k.length, stride, skip, skipped, limit);
                NAME(far_ahead)(dy, i, k.length, stride, skip, skipped, dy_limit);
            }
            V value = NAME(load)(x + i);
            W g = NAME(widen)(NAME(gated)(NAME(load)(dy + i), value, high, scale, low, slope, sign));
            dys += g;
            dots += g * NAME(widen)(value - mean);
        }
        if (rest) {
            V value = NAME(load)(x + k.length - LANES);
            V gate = NAME(gated)(NAME(load)(dy + k.length - LANES), value, high, scale, low, slope, sign);
            W g = NAME(widen)((V)((M)gate & tail));
            dys += g;
            dots += g * NAME(widen)(value - mean);
        }
    }
    *sum_dy += NAME(total)(dys);
    *sum_dot += NAME(total)(dots);
}

/* Output of `length` values of channel c. */
point void NAME(apply_row)(const Job *job, const REAL *x, const REAL *residual, Index length, Index c, REAL *y, uint16_t *sign) {
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

/* dx, and dresidual if wanted, of `length` values of channel c. */
point void NAME(gradient_row)(const Job *job, const REAL *dy, const REAL *x, Index length, Index c, REAL *dx, REAL *dresidual,
                              const uint16_t *sign) {
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

/* Output of a block of channels c0 to c1. */
static void NAME(apply_block)(const Job *job, Index c0, Index c1, Block k) {
    const Index words = words_of(job->s, LANES);
    for (Index row = k.first; row < k.first + k.rows; row++)
        for (Index c = c0; c < c1; c++) {
            const Index at = (row * job->channels + c) * job->s + k.column;
            uint16_t *sign = job->signs ? job->signs + (row * job->channels + c) * words + k.column / LANES : 0;
            NAME(apply_row)(job, (const REAL *)job->x + at, job->residual ? (const REAL *)job->residual + at : 0, k.length, c,
                            (REAL *)job->y + at, sign);
        }
}

/* dx and dresidual of a block of channels c0 to c1. */
static void NAME(gradient_block)(const Job *job, Index c0, Index c1, Block k) {
    const Index words = words_of(job->s, LANES);
    for (Index row = k.first; row < k.first + k.rows; row++)
        for (Index c = c0; c < c1; c++) {
            const Index at = (row * job->channels + c) * job->s + k.column;
            uint16_t *sign = job->signs ? job->signs + (row * job->channels + c) * words + k.column / LANES : 0;
            NAME(gradient_row)(job, (const REAL *)job->dy + at, (const REAL *)job->x + at, k.length, c, (REAL *)job->dx + at,
                               job->dresidual ? (REAL *)job->dresidual + at : 0, sign);
        }
}

/* --- column nest -------------------------------------------------------------------------------------------------- */

/* Mean and m2 of every column of a chunk of a block of rows, into `part` (blocks, 2, columns). */
static void NAME(column_moments)(const Job *job, Index t) {
    const Chunk q = chunk_of(t, job->columns);
    const Index first = q.block * job->block, end = min(first + job->block, job->rows), rest = q.width % LANES;
    double *s1 = job->part + 2 * q.block * job->columns + q.column, *s2 = s1 + job->columns;
    const REAL *origin = (const REAL *)job->x + first * job->columns + q.column;
    const MW tail = NAME(wide_mask)(NAME(last)(rest));
    for (Index j = 0; j < q.width; j++) s1[j] = s2[j] = 0;
    const REAL *x = origin;
    for (Index row = first; row < end; row++, x += job->columns)
        for (Index j = 0; j < q.width; j += LANES) {
            const Index k = min(j, q.width - LANES);
            W d = NAME(widen)(NAME(load)(x + k)) - NAME(finite)(NAME(widen)(NAME(load)(origin + k)));
            if (k < j) d = (W)((MW)d & tail);
            NAME(store_wide)(s1 + k, NAME(load_wide)(s1 + k) + d);
            NAME(store_wide)(s2 + k, NAME(load_wide)(s2 + k) + d * d);
        }
    for (Index j = 0; j < q.width; j++) {
        const double mean = s1[j] / (end - first), m2 = s2[j] - s1[j] * mean;
        s1[j] = mean + (isfinite(origin[j]) ? origin[j] : 0);
        s2[j] = m2 < 0 ? 0 : m2;
    }
}

/* Sums of gated dy and of dy * (x - MEAN) of every column of a chunk, into `part` (blocks, 2, columns). */
static void NAME(column_gradients)(const Job *job, Index t) {
    const Chunk q = chunk_of(t, job->columns);
    const Index first = q.block * job->block, end = min(first + job->block, job->rows);
    const Index words = words_of(job->columns, LANES);
    double *dys = job->part + 2 * q.block * job->columns + q.column, *dots = dys + job->columns;
    const REAL *coef = (const REAL *)job->coef + q.column, slope = job->slope;
    const M tail = NAME(last)(q.width % LANES);
    for (Index j = 0; j < q.width; j++) dys[j] = dots[j] = 0;
    for (Index row = first; row < end; row++) {
        const REAL *x = (const REAL *)job->x + row * job->columns + q.column;
        const REAL *dy = (const REAL *)job->dy + row * job->columns + q.column;
        const uint16_t *sign = job->signs ? job->signs + row * words + q.column / LANES : 0;
        for (Index j = 0; j < q.width; j += LANES, sign += sign != 0) {
            const Index k = min(j, q.width - LANES);
            V value = NAME(load)(x + k);
            V g = NAME(gated)(NAME(load)(dy + k), value, NAME(load)(coef + HIGH * job->columns + k),
                              NAME(load)(coef + SCALE * job->columns + k), NAME(load)(coef + LOW * job->columns + k), slope, sign);
            if (k < j) g = (V)((M)g & tail);
            W wide = NAME(widen)(g), d = NAME(widen)(value - NAME(load)(coef + MEAN * job->columns + k));
            NAME(store_wide)(dys + k, NAME(load_wide)(dys + k) + wide);
            NAME(store_wide)(dots + k, NAME(load_wide)(dots + k) + wide * d);
        }
    }
}

/* Output of a row. */
point void NAME(apply_columns)(const Job *job, const REAL *x, const REAL *residual, REAL *y, uint16_t *sign) {
    const REAL *coef = (const REAL *)job->coef, slope = job->slope;
    const Index columns = job->columns, end = columns - LANES;
    const V last = NAME(load)(x + end), last_added = residual ? NAME(load)(residual + end) : (V){0};
    for (Index j = 0; j < columns; j += LANES, sign += sign != 0) {
        const Index k = min(j, end);
        V value = k < j ? last : NAME(load)(x + k);
        V added = k < j || !residual ? last_added : NAME(load)(residual + k);
        NAME(store)(y + k, NAME(output)(value, added, NAME(load)(coef + HIGH * columns + k),
                                        NAME(load)(coef + SCALE * columns + k),
                                        NAME(load)(coef + LOW * columns + k), slope, sign));
    }
}

/* dx, and dresidual if wanted, of a row. */
point void NAME(gradient_columns)(const Job *job, const REAL *dy, const REAL *x, REAL *dx, REAL *dresidual,
                                  const uint16_t *sign) {
    const REAL *coef = (const REAL *)job->coef, slope = job->slope;
    const Index columns = job->columns, end = columns - LANES;
    const V last = NAME(load)(x + end), last_dy = NAME(load)(dy + end);
    for (Index j = 0; j < columns; j += LANES, sign += sign != 0) {
        const Index k = min(j, end);
        V value = k < j ? last : NAME(load)(x + k), g = k < j ? last_dy : NAME(load)(dy + k);
        V scale = NAME(load)(coef + SCALE * columns + k);
        g = NAME(gated)(g, value, NAME(load)(coef + HIGH * columns + k), scale,
                        NAME(load)(coef + LOW * columns + k), slope, sign);
        NAME(store)(dx + k, NAME(gradient)(g, value, job->training, scale, NAME(load)(coef + MEAN * columns + k),
                                           NAME(load)(coef + A * columns + k), NAME(load)(coef + B * columns + k)));
        if (dresidual) NAME(store)(dresidual + k, g);
    }
}

/* Output of the t-th group of rows. */
static void NAME(apply_group)(const Job *job, Index t) {
    const Index columns = job->columns, words = words_of(columns, LANES), group = group_of(columns);
    for (Index row = t * group; row < min((t + 1) * group, job->rows); row++)
        NAME(apply_columns)(job, (const REAL *)job->x + row * columns,
                            job->residual ? (const REAL *)job->residual + row * columns : 0, (REAL *)job->y + row * columns,
                            job->signs ? job->signs + row * words : 0);
}

/* dx and dresidual of the t-th group of rows. */
static void NAME(gradient_group)(const Job *job, Index t) {
    const Index columns = job->columns, words = words_of(columns, LANES), group = group_of(columns);
    for (Index row = t * group; row < min((t + 1) * group, job->rows); row++)
        NAME(gradient_columns)(job, (const REAL *)job->dy + row * columns, (const REAL *)job->x + row * columns,
                               (REAL *)job->dx + row * columns,
                               job->dresidual ? (REAL *)job->dresidual + row * columns : 0,
                               job->signs ? job->signs + row * words : 0);
}

/* --- phases ------------------------------------------------------------------------------------------------------- */

/* Task t of a phase of the forward kernel. */
static void NAME(forward_task)(const Job *job, int phase, Index t) {
    const Index c0 = t * job->run, c1 = min(c0 + job->run, job->channels);
    switch (phase) {
    case FUSED:
        for (Index c = c0; c < c1; c++) {
            Moments total = {0}, part;
            for (Index b = 0; b < job->blocks; b++) {
                part.count = NAME(block_moments)(job, c, b, &part.mean, &part.m2);
                merge(&total, part);
            }
            finish_statistics(job, c, total);
            NAME(round_affine)(job, c, c);
        }
        for (Index b = job->blocks - 1; b >= 0; b--) /* backwards: the last ones are still in the nearest cache */
            NAME(apply_block)(job, c0, c1, block_of(b, job->n, job->s));
        break;
    case REDUCE: {
        double *part = job->part + 2 * (t % job->blocks) * job->channels + t / job->blocks;
        NAME(block_moments)(job, t / job->blocks, t % job->blocks, part, part + job->channels);
        break;
    }
    case APPLY: {
        const Span a = span_of(t, job);
        NAME(apply_block)(job, a.c0, a.c1, a.block);
        break;
    }
    case REDUCE_COLUMNS: NAME(column_moments)(job, t); break;
    case APPLY_COLUMNS: NAME(apply_group)(job, t); break;
    }
    if (job->streaming) fence();
}

/* Task t of a phase of the backward kernel. */
static void NAME(backward_task)(const Job *job, int phase, Index t) {
    const Index c0 = t * job->run, c1 = min(c0 + job->run, job->channels);
    switch (phase) {
    case FUSED:
        for (Index c = c0; c < c1; c++) {
            double sum_dy = 0, dot = 0;
            for (Index b = 0; b < job->blocks; b++) NAME(block_gradients)(job, c, b, &sum_dy, &dot);
            finish_gradient(job, c, (REAL)job->stats[c], sum_dy, dot);
            NAME(round_gradient)(job, c, c);
        }
        for (Index b = job->blocks - 1; b >= 0; b--) NAME(gradient_block)(job, c0, c1, block_of(b, job->n, job->s));
        break;
    case REDUCE: {
        double *part = job->part + 2 * (t % job->blocks) * job->channels + t / job->blocks;
        part[0] = part[job->channels] = 0;
        NAME(block_gradients)(job, t / job->blocks, t % job->blocks, part, part + job->channels);
        break;
    }
    case APPLY: {
        const Span a = span_of(t, job);
        NAME(gradient_block)(job, a.c0, a.c1, a.block);
        break;
    }
    case REDUCE_COLUMNS: NAME(column_gradients)(job, t); break;
    case APPLY_COLUMNS: NAME(gradient_group)(job, t); break;
    }
    if (job->streaming) fence();
}

/* --- between phases ----------------------------------------------------------------------------------------------- */

/* Mean and m2 of every channel into the first two rows of `stats`: all its parts, in order. The values that fill no row
   of the column nest have a part each. */
static void NAME(merge_moments)(const Job *job) {
    const Index columns = job->columns, pixel = job->channels * job->s, rest = job->n * pixel - job->rows * columns;
    const REAL *x = (const REAL *)job->x + job->rows * columns;
    for (Index c = 0; c < job->channels; c++) {
        Moments total = {0};
        for (Index b = 0; b < job->blocks && !columns; b++) {
            const Block k = block_of(b, job->n, job->s);
            const double *part = job->part + 2 * b * job->channels + c;
            merge(&total, (Moments){k.rows * k.length, part[0], part[job->channels]});
        }
        for (Index begin = c * job->s; begin < columns; begin += pixel)
            for (Index j = begin; j < begin + job->s; j++) {
                for (Index b = 0; b < job->blocks; b++) {
                    const double *part = job->part + 2 * b * columns + j;
                    merge(&total, (Moments){min(job->block, job->rows - b * job->block), part[0], part[columns]});
                }
                if (j < rest) merge(&total, (Moments){1, x[j], 0});
            }
        job->stats[c] = total.mean;
        job->stats[job->channels + c] = total.m2;
    }
}

/* The values that fill no row, padded with zeros to one. */
static void NAME(pad)(const Job *job, const REAL *x, REAL *row) {
    const Index begin = job->rows * job->columns, rest = job->n * job->channels * job->s - begin;
    for (Index j = 0; j < job->columns; j++) row[j] = x && j < rest ? x[begin + j] : 0;
}

static void NAME(unpad)(const Job *job, const REAL *row, REAL *y) {
    const Index begin = job->rows * job->columns, rest = job->n * job->channels * job->s - begin;
    for (Index j = 0; j < rest && y; j++) y[begin + j] = row[j];
}

static uint16_t *NAME(last_sign)(const Job *job) {
    return job->signs ? job->signs + job->rows * words_of(job->columns, LANES) : 0;
}

/* Output of the values that fill no row. */
static void NAME(apply_last_row)(const Job *job) {
    REAL x[LONGEST_FOLD], residual[LONGEST_FOLD], y[LONGEST_FOLD];
    NAME(pad)(job, job->x, x);
    NAME(pad)(job, job->residual, residual);
    NAME(apply_columns)(job, x, residual, y, NAME(last_sign)(job));
    NAME(unpad)(job, y, job->y);
}

/* dx and dresidual of the values that fill no row. */
static void NAME(gradient_last_row)(const Job *job) {
    REAL x[LONGEST_FOLD], dy[LONGEST_FOLD], dx[LONGEST_FOLD], dresidual[LONGEST_FOLD];
    NAME(pad)(job, job->x, x);
    NAME(pad)(job, job->dy, dy);
    NAME(gradient_columns)(job, dy, x, dx, dresidual, NAME(last_sign)(job));
    NAME(unpad)(job, dx, job->dx);
    NAME(unpad)(job, dresidual, job->dresidual);
}

/* Both sums of every channel into the first two rows of `grads`: all its parts, in order. The values that fill no row
   are the last block. */
static void NAME(merge_gradients)(const Job *job) {
    const Index columns = job->columns, pixel = job->channels * job->s;
    const Index rest = columns ? job->n * pixel - job->rows * columns : 0;
    if (rest) {
        REAL x[LONGEST_FOLD], dy[LONGEST_FOLD];
        NAME(pad)(job, job->x, x);
        NAME(pad)(job, job->dy, dy);
        Job row = *job;
        row.x = x, row.dy = dy, row.rows = row.block = 1, row.signs = NAME(last_sign)(job);
        row.part = job->part + 2 * job->blocks * columns;
        for (Index t = 0; t < chunks_of(columns); t++) NAME(column_gradients)(&row, t);
    }
    for (Index c = 0; c < job->channels; c++) {
        double sum_dy = 0, dot = 0;
        for (Index b = 0; b < job->blocks && !columns; b++) {
            const double *part = job->part + 2 * b * job->channels + c;
            sum_dy += part[0];
            dot += part[job->channels];
        }
        for (Index begin = c * job->s; begin < columns; begin += pixel)
            for (Index j = begin; j < begin + job->s; j++)
                for (Index b = 0; b < job->blocks + (j < rest); b++) {
                    const double *part = job->part + 2 * b * columns + j;
                    sum_dy += part[0];
                    dot += part[columns];
                }
        job->grads[c] = sum_dy;
        job->grads[job->channels + c] = dot;
    }
}

/* What comes before a phase, serially: coefficients for every channel or, repeated as the channels are, every column. */
static void NAME(prepare)(const Job *job, int backward, int phase) {
    const Index repeats = job->columns ? job->columns / (job->channels * job->s) : 1, length = job->columns ? job->s : 1;
    const Index width = repeats * job->channels * length;
    const int apply = phase == APPLY || phase == APPLY_COLUMNS;
    Index j = 0;
    for (Index q = 0; q < repeats; q++)
        for (Index c = 0; c < job->channels; c++)
            for (Index k = 0; k < length; k++, j++) {
                if (backward ? !apply : apply) NAME(round_affine)(job, j, c);
                if (backward && !apply) ((REAL *)job->coef)[MEAN * width + j] = (REAL)job->stats[c];
                if (backward && apply) NAME(round_gradient)(job, j, c);
            }
}

/* What comes after a phase, serially. */
static void NAME(finish)(const Job *job, int backward, int phase) {
    const int reduce = phase == REDUCE || phase == REDUCE_COLUMNS;
    if (reduce) (backward ? NAME(merge_gradients) : NAME(merge_moments))(job);
    if (reduce && !backward && job->affine)
        for (Index c = 0; c < job->channels; c++)
            finish_statistics(job, c, (Moments){job->n * job->s, job->stats[c], job->stats[job->channels + c]});
    if (reduce && backward)
        for (Index c = 0; c < job->channels; c++) {
            double *sum_dy = job->grads + c, *dot = sum_dy + job->channels, mean = job->stats[c];
            if (job->dx) finish_gradient(job, c, (REAL)mean, *sum_dy, *dot);
            else *dot -= (mean - (REAL)mean) * *sum_dy;
        }
    if (phase == APPLY_COLUMNS && job->rows * job->columns < job->n * job->channels * job->s)
        (backward ? NAME(gradient_last_row) : NAME(apply_last_row))(job);
}

static const Kernels NAME(kernels) = {LANES, NAME(prepare), NAME(forward_task), NAME(backward_task), NAME(finish)};

#undef V
#undef M
#undef W
#undef MW
#undef LANES
