"""Every torch op of the library called with what does not fit: refused with an exception, or done within its tensors.

    python tests/fuzz_ops.py CASES [SEED [FIRST]]      OPLORA_CUDA_LIBRARY names the kernels that the CPU executes

Calls of real steps are recorded; a case is one of them with a few arguments made wrong: sizes, dtypes, numbers of
tensors, layouts, memory that is gone, values. It runs with little more memory than the process has, so that nothing is
taken for a number that a caller chose. Each tensor lies between guards, which nothing may write. A plan's table is the
one thing that is passed on as it was made: it holds addresses, and lies on the device.
"""

import faulthandler
import math
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import HOST
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import oplora
from oplora import engines
from oplora.optim import refusals

GUARD, GUARD_BYTES = 0xA5, 64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
DTYPES = (*DTYPES, torch.bool, torch.complex64)
NUMBERS = (-1, 0, 1, 2, 3, 7, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, -(2**63), 12345)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-320, 1e308, 3.5)
MORE_MEMORY = 1 << 30
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)
Call = tuple[Any, list[Any]]
Change = Callable[[Tensor, random.Random], Tensor]


# ---- calls that fit ----


class Recorder(TorchDispatchMode):
    """Keeps copies of what ops are called with, a few of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "oplora":
            rest = func._schema.arguments[len(args) :]  # torch leaves out what is the default
            arguments = [*args, *((kwargs or {}).get(one.name, one.default_value) for one in rest)]
            self.calls.setdefault(func.overloadpacket.__name__, []).append((func, guarded_all(arguments)))
        return func(*args, **(kwargs or {}))


def model(dtype: torch.dtype, layers: int) -> nn.Module:
    sizes = [3, 4, 2][: layers + 1]
    net = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))).to(dtype)
    targets = [str(i) for i in range(layers)]
    return get_peft_model(net, LoraConfig(r=2, target_modules=targets), autocast_adapter_dtype=False)


def record() -> dict[str, list[Call]]:
    with Recorder() as recorder:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for dtype in (torch.float32, torch.float64):
            for state in ("lean", "exact"):
                train(dtype, state, keep=False, divides=True)
        dist.destroy_process_group()
        for on_device in (False, True):
            for module in (engines, refusals):
                module.runs_on_device = lambda device, on=on_device: on and device != HOST
            for dtype in (torch.float32, torch.bfloat16, torch.float64)[: 2 if on_device else 3]:
                for state in ("lean", "exact", None):
                    for keep in (False, True):
                        train(dtype, state, keep)
        H, Z, N = 5, 3, 7
        for dtype in (torch.float32, torch.float64):
            for W2 in (torch.randn(N, H, dtype=dtype), torch.randn(H, N, dtype=dtype).t()):
                some = [torch.randn(s, dtype=dtype) for s in ((Z,), (H, Z), (H,), (N,), (N,))]
                torch.ops.oplora.generate(*some[:3], W2, some[3])
                torch.ops.oplora.generate_backward(some[4], *some[:3], W2)
        torch.ops.oplora.fingerprint([torch.randn(5), torch.zeros(0), torch.randn(3, 4).t()])
    return recorder.calls


def train(dtype: torch.dtype, state: str | None, keep: bool, divides: bool = False) -> None:
    """divides: the factors are DTensors, as processes divide them."""
    net = model(dtype, 2 if keep else 1)
    if divides:
        fully_shard(net, mesh=dist.init_device_mesh("cpu", (1,)))
    options: dict[str, Any] = {} if state is None else {"state": state, "hidden_width": 5, "latent_width": 3}
    if keep:
        options |= {"init": "keep"} if state else {}
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.25)
    optimizer = oplora.AdamW(net, lr=1e-2, **options)
    for clip in (None, 0.1, None):
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()


# ---- guards ----


def span(t: Tensor) -> int:
    """Bytes of its storage up to its last element."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size() if t.numel() else 0


def guarded(t: Tensor) -> Tensor:
    """A copy between guards, of the same strides."""
    size = t.element_size()
    count = span(t) // size - t.storage_offset() if t.numel() else 0
    raw = torch.full((count * size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8)
    inner = raw[GUARD_BYTES : GUARD_BYTES + count * size].view(t.dtype)
    return inner.as_strided(t.shape, t.stride(), GUARD_BYTES // size).copy_(t.detach())


def guarded_all(some: Any) -> Any:
    if isinstance(some, Tensor):
        return guarded(some)
    return [guarded_all(one) for one in some] if isinstance(some, list | tuple) else some


def leaves(some: Any) -> list[Tensor]:
    if isinstance(some, Tensor):
        return [some]
    return [t for one in some for t in leaves(one)] if isinstance(some, list | tuple) else []


def guards(tensors: list[Tensor]) -> list[Tensor]:
    found = []
    for t in tensors:
        raw = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
        found += [raw[:GUARD_BYTES], raw[-GUARD_BYTES:]]
    return found


# ---- what does not fit ----


def cut(t: Tensor, rng: random.Random) -> Tensor:
    return t.narrow(rng.randrange(t.dim()), 0, 0) if t.dim() and rng.random() < 0.3 else t.flatten()[:-1].clone()


def shrunk(t: Tensor, rng: random.Random) -> Tensor:
    """As FSDP leaves a tensor whose memory is elsewhere."""
    gone = t.clone()
    gone.untyped_storage().resize_(rng.choice([0, gone.untyped_storage().nbytes() // 2]))
    return gone


def strided(t: Tensor, rng: random.Random) -> Tensor:
    return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], -1)[..., 0]


def longer(t: Tensor, rng: random.Random) -> Tensor:
    return torch.cat([t, t[:1]]) if t.dim() else t[None]


def narrower(t: Tensor, rng: random.Random) -> Tensor:
    return t[..., :-1].contiguous() if t.dim() else t


def other_values(t: Tensor, rng: random.Random) -> Tensor:
    changed = t.clone()
    flat = changed.view(-1) if changed.is_contiguous() else changed.flatten()
    for _ in range(rng.randint(1, 3) if t.numel() else 0):
        i = rng.randrange(t.numel())
        if t.dtype in (torch.int64, torch.int32, torch.uint8):
            info = torch.iinfo(t.dtype)
            flat[i] = min(max(rng.choice(NUMBERS), info.min), info.max)
        elif t.dtype == torch.float64 and rng.random() < 0.3:
            flat.view(torch.int64)[i] = rng.choice(NUMBERS)  # as the step counts are read
        else:
            flat[i] = rng.choice(FLOATS)
    return changed


CHANGES: list[Change] = [
    cut,
    shrunk,
    strided,
    longer,
    narrower,
    lambda t, rng: t.to(rng.choice(DTYPES)),
    lambda t, rng: t.reshape(rng.choice([(-1,), (1, *t.shape), (*t.shape, 1)])),
    lambda t, rng: t.to("meta"),
    lambda t, rng: t.to_sparse() if t.dim() else t,
    lambda t, rng: t.expand(rng.choice([2, 1 << 40]), *t.shape),
    lambda t, rng: torch._neg_view(t) if t.is_floating_point() else t,
    lambda t, rng: torch.zeros(()),
    other_values,
    other_values,
    other_values,
    other_values,
]


def changed(t: Tensor, rng: random.Random, changes: Sequence[Change]) -> Tensor:
    is_plain = t.layout == torch.strided and t.device.type == "cpu" and t.numel() <= 1 << 20
    if not is_plain or t.untyped_storage().nbytes() < span(t):
        return t  # changed before, and torch itself does not look whether memory is gone
    try:
        return rng.choice(changes)(t, rng)
    except REFUSALS:
        return t


def wrong(some: Any, rng: random.Random, everything: list[Tensor]) -> Any:
    if isinstance(some, Tensor):
        if rng.random() < 0.1:
            return rng.choice(everything)
        return changed(some, rng, CHANGES)
    if isinstance(some, list):
        return wrong_list(list(some), rng, everything)
    if isinstance(some, bool):
        return not some
    return rng.choice(FLOATS) if isinstance(some, float) else rng.choice([*everything, None])


def wrong_list(some: list[Any], rng: random.Random, everything: list[Tensor]) -> list[Any]:
    kind, at = rng.randrange(7), rng.randrange(max(len(some), 1))
    if kind == 0:
        return some[:at]
    if kind == 1:
        return [*some, *some[:1]] if rng.random() < 0.9 else some * 1000
    if kind == 2:
        return [None if i == at else one for i, one in enumerate(some)]
    if kind == 3:
        return rng.sample(some, len(some))
    return [wrong(one, rng, everything) if i == at else one for i, one in enumerate(some)]


# ---- a case ----


def run(func: Any, arguments: list[Any]) -> Any:
    """The op's results, or None if it refused."""
    try:
        results = func(*arguments)
        return () if results is None else results
    except REFUSALS as error:
        if any(sign in str(error) for sign in ("bad_alloc", "out of memory", "std::vector")):
            raise MemoryError("memory was to be taken for a number that a caller chose") from error
        return None


class Fuzz:
    def __init__(self, calls: dict[str, list[Call]]) -> None:
        self.calls, self.names = calls, sorted(calls)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def case(self, rng: random.Random) -> None:
        name = rng.choice(self.names)
        func, recorded = rng.choice(self.calls[name])
        arguments = guarded_all(recorded)
        watched = leaves(arguments)
        launches = name.startswith("cuda_") and not name.endswith("_plan")
        held = self._planned(name, arguments, rng) if launches else None
        everything = leaves(arguments)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            i = rng.randrange(len(arguments))
            if launches and i == 1:  # the table
                arguments[i] = changed(arguments[i], rng, [cut, shrunk, longer, strided])
            else:
                arguments[i] = wrong(arguments[i], rng, [t for t in everything if t is not arguments[i]])
        results = run(func, arguments)
        (self.refused if results is None else self.done)[name] += 1
        if name.endswith("_plan") and results is not None:
            self._launch(name, results, rng)  # while the arguments are there
        for guard in guards(watched + ([] if held is None else held)):
            assert bool((guard == GUARD).all()), f"{name} has written beyond a tensor"

    def _planned(self, name: str, arguments: list[Any], rng: random.Random) -> list[Tensor]:
        """Puts a plan with its table and workspace before the other arguments; the tensors that it was made for."""
        func, recorded = rng.choice(self.calls["_".join([*name.split("_")[:2], "plan"])])
        of_plan = guarded_all(recorded)
        arguments[:3] = func(*of_plan)
        return leaves(of_plan)

    def _launch(self, name: str, planned: Any, rng: random.Random) -> None:
        """What a plan op has accepted can be launched."""
        for launch in self.names:
            if launch.startswith(name.removesuffix("plan")) and launch != name:
                func, recorded = rng.choice(self.calls[launch])
                run(func, [*planned, *guarded_all(recorded[3:])])


def main(cases: int, seed: int = 0, first: int = 0) -> None:
    faulthandler.enable()
    faulthandler.enable()
    torch.set_num_threads(1)
    Tensor.__repr__ = lambda t, **_: "a tensor"  # type: ignore[method-assign]  # torch would read memory that is gone
    fuzz = Fuzz(record())
    every = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("oplora::")}
    assert set(fuzz.names) == every, set(fuzz.names) ^ every
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number in range(first, first + cases):
        rng = random.Random(f"{seed} {number}")
        faulthandler.dump_traceback_later(60, exit=True)  # a case takes milliseconds
        try:
            fuzz.case(rng)
        except BaseException:
            print(f"case {number} of seed {seed}", file=sys.stderr)
            raise
    for name in fuzz.names:
        print(f"{name}: {fuzz.refused[name]} refused, {fuzz.done[name]} done")
    print(f"{cases} cases")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
