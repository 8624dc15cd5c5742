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
    plan: NDArray[Any],
    training: bool,
    wide: bool,
    eps: float,
    slope: float,
    factor: float,
    x: NDArray[Any],
    residual: NDArray[Any] | None,
    dy: NDArray[Any] | None,
    y: NDArray[Any] | None,
    dx: NDArray[Any] | None,
    dresidual: NDArray[Any] | None,
    signs: NDArray[Any] | None,
    weight: NDArray[Any] | None,
    bias: NDArray[Any] | None,
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    norm: NDArray[Any],
    grads: NDArray[Any] | None,
    part: NDArray[Any] | None,
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
