"""A model to look at and edit while the given one stays untouched.

The graph, its subgraphs and the bodies of the model's functions become :class:`Scope` objects, lists of :class:`Node`.
They refer to the given protobuf messages and never write to them; what changes is written beside them, and
:meth:`Model.assemble` builds the result in one go. So a weight exists twice at most, once in the given model and once
in the result, and a model of which nothing changed comes out as it went in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]

STANDARD = ("", "ai.onnx")
FIRST_OPSET = 7
OLD_IR = 4  # before this version every initializer had to be declared as a graph input too
SAID = {"doc_string", "metadata_props"}  # fields of a tensor beside its values
SMALL = 1024  # elements: shape inference may need the values of such a constant, never those of a larger one

# Operators that give the same value each time and carry no graph: constants may be computed through them.
# DequantizeLinear is left out on purpose: folding into its result would undo a quantization.
# fmt: off
FOLDABLE_CONSTANTS = frozenset({
    "Abs", "Add", "Cast", "CastLike", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "Pow", "Range", "Reciprocal", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Slice", "Split", "Sqrt", "Squeeze",
    "Sub", "Sum", "Tile", "Transpose", "Unsqueeze", "Where",
})
# fmt: on


class AttributeReferenceError(Exception):
    """An attribute inside a model function gets its value from the call."""


class ConstantError(ValueError):
    """A constant expression could not be computed."""


class Node:
    """A node whose inputs, outputs and attributes can change; the message it came from does not."""

    def __init__(self, source: NodeProto, scope: Scope) -> None:
        self.source = source
        self.scope = scope
        self.op = source.op_type if source.domain in STANDARD else f"{source.domain}::{source.op_type}"
        self.inputs = list(source.input)
        self.outputs = list(source.output)
        self.subscopes: dict[str, list[Scope]] = {}
        self.dropped: set[str] = set()  # attributes

    @property
    def name(self) -> str:
        """The node's name."""
        return self.source.name

    @property
    def label(self) -> str:
        """What to call the node in a report: its name, and where it has none its first output in the given model."""
        return self.name or next(filter(None, self.source.output), self.op)

    def input(self, index: int) -> str:
        """Return the name of an input, empty where it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute's value, ``default`` where it is absent."""
        for attribute in self.source.attribute:
            if attribute.name == name and name not in self.dropped:
                if attribute.ref_attr_name:
                    raise AttributeReferenceError(name)
                return helper.get_attribute_value(attribute)
        return default

    def copy(self, name: str) -> Node:
        """Return a node that does the same and is called ``name``; its inputs and outputs are to be set."""
        source = NodeProto()
        source.CopyFrom(self.source)
        source.name = name
        copy = Node(source, self.scope)
        copy.dropped = set(self.dropped)
        return copy

    def assemble_into(self, target: NodeProto) -> None:
        """Write the node as it is now into an empty message."""
        copy_fields(self.source, target, skip={"input", "output", "attribute"})
        target.input.extend(self.inputs)
        target.output.extend(self.outputs)
        for attribute in self.source.attribute:
            if attribute.name in self.dropped:
                continue
            copied = target.attribute.add()
            if attribute.name not in self.subscopes:
                copied.CopyFrom(attribute)
                continue
            copy_fields(attribute, copied, skip={"g", "graphs"})
            for scope in self.subscopes[attribute.name]:
                scope.assemble_into(copied.g if attribute.type == AttributeProto.GRAPH else copied.graphs.add())


class Scope:
    """A list of nodes with the names it defines: the main graph, a subgraph, or a function's body."""

    def __init__(self, model: Model, source: GraphProto | FunctionProto, path: str, parent: Scope | None) -> None:
        self.model = model
        self.source = source
        self.path = path
        self.parent = parent
        self.nodes: list[Node] = []
        self.children: list[Scope] = []  # in the order in which the given graph has them
        self.producers: dict[str, Node] = {}
        self.readers: dict[str, list[Node]] = {}  # of each name defined here, in nested scopes too
        self.exported: set[str] = set()  # names that something outside the nodes refers to
        self.constants: set[str] = set()
        self.initializers: dict[str, TensorProto | Array] = {}  # an array is a new value
        self.overridable: set[str] = set()
        self.removed: set[str] = set()
        self.unknown: set[str] = set()  # names that were read before anything defined them
        self.new_constants: dict[str, Array] = {}
        self.same_rank: dict[str, str] = {}  # new names of values, and the given ones that have as many axes
        self._read()

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        if isinstance(self.source, GraphProto):
            self._read_initializers(self.source)
            inputs = [value.name for value in self.source.input]
            outputs = [value.name for value in self.source.output]
        else:
            inputs, outputs = list(self.source.input), list(self.source.output)
        for name in (*inputs, *self.initializers):
            self.readers[name] = []
        self.model.names.update(self.readers)
        for source in self.source.node:
            self._read_node(Node(source, self))
        for name in outputs:
            scope = self.definer(name)
            (scope or self).exported.add(name)

    def _read_initializers(self, graph: GraphProto) -> None:
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        if self.model.source.ir_version >= OLD_IR:
            self.overridable = {value.name for value in graph.input if value.name in self.initializers}
        self.constants.update(name for name in self.initializers if name not in self.overridable)
        for sparse in graph.sparse_initializer:
            self.readers[sparse.values.name] = []
        for annotation in graph.quantization_annotation:
            self.exported.update(entry.value for entry in annotation.quant_parameter_tensor_names)

    def _read_node(self, node: Node) -> None:
        self.nodes.append(node)
        node_names = [name for name in node.inputs if name]
        for name in node_names:
            scope = self.definer(name)
            if scope is not None:
                scope.readers[name].append(node)
            else:
                self._note_unknown(name)
        for attribute in node.source.attribute:
            graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            if graphs:
                paths = (f"{self.path}{node.label}/{attribute.name}/" for _ in graphs)
                node.subscopes[attribute.name] = [
                    Scope(self.model, graph, path, self) for graph, path in zip(graphs, paths, strict=True)
                ]
                self.children += node.subscopes[attribute.name]
        constant = (
            node.op in FOLDABLE_CONSTANTS
            and not node.subscopes
            and not any(attribute.ref_attr_name for attribute in node.source.attribute)
            and all(self.is_constant(name) for name in node_names)
        )
        for name in filter(None, node.outputs):
            if name in self.unknown or name in self.readers:
                what = "is read before it is given" if name in self.unknown else "is given twice"
                raise ValueError(f"this is not a valid ONNX model: {name}, an output of {node.label}, {what}")
            self.define(name, node)
            if constant:
                self.constants.add(name)
        self.model.names.update((node.name, *node.inputs, *node.outputs))

    def _note_unknown(self, name: str) -> None:
        scope: Scope | None = self
        while scope is not None:
            scope.unknown.add(name)
            scope = scope.parent

    def define(self, name: str, node: Node) -> None:
        """Note that ``node`` gives the value called ``name``."""
        self.producers[name] = node
        self.readers.setdefault(name, [])

    def definer(self, name: str) -> Scope | None:
        """Return the innermost scope, this one or one around it, that defines a name."""
        scope: Scope | None = self
        while scope is not None and name not in scope.readers:
            scope = scope.parent
        return scope

    @property
    def opset(self) -> int:
        """Version of the standard operators in this scope."""
        imports = self.source.opset_import if isinstance(self.source, FunctionProto) else self.model.source.opset_import
        return next((entry.version for entry in imports if entry.domain in STANDARD), 0)

    def walk(self) -> Iterator[Node]:
        """Yield the nodes of this scope and, behind each, those of its subgraphs."""
        for node in list(self.nodes):
            yield node
            for scopes in node.subscopes.values():
                for scope in scopes:
                    yield from scope.walk()

    # -- constants -------------------------------------------------------------------------------------------------

    def is_constant(self, name: str) -> bool:
        """Say whether a name's value is fixed by the model alone."""
        scope = self.definer(name)
        return scope is not None and name in scope.constants

    def is_read(self, name: str) -> bool:
        """Say whether anything reads a value that this scope defines."""
        return bool(self.readers[name]) or name in self.exported

    def is_overridable(self, name: str) -> bool:
        """Say whether a name is an initializer that the caller of the model may replace."""
        scope = self.definer(name)
        return scope is not None and name in scope.overridable

    def constant(self, name: str) -> Array:
        """Compute the value of a constant."""
        values: dict[tuple[Scope | None, str], Array] = {}  # an inner name may be that of an outer value
        needed: dict[Node, None] = {}
        pending: list[tuple[Scope, str]] = [(self, name)]
        while pending:
            scope, wanted = pending.pop()
            definer = scope.definer(wanted)
            assert definer is not None
            producer = definer.producers.get(wanted)
            if producer is None:
                values[definer, wanted] = definer._stored(wanted)
            elif producer not in needed:
                needed[producer] = None
                pending.extend((definer, entry) for entry in producer.inputs if entry)
        for node in sorted(needed, key=self.model.order.__getitem__):
            inputs = {entry: values[node.scope.definer(entry), entry] for entry in node.inputs if entry}
            values.update(((node.scope, output), value) for output, value in _evaluate(node, inputs).items())
        return values[self.definer(name), name]

    def _stored(self, name: str) -> Array:
        stored = self.new_constants[name] if name in self.new_constants else self.initializers[name]
        if not isinstance(stored, TensorProto):
            return stored
        return numpy_helper.to_array(stored)

    def rank(self, name: str) -> int | None:
        """Return the number of axes of a value where it can be known."""
        definer = self.definer(name)
        return None if definer is None else self.model.ranks(definer).get(definer.same_rank.get(name, name))

    # -- editing ---------------------------------------------------------------------------------------------------

    def set_input(self, node: Node, index: int, name: str) -> None:
        """Let a node read ``name``; what nobody reads any more goes away."""
        while len(node.inputs) <= index:
            node.inputs.append("")
        old, node.inputs[index] = node.inputs[index], name
        definer = self.definer(name)
        assert definer is not None
        definer.readers[name].append(node)
        if old:
            self._unread(node, old)

    def set_constant(self, node: Node, index: int, value: Array, hint: str) -> None:
        """Let a node read a new constant: under the old one's name where nobody else sees it, else under a new name."""
        old = node.input(index)
        definer = self.definer(old) if old else None
        if definer is not None and definer._may_overwrite(old, value):
            stored = definer.initializers if old in definer.initializers else definer.new_constants
            stored[old] = value
        else:
            self.set_input(node, index, self.add_constant(value, old or hint))

    def _may_overwrite(self, name: str, value: Array) -> bool:
        if name in self.new_constants:
            return len(self.readers[name]) == 1
        stored = self.initializers.get(name)
        if stored is None or name in self.exported or len(self.readers[name]) != 1:
            return False
        if isinstance(stored, TensorProto):
            return tuple(stored.dims) == value.shape and stored.data_type == helper.np_dtype_to_tensor_dtype(
                value.dtype
            )
        return stored.shape == value.shape and stored.dtype == value.dtype

    def add_constant(self, value: Array, hint: str) -> str:
        """Add a constant under a name that is not taken."""
        name = self.model.fresh_name(hint)
        if isinstance(self.source, GraphProto) and (self.parent is None or self.model.source.ir_version >= OLD_IR):
            self.initializers[name] = value
        else:
            self.new_constants[name] = value
        self.readers[name] = []
        self.constants.add(name)
        return name

    def remove(self, node: Node) -> None:
        """Take a node out, and with it the constants that only it read."""
        node.scope.nodes.remove(node)
        for name in filter(None, node.outputs):
            if node.scope.producers.get(name) is node:
                del node.scope.producers[name]
                node.scope.removed.add(name)
        for name in filter(None, node.inputs):
            self._unread(node, name)

    def rename_output(self, node: Node, name: str) -> None:
        """Let a node give the value called ``name``, which it takes over from the node that gave it before."""
        old, node.outputs[0] = node.outputs[0], name
        del self.producers[old]
        self.removed.add(old)
        self.removed.discard(name)
        self.define(name, node)

    def insert(self, position: int, node: Node) -> None:
        """Add a node whose inputs are defined already."""
        self.nodes.insert(position, node)
        self.model.order[node] = len(self.model.order)
        for name in filter(None, node.outputs):
            self.define(name, node)
            self.removed.discard(name)
        for name in filter(None, node.inputs):
            definer = self.definer(name)
            assert definer is not None
            definer.readers[name].append(node)

    def _unread(self, node: Node, name: str) -> None:
        """Note that ``node`` reads ``name`` one time less."""
        pending = [(self, node, name)]
        while pending:
            scope, reader, value = pending.pop()
            definer = scope.definer(value)
            if definer is None:
                continue
            definer.readers[value].remove(reader)
            unread = not definer.readers[value] and value not in definer.exported
            if not unread or value not in definer.constants:
                continue
            producer = definer.producers.get(value)
            if producer is None:
                definer.initializers.pop(value, None)
                definer.new_constants.pop(value, None)
                definer.removed.add(value)
            elif all(not definer.readers.get(name) and name not in definer.exported for name in producer.outputs):
                definer.nodes.remove(producer)
                for output in filter(None, producer.outputs):
                    definer.producers.pop(output, None)
                    definer.removed.add(output)
                pending.extend((definer, producer, name) for name in producer.inputs if name)

    # -- the result ------------------------------------------------------------------------------------------------

    def assemble_into(self, target: GraphProto | FunctionProto) -> None:
        """Write the scope as it is now into an empty message. New values are handed over, not kept."""
        copy_fields(self.source, target, skip={"node", "initializer", "value_info", "input", "quantization_annotation"})
        if isinstance(target, GraphProto):
            assert isinstance(self.source, GraphProto)
            given = {tensor.name: tensor for tensor in self.source.initializer}
            kept = self.initializers.keys()
            target.input.extend(value for value in self.source.input if value.name not in given.keys() - kept)
            target.quantization_annotation.extend(
                entry for entry in self.source.quantization_annotation if entry.tensor_name not in self.removed
            )
            for name in list(kept):
                tensor = target.initializer.add()
                _write_tensor(self.initializers.pop(name), name, tensor, given.get(name))
                if name not in given and self.model.source.ir_version < OLD_IR:
                    target.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        else:
            assert isinstance(self.source, FunctionProto)
            target.input.extend(self.source.input)
        for name in list(self.new_constants):
            node = target.node.add(op_type="Constant", output=[name])
            attribute = node.attribute.add(name="value", type=AttributeProto.TENSOR)
            _write_tensor(self.new_constants.pop(name), name, attribute.t)
        for node_ in self.nodes:
            node_.assemble_into(target.node.add())
        target.value_info.extend(value for value in self.source.value_info if value.name not in self.removed)


class Model:
    """A model as a tree of scopes."""

    def __init__(self, source: ModelProto) -> None:
        self.source = source
        self.order: dict[Node, int] = {}
        self.names: set[str] = set()  # every name in use, of values and of nodes
        self._ranks: dict[Scope, dict[str, int]] = {}
        self.graph = Scope(self, source.graph, "", None)
        self.functions = [Scope(self, function, f"{function.name}/", None) for function in source.functions]
        for info in source.training_info:
            for binding in (*info.initialization_binding, *info.update_binding):
                self.graph.exported.update((binding.key, binding.value))
            self._note_algorithm(info.algorithm)
        for node in self.walk():
            self.order[node] = len(self.order)

    def _note_algorithm(self, graph: GraphProto) -> None:
        """Note what a training algorithm reads: it is the main graph's continuation, with names of its own."""
        for body in _bodies([graph]):
            assert isinstance(body, GraphProto)
            names = {name for node in body.node for name in (*node.input, *node.output)}
            names.update(tensor.name for tensor in body.initializer)
            names.update(value.name for value in (*body.input, *body.output))
            self.graph.exported |= names
            self.names |= names

    def walk(self) -> Iterator[Node]:
        """Yield every node in graph order, behind each those of its subgraphs, and in the end those of functions."""
        for scope in (self.graph, *self.functions):
            yield from scope.walk()

    def fresh_name(self, hint: str) -> str:
        """Return a name that the model does not use yet."""
        name, number = hint, 0
        while name in self.names:
            number += 1
            name = f"{hint}_{number}"
        self.names.add(name)
        return name

    def ranks(self, scope: Scope) -> Mapping[str, int]:
        """Return the number of axes of the values that a scope defines, where they can be known: not in functions."""
        if not self._ranks:
            self._note_ranks(self.graph, _with_shapes(self.source).graph)
        return self._ranks.get(scope, {})

    def _note_ranks(self, scope: Scope, graph: GraphProto) -> None:
        self._ranks[scope] = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        for child, inner in zip(scope.children, _subgraphs(graph), strict=True):
            self._note_ranks(child, inner)

    def assemble(self) -> ModelProto:
        """Build the model as it is now. The scopes hand over their new values: this can be done once."""
        result = ModelProto()
        copy_fields(self.source, result, skip={"graph", "functions"})
        self.graph.assemble_into(result.graph)
        for function in self.functions:
            function.assemble_into(result.functions.add())
        self._let_go()
        return result

    def _let_go(self) -> None:
        """Break the circles of references, which would keep the given model in memory until the next collection."""
        for scope in {node.scope for node in self.order} | {self.graph, *self.functions}:
            scope.nodes.clear()
            scope.children.clear()
            scope.producers.clear()
            scope.readers.clear()
            del scope.model
        self.order.clear()
        self._ranks.clear()


def bodies(model: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    """Yield a model's graph, its functions, and the subgraphs of both."""
    return _bodies([model.graph, *model.functions])


def _bodies(outermost: Iterable[GraphProto | FunctionProto]) -> Iterator[GraphProto | FunctionProto]:
    pending = list(outermost)
    while pending:
        body = pending.pop()
        yield body
        pending.extend(_subgraphs(body))


def _subgraphs(body: GraphProto | FunctionProto) -> Iterator[GraphProto]:
    for attribute in (attribute for node in body.node for attribute in node.attribute):
        yield from [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield the tensors that a model stores: initializers and the values of Constant nodes, in every body."""
    for body in bodies(model):
        if isinstance(body, GraphProto):
            yield from body.initializer
            for sparse in body.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in body.node for attribute in node.attribute):
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t


def copy_fields(source: Message, target: Message, skip: set[str]) -> None:
    """Copy the fields of a message into an empty one of its kind, except those named."""
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def _write_tensor(
    value: TensorProto | Array, name: str, target: TensorProto, before: TensorProto | None = None
) -> None:
    """Write a tensor into an empty message; what is said about the one ``before`` holds for it too."""
    if isinstance(value, TensorProto):
        target.CopyFrom(value)
        return
    if before is not None:
        copy_fields(before, target, skip={field.name for field in before.DESCRIPTOR.fields} - SAID)
    target.name = name
    target.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
    target.dims.extend(value.shape)
    target.raw_data = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()


def _evaluate(node: Node, values: Mapping[str, Array]) -> dict[str, Array]:
    """Compute the outputs of a node whose inputs are known."""
    if node.op == "Constant" and (value := node.attribute("value", None)) is not None:
        return {node.outputs[0]: numpy_helper.to_array(value)}
    if node.op == "Identity":
        return {node.outputs[0]: values[node.inputs[0]]}
    inputs = list(dict.fromkeys(filter(None, node.inputs)))
    outputs = [name for name in node.outputs if name]
    opset = helper.make_opsetid("", node.scope.opset)
    function = helper.make_function("fastbn", "constant", inputs, outputs, [node.source], [opset])
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(function).run(None, {name: values[name] for name in inputs}, attributes={})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConstantError(f"{node.op} {node.label}: {error!r}") from error
    return dict(zip(outputs, results, strict=True))


def _with_shapes(model: ModelProto) -> ModelProto:
    """Return a copy of a model without its large weights, and with what can be inferred of its values' shapes."""
    skeleton = ModelProto()
    copy_fields(model, skeleton, skip={"graph"})
    copy_fields(model.graph, skeleton.graph, skip={"initializer"})
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) <= SMALL:
            skeleton.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            skeleton.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    try:
        return onnx.shape_inference.infer_shapes(skeleton)
    except onnx.shape_inference.InferenceError:
        return skeleton
