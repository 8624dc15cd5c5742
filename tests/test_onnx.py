"""Folding ONNX models: every graph is folded, checked, and run beside the original."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_graphs import CASES
from onnx_models import Graph, light_model
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from fastbn._onnx_compare import compare, difference, input_shapes, random_inputs, required_inputs
from fastbn.onnx import REASONS, fold, read, save

INTO, BEHIND = "into-producer", "into-consumer"


def run(model, inputs):
    """Run a model in ONNX Runtime, or, where that has no kernel for it, in onnx's own evaluator."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    except (errors.NotImplemented, errors.Fail):  # the latter for an opset newer than it knows
        return ReferenceEvaluator(model).run(None, inputs)
    return session.run(None, inputs)


def norms_of(model):
    return [node for node in model.graph.node if node.op_type == "BatchNormalization"]


def assert_same_function(original, folded, tolerance, inputs=None):
    inputs = inputs or random_inputs(original, input_shapes(original, {}))
    expected, actual = run(original, inputs), run(folded, inputs)
    assert len(expected) == len(actual) > 0
    for name, one, other in zip([value.name for value in original.graph.output], expected, actual, strict=True):
        assert one.dtype == other.dtype
        assert np.abs(np.asarray(one, np.float64)).max() > 1e-3, "a degenerate output proves nothing"
        assert difference(name, one, other).max_rel <= tolerance


# --- every kind of graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_graph(name):
    case = CASES[name]
    model = case.build()
    onnx.checker.check_model(model, full_check=True)
    given = model.SerializeToString(deterministic=True)

    result = fold(model, **case.options)

    assert [entry.reason for entry in result.report] == case.reasons
    assert all(entry.folded == entry.reason.startswith("into-") for entry in result.report)
    assert result.folded == sum(reason.startswith("into-") for reason in case.reasons)
    assert result.kept == len(case.reasons) - result.folded
    assert model.SerializeToString(deterministic=True) == given, "the given model was modified"
    onnx.checker.check_model(result.model, full_check=True)
    for kind in ("input", "output"):
        kept = [value for value in getattr(result.model.graph, kind) if value in getattr(model.graph, kind)]
        if model.ir_version >= 4:
            assert kept == list(getattr(model.graph, kind))
    assert list(required_inputs(result.model)) == list(required_inputs(model))
    if case.operators is not None:
        assert [node.op_type for node in result.model.graph.node] == case.operators
    if not result.folded:
        assert result.model == model
    else:
        assert_same_function(model, result.model, case.tolerance)

    inferred = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(fold(inferred, **case.options).model, full_check=True)
    again = fold(result.model, **case.options)
    assert again.folded == 0
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
    assert fold(model, **case.options).model.SerializeToString() == result.model.SerializeToString()


def test_cases_cover_every_reason():
    seen = {reason for case in CASES.values() for reason in case.reasons}
    assert seen == set(REASONS) - {"mixed-dtype", "unsupported-dtype"}  # below


def test_dtypes_that_do_not_go_together_are_left_alone():
    """No valid model has them, but some files do."""
    for name, dtype, reason in (
        ("conv.bias", np.float16, "mixed-dtype"),
        ("conv.weight", np.int32, "unsupported-dtype"),
    ):
        graph = Graph(1, 4, 8, 8)
        model = graph.model(graph.norm(graph.conv("x", 4, 6, name="conv"), 6))
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), name))
        result = fold(model)
        assert [entry.reason for entry in result.report] == [reason]
        assert result.model == model


@pytest.mark.parametrize("opset", range(7, onnx.defs.onnx_opset_version() + 1))
def test_opsets(opset):
    graph = Graph(1, 4, 8, 8, opset=opset)
    x = graph.add("Relu", graph.norm(graph.conv("x", 4, 6), 6))
    x = graph.conv(graph.norm(x, 6), 6, 5)
    model = graph.model(graph.norm(graph.norm(x, 5), 5))
    result = fold(model)
    assert [entry.reason for entry in result.report] == [INTO, BEHIND, INTO, INTO]
    onnx.checker.check_model(result.model, full_check=True)
    assert result.model.opset_import == model.opset_import
    assert result.model.ir_version == model.ir_version
    assert_same_function(model, result.model, 1e-5)


@pytest.mark.parametrize("dtype", (np.float64, np.float32))
def test_accuracy(dtype):
    """Double precision folds to double precision."""
    graph = Graph(2, 4, 8, 8, dtype=dtype)
    model = graph.model(graph.norm(graph.conv("x", 4, 6), 6))
    assert_same_function(model, fold(model).model, 100 * np.finfo(dtype).eps)


# --- what is preserved -----------------------------------------------------------------------------------------------


def test_everything_else_is_preserved():
    graph = Graph("batch", 4, "height", 8)
    y = graph.conv("x", 4, 6, name="first", pads=[1, 1, 1, 1])
    z = graph.norm(y, 6, name="bn")
    out = graph.add("Sigmoid", graph.add("Relu", z, name="relu"), name="sigmoid", outputs=["result"])
    model = graph.model(out)
    model.doc_string, model.domain, model.model_version = "about", "org.example", 3
    helper.set_model_props(model, {"author": "someone"})
    model.graph.doc_string = "about the graph"
    model.graph.node[0].doc_string = "about the convolution"
    shape = ["batch", 6, "height", 8]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (y, z, "relu_out")]
    model.graph.value_info.extend(infos)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "unused"))
    model.graph.initializer[0].doc_string = "about the weight"
    for name in (y, z):
        model.graph.quantization_annotation.add(tensor_name=name)

    folded = fold(model).model

    for field in ("doc_string", "domain", "model_version", "producer_name", "metadata_props", "opset_import"):
        assert getattr(folded, field) == getattr(model, field)
    assert folded.graph.name == model.graph.name
    assert folded.graph.doc_string == model.graph.doc_string
    assert folded.graph.input == model.graph.input
    assert folded.graph.output == model.graph.output
    assert list(folded.graph.value_info) == infos[1:], (
        "that of the convolution's old output is gone, the others are true"
    )
    assert folded.graph.node[0].doc_string == "about the convolution"
    assert folded.graph.node[0].attribute == model.graph.node[0].attribute
    assert list(folded.graph.node[1:]) == list(model.graph.node[2:])
    assert [tensor.name for tensor in folded.graph.initializer] == ["first.weight", "first.bias", "unused"]
    assert folded.graph.initializer[0].doc_string == "about the weight"
    assert [entry.tensor_name for entry in folded.graph.quantization_annotation] == [z]


def test_what_a_training_algorithm_reads_is_kept():
    """It is the continuation of the main graph."""
    graph = Graph(1, 4, 9, 8)
    y = graph.conv("x", 4, 6)
    model = graph.model(graph.norm(y, 6))
    loss = helper.make_tensor_value_info("loss", TensorProto.FLOAT, [])
    step = helper.make_graph([helper.make_node("ReduceMean", [y], ["loss"], keepdims=0)], "step", [], [loss])
    model.training_info.add().algorithm.CopyFrom(step)
    result = fold(model)
    assert [entry.reason for entry in result.report] == ["graph-output"]
    assert result.model == model


def test_shared_weights_are_cloned():
    graph = Graph(1, 4, 8, 8)
    weight = graph.const(graph.normal(4, 4, 3, 3), "shared")
    outputs = [graph.norm(graph.conv("x", 4, 4, weight=weight), 4) for _ in range(2)]
    plain = graph.conv("x", 4, 4, weight=weight)
    model = graph.model(*outputs, plain)
    folded = fold(model).model
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in folded.graph.initializer}
    assert np.array_equal(stored["shared"], numpy_helper.to_array(model.graph.initializer[0]))
    weights = [node.input[1] for node in folded.graph.node]
    assert weights[2] == "shared"
    assert len(set(weights)) == 3


def test_model_of_ir_3_keeps_its_form():
    """There every initializer is declared as an input; the inputs that must be fed stay as they were."""
    graph = Graph(1, 4, 8, 8, opset=8)
    model = graph.model(graph.norm(graph.conv("x", 4, 6, bias=False), 6))
    folded = fold(model).model
    assert folded.ir_version == 3
    assert {value.name for value in folded.graph.input} == {"x"} | {t.name for t in folded.graph.initializer}
    assert len(folded.graph.initializer) == 2


def test_external_data_is_read_and_written(tmp_path):
    graph = Graph(1, 4, 8, 8)
    y = graph.norm(graph.conv("x", 4, 16), 16)
    model = graph.model(graph.add("Reshape", y, graph.const([1, -1], dtype=np.int64)))
    path, target = tmp_path / "model.onnx", tmp_path / "folded.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin")
    assert read(path)[1] == {tmp_path / "weights.bin"}
    result = fold(path)
    assert result.model == fold(model).model
    save(result.model, target, external=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "folded.onnx",
        "folded.onnx.data",
        "model.onnx",
        "weights.bin",
    ]
    onnx.checker.check_model(target, full_check=True)  # which, as ONNX Runtime, wants the Reshape's sizes at hand
    assert all(d.max_rel < 1e-6 for d in compare(path, target, random_inputs(model, input_shapes(model, {}))))
    save(result.model, tmp_path / ("a" * 250 + ".onnx"))

    with pytest.raises(ValueError, match=r"weights\.bin.*give the path"):
        fold(onnx.load(path, load_external_data=False))
    outside = onnx.load(path)
    outside.graph.initializer.add(name="unused", data_type=TensorProto.FLOAT, dims=[1], data_location="EXTERNAL")
    with pytest.raises(ValueError, match="unused lie in the external file"):
        fold(outside)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(OSError, match="external data"):
        fold(path)


def test_external_data_of_a_sparse_initializer(tmp_path):
    graph = Graph(1, 4, 8, 8)
    y = graph.norm(graph.conv("x", 4, 3, kernel=(1, 1)), 3)
    values = numpy_helper.from_array(np.ones(2, np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([0, 5]), "indices")
    dense = graph.model(graph.add("Add", y, graph.const(np.eye(1, 8), "sparse")))
    model = onnx.ModelProto()
    model.CopyFrom(dense)
    model.graph.initializer.remove(model.graph.initializer[-1])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "values").write_bytes(values.raw_data)
    values.ClearField("raw_data")
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="values")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    (tmp_path / "in" / "model.onnx").write_bytes(model.SerializeToString())
    assert read(tmp_path / "in" / "model.onnx")[1] == {tmp_path / "in" / "values"}
    result = fold(tmp_path / "in" / "model.onnx")
    assert result.folded == 1
    save(result.model, tmp_path / "model.onnx")
    inputs = random_inputs(dense, input_shapes(dense, {}))
    assert all(d.max_rel < 1e-6 for d in compare(tmp_path / "in" / "model.onnx", tmp_path / "model.onnx", inputs))


def branches(then_branch, else_branch, *inputs):
    """A model that is one If, with what both branches read from outside."""
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["z"], name="if", then_branch=then_branch, else_branch=else_branch)],
        "main",
        [*inputs, helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize("order", ((2, 3), (3, 2)))
def test_the_same_name_in_two_branches_is_two_values(order):
    """Of which one has two axes, so that MatMul gives channels last, and the other three."""

    def branch(rank):
        body = Graph(prefix=f"r{rank}_", seed=rank)
        weight = body.const(body.normal(4, 5))
        body.nodes.append(helper.make_node("MatMul", [f"x{rank}", weight], ["h"], name=f"matmul{rank}"))
        y = body.norm("h", 5)
        body.add("Flatten", y, outputs=[f"z{rank}"])
        graph = body.graph()
        graph.output.append(helper.make_tensor_value_info(f"z{rank}", TensorProto.FLOAT, [None, None]))
        return graph

    shapes = {"x2": (2, 4), "x3": (2, 5, 4)}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    model = branches(*map(branch, order), *inputs)
    result = fold(model)
    assert {entry.output: entry.folded for entry in result.report} == {"r2_bn2_out": True, "r3_bn2_out": False}
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for which in (True, False):
        (expected,), (actual,) = (run(each, arrays | {"c": np.array(which)}) for each in (model, result.model))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_an_inner_constant_by_the_name_of_an_outer_one():
    """What an outer node reads under that name is another value."""

    def branch(key):
        body = Graph(prefix=key)
        body.const(np.full((1, 1, 1, 1), 2), "a")
        weight = body.add("Add", "a", "b")
        body.add("Identity", body.norm(body.add("Conv", "x", weight), 1), outputs=[f"{key}z"])
        graph = body.graph()
        graph.output.append(helper.make_tensor_value_info(f"{key}z", TensorProto.FLOAT, None))
        return graph

    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 1, 1, 1))
    model = branches(branch("then"), branch("else"), shape)
    model.graph.node.insert(0, helper.make_node("Neg", ["a"], ["b"]))
    model.graph.initializer.append(numpy_helper.from_array(np.full((1, 1, 1, 1), 10, np.float32), "a"))
    result = fold(model)
    assert result.folded == 2
    assert_same_function(model, result.model, 1e-6, {"x": np.ones((1, 1, 1, 1), np.float32), "c": np.array(True)})


def test_a_layer_without_channels_holds_up_nothing():
    graph = Graph(1, 4, 9, 8)
    other = graph.norm(graph.conv("x", 4, 6), 6)
    model = graph.model(other, graph.norm(graph.conv("x", 4, 0), 0))
    result = fold(model)
    assert result.folded == 2
    inputs = random_inputs(model, input_shapes(model, {}))
    assert [output.shape for output in run(result.model, inputs)] == [(1, 6, 7, 6), (1, 0, 7, 6)]


@pytest.mark.parametrize("op", ("Identity", "Dropout", "Relu"))
def test_a_reader_in_a_branch_keeps_the_norm(op):
    def branch(name, op):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["y"], [name])], name, [], [value])

    graph = Graph(1, 3, 4, 4)
    graph.norm("x", 3, outputs=["y"])
    graph.inputs.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    graph.add("If", "c", outputs=["z"], then_branch=branch("t", op), else_branch=branch("e", "Neg"))
    model = helper.make_model(graph.graph("z"), opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    result = fold(model)
    assert result.model == model
    assert [entry.reason for entry in result.report] == ["no-linear-neighbour"]


def test_an_axis_may_be_a_scalar():
    graph = Graph(3, 4)
    weight, axis = graph.const(graph.normal(4, 5)), graph.const(np.array(2), dtype=np.int64)
    model = graph.model(graph.norm(graph.add("Unsqueeze", graph.add("Gemm", "x", weight), axis), 5), shape=(3, 5, 1))
    result = fold(model)
    assert result.folded == 1
    assert_same_function(model, result.model, 1e-6)


# --- the report ------------------------------------------------------------------------------------------------------


def test_report_figures():
    graph = Graph(1, 4, 8, 8)
    y = graph.conv("x", 4, 4, name="conv", groups=2)
    values = ([2.0, 0.0, -8.0, 1.0], [0.0] * 4, [0.0] * 4, [1.0, 1.0, 4.0, 1e-9])
    constants = [graph.const(value) for value in values]
    z = graph.norm(y, 4, name="bn", constants=constants, epsilon=1e-3, outputs=["normalised"])
    result = fold(graph.model(z))
    (entry,) = result.report
    assert (entry.name, entry.output, entry.op, entry.into) == ("bn", "normalised", "Conv", "conv")
    assert (entry.folded, entry.reason, entry.groups, entry.channels) == (True, INTO, 2, 4)
    assert entry.sentence.endswith("conv")
    assert entry.min_scale == 0
    assert entry.max_scale == pytest.approx(1 / np.sqrt(1e-3), rel=1e-4)
    assert (entry.zero_weight, entry.tiny_variance, entry.overflow, entry.underflow) == (1, 1, 0, 0)
    assert (result.before.nodes, result.after.nodes) == (2, 1)
    assert result.before.bytes - result.after.bytes == 4 * 4 * 4
    with pytest.raises(AttributeError):
        entry.name = "other"


def test_report_is_in_graph_order_and_names_the_scope():
    report = fold(CASES["if_branches"].build()).report
    assert [entry.scope for entry in report] == ["", "branch/else_branch/", "branch/then_branch/", ""]
    assert [entry.scope for entry in fold(CASES["model_function"].build()).report] == ["block/"]


def test_overflow_is_counted():
    (entry,) = fold(CASES["float16_overflow"].build()).report
    assert entry.overflow == 1
    assert "channel 2" in entry.sentence
    (entry,) = fold(CASES["float16_underflow"].build()).report
    assert entry.underflow == 1


def test_progress():
    graph = Graph(1, 4, 8, 8)
    model = graph.model(graph.norm(graph.add("Relu", graph.norm(graph.conv("x", 4, 6), 6)), 6))
    calls = []
    fold(model, progress=lambda done, total: calls.append((done, total)))
    assert calls[:2] == [(1, 2), (2, 2)]
    assert all(call == (2, 2) for call in calls[2:])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        fold(tmp_path / "absent.onnx")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is text, not a model")
    with pytest.raises(ValueError, match="not an ONNX model"):
        fold(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no graph"):
        fold(str(path))
    path.write_bytes(CASES["conv_2d"].build().SerializeToString()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        fold(path)
    with pytest.raises(ValueError, match="no graph"):
        fold(onnx.ModelProto())
    for thing in (42, None, b"bytes", CASES["conv_2d"].build().graph):
        with pytest.raises(TypeError, match=f"got {type(thing).__name__}"):
            fold(thing)
    model = CASES["conv_2d"].build()
    for version in (6, 999):
        model.opset_import[0].version = version
        with pytest.raises(ValueError, match=f"opset {version} is not supported, only 7 to"):
            fold(model)


# --- real networks ---------------------------------------------------------------------------------------------------

NETWORKS = {"resnet50": (53, 0), "inception_v2": (69, 0), "shufflenet": (49, 0), "densenet121": (59, 62)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = light_model(name)
    result = fold(model)
    assert (result.folded, result.kept) == NETWORKS[name]
    onnx.checker.check_model(result.model, full_check=True)
    assert_same_function(model, result.model, 1e-5)
    shuffled = [entry.groups for entry in result.report if entry.groups > 1]
    assert bool(shuffled) == (name == "shufflenet")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_weights_from_constant_of_shape(name):
    """As the onnx package ships them."""
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    result = fold(path)
    assert (result.folded, result.kept) == NETWORKS[name]
    onnx.checker.check_model(result.model, full_check=True)


PEAK = """
import re, sys, time
from pathlib import Path

def peak():
    return 1024 * int(re.search("VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
RESNET = (
    PEAK
    + """
import numpy as np
from fastbn.onnx import fold, read, save

model, _ = read(sys.argv[1])
begin = time.process_time()
result = fold(model)
seconds = time.process_time() - begin
assert result.folded == 53
del model
save(result.model, sys.argv[2])
print(seconds, peak(), result.before.bytes)
"""
)
IMPORTS = PEAK + "import fastbn.onnx; print(peak())"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_resnet_takes_two_seconds_and_three_times_its_size(tmp_path):
    source = tmp_path / "resnet50.onnx"
    source.write_bytes(light_model("resnet50").SerializeToString())

    def figures(*arguments):
        output = subprocess.run([sys.executable, "-c", *arguments], check=True, capture_output=True, text=True).stdout
        return [float(word) for word in output.split()]

    (base,) = figures(IMPORTS)
    seconds, peak, size = figures(RESNET, str(source), str(tmp_path / "folded.onnx"))
    assert seconds < 2
    assert peak - base < 3 * size


# --- graphs that break ONNX's rules, most of them found by .ci/fuzz_onnx.py ------------------------------------------


def edited(name, edit):
    """Build a hand-made graph and spoil it."""
    model = CASES[name].build()
    edit(model.graph)
    return model


def conv_reads_the_norm(graph):
    graph.node[0].input[0] = graph.node[1].output[0]


def a_parameter_is_the_input(graph):
    graph.node[1].input[1] = "x"


def pads_are_a_number(graph):
    graph.node[0].ClearField("attribute")
    graph.node[0].attribute.append(helper.make_attribute("group", "two"))


SPOILT = {
    "is read before it is given": lambda graph: graph.node.append(graph.node.pop(0)),
    "bn2_out, an output of bn2, is read before": conv_reads_the_norm,
    "is given twice": lambda graph: graph.node.append(graph.node[1]),
    "not a valid ONNX model: .*bn2": lambda graph: graph.node[1].ClearField("input"),
    "not a valid ONNX model: .*group": pads_are_a_number,
}


@pytest.mark.parametrize("complaint", SPOILT)
def test_a_graph_that_breaks_the_rules_is_an_error_that_says_how(complaint):
    with pytest.raises(ValueError, match=complaint):
        fold(edited("conv_2d", SPOILT[complaint]))


def test_a_parameter_that_is_an_input_stays():
    (entry,) = fold(edited("conv_2d", a_parameter_is_the_input)).report
    assert not entry.folded
    assert entry.reason == "non-constant-parameter"


def test_a_size_that_is_declared_but_not_there_makes_no_second_file(tmp_path):
    model = CASES["conv_2d"].build()
    model.graph.initializer.add(name="idle", data_type=TensorProto.FLOAT, dims=[2**40])
    save(fold(model).model, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_constant_that_overflows_warns_nobody():
    g = Graph(2, 4, 9, 8)
    weight = g.add("Mul", g.const(np.full((6, 4, 3, 3), 3e38)), g.const(3e38))
    (entry,) = fold(g.model(g.norm(g.conv("x", 4, 6, weight=weight), 6))).report
    assert entry.folded  # infinite before, and so it stays


# --- exports from PyTorch --------------------------------------------------------------------------------------------


BLOCKS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "grouped",
    "depthwise",
    "circular",
    "transposed1d",
    "transposed2d",
    "transposed3d",
    "linear",
    "linear_no_bias",
    "norm_first",
    "chain",
)


def blocks(nn):
    """Return a network for each of ``BLOCKS``, with the shape of its input."""
    return {
        "conv1d": ((2, 4, 16), nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU())),
        "conv2d": ((2, 4, 9, 9), nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())),
        "conv3d": ((2, 4, 5, 5, 5), nn.Sequential(nn.Conv3d(4, 6, 3, bias=False), nn.BatchNorm3d(6))),
        "grouped": ((2, 4, 9, 9), nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.BatchNorm2d(8))),
        "depthwise": ((2, 4, 9, 9), nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4))),
        "circular": (
            (2, 4, 9, 9),
            nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)),
        ),
        "transposed1d": ((2, 4, 9), nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6))),
        "transposed2d": ((2, 4, 9, 9), nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))),
        "transposed3d": ((2, 4, 4, 4, 4), nn.Sequential(nn.ConvTranspose3d(4, 6, 2, stride=2), nn.BatchNorm3d(6))),
        "linear": ((5, 4), nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))),
        "linear_no_bias": ((5, 4), nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False))),
        "norm_first": ((2, 4, 9, 9), nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))),
        "chain": ((2, 4, 9, 9), nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.BatchNorm2d(6))),
    }


def export(torch, network, shape):
    """Export without the folding that the exporter itself can do."""
    x = torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mode = torch.onnx.TrainingMode.PRESERVE
        buffer = io.BytesIO()
        torch.onnx.export(network, (x,), buffer, dynamo=False, training=mode, do_constant_folding=False)
    return onnx.load_from_string(buffer.getvalue()), x


@pytest.mark.parametrize("kind", BLOCKS)
def test_pytorch_exports(torch, kind):
    torch.manual_seed(0)
    shape, network = blocks(torch.nn)[kind]
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    network.eval()
    model, x = export(torch, network, shape)
    norms = norms_of(model)
    assert norms
    result = fold(model)
    assert (result.folded, result.kept) == (len(norms), 0)
    assert not norms_of(result.model)
    onnx.checker.check_model(result.model, full_check=True)
    (y,) = run(result.model, {model.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        expected = network(x).numpy()
    assert difference("y", expected, y).max_rel < 1e-5
