"""Files that come in and go out: archives of arrays, and results that take their place once they are complete."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from fastbn._arrays import Array


def read_npz(file: Path | IO[bytes], names: Collection[str] | None = None) -> dict[str, Array]:
    """Read the arrays of an .npz file: all of them, or those with these names as far as it has them.

    Raises OSError if there is no such file, and ValueError if it is another one, or damaged.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return read_npz(opened, names)
    name, begin = getattr(file, "name", "the file"), file.tell()
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{name} is not an .npz file")
    file.seek(begin)
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files if names is None or key in names}
    except Exception as error:  # a damaged one raises what zipfile, zlib, lzma, tokenize or the allocator has for it
        if isinstance(error, OSError) and error.errno is not None:  # the disk does
            raise
        raise ValueError(f"{name} is not an .npz file that can be read: {error}") from error
    other = next((key for key, value in arrays.items() if not isinstance(value, np.ndarray)), None)
    if other is not None:
        raise ValueError(f"{name} is not an .npz file of arrays alone: it holds {other}")
    return arrays


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Say whether the bytes of a path are UTF-8."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        return False
    return True


def put(aside: Path, path: Path) -> None:
    """Move a file into place, with the permissions of the one it replaces, or else of any new one."""
    mode = path.stat().st_mode if path.exists() else _mode_of_new(aside.parent)
    with suppress(OSError):  # not every file system has permissions
        aside.chmod(stat.S_IMODE(mode))
    aside.replace(path)


def _mode_of_new(folder: Path) -> int:
    fresh = folder / f".{os.urandom(8).hex()}"
    try:
        fresh.touch()
        return fresh.stat().st_mode
    finally:
        fresh.unlink(missing_ok=True)
