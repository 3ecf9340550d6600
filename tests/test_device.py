"""oplora.AdamW's way to a GPU, with kernels that the CPU executes (tests/cuda_on_cpu): what the host plans, hands over,
remembers and is told later. The kernels' own results are compared with the C core in tests/cuda."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import adapter_types
import pytest
import torch
from conftest import HOST, assert_same_bits, batches, factors, make_model, train, train_on
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oplora
from oplora import engines, kernels, reference
from oplora.engines import DeviceEngine, staging

STATES = ("lean", "exact", None)  # None: of preset "auto"


def trained(steps: int = 3, dtype: torch.dtype = torch.float32, **settings: object) -> tuple[nn.Module, oplora.AdamW]:
    model = make_model(dtype)
    optimizer = oplora.AdamW(model, lr=1e-2, seed=5, **settings)
    train(model, optimizer, steps, dtype)
    return model, optimizer


def both(as_device: Callable[[bool], None], **settings: object) -> tuple[nn.Module, nn.Module]:
    """A model trained by the kernels, and by the C core."""
    theirs, _ = trained(**settings)
    as_device(False)
    ours, _ = trained(**settings)
    as_device(True)
    return theirs, ours


def backward(model: nn.Module) -> None:
    x, y = next(batches(1, next(p.dtype for p in model.parameters())))
    (model(x) - y).square().mean().backward()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_trains_with_the_cores_bits(as_device, state, dtype):
    on_device, on_core = both(as_device, state=state, dtype=dtype)
    assert_same_bits(factors(on_device), factors(on_core))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("several", [False, True])
def test_the_rate_that_is_found_is_the_cores(as_device, dtype, several, monkeypatch):
    if several:  # engines
        monkeypatch.setattr(engines.Recipe, "make", lambda self, ties: [self._engine([tie]) for tie in ties])
    found = []
    for on in (True, False):
        as_device(on)
        _, optimizer = trained(steps=6, dtype=dtype)
        assert len(optimizer._stepper.engines) == 1 + several
        found += [engine.state.found for engine in optimizer._stepper.engines]
    for numbers in found[1:]:
        torch.testing.assert_close(numbers, found[0], rtol=1e-12, atol=0)
    rate, _, _, _, steps, *_ = found[0].tolist()
    assert steps == 6 and rate != engines.rate.START


def test_a_refused_step_finds_no_rate(as_device):
    model, optimizer = trained(skip_nonfinite=True)
    found = optimizer._stepper.found
    before, state = found.clone(), copy.deepcopy(optimizer.state_dict()["state"])
    next(p.grad for p in model.parameters() if p.grad is not None)[0, 0] = float("nan")
    for _ in range(2):
        optimizer.step()
        assert torch.equal(found, before)
    for number, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, state[number][key]) if isinstance(value, torch.Tensor) else True, key
    train(model, optimizer, 1)
    assert found[4] == before[4] + 1


@pytest.mark.parametrize("state", ["lean", "exact"])
@pytest.mark.parametrize("init", ["paper", "keep"])
def test_starts_are_the_cores(as_device, state, init):
    on_device, on_core = both(as_device, state=state, init=init, steps=0)
    assert_same_bits(factors(on_device), factors(on_core))


@pytest.mark.parametrize("settings", [{"start": "uniform"}, {"weight_rank": 3, "moment_rank": 2}, {"init": "keep"}])
def test_settings_reach_the_kernels(as_device, settings):
    on_device, on_core = both(as_device, **settings)
    assert_same_bits(factors(on_device), factors(on_core))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("case", ["DoRA, Linear", "LoRA, parameters", "VeRA", "IA3", "LoHa, Conv2d", "Lily"])
def test_every_kind_of_adapter_trains_with_the_cores_bits(as_device, state, case):
    def run() -> dict[str, torch.Tensor]:
        model = adapter_types.make(case, torch.float32)
        pairs = adapter_types.data(case, 3, torch.float32)
        train_on(model, oplora.AdamW(model, lr=1e-2, state=state), pairs)
        return model.state_dict()

    on_device = run()
    as_device(False)
    assert_same_bits(on_device, run())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preconditioned_steps_are_the_cores(as_device, state, dtype):
    on_device, on_core = both(as_device, state=state, dtype=dtype, precondition=1e-2)
    for name, mine in factors(on_device).items():
        # of 16 bits the device takes a gradient that was rounded once more
        torch.testing.assert_close(mine, factors(on_core)[name], rtol=0, atol=0 if dtype == torch.float32 else 1e-2)


def test_preconditioned_float16_is_refused_on_a_device(as_device):
    with pytest.raises(oplora.OPLoRAError, match=r"float16, whose range .* bfloat16"):
        oplora.AdamW(make_model(torch.float16), precondition=1e-6)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_is_the_cores(as_device, state, dtype):
    def clipped() -> tuple[nn.Module, torch.Tensor]:
        model = make_model(dtype)
        optimizer = oplora.AdamW(model, lr=1e-2, state=state)
        norms = []
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            norms.append(optimizer.clip_grad_norm_(0.05))
            optimizer.step()
        return model, torch.stack(norms)

    on_device, norms = clipped()
    as_device(False)
    on_core, expected = clipped()
    torch.testing.assert_close(norms, expected, rtol=1e-12, atol=0)
    assert bool((norms > 0.05).any())
    assert_same_bits(factors(on_device), factors(on_core))


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a device: numbers that the host reads."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        pinned = name == "_local_scalar_dense" and args[0].dtype == torch.int32  # the verdict, which lies on the host
        assert pinned or name not in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("state", STATES)
def test_neither_step_nor_clipping_waits(as_device, state):
    model = make_model(modules_to_save=["second"], target_modules=["first"])
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    for i in range(3):
        optimizer.zero_grad()
        backward(model)
        # before its first step preset "auto" looks whether what tells of the rate starts at zero
        with nullcontext() if state is None and i == 0 else NoWaiting():
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    assert optimizer._stepper.states[0].steps == 3


@pytest.mark.parametrize("state", STATES)
def test_a_plan_serves_until_an_address_changes(as_device, state):
    model, optimizer = trained(steps=1, state=state)
    (engine,) = optimizer._stepper.engines
    plan = engine.plan
    for _ in range(2):
        optimizer.step()
        assert engine.plan is plan
    gradient = next(p for p in model.parameters() if p.grad is not None)
    gradient.grad = gradient.grad.clone()
    optimizer.step()
    assert engine.plan is not plan


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_told_at_the_next_step(as_device, state, bad):
    model, optimizer = trained(state=state)
    before, saved = factors(model), copy.deepcopy(optimizer.state_dict()["state"])
    name, parameter = next((n, p) for n, p in model.named_parameters() if "second" in n and "lora_B" in n)
    good = parameter.grad.clone()
    parameter.grad[1, 1] = bad
    optimizer.step()
    assert_same_bits(factors(model), before)
    after = optimizer.state_dict()["state"]
    for number, entry in saved.items():
        for key, value in entry.items():
            assert torch.equal(value, after[number][key]) if isinstance(value, torch.Tensor) else True, key
    parameter.grad.copy_(good)
    with pytest.raises(oplora.OPLoRAError, match=r"layer .*second.*1 earlier step"):
        optimizer.step()
    optimizer.step()  # told once, then it goes on
    assert not torch.equal(dict(model.named_parameters())[name], before[name])


def test_refused_steps_are_skipped_on_request(as_device):
    model, optimizer = trained(skip_nonfinite=True)
    before = factors(model)
    gradient = next(p.grad for p in model.parameters() if p.grad is not None)
    gradient[0, 0] = float("nan")
    optimizer.step()
    optimizer.step()
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize("where", ["factor", "other"])
def test_all_parameters_refuse_together(as_device, where):
    model = make_model(modules_to_save=["second"], target_modules=["first"])
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bad = next(p for n, p in model.named_parameters() if p.grad is not None and ("lora_" in n) == (where == "factor"))
    bad.grad.view(-1)[0] = float("inf")
    optimizer.step()
    assert_same_bits({name: p.detach() for name, p in model.named_parameters()}, before)


def test_other_parameters_step_as_torchs(as_device):
    def weights(on: bool) -> torch.Tensor:
        as_device(on)
        model = make_model(modules_to_save=["second"], target_modules=["first"])
        train(model, oplora.AdamW(model, lr=1e-2), 3)
        return next(p for n, p in model.named_parameters() if "modules_to_save.default.weight" in n).detach()

    torch.testing.assert_close(weights(True), weights(False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("state", STATES)
def test_a_state_resumes_on_either_side(as_device, state):
    """Saved on the device, it goes on there and on the CPU with the same bits."""
    model, optimizer = trained(state=state)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    ends = []
    for on in (True, False):
        as_device(on)
        again = make_model()
        resumed = oplora.AdamW(again, lr=1e-2, seed=99, state=state)
        again.load_state_dict(weights)
        resumed.load_state_dict(saved)
        train(again, resumed, 2)
        ends.append(factors(again))
    as_device(True)
    train(model, optimizer, 2)
    for end in ends:
        assert_same_bits(end, factors(model))


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_loaded_between_steps_of_one_plan(as_device, state):
    """Gradients stay where they are; how the loaded generators began is another story."""

    def loaded(on: bool) -> dict[str, torch.Tensor]:
        as_device(on)
        source = oplora.AdamW(make_model(), lr=1e-2, seed=99, state=state).state_dict()
        model, optimizer = trained(state=state)
        optimizer.load_state_dict(copy.deepcopy(source))
        optimizer.step()
        optimizer.step()
        return factors(model)

    assert_same_bits(loaded(True), loaded(False))


@pytest.mark.parametrize("state", STATES)
def test_a_moved_model_takes_its_generators_along(as_device, state):
    """As accelerate and Trainer do: the optimizer is made before the model goes to the GPU."""
    as_device(False)
    model, optimizer = trained(steps=2, state=state)
    expected, other = trained(steps=2, state=state)
    as_device(True)
    (engine,) = optimizer._stepper.engines
    engine.placed = torch.device("meta")  # anywhere else
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as a move does
    train(model, optimizer, 2)
    assert isinstance(optimizer._stepper.engines[0], DeviceEngine)
    as_device(False)
    train(expected, other, 2)
    assert_same_bits(factors(model), factors(expected))


@pytest.mark.parametrize("state", STATES)
def test_layers_without_gradients_stay(as_device, state):
    model, optimizer = trained(state=state)
    before = factors(model)
    for name, parameter in model.named_parameters():
        if "first" in name:
            parameter.grad = None
    optimizer.step()
    steps = {generator.name: generator.steps for generator in optimizer._stepper.states}
    assert sorted(steps.values()) == [3, 4]
    for name, value in factors(model).items():
        assert torch.equal(value, before[name]) == ("first" in name)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_that_is_frozen_stays(as_device, state, dtype):
    def go_on(on: bool) -> dict[str, torch.Tensor]:
        as_device(on)
        model, optimizer = trained(state=state, dtype=dtype)
        As = [p for name, p in model.named_parameters() if "lora_A" in name]
        before = [p.detach().clone() for p in As]
        for is_trained in (False, True):
            for p in As:
                p.requires_grad_(is_trained)
                p.grad = None
            train(model, optimizer, 2, dtype)
            assert all(map(torch.equal, before, As)) != is_trained
        return factors(model)

    assert_same_bits(go_on(True), go_on(False))


@pytest.mark.parametrize("state", STATES)
def test_rates_reach_the_device_as_numbers_and_as_tensors(as_device, state):
    ends = []
    for as_rate in (float, torch.tensor):
        model, optimizer = trained(state=state)
        optimizer.param_groups[0]["lr"] = as_rate(3e-3)
        train(model, optimizer, 2)
        ends.append(factors(model))
    rates = (torch.tensor(3e-3) if state else torch.tensor(3e-3) / 1e-2).double().item()  # auto: of the highest
    assert optimizer._stepper.engines[0].numbers.rates[0, 0].item() == rates
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("state", STATES)
def test_edits_are_gone_on_from(as_device, state):
    def edited(on: bool) -> dict[str, torch.Tensor]:
        as_device(on)
        model, optimizer = trained(state=state)
        for _ in range(2):  # the second of what has a base
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.5)
            if state == "exact":
                with pytest.warns(UserWarning, match="were changed"):
                    train(model, optimizer, 1)
            train(model, optimizer, 1)
        return factors(model)

    assert_same_bits(edited(True), edited(False))


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("init", ["paper", "keep"])
def test_edits_before_the_first_step_are_gone_on_from(as_device, state, init):
    def edited(on: bool) -> dict[str, torch.Tensor]:
        as_device(on)
        model = make_model()
        optimizer = oplora.AdamW(model, lr=1e-2, state=state, init=init if state else None)
        for _ in range(2):
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.add_(0.5)
            optimizer.clip_grad_norm_(1.0)
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.clip_grad_norm_(1.0)
        train(model, optimizer, 2)
        return factors(model)

    assert_same_bits(edited(True), edited(False))


@pytest.mark.parametrize("state", ["lean", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_of_16_bits_that_no_version_counts_are_gone_on_from(as_device, state, dtype):
    def edited(on: bool) -> dict[str, torch.Tensor]:
        as_device(on)
        model, optimizer = trained(state=state, dtype=dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    (parameter.data if on else parameter).mul_(0.5)
        train(model, optimizer, 2, dtype)
        return factors(model)

    assert_same_bits(edited(True), edited(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edits_of_16_bits_that_only_the_kernels_see(as_device, dtype, monkeypatch):
    """Fingerprints do not tell on a GPU: what was written is also what is generated from then on."""
    monkeypatch.setattr(engines.engine, "marks", lambda tensors: [(t.data_ptr(), t._version) for t in tensors])
    model, optimizer = trained(dtype=dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(0.5)
    optimizer.step()
    rate = float(optimizer._stepper.found[0])
    for value in [*factors(model).values(), optimizer._stepper.engines[0].state.generated]:
        torch.testing.assert_close(value.float(), torch.full(value.shape, 0.5), rtol=0, atol=4 * rate + 1e-3)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_any_layout(as_device, state, dtype):
    def transposed(on: bool) -> dict[str, torch.Tensor]:
        as_device(on)
        model = make_model(dtype)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.t().contiguous().t()
        optimizer = oplora.AdamW(model, lr=1e-2, state=state)
        train(model, optimizer, 3, dtype)
        return factors(model)

    assert_same_bits(transposed(True), transposed(False))


def test_stats_are_the_cores(as_device):
    for state in STATES:
        _, optimizer = trained(state=state)
        as_device(False)
        _, other = trained(state=state)
        as_device(True)
        mine, theirs = oplora.stats(optimizer), oplora.stats(other)
        for layer, numbers in theirs.items():
            for key, value in numbers.items():
                assert mine[layer][key] == pytest.approx(value, rel=1e-12, nan_ok=True), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generators_in_host_memory_train_as_on_the_cpu(as_device, dtype, monkeypatch):
    fetched: list[int] = []
    fetch = staging.Staging.fetch

    def counted(sources, buffers):
        fetched.append(sum(source.numel() for source in sources))
        fetch(sources, buffers)

    monkeypatch.setattr(staging.Staging, "fetch", staticmethod(counted))
    model, optimizer = trained(state="exact", generator_device=HOST, dtype=dtype)
    assert not isinstance(optimizer._stepper.engines[0], DeviceEngine)
    entries = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert fetched == [entries] * 3
    as_device(False)
    expected, _ = trained(state="exact", dtype=dtype)
    assert_same_bits(factors(model), factors(expected))


def test_generators_in_host_memory_are_clipped_and_refuse(as_device):
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, state="exact", generator_device=HOST)
    backward(model)
    norm = optimizer.clip_grad_norm_(1e-3)
    optimizer.step()
    assert float(norm) > 1e-3
    assert float(optimizer._stepper.states[0].report[0]) <= 1e-6
    next(p.grad for p in model.parameters() if p.grad is not None)[0, 0] = float("nan")
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match="NaN"):
        optimizer.step()
    assert_same_bits(factors(model), before)


def test_generator_device_is_for_exact_state():
    with pytest.raises(oplora.OPLoRAError, match="state='exact'"):
        oplora.AdamW(make_model(), generator_device="cpu")
    with pytest.raises(oplora.OPLoRAError, match="expected 'cpu'"):
        oplora.AdamW(make_model(), state="exact", generator_device="cuda")


def test_double_factors_are_refused_on_a_device(as_device):
    with pytest.raises(oplora.OPLoRAError, match="float64"):
        oplora.AdamW(make_model(torch.float64))


def test_no_kernels_is_told_with_how_to_build_them(as_device, monkeypatch):
    monkeypatch.delenv("OPLORA_CUDA_LIBRARY")
    monkeypatch.setattr(kernels, "_LIBRARY", Path("not there"))
    with pytest.raises(oplora.OPLoRAError, match=r"OPLORA_CUDA=1 pip install"):
        oplora.AdamW(make_model())


def test_the_ops_tell_how_to_build_a_missing_library(tmp_path):
    call = (
        "import torch, oplora.ops; t = torch.zeros(0, dtype=torch.uint8)\ntorch.ops.oplora.cuda_lean_measure_(t, t, t)"
    )
    environment = {**os.environ, "OPLORA_CUDA_LIBRARY": str(tmp_path / "liboplora_cuda.so")}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "does not load" in done.stderr
    assert "OPLORA_CUDA=1 pip install" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [True, False])
def test_generates_cuda_side(as_device, dtype, columns):
    """The op's CUDA key, called with the CPU's tensors."""
    torch.manual_seed(3)
    H, Z, N = 33, 7, 130
    z, W1, c1, c2, g = (torch.randn(size, dtype=dtype) for size in ((Z,), (H, Z), (H,), (N,), (N,)))
    W2 = torch.randn(H, N, dtype=dtype).t() if columns else torch.randn(N, H, dtype=dtype)
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    ops = torch.ops.oplora
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    v = ops.generate.default.redispatch(on_cuda, z, W1, c1, W2, c2)
    torch.testing.assert_close(v, reference.generate(z, W1, c1, W2, c2), **tolerance)
    ours = ops.generate_backward.default.redispatch(on_cuda, g, z, W1, c1, W2)
    for mine, theirs in zip(ours, reference.generate_backward(g, z, W1, c1, W2), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_the_ops_refuse_what_does_not_fit(as_device):
    _, optimizer = trained(steps=1, state="lean")
    (engine,) = optimizer._stepper.engines
    lean, parameters = engine.state, engine.states[0].factors.layer.parameters()
    gradients = [p.grad for p in parameters]
    tables = lean.sizes[:1], lean.random[:2]
    args = [*lean.arenas(), parameters, [None] * 2, [None] * 2, gradients, *tables]
    report, dh = torch.zeros(9, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    rows = torch.tensor([[0, 0]])
    last = [engine.numbers.adamw, engine.numbers.rates, rows, engine.verdict, report, dh]
    plan = torch.ops.oplora.cuda_lean_plan
    plan(*args, *last)
    for index, bad, what in (
        (2, torch.tensor([[2, 0]]), "no row 2"),
        (2, torch.tensor([[0, 3]]), "no 2 rows from row 3"),
        (0, engine.numbers.adamw[:, :6].contiguous(), "rows of 7 numbers"),
        (1, engine.numbers.rates[:, :1].contiguous(), "rows of 2 numbers"),
        (3, engine.verdict[:1], "verdict"),
        (4, report[:8], "report"),
        (5, dh[:31], "dh"),
    ):
        with pytest.raises(RuntimeError, match=what):
            plan(*args, *[bad if i == index else value for i, value in enumerate(last)])
    with pytest.raises(RuntimeError, match="a factor is missing"):
        plan(*args[:3], [None] * 2, *args[4:], *last)
    with pytest.raises(RuntimeError, match="has another dtype"):
        plan(*args[:6], [g.double() for g in gradients], *args[7:], *last)


def test_the_ops_of_state_rate_refuse_what_does_not_fit(as_device):
    _, optimizer = trained(steps=1)
    (engine,) = optimizer._stepper.engines
    rate, parameters = engine.state, engine.states[0].factors.layer.parameters()
    args = {
        "generated": rate.generated,
        "exp_avg_sq": rate.exp_avg_sq,
        "found": rate.found,
        "factors": parameters,
        "rounded": [None] * 2,
        "bases": [None] * 2,
        "grads": [p.grad for p in parameters],
        "sizes": rate.sizes[:1],
        "listens": rate.listens[:2],
        "adamw": engine.numbers.adamw,
        "rates": engine.numbers.rates,
        "rows": torch.tensor([[0, 0]]),
        "verdict": engine.verdict,
        "report": torch.zeros(5, dtype=torch.float64),
    }
    plan = torch.ops.oplora.cuda_rate_plan
    plan(**args)
    for name, bad, what in (
        ("generated", rate.generated[:5], "exp_avg_sq has"),
        ("found", rate.found[:1], "found"),
        ("found", rate.found.float(), "found"),
        ("factors", [None] * 2, "a factor is missing"),
        ("grads", [p.grad.double() for p in parameters], "has another dtype"),
        ("sizes", torch.tensor([[2, rate.generated.numel()]]), "within generated"),
        ("listens", rate.listens[:1], "listens"),
        ("rows", torch.tensor([[2, 0]]), "no row 2"),
        ("verdict", engine.verdict[:1], "verdict"),
        ("report", torch.zeros(4, dtype=torch.float64), "report"),
    ):
        with pytest.raises(RuntimeError, match=what):
            plan(**{**args, name: bad})
    halves = [p.detach().bfloat16() for p in parameters]
    with pytest.raises(RuntimeError, match="value before rounding"):
        plan(**{**args, "factors": [None] * 2, "rounded": halves, "grads": halves})


@pytest.mark.parametrize("state", STATES)
def test_layers_on_several_devices_step_or_refuse_together(as_device, state, monkeypatch):
    expected, _ = trained(state=state)
    monkeypatch.setattr(engines.Recipe, "make", lambda self, ties: [self._engine([tie]) for tie in ties])
    model, optimizer = trained(state=state)
    assert len(optimizer._stepper.engines) == 2
    assert_same_bits(factors(model), factors(expected))
    before = factors(model)
    next(p.grad for n, p in model.named_parameters() if "second" in n and "lora_A" in n)[0, 0] = float("nan")
    optimizer.step()
    assert_same_bits(factors(model), before)
    with pytest.raises(oplora.OPLoRAError, match="second"):
        optimizer.step()


class CountingOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_step(layers: int, **settings: object) -> tuple[int, int]:
    """How many Python functions and how many torch ops the step of a model of as many layers calls."""
    sizes = [nn.Linear(4, 4, bias=False) for _ in range(layers)]
    config = LoraConfig(r=2, target_modules=[str(i) for i in range(layers)])
    model = get_peft_model(nn.Sequential(*sizes), config)
    optimizer = oplora.AdamW(model, **settings)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    with CountingOps() as ops:
        optimizer.step()
    sys.setprofile(count)
    optimizer.step()
    sys.setprofile(None)
    return calls, ops.count


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_the_hosts_part_of_a_step_calls_no_more_for_many_layers(as_device, state, on_device):
    as_device(on_device)
    few, many = (calls_of_a_step(layers, state=state, hidden_width=4 if state else None) for layers in (2, 40))
    assert few == many
