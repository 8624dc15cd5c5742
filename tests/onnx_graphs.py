"""Hand-made graphs, each with the reason that every batch norm in it must get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from onnx import ModelProto, TensorProto, helper
from onnx_models import Graph

INTO, BEHIND = "into-producer", "into-consumer"


@dataclass
class Case:
    build: Callable[[], ModelProto]
    reasons: list[str]
    operators: list[str] | None = None  # of the folded graph
    tolerance: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(*reasons: str, **kwargs: Any) -> Callable[[Callable[[], ModelProto]], Callable[[], ModelProto]]:
    """Add a function that builds a model to the table, under the function's name."""

    def add(build: Callable[[], ModelProto]) -> Callable[[], ModelProto]:
        CASES[build.__name__] = Case(build, list(reasons), **kwargs)
        return build

    return add


# --- convolutions ----------------------------------------------------------------------------------------------------


@case(INTO, operators=["Conv"])
def conv_1d():
    g = Graph(2, 4, 9)
    return g.model(g.norm(g.conv("x", 4, 6, (3,)), 6))


@case(INTO, operators=["Conv"])
def conv_2d():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm(g.conv("x", 4, 6, pads=[1, 1, 1, 1], strides=[2, 1]), 6))


@case(INTO, operators=["Conv"])
def conv_3d():
    g = Graph(2, 4, 5, 6, 5)
    return g.model(g.norm(g.conv("x", 4, 6, (3, 1, 2)), 6))


@case(INTO, operators=["Conv"])
def conv_without_bias():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm(g.conv("x", 4, 6, bias=False), 6))


@case(INTO, operators=["Conv"])
def conv_with_bias_left_empty():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6, bias=False)
    g.nodes[-1].input.append("")
    return g.model(g.norm(y, 6))


@case(INTO, operators=["Conv"])
def grouped():
    g = Graph(2, 6, 9, 8)
    return g.model(g.norm(g.conv("x", 6, 9, groups=3), 9))


@case(INTO, operators=["Conv"])
def depthwise():
    g = Graph(2, 6, 9, 8)
    return g.model(g.norm(g.conv("x", 6, 12, groups=6, bias=False), 12))


@case(INTO, operators=["ConvTranspose"])
def transposed():
    g = Graph(2, 4, 5, 6)
    return g.model(g.norm(g.conv_transpose("x", 4, 6, strides=[2, 2], output_padding=[1, 0]), 6))


@case(INTO, operators=["ConvTranspose"])
def transposed_with_equal_channels():
    g = Graph(2, 5, 5, 6)
    return g.model(g.norm(g.conv_transpose("x", 5, 5, bias=False), 5))


@case(INTO, operators=["ConvTranspose"])
def transposed_grouped():
    g = Graph(2, 4, 5, 6)
    return g.model(g.norm(g.conv_transpose("x", 4, 6, groups=2), 6))


@case(INTO, operators=["ConvTranspose"])
def transposed_depthwise_1d():
    g = Graph(2, 4, 7)
    return g.model(g.norm(g.conv_transpose("x", 4, 8, (3,), groups=4, bias=False), 8))


@case(INTO, INTO, operators=["Conv", "Relu", "Conv"])
def two_convs():
    g = Graph(2, 4, 9, 8)
    y = g.add("Relu", g.norm(g.conv("x", 4, 6), 6))
    return g.model(g.norm(g.conv(y, 6, 5), 5))


@case(INTO, operators=["Conv", "Shape"])
def shape_of_the_convolution():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6)
    shape = g.add("Shape", y)
    return g.model(g.norm(y, 6), shape)


@case(INTO, operators=["Conv", "Identity", "Dropout"])
def through_identity_and_dropout():
    g = Graph(2, 4, 9, 8)
    y = g.add("Dropout", g.add("Identity", g.conv("x", 4, 6)))
    return g.model(g.norm(y, 6))


@case(INTO, operators=["Conv", "Add"])
def conv_and_add():
    g = Graph(2, 4, 9, 8)
    y = g.add("Add", g.conv("x", 4, 6), g.const(g.rng.normal(size=(6, 1, 1))))
    return g.model(g.norm(y, 6))


@case(INTO, operators=["Conv", "Add", "Add"])
def conv_and_adds_of_maps_and_numbers():
    g = Graph(2, 4, 9, 8)
    y = g.add("Add", g.const(1.5), g.conv("x", 4, 6))
    y = g.add("Add", y, g.const(g.rng.normal(size=(7, 6))))
    return g.model(g.norm(y, 6))


@case(INTO, operators=["InstanceNormalization"])
def instance_norm():
    g = Graph(2, 4, 9, 8)
    y = g.add("InstanceNormalization", "x", g.const(g.rng.normal(size=4)), g.const(g.rng.normal(size=4)))
    return g.model(g.norm(y, 4))


# --- matrix products -------------------------------------------------------------------------------------------------


def gemm(bias_shape, *, behind=False, **attributes):
    g = Graph(*((4, 3) if attributes.get("transA") else (3, 4)))
    x = g.norm("x", 4) if behind else "x"
    weight = g.normal(6, 4) if attributes.get("transB") else g.normal(4, 6)
    inputs = [x, g.const(weight)] + ([] if bias_shape is None else [g.const(g.rng.normal(size=bias_shape))])
    y = g.add("Gemm", *inputs, **attributes)
    return g.model(y if behind else g.norm(y, 6))


for number, (shape, options) in enumerate(
    [
        ((6,), {}),
        ((6,), {"transB": 1}),
        ((6,), {"transA": 1, "transB": 1}),
        ((6,), {"alpha": 0.5, "beta": 2.0}),
        ((3, 6), {"beta": -0.5}),
        ((3, 1), {"alpha": 2.0}),
        ((1, 6), {}),
        ((1,), {}),
        ((), {}),
        (None, {}),
        (None, {"alpha": 3.0, "transA": 1}),
        ((6,), {"beta": 0.0}),
    ]
):
    CASES[f"gemm_{number}"] = Case(lambda s=shape, o=options: gemm(s, **o), [INTO], ["Gemm"])
    if "transA" not in options:
        CASES[f"norm_and_gemm_{number}"] = Case(
            lambda s=shape, o=options: gemm(s, behind=True, **o), [BEHIND], ["Gemm"]
        )


@case(INTO, operators=["MatMul", "Add"])
def matmul():
    g = Graph(3, 4)
    return g.model(g.norm(g.add("MatMul", "x", g.const(g.normal(4, 6))), 6))


@case(INTO, operators=["MatMul"])
def matmul_without_shift():
    g = Graph(3, 4)
    constants = [g.const(v) for v in (g.rng.normal(size=6), np.zeros(6), np.zeros(6), np.ones(6))]
    return g.model(g.norm(g.add("MatMul", "x", g.const(g.normal(4, 6))), 6, constants=constants))


@case(INTO, operators=["MatMul", "Add"])
def matmul_and_add():
    g = Graph(3, 4)
    y = g.add("Add", g.add("MatMul", "x", g.const(g.normal(4, 6))), g.const(g.rng.normal(size=6)))
    return g.model(g.norm(y, 6))


@case(INTO, operators=["MatMul", "Add"])
def matmul_and_add_the_other_way_round():
    g = Graph(3, 4)
    y = g.add("Add", g.const(g.rng.normal(size=(3, 1))), g.add("MatMul", "x", g.const(g.normal(4, 6))))
    return g.model(g.norm(y, 6))


@case(INTO, operators=["MatMul", "Add", "Transpose"])
def matmul_over_sequences():
    """The channels come last and are moved to axis 1 for the batch norm."""
    g = Graph(2, 5, 4)
    y = g.add("Add", g.add("MatMul", "x", g.const(g.normal(4, 6))), g.const(g.rng.normal(size=6)))
    return g.model(g.norm(g.add("Transpose", y, perm=[0, 2, 1]), 6))


@case(INTO, operators=["MatMul", "Unsqueeze", "Add", "Squeeze"])
def matmul_with_an_axis_more():
    g = Graph(3, 4)
    axes = g.const([2], dtype=np.int64)
    y = g.norm(g.add("Unsqueeze", g.add("MatMul", "x", g.const(g.normal(4, 6))), axes), 6)
    return g.model(g.add("Squeeze", y, axes))


@case(INTO, operators=["MatMul", "Add"])
def matmul_with_the_weight_on_the_left():
    g = Graph(2, 4, 7)
    return g.model(g.norm(g.add("MatMul", g.const(g.normal(6, 4)), "x"), 6))


@case("channel-axis", operators=["MatMul", "BatchNormalization"])
def matmul_over_the_wrong_axis():
    g = Graph(2, 6, 4)
    return g.model(g.norm(g.add("MatMul", "x", g.const(g.normal(4, 6))), 6))


@case("unknown-rank")
def matmul_of_unknown_rank():
    """A reshape to a shape that is given at run time."""
    g = Graph(3, 4)
    g.inputs.append(helper.make_tensor_value_info("shape", TensorProto.INT64, ["rank"]))
    g.inputs[1].type.tensor_type.shape.dim[0].dim_param = "rank"
    flat = g.add(
        "If", g.add("Equal", g.add("Size", "shape"), g.const(8, dtype=np.int64)), **either("x", [3, 4], [1, 3, 4])
    )
    y = g.norm(g.add("MatMul", flat, g.const(g.normal(4, 6))), 6)
    return g.model(g.add("Reshape", y, g.const([18], dtype=np.int64)))


def either(name, shape, other):
    """Return the branches of an If that reshape a value in one way or another."""
    branches = {}
    for key, sizes in (("then_branch", other), ("else_branch", shape)):
        b = Graph(prefix=key)
        y = b.add("Reshape", name, b.const(sizes, dtype=np.int64))
        branches[key] = helper.make_graph(
            b.nodes, key, [], [helper.make_tensor_value_info(y, TensorProto.FLOAT, sizes)], b.initializers
        )
    return branches


# --- batch norm in front ---------------------------------------------------------------------------------------------


@case(BEHIND, operators=["Relu", "Conv"])
def norm_and_conv():
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm(g.add("Relu", "x"), 4), 4, 6))


@case(BEHIND, operators=["Conv"])
def norm_and_grouped_conv():
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm("x", 4), 4, 6, groups=2, bias=False, auto_pad="VALID"))


@case(BEHIND, operators=["Conv"])
def norm_and_pointwise_conv_that_pads_the_same():
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm("x", 4), 4, 6, (1, 1), auto_pad="SAME_UPPER", strides=[2, 2]))


@case("padded-consumer")
def norm_and_pointwise_conv_with_an_empty_mode_that_pads():
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm("x", 4), 4, 6, (1, 1), auto_pad="", pads=[1, 1, 1, 1]))


@case(BEHIND, INTO, operators=["MatMul", "Add"])
def norm_and_matmul_and_norm():
    g = Graph(3, 4)
    return g.model(g.norm(g.add("MatMul", g.norm("x", 4), g.const(g.normal(4, 6))), 6))


@case("padded-consumer")
def norm_and_padded_conv():
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm("x", 4), 4, 6, pads=[1, 1, 1, 1]))


@case("padded-consumer")
def norm_and_conv_that_pads_the_same():
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm("x", 4), 4, 6, auto_pad="SAME_LOWER"))


@case(BEHIND, operators=["Conv"])
def norm_without_shift_and_padded_conv():
    g = Graph(2, 4, 9, 8)
    constants = [g.const(v) for v in (g.rng.normal(size=4), np.zeros(4), np.zeros(4), np.ones(4))]
    return g.model(g.conv(g.norm("x", 4, constants=constants), 4, 6, pads=[1, 1, 1, 1]))


@case(BEHIND, operators=["Pad", "Conv"])
def norm_and_reflecting_pad():
    g = Graph(2, 4, 9, 8)
    y = g.add("Pad", g.norm("x", 4), g.const([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64), mode="reflect")
    return g.model(g.conv(y, 4, 6))


def one_channel(opset):
    g = Graph(2, 1, 9, 8, opset=opset)
    return g.model(g.conv(g.norm("x", 1), 1, 6, pads=[1, 2, 0, 1]))


CASES["norm_of_one_channel_and_padded_conv"] = Case(lambda: one_channel(17), [BEHIND], ["Pad", "Conv"])
CASES["norm_of_one_channel_and_padded_conv_in_opset_9"] = Case(lambda: one_channel(9), [BEHIND], ["Pad", "Conv"])


@case(BEHIND, operators=["Pad", "Conv"])
def norm_of_equal_channels_and_padded_conv():
    """Normalised images in grey: the same mean everywhere, each channel with its own scale."""
    g = Graph(2, 3, 9, 8)
    constants = [g.const(v) for v in ([2.0, -4.0, 1.0], np.zeros(3), np.full(3, 0.5), np.ones(3))]
    return g.model(g.conv(g.norm("x", 3, constants=constants), 3, 6, pads=[1, 1, 1, 1], bias=False))


@case("padded-consumer")
def norm_of_one_channel_read_twice():
    g = Graph(2, 1, 9, 8)
    y = g.norm("x", 1)
    return g.model(g.conv(y, 1, 6, pads=[1, 1, 1, 1]), g.conv(y, 1, 6, pads=[1, 1, 1, 1]))


@case("padded-consumer")
def norm_and_zero_pad():
    g = Graph(2, 4, 9, 8)
    y = g.add("Pad", g.norm("x", 4), g.const([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64))
    return g.model(g.conv(y, 4, 6))


@case(BEHIND, operators=["Pad", "Conv"])
def norm_and_pad_with_its_fixed_point():
    g = Graph(2, 4, 9, 8)
    constants = [g.const(v) for v in ([2.0] * 4, [3.0] * 4, [2.0] * 4, [1.0] * 4)]  # (x - 2) * 2 + 3 = x at x = 1
    y = g.norm("x", 4, constants=constants, epsilon=0.0)
    y = g.add("Pad", y, g.const([0, 0, 1, 1, 0, 0, 1, 1], dtype=np.int64), g.const(1.0))
    return g.model(g.conv(y, 4, 6))


@case(BEHIND, operators=["Conv", "Conv", "Add"])
def norm_and_two_convs():
    g = Graph(2, 4, 9, 8)
    y = g.norm("x", 4)
    weight = g.const(g.normal(6, 4, 3, 3))
    return g.model(g.add("Add", g.conv(y, 4, 6, weight=weight), g.conv(y, 4, 6, weight=weight, bias=False)))


@case("second-consumer")
def norm_read_by_a_conv_and_a_relu():
    g = Graph(2, 4, 9, 8)
    y = g.norm("x", 4)
    return g.model(g.conv(y, 4, 6), g.add("Relu", y))


@case("graph-output")
def norm_that_is_an_output_too():
    g = Graph(2, 4, 9, 8)
    y = g.norm("x", 4)
    return g.model(g.conv(y, 4, 6), y)


@case(BEHIND, operators=["MatMul", "Add"])
def norm_and_matmul():
    g = Graph(3, 4)
    return g.model(g.add("MatMul", g.norm("x", 4), g.const(g.normal(4, 6))))


@case("channel-axis")
def norm_and_matmul_over_another_axis():
    g = Graph(2, 4, 4)
    return g.model(g.add("MatMul", g.norm("x", 4), g.const(g.normal(4, 6))))


@case("channel-axis")
def norm_and_gemm_over_another_axis():
    g = Graph(4, 4)
    return g.model(g.add("Gemm", g.norm("x", 4), g.const(g.normal(4, 6)), transA=1))


@case(BEHIND, operators=["ConvTranspose"])
def norm_and_pointwise_transposed():
    g = Graph(2, 4, 5, 6)
    return g.model(g.conv_transpose(g.norm("x", 4), 4, 6, (1, 1), groups=2))


@case("padded-consumer")
def norm_and_transposed():
    g = Graph(2, 4, 5, 6)
    return g.model(g.conv_transpose(g.norm("x", 4), 4, 6))


@case("no-linear-neighbour", operators=["Relu", "BatchNormalization", "Relu"])
def norm_between_activations():
    g = Graph(2, 4, 9, 8)
    return g.model(g.add("Relu", g.norm(g.add("Relu", "x"), 4)))


@case("no-linear-neighbour")
def norm_alone():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm("x", 4))


@case("no-linear-neighbour")
def activation_between():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm(g.add("Relu", g.conv("x", 4, 6)), 6))


# --- chains ----------------------------------------------------------------------------------------------------------


@case(INTO, INTO, INTO, operators=["Conv"])
def chain_behind_conv():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm(g.norm(g.norm(g.conv("x", 4, 6), 6), 6), 6))


@case("no-linear-neighbour", INTO, operators=["BatchNormalization"])
def chain_alone():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm(g.norm("x", 4), 4))


@case(BEHIND, INTO, operators=["Conv"])
def chain_in_front_of_conv():
    """The second goes into the first, which then goes into the convolution."""
    g = Graph(2, 4, 9, 8)
    return g.model(g.conv(g.norm(g.norm("x", 4), 4), 4, 6))


@case("training-mode", "no-linear-neighbour")
def chain_behind_a_norm_that_trains():
    g = Graph(2, 4, 9, 8)
    y = g.norm("x", 4, training_mode=1, outputs=["y1", "mean", "var"])
    return g.model(g.norm(y, 4))


# --- who else reads --------------------------------------------------------------------------------------------------


def two_readers():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6)
    return g.model(g.norm(y, 6), g.add("Relu", y))


case("second-consumer")(two_readers)
CASES["two_readers_duplicated"] = Case(two_readers, [INTO], ["Conv", "Conv", "Relu"], options={"duplicate": True})


def output_between():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6)
    return g.model(y, g.norm(y, 6))


case("graph-output")(output_between)
CASES["output_between_duplicated"] = Case(output_between, [INTO], ["Conv", "Conv"], options={"duplicate": True})


@case(INTO, INTO, operators=["Conv", "Conv"], options={"duplicate": True})
def two_norms_of_one_conv():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6)
    return g.model(g.norm(y, 6), g.norm(y, 6))


@case(INTO, operators=["MatMul", "MatMul", "Add"], options={"duplicate": True})
def matmul_duplicated():
    g = Graph(3, 4)
    y = g.add("MatMul", "x", g.const(g.normal(4, 6)))
    return g.model(y, g.norm(y, 6))


@case(INTO, operators=["MatMul", "Add", "MatMul", "Add", "Relu"], options={"duplicate": True})
def matmul_and_add_duplicated():
    g = Graph(3, 4)
    y = g.add("Add", g.add("MatMul", "x", g.const(g.normal(4, 6))), g.const(g.rng.normal(size=6)))
    return g.model(g.norm(y, 6), g.add("Relu", y))


@case("second-consumer", BEHIND, operators=["BatchNormalization", "Relu", "Conv"], options={"duplicate": True})
def nothing_is_copied_that_something_behind_takes_in():
    g = Graph(2, 4, 9, 8)
    y = g.norm("x", 4)
    return g.model(g.add("Relu", y), g.conv(g.norm(y, 4), 4, 6))


@case(INTO, operators=["Conv", "Conv", "Add", "Relu"], options={"duplicate": True})
def what_only_the_copy_was_read_for_goes():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6)
    z = g.add("Add", y, g.const(g.rng.normal(size=(6, 1, 1))))
    return g.model(g.norm(z, 6), g.add("Relu", y))


@case("second-consumer")
def convolution_inside_a_trail_read_twice():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 6)
    z = g.norm(g.add("Add", y, g.const(g.rng.normal(size=(6, 1, 1)))), 6)
    return g.model(g.add("Add", y, z))


# --- where parameters come from --------------------------------------------------------------------------------------


@case(INTO, INTO, operators=["Conv", "Conv"])
def shared_weight():
    g = Graph(2, 4, 9, 8)
    weight = g.const(g.normal(6, 4, 3, 3))
    return g.model(g.norm(g.conv("x", 4, 6, weight=weight), 6), g.norm(g.conv("x", 4, 6, weight=weight), 6))


@case(INTO, INTO, operators=["Conv", "Conv"])
def shared_bias():
    g = Graph(2, 4, 9, 8)
    bias = g.const(g.rng.normal(size=6))
    first, second = (g.add("Conv", "x", g.const(g.normal(6, 4, 3, 3)), bias) for _ in range(2))
    return g.model(g.norm(first, 6), g.norm(second, 6))


@case(INTO, INTO, operators=["Conv", "Conv"])
def shared_norm():
    g = Graph(2, 4, 9, 8)
    constants = g.norm_constants("shared", 6)
    return g.model(*(g.norm(g.conv("x", 4, 6), 6, constants=constants) for _ in range(2)))


@case(INTO, operators=["Conv"])
def everything_from_constant_nodes():
    g = Graph(2, 4, 9, 8)
    g.norm(g.conv("x", 4, 6), 6)
    out = g.nodes[-1].output[0]
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in g.initializers]
    g.nodes, g.initializers = nodes + g.nodes, []
    return g.model(out)


@case(INTO, operators=["Conv"])
def weight_from_constant_node():
    g = Graph(2, 4, 9, 8)
    y = g.norm(g.conv("x", 4, 6, weight="weight"), 6)
    value = helper.make_tensor("value", TensorProto.FLOAT, (6, 4, 3, 3), g.normal(6, 4, 3, 3).ravel())
    g.nodes.insert(0, helper.make_node("Constant", [], ["weight"], value=value))
    return g.model(y)


@case(INTO, operators=["Conv"])
def norm_from_constants_of_other_kinds():
    g = Graph(2, 4, 9, 8)
    y = g.conv("x", 4, 3)
    scale = g.add("Identity", g.add("Constant", value_floats=[0.5, 2.0, -1.5]))
    bias = g.add("ConstantOfShape", g.const([3], dtype=np.int64), value=helper.make_tensor("v", 1, [1], [0.25]))
    mean = g.add("ConstantOfShape", g.add("Constant", value_ints=[3]))
    var = g.add("Sqrt", g.add("Mul", g.const([1.0, 2.0, 3.0]), g.const(2.0)))
    return g.model(g.norm(y, 3, constants=[scale, bias, mean, var]))


@case(INTO, operators=["Conv"])
def weight_from_an_expression():
    g = Graph(2, 4, 9, 8)
    flat = g.const(g.normal(6, 36))
    weight = g.add("Reshape", g.add("Mul", flat, g.const(0.5)), g.const([6, 4, 3, 3], dtype=np.int64))
    bias = g.add("Squeeze", g.const(g.rng.normal(size=(1, 6))), g.const([0], dtype=np.int64))
    return g.model(g.norm(g.add("Conv", "x", weight, bias), 6))


@case(INTO, operators=["ConstantOfShape", "Conv", "Unsqueeze", "Add"])
def constant_that_is_read_elsewhere_too():
    g = Graph(2, 4, 9, 8)
    bias = g.add("ConstantOfShape", g.const([6], dtype=np.int64), value=helper.make_tensor("v", 1, [1], [0.25]))
    y = g.norm(g.add("Conv", "x", g.const(g.normal(6, 4, 3, 6)), bias), 6)
    return g.model(g.add("Add", y, g.add("Unsqueeze", bias, g.const([1, 2], dtype=np.int64))))


@case("non-constant-parameter")
def weight_from_an_input():
    g = Graph(2, 4, 9, 8)
    g.inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [6, 4, 3, 3]))
    return g.model(g.norm(g.conv("x", 4, 6, weight="w"), 6))


@case("non-constant-parameter")
def norm_with_a_parameter_from_an_input():
    g = Graph(2, 4, 9, 8)
    g.inputs.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [6]))
    constants = ["scale", *g.norm_constants("bn", 6)[1:]]
    return g.model(g.norm(g.conv("x", 4, 6), 6, constants=constants))


def overridable(name):
    g = Graph(2, 4, 9, 8)
    model = g.model(g.norm(g.conv("x", 4, 6, name="conv"), 6, name="bn"))
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, tensor.dims))
    return model


for parameter in ("conv.weight", "conv.bias", "bn.weight", "bn.running_var"):
    CASES[f"overridable_{parameter}"] = Case(lambda name=parameter: overridable(name), ["overridable-parameter"])


@case("quantized-weight")
def quantized_weight():
    g = Graph(2, 4, 9, 8)
    codes = g.const(g.rng.integers(-127, 127, (6, 4, 3, 3)), dtype=np.int8)
    weight = g.add("DequantizeLinear", codes, g.const(0.01))
    return g.model(g.norm(g.add("Conv", "x", weight), 6))


# --- what cannot be folded -------------------------------------------------------------------------------------------


@case("training-mode")
def training_with_unused_outputs():
    g = Graph(2, 4, 9, 8)
    return g.model(g.norm(g.conv("x", 4, 6), 6, training_mode=1, outputs=["y", "mean", "var"]))


@case("training-mode")
def training_by_outputs_before_opset_14():
    g = Graph(2, 4, 9, 8, opset=13)
    return g.model(g.norm(g.conv("x", 4, 6), 6, outputs=["y", "mean", "var", "saved_mean", "saved_var"]))


@case("spatial-0")
def statistics_for_every_position():
    g = Graph(2, 4, 5, 5, opset=8)
    y = g.conv("x", 4, 2, bias=False)
    constants = [g.const(np.abs(g.rng.normal(size=(2, 3, 3))) + 0.5) for _ in range(4)]
    return g.model(g.norm(y, 2, constants=constants, spatial=0))


@case("invalid-parameter")
def negative_variance():
    g = Graph(2, 4, 9, 8)
    constants = [g.const(v) for v in (np.ones(6), np.zeros(6), np.zeros(6), [1.0, 1, -1, 1, 1, 1])]
    return g.model(g.norm(g.conv("x", 4, 6), 6, constants=constants))


# --- narrow and mixed dtypes -----------------------------------------------------------------------------------------


@case(INTO, operators=["Conv"], tolerance=5e-3)
def float16():
    g = Graph(2, 4, 9, 8, dtype=np.float16)
    return g.model(g.norm(g.conv("x", 4, 6), 6))


@case(INTO, operators=["Conv"])
def float64():
    g = Graph(2, 4, 9, 8, dtype=np.float64)
    return g.model(g.norm(g.conv("x", 4, 6), 6))


@case(INTO, operators=["Conv"], tolerance=5e-3)
def float16_conv_and_float32_norm():
    g = Graph(2, 4, 9, 8, dtype=np.float16)
    return g.model(g.norm(g.conv("x", 4, 6), 6, dtype=np.float32))


@case(INTO, operators=["Cast", "Conv", "Cast"], tolerance=5e-2)
def bfloat16():
    g = Graph(2, 4, 9, 8, opset=22)
    x = g.add("Cast", "x", to=TensorProto.BFLOAT16)
    g.dtype = np.dtype(ml_dtypes.bfloat16)
    y = g.norm(g.conv(x, 4, 6), 6)
    g.dtype = np.dtype(np.float32)
    return g.model(g.add("Cast", y, to=TensorProto.FLOAT))


@case("no-linear-neighbour")
def cast_between():
    g = Graph(2, 4, 9, 8, dtype=np.float16)
    y = g.add("Cast", g.conv("x", 4, 6), to=TensorProto.FLOAT)
    g.dtype = np.dtype(np.float32)
    return g.model(g.norm(y, 6))


def narrow(scale):
    """Return a model with a scale that float16 holds, and a product in channel 2 that it does not."""
    g = Graph(2, 4, 9, 8, dtype=np.float16)
    y = g.conv("x", 4, 6, bias=False)
    scales = np.ones(6)
    scales[2] = scale
    constants = [g.const(value) for value in (scales, np.zeros(6), np.zeros(6), np.full(6, 1e-2))]
    return g.model(g.norm(y, 6, constants=constants))


@case("overflow")
def float16_overflow():
    return narrow(6e4)


@case("underflow", tolerance=5e-3)
def float16_underflow():
    return narrow(1e-6)


# --- subgraphs and functions -----------------------------------------------------------------------------------------


def branch(key, *, weight=None, producer=True):
    """Return a branch that normalises the outer ``y``, behind a convolution of its own or without one."""
    b = Graph(prefix=key, seed=len(key))
    y = b.norm(b.conv("y", 4, 4, (1, 1), weight=weight) if producer else "y", 4)
    value = helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 4, 7, 6])
    return helper.make_graph(b.nodes, key, [], [value], b.initializers)


@case(INTO, INTO, "outer-scope", "no-linear-neighbour")
def if_branches():
    """Two batch norms outside, one in each branch; one branch reads a weight of the outer graph."""
    g = Graph(2, 4, 9, 8)
    g.norm(g.conv("x", 4, 4), 4, outputs=["y0"])
    g.add("Conv", "y0", g.const(g.normal(4, 4, 1, 1)), outputs=["y"])
    condition = g.add("Greater", g.add("ReduceSum", "x", keepdims=0), g.const(0.0))
    branches = {"else_branch": branch("else", weight="shared"), "then_branch": branch("then", producer=False)}
    g.const(g.normal(4, 4, 1, 1), "shared")
    g.add("If", condition, outputs=["z"], name="branch", **branches)
    return g.model(g.norm(g.add("Abs", "z"), 4))


@case(INTO, operators=["Loop"])
def loop_body():
    b = Graph(prefix="body")
    y = b.norm(b.conv("state", 4, 4, (1, 1)), 4)
    keep = b.add("Identity", "keep_in")
    body = helper.make_graph(
        b.nodes,
        "body",
        [
            helper.make_tensor_value_info("iteration", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 4, 5, 5]),
        ],
        [
            helper.make_tensor_value_info(keep, TensorProto.BOOL, []),
            helper.make_tensor_value_info(y, TensorProto.FLOAT, [2, 4, 5, 5]),
        ],
        b.initializers,
    )
    g = Graph(2, 4, 5, 5)
    trips, start = g.const(3, dtype=np.int64), g.const(True, dtype=np.bool_)
    return g.model(g.add("Loop", trips, start, "x", body=body), shape=[2, 4, 5, 5])


@case(INTO, operators=["Scan"])
def scan_body():
    b = Graph(prefix="body")
    y = b.norm(b.add("Gemm", "row", b.const(b.normal(4, 6))), 6)
    body = helper.make_graph(
        b.nodes,
        "body",
        [helper.make_tensor_value_info("row", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, [3, 6])],
        b.initializers,
    )
    g = Graph(5, 3, 4)
    return g.model(g.add("Scan", "x", body=body, num_scan_inputs=1))


def function_model(**attributes):
    """Return a model that calls a function, whose constants are Constant nodes."""
    b = Graph(opset=17, prefix="f")
    y = b.norm(b.conv("a", 4, 6), 6, **attributes)
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in b.initializers]
    function = helper.make_function(
        "local", "block", ["a"], [y], nodes + b.nodes, [helper.make_opsetid("", 17)], ["epsilon"] if attributes else []
    )
    g = Graph(2, 4, 9, 8)
    call = {"epsilon": 0.5} if attributes else {}
    y = g.add("block", "x", domain="local", **call)
    return function, g, y


@case(INTO, operators=["block"])
def model_function():
    function, g, y = function_model()
    return g.model(y, functions=[function])


@case("attribute-reference")
def model_function_with_an_attribute():
    function, g, y = function_model(epsilon=0.5)
    attribute = next(a for a in function.node[-1].attribute if a.name == "epsilon")
    attribute.ClearField("f")
    attribute.ref_attr_name = "epsilon"
    return g.model(y, functions=[function])


@case("non-constant-parameter")
def model_function_with_parameters_as_inputs():
    b = Graph(opset=17, prefix="f")
    names = ["a", "w", "scale", "bias", "mean", "var"]
    y = b.norm(b.add("Conv", "a", "w"), 6, constants=names[2:])
    function = helper.make_function("local", "block", names, [y], b.nodes, [helper.make_opsetid("", 17)])
    g = Graph(2, 4, 9, 8)
    weight = g.const(g.normal(6, 4, 3, 3))
    y = g.add("block", "x", weight, *g.norm_constants("bn", 6), domain="local")
    return g.model(y, functions=[function])
