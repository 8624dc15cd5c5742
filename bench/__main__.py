"""Measure: without arguments everything, which is stored and reported.

Arguments are pytest's: a selection (-k) is printed only, or with --store replaces the same rows of what is stored.
Rows are measured against their own copies, so that those of different runs stand beside each other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import report

TEST = Path(__file__).with_name("test_kernels.py")
PRINTED = ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=min"]


def main(arguments: list[str]) -> int:
    """Exit status as pytest's."""
    if arguments and "--store" not in arguments:
        return int(pytest.main([str(TEST), *PRINTED, *arguments]))
    selection = [argument for argument in arguments if argument != "--store"]
    fresh = report.STORED.with_suffix(".new")
    status = int(pytest.main([str(TEST), "-q", "--benchmark-quiet", f"--benchmark-json={fresh}", *selection]))
    if status == 0:
        if selection:
            merge(fresh)
        fresh.replace(report.STORED)
        report.write()
    return status


def merge(fresh: Path) -> None:
    """Add to freshly measured rows the stored ones that were not measured again, in the stored order."""
    new = json.loads(fresh.read_text(encoding="utf-8"))
    stored = json.loads(report.STORED.read_text(encoding="utf-8"))["benchmarks"]
    rows: dict[str, list[object]] = {entry["group"]: [] for entry in (*stored, *new["benchmarks"])}
    measured = {entry["group"] for entry in new["benchmarks"]}
    for entry in (*(entry for entry in stored if entry["group"] not in measured), *new["benchmarks"]):
        rows[entry["group"]].append(entry)
    new["benchmarks"] = [entry for entries in rows.values() for entry in entries]
    fresh.write_text(json.dumps(new, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
