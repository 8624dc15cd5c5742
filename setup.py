"""Build the compiled kernels; everything else about the package stands in pyproject.toml.

The extension needs gcc or clang. It is built with OpenMP, serially where the compiler has none, and left out where
there is no such compiler: the Numba and NumPy backends need none. ``FASTBN_EXT=require`` makes a missing extension an
error.

``cythonize()`` is not called on purpose: setuptools translates the ``.pyx`` itself, keeps it in the sdist, and honours
``optional``.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# No -march=native and no -ffast-math: the kernels choose their instruction set when they run, and rounding is theirs.
# They say which products and sums are fused: a compiler that chooses may fuse differently at the end of a row.
# A square root sets no errno, so that loops of them become vectors.
# Debug sections would carry the paths of the machine that built.
OPTIMISE = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-g0"]

# For GCC. A loop of seven instructions that crosses a line of the cache takes half as long again on Zen 3, so that it
# was chance how fast a build was: 32x256x13x13, inference, 2.3 or 3.7 ns for 16 values on a thread, training 5.8 or
# 7.2, backward 9.4 or 10.7. Loops that GCC splits in two take a tenth longer (32x1280x7x7, sums of gradients).
PLACEMENT = ["-falign-loops=64", "-falign-jumps=64", "-fno-split-loops"]

# Apple's clang has the pragmas but not the library, which is Homebrew's libomp.
OPENMP_COMPILE = ["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"]
OPENMP_LINK = ["-lomp"] if sys.platform == "darwin" else ["-fopenmp"]


class BuildExt(build_ext):
    """Build with OpenMP, and once more without it where that fails."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        optimise = OPTIMISE + (PLACEMENT if self._is_gcc() else [])
        ext.extra_compile_args, ext.extra_link_args = optimise + OPENMP_COMPILE, OPENMP_LINK
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            self.warn(f"building {ext.name!r} with OpenMP failed ({error}); building it serially")
            ext.extra_compile_args, ext.extra_link_args = optimise, []
            super().build_extension(ext)

    def _is_gcc(self) -> bool:
        """Whether the compiler is GCC by its own account; it may be Clang under the name of gcc."""
        command = getattr(self.compiler, "compiler_so", None) or [""]
        try:
            said = subprocess.run(  # noqa: S603  # setuptools would run it too
                [command[0], "--version"], capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return "Free Software Foundation" in said.stdout


setup(
    ext_modules=[
        Extension(
            "fastbn_ext._kernels",
            ["fastbn_ext/_kernels.pyx"],
            depends=sorted(map(str, Path("fastbn_ext").glob("*.h"))),
            optional=os.environ.get("FASTBN_EXT") != "require",
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
