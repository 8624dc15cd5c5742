"""Three spirals of points, and a small network with batch norm that tells them apart: what the examples train."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import fastbn

CLASSES = 3


def spirals(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (samples, 2) and their classes (samples,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, samples)
    radius = np.sqrt(rng.uniform(0.02, 1, samples))
    angle = 2 * np.pi * (labels / CLASSES + 0.8 * radius) + rng.normal(0, 0.1, samples)
    points = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
    return points.astype(np.float32), labels


class Network:
    """Linear, batch norm with ReLU, twice; linear.

    Parameters
    ----------
    width : int
        Channels of the hidden layers.
    comm : mpi4py communicator, optional
        Its ranks train together.
    """

    def __init__(self, width: int = 64, comm: Any = None) -> None:
        rng = np.random.default_rng(0)
        sizes = (2, width, width, CLASSES)
        self.matrices = [rng.normal(0, np.sqrt(2 / a), (a, b)).astype(np.float32) for a, b in itertools.pairwise(sizes)]
        self.norms = [fastbn.BatchNorm1d(width, activation="relu", comm=comm) for _ in range(2)]

    @property
    def parameters(self) -> list[np.ndarray]:
        """All that is trained."""
        return [*self.matrices, *(p for bn in self.norms for p in bn.params.values())]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Scores (N, CLASSES)."""
        self.inputs = [x]
        for matrix, bn in zip(self.matrices, self.norms, strict=False):
            self.inputs.append(bn(self.inputs[-1] @ matrix))
        return self.inputs[-1] @ self.matrices[-1]

    def gradients(self, dy: np.ndarray) -> list[np.ndarray]:
        """Gradients of `parameters`, from that of the scores."""
        found = []
        for i in reversed(range(len(self.matrices))):
            found.append(self.inputs[i].T @ dy)
            if i:
                dy = self.norms[i - 1].backward(dy @ self.matrices[i].T)
        return [*reversed(found), *(g for bn in self.norms for g in bn.grads.values())]

    def train(self, mode: bool = True) -> None:
        """Switch all batch norms to training, or to inference."""
        for bn in self.norms:
            bn.train(mode)

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Share of points whose class is found in inference."""
        self.train(False)
        share = float((self(x).argmax(1) == labels).mean())
        self.train()
        return share


def loss_and_gradient(scores: np.ndarray, labels: np.ndarray, samples: int) -> tuple[float, np.ndarray]:
    """Cross entropy over a batch of so many samples, as far as these ones make it, and its gradient."""
    scores = scores - scores.max(1, keepdims=True, initial=-np.inf)
    chances = np.exp(scores)
    chances /= chances.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(chances[rows, labels]).sum() / samples
    chances[rows, labels] -= 1
    return float(loss), chances / samples
