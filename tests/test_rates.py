"""Rates in groups: what each number of a parameter group does, under schedules and finders, and which are refused."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, batches, factors, make_model, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

import oplora

Group = dict[str, Any]
both_states = pytest.mark.parametrize("state", ["lean", "exact"])
both_starts = pytest.mark.parametrize("init", ["paper", "keep"])

KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lean": lambda model, **options: oplora.AdamW(model, state="lean", **options),
    "exact": lambda model, **options: oplora.AdamW(model, state="exact", **options),
    "AdamW": lambda model, **options: oplora.create_oplora_optimizer(model, torch.optim.AdamW, **options),
    "SGD": lambda model, **options: oplora.create_oplora_optimizer(model, torch.optim.SGD, **options),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def of_kind(model: nn.Module, *names: str) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.requires_grad and any(name in n for name in names)]


def apart(model: nn.Module, of_a: Group, of_b: Group) -> list[Group]:
    """A and B of every layer in groups of their own."""
    return [{"params": of_kind(model, "lora_A"), **of_a}, {"params": of_kind(model, "lora_B"), **of_b}]


def by_layer(model: nn.Module, first: Group, second: Group) -> list[Group]:
    return [{"params": of_kind(model, "first"), **first}, {"params": of_kind(model, "second"), **second}]


# ---- the definition ----


class Definition:
    """Generators under autograd and torch.optim.AdamW, with a rate and a decay for the rows of each tensor."""

    def __init__(self, model: nn.Module, optimizer: oplora.AdamW, **options: Any) -> None:
        self.generators, self.optimizers = [], []
        for generator in oplora.Generators(copy.deepcopy(model), **options):
            shapes = generator.factors.shapes
            rows = [shape.numel() for shape in shapes]
            hidden = [nn.Parameter(getattr(generator, name).detach().clone()) for name in ("z", "W1", "c1")]
            W2, c2 = (
                [nn.Parameter(t.detach().clone()) for t in full.split(rows)] for full in (generator.W2, generator.c2)
            )
            self.generators.append((hidden, W2, c2, shapes))
            self.optimizers.append(torch.optim.AdamW([{"params": [p]} for p in (*W2, *c2)] + [{"params": hidden}]))
        self.model, self.theirs, self.width = model, optimizer, options["hidden_width"]
        names = [n for n, p in model.named_parameters() if "lora_" in n]
        self.tensors = [[model.get_parameter(n) for n in names if layer in n] for layer in ("first", "second")]
        self.bases: list[list[Tensor]] | None = None

    def v(self, i: int) -> list[Tensor]:
        (z, W1, c1), W2, c2, shapes = self.generators[i]
        h = torch.relu(W1 @ z + c1)
        return [(w @ h + c).view(shape) for w, c, shape in zip(W2, c2, shapes, strict=True)]

    def step(self) -> list[list[Tensor]]:
        """The factors after a step from the gradients that the model holds."""
        if self.bases is None:
            self.bases = [
                [p.detach() - v.detach() for p, v in zip(some, self.v(i), strict=True)]
                for i, some in enumerate(self.tensors)
            ]
        group_of = {id(p): group for group in self.theirs.param_groups for p in group["params"]}
        after = []
        for i, (some, adamw) in enumerate(zip(self.tensors, self.optimizers, strict=True)):
            torch.autograd.backward(self.v(i), [p.grad for p in some])
            groups, narrower = [group_of[id(p)] for p in some], 32 / self.width
            for mine, group, wide in zip(
                adamw.param_groups, [*groups, *groups, groups[0]], [narrower] * 2 + [1.0] * 3, strict=True
            ):
                lr = group["lr"] * (group["hidden_lr_ratio"] if mine is adamw.param_groups[-1] else wide)
                mine.update(lr=lr, weight_decay=group["weight_decay"] / wide, betas=group["betas"], eps=group["eps"])
            adamw.step()
            adamw.zero_grad()
            after.append([base + v.detach() for base, v in zip(self.bases[i], self.v(i), strict=True)])
        return after


def assert_follows_the_definition(
    groups: Callable[[nn.Module], Any], init: str = "paper", width: int = 32, ratio: float = 1.0, schedule: Any = None
) -> None:
    model = make_model(torch.float64, init_lora_weights="orthogonal" if init == "keep" else True, r=4)
    options = dict(hidden_width=width, latent_width=16, init=init, seed=3)
    optimizer = oplora.AdamW(groups(model), state="exact", start="uniform", hidden_lr_ratio=ratio, **options)
    definition = Definition(model, optimizer, **options)
    for i, (x, y) in enumerate(batches(20, torch.float64)):
        if schedule is not None:
            schedule(i, optimizer.param_groups)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        expected = definition.step()
        optimizer.step()
        for some, of_layer in zip(definition.tensors, expected, strict=True):
            for p, tensor in zip(some, of_layer, strict=True):
                torch.testing.assert_close(p.detach(), tensor, rtol=1e-12, atol=1e-12 * float(tensor.abs().max()))


FAST_B = (dict(lr=3e-3, weight_decay=0.3), dict(lr=2e-2, weight_decay=0.05))
NUMBERS: dict[str, tuple[Group, Group]] = {
    "B faster": FAST_B,
    "A faster": (dict(lr=2e-2, weight_decay=0.0), dict(lr=3e-3, weight_decay=1.0)),
    "A at rest": (dict(lr=0.0, weight_decay=0.5), dict(lr=1e-2, weight_decay=0.1)),
    "B at rest": (dict(lr=1e-2, weight_decay=0.5), dict(lr=0.0, weight_decay=0.1)),
    "other betas and eps": (dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-4), dict(lr=2e-2, betas=(0.8, 0.95), eps=1e-4)),
}


@both_starts
@pytest.mark.parametrize("width", [32, 5])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_exact_with_a_and_b_apart_equals_its_definition(numbers: tuple[Group, Group], width: int, init: str) -> None:
    assert_follows_the_definition(lambda model: apart(model, *numbers), init, width, ratio=0.25)


@both_starts
def test_exact_with_layers_apart_equals_its_definition(init: str) -> None:
    numbers = dict(lr=3e-3, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-4), dict(lr=2e-2, betas=(0.5, 0.9), eps=1e-6)
    assert_follows_the_definition(lambda model: by_layer(model, *numbers), init)


def test_exact_with_rates_that_change_at_every_step_equals_its_definition() -> None:
    def schedule(i: int, groups: list[Group]) -> None:
        groups[0].update(lr=1e-3 * (i % 4), weight_decay=0.1 * (i % 3), hidden_lr_ratio=0.5 + i)
        groups[1].update(lr=1e-2 / (i + 1))

    assert_follows_the_definition(lambda model: apart(model, *FAST_B), schedule=schedule)


class Rows:
    """docs/lean.md's W2 and c2 in float64 a rate and a keep for each row; truncations weigh rows by their steps."""

    def __init__(self, W0: Tensor, ranks: tuple[int, int]) -> None:
        self.W0, self.ranks, self.t, self.mean = W0, ranks, 0, 0.0
        self.change, self.moment = torch.zeros_like(W0), torch.zeros_like(W0)
        self.R, self.c, self.m, self.S = (W0.new_zeros(len(W0)) for _ in range(4))
        self.r = W0.new_zeros(W0.shape[1])

    def step(
        self, g: Tensor, x: Tensor, lr: Tensor, ratio: float, keep: Tensor, b: Sequence[float], eps: float
    ) -> None:
        self.t += 1
        first, second, mean_x = 1 - b[0] ** self.t, 1 - b[1] ** self.t, float(x.square().mean())
        fresh = (1 - b[1]) * mean_x * float(g.square().mean())
        self.mean = b[1] * self.mean + fresh
        self.r += fresh / self.mean * (x.square() / mean_x - self.r)
        self.R = b[1] * self.R + (1 - b[1]) * mean_x * g.square()
        root = self.r.sqrt()
        live = root > 0
        row = 1 / ((self.R / second).sqrt() + eps / float(root[live].mean()))
        col = torch.where(live, 1 / root, torch.zeros_like(root))
        row_step = row * lr / lr.max()
        moment = b[0] * self.moment + (1 - b[0]) * torch.outer(g, x)
        update = _truncated(row_step[:, None] * moment * col, self.ranks[1])
        self.moment = update / row_step[:, None] * root
        self.change = _truncated(keep[:, None] * self.change - lr.max() * ratio / first * update, self.ranks[0])
        self.W0 = keep[:, None] * self.W0
        self.m = b[0] * self.m + (1 - b[0]) * g
        self.S = b[1] * self.S + (1 - b[1]) * g.square()
        self.c = keep * self.c - lr / first * self.m / ((self.S / second).sqrt() + eps)


def _truncated(product: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(product, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("ranks", [(2, 1), (8, 8)])
@pytest.mark.parametrize("width", [32, 5])
def test_lean_with_a_and_b_apart_equals_its_definition(width: int, ranks: tuple[int, int]) -> None:
    """With the hidden path at rest, which rates of tensors do not change."""
    model = make_model(torch.float64, target_modules=["first"])
    options = dict(hidden_width=width, latent_width=16, seed=3)
    ranked = dict(weight_rank=ranks[0], moment_rank=ranks[1])
    (generator,) = oplora.Generators(copy.deepcopy(model), **options)
    x = torch.relu(generator.W1 @ generator.z + generator.c1).detach()
    rows = Rows(generator.W2.detach().clone(), ranks)
    groups = apart(model, *FAST_B)
    optimizer = oplora.AdamW(groups, state="lean", start="uniform", hidden_lr_ratio=0.0, **options, **ranked)
    A, B = of_kind(model, "lora_")
    lr = torch.cat(
        [torch.full((p.numel(),), f["lr"], dtype=torch.float64) for p, f in zip((A, B), FAST_B, strict=True)]
    )
    decay = torch.cat(
        [torch.full((p.numel(),), f["weight_decay"]) for p, f in zip((A, B), FAST_B, strict=True)]
    ).double()
    for _ in range(20):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        g = torch.cat([A.grad.flatten(), B.grad.flatten()])
        rows.step(g, x, lr, 32 / width, 1 - lr * decay, (0.9, 0.999), 1e-8)
        optimizer.step()
        truth = (rows.W0 + rows.change) @ x + rows.c
        ours = torch.cat([A.detach().flatten(), B.detach().flatten()])
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-9 * float(truth.abs().max()))


@both_states
def test_rate_of_zero_for_a_leaves_what_b_learns_and_the_hidden_path_apart(state: str) -> None:
    """A's rows rest, and with its group's rate the hidden path does: A does not move at all."""
    model = make_model()
    optimizer = oplora.AdamW(apart(model, dict(lr=0.0), dict(lr=1e-2)), state=state)
    before = factors(model)
    train(model, optimizer, 3)
    for name, tensor in factors(model).items():
        assert torch.allclose(tensor, before[name], rtol=1e-6, atol=1e-7) == ("lora_A" in name)


@both_states
def test_pefts_loraplus_is_groups_apart(state: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    model, twin = make_model(), make_model()
    plus = create_loraplus_optimizer(
        model, oplora.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, state=state
    )
    numbers = [dict(lr=lr, weight_decay=0.1) for lr in (1e-3, 16e-3)]
    train(model, plus, 3), train(twin, oplora.AdamW(apart(twin, *numbers), state=state), 3)
    assert_same_bits(factors(model), factors(twin))


# ---- numbers of one generator ----


other_moments = pytest.mark.parametrize(("name", "value"), [("betas", (0.8, 0.9)), ("eps", 1e-3)])
REFUSED = "lora_B of layer .* is in parameter group 1 with {} .*give their groups the same"


@both_states
@other_moments
def test_other_moments_within_a_generator_are_refused_before_anything_is_written(
    name: str, value: Any, state: str
) -> None:
    model = make_model()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=REFUSED.format(name)):
        oplora.AdamW(apart(model, {}, {name: value}), state=state)
    assert_same_bits(factors(model), before)


@both_states
@other_moments
def test_other_moments_set_later_are_refused_and_nothing_changed(name: str, value: Any, state: str) -> None:
    model = make_model()
    optimizer = oplora.AdamW(apart(model, {}, {}), state=state)
    train(model, optimizer, 1)
    before = factors(model)
    optimizer.param_groups[1][name] = value
    with pytest.raises(oplora.OPLoRAError, match=REFUSED.format(name)):
        train(model, optimizer, 1)
    assert_same_bits(factors(model), before)


@every_kind
def test_hidden_lr_ratio_is_read_and_set_in_its_group(make: Callable[..., Any]) -> None:
    model, twin = make_model(), make_model()
    optimizer, other = make(model, lr=1e-2, hidden_lr_ratio=0.5), make(twin, lr=1e-2, hidden_lr_ratio=3.0)
    assert optimizer.param_groups[0]["hidden_lr_ratio"] == 0.5
    optimizer.param_groups[0]["hidden_lr_ratio"] = 3.0
    train(model, optimizer, 3), train(twin, other, 3)
    assert_same_bits(factors(model), factors(twin))


@both_states
def test_group_may_bring_its_own_hidden_lr_ratio(state: str) -> None:
    model, twin = make_model(), make_model()
    optimizer = oplora.AdamW([{"params": of_kind(model, "lora_"), "hidden_lr_ratio": 0.25}], state=state, lr=1e-2)
    train(model, optimizer, 3), train(twin, oplora.AdamW(twin, state=state, lr=1e-2, hidden_lr_ratio=0.25), 3)
    assert_same_bits(factors(model), factors(twin))


# ---- preset "flat" under any rates ----


def assert_flat(group: Group) -> None:
    """After a step: what it was made with."""
    hidden = group["lr"] * group["hidden_lr_ratio"]
    assert hidden <= 0.01 * (1 + 1e-12)
    assert group["lr"] * hidden <= 5e-6 * (1 + 1e-12)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> Iterator[Group]:
    """With gradients that do not depend on what was learnt, so that no rate diverges."""
    random = torch.Generator().manual_seed(3)
    for _ in range(count):
        for p in of_kind(model, ""):
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
        yield optimizer.param_groups[0]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 5),
    "warm-up past the rate": lambda o: lr_scheduler.LambdaLR(o, lambda step: 4.0**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12, div_factor=1e5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@every_kind
@every_schedule
@pytest.mark.parametrize("lr", [1e-5, 1e-3, 0.3])
def test_schedule_keeps_the_rule_of_flat(schedule: Callable[[Any], Any], lr: float, make: Callable[..., Any]) -> None:
    model = make_model()
    optimizer = make(model, lr=lr, preset="flat")
    scheduler = schedule(optimizer)
    for group in steps(model, optimizer, 8):
        assert_flat(group)
        scheduler.step()


@settings(max_examples=30, deadline=None)
@given(rates=st.lists(st.floats(0, 1e3), min_size=1, max_size=12), first=st.floats(0, 1.0))
def test_any_order_of_rates_keeps_the_rule_of_flat(rates: list[float], first: float) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=first, preset="flat")
    for _ in steps(model, optimizer, 1):
        assert_flat(optimizer.param_groups[0])
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert_flat(optimizer.param_groups[0])


@every_kind
def test_finder_keeps_the_rule_of_flat_and_is_over_when_the_state_is_put_back(make: Callable[..., Any]) -> None:
    model, twin = make_model(), make_model()
    optimizer, other = make(model, lr=1e-4, preset="flat"), make(twin, lr=1e-4, preset="flat")
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 1e-8
    for group in steps(model, optimizer, 9):
        assert_flat(group)
        group["lr"] *= 10
    assert group["lr"] > 1
    optimizer.load_state_dict(saved)
    assert train(model, optimizer, 3) == train(twin, other, 3)


@every_kind
def test_schedule_that_only_falls_has_the_rates_of_a_constant_scaled(make: Callable[..., Any]) -> None:
    model = make_model()
    optimizer = make(model, lr=1e-2, preset="flat")
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for i, group in enumerate(steps(model, optimizer, 4)):
        assert group["lr"] * group["hidden_lr_ratio"] == pytest.approx(5e-4 * 0.5**i)
        scheduler.step()


@every_kind
def test_plateau_scales_both_rates(make: Callable[..., Any]) -> None:
    model = make_model()
    optimizer = make(model, lr=1e-4, preset="flat")
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in steps(model, optimizer, 3):
        scheduler.step(1.0)
    group = optimizer.param_groups[0]
    assert group["lr"] == 2.5e-5
    assert group["lr"] * group["hidden_lr_ratio"] == pytest.approx(0.0025)


@every_kind
@pytest.mark.parametrize("low", [0.0, 1e-8])
def test_rate_that_rises_to_a_constant_comes_to_the_constants_hidden_rate(make: Callable[..., Any], low: float) -> None:
    model, twin = make_model(), make_model()
    optimizer, other = make(model, lr=low, preset="flat"), make(twin, lr=1e-2, preset="flat")
    optimizer.param_groups[0]["lr"] = 1e-2
    train(model, optimizer, 3), train(twin, other, 3)
    assert_same_bits(factors(model), factors(twin))


@every_kind
@pytest.mark.parametrize("preset", ["paper", "flat"])
def test_rate_of_zero_at_construction_is_taken(preset: str, make: Callable[..., Any]) -> None:
    model = make_model()
    optimizer = make(model, lr=0.0, preset=preset)
    before = factors(model)
    train(model, optimizer, 2)
    for name, tensor in factors(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)
    optimizer.param_groups[0]["lr"] = 1e-2
    list(steps(model, optimizer, 3))
    assert all((tensor - before[name]).abs().max() > 1e-6 for name, tensor in factors(model).items())


@every_kind
@pytest.mark.parametrize("ratio", [0.0, 0.125, 1.0])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
@pytest.mark.parametrize("how", ["argument", "group"])
def test_ratio_set_by_hand_stays_when_the_rate_rises(
    how: str, lr: float, ratio: float, make: Callable[..., Any]
) -> None:
    model = make_model()
    optimizer = make(model, lr=lr, preset="flat", **({"hidden_lr_ratio": ratio} if how == "argument" else {}))
    if how == "group" and lr:
        optimizer.param_groups[0]["hidden_lr_ratio"] = ratio
    elif how == "group":
        pytest.skip("0 is what a rate of 0 makes of it")
    for rate in (1e-3, 1e-2, 1.0):
        optimizer.param_groups[0]["lr"] = rate
        (group,) = steps(model, optimizer, 1)
        assert group["hidden_lr_ratio"] == ratio


@both_states
def test_flat_that_was_resumed_goes_on_with_its_rule(state: str) -> None:
    model, twin = make_model(), make_model()
    optimizer, resumed = (oplora.AdamW(m, state=state, lr=1e-6, preset="flat") for m in (model, twin))
    optimizer.param_groups[0]["lr"] = 1e-3
    train(model, optimizer, 2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, resumed)):
        its.param_groups[0]["lr"] = 0.5
        train(each, its, 2)
        assert_flat(its.param_groups[0])
    assert_same_bits(factors(model), factors(twin))


# ---- rates that are tensors ----


@both_states
def test_rate_as_a_tensor_is_its_number(state: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    rate = torch.tensor(1e-2, dtype=torch.float64)
    train(model, oplora.AdamW(model, lr=rate, state=state), 3), train(twin, oplora.AdamW(twin, lr=1e-2, state=state), 3)
    for name, tensor in factors(model).items():
        assert torch.equal(tensor, factors(twin)[name])


@both_states
@pytest.mark.parametrize("preset", ["paper", "flat"])
def test_scheduler_fills_a_rate_that_is_a_tensor(state: str, preset: str) -> None:
    model, twin = make_model(), make_model()
    for each, lr in ((model, torch.tensor(1e-2, dtype=torch.float64)), (twin, 1e-2)):
        optimizer = oplora.AdamW(each, lr=lr, state=state, preset=preset)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 2.0**step)
        for _ in steps(each, optimizer, 3):
            scheduler.step()
    assert_same_bits(factors(model), factors(twin))


# ---- refusals ----


NOT_RATES = [torch.ones(2), float("nan"), float("inf"), -1e-3, "1e-3", None, [1e-3], torch.tensor(float("nan"))]


@every_kind
@pytest.mark.parametrize("name", ["lr", "weight_decay", "hidden_lr_ratio"])
@pytest.mark.parametrize("value", NOT_RATES, ids=str)
def test_number_set_later_that_is_no_rate_is_refused_and_nothing_changed(
    name: str, value: Any, make: Callable[..., Any]
) -> None:
    model = make_model()
    optimizer = make(model, lr=1e-2)
    train(model, optimizer, 2)
    before, state = factors(model), copy.deepcopy(optimizer.state_dict()["state"])
    mine = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(oplora.OPLoRAError, match=f"{name}.* is .*expected|{name} is .*expected"):
        train(model, optimizer, 1)
    assert_same_bits(factors(model), before)
    optimizer.param_groups[0][name] = mine
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


@every_kind
def test_tensor_that_becomes_no_rate_is_refused(make: Callable[..., Any]) -> None:
    model = make_model()
    optimizer = make(
        model, lr=torch.tensor(1e-2), **({"foreach": False} if make in (KINDS["AdamW"], KINDS["SGD"]) else {})
    )
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"].fill_(float("nan"))
    with pytest.raises(oplora.OPLoRAError, match="lr"):
        train(model, optimizer, 1)


@both_states
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps"])
@pytest.mark.parametrize("value", ["1e-4", float("nan"), -1.0], ids=str)
def test_number_of_a_group_is_refused_at_construction_before_anything_is_written(
    name: str, value: Any, state: str
) -> None:
    model = make_model()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=f"{name} of parameter group 1 is {value!r}, expected"):
        oplora.AdamW(apart(model, {}, {name: value}), state=state)
    assert_same_bits(factors(model), before)


@both_states
def test_plain_group_has_all_its_own_numbers(state: str) -> None:
    model, twin = make_model(bias="all"), make_model(bias="all")
    own = dict(lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7)
    groups = [{"params": of_kind(model, "lora_")}, {"params": of_kind(model, "bias"), **own}]
    optimizer, plain = oplora.AdamW(groups, state=state), torch.optim.AdamW(of_kind(twin, "bias"), **own)
    for _ in range(3):
        for mine, its in zip(of_kind(model, "lora_", "bias"), of_kind(twin, "lora_", "bias"), strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad.clone()
        optimizer.step(), plain.step()
    for mine, its in zip(of_kind(model, "bias"), of_kind(twin, "bias"), strict=True):
        assert torch.equal(mine, its)
