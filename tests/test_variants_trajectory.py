"""OP-DoRA, OP-VeRA and OP-ScaledAdamW against definitions of their own, written from the papers for autograd.

Nothing of PEFT's layers or of oplora computes the truth: the model is a function of plain tensors.
"""

from collections.abc import Callable

import peft
import pytest
import torch
from conftest import EagerGenerator, Net, batches
from torch import Tensor, nn

import oplora

STEPS = 40
LR = 1e-2
SCALING = 2.0  # lora_alpha / r


def make(config: type, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    settings = config(target_modules=["first", "second"], **arguments)
    return peft.get_peft_model(Net().double(), settings, autocast_adapter_dtype=False).double()


def lora(x: Tensor, layer: nn.Linear, A: Tensor, B: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias + SCALING * (x @ A.T) @ B.T


def dora(x: Tensor, layer: nn.Linear, A: Tensor, B: Tensor, offset: Tensor) -> Tensor:
    """m (W + s B A) / ||W + s B A||, row by row, with m = ||W|| + offset and the norm a constant (arXiv 2402.09353)."""
    W = layer.weight + SCALING * B @ A
    m = layer.weight.norm(dim=1) + offset
    return x @ (m / W.norm(dim=1).detach())[:, None].mul(W).T + layer.bias


class Truth:
    """The net whose factors come out of one eager generator a layer, stepped by torch.optim.AdamW."""

    def __init__(self, start: nn.Module, layer_fn: Callable[..., Tensor], width: int) -> None:
        """start: the model whose base and whose generators' start are taken."""
        generators = list(oplora.Generators(start, hidden_width=width))
        self.net = [start.base_model.model.get_submodule(name).base_layer for name in ("first", "second")]
        self.generators = [EagerGenerator(dict(g.named_parameters()), g.factors.shapes) for g in generators]
        self.layer_fn = layer_fn
        rate = LR * 32 / width  # of W2, which decays as c2 does
        weights, others = [g.W2 for g in self.generators], [p for g in self.generators for p in (g.c2, g.z, g.W1, g.c1)]
        groups = [{"params": weights, "lr": rate, "weight_decay": 0.01 * width / 32}, {"params": others}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.01)

    def step(self, x: Tensor, y: Tensor, scale: Callable[[list[Tensor]], None] | None = None) -> None:
        self.optimizer.zero_grad()
        values = [generator() for generator in self.generators]
        leaves = [[v.detach().requires_grad_() for v in some] for some in values]
        first, second = self.net
        out = self.layer_fn(torch.tanh(self.layer_fn(x, first, *leaves[0])), second, *leaves[1])
        (out - y).square().mean().backward()
        for some, of in zip(values, leaves, strict=True):
            if scale is not None:
                scale(of)
            torch.autograd.backward(some, [leaf.grad for leaf in of])
        self.optimizer.step()

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        return [v for generator in self.generators for v in generator()]


def run(model: nn.Module, **options: object) -> list[Tensor]:
    optimizer = oplora.AdamW(model, lr=LR, state="exact", **options)
    for x, y in batches(STEPS, torch.float64):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return [p.detach() for layer in optimizer._stepper.layers for p in layer.parameters()]


def assert_equal_to(truth: list[Tensor], ours: list[Tensor]) -> None:
    for mine, theirs in zip(ours, truth, strict=True):
        assert (mine - theirs).abs().max() <= 1e-12 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("width", [4, 32])
def test_op_dora_equals_its_definition(width: int) -> None:
    arguments = dict(r=3, lora_alpha=6, use_dora=True)
    truth = Truth(make(peft.LoraConfig, **arguments), dora, width)
    for x, y in batches(STEPS, torch.float64):
        truth.step(x, y)
    expected = truth.values()
    for i, layer in enumerate(truth.net):  # PEFT holds m itself
        expected[3 * i + 2] = expected[3 * i + 2] + layer.weight.norm(dim=1)
    assert_equal_to(expected, run(make(peft.LoraConfig, **arguments), hidden_width=width))


def test_op_vera_equals_its_definition() -> None:
    model = make(peft.VeraConfig, r=16)
    shared_A, shared_B = (getattr(model.base_model, name)["default"] for name in ("vera_A", "vera_B"))

    def vera(x: Tensor, layer: nn.Linear, b: Tensor, d: Tensor) -> Tensor:
        """W x + b * B (d * (A x)) with A and B frozen and shared by all layers (arXiv 2310.11454)."""
        A, B = shared_A[:, : layer.in_features], shared_B[: layer.out_features]
        return x @ layer.weight.T + layer.bias + b * ((start + d) * (x @ A.T) @ B.T)

    start = torch.tensor(0.1, dtype=torch.float32).double()  # as PEFT fills d, before it becomes float64
    truth = Truth(make(peft.VeraConfig, r=16), vera, 32)
    for x, y in batches(STEPS, torch.float64):
        truth.step(x, y)
    expected = truth.values()
    expected[1], expected[3] = expected[1] + start, expected[3] + start
    assert_equal_to(expected, run(model))


@pytest.mark.parametrize("delta", [1e-6, 1e-2])
def test_op_scaled_adamw_equals_its_definition(delta: float) -> None:
    def scale(leaves: list[Tensor]) -> None:
        A, B = leaves
        identity = delta * torch.eye(3, dtype=torch.float64)
        with torch.no_grad():
            g_A = torch.linalg.solve(B.T @ B + identity, A.grad)
            g_B = torch.linalg.solve(A @ A.T + identity, B.grad, left=False)
            A.grad, B.grad = g_A, g_B

    truth = Truth(make(peft.LoraConfig, r=3, lora_alpha=6), lora, 32)
    for x, y in batches(STEPS, torch.float64):
        truth.step(x, y, scale)
    assert_equal_to(truth.values(), run(make(peft.LoraConfig, r=3, lora_alpha=6), precondition=delta))
