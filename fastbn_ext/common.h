/* What all value types and instruction sets share: a call's arguments, and how a tensor is cut. The constants are those of
   fastbn/backends/_plan.py and of the modules in _numba whose functions use them. */

#ifndef FASTBN_COMMON_H
#define FASTBN_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define point static inline __attribute__((always_inline))
#define prefetch(address) __builtin_prefetch(address, 0, 3)       /* into all caches */
#define prefetch_later(address) __builtin_prefetch(address, 0, 2) /* but the nearest */

enum { FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS }; /* phases */
enum { HIGH, LOW, SCALE, MEAN, A, B };                        /* rows of `coef` */
enum { PLAIN, RELU, ACTIVATED, ADDED, SIGNED, ANY };          /* kinds: see kind_of */
enum { OUTPUT, GRADIENT, RESIDUAL };                              /* what is written: y, dx, dresidual */
enum { LINE = 64, BLOCK = 1 << 14, AHEAD = 128, STREAMS = 4, PIECE = BLOCK / STREAMS }; /* row nest */
enum { SLAB = 1600, ROW = 16, MOST_CHANNELS = SLAB / ROW };                             /* values and channels of a run */
enum { CHUNK = 1024, GROUP = 1 << 14, LONGEST_FOLD = 1024 };                   /* column nest */
enum { ROOM = 2048, PATIENCE = 1 << 14 }; /* values of `part` on the stack; pauses until a thread has waited too long */
enum { TOGETHER = 64 };                              /* channels finished at a time, in loops that become vectors */
enum { COLUMN_STREAMS = 8, MOST_LANES = 16, WIDEST = 2 * CHUNK + MOST_LANES }; /* both: rows at a time, room for sums */
enum { SHARES = 64 };                                /* of tasks, at most: threads beyond have one together */

typedef ptrdiff_t Index; /* `long` has 32 bits on Windows */

/* The tasks of a phase, in shares: of each the next task and the end, on a line of their own. */
typedef struct { Index next, end; } __attribute__((aligned(LINE))) Share;
typedef struct { Share each[SHARES]; Index count; } Shares;

/* A call's plan, see fastbn/backends/_plan.py, and its arguments, see fastbn/backends/__init__.py; NULL for None. */
typedef struct {
    Index n, channels, s, threads, split, streaming, run, columns, rows, block, blocks, ahead, turns;
    int training, wide;
    double eps, slope, factor;
    const void *x, *residual, *dy;
    void *y, *dx, *dresidual;
    uint16_t *signs;
    void *weight, *bias, *running_mean, *running_var; /* double if `wide`, else float; in a backward pass dweight, dbias */
    void *coef;
    double *stats, *affine, *grads, *part;
    Index *writing; /* whether a thread has its turn */
    Shares *shares;
} Job;

/* The kernels of one value type and one instruction set. */
typedef struct {
    Index lanes;
    void (*prepare)(const Job *, int backward, int phase);
    void (*work)(const Job *, int backward, int phase, Index k);
    void (*last_row)(const Job *, int backward, int phase);
    void (*finish_channels)(const Job *, Index c0, Index c1, int backward, int apply);
} Kernels;

typedef struct { Index first, rows, column, length; } Block; /* rows of values of a channel */
typedef struct { Index c0, c1; } Run;                        /* neighbouring channels */
typedef struct { Index turn, after; } Ahead;
typedef struct { Index first, apart, rows; } Bundle; /* rows that are read at a time */
typedef struct { Index at, stride, word, words; } Slab; /* a run's rows and their signs: begin, distance */
typedef struct { Index first, rows, column, width; double *part; } Chunk; /* columns of a block of rows, their sums */

point Index min(Index a, Index b) { return a < b ? a : b; }
point Index max(Index a, Index b) { return a > b ? a : b; }
point Index words_of(Index s, Index lanes) { return (s + lanes - 1) / lanes; }
point Index whole_lines(Index count, Index itemsize) { return count * itemsize / LINE * LINE / itemsize; } /* values */

/* Width of `coef` and `part`, and columns of a channel side by side in it. */
point Index width_of(const Job *job) { return job->columns ? job->columns : job->channels; }
point Index columns_of_channel(const Job *job) { return job->columns ? job->s : 1; }

/* Prefetch what lies so many bytes ahead, if any: what the next run will read first does not go to the nearest cache. */
point void prefetch_onward(const void *x, Index ahead, int later) {
    if (ahead && later) prefetch_later((const char *)x + ahead);
    else if (ahead) prefetch((const char *)x + ahead);
}

/* Prefetch a line to store a part of it, unless it begins there. */
point void prefetch_part(const void *x) {
    if ((uintptr_t)x & (LINE - 1)) __builtin_prefetch(x, 1);
}

point Index to_line(const void *x, Index itemsize) { return (-(uintptr_t)x & (LINE - 1)) / itemsize; } /* values */

/* Deal the tasks of a phase (design, L): neighbours to one thread, and to the first ones what is left over. */
static inline void deal(Shares *shares, Index tasks, Index threads) {
    const Index count = shares->count = min(threads, SHARES);
    for (Index k = 0; k < count; k++) {
        shares->each[k].next = k ? shares->each[k - 1].end : 0;
        shares->each[k].end = ((k + 1) * tasks + count - 1) / count;
    }
}

/* A task that no thread has begun, of share `at` or, where that is done, of those behind it; -1 where all are. */
point Index next_task(Shares *shares, Index *at) {
    for (Index tried = 0; tried < shares->count; tried++, ++*at) {
        Share *share = shares->each + *at % shares->count;
        const Index t = __atomic_fetch_add(&share->next, 1, __ATOMIC_RELAXED);
        if (t < share->end) return t;
    }
    return -1;
}

/* Pieces of so many values that a row is cut into; the last takes the rest: none is shorter than a vector. */
point Index pieces_of(Index s, Index piece) { return max(1, s / piece); }

/* Blocks of a channel, of so many rows of a piece, and block b of them. */
point Index blocks_of(Index n, Index s, Index height, Index piece) {
    return (n + height - 1) / height * pieces_of(s, piece);
}
point Block block_of(Index b, Index n, Index s, Index height, Index piece) {
    const Index pieces = pieces_of(s, piece), first = b / pieces * height, p = b % pieces;
    return (Block){first, min(height, n - first), p * piece, p < pieces - 1 ? piece : s - p * piece};
}

/* Block b of a reduction: whole bundles of streams. */
point Block block_to_reduce(const Job *job, Index b) {
    const Index s = job->s, height = max(1, (BLOCK / s + STREAMS - 1) / STREAMS) * STREAMS;
    return block_of(b, job->n, s, height, PIECE);
}

/* A row that no others are left to be read with has a stream in each quarter, which is of whole vectors. */
point Index quarter_of(Index length) { return length / STREAMS / MOST_LANES * MOST_LANES; }

/* How far ahead of value i of a row of block k, of the q-th channel of a run, to prefetch: AHEAD where i < turn, and `after`
   from there on. The next channel's values follow in memory; but behind the last channel, a run goes on in its next STREAMS
   rows, which are far away, if there are any. */
point Ahead ahead_in(const Job *job, Run run, Block k, Index row, Index q) {
    const Index channels = run.c1 - run.c0, after = (STREAMS * job->channels - channels) * job->s + AHEAD;
    if (q < channels - 1 || k.column + k.length < job->s) return (Ahead){k.length, AHEAD};
    return (Ahead){k.length - AHEAD, k.first + row + STREAMS < job->n ? after : 0};
}

/* Channels of a task of output alone: as many as have words together, with signs; else as many as lie in a block's length,
   in whole lines where they are enough (32x1280x7x7, inference: 3 to 13 % less time). */
point Index spread_of(const Job *job) {
    const Index channels = BLOCK / job->s;
    if (job->s > BLOCK || job->signs) return job->run;
    return channels < MOST_LANES ? channels : channels - channels % MOST_LANES;
}

/* Sign i of each of so many rows, in one word. */
point uint16_t gathered_bits(const uint16_t *sign, Index words, const Index streams, Index i, Index lanes) {
    unsigned bits = 0;
    for (Index r = 0; r < streams; r++) bits |= (sign[r * words + i / lanes] >> i % lanes & 1u) << r;
    return bits;
}

/* Number of runs of so many neighbouring channels, and run t. */
point Index runs_of(const Job *job, Index run) { return (job->channels + run - 1) / run; }
point Run run_of(const Job *job, Index t, Index run) { return (Run){t * run, min(t * run + run, job->channels)}; }

/* The rows of a run from channel c0 and sample `first` on. With signs, all runs but the last are of one width. */
point Slab slab_of(const Job *job, Index c0, Index first, Index lanes) {
    const Index s = job->s, stride = job->channels * s, slab = words_of(job->run * s, lanes);
    const Index words = runs_of(job, job->run) * slab;
    return (Slab){first * stride + c0 * s, stride, first * words + c0 / job->run * slab, words};
}

/* Rows are read so many at a time, a bundle, each from a stream of its own: bundle b has row b of every stream. Streams are
   of as many rows, an odd number (design, G); what is left over is the last bundle. */
point Index rows_of_stream(Index rows, Index streams) {
    const Index most = rows / streams;
    return most ? (most - 1) | 1 : 0;
}
point Index bundles_of(Index rows, Index streams) {
    const Index whole = rows_of_stream(rows, streams);
    return whole + (whole * streams < rows);
}
point Bundle bundle_at(Index b, Index rows, Index streams) {
    const Index whole = rows_of_stream(rows, streams);
    return b < whole ? (Bundle){b, whole, streams} : (Bundle){whole * streams, 1, rows - whole * streams};
}

point Index chunks_of(Index columns) { return max(1, columns / CHUNK); }
point Index group_of(Index columns) { return max(1, GROUP / columns); }

/* Chunk t of all blocks; the last one of a row takes the rest. */
point Chunk chunk_of(const Job *job, Index t) {
    const Index columns = job->columns, chunks = chunks_of(columns), b = t / chunks, q = t % chunks;
    const Index first = b * job->block, begin = q * CHUNK, width = q < chunks - 1 ? CHUNK : columns - begin;
    return (Chunk){first, min(job->block, job->rows - first), begin, width, job->part + 2 * b * columns + begin};
}

/* Values that fill no row of the column nest: whole pixels. */
point Index rest_of(const Job *job) { return job->n * job->channels * job->s - job->rows * job->columns; }

/* Parts of every channel: blocks, and what fills no row. */
point Index number_of_parts(const Job *job) { return job->blocks + (job->columns && rest_of(job)); }

/* Number of values of a channel in part b. */
point Index size_of(const Job *job, Index b) {
    if (!job->columns) {
        const Block k = block_to_reduce(job, b);
        return k.rows * k.length;
    }
    if (b == job->blocks) return rest_of(job) / job->channels;
    return job->columns / job->channels * min(job->block, job->rows - b * job->block);
}

/* Two sums (mean and m2 in the row nest) of so many channels from c0 on in part b, their columns together. */
point void sums_of(const Job *job, Index c0, Index count, Index b, double *first, double *second) {
    const Index channels = job->channels, width = width_of(job), length = columns_of_channel(job);
    const Index end = job->columns && b == job->blocks ? rest_of(job) : width;
    for (Index k = 0; k < count; k++) first[k] = second[k] = 0;
    for (Index pixel = 0; pixel < end; pixel += channels * length)
        for (Index j = 0; j < length; j++) {
            const double *part = job->part + 2 * b * width + pixel + c0 * length + j;
            for (Index k = 0; k < count; k++) first[k] += part[k * length], second[k] += part[k * length + width];
        }
}

/* Kind of output or of a gradient: PLAIN has neither a residual nor an activation, RELU and ACTIVATED have a ReLU or another
   activation, ADDED has a residual, SIGNED one and a ReLU whose signs are kept; with ANY all of it is asked for. GCC leaves
   tests of what never changes in loops of many (inference with a residual, in cache: 15 ns for 16 values, 6 so); LLVM does
   not. A ReLU needs one instruction where an activation needs four (8x64x56x56, backward with it: 11.8 ns, 10.4 so). */
point int kind_of(int added, double slope, int signs) {
    if (!added && !signs) return slope == 1 ? PLAIN : slope == 0 ? RELU : ACTIVATED;
    return added && slope == 1 ? ADDED : added && slope == 0 && signs ? SIGNED : ANY;
}
point int kind_to_sum(const Job *job) { return kind_of(job->signs != 0, job->slope, job->signs != 0); }
point int kind_to_write(const Job *job, int backward) {
    if (!job->training) return ANY;
    return backward ? kind_to_sum(job) : kind_of(job->residual != 0, job->slope, job->signs != 0);
}
point double slope_of(const Job *job, int kind) {
    return kind == PLAIN || kind == ADDED ? 1 : kind == RELU || kind == SIGNED ? 0 : job->slope;
}

/* In place the lines are in the cache already. */
static inline int can_stream(const Job *job) {
    const void *out = job->y ? job->y : job->dx;
    return out != job->x && out != job->residual && out != job->dy;
}

/* Wait for this thread's turn to write; whether it came, for who has waited too long writes without. */
static inline int take_turn(const Job *job) {
    for (int i = 0; i < PATIENCE; i++) {
        if (!__atomic_exchange_n(job->writing, 1, __ATOMIC_ACQUIRE)) return 1;
        relax();
    }
    return 0;
}
static inline void end_turn(const Job *job) { __atomic_store_n(job->writing, 0, __ATOMIC_RELEASE); }

/* Number of independent tasks of a phase. */
static inline Index tasks_of(const Job *job, int phase) {
    switch (phase) {
    case FUSED: return runs_of(job, job->run);
    case REDUCE: return job->blocks * runs_of(job, job->run);
    case APPLY: return blocks_of(job->n, job->s, 1, BLOCK) * runs_of(job, spread_of(job));
    case REDUCE_COLUMNS: return job->blocks * chunks_of(job->columns);
    default: return (job->rows + group_of(job->columns) - 1) / group_of(job->columns);
    }
}

#endif
