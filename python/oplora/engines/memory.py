"""Memory of generators: how much there is, and pieces of it."""

import contextlib
import mmap
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import OPLoRAMemoryError

__all__ = ["CPU", "allocate", "columns", "free_memory", "refuse_more_than_memory"]

CPU = torch.device("cpu")  # named where a tensor is for the core: torch.set_default_device() may say otherwise


def allocate(count: int, dtype: torch.dtype, device: torch.device = CPU, *, huge_pages: bool) -> Tensor:
    """Zeros of one piece; on the CPU its pages come when they are first touched.

    W2 asks for huge pages, with which its columns stream faster. Its moments ask for none: a huge page would span
    columns of units that are on and off, and make resident what no step has touched, a third of the state.
    """
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise OPLoRAMemoryError(
            f"oplora: there is no memory for {count} numbers of the generators. Lower hidden_width or the "
            "rank r, or adapt fewer layers."
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def columns(arena: Tensor, begin: int, count: int, stride: int, shape: torch.Size) -> Tensor:
    """`count` columns that lie `stride` apart, each seen as a tensor of this shape."""
    own = torch.empty(shape, device="meta").stride()
    return arena.as_strided((count, *shape), (stride, *own), arena.storage_offset() + begin)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated there."""
    if device.type == "cuda":
        return (
            int(torch.cuda.mem_get_info(device)[0])
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_more_than_memory(needed: Iterable[tuple[torch.device, int]], advice: str) -> None:
    """Before anything is allocated: the system may grant more than it has and kill the process later.

    needed: bytes and where, in pieces. advice: how to need less.
    """
    sums: dict[torch.device, int] = {}
    for device, bytes_needed in needed:
        sums[device] = sums.get(device, 0) + bytes_needed
    for device, bytes_needed in sums.items():
        if bytes_needed <= (memory := free_memory(device)):
            continue
        has = "this machine has" if device.type == "cpu" else f"{device} has free"
        raise OPLoRAMemoryError(
            f"oplora.AdamW: the generators need {bytes_needed / 2**30:.1f} GiB, {has} {memory / 2**30:.1f} GiB. "
            f"{advice}."
        )
