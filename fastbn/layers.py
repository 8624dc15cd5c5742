"""Batch normalization layers with PyTorch's names: parameters, running statistics, modes, checkpoints."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import functional as F
from fastbn._arrays import (
    FLOATS,
    Array,
    channel_axis,
    channel_vector,
    check_apart,
    converted,
    described,
    floating,
    integer,
    numbers,
    real,
    truth,
    view,
    wrong_channels,
)
from fastbn._channels import Parameters, fold, update_running
from fastbn._comm import BACKWARD, Detour, Inputs, Ranks, ranks_of

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ScaleShift"]

Activation = str | tuple[str, float] | None

UNWRITTEN = -1.0  # in the place of an invstd, which is never negative


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` with ``strict=False`` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _BatchNorm:
    """What the layers share."""

    _ranks: tuple[int, ...]  # the numbers of dimensions that a layer takes
    _detour: Detour | None = None  # of training statistics, see `comm`
    _buffers: tuple[str, ...] = ("running_mean", "running_var", "num_batches_tracked")  # of the state, where not None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.__module__ == __name__:  # other people's classes have their own words
            cls.__doc__ = f"{cls.__doc__}{_PARAMETERS}"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
        comm: Any = None,
    ) -> None:
        self.num_features = _positive_integer(num_features, "num_features")
        self.eps = _eps(eps)
        self.momentum = _momentum(momentum)
        self.affine = truth(affine, "affine")
        self.track_running_stats = truth(track_running_stats, "track_running_stats")
        channel_axis(axis, max(self._ranks))
        self.axis = integer(axis, "axis")
        self.dtype = dtype
        self.activation = activation
        self.training = True
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        self._saved: F.Saved | None = None
        self._checked: tuple[tuple[Any, ...], Parameters] | None = None  # see `_parameters`
        if self.affine:
            self.params["weight"] = np.ones(self.num_features, self.dtype)
            if truth(bias, "bias"):
                self.params["bias"] = np.zeros(self.num_features, self.dtype)
        self._make_buffers()
        self.comm = comm

    def _make_buffers(self) -> None:
        tracked = self.track_running_stats
        self.running_mean: Array | None = np.zeros(self.num_features, self.dtype) if tracked else None
        self.running_var: Array | None = np.ones(self.num_features, self.dtype) if tracked else None
        self.num_batches_tracked: int | None = 0 if tracked else None

    # --- forward and backward ---

    def __call__(self, x: ArrayLike, *, residual: ArrayLike | None = None, out: Array | None = None) -> Array:
        """``activation(batch_norm(x) + residual)``.

        Parameters
        ----------
        x : array_like of float32 or float64
            Of this layer's rank, with `num_features` channels on `axis`.
        residual : array_like, optional
            Added before the activation; of x's shape and dtype.
        out : array, optional
            Takes the result. Where it overlaps `x`, `backward` is not possible.

        Returns
        -------
        array
            Like `x`. In training it is normalised with the batch's statistics, which the running ones follow; in eval
            mode with the running ones, if there are any.

        Raises
        ------
        ValueError, TypeError
            For a wrong rank, channel count or dtype, and in training for one value per channel. The layer stays as it
            was. With `comm`, an error on one rank in training is an error on all, and no rank's layer changes.
        """
        try:
            array = floating(x)
            if array.ndim not in self._ranks:
                expected = " or ".join(f"{rank}D" for rank in self._ranks)
                raise ValueError(f"expected {expected} input (got {array.ndim}D input)")
            xv = view(array, self.axis)
            if xv.c != self.num_features:
                raise wrong_channels(self.num_features, self.axis, xv)
            parameters = self._parameters()
            if type(self.momentum) is not float:
                self.momentum = _momentum(self.momentum)
            if out is not None and self.training:
                check_apart(out, self.running_mean, self.running_var)
        except Exception as error:
            if self._detour is not None and self.training:
                self._detour.refuse(error)
            raise
        if self._detour is not None and self.training:
            y, saved = self._detour.forward(self, Inputs(xv, residual, out, parameters))
        elif self.training or parameters.running_mean is None:
            factor = self._factor(parameters) if self.training else None
            follow = factor is not None and array.size > 0
            norm = np.empty((6, xv.c))
            norm[2, 0] = UNWRITTEN
            try:
                y, saved = F._normalize_batch(xv, residual, parameters, self.eps, self._slope, out, factor, norm)
            except BaseException:  # Ctrl-C while a kernel runs is raised when it is done: the statistics have followed
                if follow and norm[2, 0] != UNWRITTEN:
                    self._tracked(parameters)
                raise
            if follow:
                self._tracked(parameters)
        else:
            y, saved = F._normalize_running(xv, residual, parameters, self.eps, self._slope, out)
        self._saved = saved
        return y

    forward = __call__

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Any:
        """Gradients of the last forward; those of the parameters are assigned to `grads`.

        Parameters
        ----------
        dy : array_like
            Gradient of the output, of the input's shape and dtype.
        out : array, optional
            Takes `dx`; `dy` itself is allowed.

        Returns
        -------
        dx : array
            Like the input: the full gradient where the forward used the batch's statistics, ``dy * scale`` where it
            used the running ones.
        dresidual : array
            Only where the forward had a residual.

        Raises
        ------
        RuntimeError
            Without a forward since the last backward, or where that forward wrote its output over its input.
        ValueError, TypeError
            If `dy` has not the input's shape and dtype.
        """
        saved = self._saved
        if saved is None or saved.overwritten:
            error = RuntimeError(
                "backward needs a forward before it: call the layer on its input first"
                if saved is None
                else "backward needs the input, but the forward's out= overwrote it"
            )
            if self._detour is not None and (self.training if saved is None else saved.total is not None):
                self._detour.refuse(error, BACKWARD)
            raise error
        dx, dresidual, dweight, dbias = self._gradients(dy, saved, out)
        self._saved = None
        self.grads = {key: grad for key, grad in (("weight", dweight), ("bias", dbias)) if key in self.params}
        return dx if dresidual is None else (dx, dresidual)

    def _gradients(self, dy: Any, saved: F.Saved, out: Array | None) -> tuple[Array, Array | None, Array, Array]:
        if self._detour is not None:
            return self._detour.gradients(self, saved, dy, out)
        return F._gradients(dy, saved, self.dtype, out)

    def _parameters(self) -> Parameters:
        """weight, bias and running statistics, checked: the very arrays of the last call are not checked again."""
        weight, bias = self.params.get("weight"), self.params.get("bias")
        mean, var = self.running_mean, self.running_var
        if self._checked is not None:
            before, parameters = self._checked
            same = before[0] is weight and before[1] is bias and before[2] is mean and before[3] is var
            if same and before[4] == self.num_features and not (self.training and _read_only(mean, var)):
                return parameters
        running = self._running(self.training) or (None, None)
        parameters = Parameters.of(*F._weight_and_bias(weight, bias, self.num_features), *running)
        given = (weight, bias, mean, var, self.num_features)
        as_given = all(a is b for a, b in zip(given[:4], parameters[:4], strict=True))
        self._checked = (given, parameters) if as_given else None  # copies grow stale
        return parameters

    def _running(self, update: bool = False) -> tuple[Array, Array] | None:
        """The running statistics, checked, also for being updated in place."""
        mean, var = self.running_mean, self.running_var
        if (mean is None) != (var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if mean is None or var is None:
            return None
        return F._running_vectors(mean, var, self.num_features, update)

    def _inference(self) -> Array:
        """`norm` of eval mode."""
        running = self._running()
        if running is None:
            raise ValueError(f"only a layer with running statistics can be folded, and {self!r} has none")
        vectors = F._weight_and_bias(self.weight, self.bias, self.num_features)
        return fold(Parameters.of(*vectors, *running), _eps(self.eps))

    def _track(self, parameters: Parameters, saved: F.Saved, count: int) -> None:
        """Let the running statistics follow those of a forward that left them alone."""
        factor = self._factor(parameters)
        if factor is not None:
            assert parameters.running_mean is not None
            assert parameters.running_var is not None
            update_running(parameters.running_mean, parameters.running_var, saved.norm, count, factor)
            self._tracked(parameters)

    def _factor(self, parameters: Parameters) -> float | None:
        """Weight of the next batch in the running statistics, None where there are none to follow."""
        if parameters.running_mean is None or not self.track_running_stats:
            return None
        batches = self._batches()
        return 1.0 / (batches + 1) if self.momentum is None else self.momentum

    def _batches(self) -> int:
        """`num_batches_tracked`, checked."""
        batches = self.num_batches_tracked or 0
        if type(batches) is not int:
            batches = integer(batches, "num_batches_tracked")
        if batches < 0:
            raise ValueError(f"num_batches_tracked must not be negative, got {batches}")
        return batches

    def _tracked(self, parameters: Parameters) -> None:
        """The running statistics among the parameters have followed a batch."""
        F._write_back(parameters, self.running_mean, self.running_var)
        self.num_batches_tracked = self._batches() + 1

    # --- parameters and modes ---

    @property
    def activation(self) -> Activation:
        """None, "relu" or ("leaky_relu", slope); the next forward applies what is assigned."""
        return self._activation

    @activation.setter
    def activation(self, activation: Activation) -> None:
        self._slope = slope_of(activation)
        self._activation = _kept(activation)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of parameters, running statistics and gradients: float32 or float64."""
        return self._real

    @dtype.setter
    def dtype(self, dtype: DTypeLike) -> None:
        self._real = _dtype(dtype)

    @property
    def _vectors(self) -> dict[str, Array]:
        """Weight and bias, as far as there are any, whether trained or not."""
        return self.params

    @property
    def comm(self) -> Any:
        """The communicator whose ranks train this layer together, or None; assigning drops the last forward."""
        return self._comm

    @comm.setter
    def comm(self, comm: Any) -> None:
        if comm is not None and type(self).__call__ is not _BatchNorm.__call__:
            raise TypeError(f"a {type(self).__name__} takes no communicator")
        pooled = self._detour is not None and not isinstance(self._detour, Ranks)
        if pooled:
            raise RuntimeError("comm cannot be assigned within recalibrate, which pools the layer's statistics")
        self._detour = ranks_of(comm, self.num_features)
        self._comm, self._saved = comm, None

    @property
    def weight(self) -> Array | None:
        """Scale of the normalised values, (C,), or None. Assigning copies into the array that is there."""
        return self._vectors.get("weight")

    @weight.setter
    def weight(self, values: ArrayLike) -> None:
        self._assign("weight", values)

    @property
    def bias(self) -> Array | None:
        """Shift of the normalised values, (C,), or None. Assigning copies into the array that is there."""
        return self._vectors.get("bias")

    @bias.setter
    def bias(self, values: ArrayLike) -> None:
        self._assign("bias", values)

    def _assign(self, key: str, values: ArrayLike) -> None:
        if key not in self._vectors:
            raise AttributeError(f"this {type(self).__name__} has no {key}")
        self._vectors[key][:] = channel_vector(values, key, self.num_features)

    def train(self, mode: bool = True) -> Self:
        """Use the batch's statistics from now on (or not, with False). Returns self."""
        self.training = truth(mode, "mode")
        return self

    def eval(self) -> Self:
        """Use the running statistics from now on. Returns self."""
        return self.train(False)

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean[:] = 0
            self.running_var[:] = 1
            self.num_batches_tracked = 0

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and `reset_running_stats`."""
        self.reset_running_stats()
        for key, value in (("weight", 1), ("bias", 0)):
            if key in self._vectors:
                self._vectors[key][:] = value

    # --- checkpoints and deployment ---

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and running statistics under PyTorch's keys."""
        buffers = {key: getattr(self, key) for key in self._buffers}
        return {key: np.array(value) for key, value in (self.params | buffers).items() if value is not None}

    def load_state_dict(self, state: Mapping[str, ArrayLike], strict: bool = True) -> IncompatibleKeys:
        """Take over a state with PyTorch's keys; values are copied into the arrays that are there.

        Parameters
        ----------
        state : mapping of str to array_like
            `num_batches_tracked` may be missing: the counter then stays.
        strict : bool
            Whether missing and unexpected keys are errors.

        Returns
        -------
        IncompatibleKeys
            The missing and unexpected keys.

        Raises
        ------
        ValueError
            Naming every missing, unexpected and misshapen key. The layer stays as it was.
        TypeError
            If `state` is no mapping.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
        strict = truth(strict, "strict")
        own = self.state_dict()
        missing = [key for key in own if key not in state and key != "num_batches_tracked"]
        unexpected = [key for key in state if key not in own]
        problems = []
        if strict and missing:
            problems.append("missing keys: " + ", ".join(missing))
        if strict and unexpected:
            problems.append("unexpected keys: " + ", ".join(map(str, unexpected)))
        loaded = {}
        for key in own:
            if key in state:
                try:
                    loaded[key] = _like(own[key], state[key], key)
                except (ValueError, TypeError) as error:
                    problems.append(f"{key}: {error}")
                current = getattr(self, key)
                if isinstance(current, np.ndarray) and not current.flags.writeable:
                    problems.append(f"{key}: the layer's array is read-only")
        if problems:
            raise ValueError(f"cannot load the state into {self!r}: " + "; ".join(problems))
        for key, value in loaded.items():
            current = getattr(self, key)
            if isinstance(current, np.ndarray):
                current[...] = value
            else:  # a counter, or a list in an array's place
                setattr(self, key, value if value.ndim else value.item())
        return IncompatibleKeys(missing, unexpected)

    def fold(self) -> ScaleShift:
        """The layer in eval mode as one scale and one shift a channel.

        Returns
        -------
        ScaleShift
            A snapshot of the current state, which computes bitwise what the layer computes in eval mode.

        Raises
        ------
        ValueError
            If there are no running statistics.
        """
        *_, scale, shift = self._inference()
        return ScaleShift(scale, shift, axis=self.axis, dtype=self.dtype, activation=self.activation)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_saved": None, "_checked": None, "_comm": None, "_detour": None}

    def __copy__(self) -> Self:
        return self._copied(self.__getstate__(), object.__new__(type(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = layer = object.__new__(type(self))  # first: the state may refer to the layer
        return self._copied(copy.deepcopy(self.__getstate__(), memo), layer)

    def _copied(self, state: dict[str, Any], layer: Self) -> Self:
        """The layer with this state and the same communicator."""
        layer.__dict__.update(state)
        layer.comm = self.comm
        return layer

    def __repr__(self) -> str:
        extras = ""
        if self.axis != 1:
            extras += f", axis={self.axis}"
        if self.dtype != np.float32:
            extras += f", dtype={self.dtype}"
        if self.activation is not None:
            extras += f", activation={self.activation!r}"
        return f"{type(self).__name__}({self.num_features}, {self._options()}{extras})"

    def _options(self) -> str:
        return (
            f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, bias={'bias' in self.params}, "
            f"track_running_stats={self.track_running_stats}"
        )


def _read_only(mean: Array | None, var: Array | None) -> bool:
    return mean is not None and var is not None and not (mean.flags.writeable and var.flags.writeable)


_PARAMETERS = """

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of a new batch in the running statistics; None for the cumulative average.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether to keep running statistics; without them eval mode uses the batch's statistics too.
    bias : bool
        Whether an affine layer has a bias.
    axis : int
        The channel axis; -1 for channels last.
    dtype : dtype
        Of parameters and running statistics: float32 or float64. The input may have the other one, and is computed in
        its own; statistics accumulate in float64.
    activation : None, "relu" or ("leaky_relu", slope)
        Applied in the same pass over memory.
    comm : mpi4py communicator, optional
        Its ranks train together: statistics are those of all ranks' batches, and `backward` gives the `dx` of the whole
        batch, while `grads` stay local and add up to the whole batch's. Every rank calls the layer, on batches of any
        size or none, and in the same mode. In eval mode ranks do not communicate.

    Attributes
    ----------
    params, grads : dict of str to (C,) array
        "weight" and "bias"; a parameter changed in place is seen by the next call.
    weight, bias, running_mean, running_var : (C,) array or None
    num_batches_tracked : int or None
    training : bool

    Raises
    ------
    ValueError, TypeError
        For a parameter out of range, or of another type. Attributes that are assigned are checked at the next call.

    Notes
    -----
    Normalisation uses the biased variance, the running variance takes the unbiased one, as in PyTorch. An empty batch
    changes nothing. The layer keeps a reference to its last input until `backward`; `fold` gives an inference form
    that keeps none. A copy shares the communicator; pickling drops it, since it means nothing elsewhere: assign `comm`
    after loading.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    2015.
"""


class BatchNorm1d(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, L) arrays."""

    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalization of (N, C, H, W) arrays."""

    _ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """Batch normalization of (N, C, D, H, W) arrays."""

    _ranks = (5,)


class ScaleShift:
    """One scale and one shift a channel: what batch normalization is in inference. Immutable.

    Parameters
    ----------
    scale, shift : (C,) array_like
    axis : int
        The channel axis.
    dtype : dtype
        Of `scale` and `shift` as attributes.
    activation : None, "relu" or ("leaky_relu", slope)
        Applied after the shift.

    Raises
    ------
    ValueError, TypeError
        If `scale` and `shift` are not numbers of one shape (C,), or another parameter is not as said here.
    """

    __slots__ = ("_norm", "_slope", "activation", "axis", "scale", "shift")

    scale: Array
    shift: Array
    axis: int
    activation: Activation
    _norm: Array
    _slope: float

    def __init__(
        self,
        scale: ArrayLike,
        shift: ArrayLike,
        *,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:
        scale = numbers(scale, "scale")
        norm = F._norm_of(scale, shift, scale.size)
        rounded = norm.astype(_dtype(dtype))
        rounded.flags.writeable = False
        for name, value in (
            ("_norm", norm),
            ("_slope", slope_of(activation)),
            ("scale", rounded[4]),
            ("shift", rounded[5]),
            ("axis", integer(axis, "axis")),
            ("activation", _kept(activation)),
        ):
            object.__setattr__(self, name, value)

    def __call__(self, x: ArrayLike, *, residual: ArrayLike | None = None, out: Array | None = None) -> Array:
        """``activation(x * scale + shift + residual)``, like `x`; ``out=x`` works in place."""
        array = floating(x)
        xv = view(array, self.axis)
        if xv.c != len(self.scale):
            raise wrong_channels(len(self.scale), self.axis, xv)
        return F._transform(xv, residual, self._norm, self._slope, out, keep_signs=False)[0]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a ScaleShift is immutable, cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a ScaleShift is immutable, cannot delete {name}")

    def __reduce__(self) -> Any:
        return _rebuild, (self._norm[4], self._norm[5], self.axis, self.scale.dtype, self.activation)

    def __repr__(self) -> str:
        values = f"scale={self.scale}, shift={self.shift}"
        return f"ScaleShift({values}, axis={self.axis}, activation={self.activation!r})"


def _rebuild(scale: Array, shift: Array, axis: int, dtype: DTypeLike, activation: Activation) -> ScaleShift:
    return ScaleShift(scale, shift, axis=axis, dtype=dtype, activation=activation)


def slope_of(activation: Activation) -> float:
    """Slope below zero: 1 without an activation, 0 for ReLU, its own for leaky ReLU."""
    match activation:
        case None:
            return 1.0
        case str() if activation == "relu":
            return 0.0
        case (str() as kind, float() | int() | np.floating() | np.integer() as slope) if (
            kind == "leaky_relu" and not isinstance(slope, bool)
        ):
            if math.isfinite(number := real(slope, "the slope of leaky_relu")):
                return number
    raise ValueError(f"activation must be None, 'relu' or ('leaky_relu', slope), got {described(activation)}")


def _kept(activation: Activation) -> Activation:
    """An activation that has a slope, as nobody can change it."""
    return activation if isinstance(activation, str | None) else (activation[0], activation[1])


def _positive_integer(value: Any, name: str) -> int:
    number = integer(value, name)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {described(number)}")
    if number > sys.maxsize:
        raise ValueError(f"{name} must be at most {sys.maxsize}, got {described(number)}")
    return number


def _eps(eps: Any) -> float:
    value = real(eps, "eps")
    if not value >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    return value


def _momentum(momentum: Any) -> float | None:
    return None if momentum is None else real(momentum, "momentum")


def _dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        result = np.dtype(dtype)
    except Exception as error:
        raise TypeError(f"dtype must be float32 or float64, got {described(dtype)}") from error
    if result not in FLOATS:
        raise TypeError(f"dtype must be float32 or float64, got {result}")
    return result


def _like(own: Array, value: Any, name: str) -> Array:
    """`value` with the shape and dtype of `own`, or an error saying what it is."""
    array = converted(value, name)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected numbers, got {array.dtype}")
    if array.shape == (1,) and own.shape == ():  # as PyTorch's first versions wrote a counter
        array = array[0]
    if array.shape != own.shape:
        raise ValueError(f"expected shape {own.shape}, got {array.shape}")
    if own.dtype.kind == "i" and not (0 <= float(array) < 2.0**63 and float(array).is_integer()):
        raise ValueError(f"expected a number of batches, got {array}")
    return array.astype(own.dtype)
