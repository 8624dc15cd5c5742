"""``fastbn fold``: what it writes, prints and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import CASES
from onnx_models import Graph
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastbn import fold_state_dict
from fastbn._checkpoint import find_pairs
from fastbn._onnx_compare import difference, input_shapes, random_inputs
from fastbn.cli import main
from fastbn.onnx import fold


@pytest.fixture
def model_path(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(CASES["two_convs"].build(), path)
    return path


def fold_json(capsys, *arguments):
    """Run the command with ``--json`` and return its status and its document."""
    status = main(["fold", "--json", *map(str, arguments)])
    output = capsys.readouterr()
    assert not output.err

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return status, json.loads(output.out, parse_constant=refuse)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def spoil(monkeypatch, factor=1.5):
    """Let folding go wrong, so that a check has something to find."""

    def wrong(model, **options):
        result = fold(model, **options)
        bias = next(t for t in result.model.graph.initializer if t.name.endswith("bias"))
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(factor), bias.name))
        return result

    monkeypatch.setattr("fastbn.onnx.fold", wrong)


# --- models ----------------------------------------------------------------------------------------------------------


def test_writes_what_fold_returns(model_path, capsys):
    target = model_path.with_name("out.onnx")
    assert main(["fold", str(model_path), "-o", str(target)]) == 0
    output = capsys.readouterr()
    assert not output.err
    assert onnx.load(target) == fold(model_path).model
    again = model_path.with_name("again.onnx")
    assert main(["fold", str(model_path), "-o", str(again)]) == 0
    assert again.read_bytes() == target.read_bytes()
    again.unlink()
    assert files(model_path.parent) == ["model.onnx", "out.onnx"]
    for words in (
        "bn2",
        "folded -> conv1",
        "into-producer",
        "2 of 2 batch norms folded; nodes 5 -> 3",
        f"written: {target}",
    ):
        assert words in output.out


def test_default_output_stands_beside_the_input(model_path, capsys):
    assert main(["fold", str(model_path)]) == 0
    assert model_path.with_name("model.folded.onnx").exists()
    capsys.readouterr()


def test_table_says_why_each_is_kept(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    onnx.save(CASES["two_readers"].build(), path)
    assert main(["fold", str(path), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "second-consumer: Relu relu3 reads conv1_out too" in output
    assert "0 of 1 batch norms folded" in output
    assert "nothing written" in output
    assert files(tmp_path) == ["model.onnx"]
    assert main(["fold", str(path), "--dry-run", "--duplicate"]) == 0
    assert "folded -> conv1_folded" in capsys.readouterr().out


def test_json(model_path, capsys):
    target = model_path.with_name("out.onnx")
    status, document = fold_json(capsys, model_path, "-o", target)
    assert status == 0
    assert document["input"] == str(model_path)
    assert document["output"] == str(target)
    assert (document["folded"], document["kept"], document["check"]) == (2, 0, None)
    assert [entry["name"] for entry in document["report"]] == ["bn2", "bn5"]
    assert document["report"][0]["reason"] == "into-producer"
    assert document["before"]["nodes"] == 5
    status, document = fold_json(capsys, model_path, "--dry-run", "--check")
    assert (status, document["output"]) == (0, None)
    (output,) = document["check"]["outputs"]
    assert output.keys() == {"name", "max_abs", "max_rel", "max_ulp"}
    assert 0 < output["max_rel"] < 1e-5
    assert document["check"]["tolerance"] == 1e-4
    assert document["check"]["passed"] is True


def test_failed_check_writes_nothing(model_path, capsys, monkeypatch):
    spoil(monkeypatch)
    target = model_path.with_name("out.onnx")
    target.write_text("older")
    status, document = fold_json(capsys, model_path, "-o", target, "--check")
    assert status == 1
    assert document["output"] is None
    assert document["check"]["passed"] is False
    assert main(["fold", str(model_path), "-o", str(target), "--check"]) == 1
    assert "check FAILED" in capsys.readouterr().out
    assert target.read_text() == "older"
    assert files(model_path.parent) == ["model.onnx", "out.onnx"]
    assert main(["fold", str(model_path), "-o", str(target), "--check", "--tolerance", "10"]) == 0
    assert target.read_text(errors="replace") != "older"
    capsys.readouterr()


def test_check_with_infinite_differences_is_strict_json(model_path, capsys, monkeypatch):
    spoil(monkeypatch, np.inf)
    status, document = fold_json(capsys, model_path, "--dry-run", "--check")
    assert status == 1
    assert document["check"]["outputs"][0]["max_rel"] is None


def test_check_on_given_inputs(tmp_path, capsys):
    """The difference that random inputs do not show is found on inputs that do."""
    graph = Graph(2, 4)
    y = graph.add("Gemm", graph.add("Relu", "x"), graph.const(graph.normal(4, 6)), graph.const(graph.normal(6)))
    path, inputs = tmp_path / "model.onnx", tmp_path / "inputs.npz"
    onnx.save(graph.model(graph.norm(y, 6)), path)
    np.savez(inputs, x=np.full((2, 4), 1e6))
    status, document = fold_json(capsys, path, "--dry-run", "--inputs", inputs)
    assert status == 0
    assert document["check"]["outputs"][0]["max_abs"] > 1e-3, "outputs of size 1e6 differ by more than random ones"


def test_inputs_that_are_given_need_not_be_made_up(tmp_path, capsys):
    graph = Graph(2, 4, 9, 8)
    graph.inputs.append(helper.make_tensor_value_info("s", TensorProto.STRING, [2]))
    model = graph.model(graph.norm(graph.conv("x", 4, 5), 5), graph.add("Identity", "s"))
    path, inputs = tmp_path / "model.onnx", tmp_path / "inputs.npz"
    onnx.save(model, path)
    assert main(["fold", str(path), "--check"]) == 2
    assert "cannot make up input s" in one_line(capsys)
    np.savez(inputs, x=np.ones((2, 4, 9, 8), np.float32), s=np.array(["a", "b"]))
    assert main(["fold", str(path), "--check", "--inputs", str(inputs)]) == 0


def test_sizes_that_are_not_positive_are_open():
    model = Graph(-1, 4, 0, 8).model()
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 9
    assert input_shapes(model, {}) == {"x": (1, 4, 224, 9)}
    assert input_shapes(model, {"x": (2, 4, 7, 9)}) == {"x": (2, 4, 7, 9)}
    with pytest.raises(ValueError, match=re.escape("has shape ?,4,?,9, which 2,5,7,9 does not fit")):
        input_shapes(model, {"x": (2, 5, 7, 9)})


def test_dynamic_axes_and_shapes(tmp_path, capsys):
    graph = Graph("batch", 4, "height", "width")
    model = graph.model(graph.norm(graph.conv("x", 4, 6), 6))
    assert input_shapes(model, {}) == {"x": (1, 4, 224, 224)}
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert main(["fold", str(path), "--dry-run", "--shape", "x=2,4,16,9"]) == 0
    assert "check passed" in capsys.readouterr().out


def test_axes_of_one_name_get_one_size():
    value = helper.make_tensor_value_info
    inputs = [value("a", TensorProto.FLOAT, ["n", "t", 3]), value("b", TensorProto.INT64, ["n", "t"])]
    model = helper.make_model(helper.make_graph([], "g", inputs, []))
    assert input_shapes(model, {}) == {"a": (1, 8, 3), "b": (1, 8)}
    assert input_shapes(model, {"b": (2, 5)}) == {"a": (2, 5, 3), "b": (2, 5)}
    drawn = random_inputs(model, input_shapes(model, {}))
    assert drawn["a"].dtype == np.float32
    assert set(np.unique(drawn["b"])) <= {0, 1}


def test_external_data(tmp_path, capsys, monkeypatch):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    model = CASES["two_convs"].build()
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    assert main(["fold", str(source / "model.onnx"), "-o", str(target / "model.onnx"), "--check"]) == 0
    assert files(target) == ["model.onnx", "model.onnx.data"]
    assert fold(target / "model.onnx").report == []
    capsys.readouterr()
    for output in ("weights", "model.onnx"):
        assert main(["fold", str(source / "model.onnx"), "-o", str(source / output)]) == 2
        assert "would overwrite the input" in one_line(capsys)
    monkeypatch.chdir(target)  # where a file of external data is that will be replaced
    assert main(["fold", str(source / "model.onnx"), "-o", "model.onnx", "--check"]) == 0
    assert files(target) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("external", (True, False))
def test_results_have_the_permissions_of_other_files(tmp_path, external):
    """Of new ones, or of those that they replace."""
    model = CASES["two_convs"].build()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=external, location="weights", size_threshold=0)
    save_file(network(("conv", (2, 3, 3, 3)), ("bn", 2)), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    fresh = (tmp_path / "other").stat().st_mode
    for mode in (fresh, fresh ^ 0o022):
        assert main(["fold", str(tmp_path / "model.onnx")]) == 0
        assert main(["fold", str(tmp_path / "model.safetensors"), "--pairs", "auto"]) == 0
        results = list(tmp_path.glob("*.folded.*"))
        assert len(results) == 2 + external
        for path in results:
            assert path.stat().st_mode == mode
            path.chmod(fresh ^ 0o022)


def one_line(capsys):
    output = capsys.readouterr()
    assert not output.out
    assert output.err.count("\n") == 1
    assert output.err.startswith("fastbn fold: error: ")
    return output.err


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["absent.onnx"], "absent.onnx: no such file"),
        (["."], "not a file"),
        (["text.onnx"], "text.onnx is not an ONNX model"),
        (["empty.onnx"], "it has no graph"),
        (["cut.onnx"], "cut short"),
        (["old.onnx"], "opset 6 is not supported, only 7 to"),
        (["model.onnx", "-o", "model.onnx"], "would overwrite the input"),
        (["model.onnx", "-o", "link.onnx"], "would overwrite the input"),
        (["model.onnx", "-o", "absent/out.onnx"], "absent: no such folder"),
        (["model.onnx", "-o", "folder"], "folder: is a folder"),
        (["model.onnx", "-o", "pipe"], "pipe: is not a regular file"),
        (["model.onnx", "-o", "loop.onnx"], "loop.onnx: Too many levels of symbolic links"),
        (["model.onnx", "-o", "out.safetensors"], "what becomes of model.onnx is no .safetensors file"),
        (["model.onnx", "--eps", "0.1"], "to which --eps does not apply"),
        (["model.onnx", "--eps", "1e-5"], "to which --eps does not apply"),
        (["model.onnx", "--inputs", "damaged.npz"], "damaged.npz is not an .npz file"),
        (["model.onnx", "--inputs", "huge.npz"], "huge.npz is not an .npz file that can be read: Unable to allocate"),
        (["model.onnx", "--inputs", "bytes.npz"], "bytes.npz is not an .npz file of arrays alone: it holds x"),
        (["model.onnx", "--check", "--tolerance", "nan"], "--tolerance must be finite"),
        (["model.onnx", "--check", "--tolerance", "-1"], "--tolerance must be finite"),
        (["model.onnx", "--shape", "x"], "--shape wants NAME=1,3,224,224, got 'x'"),
        (["model.onnx", "--shape", "x=1,0,2"], "--shape wants"),
        (["model.onnx", "--shape", "y=1,2"], "no input y, only x"),
        (["model.onnx", "--shape", "x=2,4,9"], "input x has shape 2,4,9,8, which 2,4,9 does not fit"),
        (["model.onnx", "--inputs", "absent.npz"], "No such file"),
        (["model.onnx", "--inputs", "text.onnx"], "not an .npz file"),
        (["model.onnx", "--inputs", "other.npz"], "must hold the inputs x, it holds y"),
        (["model.onnx", "--inputs", "complex.npz"], "input x of the model is float32, but .* holds complex128"),
        (["model.onnx", "--inputs", "small.npz"], "which 1,2 does not fit"),
        (["model.onnx", "--pairs", "auto"], "is an ONNX model, to which --pairs does not apply"),
        (["unknown.onnx", "--check"], "ONNX Runtime cannot run the model"),
        ([os.fsdecode(b"\xff.onnx"), "--check"], "it reads no files whose path is not UTF-8"),
    ),
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    model = CASES["two_convs"].build()
    onnx.save(model, "model.onnx")
    (tmp_path / "link.onnx").symlink_to("model.onnx")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    (tmp_path / os.fsdecode(b"\xff.onnx")).symlink_to("model.onnx")
    with zipfile.ZipFile("bytes.npz", "w") as archive:
        archive.writestr("x", b"no array")
    with zipfile.ZipFile("huge.npz", "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 58,)})
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes(model.SerializeToString()[:-50])
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    np.savez_compressed("damaged.npz", x=np.arange(576.0).reshape(2, 4, 9, 8))
    damaged = bytearray((tmp_path / "damaged.npz").read_bytes())
    damaged[60:90] = bytes(30)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    np.savez("other.npz", y=np.zeros(3))
    np.savez("complex.npz", x=np.zeros((2, 4, 9, 8), complex))
    np.savez("small.npz", x=np.zeros((1, 2)))
    model.graph.node[0].domain = "unknown"
    model.opset_import.add(domain="unknown", version=1)
    onnx.save(model, "unknown.onnx")
    model.opset_import[0].version = 6
    onnx.save(model, "old.onnx")
    before = files(Path())

    assert main(["fold", *arguments]) == 2
    assert re.search(message, one_line(capsys))
    assert files(Path()) == before


def test_a_link_is_followed(model_path, capsys):
    target, link = model_path.with_name("target.onnx"), model_path.with_name("out.onnx")
    target.write_bytes(b"")
    link.symlink_to(target)
    assert main(["fold", str(model_path), "-o", str(link)]) == 0
    capsys.readouterr()
    assert link.is_symlink()
    assert len(onnx.load(target).graph.node) > 0


def test_unwritable_output(model_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert main(["fold", str(model_path)]) == 2
    assert "cannot be written" in one_line(capsys)


def test_a_signal_leaves_nothing_half_written(model_path, monkeypatch):
    def interrupted(*_):
        yield b"the beginning"
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("fastbn.onnx._serialized", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["fold", str(model_path)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert files(model_path.parent) == ["model.onnx"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_too_little_memory_is_one_line(model_path, capsys, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr("fastbn._onnx_compare.random_inputs", exhausted)
    assert main(["fold", str(model_path), "--check"]) == 2
    assert "MemoryError" in one_line(capsys)
    assert files(model_path.parent) == ["model.onnx"]


def test_without_rich_there_is_no_table_and_nothing_is_written(model_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["fold", str(model_path)]) == 2
    assert "tables need rich: pip install rich" in one_line(capsys)
    assert files(model_path.parent) == ["model.onnx"]
    assert fold_json(capsys, model_path)[0] == 0


def test_a_narrow_terminal_has_room_for_names(model_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["fold", str(model_path)]) == 0
    printed = capsys.readouterr().out
    assert "reason" in printed
    assert "|scale|" not in printed
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["fold", str(model_path)]) == 0
    assert "|scale|" in capsys.readouterr().out


def test_no_half_written_file(model_path, capsys, monkeypatch):
    def full(*_):
        yield b"the beginning"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastbn.onnx._serialized", full)
    assert main(["fold", str(model_path)]) == 2
    assert "No space left" in one_line(capsys)
    assert files(model_path.parent) == ["model.onnx"]


def test_difference_counts_ulps():
    one = np.array([1.0, -2.0, 0.0, np.nan, np.inf], np.float32)
    other = one.copy()
    other[:2] = np.nextafter(other[:2], np.float32(9))
    other[2] = -0.0
    entry = difference("y", one, other)
    assert (entry.max_abs, entry.max_ulp) == (2.0**-23, 1)
    assert entry.max_rel == 2.0**-24
    assert difference("y", np.array([-1e-45], np.float32), np.array([1e-45], np.float32)).max_ulp == 2
    for bad in (one[:4], np.zeros(5, np.float32), -one):
        assert difference("y", one, bad).max_abs == np.inf
    assert difference("y", np.array([1, 2]), np.array([1, 4])).max_abs == 2
    assert difference("y", np.zeros(2), np.zeros(2)).max_rel == 0
    assert difference("y", np.zeros(2), np.ones(2)).max_rel == np.inf


def test_difference_of_sequences_and_maps():
    one, other = [np.ones(2, np.float32), np.zeros((1, 3))], [np.ones(2, np.float32), np.full((1, 3), 1e-6)]
    assert difference("s", one, one).max_abs == 0
    assert difference("s", one, other).max_abs == 1e-6
    assert difference("s", [], []).max_rel == 0
    for bad in (one[:1], {0: one[0], 1: one[1]}, [one[0], None]):
        assert difference("s", one, bad).max_abs == np.inf
    assert difference("m", [{"a": 1.0, "b": 2.0}], [{"a": 1.0, "b": 2.5}]).max_abs == 0.5
    assert difference("m", {"a": 1.0}, {"b": 1.0}).max_abs == np.inf
    assert difference("o", None, None).max_abs == 0


@pytest.mark.parametrize(
    "arguments, message", ((["--check"], "nor can --inputs give it"), (["--inputs", "in.npz"], "can hold nothing else"))
)
def test_an_input_that_is_a_sequence(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    graph = Graph(1, 4, 9, 8)
    graph.inputs.append(helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None))
    onnx.save(graph.model(graph.norm(graph.conv("x", 4, 6), 6), graph.add("SequenceLength", "q")), "model.onnx")
    np.savez("in.npz", x=np.ones((1, 4, 9, 8), np.float32), q=np.ones((2, 3), np.float32))
    assert main(["fold", "model.onnx", *arguments]) == 2
    assert message in one_line(capsys)
    assert files(Path()) == ["in.npz", "model.onnx"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def norm(rng, name, channels, dtype=np.float32):
    keys = ("weight", "bias", "running_mean")
    state = {f"{name}.{key}": rng.normal(size=channels).astype(dtype) for key in keys}
    state[f"{name}.running_var"] = rng.uniform(0.5, 2, channels).astype(dtype)
    return state | {f"{name}.num_batches_tracked": np.array(5)}


def network(*parts, dtype=np.float32):
    """Return the state of a network: (name, shape) for a layer, (name, channels) for a batch norm."""
    rng = np.random.default_rng(0)
    state = {}
    for name, size in parts:
        if isinstance(size, int):
            state |= norm(rng, name, size, dtype)
        else:
            state[f"{name}.weight"] = rng.normal(size=size).astype(dtype)
    return state


def basic_block(name, inputs, outputs):
    parts = [(f"{name}.conv1", (outputs, inputs, 3, 3)), (f"{name}.bn1", outputs)]
    parts += [(f"{name}.conv2", (outputs, outputs, 3, 3)), (f"{name}.bn2", outputs)]
    if inputs != outputs:
        parts += [(f"{name}.downsample.0", (outputs, inputs, 1, 1)), (f"{name}.downsample.1", outputs)]
    return parts


def resnet():
    stem = [("conv1", (8, 3, 7, 7)), ("bn1", 8), ("fc", (10, 16))]
    return network(*stem, *basic_block("layer1.0", 8, 8), *basic_block("layer2.0", 8, 16))


def mobilenet():
    parts = [("features.0.0", (8, 3, 3, 3)), ("features.0.1", 8)]
    parts += [("features.1.conv.0.0", (8, 1, 3, 3)), ("features.1.conv.0.1", 8)]
    parts += [("features.1.conv.1", (4, 8, 1, 1)), ("features.1.conv.2", 4), ("classifier.1", (10, 4))]
    return network(*parts)


def vgg():
    parts = [("features.0", (8, 3, 3, 3)), ("features.1", 8), ("features.3", (8, 8, 3, 3)), ("features.4", 8)]
    return network(*parts, ("classifier.0", (16, 8)), ("classifier.3", (10, 16)))


def densenet():
    parts = [("features.conv0", (8, 3, 7, 7)), ("features.norm0", 8)]
    for number, channels in ((1, 8), (2, 12), (3, 16)):  # in the third, the first batch norm has conv1's channels too
        name = f"features.denseblock1.denselayer{number}"
        parts += [(f"{name}.norm1", channels), (f"{name}.conv1", (16, channels, 1, 1))]
        parts += [(f"{name}.norm2", 16), (f"{name}.conv2", (4, 16, 3, 3))]
    parts += [("features.transition1.norm", 20), ("features.transition1.conv", (10, 20, 1, 1))]
    return network(*parts, ("features.norm5", 10), ("classifier", (10, 10)))


def preactivated():
    parts = [("conv1", (8, 3, 3, 3))]
    for name, inputs, outputs in (("layer1.0", 8, 8), ("layer2.0", 8, 16)):
        parts += [(f"{name}.bn1", inputs), (f"{name}.conv1", (outputs, inputs, 3, 3))]
        parts += [(f"{name}.bn2", outputs), (f"{name}.conv2", (outputs, outputs, 3, 3))]
    return network(*parts)


PAIRS = {
    resnet: 6,
    mobilenet: 3,
    vgg: 2,
    densenet: 4,
    preactivated: 2,
}


@pytest.mark.parametrize("build", PAIRS)
def test_pairs_by_name(build):
    state = build()
    pairing = find_pairs(state)
    norms = [key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")]
    assert len(pairing.pairs) == PAIRS[build]
    assert sorted([norm for _, norm in pairing.pairs] + list(pairing.left)) == sorted(norms)
    assert pairing == find_pairs(dict(sorted(state.items()))) or sorted(pairing.pairs) == sorted(
        find_pairs(dict(sorted(state.items()))).pairs
    ), "the order of the keys does not matter"
    for layer, norm in pairing.pairs:
        first, second = layer.rpartition(".")[2], norm.rpartition(".")[2]
        if build in (densenet, preactivated) and first[-1] in "12":
            assert int(second[-1]) == int(first[-1]) + 1
        elif first.isdecimal():
            assert int(second) == int(first) + 1
        else:
            assert first[-1] == second[-1]
    if build is densenet:
        assert "features.norm5" in pairing.left
        assert "stands in front of its layer" in pairing.left["features.denseblock1.denselayer3.norm1"]


def test_what_names_and_shapes_leave_open_stays_open():
    pairing = find_pairs(network(("block.conv1", (8, 8, 3, 3)), ("block.bn1", 8)))
    assert pairing.pairs == []
    assert "name the pair" in pairing.left["block.bn1"]
    pairing = find_pairs(
        network(("0", (8, 8, 3, 3)), ("1", 9), ("head.conv", (4, 5, 1, 1)), ("head.bn", 6), ("lonely", 3))
    )
    assert pairing.pairs == []
    assert pairing.left["1"] == "0 gives 8 channels, it has 9"
    assert "fits its layer neither way" in pairing.left["head.bn"]
    assert "no layer stands in front" in pairing.left["lonely"]


def test_of_layers_with_one_number_the_fitting_one_is_taken():
    conv, fc = ("conv1", (16, 3, 3, 3)), ("fc1", (16, 40))
    assert find_pairs(network(conv, ("bn1", 16), ("fc1", (10, 16)))).pairs == [("conv1", "bn1")]
    assert find_pairs(network(("conv1", (8, 3, 3, 3)), fc, ("bn1", 16))).pairs == [("fc1", "bn1")]
    pairing = find_pairs(network(conv, fc, ("bn1", 16)))
    assert pairing.pairs == []
    assert pairing.left == {"bn1": "by its shape it fits behind conv1 and fc1: name the pair"}


def test_statistics_that_are_no_batch_norm_s_are_no_matter():
    state = network(("conv1", (16, 3, 3, 3)), ("bn1", 16)) | {"obs.running_mean": np.array(0.5)}
    assert find_pairs(state).pairs == [("conv1", "bn1")]


@pytest.mark.parametrize("dtype", (np.float32, np.float16, ml_dtypes.bfloat16))
def test_checkpoint(tmp_path, capsys, dtype):
    source, target = tmp_path / "model.safetensors", tmp_path / "folded.safetensors"
    state = network(("conv1", (8, 3, 3, 3)), ("bn1", 8), ("up", (8, 4, 2, 2)), ("bn2", 4), dtype=dtype)
    save_file(state, source, metadata={"format": "pt"})
    arguments = [source, "-o", target, "--pairs", "conv1:bn1", "up:bn2", "--transposed", "up", "--eps", "0.001"]
    status, document = fold_json(capsys, *arguments)
    assert status == 0
    assert (document["folded"], document["kept"], document["output"]) == (2, 0, str(target))
    assert document["report"][0] | {"sentence": ""} == {
        "name": "bn1",
        "into": "conv1",
        "folded": True,
        "reason": "paired",
        "sentence": "",
    }
    folded = load_file(target)
    expected = fold_state_dict(state, [("conv1", "bn1"), ("up", "bn2")], eps=1e-3, transposed=["up"])
    assert folded.keys() == expected.keys()
    for key, value in expected.items():
        assert folded[key].dtype == dtype
        np.testing.assert_array_equal(folded[key], value)
    with safe_open(target, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert files(tmp_path) == ["folded.safetensors", "model.safetensors"]


def test_checkpoint_with_pairs_found(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    save_file(densenet(), source)
    assert main(["fold", str(source), "--pairs", "auto"]) == 0
    output = capsys.readouterr().out
    assert "features.norm0" in output
    assert "folded -> features.conv0" in output
    assert "unpaired: by its shape it stands in front of its layer" in output
    assert "4 of 9 batch norms folded" in output
    assert "see that nothing else lies between" in output
    folded = load_file(tmp_path / "model.folded.safetensors")
    assert "features.conv0.bias" in folded
    assert "features.norm0.running_mean" not in folded
    assert "features.norm5.running_mean" in folded


def test_groups_of_a_transposed_convolution_are_found(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    save_file(network(("m.0", (4, 3, 3, 3)), ("m.1", 6), ("n.0", (4, 3, 3, 3)), ("n.1", 7)), source)
    assert main(["fold", str(source), "--pairs", "auto", "--transposed", "m.0", "n.0"]) == 0
    output = capsys.readouterr().out
    assert "folded -> m.0" in output
    assert "unpaired: n.0 gives 3 channels, it has 7" in output
    assert load_file(tmp_path / "model.folded.safetensors")["m.0.bias"].shape == (6,)


def test_warning_of_a_checkpoint_takes_one_line(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    state = network(("conv", (2, 3, 3, 3)), ("bn", 2), dtype=np.float16) | {"bn.weight": np.full(2, 1e-6, np.float32)}
    save_file(state, source)
    assert main(["fold", str(source), "--pairs", "conv:bn", "--dry-run"]) == 0
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    (
        ([], "give --pairs LAYER:BN ..., or --pairs auto"),
        (["--pairs", "conv"], "--pairs wants LAYER:BN, got 'conv'"),
        (["--pairs", "conv:absent"], "missing from the state: absent.running_mean"),
        (["--pairs", "conv:bn", "--check"], "is a checkpoint, to which --check does not apply"),
        (["--pairs", "conv:bn", "-o", "model.safetensors"], "would overwrite the input"),
        (["--pairs", "conv:bn", "-o", "out.ONNX"], "what becomes of model.safetensors is no .ONNX file"),
        (["--pairs", "conv:bn", "--eps", "-1"], "eps must be finite"),
        (["--pairs", "conv:bn", "--transposed", "other"], "in no pair: other"),
    ),
)
def test_bad_checkpoint_input(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_file(network(("conv", (2, 3, 3, 3)), ("bn", 2)), "model.safetensors")
    assert main(["fold", "model.safetensors", *arguments]) == 2
    assert message in one_line(capsys)
    assert files(Path()) == ["model.safetensors"]


def test_no_safetensors_file(tmp_path, capsys):
    path = tmp_path / "model.SAFETENSORS"
    path.write_bytes(b"something else")
    assert main(["fold", str(path), "--pairs", "auto"]) == 2
    assert "no safetensors file" in one_line(capsys)
