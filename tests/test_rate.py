"""Preset "auto": nobody chooses a learning rate."""

import copy
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapter_types import CASES, data, make
from conftest import assert_same_bits, batches, factors, make_model, train, train_on
from rate_oracle import Oracle
from torch import Tensor, nn

import oplora
from oplora.engines import FOUND


def found(optimizer: Any) -> dict[str, float]:
    return dict(zip(FOUND, optimizer._stepper.found.tolist(), strict=True))


def rate_of(optimizer: Any) -> float:
    return found(optimizer)["rate"]


def adapted(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def begun(steps: int = 12, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    model = make_model(dtype)
    optimizer = oplora.AdamW(model, **options)
    train(model, optimizer, steps, dtype)
    return model, optimizer


# ---- the definition ----


def test_trajectory_is_the_definitions_by_autograd() -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = oplora.AdamW(model)
    oracle = Oracle(adapted(twin), ["lora_B" in name for name, p in twin.named_parameters() if p.requires_grad])
    for x, y in batches(300, torch.float64):
        for some in (model, twin):
            some.zero_grad()
            (some(x) - y).square().mean().backward()
        optimizer.step()
        oracle.step()
        assert rate_of(optimizer) == pytest.approx(oracle.search.rate, rel=1e-12)
        for a, b in zip(adapted(model), adapted(twin), strict=True):
            assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))


def test_trajectory_of_groups_is_the_definitions() -> None:
    """B four times as fast, and no decay: as LoRA+ groups them. The mean square comes to forget by beta2."""
    model, twin = make_model(torch.float64), make_model(torch.float64)
    pairs = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in pairs if f"lora_{factor}" in n], "lr": lr} for factor, lr in (("A", 1), ("B", 4))
    ]
    betas = (0.8, 0.95)
    optimizer = oplora.AdamW(groups, betas=betas, weight_decay=0.0)
    listens = ["lora_B" in name for name, _ in pairs]
    oracle = Oracle(adapted(twin), listens, betas, weight_decay=0.0)
    for x, y in batches(60, torch.float64):
        for some in (model, twin):
            some.zero_grad()
            (some(x) - y).square().mean().backward()
        optimizer.step()
        oracle.step([1.0 if listening else 0.25 for listening in listens])
        for a, b in zip(adapted(model), adapted(twin), strict=True):
            assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))


def test_float32_follows_float64() -> None:
    (model, optimizer), (twin, other) = begun(20), begun(20, torch.float64)
    assert rate_of(optimizer) == pytest.approx(rate_of(other), rel=1e-3)
    for p, wide in zip(adapted(model), adapted(twin), strict=True):
        assert torch.allclose(p.double(), wide, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CASES)
def test_every_adapter_type_trains(kind: str) -> None:
    model = make(kind)
    optimizer = oplora.AdamW(model)
    losses = train_on(model, optimizer, data(kind, 30))
    assert all(map(math.isfinite, losses))
    assert found(optimizer)["steps"] == 30 and rate_of(optimizer) != 1e-4


# ---- lr ----


@pytest.mark.parametrize("lr", [1e-5, 1e-2, 3.0, torch.tensor(1e-4)])
def test_size_of_lr_does_not_matter(lr: Any) -> None:
    assert_same_bits(factors(begun(lr=lr)[0]), factors(begun()[0]))


def test_lr_is_a_share_of_the_highest_so_far() -> None:
    model, optimizer = begun(8, lr=1e-3)
    before = factors(model), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(
        torch.equal(e["generated"], s["generated"])
        for e, s in zip(optimizer.state.values(), before[1]["state"].values(), strict=True)
    )


def test_warm_up_is_the_searchs_own() -> None:
    """While lr rises it is the highest so far."""
    model, (twin, _) = make_model(), begun(10)
    optimizer = oplora.AdamW(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 20)
    for pair in batches(10, torch.float32):
        train_on(model, optimizer, [pair])
        scheduler.step()
    assert_same_bits(factors(model), factors(twin))


def test_step_before_a_warm_up_has_begun_moves_nothing() -> None:
    """transformers' warm-ups have 0 for the first step; the search then begins with the second."""
    model = make_model()
    optimizer = oplora.AdamW(model, lr=0.0)
    before, rates = factors(model), []
    for lr, pair in zip((0.0, 0.1, 0.2), batches(3, torch.float32), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        train_on(model, optimizer, [pair])
        rates.append(optimizer.found_lr)
        if lr == 0.0:
            assert_same_bits(factors(model), before)
    assert rates[0] == 0.0 and rates[1] == pytest.approx(1e-4) and rates[2] > 1.5e-4


@pytest.mark.parametrize("schedule", [lambda t: max(0.0, 1 - t / 40), lambda t: (1 + math.cos(math.pi * t / 40)) / 2])
def test_schedules_end_at_rest(schedule: Any) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    moves = []
    for pair in batches(40, torch.float32):
        before = [e["generated"].clone() for e in optimizer.state.values()]
        train_on(model, optimizer, [pair])
        scheduler.step()
        after = [e["generated"] for e in optimizer.state.values()]
        moves.append(sum(float((a - b).norm()) for a, b in zip(after, before, strict=True)))
    assert moves[-1] < 0.2 * max(moves)


def test_argument_of_a_generator_a_layer_asks_for_the_papers_preset() -> None:
    assert oplora.AdamW(make_model(), hidden_width=4)._preset.name == "paper"
    assert oplora.AdamW(make_model(), state="exact")._preset.name == "paper"
    assert oplora.AdamW(make_model(), lr=1e-3, seed=3)._preset.name == "auto"


def test_argument_of_a_generator_a_layer_is_refused_beside_auto() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"hidden_width, state are for presets 'paper' and 'flat'"):
        oplora.AdamW(make_model(), preset="auto", hidden_width=4, state="lean")


# ---- what is found ----


def test_rate_grows_from_below_and_turns() -> None:
    _, optimizer = begun(60)
    assert rate_of(optimizer) > 1e-3
    assert 0 < found(optimizer)["turned"] < 60


def test_rate_of_a_loss_that_falls_without_end_is_bounded() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model)
    for _ in range(200):
        for p in adapted(model):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert rate_of(optimizer) == 10
    assert all(t.isfinite().all() for t in factors(model).values())


@pytest.mark.parametrize("scaling", [1e-3, 1e3])
def test_rate_does_not_depend_on_the_losss_scale(scaling: float) -> None:
    optimizers = []
    for factor in (1.0, scaling):
        model = make_model(torch.float64)
        optimizers.append(oplora.AdamW(model, eps=1e-30))
        for x, y in batches(15, torch.float64):
            optimizers[-1].zero_grad()
            (factor * (model(x) - y).square().mean()).backward()
            optimizers[-1].step()
    assert rate_of(optimizers[1]) == pytest.approx(rate_of(optimizers[0]), rel=1e-6)


def test_gradients_of_zero_move_nothing() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, weight_decay=0.0)
    before = factors(model)
    for p in adapted(model):
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert_same_bits(factors(model), before)
    assert rate_of(optimizer) == 1e-4


def test_step_without_gradients_tells_nothing() -> None:
    _, optimizer = begun()
    before = found(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert found(optimizer) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    model, optimizer = begun()
    before = copy.deepcopy(optimizer.state_dict())
    for p in adapted(model):
        p.grad = torch.ones_like(p)
    adapted(model)[0].grad.view(-1)[3] = bad
    with pytest.raises(oplora.OPLoRAError, match="holds NaN or infinity"):
        optimizer.step()
    for saved, now in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(saved[k], now[k]) for k in saved if isinstance(saved[k], Tensor))


# ---- memory, and what is kept ----


def test_state_is_eight_bytes_an_entry() -> None:
    _, optimizer = begun(1)
    entries = sum(p.numel() for p in adapted(optimizer._model))
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for e in optimizer.state.values()
        for t in e.values()
        if isinstance(t, Tensor)
    }
    state = optimizer._stepper.engines[0].state
    assert state.generated.nbytes + state.exp_avg_sq.nbytes == 8 * entries
    assert all("base" not in e and "master" not in e for e in optimizer.state.values())
    assert sum(held.values()) < 8 * entries + 4096


def test_start_of_b_that_is_not_zero_is_kept() -> None:
    model = make_model(init_lora_weights="pissa")
    optimizer = oplora.AdamW(model)
    starts = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    train(model, optimizer, 3)
    for name, start in starts.items():
        entry = optimizer.state[dict(model.named_parameters())[name]]
        assert torch.equal(entry["base"], start)


def test_nothing_is_written_before_the_first_step() -> None:
    model = make_model()
    before = factors(model)
    oplora.AdamW(model)
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resumes_to_the_bit(dtype: torch.dtype) -> None:
    model, optimizer = begun(9, dtype)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 7, dtype)
    fresh = make_model(dtype)
    other = oplora.AdamW(fresh)
    fresh.load_state_dict(weights)
    other.load_state_dict(saved)
    train(fresh, other, 7, dtype)
    assert_same_bits(factors(fresh), factors(model))
    assert found(other) == found(optimizer)


def test_an_edit_between_steps_is_gone_on_from() -> None:
    model, optimizer = begun()
    p = adapted(model)[1]
    p.data.fill_(0.25)
    train(model, optimizer, 1)
    entry = optimizer.state[p]
    assert float((entry["generated"] - 0.25).abs().max()) <= 1.1 * rate_of(optimizer) * 10


def put(model: nn.Module, values: dict[str, Tensor], **options: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in values.items()}, strict=False, **options)


def move_and_put(model: nn.Module, optimizer: Any, values: dict[str, Tensor]) -> None:
    for p in adapted(model):
        p.data = p.data.clone()
    put(model, values)


def load_and_put(model: nn.Module, optimizer: Any, values: dict[str, Tensor]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    put(model, values)


EDITS = {
    "in new Parameters": lambda model, optimizer, values: put(model, values, assign=True),
    "of another dtype": lambda model, optimizer, values: put(
        model, {name: value.to(torch.bfloat16) for name, value in values.items()}, assign=True
    ),
    "after a move": move_and_put,
    "after a state was loaded": load_and_put,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_values_are_gone_on_from(dtype: torch.dtype, edit: Any) -> None:
    model, optimizer = begun(dtype=dtype, weight_decay=0.0)
    values = {name: torch.full_like(value, 0.5) for name, value in factors(model).items()}
    edit(model, optimizer, values)
    for p in adapted(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in adapted(model):
        assert torch.equal(p, torch.full_like(p, 0.5))
        assert torch.equal(optimizer.state[p]["generated"], p.detach().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_model_loaded_after_the_optimizer_changes_no_bit(assign: bool, dtype: torch.dtype) -> None:
    (model, optimizer), (twin, resumed) = begun(dtype=dtype), begun(steps=1, dtype=dtype)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    put(twin, factors(model), assign=assign)
    train(model, optimizer, 3, dtype), train(twin, resumed, 3, dtype)
    assert_same_bits(factors(twin), factors(model))


def test_bfloat16_factors_keep_small_steps() -> None:
    model = make_model(torch.bfloat16)
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 3, torch.bfloat16)
    for p in adapted(model):
        assert torch.equal(optimizer.state[p]["master"].to(torch.bfloat16), p.detach())


def test_an_edit_of_one_bfloat16_factor_leaves_its_neighbour_as_it_was() -> None:
    model = make_model(torch.bfloat16)
    optimizer = oplora.AdamW(model, weight_decay=0.0)
    train(model, optimizer, 12, torch.bfloat16)
    A, B = adapted(model)[:2]
    held = {key: optimizer.state[B][key].clone() for key in ("generated", "master")}
    A.data.mul_(2)
    for p in adapted(model):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[B]["generated"], held["generated"])
    assert not torch.equal(held["generated"], held["master"])
    assert torch.equal(optimizer.state[A]["generated"], A.detach().float())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    def run(n: int) -> Iterator[Tensor]:
        torch.manual_seed(0)
        p = [nn.Parameter(torch.randn(64, 1031)), nn.Parameter(torch.zeros(513, 64))]
        named = [("layer.lora_A.default.weight", p[0]), ("layer.lora_B.default.weight", p[1])]
        optimizer = oplora.AdamW(named)
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        generator = torch.Generator().manual_seed(1)
        try:
            for _ in range(4):
                for one in p:
                    one.grad = torch.randn(one.shape, generator=generator)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return (one.detach() for one in (*p, optimizer._stepper.found))

    assert all(map(torch.equal, run(threads), run(1)))


# ---- what is evaluated is what is saved ----


def test_factors_are_the_average_at_every_moment() -> None:
    """So evaluating, saving and merging need no call: at beta1 = 0.9 nine parts in ten of a factor are the average."""
    model, optimizer = begun(30)
    p = adapted(model)[0]
    v = optimizer.state[p]["generated"]
    average = (p.detach() - 0.1 * v) / 0.9
    assert (p.detach() - average).norm() < 0.11 * (v - average).norm()
    assert float((v - average).norm()) > 0
    assert not any(hasattr(optimizer, name) for name in ("train", "eval"))


def test_other_parameters_step_at_the_rate_that_is_found() -> None:
    model = make_model(bias="all")
    optimizer = oplora.AdamW(model)
    train(model, optimizer, 5)
    bias = next(p for name, p in model.named_parameters() if name.endswith("base_layer.bias"))
    twin = nn.Parameter(bias.detach().clone())
    plain = torch.optim.AdamW([twin], betas=(0.9, 0.99))
    plain.state[twin] = copy.deepcopy(dict(optimizer.state[bias]))
    train(model, optimizer, 1)
    twin.grad = bias.grad.clone()
    plain.param_groups[0]["lr"] = rate_of(optimizer)
    plain.step()
    assert torch.equal(twin, bias)


def test_clipped_gradients_are_measured_again() -> None:
    model, twin = make_model(), make_model()
    optimizer, other = oplora.AdamW(model, max_grad_norm=1e-3), oplora.AdamW(twin)
    for pair in batches(6, torch.float32):
        train_on(model, optimizer, [pair])
        x, y = pair
        other.zero_grad()
        (twin(x) - y).square().mean().backward()
        other.clip_grad_norm_(1e-3)
        other.step()
    assert_same_bits(factors(model), factors(twin))


def test_what_was_found_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="oplora"):
        begun(130)
    lines = [r.getMessage() for r in caplog.records if "found" in r.getMessage() and "e-" in r.getMessage()]
    assert len(lines) == 1
