"""Statistics of image data in Numba; `_images` says how they are cut, and has the design. The twin of `images.h`.

A column is a vector of LLVM's own type, as in `vectors`, of 32 lanes for 8 bits and of 16 otherwise. Numba has no
float16 on CPUs: such arrays come as uint16, and a vector's bits are read as LLVM's ``half``.
"""

from __future__ import annotations

import functools
import math
import operator
import platform
import sys
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numba.np.numpy_support import from_dtype

from fastbn.backends import _images, _plan
from fastbn.backends._images import HALF, INTEGERS, lanes
from fastbn.backends._numba import buffers, compiler, prepare, shares, vectors
from fastbn.backends._numba.buffers import Buffer
from fastbn.backends._numba.cache import digest_of
from fastbn.backends._numba.compiler import ZERO, loop, point
from fastbn.backends._numba.prepare import once, one_at_a_time, prepared
from fastbn.backends._numba.shares import ROOM_FOR_SHARES, deal, next_task
from fastbn.backends._numba.vectors import ahead_of, noinline, prefetch_later, scratch, seen_as, team
from fastbn.backends._plan import LONGEST_FOLD

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


# --- vectors --------------------------------------------------------------------------------------------------------


class Column(types.Type):
    """`count` integers of `bits` bits, or float64 where `bits` is 0."""

    def __init__(self, bits, count, signed):
        self.bits, self.count, self.signed = bits, count, signed
        self.llvm = ir.VectorType(ir.IntType(bits) if bits else ir.DoubleType(), count)
        super().__init__(name=f"Column({bits}, {count}, {signed})")


register_model(Column)(
    type(
        "ColumnModel",
        (models.PrimitiveModel,),
        {"__init__": lambda self, manager, column: models.PrimitiveModel.__init__(self, manager, column, column.llvm)},
    )
)


def _column_of(dtype):
    """Integers twice as wide as the dtype's."""
    return Column(2 * dtype.bitwidth, lanes(dtype.bitwidth // 8), dtype.signed)


FLOAT_LANES = 16
FLOATS = Column(0, FLOAT_LANES, True)


def _vector_at(builder, place, llvm):
    """The vector that begins at ``x[i]``, `place` being (x, i)."""
    x, i = place
    return builder.load(builder.bitcast(builder.gep(x, [i]), llvm.as_pointer()), align=1)


def _extended(builder, value, llvm, signed):
    return (builder.sext if signed else builder.zext)(value, llvm)


@intrinsic
def wide(typing, x, i):
    """Column of integers from ``x[i]`` on, twice as wide as they are stored."""
    column = _column_of(x.dtype)
    stored = ir.VectorType(ir.IntType(x.dtype.bitwidth), column.count)

    def build(context, builder, signature, args):
        return _extended(builder, _vector_at(builder, args, stored), column.llvm, column.signed)

    return column(x, types.intp), build


@intrinsic
def lanes_of(typing, x):
    """Lanes of a column of such integers."""

    def build(context, builder, signature, args):
        return _I64(_column_of(x.dtype).count)

    return types.intp(x), build


@intrinsic
def floats(typing, x, i):
    """Column of float64 from ``x[i]`` on; 16-bit values are halves."""
    stored = ir.HalfType() if x.dtype == types.uint16 else _FLOATS[x.dtype]

    def build(context, builder, signature, args):
        value = _vector_at(builder, args, ir.VectorType(stored, FLOATS.count))
        if isinstance(stored, ir.HalfType):
            value = builder.fpext(value, ir.VectorType(ir.FloatType(), FLOATS.count))
        return value if value.type == FLOATS.llvm else builder.fpext(value, FLOATS.llvm)

    return FLOATS(x, types.intp), build


@intrinsic
def real(typing, x, i):
    """``x[i]`` as float64; a 16-bit value is a half."""

    def build(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if x.dtype == types.uint16:
            value = builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value if value.type == ir.DoubleType() else builder.fpext(value, ir.DoubleType())

    return types.float64(x, types.intp), build


@intrinsic
def everywhere(typing, value):
    """Column with the float64 `value` in every lane."""

    def build(context, builder, signature, args):
        undefined = ir.Constant(FLOATS.llvm, ir.Undefined)
        first = builder.insert_element(undefined, args[0], _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, FLOATS.count), [0] * FLOATS.count)
        return builder.shuffle_vector(first, undefined, zeros)

    return FLOATS(types.float64), build


@intrinsic
def finite(typing, column):
    """The column with zeros where it is NaN or infinite."""

    def build(context, builder, signature, args):
        zero = ir.Constant(column.llvm, [0.0] * column.count)
        known = builder.fcmp_ordered("==", builder.fsub(args[0], args[0]), zero)
        return builder.select(known, args[0], zero)

    return column(column), build


@intrinsic
def fused(typing, a, b, c):
    """``a * b + c`` of columns of float64, rounded once."""

    def build(context, builder, signature, args):
        name = f"llvm.fma.v{a.count}f64"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(a.llvm, [a.llvm] * 3), name)
        return builder.call(function, args)

    return a(a, a, a), build


@intrinsic
def nothing(typing, column):
    """Zeros like `column`."""

    def build(context, builder, signature, args):
        return ir.Constant(column.llvm, None)

    return column(column), build


@intrinsic
def half_of(typing, column, odd):
    """Even or odd lanes of a column of unsigned integers, twice as wide."""
    halves = Column(2 * column.bits, column.count // 2, False)

    def build(context, builder, signature, args):
        value = builder.bitcast(args[0], halves.llvm)
        bits = [column.bits] * halves.count
        if odd.literal_value:
            return builder.lshr(value, ir.Constant(halves.llvm, bits))
        return builder.and_(value, ir.Constant(halves.llvm, [(1 << column.bits) - 1] * halves.count))

    return (halves(column, odd), build) if isinstance(odd, types.IntegerLiteral) else None


@intrinsic
def in_turn(typing, even, odd):
    """Column of the lanes of two in turn."""
    both = Column(even.bits, 2 * even.count, even.signed)

    def build(context, builder, signature, args):
        order = [lane // 2 + lane % 2 * even.count for lane in range(both.count)]
        return builder.shuffle_vector(*args, ir.Constant(ir.VectorType(_I32, both.count), order))

    return both(even, odd), build


@intrinsic
def add_to(typing, sums, j, column, first):
    """``sums[j : j + count] += column``, in the lanes from `first` on."""

    def build(context, builder, signature, args):
        target, index, value, start = args
        kind = ir.DoubleType() if column.bits == 0 else _I64
        llvm = ir.VectorType(kind, column.count)
        if column.bits and column.bits < 64:
            value = _extended(builder, value, llvm, column.signed)
        lanes = ir.Constant(ir.VectorType(_I64, column.count), list(range(column.count)))
        undefined = ir.Constant(lanes.type, ir.Undefined)
        bound = builder.shuffle_vector(
            builder.insert_element(undefined, start, _I32(0)),
            undefined,
            ir.Constant(ir.VectorType(_I32, column.count), [0] * column.count),
        )
        value = builder.select(builder.icmp_signed(">=", lanes, bound), value, ir.Constant(llvm, None))
        address = builder.bitcast(builder.gep(target, [index]), llvm.as_pointer())
        before = builder.load(address, align=8)
        builder.store((builder.add if column.bits else builder.fadd)(before, value), address, align=8)
        return context.get_dummy_value()

    return types.void(sums, types.intp, column, types.intp), build


def _arithmetic(function, integer, floating):
    @type_callable(function)
    def typer(context):
        return lambda a, b: a if isinstance(a, Column) and a == b else None

    @lower_builtin(function, Column, Column)
    def build(context, builder, signature, args):
        return getattr(builder, integer if signature.return_type.bits else floating)(*args)


_arithmetic(operator.add, "add", "fadd")
_arithmetic(operator.sub, "sub", "fsub")
_arithmetic(operator.mul, "mul", "fmul")


# --- columns ----------------------------------------------------------------------------------------------------------


@loop
def integer_column(x, at, stride, rows, ahead, step, first, s1, s2, j):
    """Add the sums and sums of squares of a column of at most `TILE` rows to ``s1[j:]`` and ``s2[j:]``."""
    noinline()
    total = nothing(wide(x, at))
    even, odd = nothing(half_of(total, 0)), nothing(half_of(total, 1))
    for _ in range(rows):
        prefetch_later(x, ahead)
        value = wide(x, at)
        square = value * value
        total = total + value
        even = even + half_of(square, 0)
        odd = odd + half_of(square, 1)
        at += stride
        ahead += step
    add_to(s1, j, total, first)
    add_to(s2, j, in_turn(even, odd), first)


@loop
def float_column(x, at, stride, rows, ahead, step, first, shift, s1, s2, j):
    """Add the sums of deviations from `shift`, and of their squares, to ``s1[j:]`` and ``s2[j:]``."""
    noinline()
    total = nothing(shift)
    squares = nothing(shift)
    for _ in range(rows):
        prefetch_later(x, ahead)
        value = floats(x, at) - shift
        total = total + value
        squares = fused(value, value, squares)
        at += stride
        ahead += step
    add_to(s1, j, total, first)
    add_to(s2, j, squares, first)


# --- tasks ------------------------------------------------------------------------------------------------------------


@point
def piece_of(t, length, pieces, piece):
    """(first value, number of values) of task t."""
    column = t % pieces * piece
    return t // pieces * length + column, min(piece, length - column)


@loop
def integer_task(x, t, length, pieces, piece, width, tile, whole, part):
    """Sums and sums of squares of the columns of task t, or of all of it, into `part` (tasks, 2, columns)."""
    noinline()
    vector = lanes_of(x)
    start, size = piece_of(t, length, pieces, piece)
    out = ahead_of(part, 2 * t * (1 if whole else width))
    s1 = scratch(part, LONGEST_FOLD) if whole else out
    s2 = ahead_of(s1, width)
    for j in range(2 * width):
        s1[j] = 0
    rows = size // width
    for row in range(0, rows, tile):
        at = start + row * width
        ahead = at + tile * width
        for j in range(0, width, vector):
            k = min(j, width - vector)
            height = min(tile, rows - row)
            integer_column(x, at + k, width, height, ahead + j * tile, vector, j - k, s1, s2, k)
    for j in range(size - rows * width):
        value = np.int64(x[start + rows * width + j])
        s1[j] += value
        s2[j] += value * value
    if whole:
        total, squares = np.int64(0), np.int64(0)
        for j in range(width):
            total += s1[j]
            squares += s2[j]
        out[0], out[1] = total, squares


@loop
def float_task(x, t, length, pieces, piece, width, tile, whole, part):
    """First value, the mean's distance from it, and m2, of columns or of all, into `part` (tasks, 3, columns)."""
    noinline()
    vector = FLOAT_LANES
    start, size = piece_of(t, length, pieces, piece)
    out = ahead_of(part, 3 * t * (1 if whole else width))
    s1 = scratch(part, LONGEST_FOLD) if whole else ahead_of(out, width)
    s2 = ahead_of(s1, width)
    for j in range(2 * width):
        s1[j] = 0.0
    rows = size // width
    for row in range(0, rows, tile):
        at = start + row * width
        ahead = at + tile * width
        for j in range(0, width, vector):
            k = min(j, width - vector)
            shift = finite(everywhere(real(x, start)) if whole else floats(x, start + k))
            height = min(tile, rows - row)
            float_column(x, at + k, width, height, ahead + j * tile, vector, j - k, shift, s1, s2, k)
    rest = size - rows * width
    for j in range(rest):
        d = real(x, start + rows * width + j) - shift_of(x, start if whole else start + j)
        s1[j] += d
        s2[j] += d * d
    if whole:
        total, squares = 0.0, 0.0
        for j in range(width):
            total += s1[j]
            squares += s2[j]
        out[0] = shift_of(x, start)
        out[1], out[2] = finished(total, squares, size)
    else:
        for j in range(width):
            count = rows + (1 if j < rest else 0)
            out[j] = shift_of(x, start + j) if count else 0.0
            if count:
                s1[j], s2[j] = finished(s1[j], s2[j], count)


@point
def shift_of(x, i):
    """``x[i]``, or 0 if it is not finite."""
    value = real(x, i)
    return value if math.isfinite(value) else 0.0


@point
def finished(total, squares, count):
    """Mean and m2 from sums."""
    mean = total / count
    m2 = squares - total * mean
    return mean, 0.0 if m2 < 0.0 else m2


# --- kernels ----------------------------------------------------------------------------------------------------------


def _kernel_over(task):
    @point
    def work(shares, k, x, length, pieces, piece, width, tile, whole, part):
        """Tasks that thread k does: of its own share first."""
        t, at = next_task(shares, k)
        while t >= 0:
            task(x, t, length, pieces, piece, width, tile, whole, part)
            t, at = next_task(shares, at)

    def kernel(threads, tasks, length, pieces, piece, width, tile, whole, x, part):
        shares = seen_as(scratch(part, ROOM_FOR_SHARES), np.intp)
        deal(shares, tasks, threads)
        if threads == 1:
            work(shares, ZERO, x, length, pieces, piece, width, tile, whole, part)
        else:
            before = team(threads)
            for k in prange(threads):
                work(shares, np.intp(k), x, length, pieces, piece, width, tile, whole, part)
            team(before)

    return kernel


# All that kernels are compiled from.
SOURCES = (sys.modules[__name__], vectors, shares, compiler, prepare, buffers, _plan, _images)
_SOURCE = digest_of(SOURCES)


@once
def _compiled(dtype: np.dtype[Any]) -> Any:
    """The kernel for this dtype: from the compile cache, or compiled now and put there if it can be written."""
    real = types.uint16 if dtype == HALF else from_dtype(dtype)
    integers = dtype in INTEGERS
    task, part = (integer_task, types.int64) if integers else (float_task, types.float64)
    signature = types.void(*(types.intp,) * 7, types.boolean, Buffer(real), Buffer(part))
    name = f"{'integers' if integers else 'floats'}-{dtype}"
    function = prepared(_kernel_over(task), name, _SOURCE, signature, parallel=True)
    return one_at_a_time(function, lambda arguments: arguments[0])


@functools.cache
def _has_half() -> bool:
    """Whether the CPU converts float16; LLVM calls a function that need not be there otherwise."""
    return "86" not in platform.machine() or bool(llvmlite.binding.get_host_cpu_features().get("f16c"))


def kernel_of(dtype: np.dtype[Any]) -> Any:
    """The kernel for arrays of a dtype, which takes a `Cut` and leaves what the tasks find; None if there is none."""
    return _compiled(dtype) if dtype != HALF or _has_half() else None
