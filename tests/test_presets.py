"""Settings by name: what each stands for, and that an argument that is given wins."""

import pytest
import torch
from conftest import assert_same_bits, factors, make_model, train

import oplora

PAPER = {"init": "paper", "hidden_lr_ratio": 1.0}


def flat(lr: float) -> dict[str, object]:
    return {"init": "keep", "hidden_lr_ratio": min(0.01, 5e-6 / lr) / lr}


def trained(state: str, **settings: object) -> dict[str, torch.Tensor]:
    model = make_model()
    train(model, oplora.AdamW(model, state=state, **settings), 4)
    return factors(model)


@pytest.mark.parametrize("state", ["lean", "exact"])
@pytest.mark.parametrize("lr", [1e-4, 3e-2])
@pytest.mark.parametrize("preset", ["paper", "flat"])
def test_preset_is_its_settings(state: str, lr: float, preset: str) -> None:
    by_name = trained(state, lr=lr, preset=preset)
    spelt_out = trained(state, lr=lr, **(PAPER if preset == "paper" else flat(lr)))
    assert_same_bits(by_name, spelt_out)


@pytest.mark.parametrize("lr", [1e-4, 3e-2, torch.tensor(3e-2)])
def test_flat_keeps_loras_start(lr: float) -> None:
    model = make_model()
    before = factors(model)
    oplora.AdamW(model, lr=lr, preset="flat")
    assert_same_bits(factors(model), before)


@pytest.mark.parametrize(("lr", "hidden_lr"), [(1e-6, 0.01), (1e-4, 0.01), (5e-4, 0.01), (1e-3, 5e-3), (1e-2, 5e-4)])
def test_hidden_rate_of_flat_is_its_own_until_the_product_is_too_high(lr: float, hidden_lr: float) -> None:
    optimizer = oplora.AdamW(make_model(), lr=lr, preset="flat")
    group = optimizer.param_groups[0]
    assert group["lr"] * group["hidden_lr_ratio"] == pytest.approx(hidden_lr)


def test_schedule_scales_the_hidden_rate_of_flat() -> None:
    optimizer = oplora.AdamW(make_model(), lr=1e-4, preset="flat")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert scheduler.get_last_lr() == [5e-5]
    group = optimizer.param_groups[0]
    assert group["lr"] * group["hidden_lr_ratio"] == pytest.approx(0.005)


@pytest.mark.parametrize("given", [{"init": "paper"}, {"hidden_lr_ratio": 0.0}])
def test_argument_that_is_given_wins(given: dict[str, object]) -> None:
    settings = {"lr": 1e-2, **flat(1e-2), **given}
    by_name, spelt_out = trained("lean", lr=1e-2, preset="flat", **given), trained("lean", **settings)
    assert_same_bits(by_name, spelt_out)


def test_any_optimizer_class_has_the_presets() -> None:
    optimizer = oplora.create_oplora_optimizer(make_model(), torch.optim.Adam, lr=1e-4, preset="flat")
    assert optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["hidden_lr_ratio"] == pytest.approx(0.01)
    optimizer = oplora.create_oplora_optimizer(make_model(), torch.optim.Adam, lr=1e-4, preset="paper")
    assert optimizer.param_groups[0]["hidden_lr_ratio"] == 1


def test_resumed_run_goes_on_with_the_rates_it_had() -> None:
    saved = oplora.AdamW(make_model(), lr=1e-4, preset="flat").state_dict()
    resumed = oplora.AdamW(make_model(), lr=1e-1, preset="paper", init="keep")
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] * resumed.param_groups[0]["hidden_lr_ratio"] == pytest.approx(0.01)


def test_unknown_preset_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(oplora.OPLoRAError, match="preset is 'flatter', expected 'auto' or 'paper' or 'flat'"):
        oplora.AdamW(make_model(), preset="flatter")


def test_flat_takes_its_rate_from_the_first_that_is_not_zero() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=0.0, preset="flat")
    optimizer.param_groups[0]["lr"] = 1e-4
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["hidden_lr_ratio"] == pytest.approx(100.0)


def test_preset_auto_is_refused_over_other_optimizers() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"preset is 'auto', .* take oplora\.AdamW"):
        oplora.create_oplora_optimizer(make_model(), torch.optim.SGD, lr=1e-3, preset="auto")
