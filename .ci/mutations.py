"""Whether the tests notice when a key line of the kernels is wrong: each line below is spoilt, and some test must fail.

    python .ci/mutations.py [PART ...]      a PART of a file's name or of a reason chooses; without any, all are done

A mutation is a piece of text that stands in its file once, what it becomes, and what breaks with it. Ends with status 1
where a mutation survives, or where its text is no longer found: then the table is to be brought up to date. Needs gcc,
Cython and the test group; takes about ten minutes, most of it for Numba's compiler.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from copies import build_extension, copy_tree

NUMBA, C = "fastbn/backends/_numba/", "fastbn_ext/"
NUMPY, MERGE, CHANNELS = "fastbn/backends/numpy_.py", "fastbn/_merge.py", "fastbn/_channels.py"

# What catches most comes first. Numba's mutations have no more than what catches them: its compiler takes the time.
PRECISION = ("tests/test_precision.py",)
FORWARD = (*PRECISION, "tests/test_moments.py", "tests/test_functional.py")
BACKWARD = (*PRECISION, "tests/test_functional.py", "tests/test_layers.py")
FUSED = ("tests/test_fused.py",)
STREAMING = ("tests/test_streaming.py",)


class Mutation(NamedTuple):
    """What to spoil, and the tests that must notice."""

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        NUMBA + "channels.py", "weight = size_a * share", "weight = size_a * 1.0", "Chan's merge of m2", PRECISION
    ),
    Mutation(
        NUMBA + "channels.py", "m2 = sum2 - sum1 * mean", "m2 = sum2", "m2 about the mean, not the shift", PRECISION
    ),
    Mutation(
        NUMBA + "channels.py",
        "rounded(coef, shift - (center - high) * scale)",
        "rounded(coef, shift)",
        "what rounding the mean to float32 leaves over",
        PRECISION,
    ),
    Mutation(
        NUMBA + "channels.py",
        "dot[k] - low[k] * sum_dy[k]",
        "dot[k]",
        "what rounding the mean leaves over, in the gradient",
        PRECISION,
    ),
    Mutation(
        NUMBA + "kernel.py",
        "finish_together(job, c, ",
        "finish_together(job, c0, ",
        "more channels than 64",
        ("tests/test_functional.py",),
    ),
    Mutation(
        NUMBA + "kernel.py", "return rest_of(job) // job.channels", "return 1", "pixels that fill no row", PRECISION
    ),
    Mutation(
        NUMBA + "points.py", "scaled(z, slope)", "z * like(z, slope)", "ReLU of minus infinity is 0, not NaN", FUSED
    ),
    Mutation(
        NUMBA + "columns.py",
        "sums[j] = sums[j + LANES - rest]",
        "pass",
        "a row's last vector of sums overlaps",
        ("tests/test_functional.py",),
    ),
    Mutation(
        NUMBA + "columns.py", "rows - whole * streams", "0", "rows that are left over by eight streams", PRECISION
    ),
    Mutation(
        NUMBA + "shares.py", "t < shares[share + 1]", "t < shares[share + 1] - 1", "a share's last task", PRECISION
    ),
    Mutation(NUMBA + "rows.py", "b // pieces * height", "0", "pieces of a long row in several blocks", PRECISION),
    Mutation(
        NUMBA + "rows.py",
        "sum1, sum2 = add(job, c0 + q, begin, single,",
        "add(job, c0 + q, begin, single,",
        "what is left of a row's quarters",
        ("tests/test_functional.py",),
    ),
    Mutation(NUMBA + "rows.py", "else (each, each // LANES)", "else (each, words)", "signs of a row's quarters", FUSED),
    Mutation(
        NUMBA + "output.py",
        "joined(coefs, following, edge - i)",
        "coefs",
        "a vector that two channels share",
        ("tests/test_functional.py",),
    ),
    Mutation(NUMBA + "output.py", "store_where(out, at + i, rest, z)", "pass", "what is left of a row", FUSED),
    Mutation(NUMBA + "columns.py", "shifts[j - pixel]", "row[0]", "the columns of a channel share a shift", PRECISION),
    Mutation(
        NUMBA + "channels.py", "unbiased * var[k]", "var[k]", "running variance is unbiased", ("tests/test_layers.py",)
    ),
    Mutation(
        NUMBA + "kernel.py", "same(out, job.dy)", "same(job.dx, job.dy)", "what is not there is not in place", STREAMING
    ),
    Mutation(C + "channels.h", "weight = size_a * share", "weight = size_a", "Chan's merge of m2", FORWARD),
    Mutation(C + "channels.h", "isfinite(delta) ? mean : sum", "mean", "an infinite mean is no NaN", FORWARD),
    Mutation(
        C + "channels.h",
        "dot[k] - low[k] * sum_dy[k]",
        "dot[k]",
        "what rounding the mean leaves over, in the gradient",
        BACKWARD,
    ),
    Mutation(
        C + "kernels.h",
        "NAME(finish_together)(job, c, ",
        "NAME(finish_together)(job, c0, ",
        "more channels than 64",
        FORWARD,
    ),
    Mutation(C + "common.h", "return rest_of(job) / job->channels", "return 1", "pixels that fill no row", FORWARD),
    Mutation(C + "columns.h", "= shifts[j - pixel]", "= row[0]", "the columns of a channel share a shift", FORWARD),
    Mutation(C + "channels.h", "(unbiased * var[k])", "var[k]", "running variance is unbiased", BACKWARD),
    Mutation(C + "rows.h", "isfinite(*x) ? *x : 0", "0", "a shift near the mean: no cancellation", FORWARD),
    Mutation(
        C + "points.h",
        "NAME(scaled)(z, slope)",
        "(V)(z * slope)",
        "ReLU of minus infinity is 0, not NaN",
        FUSED,
    ),
    Mutation(C + "columns.h", "sums[j] = sums[j + LANES - rest]", "", "a row's last vector of sums overlaps", FORWARD),
    Mutation(C + "common.h", "rows - whole * streams", "0", "rows that are left over by eight streams", FORWARD),
    Mutation(C + "common.h", "if (t < share->end)", "if (t < share->end - 1)", "a share's last task", FORWARD),
    Mutation(C + "common.h", "b / pieces * height", "0", "pieces of a long row in several blocks", FORWARD),
    Mutation(
        C + "rows.h",
        "NAME(widen)(NAME(where)(tail, gate, (V){0}))",
        "NAME(widen)(gate)",
        "a row's last vector overlaps the one before",
        BACKWARD,
    ),
    Mutation(C + "output.h", "NAME(joined)(k, next, edge - i)", "k", "a vector that two channels share", FORWARD),
    Mutation(C + "rows.h", "ADD(1, STREAMS * each", "ADD(1, 0", "what is left of a row's quarters", FORWARD),
    Mutation(C + "rows.h", "slab.words : each / LANES", "slab.words : 0", "signs of a row's quarters", FUSED),
    Mutation(C + "output.h", "NAME(store_where)(out + i, rest, z);", "", "what is left of a row", FUSED),
    Mutation(
        C + "points.h", "(uint32_t)sign[word + 1] << LANES", "0u", "signs of a vector that begins within a word", FUSED
    ),
    Mutation(C + "points.h", "NAME(load_widened_where)(dy, open)", "NAME(load_widened)(dy)", "sums with a ReLU", FUSED),
    Mutation(
        NUMBA + "points.py",
        "where(opened, widen(load(dy, at)), splat(0.0))",
        "widen(load(dy, at))",
        "sums behind a ReLU",
        FUSED,
    ),
    Mutation(
        C + "kernels.h",
        "(shift[c] - (center[c] - (REAL)center[c]) * scale[c])",
        "shift[c]",
        "what rounding the mean to float32 leaves over",
        FORWARD,
    ),
    Mutation(
        NUMPY,
        "shift + (block - shift[:, None]).mean((0, 2))",
        "block.mean((0, 2))",
        "constant channels",
        FORWARD,
    ),
    Mutation(CHANNELS, "unbiased * norm[1]", "norm[1]", "running variance is unbiased", BACKWARD),
    Mutation(NUMPY, "(dot * invstd**2 / (n * s))", "(dot * invstd / (n * s))", "the gradient of variance", BACKWARD),
    Mutation(NUMPY, "positive = ~(z <= 0)", "positive = z > 0", "an activation lets NaN through", FUSED),
    Mutation(MERGE, "(count_a * share)", "count_a", "Chan's merge of m2", ("tests/test_moments.py",)),
    Mutation(MERGE, " + (rest_b - rest_a)", "", "what rounding takes from the mean", ("tests/test_moments.py",)),
    Mutation(
        MERGE,
        "np.where(finite, mean, mean_a + mean_b)",
        "mean",
        "an infinite mean is no NaN",
        ("tests/test_moments.py",),
    ),
)


def backend_of(mutation: Mutation) -> str:
    """Return the backend whose tests must notice."""
    return "numba" if mutation.file.startswith(NUMBA) else "cython" if mutation.file.startswith(C) else "numpy"


def failing_test(tree: Path, backend: str, tests: Iterable[str]) -> str | None:
    """Run tests on a backend, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", backend, *tests]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if run.returncode > 1:  # 1 says that tests failed, any other number that there were none to run
        raise RuntimeError(f"the tests cannot be run: {run.stdout}{run.stderr}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return failed[1] if failed else None


def catch(mutation: Mutation, tree: Path) -> str | None:
    """Spoil a line in the copy, run the tests, and put the line back."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    found = text.count(mutation.old)
    if found != 1:
        raise LookupError(f"{mutation.file} has {mutation.old!r} {found} times: bring the table up to date")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        if path.suffix == ".h":
            build_extension(tree / "fastbn_ext", "-O1", "-w")
        return failing_test(tree, backend_of(mutation), mutation.tests)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Try every mutation that is chosen."""
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(part in m.file + m.breaks for part in sys.argv[1:])]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="fastbn-mutations-") as name:
        tree = Path(name)
        copy_tree(tree)
        build_extension(tree / "fastbn_ext", "-O1", "-w")
        for backend in sorted({backend_of(mutation) for mutation in chosen}):
            tests = {test for mutation in chosen if backend_of(mutation) == backend for test in mutation.tests}
            if failed := failing_test(tree, backend, sorted(tests)):
                sys.exit(f"{failed} fails without any mutation: nothing can be said")
        for mutation in chosen:
            start = time.perf_counter()
            try:
                test = catch(mutation, tree)
                verdict = f"caught by {test}" if test else "SURVIVED"
            except LookupError as error:
                test, verdict = None, f"NOT TRIED, {error}"
            print(f"{time.perf_counter() - start:4.0f} s  {mutation.file}: {mutation.breaks}: {verdict}", flush=True)
            if not test:
                survivors.append(mutation)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
