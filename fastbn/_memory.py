"""Where outputs come from: large ones take the memory of earlier outputs that nobody can see any more.

Fresh pages are expensive: the system clears each of them, which takes longer than a training forward. So large
outputs are views of blocks that the pool keeps, and a block is handed out again once no array, view, memoryview or
tensor refers to it: all of these hold a reference to the block, which Python counts. Nothing else is trusted, and no
memory is ever handed out that anyone can still reach.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable

import numpy as np

from fastbn._arrays import Array, described

LINE = 64  # bytes: outputs begin on a line of the cache, so that whole lines can be written past it
SMALLEST = 1 << 20  # bytes from which an output comes from the pool; below, the allocator keeps pages by itself
DEFAULT_LIMIT = 1 << 30

_blocks: list[Array] = []  # the one that was handed out last at the end
_lock = threading.RLock()  # a finaliser or a signal's handler that runs meanwhile may want an output too
_limit: int | None = None


def empty_like(x: Array) -> Array:
    """Uninitialised array of the shape, dtype and memory order of `x`, which is dense."""
    if x.nbytes < SMALLEST:
        return np.empty_like(x)
    if x.nbytes > get_pool_limit():
        return _made(lambda: np.empty_like(x), release_pool)
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    flat = _take(x.nbytes).view(x.dtype)
    return flat.reshape([x.shape[i] for i in order]).transpose(np.argsort(order))


def _take(nbytes: int) -> Array:
    """So many bytes of a block that nobody sees any more and that is not much too large, else of a new one."""
    with _lock:
        size = nbytes + LINE
        blocks = _all()
        try:
            block = _taken_out(blocks, size)
            if block is None:
                _drop(blocks, get_pool_limit() - size)
                block = _made(lambda: np.empty(size, np.uint8), lambda: _drop(blocks, 0))
            blocks.append(block)
        finally:
            _blocks[:0] = blocks
        start = -block.__array_interface__["data"][0] % LINE
        return block[start : start + nbytes]


def _all() -> list[Array]:
    """All blocks, out of the pool: what a finaliser or a signal's handler asks of it meanwhile, it does with none."""
    blocks = _blocks.copy()
    _blocks.clear()
    return blocks


def _made(make: Callable[[], Array], give_back: Callable[[], int]) -> Array:
    """A new array; where there is no memory left for it, in what the pool gives back."""
    try:
        return make()
    except MemoryError:
        if not give_back():
            raise
        return make()


def _taken_out(blocks: list[Array], size: int) -> Array | None:
    """A block of about that size that nobody sees, out of these."""
    i = 0
    while i < len(blocks):
        if size <= blocks[i].size <= size + size // 4:
            block = blocks.pop(i)
            if _references(block) == _ALONE and not weakref.getweakrefcount(block):
                return block
            blocks.insert(i, block)
        i += 1
    return None


def _references(block: Array) -> int:
    return sys.getrefcount(block)


def _references_of_one() -> int:
    block = np.empty(0, np.uint8)
    return _references(block)


_ALONE = _references_of_one()  # what is counted for a block that one variable refers to


def _drop(blocks: list[Array], room: int) -> int:
    """Forget blocks until these are no more than `room` bytes: first unseen ones, whose memory is free then."""
    held = sum(block.size for block in blocks)
    freed = 0
    for unseen in (True, False):
        i = 0
        while held > max(room, 0) and i < len(blocks):
            block = blocks.pop(i)
            if unseen and _references(block) != _ALONE:
                blocks.insert(i, block)
                i += 1
                continue
            held -= block.size
            freed += block.size * unseen
    return freed


def get_pool_limit() -> int:
    """Bytes that the pool of outputs may hold: `set_pool_limit`, else ``FASTBN_POOL_LIMIT``, else 1 GiB."""
    global _limit
    if _limit is None:
        text = os.environ.get("FASTBN_POOL_LIMIT", "").strip()
        try:
            _limit = _checked(int(text)) if text else _default_limit()
        except ValueError:
            raise ValueError(f"FASTBN_POOL_LIMIT must be a number of bytes, 0 for no pool, got {text!r}") from None
    return _limit


def _default_limit() -> int:
    """Without the interpreter lock reference counts cannot be read while other threads run: no pool there."""
    return DEFAULT_LIMIT if getattr(sys, "_is_gil_enabled", lambda: True)() else 0


def set_pool_limit(nbytes: int) -> None:
    """Set how many bytes the pool of outputs may hold.

    Outputs of 1 MiB or more are made in memory of earlier outputs that nothing refers to any more. What the pool holds
    beyond the new limit is given back to the system at once.

    Parameters
    ----------
    nbytes : int
        0 switches the pool off.

    Raises
    ------
    TypeError, ValueError
        If `nbytes` is no integer, or negative. The setting in force stays.
    """
    global _limit
    limit = _checked(nbytes)
    with _lock:
        _limit = limit
        _shrink(limit)


def _checked(nbytes: int) -> int:
    if isinstance(nbytes, bool) or not isinstance(nbytes, int | np.integer):
        raise TypeError(f"the pool's limit must be an integer, got {type(nbytes).__name__}")
    if nbytes < 0:
        raise ValueError(f"the pool's limit must not be negative, got {described(nbytes)}")
    return int(nbytes)


def release_pool() -> int:
    """Give the memory of outputs that nothing refers to any more back to the system.

    Returns
    -------
    int
        The number of bytes.
    """
    with _lock:
        return _shrink(0)


def _shrink(room: int) -> int:
    blocks = _all()
    try:
        return _drop(blocks, room)
    finally:
        _blocks[:0] = blocks


def _after_fork_in_child() -> None:
    """Another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
