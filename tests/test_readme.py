"""The README's example does what it says, and its tables are those of the stored results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.usefixtures("backend")
def test_example_runs_as_printed():
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), names)
    bn, x, y = names["bn"], names["x"], names["y"]
    scale, shift = bn.weight / np.sqrt(bn.running_var + bn.eps), bn.bias
    expected = (x - bn.running_mean[:, None, None]) * scale[:, None, None] + shift[:, None, None]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(names["weight"], np.ones((64, 3, 3, 3)) * scale[:, None, None, None], rtol=1e-6)


@pytest.mark.parametrize("mark, script", (("folding", "folding"), ("images", "image_statistics"), ("ranks", "ranks")))
def test_tables_are_those_of_the_stored_results(mark, script):
    command = [sys.executable, "-m", f"bench.{script}", "--tables"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=README.parent).stdout.strip()
    text = README.read_text(encoding="utf-8")
    assert text.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0].strip() == printed
