/* What all value types and instruction sets share: a call's arguments, how a tensor is cut (the constants are those of
   fastbn/backends/_plan.py), and the arithmetic of one channel. */

#ifndef FASTBN_COMMON_H
#define FASTBN_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define point static inline __attribute__((always_inline))
#define prefetch(address) __builtin_prefetch(address, 0, 2)

enum { FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS };           /* phases */
enum { HIGH, SCALE, LOW, MEAN, A, B };                                  /* rows of `coef` */
enum { LINE = 64, BLOCK = 1 << 14, CHUNK = 512, GROUP = 1 << 14, LONGEST_FOLD = 1 << 10, AHEAD = 2048, DEPTH = 8 };

typedef ptrdiff_t Index; /* `long` has 32 bits on Windows */

/* A call's arguments: sizes, plan and arrays, as fastbn/backends/__init__.py describes them; NULL for an empty array. */
typedef struct {
    Index n, channels, s, run, columns, rows, block, blocks, ahead;
    int streaming, training;
    double eps, slope;
    const void *x, *residual, *dy;
    void *y, *dx, *dresidual, *coef;
    uint16_t *signs;
    double *stats, *affine, *grads, *part;
} Job;

/* The kernels of one value type and one instruction set. */
typedef struct {
    Index lanes;
    void (*prepare)(const Job *, int backward, int phase);
    void (*task)(const Job *, int backward, int phase, Index t);
    void (*last_row)(const Job *, int backward, int phase);
    void (*finish)(const Job *, int backward, int apply);
} Kernels;

typedef struct { Index count; double mean, m2; } Moments;
typedef struct { Index first, rows, column, length; } Block; /* rows of values of a channel */
typedef struct { Index c0, c1; Block block; } Span;          /* a block of some channels */
typedef struct { Index first, end, column, width; double *part; } Chunk; /* columns of a block of rows, their sums */

point Index min(Index a, Index b) { return a < b ? a : b; }
point Index max(Index a, Index b) { return a > b ? a : b; }
point Index words_of(Index s, Index lanes) { return (s + lanes - 1) / lanes; }
point Index to_line(const void *x, Index itemsize) { return (-(uintptr_t)x & (LINE - 1)) / itemsize; } /* values */

/* Block b of a channel. The last one of a row takes the rest: none is shorter than a vector. */
point Block block_of(Index b, Index n, Index s) {
    if (s > BLOCK) {
        const Index pieces = s / BLOCK, p = b % pieces;
        return (Block){b / pieces, 1, p * BLOCK, p < pieces - 1 ? BLOCK : s - p * BLOCK};
    }
    const Index rows = BLOCK / s;
    return (Block){b * rows, min(rows, n - b * rows), 0, s};
}

/* Channels of a span: as many as lie in a block's length. */
point Index spread_of(const Job *job) { return job->s > BLOCK ? 1 : max(job->run, BLOCK / job->s); }

/* Span t of the whole tensor, in the order of memory. */
point Span span_of(Index t, const Job *job) {
    const Index spread = spread_of(job), spans = (job->channels + spread - 1) / spread, c0 = t % spans * spread;
    const Block row = {t / spans, 1, 0, job->s};
    return (Span){c0, min(c0 + spread, job->channels), job->s > BLOCK ? block_of(t / spans, job->n, job->s) : row};
}

point Index chunks_of(Index columns) { return max(1, columns / CHUNK); }
point Index group_of(Index columns) { return max(1, GROUP / columns); }

/* Chunk t; the last one of a row takes the rest. */
point Chunk chunk_of(const Job *job, Index t) {
    const Index columns = job->columns, chunks = chunks_of(columns), b = t / chunks, q = t % chunks, begin = q * CHUNK;
    const Index width = q < chunks - 1 ? CHUNK : columns - begin;
    return (Chunk){b * job->block, min((b + 1) * job->block, job->rows), begin, width, job->part + 2 * b * columns + begin};
}

/* Number of values behind part b of a channel or column; one in the part of the values that fill no row. */
point Index size_of(const Job *job, Index b) {
    if (job->columns) return b < job->blocks ? min(job->block, job->rows - b * job->block) : 1;
    const Block k = block_of(b, job->n, job->s);
    return k.rows * k.length;
}

/* In place the lines are in the cache already; in the column nest rows must begin on a line. */
static inline int can_stream(const Job *job) {
    const void *out = job->y ? job->y : job->dx;
    if (out == job->x || out == job->residual || out == job->dy) return 0;
    return !job->columns || !(to_line(out, 1) || to_line(job->dresidual, 1));
}

/* Number of independent tasks of a phase. */
static inline Index tasks_of(const Job *job, int phase) {
    switch (phase) {
    case FUSED: return (job->channels + job->run - 1) / job->run;
    case REDUCE: return job->blocks * job->channels;
    case APPLY: {
        const Index spread = spread_of(job);
        return (job->s > BLOCK ? job->blocks : job->n) * ((job->channels + spread - 1) / spread);
    }
    case REDUCE_COLUMNS: return job->blocks * chunks_of(job->columns);
    default: return (job->rows + group_of(job->columns) - 1) / group_of(job->columns);
    }
}

/* Moments of two parts together (Chan, Golub and LeVeque 1983); an infinite mean stays infinite. */
point void merge(Moments *a, Moments b) {
    if (a->count == 0) {
        *a = b;
        return;
    }
    const double delta = b.mean - a->mean, share = (double)b.count / (a->count + b.count);
    a->m2 = isfinite(delta) ? a->m2 + b.m2 + delta * delta * (a->count * share) : NAN;
    a->mean = isfinite(delta) ? a->mean + delta * share : a->mean + b.mean;
    a->count += b.count;
}

/* All that follows from the moments of channel c; `affine` holds weight and bias before. */
point void finish_statistics(const Job *job, Index c, double mean, double m2) {
    const double var = m2 / ((double)job->n * job->s), invstd = 1 / sqrt(var + job->eps);
    double *stats = job->stats + c, *affine = job->affine + c;
    stats[0] = mean;
    stats[job->channels] = var;
    stats[2 * job->channels] = invstd;
    affine[0] = mean;
    affine[job->channels] *= invstd;
}

/* All that follows from the sums of dy and dy * (x - MEAN): dweight, dbias, and A, B of
   dx = SCALE * dy + A * (x - MEAN) + B. */
point void finish_gradient(const Job *job, Index c, double rounded_mean, double sum_dy, double dot) {
    const double count = (double)job->n * job->s, invstd = job->stats[2 * job->channels + c];
    const double scale = job->affine[job->channels + c], low = job->stats[c] - rounded_mean;
    double *grads = job->grads + c;
    dot -= low * sum_dy;
    const double a = -scale * invstd * invstd * dot / count;
    grads[0] = dot * invstd;
    grads[job->channels] = sum_dy;
    grads[2 * job->channels] = a;
    grads[3 * job->channels] = -scale * sum_dy / count - a * low;
}

#endif
