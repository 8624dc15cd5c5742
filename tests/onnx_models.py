"""A small language for ONNX graphs with batch norms, whose parameters are drawn so that no fold is degenerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, shape_inference

IR_OF_OPSET = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8}


class Graph:
    """A graph under construction; every method that adds a node returns the name of its first output."""

    def __init__(self, *shape: Any, opset: int = 17, dtype: Any = np.float32, seed: int = 0, prefix: str = "") -> None:
        self.opset = opset
        self.dtype = np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", self.elem(self.dtype), shape)] if shape else []
        self.count = 0

    @staticmethod
    def elem(dtype: Any) -> int:
        return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{self.prefix}{kind.lower()}{self.count}"

    def const(self, value: Any, name: str | None = None, dtype: Any = None) -> str:
        name = name or self.fresh("const")
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype or self.dtype), name))
        return name

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1))

    def add(
        self, op: str, *inputs: str, name: str | None = None, outputs: list[str] | None = None, **attributes
    ) -> str:
        label = name or self.fresh(op)
        outputs = outputs or [f"{label}_out"]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=label, **attributes))
        return outputs[0]

    def conv(
        self, x: str, c_in: int, c_out: int, kernel=(3, 3), *, groups=1, bias=True, weight=None, name=None, **attrs
    ):
        name = name or self.fresh("Conv")
        weight = weight or self.const(self.normal(c_out, c_in // groups, *kernel), f"{name}.weight")
        inputs = [x, weight] + ([self.const(self.rng.normal(size=c_out), f"{name}.bias")] if bias else [])
        return self.add("Conv", *inputs, name=name, group=groups, kernel_shape=kernel, **attrs)

    def conv_transpose(self, x: str, c_in: int, c_out: int, kernel=(3, 3), *, groups=1, bias=True, **attrs) -> str:
        name = self.fresh("ConvTranspose")
        weight = self.const(self.normal(c_in, c_out // groups, *kernel), f"{name}.weight")
        inputs = [x, weight] + ([self.const(self.rng.normal(size=c_out), f"{name}.bias")] if bias else [])
        return self.add("ConvTranspose", *inputs, name=name, group=groups, **attrs)

    def norm_values(self, channels: int) -> list[np.ndarray]:
        """Draw scale, bias, mean and variance; some scales are negative."""
        rng = self.rng
        return [
            rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels),
            rng.normal(size=channels),
            rng.normal(size=channels),
            rng.uniform(0.5, 2, channels),
        ]

    def norm_constants(self, name: str, channels: int, dtype: Any = None) -> list[str]:
        keys = ("weight", "bias", "running_mean", "running_var")
        values = self.norm_values(channels)
        return [self.const(value, f"{name}.{key}", dtype) for key, value in zip(keys, values, strict=True)]

    def norm(self, x: str, channels: int, *, name=None, constants=None, dtype=None, outputs=None, **attributes) -> str:
        name = name or self.fresh("BN")
        constants = constants or self.norm_constants(name, channels, dtype)
        return self.add("BatchNormalization", x, *constants, name=name, outputs=outputs, **attributes)

    def graph(self, *outputs: str) -> GraphProto:
        values = [ValueInfoProto(name=name) for name in outputs]  # the type is inferred
        return helper.make_graph(self.nodes, "graph", self.inputs, values, self.initializers)

    def model(self, *outputs: str, functions=(), ir_version=None, shape=None, **kwargs) -> ModelProto:
        graph = self.graph(*outputs)
        ir_version = ir_version or IR_OF_OPSET.get(self.opset, 10)
        if ir_version < 4:
            graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.initializers)
        imports = [helper.make_opsetid("", self.opset)] + [helper.make_opsetid("local", 1)] * bool(functions)
        model = helper.make_model(
            graph, opset_imports=imports, ir_version=ir_version, functions=functions, producer_name="tests", **kwargs
        )
        inferred = shape_inference.infer_shapes(model, strict_mode=True)
        for value, known in zip(model.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(known)
            if not value.type.tensor_type.HasField("shape"):  # which the checker wants
                value.CopyFrom(helper.make_tensor_value_info(value.name, known.type.tensor_type.elem_type, shape))
        return model


def light_model(name: str, seed: int = 0) -> ModelProto:
    """Load one of the architectures that come with the onnx package and draw its weights.

    The package ships them without weights: nodes of kind ConstantOfShape stand in. Each becomes an initializer drawn
    for its role, so that activations neither vanish nor explode and no two channels are alike.
    """
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(folder / f"light_{name}.onnx")
    rng = np.random.default_rng(seed)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stand_ins = [node for node in model.graph.node if node.op_type == "ConstantOfShape"]
    readers = {name: (node.op_type, index) for node in model.graph.node for index, name in enumerate(node.input)}
    for node in stand_ins:
        shape = [int(size) for size in shapes[node.input[0]]]
        match readers.get(node.output[0]):
            case ("Conv" | "Gemm", 1):
                value = rng.normal(size=shape) * np.sqrt(2 / max(np.prod(shape[1:]), 1))
            case ("BatchNormalization", 1 | 4) | ("Unsqueeze", 0):
                value = rng.uniform(0.5, 1.5, shape)
            case _:
                value = rng.normal(size=shape) * 0.1
        tensor = numpy_helper.from_array(value.astype(np.float32), node.output[0])
        model.graph.initializer.append(tensor)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape))
        model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for values in (model.graph.initializer, model.graph.input):  # the stand-ins' shapes
        kept = [value for value in values if value.name in read]
        del values[:]
        values.extend(kept)
    last = model.graph.node[-1]
    if last.op_type == "Softmax":  # which would flatten all differences
        model.graph.output[0].name = last.input[0]
        model.graph.node.remove(last)
    return model
