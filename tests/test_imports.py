"""What an import loads, how long it takes, and what it offers."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType, ModuleType

import pytest
from conftest import BACKENDS
from subprocesses import python

import fastbn

OPTIONAL = (
    *(
        "numba",
        "llvmlite",
        "fastbn_ext",
        "Cython",
        "onnx",
        "onnxruntime",
        "dask",
        "distributed",
        "mpi4py",
        "torch",
        "jax",
    ),
    *("sklearn", "scipy", "matplotlib", "rich", "safetensors", "ml_dtypes", "threadpoolctl"),
)
CONTRACT = {
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ScaleShift", "Moments"),
    *("batch_norm", "batch_norm_forward", "batch_norm_backward", "scale_shift", "moments"),
    *("fold_scale_shift", "fold_conv", "fold_linear", "fold_into_next_conv", "fold_state_dict"),
    *(
        "set_backend",
        "get_backend",
        "available_backends",
        "use_backend",
        "set_num_threads",
        "get_num_threads",
        "show_config",
    ),
}


def test_import_loads_nothing_but_numpy():
    code = "import sys, fastbn; print(*sys.modules)"
    loaded = python(code).stdout.split()
    assert not {name.partition(".")[0] for name in loaded} & set(OPTIONAL)
    assert not {name for name in loaded if name.startswith(("fastbn.onnx", "fastbn.cli", "fastbn.demo"))}


@pytest.mark.parametrize("backend, loaded", (("numpy", set()), ("cython", {"fastbn_ext"})))
def test_a_backend_loads_no_other(backend, loaded):
    code = "import sys, fastbn; fastbn.BatchNorm1d(3)([[1., 2, 3]] * 4); print(*sys.modules)"
    modules = {name.partition(".")[0] for name in python(code, FASTBN_BACKEND=backend).stdout.split()}
    assert modules & set(OPTIONAL) == loaded


def test_import_takes_little_longer_than_numpy_s(tmp_path):
    code = "import numpy, time; start = time.process_time(); import fastbn; print(time.process_time() - start)"
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}  # as it is once installed
    assert min(float(python(code, **compiled).stdout) for _ in range(5)) < 0.05


def test_public_names():
    assert sorted(fastbn.__all__) == list(fastbn.__all__)
    assert set(fastbn.__all__) >= CONTRACT
    for name in fastbn.__all__:
        assert getattr(fastbn, name) is not None
    offered = {
        name for name, value in vars(fastbn).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert offered - {"annotations"} <= set(fastbn.__all__)


def test_every_public_name_says_what_it_is():
    for name in fastbn.__all__:
        if not isinstance(value := getattr(fastbn, name), str | ModuleType):
            assert inspect.getdoc(value), name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'batchnorm'"):
        _ = fastbn.batchnorm


def kernels(backend: str) -> dict[str, list[str]]:
    """Parameter names of every function that a backend module offers."""
    module = importlib.import_module(f"fastbn.backends.{backend}_")
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    reference = importlib.import_module("fastbn.backends.numpy_")
    names = {
        name
        for name, value in vars(reference).items()
        if isinstance(value, FunctionType) and value.__module__ == reference.__name__
    }
    return {name: list(inspect.signature(own[name]).parameters) for name in names if not name.startswith("_")}


@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_backends_share_one_signature(backend):
    if backend not in fastbn.available_backends():
        pytest.skip(f"backend {backend!r} is not installed")
    assert kernels(backend) == kernels("numpy")
