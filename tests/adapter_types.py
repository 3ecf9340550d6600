"""Every adapter type that oplora generates, on the smallest model that can hold it, and the oracle of its training."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from conftest import EagerGenerator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import oplora


class Experts(nn.Module):
    """Three experts, all of them used, with one Parameter for each of their layers, as in transformers' mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 12, 16) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bei,eio->bo", torch.tanh(torch.einsum("bi,eio->beo", x, self.up)), self.down)


class Block(nn.Module):
    """`first`, the layer that is adapted, then a frozen linear layer."""

    def __init__(self, first: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x, x, x, need_weights=False)[0][:, 0, :8]


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8))


BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (linear, (12,)),
    "Conv1D": (lambda: Block(Conv1D(24, 12), 24), (12,)),
    "Conv1d": (lambda: Block(nn.Conv1d(4, 6, 3), 30), (4, 7)),
    "Conv2d": (lambda: Block(nn.Conv2d(4, 6, 3, padding=1), 150), (4, 5, 5)),
    "Conv2d, groups": (lambda: Block(nn.Conv2d(4, 6, 3, groups=2), 54), (4, 5, 5)),
    "Conv3d": (lambda: Block(nn.Conv3d(2, 3, 2), 24), (2, 3, 3, 3)),
    "Embedding": (lambda: Block(nn.Embedding(11, 6), 18), (3,)),
    "MultiheadAttention": (Attention, (4, 12)),
    "parameters": (lambda: Block(Experts(), 8), (12,)),
}
LORA = dict(r=4, lora_alpha=8)

# name: (the layer it sits in, PEFT's config, its arguments)
CASES: dict[str, tuple[str, type, dict[str, Any]]] = {
    **{f"LoRA, {base}": (base, peft.LoraConfig, LORA) for base in BASES},
    "rsLoRA": ("Linear", peft.LoraConfig, {**LORA, "use_rslora": True}),
    "DoRA, Linear": ("Linear", peft.LoraConfig, {**LORA, "use_dora": True}),
    "DoRA, Conv1D": ("Conv1D", peft.LoraConfig, {**LORA, "use_dora": True, "fan_in_fan_out": True}),
    "DoRA, Conv2d": ("Conv2d", peft.LoraConfig, {**LORA, "use_dora": True}),
    "DoRA, Embedding": ("Embedding", peft.LoraConfig, {**LORA, "use_dora": True}),
    "VeRA": ("Linear", peft.VeraConfig, dict(r=16)),
    "IA3": ("Linear", peft.IA3Config, dict(feedforward_modules=["2"])),
    "LoHa, Linear": ("Linear", peft.LoHaConfig, dict(r=3)),
    "LoHa, Conv2d": ("Conv2d", peft.LoHaConfig, dict(r=3, use_effective_conv2d=True)),
    "LoKr, Linear": ("Linear", peft.LoKrConfig, dict(r=2)),
    "LoKr, Conv2d": ("Conv2d", peft.LoKrConfig, dict(r=1, use_effective_conv2d=True, decompose_both=True)),
    "OFT": ("Linear", peft.OFTConfig, dict(oft_block_size=4)),
    "BOFT": ("Linear", peft.BOFTConfig, dict(boft_block_size=4)),
    "Lily": ("Linear", peft.LilyConfig, dict(r=2, stride_A=1, num_B=2)),
    "RandLoRA": ("Linear", peft.RandLoraConfig, dict(r=4)),
    "HRA": ("Linear", peft.HRAConfig, dict(r=4)),
    "C3A": ("Linear", peft.C3AConfig, dict(block_size=4)),
    "MiSS": ("Linear", peft.MissConfig, dict(r=4)),
    "FourierFT": ("Linear", peft.FourierFTConfig, dict(n_frequency=10)),
    "DeLoRA": ("Linear", peft.DeloraConfig, dict(r=4)),
    "GraLoRA": ("Linear", peft.GraloraConfig, dict(r=4, gralora_k=2)),
    "VB-LoRA": ("Linear", peft.VBLoRAConfig, dict(r=2, num_vectors=8, vector_length=4, topk=2)),
}
TARGETS = {"Linear": ["0", "2"]}


def make(case: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The case's model, always from the same seed."""
    torch.manual_seed(0)
    base, config, arguments = CASES[case]
    if base == "parameters":
        targets: dict[str, Any] = {"target_parameters": ["first.up", "first.down"]}
    else:
        targets = {"target_modules": TARGETS.get(base, ["first"])}
    net = BASES[base][0]().to(dtype)
    return peft.get_peft_model(net, config(**arguments, **targets), autocast_adapter_dtype=False).to(dtype)


def data(case: str, steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    base, shape = CASES[case][0], BASES[CASES[case][0]][1]
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randint(11, (6, *shape), generator=generator)
            if base == "Embedding"
            else torch.randn(6, *shape, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(6, 8, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(steps)
    ]


class EagerOptimizer:
    """The generators of a model's adapters under autograd and torch.optim.AdamW, fed with the model's own gradients."""

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float = 0.01, eps: float = 1e-8, **options: Any
    ) -> None:
        generators = list(oplora.Generators(model, **options))
        self.ties = [g.factors for g in generators]
        self.eager = [EagerGenerator(dict(g.named_parameters()), g.factors.shapes) for g in generators]
        with torch.no_grad():
            self.bases = [
                [p.detach() - v for p, v in zip(tie.layer.parameters(), eager(), strict=True)]
                for tie, eager in zip(self.ties, self.eager, strict=True)
            ]
        narrower = 32 / self.eager[0].W2.shape[1]  # W2's rate for the width, at which it decays as c2 does
        weights = [eager.W2 for eager in self.eager]
        rest = [p for eager in self.eager for name, p in eager.named_parameters() if name != "W2"]
        groups = [{"params": weights, "lr": lr * narrower, "weight_decay": weight_decay / narrower}, {"params": rest}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, eps=eps)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        for tie in self.ties:
            for parameter in tie.layer.parameters():
                parameter.grad = None

    def step(self) -> None:
        for tie, eager in zip(self.ties, self.eager, strict=True):
            gradients = [p.grad for p in tie.layer.parameters()]
            if any(g is not None for g in gradients):
                some = [torch.zeros(shape) if g is None else g for g, shape in zip(gradients, tie.shapes, strict=True)]
                torch.autograd.backward(eager(), some)
        self.optimizer.step()
        with torch.no_grad():
            for tie, eager, bases in zip(self.ties, self.eager, self.bases, strict=True):
                for parameter, base, v in zip(tie.layer.parameters(), bases, eager(), strict=True):
                    parameter.copy_(base + v)
