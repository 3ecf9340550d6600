"""oplora.AdamW(state="lean"): the path of the float64 oracle, its edges, and what its rounding does."""

import copy
import io
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import Net, assert_same_bits, factors, make_model, train
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_oracle import Pair, gradient, rows_of, values
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import oplora
from oplora.engines import LayerState


def random_gradients(seed: int) -> Callable[[LayerState], Tensor]:
    """Normal numbers, the next ones at every call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda state: torch.randn(rows_of(state), generator=generator, dtype=torch.float64)


def piece(state: LayerState, name: str) -> Tensor:
    """A part of `numbers` or `moments`; oplora_core.h says what is where."""
    lean, own, N = state.engine.state, state.pieces(), rows_of(state)
    H, Z, (d, k) = lean.settings.hidden_width, lean.settings.latent_width, lean.ranks
    numbers = {"U": d * N, "U1": d * H, "pre": H, "Q": d * H, "B": k * H, "r": H, "Q1": d * Z, "B1": k * Z, "r1": Z}
    moments = {"A": k * N, "m": N, "S": N, "R": N, "A1": k * H, "m1": H, "S1": H, "R1": H}
    numbers |= {"z": Z, "z_avg": Z, "z_avg_sq": Z}
    pieces = dict(zip(numbers, own["numbers"].split(list(numbers.values())), strict=True))
    pieces |= zip(moments, own["moments"].split(list(moments.values())), strict=True)
    return pieces[name]


def set_gradient(state: LayerState, g: Tensor) -> None:
    parameters = state.factors.layer.parameters()
    for p, piece in zip(parameters, g.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p).to(p.dtype, copy=True)


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
    dict(weight_rank=8, moment_rank=8, hidden_width=2, latent_width=3, lr=1e-3),  # more than the matrices have
    dict(latent_width=5, betas=(0.0, 0.9), eps=1e-4),
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
            set_gradient(state, torch.randn(rows_of(state), generator=generator, dtype=torch.float64) * (step % 3))
        pair.step()
        live.add(oplora.stats(pair.optimizer)[pair.states[0].name]["live_units"])
    assert len(live) > 3
    assert pair.error() <= 1e-8


def wide_model() -> nn.Module:
    """Two layers: the first has so many rows that its work is spread over the threads, the second has few."""
    torch.manual_seed(0)
    config = LoraConfig(r=128, rank_pattern={"second": 2}, target_modules=["first", "second"])
    return get_peft_model(Net((1000, 700, 20)), config)


@pytest.mark.parametrize("start", ["sign", "uniform"])
def test_layer_that_is_spread_over_threads_equals_the_oracle(start: str) -> None:
    pair, random = Pair(model=wide_model().double(), hidden_width=8, latent_width=4, start=start), random_gradients(0)
    assert rows_of(pair.states[0]) > 2**17  # by which the core spreads a layer whatever its width
    for _ in range(3):
        for state in pair.states:
            set_gradient(state, random(state))
        pair.step()
    assert pair.error() <= 1e-9


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("start", ["sign", "uniform"])
def test_same_bits_for_any_number_of_threads(
    threads: Callable[[int], None], start: str, max_norm: float | None
) -> None:
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        model = wide_model()
        optimizer = oplora.AdamW(model, lr=1e-2, hidden_width=16, start=start)
        random = random_gradients(0)
        for _ in range(3):
            for state in optimizer._stepper.states:
                set_gradient(state, random(state))
            if max_norm is not None:
                optimizer.clip_grad_norm_(max_norm)
            optimizer.step()
        pieces = ((f"{s.name} {key}", piece) for s in optimizer._stepper.states for key, piece in s.pieces().items())
        kept = {name: piece.clone() for name, piece in pieces}
        results.append({**factors(model), **kept})
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("start", ["sign", "uniform"])
def test_start_is_that_of_state_exact(start: str) -> None:
    models = [make_model(torch.float64), make_model(torch.float64)]
    for model, state in zip(models, ("lean", "exact"), strict=True):
        oplora.AdamW(model, state=state, start=start, seed=5)
    for name, tensor in factors(models[0]).items():
        torch.testing.assert_close(tensor, factors(models[1])[name], rtol=1e-12, atol=1e-18)


def test_steps_without_any_gradient_come_first_and_between() -> None:
    pair, random = Pair(), random_gradients(0)
    for step in range(10):
        for state in pair.states:
            set_gradient(state, random(state) * (step not in (0, 1, 5)))
        pair.step()
    assert pair.error() <= 1e-9


@pytest.mark.parametrize("ranks", [(2, 1), (3, 2)])
def test_rows_without_gradient_follow_the_oracle(ranks: tuple[int, int]) -> None:
    pair = Pair(weight_rank=ranks[0], moment_rank=ranks[1], eps=1e-3, betas=(0.8, 0.99))
    random = random_gradients(0)
    for step in range(20):
        for state in pair.states:
            g = random(state)
            g[::2] = 0  # rows that never get any
            if step < 10:
                g[1::4] = 0  # and some that wait
            set_gradient(state, g)
        pair.step()
    assert pair.error() <= 1e-9


def test_constant_gradient_follows_the_oracle() -> None:
    pair = Pair(weight_rank=3, moment_rank=2)  # all that is truncated is of rank one
    for _ in range(20):
        for state in pair.states:
            set_gradient(state, torch.ones(rows_of(state)))
        pair.step()
    assert pair.error() <= 1e-9


def test_layers_of_several_dtypes_are_clipped_together() -> None:
    model = make_model()
    model.base_model.model.second.double()
    pair, random = Pair(model=model), random_gradients(0)
    for state in pair.states:
        set_gradient(state, random(state))
    squares = [oracle.norm_square(gradient(state)) for state, oracle in zip(pair.states, pair.oracles, strict=True)]
    norm = pair.optimizer.clip_grad_norm_(0.05).item()
    assert norm == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-6)
    pair.optimizer.step()
    stats = oplora.stats(pair.optimizer)
    for state in pair.states:
        assert stats[state.name]["norm_g"] == pytest.approx(gradient(state).norm().item(), rel=1e-6)


def test_layer_that_sits_steps_out_follows_the_oracle() -> None:
    pair, random = Pair(), random_gradients(0)
    for step in range(12):
        pair.optimizer.zero_grad()
        for state in pair.states[: 1 + step % 2]:
            set_gradient(state, random(state))
        pair.step()
    assert [state.steps for state in pair.states] == [12, 6]
    assert pair.error() <= 1e-9


def test_generator_whose_units_are_all_off_and_come_back_follows_the_oracle() -> None:
    pair, random = Pair(hidden_width=8, latent_width=4), random_gradients(0)
    live = []
    for step in range(24):
        for state, oracle in zip(pair.states, pair.oracles, strict=True):
            if step % 4 == 0:  # push all units off or on, and let c2 take up what this changes
                shift, before = (1.0 if step % 8 else -1.0), oracle.generate()
                piece(state, "pre").add_(shift)
                oracle.hidden.c += shift
                oracle.outer.c += before - oracle.generate()
            set_gradient(state, random(state))
        pair.step()
        live.append(oplora.stats(pair.optimizer)[pair.states[0].name]["live_units"])
    assert live[:4] == [0] * 4 and min(live[4:8]) > 0
    assert pair.error() <= 1e-9


# ---- rounding ----


def float32_path(seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """The factors in float32, with moments in bfloat16, and in float64, from the same gradients."""
    pair = Pair(torch.float32, lr=1e-3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for state in pair.states:
            set_gradient(state, torch.randn(rows_of(state), generator=generator) + 0.3)
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


def test_each_moment_is_unbiased_over_seeds() -> None:
    errors: dict[str, list[Tensor]] = {"m": [], "S": [], "R": []}
    for seed in range(32):
        pieces = []
        for dtype in (torch.float32, torch.float64):
            model, random = make_model(dtype, target_modules=["first"]), random_gradients(9)
            optimizer = oplora.AdamW(
                model, state="lean", lr=1e-7, seed=seed
            )  # h stays, so that the moments depend on g alone
            state = optimizer._stepper.states[0]
            for _ in range(150):
                set_gradient(state, (random(state) + 0.3).float())
                optimizer.step()
            pieces.append({name: piece(state, name).double() for name in errors})
        for name, kept in errors.items():
            kept.append(pieces[0][name] / pieces[1][name] - 1)
    for kept in errors.values():
        mean, deviation = torch.stack(kept).mean(0), torch.stack(kept).std(0)
        assert deviation.mean() > 2e-3  # a moment's bfloat16 is rounded at every step
        assert (mean / (deviation / math.sqrt(32))).square().mean().sqrt() <= 1.3  # a bias would show as more than 1


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
        set_gradient(state, torch.zeros(rows_of(state)))
    pair.optimizer.step()
    assert_same_bits(factors(pair.model), before)
    assert all(state.pieces()["numbers"].isfinite().all() for state in pair.states)


def test_rate_of_zero_moves_no_bit() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, state="lean", lr=1e-2)
    train(model, optimizer, 5)
    before = factors(model)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 5)
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize("ranks", [(2, 1), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scales", [(1e-42,), (1e-30,), (1e30,), (1.0, 1e-30, 1e30, 1e-42, 0.0), (0.0, 1e-45, 1e-38, 1e-20)], ids=str
)
def test_extreme_gradients_stay_finite(scales: tuple[float, ...], dtype: torch.dtype, ranks: tuple[int, int]) -> None:
    pair, random = Pair(dtype, lr=1e-3, weight_rank=ranks[0], moment_rank=ranks[1]), random_gradients(0)
    for step in range(20):
        for state in pair.states:
            set_gradient(state, random(state) * scales[step % len(scales)])
        pair.optimizer.step()
        for numbers in oplora.stats(pair.optimizer).values():
            assert all(0 <= value <= 1 for name, value in numbers.items() if name.startswith("dropped"))
    assert all(t.isfinite().all() for t in factors(pair.model).values())
    pieces = [piece for state in pair.states for piece in state.pieces().values()]
    assert all(piece.isfinite().all() for piece in pieces)


@pytest.mark.parametrize("r", [1, 2])
def test_smallest_layer_follows_the_oracle(r: int) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), LoraConfig(r=r, target_modules=["0"])).double()
    pair = Pair(model=model, hidden_width=1, latent_width=1)
    for step in range(10):
        set_gradient(pair.states[0], torch.full((2 * r,), (-1.0) ** step + 0.1, dtype=torch.float64))
        pair.step()
    assert pair.error() <= 1e-9


# not at 0.99, where the directions that are kept are about as long as those that are dropped, and rounding chooses
@pytest.mark.parametrize("decay", [1.0, 1.5, 2.0])
def test_decay_so_strong_that_the_scale_vanishes_follows_the_oracle(decay: float) -> None:
    pair = Pair(lr=1e-3, weight_decay=decay / 1e-3)
    pair.train(170)
    assert abs(pair.states[0].pieces()["scalars"][0]) < 1e-50 or decay == 2.0  # where it changes its sign each step
    assert pair.error() <= 1e-12
    assert all(state.pieces()["numbers"].isfinite().all() for state in pair.states)


@pytest.mark.parametrize("decay", [0.99, 1.0, 1.5, 2.0])
def test_decay_so_strong_that_the_scale_vanishes_is_finite_in_float32(decay: float) -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, state="lean", lr=1e-3, weight_decay=decay / 1e-3)
    train(model, optimizer, 200)
    assert all(t.isfinite().all() for t in factors(model).values())
    assert all(piece.isfinite().all() for state in optimizer._stepper.states for piece in state.pieces().values())


@pytest.mark.parametrize(
    ("dtype", "turned", "off"),
    [(torch.float64, 1e-12, 1e-6), (torch.float32, 1e-6, 1e-2)],  # bfloat16 moments: a hundredth after 2,000 steps
    ids=str,
)
def test_directions_stay_orthonormal_and_the_output_true_over_many_steps(
    dtype: torch.dtype, turned: float, off: float
) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=1, target_modules=["0"])).to(dtype)
    pair = Pair(model=model, hidden_width=6, latent_width=3, lr=1e-3, weight_decay=0.01)
    state, random = pair.states[0], random_gradients(1)
    target = random(state)
    for _ in range(2000):
        set_gradient(state, values(state) - target + 0.1 * random(state))
        pair.step()
    settings = state.engine.state.settings
    for name, width in (("Q", settings.hidden_width), ("Q1", settings.latent_width)):
        Q = piece(state, name).view(state.engine.state.ranks[0], width)
        assert torch.dist(Q @ Q.T, torch.eye(2, dtype=dtype)) <= turned
    assert pair.error() <= off


# ---- other hands ----


def test_edit_is_kept_and_decays_as_the_bias_does() -> None:
    pairs = [Pair(weight_decay=2.0), Pair(weight_decay=2.0)]
    random = random_gradients(0)
    for step in range(6):
        for edited, alone in zip(*(pair.states for pair in pairs), strict=True):
            g = random(edited)
            set_gradient(edited, g), set_gradient(alone, g)
            if step == 2:
                for p in edited.factors.layer.parameters():
                    p.detach().add_(0.5)
        for pair in pairs:
            pair.optimizer.step()
    for edited, alone in zip(*(pair.states for pair in pairs), strict=True):
        left = torch.full((rows_of(edited),), 0.5 * (1 - 1e-2 * 2.0) ** 4, dtype=torch.float64)
        torch.testing.assert_close(values(edited) - values(alone), left, rtol=1e-12, atol=0)


def test_edits_make_no_warning() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, state="lean")
    train(model, optimizer, 1)
    model.load_state_dict({n: t + 1 for n, t in factors(model).items()}, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)


def test_edits_of_bfloat16_factors_replace_their_masters() -> None:
    model = make_model(torch.bfloat16)
    optimizer = oplora.AdamW(model, state="lean", lr=1e-4)
    train(model, optimizer, 2, torch.bfloat16)
    model.load_state_dict({n: torch.full_like(t, 0.25) for n, t in factors(model).items()}, strict=False)
    train(model, optimizer, 1, torch.bfloat16)
    masters = [master for state in optimizer._stepper.states for master in state.masters]
    assert all((master - 0.25).abs().max() < 1e-2 for master in masters)


@pytest.mark.parametrize("init", ["paper", "keep"])
def test_factors_that_are_not_contiguous_train_as_those_that_are(init: str) -> None:
    models = [make_model(), make_model()]
    linear = models[0].base_model.model.first.lora_A["default"]
    linear.weight = nn.Parameter(linear.weight.detach().t().contiguous().t())
    for model in models:
        optimizer, random = oplora.AdamW(model, state="lean", lr=1e-2, init=init), random_gradients(0)
        for _ in range(3):
            for state in optimizer._stepper.states:
                set_gradient(state, random(state))
            optimizer.step()
    assert not linear.weight.is_contiguous()
    assert_same_bits(*(factors(model) for model in models))


# ---- masters ----


def test_small_steps_are_not_lost_in_bfloat16_factors() -> None:
    model = make_model(torch.bfloat16)
    optimizer = oplora.AdamW(model, state="lean", lr=1e-5, weight_decay=0.0)
    model_before = factors(model)
    for _ in range(300):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = [(t.float() - model_before[n].float()).abs().mean() for n, t in factors(model).items() if "lora_B" in n]
    assert all(m > 2e-3 for m in moved)  # 300 steps of at least 1e-5


@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_state_that_is_saved_after_the_model_was_moved_resumes(first: torch.dtype, then: torch.dtype) -> None:
    model, fresh = make_model(first), make_model(then)
    optimizer, resumed = oplora.AdamW(model, state="lean", lr=1e-2), oplora.AdamW(fresh, state="lean", lr=1e-2)
    train(model, optimizer, 2, first)
    model.to(then)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(fresh, resumed, 3, then) == train(model, optimizer, 3, then)


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
    optimizer = oplora.AdamW(model, state="lean", **options, seed=2**64 - 5)
    train(model, optimizer, before, dtype)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = oplora.AdamW(fresh, state="lean", **options)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert train(fresh, resumed, after, dtype) == train(model, optimizer, after, dtype)
    assert_same_bits(factors(fresh), factors(model))


@pytest.mark.parametrize(("key", "value"), [("seed", 2**64), ("seed", 0.5), ("layer", 2**32), ("master", [None])])
def test_damaged_lean_state_is_refused(key: str, value: object) -> None:
    optimizer = oplora.AdamW(make_model(torch.bfloat16), state="lean")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = value
    with pytest.raises(oplora.OPLoRAError, match=f"the saved {key} of layer .*first.default"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(("before", "after"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_state_of_another_dtype_goes_on_from_the_unrounded_factors(before: torch.dtype, after: torch.dtype) -> None:
    model, other = make_model(before), make_model(after)
    optimizer, resumed = oplora.AdamW(model, state="lean", lr=1e-2), oplora.AdamW(other, state="lean", lr=1e-2)
    train(model, optimizer, 3, before)
    held = [master for state in optimizer._stepper.states for master in state.masters]
    exact = held if before == torch.bfloat16 else [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(torch.equal(p, e.to(after)) for p, e in zip(resumed.param_groups[0]["params"], exact, strict=True))
    train(other, resumed, 2, after)


# ---- stats ----


def test_stats_tell_what_the_truncations_drop() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, state="lean", lr=1e-2, weight_rank=1)
    names = ("dropped_moment", "dropped_weight", "dropped_hidden_moment", "dropped_hidden_weight")
    assert all(math.isnan(numbers[name]) for numbers in oplora.stats(optimizer).values() for name in names)
    train(model, optimizer, 20, torch.float64)
    for numbers in oplora.stats(optimizer).values():
        assert all(0 <= numbers[name] < 0.5 for name in names)
        assert numbers["dropped_weight"] > 0


def test_nothing_is_dropped_at_full_rank() -> None:
    model = make_model(torch.float64)
    optimizer = oplora.AdamW(model, state="lean", lr=1e-2, hidden_width=2, weight_rank=4, moment_rank=4)
    train(model, optimizer, 5, torch.float64)
    for numbers in oplora.stats(optimizer).values():
        assert numbers["dropped_moment"] < 1e-12 and numbers["dropped_weight"] < 1e-12


def test_state_saved_before_the_first_step_resumes_with_its_own_start() -> None:
    """latent_std is the saved run's: the start of a kept generator may be made anew."""
    model, twin = make_model(), make_model()
    saved = oplora.AdamW(model, state="lean", lr=1e-2, init="keep", latent_std=0.5)
    resumed = oplora.AdamW(twin, state="lean", lr=1e-2, init="keep")
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert train(model, saved, 3) == train(twin, resumed, 3)
    assert_same_bits(factors(model), factors(twin))


def test_state_whose_w2_starts_at_random_resumes_where_this_one_was_kept() -> None:
    """A trained adapter is kept until its state is loaded."""
    model, twin = make_model(), make_model()
    optimizer = oplora.AdamW(model, state="lean", lr=1e-2)
    train(model, optimizer, 2)
    resumed = oplora.AdamW(twin, state="lean", lr=1e-2, init="keep")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 3) == train(twin, resumed, 3)
    assert_same_bits(factors(model), factors(twin))
