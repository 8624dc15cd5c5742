"""Copies of the source tree in which the other scripts here build and break things."""

import ast
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


def build_extension(
    package: Path,
    *flags: str,
    compiler: str = "gcc",
    include: tuple[str | Path, ...] = (sysconfig.get_path("include"),),
    suffix: str = str(sysconfig.get_config_var("EXT_SUFFIX")),
) -> None:
    """Compile the extension where its sources are, with the options of setup.py and then these."""
    for old in (*package.glob("*.so"), *package.glob("_kernels.c")):
        old.unlink()
    subprocess.run([sys.executable, "-m", "cython", "-3", "_kernels.pyx"], check=True, cwd=package)
    options = [*optimise(), "-shared", "-fPIC", "-fopenmp", *flags, *(f"-I{folder}" for folder in include)]
    subprocess.run([compiler, *options, "_kernels.c", "-o", f"_kernels{suffix}"], check=True, cwd=package)


def optimise() -> list[str]:
    """The options of setup.py, which decide on rounding."""
    for statement in ast.parse((SOURCE / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "OPTIMISE":
            return list(ast.literal_eval(statement.value))
    raise ValueError("setup.py has no OPTIMISE")
