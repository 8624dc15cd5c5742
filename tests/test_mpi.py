"""Layers over the ranks of MPI, against PyTorch in one process on the whole batch; what they check is in ranks.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fastbn

EXAMPLES = Path(__file__).parents[1] / "examples"


def mpiexec(ranks: int, *arguments: str) -> str:
    """Output of a Python program on so many ranks; a program that hangs is a failure."""
    beside = Path(sys.executable).with_name("mpiexec")
    command = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert command is not None, "mpiexec comes with the wheel mpich"
    environment = os.environ | {"FASTBN_NUM_THREADS": "1"}
    result = subprocess.run(
        [command, "-n", str(ranks), sys.executable, "-W", "error", "-m", "mpi4py", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def expected_of(torch: ModuleType) -> dict[str, np.ndarray]:
    """Three batches, and PyTorch's outputs, gradients and running statistics in float64."""
    rng = np.random.default_rng(3)
    shape = (3, 9, 5, 4, 3)
    arrays = {name: rng.standard_normal(shape) for name in ("x", "residual", "dy")}
    arrays["x"] = arrays["x"] * rng.uniform(0.5, 2, (5, 1, 1)) + rng.uniform(-5, 5, (5, 1, 1))
    # Values that float32 holds, for both dtypes are compared with the same results.
    arrays = {name: a.astype(np.float32).astype(float) for name, a in arrays.items()}
    arrays |= {name: rng.uniform(0.5, 1.5, 5).astype(np.float32).astype(float) for name in ("weight", "bias")}
    results: dict[str, list[np.ndarray]] = {}
    for momentum in (0.1, None):
        bn = torch.nn.BatchNorm2d(5, momentum=momentum).double()
        bn.load_state_dict({**bn.state_dict(), **{k: torch.tensor(arrays[k]) for k in ("weight", "bias")}})
        for step in range(3):
            x, residual = (torch.tensor(arrays[name][step]).requires_grad_() for name in ("x", "residual"))
            bn.zero_grad()
            y = torch.relu(bn(x) + residual)
            y.backward(torch.tensor(arrays["dy"][step]))
            if momentum is None:
                pairs = {"y": y.detach(), "dx": x.grad, "dresidual": residual.grad}
                for name, value in (pairs | {"dweight": bn.weight.grad, "dbias": bn.bias.grad}).items():
                    results.setdefault(name, []).append(value.numpy().copy())
        arrays |= {f"{name} {momentum}": getattr(bn, name).numpy().copy() for name in ("running_mean", "running_var")}
    return arrays | {name: np.stack(values) for name, values in results.items()}


@pytest.mark.parametrize("ranks", (2, 3))
def test_ranks_train_together(torch, tmp_path, ranks):
    path = tmp_path / "expected.npz"
    np.savez(path, **expected_of(torch))
    backends = [name for name in fastbn.available_backends() if ranks == 2 or name != "numba"]
    if "numba" in backends:
        with fastbn.use_backend("numba"):
            fastbn.warmup()  # compiles once, not once a rank
    output = mpiexec(ranks, str(Path(__file__).with_name("ranks.py")), str(path), *backends)
    assert all(f"rank {rank} of {ranks} is content" in output for rank in range(ranks))


@pytest.mark.parametrize("ranks", (1, 2))
def test_example_of_training_over_ranks(ranks):
    *_, last = mpiexec(ranks, str(EXAMPLES / "sync_bn.py")).splitlines()
    words = last.split()
    assert float(words[1]) > 0.9
    assert last.endswith(f"on {ranks} ranks, whose running statistics are the same to the bit")


@pytest.mark.parametrize("comm", (3, "world", np.zeros(2), dict))
def test_what_is_no_communicator_is_refused(comm):
    with pytest.raises(TypeError, match="comm must be None or an mpi4py communicator"):
        fastbn.BatchNorm2d(3, comm=comm)


def test_variants_take_no_communicator():
    bn = fastbn.GhostBatchNorm(3)
    with pytest.raises(TypeError, match="GhostBatchNorm"):
        bn.comm = object()
