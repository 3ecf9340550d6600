"""Trainers that do not install here: the call that each one's source makes of an optimizer, on an adapter of PEFT's.

docs/trainers.md says of which version that is. Each trains 20 steps; the loss falls, and PEFT reads the adapter.
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, make_model
from peft import PeftModel
from torch import Tensor, nn

import oplora

STEPS, LR = 20, 1e-4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> list[float]:
    """On one batch, as loops do that zero the gradients afterwards."""
    random = torch.Generator().manual_seed(7)
    x, y = (torch.randn(16, size, generator=random) for size in (13, 5))
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def reads_back(model: nn.Module, folder: Path) -> None:
    """What was trained is what PEFT reads."""
    model.save_pretrained(folder)
    torch.manual_seed(0)
    read = PeftModel.from_pretrained(Net(), folder)
    x = torch.randn(3, 13)
    assert torch.equal(read(x), model(x))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- kohya's scripts ----


def by_dotted_path(params: Any, optimizer_type: str, optimizer_args: list[str]) -> torch.optim.Optimizer:
    """get_optimizer of sd-scripts' library/train_util.py and of musubi-tuner's training/trainer_base.py."""
    kwargs = {key: ast.literal_eval(value) for key, value in (arg.split("=") for arg in optimizer_args)}
    *module, name = optimizer_type.split(".")
    made: torch.optim.Optimizer = getattr(importlib.import_module(".".join(module)), name)(params, lr=LR, **kwargs)
    return made


def kohya_groups(model: nn.Module, loraplus_ratio: float | None) -> list[dict[str, Any]]:
    """prepare_optimizer_params of networks/lora.py: values of dicts, one group, or two with LoRA+."""
    every = trainable(model)
    plus = {name: p for name, p in every.items() if loraplus_ratio is not None and "lora_B" in name}
    rest = {name: p for name, p in every.items() if name not in plus}
    groups: list[dict[str, Any]] = [{"params": rest.values(), "lr": LR}]
    return groups + ([{"params": plus.values(), "lr": LR * (loraplus_ratio or 1)}] if plus else [])


def sd_scripts(model: nn.Module) -> torch.optim.Optimizer:
    return by_dotted_path(kohya_groups(model, None), "oplora.AdamW", [])


def sd_scripts_with_arguments(model: nn.Module) -> torch.optim.Optimizer:
    arguments = ["preset='auto'", "weight_decay=0.1", "betas=(0.9,0.99)"]
    return by_dotted_path(kohya_groups(model, None), "oplora.AdamW", arguments)


def sd_scripts_with_loraplus(model: nn.Module) -> torch.optim.Optimizer:
    return by_dotted_path(kohya_groups(model, 4.0), "oplora.AdamW", [])


# ---- lists of optimizers that are closed: the line that a patch adds ----


def ai_toolkit(model: nn.Module) -> torch.optim.Optimizer:
    """toolkit/optimizer.py: a branch of get_optimizer(params, optimizer_type, learning_rate, optimizer_params)."""
    params, optimizer_params = [{"params": list(trainable(model).values()), "lr": LR}], {"weight_decay": 0.01}
    return oplora.AdamW(params, lr=float(LR), **optimizer_params)


def one_trainer(model: nn.Module) -> torch.optim.Optimizer:
    """modules/util/create.py: a case of create_optimizer; groups as NamedParameterGroup.py makes them."""
    group = {"name": "unet", "params": list(trainable(model).values()), "lr": LR, "initial_lr": LR}
    return oplora.AdamW(params=[group], lr=LR, betas=(0.9, 0.99), weight_decay=1e-2, eps=1e-8)


def simple_tuner(model: nn.Module) -> torch.optim.Optimizer:
    """helpers/training/optimizer_param.py: an entry of optimizer_choices, called by create_optimizer_with_param_groups;
    the second group may be empty."""
    decay: list[dict[str, Any]] = [
        {"params": list(trainable(model).values()), "weight_decay": 0.01, "lr": LR},
        {"params": [], "weight_decay": 0.0, "lr": LR},
    ]
    return oplora.AdamW(decay, betas=(0.9, 0.99), eps=1e-8)


def diffusion_pipe(model: nn.Module) -> torch.optim.Optimizer:
    """train.py: a branch of get_optimizer; tensors carry original_name, and are split by whether they decay."""
    for name, p in trainable(model).items():
        p.original_name = name
    decaying = [p for p in trainable(model).values() if p.ndim > 1]
    return oplora.AdamW([{"params": decaying}], lr=LR, betas=[0.9, 0.99], weight_decay=0.01, eps=1e-8)


# ---- others ----


def torchtune(model: nn.Module) -> torch.optim.Optimizer:
    """recipes/lora_finetune_single_device.py: config.instantiate(cfg.optimizer, parameters), frozen ones too."""
    component, arguments = "oplora.AdamW", {"lr": LR, "weight_decay": 0.01}
    module, name = component.rsplit(".", 1)
    made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(model.parameters(), **arguments)
    return made


def diffusers_script(model: nn.Module) -> torch.optim.Optimizer:
    """examples/text_to_image/train_text_to_image_lora.py."""
    lora_layers = filter(lambda p: p.requires_grad, model.parameters())
    return oplora.AdamW(lora_layers, lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-08)


CALLS: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
    sd_scripts,
    sd_scripts_with_arguments,
    sd_scripts_with_loraplus,
    ai_toolkit,
    one_trainer,
    simple_tuner,
    diffusion_pipe,
    torchtune,
    diffusers_script,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_call_of_a_trainers_source_trains_an_adapter_that_peft_reads(call: Any, tmp_path: Path) -> None:
    model = make_model()
    optimizer = call(model)
    assert len(optimizer._stepper.layers) == 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    losses = train(model, optimizer, scheduler)
    assert losses[-1] < 0.9 * losses[0]
    reads_back(model, tmp_path)


# ---- trainers that are transformers' ----


class Handing:
    """What is common to trainers of transformers' kind, without their data and devices."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.args = model, None
        self.optimizer: Any = None
        self.optimizer_cls_and_kwargs: Any = None


def axolotl(trainer: Handing) -> None:
    """src/axolotl/core/trainers/mixins/optimizer.py: factories get the arguments too; set by a plugin's
    post_trainer_create(cfg, trainer)."""
    trainer.optimizer_cls_and_kwargs = oplora.for_trainer(weight_decay=0.1)
    factory, kwargs = trainer.optimizer_cls_and_kwargs
    trainer.optimizer = factory()(trainer.model, trainer.args, **kwargs)


def ms_swift(trainer: Handing) -> None:
    """swift/optimizers/base.py: create_optimizer of what --optimizer names, registered by --external_plugins."""
    trainer.optimizer = oplora.AdamW(trainer.model, weight_decay=0.1)


def llama_factory(trainer: Handing) -> None:
    """src/llamafactory/train/sft/trainer.py: create_custom_optimizer(model, training_args, finetuning_args)."""

    def create_custom_optimizer(model: nn.Module, training_args: Any, finetuning_args: Any) -> torch.optim.Optimizer:
        return oplora.AdamW(model, weight_decay=0.1)

    trainer.optimizer = create_custom_optimizer(trainer.model, trainer.args, None)


@pytest.mark.parametrize("hand_over", [axolotl, ms_swift, llama_factory], ids=lambda call: call.__name__)
def test_hook_of_a_trainer_makes_the_optimizer_of_its_model(hand_over: Any, tmp_path: Path) -> None:
    trainer = Handing(make_model())
    hand_over(trainer)
    losses = train(trainer.model, trainer.optimizer)
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    reads_back(trainer.model, tmp_path)


# ---- Flux's split layers in kohya's networks ----


class SplitLoRA(nn.Module):
    """networks/lora_flux.py: one base layer whose outputs are split, an adapter for each; all downs come first."""

    def __init__(self, base: nn.Linear, split: list[int], r: int = 3) -> None:
        super().__init__()
        self.lora_down = nn.ModuleList(nn.Linear(base.in_features, r, bias=False) for _ in split)
        self.lora_up = nn.ModuleList(nn.Linear(r, size, bias=False) for size in split)
        for up in self.lora_up:
            nn.init.zeros_(up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([up(down(x)) for down, up in zip(self.lora_down, self.lora_up, strict=True)], -1)


@pytest.mark.parametrize("loraplus", [False, True])
def test_split_layers_between_whole_ones_are_paired_by_shape(loraplus: bool) -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(13, 12), nn.Linear(12, 21), nn.Linear(21, 5)]
    splits = [[12], [7, 7, 7], [5]]
    adapters = [SplitLoRA(linear, split) for linear, split in zip(linears, splits, strict=True)]
    named = [(f"{i}.{name}", p) for i, adapter in enumerate(adapters) for name, p in adapter.named_parameters()]
    if loraplus:
        groups = [{"params": [p for name, p in named if ("lora_up" in name) == is_up]} for is_up in (False, True)]
    else:
        groups = [{"params": [p for _, p in named]}]
    optimizer = oplora.AdamW(groups)
    held = {frozenset(map(id, layer.parameters())) for layer in optimizer._stepper.layers}
    expected = {
        frozenset((id(down.weight), id(up.weight)))
        for adapter in adapters
        for down, up in zip(adapter.lora_down, adapter.lora_up, strict=True)
    }
    assert held == expected
