"""When a BatchNormalization node can go into a neighbour, and how.

A batch norm goes into the linear node in front of it (:func:`into_producer`) or, failing that, into all the linear
nodes behind it (:func:`into_consumers`). Where an :class:`Obstacle` stands in the way nothing has been changed yet:
everything is computed first, and only a result that its dtype can hold is written into the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from fastbn import folding
from fastbn._onnx_graph import AttributeReferenceError, ConstantError, Node
from fastbn.folding import Affine, Layout

Array = NDArray[Any]
Wide = NDArray[np.float64]
Flags = NDArray[np.bool_]

EPSILON = float(np.float32(1e-5))  # where the attribute, a float32, is absent

REASONS = {
    "into-producer": "folded into the linear node in front of it",
    "into-consumer": "folded into the linear nodes behind it",
    "training-mode": "it normalises with the statistics of its batch",
    "spatial-0": "it has statistics for every position (spatial=0), not for every channel",
    "attribute-reference": "an attribute gets its value from the call of the function",
    "non-constant-parameter": "a parameter that folding needs is computed from the model's input",
    "overridable-parameter": "a parameter is an initializer that the caller may replace, for it is a graph input too",
    "quantized-weight": "the weight comes out of DequantizeLinear; fold before quantizing",
    "invalid-parameter": "its parameters do not make a batch norm",
    "unsupported-dtype": "the weight's dtype is not a floating one",
    "mixed-dtype": "weight and bias of the linear node differ in dtype",
    "second-consumer": "something else reads the value between the two nodes",
    "graph-output": "the value between the two nodes is an output of the graph",
    "outer-scope": "the linear node is in another graph than the batch norm",
    "channel-axis": "the channels of the linear node are not those of the batch norm",
    "unknown-rank": "the rank is not known, and with it the axis of the linear node's channels",
    "padded-consumer": "the convolution behind it pads with zeros where the batch norm gives its shift",
    "no-linear-neighbour": "neither the node in front of it nor those behind it can take it in",
    "overflow": "the folded values do not fit the weight's dtype",
    "underflow": "the folded float16 weights of a channel would sink so low that they lose digits",
}


class Obstacle(Exception):  # noqa: N818 - it is an answer, not an error
    """Why a batch norm stays: a code of ``REASONS`` and the sentence that fits the case."""

    def __init__(self, code: str, sentence: str, overflow: int = 0, underflow: int = 0) -> None:
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence
        self.overflow = overflow  # channels
        self.underflow = underflow


# ----------------------------------------------------------------------------------------------------------------
# The batch norm itself
# ----------------------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """The constants of a BatchNormalization node."""

    scale: Array
    bias: Array
    mean: Array
    var: Array


def parameters_of(bn: Node) -> Parameters:
    """Return the constants of a BatchNormalization node that is in inference."""
    check_inference(bn)
    return Parameters(*(parameter(bn, index) for index in (1, 2, 3, 4)))


def affine_of(bn: Node, parameters: Parameters) -> Affine:
    """Return the map of a BatchNormalization node in inference."""
    scale, bias, mean, var = parameters
    try:
        return folding.affine_of_statistics(mean, var, scale, bias, attribute(bn, "epsilon", EPSILON))
    except ValueError as error:
        raise Obstacle("invalid-parameter", str(error)) from None


def check_inference(bn: Node) -> None:
    """Refuse a node that takes its statistics from the batch, or position by position."""
    if attribute(bn, "training_mode", 0):
        raise Obstacle("training-mode", "training_mode=1: it normalises with the statistics of its batch")
    if any(bn.outputs[1:]):
        raise Obstacle("training-mode", "its outputs for statistics are in use, so it trains")
    if not attribute(bn, "spatial", 1):
        raise Obstacle("spatial-0", "spatial=0: it has statistics for every position, not for every channel")


def attribute(node: Node, name: str, default: Any) -> Any:
    """Return an attribute's value, or refuse one that comes from a function's call."""
    try:
        return node.attribute(name, default)
    except AttributeReferenceError:
        raise Obstacle(
            "attribute-reference", f"{name} of {node.label} gets its value from the function's call"
        ) from None


def parameter(node: Node, index: int) -> Array:
    """Return the constant floating value that a node reads."""
    scope, name = node.scope, node.input(index)
    if scope.is_overridable(name):
        raise Obstacle("overridable-parameter", f"{name} is an initializer that is a graph input too")
    if not scope.is_constant(name):
        definer = scope.definer(name)
        producer = definer.producers.get(name) if definer else None
        if producer is not None and producer.op == "DequantizeLinear":
            raise Obstacle("quantized-weight", f"{name} comes out of DequantizeLinear; fold before quantizing")
        raise Obstacle("non-constant-parameter", f"{name or f'input {index}'} of {node.label} is not a constant")
    try:
        value = scope.constant(name)
    except ConstantError as error:
        raise Obstacle("non-constant-parameter", f"{name} cannot be computed: {error}") from None
    if value.dtype.name not in folding.FLOATS:
        raise Obstacle("unsupported-dtype", f"{name} is {value.dtype}, not floating")
    return value


def known(node: Node, index: int) -> Array | None:
    """Return the constant that a node reads; None where there is none, or none that can be computed."""
    scope, name = node.scope, node.input(index)
    try:
        return scope.constant(name) if name and scope.is_constant(name) else None
    except ConstantError:
        return None


# ----------------------------------------------------------------------------------------------------------------
# Linear nodes
# ----------------------------------------------------------------------------------------------------------------

CONVOLUTIONS = ("Conv", "ConvTranspose")
NORMALIZATIONS = ("BatchNormalization", "InstanceNormalization")
PRODUCERS = (*CONVOLUTIONS, "Gemm", "MatMul", *NORMALIZATIONS)
CONSUMERS = (*CONVOLUTIONS, "Gemm", "MatMul")
INPUTS_OF_PAD = 11  # the opset in which its attributes became inputs
BIAS = 2  # the input that is the bias of each of them but MatMul


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight of a linear node: which input it is, its value, and where its channels lie."""

    index: int
    value: Array
    layout: Layout
    axis: int  # of the output channels in the node's output, which has
    rank: int | None  # axes, None where that is not known


def weight_of(node: Node, rank: int | None) -> Weight:
    """Return the weight of one of ``PRODUCERS``; ``rank`` is that of its output where its readers tell."""
    if node.op == "MatMul":
        return _matmul_weight(node, node.scope.rank(node.outputs[0]) or rank)
    if node.op == "BatchNormalization":
        try:
            check_inference(node)
        except Obstacle as obstacle:
            raise Obstacle("no-linear-neighbour", f"of {node.label} in front of it: {obstacle.sentence}") from None
    value = parameter(node, 1)
    try:
        if node.op in CONVOLUTIONS:
            layout = folding.conv_layout(value.shape, attribute(node, "group", 1), node.op == "ConvTranspose")
            return Weight(1, value, layout, 1, value.ndim)
        if node.op == "Gemm":
            return Weight(1, value, folding.linear_layout(value.shape, 0 if attribute(node, "transB", 0) else 1), 1, 2)
    except ValueError as error:
        raise Obstacle("channel-axis", f"{node.label}: {error}") from None
    return Weight(1, value, Layout((1, value.size, 1, 1), 1), 1, node.scope.rank(node.outputs[0]) or rank)


def _matmul_weight(node: Node, rank: int | None) -> Weight:
    index = 0 if node.scope.is_constant(node.inputs[0]) else 1
    value = parameter(node, index)
    if rank is None:
        raise Obstacle("unknown-rank", f"the rank of what {node.label} gives is not known")
    if value.ndim != 2:
        raise Obstacle("channel-axis", f"the weight of {node.label} is no matrix, its shape is {value.shape}")
    return Weight(index, value, folding.linear_layout(value.shape, index), rank - 2 + index, rank)


def bias_of(node: Node, weight: Weight) -> Wide | None:
    """Return what a linear node adds, channels last and in float64; None where it adds nothing."""
    if node.op == "MatMul" or not node.input(BIAS):
        return None
    value = parameter(node, BIAS)
    if value.dtype != weight.value.dtype:
        raise Obstacle("mixed-dtype", f"{node.label} has a weight of {weight.value.dtype} and a bias of {value.dtype}")
    factor = attribute(node, "beta", 1.0) if node.op == "Gemm" else 1.0
    bias = value.astype(np.float64) * factor if factor else np.zeros(value.shape)
    return _spread_channels(bias, weight.layout.outputs, node)


def _spread_channels(values: Wide, channels: int, node: Node) -> Wide:
    """Broadcast an added constant so that its last axis is that of the channels."""
    try:
        shape = np.broadcast_shapes(values.shape, (channels,))
    except ValueError:
        shape = ()
    if shape[-1:] != (channels,):
        raise Obstacle(
            "channel-axis", f"{node.label} adds a constant of shape {values.shape} where there are {channels} channels"
        )
    return np.broadcast_to(values, shape)


def refuse_loss(overflow: Flags, underflow: Flags, dtype: np.dtype[Any]) -> int:
    """Refuse a result whose channels its dtype cannot hold; return how many lost digits."""
    lost = int(underflow.sum())
    if overflow.any():
        where = folding.listed(np.flatnonzero(overflow))
        raise Obstacle("overflow", f"the folded values overflow {dtype} in {where}", int(overflow.sum()), lost)
    if lost and dtype == np.float16:
        where = folding.listed(np.flatnonzero(underflow))
        raise Obstacle("underflow", f"the folded float16 weights would sink and lose digits in {where}", 0, lost)
    return lost


@dataclass(frozen=True)
class Placed:
    """Where a batch norm went, and how many channels lost digits on the way."""

    into: str
    code: str
    underflow: int


# ----------------------------------------------------------------------------------------------------------------
# Into the node in front
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trail:
    """The nodes from a linear one to the batch norm behind it; those between only move or shift the channels."""

    nodes: list[Node]
    axes: list[int]  # of the batch norm's channels in the output of each node
    rank: int | None  # of the first node's output, where the others tell


@dataclass(frozen=True, eq=False)
class Term:
    """A constant that is added on a trail: input ``index`` of the node at ``position``."""

    position: int
    index: int
    value: Wide  # channels last
    axis: int | None = None  # of the channels in an Add's result


def into_producer(bn: Node, affine: Affine, *, duplicate: bool) -> Placed:
    """Fold a batch norm into the linear node in front of it, or into a copy of that node."""
    trail = walk_back(bn)
    weight = weight_of(trail.nodes[0], trail.rank)
    check_channels(trail, weight, affine)
    terms, rank = terms_of(trail, weight)
    shared = sharing(trail, bn)
    if shared is not None and (not duplicate or trail.nodes[0].op == "BatchNormalization"):
        raise shared

    *inner, last = terms or [Term(0, BIAS, np.zeros(affine.channels))]
    folded = folding.fold_after(weight.value, last.value, affine, weight.layout)
    scaled = [folding.fold_term(term.value, affine.linear, weight.value.dtype) for term in inner]
    overflow = np.logical_or.reduce([folded.overflow, *(flags for _, flags in scaled)])
    underflow = refuse_loss(overflow, folded.underflow, weight.value.dtype)

    nodes = trail.nodes if shared is None else copy_in_front(bn, trail.nodes)
    head, constants = nodes[0], [value for value, _ in scaled]
    if terms or head.op != "MatMul":
        take_over(bn, nodes[-1])
        constants.append(folded.bias)
    else:
        add_shift(bn, nodes[-1], folded.bias, rank)
    head.scope.set_constant(head, weight.index, folded.weight, f"{head.label}_weight")
    for term, value in zip([*inner, last], constants, strict=False):  # no constant for a MatMul without an Add
        node = nodes[term.position]
        node.scope.set_constant(node, term.index, as_operand(value, term), f"{node.label}_bias")
    if head.op == "Gemm":
        head.dropped.add("beta")  # the constant has it now
    if shared is not None:
        remove_unread(trail.nodes)
    return Placed(head.label, "into-producer", underflow)


def walk_back(bn: Node) -> Trail:
    """Follow the input of a batch norm to the linear node that it comes from."""
    nodes: list[Node] = []
    axes: list[int] = []
    name, axis, rank = bn.inputs[0], 1, None
    while True:
        node = producer_of(bn, name)
        nodes.insert(0, node)
        axes.insert(0, axis)
        if node.op in PRODUCERS:
            return Trail(nodes, axes, rank)
        name, axis, rank = step_back(node, axis, rank)


def producer_of(bn: Node, name: str) -> Node:
    """Return the node of the batch norm's own graph that gives a value."""
    definer = bn.scope.definer(name)
    producer = definer.producers.get(name) if definer is not None else None
    if producer is None:
        raise Obstacle("no-linear-neighbour", f"{name} comes from outside the graph")
    if definer is not bn.scope and producer.op in PRODUCERS:
        raise Obstacle("outer-scope", f"{producer.label} is in another graph than the batch norm")
    if definer is not bn.scope:
        raise Obstacle("no-linear-neighbour", f"its input comes from {producer.op} {producer.label}")
    return producer


def step_back(node: Node, axis: int, rank: int | None) -> tuple[str, int, int | None]:
    """Go from a node's output to the input that carries the channels: its name, their axis there, and its rank."""
    source = node.inputs[0] if node.inputs else ""
    if transparent(node):
        return source, axis, rank
    if node.op == "Add":
        variable = [name for name in node.inputs if not node.scope.is_constant(name)]
        if len(variable) == 1:
            return variable[0], axis, rank
    if node.op == "Transpose" and (perm := attribute(node, "perm", None)) is not None:
        return source, perm[axis], len(perm)
    if node.op == "Squeeze" and (axes := axes_of(node)) is not None:
        for other in axes:
            axis += other <= axis
        return source, axis, None if rank is None else rank + len(axes)
    if node.op == "Unsqueeze" and (axes := axes_of(node)) is not None and axis not in axes:
        return source, axis - sum(other < axis for other in axes), None if rank is None else rank - len(axes)
    raise Obstacle("no-linear-neighbour", f"its input comes from {node.op} {node.label}")


def axes_of(node: Node) -> list[int] | None:
    """Return the axes of a Squeeze or Unsqueeze, sorted, where they are known and count from the front."""
    if len(node.inputs) > 1:
        constant = known(node, 1)
        axes = None if constant is None else constant.ravel().tolist()  # one axis may be a scalar
    else:
        axes = attribute(node, "axes", None)
    return None if axes is None or min(axes, default=-1) < 0 else sorted(axes)


def transparent(node: Node) -> bool:
    """Say whether a node hands its first input on as it is: Identity, and Dropout in inference."""
    if node.op != "Dropout" or any(node.outputs[1:]):
        return node.op == "Identity"
    training = known(node, 2)
    return not node.input(2) or (training is not None and not training.any())


def check_channels(trail: Trail, weight: Weight, affine: Affine) -> None:
    """Refuse a linear node whose output channels are not those of the batch norm."""
    head = trail.nodes[0]
    if trail.axes[0] != weight.axis:
        raise Obstacle(
            "channel-axis",
            f"{head.label} has its channels on axis {weight.axis}, the batch norm has them on axis {trail.axes[0]}",
        )
    if weight.layout.outputs != affine.channels:
        raise Obstacle(
            "channel-axis",
            f"{head.label} gives {weight.layout.outputs} channels, the batch norm has {affine.channels}",
        )


def terms_of(trail: Trail, weight: Weight) -> tuple[list[Term], int | None]:
    """Return the constants that are added on a trail, first to last, and the rank at its end."""
    head, *others = trail.nodes
    bias = bias_of(head, weight)
    terms = [] if bias is None else [Term(0, BIAS, bias)]
    rank = weight.rank
    for position, node in enumerate(others, start=1):
        if node.op == "Squeeze" and rank is not None:
            rank -= len(axes_of(node) or ())
        if node.op == "Unsqueeze" and rank is not None:
            rank += len(axes_of(node) or ())
        if node.op == "Add":
            terms.append(term_of(position, node, trail.axes[position], rank, weight))
    return terms, rank


def term_of(position: int, node: Node, axis: int, rank: int | None, weight: Weight) -> Term:
    """Return the constant of an Add whose result has ``rank`` axes, the channels on ``axis``."""
    index = 0 if node.scope.is_constant(node.inputs[0]) else 1
    value = parameter(node, index)
    if value.dtype != weight.value.dtype:
        raise Obstacle("mixed-dtype", f"{node.label} adds {value.dtype} where the weight is {weight.value.dtype}")
    if rank is None:
        raise Obstacle("unknown-rank", f"the rank of what {node.label} gives is not known")
    if value.ndim > rank:
        raise Obstacle("channel-axis", f"{node.label} adds a constant of shape {value.shape} to {rank} axes")
    full = value.astype(np.float64).reshape((1,) * (rank - value.ndim) + value.shape)
    return Term(position, index, _spread_channels(np.moveaxis(full, axis, -1), weight.layout.outputs, node), axis)


def as_operand(value: Array, term: Term) -> Array:
    """Put the channels of a term back where they belong, without the leading axes that broadcasting supplies."""
    if term.axis is None:
        return value
    operand = np.moveaxis(value, -1, term.axis)
    while operand.shape[0] == 1 and term.axis > value.ndim - operand.ndim:
        operand = operand[0]
    return np.ascontiguousarray(operand)


def sharing(trail: Trail, bn: Node) -> Obstacle | None:
    """Return the obstacle where something besides the batch norm sees a value on the trail.

    A Shape or Size that reads the last one is none: a batch norm keeps the shape.
    """
    for node, following in zip(trail.nodes, [*trail.nodes[1:], bn], strict=True):
        name = node.outputs[0]
        if name in bn.scope.exported:
            return Obstacle("graph-output", f"{name}, which {node.label} gives, is an output of the graph")
        readers = list(bn.scope.readers[name])
        readers.remove(following)
        others = [reader for reader in readers if following is not bn or reader.op not in ("Shape", "Size")]
        if others:
            return Obstacle("second-consumer", f"{others[0].op} {others[0].label} reads {name} too")
    return None


def copy_in_front(bn: Node, nodes: list[Node]) -> list[Node]:
    """Put copies of a trail's nodes in front of the batch norm; they read what the nodes read."""
    scope = bn.scope
    renamed: dict[str, str] = {}
    copies = []
    for node in nodes:
        name = scope.model.fresh_name(f"{node.name}_folded") if node.name else ""
        copy = node.copy(name)
        copy.inputs = [renamed.get(name, name) for name in node.inputs]
        copy.outputs = [renamed.setdefault(node.outputs[0], scope.model.fresh_name(f"{node.outputs[0]}_folded"))]
        scope.same_rank[copy.outputs[0]] = node.outputs[0]
        scope.insert(scope.nodes.index(bn), copy)
        copies.append(copy)
    return copies


def remove_unread(nodes: list[Node]) -> None:
    """Take out the last of some nodes, as long as nobody reads what they give."""
    for node in reversed(nodes):
        if any(node.scope.is_read(name) for name in node.outputs if name):
            return
        node.scope.remove(node)


def take_over(bn: Node, node: Node) -> None:
    """Let a node give what the batch norm gave, and take that one out."""
    scope, old = bn.scope, node.outputs[0]
    scope.remove(bn)
    scope.rename_output(node, bn.outputs[0])
    for reader in list(scope.readers[old]):  # Shape and Size
        reader.scope.set_input(reader, reader.inputs.index(old), bn.outputs[0])


def add_shift(bn: Node, node: Node, shift: Array, rank: int | None) -> None:
    """Put an Add of the shift in the place of a batch norm, or nothing where there is no shift."""
    if not shift.any():
        take_over(bn, node)
        return
    assert rank is not None
    operand = bn.scope.add_constant(shift.reshape((-1,) + (1,) * (rank - 2)), f"{node.label}_bias")
    add = helper.make_node("Add", [node.outputs[0], operand], [bn.outputs[0]], name=bn.name)
    replace(bn, add)


def replace(old: Node, new: NodeProto) -> None:
    """Put a new node in the place of an old one."""
    old.scope.insert(old.scope.nodes.index(old), Node(new, old.scope))
    old.scope.remove(old)


# ----------------------------------------------------------------------------------------------------------------
# Into the nodes behind
# ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Taken:
    """A linear node behind a batch norm with the weight and bias that it gets."""

    node: Node
    index: int  # of the weight
    weight: Array
    bias: Array
    underflow: int

    def write(self) -> None:
        """Give the node what it gets."""
        node, scope = self.node, self.node.scope
        scope.set_constant(node, self.index, self.weight, f"{node.label}_weight")
        if node.op == "MatMul":
            shift_output(node, self.bias)
        elif node.input(BIAS) or self.bias.any():
            scope.set_constant(node, BIAS, self.bias, f"{node.label}_bias")
        if node.op == "Gemm":
            node.dropped.add("beta")


def into_consumers(bn: Node, affine: Affine) -> Placed:
    """Fold a batch norm into the linear nodes behind it, all of them or none."""
    scope, name = bn.scope, bn.outputs[0]
    try:
        taken = list(takers_of(bn, name, affine))
    except Obstacle as obstacle:
        if obstacle.code != "padded-consumer":
            raise
        return into_padded_consumer(bn, affine, obstacle)
    if not taken:
        raise Obstacle("no-linear-neighbour", "nothing behind it is linear")
    for reader in list(scope.readers[name]):
        reader.scope.set_input(reader, reader.inputs.index(name), bn.inputs[0])
    scope.remove(bn)
    into = ", ".join(entry.node.label for entry in taken)
    for entry in taken:
        entry.write()
    return Placed(into, "into-consumer", sum(entry.underflow for entry in taken))


def takers_of(bn: Node, name: str, affine: Affine) -> Iterator[Taken]:
    """Compute what every reader of a value takes in, seen through the nodes that hand the value on."""
    obstacles, count = [], 0
    for reader in bn.scope.readers[name]:
        if reader.op in ("Shape", "Size"):
            continue
        try:
            if reader.scope is bn.scope and hands_on(reader, affine):
                yield from takers_of(bn, reader.outputs[0], affine)
            else:
                yield taken_by(reader, bn, name, affine)
            count += 1
        except Obstacle as obstacle:
            obstacles.append(obstacle)
    if obstacles:
        first = obstacles[0]
        if count and first.code == "no-linear-neighbour":
            raise Obstacle("second-consumer", f"not all that reads {name} can take it in: {first.sentence}")
        raise first
    if name in bn.scope.exported:
        code = "graph-output" if count else "no-linear-neighbour"
        raise Obstacle(code, f"its output {name} is an output of the graph")


def into_padded_consumer(bn: Node, affine: Affine, obstacle: Obstacle) -> Placed:
    """Fold a batch norm into the one Conv behind it that pads, by a Pad in front with what becomes zero behind it.

    A Pad has one value for all channels, so all must have the same ``-shift / scale``: always so with one channel.
    """
    scope, name = bn.scope, bn.outputs[0]
    node, *others = scope.readers[name]
    if others or name in scope.exported or node.op != "Conv" or padding_mode(node) != b"NOTSET":
        raise obstacle
    taken = taken_by(node, bn, name, affine, padded=True)
    with np.errstate(all="ignore"):
        values = np.unique((-affine.shift / affine.scale).astype(taken.weight.dtype))
    if values.size != 1 or not np.isfinite(values).all():
        raise obstacle
    pads = list(attribute(node, "pads", ()))
    half = len(pads) // 2
    pads = [0, 0, *pads[:half], 0, 0, *pads[half:]]
    if scope.opset < INPUTS_OF_PAD:
        pad = helper.make_node("Pad", [bn.inputs[0]], [name], name=bn.name, pads=pads, value=float(values[0]))
    else:
        constants = [np.array(pads, np.int64), values.reshape(())]
        names = [scope.add_constant(value, f"{node.label}_pads") for value in constants]
        pad = helper.make_node("Pad", [bn.inputs[0], *names], [name], name=bn.name)
    replace(bn, pad)
    scope.removed.add(name)  # what was declared of it: its shape is another now
    taken.write()
    node.dropped.add("pads")
    return Placed(node.label, "into-consumer", taken.underflow)


def taken_by(node: Node, bn: Node, name: str, affine: Affine, *, padded: bool = False) -> Taken:
    """Compute what one node behind a batch norm takes in; with ``padded``, its padding has been seen to."""
    if node.op == "Pad" and any(reader.op in CONVOLUTIONS for reader in bn.scope.readers.get(node.outputs[0], ())):
        raise Obstacle(
            "padded-consumer", f"{node.label} pads a convolution with another value than the batch norm gives"
        )
    if node.op not in CONSUMERS or node.inputs[0] != name or node.inputs.count(name) > 1:
        raise Obstacle("no-linear-neighbour", f"its output goes to {node.op} {node.label}")
    if node.scope is not bn.scope:
        raise Obstacle("outer-scope", f"{node.label} is in another graph than the batch norm")
    weight = weight_of(node, None)
    check_inputs(node, weight, affine)
    if not padded:
        check_padding(node, weight, affine)
    bias = bias_of(node, weight)
    if bias is None:
        bias = np.zeros(weight.layout.outputs)
    if node.op == "Gemm":
        affine = affine.with_shift(attribute(node, "alpha", 1.0) * affine.shift)
    folded = folding.fold_before(weight.value, bias, affine, weight.layout)
    underflow = refuse_loss(folded.overflow, folded.underflow, weight.value.dtype)
    return Taken(node, weight.index, folded.weight, folded.bias, underflow)


def check_inputs(node: Node, weight: Weight, affine: Affine) -> None:
    """Refuse a linear node whose input channels are not those of the batch norm."""
    if (node.op == "Gemm" and attribute(node, "transA", 0)) or (node.op == "MatMul" and weight.rank != 2):
        raise Obstacle("channel-axis", f"{node.label} does not sum over the channels of the batch norm")
    if weight.layout.inputs != affine.channels:
        raise Obstacle(
            "channel-axis", f"{node.label} takes {weight.layout.inputs} channels, the batch norm has {affine.channels}"
        )


def check_padding(node: Node, weight: Weight, affine: Affine) -> None:
    """Refuse a convolution that adds zeros at its borders where the batch norm would have given its shift."""
    if node.op not in CONVOLUTIONS or not affine.shift.any():
        return
    mode, pads = padding_mode(node), attribute(node, "pads", ())
    kernel = weight.value.shape[2:]
    padded = any(pads) if mode == b"NOTSET" else mode != b"VALID" and max(kernel) > 1
    if node.op == "ConvTranspose":  # which takes fewer taps at its borders, and between the strides
        stretched = max(*kernel, *attribute(node, "strides", (1,))) > 1
        padded = padded or stretched or any(attribute(node, "output_padding", ()))
        padded = padded or attribute(node, "output_shape", None) is not None
    if padded:
        raise Obstacle("padded-consumer", f"{node.label} pads with zeros where the batch norm gives its shift")


def padding_mode(node: Node) -> bytes:
    """Return a convolution's ``auto_pad``; an empty one is none, as for the runtimes."""
    mode: bytes = attribute(node, "auto_pad", b"") or b"NOTSET"
    return mode


def hands_on(node: Node, affine: Affine) -> bool:
    """Say whether a node could as well stand in front of the batch norm: it only moves values, or pads fittingly."""
    if transparent(node):
        return True
    if node.op != "Pad" or node.input(3):
        return False
    amounts, filler = known(node, 1), known(node, 2)
    if (node.input(1) and amounts is None) or (node.input(2) and filler is None):
        return False
    pads = attribute(node, "pads", []) if amounts is None else amounts.tolist()
    rank = len(pads) // 2
    if rank < 2 or any((*pads[:2], *pads[rank : rank + 2])):  # batch and channels
        return False
    value = float(attribute(node, "value", 0.0) if filler is None else filler.item())
    return attribute(node, "mode", b"constant") != b"constant" or bool(np.all(affine(np.float64(value)) == value))


def shift_output(node: Node, shift: Array) -> None:
    """Add a shift to what a MatMul gives, unless it is zero."""
    if not shift.any():
        return
    scope, name = node.scope, node.outputs[0]
    inner = scope.model.fresh_name(f"{name}_unshifted")
    scope.same_rank[inner] = name
    operand = scope.add_constant(shift, f"{node.label}_bias")
    add_name = scope.model.fresh_name(f"{node.name}_bias") if node.name else ""
    scope.rename_output(node, inner)
    add = Node(helper.make_node("Add", [inner, operand], [name], name=add_name), scope)
    scope.insert(scope.nodes.index(node) + 1, add)
