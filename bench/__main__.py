"""Measure: arguments are pytest's. A whole run is stored and reported; a selection (-k) is only printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench import report

TEST = Path(__file__).with_name("test_kernels.py")
PRINTED = ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=min"]


def main(arguments: list[str]) -> int:
    """Exit status as pytest's."""
    if arguments:
        return int(pytest.main([str(TEST), *PRINTED, *arguments]))
    fresh = report.STORED.with_suffix(".new")
    status = int(
        pytest.main([str(TEST), "-q", "--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={fresh}"])
    )
    if status == 0:
        fresh.replace(report.STORED)
        report.write()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
