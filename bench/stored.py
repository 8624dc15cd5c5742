"""What scripts that measure for a table have in common: measure and store, or take what is stored; make the table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def path_of(name: str) -> Path:
    """Where the results of that script lie."""
    return RESULTS / f"{name}.json"


def load(name: str) -> Any:
    """Those results."""
    return json.loads(path_of(name).read_text(encoding="utf-8"))


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table with words on the left and figures on the right."""
    heads = list(heads)
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(doc: str | None, name: str, measure: Callable[[], Any], tables: Callable[[Any], str]) -> None:
    """Command line of the script with that docstring and name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only print the tables of the stored results")
    if not parser.parse_args().tables:
        path_of(name).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(tables(load(name)))
