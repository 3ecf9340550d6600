"""oplora.AdamW(state="lean"): the path of the float64 oracle, its edges, and what its rounding does."""

import io
import math

import pytest
import torch
from conftest import Net, assert_same_bits, batches, factors, make_model, train
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_oracle import LeanOracle
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import oplora
from oplora.lean import LeanState
from oplora.start import Settings, count_parameters, start_parameters, views


def values(state: LeanState) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in state.factors.layer.parameters()])


def gradient(state: LeanState) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in state.factors.layer.parameters()])


def set_gradient(state: LeanState, g: Tensor) -> None:
    parameters = state.factors.layer.parameters()
    for p, piece in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p).to(p.dtype, copy=True)


def oracle_of(state: LeanState) -> LeanOracle:
    widths = Settings(state.H, state.Z, state.latent_std, state.seed, state.start)
    flat = torch.zeros(count_parameters(state.factors, widths), dtype=torch.float64)
    start_parameters(flat, state.factors, widths, state.index)
    return LeanOracle(views(flat, state.H, state.Z), (state.weight_rank, state.moment_rank))


class Pair:
    """An optimizer and the oracles of its layers, fed with the same gradients."""

    def __init__(self, dtype: torch.dtype = torch.float64, model: nn.Module | None = None, **options: object) -> None:
        self.model = make_model(dtype) if model is None else model
        self.options = {"lr": 1e-2, "weight_decay": 0.1, "hidden_lr_ratio": 1.0, **options}
        self.optimizer = oplora.AdamW(self.model, state="lean", **self.options)
        self.states: list[LeanState] = self.optimizer._states
        self.oracles = [oracle_of(state) for state in self.states]
        pairs = zip(self.states, self.oracles, strict=True)
        self.bases = [values(state) - oracle.generate() for state, oracle in pairs]

    def step(self, max_norm: float | None = None) -> None:
        gradients = [gradient(state) for state in self.states]
        if max_norm is not None:
            squares = [oracle.norm_square(g) for oracle, g in zip(self.oracles, gradients, strict=True)]
            norm = torch.stack(squares).sum().sqrt()
            assert self.optimizer.clip_grad_norm_(max_norm).item() == pytest.approx(norm.item(), rel=1e-9)
            gradients = [g * min(1.0, max_norm / (norm.item() + 1e-6)) for g in gradients]
        self.optimizer.step()
        lr, ratio = self.options["lr"], self.options["hidden_lr_ratio"]
        for state, oracle, g in zip(self.states, self.oracles, gradients, strict=True):
            rates = dict(weight_lr=lr * 32 / state.H, hidden_lr=lr * ratio)
            oracle.step(g, lr, weight_decay=self.options["weight_decay"], **rates)

    def train(self, steps: int, max_norm: float | None = None) -> None:
        for x, y in batches(steps, torch.float64):
            self.optimizer.zero_grad()
            (self.model(x) - y).square().mean().backward()
            self.step(max_norm)

    def error(self) -> float:
        """The largest relative distance of a layer's factors from the oracle's."""
        errors = []
        for state, oracle, base in zip(self.states, self.oracles, self.bases, strict=True):
            truth = base + oracle.generate()
            errors.append(float((values(state) - truth).norm() / truth.norm().clamp_min(1e-6)))
        return max(errors)


# ---- the oracle's path ----


CASES = [
    dict(),
    dict(start="uniform", weight_decay=0.0),
    dict(init="keep"),
    dict(init="keep", start="uniform", hidden_lr_ratio=0.1),
    dict(hidden_lr_ratio=0.0, weight_decay=1.0),
    dict(weight_rank=1, hidden_width=7, latent_width=5, start="uniform"),
    dict(weight_rank=3, moment_rank=2, hidden_width=70),
    dict(weight_rank=8, moment_rank=8, hidden_width=33, latent_width=3),
    dict(hidden_width=1, latent_width=1, lr=1e-3),
]


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lean_equals_the_oracle_in_float64(case: dict[str, object], max_norm: float | None) -> None:
    pair = Pair(**case)
    pair.train(40, max_norm)
    assert pair.error() <= 1e-9


@settings(max_examples=20, deadline=None)
@given(
    hidden_width=st.sampled_from([1, 2, 31, 32, 65]),
    latent_width=st.sampled_from([1, 16, 130]),
    ranks=st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 2)]),
    start=st.sampled_from(["sign", "uniform"]),
    seed=st.integers(0, 2**64 - 1),
    weight_decay=st.sampled_from([0.0, 0.01, 10.0]),
    lr=st.sampled_from([0.0, 1e-4, 1e-2]),
)
def test_lean_equals_the_oracle_for_any_width_rank_and_seed(
    hidden_width: int,
    latent_width: int,
    ranks: tuple[int, int],
    start: str,
    seed: int,
    weight_decay: float,
    lr: float,
) -> None:
    pair = Pair(
        hidden_width=hidden_width,
        latent_width=latent_width,
        weight_rank=ranks[0],
        moment_rank=ranks[1],
        start=start,
        seed=seed,
        weight_decay=weight_decay,
        lr=lr,
    )
    pair.train(10)
    assert pair.error() <= 1e-8


def test_units_that_die_and_come_back_follow_the_oracle() -> None:
    pair = Pair(lr=0.05, hidden_width=16, latent_width=4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    live = set()
    for step in range(60):
        for state in pair.states:
            set_gradient(state, torch.randn(state.N, generator=generator, dtype=torch.float64) * (step % 3))
        pair.step()
        live.add(oplora.stats(pair.optimizer)[pair.states[0].name]["live_units"])
    assert len(live) > 3
    assert pair.error() <= 1e-8


def test_layer_that_is_spread_over_threads_equals_the_oracle() -> None:
    torch.manual_seed(0)
    wide = get_peft_model(Net((300, 700, 20)), LoraConfig(r=16, target_modules=["first"]))
    pair = Pair(model=wide.double(), hidden_width=600, latent_width=4)
    assert pair.states[0].N * (1 + 600 / 32) > 2**18
    for _ in range(2):
        set_gradient(pair.states[0], torch.randn(pair.states[0].N, dtype=torch.float64))
        pair.step()
    assert pair.error() <= 1e-9


# ---- rounding ----


def float32_path(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """The factors in float32, with moments in bfloat16, and in float64, from the same gradients."""
    pair = Pair(torch.float32, lr=1e-3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for state in pair.states:
            set_gradient(state, torch.randn(state.N, generator=generator) + 0.3)
        pair.step()
    truth = torch.cat([b + o.generate() for b, o in zip(pair.bases, pair.oracles, strict=True)])
    return torch.cat([values(state) for state in pair.states]), truth


def test_float32_stays_near_float64() -> None:
    ours, truth = float32_path(0, 30)
    assert (ours - truth).norm() <= 0.02 * truth.norm()


def test_rounding_of_moments_is_unbiased() -> None:
    paths = [float32_path(seed, 20) for seed in range(8)]
    errors = torch.stack([ours - truth for ours, truth in paths])
    mean, deviation = errors.mean(), errors.std()
    assert abs(mean) <= 4 * deviation / math.sqrt(errors.numel())


def test_float32_losses_are_the_exact_states_within_a_hundredth() -> None:
    def final_loss(state: str, seed: int) -> float:
        model = make_model()
        return sum(train(model, oplora.AdamW(model, lr=1e-2, state=state, start="sign", seed=seed), 200)[-50:]) / 50

    lean, exact = (torch.tensor([final_loss(state, seed) for seed in range(4)]) for state in ("lean", "exact"))
    assert abs(lean.mean() - exact.mean()) <= 0.01 * exact.mean()


# ---- edges ----


def test_zero_gradients_move_nothing() -> None:
    pair = Pair(torch.float32, weight_decay=0.0)
    before = factors(pair.model)
    for state in pair.states:
        set_gradient(state, torch.zeros(state.N))
    pair.optimizer.step()
    assert_same_bits(factors(pair.model), before)
    assert all(state.numbers.isfinite().all() for state in pair.states)


def test_rate_of_zero_moves_no_bit() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2)
    train(model, optimizer, 5)
    before = factors(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 5)
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_extreme_gradients_leave_no_nan(scale: float) -> None:
    pair = Pair(torch.float32, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for state in pair.states:
            set_gradient(state, torch.randn(state.N, generator=generator) * scale)
        pair.optimizer.step()
    assert all(t.isfinite().all() for t in factors(pair.model).values())
    for state in pair.states:
        assert not state.numbers.isnan().any() and not state.moments.isnan().any()


@pytest.mark.parametrize("r", [1, 2])
def test_smallest_layer_follows_the_oracle(r: int) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=r, target_modules=["0"])).double()
    pair = Pair(model=model, hidden_width=1, latent_width=1)
    for step in range(10):
        set_gradient(pair.states[0], torch.full((2 * r,), (-1.0) ** step + 0.1, dtype=torch.float64))
        pair.step()
    assert pair.error() <= 1e-9


@pytest.mark.parametrize("decay", [0.99, 1.0, 1.5])
def test_decay_so_strong_that_the_scale_vanishes_follows_the_oracle(decay: float) -> None:
    pair = Pair(lr=1e-3, weight_decay=decay / 1e-3)
    pair.train(170)
    assert abs(pair.states[0].scalars[0]) < 1e-50
    assert pair.error() <= 1e-6
    assert all(state.numbers.isfinite().all() for state in pair.states)


def test_directions_stay_orthonormal_and_the_output_true_over_many_steps() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=1, target_modules=["0"])).double()
    pair = Pair(model=model, hidden_width=6, latent_width=3, lr=1e-3, weight_decay=0.01)
    state = pair.states[0]
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(state.N, generator=generator, dtype=torch.float64)
    for _ in range(2000):
        noise = 0.1 * torch.randn(state.N, generator=generator, dtype=torch.float64)
        set_gradient(state, values(state) - target + noise)
        pair.step()
    begin = state.weight_rank * state.N + (state.weight_rank + 1) * state.H
    Q = state.numbers[begin : begin + 2 * state.H].view(2, state.H)
    assert torch.dist(Q @ Q.T, torch.eye(2, dtype=torch.float64)) <= 1e-12
    assert pair.error() <= 1e-6


# ---- masters ----


def test_small_steps_are_not_lost_in_bfloat16_factors() -> None:
    model = make_model(torch.bfloat16)
    optimizer = oplora.AdamW(model, lr=1e-5, weight_decay=0.0)
    model_before = factors(model)
    for _ in range(300):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = [(t.float() - model_before[n].float()).abs().mean() for n, t in factors(model).items() if "lora_B" in n]
    assert all(m > 2e-3 for m in moved)  # 300 steps of at least 1e-5


@settings(max_examples=10, deadline=None)
@given(
    before=st.integers(0, 3),
    after=st.integers(1, 3),
    ranks=st.sampled_from([(1, 1), (2, 1), (3, 2)]),
    start=st.sampled_from(["sign", "uniform"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_resume_under_another_seed_equals_uninterrupted(
    before: int, after: int, ranks: tuple[int, int], start: str, dtype: torch.dtype
) -> None:
    options = dict(lr=1e-2, weight_rank=ranks[0], moment_rank=ranks[1], start=start)
    model, fresh = make_model(dtype), make_model(dtype)
    optimizer = oplora.AdamW(model, **options, seed=2**64 - 5)
    train(model, optimizer, before, dtype)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = oplora.AdamW(fresh, **options)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert train(fresh, resumed, after, dtype) == train(model, optimizer, after, dtype)
    assert_same_bits(factors(fresh), factors(model))


# ---- stats ----


def test_stats_tell_what_the_truncations_drop() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, lr=1e-2, weight_rank=1)
    names = ("dropped_moment", "dropped_weight", "dropped_hidden_moment", "dropped_hidden_weight")
    assert all(math.isnan(numbers[name]) for numbers in oplora.stats(optimizer).values() for name in names)
    train(model, optimizer, 20, torch.float64)
    for numbers in oplora.stats(optimizer).values():
        assert all(0 <= numbers[name] < 0.5 for name in names)
        assert numbers["dropped_weight"] > 0


def test_nothing_is_dropped_at_full_rank() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, lr=1e-2, hidden_width=2, weight_rank=4, moment_rank=4)
    train(model, optimizer, 5, torch.float64)
    for numbers in oplora.stats(optimizer).values():
        assert numbers["dropped_moment"] < 1e-12 and numbers["dropped_weight"] < 1e-12
