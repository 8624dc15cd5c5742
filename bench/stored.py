"""What scripts that measure for a table have in common: measure and store, or take what is stored; print the table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def path_of(name: str) -> Path:
    """Where the results of that script lie."""
    return RESULTS / f"{name}.json"


def load(name: str) -> Any:
    """Those results."""
    return json.loads(path_of(name).read_text(encoding="utf-8"))


def main(doc: str | None, name: str, measure: Callable[[], Any], tables: Callable[[Any], str]) -> None:
    """Command line of the script with that docstring and name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="only print the tables of the stored results")
    if not parser.parse_args().tables:
        path_of(name).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(tables(load(name)))
