"""The extension compiled for ARM64 and tested there, on an emulated CPU.

    python .ci/aarch64.py [ARGUMENT ...]      arguments go to pytest; without any, the tests of the extension are run

On Debian, as root for `dpkg --add-architecture arm64`, once:

    apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

Python 3.11 for ARM64 is unpacked from Debian 12's packages, NumPy and pytest from their wheels; nothing is installed.
`--folder FOLDER` keeps all that for the next time. Without Numba and PyTorch, whose tests are left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from copies import build_extension, copy_tree

PACKAGES = (
    *("libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libexpat1", "libffi8", "libssl3", "libsqlite3-0"),
    *("libbz2-1.0", "liblzma5", "libuuid1", "libcrypt1"),
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev"),
)
DISTRIBUTIONS = ("numpy", "pytest>=9", "hypothesis>=6.100", "ml_dtypes", "scipy")
GLIBC = (17, 27, 28)
TESTS = (
    "tests/test_extension.py",
    "tests/test_functional.py",
    "tests/test_moments.py",
    "tests/test_fused.py",
    "tests/test_precision.py",
)
SELECTED = "(cython or extension) and not pytorch and not numba"
CHECK = """
import platform, numpy, fastbn
from fastbn_ext import _kernels
assert platform.machine() == "aarch64"
print("Python", platform.python_version(), "NumPy", numpy.__version__, fastbn.available_backends(),
      _kernels.available_instruction_sets(), "OpenMP" if _kernels.openmp else "serial")
assert fastbn.available_backends() == ("cython", "numpy")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> None:
    """Run a command."""
    subprocess.run(command, check=True, cwd=cwd, env=os.environ | environment)


def unpack(folder: Path) -> None:
    """Fetch and unpack Python and what the tests import."""
    debs, wheels, root = (folder / name for name in ("debs", "wheels", "root"))
    for made in (debs, wheels, root):
        made.mkdir(parents=True, exist_ok=True)
    run("dpkg", "--add-architecture", "arm64", cwd=debs)
    run("apt-get", "update", "-qq", cwd=debs)
    run("apt-get", "download", "-qq", *(f"{name}:arm64" for name in PACKAGES), cwd=debs)
    for package in sorted(debs.glob("*.deb")):
        run("dpkg-deb", "-x", package, root, cwd=debs)
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC]
    target = ("--python-version=3.11", "--implementation=cp", "--only-binary=:all:", *platforms)
    run(sys.executable, "-m", "pip", "download", "-q", *target, "-d", wheels, *DISTRIBUTIONS, cwd=folder)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
    (folder / "done").touch()


def main() -> None:
    """Unpack, build and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="fastbn-aarch64-") as name:
        work = Path(name)
        folder = (options.folder or work / "arm64").resolve()
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            unpack(folder)
        tree = work / "tree"
        tree.mkdir()
        copy_tree(tree)
        headers = folder / "root/usr/include"
        build_extension(
            tree / "fastbn_ext",
            "-fwrapv",
            compiler="aarch64-linux-gnu-gcc",
            include=(headers / "python3.11", headers),
            suffix=".cpython-311-aarch64-linux-gnu.so",
        )
        python = ("qemu-aarch64", "-L", folder / "root", folder / "root/usr/bin/python3.11")
        environment = {"PYTHONPATH": f"{tree}:{folder / 'site'}", "PYTHONHOME": str(folder / "root/usr")}
        run(*python, "-c", CHECK, cwd=tree, **environment)
        selection = arguments or ["-k", SELECTED, *TESTS]
        run(*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection, cwd=tree, **environment)


if __name__ == "__main__":
    main()
