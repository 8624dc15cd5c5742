"""Statistics and normalisation of Dask arrays, which may be larger than memory. Needs the extra ``dask``.

A data set is measured in one pass and normalised in a second one:

>>> import dask.array as da
>>> import fastbn
>>> import fastbn.dask
>>> images = da.random.default_rng(0).random((1000, 3, 8, 8), chunks=(100, 3, 8, 8))
>>> m = fastbn.dask.moments(images)
>>> scale, shift = fastbn.fold_scale_shift(m.mean, m.var(), eps=0)
>>> normalised = fastbn.dask.scale_shift(images, scale, shift)
>>> bool(abs(normalised.std().compute() - 1) < 1e-9)
True
"""

from __future__ import annotations

import copy
import math
import operator
import threading
from collections.abc import Callable, Iterable
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

try:
    import dask.array as da
    from dask.array.optimization import optimize
    from dask.base import DaskMethodsMixin, compute
    from dask.core import flatten
    from dask.threaded import get as threaded
except ModuleNotFoundError as error:
    raise ImportError('statistics of Dask arrays need the dask package: pip install "fastbn[dask]"') from error
from fastbn import functional as F
from fastbn._arrays import FLOATS, Array, channel_axis, channel_vector
from fastbn._engine import one_thread
from fastbn.moments import Moments

__all__ = ["DaskMoments", "moments", "scale_shift"]


def moments(
    array: da.Array,
    axis: int = 1,
    *,
    where: da.Array | ArrayLike | None = None,
    weights: da.Array | ArrayLike | None = None,
    split_every: int = 16,
    **options: Any,
) -> DaskMoments:
    """Count, mean and m2 of every channel of a Dask array, in one pass over its chunks.

    Each chunk is measured where it lies and merged with its neighbours in a tree, in an order that depends on the
    chunks alone: the result is bitwise the same on any scheduler. A chunk is free as soon as it is measured.

    Parameters
    ----------
    array : dask.array.Array
        Of a dtype that `Moments.update` takes, chunked in any way, also along the channels. Sizes of chunks may be
        unknown, and chunks may be empty.
    axis : int
        The channel axis.
    where, weights : dask.array.Array or array_like, optional
        Which values count, and how much, as in `Moments.update`; rechunked like `array` where they are not.
    split_every : int
        How many statistics are merged in one task, at least 2 and about this many.
    **options
        Passed to `Moments.update` with each chunk: ``nan_policy="omit"``.

    Returns
    -------
    DaskMoments
        A `Moments` that is computed at the first look at its values.

    Raises
    ------
    TypeError
        If `array` is no Dask array, or has a dtype that `Moments.update` does not take.
    ValueError
        For an axis that the array has not, no channels, or a `split_every` below 2.
    """
    channel = _channel_of(array, axis)
    chosen = {
        name: _beside(array, values, name, channel)
        for name, values in (("where", where), ("weights", weights))
        if values is not None
    }
    nothing = np.empty([int(i == channel) for i in range(array.ndim)], array.dtype)
    options_of_one = options | {name: np.ones((1,) * array.ndim, values.dtype) for name, values in chosen.items()}
    Moments.empty(1).update(nothing, channel, **options_of_one)  # refuses what it would refuse in a task
    axes = tuple(range(array.ndim))
    measured = da.blockwise(
        _measure,
        axes,
        array,
        axes,
        *(part for values in chosen.values() for part in (values, axes)),
        channel=channel,
        names=tuple(chosen),
        options=options,
        dtype=object,
        meta=np.empty((0,) * array.ndim, object),
        align_arrays=False,
    )
    reduced = [i for i in axes if i != channel]
    parts = da.reduction(
        measured,
        _itself,
        _merge,
        axis=reduced,
        dtype=object,
        meta=np.empty(0, object),
        split_every=_fan_in(split_every, [array.numblocks[i] for i in reduced], reduced),
        concatenate=False,
        name="moments",
    )
    return DaskMoments(parts)


def scale_shift(array: da.Array, scale: ArrayLike, shift: ArrayLike, axis: int = 1) -> da.Array:
    """``array * scale + shift``, one scale and one shift a channel, chunk by chunk when it is computed.

    To normalise with measured statistics `m`, take ``fold_scale_shift(m.mean, m.var(), eps=0)``, which is ``1 / std``
    and ``-mean / std``. Reading `m` computes it: with statistics that were a part of the same graph, every chunk would
    stay in memory between the two passes.

    Parameters
    ----------
    array : dask.array.Array of float32 or float64
        Chunked in any way. For images of integers take ``images.astype("float32")``, which stays lazy too.
    scale, shift : (C,) array_like
        Rounded once to the array's dtype.
    axis : int
        The channel axis.

    Returns
    -------
    dask.array.Array
        With the dtype and chunks of `array`.

    Raises
    ------
    TypeError
        If `array` is no Dask array of float32 or float64.
    ValueError
        If `scale` or `shift` has not one value a channel, or if the channels lie in several chunks of unknown size.
    """
    channel = _channel_of(array, axis)
    if array.dtype not in FLOATS:
        raise TypeError(f"array must be float32 or float64, got {array.dtype}; array.astype('float32') converts it")
    sizes = array.chunks[channel]
    unknown = math.isnan(sum(sizes))
    if unknown and len(sizes) > 1:
        raise ValueError(
            f"the channels on axis {axis} lie in {len(sizes)} chunks of unknown size; "
            "array.compute_chunk_sizes() makes them known"
        )
    channels = np.size(scale) if unknown else sum(sizes)
    vectors = [channel_vector(values, name, channels) for values, name in ((scale, "scale"), (shift, "shift"))]
    bounds = [slice(None)] if unknown else [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]
    result: da.Array = da.map_blocks(
        _scale_shift_block,
        array,
        channel=channel,
        parts=[tuple(vector[part].copy() for vector in vectors) for part in bounds],
        dtype=array.dtype,
        meta=np.empty((0,) * array.ndim, array.dtype),
    )
    return result


class DaskMoments(DaskMethodsMixin, Moments):  # type: ignore[misc]  # the mixin's only slot is a weak reference
    """`Moments` of a Dask array: a Dask collection until it is computed, the computed values from then on.

    Reading `count`, `mean` or `m2`, and whatever needs them, computes all of them once, with the scheduler in force.
    ``compute()`` does so with a scheduler of one's choice, and returns plain `Moments`. To share a pass with other
    results, ``dask.compute(m, other)`` gives plain `Moments` in its place. Unpickled, it is plain `Moments` where it
    was computed, else still to be computed.
    """

    __slots__ = ("_lock", "_parts")

    __dask_scheduler__ = staticmethod(threaded)
    __dask_optimize__ = staticmethod(optimize)

    _parts: da.Array | None  # one Moments in each chunk of channels; None once they are computed

    def __init__(self, parts: da.Array) -> None:
        self._parts = parts
        self._lock = threading.RLock()

    def compute(self, **kwargs: Any) -> Moments:
        """Compute once, with Dask's own arguments (``scheduler=`` and others), and return plain `Moments`."""
        with self._lock:
            if self._parts is not None:
                (computed,) = compute(self, traverse=False, **kwargs)
                _fill(self, *(getattr(computed, name) for name in Moments.__slots__))
                self._parts = None
        return _plain(*map(copy.copy, self._contents()))

    def __getattr__(self, name: str) -> Any:
        """Fill the fields, which are unset before they are computed."""
        if name not in Moments.__slots__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.compute()
        return object.__getattribute__(self, name)

    def __dask_graph__(self) -> Any:
        return None if self._parts is None else self._parts.__dask_graph__()

    def __dask_keys__(self) -> Any:
        return self._lazy.__dask_keys__()

    def __dask_layers__(self) -> Any:
        return self._lazy.__dask_layers__()

    def __dask_tokenize__(self) -> Any:
        return (type(self), *self._contents())

    def __dask_postcompute__(self) -> tuple[Callable[..., Moments], tuple[()]]:
        return _join, ()

    def __dask_postpersist__(self) -> tuple[Callable[..., DaskMoments], tuple[Any, ...]]:
        return _rebuilt, self._lazy.__dask_postpersist__()

    @property
    def _lazy(self) -> da.Array:
        assert self._parts is not None, "a computed DaskMoments is no Dask collection any more"
        return self._parts

    def _contents(self) -> tuple[Any, ...]:
        if self._parts is not None:
            return (self._parts,)
        return tuple(getattr(self, name) for name in Moments.__slots__)

    def __reduce__(self) -> Any:
        return _plain if self._parts is None else DaskMoments, self._contents()

    def __repr__(self) -> str:
        if self._parts is not None:
            return f"DaskMoments(to be computed, {math.prod(self._parts.numblocks)} chunks of channels)"
        return super().__repr__()


def _fill(moments: Moments, *values: Any) -> None:
    for name, value in zip(Moments.__slots__, values, strict=True):
        setattr(moments, name, value)


def _plain(*values: Any) -> Moments:
    plain = object.__new__(Moments)
    _fill(plain, *values)
    return plain


def _rebuilt(graph: Any, rebuild: Callable[..., da.Array], args: tuple[Any, ...], **kwargs: Any) -> DaskMoments:
    return DaskMoments(rebuild(graph, *args, **kwargs))


# --- tasks ----------------------------------------------------------------------------------------------------------
# Dask brings the parallelism: each of them computes on one thread.


def _measure(block: Array, *chosen: Array, channel: int, names: tuple[str, ...], options: dict[str, Any]) -> Moments:
    measured = Moments.empty(block.shape[channel])
    if not block.size:
        return measured
    with one_thread():
        return measured.update(block, channel, **(options | dict(zip(names, chosen, strict=True))))


def _itself(part: Any, **_: Any) -> Any:
    """What Dask's reductions do with each chunk, where a chunk is a Moments already."""
    return part


def _merge(parts: Any, **_: Any) -> Moments:
    """Merge one Moments, or nested lists of them, in order; none of them is changed, for Dask may hold it."""
    return reduce(operator.add, _flat(parts))


def _flat(parts: Any) -> list[Moments]:
    nested = (list, tuple)  # which of them depends on Dask's version
    return list(flatten(parts, container=nested)) if isinstance(parts, nested) else [parts]


def _join(parts: Any) -> Moments:
    """Moments of all channels, from those of the chunks of channels."""
    known = [part for part in _flat(parts) if part.mean.size]
    if not known:
        raise ValueError("there must be at least one channel, but all chunks of channels are empty")
    return _plain(*(_side_by_side([(getattr(m, name), m.mean.shape) for m in known]) for name in Moments.__slots__))


def _side_by_side(fields: list[tuple[Any, tuple[int, ...]]]) -> Any:
    """One field of all channels: arrays in a row, and numbers as they are where they agree."""
    first = fields[0][0]
    if all(np.ndim(value) == 0 and value == first for value, _ in fields):
        return first
    return np.concatenate([np.broadcast_to(value, shape) for value, shape in fields])


def _scale_shift_block(
    block: Array, *, channel: int, parts: list[tuple[Array, Array]], block_id: tuple[int, ...]
) -> Array:
    if not block.size:
        return block
    with one_thread():
        return F.scale_shift(block, *parts[block_id[channel]], axis=channel)


# --- what may come in -----------------------------------------------------------------------------------------------


def _channel_of(array: Any, axis: int) -> int:
    """Number of the channel axis, once it is known to have channels."""
    if not isinstance(array, da.Array):
        raise TypeError(f"array must be a dask.array.Array, got {type(array).__name__}")
    channel = channel_axis(axis, array.ndim)
    if array.shape[channel] == 0:
        raise ValueError(f"there must be at least one channel, got none on axis {axis} of shape {array.shape}")
    return channel


def _beside(array: da.Array, values: Any, name: str, channel: int) -> da.Array:
    """Values that broadcast against `array`, with its number of axes and its chunks."""
    beside = da.asanyarray(values)
    if beside.ndim > array.ndim:
        raise ValueError(f"{name} must be broadcastable to {array.shape}, got {beside.shape}")
    if name == "weights" and beside.ndim == 1 < array.ndim:  # one for each sample
        samples = 0 if channel else 1
        beside = beside[tuple(slice(None) if i == samples else None for i in range(array.ndim))]
    else:
        beside = beside[(None,) * (array.ndim - beside.ndim)]
    chunks = {}
    for i, (own, size) in enumerate(zip(beside.shape, array.shape, strict=True)):
        if own == 1 or not (math.isnan(own) or math.isnan(size)):
            if own not in (1, size):
                raise ValueError(f"{name} must be broadcastable to {array.shape}, got {np.shape(values)}")
            chunks[i] = array.chunks[i] if own == size else (1,)
        elif beside.numblocks[i] != array.numblocks[i]:
            raise ValueError(
                f"{name} must have the {array.numblocks[i]} chunks of the array on axis {i}, whose sizes are unknown, "
                f"got {beside.numblocks[i]}"
            )
    result: da.Array = beside.rechunk(chunks)
    return result


def _fan_in(split_every: int, numblocks: Iterable[int], axes: Iterable[int]) -> dict[int, int]:
    """What each reduced axis merges at once, so that together they merge about `split_every`."""
    if isinstance(split_every, bool) or operator.index(split_every) < 2:
        raise ValueError(f"split_every must be an integer of at least 2, got {split_every}")
    chunked = sum(blocks > 1 for blocks in numblocks)
    return dict.fromkeys(axes, max(2, round(split_every ** (1 / max(chunked, 1)))))
