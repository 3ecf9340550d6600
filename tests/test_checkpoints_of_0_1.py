"""Checkpoints that version 0.1 wrote (tests/data/0.1) go on as 0.1 went on, to the bit.

A file holds the model's state_dict after SAVED steps, the optimizer's, and the losses of the STEPS that 0.1 made then.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, batches, train_on
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import oplora

DATA = Path(__file__).parent / "data" / "0.1"
SIZES = (5, 7, 3)
SAVED, STEPS = 3, 4

Make = Callable[[nn.Module], torch.optim.Optimizer]
SMALL = dict(lr=1e-2, hidden_width=6, latent_width=3, seed=5)
LEAN, EXACT = dict(SMALL, state="lean"), dict(SMALL, state="exact")


def adamw(**options: Any) -> Make:
    return lambda model: oplora.AdamW(model, **options)


# name: the adapter's config, the model's dtype, the optimizer
CASES: dict[str, tuple[dict[str, Any], torch.dtype, Make]] = {
    "lean": ({}, torch.float32, adamw(**LEAN)),
    "lean of other ranks, flat": ({}, torch.float32, adamw(**LEAN, weight_rank=1, moment_rank=2, preset="flat")),
    "lean bfloat16": ({}, torch.bfloat16, adamw(**LEAN)),
    "lean float64": ({}, torch.float64, adamw(**LEAN)),
    "lean that keeps": (dict(init_lora_weights="orthogonal", r=2), torch.float32, adamw(**LEAN, init="keep")),
    "lean with biases": (dict(bias="all"), torch.float32, adamw(**LEAN)),
    "exact that decays": ({}, torch.float32, adamw(**EXACT, weight_decay=1.0)),
    "exact that keeps": (dict(init_lora_weights="orthogonal", r=2), torch.float32, adamw(**EXACT, init="keep")),
    "exact with biases": (dict(bias="all"), torch.float32, adamw(**EXACT)),
    "exact bfloat16": ({}, torch.bfloat16, adamw(**EXACT)),
    "DoRA": (dict(use_dora=True), torch.float32, adamw(**LEAN)),
    "AdamW over generators": (
        dict(bias="all"),
        torch.float32,
        lambda model: oplora.create_oplora_optimizer(
            model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, hidden_width=6, latent_width=3, hidden_lr_ratio=0.5
        ),
    ),
    "SGD over generators": (
        {},
        torch.float32,
        lambda model: oplora.create_oplora_optimizer(
            model, torch.optim.SGD, lr=0.1, momentum=0.9, hidden_width=6, latent_width=3
        ),
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def make(name: str) -> nn.Module:
    config, dtype, _ = CASES[name]
    torch.manual_seed(0)
    settings = {"r": 1, "lora_alpha": 6, "target_modules": ["first", "second"], **config}
    return get_peft_model(Net(SIZES).to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)


def data(name: str, begin: int, end: int) -> list[tuple[Tensor, Tensor]]:
    return list(batches(end, CASES[name][1], (SIZES[0], SIZES[-1])))[begin:]


def backwards(name: str, model: nn.Module) -> list[Tensor]:
    """Of the saved model, without oplora: whether this machine's matrix products have the bits of the one that wrote
    the files."""
    (x, y), *_ = data(name, SAVED, SAVED + 1)
    loss = (model(x) - y).square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def write(name: str) -> None:
    """What 0.1 ran."""
    model = make(name)
    optimizer = CASES[name][2](model)
    train_on(model, optimizer, data(name, 0, SAVED))
    optimizer.zero_grad()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    saved = {"model": state, "optimizer": optimizer.state_dict(), "backwards": backwards(name, model)}
    torch.save(saved, file_of(name))
    losses = train_on(model, optimizer, data(name, SAVED, SAVED + STEPS))
    saved = torch.load(file_of(name), weights_only=True)
    torch.save({**saved, "losses": losses}, file_of(name))


def file_of(name: str) -> Path:
    return DATA / (name.replace(" ", "_").replace(",", "") + ".pt")


def load(name: str) -> dict[str, Any]:
    return torch.load(file_of(name), weights_only=True)


def resume(name: str, saved: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make(name)
    optimizer = CASES[name][2](model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


@every_case
def test_goes_on_to_the_losses_of_0_1(name: str) -> None:
    saved = load(name)
    model, optimizer = resume(name, saved)
    has_its_bits = all(map(torch.equal, backwards(name, model), saved["backwards"]))
    losses = train_on(model, optimizer, data(name, SAVED, SAVED + STEPS))
    assert losses == (saved["losses"] if has_its_bits else pytest.approx(saved["losses"], rel=1e-3))


@every_case
def test_loading_puts_the_factors_back(name: str) -> None:
    saved = load(name)
    model = make(name)
    CASES[name][2](model).load_state_dict(saved["optimizer"])
    for key, tensor in model.state_dict().items():
        if "lora_A" in key or "lora_B" in key:
            assert torch.equal(tensor, saved["model"][key])


@every_case
def test_saved_anew_goes_on_alike(name: str) -> None:
    saved = load(name)
    model, optimizer = resume(name, saved)
    again, resumed = resume(name, {**saved, "optimizer": copy.deepcopy(optimizer.state_dict())})
    some = data(name, SAVED, SAVED + STEPS)
    assert train_on(again, resumed, some) == train_on(model, optimizer, some)


def test_files_hold_what_they_are_for() -> None:
    of_layer = {name: next(iter(load(name)["optimizer"]["generators"].values())) for name in CASES if "gen" not in name}
    assert not of_layer["exact that decays"]["moving"].all()
    assert bool((of_layer["exact that decays"]["decay"] != 1).any())
    assert all(base is not None for base in of_layer["lean that keeps"]["bases"])
    assert all(base is not None for base in of_layer["exact that keeps"]["bases"])
    assert all(master is not None for master in of_layer["lean bfloat16"]["masters"])


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a layer less": lambda saved: saved["generators"].popitem(),
    "a layer more": lambda saved: saved["generators"].update(x=next(iter(saved["generators"].values()))),
    "no moments": lambda saved: saved["generators"]["base_model.model.first.default"].pop("moments"),
    "shorter numbers": lambda saved: saved["generators"]["base_model.model.first.default"].update(
        numbers=torch.zeros(3)
    ),
    "text": lambda saved: saved["generators"].update({"base_model.model.first.default": "lost"}),
    "no generators": lambda saved: saved.pop("generators"),
    "no groups": lambda saved: saved["param_groups"].clear(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_refused_and_nothing_changed(damage: Callable[[dict[str, Any]], Any]) -> None:
    saved = load("lean")["optimizer"]
    damage(saved)
    model = make("lean")
    optimizer = CASES["lean"][2](model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(oplora.OPLoRAError):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("lean") and "keeps" not in name])
def test_state_that_does_not_say_how_it_began_goes_on_alike(name: str) -> None:
    """The first of 0.1's checkpoints had neither key: A's rows started at random, z with the paper's deviation."""
    saved = load(name)
    if "flat" not in name:  # whose rows of A were no random ones
        for layer in saved["optimizer"]["generators"].values():
            del layer["random"]
    for layer in saved["optimizer"]["generators"].values():
        del layer["latent_std"]
    runs = [resume(name, state) for state in (saved, load(name))]
    some = data(name, SAVED, SAVED + STEPS)
    first, second = (train_on(model, optimizer, some) for model, optimizer in runs)
    assert first == second
