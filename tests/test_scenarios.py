"""Where fastbn finds itself: each scenario in a fresh process must give the right numbers, or say what is wrong."""

from __future__ import annotations

import compileall
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from subprocesses import environment, python

import fastbn

ROOT = Path(fastbn.__file__).parent

# Forward and backward of a layer, large enough for several threads, against NumPy.
CHECK = """
import numpy as np, fastbn
def check():
    x = np.random.default_rng(0).standard_normal((8, 16, 40, 40), np.float32)
    bn = fastbn.BatchNorm2d(16)
    y, dx = bn(x), bn.backward(x)
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    assert np.allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    assert abs(dx).max() < 1e-4, "the gradient of y along x, which is no change of y but its size"
    return fastbn.get_backend()
"""


@dataclass
class Scenario:
    """What surrounds `check`, and what must be printed by it."""

    before: str = ""
    env: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    backend: str = "cython"
    after: str = ""


BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise {error}
sys.meta_path.insert(0, Broken())
"""
TORCH = "import torch\ntorch.nn.BatchNorm2d(64)(torch.randn(32, 64, 56, 56))\n"
NOWHERE = "/proc/nowhere" if sys.platform == "linux" else "/dev/null/nowhere"

RIGHT = {
    "warnings are errors": Scenario(),
    "-O": Scenario(flags=("-O",)),
    "-OO": Scenario(flags=("-OO",)),
    "Numba without its library": Scenario(before=BROKEN.format(error="OSError('libllvmlite.so')"), env={"CHOICE": ""}),
    "Numba too old for NumPy": Scenario(before=BROKEN.format(error="AttributeError('np.long')"), env={"CHOICE": ""}),
    "Numba without its compiler": Scenario(env={"NUMBA_DISABLE_JIT": "1", "CHOICE": ""}),
    "nonsense for LLVM": Scenario(env={"NUMBA_CPU_FEATURES": "nonsense", "CHOICE": ""}),
    "nonsense for Numba's threads": Scenario(env={"NUMBA_NUM_THREADS": "0", "CHOICE": ""}),
    "fewer threads for Numba": Scenario(env={"NUMBA_NUM_THREADS": "1"}, backend="numba"),
    "one thread for OpenMP": Scenario(env={"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "true"}),
    "spaces around a choice": Scenario(env={"FASTBN_BACKEND": " cython "}),
    "PyTorch before and in between": Scenario(before=TORCH, after=TORCH + "check()"),
}


def run(scenario: Scenario, code: str = CHECK, **options) -> subprocess.CompletedProcess[str]:
    env = dict(scenario.env)
    if env.pop("CHOICE", None) is None:
        env.setdefault("FASTBN_BACKEND", scenario.backend)
    lines = (scenario.before, code, "print(check())", scenario.after)
    return python("\n".join(lines), flags=scenario.flags, **options, **env)


@pytest.mark.parametrize("name", RIGHT)
def test_right_numbers(name):
    assert run(RIGHT[name]).stdout.strip() == RIGHT[name].backend


WRONG = {
    "backend": ({"FASTBN_BACKEND": "torch"}, "ValueError", ("FASTBN_BACKEND", "'torch'", "numba, cython, numpy")),
    "threads": ({"FASTBN_NUM_THREADS": "many"}, "ValueError", ("FASTBN_NUM_THREADS", "'many'", "1 to")),
    "pool": ({"FASTBN_POOL_LIMIT": "2 GB"}, "ValueError", ("FASTBN_POOL_LIMIT", "'2 GB'", "bytes")),
    "no compiler": (
        {"FASTBN_BACKEND": "numba", "NUMBA_DISABLE_JIT": "1"},
        "RuntimeError",
        ("FASTBN_BACKEND", "NUMBA_DISABLE_JIT"),
    ),
    "features": (
        {"FASTBN_BACKEND": "numba", "NUMBA_CPU_FEATURES": "avx9"},
        "RuntimeError",
        ("NUMBA_CPU_FEATURES", "'avx9'", "+ or -"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_nonsense_is_an_error_at_first_use(name):
    env, error, words = WRONG[name]
    code = "import fastbn, numpy\nprint('imported', flush=True)\n"
    code += "fastbn.BatchNorm2d(16)(numpy.zeros((8, 16, 99, 99), 'f4'))"
    result = python(code, check=False, **{"FASTBN_BACKEND": "cython"} | env)
    assert result.stdout.strip() == "imported"
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    for word in (error, *words):
        assert word in last


def test_show_config_says_why_a_backend_is_missing():
    hidden = BROKEN.format(error="OSError('libllvmlite.so cannot be opened')")
    shown = python(hidden + "import fastbn; fastbn.show_config()").stdout
    assert "numba" in shown
    assert "not available: OSError: libllvmlite.so cannot be opened" in shown


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Build the package as a freezer does: code objects in an archive, without sources."""
    folder = tmp_path_factory.mktemp("frozen")
    shutil.copytree(ROOT, folder / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(folder / "fastbn", quiet=1, legacy=True)
    path = folder / "frozen.zip"
    with zipfile.ZipFile(path, "w") as file:
        for code in folder.rglob("*.pyc"):
            file.write(code, code.relative_to(folder))
    shutil.rmtree(folder / "fastbn")
    return path


FROZEN = """
import sys, inspect
sys.path.insert(0, {archive!r})
import fastbn
assert {archive!r} in fastbn.__file__
try:
    inspect.getsource(fastbn.batch_norm)
except OSError:
    pass
else:
    raise AssertionError("there should be no source")
"""


def test_frozen_without_sources(archive):
    before = FROZEN.format(archive=str(archive))
    assert run(Scenario(before, backend="numpy")).stdout.strip() == "numpy"
    # Compiling the other kernels takes longer, and nothing more could go wrong.
    numba = """
import numpy as np
with fastbn.use_backend("numba"):
    seen = fastbn.moments(np.full((2, 3, 8, 8), 3, np.uint8))
assert (seen.mean == 3).all()
fastbn.show_config()
"""
    home = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "NUMBA_CACHE_DIR": ""}
    shown = python(before + numba, FASTBN_BACKEND="numpy", **home).stdout
    assert shown.count("none, for") == 1
    assert f"{archive}/fastbn/backends/_numba/__pycache__" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
@pytest.mark.parametrize("backend", ("numba", "cython", "numpy"))
def test_ctrl_c_ends_a_loop_of_calls(backend):
    # A shell's job in the background ignores the signal, and so would its children.
    loop = "\nimport signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    loop += "\nbn, x = fastbn.BatchNorm2d(16), np.ones((8, 16, 80, 80), np.float32)\nbn(x)\nprint('on', flush=True)\n"
    loop += "while True:\n    bn.backward(bn(x))\n"
    process = subprocess.Popen(
        [sys.executable, "-c", CHECK + loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(FASTBN_BACKEND=backend),
    )
    try:
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert said.strip().endswith("KeyboardInterrupt")


def test_a_user_who_can_write_nowhere():
    """The compiled kernels that lie beside the package serve everybody who may read them."""
    become = """
import os, numpy, fastbn
fastbn.moments(numpy.ones((3, 3)))  # afterwards all that is imported has been: nobody may not even read Python's files
if hasattr(os, "setuid") and os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
"""
    env = {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE, "NUMBA_CACHE_DIR": ""}
    assert run(Scenario(become, env, backend="numba")).stdout.strip() == "numba"
