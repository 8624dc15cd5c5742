/* Statistics of image data, of one value type and one instruction set: the twin of fastbn/backends/_numba/images.py;
   how the work is cut, and the design, stand in fastbn/backends/_images.py. `image_types.h` includes this file once for
   each pair, with

       NAME      makes names of this type and instruction set
       STORED    a value as it is in memory
       WIDE      an integer of twice as many bits, PAIR an unsigned one of four times as many; neither for floats
       VALUE(x)  a float as float64
       LOAD(x)   COUNT floats as a vector of float64

   A column is `UNROLL` registers wide, so that sums wait for none before them. */

#ifdef WIDE
#define SUM int64_t
#define PARTS 2
#define COUNT (VECTOR_BYTES / (Index)sizeof(WIDE))
#define UNROLL (VECTOR_BYTES == 64 ? 1 : 2)
#else
#define SUM double
#define PARTS 3
#define COUNT (VECTOR_BYTES / (Index)sizeof(double))
#define UNROLL (VECTOR_BYTES == 64 ? 2 : 4)
#endif
#define COLUMN (COUNT * UNROLL)

#ifdef WIDE
typedef STORED NAME(Narrow) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(sizeof(STORED)), may_alias));
typedef WIDE NAME(Wide) __attribute__((vector_size(VECTOR_BYTES)));
typedef PAIR NAME(Pair) __attribute__((vector_size(VECTOR_BYTES)));

/* Add the sums and sums of squares of a column of at most 256 rows to s1 and s2, in the lanes from `first` on. */
static void NAME(column)(const STORED *x, Index stride, Index rows, const STORED *ahead, Index first, const double *around,
                         SUM *s1, SUM *s2) {
    enum { BITS = 8 * sizeof(WIDE) };
    (void)around;
    NAME(Wide) sum[UNROLL] = {0};
    NAME(Pair) even[UNROLL] = {0}, odd[UNROLL] = {0};
    for (Index r = 0; r < rows; r++, x += stride, ahead += COLUMN) {
        prefetch_later(ahead);
        for (Index k = 0; k < UNROLL; k++) {
            const NAME(Wide) value = __builtin_convertvector(((const NAME(Narrow) *)x)[k], NAME(Wide));
            const NAME(Pair) square = (NAME(Pair))(value * value);
            sum[k] += value;
            even[k] += square & (PAIR)(((PAIR)1 << BITS) - 1);
            odd[k] += square >> BITS;
        }
    }
    WIDE sums[COLUMN];
    PAIR squares[2][COLUMN / 2];
    __builtin_memcpy(sums, sum, sizeof sums);
    __builtin_memcpy(squares[0], even, sizeof squares[0]);
    __builtin_memcpy(squares[1], odd, sizeof squares[1]);
    for (Index j = first; j < COLUMN; j++) {
        s1[j] += sums[j];
        s2[j] += squares[j % 2][j / 2];
    }
}
#else
typedef double NAME(Wide) __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));

/* Add the sums of deviations from `around` and of their squares to s1 and s2, in the lanes from `first` on. */
static void NAME(column)(const STORED *x, Index stride, Index rows, const STORED *ahead, Index first, const double *around,
                         SUM *s1, SUM *s2) {
    NAME(Wide) sum[UNROLL] = {0}, squares[UNROLL] = {0}, shift[UNROLL];
    __builtin_memcpy(shift, around, sizeof shift);
    for (Index r = 0; r < rows; r++, x += stride, ahead += COLUMN) {
        for (Index k = 0; k < COLUMN; k += LINE / (Index)sizeof(STORED)) prefetch_later(ahead + k);
        for (Index k = 0; k < UNROLL; k++) {
            const NAME(Wide) d = LOAD(x + k * COUNT) - shift[k];
            sum[k] += d;
            squares[k] = FMA_double(d, d, squares[k]);
        }
    }
    double sums[2][COLUMN];
    __builtin_memcpy(sums[0], sum, sizeof sums[0]);
    __builtin_memcpy(sums[1], squares, sizeof sums[1]);
    for (Index j = first; j < COLUMN; j++) {
        s1[j] += sums[0][j];
        s2[j] += sums[1][j];
    }
}

point double NAME(shift_of)(STORED x) {
    const double value = VALUE(x);
    return isfinite(value) ? value : 0;
}

/* The mean's distance from `shift`, and m2, from sums around it, in their place. */
point void NAME(finish)(double *s1, double *s2, Index count) {
    const double mean = *s1 / count, m2 = *s2 - *s1 * mean;
    *s1 = mean;
    *s2 = m2 < 0 ? 0 : m2;
}
#endif

/* Of the columns of task t, or of all of it, into job->part: of integers their sums and sums of squares, (tasks, 2,
   columns); of floats a first value, the mean's distance from it, and m2, (tasks, 3, columns). */
static void NAME(task)(const ImageJob *job, Index t) {
    const Index begin = t % job->pieces * job->piece, size = min(job->piece, job->length - begin), width = job->width;
    const STORED *x = (const STORED *)job->x + t / job->pieces * job->length + begin, *last;
    SUM room[2 * IMAGE_COLUMN], *out = (SUM *)job->part + PARTS * t * (job->whole ? 1 : width);
    SUM *s1 = job->whole ? room : out + (PARTS - 2) * width, *s2 = s1 + width;
    const Index rows = size / width, rest = size - rows * width;
    for (Index j = 0; j < 2 * width; j++) s1[j] = 0;
    for (Index row = 0; row < rows; row += job->tile)
        for (Index j = 0; j < width; j += COLUMN) {
            const Index k = min(j, width - COLUMN);
            const STORED *at = x + row * width, *ahead = at + job->tile * (width + j);
            double around[COLUMN];
#ifndef WIDE
            for (Index i = 0; i < COLUMN; i++) around[i] = NAME(shift_of)(x[job->whole ? 0 : k + i]);
#endif
            NAME(column)(at + k, width, min(job->tile, rows - row), ahead, j - k, around, s1 + k, s2 + k);
        }
    last = x + rows * width;
    for (Index j = 0; j < rest; j++) {
#ifdef WIDE
        const SUM value = last[j];
#else
        const SUM value = VALUE(last[j]) - NAME(shift_of)(x[job->whole ? 0 : j]);
#endif
        s1[j] += value;
        s2[j] += value * value;
    }
    if (job->whole) {
        SUM sum = 0, squares = 0;
        for (Index j = 0; j < width; j++) {
            sum += s1[j];
            squares += s2[j];
        }
        out[PARTS - 2] = sum;
        out[PARTS - 1] = squares;
    }
#ifndef WIDE
    if (job->whole) {
        *out = NAME(shift_of)(*x);
        NAME(finish)(out + 1, out + 2, size);
    } else
        for (Index j = 0; j < width; j++) {
            const Index count = rows + (j < rest);
            out[j] = count ? NAME(shift_of)(x[j]) : 0;
            if (count) NAME(finish)(s1 + j, s2 + j, count);
        }
#endif
}

/* Tasks that thread k does: of its own share first. */
static void NAME(work)(const ImageJob *job, Index k) {
    for (Index t; (t = next_task(job->shares, &k)) >= 0;) NAME(task)(job, t);
}

#undef SUM
#undef PARTS
#undef COUNT
#undef UNROLL
#undef COLUMN
