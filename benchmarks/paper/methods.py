"""The methods that are compared, by name: how each adapts a model, and what steps it.

All train with AdamW at torch's defaults (betas 0.9 and 0.999, weight decay 0.01) unless their authors' defaults say
otherwise. Each of the others is its own authors' or maintainers' code at its documented defaults; none is ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from eager_generators import EagerOPLoRA, pairs
from torch import nn
from torch.optim import AdamW, Optimizer

import oplora


@dataclass(frozen=True)
class Method:
    name: str
    source: str
    optimizer: Callable[[nn.Module, float, int], Any]  # of a model with the adapter, a learning rate, a seed
    adapter: dict[str, Any] = field(default_factory=dict)  # of LoraConfig, beside r, alpha and targets
    rank_factor: float = 1.0

    def adapt(self, base: nn.Module, r: int, alpha: int, targets: Sequence[str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        r, alpha = round(self.rank_factor * r), round(self.rank_factor * alpha)
        config = {"r": r, "lora_alpha": alpha, "target_modules": list(targets), **self.adapter}
        return get_peft_model(base, LoraConfig(**config))  # type: ignore[no-any-return]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float, seed: int, factor: float = 1.0) -> Optimizer:
    return AdamW(trainable(model), lr=factor * lr)


def lora_plus(model: nn.Module, lr: float, seed: int) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, AdamW, lr=lr, loraplus_lr_ratio=16)  # type: ignore[no-any-return]


def scaled_adamw(model: nn.Module, lr: float, seed: int) -> Optimizer:
    from peft.optimizers import create_riemannian_optimizer

    return create_riemannian_optimizer(model, AdamW, lr=lr)  # type: ignore[no-any-return]


def lora_pro(model: nn.Module, lr: float, seed: int) -> Any:
    from lora_pro import LoRAProAdamW

    return LoRAProAdamW(model, lr=lr)


def lora_rite(model: nn.Module, lr: float, seed: int) -> Optimizer:
    from pytorch_optimizer import LoRARite

    in_turn = [p for pair in pairs(model) for p in pair]  # A, B, A, B, ...: the order that it asks for
    return LoRARite(in_turn, lr=lr)  # type: ignore[no-any-return]


def op(
    model: nn.Module,
    lr: float,
    seed: int,
    hidden_lr: float | None = None,
    bound: tuple[float, int] = (math.inf, 1),
    **settings: Any,
) -> Optimizer:
    """The hidden path's rate is hidden_lr, whatever lr is, but at most bound[0] / lr ** bound[1]."""
    if hidden_lr is not None:
        settings["hidden_lr_ratio"] = min(hidden_lr, bound[0] / lr ** bound[1]) / lr
    return oplora.AdamW(model, lr=lr, seed=seed, **settings)


PAPER = {"init": "paper", "hidden_lr_ratio": 1.0, "hidden_width": 32, "latent_width": 128, "latent_std": 0.01}
OP_LORA = "arXiv 2412.10362"


def oplora_method(name: str, adapter: dict[str, Any] | None = None, **settings: Any) -> Method:
    """As the paper sets it up, but for what `settings` say."""
    return Method(name, OP_LORA, partial(op, **{**PAPER, **settings}), adapter or {})


def eager(name: str, **settings: Any) -> Method:
    """Of eager_generators.py; as the paper sets it up, but for what `settings` say."""
    return Method(name, OP_LORA, partial(EagerOPLoRA, **settings))


def steps_factors(name: str, optimizer: Callable[..., Optimizer], **settings: Any) -> Method:
    """A torch optimizer on A and B themselves."""
    return Method(name, "torch.optim", partial(on_factors, optimizer=optimizer, **settings))


def on_factors(
    model: nn.Module, lr: float, seed: int, optimizer: Callable[..., Optimizer], **settings: Any
) -> Optimizer:
    return optimizer(trainable(model), lr=lr, **settings)


LORA = Method("LoRA", "arXiv 2106.09685; peft, torch.optim.AdamW", adamw)
# OP-LoRA steps by lr (1 + the sum of h): LoRA between the rates of the grid, which are 2.2 apart, tells what the
# generator does from what another rate does
BETWEEN = 1.7
LORA_FASTER = Method(f"LoRA, {BETWEEN} times the rate", LORA.source, partial(adamw, factor=BETWEEN))
OP_EXACT = oplora_method("OP-LoRA, exact", state="exact")
OP_LEAN = oplora_method("OP-LoRA, lean", state="lean")
START_KEPT = oplora_method("OP-LoRA, start kept", init="keep")
OWN_RATE = oplora_method("OP-LoRA, start kept, hidden rate 0.01", init="keep", hidden_lr=1e-2)
FALLING = oplora_method("OP-LoRA, start kept, hidden rate 1e-12 / lr^3", init="keep", hidden_lr=1e-2, bound=(1e-12, 3))
FLAT = Method("OP-LoRA, flat", OP_LORA, partial(op, preset="flat"))
# in bytes an entry, factor and gradient included: plain LoRA under AdamW 16; state lean with a start that is kept 28
LORA_OF_EQUAL_MEMORY = Method("LoRA, as much memory", LORA.source, LORA.optimizer, rank_factor=28 / 16)
PEERS = [
    Method("rsLoRA", "arXiv 2312.03732; peft", adamw, {"use_rslora": True}),
    Method("LoRA+", "arXiv 2402.12354; peft, B's rate 16 times A's", lora_plus),
    Method("DoRA", "arXiv 2402.09353; peft", adamw, {"use_dora": True}),
    Method("PiSSA", "arXiv 2404.02948; peft, 16 iterations", adamw, {"init_lora_weights": "pissa_niter_16"}),
    Method("ScaledAdamW", "arXiv 2402.02347; peft's create_riemannian_optimizer", scaled_adamw),
    Method("LoRA-Pro", "arXiv 2407.18242; lora-pro-adamw", lora_pro),
    Method("LoRA-RITE", "arXiv 2410.20625; pytorch-optimizer", lora_rite),
]
OP_DORA = oplora_method("OP-DoRA", {"use_dora": True}, state="lean")
