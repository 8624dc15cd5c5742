"""Recalibration: running statistics that are exactly those of a set of batches.

After weight averaging, or with new data, the running statistics of training no longer fit. Averages of batch statistics
weigh small batches like large ones; here the statistics of all batches are merged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastbn import functional as F
from fastbn._arrays import Array, described
from fastbn._comm import FORWARD, Detour, Inputs, Ranks
from fastbn.layers import _BatchNorm
from fastbn.moments import Moments

__all__ = ["recalibrate"]


@contextmanager
def recalibrate(layers: _BatchNorm | Iterable[_BatchNorm] | Mapping[str, _BatchNorm]) -> Iterator[None]:
    """Set running statistics to the exact pooled ones of all batches seen inside a ``with`` block.

    Inside, the layers are in training mode: they normalise with each batch's own statistics, of any size, even of one
    value per channel. At the end `running_mean` and `running_var` (unbiased) are those of all values together,
    `num_batches_tracked` is the number of batches that were not empty, and the modes are what they were.

    Parameters
    ----------
    layers : BatchNorm1d, BatchNorm2d, BatchNorm3d, or several in an iterable or a mapping of names
        With running statistics. Layers with a communicator pool over its ranks, which enter and leave together.

    Raises
    ------
    TypeError, ValueError
        At the beginning, for what is not such a layer; at the end, for a layer that saw one value per channel in all.
        After any error in the block, running statistics, counters and modes are as before.

    Warns
    -----
    UserWarning
        For a layer that saw nothing; it is left as it was.

    Examples
    --------
    >>> bn = fastbn.BatchNorm1d(3).eval()
    >>> batches = np.array_split(np.random.default_rng(0).standard_normal((100, 3)), 7)
    >>> with fastbn.recalibrate(bn):
    ...     for batch in batches:
    ...         y = bn(batch)
    >>> np.allclose(bn.running_var, np.concatenate(batches).var(0, ddof=1))
    True

    References
    ----------
    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
    """
    states = [_State(name, layer) for name, layer in _named(layers)]
    try:
        for state in states:
            state.begin()
        try:
            yield
            unseen = [state.name for state in states if not state.pool.batches]
            for state in states:
                state.check()
        except Exception as error:
            _tell_ranks(states, error)
            raise
        _tell_ranks(states, None)
        for state in states:
            state.take_over()
    except BaseException:
        for state in states:
            state.restore()
        raise
    finally:
        for state in states:
            state.end()
    if unseen:
        warnings.warn(f"recalibrate: no batch was seen by {', '.join(unseen)}; left as before", stacklevel=3)


class _Pool:
    """A layer's training statistics, merged over batches, on top of what it does otherwise (a `Detour` itself)."""

    def __init__(self, below: Detour | None, channels: int) -> None:
        self.below = below
        self.moments, self.batches = Moments.empty(channels), 0

    def forward(self, layer: Any, given: Inputs) -> tuple[Array, F.Saved]:
        """Normalise with this batch's statistics, and add them; the running ones wait for the end."""
        y, saved = self._normalize(layer, given)
        count = given.x.n * given.x.s if saved.total is None else saved.total
        if count:
            self.moments.merge(Moments(count, saved.norm[0], saved.norm[1] * count))
            self.batches += 1
        return y, saved

    def _normalize(self, layer: Any, given: Inputs) -> tuple[Array, F.Saved]:
        if isinstance(self.below, Ranks):
            return self.below.normalize(layer, given, least=1)
        if self.below is not None:
            return self.below.forward(layer, given)
        x, residual, out, parameters = given
        if x.n * x.s == 1:  # what training refuses
            y, saved = F._normalize_merged(
                x, residual, parameters, layer.eps, layer._slope, out, lambda *moments: moments
            )
            saved.total = None
            return y, saved
        return F._normalize_batch(x, residual, parameters, layer.eps, layer._slope, out)

    def gradients(
        self, layer: Any, saved: F.Saved, dy: Any, out: Array | None
    ) -> tuple[Array, Array | None, Array, Array]:
        """dx, dresidual, dweight and dbias."""
        if self.below is None:
            return F._gradients(dy, saved, layer.dtype, out)
        return self.below.gradients(layer, saved, dy, out)

    def refuse(self, error: Exception, kind: int = FORWARD) -> None:
        """Tell other ranks, if there are any."""
        if self.below is not None:
            self.below.refuse(error, kind)


class _State:
    """What a layer was like before, and its pool."""

    def __init__(self, name: str, layer: Any) -> None:
        if not isinstance(layer, _BatchNorm) or type(layer).__call__ is not _BatchNorm.__call__:
            raise TypeError(
                f"recalibrate takes BatchNorm1d, 2d and 3d layers, got {name} of type {type(layer).__name__}"
            )
        running = layer._running(update=True)
        if not layer.track_running_stats or running is None:
            raise ValueError(f"recalibrate sets running statistics, and {name} has none: {layer!r}")
        self.name, self.layer = name, layer
        self.training, self.tracked = layer.training, layer.num_batches_tracked
        self.arrays = layer.running_mean, layer.running_var
        self.values = [values.copy() for values in running]
        self.pool = _Pool(layer._detour, layer.num_features)

    def begin(self) -> None:
        self.layer._detour = self.pool
        self.layer.training = True

    def check(self) -> None:
        if self.pool.moments.count == 1:
            raise ValueError(f"{self.name} saw one value per channel in all, whose unbiased variance is undefined")

    def take_over(self) -> None:
        """Make the pooled statistics the running ones."""
        if self.pool.batches:
            moments, (mean, var) = self.pool.moments, (self.layer.running_mean, self.layer.running_var)
            assert mean is not None
            assert var is not None
            with np.errstate(all="ignore"):
                mean[:], var[:] = moments.mean, moments.var(ddof=1)
            self.layer.num_batches_tracked = self.pool.batches

    def restore(self) -> None:
        """Take back what the block did to the running statistics."""
        self.layer.running_mean, self.layer.running_var = self.arrays
        self.layer.num_batches_tracked = self.tracked
        for array, values in zip(self.arrays, self.values, strict=True):
            assert array is not None
            array[:] = values

    def end(self) -> None:
        self.layer._detour = self.pool.below
        self.layer.training = self.training


def _named(layers: Any) -> list[tuple[str, _BatchNorm]]:
    """Every layer once, with a name for messages."""
    if isinstance(layers, _BatchNorm):
        pairs = [(type(layers).__name__, layers)]
    elif isinstance(layers, Mapping):
        pairs = [(str(name), layer) for name, layer in layers.items()]
    else:
        try:
            pairs = [(f"layer {i}", layer) for i, layer in enumerate(layers)]
        except Exception as error:
            raise TypeError(
                f"recalibrate takes layers: one, an iterable or a mapping of them, got {described(layers)}"
            ) from error
    unique: dict[int, tuple[str, Any]] = {}
    for name, layer in pairs:
        unique.setdefault(id(layer), (name, layer))
    return list(unique.values())


def _tell_ranks(states: list[_State], error: Exception | None) -> None:
    """Where layers share their statistics with other ranks, let all of them know how the block ended."""
    together: list[list[Ranks]] = []  # by communicator
    for state in states:
        ranks = state.pool.below
        if isinstance(ranks, Ranks):
            same = next((group for group in together if group[0].comm is ranks.comm), None)
            if same is None:
                together.append([ranks])
            else:
                same.append(ranks)
    for group in together:
        told = error is not None and any(ranks.met_leaving for ranks in group)  # by one who left earlier
        for ranks in group:
            ranks.met_leaving = False
        if not told:
            group[0].leave(error)
