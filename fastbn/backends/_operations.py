"""A backend's operations as calls of its one kernel: written once for Numba and Cython.

The kernel takes flags (backward, reduce, apply), a `Plan`, sizes, numbers and flat arrays, of which those that are not
there are empty. `stats` (3, C) is mean, variance and invstd, `affine` (3, C) center, scale and shift, all in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn._arrays import EMPTY, NO_SIGNS
from fastbn.backends import _images, _plan, numpy_
from fastbn.backends._plan import Plan, plan

Array = NDArray[Any]

_NO_ROWS, _NO_PARTS = np.empty((0, 0)), np.empty(0)


class Operations:
    """What `fastbn.backends` promises, but for `fold` and `update_running`.

    Parameters
    ----------
    kernel_of : callable
        The kernel for arrays of a dtype.
    threads : callable
        On how many threads to compute.
    lanes : callable
        Number of values in a vector, from the size of one in bytes.
    image_kernel_of : callable
        The kernel for statistics of image data of a dtype, or None where there is none.
    """

    def __init__(
        self,
        kernel_of: Callable[[np.dtype[Any]], Callable[..., None]],
        threads: Callable[[], int],
        lanes: Callable[[int], int],
        image_kernel_of: Callable[[np.dtype[Any]], Callable[..., None] | None],
    ) -> None:
        self._kernel_of = kernel_of
        self._threads = threads
        self._lanes = lanes
        self._image_kernel_of = image_kernel_of

    def _cut(self, n: int, c: int, s: int, itemsize: int, arrays: int, signs: Array = NO_SIGNS) -> Plan:
        return plan(n, c, s, itemsize, arrays, self._threads(), signs.size > 0)

    def sign_words(self, n: int, c: int, s: int, itemsize: int) -> int:
        """Number of uint16 words that `signs` needs."""
        return _plan.sign_words(n, c, s, self._lanes(itemsize))

    def moments(self, x: Array, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
        """Mean, what rounding took from it, and sum of squared deviations of every channel."""
        if _images.takes(x.dtype, c, s):
            self._image_moments(x, n, c, s, mean, rest, m2)
            return
        cut = self._cut(n, c, s, x.itemsize, 1)
        none, stats = EMPTY[x.dtype], np.empty((2, c))
        self._kernel_of(x.dtype)(
            *(False, True, False, *cut, n, c, s, True, 0.0, 1.0, x, none, none, none, none, none, none, NO_SIGNS),
            *(stats, _NO_ROWS, _NO_ROWS, _parts(cut, c)),
        )
        mean[:], m2[:] = stats
        rest[:] = 0.0

    def _image_moments(self, x: Array, n: int, c: int, s: int, mean: Array, rest: Array, m2: Array) -> None:
        kernel = self._image_kernel_of(x.dtype)
        if kernel is None:
            numpy_.moments(x, n, c, s, mean, rest, m2)
            return
        cut = _images.cut(n, c, s, x.itemsize, self._threads())
        part = _images.room(cut, x.dtype)
        kernel(*cut, x, part)
        _images.finish(part, cut, n, c, s, mean, rest, m2)

    def forward(
        self,
        x: Array,
        residual: Array,
        weight: Array,
        bias: Array,
        eps: float,
        slope: float,
        n: int,
        c: int,
        s: int,
        y: Array,
        signs: Array,
        stats: Array,
        affine: Array,
    ) -> None:
        """Training: the batch's statistics, then the output."""
        cut = self._cut(n, c, s, x.itemsize, 3 if residual.size else 2, signs)
        affine[1] = weight if weight.size else 1.0
        affine[2] = bias if bias.size else 0.0
        none, coef = EMPTY[x.dtype], np.empty(3 * (cut.columns or c), x.dtype)
        self._kernel_of(x.dtype)(
            *(False, True, True, *cut, n, c, s, True, eps, slope, x, residual, none, y, none, none, coef, signs),
            *(stats, affine, _NO_ROWS, _parts(cut, c)),
        )

    def transform(
        self, x: Array, residual: Array, affine: Array, slope: float, n: int, c: int, s: int, y: Array, signs: Array
    ) -> None:
        """y = activation((x - center) * scale + shift + residual)."""
        cut = self._cut(n, c, s, x.itemsize, 3 if residual.size else 2, signs)
        none, coef = EMPTY[x.dtype], np.empty(3 * (cut.columns or c), x.dtype)
        self._kernel_of(x.dtype)(
            *(False, False, True, *cut, n, c, s, True, 0.0, slope, x, residual, none, y, none, none, coef, signs),
            *(_NO_ROWS, affine, _NO_ROWS, _NO_PARTS),
        )

    def backward(
        self,
        dy: Array,
        x: Array,
        stats: Array,
        affine: Array,
        training: bool,
        slope: float,
        signs: Array,
        n: int,
        c: int,
        s: int,
        dx: Array,
        dresidual: Array,
        dweight: Array,
        dbias: Array,
    ) -> None:
        """Gradients of input, residual, weight and bias."""
        cut = self._cut(n, c, s, x.itemsize, 4 if dresidual.size else 3, signs)
        grads = np.empty((4, c))
        none, coef = EMPTY[x.dtype], np.empty(6 * (cut.columns or c), x.dtype)
        self._kernel_of(x.dtype)(
            *(True, True, True, *cut, n, c, s, training, 0.0, slope, x, none, dy, none, dx, dresidual, coef, signs),
            *(stats, affine, grads, _parts(cut, c)),
        )
        dweight[:] = grads[0]
        dbias[:] = grads[1]

    def gradient_sums(
        self,
        dy: Array,
        x: Array,
        stats: Array,
        affine: Array,
        slope: float,
        signs: Array,
        n: int,
        c: int,
        s: int,
        sums: Array,
    ) -> None:
        """Sums of dy behind the activation, and of it times x - mean."""
        cut = self._cut(n, c, s, x.itemsize, 2, signs)
        none, coef = EMPTY[x.dtype], np.empty(6 * (cut.columns or c), x.dtype)
        self._kernel_of(x.dtype)(
            *(True, True, False, *cut, n, c, s, True, 0.0, slope, x, none, dy, none, none, none, coef, signs),
            *(stats, affine, sums, _parts(cut, c)),
        )

    def gradient_apply(
        self,
        dy: Array,
        x: Array,
        stats: Array,
        affine: Array,
        slope: float,
        signs: Array,
        n: int,
        c: int,
        s: int,
        dx: Array,
        dresidual: Array,
        grads: Array,
    ) -> None:
        """dx = scale * dy + a * (x - mean) + b and dresidual, with a and b the last two rows of `grads`."""
        cut = self._cut(n, c, s, x.itemsize, 4 if dresidual.size else 3, signs)
        none, coef = EMPTY[x.dtype], np.empty(6 * (cut.columns or c), x.dtype)
        self._kernel_of(x.dtype)(
            *(True, False, True, *cut, n, c, s, True, 0.0, slope, x, none, dy, none, dx, dresidual, coef, signs),
            *(stats, affine, grads, _NO_PARTS),
        )


def _parts(cut: Plan, c: int) -> Array:
    """Room for the sums of every block, and of the values that fill no row of the column nest."""
    return np.empty(2 * (cut.blocks + 1) * (cut.columns or c))
