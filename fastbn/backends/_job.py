"""A call's arguments as one value for Numba kernels: the twin of `Job` in fastbn_ext/common.h.

Every function below the kernel takes the job and reads from it what it needs. That spares the compiler much work: each
argument of a function costs it time, and a parallel loop passes all that it uses through several functions. With one
kernel for all operations, compiling took 14 seconds of a core instead of 21.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    infer_getattr,
    intrinsic,
    lower_getattr_generic,
    lower_setattr_generic,
    models,
    register_model,
)

_I32, _I64 = ir.IntType(32), ir.IntType(64)

SIZES = ("n", "channels", "s", "run", "columns", "rows", "block", "blocks", "ahead")
FLAGS = ("streaming", "training")
NUMBERS = ("eps", "slope")
VALUES = ("x", "residual", "dy", "y", "dx", "dresidual", "coef")  # of x's dtype
DOUBLES = ("stats", "affine", "grads", "part")
FIELDS = (*SIZES, *FLAGS, *NUMBERS, *VALUES, "signs", *DOUBLES)


class Job(types.Type):
    """Pointer to the arguments of a call on arrays of one dtype. Arrays are pointers in it, null if they are empty."""

    def __init__(self, real):
        self.real = real
        self.fields = {
            **dict.fromkeys(SIZES, types.intp),
            **dict.fromkeys(FLAGS, types.boolean),
            **dict.fromkeys(NUMBERS, types.float64),
            **dict.fromkeys(VALUES, types.CPointer(real)),
            "signs": types.CPointer(types.uint16),
            **dict.fromkeys(DOUBLES, types.CPointer(types.float64)),
        }
        super().__init__(name=f"Job({real})")


@register_model(Job)
class _JobModel(models.PrimitiveModel):
    def __init__(self, manager, job):
        fields = [manager.lookup(kind).get_value_type() for kind in job.fields.values()]
        super().__init__(manager, job, ir.LiteralStructType(fields).as_pointer())


@infer_getattr
class _JobAttributes(AttributeTemplate):
    key = Job

    def generic_resolve(self, job, name):
        return job.fields.get(name)


@lower_getattr_generic(Job)
def _field(context, builder, job, value, name):
    return builder.load(builder.gep(value, [_I32(0), _I32(FIELDS.index(name))]))


@lower_setattr_generic(Job)
def _set_field(context, builder, signature, args, name):
    job, value = args
    builder.store(value, builder.gep(job, [_I32(0), _I32(FIELDS.index(name))]))


@intrinsic
def copy_of(typing, job):
    """A job with the same fields. It lives as long as its maker runs."""

    def build(context, builder, signature, args):
        return cgutils.alloca_once_value(builder, builder.load(args[0]))

    return job(job), build


@intrinsic
def make_job(typing, arguments):
    """The job of a tuple of all `FIELDS`, whose arrays become pointers. It lives as long as its maker runs."""
    job = Job(arguments[FIELDS.index("coef")].dtype)

    def build(context, builder, signature, args):
        room = cgutils.alloca_once(builder, context.get_value_type(job).pointee)
        values = cgutils.unpack_tuple(builder, args[0])
        for i, (value, kind, field) in enumerate(zip(values, arguments, job.fields.values(), strict=True)):
            if isinstance(kind, types.Array):
                array = context.make_array(kind)(context, builder, value)
                empty = builder.icmp_signed("==", array.nitems, _I64(0))
                stored = builder.select(empty, ir.Constant(array.data.type, None), array.data)
            else:
                stored = context.cast(builder, value, kind, field)
            builder.store(stored, builder.gep(room, [_I32(0), _I32(i)]))
        return room

    return job(arguments), build


_parts: dict[Job, list[object]] = {}


def parts_of(real):
    """Libraries of all functions compiled `apart` for jobs of this value type, each behind those that it calls."""
    return tuple(_parts.get(Job(real), ()))


@intrinsic
def apart(typing, function, arguments):
    """``function(*arguments)``, the first of them a job, compiled apart: called by its symbol.

    A library of Numba's takes in all that it calls, optimises it and translates it anew, on every level of calls; a
    parallel loop is three levels by itself. What is called by its symbol is translated once, and has to be loaded
    before its caller is (compiling took 14 seconds of a core when all was linked, and 11).
    """
    kinds = tuple(types.unliteral(kind) for kind in arguments)
    function.dispatcher.compile(kinds)
    compiled = function.dispatcher.overloads[kinds]
    called, parts = compiled.fndesc, _parts.setdefault(kinds[0], [])
    if compiled.library not in parts:
        parts.append(compiled.library)

    def build(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        values = [context.cast(builder, *each) for each in zip(values, arguments, kinds, strict=True)]
        declared = context.declare_function(builder.module, called)
        return context.call_conv.call_function(builder, declared, called.restype, called.argtypes, values)[1]

    return called.restype(function, arguments), build
