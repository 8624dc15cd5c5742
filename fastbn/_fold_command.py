"""``fastbn fold``: fold the batch norms of an ONNX model or a checkpoint, report on each, check the result.

Exit status 0; 1 where the check found too large a difference, and then nothing is written; 2 on bad input, with one
line on stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbn._files import put, read_npz
from fastbn.folding import DEFAULT_EPS, fold_state_dict

if TYPE_CHECKING:
    from onnx import ModelProto
    from rich.table import Table

    from fastbn._onnx_compare import Difference
    from fastbn.onnx import FoldEntry, FoldResult

Array = NDArray[Any]
Progress = Callable[[int, int], None]
WIDE = 160  # columns for a table that does not go to a terminal
NARROW = 80  # and of a terminal that shows no figures
CHECKPOINT = ".safetensors"
FAILED, BAD_INPUT = 1, 2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``fold`` to the parser of ``fastbn``."""
    parser = subparsers.add_parser(
        "fold",
        help="fold the batch norms of an ONNX model or a safetensors checkpoint",
        description="Fold every batch norm that can be folded exactly into the layer beside it, and say why for each "
        "that stays. Exit status 0, 1 where --check fails (nothing is written then), 2 on bad input.",
    )
    parser.add_argument("input", type=Path, metavar="IN", help="an .onnx model or a .safetensors checkpoint")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="where to write the result (default: IN with .folded in its name)",
    )
    parser.add_argument("--dry-run", action="store_true", help="report, but write nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    models = parser.add_argument_group("ONNX models")
    models.add_argument(
        "--duplicate",
        action="store_true",
        help="where something else needs a layer's output, fold into a copy of the layer",
    )
    models.add_argument(
        "--check", action="store_true", help="run both models in ONNX Runtime on random inputs and compare the outputs"
    )
    models.add_argument(
        "--inputs", type=Path, metavar="FILE.npz", help="check, on these inputs too: one array for each input, by name"
    )
    models.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="check, and pass up to this difference, in parts of the output's largest magnitude (default: 1e-4, "
        "or 1e-2 with weights of 16 bits)",
    )
    models.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="check, with this shape of a random input where the model leaves it open; may be repeated",
    )
    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--pairs",
        nargs="+",
        metavar="LAYER:BN",
        help='layers and the batch norms behind them, or "auto" to find them by names and shapes, which do not say '
        "what else lies between the two, nor whether a layer with as many inputs as outputs is transposed",
    )
    checkpoints.add_argument(
        "--transposed", nargs="+", default=[], metavar="LAYER", help="those layers that are transposed convolutions"
    )
    checkpoints.add_argument("--eps", type=float, help=f"eps of the batch norms (default: {DEFAULT_EPS})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    try:
        with _warnings_in_one_line():
            if not args.json and not _has_rich():
                raise ImportError("tables need rich: pip install rich (--json does without)")
            if _is_checkpoint(args.input):
                return _fold_checkpoint(args)
            return _fold_model(args)
    except BrokenPipeError:  # nobody reads on: the caller's matter
        raise
    except (OSError, ValueError, TypeError, ImportError, OverflowError, MemoryError) as error:
        return _complain("error", _message(error))


def _is_checkpoint(path: Path) -> bool:
    return path.suffix.lower() == CHECKPOINT


def _has_rich() -> bool:
    return find_spec("rich") is not None


# --- ONNX models -----------------------------------------------------------------------------------------------------


def _fold_model(args: argparse.Namespace) -> int:
    eps_given = args.eps is not None
    _refuse_options(args, "an ONNX model", pairs=args.pairs, transposed=args.transposed, eps=eps_given)
    output = _checked_output(args)
    from fastbn import onnx

    model, external = onnx.read(args.input)
    if output is not None:
        _refuse_overwriting({output, onnx.data_path(output)}, {args.input, *external})
    with _progress("folding") as progress:
        result = onnx.fold(model, duplicate=args.duplicate, progress=progress)
    checked = args.check or args.inputs or args.tolerance is not None or args.shape
    folder = output.parent if output is not None else None
    with tempfile.TemporaryDirectory(prefix=".fastbn-fold-", dir=folder) as aside:
        path = Path(aside) / (output or args.input).name
        if output is not None or checked:
            onnx.write(result.model, path, external=bool(external))
        check = _check(args, model, path) if checked else None
        passed = check is None or check["passed"]
        if output is not None and passed:
            onnx.move(path, output)
    written = output if passed else None
    with _printing(written):
        if args.json:
            _print_json(
                {
                    "input": str(args.input),
                    "output": None if written is None else str(written),
                    "folded": result.folded,
                    "kept": result.kept,
                    "before": dataclasses.asdict(result.before),
                    "after": dataclasses.asdict(result.after),
                    "report": [dataclasses.asdict(entry) for entry in result.report],
                    "check": check,
                }
            )
        else:
            _print_model_report(result, check, written)
    return 0 if passed else FAILED


def _check(args: argparse.Namespace, model: ModelProto, folded: Path) -> dict[str, Any]:
    """Run both models on random and on given inputs, and keep the largest differences."""
    from fastbn import _onnx_compare as comparing

    tolerance = comparing.default_tolerance(model) if args.tolerance is None else args.tolerance
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"--tolerance must be finite and not negative, got {tolerance}")
    given = _read_inputs(args.inputs, model) if args.inputs else None
    shapes = {} if given is None else {name: array.shape for name, array in given.items()}
    shapes |= dict(_parse_shape(text) for text in args.shape)
    full = comparing.input_shapes(model, shapes)
    outputs: dict[str, Difference] = {}
    feeds = [] if given is None else [given]
    if given is None or all(map(comparing.drawable, comparing.required_inputs(model))):
        feeds.append(comparing.random_inputs(model, full))
    with _progress("checking") as progress:
        for done, inputs in enumerate(feeds, start=1):
            try:
                differences = comparing.compare(args.input, folded, inputs)
            except comparing.RunError as error:
                raise ValueError(f"ONNX Runtime cannot run the model: {error}") from None
            for new in differences:
                outputs[new.name] = comparing.larger(outputs.get(new.name, new), new)
            progress(done, len(feeds))
    return {
        "outputs": [dataclasses.asdict(entry) for entry in outputs.values()],
        "tolerance": tolerance,
        "passed": all(entry.max_rel <= tolerance for entry in outputs.values()),
    }


def _read_inputs(path: Path, model: ModelProto) -> dict[str, Array]:
    """Read arrays for all inputs of a model; floats of another width than the model's are converted."""
    from onnx import helper

    from fastbn._onnx_compare import required_inputs

    arrays = read_npz(path)
    for value in required_inputs(model):
        if not value.type.HasField("tensor_type"):
            raise ValueError(f"input {value.name} of the model is no tensor, and {path} can hold nothing else")
    wanted = {value.name: value.type.tensor_type.elem_type for value in required_inputs(model)}
    if arrays.keys() != wanted.keys():
        raise ValueError(f"{path} must hold the inputs {', '.join(wanted)}, it holds {', '.join(arrays) or 'nothing'}")
    dtypes = {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in wanted.items()}
    for name, array in arrays.items():
        if not np.can_cast(array.dtype, dtypes[name], "same_kind"):
            raise ValueError(f"input {name} of the model is {dtypes[name]}, but {path} holds {array.dtype}")
    return {name: array.astype(dtypes[name], copy=False) for name, array in arrays.items()}


def _parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    try:
        shape = tuple(int(size) for size in sizes.split(",")) if sizes else ()
    except ValueError:
        shape = (0,)
    if not name or any(size < 1 for size in shape):
        raise ValueError(f"--shape wants NAME=1,3,224,224, got {text!r}")
    return name, shape


def _print_model_report(result: FoldResult, check: Mapping[str, Any] | None, written: Path | None) -> None:
    figures = ("|scale|", "tiny var", "zero weight") if _width() >= NARROW else ()
    table = _table("batch norm", "behind", "result", "reason", *figures, numbers=len(figures))
    for entry in result.report:
        table.add_row(*map(str, _model_row(entry)[: len(table.columns)]))
    _print(table if result.report else "no BatchNormalization in this model")
    before, after = result.before, result.after
    _print(
        f"{result.folded} of {len(result.report)} batch norms folded; nodes {before.nodes} -> {after.nodes}, "
        f"weights {before.bytes / 1e6:.2f} MB -> {after.bytes / 1e6:.2f} MB"
    )
    if check is not None:
        table = _table("output", "max abs", "max rel", "max ULP", numbers=3)
        for output in check["outputs"]:
            apart = (output["max_abs"], output["max_rel"], output["max_ulp"])
            table.add_row(output["name"], *("" if figure is None else f"{figure:.3g}" for figure in apart))
        _print(table)
        _print(
            f"check {'passed' if check['passed'] else 'FAILED'}: tolerance {check['tolerance']:g} of the largest value"
        )
    _print_written(written)


def _model_row(entry: FoldEntry) -> tuple[object, ...]:
    op = f"{entry.op} ({entry.groups} groups)" if entry.groups > 1 else entry.op
    result = f"folded -> {entry.into}" if entry.folded else "kept"
    reason = entry.reason if entry.folded else f"{entry.reason}: {entry.sentence}"
    name = entry.scope + (entry.name or entry.output)
    if entry.min_scale is None or entry.max_scale is None:
        return name, op, result, reason, "", "", ""
    scales = f"{entry.min_scale:.3g} .. {entry.max_scale:.3g}"
    return name, op, result, reason, scales, entry.tiny_variance or "", entry.zero_weight or ""


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _fold_checkpoint(args: argparse.Namespace) -> int:
    model_options = {key: getattr(args, key) for key in ("duplicate", "check", "inputs", "shape")}
    _refuse_options(args, "a checkpoint", **model_options, tolerance=args.tolerance is not None)
    if not args.pairs:
        raise ValueError("a checkpoint does not say what follows what: give --pairs LAYER:BN ..., or --pairs auto")
    output = _checked_output(args)
    if output is not None:
        _refuse_overwriting({output}, {args.input})
    from fastbn._checkpoint import Pairing, find_pairs, read_checkpoint, write_checkpoint

    state, metadata = read_checkpoint(args.input)
    transposed = args.transposed
    if args.pairs == ["auto"]:
        pairing = find_pairs(state, transposed)
        paired = {layer for layer, _ in pairing.pairs}
        transposed = [name for name in transposed if name in paired or f"{name}.weight" not in state]
    else:
        pairing = Pairing([_parse_pair(text) for text in args.pairs])
    eps = DEFAULT_EPS if args.eps is None else args.eps
    folded = fold_state_dict(state, pairing.pairs, eps=eps, transposed=transposed)
    if output is not None:
        with tempfile.TemporaryDirectory(prefix=".fastbn-fold-", dir=output.parent) as aside:
            path = Path(aside) / output.name
            write_checkpoint(folded, metadata, path)
            put(path, output)
    report: list[dict[str, Any]] = [
        {"name": norm, "into": layer, "folded": True, "reason": "paired", "sentence": f"folded into {layer}"}
        for layer, norm in pairing.pairs
    ]
    report += [
        {"name": norm, "into": None, "folded": False, "reason": "unpaired", "sentence": sentence}
        for norm, sentence in pairing.left.items()
    ]
    with _printing(output):
        if args.json:
            totals = {"folded": len(pairing.pairs), "kept": len(pairing.left)}
            written = None if output is None else str(output)
            _print_json({"input": str(args.input), "output": written, **totals, "report": report, "check": None})
        else:
            table = _table("batch norm", "result", "reason")
            for entry in report:
                into = f"folded -> {entry['into']}" if entry["folded"] else "kept"
                table.add_row(entry["name"], into, "" if entry["folded"] else f"unpaired: {entry['sentence']}")
            _print(table)
            _print(f"{len(pairing.pairs)} of {len(report)} batch norms folded")
            if args.pairs == ["auto"]:
                _print("paired by names and shapes: see that nothing else lies between a layer and its batch norm")
            _print_written(output)
    return 0


def _parse_pair(text: str) -> tuple[str, str]:
    layer, colon, norm = text.partition(":")
    if not (layer and colon and norm) or ":" in norm:
        raise ValueError(f"--pairs wants LAYER:BN, got {text!r}")
    return layer, norm


# --- what both share -------------------------------------------------------------------------------------------------


def _refuse_options(args: argparse.Namespace, what: str, **options: object) -> None:
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise ValueError(f"{args.input} is {what}, to which {', '.join(given)} does not apply")


def _checked_output(args: argparse.Namespace) -> Path | None:
    """Return where to write, None for a dry run, once it is clear that it can be written."""
    if not args.input.is_file():
        raise FileNotFoundError(f"{args.input}: {'not a file' if args.input.exists() else 'no such file'}")
    if args.dry_run:
        return None
    output: Path = args.output or args.input.with_name(f"{args.input.stem}.folded{args.input.suffix}")
    if output.is_symlink():
        output = Path(os.path.realpath(output))  # what it points to is written, and the link stays
        if output.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(output))
    if output.suffix.lower() == (".onnx" if _is_checkpoint(args.input) else CHECKPOINT):
        raise ValueError(f"{output}: what becomes of {args.input} is no {output.suffix} file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder")
    if output.is_dir():
        raise IsADirectoryError(f"{output}: is a folder")
    if output.exists() and not output.is_file():  # it would be replaced
        raise ValueError(f"{output}: is not a regular file")
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"{output.parent}: cannot be written")
    return output


def _refuse_overwriting(outputs: set[Path], inputs: set[Path]) -> None:
    for output, path in product(outputs, inputs):
        try:
            same = output.samefile(path)
        except OSError:  # one of them is not there, or no name for a file
            continue
        if same:
            raise ValueError(f"{output} would overwrite the input {path}")


@contextmanager
def _printing(written: Path | None) -> Iterator[None]:
    """Tell apart what goes wrong with the report from what goes wrong with the result."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        done = "nothing was to be written" if written is None else f"{written} has been written"
        raise OSError(f"the report cannot be printed: {_message(error)}; {done}") from None


def _print_json(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(_finite(document), allow_nan=False, indent=2) + "\n")


def _finite(value: Any) -> Any:
    """Put None in the place of numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(*columns: str, numbers: int = 0) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        right = position >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _print(what: Table | str) -> None:
    from rich.console import Console

    Console(width=_width(), markup=False, emoji=False, highlight=False, soft_wrap=isinstance(what, str)).print(what)


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDE


def _print_written(output: Path | None) -> None:
    _print("nothing written" if output is None else f"written: {output}")


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """Show a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty() or not _has_rich():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            _complain("warning", str(warning.message))


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _complain(kind: str, message: str) -> int:
    with suppress(OSError):  # the status tells it too
        sys.stderr.write(f"fastbn fold: {kind}: {' '.join(message.split())}\n")
        sys.stderr.flush()
    return BAD_INPUT
