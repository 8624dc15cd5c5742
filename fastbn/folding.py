"""Folding: a batch norm in inference is an affine map per channel, so a neighbouring linear layer can take it in.

In inference a batch norm computes ``y = (x - mean) * scale + bias`` with ``scale = weight / sqrt(var + eps)``.
A convolution or a linear layer in front of it takes in the whole map: its weights are multiplied by the scale of their
output channel and its bias goes through the map. A convolution behind it takes it in as well: its weights are
multiplied by the scale of their input channel, and what the shift adds becomes part of its bias. The second is
exact only where the convolution does not pad, for padding puts zeros where the batch norm would have put ``shift``.

Everything is computed in float64 and rounded once, to the dtype of the weight that is folded into. No input is
modified. Arrays may be float16, float32, float64 or, where ``ml_dtypes`` is installed, bfloat16.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn._arrays import converted, described, integer, real, truth

__all__ = ["fold_conv", "fold_into_next_conv", "fold_linear", "fold_scale_shift", "fold_state_dict"]

Wide = NDArray[np.float64]
Array = NDArray[Any]
Flags = NDArray[np.bool_]

DEFAULT_EPS = 1e-5
FLOATS = ("float16", "bfloat16", "float32", "float64")
STATE_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class BatchNormLayer(Protocol):
    """What folding reads of a layer; every fastbn layer has it, in either mode."""

    eps: float

    @property
    def weight(self) -> Array | None: ...
    @property
    def bias(self) -> Array | None: ...
    @property
    def running_mean(self) -> Array | None: ...
    @property
    def running_var(self) -> Array | None: ...


BatchNorm = BatchNormLayer | Mapping[str, Any]


# ----------------------------------------------------------------------------------------------------------------
# The map of one batch norm
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Affine:
    """A batch norm in inference, ``y = (x - mean) * scale + bias``: float64 arrays of shape (C,).

    It keeps ``mean`` and ``bias`` apart instead of adding them up to a shift: no digit is lost where the bias of a
    convolution cancels the mean. ``finite`` says which channels came from finite numbers alone.
    """

    mean: Wide
    scale: Wide
    bias: Wide
    finite: Flags

    @property
    def channels(self) -> int:
        return self.scale.size

    @property
    def shift(self) -> Wide:
        """What the map adds to ``x * scale``."""
        with np.errstate(all="ignore"):
            return self.bias - self.mean * self.scale

    def with_shift(self, shift: Wide) -> Affine:
        """Return the map with the same scale that adds ``shift`` to ``x * scale``."""
        return Affine(np.zeros_like(shift), self.scale, shift, self.finite)

    @property
    def linear(self) -> Affine:
        """The scale alone."""
        return self.with_shift(np.zeros_like(self.scale))

    def __call__(self, values: Array | np.float64) -> Wide:
        """Send ``values``, with the channels on the last axis, through the map."""
        with np.errstate(all="ignore"):
            return np.asarray((values.astype(np.float64) - self.mean) * self.scale + self.bias)


def affine_of_statistics(
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float, prefix: str = ""
) -> Affine:
    """Return the map of a batch norm's statistics and parameters, all (C,); ``prefix`` names them in errors."""
    eps = _checked_eps(eps)
    if mean.ndim != 1:
        raise ValueError(f"{prefix}mean must have shape (C,), got {mean.shape}")
    for name, array in ((f"{prefix}var", var), ("weight", weight), ("bias", bias)):
        if array is not None and array.shape != mean.shape:
            raise ValueError(
                f"{prefix}mean must have shape (C,) and {name} the same, "
                f"but {prefix}mean has shape {mean.shape} and {name} {array.shape}"
            )
    variance = var.astype(np.float64) + eps
    if np.any(variance <= 0):  # NaN passes: it stays in its own channel, as in the layers
        raise ValueError(
            f"{prefix}var + eps must be positive to divide by its root, "
            f"but it is not in {listed(np.flatnonzero(variance <= 0))} (eps = {eps})"
        )
    scale = 1.0 / np.sqrt(variance)
    if weight is not None:
        with np.errstate(all="ignore"):
            scale = weight.astype(np.float64) * scale
    offset = np.zeros(len(mean)) if bias is None else bias.astype(np.float64)
    finite = np.logical_and.reduce([np.isfinite(array) for array in (mean, var, weight, bias) if array is not None])
    return Affine(mean.astype(np.float64), scale, offset, finite)


def affine_of(bn: BatchNorm) -> Affine:
    """Return the map of a layer, or of a mapping with PyTorch's keys and, where it has one, ``eps``."""
    if isinstance(bn, Mapping):
        values = {key: bn.get(key) for key in STATE_KEYS[:4]}
        eps = bn.get("eps", DEFAULT_EPS)
    elif all(hasattr(bn, key) for key in (*STATE_KEYS[:4], "eps")):
        values = {key: getattr(bn, key) for key in STATE_KEYS[:4]}
        eps = bn.eps
    else:
        raise TypeError(f"bn must be a batch norm layer or a mapping with PyTorch's keys, got {type(bn).__name__}")
    arrays = {key: None if value is None else _as_float_array(value, key) for key, value in values.items()}
    mean, var = arrays["running_mean"], arrays["running_var"]
    if mean is None or var is None:
        absent = " and ".join(key for key in STATE_KEYS[2:4] if arrays[key] is None)
        raise ValueError(f"a batch norm without running statistics cannot be folded: {absent} missing")
    return affine_of_statistics(mean, var, arrays["weight"], arrays["bias"], eps, prefix="running_")


def fold_scale_shift(
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = DEFAULT_EPS,
) -> tuple[Array, Array]:
    """Return the ``scale`` and ``shift`` with which a batch norm in inference is ``y = x * scale + shift``.

    Parameters
    ----------
    mean, var : array (C,)
        Mean and biased variance of each channel, or the running ones.
    weight, bias : array (C,), optional
        Gamma and beta; 1 and 0 where absent.
    eps : float
        Added to the variance. May be 0 where every variance is positive.

    Returns
    -------
    scale, shift : array (C,)
        ``weight / sqrt(var + eps)`` and ``bias - mean * scale``, computed in float64 and rounded once: to the dtype of
        ``weight``, and without one to the common dtype of ``mean`` and ``var``.

    Raises
    ------
    ValueError
        Shapes that differ, eps negative, infinite or NaN, or ``var + eps`` not positive.
    TypeError
        A dtype that is not floating.
    OverflowError
        Where finite parameters give a value beyond the result's dtype. The message names the channels.
    """
    given = {"mean": mean, "var": var, "weight": weight, "bias": bias}
    arrays = {name: None if value is None else _as_float_array(value, name) for name, value in given.items()}
    means, variances, weights = _as_float_array(mean, "mean"), _as_float_array(var, "var"), arrays["weight"]
    affine = affine_of_statistics(means, variances, weights, arrays["bias"], eps)
    dtype = np.result_type(means, variances) if weights is None else weights.dtype
    scale, shift = _round(affine.scale, dtype), _round(affine.shift, dtype)
    _refuse_overflow(affine.finite & ~(np.isfinite(scale) & np.isfinite(shift)), dtype, "scale and shift")
    return scale, shift


# ----------------------------------------------------------------------------------------------------------------
# A batch norm and the linear layer beside it
# ----------------------------------------------------------------------------------------------------------------


def fold_conv(
    weight: ArrayLike, bias: ArrayLike | None, bn: BatchNorm, *, groups: int = 1, transposed: bool = False
) -> tuple[Array, Array]:
    """Fold a batch norm into the convolution, or transposed convolution, in front of it.

    Parameters
    ----------
    weight : array (O, I/groups, *kernel), or (I, O/groups, *kernel) where ``transposed``
        PyTorch's layout, with one kernel axis or more.
    bias : array (O,) or None
    bn : layer or mapping
        A batch norm over O channels: its running statistics are used, in either mode. A mapping has PyTorch's keys
        (``running_mean``, ``running_var``, and perhaps ``weight``, ``bias``) and perhaps ``eps`` (1e-5 where absent).
        An activation that the layer has stays to be applied behind the convolution.
    groups : int
        The convolution's groups; ``groups == I`` is depthwise.
    transposed : bool
        Whether this is a transposed convolution, whose output channels lie on the second axis.

    Returns
    -------
    weight, bias : array
        New arrays of the weight's shape, and (O,), in the weight's dtype.

    Raises
    ------
    ValueError
        Shapes or channel counts that do not go together, or a batch norm without usable statistics.
    TypeError
        A dtype that is not floating, or a ``bn`` of another kind.
    OverflowError
        Where finite values give one beyond the weight's dtype. The message names the channels.

    Warns
    -----
    RuntimeWarning
        Where all weights of a float16 channel sink below the smallest normal number and lose their digits.
    """
    array = _as_float_array(weight, "weight")
    return _fold_after(array, bias, affine_of(bn), conv_layout(array.shape, groups, transposed)).checked()


def fold_linear(weight: ArrayLike, bias: ArrayLike | None, bn: BatchNorm) -> tuple[Array, Array]:
    """Fold a batch norm into the linear layer in front of it.

    ``weight`` is (out, in) as in PyTorch, ``bias`` (out,) or None, and ``bn`` a batch norm over ``out`` channels whose
    input is the layer's two-dimensional output. Otherwise as :func:`fold_conv`.
    """
    array = _as_float_array(weight, "weight")
    return _fold_after(array, bias, affine_of(bn), linear_layout(array.shape)).checked()


def fold_into_next_conv(
    bn: BatchNorm, weight: ArrayLike, bias: ArrayLike | None, *, groups: int = 1
) -> tuple[Array, Array]:
    """Fold a batch norm into the convolution behind it, which must not pad.

    Parameters
    ----------
    bn : layer or mapping
        A batch norm over the convolution's I input channels, as in :func:`fold_conv`.
    weight : array (O, I/groups, *kernel)
    bias : array (O,) or None
    groups : int

    Returns
    -------
    weight, bias : array
        As in :func:`fold_conv`, which also lists what is raised.

    Notes
    -----
    With padding the result is wrong at the borders unless every shift is zero: the convolution pads with zeros behind
    the batch norm, and so with ``-shift / scale`` in front of it.
    """
    if getattr(bn, "activation", None) is not None:
        raise ValueError(f"an activation stands between the batch norm and the convolution: {bn!r}")
    array = _as_float_array(weight, "weight")
    affine = affine_of(bn)
    layout = conv_layout(array.shape, groups)
    if affine.channels != layout.inputs:
        raise ValueError(
            f"the batch norm has {affine.channels} channels, but a weight of shape {array.shape} "
            f"with groups={groups} takes {layout.inputs}"
        )
    return fold_before(array, _checked_bias(bias, layout.outputs), affine, layout).checked()


# ----------------------------------------------------------------------------------------------------------------
# How it is computed
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a weight's output and input channels lie, once it is seen with four axes (G, A, B, K).

    ====================================== ===================== ======== =======
    weight                                 seen as               outputs  inputs
    ====================================== ===================== ======== =======
    (O, I/G, *kernel) of a convolution     (G, O/G, I/G, kernel) G and A  G and B
    (I, O/G, *kernel) of a transposed one  (G, I/G, O/G, kernel) G and B  G and A
    (O, I) of a linear layer               (1, O, I, 1)          A        B
    (I, O) of a matrix product             (1, I, O, 1)          B        A
    (C,) of a batch norm                   (1, C, 1, 1)          A
    ====================================== ===================== ======== =======
    """

    view: tuple[int, int, int, int]
    output_axis: int

    @property
    def input_axis(self) -> int:
        return 3 - self.output_axis

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.view[0] * self.view[self.output_axis]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.view[0] * self.view[self.input_axis]

    def spread(self, factors: Wide, axis: int) -> Wide:
        """Give one factor a channel, (C,), the shape in which they broadcast along ``axis`` of the view."""
        shape = [self.view[0], 1, 1, 1]
        shape[axis] = self.view[axis]
        return factors.reshape(shape)

    def at_outputs(self, flags: Flags, axis: int, combine: Callable[..., Flags]) -> Flags:
        """Bring flags of the channels along ``axis`` to the outputs, (O,): a group's inputs reach all its outputs."""
        if axis == self.output_axis:
            return flags
        return np.repeat(combine(flags.reshape(self.view[0], -1), axis=1), self.view[self.output_axis])

    def largest(self, weight: Array) -> Wide:
        """Return the largest magnitude in each output channel, (O,); NaN where there is a NaN."""
        seen, others = weight.reshape(self.view), (self.input_axis, 3)
        highest, lowest = (reduce(seen, axis=others, initial=0).astype(np.float64) for reduce in (np.max, np.min))
        return np.asarray(np.maximum(highest, -lowest)).ravel()


def conv_layout(shape: Sequence[int], groups: int, transposed: bool = False) -> Layout:
    """Return the layout of a convolution's weight, or raise ValueError."""
    if len(shape) < 3:
        raise ValueError(f"a convolution's weight has at least three axes, got shape {tuple(shape)}")
    groups = integer(groups, "groups")
    if groups < 1 or shape[0] % groups:
        raise ValueError(
            f"groups must be positive and divide the first axis of the weight, "
            f"got groups={described(groups)} and shape {tuple(shape)}"
        )
    view = (groups, shape[0] // groups, shape[1], math.prod(shape[2:]))
    return Layout(view, output_axis=2 if truth(transposed, "transposed") else 1)


def linear_layout(shape: Sequence[int], output_axis: int = 0) -> Layout:
    """Return the layout of a matrix whose outputs lie on ``output_axis``, or raise ValueError."""
    if len(shape) != 2:
        raise ValueError(f"a linear weight must have two axes, got shape {tuple(shape)}")
    return Layout((1, shape[0], shape[1], 1), output_axis + 1)


@dataclass(frozen=True, eq=False)
class Folded:
    """Folded weight and bias, in their dtype, and the output channels (O,) that it cannot hold."""

    weight: Array
    bias: Array
    overflow: Flags  # finite values gave one beyond the dtype
    underflow: Flags  # all weights sank below the smallest normal number, where digits are lost

    def checked(self) -> tuple[Array, Array]:
        """Return weight and bias, or raise OverflowError; warn where float16 weights sank."""
        _refuse_overflow(self.overflow, self.weight.dtype, "folded weight and bias")
        if self.weight.dtype == np.float16 and self.underflow.any():
            channels = listed(np.flatnonzero(self.underflow))
            warnings.warn(f"folded float16 weights sink so low that they lose digits in {channels}", RuntimeWarning, 3)
        return self.weight, self.bias


def fold_after(weight: Array, bias: Wide, affine: Affine, layout: Layout) -> Folded:
    """Fold ``affine`` into the weight in front of it; ``bias`` is (..., O) in float64 and goes through the map."""
    return _folded(weight, bias, affine(bias), affine, layout, layout.output_axis)


def fold_before(weight: Array, bias: Wide, affine: Affine, layout: Layout) -> Folded:
    """Fold ``affine`` into the weight behind it; ``bias`` is (..., O) in float64 and gets what the shift adds."""
    axis = layout.input_axis
    with np.errstate(all="ignore"):
        taps = weight.reshape(layout.view).sum(axis=3, dtype=np.float64)  # (G, A, B)
        added = (taps * layout.spread(affine.shift, axis)[..., 0]).sum(axis=axis).ravel()
        total = bias + added
    return _folded(weight, bias, total, affine, layout, axis)


def fold_term(term: Wide, affine: Affine, dtype: np.dtype[Any]) -> tuple[Array, Flags]:
    """Send an added constant (..., C) through ``affine``, rounded to ``dtype``; flag the channels that overflow."""
    rounded = _round(affine(term), dtype)
    overflow = affine.finite & np.isfinite(term) & ~np.isfinite(rounded)
    return rounded, np.any(overflow, axis=_all_but_last(overflow))


def _fold_after(weight: Array, bias: ArrayLike | None, affine: Affine, layout: Layout) -> Folded:
    if affine.channels != layout.outputs:
        raise ValueError(
            f"the batch norm has {affine.channels} channels, "
            f"but a weight of shape {weight.shape} gives {layout.outputs}"
        )
    return fold_after(weight, _checked_bias(bias, layout.outputs), affine, layout)


def _folded(
    weight: Array,
    bias: Wide,  # (..., O) before folding
    total: Wide,  # and after it
    affine: Affine,
    layout: Layout,
    axis: int,  # of the layout's view, along which the channels of the batch norm lie
) -> Folded:
    scaled, rounded = _scaled(weight, affine.scale, layout, axis), _round(total, weight.dtype)
    before, after = layout.largest(weight), layout.largest(scaled)
    bias_before, bias_after = (np.isfinite(array).all(axis=_all_but_last(array)) for array in (bias, rounded))
    sound = layout.at_outputs(affine.finite, axis, np.all) & np.isfinite(before) & bias_before
    tiny = _smallest_normal(weight.dtype)
    sunk = (before >= tiny) & (after < tiny) & layout.at_outputs(affine.scale != 0, axis, np.any)
    return Folded(scaled, rounded, sound & ~(np.isfinite(after) & bias_after), sunk)


def _scaled(weight: Array, factors: Wide, layout: Layout, axis: int) -> Array:
    """Multiply in float64 and round into a new array, block by block inside NumPy: no wide copy is made."""
    product = np.empty(layout.view, weight.dtype)
    seen, factor = weight.reshape(layout.view), layout.spread(factors, axis)
    with np.errstate(all="ignore"):
        if _is_bfloat16(weight.dtype):
            product[...] = _round(seen.astype(np.float64) * factor, weight.dtype)
        else:
            np.multiply(seen, factor, out=product, casting="unsafe", dtype=np.float64)
    scaled: Array = product.reshape(weight.shape)
    return scaled


def _round(values: Wide, dtype: np.dtype[Any]) -> Array:
    """Round float64 to ``dtype`` once."""
    with np.errstate(all="ignore"):
        if not _is_bfloat16(dtype):
            return values.astype(dtype)
        # The conversion to bfloat16 goes through float32 and would round twice. A float32 that is rounded to odd
        # (the last bit says that something was cut off) keeps the second rounding from seeing a false tie.
        narrow = values.astype(np.float32)
        beyond = np.abs(narrow.astype(np.float64)) > np.abs(values)
        narrow = np.where(beyond, np.nextafter(narrow, np.float32(0)), narrow)
        inexact = np.isfinite(values) & (narrow.astype(np.float64) != values)
        odd: Array = (narrow.view(np.uint32) | inexact).view(np.float32)
        return odd.astype(dtype)


def _all_but_last(array: Array) -> tuple[int, ...]:
    return tuple(range(array.ndim - 1))


def _smallest_normal(dtype: np.dtype[Any]) -> float:
    return float(np.finfo(np.float32 if _is_bfloat16(dtype) else dtype).smallest_normal)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------


def fold_state_dict(
    state: Mapping[str, Any],
    pairs: Iterable[tuple[str, str]],
    *,
    eps: float = DEFAULT_EPS,
    transposed: Iterable[str] = (),
) -> dict[str, Any]:
    """Fold the batch norms of a checkpoint.

    Parameters
    ----------
    state : mapping from str to array
        PyTorch's keys: ``conv1.weight``, ``bn1.running_mean`` and so on.
    pairs : iterable of (str, str)
        Names of a convolution or linear layer and of the batch norm behind it: ``[("conv1", "bn1"), ...]``. Whether it
        is a convolution follows from its weight, and so do its groups. A batch norm may stand behind several.
    eps : float
        Of all the batch norms: a checkpoint does not hold it.
    transposed : iterable of str
        Those of the named layers that are transposed convolutions. Nothing in a checkpoint tells them apart.

    Returns
    -------
    dict
        A new mapping in the same order without the batch norms' keys, in which every folded layer has a ``bias``
        (placed after its weight). Arrays that were not folded are the given ones, not copies.

    Raises
    ------
    ValueError
        Naming every key that is missing, a layer that is paired twice, or shapes that do not go together.
    TypeError, OverflowError
        As in :func:`fold_conv`, with the layer's name.
    """
    matched = _checked_pairs(state, pairs)
    turned = _checked_transposed(transposed, matched)
    folded: dict[str, Array] = {}
    for layer, norm in matched:
        bn = {key: state.get(f"{norm}.{key}") for key in STATE_KEYS[:4]}
        try:
            weight, bias = _fold_named(state, layer, {**bn, "eps": eps}, layer in turned)
        except (ValueError, TypeError, OverflowError) as error:
            raise type(error)(f"{layer} and {norm}: {error}") from error
        folded[f"{layer}.weight"], folded[f"{layer}.bias"] = weight, bias
    gone = {f"{norm}.{key}" for _, norm in matched for key in STATE_KEYS}
    result: dict[str, Any] = {}
    for key, value in state.items():
        if key in gone:
            continue
        result[key] = folded.get(key, value)
        layer, _, kind = str(key).rpartition(".")
        if kind == "weight" and f"{layer}.bias" in folded:
            result[f"{layer}.bias"] = folded[f"{layer}.bias"]
    return result


def _fold_named(state: Mapping[str, Any], layer: str, bn: BatchNorm, transposed: bool) -> tuple[Array, Array]:
    weight, bias = _as_float_array(state[f"{layer}.weight"], "weight"), state.get(f"{layer}.bias")
    if weight.ndim == 2 and not transposed:
        return fold_linear(weight, bias, bn)
    if not transposed:
        return fold_conv(weight, bias, bn)
    channels = affine_of(bn).channels
    if weight.ndim < 3 or channels % max(weight.shape[1], 1):
        raise ValueError(
            f"the batch norm has {channels} channels, "
            f"which is no multiple of what a transposed weight of shape {weight.shape} gives"
        )
    groups = max(channels // max(weight.shape[1], 1), 1)
    return fold_conv(weight, bias, bn, groups=groups, transposed=True)


def _checked_pairs(state: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {described(state)}")
    result: list[tuple[str, str]] = []
    for pair in _listed(pairs, "pairs"):
        match pair:
            case (str(layer), str(norm)):
                result.append((layer, norm))
            case _:
                raise ValueError(f"each of pairs must be (layer, batch norm), two names, got {described(pair)}")
    needed = [f"{layer}.weight" for layer, _ in result]
    needed += [f"{norm}.{key}" for _, norm in result for key in STATE_KEYS[2:4]]
    missing = [key for key in dict.fromkeys(needed) if key not in state]
    if missing:
        raise ValueError(f"missing from the state: {', '.join(missing)}")
    layers = [layer for layer, _ in result]
    twice = [layer for layer in dict.fromkeys(layers) if layers.count(layer) > 1]
    if twice:
        raise ValueError(f"a layer can take in one batch norm, but these are paired twice: {', '.join(twice)}")
    return result


def _listed(values: Any, name: str) -> list[Any]:
    try:
        return list(values)
    except Exception as error:  # whatever a foreign object raises
        raise TypeError(f"{name} must be a list, got {described(values)}") from error


def _checked_transposed(transposed: Iterable[str], pairs: list[tuple[str, str]]) -> set[str]:
    listed_names = [transposed] if isinstance(transposed, str) else _listed(transposed, "transposed")
    for name in listed_names:
        if not isinstance(name, str):
            raise TypeError(f"transposed must be names of layers, got {described(name)}")
    names = set(listed_names)
    unknown = names - {layer for layer, _ in pairs}
    if unknown:
        raise ValueError(f"transposed names layers that are in no pair: {', '.join(sorted(unknown))}")
    return names


# ----------------------------------------------------------------------------------------------------------------
# What may come in
# ----------------------------------------------------------------------------------------------------------------


def _as_float_array(value: ArrayLike, name: str) -> Array:
    array = converted(value, name)
    if array.dtype.name not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(FLOATS)}, got {array.dtype}")
    return array


def _checked_eps(eps: float) -> float:
    number = real(eps, "eps")
    if not 0 <= number < np.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return number


def _checked_bias(bias: ArrayLike | None, channels: int) -> Wide:
    if bias is None:
        return np.zeros(channels)
    array = _as_float_array(bias, "bias")
    if array.shape != (channels,):
        raise ValueError(f"the bias must have shape ({channels},), one value an output channel, got {array.shape}")
    return array.astype(np.float64)


def _refuse_overflow(channels: Flags, dtype: np.dtype[Any], what: str) -> None:
    if channels.any():
        raise OverflowError(f"{what} overflow {dtype.name} in {listed(np.flatnonzero(channels))}")


def listed(channels: NDArray[np.intp], limit: int = 8) -> str:
    """Write channel numbers for a message: at most ``limit`` of them."""
    shown = ", ".join(str(channel) for channel in channels[:limit])
    more = f" and {channels.size - limit} more" if channels.size > limit else ""
    return f"channel{'s' if channels.size > 1 else ''} {shown}{more}"


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    return dtype.name == "bfloat16"
