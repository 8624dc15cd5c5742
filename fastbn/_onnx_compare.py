"""Run two models on the same inputs in ONNX Runtime and say how far their outputs are apart."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, TensorShapeProto, ValueInfoProto, helper

from fastbn._files import is_utf8
from fastbn._onnx_graph import tensors

Array = NDArray[Any]

BATCH, SEQUENCE, IMAGE, VOLUME, OTHER = 1, 64, 224, 32, 8  # sizes for axes that a model leaves open
NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


class RunError(Exception):
    """ONNX Runtime cannot run a model on these inputs."""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart in one output; ``max_rel`` is in parts of the output's largest magnitude.

    All three are infinite where the outputs differ in shape, or in where they are finite. ``max_ulp`` counts the
    numbers of the output's dtype in between and is None where the output is not floating.
    """

    name: str
    max_abs: float
    max_rel: float
    max_ulp: float | None


def compare(
    original: ModelProto | str | os.PathLike[str],
    folded: ModelProto | str | os.PathLike[str],
    inputs: Mapping[str, Array],
) -> list[Difference]:
    """Run both models, without graph optimisation, and compare output by output."""
    expected, actual = run(original, inputs), run(folded, inputs)
    return [difference(name, expected[name], actual[name]) for name in expected]


def run(model: ModelProto | str | os.PathLike[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model in ONNX Runtime as it stands, without graph optimisation, on the CPU."""
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors
    except ModuleNotFoundError as error:
        raise ImportError('running ONNX models needs ONNX Runtime: pip install "fastbn[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = model.SerializeToString() if isinstance(model, ModelProto) else os.fspath(model)
    if isinstance(source, str) and not is_utf8(source):
        raise RunError("it reads no files whose path is not UTF-8")
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        wanted |= {value.name for value in session.get_overridable_initializers()}
        results = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
    except _exceptions(errors) as error:
        raise RunError(str(error).strip().splitlines()[0]) from error
    return dict(zip(names, results, strict=True))


def _exceptions(module: ModuleType) -> tuple[type[Exception], ...]:
    """Return the exceptions that ONNX Runtime defines: they share no base but Exception."""
    own = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError)


def difference(name: str, expected: Any, actual: Any) -> Difference:
    """Compare one output of two models: a tensor, or a sequence or map of them."""
    if isinstance(expected, (list, Mapping)):
        fits = type(actual) is type(expected) and len(actual) == len(expected)
        keys = list(expected) if isinstance(expected, Mapping) else range(len(expected))
        if not fits or (isinstance(expected, Mapping) and actual.keys() != expected.keys()):
            return Difference(name, np.inf, np.inf, None)
        parts = [difference(name, expected[key], actual[key]) for key in keys]
        return functools.reduce(larger, parts) if parts else Difference(name, 0.0, 0.0, None)
    return _difference(name, np.asarray(expected), np.asarray(actual))


def _difference(name: str, expected: Array, actual: Array) -> Difference:
    if expected.dtype.kind not in "fiub":
        same = bool(np.array_equal(expected, actual))
        return Difference(name, *((0.0, 0.0) if same else (np.inf, np.inf)), None)
    floating = expected.dtype.kind == "f"
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    if wide.shape != other.shape or not np.array_equal(np.isfinite(wide), np.isfinite(other)):
        return Difference(name, np.inf, np.inf, np.inf if floating else None)
    finite = np.isfinite(wide)
    beyond = ~finite & ~((wide == other) | (np.isnan(wide) & np.isnan(other)))
    if beyond.any():
        return Difference(name, np.inf, np.inf, np.inf if floating else None)
    wide, other = wide[finite], other[finite]
    max_abs = float(np.abs(wide - other).max(initial=0.0))
    largest = float(np.abs(wide).max(initial=0.0))
    max_rel = max_abs / largest if largest else (np.inf if max_abs else 0.0)
    max_ulp = None
    if floating:
        steps = _ordinals(expected[finite]) - _ordinals(actual[finite])
        max_ulp = float(np.abs(steps.astype(np.float64)).max(initial=0.0))
    return Difference(name, max_abs, max_rel, max_ulp)


def _ordinals(values: Array) -> NDArray[np.int64]:
    """Number floats in their order, so that neighbours differ by one and both zeros are 0."""
    bits = values.view(f"i{values.dtype.itemsize}").astype(np.int64)
    lowest = np.int64(-(2 ** (8 * values.dtype.itemsize - 1)))
    return np.where(bits < 0, lowest - bits, bits)


def default_tolerance(model: ModelProto) -> float:
    """Return the relative difference to expect at most: more where weights are narrower than float32."""
    return 1e-2 if any(tensor.data_type in NARROW for tensor in tensors(model)) else 1e-4


def input_shapes(model: ModelProto, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return a shape for each input that must be fed; axes that the model leaves open get customary sizes.

    ``given`` overrides; axes with the same name get the same size. Raises ValueError where the two do not fit.
    """
    values = {value.name: value for value in required_inputs(model)}
    unknown = given.keys() - values.keys()
    if unknown:
        raise ValueError(f"the model has no input {', '.join(sorted(unknown))}, only {', '.join(values)}")
    sizes: dict[str, int] = {}
    for name, shape in given.items():
        dims = values[name].type.tensor_type.shape.dim
        fixed = [_fixed(dim) for dim in dims]
        if values[name].type.tensor_type.HasField("shape") and (
            len(fixed) != len(shape) or any(a not in (None, b) for a, b in zip(fixed, shape, strict=True))
        ):
            declared = ",".join(dim.dim_param or str(_fixed(dim) or "?") for dim in dims)
            raise ValueError(f"input {name} has shape {declared}, which {','.join(map(str, shape))} does not fit")
        sizes.update((dim.dim_param, size) for dim, size in zip(dims, shape, strict=False) if dim.dim_param)
    return {name: given.get(name) or _open_shape(value, sizes) for name, value in values.items()}


def _open_shape(value: ValueInfoProto, sizes: dict[str, int]) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    spatial = {3: SEQUENCE, 4: IMAGE, 5: VOLUME}.get(len(dims), OTHER)
    shape = []
    for axis, dim in enumerate(dims):
        usual = BATCH if axis == 0 else spatial if axis > 1 else OTHER
        shape.append(_fixed(dim) or (sizes.setdefault(dim.dim_param, usual) if dim.dim_param else usual))
    return tuple(shape)


def _fixed(dim: TensorShapeProto.Dimension) -> int | None:
    """Return the size of an axis; None where it is open, which older exporters write as 0 or -1."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None


def required_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Return the inputs of a model that have no initializer."""
    initialized = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initialized]


def drawable(value: ValueInfoProto) -> bool:
    """Say whether an input is one that random numbers can stand for."""
    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type != TensorProto.STRING


def random_inputs(model: ModelProto, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Draw an input of each shape: floats from the normal distribution, integers and booleans from 0 and 1."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for value in required_inputs(model):
        if not drawable(value):
            advice = ": give it with --inputs" if value.type.HasField("tensor_type") else ", nor can --inputs give it"
            raise ValueError(f"cannot make up input {value.name}, which is no numeric tensor{advice}")
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shapes[value.name]
        draw = rng.integers(0, 2, shape) if dtype.kind in "iub" else rng.standard_normal(shape)
        inputs[value.name] = draw.astype(dtype)
    return inputs


def larger(first: Difference, second: Difference) -> Difference:
    """Return the larger of each figure of two differences in the same output."""
    ulp = None if first.max_ulp is None or second.max_ulp is None else max(first.max_ulp, second.max_ulp)
    return Difference(first.name, max(first.max_abs, second.max_abs), max(first.max_rel, second.max_rel), ulp)
