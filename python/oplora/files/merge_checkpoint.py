"""Merging a LoRA adapter into a checkpoint on disk: ``python -m oplora merge BASE ADAPTER OUT``.

A merged checkpoint has its base's tensors, dtypes and shapes, so every weight file keeps its header to the
byte, and only the numbers of the adapted tensors change. They stream through in blocks of rows: the memory
needed is a block and one layer's A and B, whatever the size of the model. Everything that can be checked is
checked before the first byte is written. OUT is whole or not there at all; what a process that was killed has left
is put right by the next merge into the same OUT.

Neither torch nor PEFT is needed. The result is that of PEFT's own ``merge_and_unload``, with sums in float32
(float64 for a float64 base) and one rounding.
"""

from __future__ import annotations  # _core.DType is a name of the stub alone

import math
import os
import shutil
from collections.abc import Callable, Mapping
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import _core
from ..errors import OPLoRAError, OPLoRAFileError, OPLoRAValueError
from . import atomic
from .merge_base import Base, read_base
from .merge_plan import Change, Delta, plan_merge
from .peft_adapter import read_adapter
from .tensor_file import (
    FLOATS,
    StoredTensor,
    TensorFile,
    count_nonfinite,
    read_factor,
    read_into,
    read_numbers,
    to_float32,
)

__all__ = ["merge_checkpoint"]

BLOCK_BYTES: Final = 16 << 20


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write `base` with `adapter` folded in to the folder `out`: W + scaling B A for every adapted weight.

    base: a folder with model.safetensors, or with model.safetensors.index.json and its shards; or one
    .safetensors file.
    adapter: a folder as PEFT writes it, with adapter_config.json and adapter_model.safetensors. Linear and
    convolution layers, GPT-2's Conv1D, embeddings, trained biases and modules_to_save are merged as PEFT
    does; rank_pattern, alpha_pattern and use_rslora count.
    out: a folder that does not exist or is empty; with `overwrite` it may hold an earlier model, which is
    kept until the new one is complete. It gets the merged weights and the base folder's other files, but no
    hidden ones and no other weights beside the model's own.
    progress: show a bar over the bytes on stderr.

    Raises OPLoRAFileError for files that are missing, damaged or cannot be written, and OPLoRAValueError for
    an adapter that does not fit; `out` is untouched then.
    """
    try:
        folders = _resolved(base), _resolved(adapter), _resolved(out)
        _merge(*folders, overwrite=overwrite, progress=progress)
    except OPLoRAError:
        raise
    except OSError as error:
        raise OPLoRAFileError(f"{error}. Nothing was written to {os.fspath(out)!r}.") from error


def _merge(base: Path, adapter: Path, out: Path, *, overwrite: bool, progress: bool) -> None:
    atomic.put_right(out, _holds_weights)
    _check_out(base, adapter, out, overwrite)
    source = read_base(base)
    config, factors = read_adapter(adapter)
    changes = plan_merge(source, factors, config)
    total = source.nbytes()
    free = shutil.disk_usage(out.parent).free
    if free < total:
        raise OPLoRAFileError(
            f"{out.parent} has {free:,} bytes free, but the merged model needs {total:,}. Free space there, or choose "
            "an OUT on another disk. Nothing was written."
        )
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar,
        atomic.folder(out, overwrite=overwrite) as new,
    ):
        _write_all(new, source, factors, changes, bar.update)


# ---- paths ----


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL in the name
        raise OPLoRAFileError(f"{os.fspath(path)!r} is no usable path: {error}.") from error


def _check_out(base: Path, adapter: Path, out: Path, overwrite: bool) -> None:
    for source, what in ((base, "BASE"), (adapter, "ADAPTER")):
        if out == source or out in source.parents or source in out.parents:
            raise OPLoRAValueError(
                f"OUT {str(out)!r} and {what} {str(source)!r} contain each other. Choose an OUT elsewhere."
            )
    if not os.path.isdir(out.parent):
        raise OPLoRAFileError(f"{str(out.parent)!r}, where OUT is to lie, is no folder. Create it first.")
    if not os.path.exists(out):
        return
    if not os.path.isdir(out):
        raise OPLoRAFileError(f"OUT {str(out)!r} exists and is no folder. Choose another OUT, or delete it.")
    names = os.listdir(out)
    if names and not overwrite:
        raise OPLoRAFileError(f"OUT {str(out)!r} is not empty. Choose another OUT, or replace it with --overwrite.")
    if names and not _holds_weights(out):
        raise OPLoRAFileError(
            f"OUT {str(out)!r} holds no .safetensors file, so it is no earlier model that --overwrite might replace. "
            "Choose another OUT, or delete it yourself."
        )


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


# ---- writing ----

Advance = Callable[[int], object]  # is told how many bytes were written


def _write_all(folder: Path, base: Base, adapter: TensorFile, changes: Mapping[str, Change], advance: Advance) -> None:
    for other in base.others:
        target = folder / other
        target.parent.mkdir(parents=True, exist_ok=True)
        with (base.root / other).open("rb") as source, target.open("xb") as file:
            _copy(source, file, 0, os.fstat(source.fileno()).st_size, advance)
    with adapter.path.open("rb") as factors:
        for weights in base.files:
            with weights.path.open("rb") as source, (folder / weights.path.name).open("xb") as file:
                file.write(weights.header)
                advance(len(weights.header))
                for tensor in weights.tensors:
                    _write_tensor(file, tensor, source, factors, changes.get(tensor.name, Change()), advance)


def _copy(source: BufferedReader, file: BufferedWriter, begin: int, end: int, advance: Advance) -> None:
    buffer = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
    for offset in range(begin, end, BLOCK_BYTES):
        block = buffer[: min(BLOCK_BYTES, end - offset)]
        read_into(source, offset, block)
        file.write(block)
        advance(len(block))


def _write_tensor(
    file: BufferedWriter,
    tensor: StoredTensor,
    source: BufferedReader,
    factors: BufferedReader,
    change: Change,
    advance: Advance,
) -> None:
    if tensor.begin == tensor.end:
        return
    delta = change.delta
    origin, stored = (source, tensor) if change.replacement is None else (factors, change.replacement)
    if delta is None and stored.dtype == tensor.dtype:
        _copy(origin, file, stored.begin, stored.end, advance)
        return
    product = None if delta is None else (delta, read_factor(factors, delta.A), read_factor(factors, delta.B))
    rows = tensor.shape[0] if tensor.shape else 1
    columns = math.prod(tensor.shape[1:])
    height = max(1, BLOCK_BYTES // (8 * columns))
    for top in range(0, rows, height):
        block = slice(top, min(top + height, rows))
        numbers = _start_numbers(origin, stored, tensor, block, columns)
        if product is not None:
            _add(numbers, *product, block, FLOATS[tensor.dtype][0])
            if count_nonfinite(numbers, tensor.dtype):
                before = _start_numbers(origin, stored, tensor, block, columns)
                _check_overflow(tensor, numbers, count_nonfinite(before, tensor.dtype))
        file.write(numbers.data.cast("B"))
        advance(numbers.nbytes)


def _start_numbers(
    origin: BufferedReader, stored: StoredTensor, tensor: StoredTensor, block: slice, columns: int
) -> NDArray[Any]:
    """A block of rows before the product is added: what `stored` holds, rounded to the dtype of `tensor`."""
    numbers = read_numbers(origin, stored, block.start * columns, (block.stop - block.start) * columns)
    if stored.dtype != tensor.dtype:
        nonfinite = count_nonfinite(numbers, stored.dtype)
        numbers = _core.round(to_float32(numbers, stored.dtype), FLOATS[tensor.dtype][0])
        _check_overflow(tensor, numbers, nonfinite)
    return numbers.reshape(-1, columns)


def _add(
    W: NDArray[Any],
    delta: Delta,
    A: NDArray[np.float32],
    B: NDArray[np.float32],
    block: slice,
    dtype: _core.DType,
) -> None:
    if delta.transposed:
        _core.merge(W, np.ascontiguousarray(A[:, block]), B, delta.scaling, dtype=dtype, transposed=True)
    else:
        _core.merge(W, A, B[block], delta.scaling, dtype=dtype)


def _check_overflow(tensor: StoredTensor, numbers: NDArray[Any], before: int) -> None:
    after = count_nonfinite(numbers, tensor.dtype)
    if after > before:
        raise OPLoRAValueError(
            f"merged into tensor {tensor}, the adapter's numbers pass what {tensor.dtype} can hold at {after - before} "
            "places. Convert BASE to BF16 or F32 first, or check the adapter's scaling. Nothing was written."
        )
