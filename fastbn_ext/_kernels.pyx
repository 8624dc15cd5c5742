# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The compiled kernels: a call's arguments become a `Job`, whose phases run on OpenMP threads without the GIL.

What a task computes is in kernels.h, once for each value type and instruction set; how a tensor is cut, and the design,
are those of fastbn/backends/_plan.py and numba_.py. Arrays are reached through the buffer protocol, so that no NumPy
headers are needed to build this. Nothing is checked here: fastbn/backends/cython_.py is the only caller.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, Py_buffer, PyBuffer_Release, PyObject_GetBuffer
from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdint cimport uint16_t

cdef extern from "dispatch.h" nogil:
    enum: FUSED, REDUCE, APPLY, REDUCE_COLUMNS, APPLY_COLUMNS
    enum: NUM_INSTRUCTION_SETS
    const char *instruction_sets[]
    ctypedef struct Job:
        Py_ssize_t n, channels, s, run, columns, rows, block, blocks, ahead
        int streaming, training
        double eps, slope
        const void *x
        const void *residual
        const void *dy
        void *y
        void *dx
        void *dresidual
        void *coef
        uint16_t *signs
        double *stats
        double *affine
        double *grads
        double *part
    ctypedef struct Kernels:
        Py_ssize_t lanes
        void (*prepare)(const Job *, int, int) noexcept nogil
        void (*task)(const Job *, int, int, Py_ssize_t) noexcept nogil
        void (*last_row)(const Job *, int, int) noexcept nogil
        void (*finish_channel)(const Job *, Py_ssize_t, int, int) noexcept nogil
    const Kernels *kernels_of(int index, int itemsize)
    int has_instruction_set(int index)
    Py_ssize_t tasks_of(const Job *, int phase)
    int can_stream(const Job *)
    ctypedef struct ImageJob:
        Py_ssize_t length, pieces, piece, width, tile
        int whole
        const void *x
        void *part
    ctypedef void (*ImageTask)(const ImageJob *, Py_ssize_t) noexcept nogil
    ImageTask image_task_of(int index, int dtype)

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define OPENMP 1
    #else
    #define OPENMP 0
    #endif
    """
    const int OPENMP

openmp = bool(OPENMP)

cdef int instruction_set = 0
while not has_instruction_set(instruction_set):
    instruction_set += 1


def get_instruction_set():
    """Name of the instruction set in use."""
    return instruction_sets[instruction_set].decode()


def available_instruction_sets():
    """Names of those that this CPU has, best first."""
    return [instruction_sets[i].decode() for i in range(NUM_INSTRUCTION_SETS) if has_instruction_set(i)]


def set_instruction_set(str name):
    """Use another instruction set that this CPU has."""
    global instruction_set
    for i in range(NUM_INSTRUCTION_SETS):
        if instruction_sets[i].decode() == name and has_instruction_set(i):
            instruction_set = i
            return
    raise ValueError(f"instruction set must be one of {', '.join(available_instruction_sets())}; got {name!r}")


def lanes(int itemsize):
    """Values in a vector."""
    return kernels_of(instruction_set, itemsize).lanes


cdef void *data(object array, int flags=PyBUF_SIMPLE) except? NULL:
    """Address of a contiguous array's values, NULL if it is empty. The caller keeps the array alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, flags)
    cdef void *address = view.buf if view.len else NULL
    PyBuffer_Release(&view)
    return address


def kernel(
    bint backward, bint reduce, bint apply,
    int threads, bint split, bint streaming, Py_ssize_t run, Py_ssize_t columns, Py_ssize_t rows, Py_ssize_t block,
    Py_ssize_t blocks, Py_ssize_t ahead, Py_ssize_t n, Py_ssize_t channels, Py_ssize_t s, bint training, double eps,
    double slope, x, residual, dy, y, dx, dresidual, coef, signs, stats, affine, grads, part,
):
    """Reduction (statistics, or sums of gradients) and output, or one of them; `affine` has weight and bias before.

    Sums of gradients alone become the first two rows of `grads`; the output alone takes A and B from the last two.
    """
    cdef Job job
    job.n, job.channels, job.s = n, channels, s
    job.run, job.columns, job.rows, job.block, job.blocks, job.ahead = run, columns, rows, block, blocks, ahead
    job.training, job.eps, job.slope = training, eps, slope
    job.x, job.residual, job.dy = data(x), data(residual), data(dy)
    job.y, job.dx, job.dresidual = data(y, PyBUF_WRITABLE), data(dx, PyBUF_WRITABLE), data(dresidual, PyBUF_WRITABLE)
    job.coef, job.signs = data(coef), <uint16_t *>data(signs)
    job.stats, job.affine, job.grads = <double *>data(stats), <double *>data(affine), <double *>data(grads)
    job.part = <double *>data(part)
    job.streaming = streaming and can_stream(&job)
    cdef const Kernels *kernels = kernels_of(instruction_set, x.itemsize)
    cdef bint last = columns and rows * columns < n * channels * s, fused = reduce and apply and not split
    cdef Py_ssize_t t, tasks
    cdef int step, phase
    with nogil:
        if backward and not reduce:
            kernels.prepare(&job, backward, REDUCE)  # for the output too
        for step in range(0 if reduce else 1, 2 if apply and not fused else 1):
            if step == 0:
                phase = FUSED if fused else (REDUCE_COLUMNS if columns else REDUCE)
            else:
                phase = APPLY_COLUMNS if columns else APPLY
            if backward or step:
                kernels.prepare(&job, backward, phase)
            tasks = tasks_of(&job, phase)
            if threads == 1:
                for t in range(tasks):
                    kernels.task(&job, backward, phase, t)
            else:
                for t in prange(tasks, num_threads=threads, schedule="static"):
                    kernels.task(&job, backward, phase, t)
            if last:
                kernels.last_row(&job, backward, phase)
            if step == 0 and not fused:
                for t in range(channels):
                    kernels.finish_channel(&job, t, backward, apply)


cdef inline double get(const void *values, Py_ssize_t c, int itemsize) noexcept nogil:
    """A value of a vector of float32 or float64."""
    return (<const double *>values)[c] if itemsize == 8 else (<const float *>values)[c]


cdef inline void put(void *values, Py_ssize_t c, int itemsize, double value) noexcept nogil:
    if itemsize == 8:
        (<double *>values)[c] = value
    else:
        (<float *>values)[c] = <float>value


def fold(running_mean, running_var, weight, bias, double eps, stats, affine, Py_ssize_t channels, int itemsize):
    """Inference: statistics and one scale and shift a channel from the running ones."""
    cdef const void *means = data(running_mean)
    cdef const void *variances = data(running_var)
    cdef const void *weights = data(weight)
    cdef const void *biases = data(bias)
    cdef double *stat = <double *>data(stats, PyBUF_WRITABLE)
    cdef double *coefficient = <double *>data(affine, PyBUF_WRITABLE)
    cdef double mean, var, invstd, scale
    cdef Py_ssize_t c
    for c in range(channels):
        mean, var = get(means, c, itemsize), get(variances, c, itemsize)
        invstd = 1 / sqrt(var + eps)
        scale = (get(weights, c, itemsize) if weights else 1) * invstd
        stat[c], stat[channels + c], stat[2 * channels + c] = mean, var, invstd
        coefficient[c], coefficient[channels + c] = 0, scale
        coefficient[2 * channels + c] = (get(biases, c, itemsize) if biases else 0) - mean * scale


def update_running(running_mean, running_var, stats, Py_ssize_t count, double factor, Py_ssize_t channels, int itemsize):
    """Move the running statistics towards the batch's, the variance unbiased, by `factor`."""
    cdef void *means = data(running_mean, PyBUF_WRITABLE)
    cdef void *variances = data(running_var, PyBUF_WRITABLE)
    cdef const double *stat = <const double *>data(stats)
    cdef double unbiased = <double>count / (count - 1)
    cdef Py_ssize_t c
    for c in range(channels):
        put(means, c, itemsize, (1 - factor) * get(means, c, itemsize) + factor * stat[c])
        put(variances, c, itemsize,
            (1 - factor) * get(variances, c, itemsize) + factor * (unbiased * stat[channels + c]))


def image_sums(
    int dtype, int threads, Py_ssize_t tasks, Py_ssize_t length, Py_ssize_t pieces, Py_ssize_t piece, Py_ssize_t width,
    Py_ssize_t tile, bint whole, x, part,
):
    """Statistics of every task: see images.h."""
    cdef ImageJob job
    job.length, job.pieces, job.piece, job.width, job.tile, job.whole = length, pieces, piece, width, tile, whole
    job.x, job.part = data(x), data(part, PyBUF_WRITABLE)
    cdef ImageTask task = image_task_of(instruction_set, dtype)
    cdef Py_ssize_t t
    with nogil:
        if threads == 1:
            for t in range(tasks):
                task(&job, t)
        else:
            for t in prange(tasks, num_threads=threads, schedule="static"):
                task(&job, t)
