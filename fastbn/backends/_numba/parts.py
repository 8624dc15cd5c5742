"""The parts of a kernel: compiled by several processes at once, or loaded.

Numba spends most of its time in Python, where threads do not help. Parts know nothing of each other but their places
in the kernel's table, so any process can compile any of them: each takes the next one that no other has taken, and
what the others have made is read from files at the end. With nothing cached, a kernel takes 9.8 to 11.5 seconds in one
process and 5.8 to 7.2 in two (Zen 3, 2 cores). Nothing is lost where there can be no other process, or where one fails.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from numba.core.registry import cpu_target

from fastbn._engine import usable_cpus

MOST = 3  # processes at once: each takes 200 MB meanwhile, and the largest part a fifth of the time
PATIENCE = 60.0  # seconds to wait for another process when there is nothing else to do

Packed = tuple[str, Any]  # a function's symbol, and the library that it is in, as other processes can load them


class Parts:
    """Functions with one signature each, and where their machine code lies.

    Parameters
    ----------
    functions : sequence of (function, types of its arguments)
    helper : callable
        Python code of a process that helps: it calls `help_with` for the folder whose name it is given.

    Attributes
    ----------
    table : array of intp
        Their addresses.
    """

    def __init__(
        self, functions: Sequence[tuple[Any, tuple[Any, ...]]] = (), helper: Callable[[str], str] = str
    ) -> None:
        self.table = np.zeros(len(functions), np.intp)
        self._functions = functions
        self._helper = helper
        self._made: dict[int, Packed | None] = {}  # None for one that holds addresses of this process
        self._libraries: list[Any] = []  # machine code goes with the last reference to them
        self._folder: Path | None = None  # that this process shares with others
        self._others: list[subprocess.Popen[bytes]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the other processes."""
        self._stack.close()

    def begin(self) -> None:
        """Let other processes begin to compile, if there can be any."""
        program = Path(sys.executable or "")
        if getattr(sys, "frozen", False) or not program.stem.startswith("python"):
            return  # another program, which has Python in it
        try:
            for _ in range(min(usable_cpus(), MOST) - 1 if self._functions else 0):
                if self._folder is None:
                    made = TemporaryDirectory(prefix="fastbn-", ignore_cleanup_errors=True)
                    self._folder = Path(self._stack.enter_context(made))
                code = f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}; {self._helper(str(self._folder))}"
                self._others.append(self._stack.enter_context(_Helper([program, "-c", code])))
        except OSError:  # no folder for temporary files, no room for a process
            return

    def finish(self) -> None:
        """Compile what is not there yet."""
        for number in self._taken():
            self._compile(number)
        for process in self._others:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        for number in range(len(self._functions)):
            if number not in self._made and not self._receive(number):
                self._compile(number)

    def help_with(self, folder: str, parent: int) -> None:
        """Compile parts for the process that this folder belongs to, and clear up behind it if it has gone."""
        self._folder = Path(folder)
        if sys.platform == "win32":  # where children do not learn that, and a virtual environment's Python has a parent
            parent = os.getppid()
        for number in self._taken():
            if os.getppid() != parent:
                break
            self._compile(number)
            unfinished = self._folder / f"{number}.unfinished"
            unfinished.write_bytes(pickle.dumps(self._made[number]))
            unfinished.replace(self._folder / f"{number}.part")
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)

    def packed(self) -> list[Packed] | None:
        """All parts for `load`, in another process; None where that cannot be."""
        self.finish()
        packed = [self._made[number] for number in range(len(self._functions))]
        return None if None in packed else [part for part in packed if part]

    def load(self, packed: Sequence[Packed]) -> None:
        """Take over what was `packed`: all of it, or nothing where it is not as many parts or one cannot be loaded."""
        if len(packed) != len(self._functions):
            raise ValueError(f"expected {len(self._functions)} parts, got {len(packed)}")
        libraries = [_unpacked(part) for part in packed]
        for number, (part, library) in enumerate(zip(packed, libraries, strict=True)):
            self._keep(number, part, part[0], library)

    def _taken(self) -> Iterator[int]:
        """Numbers of the parts that no other process has taken, until there are no more."""
        for number in range(len(self._functions)):
            if number in self._made:
                continue
            try:
                if self._folder is not None:
                    (self._folder / f"{number}.taken").touch(exist_ok=False)
            except FileExistsError:
                continue
            except OSError:  # the folder is full, or gone
                pass
            yield number

    def _compile(self, number: int) -> None:
        function, kinds = self._functions[number]
        function.compile(kinds)
        compiled = function.overloads[kinds]
        name, library = compiled.fndesc.llvm_func_name, compiled.library
        packed = None if library.has_dynamic_globals else (name, library.serialize_using_object_code())
        self._keep(number, packed, name, library)

    def _receive(self, number: int) -> bool:
        """Whether another process has compiled a part for this one."""
        if self._folder is None:
            return False
        try:
            packed = pickle.loads((self._folder / f"{number}.part").read_bytes())  # noqa: S301  # from our own process
            self._keep(number, packed, packed[0], _unpacked(packed))
        except Exception:  # noqa: BLE001  # that has failed, in whatever way
            return False
        return True

    def _keep(self, number: int, packed: Packed | None, name: str, library: Any) -> None:
        self.table[number] = library.get_pointer_to_function(name)
        self._libraries.append(library)
        self._made[number] = packed


def _unpacked(packed: Packed) -> Any:
    """The library that a function is in."""
    return cpu_target.target_context.codegen().unserialize_library(packed[1])


class _Helper(subprocess.Popen[bytes]):
    """A silent process, which ends with its ``with`` block."""

    def __init__(self, command: list[Any]) -> None:
        nowhere = subprocess.DEVNULL
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
        super().__init__(command, stdin=nowhere, stdout=nowhere, stderr=nowhere, creationflags=flags)

    def __exit__(self, *_: object) -> None:  # whatever has ended the block
        self.kill()
        self.wait()
