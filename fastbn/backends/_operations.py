"""A backend's operations as calls of its one kernel: written once for Numba and Cython.

The kernel takes flags (backward, reduce, apply), a plan, numbers and arrays, which are None where they are not there.
`norm` (6, C) is mean, variance and invstd, then center, scale and shift, all in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn._channels import Parameters
from fastbn._engine import can_start, get_num_threads
from fastbn.backends import _images, _plan, numpy_
from fastbn.backends._plan import ROOM, THREADS, cut
from fastbn.backends._trials import Trials

Array = NDArray[Any]


class Operations:
    """What `fastbn.backends` promises.

    Parameters
    ----------
    kernel_of : callable
        The kernel for arrays of a dtype.
    most_threads : callable
        How many threads the kernels can use, whatever is set.
    lanes : callable
        Number of values in a vector, from the size of one in bytes.
    image_kernel_of : callable
        The kernel for statistics of image data of a dtype, or None where there is none.
    """

    def __init__(
        self,
        kernel_of: Callable[[np.dtype[Any]], Callable[..., None]],
        most_threads: Callable[[], int],
        lanes: Callable[[int], int],
        image_kernel_of: Callable[[np.dtype[Any]], Callable[..., None] | None],
    ) -> None:
        self._kernel_of = kernel_of
        self._most_threads = most_threads
        self._lanes = lanes
        self._image_kernel_of = image_kernel_of
        self._prepared = lru_cache(4096)(self._prepare)

    def _ready(
        self, flags: tuple[bool, bool, bool], x: Array, n: int, c: int, s: int, arrays: int, signs: Array | None = None
    ) -> tuple[Callable[..., None], Array, Array | None]:
        """Kernel, plan and room for x and so many arrays like it. Flags are the kernel's: backward, reduce, apply."""
        threads = get_num_threads()
        kernel, plan, room, used = self._prepared(x.dtype, n, c, s, arrays, threads, signs is not None, flags)
        if used > 1 and not can_start(used):
            kernel, plan, room, _ = self._prepared(x.dtype, n, c, s, arrays, 1, signs is not None, flags)
        return kernel, kernel.plan if plan is None else plan, np.empty(room) if room > ROOM else None

    def _prepare(
        self,
        dtype: np.dtype[Any],
        n: int,
        c: int,
        s: int,
        arrays: int,
        threads: int,
        signs: bool,
        flags: tuple[bool, bool, bool],
    ) -> tuple[Any, Array | None, int, int]:
        _, reduce, apply = flags
        plans, room = cut(n, c, s, dtype.itemsize, arrays, min(threads, self._most_threads()), signs, reduce)
        kernel = self._kernel_of(dtype)
        used = int(plans[0][THREADS])
        return (Trials(kernel, plans), None, room, used) if apply and len(plans) > 1 else (kernel, plans[0], room, used)

    def sign_words(self, n: int, c: int, s: int, itemsize: int) -> int:
        """Number of uint16 words that `signs` needs."""
        return _plan.sign_words(n, c, s, self._lanes(itemsize))

    def moments(self, x: Array, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
        """Mean, what rounding took from it, and sum of squared deviations of every channel."""
        if _images.takes(x.dtype, c, s):
            self._image_moments(x, n, c, s, mean, rest, m2)
            return
        kernel, plan, part = self._ready((False, True, False), x, n, c, s, 1)
        stats = np.empty((2, c))
        kernel(
            False, True, False, plan, True, False, 0.0, 1.0, 0.0, x, None, None, None, None, None, None,
            None, None, None, None, stats, None, part,
        )  # fmt: skip
        mean[:], m2[:] = stats
        rest[:] = 0.0

    def _image_moments(self, x: Array, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
        kernel = self._image_kernel_of(x.dtype)
        if kernel is None:
            numpy_.moments(x, n, c, s, mean, rest, m2)
            return
        how = _images.cut(n, c, s, x.itemsize, min(get_num_threads(), self._most_threads()))
        if not can_start(how.threads):
            how = how._replace(threads=1)
        part = _images.room(how, x.dtype)
        kernel(*how, x, part)
        _images.finish(part, how, n, c, s, mean, rest, m2)

    def forward(
        self,
        x: Array,
        residual: Array | None,
        parameters: Parameters,
        training: bool,
        factor: float | None,
        eps: float,
        slope: float,
        n: int,
        c: int,
        s: int,
        y: Array,
        signs: Array | None,
        norm: Array,
    ) -> None:
        """`norm` of the batch, which the running statistics follow by `factor` if any, or of these; the output."""
        weight, bias, mean, var, wide = parameters
        if training and factor is None:
            mean = var = None
        kernel, plan, part = self._ready((False, training, True), x, n, c, s, 2 if residual is None else 3, signs)
        kernel(
            False, training, True, plan, True, wide, eps, slope, factor or 0.0, x, residual, None, y, None, None, signs,
            weight, bias, mean, var, norm, None, part,
        )  # fmt: skip

    def transform(
        self,
        x: Array,
        residual: Array | None,
        norm: Array,
        slope: float,
        n: int,
        c: int,
        s: int,
        y: Array,
        signs: Array | None,
    ) -> None:
        """y = activation((x - center) * scale + shift + residual)."""
        kernel, plan, part = self._ready((False, False, True), x, n, c, s, 2 if residual is None else 3, signs)
        kernel(
            False, False, True, plan, True, False, 0.0, slope, 0.0, x, residual, None, y, None, None, signs,
            None, None, None, None, norm, None, part,
        )  # fmt: skip

    def backward(
        self,
        dy: Array,
        x: Array,
        norm: Array,
        training: bool,
        slope: float,
        signs: Array | None,
        n: int,
        c: int,
        s: int,
        dx: Array,
        dresidual: Array | None,
        dweight: Array,
        dbias: Array,
    ) -> None:
        """Gradients of input, residual, weight and bias."""
        kernel, plan, part = self._ready((True, True, True), x, n, c, s, 3 if dresidual is None else 4, signs)
        kernel(
            True, True, True, plan, training, dweight.itemsize == 8, 0.0, slope, 0.0, x, None, dy, None, dx, dresidual,
            signs, dweight, dbias, None, None, norm, np.empty((4, c)), part,
        )  # fmt: skip

    def gradient_sums(
        self,
        dy: Array,
        x: Array,
        norm: Array,
        slope: float,
        signs: Array | None,
        n: int,
        c: int,
        s: int,
        sums: Array,
    ) -> None:
        """Sums of dy behind the activation, and of it times x - mean."""
        kernel, plan, part = self._ready((True, True, False), x, n, c, s, 2, signs)
        kernel(
            True, True, False, plan, True, False, 0.0, slope, 0.0, x, None, dy, None, None, None, signs,
            None, None, None, None, norm, sums, part,
        )  # fmt: skip

    def gradient_apply(
        self,
        dy: Array,
        x: Array,
        norm: Array,
        slope: float,
        signs: Array | None,
        n: int,
        c: int,
        s: int,
        dx: Array,
        dresidual: Array | None,
        grads: Array,
    ) -> None:
        """dx = scale * dy + a * (x - mean) + b and dresidual, with a and b the last two rows of `grads`."""
        kernel, plan, part = self._ready((True, False, True), x, n, c, s, 3 if dresidual is None else 4, signs)
        kernel(
            True, False, True, plan, True, False, 0.0, slope, 0.0, x, None, dy, None, dx, dresidual, signs,
            None, None, None, None, norm, grads, part,
        )  # fmt: skip
