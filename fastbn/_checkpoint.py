"""Checkpoints in safetensors files, and finding by name and shape which batch norm stands behind which layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Channels = Mapping[str, int]  # of each batch norm, by module name
Pair = tuple[str, str]

LAYER = re.compile(r"(?:conv|fc|linear|lin)_?(\d*)")
NORM = re.compile(r"(?:bn|norm|batch_?norm)_?(\d*)")


@dataclass(frozen=True)
class Layer:
    """Channels that a layer gives and takes; of a transposed convolution the outputs are those of one group."""

    outputs: int
    inputs: int
    transposed: bool = False

    def gives(self, channels: int) -> bool:
        """Say whether a batch norm of so many channels fits behind it, whatever its groups."""
        if not self.transposed or not self.outputs:
            return channels == self.outputs
        groups, rest = divmod(channels, self.outputs)
        return rest == 0 and groups > 0 and self.inputs % groups == 0


Layers = Mapping[str, Layer]  # by module name


@dataclass(frozen=True)
class Pairing:
    """Layers with the batch norm behind each, and why other batch norms found no layer."""

    pairs: list[Pair] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: Path) -> tuple[dict[str, Array], dict[str, str] | None]:
    """Read the arrays and the metadata of a safetensors file; raise OSError or ValueError."""
    try:
        import ml_dtypes  # noqa: F401 - gives NumPy the bfloat16 that the file may hold
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise ImportError('folding checkpoints needs safetensors: pip install "fastbn[safetensors]"') from error
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping
    except (SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file that NumPy can hold: {error}") from None


def write_checkpoint(state: dict[str, Array], metadata: dict[str, str] | None, path: Path) -> None:
    """Write a safetensors file; raise OSError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(state, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name} cannot be written: {error}") from None


def find_pairs(state: Mapping[str, Array], transposed: Iterable[str] = ()) -> Pairing:
    """Pair layers and batch norms by the names that ResNet, MobileNet, VGG and DenseNet give them.

    Two patterns are known. In a ``Sequential`` a batch norm follows the layer whose number is one less
    (``features.0``, ``features.1``; ``downsample.0``, ``downsample.1``). Elsewhere names tell (``conv1``, ``bn1``;
    ``conv``, ``norm``), but not whether the batch norm stands behind its layer, as in ResNet, or in front of it, as
    in DenseNet. The shapes decide this, for all blocks of one kind together; where they allow both, it stays open.
    """
    norms = {_module(key): len(state[key]) for key in state if key.endswith(".running_mean") and state[key].ndim == 1}
    layers = {
        _module(key): _layer(array.shape, _module(key) in set(transposed))
        for key, array in state.items()
        if key.endswith(".weight") and array.ndim > 1 and _module(key) not in norms
    }
    pairing = Pairing()
    _pair_by_number(norms, layers, pairing)
    _pair_by_name(norms, layers, pairing)
    paired = {norm for _, norm in pairing.pairs}
    for norm in norms:
        if norm not in paired:
            pairing.left.setdefault(norm, "no layer stands in front of it by its name")
    order = {norm: position for position, norm in enumerate(norms)}
    pairing.pairs.sort(key=lambda pair: order[pair[1]])
    return pairing


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _layer(shape: tuple[int, ...], transposed: bool) -> Layer:
    return Layer(shape[1], shape[0], True) if transposed else Layer(shape[0], shape[1])


def _pair_by_number(norms: Channels, layers: Layers, pairing: Pairing) -> None:
    for norm, channels in norms.items():
        parent, _, number = norm.rpartition(".")
        if not number.isdecimal() or int(number) == 0:
            continue
        layer = f"{parent}.{int(number) - 1}".lstrip(".")
        if layer not in layers:
            continue
        if layers[layer].gives(channels):
            pairing.pairs.append((layer, norm))
        else:
            pairing.left[norm] = f"{layer} gives {layers[layer].outputs} channels, it has {channels}"


def _pair_by_name(norms: Channels, layers: Layers, pairing: Pairing) -> None:
    kinds: dict[tuple[str, ...], list[_Block]] = defaultdict(list)
    for block in _blocks(norms, layers, pairing.left).values():
        kinds[block.kind].append(block)
    for blocks in kinds.values():
        behind = all(block.fits_behind(norms, layers) for block in blocks)
        in_front = all(block.fits_in_front(norms, layers) for block in blocks)
        for block in blocks:
            if behind and not in_front:
                pairing.pairs.extend(block.pairs(0))
            elif in_front and not behind:
                pairs = [(a, b) for a, b in block.pairs(1) if layers[a].gives(norms[b])]
                pairing.pairs.extend(pairs)
                first = set(block.norms.values()) - {norm for _, norm in pairs}
                pairing.left.update(dict.fromkeys(first, "by its shape it stands in front of its layer, not behind it"))
            else:
                why = "may stand in front of its layer or behind it" if behind else "fits its layer neither way"
                pairing.left.update(dict.fromkeys(block.norms.values(), f"by its shape it {why}: name the pair"))


@dataclass(frozen=True)
class _Block:
    """The named layers and batch norms of one module, by the number in their name (-1 without one)."""

    layers: dict[int, str] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, ...]:
        return tuple(sorted(name.rpartition(".")[2] for name in (*self.layers.values(), *self.norms.values())))

    def pairs(self, step: int) -> list[Pair]:
        """Return each layer with the batch norm whose number is ``step`` higher."""
        return [
            (name, self.norms[n + step])
            for n, name in self.layers.items()
            if n >= 0 or not step
            if n + step in self.norms
        ]

    def fits_behind(self, norms: Channels, layers: Layers) -> bool:
        return all(layers[layer].gives(norms[norm]) for layer, norm in self.pairs(0))

    def fits_in_front(self, norms: Channels, layers: Layers) -> bool:
        return all(layers[layer].inputs == norms[norm] for layer, norm in self.pairs(0))


def _blocks(norms: Channels, layers: Layers, left: dict[str, str]) -> dict[str, _Block]:
    """Gather the modules in which a layer and a batch norm have the same number.

    Of several layers with that number (``conv1``, ``fc1``) it is the one that the batch norm fits behind; where it fits
    behind more than one, it is none of them, and `left` says so.
    """
    blocks: dict[str, _Block] = defaultdict(_Block)
    rivals: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in norms:
        if place := _place(name, NORM):
            blocks[place[0]].norms.setdefault(place[1], name)
    for name in layers:
        if place := _place(name, LAYER):
            rivals[place].append(name)
    for (parent, number), names in rivals.items():
        norm = blocks[parent].norms.get(number)
        fitting = [name for name in names if norm is not None and layers[name].gives(norms[norm])]
        if norm is not None and len(fitting) > 1:
            left[norm] = f"by its shape it fits behind {' and '.join(fitting)}: name the pair"
        else:
            blocks[parent].layers[number] = (fitting or sorted(names))[0]
    return {parent: block for parent, block in blocks.items() if block.pairs(0)}


def _place(name: str, pattern: re.Pattern[str]) -> tuple[str, int] | None:
    """Return the module that a layer or batch norm is in, and the number in its name, -1 without one."""
    parent, _, local = name.rpartition(".")
    match = pattern.fullmatch(local)
    return None if match is None else (parent, int(match[1] or -1))
