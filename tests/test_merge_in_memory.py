"""oplora.merge: the base model again, in every kind of layer that PEFT adapts, and as it was where it cannot be."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from test_merge_checkpoint import llama, randomise
from test_merge_layouts import EXPERTS, TIED, moe
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import oplora

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: nn.Module) -> Tensor:
    return model.eval()(torch.arange(9)[None]).logits.detach()


def assert_is_plain(model: nn.Module) -> None:
    assert not [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    assert not [name for name in model.state_dict() if "lora_" in name or "base_layer" in name or "original" in name]


def adapted(model: nn.Module, injected: bool, **config: Any) -> nn.Module:
    settings = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], **config})
    if injected:
        model.add_adapter(settings)
    else:
        model = get_peft_model(model, settings)
    randomise(model)
    return model


CASES = {
    "linear layers": (llama, {}),
    "DoRA": (llama, {"use_dora": True}),
    "saved modules": (llama, {"modules_to_save": ["lm_head", "norm"]}),
    **{f"experts, {name}": (moe, {"target_modules": ["q_proj"], **config}) for name, config in EXPERTS.items()},
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merged_model_is_plain_and_gives_the_same(case: str, injected: bool) -> None:
    make, config = CASES[case]
    if injected and "modules_to_save" in config:
        pytest.skip("PEFT injects no saved modules")
    model = adapted(make(), injected, **config)
    expected = logits(model)
    merged = oplora.merge(model)
    assert_is_plain(merged)
    assert type(merged) is type(make())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("injected", [False, True])
def test_merged_model_is_saved_and_loaded_as_any_other(tmp_path: Path, injected: bool) -> None:
    model = adapted(llama(), injected)
    expected = logits(model)
    oplora.merge(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_merged_model_takes_an_adapter_again() -> None:
    model = oplora.merge(adapted(llama(), injected=True))
    again = adapted(model, injected=True)
    expected = logits(again)
    torch.testing.assert_close(logits(oplora.merge(again)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", TIED)
def test_tied_modules_give_the_same_where_one_is_adapted(tmp_path: Path, case: str) -> None:
    model = adapted(llama(tie_word_embeddings=True), injected=False, **TIED[case])
    expected = logits(model)
    merged = oplora.merge(model)
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    merged.save_pretrained(tmp_path)
    again = logits(LlamaForCausalLM.from_pretrained(tmp_path))
    assert (again - expected).abs().max() <= 1e-5 * expected.abs().max()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("injected", [False, True])
def test_multihead_attention_is_merged(injected: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["attention", "out"], init_lora_weights=False)
    model = inject_adapter_in_model(config, Attention()) if injected else get_peft_model(Attention(), config)
    x = torch.randn(2, 5, 8)
    expected = model.eval()(x).detach()
    merged = oplora.merge(model)
    assert type(merged.attention) is nn.MultiheadAttention
    assert merged.state_dict().keys() == Attention().state_dict().keys()
    torch.testing.assert_close(merged.eval()(x).detach(), expected, rtol=1e-5, atol=1e-6)


def test_adapters_of_two_parts_of_a_model_are_both_merged() -> None:
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    for part in parts:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), part)
    expected = parts(torch.ones(1, 4))
    merged = oplora.merge(parts)
    assert_is_plain(merged)
    torch.testing.assert_close(merged(torch.ones(1, 4)), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("layer", ["q_proj", "down_proj"])
def test_refused_merge_leaves_the_model_as_it_was(layer: str, value: float) -> None:
    model = adapted(llama(), injected=False)
    last = [p for name, p in model.named_parameters() if layer in name and "lora_B" in name][-1]
    with torch.no_grad():
        last.fill_(value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(oplora.OPLoRAError, match="NaN"):
        oplora.merge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if not before[name].isnan().any())


def test_only_named_adapters_are_merged() -> None:
    model = adapted(llama(), injected=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    torch.testing.assert_close(logits(oplora.merge(model, ["default"])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["othre"], "no adapter is named 'othre'; the model has 'default', 'other'"),
        (["default", "othre"], "no adapter is named 'othre'"),
        ("default", "adapter_names is 'default', expected a list of some of 'default', 'other'"),
        ([], r"adapter_names is \[\], expected a list"),
    ],
)
def test_names_of_no_adapter_are_refused(names: Any, message: str) -> None:
    model = adapted(llama(), injected=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model)
    with pytest.raises(oplora.OPLoRAError, match=message):
        oplora.merge(model, names)
    assert torch.equal(logits(model), expected)


def test_adapter_that_is_tied_as_its_modules_are_gives_the_same() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    randomise(model)
    expected = logits(model)
    torch.testing.assert_close(logits(oplora.merge(model)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "active"), [("default", "other"), ("other", "default"), ("bare", "default")])
def test_saved_modules_are_those_of_the_named_adapter(name: str, active: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.add_adapter("other", config)
    model.add_adapter("bare", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for number, head in enumerate(model.base_model.model.lm_head.modules_to_save.values()):
        head.weight.data += number + 1
    model.set_adapter(name)
    expected = logits(model)
    model.set_adapter(active)
    torch.testing.assert_close(logits(oplora.merge(model, [name])), expected, rtol=1e-5, atol=1e-5)


def test_saved_modules_of_two_adapters_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama(), config)
    model.add_adapter("other", config)
    with pytest.raises(oplora.OPLoRAError, match="lm_head is in modules_to_save of default, other"):
        oplora.merge(model, ["default", "other"])
    assert model.base_model.model.lm_head.active_adapters == ["default"]


def test_merge_of_no_active_adapter_is_refused() -> None:
    model = adapted(llama(), injected=True)
    model.set_adapter([])
    with pytest.raises(oplora.OPLoRAError, match=r"no adapter is active.*some of 'default'"):
        oplora.merge(model)


def test_merging_takes_about_the_time_that_peft_takes() -> None:
    def make() -> nn.Module:
        layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(24)))
        names = [str(number) for number in range(24)]
        return get_peft_model(layers, LoraConfig(r=8, target_modules=names, init_lora_weights=False))

    ratios = []
    for _ in range(5):
        ours, theirs = make(), make()
        begin = time.perf_counter()
        theirs.merge_and_unload()
        middle = time.perf_counter()
        oplora.merge(ours)
        ratios.append((time.perf_counter() - middle) / (middle - begin))
    assert min(ratios) < 2
