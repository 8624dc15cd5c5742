"""A small residual network in NumPy around fastbn's layers, for the demo.

Every layer is callable, gives the gradient of its input from `backward`, and keeps parameters and gradients in dicts
with the same keys, as the batch norm layers do. Batch norm, the skip connection and ReLU are one call,
``bn(x, residual=skip)``. `Relu` has the same signature and stands in its place in a network without batch norm, so that
a network is written once, and folding is the replacement of one by the other.

Inside the network images are channels last, (N, H, W, C): the windows of a convolution are then copied in runs of
neighbouring channels, which made unfolding and folding 2 to 4 times as fast as channels first on images of this size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import fastbn

Array = np.ndarray[Any, np.dtype[Any]]


class Layer(Protocol):
    """Something with parameters, and their gradients under the same keys."""

    @property
    def params(self) -> dict[str, Array]: ...

    @property
    def grads(self) -> dict[str, Array]: ...


class Stopwatch:
    """Time spent inside its ``with`` blocks.

    Attributes
    ----------
    seconds : float
        The sum so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Conv2d:
    """Convolution as one matrix product over the unfolded windows of all images.

    Parameters
    ----------
    weight : (O, C, K, K) array
        K is odd; images are padded with ``K // 2`` zeros on every side.
    bias : (O,) array, optional
        Not needed where batch norm follows.
    stride : int
    """

    def __init__(self, weight: Array, bias: Array | None = None, stride: int = 1) -> None:
        self.params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self.grads: dict[str, Array] = {}
        self.stride = stride

    @property
    def kernel(self) -> int:
        """K, height and width of a window."""
        return int(self.params["weight"].shape[-1])

    @property
    def padding(self) -> int:
        """Zeros on every side of an image."""
        return self.kernel // 2

    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) -> (N, H', W', O)."""
        windows = sliding_window_view(self._padded(x), (self.kernel, self.kernel), axis=(1, 2))
        windows = windows[:, :: self.stride, :: self.stride].transpose(0, 1, 2, 4, 5, 3)  # (N, H', W', K, K, C)
        size = windows.shape[:3]
        self._input_shape = x.shape
        # Windows overlap: this reshape is the copy that leaves the rest to BLAS.
        self._rows = windows.reshape(math.prod(size), -1)
        y = self._rows @ self._matrix()
        if "bias" in self.params:
            y += self.params["bias"]
        return y.reshape(*size, -1)

    def backward(self, dy: Array) -> Array:
        """(N, H', W', O) -> (N, H, W, C)."""
        drows = dy.reshape(-1, dy.shape[-1])
        outputs, inputs, k, _ = self.params["weight"].shape
        dmatrix = (self._rows.T @ drows).reshape(k, k, inputs, outputs)
        self.grads = {"weight": dmatrix.transpose(3, 2, 0, 1)}
        if "bias" in self.params:
            self.grads["bias"] = drows.sum(axis=0)
        dwindows = drows @ self._matrix().T
        return self._fold_windows(dwindows.reshape(*dy.shape[:3], k, k, inputs))

    def _matrix(self) -> Array:
        """The weight as (K*K*C, O), rows in the order of the unfolded windows."""
        weight = self.params["weight"]
        return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))

    def _padded(self, x: Array) -> Array:
        p = self.padding
        return np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))

    def _fold_windows(self, dwindows: Array) -> Array:
        """Add up the windows (N, H', W', K, K, C) where they overlap: the adjoint of unfolding."""
        n, h, w, c = self._input_shape
        p, step = self.padding, self.stride
        rows, columns = (step * size for size in dwindows.shape[1:3])
        dx = np.zeros((n, h + 2 * p, w + 2 * p, c), dwindows.dtype)
        for i, j in np.ndindex(self.kernel, self.kernel):
            dx[:, i : i + rows : step, j : j + columns : step] += dwindows[:, :, :, i, j]
        return dx[:, p : p + h, p : p + w]


class Relu:
    """``max(x + residual, 0)``, callable as a batch norm layer with an activation is."""

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}

    def __call__(self, x: Array, *, residual: Array | None = None) -> Array:
        """(N, H, W, C) -> (N, H, W, C)."""
        self._residual = residual is not None
        self._y = np.maximum(x if residual is None else x + residual, 0)
        return self._y

    def backward(self, dy: Array) -> Any:
        """Gradient of the input, and of the residual where there was one."""
        dx = np.where(self._y > 0, dy, 0)
        return (dx, dx) if self._residual else dx


@dataclass
class Unit:
    """A convolution, then batch norm with ReLU or ReLU alone."""

    conv: Conv2d
    norm: fastbn.BatchNorm2d | Relu
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """(N, H, W, C) -> (N, H', W', O); a residual is added before ReLU."""
        y = self.conv(x)
        with self.watch:
            return self.norm(y, residual=residual)

    def backward(self, dy: Array) -> Array:
        """Gradient of the input of a call without a residual."""
        with self.watch:
            dy = self.norm.backward(dy)
        return self.conv.backward(dy)

    def backward_residual(self, dy: Array) -> tuple[Array, Array]:
        """Gradients of the input and of the residual."""
        with self.watch:
            dy, dresidual = self.norm.backward(dy)
        return self.conv.backward(dy), dresidual

    def units(self) -> Iterator[Unit]:
        """Itself, as a block gives its two."""
        yield self

    def fold(self) -> Unit:
        """The unit with batch norm in the convolution's weights."""
        if isinstance(self.norm, Relu):
            return self
        params = self.conv.params
        weight, bias = fastbn.fold_conv(params["weight"], params.get("bias"), self.norm)
        return Unit(Conv2d(weight, bias, self.conv.stride), Relu())


@dataclass
class Block:
    """Two units with a skip connection from the input to the second one's ReLU."""

    first: Unit
    second: Unit

    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) -> (N, H, W, C)."""
        return self.second(self.first(x), residual=x)

    def backward(self, dy: Array) -> Array:
        """Gradient of the input: through both units, and past them."""
        dx, dskip = self.second.backward_residual(dy)
        return self.first.backward(dx) + dskip

    def units(self) -> Iterator[Unit]:
        """Both units."""
        yield self.first
        yield self.second

    def fold(self) -> Block:
        """The block with batch norm in the convolutions' weights."""
        return Block(self.first.fold(), self.second.fold())


class Classifier:
    """Average over the positions, then a linear layer.

    Parameters
    ----------
    weight : (K, C) array
    bias : (K,) array
    """

    def __init__(self, weight: Array, bias: Array) -> None:
        self.params = {"weight": weight, "bias": bias}
        self.grads: dict[str, Array] = {}

    def __call__(self, x: Array) -> Array:
        """(N, H, W, C) -> (N, K)."""
        self._shape = x.shape
        self._features = x.mean(axis=(1, 2))
        y: Array = self._features @ self.params["weight"].T + self.params["bias"]
        return y

    def backward(self, dy: Array) -> Array:
        """(N, K) -> (N, H, W, C)."""
        self.grads = {"weight": dy.T @ self._features, "bias": dy.sum(axis=0)}
        _, h, w, _ = self._shape
        dfeatures = dy @ self.params["weight"] / (h * w)
        return np.broadcast_to(dfeatures[:, None, None], self._shape)


class Network:
    """Layers in a row and a classifier at the end: images (N, C, H, W) -> logits (N, K)."""

    def __init__(self, layers: Sequence[Unit | Block], classifier: Classifier) -> None:
        self.layers = list(layers)
        self.classifier = classifier

    def __call__(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, K)."""
        return self.classifier(self.features(x, len(self.layers)))

    def features(self, x: Array, depth: int) -> Array:
        """(N, C, H, W) -> (N, H', W', O), the output of the first `depth` layers."""
        x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        for layer in self.layers[:depth]:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> Array:
        """Gradient of the images; those of the parameters are in the layers' `grads`."""
        dx = self.classifier.backward(dy)
        for layer in reversed(self.layers):
            dx = layer.backward(dx)
        return np.moveaxis(dx, -1, 1)

    def units(self) -> Iterator[Unit]:
        """All units, from the images on."""
        for layer in self.layers:
            yield from layer.units()

    def trainable(self) -> Iterator[Layer]:
        """All layers that may have parameters."""
        for unit in self.units():
            yield unit.conv
            yield unit.norm
        yield self.classifier

    def train(self, mode: bool = True) -> None:
        """Switch the batch norm layers to training, or with False to inference."""
        for unit in self.units():
            if isinstance(unit.norm, fastbn.BatchNorm2d):
                unit.norm.train(mode)

    def fold(self) -> Network:
        """The network for inference, with every batch norm in its convolution."""
        return Network([layer.fold() for layer in self.layers], self.classifier)


def residual_network(
    channels: int,
    classes: int,
    *,
    batch_norm: bool,
    rng: np.random.Generator,
    watch: Stopwatch,
    widths: Sequence[int] = (16, 32),
    blocks: int = 1,
) -> Network:
    """Build a network with fresh weights, which depend on `rng` and the sizes alone.

    For every width a convolution and residual blocks follow each other; all but the first halve height and width.

    Parameters
    ----------
    channels, classes : int
        Of the images, and of the logits.
    batch_norm : bool
        Whether batch norm follows every convolution. Otherwise the convolutions have a bias.
    rng : numpy.random.Generator
    watch : Stopwatch
        Gets the time spent in what follows the convolutions.
    widths : sequence of int
        Channels of the network, stage by stage.
    blocks : int
        Residual blocks a stage.

    Returns
    -------
    Network

    References
    ----------
    He et al., "Deep Residual Learning for Image Recognition", 2015; the weights' scale is that of their "Delving Deep
    into Rectifiers", 2015.
    """

    def unit(inputs: int, outputs: int, stride: int = 1) -> Unit:
        weight = rng.standard_normal((outputs, inputs, 3, 3), np.float32) * np.float32(np.sqrt(2 / (9 * inputs)))
        if batch_norm:
            return Unit(Conv2d(weight, None, stride), fastbn.BatchNorm2d(outputs, axis=-1, activation="relu"), watch)
        return Unit(Conv2d(weight, np.zeros(outputs, np.float32), stride), Relu(), watch)

    layers: list[Unit | Block] = []
    inputs = channels
    for width in widths:
        layers.append(unit(inputs, width, stride=2 if layers else 1))
        layers += [Block(unit(width, width), unit(width, width)) for _ in range(blocks)]
        inputs = width
    weight = rng.standard_normal((classes, inputs), np.float32) * np.float32(np.sqrt(1 / inputs))
    return Network(layers, Classifier(weight, np.zeros(classes, np.float32)))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Mean negative log likelihood of the labels under softmax.

    Parameters
    ----------
    logits : (N, K) array
    labels : (N,) array of int

    Returns
    -------
    loss : float
    dlogits : (N, K) array
        Its gradient.
    """
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_likelihood = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    images = np.arange(len(labels))
    dlogits = np.exp(log_likelihood)
    dlogits[images, labels] -= 1
    return -float(log_likelihood[images, labels].mean()), dlogits / np.float32(len(labels))


class Sgd:
    """Gradient descent with momentum, in PyTorch's form: ``v = momentum * v + g``, ``p -= rate * v``.

    Parameters
    ----------
    layers : iterable of Layer
    rate, momentum : float
    """

    def __init__(self, layers: Iterator[Layer], rate: float, momentum: float = 0.9) -> None:
        self.layers = list(layers)
        self.rate, self.momentum = rate, momentum
        self._velocities = [{key: np.zeros_like(p) for key, p in layer.params.items()} for layer in self.layers]

    def step(self) -> None:
        """Move every parameter, in place."""
        for layer, velocities in zip(self.layers, self._velocities, strict=True):
            for key in velocities:
                velocities[key] *= self.momentum
                velocities[key] += layer.grads[key]
                layer.params[key] -= self.rate * velocities[key]
