"""The one table of shapes and dtypes: the tests check every entry of it, the benchmarks time the entries marked for it.

A shape is the array's own, channels last included, so that a case reads as what a user would pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DTYPES = (np.float32, np.float64)

# How far a result may stand from the true one, as a share of the true one's largest value.
TOLERANCE = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-10}


class Data(NamedTuple):
    """What one call needs; `x`, `dy` and `residual` have the case's shape, the others are (C,)."""

    x: np.ndarray
    dy: np.ndarray
    residual: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Case:
    """An input's shape and where its channels are (`axis` 1 or -1)."""

    shape: tuple[int, ...]
    axis: int = 1

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + ("-last" if self.axis == -1 else "")

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.size // self.channels

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes that statistics run over."""
        channel = self.axis % len(self.shape)
        return tuple(i for i in range(len(self.shape)) if i != channel)

    @property
    def layer(self) -> str:
        """Name of the layer class that takes this rank."""
        return {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(self.shape)]

    def per_channel(self, values: np.ndarray) -> np.ndarray:
        """(C,) made to broadcast against the input."""
        return np.expand_dims(values, self.reduced)

    def make(
        self, dtype: np.typing.DTypeLike = np.float32, *, mean: float = 0.5, std: float = 2.0, seed: int = 0
    ) -> Data:
        """Draw normal data of about that mean and standard deviation, a different one in every channel."""
        rng = np.random.default_rng(seed)
        offset = self.per_channel(mean + std * rng.uniform(-1, 1, self.channels))
        spread = self.per_channel(std * rng.uniform(0.5, 1.5, self.channels))
        x, dy, residual = (rng.standard_normal(self.shape, np.float32) for _ in range(3))
        weight, bias = rng.uniform(-1.5, 1.5, self.channels), rng.standard_normal(self.channels)
        return Data(*(a.astype(dtype) for a in (offset + spread * x, dy, residual, weight, bias)))


# Quick ones, for every combination of backend and dtype: all ranks, both layouts, odd sizes, one channel, one sample.
SMALL = (
    Case((2, 1)),
    Case((5, 3)),
    Case((32, 64)),
    Case((33, 17)),
    Case((7, 144)),
    Case((257, 16)),
    Case((9, 1009)),
    Case((2, 3, 1)),
    Case((1, 16, 40)),
    Case((3, 17, 31)),
    Case((37, 3), axis=-1),
    Case((6, 29, 17), axis=-1),
    Case((1, 3, 1, 2)),
    Case((2, 1, 3, 3)),
    Case((5, 144, 7, 7)),
    Case((3, 17, 14, 14)),
    Case((2, 16, 13, 13)),
    Case((1, 3, 55, 55)),
    Case((4, 7, 7, 144), axis=-1),
    Case((2, 13, 13, 17), axis=-1),
    Case((3, 14, 14, 1), axis=-1),
    Case((1, 5, 7, 3), axis=-1),
    Case((3, 129, 3, 3)),
    Case((2, 3, 3, 4, 5)),
    Case((1, 17, 2, 7, 7)),
    Case((2, 3, 4, 5, 16), axis=-1),
)

# Big enough to go parallel: many channels, one channel, one sample, short rows, long rows.
PARALLEL = (
    Case((4096, 64)),
    Case((3, 40009)),
    Case((6, 2, 33001)),
    Case((2, 4, 33000)),
    Case((1, 4, 182, 182)),
    Case((5, 3, 777)),
    Case((8, 16, 55, 55)),
    Case((16, 1, 120, 120)),
    Case((1, 17, 112, 112)),
    Case((16, 144, 7, 7)),
    Case((300, 3, 14, 14)),
    Case((8, 55, 55, 16), axis=-1),
    Case((4, 120, 120, 1), axis=-1),
    Case((2, 3, 8, 55, 55)),
)

# More than 40 MB in float32: beyond the cache, where outputs are written past it.
HUGE = (
    Case((8, 64, 144, 145)),
    Case((128, 1792, 7, 7)),
    Case((8, 144, 145, 64), axis=-1),
)

CASES = SMALL + PARALLEL

# Timed, with the batch sizes of training; the first seven are ResNet-50's.
BENCH = (
    Case((32, 64, 112, 112)),
    Case((32, 64, 56, 56)),
    Case((32, 256, 56, 56)),
    Case((32, 512, 28, 28)),
    Case((32, 1024, 14, 14)),
    Case((32, 2048, 7, 7)),
    Case((1, 64, 56, 56)),
    Case((8, 64, 56, 56)),
    Case((32, 144, 56, 56)),
    Case((32, 576, 14, 14)),
    Case((32, 1280, 7, 7)),
    Case((32, 3, 224, 224)),
    Case((32, 17, 112, 112)),
    Case((32, 64, 55, 55)),
    Case((32, 256, 13, 13)),
    Case((4, 64, 16, 56, 56)),
    Case((64, 128, 1000)),
    Case((65536, 256)),
    Case((32, 64)),
    Case((32, 56, 56, 64), axis=-1),
    Case((32, 14, 14, 1024), axis=-1),
)
