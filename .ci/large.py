"""Arrays of more than 2**31 values: run `python .ci/large.py`, which needs 10 GB of memory and some minutes.

Inputs are zeros that are never written, so the system backs them with one page of zeros; a few values at both ends are
not zero, which makes every result known in closed form.
"""

import sys
import time

import numpy as np

import fastbn

SHAPES = ((1, 3, 2**31 // 3 + 1009), (2**31 // 576 + 5, 64, 9), (2**31 // 64 + 3, 64, 1))
SPIKE = 64.0  # exact, and so are its multiples by powers of two


def check(name: str, condition: object) -> None:
    """Stop at the first thing that is wrong."""
    if not condition:
        sys.exit(f"WRONG: {name}")


def same(values: np.ndarray, expected: np.ndarray) -> bool:
    """Whether all values (N, C, S) are near those of their channel, in pieces that need little memory."""
    pieces = np.array_split(values, 2048, axis=int(np.argmax(values.shape)))
    return all(np.abs(piece - expected.astype(np.float32)[:, None]).max() < 1e-6 for piece in pieces)


def run(shape: tuple[int, ...], y: np.ndarray) -> None:
    """Every kernel on one shape; `y` is memory for the outputs."""
    x, y = np.zeros(shape, np.float32), y[: np.prod(shape)].reshape(shape)
    first, last = (0, 0, 0), (-1, -1, -1)
    x[first], x[last] = SPIKE, -SPIKE
    channels, count = shape[1], x.size // shape[1]
    ends = (0, channels - 1)
    mean, m2 = np.zeros(channels), np.zeros(channels)
    for c, value in zip(ends, (SPIKE, -SPIKE), strict=True):
        mean[c], m2[c] = value / count, SPIKE**2 * (1 - 1 / count)

    got = fastbn.moments(x)
    check("count", got.count == count)
    check("mean", np.allclose(got.mean, mean, 1e-12, 0))
    check("m2", np.allclose(got.m2, m2, 1e-9, 0))

    weight, bias = np.linspace(1, 2, channels), np.linspace(-1, 1, channels)
    _, batch_mean, invstd = fastbn.batch_norm_forward(x, weight, bias, eps=1e-3, out=y)
    check("invstd", np.allclose(invstd, 1 / np.sqrt(m2 / count + 1e-3), 1e-9, 0))
    scale = weight * invstd
    rest = bias - mean * scale
    for at, c, value in ((first, 0, SPIKE), (last, -1, -SPIKE)):
        check("output at an end", np.isclose(y[at], value * scale[c] + rest[c], 1e-5))
        y[at] = rest[c]
    check("output", same(y, rest))

    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, batch_mean, invstd, weight, out=y)
    check("dbias", np.allclose(dbias, mean * count, 1e-6, 1e-6))
    check("dweight", np.allclose(dweight, m2 * invstd, 1e-5))
    dot, total = m2, mean * count  # of x with x - mean, and of x: the input is its own gradient here
    for at, c, value in ((first, 0, SPIKE), (last, -1, -SPIKE)):
        exact = scale[c] * (value - total[c] / count - (value - mean[c]) * invstd[c] ** 2 * dot[c] / count)
        check("gradient at an end", np.isclose(dx[at], exact, 1e-5))
    fastbn.scale_shift(x, weight, bias, out=y)
    for at, c, value in ((first, 0, SPIKE), (last, -1, -SPIKE)):
        check("scaled at an end", np.isclose(y[at], value * weight[c] + bias[c], 1e-6))


def main() -> None:
    """All shapes on both compiled backends."""
    y = np.empty(max(map(np.prod, SHAPES)), np.float32)
    for name in fastbn.available_backends()[:-1]:
        with fastbn.use_backend(name):
            for shape in SHAPES:
                start = time.perf_counter()
                run(shape, y)
                size = np.prod(shape)
                print(f"{name}: {shape}, {size} values, right, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
