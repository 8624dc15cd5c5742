"""Points: activation, output and gradient of one vector."""

from __future__ import annotations

import numpy as np

from fastbn.backends._numba.compiler import point
from fastbn.backends._numba.vectors import bits, fma, load, mask_of, positive, present, scaled, splat, where, widen
from fastbn.backends._plan import LANES

# Kinds of sums and of output: of x and dy alone, with a ReLU, with that and its signs, or with anything.
PLAIN, RELU, SIGNED, ANY = map(np.intp, range(4))


@point
def slope_of(job, kind):
    """Slope of the activation, as far as it is known when this is compiled."""
    return 1.0 if kind == PLAIN else (job.slope if kind == ANY else 0.0)


@point
def kind_to_sum(job):
    """Kind of the sums of gradients."""
    if job.slope == 1.0:
        return PLAIN
    if job.slope != 0.0:
        return ANY
    return SIGNED if present(job.signs) else RELU


@point
def activated(z, opened, slope):
    """z where the activation is open, slope * z elsewhere; a slope of 0 gives zero even for an infinite z."""
    return where(opened, z, scaled(z, slope))


@point
def output(x, added, high, scale, low, slope, signs, word):
    """activation((x - center) * scale + shift + residual)."""
    z = fma(x - high, scale, low) + added
    if slope != 1.0:
        opened = positive(z)
        if present(signs):
            signs[word] = bits(opened)
        z = activated(z, opened, slope)
    return z


@point
def mask_at(signs, word, bit):
    """Signs of the vector whose first one is so many bits behind the first of a word."""
    return mask_of(np.uint16((np.uint32(signs[word]) | np.uint32(signs[word + 1]) << LANES) >> bit))


@point
def signs_of(x, high, scale, low):
    """Signs without a residual, computed again exactly as in `output`."""
    return positive(fma(x - high, scale, low))


@point
def gated(dy, x, high, scale, low, slope, signs, word, bit):
    """dy behind an activation, whose sign is read or computed again."""
    if present(signs):
        dy = activated(dy, mask_at(signs, word, bit), slope)
    else:
        dy = activated(dy, signs_of(x, high, scale, low), slope)
    return dy


@point
def wide_gated(dy, x, at, high, scale, low, slope, signs, word, bit, kind):
    """`gated` as W, from ``x[at]`` and ``dy[at]`` on; a ReLU chooses what becomes float64 as it is loaded: see J."""
    if kind == PLAIN:
        return widen(load(dy, at))
    if kind == ANY:
        return widen(gated(load(dy, at), load(x, at), high, scale, low, slope, signs, word, bit))
    opened = mask_at(signs, word, bit) if kind == SIGNED else signs_of(load(x, at), high, scale, low)
    return where(opened, widen(load(dy, at)), splat(0.0))


@point
def gradient(dy, x, training, scale, mean, a, b):
    """dx of a gated dy."""
    return fma(scale, dy, fma(a, x - mean, b)) if training else scale * dy
