"""Recalibrate batch norm after weight averaging: ``python examples/recalibrate.py``.

Averaged weights make other activations than those that the running statistics were gathered from. One pass over the
data inside `fastbn.recalibrate` sets them to the exact statistics of that pass, whatever the sizes of its batches.
"""

from __future__ import annotations

import numpy as np
from spirals import Network, loss_and_gradient, spirals

import fastbn

BATCH, STEPS, AVERAGED, RATE = 48, 100, 60, 2.0  # so fast that averaging pays


def main() -> None:
    """Train, average the last weights, recalibrate."""
    network = Network()
    x, labels = spirals(2000, seed=1)
    rng = np.random.default_rng(2)
    averages = [np.zeros(p.shape) for p in network.parameters]
    for step in range(STEPS):
        batch = rng.integers(0, len(x), BATCH)
        _, dy = loss_and_gradient(network(x[batch]), labels[batch], BATCH)
        for parameter, gradient in zip(network.parameters, network.gradients(dy), strict=True):
            np.subtract(parameter, RATE * gradient, out=parameter)
        if step >= STEPS - AVERAGED:
            averages = [a + p / AVERAGED for a, p in zip(averages, network.parameters, strict=True)]
    test = spirals(1000, seed=3)
    print(f"accuracy after training:      {network.accuracy(*test):.3f}")
    for average, parameter in zip(averages, network.parameters, strict=True):
        parameter[:] = average
    print(f"with averaged weights:        {network.accuracy(*test):.3f}")
    with fastbn.recalibrate(network.norms):
        for first in range(0, len(x), 300):  # the last batch is smaller
            network(x[first : first + 300])
    print(f"and recalibrated batch norms: {network.accuracy(*test):.3f}")


if __name__ == "__main__":
    main()
