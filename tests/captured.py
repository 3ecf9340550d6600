"""CUDA graphs on the CPU: a block is recorded as a graph has it, by addresses alone, and replayed.

What the block makes belongs to the graph, as the memory of torch's private pool does. All else is looked up when it is
replayed: what was let go since then is an error here, where a GPU would read whatever lies there by then.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

UNWRITTEN = ("empty", "empty_like", "new_empty", "fingerprint")


class Address:
    """Where a tensor lies; it does not keep it."""

    def __init__(self, t: Tensor) -> None:
        self._storage = StorageWeakRef(t.untyped_storage())
        self._view = t.storage_offset(), t.shape, t.stride()
        self._dtype = t.dtype

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)  # type: ignore[attr-defined]
        assert storage is not None, "a replay reads memory that was let go"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._view)


def addresses_in(some: Any) -> Any:
    return tree_map_only(Tensor, Address, some)


def tensors_at(some: Any) -> Any:
    return tree_map_only(Address, lambda address: address.tensor(), some)


def is_launch(func: Any) -> bool:
    return func.namespace == "oplora" and func.overloadpacket.__name__.startswith("cuda_")


@dataclass
class Graph:
    """What was recorded: calls with their arguments, and the tensors that take their results."""

    device: "Device"
    calls: list[tuple[Any, Any, Any, list[Tensor]]]
    pool: list[Tensor]

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            arguments, named = tensors_at(args), tensors_at(kwargs)
            if is_launch(func):
                self.device.launch(func, *arguments[1:])
                continue
            results = tree_leaves(func(*arguments, **named))
            for output, result in zip(outputs, results, strict=False):
                output.copy_(result)


class Device(TorchDispatchMode):
    """Knows which addresses are in the table of which plan, as kernels find them there."""

    def __init__(self) -> None:
        super().__init__()
        self.graph: Graph | None = None
        self.planned: dict[bytes, tuple[Tensor, Address, list[Address]]] = {}

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        self.graph = graph = Graph(self, [], [])
        try:
            yield graph
        finally:
            self.graph = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_launch(func) and func.overloadpacket.__name__.endswith("_plan"):
            return self._plan(func, args, kwargs or {})
        if self.graph is None:
            return func(*args, **(kwargs or {}))
        return self._record(self.graph, func, args, kwargs or {})

    def launch(self, func: Any, table: Tensor, workspace: Any, *more: Any) -> None:
        plan, workspace, held = self.planned[table.numpy().tobytes()]
        for address in held:
            address.tensor()
        func(plan, table, workspace.tensor(), *more)

    def _plan(self, func: Any, args: Any, kwargs: Any) -> Any:
        plan, table, workspace = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        held = [Address(t) for t in given if t.dtype != torch.int64]  # sizes and rows are read when a plan is made
        self.planned[table.numpy().tobytes()] = plan.clone(), Address(workspace), held
        if self.graph is not None:
            self.graph.pool.append(workspace)
        return plan, table, workspace

    def _record(self, graph: Graph, func: Any, args: Any, kwargs: Any) -> Any:
        if is_launch(func):
            graph.calls.append((func, [None, Address(args[1]), None, *addresses_in(args[3:])], {}, []))
            return None
        recorded = addresses_in(args), addresses_in(kwargs)
        if func._schema.is_mutable:  # nothing runs yet
            graph.calls.append((func, *recorded, []))
            return args[0] if func._schema.returns else None
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = func(*args, **kwargs)
        made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
        if any(t.untyped_storage()._cdata in known for t in made):
            return results  # views
        graph.pool += made
        if made and func.overloadpacket.__name__ not in UNWRITTEN:
            graph.calls.append((func, *recorded, made))
        return results
