"""The command line: ``fastbn demo``, ``fastbn fold``, ``fastbn info``.

Exit status 0, 1 where ``fold --check`` fails, 2 for what the user can mend (with one line on stderr), and 128 and the
signal's number where a signal ends it: 130 after Ctrl-C, 141 where nobody reads on. What a command needs is imported
when it runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import fastbn
from fastbn import _fold_command
from fastbn._engine import BACKENDS
from fastbn._files import is_utf8

USER_ERROR = 2
SIGNALLED = 128  # and the signal's number
BROKEN_PIPE = SIGNALLED + 13


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process if not given.

    Returns
    -------
    int
        Exit status.
    """
    _prepare_output()
    args = _parser().parse_args(argv)
    status: int = 0
    try:
        with _signals_unwind():
            status = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted")
        return SIGNALLED + signal.SIGINT
    except BrokenPipeError:  # the reader has left, as `head` does
        _discard_output()
        return BROKEN_PIPE
    except OSError as error:
        _discard_output()
        return status or _fail(None, f"the output cannot be printed: {error.strerror or error}")
    return status


def _prepare_output() -> None:
    """Let there be a standard output that takes whatever names have in them."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # to the end
    elif hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Nothing more can be printed, not even when Python flushes at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let a signal that would end the process at once do so by an exception, which clears up what is half written."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(SIGNALLED + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in ending if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    """A parser, and with it its subparsers, whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="fastbn", description="Batch normalization for NumPy on CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _fold_command.add_parser(commands)
    _add_info(commands)
    return parser


# --- demo -----------------------------------------------------------------------------------------------------------


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small network with and without batch norm, fold it, export it, compare",
        description="Train a small residual network with and without batch norm at the same learning rate, fold batch "
        "norm into the convolutions, run both networks in ONNX Runtime, and print one table of what came out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        default=argparse.SUPPRESS,
        help="images x (N, C, H, W), float or uint8, and labels y (N,), integers (default: scikit-learn's digits)",
    )
    parser.add_argument("--epochs", type=_positive, default=10, help="passes over the training images")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights, batches and the choice of test images")
    parser.add_argument("--backend", choices=BACKENDS, default=argparse.SUPPRESS, help="(default: fastbn's choice)")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("fastbn-demo"), help="takes picture and models")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    try:
        from fastbn import demo
    except ImportError as error:
        return _fail("demo", f'{error}; what the demo needs is installed by: pip install "fastbn[demo]"')
    try:
        if "backend" in args:
            fastbn.set_backend(args.backend)
        fastbn.get_backend(), fastbn.get_num_threads()  # what the environment asks for is to be had, or an error here
        if not is_utf8(args.out):
            raise ValueError(f"--out {args.out}: ONNX Runtime reads no files whose path is not UTF-8")
        images = demo.load_images(getattr(args, "data", None), args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        return _fail("demo", error)
    try:
        demo.run(images, args.epochs, args.seed, args.out)
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        return _fail("demo", error)
    return 0


def _positive(text: str) -> int:
    return _integer(text, 1, None)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**32 - 1)


def _integer(text: str, low: int, high: int | None) -> int:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if number < low or (high is not None and number > high):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


# --- info -----------------------------------------------------------------------------------------------------------


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "info",
        help="print versions, backends, threads and the compile cache's folder",
        description="Print versions, backends and whether they can be used, threads, CPU features and caches, the "
        "limit of the output pool, and the compile cache's folder.",
    )
    parser.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    try:
        fastbn.show_config()
    except (ValueError, RuntimeError) as error:
        return _fail("info", error)
    return 0


def _fail(command: str | None, error: object) -> int:
    """Say what went wrong in one line; returns the exit status."""
    if isinstance(error, OSError) and error.filename is not None:
        error = f"{error.filename}: {error.strerror}"
    _say(f"fastbn{f' {command}' if command else ''}: error: {' '.join(str(error).split())}")
    return USER_ERROR


def _say(line: str) -> None:
    with suppress(OSError):  # the exit status tells it too
        print(line, file=sys.stderr, flush=True)
