"""Batch normalization for small or odd batches: in virtual batches, renormalised, by running sums, frozen.

They are layers like those of `fastbn.layers`, on the same kernels, but each takes arrays of every rank from 2: (N, C),
(N, C, L), (N, C, H, W) and so on, or with the channels elsewhere by `axis`. The batch is the first of the other axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fastbn import functional as F
from fastbn._arrays import (
    Array,
    View,
    channel_axis,
    channel_vector,
    check_apart,
    check_out,
    floating,
    real,
    same_layout,
    view,
    writable_in_place,
    wrong_channels,
)
from fastbn._channels import Parameters, finish_gradient, finish_statistics
from fastbn._engine import kernels
from fastbn._memory import empty_like
from fastbn._merge import merge
from fastbn.layers import Activation, IncompatibleKeys, _BatchNorm, _momentum, _positive_integer

__all__ = ["BatchRenorm", "FrozenBatchNorm", "GhostBatchNorm", "RunningBatchNorm"]

MAX_RANK = 64  # of a NumPy array


class _Variant(_BatchNorm):
    """What the variants share: any rank, and one forward for training and one for inference."""

    _ranks = tuple(range(2, MAX_RANK + 1))
    _detail: Any = None  # what the gradients of the last forward need beyond `Saved`; None where it was inference

    def __init_subclass__(cls) -> None:
        pass  # each has a docstring of its own

    def __call__(self, x: ArrayLike, *, residual: ArrayLike | None = None, out: Array | None = None) -> Array:
        """``activation(normalised(x) + residual)``.

        Parameters
        ----------
        x : array_like of float32 or float64
            Of two dimensions or more, with `num_features` channels on `axis`.
        residual : array_like, optional
            Added before the activation; of x's shape and dtype.
        out : array, optional
            Takes the result. Where it overlaps `x`, `backward` is not possible.

        Returns
        -------
        array
            Like `x`.

        Raises
        ------
        ValueError, TypeError
            For a wrong rank, channel count or dtype, and in training for too small a batch. The layer stays as it was.
        """
        array = floating(x)
        if array.ndim < 2:
            raise ValueError(f"expected input of at least 2 dimensions (got {array.ndim}D input)")
        xv = view(array, self.axis)
        if xv.c != self.num_features:
            raise wrong_channels(self.num_features, self.axis, xv)
        self.momentum = _momentum(self.momentum)
        forward = self._train if self._trains() else self._infer
        y, self._saved, self._detail = forward(xv, residual, out)
        return y

    forward = __call__

    def _trains(self) -> bool:
        """Whether the next forward looks at the batch's own statistics."""
        return self.training

    def _train(self, xv: View, residual: Any, out: Array | None) -> tuple[Array, F.Saved, Any]:
        """Forward in training: output, and what the gradients need."""
        return self._infer(xv, residual, out)

    def _infer(self, xv: View, residual: Any, out: Array | None) -> tuple[Array, F.Saved, Any]:
        return *self._scale(xv, residual, out, self._inference(), batch=False), None

    def _scale(self, xv: View, residual: Any, out: Array | None, norm: Array, *, batch: bool) -> tuple[Array, F.Saved]:
        """y = activation((x - center) * scale + shift + residual), and what it leaves for the gradients."""
        y, signs, overwritten, backend = F._transform(xv, residual, norm, self._slope, out)
        return y, F.Saved(xv, norm, signs, self._slope, batch, residual is not None, overwritten, backend)

    def _moments(self, xv: View) -> tuple[Array, Array]:
        """Mean and m2 of the batch, (C,)."""
        F._training_eps(self.eps)
        if xv.n * xv.s == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {xv.array.shape}")
        mean, m2 = np.zeros(xv.c), np.zeros(xv.c)
        if xv.array.size:
            kernels().moments(xv.array, xv.n, xv.c, xv.s, mean, np.empty(xv.c), m2)
        return mean, m2

    def _batch_axis(self, x: Array) -> int:
        return 0 if channel_axis(self.axis, x.ndim) else 1

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_detail": None}


class GhostBatchNorm(_Variant):
    """Batch normalization in virtual batches: each is normalised on its own, as if the batch were that small.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    virtual_batch_size : int
        Samples that are normalised together. A batch of N samples is cut into ``ceil(N / virtual_batch_size)`` parts of
        one size, as far as that goes: the last one may be smaller, as with ``torch.chunk``.
    eps, momentum, affine, track_running_stats, bias, axis, dtype, activation
        As in `BatchNorm2d`.

    Notes
    -----
    In training the running statistics follow one virtual batch after the other, in order, each with weight `momentum`;
    `num_batches_tracked` counts virtual batches. Inference is that of `BatchNorm2d`; without running statistics it
    normalises in virtual batches too. Where a part would have one value per channel, the forward is an error, and the
    layer stays as it was.

    References
    ----------
    Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in large batch training
    of neural networks", 2017, algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        virtual_batch_size: int = 128,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            axis=axis,
            dtype=dtype,
            activation=activation,
        )
        self.virtual_batch_size = _positive_integer(virtual_batch_size, "virtual_batch_size")

    def _trains(self) -> bool:
        return self.training or self._running() is None

    def _train(self, xv: View, residual: Any, out: Array | None) -> tuple[Array, F.Saved, Any]:
        running = self._running(update=True) if self.training and self.track_running_stats else None
        if running:
            check_apart(out, self.running_mean, self.running_var)
        vectors = F._weight_and_bias(self.weight, self.bias, self.num_features)
        parameters = Parameters.of(*vectors, *(running or ()))
        y, _, _, overwritten = F._prepare(kernels(), xv, residual, 1.0, out, vectors)
        residual = None if residual is None else floating(residual)
        parts, saved = self._parts(xv), []
        for part in parts:
            inputs, added = view(xv.array[part], self.axis), None if residual is None else residual[part]
            saved.append(F._normalize_batch(inputs, added, parameters, self.eps, self._slope, y[part])[1])
        if xv.array.size:
            for ghost in saved:
                self._track(parameters, ghost, ghost.x.n * ghost.x.s)
        whole = F.Saved(xv, np.empty((6, 0)), None, self._slope, True, residual is not None, overwritten, None)
        return F._delivered(y, out), whole, list(zip(parts, saved, strict=True))

    def _parts(self, xv: View) -> list[tuple[slice, ...]]:
        """Where the virtual batches lie."""
        axis = self._batch_axis(xv.array)
        samples = xv.array.shape[axis]
        if not samples:
            return []
        wanted = _positive_integer(self.virtual_batch_size, "virtual_batch_size")
        size = -(-samples // -(-samples // wanted))
        values = xv.n * xv.s // samples
        if values == 1 and (size == 1 or samples % size == 1):
            raise ValueError(
                f"Expected more than 1 value per channel when training, got a virtual batch of 1 sample: "
                f"{samples} samples in virtual batches of {size}, input size {xv.array.shape}"
            )
        around = (slice(None),) * axis
        return [(*around, slice(first, first + size)) for first in range(0, samples, size)]

    def _gradients(self, dy: Any, saved: F.Saved, out: Array | None) -> tuple[Array, Array | None, Array, Array]:
        if self._detail is None:
            return super()._gradients(dy, saved, out)
        x = saved.x.array
        dy = F._checked_gradient(dy, x)
        if out is not None:
            check_out(out, x.shape, x.dtype)
        dx = out if out is not None and writable_in_place(out, saved.x, (dy, x)) else empty_like(x)
        dresidual = empty_like(x) if saved.residual else None
        sums = np.zeros((2, saved.x.c))
        for part, ghost in self._detail:
            _, through, *grads = F._gradients(dy[part], ghost, sums.dtype, dx[part])
            sums += grads
            if dresidual is not None:
                dresidual[part] = through
        return F._delivered(dx, out), dresidual, *sums.astype(self.dtype)

    def _options(self) -> str:
        return f"virtual_batch_size={self.virtual_batch_size}, {super()._options()}"


class BatchRenorm(_Variant):
    """Batch renormalization: training sees what inference will see, with limits to how far it follows.

    In training ``y = weight * ((x - mean) / std * r + d) + bias`` with the batch's own mean and
    ``std = sqrt(var + eps)``, where ``r = clip(std / running_std, 1 / r_max, r_max)`` and
    ``d = clip((mean - running_mean) / running_std, -d_max, d_max)`` are constants to the gradient. In inference
    ``y = weight * (x - running_mean) / running_std + bias``.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance; 1e-3 as published.
    momentum : float or None
        Weight of a new batch in the running statistics, 0.01 as published; None for the cumulative average.
    affine, bias, axis, dtype, activation
        As in `BatchNorm2d`.
    r_max, d_max : float
        Limits of the correction, at least 1 and at least 0. They are attributes that may be set between calls: the
        paper begins with 1 and 0, which is batch normalization, for the first 5000 steps, and then raises r_max to 3 by
        step 40000 and d_max to 5 by step 25000.

    Attributes
    ----------
    running_mean, running_std : (C,) array
        0 and 1 at first. The running standard deviation is the average of ``sqrt(var + eps)`` with the biased variance,
        as published.
    running_var : (C,) array of float64
        ``running_std**2 - eps``, for folding; read-only.

    References
    ----------
    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017.
    """

    _buffers = ("running_mean", "running_std", "num_batches_tracked")

    running_mean: Array

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        bias: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, bias=bias, axis=axis, dtype=dtype, activation=activation)
        self.r_max, self.d_max = r_max, d_max
        self._limits()

    def _make_buffers(self) -> None:
        self.running_mean = np.zeros(self.num_features, self.dtype)
        self.running_std = np.ones(self.num_features, self.dtype)
        self.num_batches_tracked = 0

    @property
    def running_var(self) -> Array:  # type: ignore[override]  # it follows from the standard deviation
        """``running_std**2 - eps``, (C,) float64."""
        return np.square(self.running_std, dtype=np.float64) - self.eps

    def reset_running_stats(self) -> None:
        """Running mean 0, running standard deviation 1, no batches."""
        self.running_mean[:], self.running_std[:] = 0, 1
        self.num_batches_tracked = 0

    def _limits(self) -> tuple[float, float]:
        r_max, d_max = real(self.r_max, "r_max"), real(self.d_max, "d_max")
        if not r_max >= 1:
            raise ValueError(f"r_max must be at least 1, got {r_max}")
        if not d_max >= 0:
            raise ValueError(f"d_max must not be negative, got {d_max}")
        return r_max, d_max

    def _train(self, xv: View, residual: Any, out: Array | None) -> tuple[Array, F.Saved, Any]:
        r_max, d_max = self._limits()
        parameters = Parameters.of(*F._weight_and_bias(self.weight, self.bias, self.num_features))
        running_mean = channel_vector(self.running_mean, "running_mean", self.num_features, update=True)
        running_std = channel_vector(self.running_std, "running_std", self.num_features, update=True)
        check_apart(out, self.running_mean, self.running_std)
        mean, m2 = self._moments(xv)
        norm = finish_statistics(max(xv.n * xv.s, 1), mean, m2, parameters, self.eps)
        with np.errstate(all="ignore"):
            std = np.sqrt(norm[1] + self.eps)
            r = np.clip(std / running_std, 1 / r_max, r_max)
            d = np.clip((mean - running_mean) / running_std, -d_max, d_max)
            norm[4] *= r
            norm[5] += (1.0 if parameters.weight is None else parameters.weight) * d
        y, saved = self._scale(xv, residual, out, norm, batch=True)
        if xv.array.size:
            count = (self.num_batches_tracked or 0) + 1
            factor = 1 / count if self.momentum is None else self.momentum
            with np.errstate(all="ignore"):
                for running, new in ((self.running_mean, mean), (self.running_std, std)):
                    running[:] = running + factor * (new - running)
            self.num_batches_tracked = count
        return y, saved, (r, d)

    def _gradients(self, dy: Any, saved: F.Saved, out: Array | None) -> tuple[Array, Array | None, Array, Array]:
        if self._detail is None:
            return super()._gradients(dy, saved, out)
        r, d = self._detail
        dx, dresidual, dweight, dbias = F._gradients(dy, saved, np.dtype(np.float64), out)
        with np.errstate(all="ignore"):
            dweight = r * dweight + d * dbias
            return dx, dresidual, dweight.astype(self.dtype), dbias.astype(self.dtype)

    def _options(self) -> str:
        return (
            f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, bias={'bias' in self.params}, "
            f"r_max={self.r_max}, d_max={self.d_max}"
        )


class RunningBatchNorm(_Variant):
    """Batch normalization by running sums, in training too: for batches of two samples and more.

    Sums, sums of squares and counts of the batches are averaged, the newest with the weight
    ``m = 1 - (1 - momentum) / sqrt(N - 1)``, and the mean and variance of these averages normalise the batch that has
    just entered them. The gradient goes through its part in them.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    momentum : float
        Weight of a new batch of two samples; larger ones weigh more.
    affine, bias, axis, dtype, activation
        As in `BatchNorm2d`.

    Attributes
    ----------
    running_mean, running_m2 : (C,) array of float64
        Mean, and sum of squared deviations from it, of `count` values.
    count, dbias : float
        Averages of the batches' counts and of ones. Debiasing divides sums and counts by `dbias`, which the mean and
        the variance, as quotients of two of them, do not see.
    num_batches_tracked, num_samples_tracked : int
        What the course calls ``step`` and ``batch``.
    running_var : (C,) array of float64
        What it normalises with, ``running_m2 / count``, and 1 before the first batch; read-only.
    sums, sqrs : (C,) array of float64
        The averages of the batches' sums and sums of squares; read-only.

    Notes
    -----
    The mathematics is that of the course, with its limit: until 20 samples have been seen, no variance is taken for
    less than 0.01, and where the limit holds no gradient goes through the variance. The arithmetic is not: the course
    subtracts the square of the mean from the mean square, which loses all digits where the mean is large. Here the
    averages are kept as count, mean and m2 and merged like `Moments`, in float64, with m and 1 - m as weights.

    References
    ----------
    Howard and Gugger, fast.ai course v3, part 2, lesson 10, notebook ``07_batchnorm``, 2019.
    """

    _buffers = ("running_mean", "running_m2", "count", "dbias", "num_batches_tracked", "num_samples_tracked")

    running_mean: Array

    FEW_SAMPLES, LEAST_VARIANCE = 20, 0.01

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, bias=bias, axis=axis, dtype=dtype, activation=activation)
        self._share(2)

    def _share(self, samples: int) -> float:
        """Weight of a batch of so many samples."""
        momentum = real(self.momentum, "momentum")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum}")
        return 1 - (1 - momentum) / math.sqrt(samples - 1)

    def _make_buffers(self) -> None:
        self.running_mean, self.running_m2 = np.zeros(self.num_features), np.zeros(self.num_features)
        self.count = self.dbias = 0.0
        self.num_batches_tracked = self.num_samples_tracked = 0

    def reset_running_stats(self) -> None:
        """No sums, no batches."""
        self._make_buffers()

    @property
    def running_var(self) -> Array:  # type: ignore[override]  # it follows from m2
        """The variance that the layer normalises with, (C,) float64."""
        return self._variance(self.count, self.running_m2, self.num_samples_tracked)[0]

    @property
    def sums(self) -> Array:
        """Average of the batches' sums, (C,) float64."""
        return self.count * self._mean

    @property
    def sqrs(self) -> Array:
        """Average of the batches' sums of squares, (C,) float64."""
        return self.running_m2 + self.count * np.square(self._mean)

    @property
    def _mean(self) -> Array:
        return channel_vector(self.running_mean, "running_mean", self.num_features)

    def _variance(self, count: float, m2: Array, samples: int) -> tuple[Array, Array]:
        """Variance of so many samples, and where it is what its values say."""
        if not count:
            return np.ones_like(m2), np.ones_like(m2)
        var = m2 / count
        if samples >= self.FEW_SAMPLES:
            return var, np.ones_like(m2)
        return np.maximum(var, self.LEAST_VARIANCE), (var >= self.LEAST_VARIANCE).astype(np.float64)

    def _train(self, xv: View, residual: Any, out: Array | None) -> tuple[Array, F.Saved, Any]:
        if not xv.array.size:
            return self._infer(xv, residual, out)
        samples = xv.array.shape[self._batch_axis(xv.array)]
        if samples == 1:
            raise ValueError(f"Expected at least 2 samples when training, got input size {xv.array.shape}")
        share, (mean, m2) = self._share(samples), self._moments(xv)
        parameters = Parameters.of(*F._weight_and_bias(self.weight, self.bias, self.num_features))
        kept, added = (1 - share) * self.count, share * (xv.n * xv.s)
        mean, m2 = merge(kept, self._mean, (1 - share) * self.running_m2, added, mean, share * m2)
        count, seen = kept + added, self.num_samples_tracked + samples
        var, free = self._variance(count, m2, seen)
        norm = finish_statistics(1, mean, var, parameters, self.eps)
        y, saved = self._scale(xv, residual, out, norm, batch=False)
        self.running_mean, self.running_m2, self.count, self.num_samples_tracked = mean, m2, count, seen
        self.dbias = (1 - share) * self.dbias + share
        self.num_batches_tracked = (self.num_batches_tracked or 0) + 1
        return y, saved, (count / share, free)

    def _gradients(self, dy: Any, saved: F.Saved, out: Array | None) -> tuple[Array, Array | None, Array, Array]:
        if self._detail is None:
            return super()._gradients(dy, saved, out)
        count, free = self._detail

        def finish(sums: Array) -> Array:
            """A value's part in the mean is ``1 / count``, and in the variance ``2 / count * (x - mean)``."""
            whole = finish_gradient(sums, count, saved.norm, saved.x.array.dtype)
            sums[1] *= free
            grads = finish_gradient(sums, count, saved.norm, saved.x.array.dtype)
            grads[0] = whole[0]
            return grads

        return F._gradients(dy, saved, self.dtype, out, finish)

    def _options(self) -> str:
        return f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, bias={'bias' in self.params}"


class FrozenBatchNorm(_Variant):
    """Batch normalization whose statistics and parameters stand still, as detection models use it.

    The twin of ``torchvision.ops.FrozenBatchNorm2d``: ``weight``, ``bias``, ``running_mean`` and ``running_var`` are
    buffers of the state, nothing is trained, and `train` changes nothing.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance.
    axis, dtype, activation
        As in `BatchNorm2d`.

    Notes
    -----
    `params` and `grads` are empty; `backward` gives ``dx = dy * scale``. `load_state_dict` takes the states of
    trainable layers too: it passes over ``num_batches_tracked``.
    """

    _buffers = ("weight", "bias", "running_mean", "running_var")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: Activation = None,
    ) -> None:
        super().__init__(num_features, eps, 0.0, affine=False, axis=axis, dtype=dtype, activation=activation)

    def _make_buffers(self) -> None:
        super()._make_buffers()
        self._constants = {
            "weight": np.ones(self.num_features, self.dtype),
            "bias": np.zeros(self.num_features, self.dtype),
        }
        self.num_batches_tracked = None

    @property
    def _vectors(self) -> dict[str, Array]:
        return self._constants

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1."""
        super().reset_running_stats()
        self.num_batches_tracked = None

    def load_state_dict(self, state: Mapping[str, ArrayLike], strict: bool = True) -> IncompatibleKeys:
        """Take over the state of a frozen or of a trainable layer, as `BatchNorm2d.load_state_dict`."""
        if isinstance(state, Mapping):
            state = {key: value for key, value in state.items() if key != "num_batches_tracked"}
        return super().load_state_dict(state, strict)

    def _gradients(self, dy: Any, saved: F.Saved, out: Array | None) -> tuple[Array, Array | None, Array, Array]:
        if saved.slope != 1.0:  # what the activation let through is seen from x
            return super()._gradients(dy, saved, out)
        dy = F._checked_gradient(dy, saved.x.array)
        scale = np.zeros_like(saved.norm)
        scale[4] = saved.norm[4]
        dresidual = dy.copy() if saved.residual else None
        x = saved.x
        dx = F._transform(View(same_layout(dy, x), x.n, x.c, x.s), None, scale, 1.0, out)[0]
        return dx, dresidual, np.empty(0, self.dtype), np.empty(0, self.dtype)

    def _options(self) -> str:
        return f"eps={self.eps}"
