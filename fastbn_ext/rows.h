/* The row nest: sums over blocks of rows; the twin of fastbn/backends/_numba/rows.py.
   kernels.h includes this file for each value type and instruction set. */

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
    switch (kind_to_sum(job)) {
    case PLAIN: NAME(sum_run)(job, run, b, mean, dys, dots, 1, PLAIN); break;
    case RELU: NAME(sum_run)(job, run, b, mean, dys, dots, 1, RELU); break;
    case ACTIVATED: NAME(sum_run)(job, run, b, mean, dys, dots, 1, ACTIVATED); break;
    case SIGNED: NAME(sum_run)(job, run, b, mean, dys, dots, 1, SIGNED); break;
    default: NAME(sum_run)(job, run, b, mean, dys, dots, 1, ANY);
    }
    for (Index q = 0; q < run.c1 - run.c0; q++, part++)
        part[0] = NAME(total)(dys[q]), part[job->channels] = NAME(total)(dots[q]);
}
