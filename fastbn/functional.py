"""Batch normalization as functions of arrays. Validation ends here, kernels begin.

The public functions follow PyTorch's `torch.nn.functional` and NumPy's ``axis=``, ``out=``. Those with a leading
underscore are what the layers are made of: they take checked vectors and keep what the backward pass needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastbn._arrays import (
    MEASURED,
    Array,
    View,
    channel_axis,
    channel_vector,
    check_apart,
    check_out,
    floating,
    real,
    same_layout,
    truth,
    view,
    writable_in_place,
)
from fastbn._channels import Parameters, finish_statistics, fold
from fastbn._engine import kernels
from fastbn._memory import empty_like
from fastbn.moments import Moments, NanPolicy

__all__ = ["batch_norm", "batch_norm_backward", "batch_norm_forward", "moments", "scale_shift"]


@dataclass(slots=True)
class Saved:
    """What a forward leaves for its backward."""

    x: View
    norm: Array  # (6, C) float64: mean, var, invstd; center, scale, shift
    signs: Array | None  # of the activation, where it cannot be computed again from x
    slope: float
    batch: bool  # whether the statistics were the batch's own
    residual: bool
    overwritten: bool  # the output lies over x
    backend: Any  # the signs are its own, in number and order
    total: int | None = None  # values a channel behind the statistics, where they are not this batch's alone


# --- public functions ---------------------------------------------------------------------------------------------


def batch_norm(
    x: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Batch normalization, as `torch.nn.functional.batch_norm`.

    Parameters
    ----------
    x : array_like of float32 or float64
        At least one-dimensional; axis `axis` has the C channels.
    running_mean, running_var : (C,) array of float32 or float64, or None
        Running statistics, both or neither. In training they are updated in place: mean and unbiased variance of the
        batch enter with weight `momentum`. Without training they are what `x` is normalised with.
    weight, bias : (C,) array_like, optional
        Scale and shift of the normalised values; 1 and 0 if not given.
    training : bool
        Normalise with the batch's own mean and biased variance.
    momentum : float
        Weight of the new statistics.
    eps : float
        Added to the variance; positive in training, else not negative.
    axis : int
        The channel axis.
    out : array, optional
        Takes the result; `x` itself is allowed.

    Returns
    -------
    array
        Like `x`.

    Raises
    ------
    ValueError
        For wrong shapes, an `eps` out of range, running statistics that are missing or incomplete, or a single value
        per channel in training.
    TypeError
        For a dtype that is not supported.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015.
    """
    momentum = real(momentum, "momentum")
    training = training if training is True else truth(training, "training")
    xv = view(_at_least_1d(floating(x)), axis)
    vectors = _weight_and_bias(weight, bias, xv.c)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if running_mean is None or running_var is None:
        if not training:
            raise ValueError("running_mean must be defined in evaluation mode")
        return _normalize_batch(xv, None, Parameters.of(*vectors), eps, 1.0, out)[0]
    running = _running_vectors(running_mean, running_var, xv.c, update=training)
    parameters = Parameters.of(*vectors, *running)
    if not training:
        return _normalize_running(xv, None, parameters, eps, 1.0, out)[0]
    if out is not None:
        check_apart(out, running_mean, running_var)
    y, _ = _normalize_batch(xv, None, parameters, eps, 1.0, out, momentum)
    _write_back(parameters, running_mean, running_var)
    return y


def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Normalise with the batch's own statistics and return them for `batch_norm_backward`.

    Parameters
    ----------
    x, weight, bias, eps, axis, out
        As for `batch_norm` in training.

    Returns
    -------
    y : array
        Like `x`.
    mean, invstd : (C,) array of float64
        The batch's mean and ``1 / sqrt(var + eps)`` with its biased variance.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm` in training.
    """
    xv = view(_at_least_1d(floating(x)), axis)
    parameters = Parameters.of(*_weight_and_bias(weight, bias, xv.c))
    y, saved = _normalize_batch(xv, None, parameters, eps, 1.0, out)
    return y, saved.norm[0], saved.norm[2]


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `batch_norm_forward`.

    Parameters
    ----------
    dy, x : array_like of one shape and dtype
        Gradient of the output, and the input.
    mean, invstd : (C,) array_like
        The statistics that the forward normalised with.
    weight : (C,) array_like, optional
        As in the forward.
    axis : int
        The channel axis.
    training : bool
        Whether `mean` and `invstd` are the batch's own, so that they depend on `x`. Otherwise they are constants, and
        ``dx = dy * weight * invstd``.
    out : array, optional
        Takes `dx`; `dy` or `x` itself is allowed.

    Returns
    -------
    dx : array
        Like `x`.
    dweight, dbias : (C,) array
        In weight's dtype, else in x's; computed whether or not a weight is given.

    Raises
    ------
    ValueError, TypeError
        If `dy` has not x's shape and dtype, a vector is not (C,), or a dtype is not supported.

    References
    ----------
    Ioffe and Szegedy, 2015, as for `batch_norm`: section 3, the gradients of the transform.
    """
    xv = view(_at_least_1d(floating(x)), axis)
    norm = np.zeros((6, xv.c))
    norm[0] = channel_vector(mean, "mean", xv.c)
    norm[2] = norm[4] = channel_vector(invstd, "invstd", xv.c)
    dtype = xv.array.dtype
    if weight is not None:
        weight = channel_vector(weight, "weight", xv.c)
        norm[4] *= weight
        dtype = weight.dtype
    saved = Saved(xv, norm, None, 1.0, truth(training, "training"), False, False, kernels())
    dx, _, dweight, dbias = _gradients(dy, saved, dtype, out)
    return dx, dweight, dbias


def scale_shift(x: ArrayLike, scale: ArrayLike, shift: ArrayLike, *, axis: int = 1, out: Array | None = None) -> Array:
    """``x * scale + shift``, one scale and one shift a channel.

    Parameters
    ----------
    x : array_like of float32 or float64
    scale, shift : (C,) array_like
        Rounded once to x's dtype.
    axis : int
        The channel axis.
    out : array, optional
        Takes the result; ``out=x`` works in place.

    Returns
    -------
    array
        Like `x`.

    Raises
    ------
    ValueError, TypeError
        For wrong shapes, or a dtype that is not supported.
    """
    xv = view(_at_least_1d(floating(x)), axis)
    return _transform(xv, None, _norm_of(scale, shift, xv.c), 1.0, out)[0]


def moments(
    x: ArrayLike,
    *,
    axis: int = 1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Moments:
    """Count, mean and m2 of every channel of `x`, in one pass.

    Parameters
    ----------
    x, axis, where, weights, nan_policy
        As for `Moments.update`.

    Returns
    -------
    Moments

    Raises
    ------
    ValueError, TypeError
        As `Moments.update`.
    """
    array = _at_least_1d(floating(x, dtypes=MEASURED))
    channels = array.shape[channel_axis(axis, array.ndim)]
    return Moments.empty(channels).update(array, axis, where=where, weights=weights, nan_policy=nan_policy)


# --- what layers are made of ----------------------------------------------------------------------------------------


def _training_eps(eps: Any) -> float:
    """`eps` as a float, checked for statistics of a batch."""
    value = real(eps, "eps")
    if not value > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {value}")
    return value


def _normalize_batch(
    xv: View,
    residual: Any,
    parameters: Parameters,
    eps: float,
    slope: float,
    out: Array | None,
    factor: float | None = None,
    norm: Array | None = None,
) -> tuple[Array, Saved]:
    """Training forward: the batch's statistics, then the output; the running statistics follow by `factor`, if any.

    `norm` (6, C) is written when they have followed, which may be told even where a signal is raised behind it.
    """
    eps = _training_eps(eps)
    count = xv.n * xv.s
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {xv.array.shape}")
    backend = kernels()
    y, res, signs, overwritten = _prepare(backend, xv, residual, slope, out, parameters[:2])
    norm = np.empty((6, xv.c)) if norm is None else norm
    if xv.array.size:
        backend.forward(xv.array, res, parameters, True, factor, eps, slope, xv.n, xv.c, xv.s, y, signs, norm)
    else:
        norm[:3], norm[3:] = np.nan, 0.0
    return _delivered(y, out), Saved(xv, norm, signs, slope, True, residual is not None, overwritten, backend)


def _normalize_merged(
    xv: View,
    residual: Any,
    parameters: Parameters,
    eps: float,
    slope: float,
    out: Array | None,
    merged: Callable[[int, Array, Array], tuple[int, Array, Array]],
) -> tuple[Array, Saved]:
    """Training forward with the statistics that `merged` makes of the batch's count, mean and m2."""
    eps = _training_eps(eps)
    backend = kernels()
    y, res, signs, overwritten = _prepare(backend, xv, residual, slope, out, parameters[:2])
    size, (mean, m2) = (xv.n, xv.c, xv.s), np.zeros((2, xv.c))
    if xv.array.size:
        backend.moments(xv.array, *size, mean, np.empty(xv.c), m2)
    total, mean, m2 = merged(xv.n * xv.s, mean, m2)
    norm = finish_statistics(max(total, 1), mean, m2, parameters, eps)
    if xv.array.size:
        backend.transform(xv.array, res, norm, slope, *size, y, signs)
    return _delivered(y, out), Saved(xv, norm, signs, slope, True, residual is not None, overwritten, backend, total)


def _normalize_running(
    xv: View, residual: Any, parameters: Parameters, eps: float, slope: float, out: Array | None
) -> tuple[Array, Saved]:
    """Inference forward: one scale and one shift a channel, from the running statistics."""
    eps = real(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    backend = kernels()
    y, res, signs, overwritten = _prepare(backend, xv, residual, slope, out, ())
    if xv.array.size:
        norm = np.empty((6, xv.c))
        backend.forward(xv.array, res, parameters, False, None, eps, slope, xv.n, xv.c, xv.s, y, signs, norm)
    else:
        norm = fold(parameters, eps)
    return _delivered(y, out), Saved(xv, norm, signs, slope, False, residual is not None, overwritten, backend)


def _transform(
    xv: View, residual: Any, norm: Array, slope: float, out: Array | None, keep_signs: bool = True
) -> tuple[Array, Array | None, bool, Any]:
    """y = activation((x - center) * scale + shift + residual), its signs, whether it lies over x, and the backend."""
    backend = kernels()
    y, res, signs, overwritten = _prepare(backend, xv, residual, slope, out, (), keep_signs)
    if xv.array.size:
        backend.transform(xv.array, res, norm, slope, xv.n, xv.c, xv.s, y, signs)
    return _delivered(y, out), signs, overwritten, backend


def _gradients(
    dy: Any,
    saved: Saved,
    dtype: np.dtype[Any],
    out: Array | None,
    finish: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array | None, Array, Array]:
    """dx, dresidual, dweight and dbias; the last two of the given dtype.

    `finish` makes `grads` of `sums`, see `finish_gradient`, where the statistics were others than this batch's.
    """
    xv, norm, backend = saved.x, saved.norm, saved.backend
    dy = _checked_gradient(dy, xv.array)
    g = same_layout(dy, xv)
    dx = out
    if out is not None:
        check_out(out, xv.array.shape, xv.array.dtype)
    if out is None or not writable_in_place(out, xv, (dy, xv.array)):
        dx = empty_like(xv.array)
    assert dx is not None
    dresidual = empty_like(xv.array) if saved.residual else None
    dweight, dbias = np.empty(xv.c, dtype), np.empty(xv.c, dtype)
    activation, size = (saved.slope, saved.signs), (xv.n, xv.c, xv.s)
    if not xv.array.size:
        dweight[:] = dbias[:] = 0
    elif finish is None:
        backend.backward(g, xv.array, norm, saved.batch, *activation, *size, dx, dresidual, dweight, dbias)
    else:
        sums = np.empty((2, xv.c))
        backend.gradient_sums(g, xv.array, norm, *activation, *size, sums)
        grads = finish(sums)
        backend.gradient_apply(g, xv.array, norm, *activation, *size, dx, dresidual, grads)
        dweight[:], dbias[:] = grads[:2]
    return _delivered(dx, out), dresidual, dweight, dbias


def _checked_gradient(dy: Any, x: Array) -> Array:
    """`dy` as an array, with the input's shape and dtype."""
    gradient = floating(dy, "dy")
    if gradient.dtype != x.dtype:
        raise TypeError(f"dy must have the input's dtype {x.dtype}, got {gradient.dtype}")
    if gradient.shape != x.shape:
        raise ValueError(f"dy must have the input's shape {x.shape}, got {gradient.shape}")
    return gradient


def _prepare(
    backend: Any,
    xv: View,
    residual: Any,
    slope: float,
    out: Array | None,
    others: tuple[Array | None, ...],
    keep_signs: bool = True,
) -> tuple[Array, Array | None, Array | None, bool]:
    """The array to compute into, the residual laid out as x is, room for signs, and whether `out` lies over x."""
    x, res, signs = xv.array, None, None
    if residual is not None:
        residual = floating(residual, "residual")
        if residual.dtype != x.dtype or residual.shape != x.shape:
            raise (TypeError if residual.dtype != x.dtype else ValueError)(
                f"residual must be {x.dtype} of shape {x.shape}, got {residual.dtype} of shape {residual.shape}"
            )
        res = same_layout(residual, xv)
        others = (*others, residual)
        if slope != 1.0 and keep_signs:
            signs = np.empty(backend.sign_words(xv.n, xv.c, xv.s, x.itemsize) if x.size else 0, np.uint16)
    if out is None:
        return empty_like(x), res, signs, False
    check_out(out, x.shape, x.dtype)
    overwritten = np.may_share_memory(out, x)
    y = out if writable_in_place(out, xv, (x, *others) if overwritten else others) else empty_like(x)
    return y, res, signs, overwritten


def _delivered(y: Array, out: Array | None) -> Array:
    """The result where the caller wants it."""
    if out is None or out is y:
        return y
    np.copyto(out, y)
    return out


def _norm_of(scale: Any, shift: Any, channels: int) -> Array:
    """`norm` of a scale and a shift alone."""
    norm = np.zeros((6, channels))
    norm[4] = channel_vector(scale, "scale", channels)
    norm[5] = channel_vector(shift, "shift", channels)
    return norm


def _weight_and_bias(weight: Any, bias: Any, channels: int) -> tuple[Array | None, Array | None]:
    """weight and bias as kernels take them, or None."""
    return (
        None if weight is None else channel_vector(weight, "weight", channels),
        None if bias is None else channel_vector(bias, "bias", channels),
    )


def _running_vectors(running_mean: Any, running_var: Any, channels: int, update: bool) -> tuple[Array, Array]:
    mean = channel_vector(running_mean, "running_mean", channels, update)
    var = channel_vector(running_var, "running_var", channels, update)
    if update and np.may_share_memory(running_mean, running_var) and np.shares_memory(running_mean, running_var):
        raise ValueError("running_mean and running_var share memory, and both are updated in place")
    return mean, var


def _write_back(updated: Parameters, running_mean: Any, running_var: Any) -> None:
    """Copy to the caller's arrays what was updated in copies of them."""
    if updated.running_mean is not None and updated.running_mean is not running_mean:
        np.copyto(running_mean, updated.running_mean)
    if updated.running_var is not None and updated.running_var is not running_var:
        np.copyto(running_var, updated.running_var)


def _at_least_1d(x: Array) -> Array:
    if x.ndim == 0:
        raise ValueError("x must have a channel axis, got a scalar")
    return x
