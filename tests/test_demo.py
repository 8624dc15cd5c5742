"""The demo: its network against PyTorch and numerical gradients, the whole command on digits and on a user's images."""

from __future__ import annotations

import copy
import errno
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from matplotlib import image
from reference import assert_close, numerical_gradient

import fastbn
from fastbn import _engine, demo
from fastbn._demo_net import Classifier, Conv2d, Relu, Sgd, Stopwatch, cross_entropy, residual_network
from fastbn.cli import main


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    """The backend that compiles nothing; a choice made by a command is undone."""
    monkeypatch.setattr(_engine, "_default", _engine._default)
    fastbn.set_backend("numpy")


def network(*, batch_norm=True, channels=2, classes=3, dtype=np.float32, seed=0):
    """A network with running statistics and biases that are not those of a fresh one."""
    rng = np.random.default_rng(seed)
    net = residual_network(channels, classes, batch_norm=batch_norm, rng=rng, watch=Stopwatch(), widths=(4, 6))
    for unit in net.units():
        if batch_norm:
            bn = fastbn.BatchNorm2d(unit.norm.num_features, axis=-1, dtype=dtype, activation="relu")
            bn.weight, bn.bias = rng.uniform(0.5, 1.5, bn.num_features), rng.normal(size=bn.num_features)
            bn.running_mean[:], bn.running_var[:] = (
                rng.normal(size=bn.num_features),
                rng.uniform(0.5, 2, bn.num_features),
            )
            unit.norm = bn
    for layer in net.trainable():
        layer.params.update({key: values.astype(dtype) for key, values in layer.params.items()})
    return net


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("size, kernel, stride", (((6, 5), 3, 1), ((6, 5), 3, 2), ((1, 4), 1, 1), ((7, 8), 5, 3)))
def test_convolution_is_pytorchs(torch, size, kernel, stride, bias):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(4, 3, kernel, kernel)), rng.normal(size=(2, *size, 3))
    conv = Conv2d(weight, rng.normal(size=4) if bias else None, stride)
    w = torch.tensor(weight, requires_grad=True)
    b = torch.tensor(conv.params["bias"], requires_grad=True) if bias else None
    images = torch.tensor(x).movedim(-1, 1).requires_grad_()
    expected = torch.nn.functional.conv2d(images, w, b, stride, kernel // 2)

    y = conv(x)
    assert_close(y, expected.detach().movedim(1, -1).numpy())
    dy = rng.normal(size=y.shape)
    dx = conv.backward(dy)
    expected.backward(torch.tensor(dy).movedim(-1, 1))
    assert_close(dx, images.grad.movedim(1, -1).numpy())
    assert_close(conv.grads["weight"], w.grad.numpy())
    if bias:
        assert_close(conv.grads["bias"], b.grad.numpy())


@pytest.mark.parametrize("batch_norm, training", ((True, True), (True, False), (False, True)))
def test_gradients_are_numerical_ones(batch_norm, training):
    net = network(batch_norm=batch_norm, dtype=np.float64)
    net.train(training)
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(3, 2, 3, 4)), rng.integers(0, 3, 3)
    dx = net.backward(cross_entropy(net(x), labels)[1])
    grads = [copy.deepcopy(layer.grads) for layer in net.trainable()]

    def loss():
        return cross_entropy(net(x), labels)[0]

    assert_close(dx, numerical_gradient(loss, x, step=1e-5), tolerance=1e-7)
    for layer, grad in zip(net.trainable(), grads, strict=True):
        assert grad.keys() == layer.params.keys()
        for key, values in layer.params.items():
            some = (slice(1),) * min(2, values.ndim)  # a window of one input and one output channel
            expected = numerical_gradient(loss, values[some], step=1e-5)
            assert_close(grad[key][some], expected, tolerance=1e-6, terms=grad[key])


def test_relu_is_what_a_layer_with_activation_does_after_normalisation():
    rng = np.random.default_rng(0)
    x, residual, dy = (rng.normal(size=(4, 3, 3, 2)) for _ in range(3))
    bn = fastbn.BatchNorm2d(2, eps=0, affine=False, axis=-1, dtype=np.float64, activation="relu").eval()
    for given in (None, residual):
        relu = Relu()
        assert_close(relu(x, residual=given), bn(x, residual=given))
        assert_close(np.stack(relu.backward(dy)), np.stack(bn.backward(dy)))


def test_cross_entropy_is_pytorchs_and_survives_large_logits(torch):
    rng = np.random.default_rng(0)
    logits, labels = 1e3 * rng.normal(size=(6, 4)), rng.integers(0, 4, 6)
    peer = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(peer, torch.tensor(labels))
    expected.backward()
    loss, dlogits = cross_entropy(logits, labels)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert_close(dlogits, peer.grad.numpy())


def test_sgd_is_pytorchs(torch):
    rng = np.random.default_rng(0)
    layer = Classifier(rng.normal(size=(3, 4)), rng.normal(size=3))
    peers = {key: torch.tensor(values, requires_grad=True) for key, values in layer.params.items()}
    sgd, peer = Sgd(iter([layer]), 0.1, 0.9), torch.optim.SGD(peers.values(), 0.1, 0.9)
    for _ in range(3):
        layer.grads = {key: rng.normal(size=values.shape) for key, values in layer.params.items()}
        for key, values in layer.grads.items():
            peers[key].grad = torch.tensor(values)
        sgd.step()
        peer.step()
    for key, values in layer.params.items():
        assert_close(values, peers[key].detach().numpy())


def test_folding_leaves_no_batch_norm_and_changes_no_logit():
    net = network()
    net.train(False)
    x = np.random.default_rng(1).standard_normal((5, 2, 6, 7), np.float32)
    folded = net.fold()
    assert [type(unit.norm) for unit in folded.units()] == [Relu] * 6
    assert_close(folded(x), net(x), tolerance=5e-6)


def test_equal_seeds_give_equal_networks_with_and_without_batch_norm():
    one, other, without = (
        residual_network(1, 10, batch_norm=bn, rng=np.random.default_rng(3), watch=Stopwatch())
        for bn in (True, True, False)
    )
    for a, b, c in zip(one.units(), other.units(), without.units(), strict=True):
        np.testing.assert_array_equal(a.conv.params["weight"], b.conv.params["weight"])
        np.testing.assert_array_equal(a.conv.params["weight"], c.conv.params["weight"])
        assert not a.conv.params.keys() - {"weight"}
        assert not c.conv.params["bias"].any()


# --- the command --------------------------------------------------------------------------------------------------


def write_images(path, *, dtype=np.float32, classes=(-1, 4, 7), shape=(2, 7, 6), each=20):
    """Images that are told apart by where they are bright."""
    rng = np.random.default_rng(0)
    y = np.repeat(classes, each)
    x = rng.uniform(0, 80, (len(y), *shape))
    for i, label in enumerate(classes):
        x[y == label, :, i * 2 : i * 2 + 2] += 150
    np.savez(path, x=x.astype(dtype), y=y)
    return path


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The command as a user gives it, with few epochs: its output folder, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    command = [sys.executable, "-m", "fastbn", "demo", "--epochs", "3", "--out", out]
    environment = os.environ | {"COLUMNS": "100", "MPLBACKEND": "TkAgg"}
    return out, subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)


def row(printed, name):
    """The two results behind a name in the table."""
    (line,) = (line for line in printed.splitlines() if name in line and "│" in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def test_the_table_has_every_result(short_run):
    printed = short_run[1].stdout
    accuracies = [float(cell.rstrip("%")) for cell in row(printed, "test accuracy, after training")]
    assert accuracies[0] > 90
    assert accuracies[0] > accuracies[1] > 10
    steps, without = row(printed, "steps to 95%")
    assert 10 < int(steps) <= 66
    assert without == "not in 66" or int(without) > int(steps)
    share = float(row(printed, "share of")[0].rstrip("%"))
    assert 1 < share < 99
    assert all(float(cell.rstrip(" ms")) > 0 for cell in row(printed, "time of a step") + row(printed, "time of 64"))
    assert row(printed, "test accuracy, deployed") == [f"{accuracies[0]:.1f}%"] * 2
    difference, largest = float(row(printed, "largest difference")[1]), float(row(printed, "largest logit")[0])
    assert 0 < difference < 1e-5 * largest
    assert "1437 to train, 360 to test, 10 classes" in printed


def test_progress_shows_loss_and_accuracy_of_both(short_run):
    shown = short_run[1].stderr
    for title in ("with batch norm", "without"):
        assert re.search(rf"^{title}\W+66/66 loss \d\.\d+ accuracy \d+\.\d%", shown, re.MULTILINE)


def test_the_picture_is_a_picture(short_run):
    height, width, _ = image.imread(short_run[0] / "demo.png").shape
    assert width > 1500
    assert height > 500


def test_the_files_hold_the_network_and_the_folded_one(short_run):
    models = [onnx.load(short_run[0] / name) for name in ("original.onnx", "folded.onnx")]
    operations = [[node.op_type for node in model.graph.node] for model in models]
    assert operations[0].count("BatchNormalization") == 6
    assert operations[1] == [op for op in operations[0] if op != "BatchNormalization"]

    images = demo.load_images(None, seed=0)
    logits = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"pixels": images.test[0]})[0]
        for model in models
    ]
    assert_close(logits[1], logits[0], tolerance=5e-6)
    assert demo.accuracy(logits[1], images.test[1]) > 0.9


def test_an_onnx_file_computes_what_the_network_does(tmp_path):
    images = demo.load_images(write_images(tmp_path / "images.npz"), seed=0)
    net = network()
    net.train(False)
    expected = net(images.standardized(images.test[0]))
    for form in (net, net.fold()):
        model = demo.to_onnx(form, images)
        assert all(opset.version <= 17 for opset in model.opset_import)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        assert_close(session.run(None, {"pixels": images.test[0]})[0], expected, tolerance=5e-6)


@pytest.mark.parametrize("dtype", (np.uint8, np.float16, np.float64))
def test_own_images(tmp_path, capsys, dtype):
    data = write_images(tmp_path / "mine.npz", dtype=dtype)
    assert main(["demo", "--data", str(data), "--epochs", "8", "--backend", "numpy", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mine.npz: 48 to train, 12 to test, 3 classes" in printed
    assert float(row(printed, "test accuracy, after training")[0].rstrip("%")) > 90
    assert {path.name for path in tmp_path.iterdir()} == {"mine.npz", "demo.png", "original.onnx", "folded.onnx"}


def test_images_are_split_by_class_and_standardized_by_the_training_part(tmp_path):
    path = write_images(tmp_path / "images.npz", each=10)
    images = demo.load_images(path, seed=3)
    assert np.bincount(images.test[1]).tolist() == [2, 2, 2]
    assert np.bincount(images.train[1]).tolist() == [8, 8, 8]
    x = images.standardized(images.train[0])
    np.testing.assert_allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(0, 2, 3)), 1, rtol=1e-5)
    again, other = demo.load_images(path, seed=3), demo.load_images(path, seed=4)
    np.testing.assert_array_equal(again.test[0], images.test[0])
    assert not np.array_equal(other.test[0], images.test[0])


def test_a_constant_channel_is_no_obstacle(tmp_path):
    x, y = np.random.default_rng(0).uniform(size=(20, 2, 3, 3)), np.arange(20) % 2
    x[:, 1] = 7
    np.savez(tmp_path / "images.npz", x=x, y=y)
    images = demo.load_images(tmp_path / "images.npz", seed=0)
    np.testing.assert_allclose(images.standardized(images.test[0])[:, 1], 0, atol=1e-6)


def losses(images, seed):
    runs = [demo.Run.start(name, images, seed, batch_norm=name == "with") for name in ("with", "without")]
    with demo.Progress(disable=True) as progress:
        demo.train(runs, images, 2, seed, progress)
    return [run.losses for run in runs]


def test_a_seed_gives_one_result(tmp_path):
    images = demo.load_images(write_images(tmp_path / "images.npz"), seed=0)
    assert losses(images, 5) == losses(images, 5)
    assert losses(images, 5) != losses(images, 6)


def test_a_network_that_diverges_is_shown_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LEARNING_RATE", 1e9)
    images = demo.load_images(write_images(tmp_path / "images.npz"), seed=0)
    assert not np.isfinite(losses(images, 0)[1]).all()


# --- what can go wrong --------------------------------------------------------------------------------------------

X, Y = np.zeros((10, 1, 4, 4), np.float32), np.arange(10) % 2


def failure(capsys, *arguments):
    """The one line that a failing command leaves."""
    assert main(["demo", "--epochs", "1", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("fastbn demo: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    "arrays, words",
    (
        ({"x": X}, "must hold arrays x and y, of these it holds x"),
        ({}, "of these it holds none"),
        ({"x": X.astype(np.int64), "y": Y}, "x must be float or uint8, got int64"),
        ({"x": X.astype(object), "y": Y}, "allow_pickle"),
        ({"x": X[:, 0], "y": Y}, "shape (N, C, H, W), got shape (10, 4, 4)"),
        ({"x": X[:, :0], "y": Y}, "got shape (10, 0, 4, 4)"),
        ({"x": X[:0], "y": Y[:0]}, "got shape (0, 1, 4, 4)"),
        ({"x": X + np.inf, "y": Y}, "x must be finite"),
        ({"x": X.astype(float) + 1e300, "y": Y}, "x must be finite in float32"),
        ({"x": X, "y": Y.astype(float)}, "y must be integers, got float64"),
        ({"x": X, "y": Y[:9]}, "each of the 10 images, got shape (9,)"),
        ({"x": X, "y": Y[:, None]}, "got shape (10, 1)"),
        ({"x": X, "y": 0 * Y + 3}, "at least two classes, got only 3"),
        ({"x": X, "y": np.arange(10) // 6}, "at least 5 images, class 1 has 4"),
    ),
)
def test_images_that_cannot_be_used(tmp_path, capsys, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    assert words in failure(capsys, "--data", tmp_path / "bad.npz", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_archives_of_arrays(tmp_path, capsys):
    missing, text, array, cut = (tmp_path / name for name in ("missing.npz", "text.npz", "array.npy", "cut.npz"))
    text.write_text("x and y")
    np.save(array, X)
    whole = write_images(tmp_path / "whole.npz").read_bytes()
    assert f"{missing}: No such file or directory" in failure(capsys, "--data", missing)
    assert f"{tmp_path}: Is a directory" in failure(capsys, "--data", tmp_path)
    assert f"{text} is not an .npz file" in failure(capsys, "--data", text)
    assert f"{array} is not an .npz file" in failure(capsys, "--data", array)
    cut.write_bytes(whole[: len(whole) // 2])
    assert f"{cut} is not an .npz file" in failure(capsys, "--data", cut)
    cut.write_bytes(whole[:300] + bytes(200) + whole[500:])
    assert str(cut) in failure(capsys, "--data", cut)


def test_an_output_folder_that_is_a_file(tmp_path, capsys):
    path = write_images(tmp_path / "images.npz")
    assert f"{path}: File exists" in failure(capsys, "--data", path, "--out", path)


@pytest.mark.parametrize("variable, value", (("FASTBN_BACKEND", "fortran"), ("FASTBN_NUM_THREADS", "many")))
def test_an_environment_that_asks_for_what_is_not_there(monkeypatch, capsys, variable, value):
    monkeypatch.setattr(_engine, "_default", None)
    monkeypatch.setattr(_engine, "_num_threads", 0)
    monkeypatch.setenv(variable, value)
    line = failure(capsys)
    assert variable in line
    assert value in line


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "original.onnx")

    monkeypatch.setattr(onnx, "save_model", fail)
    path = write_images(tmp_path / "images.npz")
    assert main(["demo", "--data", str(path), "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("fastbn demo: error: original.onnx: No space left on device\n")


@pytest.mark.parametrize("missing", ("sklearn", "onnx", "onnxruntime", "matplotlib", "rich", "threadpoolctl"))
def test_without_the_extra_the_command_that_installs_it(monkeypatch, capsys, missing):
    monkeypatch.delitem(sys.modules, "fastbn.demo")
    monkeypatch.delattr(fastbn, "demo")
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    line = failure(capsys)
    assert missing in line
    assert 'pip install "fastbn[demo]"' in line
