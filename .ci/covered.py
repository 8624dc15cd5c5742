"""Lines and branches of fastbn that the tests reach, and lines of the C kernels.

    python .ci/covered.py [ARGUMENT ...]      go to pytest (-k "not numba", a file); without any, all tests are run

Python is counted by coverage.py, in subprocesses too; the extension is compiled with gcc's counters in a copy of the
source tree and counted by gcov. What Numba compiles cannot be counted: see pyproject.toml. Lines that no test reaches
are listed; on a CPU without AVX-512 those of its masks are among them. Needs gcc, Cython and the test group.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from copies import SOURCE, build_extension, copy_tree

HEADERS = sorted(path.name for path in (SOURCE / "fastbn_ext").glob("*.h"))
HOOK = "import coverage; coverage.process_startup()\n"


def c_lines(folder: Path) -> dict[str, tuple[int, int]]:
    """Count the lines of each header, those that ran and all, over every value type and instruction set."""
    subprocess.run(["gcov", "--relative-only", *folder.glob("*.gcda")], cwd=folder, capture_output=True, check=True)
    found = {}
    for header in HEADERS:
        report = folder / f"{header}.gcov"
        if not report.exists():
            continue
        ran: dict[int, bool] = {}
        for line in report.read_text(encoding="utf-8").splitlines():
            if match := re.match(r" *([\d*#=-]+): *(\d+):", line):
                count, number = match[1], int(match[2])
                if count != "-" and number:
                    ran[number] = ran.get(number, False) or count.strip("*")[:1].isdigit()
        missed = [number for number, did in sorted(ran.items()) if not did]
        print(f"{header}: {len(ran) - len(missed)} of {len(ran)} lines; missed {missed or 'none'}")
        found[header] = (len(ran) - len(missed), len(ran))
    return found


def main() -> None:
    """Test and count."""
    with tempfile.TemporaryDirectory(prefix="fastbn-coverage-") as name:
        tree = Path(name)
        copy_tree(tree)
        extension = tree / "fastbn_ext"
        build_extension(extension, "-O1", "-w", "--coverage", "-fprofile-update=atomic")
        hooks = tree / "hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
        environment = os.environ | {
            "COVERAGE_PROCESS_START": str(tree / "pyproject.toml"),
            "COVERAGE_FILE": str(tree / ".coverage"),
            "PYTHONPATH": os.pathsep.join((str(tree), str(hooks))),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]
        status = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
        quiet = {key: value for key, value in environment.items() if key != "COVERAGE_PROCESS_START"}
        for step in (("combine", "-q"), ("report",)):
            subprocess.run([sys.executable, "-m", "coverage", *step], cwd=tree, env=quiet, check=True)
        lines = c_lines(extension)
        print(f"C: {sum(ran for ran, _ in lines.values())} of {sum(all_ for _, all_ in lines.values())} lines")
    sys.exit(status)


if __name__ == "__main__":
    main()
