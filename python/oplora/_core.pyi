"""The C core on NumPy arrays, without torch. Shapes, dtypes and errors: each function's own docstring."""

from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray

F = TypeVar("F", np.float32, np.float64)
DType = Literal["float32", "float64", "float16", "bfloat16"]

def generate(z: NDArray[F], W1: NDArray[F], c1: NDArray[F], W2: NDArray[F], c2: NDArray[F]) -> NDArray[F]: ...
def generate_backward(
    g: NDArray[F], z: NDArray[F], W1: NDArray[F], c1: NDArray[F], W2: NDArray[F]
) -> tuple[NDArray[F], NDArray[F], NDArray[F], NDArray[F]]: ...
def start(
    out: NDArray[np.float32] | NDArray[np.float64],
    *,
    hidden_width: int,
    latent_width: int,
    seed: SupportsIndex,
    layer: SupportsIndex,
    latent_std: float,
    random: Sequence[tuple[int, int]],
    start: Literal["uniform", "sign"],
) -> None: ...
def merge(
    W: NDArray[Any],
    A: NDArray[np.float32],
    B: NDArray[np.float32],
    scaling: float,
    *,
    dtype: DType,
    transposed: bool = False,
) -> None: ...
def round(values: NDArray[np.float32], dtype: DType) -> NDArray[Any]: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]: ...
def isa() -> Literal["base", "avx2", "avx512"]: ...
