"""How each library does a row's operation, on the same arrays.

Outputs are preallocated for every candidate that can take one; JAX cannot. Backward passes get the forward's
statistics, in JAX as what `jax.vjp` keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case

import fastbn
from bench import native
from bench.rows import COPIES, Row
from bench.turns import Candidate
from fastbn import functional as F
from fastbn._engine import usable_cpus

EPS = 1e-5


class RefusedError(Exception):
    """The library cannot do the row."""


class Problem:
    """A case's arrays, on 64-byte boundaries and touched, and its statistics."""

    def __init__(self, case: Case, dtype: str) -> None:
        data = case.make(dtype)
        self.case = case
        self.x, self.dy, self.residual = (_aligned(a) for a in (data.x, data.dy, data.residual))
        self.out, self.y = _aligned(data.x), _aligned(data.x)
        self.weight, self.bias = data.weight, data.bias
        self.mean, self.invstd = F.batch_norm_forward(self.x, eps=EPS, axis=case.axis, out=self.out)[1:]
        self.var = 1 / self.invstd**2 - EPS
        self.scale = (self.weight * self.invstd).astype(dtype)
        self.shift = (self.bias - self.mean * self.scale).astype(dtype)


def _aligned(values: np.ndarray) -> np.ndarray:
    """Copy to a 64-byte boundary, as every library but NumPy allocates."""
    raw = np.empty(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@functools.lru_cache(maxsize=1)
def problem(case: Case, dtype: str) -> Problem:
    """The last case's problem is kept: its operations follow one another."""
    return Problem(case, dtype)


def candidate(row: Row, name: str) -> Candidate:
    """The candidate of that name, ready to run.

    Raises
    ------
    RefusedError
        If its library cannot do this.
    """
    p = problem(row.case, row.dtype)
    library, _, variant = name.partition(", ")
    threads = int(variant.split()[0]) if "threads" in variant else usable_cpus()
    if library in COPIES:
        return _copy(p, library, threads)
    if library == "PyTorch":
        return (_torch_layer if row.table == "layer" else _torch)(row, p, threads)
    if library == "JAX":
        return _jax(row, p)
    if library.startswith("oneDNN"):
        return _onednn(row, p, library.removeprefix("oneDNN "), threads)
    return _fastbn(row, p, library, variant, threads)


# --- the memory's limit -----------------------------------------------------------------------------------------------


def _copy(p: Problem, name: str, threads: int) -> Candidate:
    lib = native.library()
    run = lib.copy_stream if name == "copy streaming" else lib.copy_plain
    arguments = p.x.ctypes.data, p.out.ctypes.data, p.x.nbytes
    return Candidate(lambda: run(*arguments), before=lambda: lib.set_threads(threads), result=lambda _: p.out)


# --- fastbn -----------------------------------------------------------------------------------------------------------


def _fastbn(row: Row, p: Problem, backend: str, variant: str, threads: int) -> Candidate:
    def before() -> None:
        fastbn.set_backend(backend)
        fastbn.set_num_threads(threads)

    if row.table == "layer" or ((row.relu or row.add) and not variant.endswith("alone")):
        return _fastbn_layer(row, p, before)
    axis, out = row.case.axis, p.out
    if "no out" in row.op and variant != "out=":
        out = None  # type: ignore[assignment]
    calls: dict[str, Callable[[], Any]] = {
        "train": lambda: F.batch_norm_forward(p.x, p.weight, p.bias, eps=EPS, axis=axis, out=out),
        "eval": lambda: F.scale_shift(p.x, p.scale, p.shift, axis=axis, out=out),
        "backward": lambda: F.batch_norm_backward(p.dy, p.x, p.mean, p.invstd, p.weight, axis=axis, out=out),
    }
    return Candidate(calls[row.kind], before, result=_first)


def _first(returned: Any) -> Any:
    return returned[0] if isinstance(returned, tuple) else returned


def _fastbn_layer(row: Row, p: Problem, choose: Callable[[], None]) -> Candidate:
    make = getattr(fastbn, row.case.layer)
    relu = "relu" if row.relu else None
    bn = make(row.case.channels, eps=EPS, axis=row.case.axis, dtype=p.x.dtype, activation=relu)
    bn.weight, bn.bias, bn.running_mean[:], bn.running_var[:] = p.weight, p.bias, p.mean, p.var
    residual = p.residual if row.add else None
    out = None if row.table == "layer" else p.out  # a layer is called as PyTorch's is, which takes none
    forward = functools.partial(bn, p.x, residual=residual, out=out)
    if row.kind != "backward":
        bn.train(row.kind == "train")
        return Candidate(forward, choose)

    def before() -> None:
        choose()
        bn(p.x, residual=residual, out=p.y)

    if row.table == "layer":
        return Candidate(lambda: bn.backward(p.dy), before, once=True, result=_first)
    before()
    saved = bn._saved

    def gradient() -> Any:
        bn._saved = saved  # a forward in between would cool the caches, and peers have none
        return bn.backward(p.dy, out=p.out)

    return Candidate(gradient, choose, result=_first)


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def _torch_vectors(p: Problem) -> Any:
    import torch

    dtype = torch.float64 if p.x.dtype == np.float64 else torch.float32
    return (torch.from_numpy(v).to(dtype) for v in (p.weight, p.bias, p.mean, p.var, p.invstd))


def _torch_tensor(p: Problem, values: np.ndarray) -> Any:
    """The array as PyTorch takes it: channels second, which for channels last is a view."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.movedim(-1, 1) if p.case.axis == -1 else tensor


def _torch(row: Row, p: Problem, threads: int) -> Candidate:
    import torch

    aten = torch.ops.aten
    x, dy, residual, out, y = (_torch_tensor(p, a) for a in (p.x, p.dy, p.residual, p.out, p.y))
    weight, bias, mean, var, invstd = _torch_vectors(p)
    saved = torch.empty_like(weight), torch.empty_like(weight)
    running = mean.clone(), var.clone()

    def normalize(to: Any, training: bool) -> Any:
        statistics = running if training else (mean, var)
        if "no out" in row.op:
            return aten.native_batch_norm(x, weight, bias, *statistics, training, 0.1, EPS)[0]
        aten.native_batch_norm.out(
            x, weight, bias, *statistics, training, 0.1, EPS, out=to, save_mean=saved[0], save_invstd=saved[1]
        )
        if row.add:
            to.add_(residual)
        return to.relu_() if row.relu else to

    def gradient() -> Any:
        g = aten.threshold_backward.grad_input(dy, y, 0, grad_input=masked) if row.relu else dy
        aten.native_batch_norm_backward.out(
            g, x, weight, *running, mean, invstd, True, EPS, [True] * 3, out0=out, out1=saved[0], out2=saved[1]
        )
        return out

    masked = torch.empty_like(dy) if row.relu and row.kind == "backward" else None
    if masked is not None:
        normalize(y, True)
    call = gradient if row.kind == "backward" else lambda: normalize(out, row.kind == "train")
    return Candidate(call, _torch_settings(threads, grad=False), result=lambda tensor: _back(p, tensor))


def _torch_settings(threads: int, grad: bool) -> Callable[[], None]:
    import torch

    def before() -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)

    return before


def _back(p: Problem, tensor: Any) -> np.ndarray:
    """The array that a PyTorch tensor is."""
    values: np.ndarray = tensor.detach().numpy()
    return np.moveaxis(values, 1, -1) if p.case.axis == -1 else values


def _torch_layer(row: Row, p: Problem, threads: int) -> Candidate:
    import torch

    bn = getattr(torch.nn, row.case.layer)(row.case.channels, eps=EPS, dtype=_torch_tensor(p, p.x).dtype)
    with torch.no_grad():
        for mine, values in zip((bn.weight, bn.bias, bn.running_mean, bn.running_var), _torch_vectors(p), strict=False):
            mine.copy_(values)
    x, dy = _torch_tensor(p, p.x), _torch_tensor(p, p.dy)
    choose = _torch_settings(threads, grad=row.kind != "eval")
    if row.kind != "backward":
        bn.train(row.kind == "train")
        return Candidate(lambda: bn(x), choose, result=lambda tensor: _back(p, tensor))
    x.requires_grad_()
    inputs = (x, bn.weight, bn.bias)
    outputs: list[Any] = []

    def before() -> None:
        choose()
        outputs[:] = [bn(x)]

    call = functools.partial(torch.autograd.grad, outputs, inputs, dy)
    return Candidate(call, before, once=True, result=lambda gradients: _back(p, gradients[0]))


# --- JAX --------------------------------------------------------------------------------------------------------------


def _jax(row: Row, p: Problem) -> Candidate:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    lift = row.case.per_channel
    x, dy, residual = (jnp.asarray(a) for a in (p.x, p.dy, p.residual))
    weight, bias, scale, shift = (jnp.asarray(lift(v)) for v in (p.weight, p.bias, p.scale, p.shift))
    function, pulled = _jax_functions(row)
    arguments: tuple[Any, ...] = (x, weight, bias, residual)
    if row.kind == "backward":
        arguments = (pulled(*arguments[: 4 if row.add else 3]), dy)
    elif row.kind == "eval":
        arguments = (x, scale, shift, residual)
    finish: Callable[[Any], Any] = jax.block_until_ready
    return Candidate(lambda: finish(function(*arguments)), result=lambda returned: np.asarray(_first(returned)))


@functools.cache
def _jax_functions(row: Row) -> tuple[Any, Any]:
    """The row's operation, compiled; and what makes of a forward's arguments what its backward starts from."""
    import jax
    import jax.numpy as jnp

    axes = row.case.reduced

    def activate(y: Any, residual: Any) -> Any:
        y = y + residual if row.add else y
        return jnp.maximum(y, 0) if row.relu else y

    def train(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
        mean = x.mean(axes, keepdims=True)
        var = jnp.square(x - mean).mean(axes, keepdims=True)
        return activate((x - mean) * (jax.lax.rsqrt(var + EPS) * weight) + bias, residual)

    def evaluate(x: Any, scale: Any, shift: Any, residual: Any) -> Any:
        return activate(x * scale + shift, residual)

    operation: Callable[..., Any] = {"train": train, "eval": evaluate, "backward": lambda pull, dy: pull(dy)}[row.kind]
    return jax.jit(operation), jax.jit(lambda *arguments: jax.vjp(train, *arguments)[1])


# --- oneDNN -----------------------------------------------------------------------------------------------------------


def _onednn(row: Row, p: Problem, layout: str, threads: int) -> Candidate:
    x, dy = (_channels_second(p, a) for a in (p.x, p.dy))
    native.library().set_threads(threads)  # it decides on them when it is made
    vectors = (p.weight, p.bias, p.mean, p.var)
    try:
        norm = native.Norm(row.kind, layout, x, dy, vectors, EPS, row.relu)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    case = row.case

    def result(_: object) -> np.ndarray:
        values = norm.result()
        if case.axis == -1:
            values = np.moveaxis(values, 1, -1)
        return values.reshape(case.shape)

    return Candidate(norm.run, before=lambda: native.library().set_threads(threads), result=result)


def _channels_second(p: Problem, values: np.ndarray) -> np.ndarray:
    """(N, C, H, W) of any rank: missing axes are 1, more than two spatial ones become two."""
    values = np.moveaxis(values, p.case.axis, 1)
    n, c, *spatial = values.shape
    return values.reshape(n, c, int(np.prod(spatial[:-1])), spatial[-1] if spatial else 1)
