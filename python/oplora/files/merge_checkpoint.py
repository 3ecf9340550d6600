"""Merging a LoRA adapter into a checkpoint on disk: ``python -m oplora merge BASE ADAPTER OUT``.

A merged checkpoint has its base's tensors, dtypes and shapes, so every weight file keeps its header to the
byte, and only the numbers of the adapted tensors change. They stream through in blocks of rows: the memory
needed is a block and one layer's A and B, whatever the size of the model. Two exceptions: tensors that transformers
regroups when it loads them are in memory while they change, and what the base has not (a new head, a tensor that is
tied no longer) stands behind the last file's own. Everything that can be checked is checked before the first byte is
written. OUT is whole or not there at all; what a process that was killed has left is put right by the next merge into
the same OUT.

PEFT is not needed, and torch and transformers only where names or ties are to be asked for (model_layout). The result
is that of PEFT's own ``merge_and_unload``, with sums in float32 (float64 for a float64 base) and one rounding.
"""

from __future__ import annotations  # _core.DType is a name of the stub alone

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .. import _core
from ..errors import OPLoRAError, OPLoRAFileError, OPLoRAValueError
from . import atomic
from .merge_base import CONFIG, INDEX, Base, read_base
from .merge_plan import Added, Change, Delta, Plan, Regrouped, plan_merge
from .model_layout import Group
from .peft_adapter import read_adapter
from .tensor_file import (
    FLOATS,
    StoredTensor,
    TensorFile,
    count_nonfinite,
    read_factors,
    read_into,
    read_numbers,
    read_object,
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
        where = _resolved(out)
        _check_apart(base, adapter, where)
        # by their own names: a link in the hub's cache leads to a file that is called by its hash
        source, factors = (Path(path).expanduser().absolute() for path in (base, adapter))
        _merge(source, factors, where, overwrite=overwrite, progress=progress)
    except OPLoRAError:
        raise
    except OSError as error:
        raise OPLoRAFileError(f"{error}. Nothing was written to {os.fspath(out)!r}.") from error


def _merge(base: Path, adapter: Path, out: Path, *, overwrite: bool, progress: bool) -> None:
    atomic.put_right(out, _holds_weights)
    _check_out(out, overwrite)
    source = read_base(base)
    config, factors = read_adapter(adapter)
    plan = plan_merge(source, factors, config)
    total = source.nbytes() + sum(nbytes(added) for added in plan.added)
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
        _Writer(source, factors, plan, bar.update).write(new)


# ---- paths ----


def _resolved(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a NUL in the name
        raise OPLoRAFileError(f"{os.fspath(path)!r} is no usable path: {error}.") from error


def _check_apart(base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: Path) -> None:
    for source, what in ((_resolved(base), "BASE"), (_resolved(adapter), "ADAPTER")):
        if out == source or out in source.parents or source in out.parents:
            raise OPLoRAValueError(
                f"OUT {str(out)!r} and {what} {str(source)!r} contain each other. Choose an OUT elsewhere."
            )


def _check_out(out: Path, overwrite: bool) -> None:
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

_Product = tuple[Delta, NDArray[np.float32], NDArray[np.float32]]
Advance = Callable[[int], object]  # is told how many bytes were written


class _Writer:
    """Writes a merged model into a folder; every file that it reads stays open until then."""

    def __init__(self, base: Base, adapter: TensorFile, plan: Plan, advance: Advance) -> None:
        self.base, self.adapter, self.plan, self.advance = base, adapter, plan, advance
        self.group_of = {name: group for group in plan.groups for name in group.group.stored}
        self.regrouped: dict[str, NDArray[Any]] = {}  # what groups gave and is not written yet
        self.opened: dict[Path, BufferedReader] = {}
        self.stack = ExitStack()

    def write(self, folder: Path) -> None:
        with self.stack:
            for other in self.base.others:
                self._write_other(folder, other)
            for weights in self.base.files:
                is_last = weights is self.base.files[-1]
                self._write_weights(folder, weights, self.plan.added if is_last else ())

    def reader(self, path: Path) -> BufferedReader:
        if path not in self.opened:
            self.opened[path] = self.stack.enter_context(path.open("rb"))
        return self.opened[path]

    def _write_other(self, folder: Path, other: Path) -> None:
        target = folder / other
        target.parent.mkdir(parents=True, exist_ok=True)
        changed = None
        if str(other) == CONFIG and self.plan.config is not None:
            changed = dict(self.plan.config)
        elif str(other) == INDEX and self.plan.added:
            changed = _with_added(read_object(self.base.root / other), self.plan.added, self.base.files[-1].path.name)
        with (self.base.root / other).open("rb") as source, target.open("xb") as file:
            if changed is not None:
                file.write(json.dumps(changed, indent=2).encode() + b"\n")
                self.advance(os.fstat(source.fileno()).st_size)
            else:
                self._copy(source, file, 0, os.fstat(source.fileno()).st_size)

    def _write_weights(self, folder: Path, weights: TensorFile, added: Sequence[Added]) -> None:
        header, new = _header_with(weights, added)
        with (folder / weights.path.name).open("xb") as file:
            file.write(header)
            self.advance(len(weights.header))
            for tensor in weights.tensors:
                if tensor.name in self.group_of:
                    self._write_regrouped(file, tensor)
                else:
                    change = self.plan.changes.get(tensor.name, Change())
                    self._write_tensor(file, tensor, change.origin or (weights.path, tensor), change.delta)
            for tensor, one in zip(new, added, strict=True):
                assert one.change.origin is not None
                self._write_tensor(file, tensor, one.change.origin, one.change.delta)

    def _copy(self, source: BufferedReader, file: BufferedWriter, begin: int, end: int) -> None:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, end - begin)))
        for offset in range(begin, end, BLOCK_BYTES):
            block = buffer[: min(BLOCK_BYTES, end - offset)]
            read_into(source, offset, block)
            file.write(block)
            self.advance(len(block))

    def _write_tensor(
        self, file: BufferedWriter, tensor: StoredTensor, origin: tuple[Path, StoredTensor], delta: Delta | None
    ) -> None:
        """Numbers that start from those of `origin`, as a tensor of the shape and dtype of `tensor`."""
        if not math.prod(tensor.shape):
            return
        source, stored = self.reader(origin[0]), origin[1]
        if delta is None and stored.dtype == tensor.dtype:
            self._copy(source, file, stored.begin, stored.end)
            return
        product = self._product(delta, tensor)
        rows = tensor.shape[0] if tensor.shape else 1
        height = max(1, BLOCK_BYTES // (8 * math.prod(tensor.shape[1:])))
        for top in range(0, rows, height):
            block = slice(top, min(top + height, rows))
            numbers = _start_numbers(source, stored, tensor, block)
            if product is not None:
                _add(numbers, tensor.shape, *product, block, FLOATS[tensor.dtype][0])
                if count_nonfinite(numbers, tensor.dtype):
                    before = _start_numbers(source, stored, tensor, block)
                    _check_overflow(tensor, numbers, count_nonfinite(before, tensor.dtype))
            file.write(numbers.data.cast("B"))
            self.advance(numbers.nbytes)

    def _product(self, delta: Delta | None, tensor: StoredTensor) -> _Product | None:
        if delta is None:
            return None
        dtype = "F32" if delta.experts else tensor.dtype
        return delta, *read_factors(self.reader(self.adapter.path), delta.A, delta.B, dtype)

    # -- tensors that transformers regroups --

    def _write_regrouped(self, file: BufferedWriter, tensor: StoredTensor) -> None:
        if tensor.name not in self.regrouped:
            self.regrouped |= self._merge_group(self.group_of[tensor.name])
        numbers = self.regrouped.pop(tensor.name)
        file.write(np.ascontiguousarray(numbers).data.cast("B"))
        self.advance(numbers.nbytes)

    def _merge_group(self, regrouped: Regrouped) -> dict[str, NDArray[Any]]:
        group, tensors = regrouped.group, {}
        for name in group.stored:
            stored = self.base.tensors[name]
            numbers = read_numbers(self.reader(self.base.file_of(stored)), stored, 0, math.prod(stored.shape))
            tensors[name] = _as_torch(numbers.reshape(stored.shape), stored.dtype)
        loaded = group.load(tensors)
        self._check_way_back(group, tensors, group.store({name: loaded[name] for name in group.names}))
        del tensors
        for name, (target, change) in regrouped.changes.items():
            numbers = _as_numpy(loaded[name].contiguous()).reshape(target.shape[0], -1)
            rows = slice(0, target.shape[0])
            if change.origin is not None:
                numbers = _start_numbers(self.reader(change.origin[0]), change.origin[1], target, rows)
            if (product := self._product(change.delta, target)) is not None:
                before = count_nonfinite(numbers, target.dtype)
                _add(numbers, target.shape, *product, rows, FLOATS[target.dtype][0])
                _check_overflow(target, numbers, before)
            loaded[name] = _as_torch(numbers.reshape(target.shape), target.dtype)
        merged = group.store({name: loaded[name] for name in group.names})
        return {name: _as_numpy(merged[name].contiguous()) for name in group.stored}

    def _check_way_back(self, group: Group, tensors: Mapping[str, Any], again: Mapping[str, Any]) -> None:
        """What transformers regroups it must be able to bring back, to the bit."""
        if again.keys() != tensors.keys() or any(not _same_bits(again[name], tensors[name]) for name in tensors):
            raise OPLoRAValueError(
                f"transformers makes of {', '.join(map(repr, group.stored[:3]))} what it does not bring back to them, "
                "so the merged tensors cannot be stored as BASE's are. Load BASE with transformers, save it again, and "
                "merge into that, or merge with PEFT. Nothing was written."
            )


def nbytes(added: Added) -> int:
    return math.prod(added.shape) * np.dtype(FLOATS[added.dtype][1]).itemsize


def _header_with(weights: TensorFile, added: Sequence[Added]) -> tuple[bytes, list[StoredTensor]]:
    """The file's header with more tensors behind its own, and those as they lie there; without any, its own bytes."""
    if not added:
        return weights.header, []
    entries = json.loads(weights.header[8:])
    end = weights.nbytes() - len(weights.header)
    tensors = []
    for one in added:
        begin, end = end, end + nbytes(one)
        entries[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [begin, end]}
        tensors.append(StoredTensor(one.name, one.dtype, one.shape, begin, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, tensors


def _with_added(index: dict[str, Any], added: Sequence[Added], name: str) -> dict[str, Any]:
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += sum(map(nbytes, added))
    index["weight_map"] |= {one.name: name for one in added}
    return index


def _as_torch(numbers: NDArray[Any], dtype: str) -> Any:
    import torch

    tensor = torch.from_numpy(numbers)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def _as_numpy(tensor: Any) -> NDArray[Any]:
    import torch

    numbers: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return numbers


def _same_bits(one: Any, other: Any) -> bool:
    mine, theirs = (_as_numpy(tensor.contiguous()).reshape(-1).view(np.uint8) for tensor in (one, other))
    return one.shape == other.shape and np.array_equal(mine, theirs)


def _start_numbers(origin: BufferedReader, stored: StoredTensor, tensor: StoredTensor, block: slice) -> NDArray[Any]:
    """A block of rows before the product is added: what `stored` holds, rounded to the dtype of `tensor`."""
    columns = math.prod(tensor.shape[1:])
    numbers = read_numbers(origin, stored, block.start * columns, (block.stop - block.start) * columns)
    if stored.dtype != tensor.dtype:
        nonfinite = count_nonfinite(numbers, stored.dtype)
        numbers = _rounded(numbers, stored.dtype, tensor.dtype)
        _check_overflow(tensor, numbers, nonfinite)
    return numbers.reshape(-1, columns)


def _rounded(numbers: NDArray[Any], dtype: str, wanted: str) -> NDArray[Any]:
    if dtype == "F64" and wanted == "F32":
        return to_float32(numbers, dtype)
    return _core.round(to_float32(numbers, dtype), FLOATS[wanted][0])


def _add(
    W: NDArray[Any],
    shape: tuple[int, ...],
    delta: Delta,
    A: NDArray[np.float32],
    B: NDArray[np.float32],
    block: slice,
    dtype: _core.DType,
) -> None:
    """On rows [block] of a tensor of a shape; `W` has the rest of the shape as columns."""
    if delta.experts:
        As = A.reshape(delta.experts, -1, A.shape[1])
        Bs = B.reshape(B.shape[0], -1, delta.experts)
        for matrix, expert in zip(W.reshape(-1, *shape[1:]), range(block.start, block.stop), strict=True):
            own = np.ascontiguousarray(Bs[:, :, expert])
            _core.merge(matrix, As[expert], own, delta.scaling, dtype=dtype, transposed=delta.transposed)
    elif delta.transposed:
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
