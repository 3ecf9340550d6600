"""Torch ops under arguments that do not fit: nothing crashes, and nothing is written beyond a tensor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, train
from torch import Tensor

import oplora

CASES = int(os.environ.get("OPLORA_FUZZ_CASES", "2000"))  # 100000 by hand
OPS = torch.ops.oplora


def test_no_argument_crashes_an_op(cuda_on_cpu: Path) -> None:
    """In a process of its own, which would be gone."""
    program = [sys.executable, str(Path(__file__).with_name("fuzz_ops.py")), str(CASES)]
    environment = {**os.environ, "OPLORA_CUDA_LIBRARY": str(cuda_on_cpu), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"{CASES} cases" in done.stdout


@pytest.mark.parametrize("count", [-(2**63), -1, 0, 2, 2**31, 2**32 - 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("state", ["exact", "lean", "rate"])
def test_a_count_of_factors_is_refused_before_memory_is_taken(state: str, count: int) -> None:
    one, numbers = torch.zeros(4), torch.zeros(64)
    doubles, flags = torch.zeros(64, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    adamw, rates = torch.zeros(1, 7, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    sizes = {"exact": [2, 2, count, 0, 0, 0], "lean": [2, 2, 1, 1, 0, 0, count, 0, 0, 0, 0], "rate": [count, 0]}
    table, rows = torch.tensor([sizes[state]]), torch.tensor([[0, 0]])
    arguments = {
        "exact": (numbers, [one], table, doubles),
        "lean": (numbers, numbers.bfloat16(), doubles, [one], table, flags, doubles, doubles),
        "rate": (numbers, numbers, [one], [], [one], table, flags, adamw, rates, rows, doubles),
    }
    with pytest.raises(RuntimeError, match=rf"layer 0 has {count} factors, expected 1 to 1"):
        getattr(OPS, f"{state}_measure_")(*arguments[state])


def test_memory_that_is_gone_is_refused() -> None:
    """As FSDP leaves what is sharded."""
    z, W1, c1, W2, c2 = (torch.ones(s) for s in ((2,), (3, 2), (3,), (4, 3), (4,)))
    for some in (z, W1, c1, W2, c2):
        kept = some.clone()
        some.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="has no memory for its elements"):
            OPS.generate(z, W1, c1, W2, c2)
        some.untyped_storage().resize_(kept.untyped_storage().nbytes())
        some.copy_(kept)


# ---- plans ----


def planned(state: str) -> tuple[Tensor, Tensor, Tensor, oplora.AdamW]:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, **({"preset": "auto"} if state == "rate" else {"state": state}))
    train(model, optimizer, 1)
    (engine,) = optimizer._stepper.engines
    return *engine.plan.arguments(), optimizer


def launch(state: str, what: str, *arguments: object) -> None:
    more = (None,) if state == "rate" else (None, False)
    getattr(OPS, f"cuda_{state}_{what}_")(*arguments, *(more if what == "step" else ()))


@pytest.mark.parametrize("state", ["exact", "lean", "rate"])
@pytest.mark.parametrize("what", ["measure", "step"])
def test_a_launch_takes_the_plan_that_was_made(as_device, state: str, what: str) -> None:
    plan, table, workspace, _optimizer = planned(state)
    launch(state, what, plan, table, workspace)
    for i in range(len(plan)):
        wrong = plan.clone()
        wrong[i] ^= 1
        with pytest.raises(RuntimeError, match="plan is not what a plan op has returned"):
            launch(state, what, wrong, table, workspace)
    for name, arguments in {
        "plan": (plan[:-1].clone(), table, workspace),
        "table": (plan, table[:-1].clone(), workspace),
        "workspace": (plan, table, workspace.clone()),
    }.items():
        with pytest.raises(RuntimeError, match=rf"{name} (has|is)"):
            launch(state, what, *arguments)
    for other in {"exact", "lean", "rate"} - {state}:
        with pytest.raises(RuntimeError, match="plan is that of another state"):
            launch(other, what, plan, table, workspace)


@pytest.mark.parametrize("state", ["exact", "lean"])
@pytest.mark.parametrize("what", ["measure", "step"])
def test_a_plan_without_gradients_is_not_stepped(as_device, monkeypatch, state: str, what: str) -> None:
    *_, optimizer = planned(state)
    (engine,) = optimizer._stepper.engines
    made = []
    plan_of = engine.state.plan
    monkeypatch.setattr(engine.state, "plan", lambda *given: made.append(plan_of(*given)) or made[-1])
    engine.generate(engine.states[0])
    with pytest.raises(RuntimeError, match="plan was made without gradients"):
        launch(state, what, *made[0])


def test_a_plan_of_a_lazily_negated_view_is_refused(as_device, monkeypatch) -> None:
    """It would keep the address of a copy that is gone when it returns."""
    *_, optimizer = planned("lean")
    (engine,) = optimizer._stepper.engines
    engine.state.scalars = torch._neg_view(engine.state.scalars)
    held = engine.state.numbers._use_count()
    with pytest.raises(RuntimeError, match="lazily negated"):
        engine.generate(engine.states[0])
    assert engine.state.numbers._use_count() == held  # nothing is kept


# ---- schemas ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state", ["exact", "lean", "rate"])
def test_ops_write_what_their_schemas_say(state: str, dtype: torch.dtype) -> None:
    """On the CPU, where every tensor that is written is an argument; both ways, over the steps of a model."""
    written: dict[str, set[str]] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace != "oplora" or func.overloadpacket.__name__ == "fingerprint":
                return func(*args, **(kwargs or {}))
            before = [[t.clone() for t in tensors_of(some)] for some in args]
            result = func(*args, **(kwargs or {}))
            seen = written.setdefault(func.overloadpacket.__name__, set())
            for argument, old, some in zip(func._schema.arguments, before, args, strict=False):
                if any(not same_bits(a, b) for a, b in zip(old, tensors_of(some), strict=True)):
                    seen.add(argument.name)
            return result

    with Watch():
        model = make_model(dtype)
        optimizer = oplora.AdamW(model, lr=1e-2, **({"preset": "auto"} if state == "rate" else {"state": state}))
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.step()
    assert {f"{state}_measure_", f"{state}_step_"} <= written.keys()
    for name, seen in written.items():
        schema = getattr(OPS, name).default._schema
        assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == seen, name


def tensors_of(some: object) -> list[Tensor]:
    return [some] if isinstance(some, Tensor) else [t for t in some or () if t is not None] if is_list(some) else []


def is_list(some: object) -> bool:
    return isinstance(some, list | tuple)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


def test_launches_are_in_no_graph_that_is_reordered() -> None:
    """What a plan writes is no argument: tracing stops at each, as none tells what its results look like."""
    names = [s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("oplora::cuda_")]
    assert len(names) == 11
    for name in names:
        op = f"oplora::{name}"
        assert not any(
            torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
            for key in ("Meta", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "Functionalize")
        )

    @torch.compile(fullgraph=True, backend="eager")
    def step(plan: Tensor, table: Tensor, workspace: Tensor) -> None:
        OPS.cuda_lean_measure_(plan, table, workspace)

    with pytest.raises(Exception, match=r"cuda_lean_measure_"):
        step(*(torch.zeros(8, dtype=torch.uint8) for _ in range(3)))
