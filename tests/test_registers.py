"""Numba's kernels keep to the registers that are fast on a CPU, whatever is inlined into them."""

from __future__ import annotations

import pytest
from subprocesses import python

pytest.importorskip("numba")

from fastbn.backends._numba.vectors import X86  # it imports Numba

AVX512 = "+avx512f,+avx512dq,+avx512bw,+avx512vl,+avx2,+fma"
PRINT_ASSEMBLY = """
import numpy as np
from numba.np.numpy_support import from_dtype
from fastbn.backends._numba import job, output, rows
first = job.Job(from_dtype(np.dtype(np.float32)))
for part in rows.block_moments, output.apply_run:
    signature = next((first, *kinds) for function, kinds in job.parts_in_order() if function is part)
    part.compile(signature)
    print(part.inspect_asm(signature))
"""


@pytest.mark.skipif(not X86, reason="registers of x86; CI runs there, where a skipped test is a failure")
@pytest.mark.parametrize("cpu, wide", (("znver4", False), ("skylake-avx512", True)))
def test_vectors_are_in_registers_that_are_fast(cpu, wide):
    """LLVM splits vectors in two only where all that it inlines agrees; nothing here is run."""
    assembly = python(PRINT_ASSEMBLY, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=AVX512).stdout
    assert "vfmadd" in assembly
    assert ("%zmm" in assembly) == wide
