"""Merging a LoRA adapter into a checkpoint on disk: ``python -m oplora merge BASE ADAPTER OUT``.

A merged checkpoint has its base's tensors, dtypes and shapes, so every weight file keeps its header to the
byte, and only the numbers of the adapted tensors change. They stream through in blocks of rows: the memory
needed is a block and one layer's A and B, whatever the size of the model. Everything that can be checked is
checked before the first byte is written. The output is built in a folder beside OUT and renamed at the end,
so that OUT is whole or not there at all. What a process that was killed has left is put right by the next
merge into the same OUT.

Neither torch nor PEFT is needed. The result is that of PEFT's own ``merge_and_unload``, with sums in float32
(float64 for a float64 base) and one rounding.
"""

from __future__ import annotations  # _core.DType is a name of the stub alone

import glob
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import _core
from ..errors import OPLoRAError, OPLoRAFileError, OPLoRAValueError
from .merge_plan import Change, Delta, plan_merge
from .merge_sources import Base, read_adapter, read_base
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
STALE_SECONDS: Final = 3600  # nothing was written for so long: the merge was killed


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
    _put_right(out)
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
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=not progress) as bar:
        _publish(out, overwrite, lambda folder: _write_all(folder, source, factors, changes, bar.update))


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
    if names and not any(name.endswith(".safetensors") for name in names):
        raise OPLoRAFileError(
            f"OUT {str(out)!r} holds no .safetensors file, so it is no earlier model that --overwrite might replace. "
            "Choose another OUT, or delete it yourself."
        )


# ---- writing ----

Advance = Callable[[int], object]  # is told how many bytes were written


def _publish(out: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder beside OUT, then put it in OUT's place by renaming."""
    new, old = out.parent / f"{_prefix(out)}{secrets.token_hex(4)}.partial", _old(out)
    new.mkdir()
    try:
        write(new)
        _sync_folder(new)
        if overwrite and os.path.isdir(out):
            _swap(out, new, old)
        else:
            new.rename(out)  # over an empty folder too, but never over a filled one
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".oplora-{out.name}-"


def _old(out: Path) -> Path:
    return out.parent / f"{_prefix(out)}old"


def _put_right(out: Path) -> None:
    """After merges into OUT that were killed: the earlier model is in its place, and nothing beside it."""
    if _old(out).exists():
        with suppress(OSError):  # OUT is there and not empty
            _old(out).rename(out)
        if any(out.glob("*.safetensors")):  # the new model, which is complete
            shutil.rmtree(_old(out), ignore_errors=True)
    for left in out.parent.glob(f"{glob.escape(_prefix(out))}*.partial"):
        with suppress(FileNotFoundError):  # another process has finished it
            if max(path.stat().st_mtime for path in (left, *left.rglob("*"))) < time.time() - STALE_SECONDS:
                shutil.rmtree(left)


def _swap(out: Path, new: Path, old: Path) -> None:
    try:
        out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_all(folder: Path, base: Base, adapter: TensorFile, changes: Mapping[str, Change], advance: Advance) -> None:
    for other in base.others:
        target = folder / other
        target.parent.mkdir(parents=True, exist_ok=True)
        with (base.root / other).open("rb") as source, target.open("xb") as file:
            _copy(source, file, 0, os.fstat(source.fileno()).st_size, advance)
            _sync(file)
    with adapter.path.open("rb") as factors:
        for weights in base.files:
            with weights.path.open("rb") as source, (folder / weights.path.name).open("xb") as file:
                file.write(weights.header)
                advance(len(weights.header))
                for tensor in weights.tensors:
                    _write_tensor(file, tensor, source, factors, changes.get(tensor.name, Change()), advance)
                _sync(file)


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
