"""Running code in a fresh interpreter, for what happens once in a process."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with fastbn's own environment variables unset but for those given."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("FASTBN_")}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env | environment, check=False)
    assert not check or result.returncode == 0, result.stderr
    return result
