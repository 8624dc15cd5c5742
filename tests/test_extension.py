"""The extension picks its instruction set at run time; whichever it picks, the results are right."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cases import CASES, DTYPES, Case
from conftest import CPUS
from reference import assert_close
from reference import batch_norm as reference

import fastbn

pytestmark = [
    pytest.mark.parametrize("backend", ("cython",), indirect=True, scope="module"),
    pytest.mark.usefixtures("backend"),
]


@pytest.fixture
def kernels() -> Iterator:
    """Give the extension, and leave its choice as it was."""
    module = pytest.importorskip("fastbn_ext._kernels")
    chosen = module.get_instruction_set()
    yield module
    module.set_instruction_set(chosen)


def test_the_best_is_the_first_choice(kernels):
    """But for Zen 4, which computes 512 bits in two halves."""
    cpu = pytest.importorskip("llvmlite.binding").get_host_cpu_name()
    available = kernels.available_instruction_sets()
    assert kernels.get_instruction_set() == available[1 if cpu == "znver4" else 0]
    assert available[-1] == "baseline"


def test_unknown_instruction_set(kernels):
    with pytest.raises(ValueError, match=r"baseline.*'sse9'"):
        kernels.set_instruction_set("sse9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_is_right(kernels, case: Case, dtype):
    x, dy, _, weight, bias = case.make(dtype)
    expected = reference(case, x, dy, weight, bias)
    for name in kernels.available_instruction_sets():
        kernels.set_instruction_set(name)
        y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, axis=case.axis)
        dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, axis=case.axis)
        assert_close(mean, expected.mean, 1e-12)
        assert_close(y, expected.y)
        assert_close(dx, expected.dx, terms=expected.through)
        assert_close(dweight, expected.dweight)
        assert_close(dbias, expected.dbias)


@pytest.mark.parametrize("case", [case for case in CASES if case.count > 2], ids=str)  # of two, no gradient is left
@pytest.mark.usefixtures("keep_threads")
def test_activation_and_residual_with_every_instruction_set(kernels, case: Case):
    x, dy, residual, weight, bias = case.make()

    def run():
        bn = getattr(fastbn, case.layer)(case.channels, axis=case.axis, activation="relu")
        bn.weight[:], bn.bias[:] = weight, bias
        return bn(x, residual=residual), *bn.backward(dy), *bn.grads.values()

    with fastbn.use_backend("numpy"):
        expected = run()
    for name in kernels.available_instruction_sets():
        kernels.set_instruction_set(name)
        fastbn.set_num_threads(1)
        alone = run()
        fastbn.set_num_threads(CPUS)
        for got, same, want in zip(run(), alone, expected, strict=True):
            np.testing.assert_array_equal(got, same)
            assert_close(got, want, 1e-5)
