"""Every public function against odd arguments, one parameter at a time, the others valid.

A call either gives what the NumPy backend computes in float64 from the same numbers as plain arrays, or an error that
names what came; and after an error everything is as it was.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from odd import ARRAYS, THINGS, Producer, for_pytorch

import fastbn

LAYERS = (fastbn.BatchNorm1d, fastbn.BatchNorm2d, fastbn.BatchNorm3d, fastbn.GhostBatchNorm, fastbn.BatchRenorm)
LAYERS += (fastbn.RunningBatchNorm, fastbn.FrozenBatchNorm)
ERRORS = (OSError, ValueError, TypeError, RuntimeError, OverflowError, AttributeError)

RNG = np.random.default_rng(0)
X, DY, RESIDUAL = (RNG.standard_normal((4, 3, 5), np.float32) for _ in range(3))
WEIGHT, BIAS, MEAN = (RNG.standard_normal(3, np.float32) for _ in range(3))
VAR = RNG.uniform(0.5, 2, 3).astype(np.float32)
CONV = RNG.standard_normal((3, 2, 3), np.float32)
NEXT = RNG.standard_normal((2, 3, 3), np.float32)
LINEAR = RNG.standard_normal((3, 4), np.float32)
NORM = {"running_mean": MEAN, "running_var": VAR, "weight": WEIGHT, "bias": BIAS}
STATE = {"conv.weight": CONV, **{f"bn.{key}": value for key, value in NORM.items()}}


@dataclass
class Target:
    """A function and its valid arguments; or, of what is made anew for every call, a method."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    subject: Callable[[], Any] = lambda: None  # the call's first argument, unless it is None
    wide_subject: Callable[[], Any] | None = None  # the same for float64


def layer(training: bool = True, **options) -> fastbn.BatchNorm1d:
    bn = fastbn.BatchNorm1d(3, **options).train(training)
    bn.weight[:], bn.bias[:], bn.running_mean[:], bn.running_var[:] = WEIGHT, BIAS, MEAN, VAR
    return bn


def after_forward(dtype: type = np.float32) -> fastbn.BatchNorm1d:
    bn = layer(activation="relu")
    bn(X.astype(dtype), residual=RESIDUAL.astype(dtype))
    return bn


def assign(name: str) -> Callable[..., Any]:
    """Set an attribute of a layer, and use it."""

    def call(bn, **values):
        setattr(bn, name, values[name])
        return bn(X), bn.eval()(X), bn.fold()(X), bn.state_dict()

    return call


def replace(name: str) -> Callable[..., Any]:
    """Put something else among the parameters of a layer, and use it."""

    def call(bn, **values):
        bn.params[name] = values[name]
        return bn(X), bn.eval()(X)

    return call


def load(bn, *, strict=True, **state):
    bn.load_state_dict(bn.state_dict() | state, strict)
    return bn.state_dict()


def use(name):
    with fastbn.use_backend(name):
        return fastbn.get_backend()


def kept(setting: Callable, current: Callable) -> Callable[..., Any]:
    """Make a setting for a moment."""

    def call(value):
        before = current()
        try:
            setting(value)
            return current()
        finally:
            setting(before)

    return call


def recalibrated(layers):
    with fastbn.recalibrate(layers):
        pass


LAYER = {
    "num_features": 3,
    "eps": 1e-3,
    "momentum": 0.3,
    "affine": True,
    "track_running_stats": True,
    "bias": True,
    "axis": 1,
    "dtype": "f4",
    "activation": None,
}
FROZEN = {key: LAYER[key] for key in ("num_features", "eps", "axis", "dtype", "activation")}
UNTRACKED = {**FROZEN, "affine": True, "bias": True}
BATCH = {"x": X, "running_mean": MEAN, "running_var": VAR, "weight": WEIGHT, "bias": BIAS}

TARGETS = {
    "batch_norm, training": Target(
        lambda running_mean, running_var, **rest: fastbn.batch_norm(
            running_mean=_own(running_mean), running_var=_own(running_var), **rest
        ),
        {**BATCH, "training": True, "momentum": 0.2, "eps": 1e-3, "axis": 1},
    ),
    "batch_norm": Target(fastbn.batch_norm, {**BATCH, "training": False, "momentum": 0.2, "eps": 1e-3, "axis": 1}),
    "batch_norm_forward": Target(
        fastbn.batch_norm_forward, {"x": X, "weight": WEIGHT, "bias": BIAS, "eps": 1e-3, "axis": 1}
    ),
    "batch_norm_backward": Target(
        fastbn.batch_norm_backward,
        {"dy": DY, "x": X, "mean": MEAN, "invstd": VAR, "weight": WEIGHT, "axis": 1, "training": True},
    ),
    "scale_shift": Target(fastbn.scale_shift, {"x": X, "scale": WEIGHT, "shift": BIAS, "axis": 1}),
    "moments": Target(fastbn.moments, {"x": X, "axis": 1}),
    "Moments": Target(fastbn.Moments, {"count": 7, "mean": MEAN, "m2": VAR}),
    "Moments.empty": Target(fastbn.Moments.empty, {"num_channels": 3}),
    "Moments.update": Target(fastbn.Moments.update, {"x": X, "axis": 1}, lambda: fastbn.Moments(7, MEAN, VAR)),
    "Moments.merge": Target(
        fastbn.Moments.merge, {"other": fastbn.Moments(5, MEAN, VAR)}, lambda: fastbn.Moments(7, MEAN, VAR)
    ),
    "Moments.var": Target(fastbn.Moments.var, {"ddof": 1.0}, lambda: fastbn.Moments(7, MEAN, VAR)),
    "Moments.std": Target(fastbn.Moments.std, {"ddof": 1.0}, lambda: fastbn.Moments(7, MEAN, VAR)),
    "BatchNorm1d": Target(lambda **given: fastbn.BatchNorm1d(**given)(X), LAYER),
    "BatchNorm2d": Target(fastbn.BatchNorm2d.__call__, {"x": X[:, :, None]}, lambda: fastbn.BatchNorm2d(3)),
    "BatchNorm3d": Target(fastbn.BatchNorm3d.__call__, {"x": X[:, :, None, None]}, lambda: fastbn.BatchNorm3d(3)),
    "GhostBatchNorm": Target(lambda **given: fastbn.GhostBatchNorm(**given)(X), {**LAYER, "virtual_batch_size": 2}),
    "BatchRenorm": Target(
        lambda **given: fastbn.BatchRenorm(**given)(X), {**UNTRACKED, "momentum": 0.3, "r_max": 2.0, "d_max": 1.0}
    ),
    "RunningBatchNorm": Target(lambda **given: fastbn.RunningBatchNorm(**given)(X), {**UNTRACKED, "momentum": 0.3}),
    "FrozenBatchNorm": Target(lambda **given: fastbn.FrozenBatchNorm(**given)(X), FROZEN),
    **{
        f"{cls.__name__}, called": Target(cls.__call__, {"x": X, "residual": RESIDUAL}, lambda cls=cls: cls(3))
        for cls in (fastbn.GhostBatchNorm, fastbn.BatchRenorm, fastbn.RunningBatchNorm, fastbn.FrozenBatchNorm)
    },
    "recalibrate": Target(recalibrated, {"layers": layer()}),
    "layer, training": Target(fastbn.BatchNorm1d.__call__, {"x": X, "residual": RESIDUAL}, layer),
    "layer, cumulative": Target(fastbn.BatchNorm1d.__call__, {"x": X}, lambda: layer(momentum=None)),
    "layer, eval": Target(fastbn.BatchNorm1d.__call__, {"x": X, "residual": RESIDUAL}, lambda: layer(False)),
    "layer.backward": Target(fastbn.BatchNorm1d.backward, {"dy": DY}, after_forward, lambda: after_forward(np.float64)),
    "layer.train": Target(lambda bn, mode: bn.train(mode)(X), {"mode": True}, layer),
    "layer.load_state_dict": Target(
        load, {"strict": True, "weight": WEIGHT, "bias": BIAS, "running_mean": MEAN, "running_var": VAR}, layer
    ),
    "layer.load_state_dict of a counter": Target(load, {"num_batches_tracked": 5}, layer),
    "layer.load_state_dict of a mapping": Target(fastbn.BatchNorm1d.load_state_dict, {"state": {**NORM}}, layer),
    **{
        f"layer.{name}": Target(assign(name), {name: valid}, layer)
        for name, valid in {**NORM, "eps": 1e-3, "momentum": 0.2, "axis": 1}.items()
    },
    **{f"layer.params[{name!r}]": Target(replace(name), {name: NORM[name]}, layer) for name in ("weight", "bias")},
    "ScaleShift": Target(
        lambda **given: fastbn.ScaleShift(**given)(X),
        {"scale": WEIGHT, "shift": BIAS, "axis": 1, "dtype": "f4", "activation": None},
    ),
    "ScaleShift.__call__": Target(
        fastbn.ScaleShift.__call__, {"x": X, "residual": RESIDUAL}, lambda: fastbn.ScaleShift(WEIGHT, BIAS)
    ),
    "fold_scale_shift": Target(
        fastbn.fold_scale_shift, {"mean": MEAN, "var": VAR, "weight": WEIGHT, "bias": BIAS, "eps": 1e-3}
    ),
    "fold_conv": Target(fastbn.fold_conv, {"weight": CONV, "bias": BIAS, "bn": NORM, "groups": 1, "transposed": False}),
    "fold_conv of a mapping": Target(
        lambda eps, **bn: fastbn.fold_conv(CONV, BIAS, {**bn, "eps": eps}), {**NORM, "eps": 1e-3}
    ),
    "fold_linear": Target(fastbn.fold_linear, {"weight": LINEAR, "bias": BIAS, "bn": NORM}),
    "fold_into_next_conv": Target(
        fastbn.fold_into_next_conv, {"bn": NORM, "weight": NEXT, "bias": BIAS[:2], "groups": 1}
    ),
    "fold_state_dict": Target(
        fastbn.fold_state_dict, {"state": STATE, "pairs": [("conv", "bn")], "eps": 1e-3, "transposed": ()}
    ),
    "onnx.fold": Target(fastbn.onnx.fold, {"model": "no such file"}),
    "set_backend": Target(kept(fastbn.set_backend, fastbn.get_backend), {"value": "numpy"}),
    "use_backend": Target(use, {"name": "numpy"}),
    "set_num_threads": Target(kept(fastbn.set_num_threads, fastbn.get_num_threads), {"value": 1}),
    "set_pool_limit": Target(kept(fastbn.set_pool_limit, fastbn.get_pool_limit), {"value": 1}),
}
# What takes no argument that could be odd.
PLAIN = {"__version__", "available_backends", "functional", "get_backend", "get_num_threads", "get_pool_limit"}
PLAIN |= {"release_pool", "show_config", "warmup"}


def _own(values: Any) -> Any:
    """A copy of what is updated in place, of the same kind."""
    return values.copy() if type(values) is np.ndarray and values.flags.c_contiguous else values


def plain(value: Any, valid: Any) -> Any:
    """The same numbers, as a float64 array or a Python number, where `value` has any."""
    if isinstance(value, np.ma.MaskedArray):
        return value
    if isinstance(valid, np.ndarray):
        if type(value).__module__.startswith("torch"):
            return value.detach().double().numpy()
        a = np.asarray(value.a if isinstance(value, Producer) else value)
        return a.astype(np.float64) if a.dtype.kind in "fiu" else value
    if isinstance(valid, bool):
        return bool(value)
    if value is None:
        return None
    if isinstance(valid, int):
        return operator.index(value) if hasattr(value, "__index__") and np.asarray(value).dtype.kind != "f" else value
    return float(value) if isinstance(valid, float) and not isinstance(value, str | bytes) else value


def widened(valid: Any) -> Any:
    return valid.astype(np.float64) if isinstance(valid, np.ndarray) else valid


def numbers(result: Any) -> list[np.ndarray]:
    """All arrays of a result, in order."""
    if isinstance(result, fastbn.Moments):
        result = (np.array(result.count, object), result.mean, result.m2)
    if isinstance(result, dict):
        result = [value for _, value in sorted(result.items())]
    if isinstance(result, tuple | list):
        return [a for part in result for a in numbers(part)]
    return [np.asarray(result)]


def state_of(value: Any) -> Any:
    """What must not change: bytes of arrays, and all that is inside of mappings and objects."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, np.asarray(value).tobytes()
    if isinstance(value, dict):
        return {key: state_of(part) for key, part in value.items()}
    if isinstance(value, fastbn.Moments):
        return value.count, state_of(value.mean), state_of(value.m2)
    if isinstance(value, LAYERS):
        return {
            key: id(part) if key == "_saved" else state_of(part)
            for key, part in vars(value).items()
            if key != "_checked"  # what need not be checked again
        }
    return value if isinstance(value, int | float | str) and value == value else id(value)


def assert_same_numbers(got: Any, expected: Any, half: bool = False) -> None:
    with np.errstate(all="ignore"):
        for one, right in zip(numbers(got), numbers(expected), strict=True):
            assert one.shape == right.shape
            if one.dtype.kind != "f":
                assert np.array_equal(one, right)
                continue
            other = right.astype(one.dtype)
            finite = np.isfinite(other)
            np.testing.assert_array_equal(np.isfinite(one), finite)  # NaN or infinite: a matter of the order of steps
            tolerance = (1e-3 if half else 1e-5) * max(1.0, np.abs(other[finite], dtype=np.float64).max(initial=0))
            assert (np.abs(one - other)[finite] <= tolerance).all(), (one, other)


def fate(target: Target, name: str, make: Callable[[], Any]) -> str:
    """How a call ends in which one argument is odd; an AssertionError where it should not end so."""
    value = make()
    arguments = {**target.arguments, name: value}
    subject = target.subject()
    before = state_of(arguments), state_of(subject)
    given = (subject,) if subject is not None else ()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of what overflows when it is rounded, as everywhere in NumPy
            got = target.call(*given, **arguments)
    except ERRORS as error:
        complain(error, target, value)
        changed = (state_of(arguments), state_of(subject)) != before
        if changed and not target.call.__qualname__.startswith(("assign", "replace")):
            pytest.fail(f"something changed before {error!r}")
        return "refused"
    with fastbn.use_backend("numpy"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = (target.wide_subject or target.subject)()
        given = (subject,) if subject is not None else ()
        arguments = {key: widened(valid) for key, valid in target.arguments.items()}
        expected = target.call(*given, **arguments | {name: plain(make(), target.arguments[name])})
    assert_same_numbers(got, expected, getattr(make(), "dtype", None) == np.float16)
    return "right"


def complain(error: Exception, target: Target, value: Any) -> None:
    """Fail where an error is not one to be read by the caller."""
    assert not isinstance(error, RecursionError | NotImplementedError), repr(error)
    assert str(error), f"{error!r} says nothing"
    assert named(str(error), target.arguments, value), f"{error!r} does not say what came"


def named(said: str, names: Iterable[str], value: Any) -> bool:
    """Whether a message tells which argument it is about, or what was given for it."""
    if any(("batch norm" if name == "bn" else name) in said for name in names):
        return True
    words = [type(value).__name__, "'.'" if isinstance(value, str) and not value else ""]  # the path of no name
    with suppress(Exception):
        words.append(repr(value)[:40])
        a = np.asarray(value)
        words += [str(a.shape), str(a.dtype), f"{a.ndim}D"]
    return any(word in said for word in words if word)


FEW = ("dtype f8", "dtype O", "dtype U8", "list", "memoryview", "masked array", "none at all", "64 axes", "DLPack only")
FEW += ("tensor", "tensor with a gradient", "sparse tensor", "tensor without values")


def odd_ones(valid: Any, torch: Any) -> dict[str, Callable[[], Any]]:
    """What to give instead of a valid argument. All arrays are tried where an array is expected, else a few."""
    values = dict(THINGS)
    arrays = ARRAYS | for_pytorch(torch)
    if not isinstance(valid, np.ndarray):
        arrays = {key: arrays[key] for key in FEW}
        valid = X
    for key, make in arrays.items():
        with suppress(np.exceptions.AxisError, AttributeError):  # what a vector cannot be
            make(valid)
            values[key] = lambda make=make: make(valid.copy())
    return values


KERNELLESS = ("Moments", "fold", "onnx", "set_", "use_", "recalibrate", "layer.load")
ALONE = tuple(name for name in TARGETS if name.startswith(KERNELLESS) and name != "Moments.update")


def attack(name: str, torch: Any) -> None:
    target, wrong, fates = TARGETS[name], [], []
    for parameter, valid in target.arguments.items():
        for odd, make in odd_ones(valid, torch).items():
            if odd == "2**31" and parameter in ("num_features", "num_channels"):
                continue  # would be right, with enough memory
            try:
                fates.append(fate(target, parameter, make))
            except Exception as error:  # noqa: BLE001  # to show all at once
                wrong.append(f"{parameter} = {odd}: {type(error).__name__}: {str(error).strip()[:200]}")
    assert not wrong, f"{len(wrong)} of {len(wrong) + len(fates)} calls:\n" + "\n".join(wrong)
    assert "refused" in fates
    assert "right" in fates or "x" not in target.arguments


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ALONE])
def test_odd_arguments(backend, name, torch):
    attack(name, torch)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.usefixtures("keep_threads")
def test_odd_arguments_of_what_has_no_backend(name, torch):
    attack(name, torch)


def test_every_public_name_is_attacked():
    covered = " ".join(TARGETS)
    assert not [name for name in fastbn.__all__ if name not in PLAIN and name not in covered]
