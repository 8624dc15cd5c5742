"""Batch normalization for NumPy on CPUs: fast kernels, PyTorch's layers, folding for deployment."""

from __future__ import annotations

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from fastbn import functional
from fastbn._engine import (
    available_backends,
    get_backend,
    get_num_threads,
    set_backend,
    set_num_threads,
    show_config,
    use_backend,
    warmup,
)
from fastbn._memory import get_pool_limit, release_pool, set_pool_limit
from fastbn.folding import fold_conv, fold_into_next_conv, fold_linear, fold_scale_shift, fold_state_dict
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_forward, moments, scale_shift
from fastbn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, ScaleShift
from fastbn.moments import Moments
from fastbn.recalibration import recalibrate
from fastbn.variants import BatchRenorm, FrozenBatchNorm, GhostBatchNorm, RunningBatchNorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "Moments",
    "RunningBatchNorm",
    "ScaleShift",
    "__version__",
    "available_backends",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "fold_conv",
    "fold_into_next_conv",
    "fold_linear",
    "fold_scale_shift",
    "fold_state_dict",
    "functional",
    "get_backend",
    "get_num_threads",
    "get_pool_limit",
    "moments",
    "recalibrate",
    "release_pool",
    "scale_shift",
    "set_backend",
    "set_num_threads",
    "set_pool_limit",
    "show_config",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> _ModuleType:
    """Reach `fastbn.onnx` and `fastbn.dask` without importing them first."""
    if name in {"dask", "onnx"}:
        return _import_module(f"fastbn.{name}")
    raise AttributeError(f"module 'fastbn' has no attribute {name!r}")
