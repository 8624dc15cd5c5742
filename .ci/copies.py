"""Copies of the source tree in which the other scripts here build and break things."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]


def copy_tree(folder: Path) -> None:
    """Copy what the tests need."""
    for part in ("fastbn", "fastbn_ext", "tests", "bench", "docs", "examples"):
        if (SOURCE / part).exists():
            shutil.copytree(SOURCE / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "CHANGELOG.md"):
        shutil.copy(SOURCE / part, folder)


def build_extension(package: Path, *flags: str) -> None:
    """Compile the extension where its sources are."""
    for old in (*package.glob("*.so"), *package.glob("_kernels.c")):
        old.unlink()
    subprocess.run([sys.executable, "-m", "cython", "-3", "_kernels.pyx"], check=True, cwd=package)
    include = f"-I{sysconfig.get_path('include')}"
    output = f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["gcc", "-shared", "-fPIC", "-fopenmp", *flags, include, "_kernels.c", "-o", output]
    subprocess.run(command, check=True, cwd=package)
