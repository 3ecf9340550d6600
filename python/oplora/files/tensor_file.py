"""Files that came from anywhere: JSON objects and safetensors, checked for all that reading them relies on.

Only a regular file is opened, as a pipe or a device could wait or read for ever. A safetensors file is read up to its
numbers; those are fetched later, a range at a time. A file that is not sound raises OPLoRAFileError.
"""

from __future__ import annotations  # _core.DType is a name of the stub alone

import json
import math
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .. import _core
from ..errors import OPLoRAFileError

__all__ = [
    "FACTOR_DTYPES",
    "FLOATS",
    "StoredTensor",
    "TensorFile",
    "count_nonfinite",
    "damaged",
    "parse_object",
    "read_factors",
    "read_into",
    "read_numbers",
    "read_object",
    "read_tensor_file",
    "to_float32",
]

JSON_BYTES: Final = 100_000_000  # safetensors' own limit for a header

# safetensors' dtypes that arithmetic is done on: the core's name, and the NumPy dtype that holds the bits.
FLOATS: Final[dict[str, tuple[_core.DType, str]]] = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
ITEM_BYTES: Final = {
    dtype: size
    for size, dtypes in (
        (8, "F64 I64 U64 C64"),
        (4, "F32 I32 U32"),
        (2, "F16 BF16 I16 U16"),
        (1, "I8 U8 BOOL F8_E4M3 F8_E5M2"),
    )
    for dtype in dtypes.split()
}
FACTOR_DTYPES: Final = ("F64", "F32", "F16", "BF16")


def damaged(path: Path, what: str) -> OPLoRAFileError:
    """The error to raise for a file whose content can't be right."""
    return OPLoRAFileError(f"{path} is damaged: {what}. Fetch or save it again.")


def _check_regular(path: Path) -> None:
    if not os.path.isfile(path):
        raise OPLoRAFileError(f"{path} is missing or no regular file.")


# ---- JSON ----


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that the file holds; no key of it occurs twice."""
    _check_regular(path)
    if path.stat().st_size > JSON_BYTES:
        raise OPLoRAFileError(f"{path} has more than {JSON_BYTES:,} bytes, which is no sensible JSON file.")
    return parse_object(path, path.read_bytes())


def parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object that `text`, which is in the file, holds."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise OPLoRAFileError(
            f"{path} is no valid JSON: {error}. The file is damaged: fetch or save it again."
        ) from error
    if not isinstance(value, dict):
        raise OPLoRAFileError(
            f"{path} holds a JSON {type(value).__name__}, expected an object. Fetch or save it again."
        )
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name!r} occurs twice")
        result[name] = value
    return result


# ---- safetensors files ----


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header; begin and end count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.name!r} ({self.dtype}, shape {self.shape})"


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file without its numbers."""

    path: Path
    header: bytes  # from the first byte to the last before the numbers
    tensors: tuple[StoredTensor, ...]  # in the order of their offsets, which leave no gap

    def metadata(self) -> dict[str, str]:
        found = json.loads(self.header[8:]).get("__metadata__")  # safetensors has checked it
        return found if isinstance(found, dict) else {}

    def nbytes(self) -> int:
        return self.tensors[-1].end if self.tensors else len(self.header)


def read_tensor_file(path: Path) -> TensorFile:
    """The header, checked by the safetensors library and then for all that the reading below relies on."""
    _check_regular(path)
    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise OPLoRAFileError(f"{path} is no valid safetensors file: {error}. Fetch or save it again.") from error
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, JSON_BYTES):
            raise damaged(path, f"its header has {length} bytes")
        text = file.read(length)
    entries = parse_object(path, text)
    entries.pop("__metadata__", None)
    tensors = sorted(
        (_parse_tensor(path, name, entry, 8 + length) for name, entry in entries.items()),
        key=lambda tensor: (tensor.begin, tensor.end),
    )
    _check_layout(path, tensors, 8 + length, size)
    return TensorFile(path, length.to_bytes(8, "little") + text, tuple(tensors))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # a bool is an int to isinstance


def _parse_tensor(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise damaged(path, f"the header's entry for {name!r} is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise damaged(path, f"the header's entry for {name!r} lacks its dtype, shape or data_offsets")
    if len(offsets) != 2 or not all(map(_is_size, [*shape, *offsets])) or offsets[0] > offsets[1]:
        raise damaged(path, f"{name!r} has the shape {shape} and the data_offsets {offsets}")
    begin, end = offsets
    item = ITEM_BYTES.get(dtype)
    if item is not None and math.prod(shape) * item != end - begin:
        raise damaged(path, f"{name!r} ({dtype}, shape {shape}) lies in {end - begin} bytes")
    return StoredTensor(name, dtype, tuple(shape), start + begin, start + end)


def _check_layout(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            raise damaged(path, f"{tensor.name!r} begins at byte {tensor.begin}, expected {end}")
        end = tensor.end
    if end != size:
        raise damaged(path, f"its tensors end at byte {end}, the file at {size}")


# ---- numbers ----


def read_into(file: BufferedReader, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` with the file's bytes from `offset` on."""
    file.seek(offset)
    done = file.readinto(buffer)
    if done != len(buffer):
        raise OPLoRAFileError(f"{file.name} ended early at byte {offset + done}: it changed while it was read.")


def read_numbers(file: BufferedReader, tensor: StoredTensor, first: int, count: int) -> NDArray[Any]:
    """Entries [first, first + count) of a tensor with a dtype of FLOATS, as they are stored."""
    numbers = np.empty(count, FLOATS[tensor.dtype][1])
    if count:
        read_into(file, tensor.begin + first * numbers.itemsize, numbers.data.cast("B"))
    return numbers


def to_float32(numbers: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """The values of numbers stored as one of FACTOR_DTYPES, exact but for F64."""
    if dtype == "BF16":
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore"):  # infinity is refused where it is
        return numbers.astype(np.float32, copy=False)


def read_factors(
    file: BufferedReader, A: StoredTensor, B: StoredTensor, dtype: str
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Whole A and B as matrices in float32, for a product in `dtype`; convolutions' kernels lie along the columns.

    float64 is more than float32 holds. For a product in F64 each is its rounding and the rest, and their product one of
    three times the rank, A = [a; rest of a; a], B = [b, b, rest of b], which lacks the product of the rests, 2^-48.
    """
    (a, rest_of_a), (b, rest_of_b) = (_read_in_two(file, tensor) for tensor in (A, B))
    if dtype != "F64" or (rest_of_a is None and rest_of_b is None):
        return a, b
    rest_of_a, rest_of_b = (np.zeros_like(x) if rest is None else rest for x, rest in ((a, rest_of_a), (b, rest_of_b)))
    return np.concatenate([a, rest_of_a, a]), np.concatenate([b, b, rest_of_b], axis=1)


def _read_in_two(file: BufferedReader, tensor: StoredTensor) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    numbers = read_numbers(file, tensor, 0, math.prod(tensor.shape)).reshape(tensor.shape[0], -1)
    rounded = to_float32(numbers, tensor.dtype)
    return rounded, (numbers - rounded).astype(np.float32) if tensor.dtype == "F64" else None


def count_nonfinite(numbers: NDArray[Any], dtype: str) -> int:
    """How many of the numbers, stored as one of FLOATS, are NaN or infinite."""
    bad = (numbers & 0x7F80) == 0x7F80 if dtype == "BF16" else ~np.isfinite(numbers)
    return int(np.count_nonzero(bad))
