"""The README's figures are what the stored measurement gives, to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    from bench import report

    return report


def test_texts_are_what_the_stored_figures_give(report):
    assert report.outdated() == []


def test_table_shows_the_stored_numbers(report):
    document = json.loads(report.STORED.read_text(encoding="utf-8"))
    copies = {
        (info["op"], info["shape"], info["candidate"]): info["copies"]
        for info in (entry["extra_info"] for entry in document["benchmarks"])
        if info["table"] == "kernels" and info["dtype"] == "float32"
    }
    readme = report.README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+(?:x\d+)+(?:-last)?) \| (.*) \|$", readme, re.MULTILINE)
    measured = {(op, shape) for op, shape, _ in copies}
    whole = [shape for shape in report.README_SHAPES if {(op, shape) for op in report.OPS} <= measured]
    assert [shape for shape, _ in rows] == whole
    assert rows
    for shape, cells in rows:
        numba, cython, torch, *_ = ([float(v.strip("*")) for v in cell.split(" / ")] for cell in cells.split(" | "))
        for op, ours, others, peer in zip(("train", "eval", "backward"), numba, cython, torch, strict=True):
            assert ours == pytest.approx(copies[op, shape, "numba"], rel=0.01, abs=0.006)
            assert others == pytest.approx(copies[op, shape, "cython"], rel=0.01, abs=0.006)
            expected = copies[op, shape, "PyTorch"] / copies[op, shape, "numba"]
            assert peer == pytest.approx(expected, rel=0.01, abs=0.006)


def test_a_changed_figure_is_noticed(report, tmp_path, monkeypatch):
    document = json.loads(report.STORED.read_text(encoding="utf-8"))
    for entry in document["benchmarks"]:
        if entry["extra_info"]["candidate"] == "numba":
            entry["extra_info"]["copies"] *= 2
    changed = tmp_path / "kernels.json"
    changed.write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.setattr(report, "STORED", changed)
    assert report.outdated() == [report.README, report.TABLES]


def test_runs_are_compared(report):
    one, nothing = report.Stored(report.STORED), report.Stored(report.STORED)
    assert "ratios to peers: 790 of 790 within 5%, median 0.0%" in report.compare(one, one)
    nothing.lines = []
    assert "nothing in common" in report.compare(one, nothing)


@pytest.mark.parametrize("text", ("no marks", "{end}{begin}", "{begin}{begin}{end}"))
def test_a_readme_without_its_marks_is_refused(report, text):
    with pytest.raises(ValueError, match="expected"):
        report.with_figures(text.format(begin=report.BEGIN, end=report.END), "table")


def test_losses_are_shown_in_bold(report):
    assert report.ratio(0.9) == "**0.90**"
    assert report.ratio(1.0) == "1.00"
    assert report.ratio(12.34) == "12.3"
