"""What folding gains in ONNX Runtime, and what other tools make of the same models.

    python -m bench.folding             measure, store bench/results/folding.json, print the tables
    python -m bench.folding --tables    print the tables of the stored results

Besides fastbn it takes onnxoptimizer, onnxsim and onnxscript. Each tool works on four networks and on the hand-made
graphs of the tests, in a process of its own, for some of them can crash. A result counts as wrong where it is no
valid model, where ONNX Runtime cannot run it though it runs the original, where an input is gone, or where an output
differs by more than 1e-3 of its largest value (2e-2 in 16 bits).
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

import onnx
import onnxruntime
from onnx import ModelProto
from onnx_graphs import CASES
from onnx_models import light_model

import fastbn.onnx
from bench import stored
from bench.stored import markdown
from fastbn._onnx_compare import RunError, compare, input_shapes, random_inputs, required_inputs, run
from fastbn._onnx_graph import OLD_IR, bodies

NETWORKS = {
    "resnet50": "ResNet-50",
    "inception_v2": "Inception-v2",
    "shufflenet": "ShuffleNet",
    "densenet121": "DenseNet-121",
}
THREADS = 2
SECONDS = 4.0  # of runs for each time


# --- the tools -------------------------------------------------------------------------------------------------------


def with_fastbn(model: ModelProto) -> ModelProto:
    return fastbn.onnx.fold(model).model


def with_onnxoptimizer(model: ModelProto) -> ModelProto:
    import onnxoptimizer

    return onnxoptimizer.optimize(model, onnxoptimizer.get_fuse_and_elimination_passes())


def with_onnxsim(model: ModelProto) -> ModelProto:
    import onnxsim

    return onnxsim.simplify(model)[0]


def with_onnxscript(model: ModelProto) -> ModelProto:
    import onnxscript.optimizer
    import onnxscript.rewriter

    return onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(model))


def with_onnxruntime(model: ModelProto) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options)
        return onnx.load(options.optimized_model_filepath)


TOOLS = {
    "fastbn": with_fastbn,
    "onnxoptimizer": with_onnxoptimizer,
    "onnxsim": with_onnxsim,
    "onnxscript": with_onnxscript,
    "onnxruntime": with_onnxruntime,
}


# --- what they make of models ----------------------------------------------------------------------------------------


def norms(model: ModelProto) -> int:
    return sum(node.op_type == "BatchNormalization" for body in bodies(model) for node in body.node)


def build(name: str) -> ModelProto:
    return network(name) if name in NETWORKS else CASES[name].build()


def network(name: str) -> ModelProto:
    """Return a network in the form that is usual today: initializers that are no inputs."""
    model = light_model(name)
    model.ir_version = 8
    inputs = required_inputs(model)
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def judge(tool: str, name: str) -> dict[str, object]:
    """Let a tool work on a model and look at the result."""
    model = build(name)
    given = model.SerializeToString()
    try:
        result = TOOLS[tool](onnx.load_from_string(given))
    except Exception as error:  # noqa: BLE001 - whatever a tool raises, the model stays as it was
        return {"folded": 0, "verdict": "refused", "detail": repr(error)[:200]}
    folded = norms(model) - norms(result)
    inputs = random_inputs(model, input_shapes(model, {}))
    try:
        run(model, inputs)
    except RunError as error:
        return {"folded": folded, "verdict": "not run", "detail": str(error)[:200]}
    try:
        onnx.checker.check_model(result, full_check=True)
        apart = max(entry.max_rel for entry in compare(model, result, inputs))
    except (RunError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return {"folded": folded, "verdict": "invalid", "detail": str(error)[:200]}
    lost = {value.name for value in model.graph.input} - {value.name for value in result.graph.input}
    if lost and model.ir_version >= OLD_IR:
        return {"folded": folded, "verdict": "wrong", "detail": f"without the input {', '.join(sorted(lost))}"}
    narrow = name not in NETWORKS and CASES[name].tolerance > 1e-4
    wrong = not apart <= (2e-2 if narrow else 1e-3)
    return {"folded": folded, "verdict": "wrong" if wrong else "right", "detail": f"{apart:.2g}"}


def be_quiet() -> None:
    """Send what tools print, from Python or C++, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def judge_all(tool: str, names: list[str]) -> dict[str, dict[str, object]]:
    verdicts: dict[str, dict[str, object]] = {}
    pool = ProcessPoolExecutor(1, initializer=be_quiet)
    for name in names:
        try:
            verdicts[name] = pool.submit(judge, tool, name).result(timeout=120)
        except BrokenProcessPool:
            verdicts[name] = {"folded": 0, "verdict": "crashed", "detail": ""}
            pool = ProcessPoolExecutor(1, initializer=be_quiet)
    pool.shutdown()
    return verdicts


# --- what it gains ---------------------------------------------------------------------------------------------------


def milliseconds(models: dict[str, ModelProto], level: onnxruntime.GraphOptimizationLevel) -> dict[str, float]:
    """Time the models by turns, so that all see the same machine, and return the medians."""
    sessions = {}
    for key, model in models.items():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 4
        sessions[key] = onnxruntime.InferenceSession(model.SerializeToString(), options)
    inputs = random_inputs(models["original"], input_shapes(models["original"], {}))
    times: dict[str, list[float]] = {key: [] for key in sessions}
    for session in sessions.values():
        session.run(None, inputs)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for key, session in sessions.items():
            begin = time.perf_counter()
            session.run(None, inputs)
            times[key].append(1e3 * (time.perf_counter() - begin))
    return {key: statistics.median(values) for key, values in times.items()}


def gain(name: str) -> dict[str, object]:
    model = network(name)
    begin = time.perf_counter()
    result = fastbn.onnx.fold(model)
    seconds = time.perf_counter() - begin
    models = {"original": model, "folded": result.model}
    levels = onnxruntime.GraphOptimizationLevel
    return {
        "fold_seconds": seconds,
        "nodes": [result.before.nodes, result.after.nodes],
        "bytes": [result.before.bytes, result.after.bytes],
        "off": milliseconds(models, levels.ORT_DISABLE_ALL),
        "on": milliseconds(models, levels.ORT_ENABLE_ALL),
    }


def measure() -> dict[str, object]:
    names = [*NETWORKS, *CASES]
    return {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": THREADS,
        "versions": {
            name: version(name) for name in ("numpy", "onnx", "onnxoptimizer", "onnxsim", "onnxscript", "onnxruntime")
        },
        "batch_norms": {name: norms(build(name)) for name in names},
        "verdicts": {tool: judge_all(tool, names) for tool in TOOLS},
        "gains": {name: gain(name) for name in NETWORKS},
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def gains_table(results: dict) -> str:
    heads = [
        f"ms an image, {results['threads']} threads",
        "unoptimised",
        "folded",
        "gain",
        "optimised",
        "folded",
        "gain",
    ]
    rows = []
    for name, row in results["gains"].items():
        cells = [NETWORKS[name]]
        for level in ("off", "on"):
            original, folded = row[level]["original"], row[level]["folded"]
            cells += [f"{original:.1f}", f"{folded:.1f}", f"{original / folded:.2f}x"]
        rows.append([*cells, f"{row['fold_seconds']:.2f} s"])
    return markdown([*heads, "folding took"], rows)


def tools_table(results: dict) -> str:
    counts = results["batch_norms"]
    graphs = [name for name in counts if name not in NETWORKS]
    heads = [f"{title} ({counts[name]})" for name, title in NETWORKS.items()]
    heads += [
        f"{len(graphs)} hand-made graphs ({sum(counts[name] for name in graphs)})",
        "graphs spoilt",
        "reasons given",
    ]
    rows = []
    for tool, verdicts in results["verdicts"].items():
        bad = [name for name, entry in verdicts.items() if entry["verdict"] in ("wrong", "invalid", "crashed")]
        good = sum(verdicts[name]["folded"] for name in graphs if name not in bad)
        cells = [f"{verdicts[name]['folded']}{' (spoilt)' if name in bad else ''}" for name in NETWORKS]
        title = tool if tool == "fastbn" else f"{tool} {results['versions'][tool]}"
        rows.append([title, *cells, str(good), str(len(bad)), "each" if tool == "fastbn" else "none"])
    return markdown(["batch norms folded", *heads], rows)


def tables(results: dict) -> str:
    return f"{gains_table(results)}\n\n{tools_table(results)}"


if __name__ == "__main__":
    stored.main(__doc__, "folding", measure, tables)
