"""Running code in a fresh interpreter, for what happens once in a process."""

from __future__ import annotations

import os
import subprocess
import sys


def environment(**given: str) -> dict[str, str]:
    """Environment of this process, with fastbn's own variables unset but for those given."""
    return {key: value for key, value in os.environ.items() if not key.startswith("FASTBN_")} | given


def python(
    code: str, *, check: bool = True, flags: tuple[str, ...] = (), **given: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` with fastbn's own environment variables unset but for those given."""
    command = [sys.executable, "-W", "error", *flags, "-c", code]
    env = environment(**given)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert not check or result.returncode == 0, result.stderr
    return result
