"""oplora.precondition: every pair's gradients in the metric of its product, block by block."""

import pytest
import torch
from adapter_types import data, make
from conftest import Net, batches, make_model, train_on
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import oplora
from oplora.adapters import AdaptedLayer, find_layers, precondition_gradients

PAIRED = ["LoRA, Linear", "LoRA, Conv1D", "LoRA, Conv2d", "LoRA, Conv2d, groups", "LoRA, Conv3d", "LoRA, Embedding"]
PAIRED += ["LoRA, MultiheadAttention", "LoRA, parameters", "DoRA, Linear"]
DELTA = 1e-3


def with_gradients(case: str) -> list[AdaptedLayer]:
    """Trained a little, so that no B is zero, and with a gradient in every tensor."""
    model = make(case)
    train_on(model, oplora.AdamW(model, lr=1e-2), data(case, 3))
    x, y = data(case, 4)[3]
    model.zero_grad()
    (model(x) - y).square().mean().backward()
    return find_layers(model)


def held(layers: list[AdaptedLayer]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    parameters = [layer.parameters() for layer in layers]
    return [[p.detach() for p in some] for some in parameters], [[p.grad for p in some] for some in parameters]


@pytest.mark.parametrize("case", PAIRED)
def test_every_block_is_solved_with_its_own_matrix(case: str) -> None:
    layers = with_gradients(case)
    tensors, gradients = held(layers)
    for layer, some, before, after in zip(
        layers, tensors, gradients, precondition_gradients(layers, tensors, gradients, DELTA), strict=True
    ):
        A, B = layer.blocks(*(some[i] for i in layer.pair()))
        g_A, g_B = layer.blocks(*(before[i] for i in layer.pair()))
        to_A, to_B = layer.blocks(*(after[i] for i in layer.pair()))
        for block in range(len(A)):
            identity = DELTA * torch.eye(A.shape[1], dtype=torch.float64)
            solved = torch.linalg.solve(B[block].T @ B[block] + identity, g_A[block])
            torch.testing.assert_close(to_A[block], solved, rtol=1e-9, atol=1e-12)
            solved = torch.linalg.solve(A[block] @ A[block].T + identity, g_B[block], left=False)
            torch.testing.assert_close(to_B[block], solved, rtol=1e-9, atol=1e-12)
        assert all(torch.equal(before[i], after[i]) for i in range(len(some)) if i not in layer.pair())


@pytest.mark.parametrize("case", ["LoRA, Linear", "LoRA, Conv2d", "LoRA, parameters"])
def test_blocks_multiply_to_pefts_delta(case: str) -> None:
    layers = with_gradients(case)
    for layer in layers:
        A, B = layer.blocks(*(layer.parameters()[i].detach() for i in layer.pair()))
        product = (B @ A) * layer.module.scaling[layer.adapter]
        delta = layer.module.get_delta_weight(layer.adapter)
        torch.testing.assert_close(product.view(delta.shape) if delta.numel() == product.numel() else product, delta)


def test_blocks_of_a_grouped_convolution_are_its_groups() -> None:
    (layer,) = with_gradients("LoRA, Conv2d, groups")
    x = data("LoRA, Conv2d, groups", 1)[0][0]
    module, scaling = layer.module, layer.module.scaling[layer.adapter]
    A, B = layer.blocks(*(p.detach() for p in layer.parameters()))
    base = module.get_base_layer()
    inner = nn.functional.conv2d(x, A.reshape(-1, *layer.parameters()[0].shape[1:]))
    outer = [B[g] @ part.flatten(2) for g, part in enumerate(inner.chunk(len(B), 1))]
    expected = base(x) + scaling * torch.cat(outer, 1).view(base(x).shape)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("state", ["exact", "lean"])
def test_clipping_measures_what_flows_into_the_generators(state: str) -> None:
    model, twin = make_model(torch.float64), make_model(torch.float64)
    optimizer = oplora.AdamW(model, lr=1e-2, state=state, start="uniform", precondition=DELTA)
    by_hand = oplora.AdamW(twin, lr=1e-2, state=state, start="uniform")
    for x, y in batches(5, torch.float64):
        for net, one in ((model, optimizer), (twin, by_hand)):
            one.zero_grad()
            (net(x) - y).square().mean().backward()
        layers = find_layers(twin)
        for layer, scaled in zip(layers, precondition_gradients(layers, *held(layers), DELTA), strict=True):
            for parameter, gradient in zip(layer.parameters(), scaled, strict=True):
                parameter.grad = gradient
        norms = optimizer.clip_grad_norm_(0.5), by_hand.clip_grad_norm_(0.5)
        torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
        optimizer.step(), by_hand.step()
    for mine, truth in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


def test_gradients_in_the_model_stay_as_they_are() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, precondition=1e-6)
    x, y = next(batches(1, torch.float32))
    (model(x) - y).square().mean().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert all(torch.equal(dict(model.named_parameters())[name].grad, grad) for name, grad in before.items())


def test_b_that_has_just_left_zero_gives_no_nan() -> None:
    """B's rank is one then, and B^T B singular to float32's rounding."""
    model = make_model(r=8)
    optimizer = oplora.AdamW(model, lr=1e-4, precondition=1e-12)
    for x, y in batches(10, torch.float32):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [1e9, float("inf")])
def test_matrix_that_cannot_be_inverted_is_refused_and_nothing_changed(bad: float) -> None:
    """delta is lost beside 1e18, and A A^T is singular: without a check the step would take whatever comes out."""
    model = make_model(r=4)
    optimizer = oplora.AdamW(model, lr=1e-2, precondition=1e-12)
    with torch.no_grad():
        model.base_model.model.first.lora_A["default"].weight.fill_(bad)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(oplora.OPLoRAError, match=r"layer .*first.* holds NaN"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("blocked", ["a", "b"])
def test_blocks_of_bd_lora_multiply_to_its_delta(blocked: str) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(nblocks=2, **{f"target_modules_bd_{blocked}": ["first"]})
    config = LoraConfig(r=4, target_modules=["first"], init_lora_weights=False, use_bdlora=blocks)
    model = get_peft_model(Net((12, 24, 8)).double(), config, autocast_adapter_dtype=False)
    (layer,) = find_layers(model)
    A, B = layer.blocks(*(p.detach() for p in layer.parameters()))
    x = torch.randn(3, 12, dtype=torch.float64)
    low, high = (layer.module._modules[name]["default"] for name in ("lora_A", "lora_B"))
    if blocked == "a":
        product = torch.cat([x_part @ a.T for x_part, a in zip(x.chunk(2, 1), A, strict=True)], 1)
        ours = sum(part @ b.T for part, b in zip(product.chunk(2, 1), B, strict=True))
    else:
        ours = torch.cat([x @ a.T @ b.T for a, b in zip(A, B, strict=True)], 1)
    torch.testing.assert_close(ours, high(low(x)))


def test_kasa_is_refused_as_it_has_no_plain_pair() -> None:
    from peft.tuners.lora.config import KasaConfig

    config = LoraConfig(r=4, target_modules=["first"], kasa_config=KasaConfig())
    with pytest.raises(oplora.OPLoRAError, match="precondition needs the A and the B"):
        oplora.AdamW(get_peft_model(Net((12, 24, 8)), config), precondition=1e-6)


def test_nan_is_refused_and_nothing_changed() -> None:
    model = make_model()
    optimizer = oplora.AdamW(model, lr=1e-2, precondition=1e-6)
    x, y = next(batches(1, torch.float32))
    (model(x) - y).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["params"][1].grad[0, 0] = float("nan")
    with pytest.raises(oplora.OPLoRAError, match=r"layer .*first.* holds NaN"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_adapter_without_a_pair_is_refused_by_name() -> None:
    with pytest.raises(oplora.OPLoRAError, match=r"precondition needs the A and the B .* has vera_lambda_b"):
        oplora.AdamW(make("VeRA"), precondition=1e-6)


@pytest.mark.parametrize("delta", [0.0, -1e-6, float("inf"), float("nan"), True, "1e-6"])
def test_delta_out_of_range_is_named(delta: object) -> None:
    with pytest.raises(oplora.OPLoRAError, match="precondition is"):
        oplora.AdamW(make_model(), precondition=delta)
