"""A call's arguments as one value for Numba kernels: the twin of `Job` in fastbn_ext/common.h.

Every function below the kernel takes the job and reads from it what it needs. That spares the compiler much work: each
argument of a function costs it time, and a parallel loop passes all that it uses through several functions.
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

from fastbn.backends._numba.compiler import parts_in_order
from fastbn.backends._plan import Plan

_I32 = ir.IntType(32)

_FLAGS = ("training", "wide")
_NUMBERS = ("eps", "slope", "factor")
_VALUES = ("x", "residual", "dy", "y", "dx", "dresidual", "coef")  # of x's dtype
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")  # float64 if `wide`, else float32; or dweight, dbias
_DOUBLES = ("stats", "grads", "part", "affine")

# What a kernel is called with, behind the plan, and its table of parts.
ARGUMENTS = (*_FLAGS, *_NUMBERS, *_VALUES[:-1], "signs", *_PARAMETERS, *_DOUBLES[:-1], "table")
FIELDS = (*Plan._fields, *ARGUMENTS, "affine", "coef", "writing", "shares")  # two lie behind `stats` and `part`


def kinds_of(real):
    """Types of all `FIELDS`, for values of a Numba type."""
    return {
        **dict.fromkeys(Plan._fields, types.intp),
        "split": types.boolean,
        "streaming": types.boolean,
        "turns": types.boolean,
        **dict.fromkeys(_FLAGS, types.boolean),
        **dict.fromkeys(_NUMBERS, types.float64),
        **dict.fromkeys(_VALUES, types.CPointer(real)),
        "signs": types.CPointer(types.uint16),
        **dict.fromkeys(_PARAMETERS, types.CPointer(types.float32)),
        **dict.fromkeys(_DOUBLES, types.CPointer(types.float64)),
        "table": types.CPointer(types.intp),
        "writing": types.CPointer(types.intp),  # whether a thread has its turn
        "shares": types.CPointer(types.intp),
    }


class Job(types.Type):
    """Pointer to a call's plan and arguments, for values of one dtype."""

    def __init__(self, real):
        self.real = real
        self.fields = kinds_of(real)
        super().__init__(name=f"Job({real})")


@register_model(Job)
class _JobModel(models.PrimitiveModel):
    def __init__(self, manager, job):
        fields = [manager.lookup(job.fields[name]).get_value_type() for name in FIELDS]
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
def apart(typing, function, arguments):
    """``function(*arguments)`` for one of the compiler's `PARTS`, the first of its arguments a job."""
    ((place, kinds),) = (
        (place, kinds) for place, (known, kinds) in enumerate(parts_in_order()) if known is function.dispatcher
    )
    job, kinds = arguments[0], (arguments[0], *kinds)

    def build(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        values = [context.cast(builder, *each) for each in zip(values, arguments, kinds, strict=True)]
        address = builder.load(builder.gep(_field(context, builder, job, values[0], "table"), [_I32(place)]))
        kind = context.call_conv.get_function_type(types.none, kinds)
        result, error = (cgutils.alloca_once(builder, pointer.pointee) for pointer in kind.args[:2])
        given = context.get_arg_packer(kinds).as_arguments(builder, values)
        builder.call(builder.inttoptr(address, kind.as_pointer()), [result, error, *given])
        return context.get_dummy_value()

    return types.void(function, arguments), build


@intrinsic
def copy_of(typing, job):
    """A job with the same fields. It lives as long as its maker runs."""

    def build(context, builder, signature, args):
        return cgutils.alloca_once_value(builder, builder.load(args[0]))

    return job(job), build


@intrinsic
def make_job(typing, plan, arguments):
    """The job of a plan, a pointer to its fields, and of a tuple of all `ARGUMENTS`. It lives as long as its maker."""
    job = Job(arguments[ARGUMENTS.index("x")].dtype)

    def build(context, builder, signature, args):
        room = cgutils.alloca_once(builder, context.get_value_type(job).pointee)
        loaded = [builder.load(builder.gep(args[0], [_I32(i)])) for i in range(len(Plan._fields))]
        kinds = [job.fields[name] for name in Plan._fields]
        cut = [context.cast(builder, value, types.intp, kind) for value, kind in zip(loaded, kinds, strict=True)]
        for i, value in enumerate((*cut, *cgutils.unpack_tuple(builder, args[1]))):
            builder.store(value, builder.gep(room, [_I32(0), _I32(i)]))
        return room

    return job(plan, arguments), build
