"""Build the compiled kernels; everything else about the package stands in pyproject.toml.

The extension is built with OpenMP, serially where the compiler has none, and left out where there is no compiler:
the Numba and NumPy backends need none. ``FASTBN_EXT=require`` makes a missing extension an error.

``cythonize()`` is not called on purpose: setuptools translates the ``.pyx`` itself, keeps it in the sdist, and honours
``optional``.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# No -march=native and no -ffast-math: the kernels choose their instruction set when they run, and rounding is theirs.
OPTIMISE = {"unix": ["-O3"], "mingw32": ["-O3"], "msvc": ["/O2"]}


def openmp_flags(compiler_type: str) -> tuple[list[str], list[str]]:
    """Compile and link arguments that turn OpenMP on."""
    if compiler_type == "msvc":
        return ["/openmp"], []
    if sys.platform == "darwin":  # Apple's clang has the pragmas but not the library, which is Homebrew's libomp
        return ["-Xpreprocessor", "-fopenmp"], ["-lomp"]
    return ["-fopenmp"], ["-fopenmp"]


class BuildExt(build_ext):
    """Build with OpenMP, and once more without it where that fails."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        base = OPTIMISE.get(self.compiler.compiler_type, [])
        compile_openmp, link_openmp = openmp_flags(self.compiler.compiler_type)
        ext.extra_compile_args, ext.extra_link_args = base + compile_openmp, link_openmp
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            self.warn(f"building {ext.name!r} with OpenMP failed ({error}); building it serially")
            ext.extra_compile_args, ext.extra_link_args = base, []
            super().build_extension(ext)


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
