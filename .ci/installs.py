"""The ways in which fastbn gets onto a machine; run by a Python that has the test group and the build package.

    python .ci/installs.py [ARGUMENT ...]      arguments go to pytest; without any, all tests are run

Everything is made from the sdist, in a folder where the source tree is out of reach. The whole wheel passes the tests,
a compiler without OpenMP gives a serial extension, no compiler gives none, and without Numba the extension takes over.
What builds is in the environment at hand (``pip install build setuptools cython``): an isolated one for each of the
five builds cost a minute, and the README's own command has one.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]

# A compiler that refuses OpenMP the way one does that has never heard of it.
NO_OPENMP = """#!/bin/sh
case " $* " in *" -fopenmp "*) echo "error: unrecognized option '-fopenmp'" >&2; exit 1;; esac
exec {compiler} "$@"
"""

# The first argument names the backends to be had, the second those that compute (Numba compiles for half a minute).
USE = """
import sys
import numpy as np
import fastbn
names = tuple(sys.argv[1].split())
assert fastbn.available_backends() == names, fastbn.available_backends()
x = np.random.default_rng(0).standard_normal((8, 3, 5, 5))
for name in sys.argv[2].split():
    with fastbn.use_backend(name):
        y = fastbn.BatchNorm2d(3, eps=1e-12, dtype=np.float64)(x)
    np.testing.assert_allclose(y.var(axis=(0, 2, 3)), 1, rtol=1e-9)
"""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> None:
    """Run a command; its output is shown, its failure ends the script."""
    subprocess.run(command, check=True, cwd=cwd, env=os.environ | environment)


def make_sdist(folder: Path) -> Path:
    """Build the sdist of the source tree."""
    run(sys.executable, "-m", "build", "--quiet", "--no-isolation", "--sdist", "--outdir", folder, SOURCE)
    (sdist,) = folder.glob("fastbn-*.tar.gz")
    return sdist


def make_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    """Build the wheel that a machine with this environment makes of the sdist."""
    # pip's cache knows an sdist by its path alone and would hand out the wheel of another environment.
    options = ("--quiet", "--no-deps", "--no-cache-dir", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def extension(wheel: Path) -> bytes | None:
    """The compiled extension that a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("fastbn_ext/") and name.endswith(".so")]
        return archive.read(names[0]) if names else None


def make_environment(folder: Path) -> Path:
    """Create a virtual environment and return its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def install(python: Path, wheel: Path, *options: str) -> None:
    """Put a wheel into an environment, in place of what is there."""
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", *options, wheel)


def test_wheel(sdist: Path, wheel: Path, folder: Path, *options: str) -> None:
    """Run the tests that the sdist carries on a wheel, with no other fastbn in sight."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    for package in ("fastbn", "fastbn_ext"):
        (tree / package).rename(folder / f"hidden-{package}")
    python = make_environment(folder / "venv")
    install(python, wheel, "--no-deps")
    # The other distributions come from the environment at hand; its editable fastbn does not, .pth files do not nest.
    borrowed = folder / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages" / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("platlib") + "\n")
    run(python, "-c", "import fastbn, sys; assert fastbn.__file__.startswith(sys.prefix), fastbn.__file__", cwd=tree)
    run(python, "-m", "pytest", "-q", *options, cwd=tree)


def main() -> None:
    """Go through the installations."""
    os.environ.pop("FASTBN_EXT", None)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        sdist = make_sdist(work)

        compiler = work / "cc"
        compiler.write_text(NO_OPENMP.format(compiler=sysconfig.get_config_var("CC")))
        compiler.chmod(0o755)
        with ThreadPoolExecutor() as pool:  # compiling takes most of the time, on one core each
            whole = pool.submit(make_wheel, sdist, work / "whole", FASTBN_EXT="require")
            serial = pool.submit(
                make_wheel, sdist, work / "serial", CC=shlex.quote(str(compiler)), FASTBN_EXT="require"
            )

        print("-- the wheel of the sdist, tested without the source tree", flush=True)
        wheel = whole.result()
        assert b"libgomp" in (extension(wheel) or b"")
        assert str(work).encode() not in (extension(wheel) or b""), "the extension names the folder it was built in"
        test_wheel(sdist, wheel, work / "tested", *sys.argv[1:])

        print("-- no compiler", flush=True)
        without = make_wheel(sdist, work / "without", CC="/bin/false")
        assert extension(without) is None
        python = make_environment(work / "venv")
        install(python, without)
        run(python, "-c", USE, "numba numpy", "numba numpy", cwd=work)

        print("-- no compiler, but an extension required: an error", flush=True)
        try:
            make_wheel(sdist, work / "required", CC="/bin/false", FASTBN_EXT="require")
        except subprocess.CalledProcessError:
            print("(the failure above is the expected one)", flush=True)
        else:
            raise AssertionError("the build left the extension out")

        print("-- a compiler without OpenMP", flush=True)
        assert b"libgomp" not in (extension(serial.result()) or b"libgomp")
        install(python, serial.result(), "--no-deps")
        run(python, "-c", USE, "numba cython numpy", "cython", cwd=work)

        print("-- no Numba", flush=True)
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "numba", "llvmlite")
        run(python, "-c", USE, "cython numpy", "cython numpy", cwd=work)


if __name__ == "__main__":
    main()
