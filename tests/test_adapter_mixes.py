"""Invariants over layers, ranks, dtypes and mixes of adapters that hypothesis draws."""

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_types import EagerOptimizer
from conftest import train_on
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import oplora

TYPES: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {}),
    "rslora": (peft.LoraConfig, {"use_rslora": True}),
    "dora": (peft.LoraConfig, {"use_dora": True}),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    "loha": (peft.LoHaConfig, {}),
    "lokr": (peft.LoKrConfig, {}),
}
ON_CONV1D = ("lora", "rslora", "dora", "ia3")
STATES = st.sampled_from(["exact", "lean"])
few = settings(max_examples=15, deadline=None)


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    """Of several adapters injected into one model, which is what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Layer:
    type: str
    is_conv1d: bool
    width: int  # of its output
    r: int

    def config(self, name: str) -> Any:
        config, arguments = TYPES[self.type]
        if self.type != "ia3":
            arguments = {**arguments, "r": self.r}
        if self.is_conv1d:
            arguments = {**arguments, "fan_in_fan_out": True}
        return config(target_modules=[name], **arguments)


layers = st.builds(Layer, st.sampled_from(sorted(TYPES)), st.booleans(), st.integers(2, 9), st.integers(1, 5))
layers = layers.filter(lambda layer: not layer.is_conv1d or layer.type in ON_CONV1D)


@dataclass(frozen=True)
class Chain:
    """Layers one after the other, each with an adapter of a type of its own, all trained at once."""

    inputs: int
    layers: tuple[Layer, ...]

    def make(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        model, width = nn.Sequential(), self.inputs
        for i, layer in enumerate(self.layers):
            made = Conv1D(layer.width, width) if layer.is_conv1d else nn.Linear(width, layer.width)
            model.add_module(f"l{i}", made)
            model.add_module(f"tanh{i}", nn.Tanh())
            width = layer.width
        model.to(dtype)
        for i, layer in enumerate(self.layers):
            peft.inject_adapter_in_model(layer.config(f"l{i}"), model, adapter_name=f"{layer.type}_{i}")
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):  # an injection makes its own adapter the only active one
                module.set_adapter(list(module._get_available_adapters()))
        return model.to(dtype)

    def data(self, steps: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        return random_pairs((self.inputs, self.layers[-1].width), steps, dtype)


chains = st.builds(Chain, st.integers(2, 9), st.lists(layers, min_size=1, max_size=3).map(tuple))


def random_pairs(widths: tuple[int, int], steps: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = [
        [torch.randn(5, w, generator=generator, dtype=torch.float64).to(dtype) for w in widths] for _ in range(steps)
    ]
    return [(x, y) for x, y in made]


@few
@given(chain=chains, width=st.integers(1, 40), init=st.sampled_from(["paper", "keep"]))
def test_exact_equals_the_oracle(chain: Chain, width: int, init: str) -> None:
    ours, theirs = chain.make(torch.float64), chain.make(torch.float64)
    # a gradient that is zero but for rounding stays small beside eps, and does not become a step of its sign
    settings = dict(lr=1e-2, eps=1e-3, init=init, hidden_width=width)
    train_on(ours, oplora.AdamW(ours, state="exact", **settings), chain.data(6, torch.float64))
    train_on(theirs, EagerOptimizer(theirs, **settings), chain.data(6, torch.float64))
    for (name, mine), truth in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine - truth).abs().max() <= 1e-12 * max(1, truth.abs().max()), name


@few
@given(chain=chains, state=STATES, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_steps_touch_only_what_they_generate(chain: Chain, state: str, dtype: torch.dtype) -> None:
    model = chain.make(dtype)
    optimizer = oplora.AdamW(model, lr=1e-2, state=state)
    generated = {id(p) for layer in optimizer._stepper.layers for p in layer.parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_on(model, optimizer, chain.data(3, dtype))
    names = {name for name, p in model.named_parameters() if id(p) in generated}
    assert all(name in names or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


@few
@given(chain=chains, state=STATES)
def test_merged_layers_compute_what_the_adapted_ones_do(chain: Chain, state: str) -> None:
    model = chain.make(torch.float64)
    train_on(model, oplora.AdamW(model, lr=1e-2, state=state), chain.data(4, torch.float64))
    x, _ = chain.data(1, torch.float64)[0]
    adapted = model(x)
    torch.testing.assert_close(oplora.merge(model)(x), adapted, rtol=1e-9, atol=1e-9)


# ---- one PeftModel with LoRA of mixed ranks, and a second adapter that rests ----


@dataclass(frozen=True)
class Adapter:
    ranks: tuple[int, int]
    alpha: int
    use_dora: bool
    use_rslora: bool
    bias: str

    def config(self) -> peft.LoraConfig:
        pattern = {"rank_pattern": {"1": self.ranks[1]}, "alpha_pattern": {"1": self.alpha + 1}}
        flags = {"use_dora": self.use_dora, "use_rslora": self.use_rslora, "bias": self.bias}
        return peft.LoraConfig(r=self.ranks[0], lora_alpha=self.alpha, target_modules=["0", "1"], **pattern, **flags)


adapters = st.builds(
    Adapter,
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "all", "lora_only"]),
)


def two_adapters(trained: Adapter, resting: Adapter, dtype: torch.dtype) -> peft.PeftModel:
    """PEFT trains biases with one adapter only, so the one that rests has none."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 4)).to(dtype)
    model = peft.get_peft_model(base, trained.config(), "trained", autocast_adapter_dtype=False)
    model.add_adapter(
        "resting", Adapter(resting.ranks, resting.alpha, resting.use_dora, resting.use_rslora, "none").config()
    )
    model.set_adapter("trained")
    return model


@few
@given(
    trained=adapters,
    resting=adapters,
    state=STATES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_adapter_file_is_what_peft_alone_would_write(
    trained: Adapter, resting: Adapter, state: str, dtype: torch.dtype
) -> None:
    model = two_adapters(trained, resting, dtype)
    optimizer = oplora.AdamW(model, lr=1e-2, state=state, adapter_name="trained")
    still = {name: p.detach().clone() for name, p in model.named_parameters() if "resting" in name}
    train_on(model, optimizer, random_pairs((7, 4), 3, dtype))
    assert all(torch.equal(p, still[name]) for name, p in model.named_parameters() if name in still)
    alone = two_adapters(trained, resting, dtype)
    alone.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        ours, pefts = Path(folder, "ours"), Path(folder, "peft")
        oplora.save_adapter(model, ours)
        alone.save_pretrained(str(pefts))
        files = sorted(file.relative_to(pefts) for file in pefts.rglob("*") if file.is_file())
        assert sorted(file.relative_to(ours) for file in ours.rglob("*") if file.is_file()) == files
        for file in files:
            if file.suffix != ".safetensors":  # README and configuration, letter by letter
                assert (ours / file).read_text() == (pefts / file).read_text()
                continue
            mine, theirs = load_file(ours / file), load_file(pefts / file)
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
