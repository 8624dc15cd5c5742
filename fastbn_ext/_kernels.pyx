# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The compiled kernels: a call's arguments become a `Job`, whose phases run on OpenMP threads without the GIL.

What a task computes is in kernels.h, once for each value type and instruction set; how a tensor is cut, and the design,
are those of fastbn/backends/_plan.py and _numba. No more of an array is looked at than where its values lie, so that
no NumPy headers are needed to build this. Nothing is checked here: fastbn/backends/cython_.py is the only caller.
"""

from cython.parallel cimport prange
from libc.stdint cimport uint16_t

cdef extern from "dispatch.h" nogil:
    enum: FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS
    enum: ROOM
    enum: NUM_INSTRUCTION_SETS
    const char *instruction_sets[]
    ctypedef struct Shares:
        pass
    ctypedef struct Job:
        Py_ssize_t n, channels, s, threads, split, streaming, run, columns, rows, block, blocks, ahead, turns
        int training, wide
        double eps, slope, factor
        const void *x
        const void *residual
        const void *dy
        void *y
        void *dx
        void *dresidual
        uint16_t *signs
        void *weight
        void *bias
        void *running_mean
        void *running_var
        void *coef
        double *stats
        double *affine
        double *grads
        double *part
        Py_ssize_t *writing
        Shares *shares
    ctypedef struct Kernels:
        Py_ssize_t lanes
        void (*prepare)(const Job *, int, int) noexcept nogil
        void (*work)(const Job *, int, int, Py_ssize_t) noexcept nogil
        void (*last_row)(const Job *, int, int) noexcept nogil
        void (*finish_channels)(const Job *, Py_ssize_t, Py_ssize_t, int, int) noexcept nogil
    const Kernels *kernels_of(int index, int itemsize)
    int has_instruction_set(int index)
    int best_instruction_set()
    int first_instruction_set()
    Py_ssize_t tasks_of(const Job *, int phase)
    int can_stream(const Job *)
    void fold(const Job *)
    Py_ssize_t rest_of(const Job *)
    void deal(Shares *, Py_ssize_t tasks, Py_ssize_t threads)
    ctypedef struct ImageJob:
        Py_ssize_t length, pieces, piece, width, tile
        int whole
        const void *x
        void *part
        Shares *shares
    ctypedef void (*ImageWork)(const ImageJob *, Py_ssize_t) noexcept nogil
    ImageWork image_work_of(int index, int dtype)

cdef extern from *:
    """
    typedef struct { PyObject_HEAD char *data; } Array;
    #ifdef _OPENMP
    #include <omp.h>
    #define OPENMP 1
    #else
    #define OPENMP 0
    #endif
    """
    ctypedef struct Array:  # the beginning of a NumPy array, which its binary interface says
        char *data
    const int OPENMP

openmp = bool(OPENMP)

cdef int instruction_set = first_instruction_set()
cdef int image_instruction_set = best_instruction_set()


def get_instruction_set():
    """Name of the instruction set in use."""
    return instruction_sets[instruction_set].decode()


def available_instruction_sets():
    """Names of those that this CPU has, best first."""
    return [instruction_sets[i].decode() for i in range(NUM_INSTRUCTION_SETS) if has_instruction_set(i)]


def set_instruction_set(str name):
    """Use another instruction set that this CPU has, for everything."""
    global instruction_set, image_instruction_set
    for i in range(NUM_INSTRUCTION_SETS):
        if instruction_sets[i].decode() == name and has_instruction_set(i):
            instruction_set = image_instruction_set = i
            return
    raise ValueError(f"instruction set must be one of {', '.join(available_instruction_sets())}; got {name!r}")


def lanes(int itemsize):
    """Values in a vector."""
    return kernels_of(instruction_set, itemsize).lanes


cdef void *data(object array):
    """Address of an array's values, which have to be dense; NULL for None. The caller keeps the array alive."""
    return NULL if array is None else (<Array *>array).data


def kernel(
    bint backward, bint reduce, bint apply, plan, bint training, bint wide, double eps, double slope, double factor,
    x, residual, dy, y, dx, dresidual, signs, weight, bias, running_mean, running_var, norm, grads, part,
):
    """Reduction (statistics, or sums of gradients) and output, or one of them.

    A backward pass writes the gradients of weight and bias into `weight` and `bias`, and A and B into the last two rows of
    `grads`. Sums of gradients alone become its first two; the output alone takes A and B from it, or `norm` from the
    running statistics if they are given.
    """
    cdef Job job
    cdef const Py_ssize_t *p = <const Py_ssize_t *>data(plan)
    job.n, job.channels, job.s, job.threads, job.split, job.streaming = p[0], p[1], p[2], p[3], p[4], p[5]
    job.run, job.columns, job.rows, job.block, job.blocks, job.ahead, job.turns = p[6], p[7], p[8], p[9], p[10], p[11], p[12]
    job.training, job.wide, job.eps, job.slope, job.factor = training, wide, eps, slope, factor
    job.x, job.residual, job.dy, job.signs = data(x), data(residual), data(dy), <uint16_t *>data(signs)
    job.y, job.dx, job.dresidual = data(y), data(dx), data(dresidual)
    job.weight, job.bias, job.running_mean, job.running_var = data(weight), data(bias), data(running_mean), data(running_var)
    job.stats, job.grads = <double *>data(norm), <double *>data(grads)
    job.affine = job.stats + 3 * job.channels
    cdef double room[ROOM]
    job.part = &room[0] if part is None else <double *>data(part)
    job.coef = job.part + 2 * (job.blocks + 1) * (job.columns or job.channels)
    job.streaming = job.streaming and can_stream(&job)
    cdef Py_ssize_t writing = 0
    job.writing = &writing
    cdef Shares shares
    job.shares = &shares
    cdef const Kernels *kernels = kernels_of(instruction_set, x.itemsize)
    cdef bint last = job.columns != 0 and rest_of(&job) != 0
    cdef bint fused = reduce and apply and not job.split
    cdef Py_ssize_t k
    cdef int step, phase
    with nogil:
        if backward and not reduce:
            kernels.prepare(&job, backward, REDUCE)  # for the output too
        if not reduce and job.running_mean:
            fold(&job)
        for step in range(0 if reduce else 1, 2 if apply and not fused else 1):
            if step == 0:
                phase = FUSED if fused else (REDUCE_COLUMNS if job.columns else REDUCE)
            else:
                phase = APPLY_COLUMNS if job.columns else APPLY
            if backward or step:
                kernels.prepare(&job, backward, phase)
            deal(&shares, tasks_of(&job, phase), job.threads)
            if job.threads == 1:
                kernels.work(&job, backward, phase, 0)
            else:
                for k in prange(job.threads, num_threads=job.threads, schedule="static"):
                    kernels.work(&job, backward, phase, k)
            if last:
                kernels.last_row(&job, backward, phase)
            if step == 0 and not fused:
                kernels.finish_channels(&job, 0, job.channels, backward, apply)


def image_sums(
    int dtype, int threads, Py_ssize_t tasks, Py_ssize_t length, Py_ssize_t pieces, Py_ssize_t piece, Py_ssize_t width,
    Py_ssize_t tile, bint whole, x, part,
):
    """Statistics of every task: see images.h."""
    cdef ImageJob job
    job.length, job.pieces, job.piece, job.width, job.tile, job.whole = length, pieces, piece, width, tile, whole
    job.x, job.part = data(x), data(part)
    cdef ImageWork work = image_work_of(image_instruction_set, dtype)
    cdef Shares shares
    job.shares = &shares
    cdef Py_ssize_t k
    with nogil:
        deal(&shares, tasks, threads)
        if threads == 1:
            work(&job, 0)
        else:
            for k in prange(threads, num_threads=threads, schedule="static"):
                work(&job, k)
