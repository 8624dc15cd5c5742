/* The kernels of one value type and one instruction set: with common.h the twins of those in fastbn/backends/_numba, where
   the design is written down. both_types.h includes this file once for each pair; below are the phases and what comes
   between them. */

#include "vectors.h"

#include "points.h"
#include "rows.h"
#include "output.h"
#include "columns.h"

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
point void NAME(task)(const Job *job, int backward, int phase, Index t) {
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

/* Tasks of a phase that thread k does: of its own share first. */
static void NAME(work)(const Job *job, int backward, int phase, Index k) {
    for (Index t; (t = next_task(job->shares, &k)) >= 0;) NAME(task)(job, backward, phase, t);
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

static const Kernels NAME(kernels) = {LANES, NAME(prepare), NAME(work), NAME(last_row), NAME(finish_channels)};

#undef V
#undef I
#undef M
#undef W
#undef D
#undef WIDE
#undef Coefs
#undef OF
#undef LANES
