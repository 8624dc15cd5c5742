/* Output: y, dx and dresidual; the twin of fastbn/backends/_numba/output.py.
   kernels.h includes this file for each value type and instruction set. */

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

/* Output, or dx and dresidual, of the t-th group of rows. */
static void NAME(apply_group)(const Job *job, Index t, int backward) {
    const Index columns = job->columns, first = t * group_of(columns), rows = min(group_of(columns), job->rows - first);
    const Index words = words_of(columns, LANES);
    const REAL *coef = (const REAL *)job->coef;
    NAME(write_rows)(job, first * columns, columns, rows, columns, coef, columns, 0, first * words, words, job->ahead,
                     0, backward, 1);
}
