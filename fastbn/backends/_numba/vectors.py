"""Vectors of 16 values for Numba kernels: just the operations that the kernels need, as LLVM's own vector type.

Why not leave it to the auto-vectoriser: it would neither stream stores past the cache (a scalar non-temporal store
keeps it from vectorising at all), nor use 512-bit registers on Intel, nor index without Numba's wraparound of negative
indices, nor promise one order of summation. LLVM splits a `<16 x float>` into whatever registers the CPU has.

Memory is reached by pointers, which cost the compiler far less than arrays do: a function of ten arrays has seventy
arguments. Indices are not checked. `V` stands for a vector of a pointer's dtype, `W` for one of float64, `M` for one of
booleans.
"""

from __future__ import annotations

import operator
import platform

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from fastbn.backends._numba.compiler import register_bits
from fastbn.backends._plan import LANES

X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_ELEMENT = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.boolean: ir.IntType(1)}
_SUFFIX = {types.float32: f"v{LANES}f32", types.float64: f"v{LANES}f64"}


class Vector(types.Type):
    """`LANES` values of one Numba scalar type."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.llvm = ir.VectorType(_ELEMENT[dtype], LANES)
        super().__init__(name=f"Vector({dtype})")


register_model(Vector)(
    type(
        "VectorModel",
        (models.PrimitiveModel,),
        {"__init__": lambda self, manager, vector: models.PrimitiveModel.__init__(self, manager, vector, vector.llvm)},
    )
)
BOOLEANS = Vector(types.boolean)


def _vector_pointer(builder, pointer, index, llvm):
    """Address of ``pointer[index]`` as that of a vector."""
    return builder.bitcast(builder.gep(pointer, [index]), llvm.as_pointer())


def _call(builder, name, result, args):
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def _lanes(values):
    return ir.Constant(ir.VectorType(_I32, len(values)), list(values))


def _splat(builder, vector, scalar):
    undefined = ir.Constant(vector.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, _I32(0))
    return builder.shuffle_vector(first, undefined, _lanes([0] * LANES))


@intrinsic
def present(typing, x):
    """Whether a pointer is not null."""

    def build(context, builder, signature, args):
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(x), build


@intrinsic
def same(typing, x, y):
    """Whether two pointers are equal."""

    def build(context, builder, signature, args):
        return builder.icmp_unsigned("==", *args)

    return types.boolean(x, y), build


@intrinsic
def ahead_of(typing, x, i):
    """Pointer to ``x[i]``."""

    def build(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return x(x, types.intp), build


@intrinsic
def seen_as(typing, x, dtype):
    """The pointer as one to values of another dtype, or to values like those of another pointer."""
    result = types.CPointer(dtype.dtype if isinstance(dtype, types.CPointer) else dtype.instance_type)

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(result))

    return result(x, dtype), build


@intrinsic
def given(typing, x, condition):
    """The pointer, or null unless `condition`, which may be known when this is compiled."""

    def build(context, builder, signature, args):
        return builder.select(args[1], args[0], ir.Constant(args[0].type, None))

    return x(x, types.boolean), build


@intrinsic
def alias(typing, x):
    """The same pointer, of which the compiler does not know it: what is loaded through both is loaded twice."""

    def build(context, builder, signature, args):
        hidden = ir.InlineAsm(ir.FunctionType(args[0].type, [args[0].type]), "", "=r,0")
        return builder.call(hidden, [args[0]])

    return x(x), build


@intrinsic(prefer_literal=True)
def scratch(typing, x, count):
    """Pointer to `count` values like those of `x` on the stack, on a 64-byte boundary."""
    size = count.literal_value

    def build(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(args[0].type.pointee, size))
            room.align = 64
        return builder.bitcast(room, args[0].type)

    return x(x, count), build


@intrinsic
def team(typing, threads):
    """Let the calling thread's parallel loops use so many threads; returns how many they used before.

    Numba's own `set_num_threads` is a ctypes function inside a kernel, which could not be cached on disk then.
    """

    def build(context, builder, signature, args):
        get = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I64, []), "get_num_threads")
        set_ = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [_I32]), "set_num_threads")
        before = builder.sext(builder.trunc(builder.call(get, []), _I32), _I64)
        builder.call(set_, [builder.trunc(args[0], _I32)])
        return before

    return types.intp(types.intp), build


@intrinsic
def noinline(typing):
    """Keep LLVM from inlining the function that calls this: compiled once, not again in every caller."""

    def build(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def rolled(typing):
    """Keep LLVM from unrolling the loop that calls this: of few rounds, known only when it runs, it would make two."""

    def build(context, builder, signature, args):
        nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
        builder.call(nothing, [], attrs=("convergent",))
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def load(typing, x, i):
    """V: ``x[i : i + 16]``."""
    vector = Vector(x.dtype)

    def build(context, builder, signature, args):
        return builder.load(_vector_pointer(builder, args[0], args[1], vector.llvm), align=x.dtype.bitwidth // 8)

    return vector(x, types.intp), build


def _store(builder, args, kind):
    pointer, index, value = args
    builder.store(value, _vector_pointer(builder, pointer, index, kind.llvm), align=kind.dtype.bitwidth // 8)


def _stream(context, builder, args, kind):
    """One store for each register, in the order of memory: LLVM would write the second half of a line first."""
    pointer, index, value = args
    width = register_bits(context.codegen()) // kind.dtype.bitwidth
    vector = ir.VectorType(kind.llvm.element, width)
    for first in range(0, LANES, width):
        part = builder.shuffle_vector(value, value, _lanes(range(first, first + width)))
        address = _vector_pointer(builder, pointer, builder.add(index, _I64(first)), vector)
        store = builder.store(part, address, align=width * kind.dtype.bitwidth // 8)
        store.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))


@intrinsic
def store(typing, x, i, value):
    """``x[i : i + 16] = value``."""

    def build(context, builder, signature, args):
        _store(builder, args, value)
        return context.get_dummy_value()

    return types.void(x, types.intp, value), build


@intrinsic
def store_where(typing, x, i, mask, value):
    """As `store`, in the lanes where `mask` is true: other bytes are not touched."""

    def build(context, builder, signature, args):
        address = _vector_pointer(builder, args[0], args[1], value.llvm)
        function = ir.FunctionType(ir.VoidType(), [value.llvm, address.type, _I32, mask.llvm])
        name = f"llvm.masked.store.{_SUFFIX[value.dtype]}.p0"
        llvm = cgutils.get_or_insert_function(builder.module, function, name)
        builder.call(llvm, [args[3], address, _I32(value.dtype.bitwidth // 8), args[2]])
        return context.get_dummy_value()

    return types.void(x, types.intp, mask, value), build


@intrinsic
def load_where(typing, x, i, mask):
    """As `load`, in the lanes where `mask` is true, and zero in the others, which are not read."""
    vector = Vector(x.dtype)

    def build(context, builder, signature, args):
        address = _vector_pointer(builder, args[0], args[1], vector.llvm)
        function = ir.FunctionType(vector.llvm, [address.type, _I32, mask.llvm, vector.llvm])
        name = f"llvm.masked.load.{_SUFFIX[x.dtype]}.p0"
        llvm = cgutils.get_or_insert_function(builder.module, function, name)
        zero = ir.Constant(vector.llvm, None)
        return builder.call(llvm, [address, _I32(x.dtype.bitwidth // 8), args[2], zero])

    return vector(x, types.intp, mask), build


@intrinsic
def put(typing, x, i, value, streaming):
    """As `store`; if `streaming`, past the cache: ``x[i]`` lies on a 64-byte boundary then; a `fence` must follow."""

    def build(context, builder, signature, args):
        with builder.if_else(args[3]) as (then, otherwise):
            with then:
                _stream(context, builder, args[:3], value)
            with otherwise:
                _store(builder, args[:3], value)
        return context.get_dummy_value()

    return types.void(x, types.intp, value, types.boolean), build


def _prefetching(x, writing, locality, count=1):
    line = 512 // x.dtype.bitwidth

    def build(context, builder, signature, args):
        for first in range(0, count, line):
            place = builder.gep(args[0], [builder.add(args[1], _I64(first))])
            address = builder.bitcast(place, ir.IntType(8).as_pointer())
            function = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
            llvm = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
            builder.call(llvm, [address, _I32(writing), _I32(locality), _I32(1)])
        return context.get_dummy_value()

    return types.void(x, types.intp), build


@intrinsic
def prefetch(typing, x, i):
    """Ask for the lines of ``x[i : i + 16]``, which need not exist, in all caches: of float64 they are two."""
    return _prefetching(x, 0, 3, LANES)


@intrinsic
def prefetch_later(typing, x, i):
    """As `prefetch`, but not in the nearest cache."""
    return _prefetching(x, 0, 2, LANES)


@intrinsic
def prefetch_part(typing, x, i):
    """Prefetch the line of ``x[i]`` for a store to a part of it, unless it begins there; `i` may be the end of x."""
    make, build = _prefetching(x, 1, 3)

    def build_unless(context, builder, signature, args):
        address = builder.ptrtoint(builder.gep(args[0], [args[1]]), _I64)
        with builder.if_then(builder.icmp_signed("!=", builder.and_(address, _I64(63)), _I64(0))):
            build(context, builder, signature, args)
        return context.get_dummy_value()

    return make, build_unless


@intrinsic
def fence(typing):
    """Make streamed stores visible to other threads; LLVM does not do it by itself."""

    def build(context, builder, signature, args):
        if X86:  # the fence below would hold up loads too
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, nothing, "llvm.x86.sse.sfence"), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def taken(typing, flag):
    """Set a flag that threads share; whether it was not set before."""

    def build(context, builder, signature, args):
        before = builder.atomic_rmw("xchg", args[0], _I64(1), "acquire")
        return builder.icmp_signed("==", before, _I64(0))

    return types.boolean(flag), build


@intrinsic
def freed(typing, flag):
    """Clear a flag that threads share."""

    def build(context, builder, signature, args):
        builder.store_atomic(_I64(0), args[0], "release", 8)
        return context.get_dummy_value()

    return types.void(flag), build


@intrinsic
def counted(typing, x, i):
    """``x[i]``, an integer that threads share, which is one more from now on."""

    def build(context, builder, signature, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), _I64(1), "monotonic")

    return types.intp(x, types.intp), build


@intrinsic
def relax(typing):
    """Wait a moment for another thread."""

    def build(context, builder, signature, args):
        if X86:
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, nothing, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def to_line(typing, x, i):
    """Number of values from ``x[i]`` to the next 64-byte boundary."""
    size = x.dtype.bitwidth // 8

    def build(context, builder, signature, args):
        address = builder.ptrtoint(builder.gep(args[0], [args[1]]), _I64)
        return builder.udiv(builder.and_(builder.neg(address), _I64(63)), _I64(size))

    return types.intp(x, types.intp), build


@intrinsic
def splat(typing, value):
    """V with `value` in every lane."""
    vector = Vector(value)

    def build(context, builder, signature, args):
        return _splat(builder, vector, args[0])

    return vector(value), build


@intrinsic
def rounded(typing, x, value):
    """The float64 `value` as a scalar of x's dtype."""

    def build(context, builder, signature, args):
        return args[1] if x.dtype == types.float64 else builder.fptrunc(args[1], ir.FloatType())

    return x.dtype(x, types.float64), build


@intrinsic
def like(typing, vector, value):
    """V like `vector` with the float64 `value` in every lane."""

    def build(context, builder, signature, args):
        scalar = args[1] if vector.dtype == types.float64 else builder.fptrunc(args[1], ir.FloatType())
        return _splat(builder, vector, scalar)

    return vector(vector, types.float64), build


@intrinsic
def widen(typing, value):
    """W of a V."""
    wide = Vector(types.float64)

    def build(context, builder, signature, args):
        return args[0] if value == wide else builder.fpext(args[0], wide.llvm)

    return wide(value), build


@intrinsic
def fma(typing, a, b, c):
    """``a * b + c``, rounded once; for vectors and for scalars."""
    scalar = not isinstance(a, Vector)
    name = "llvm.fma." + (_SUFFIX[a.dtype] if not scalar else f"f{a.bitwidth}")

    def build(context, builder, signature, args):
        return _call(builder, name, args[0].type, args)

    return a(a, a, a), build


@intrinsic
def ones(typing):
    """W with 1.0 in every lane, of which the compiler does not know that a product with it is nothing to compute."""
    wide = Vector(types.float64)

    def build(context, builder, signature, args):
        hidden = ir.InlineAsm(ir.FunctionType(ir.DoubleType(), [ir.DoubleType()]), "", "=r,0")
        return _splat(builder, wide, builder.call(hidden, [ir.Constant(ir.DoubleType(), 1.0)]))

    return wide(), build


@intrinsic
def total(typing, value):
    """Sum of the lanes of a W, by halves: always in the same order."""

    def build(context, builder, signature, args):
        part, width = args[0], LANES
        while width > 1:
            width //= 2
            low = builder.shuffle_vector(part, part, _lanes(range(width)))
            high = builder.shuffle_vector(part, part, _lanes(range(width, 2 * width)))
            part = builder.fadd(low, high)
        return builder.extract_element(part, _I32(0))

    return value.dtype(value), build


def _lanes_where(compare, bound):
    """Intrinsic's result for the lanes whose index compares so to the scalar that `bound` builds of the argument."""

    def build(context, builder, signature, args):
        scalar = builder.trunc(bound(builder, args[0]), _I32)
        undefined = ir.Constant(ir.VectorType(_I32, LANES), ir.Undefined)
        first = builder.insert_element(undefined, scalar, _I32(0))
        everywhere = builder.shuffle_vector(first, undefined, _lanes([0] * LANES))
        return builder.icmp_signed(compare, _lanes(range(LANES)), everywhere)

    return BOOLEANS(types.intp), build


@intrinsic
def foremost(typing, k):
    """M that is true in the first `k` lanes."""
    return _lanes_where("<", lambda _, k: k)


@intrinsic
def last(typing, k):
    """M that is true in the last `k` lanes."""
    return _lanes_where(">=", lambda builder, k: builder.sub(_I64(LANES), k))


@intrinsic
def positive(typing, value):
    """M that is true where `value` is not zero or below: NaN counts as positive."""

    def build(context, builder, signature, args):
        return builder.fcmp_unordered(">", args[0], ir.Constant(value.llvm, [0.0] * LANES))

    return BOOLEANS(value), build


@intrinsic
def finite(typing, value):
    """M that is true where `value` is neither NaN nor infinite."""

    def build(context, builder, signature, args):
        return builder.fcmp_ordered("==", builder.fsub(args[0], args[0]), ir.Constant(value.llvm, [0.0] * LANES))

    return BOOLEANS(value), build


@intrinsic
def where(typing, mask, a, b):
    """`a` in the lanes where `mask` is true, `b` in the others."""

    def build(context, builder, signature, args):
        return builder.select(*args)

    return a(mask, a, a), build


@intrinsic
def scaled(typing, value, slope):
    """V: ``value * slope``, and zero for a slope of 0 even where `value` is infinite, without a branch."""
    bits = value.dtype.bitwidth

    def build(context, builder, signature, args):
        integer = ir.IntType(bits)
        integers = ir.VectorType(integer, LANES)
        kept = builder.sext(builder.fcmp_unordered("!=", args[1], ir.Constant(args[1].type, 0.0)), integer)
        undefined = ir.Constant(integers, ir.Undefined)
        first = builder.insert_element(undefined, kept, _I32(0))
        mask = builder.shuffle_vector(first, undefined, _lanes([0] * LANES))
        factor = args[1] if bits == 64 else builder.fptrunc(args[1], ir.FloatType())
        product = builder.bitcast(builder.fmul(args[0], _splat(builder, value, factor)), integers)
        return builder.bitcast(builder.and_(product, mask), value.llvm)

    return value(value, types.float64), build


@intrinsic
def bits(typing, mask):
    """uint16 with one bit a lane."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(16))

    return types.uint16(mask), build


@intrinsic
def mask_of(typing, word):
    """M of the `bits` in a uint16, lane by lane: LLVM would go through bytes where masks have no registers."""

    def build(context, builder, signature, args):
        undefined = ir.Constant(ir.VectorType(_I32, LANES), ir.Undefined)
        first = builder.insert_element(undefined, builder.zext(args[0], _I32), _I32(0))
        everywhere = builder.shuffle_vector(first, undefined, _lanes([0] * LANES))
        lanes = _lanes([1 << lane for lane in range(LANES)])
        return builder.icmp_signed("!=", builder.and_(everywhere, lanes), _lanes([0] * LANES))

    return BOOLEANS(types.uint16), build


def _arithmetic(function, instruction):
    @type_callable(function)
    def typer(context):
        return lambda a, b: a if isinstance(a, Vector) and a == b else None

    @lower_builtin(function, Vector, Vector)
    def build(context, builder, signature, args):
        return getattr(builder, instruction)(*args)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
):
    _arithmetic(_function, _instruction)
