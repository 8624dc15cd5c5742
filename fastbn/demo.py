"""``fastbn demo``: what batch norm does for training, and that nothing of it need be left for inference.

A small residual network is trained on images twice, with batch norm and without, on the same batches and at the same
learning rate. Then batch norm is folded into the convolutions, and the network as trained and as folded are written as
ONNX files, run in ONNX Runtime and compared.

This module needs the extra ``demo``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import fastbn
from fastbn._demo_net import Array, Block, Network, Relu, Sgd, Stopwatch, Unit, cross_entropy, residual_network
from fastbn._files import read_npz

BATCH_SIZE = 64
# With batch norm the fastest of 0.02, 0.05, 0.1 and 0.2. Without it 0.02 does better, and 0.05 still trains.
LEARNING_RATE = 0.05
TARGET = 0.95
TEST_SHARE = 0.2
SMALLEST_CLASS = 5  # so that a fifth of the images has room for every class
TIMED_RUNS = 50


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Pixels (N, C, H, W) in float32 and labels (N,) from 0 on, for training and for testing."""

    name: str
    train: tuple[Array, Array]
    test: tuple[Array, Array]
    classes: int
    scale: Array  # (C,), with shift: the training pixels get mean 0 and variance 1
    shift: Array  # (C,)

    def standardized(self, pixels: Array) -> Array:
        """What the networks are given."""
        return fastbn.scale_shift(pixels, self.scale, self.shift)


def load_images(path: Path | None, seed: int) -> Images:
    """Read images and set a fifth of every class aside for testing.

    Parameters
    ----------
    path : Path or None
        An .npz file with arrays `x` (N, C, H, W), float or uint8, and `y` (N,), integers; None for scikit-learn's
        handwritten digits.
    seed : int
        Decides which images are for testing.

    Returns
    -------
    Images

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not what is described above.
    """
    if path is None:
        digits = load_digits()
        x, y, name = digits.images[:, None], digits.target, "handwritten digits"
    else:
        x, y = _read_npz(path)
        name = path.name
    pixels = _checked_pixels(x)
    labels, classes = _checked_labels(y, len(pixels))
    x_train, x_test, y_train, y_test = train_test_split(
        pixels, labels, test_size=TEST_SHARE, stratify=labels, random_state=seed
    )
    moments = fastbn.moments(x_train)
    var = moments.var()
    scale, shift = fastbn.fold_scale_shift(moments.mean, np.where(var > 0, var, 1), eps=0)
    return Images(name, (x_train, y_train), (x_test, y_test), classes, scale, shift)


def _read_npz(path: Path) -> tuple[Array, Array]:
    found = read_npz(path, ("x", "y"))
    if len(found) < 2:
        raise ValueError(f"{path} must hold arrays x and y, of these it holds {', '.join(found) or 'none'}")
    return found["x"], found["y"]


def _checked_pixels(x: Array) -> Array:
    if x.dtype.kind != "f" and x.dtype != np.uint8:
        raise ValueError(f"x must be float or uint8, got {x.dtype}")
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be images of shape (N, C, H, W), got shape {x.shape}")
    with np.errstate(over="ignore"):
        pixels = x.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("x must be finite in float32, got NaN, infinite or larger values")
    return pixels


def _checked_labels(y: Array, images: int) -> tuple[Array, int]:
    if y.dtype.kind not in "iu":
        raise ValueError(f"y must be integers, got {y.dtype}")
    if y.shape != (images,):
        raise ValueError(f"y must have one label for each of the {images} images, got shape {y.shape}")
    values, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(values) < 2:
        raise ValueError(f"y must have at least two classes, got only {values[0]}")
    if counts.min() < SMALLEST_CLASS:
        rare = values[counts.argmin()]
        raise ValueError(f"every class needs at least {SMALLEST_CLASS} images, class {rare} has {counts.min()}")
    return labels, len(values)


# --- training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A network in training, and how it went."""

    title: str
    network: Network
    optimizer: Sgd
    norm_watch: Stopwatch
    losses: list[float] = field(default_factory=list)  # of every step
    accuracies: dict[int, float] = field(default_factory=dict)  # on the test images, after so many steps
    seconds: float = 0.0  # in training steps
    norm_seconds: float = 0.0  # of these, in what follows the convolutions

    @classmethod
    def start(cls, title: str, images: Images, seed: int, *, batch_norm: bool) -> Run:
        """Build a fresh network for the images."""
        watch = Stopwatch()
        network = residual_network(
            images.train[0].shape[1],
            images.classes,
            batch_norm=batch_norm,
            rng=np.random.default_rng(seed),
            watch=watch,
        )
        return cls(title, network, Sgd(network.trainable(), LEARNING_RATE), watch)

    def step(self, x: Array, labels: Array) -> None:
        """Train on one batch."""
        start, norm_start = time.perf_counter(), self.norm_watch.seconds
        # Without batch norm training may diverge, which the numbers then show.
        with np.errstate(over="ignore", invalid="ignore"):
            loss, dlogits = cross_entropy(self.network(x), labels)
            self.network.backward(dlogits)
            self.optimizer.step()
        self.losses.append(loss)
        self.seconds += time.perf_counter() - start
        self.norm_seconds += self.norm_watch.seconds - norm_start

    def evaluate(self, x: Array, labels: Array) -> None:
        """Note the accuracy in inference mode."""
        self.network.train(False)
        with np.errstate(over="ignore", invalid="ignore"):
            logits = [self.network(x[i : i + 4 * BATCH_SIZE]) for i in range(0, len(x), 4 * BATCH_SIZE)]
        self.network.train()
        self.accuracies[len(self.losses)] = accuracy(np.concatenate(logits), labels)

    @property
    def final_accuracy(self) -> float:
        """After the last step."""
        return self.accuracies[len(self.losses)]

    @property
    def steps_to_target(self) -> int | None:
        """The first evaluated step with an accuracy of `TARGET`."""
        return next((step for step, reached in self.accuracies.items() if reached >= TARGET), None)


def accuracy(logits: Array, labels: Array) -> float:
    """Share of the images whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == labels).mean())


def train(runs: Sequence[Run], images: Images, epochs: int, seed: int, progress: Progress) -> None:
    """Train the networks side by side, on the same batches in the same order."""
    x, labels = images.standardized(images.train[0]), images.train[1]
    x_test, labels_test = images.standardized(images.test[0]), images.test[1]
    size = min(BATCH_SIZE, len(x))
    steps = epochs * (len(x) // size)
    every = max(1, len(x_test) // size)  # evaluating takes less time than the steps between
    tasks = [progress.add_task(run.title, total=steps, loss=np.nan, accuracy=np.nan) for run in runs]
    rng = np.random.default_rng(seed)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            batch = order[start : start + size]
            step += 1
            for run, task in zip(runs, tasks, strict=True):
                run.step(x[batch], labels[batch])
                if step % every == 0 or step == steps:
                    run.evaluate(x_test, labels_test)
                    progress.update(task, accuracy=100 * run.accuracies[step])
                progress.update(task, advance=1, loss=run.losses[-1])


def warm_up(images: Images) -> None:
    """Have every kernel compiled, so that training times are training's own."""
    run = Run.start("warm-up", images, seed=0, batch_norm=True)
    batch = slice(min(BATCH_SIZE, len(images.train[0])))
    run.step(images.standardized(images.train[0][batch]), images.train[1][batch])
    run.evaluate(images.standardized(images.test[0]), images.test[1])


# --- deployment -----------------------------------------------------------------------------------------------------


class Graph:
    """An ONNX graph that grows node by node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node; returns the name of its output, which is its own."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Array) -> str:
        """Add an initializer; returns its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
        return name

    def add_unit(self, unit: Unit, name: str, x: str, residual: str | None = None) -> str:
        """Add what a unit computes in inference mode; returns the name of its output."""
        conv, norm = unit.conv, unit.norm
        y = self.add(
            "Conv",
            f"{name}.conv",
            [x] + [self.constant(f"{name}.conv.{key}", values) for key, values in conv.params.items()],
            pads=[conv.padding] * 4,
            strides=[conv.stride] * 2,
        )
        if not isinstance(norm, Relu):
            state = norm.state_dict()
            keys = ("weight", "bias", "running_mean", "running_var")
            constants = [self.constant(f"{name}.bn.{key}", state[key]) for key in keys]
            y = self.add("BatchNormalization", f"{name}.bn", [y, *constants], epsilon=norm.eps)
        if residual is not None:
            y = self.add("Add", f"{name}.add", [y, residual])
        return self.add("Relu", f"{name}.relu", [y])


def to_onnx(network: Network, images: Images) -> onnx.ModelProto:
    """Write a network in inference mode as ONNX: pixels (N, C, H, W) -> logits (N, K).

    Parameters
    ----------
    network : Network
    images : Images
        Whose size and standardisation become part of the model.

    Returns
    -------
    onnx.ModelProto
    """
    graph = Graph()
    x = graph.add("Mul", "scaled", ["pixels", graph.constant("scale", images.scale[:, None, None])])
    x = graph.add("Add", "standardized", [x, graph.constant("shift", images.shift[:, None, None])])
    for i, layer in enumerate(network.layers):
        if isinstance(layer, Block):
            hidden = graph.add_unit(layer.first, f"layer{i}.first", x)
            x = graph.add_unit(layer.second, f"layer{i}.second", hidden, residual=x)
        else:
            x = graph.add_unit(layer, f"layer{i}", x)
    x = graph.add("GlobalAveragePool", "pooled", [x])
    x = graph.add("Flatten", "features", [x])
    params = [graph.constant(f"classifier.{key}", values) for key, values in network.classifier.params.items()]
    graph.add("Gemm", "logits", [x, *params], transB=1)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", *images.train[0].shape[1:]])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", images.classes])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "fastbn demo", [pixels], [logits], graph.initializers),
        producer_name="fastbn",
        producer_version=fastbn.__version__,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,  # opset 17's own, so that runtimes as old as it can read the file
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class Deployed:
    """What ONNX Runtime made of one file."""

    logits: Array  # of all test images
    accuracy: float
    milliseconds: float  # for one batch, the median of many


def deploy(paths: Sequence[Path], images: Images) -> list[Deployed]:
    """Run models on the test images, and time them by turns on one batch."""
    x, labels = images.test
    sessions = [_session(path) for path in paths]
    logits = [_infer(session, x) for session in sessions]
    batch = x[:BATCH_SIZE]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(TIMED_RUNS):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            _infer(session, batch)
            taken.append(time.perf_counter() - start)
    return [
        Deployed(y, accuracy(y, labels), 1e3 * float(np.median(taken))) for y, taken in zip(logits, times, strict=True)
    ]


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # ONNX Runtime folds batch norm itself when it loads a file, which would leave nothing to compare.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _infer(session: onnxruntime.InferenceSession, pixels: Array) -> Array:
    logits: Array = session.run(None, {"pixels": pixels})[0]
    return logits


# --- picture and table ----------------------------------------------------------------------------------------------

WITH, WITHOUT, MUTED = "#1b6ca8", "#d9822b", "#666666"
HISTOGRAM_CHANNELS = 6


def draw(with_norm: Run, without: Run, images: Images) -> Figure:
    """Loss and accuracy over the steps, and a layer's activations before and after normalisation."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    _draw_losses(figure.add_subplot(grid[:, 0]), with_norm, without)
    _draw_accuracies(figure.add_subplot(grid[:, 1]), with_norm, without)
    upper = figure.add_subplot(grid[0, 2])
    lower = figure.add_subplot(grid[1, 2], sharex=upper)
    _draw_activations(upper, lower, with_norm.network, images.standardized(images.test[0]))
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_losses(axes: Axes, *runs: Run) -> None:
    for run, color in zip(runs, (WITH, WITHOUT), strict=True):
        steps = np.arange(1, len(run.losses) + 1)
        axes.plot(steps, run.losses, color=color, linewidth=0.7, alpha=0.35)
        axes.plot(steps, _smooth(run.losses), color=color, linewidth=2, label=run.title)
    axes.set(title="Training loss", xlabel="step", ylabel="cross entropy", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _smooth(values: Sequence[float], window: int = 11) -> Array:
    """Mean over a window that gets narrower towards both ends."""
    half = window // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _draw_accuracies(axes: Axes, *runs: Run) -> None:
    for run, color in zip(runs, (WITH, WITHOUT), strict=True):
        axes.plot(list(run.accuracies), [100 * a for a in run.accuracies.values()], color=color, linewidth=2)
        if run.steps_to_target is not None:
            axes.plot(run.steps_to_target, 100 * run.accuracies[run.steps_to_target], "o", color=color)
    axes.axhline(100 * TARGET, color=MUTED, linewidth=0.8, linestyle=":")
    axes.text(0.01, 100 * TARGET, f"{TARGET:.0%}", color=MUTED, va="bottom", transform=axes.get_yaxis_transform())
    axes.set(title="Test accuracy", xlabel="step", ylabel="%", ylim=(0, 104))


def _draw_activations(upper: Axes, lower: Axes, network: Network, x: Array) -> None:
    """Histograms of some channels behind the last convolution outside of a block."""
    last = max(i for i, layer in enumerate(network.layers) if isinstance(layer, Unit))
    unit = network.layers[last]
    assert isinstance(unit, Unit)
    assert isinstance(unit.norm, fastbn.BatchNorm2d)
    before = unit.conv(network.features(x, last))
    after = fastbn.batch_norm(before, unit.norm.running_mean, unit.norm.running_var, eps=unit.norm.eps, axis=-1)
    low, high = np.percentile(before, [0.05, 99.95])
    bins = np.linspace(low, high, 70)
    # From the lowest to the highest mean, so that neighbours in colour are neighbours in place.
    order = np.argsort(before.mean(axis=(0, 1, 2)))
    shown = order[np.linspace(0, len(order) - 1, min(HISTOGRAM_CHANNELS, len(order))).round().astype(int)]
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for axes, values in ((upper, before), (lower, after)):
        for channel, color in zip(shown, colors, strict=True):
            density, _ = np.histogram(values[..., channel], bins, density=True)
            axes.fill_between(bins[:-1], density, step="post", color=color, alpha=0.15, linewidth=0)
            axes.step(bins[:-1], density, where="post", color=color, linewidth=1.2)
        axes.set(yticks=[], ylim=(0, None))
    upper.set_title("Activations before normalisation")
    upper.tick_params(labelbottom=False)
    lower.set_title("after normalisation")
    lower.set_xlabel(f"value, in {len(shown)} of the channels of layer {last}")


def summary(images: Images, with_norm: Run, without: Run, original: Deployed, folded: Deployed) -> Table:
    """All results in one table."""
    sizes = f"{len(images.train[0])} to train, {len(images.test[0])} to test, {images.classes} classes"
    table = Table(
        "Training",
        Column(with_norm.title, justify="right"),
        Column(without.title, justify="right"),
        title=f"{images.name}: {sizes}",
        caption=f"{fastbn.get_backend()} backend, threads: {fastbn.get_num_threads()}; learning rate: {LEARNING_RATE}",
    )
    runs = (with_norm, without)
    table.add_row("test accuracy, after training", *(f"{run.final_accuracy:.1%}" for run in runs))
    table.add_row(f"steps to {TARGET:.0%}", *(str(run.steps_to_target or f"not in {len(run.losses)}") for run in runs))
    table.add_row("time of a step", *(f"{1e3 * run.seconds / len(run.losses):.1f} ms" for run in runs))
    table.add_row("share of batch norm, ReLU, skip", *(f"{run.norm_seconds / run.seconds:.0%}" for run in runs))
    table.add_section()
    table.add_row("In ONNX Runtime, as written", "original", "folded", style="bold")
    table.add_section()
    files = (original, folded)
    table.add_row("test accuracy, deployed", *(f"{file.accuracy:.1%}" for file in files))
    batch = min(BATCH_SIZE, len(images.test[0]))
    table.add_row(f"time of {batch} images", *(f"{file.milliseconds:.2f} ms" for file in files))
    difference = np.abs(original.logits - folded.logits).max()
    table.add_row("largest difference", "", f"{difference:.1e}")
    table.add_row("largest logit", *(f"{np.abs(file.logits).max():.1f}" for file in files))
    return table


# --- all of it ------------------------------------------------------------------------------------------------------


def run(images: Images, epochs: int, seed: int, out: Path) -> None:
    """Train, fold, export and compare; print the table.

    Parameters
    ----------
    images : Images
    epochs : int
    seed : int
        Of the weights and of the order of the images.
    out : Path
        An existing folder; takes ``demo.png``, ``original.onnx`` and ``folded.onnx``.
    """
    messages = Console(stderr=True)
    with_norm = Run.start("with batch norm", images, seed, batch_norm=True)
    without = Run.start("without", images, seed, batch_norm=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("accuracy {task.fields[accuracy]:.1f}%"),
        TimeRemainingColumn(),
    )
    # OpenBLAS' threads spin between two products and hold up the threads of batch norm: a step took 68 ms, and 18 ms
    # with one thread for these small products.
    with threadpool_limits(1, user_api="blas"):
        with messages.status("compiling kernels"):
            warm_up(images)
        with Progress(*columns, console=messages) as progress:
            train((with_norm, without), images, epochs, seed, progress)

    with messages.status("exporting"):
        with_norm.network.train(False)
        paths = [out / "original.onnx", out / "folded.onnx"]
        for network, path in zip((with_norm.network, with_norm.network.fold()), paths, strict=True):
            onnx.save_model(to_onnx(network, images), path)
        original, folded = deploy(paths, images)
        picture = out / "demo.png"
        draw(with_norm, without, images).savefig(picture, dpi=150)

    console = Console()
    console.print(summary(images, with_norm, without, original, folded))
    for path in (picture, *paths):
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
