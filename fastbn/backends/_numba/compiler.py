"""Functions of kernels: inlined where they are called, or compiled apart. All of it is for the compiler's time.

Numba makes machine code of every function, and takes a copy of it into each that calls it, where it is optimised and
translated anew. Here a `point` is only ever inlined and never made machine code by itself; a `part` is translated once
and called through its kernel's table of addresses, as in C through `Kernels`, so that parts can be compiled in any
order and by several processes (`parts`). The kernel took 21 seconds of a core when all was linked, 14 with large
functions apart and one `Job` for all arguments, a fifth less when points became fragments and functions were no longer
rewritten, for arrays and constants that they do not have, and a tenth less with one pass of optimisation instead of
three.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import config, njit, types
from numba.core.codegen import CPUCodegen, JITCodeLibrary
from numba.core.compiler import Compiler

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and these kernels are nothing without the compiler")
if any(feature[:1] not in "+-" for feature in (config.CPU_FEATURES or "").split(",")):  # LLVM would end the process
    raise ImportError(f"NUMBA_CPU_FEATURES must be names that begin with + or -, got {config.CPU_FEATURES!r}")


def register_bits(codegen):
    """Bits of the registers that vectors are put in.

    Zen 4 computes 512 bits in two halves, and converts to float64 slower so than in registers of 256 (6 values a cycle
    instead of 8; in cache, ns for 16 values on a thread: 8x16x56x56, sums of gradients 2.47 and 2.02, backward 4.63 and
    4.07; 32x64x13x13, training 3.35 and 2.96, backward 5.31 and 4.30).
    """
    _, cpu, features = codegen.magic_tuple()
    return 512 if "+avx512f" in features and cpu != "znver4" else 256


class _Apart(JITCodeLibrary):
    """A library that is optimised once: Numba's passes before are for reference counts, and there are none."""

    def _optimize_functions(self, module):
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self):
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


class _InRegisters(_Apart):
    """A library whose functions keep to registers of `register_bits`.

    LLVM does so where all that it inlines says it; and between functions that are not inlined no vector may be passed
    by value then, for their registers may differ.
    """

    def add_ir_module(self, module):
        """Add functions, and say it in each."""
        if register_bits(self._codegen) == 256:
            for function in module.functions:
                if not function.is_declaration:  # its `add` knows no such attributes
                    set.add(function.attributes, '"prefer-vector-width"="256"')
                    set.add(function.attributes, '"min-legal-vector-width"="256"')
        super().add_ir_module(module)


class _Fragment(_InRegisters):
    """A library that is linked into others, and no more."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, _):
        """None: a null pointer."""
        self._ensure_finalized()
        return 0

    @property
    def codegen(self):
        """The code generator, that has nowhere to put a Python environment."""
        return _WithoutEnvironment(super().codegen)


class _WithoutEnvironment:
    def __init__(self, codegen):
        self._codegen = codegen

    def __getattr__(self, name):
        return getattr(self._codegen, name)

    def set_env(self, name, environment):
        pass


_HOOKS = (
    "add_ir_module",
    "_optimize_functions",
    "_optimize_final_module",
    "_finalize_final_module",
    "_finalize_dynamic_globals",
)


def _into(library):
    """Options that put a function into such a library; none where this Numba makes its own in another way."""
    if not all(hasattr(JITCodeLibrary, hook) for hook in _HOOKS) or not hasattr(CPUCodegen, "_module_pass_manager"):
        return {}

    class Pipeline(Compiler):
        def __init__(self, typing, target, _, *rest):
            made = library(target.codegen(), "function")
            made.enable_object_caching()
            super().__init__(typing, target, made, *rest)

    return {"pipeline_class": Pipeline}


_function = functools.partial(
    njit, nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, no_rewrites=True
)
# That it is not to be inlined is said, because a function inherits the options of its first caller.
loop = _function(forceinline=False, **_into(_Apart))
_part = _function(forceinline=False, **_into(_InRegisters))
point = _function(forceinline=True, **_into(_Fragment))

INDEX, FLAG = types.intp, types.boolean  # arguments of parts
ZERO, ONE = map(np.intp, range(2))  # as arguments: functions are compiled once more for literal ones
# By name, functions and the types of their arguments behind the job: a module whose import has been interrupted is
# imported again, and its functions take the places of those that it has defined before.
PARTS: dict[str, tuple[Any, tuple[Any, ...]]] = {}


def part(*kinds):
    """A function of a job and of arguments of these types, called `apart`: through the kernel's table of addresses."""

    def register(python):
        function = _part(python)
        PARTS[python.__name__] = function, kinds
        return function

    return register


def parts_in_order():
    """Functions and types of all `PARTS`, in the order of the kernel's table: that of their names in every process."""
    return [PARTS[name] for name in sorted(PARTS)]
