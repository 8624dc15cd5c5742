from typing import Any

from numpy.typing import NDArray

openmp: bool

def get_instruction_set() -> str: ...
def available_instruction_sets() -> list[str]: ...
def set_instruction_set(name: str) -> None: ...
def lanes(itemsize: int) -> int: ...
def kernel(
    backward: bool,
    reduce: bool,
    apply: bool,
    threads: int,
    split: bool,
    streaming: bool,
    run: int,
    columns: int,
    rows: int,
    block: int,
    blocks: int,
    ahead: int,
    n: int,
    channels: int,
    s: int,
    training: bool,
    eps: float,
    slope: float,
    x: NDArray[Any],
    residual: NDArray[Any],
    dy: NDArray[Any],
    y: NDArray[Any],
    dx: NDArray[Any],
    dresidual: NDArray[Any],
    coef: NDArray[Any],
    signs: NDArray[Any],
    stats: NDArray[Any],
    affine: NDArray[Any],
    grads: NDArray[Any],
    part: NDArray[Any],
) -> None: ...
def fold(
    running_mean: NDArray[Any],
    running_var: NDArray[Any],
    weight: NDArray[Any],
    bias: NDArray[Any],
    eps: float,
    stats: NDArray[Any],
    affine: NDArray[Any],
    channels: int,
    itemsize: int,
) -> None: ...
def update_running(
    running_mean: NDArray[Any],
    running_var: NDArray[Any],
    stats: NDArray[Any],
    count: int,
    factor: float,
    channels: int,
    itemsize: int,
) -> None: ...
def image_sums(
    dtype: int,
    threads: int,
    tasks: int,
    length: int,
    pieces: int,
    piece: int,
    width: int,
    tile: int,
    whole: bool,
    x: NDArray[Any],
    part: NDArray[Any],
) -> None: ...
