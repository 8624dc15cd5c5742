"""The tests on an extension that is built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python .ci/sanitize.py [ARGUMENT ...]      go to pytest; without any, those chosen below are run

A read or write outside an array, a use of freed memory, a misaligned access, an overflow of a signed number or of a
shift ends the run. Leaks are not looked for: Python keeps what it allocates at start until it ends, and what an import
allocates is not the extension's. Needs gcc with its sanitizers, Cython and the test group.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from copies import build_extension, copy_tree

# -O1 keeps what the sanitizers look at.
FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# What gives the C kernels their shapes, types, strides and odd values, in three minutes. All took half an hour, and
# those of time, of memory and of processes failed: freed memory is kept aside for a while, and all is slower. Numba's
# kernels are not C.
SELECTED = "not numba and not numpy"
FILES = ("extension", "functional", "fused", "hostile", "layers", "moments", "out", "precision", "sizes", "streaming")
# Writes behind an array of four values: what must be found, or nothing is.
CANARY = """
import numpy as np
from fastbn_ext import _kernels
few = np.zeros(4)
plan = np.zeros(13, np.intp)
plan[1] = 1000  # channels
_kernels.kernel(False, False, False, plan, True, True, 0.0, 1.0, 0.0, few, *(None,) * 6, *(few,) * 5, None, few)
"""


def library(name: str) -> str:
    """Where gcc keeps a sanitizer's library."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Build and test."""
    with tempfile.TemporaryDirectory(prefix="fastbn-sanitize-") as name:
        work = Path(name)
        copy_tree(work)
        build_extension(work / "fastbn_ext", *FLAGS)
        environment = os.environ | {
            "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # so that small objects have borders too
            "PYTHONPATH": str(work),
        }
        canary = subprocess.run(
            [sys.executable, "-c", CANARY], capture_output=True, text=True, cwd=work, env=environment, check=False
        )
        assert "heap-buffer-overflow" in canary.stderr, f"the sanitizer finds nothing: {canary.stderr}"
        arguments = sys.argv[1:] or ["-k", SELECTED, *(f"tests/test_{name}.py" for name in FILES)]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        sys.exit(subprocess.run(command, cwd=work, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
