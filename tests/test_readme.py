"""The README's example does what it says."""

from __future__ import annotations

import re
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
