"""Stored figures -> the README's table, `bench/results/README.md` and the picture.

python -m bench.report                   write all three
python -m bench.report --check           exit status 1 where the two texts are not what the stored figures give
python -m bench.report --compare FILE    how far ratios lie apart in another run's figures
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.stored import RESULTS, markdown, path_of

STORED = path_of("kernels")
TABLES = RESULTS / "README.md"
PICTURE = RESULTS / "share.png"
README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"

OPS = ("train", "eval", "backward")
OURS = ("numba", "cython")
LAYOUTS = ("oneDNN nchw", "oneDNN nhwc", "oneDNN nChw16c", "oneDNN nChw8c")
COPIES = ("copy", "copy streaming")
ALL = (*OURS, "numpy", "PyTorch", "JAX", *LAYOUTS)
PEERS = ("PyTorch", "JAX", *LAYOUTS)
DISTURBED = 0.1  # share of the machine that others had: from here on a row is said to be disturbed
EVEN = 0.995  # a ratio that prints as 1.00 is no loss
README_SHAPES = (
    "32x64x112x112",
    "32x64x56x56",
    "32x256x56x56",
    "32x512x28x28",
    "32x1024x14x14",
    "32x2048x7x7",
    "1x64x56x56",
    "32x144x56x56",
    "32x1280x7x7",
    "32x3x224x224",
    "32x64x55x55",
    "4x64x16x56x56",
    "65536x256",
    "32x56x56x64-last",
)


@dataclass(frozen=True)
class Line:
    """A measured row: what each candidate took, in copies and in GB/s."""

    table: str
    op: str
    shape: str
    dtype: str
    figures: dict[str, dict[str, float]]

    @property
    def title(self) -> str:
        return self.shape + ("" if self.dtype == "float32" else f" {self.dtype}")

    @property
    def others(self) -> float:
        """Share of the machine that other processes had."""
        return max(figures.get("others", 0.0) for figures in self.figures.values())

    def copies(self, name: str) -> float | None:
        """How many copies of the tensor the candidate costs; the best of its layouts for plain "oneDNN"."""
        names = LAYOUTS if name == "oneDNN" else (name,)
        return min((self.figures[n]["copies"] for n in names if n in self.figures), default=None)

    def ratio(self, peer: str, name: str) -> float | None:
        """How many times faster than a peer; None where either did not take part."""
        theirs, mine = self.copies(peer), self.copies(name)
        return theirs / mine if theirs and mine else None


class Stored:
    """A run's figures, in the order measured."""

    def __init__(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        self.machine: dict[str, Any] = document["machine_info"]
        lines: dict[tuple[str, str, str, str], dict[str, dict[str, float]]] = {}
        for entry in document["benchmarks"]:
            info = entry["extra_info"]
            key = info["table"], info["op"], info["shape"], info["dtype"]
            lines.setdefault(key, {})[info["candidate"]] = info
        self.lines = [Line(*key, figures) for key, figures in lines.items()]

    def table(self, name: str, op: str | None = None) -> list[Line]:
        return [line for line in self.lines if line.table == name and op in (None, line.op)]

    def by_shape(self) -> dict[str, dict[str, Line]]:
        """The kernels' lines: title -> operation -> line, where all three were measured."""
        found: dict[str, dict[str, Line]] = {}
        for line in self.table("kernels"):
            if line.op in OPS:
                found.setdefault(line.title, {})[line.op] = line
        return {title: ops for title, ops in found.items() if len(ops) == len(OPS)}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three digits at most; a dash where nothing was measured."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def ratio(value: float | None) -> str:
    """A ratio to a peer, bold where the peer is faster."""
    text = number(value)
    return f"**{text}**" if value is not None and value < EVEN else text


def triple(cells: Iterable[str]) -> str:
    """The three operations in one cell."""
    cells = list(cells)
    return "-" if set(cells) == {"-"} else " / ".join(cells)


def conditions(stored: Stored) -> str:
    machine = stored.machine
    versions = machine["versions"]
    peers = (
        f"PyTorch {versions['torch'].split('+')[0]}, JAX {versions['jax']}, oneDNN {versions['onednn-cpu-gomp']}, "
        f"Numba {versions['numba']}, NumPy {versions['numpy']}"
    )
    return f"{machine['cpu']}, {machine['threads']} threads, L3 {machine['l3_kib'] / 1024:.0f} MiB; {peers}"


def figures(stored: Stored) -> str:
    """What stands in the README between the two marks."""
    peers = {"PyTorch": "PyTorch", "JAX": "JAX", "oneDNN NCHW": "oneDNN nchw", "oneDNN best layout": "oneDNN"}
    shapes = stored.by_shape()
    rows = []
    for title in filter(shapes.__contains__, README_SHAPES):
        lines = [shapes[title][op] for op in OPS]
        cells = [triple(number(line.copies(name)) for line in lines) for name in OURS]
        cells += [triple(ratio(line.ratio(peer, "numba")) for line in lines) for peer in peers.values()]
        rows.append([title, *cells])
    heads = ["train / eval / backward", "copies, Numba", "copies, Cython", *(f"to {peer}" for peer in peers)]
    lost, compared = losses(stored, "numba")
    intro = (
        "A copy is the fastest way this machine has to read the tensor once and write it once, measured in the same "
        "rounds. The last four columns say how many times faster the Numba backend is than a peer; **bold** is where "
        f"the peer is faster: {len(lost)} of all {compared} comparisons. float32, `out=` given."
    )
    where = f"{conditions(stored)}. [All figures, and where fastbn loses](bench/results/README.md); `python -m bench`."
    image = "![Achieved share of the copy limit](bench/results/share.png)"
    return "\n\n".join([intro, markdown(heads, rows), where, image])


def losses(stored: Stored, name: str) -> tuple[list[tuple[Line, str, float]], int]:
    """Where a peer is faster than a backend of ours, and among how many comparisons."""
    ratios = [
        (line, peer, value)
        for line in stored.lines
        if line.table != "scaling"
        for peer in PEERS
        if (value := line.ratio(peer, name)) is not None
    ]
    return sorted(((a, b, c) for a, b, c in ratios if c < EVEN), key=lambda loss: loss[2]), len(ratios)


HOW = (
    "Times are in *copies*: the fastest copy of the same tensor, plain or streaming, is 1. They are medians of samples "
    "taken in turn: of those during which [probes](../probes.py) found no other machine on the same cores and both "
    "threads on one die, or of the least disturbed. The least in a row is bold. Every candidate but JAX writes to an "
    "array it is given. `-last` is channels last. GB/s counts every array read or written once."
)


def tables(stored: Stored) -> str:
    """The text of `bench/results/README.md`."""
    parts = [
        "# Figures",
        f"Written by `python -m bench.report` from `kernels.json`. {conditions(stored)}.",
        HOW,
        "![Achieved share of the copy limit](share.png)",
    ]
    disturbed = [f"{line.op} {line.title}" for line in stored.lines if line.others >= DISTURBED]
    if disturbed:
        parts.append(f"Other processes kept the machine busy during: {', '.join(disturbed)}.")
    parts += [f"## {op.capitalize()}\n\n{_kernels(stored.table('kernels', op))}" for op in OPS]
    sections = {
        "Without `out=`": _allocating(stored.table("kernels", "train, no out")),
        "Fused": _fused(stored.table("fused")),
        "Layers on (32, 64)": _layers(stored.table("layer")),
        "Scaling with size and threads": _scaling(stored.table("scaling")),
        "Losses": _losses(stored),
    }
    return "\n\n".join(parts + [f"## {title}\n\n{text}" for title, text in sections.items() if text]) + "\n"


def _present(lines: list[Line], names: Iterable[str]) -> list[str]:
    return [name for name in names if any(name in line.figures for line in lines)]


def _in_copies(line: Line, names: list[str]) -> list[str]:
    values = [line.copies(name) for name in names]
    least = min(value for value in values if value is not None)
    return [f"**{number(value)}**" if value == least else number(value) for value in values]


def _kernels(lines: list[Line]) -> str:
    names = _present(lines, ALL)
    rows = []
    for line in lines:
        copy = min(COPIES, key=lambda name: line.figures[name]["copies"])
        speed = line.figures[copy]["gb_per_s"] * (2 / 3 if line.op == "backward" else 1)
        rows.append([line.title, number(speed), number(line.figures["numba"]["gb_per_s"]), *_in_copies(line, names)])
    return markdown(["", "copy GB/s", "numba GB/s", *names], rows)


def _allocating(lines: list[Line]) -> str:
    if not lines:
        return ""
    names = _present(lines, ("numba, out=", "numba", "cython, out=", "cython", "PyTorch", "JAX"))
    return markdown(["train", *names], ([line.title, *_in_copies(line, names)] for line in lines))


def _fused(lines: list[Line]) -> str:
    if not lines:
        return ""
    heads = ["", "", *(f"{name}{what}" for name in OURS for what in ("", ", to unfused", ", copies more"))]
    peers = ("PyTorch", "JAX", "oneDNN")
    rows = []
    for line in lines:
        cells = [line.op, line.title]
        for name in OURS:
            alone = next(iter(other for other in line.figures if other.startswith(f"{name}, ")), name)
            fused, plain = line.copies(name), line.copies(alone)
            assert fused is not None
            assert plain is not None
            cells += [number(fused), number(fused / plain), f"{fused - plain:+.2f}"]
        rows.append([*cells, *(number(line.copies(peer)) for peer in peers)])
    return markdown([*heads, "PyTorch", "JAX", "oneDNN best layout"], rows)


def _layers(lines: list[Line]) -> str:
    if not lines:
        return ""
    names = _present(lines, ALL)
    heads = ["us a call", *names, *(f"{name} / PyTorch" for name in OURS)]
    rows = []
    for line in lines:
        shares = [line.ratio(name, "PyTorch") for name in OURS]
        rows.append([line.op, *(number(line.figures[name]["median_us"]) for name in names), *map(number, shares)])
    return markdown(heads, rows)


def _scaling(lines: list[Line]) -> str:
    if not lines:
        return ""
    threads = sorted({int(name.split(", ")[1].split()[0]) for line in lines for name in line.figures})
    names = _present(lines, (f"{name}, {threads[0]} threads" for name in (*OURS, "PyTorch")))
    names = [name.split(", ")[0] for name in names]
    heads = ["", ""]
    for name in names:
        heads += [f"{name} copies, {k} thread{'s' * (k > 1)}" for k in threads]
        heads += [f"{name} gain" for _ in threads[1:2]]
    heads += ["the copy's gain" for _ in threads[1:2]]
    rows = []
    for line in lines:
        cells = [line.op, line.title]
        for name in names:
            cells += [number(line.copies(f"{name}, {k} threads")) for k in threads]
            cells += [f"{_gain(line, [name], threads):.2f}x" for _ in threads[1:2]]
        cells += [f"{_gain(line, list(COPIES), threads):.2f}x" for _ in threads[1:2]]
        rows.append(cells)
    note = "Copies are those on as many threads; the gain is from one thread to all."
    return f"{note}\n\n{markdown(heads, rows)}"


def _gain(line: Line, names: list[str], threads: list[int]) -> float:
    """How many times faster the best of the names is on all threads than on one."""
    one, many = (
        min(line.figures[f"{name}, {k} threads"]["median_us"] for name in names) for k in (threads[0], threads[-1])
    )
    return one / many


def _losses(stored: Stored) -> str:
    texts = []
    for name in OURS:
        lost, compared = losses(stored, name)
        rows = [[line.op, line.title, peer, number(value)] for line, peer, value in lost]
        text = f"{name}: a peer is faster in {len(lost)} of {compared} comparisons."
        texts.append(text + (f"\n\n{markdown(['', '', 'peer', 'ratio'], rows)}" if rows else ""))
    return "\n\n".join(texts)


# --- picture ----------------------------------------------------------------------------------------------------------

EDGE = 1.5  # what is more, in the caches of a core, stands at the edge
MARKS = {
    "numba": ("fastbn, Numba", "o", "#c0392b"),
    "cython": ("fastbn, Cython", "D", "#e67e22"),
    "oneDNN": ("oneDNN, best layout", "s", "#2471a3"),
    "oneDNN nchw": ("oneDNN, NCHW", "s", "#a9cce3"),
    "PyTorch": ("PyTorch", "^", "#7d3c98"),
    "JAX": ("JAX", "v", "#229954"),
}


def picture(stored: Stored, path: Path) -> None:
    """Draw each candidate's bytes a second as a share of the copy's, for every shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shapes = stored.by_shape()
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.32 * len(shapes) + 1.6), sharey=True, layout="constrained")
    heights = range(len(shapes))
    for panel, op in zip(axes, OPS, strict=True):
        arrays = 1.5 if op == "backward" else 1.0  # bytes that must move, in copies
        for name, (label, marker, colour) in reversed(MARKS.items()):
            copies = [ops[op].copies(name) for ops in shapes.values()]
            shares = [float("nan") if value is None else min(arrays / value, EDGE) for value in copies]
            size = 52 if name in OURS else 30
            panel.scatter(
                shares, heights, size, marker=marker, c=colour, label=label, zorder=3, linewidths=0, clip_on=False
            )
        panel.axvline(1, color="#555555", linewidth=1, linestyle="--")
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.set(title=op, xlabel="share of the copy limit", xlim=(0, EDGE))
    axes[0].set_yticks(list(heights), list(shapes))
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=len(MARKS), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# --- commands ---------------------------------------------------------------------------------------------------------


def with_figures(readme: str, text: str) -> str:
    """The README with this text between its marks.

    Raises
    ------
    ValueError
        If the marks are not there, once each and in order.
    """
    parts = re.split(f"({BEGIN}|{END})", readme)
    if parts[1::2] != [BEGIN, END]:
        raise ValueError(f"expected {BEGIN} and then {END}, once each, got {parts[1::2]}")
    return f"{parts[0]}{BEGIN}\n\n{text}\n\n{END}{parts[4]}"


def expected(stored: Stored) -> dict[Path, str]:
    """The texts that the stored figures give."""
    readme = README.read_text(encoding="utf-8")
    return {README: with_figures(readme, figures(stored)), TABLES: tables(stored)}


def write() -> None:
    """Bring both texts and the picture up to the stored figures."""
    stored = Stored(STORED)
    for path, text in expected(stored).items():
        path.write_text(text, encoding="utf-8")
    picture(stored, PICTURE)


def outdated() -> list[Path]:
    """The texts that are not what the stored figures give."""
    texts = expected(Stored(STORED))
    return [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def compare(one: Stored, other: Stored) -> str:
    """How far the ratios of two runs to every peer, and their copies, lie apart."""
    others = {(line.table, line.op, line.title): line for line in other.lines}
    apart: dict[str, list[tuple[float, str]]] = {}
    for line in one.lines:
        again = others.get((line.table, line.op, line.title))
        if again is None or line.table == "scaling":
            continue
        apart.setdefault("copies", []).extend(
            (abs(b / a - 1), f"{line.op} {line.title} {name}")
            for name in OURS
            if (a := line.copies(name)) and (b := again.copies(name))
        )
        apart.setdefault("ratios to peers", []).extend(
            (abs(b / a - 1), f"{line.op} {line.title} {name} to {peer}")
            for name in OURS
            for peer in PEERS
            if (a := line.ratio(peer, name)) and (b := again.ratio(peer, name))
        )
    texts = []
    for what, values in apart.items():
        if not values:
            continue
        within = sum(value <= 0.05 for value, _ in values)
        middle, most = statistics.median(value for value, _ in values), max(values)
        texts.append(
            f"{what}: {within} of {len(values)} within 5%, median {middle:.1%}, most {most[0]:.1%} ({most[1]})"
        )
    return "\n".join(texts) or "the two have nothing in common that could be compared"


def main() -> int:
    """Exit status 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the texts, write nothing")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="figures of another run")
    arguments = parser.parse_args()
    if arguments.compare:
        print(compare(Stored(STORED), Stored(arguments.compare)))
    elif arguments.check:
        stale = outdated()
        for path in stale:
            print(f"{path} is not what {STORED} gives", file=sys.stderr)
        return 1 if stale else 0
    else:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
