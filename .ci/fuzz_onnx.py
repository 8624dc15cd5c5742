"""A coverage-guided fuzz of the ONNX folder, seeded with the hand-made graphs of the tests.

    python .ci/fuzz_onnx.py [--seconds 60] [--corpus FOLDER] [--limit 10]

Every input is read as a file, folded both ways, and saved. What must not happen: an exception that `fastbn.onnx.fold`
does not document, a valid model that becomes an invalid one, more than --limit seconds for one input, more than 4 GiB
of memory, or a write anywhere but at the output. Half the mutations are libFuzzer's of bytes, which test the reader;
the other half change one thing of a model that can be parsed, which goes deeper. Needs atheris; ends with status 0
where nothing was found, and leaves what was found in crash-* otherwise. FOLDER keeps what covers new code.
"""

import argparse
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

with atheris.instrument_imports(include=["fastbn"]):
    import fastbn.onnx

DOCUMENTED = (OSError, ValueError, TypeError)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}

watched: Path | None = None  # while an input is processed: the folder where it may write
strays: list[str] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Note what is written outside the folder: an audit hook."""
    if watched is None:
        return
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes | os.PathLike) or not isinstance(flags, int) or not flags & WRITING:
            return
    elif event in CHANGING:
        path = arguments[0]
    elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect"):
        strays.append(f"{event} {arguments}")
        return
    else:
        return
    resolved = Path(os.fsdecode(path)).resolve()  # type: ignore[arg-type]
    if not resolved.is_relative_to(watched):
        strays.append(f"{event} {resolved}")


def valid(model: onnx.ModelProto) -> bool:
    """Whether onnx has no objection."""
    try:
        onnx.checker.check_model(model)
    except Exception:  # noqa: BLE001 - whatever its objection is
        return False
    return True


def process(data: bytes, folder: Path) -> None:
    """Read, fold and save one input."""
    source, target = folder / "in.onnx", folder / "out.onnx"
    source.write_bytes(data)
    try:
        result = fastbn.onnx.fold(source)
        fastbn.onnx.save(result.model, target)
        fastbn.onnx.fold(result.model, duplicate=True)
    except DOCUMENTED:
        return
    if valid(onnx.load_model_from_string(data)) and not valid(onnx.load_model(target)):
        raise AssertionError("a valid model was made invalid")


def test_one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    global watched
    with tempfile.TemporaryDirectory(prefix="fastbn-fuzz-") as name:
        folder = watched = Path(name).resolve()
        try:
            process(data, folder)
        finally:
            watched = None
        left = {path.name for path in folder.iterdir()} - {"in.onnx", "out.onnx"}
    if strays or left:
        raise AssertionError(f"written outside the output: {strays} {left}")


# --- mutation of what a model says ------------------------------------------------------------------------------------


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """Return a graph and those inside it."""
    inside = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [graph, *(found for part in inside for found in graphs(part))]


def change_node(graph: onnx.GraphProto, rng: random.Random) -> None:
    """Rewire, drop, repeat or rename a node, or change an attribute."""
    node = rng.choice(graph.node)
    names = [name for other in graph.node for name in (*other.input, *other.output)]
    names += [*(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input), "", "nothing"]
    match rng.randrange(8):
        case 0 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        case 1 if node.output:
            node.output[rng.randrange(len(node.output))] = rng.choice(names)
        case 2 if node.input:
            node.input.pop()
        case 3:
            node.input.append(rng.choice(names))
        case 4:
            graph.node.add().CopyFrom(node)
        case 5:
            node.op_type = rng.choice(("Conv", "Gemm", "MatMul", "Add", "Identity", "BatchNormalization", "Pad", "If"))
        case 6:
            graph.node.remove(node)
        case _ if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i, attribute.f = rng.choice((-1, 0, 1, 2, 7, 2**31, -(2**63))), rng.choice((0.0, -1.0, 1e38))
            if attribute.ints:
                attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice((-1, 0, 1, 3, 2**40))
            attribute.type = rng.choice((attribute.type, attribute.type, rng.randrange(0, 15)))


def change_tensor(tensor: onnx.TensorProto, rng: random.Random) -> None:
    """Change the shape, the type or the values of a weight."""
    match rng.randrange(6):
        case 0 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((-1, 0, 1, 2, 6, 2**40))
        case 1:
            tensor.dims.append(rng.choice((0, 1, 2)))
        case 2:
            tensor.data_type = rng.randrange(0, 25)
        case 3:
            tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        case 4:
            tensor.data_location = onnx.TensorProto.EXTERNAL
            location = rng.choice(("../out", "/etc/hostname", "in.onnx", "nothing", ""))
            tensor.external_data.add(key="location", value=location)
        case _:
            tensor.raw_data = rng.choice((b"\xff", b"\0", b"\x7f")) * len(tensor.raw_data)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change bytes, or one thing of a model."""
    rng = random.Random(seed)
    try:
        model = onnx.ModelProto.FromString(data)
        changes = rng.choice((0, 0, 0, 1, 1, 2))
        for _ in range(changes):
            graph = rng.choice(graphs(model.graph))
            if graph.initializer and rng.random() < 0.4:
                change_tensor(rng.choice(graph.initializer), rng)
            elif graph.node:
                change_node(graph, rng)
        changed = model.SerializeToString()
        if changes and len(changed) <= max_size:
            return changed
    except Exception:  # noqa: BLE001 - what cannot be changed so is changed byte by byte
        pass
    return atheris.Mutate(data, max_size)


def main() -> None:
    """Fuzz for some time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="folder that keeps the inputs with new coverage")
    parser.add_argument("--limit", type=int, default=10, help="seconds for one input")
    parser.add_argument("inputs", nargs="*", help="do these files only")
    options = parser.parse_args()

    warnings.simplefilter("ignore")  # onnx names unknown keys of external data
    sys.addaudithook(watch)
    from onnx_graphs import CASES

    corpus = options.corpus or Path(tempfile.mkdtemp(prefix="fastbn-corpus-"))
    corpus.mkdir(exist_ok=True)
    for name, case in CASES.items():
        (corpus / name).write_bytes(case.build().SerializeToString())
    limits = (f"-max_total_time={options.seconds}", f"-timeout={options.limit}", "-rss_limit_mb=4096", "-max_len=65536")
    what = options.inputs or [str(corpus)]
    atheris.Setup([sys.argv[0], *limits, "-print_final_stats=1", *what], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
