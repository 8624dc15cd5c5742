"""Statistics over the ranks of a communicator: what a layer with ``comm=`` does in training.

A call is one collective: every rank contributes a packet of one size, that begins with what it is doing and whether it
can. So a rank whose input is wrong joins the collective all the same, and all ranks raise instead of waiting for it.
Parts are put together in the order of ranks, by the same arithmetic on each: results are bitwise the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastbn import functional as F
from fastbn._arrays import FLOATS, Array, View, described
from fastbn._channels import Parameters, finish_gradient
from fastbn._merge import merge

# What a rank is doing.
FORWARD, BACKWARD, LEAVE = range(3)
DOING = ("forward", "backward", "the end of a recalibration")

# A packet: KIND to DTYPE, then two values a channel. FAILED is 0, or 1 and the index of the error's class.
KIND, FAILED, COUNT, DTYPE, PAYLOAD = range(5)
ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
MESSAGE = 512  # bytes of an error's message that the other ranks get to see

Exchange = Callable[[int, Array], Array]


class Inputs(NamedTuple):
    """What a training forward is of, checked: as `functional` takes it."""

    x: View
    residual: Any
    out: Array | None
    parameters: Parameters


class Detour(Protocol):
    """What takes a layer's training statistics elsewhere: to other ranks, to a pool of batches, or to both."""

    def forward(self, layer: Any, given: Inputs) -> tuple[Array, F.Saved]:
        """Output and what it leaves for the backward."""

    def gradients(
        self, layer: Any, saved: F.Saved, dy: Any, out: Array | None
    ) -> tuple[Array, Array | None, Array, Array]:
        """dx, dresidual, dweight and dbias."""

    def refuse(self, error: Exception, kind: int = FORWARD) -> None:
        """Be told that a call ends with an error before it comes here."""


class Ranks:
    """The ranks of a communicator as one layer meets them.

    Parameters
    ----------
    comm
        An mpi4py communicator of two ranks or more.
    channels : int
        The layer's number of channels. The first collective of a layer compares it, so that later ones are of one size.
    """

    def __init__(self, comm: Any, channels: int) -> None:
        self.comm, self.channels = comm, channels
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._compared = False
        self.met_leaving = False  # whether another rank left a recalibration while this one called the layer

    # --- what a layer calls ---

    def forward(self, layer: Any, given: Inputs) -> tuple[Array, F.Saved]:
        """Output and what it leaves for the backward; the running statistics follow those of all ranks."""
        y, saved = self.normalize(layer, given)
        if saved.total:
            layer._track(given.parameters, saved, saved.total)
        return y, saved

    def normalize(self, layer: Any, given: Inputs, least: int = 2) -> tuple[Array, F.Saved]:
        """Normalise with the statistics of all ranks' batches, of at least so many values a channel if not of none."""
        x, residual, out, parameters = given
        with self._joining(FORWARD, x.array.dtype) as exchange:

            def merged(count: int, mean: Array, m2: Array) -> tuple[int, Array, Array]:
                total = 0
                for row in exchange(count, np.stack((mean, m2))):
                    if number := int(row[COUNT]):
                        part = row[PAYLOAD:].reshape(2, -1)
                        mean, m2 = merge(total, mean, m2, number, *part)
                        total += number
                if 0 < total < least:
                    raise ValueError(
                        "Expected more than 1 value per channel when training, got 1 on all ranks together, "
                        f"input size {x.array.shape} on rank {self.rank}"
                    )
                return total, mean, m2

            return F._normalize_merged(x, residual, parameters, layer.eps, layer._slope, out, merged)

    def gradients(
        self, layer: Any, saved: F.Saved, dy: Any, out: Array | None
    ) -> tuple[Array, Array | None, Array, Array]:
        """dx and dresidual of the whole batch; dweight and dbias are this rank's part."""
        if saved.total is None:  # inference
            return F._gradients(dy, saved, layer.dtype, out)
        total, dtype = saved.total, saved.x.array.dtype
        with self._joining(BACKWARD, dtype) as exchange:

            def finish(sums: Array) -> Array:
                table = exchange(saved.x.n * saved.x.s, sums)
                everywhere = np.zeros_like(sums)
                for row in table:
                    everywhere += row[PAYLOAD:].reshape(sums.shape)
                grads = finish_gradient(everywhere, max(total, 1), saved.norm, dtype)
                grads[0], grads[1] = sums[1] * saved.norm[2], sums[0]
                return grads

            return F._gradients(dy, saved, layer.dtype, out, finish)

    def refuse(self, error: Exception, kind: int = FORWARD) -> None:
        """Join the others' collective to say that this rank cannot go on."""
        self._exchange(kind, error=error)

    def leave(self, error: Exception | None) -> None:
        """Tell each other how a recalibration ended; an error elsewhere is raised."""
        self._exchange(LEAVE, error=error)

    # --- collectives ---

    @contextmanager
    def _joining(self, kind: int, dtype: np.dtype[Any]) -> Iterator[Exchange]:
        """A function for the one collective of a call, which is joined too if an error comes before it."""
        joined = False

        def exchange(count: int, values: Array) -> Array:
            nonlocal joined
            joined = True
            return self._exchange(kind, count, FLOATS.index(dtype), values)

        try:
            yield exchange
            if not joined:  # for want of values
                exchange(0, np.zeros((2, self.channels)))
        except Exception as error:
            if not joined:
                self._exchange(kind, error=error)
            raise

    def _exchange(
        self, kind: int, count: int = 0, dtype: int = 0, values: Array | None = None, *, error: Exception | None = None
    ) -> Array:
        """All ranks' packets in their order, (ranks, PAYLOAD + 2 * C), once they are seen to agree."""
        self._compare_channels()
        packet = np.zeros(PAYLOAD + 2 * self.channels)
        packet[:PAYLOAD] = kind, 0 if error is None else 1 + _class_of(error), count, dtype
        if values is not None:
            packet[PAYLOAD:] = values.reshape(-1)
        table = self._gather(packet)
        self.met_leaving = kind != LEAVE and bool((table[:, KIND] == LEAVE).any())
        if table[:, FAILED].any():
            self._raise_others(error, table[:, FAILED])
        elif (table[:, KIND] != kind).any():
            doing = self._on_ranks(DOING[int(k)] for k in table[:, KIND])
            raise RuntimeError(f"all ranks must call the same method of a layer, got {doing}")
        elif (table[:, DTYPE] != table[0, DTYPE]).any():
            dtypes = self._on_ranks(FLOATS[int(k)] for k in table[:, DTYPE])
            raise TypeError(f"x must have one dtype on all ranks, got {dtypes}")
        return table

    def _compare_channels(self) -> None:
        if not self._compared:
            channels = self._gather(np.array([float(self.channels)]))[:, 0]
            if (channels != self.channels).any():
                numbers = self._on_ranks(int(c) for c in channels)
                raise ValueError(f"a layer must have one num_features on all ranks, got {numbers}")
            self._compared = True

    def _raise_others(self, own: Exception | None, failed: Array) -> None:
        """Exchange the messages, one collective more; raise unless this rank has an error of its own to raise."""
        text = b"" if own is None else (str(own) or type(own).__name__).encode()[:MESSAGE]
        packet = np.zeros(MESSAGE, np.uint8)
        packet[: len(text)] = np.frombuffer(text, np.uint8)
        table = self._gather(packet)
        if own is None:
            ranks = np.flatnonzero(failed)
            texts = (table[r].tobytes().rstrip(b"\0").decode(errors="replace") for r in ranks)
            raise ERRORS[int(failed[ranks[0]]) - 1](
                "; ".join(f"rank {r}: {t}" for r, t in zip(ranks, texts, strict=True))
            )

    def _gather(self, packet: Array) -> Array:
        table = np.empty((self.size, packet.size), packet.dtype)
        self.comm.Allgather(packet, table)
        return table

    def _on_ranks(self, values: Any) -> str:
        return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))


def ranks_of(comm: Any, channels: int) -> Ranks | None:
    """The ranks behind a layer's ``comm=``; None for no communicator, or one of a single rank."""
    if comm is None:
        return None
    if isinstance(comm, type) or not all(hasattr(comm, name) for name in ("Get_rank", "Get_size", "Allgather")):
        raise TypeError(
            f"comm must be None or an mpi4py communicator such as MPI.COMM_WORLD, with Get_rank, Get_size and "
            f"Allgather; got {described(comm)}"
        )
    return Ranks(comm, channels) if comm.Get_size() > 1 else None


def _class_of(error: Exception) -> int:
    """Index of the class that the error has for the other ranks."""
    return next((i for i, kind in enumerate(ERRORS) if isinstance(error, kind)), ERRORS.index(RuntimeError))
