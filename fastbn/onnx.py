"""Fold the batch norms of ONNX models, with a reason for each that stays. Needs the extra ``onnx``.

>>> result = fastbn.onnx.fold("model.onnx")
>>> fastbn.onnx.save(result.model, "folded.onnx")
>>> for entry in result.report:
...     print(entry.name, "folded" if entry.folded else "kept", entry.reason, entry.sentence)
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

try:
    import onnx
except ModuleNotFoundError as error:
    raise ImportError('folding ONNX models needs the onnx package: pip install "fastbn[onnx]"') from error
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, set_external_data

from fastbn._files import put
from fastbn._onnx_graph import FIRST_OPSET, STANDARD, Model, Node, bodies, copy_fields, tensors
from fastbn._onnx_rules import (
    EPSILON,
    REASONS,
    Obstacle,
    Parameters,
    Placed,
    affine_of,
    attribute,
    into_consumers,
    into_producer,
    parameters_of,
    walk_back,
)
from fastbn.folding import Affine

__all__ = ["REASONS", "FoldEntry", "FoldResult", "Size", "fold", "read", "save"]

SHARED = ("second-consumer", "graph-output")  # reasons that a copy of the node in front overcomes
SMALL = 1024  # bytes of a tensor that is never put into a file of its own, as onnx has it
LARGEST_FILE = 2**31 - 2**24  # bytes of tensors: protobuf cannot write more than 2 GiB, the graph included


@dataclass(frozen=True)
class FoldEntry:
    """What became of one BatchNormalization node.

    ``reason`` is one of ``REASONS``. The figures of the scale are None where the parameters are not known.
    """

    name: str  # of the node; may be empty
    output: str  # its first output
    op: str  # kind of the node that its input comes from, "input" where that is none of the graph
    into: str | None  # node that it went into, several separated by commas
    folded: bool
    reason: str  # code
    sentence: str
    scope: str = ""  # where it is: empty for the main graph, else "node/attribute/" or "function/"
    groups: int = 1  # of a convolution in front of it
    channels: int | None = None
    min_scale: float | None = None  # smallest and largest |weight| / sqrt(var + eps)
    max_scale: float | None = None
    tiny_variance: int | None = None  # channels with var < eps
    zero_weight: int | None = None  # channels with weight 0
    overflow: int = 0  # channels that would have overflowed the weight's dtype
    underflow: int = 0  # channels whose weights sank below the smallest normal number


@dataclass(frozen=True)
class Size:
    """How large a model is: nodes, subgraphs and functions included, and bytes of its tensors."""

    nodes: int
    bytes: int


@dataclass(frozen=True)
class FoldResult:
    """A folded model, and one entry for each of its batch norms in graph order."""

    model: ModelProto
    report: list[FoldEntry]
    before: Size
    after: Size

    @property
    def folded(self) -> int:
        """Number of batch norms that were folded."""
        return sum(entry.folded for entry in self.report)

    @property
    def kept(self) -> int:
        """Number of batch norms that stayed."""
        return len(self.report) - self.folded


def fold(
    model: ModelProto | str | os.PathLike[str],
    *,
    duplicate: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FoldResult:
    """Fold every batch norm of a model that can be folded exactly.

    A batch norm goes into the Conv, ConvTranspose, Gemm, MatMul, BatchNormalization or InstanceNormalization in front
    of it, also through Add of a constant, Transpose, Squeeze, Unsqueeze, Identity and Dropout, or else into all the
    nodes behind it where they are Conv without padding, Gemm or MatMul. Everything else is left as it is.

    Parameters
    ----------
    model : ModelProto, or path of an ONNX file
        A given model is not modified. External data is read beside the path.
    duplicate : bool
        Where something else reads the output of a linear node, or that output is one of the graph's, fold into a copy
        of the node. This costs the work of the node once more.
    progress : callable, optional
        Called with the number of batch norms looked at, and of all, after each.

    Returns
    -------
    FoldResult
        The folded model, with all its weights inside, and the report. :func:`save` writes it.

    Raises
    ------
    OSError
        Where the file, or one with its external data, cannot be read.
    ValueError
        Where it holds no model, an invalid one, or one with an opset that is not supported (7 to the newest that onnx
        knows).
    TypeError
        For any other object.
    """
    source = model if isinstance(model, ModelProto) else read(model)[0]
    _check_model(source)
    try:
        return _fold(source, duplicate, progress)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        # A graph that breaks ONNX's rules can fail anywhere. The checker takes longer than folding: it is asked now.
        if objection := _objection(source):
            raise ValueError(f"this is not a valid ONNX model: {objection}") from error
        raise


def _fold(source: ModelProto, duplicate: bool, progress: Callable[[int, int], None] | None) -> FoldResult:
    editable = Model(source)
    norms = [node for node in editable.walk() if node.op == "BatchNormalization"]
    entries = {norm: _describe(norm) for norm in norms}
    pending, changed, seen = norms, True, 0
    while changed:  # a batch norm that took another one in may fold where it could not before
        kept = []
        for norm in pending:
            entries[norm] = _fold_one(norm, entries[norm], duplicate=duplicate)
            if not entries[norm].folded:
                kept.append(norm)
            seen += 1
            if progress is not None:
                progress(min(seen, len(norms)), len(norms))
        changed, pending = len(kept) < len(pending) and bool(kept), kept
    before = _size(source)
    result = editable.assemble()
    return FoldResult(result, [entries[norm] for norm in norms], before, _size(result))


def read(path: str | os.PathLike[str]) -> tuple[ModelProto, frozenset[Path]]:
    """Read a model whole, and return it with the files of external data that it came from.

    Raises what :func:`fold` does.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected an ONNX model or the path of one, got {type(path).__name__}")
    path = Path(path)
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model, or is cut short: {error}") from None
    if not model.HasField("graph"):
        raise ValueError(f"{path} is not an ONNX model: it has no graph")
    outside = [tensor for tensor in tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    files = frozenset(path.parent / ExternalDataInfo(tensor).location for tensor in outside)
    try:
        for tensor in outside:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    except (onnx.checker.ValidationError, ValueError) as error:
        raise OSError(f"external data of {path} cannot be read: {error}") from None
    return model, files


def save(model: ModelProto, path: str | os.PathLike[str], *, external: bool = False) -> None:
    """Write a model aside and move it into place, so that no half-written file is ever to be seen.

    With ``external``, and always where the weights exceed the 2 GiB that one ONNX file can hold, they go into a file
    of their own, called as the model with ``.data`` behind; small tensors stay, for runtimes want shapes at hand.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=".fastbn-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        write(model, aside, external=external)
        move(aside, path)


def write(model: ModelProto, path: Path, *, external: bool) -> None:
    """Write a model, in place of what may be there."""
    if not external and sum(tensor.ByteSize() for tensor in tensors(model)) < LARGEST_FILE:
        with path.open("wb") as file:
            file.writelines(_serialized(model))
        return
    separated = ModelProto()
    separated.CopyFrom(model)  # onnx moves the weights out of the model it saves
    for body in bodies(separated):  # as onnx does it where no file of this name lies in the working directory
        for tensor in body.initializer if isinstance(body, GraphProto) else ():
            if len(tensor.raw_data) >= SMALL:
                set_external_data(tensor, data_path(path).name)
    onnx.save_model(separated, path, format="protobuf")


def _serialized(model: ModelProto) -> Iterator[bytes]:
    """Yield a model as protobuf writes it, weight by weight.

    Written whole, ResNet-50 takes 180 MB for its 100, for protobuf doubles its buffer and then copies it.
    """
    shell, graph = ModelProto(), GraphProto()
    copy_fields(model, shell, skip={"graph"})
    copy_fields(model.graph, graph, skip={"initializer"})
    rest = graph.SerializeToString(deterministic=True)
    heads = [_head(GraphProto, "initializer", tensor.ByteSize()) for tensor in model.graph.initializer]
    size = len(rest) + sum(
        len(head) + tensor.ByteSize() for head, tensor in zip(heads, model.graph.initializer, strict=True)
    )
    yield shell.SerializeToString(deterministic=True)
    yield _head(ModelProto, "graph", size) + rest
    for head, tensor in zip(heads, model.graph.initializer, strict=True):
        yield head
        yield tensor.SerializeToString(deterministic=True)


def _head(message: type[ModelProto | GraphProto], field: str, size: int) -> bytes:
    """Return what stands before an embedded message of ``size`` bytes: the number of its field, and its size."""
    embedded = 2  # protobuf's wire type
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | embedded) + _varint(size)


def _varint(number: int) -> bytes:
    """Write a number in protobuf's way: seven bits a byte, the lowest first."""
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*result, number])


def data_path(path: Path) -> Path:
    """Return where the external data of a model are written."""
    return path.with_name(f"{path.name}.data")


def move(aside: Path, path: Path) -> None:
    """Move a model, and before it its external data, into place."""
    if data_path(aside) in aside.parent.iterdir():  # to ask for a name that is too long would be an error
        put(data_path(aside), data_path(path))
    put(aside, path)


def _check_model(model: ModelProto) -> None:
    if not model.HasField("graph"):
        raise ValueError("this is not an ONNX model: it has no graph")
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in STANDARD and not FIRST_OPSET <= entry.version <= newest:
            raise ValueError(f"opset {entry.version} is not supported, only {FIRST_OPSET} to {newest}")
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError(
                f"the values of {tensor.name} lie in the external file {ExternalDataInfo(tensor).location}, which was "
                "not loaded: give the path of the model, or load it with its external data"
            )


def _objection(model: ModelProto) -> str:
    """Return what onnx finds wrong with a model, in one line; nothing where it is valid."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _describe(norm: Node) -> FoldEntry:
    """Say what stands in front of a batch norm before anything changes."""
    op, groups = "input", 1
    try:
        head = walk_back(norm).nodes[0]
        op, groups = head.op, attribute(head, "group", 1)
    except Obstacle:
        definer = norm.scope.definer(norm.inputs[0])
        producer = definer.producers.get(norm.inputs[0]) if definer is not None else None
        if producer is not None:
            op = producer.op
    return FoldEntry(norm.name, norm.outputs[0], op, None, False, "", "", scope=norm.scope.path, groups=groups)


def _fold_one(norm: Node, entry: FoldEntry, *, duplicate: bool) -> FoldEntry:
    """Fold a batch norm, or find the reason why it stays."""
    try:
        parameters = parameters_of(norm)
        affine = affine_of(norm, parameters)
    except Obstacle as obstacle:
        return _kept(entry, obstacle)
    if entry.channels is None:
        entry = replace(entry, **_figures(norm, parameters, affine))
    try:
        return _folded(entry, into_producer(norm, affine, duplicate=False))
    except Obstacle as in_front:
        try:
            return _folded(entry, into_consumers(norm, affine))
        except Obstacle as behind:
            if duplicate and in_front.code in SHARED:
                with suppress(Obstacle):
                    return _folded(entry, into_producer(norm, affine, duplicate=True))
            return _kept(entry, in_front, behind)


def _figures(norm: Node, parameters: Parameters, affine: Affine) -> dict[str, Any]:
    magnitude = np.abs(affine.scale)
    eps = attribute(norm, "epsilon", EPSILON)
    return {
        "channels": affine.channels,
        "min_scale": float(magnitude.min(initial=np.inf)),
        "max_scale": float(magnitude.max(initial=0.0)),
        "tiny_variance": int((parameters.var.astype(np.float64) < eps).sum()),
        "zero_weight": int((parameters.scale == 0).sum()),
    }


def _folded(entry: FoldEntry, placed: Placed) -> FoldEntry:
    sentence = f"{REASONS[placed.code]}: {placed.into}"
    return replace(
        entry,
        into=placed.into,
        folded=True,
        reason=placed.code,
        sentence=sentence,
        overflow=0,
        underflow=placed.underflow,
    )


def _kept(entry: FoldEntry, in_front: Obstacle, behind: Obstacle | None = None) -> FoldEntry:
    """Report the obstacle that comes nearest to folding."""
    obstacle, sentence = in_front, in_front.sentence
    if behind is not None and in_front.code == "no-linear-neighbour":
        obstacle = behind
        sentence = behind.sentence
        if behind.code == "no-linear-neighbour":
            sentence = f"{in_front.sentence}, and {behind.sentence}"
    return replace(
        entry,
        reason=obstacle.code,
        sentence=sentence,
        overflow=obstacle.overflow,
        underflow=obstacle.underflow,
    )


def _size(model: ModelProto) -> Size:
    nodes = sum(len(body.node) for body in bodies(model))
    return Size(nodes, sum(_tensor_bytes(tensor) for tensor in tensors(model)))


def _tensor_bytes(tensor: TensorProto) -> int:
    if tensor.data_type == TensorProto.STRING:
        return sum(len(value) for value in tensor.string_data)
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
