"""What PEFT promises of its adapters, on models that oplora.AdamW has stepped: saving, merging, switching, swapping."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Net, assert_same_bits, factors
from peft import (
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import oplora


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 9, 3, padding=1)
        self.second = nn.Conv2d(9, 7, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean((2, 3))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 2}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **quiet))


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


@dataclass(frozen=True)
class Base:
    make: Callable[[], nn.Module]
    targets: list[str]
    batch: Callable[[torch.Generator], Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def tokens(count: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(count, (6, 5), generator=generator)


BASES = {
    "mlp": Base(lambda: Net((13, 21, 7)), ["first", "second"], lambda g: torch.randn(6, 13, generator=g)),
    "conv": Base(Pictures, ["first", "second"], lambda g: torch.randn(6, 2, 4, 4, generator=g)),
    "embedding": Base(Words, ["table", "head"], tokens(11)),
    "gpt2": Base(gpt2, ["c_attn", "c_proj"], tokens(50), {"fan_in_fan_out": True}),
    "llama": Base(llama, ["q_proj", "down_proj"], tokens(64)),
}


def fresh(base: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[base].make()


def config_of(base: str, **config: Any) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": BASES[base].targets, **BASES[base].config, **config}
    return LoraConfig(**settings)


def adapted(base: str, adapter: str = "default", **config: Any) -> PeftModel:
    return get_peft_model(fresh(base), config_of(base, **config), adapter_name=adapter)


def outputs(model: nn.Module, base: str, **options: Any) -> Tensor:
    result = model(BASES[base].batch(torch.Generator().manual_seed(7)), **options)
    return getattr(result, "logits", result)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, base: str, steps: int = 2, goal: int = 0) -> None:
    """Regression on random numbers; goals are different numbers."""
    for _ in range(steps):
        optimizer.zero_grad()
        y = outputs(model, base)
        aim = torch.randn(y.shape, generator=torch.Generator().manual_seed(goal))
        (y - aim).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def adamw(model: nn.Module, state: str, **options: Any) -> oplora.AdamW:
    return oplora.AdamW(model, **{"lr": 1e-2, "state": state, **options})


def trained(base: str, state: str, **config: Any) -> tuple[PeftModel, oplora.AdamW]:
    model = adapted(base, **config)
    optimizer = adamw(model, state)
    train(model, optimizer, base)
    return model, optimizer


def two_adapters(base: str, state: str) -> tuple[PeftModel, dict[str, oplora.AdamW]]:
    """Adapters "one" and "two" with an optimizer each, trained in turn; "two" is the active one."""
    model = adapted(base, "one")
    model.add_adapter("two", config_of(base))
    optimizers = {}
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        optimizers[name] = adamw(model, state, adapter_name=name, seed=seed)
    for name in ("one", "two", "one", "two"):
        model.set_adapter(name)
        train(model, optimizers[name], base, 1, goal=["one", "two"].index(name))
    return model, optimizers


def of_adapter(model: nn.Module, name: str) -> dict[str, Tensor]:
    found = {key: tensor for key, tensor in factors(model).items() if name in key.split(".")}
    assert found
    return found


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(base: str, folder: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(fresh(base), folder, **options)


def never_stepped(model: PeftModel, base: str, **config: Any) -> PeftModel:
    """The same tensors in a model that only PEFT has had in hand."""
    twin = adapted(base, **config)
    twin.load_state_dict(model.state_dict())
    return twin


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def edits_allowed() -> Iterator[None]:
    """State exact warns of other values in the factors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "oplora: the factors of")
        yield


def changed(now: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


def assert_near(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """What one small step apart is: moved, but not far."""
    for name, tensor in now.items():
        assert 0 < (tensor - before[name]).abs().max() < 1e-3, name


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["lean", "exact"])
def state(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return request.param


# Of LoraConfig, beside what every test has; with the base that it is tried on.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank_pattern": ("mlp", {"rank_pattern": {"second": 5}}),
    "alpha_pattern": ("mlp", {"alpha_pattern": {"first": 50}}),
    "use_rslora": ("mlp", {"use_rslora": True}),
    "use_dora": ("mlp", {"use_dora": True}),
    "lora_bias": ("mlp", {"lora_bias": True}),
    "bias_all": ("mlp", {"bias": "all"}),
    "bias_lora_only": ("conv", {"bias": "lora_only", "target_modules": ["first"]}),
    "modules_to_save": ("mlp", {"target_modules": ["first"], "modules_to_save": ["second"]}),
    "modules_to_save_of_a_transformer": ("llama", {"modules_to_save": ["lm_head"]}),
    "layers_to_transform": ("llama", {"layers_to_transform": [1]}),
    "trainable_token_indices": ("llama", {"trainable_token_indices": [3, 5]}),
    "target_parameters": ("mlp", {"target_modules": [], "target_parameters": ["first.weight", "second.weight"]}),
}


@pytest.fixture(params=CONFIGS)
def configured(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return CONFIGS[request.param]


# ---- training ----


def test_training_moves_every_factor_and_nothing_else(base: str, state: str) -> None:
    model = adapted(base)
    optimizer = adamw(model, state)
    before = parameters(model)
    train(model, optimizer, base)
    assert changed(parameters(model), before) == factors(model).keys()


def test_training_moves_what_a_config_makes_trainable_and_nothing_else(
    configured: tuple[str, dict[str, Any]], state: str
) -> None:
    base, config = configured
    model = adapted(base, **config)
    optimizer = adamw(model, state)
    before = parameters(model)
    train(model, optimizer, base)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed(parameters(model), before) == trainable


def test_state_dict_keys_and_model_status_are_those_of_a_model_never_stepped(base: str, state: str) -> None:
    model, _ = trained(base, state)
    twin = adapted(base)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert get_model_status(model) == get_model_status(twin)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_gradient_checkpointing_trains_the_same_bits(base: str, state: str, use_reentrant: bool) -> None:
    plain, _ = trained(base, state)
    checkpointed = fresh(base)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model = get_peft_model(checkpointed, config_of(base))
    forwards = []
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    layer.register_forward_hook(lambda *_: forwards.append(1))
    train(model, adamw(model, state), base)
    assert len(forwards) == 2 * 2  # each step's backward runs it once more
    assert_same_bits(factors(model), factors(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_has_float32_factors_that_round_trip(
    dtype: torch.dtype, state: str, tmp_path: Path
) -> None:
    model = get_peft_model(fresh("llama").to(dtype), config_of("llama"))
    train(model, adamw(model, state), "llama")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh("llama").to(dtype), tmp_path)
    assert {tensor.dtype for tensor in factors(again).values()} == {torch.float32}
    assert_same_bits(factors(again), factors(model))


def test_injected_adapter_trains_the_same_bits(base: str, state: str) -> None:
    wrapped, _ = trained(base, state)
    model = inject_adapter_in_model(config_of(base), fresh(base))
    train(model, adamw(model, state), base)
    assert_same_bits(
        get_peft_model_state_dict(model),
        {key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(wrapped).items()},
    )


# ---- saving and loading ----


def test_saved_files_are_byte_for_byte_what_peft_alone_writes(base: str, state: str, tmp_path: Path) -> None:
    model, _ = trained(base, state)
    model.save_pretrained(tmp_path / "ours")
    never_stepped(model, base).save_pretrained(tmp_path / "theirs")
    ours = files(tmp_path / "ours")
    assert ours.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert ours == files(tmp_path / "theirs")


def test_saved_files_of_a_config_are_byte_for_byte_what_peft_alone_writes(
    configured: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    base, config = configured
    model, _ = trained(base, "lean", **config)
    model.save_pretrained(tmp_path / "ours")
    never_stepped(model, base, **config).save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_torch_saved_file_holds_what_peft_alone_writes(base: str, tmp_path: Path) -> None:
    model, _ = trained(base, "lean")
    saved = []
    for number, one in enumerate((model, never_stepped(model, base))):
        one.save_pretrained(tmp_path / str(number), safe_serialization=False)
        saved.append(torch.load(tmp_path / str(number) / "adapter_model.bin", weights_only=True))
    assert list(saved[0]) == list(saved[1])
    assert_same_bits(*saved)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_loaded_adapter_gives_the_same_outputs(base: str, state: str, safe_serialization: bool, tmp_path: Path) -> None:
    model, _ = trained(base, state)
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    expected = outputs(model, base)
    assert not torch.allclose(expected, outputs(fresh(base), base))
    assert torch.equal(outputs(loaded(base, tmp_path), base), expected)


def test_loaded_adapter_of_a_config_gives_the_same_outputs(
    configured: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    base, config = configured
    model, _ = trained(base, "lean", **config)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(loaded(base, tmp_path), base), outputs(model, base))


def test_named_adapters_are_saved_into_subfolders_of_their_names(base: str, state: str, tmp_path: Path) -> None:
    model, _ = two_adapters(base, state)
    model.save_pretrained(tmp_path)
    again = loaded(base, tmp_path / "one", adapter_name="one")
    again.load_adapter(tmp_path / "two", "two")
    assert_same_bits(factors(again), factors(model))


def test_selected_adapter_alone_is_saved(base: str, state: str, tmp_path: Path) -> None:
    """Also where its name is a part of the other adapters' names."""
    model, _ = trained(base, state)
    twin = never_stepped(model, base)
    model.add_adapter("default2", config_of(base))
    model.add_adapter("a_default", config_of(base))
    model.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    twin.save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_loaded_adapter_is_trained_on_from_where_it_was(base: str, state: str, tmp_path: Path) -> None:
    model, _ = trained(base, state)
    model.save_pretrained(tmp_path)
    again = loaded(base, tmp_path, is_trainable=True)
    optimizer = adamw(again, state, init="keep", lr=1e-5)
    assert_same_bits(factors(again), factors(model))
    train(again, optimizer, base, 1)
    assert_near(factors(again), factors(model))


def test_adapter_loaded_for_inference_is_refused_until_it_is_made_trainable(state: str, tmp_path: Path) -> None:
    trained("mlp", state)[0].save_pretrained(tmp_path)
    model = loaded("mlp", tmp_path)
    with pytest.raises(oplora.OPLoRAError, match="is_trainable=True"):
        adamw(model, state)
    model.set_adapter("default")
    adamw(model, state, init="keep")


def test_adapter_loaded_under_a_second_name_trains_alone(base: str, state: str, tmp_path: Path) -> None:
    model, _ = trained(base, state)
    model.save_pretrained(tmp_path)
    expected = outputs(model, base)
    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.set_adapter("second")
    assert torch.equal(outputs(model, base), expected)
    before = of_adapter(model, "default")
    with pytest.warns(UserWarning, match="hold a start of their own"):
        second = adamw(model, state, adapter_name="second")
    train(model, second, base)
    assert_same_bits(of_adapter(model, "default"), before)
    assert not torch.equal(outputs(model, base), expected)


def test_weights_loaded_without_copying_are_trained_on_as_copied_ones_are(
    base: str, state: str, tmp_path: Path
) -> None:
    """low_cpu_mem_usage puts other Parameters into the layers."""
    trained(base, state, lora_alpha=9)[0].save_pretrained(tmp_path)
    results = []
    for low_cpu_mem_usage in (True, False):
        model, optimizer = trained(base, state)
        old = dict(model.named_parameters())
        model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        replaced = [name for name, p in model.named_parameters() if p is not old[name]]
        assert bool(replaced) == low_cpu_mem_usage
        with edits_allowed():
            train(model, optimizer, base)
        results.append(factors(model))
    assert_same_bits(*results)


def test_state_dict_set_between_two_steps_is_trained_on_from(base: str, state: str) -> None:
    model, optimizer = trained(base, state)
    snapshot, before = copy.deepcopy(get_peft_model_state_dict(model)), factors(model)
    train(model, optimizer, base, goal=1)
    optimizer.param_groups[0]["lr"] = 1e-5
    set_peft_model_state_dict(model, snapshot)
    with edits_allowed():
        train(model, optimizer, base, 1)
    assert_near(factors(model), before)


def test_pickled_model_gives_the_same_outputs(base: str, state: str) -> None:
    model, _ = trained(base, state)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), base), outputs(model, base))


def test_deep_copy_of_a_model_is_not_stepped(base: str, state: str) -> None:
    model, optimizer = trained(base, state)
    twin = copy.deepcopy(model)
    before = factors(twin)
    train(model, optimizer, base)
    assert_same_bits(factors(twin), before)


def test_pissa_trained_on_is_saved_as_an_adapter_of_the_untouched_base(state: str, tmp_path: Path) -> None:
    model = adapted("mlp", init_lora_weights="pissa")
    optimizer = adamw(model, state, init="keep")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    train(model, optimizer, "mlp")
    expected = outputs(model, "mlp")
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert_close(outputs(loaded("mlp", tmp_path / "lora"), "mlp"), expected)


# ---- merging ----


def test_merged_adapter_gives_the_same_outputs_and_unmerging_the_base_weights(base: str, state: str) -> None:
    model, _ = trained(base, state)
    expected, weights = outputs(model, base), base_weights(model)
    model.merge_adapter()
    assert len(changed(base_weights(model), weights)) == len(tuner_layers(model))
    assert_close(outputs(model, base), expected)
    model.unmerge_adapter()
    for name, tensor in base_weights(model).items():
        assert_close(tensor, weights[name])


def test_merged_model_is_not_trained_and_still_unmerges(base: str, state: str) -> None:
    model, optimizer = trained(base, state)
    weights, before = base_weights(model), factors(model)
    outputs(model, base).square().mean().backward()
    model.merge_adapter()
    with pytest.raises(oplora.OPLoRAError, match="is merged into its base weight"):
        optimizer.step()
    assert_same_bits(factors(model), before)
    model.unmerge_adapter()
    for name, tensor in base_weights(model).items():
        assert_close(tensor, weights[name])
    train(model, optimizer, base, 1)
    assert changed(factors(model), before) == before.keys()


def test_safe_merge_and_unload_gives_plain_layers_with_the_same_outputs(base: str, state: str) -> None:
    model, _ = trained(base, state)
    expected = outputs(model, base)
    plain = model.merge_and_unload(safe_merge=True)
    assert plain.state_dict().keys() == fresh(base).state_dict().keys()
    assert_close(outputs(plain, base), expected)


def test_merge_and_unload_of_a_config_gives_the_same_outputs(
    configured: tuple[str, dict[str, Any]],
) -> None:
    base, config = configured
    model, _ = trained(base, "lean", **config)
    expected = outputs(model, base)
    assert_close(outputs(model.merge_and_unload(), base), expected)


def test_unload_gives_the_base_back_bit_for_bit(base: str, state: str) -> None:
    model, _ = trained(base, state)
    assert_same_bits(dict(model.unload().state_dict()), dict(fresh(base).state_dict()))


def test_two_merged_adapters_add_up(base: str, state: str) -> None:
    model, _ = two_adapters(base, state)
    model.base_model.set_adapter(["one", "two"])
    expected = outputs(model, base)
    model.base_model.set_adapter("one")
    assert_close(outputs(model.merge_and_unload(adapter_names=["two", "one"]), base), expected)


# ---- disabling ----


def test_disabled_adapter_gives_the_base_outputs_exactly_and_comes_back(base: str, state: str) -> None:
    model, optimizer = trained(base, state)
    expected = outputs(model, base)
    with model.disable_adapter():
        assert torch.equal(outputs(model, base), outputs(fresh(base), base))
    assert torch.equal(outputs(model, base), expected)
    train(model, optimizer, base, 1)
    assert not torch.equal(outputs(model, base), expected)


# ---- several adapters ----


def test_each_adapter_trains_as_if_it_were_alone(base: str, state: str) -> None:
    model, _ = two_adapters(base, state)
    for seed, name in enumerate(("one", "two")):
        alone = adapted(base, name)
        train(alone, adamw(alone, state, seed=seed), base, goal=seed)
        assert_same_bits(of_adapter(model, name), of_adapter(alone, name))


def test_inactive_adapter_is_bit_for_bit_unchanged(base: str, state: str) -> None:
    model, optimizers = two_adapters(base, state)
    for active in ("one", "two"):
        model.set_adapter(active)
        before = parameters(model)
        train(model, optimizers[active], base)
        assert changed(parameters(model), before) == of_adapter(model, active).keys()


def test_adapters_that_are_active_together_train_together(base: str, state: str) -> None:
    model = adapted(base, "one")
    model.add_adapter("two", config_of(base))
    model.base_model.set_adapter(["one", "two"])
    optimizer = adamw(model, state)
    before = factors(model)
    train(model, optimizer, base)
    assert changed(factors(model), before) == before.keys()


def test_batch_of_mixed_adapters_has_each_ones_outputs(base: str, state: str) -> None:
    model, _ = two_adapters(base, state)
    model.eval()
    mixed = outputs(model, base, adapter_names=["__base__", "one", "two"] * 2)
    with model.disable_adapter():
        expected = [outputs(model, base)]
    for name in ("one", "two"):
        model.set_adapter(name)
        expected.append(outputs(model, base))
        assert not torch.allclose(expected[-1], expected[-2], atol=1e-3)
    for i, alone in enumerate(expected):
        assert_close(mixed[i::3], alone[i::3])


def test_optimizer_of_an_inactive_adapter_says_which_one_is_trained(state: str) -> None:
    model, optimizers = two_adapters("mlp", state)
    outputs(model, "mlp").square().mean().backward()
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match="adapter 'two' has"):
        optimizers["one"].step()
    assert_same_bits(factors(model), before)


def test_deleted_adapter_is_named_by_its_optimizer_and_the_other_trains_on(base: str, state: str) -> None:
    model, optimizers = two_adapters(base, state)
    model.delete_adapter("two")
    with pytest.raises(oplora.OPLoRAError, match=r"no longer holds adapter 'two'. Make a new optimizer"):
        optimizers["two"].step()
    before = factors(model)
    train(model, optimizers["one"], base, 1)
    assert changed(factors(model), before) == before.keys()


def test_adapter_added_again_under_a_deleted_name_trains_with_a_new_optimizer(state: str) -> None:
    model, _ = two_adapters("mlp", state)
    model.delete_adapter("two")
    model.add_adapter("two", config_of("mlp"))
    model.set_adapter("two")
    train(model, adamw(model, state, adapter_name="two", seed=1), "mlp", goal=1)
    alone = adapted("mlp", "two")
    train(alone, adamw(alone, state, seed=1), "mlp", goal=1)
    assert_same_bits(of_adapter(model, "two"), of_adapter(alone, "two"))


WEIGHTED = {"linear": [0.7, 0.0], "cat": [0.7, -0.4], "svd": [0.7, -0.4]}  # two weights of linear are no sum of deltas


@pytest.mark.parametrize("combination", WEIGHTED)
def test_weighted_adapter_is_the_weighted_sum(base: str, state: str, combination: str) -> None:
    model, _ = two_adapters(base, state)
    weights = WEIGHTED[combination]
    model.add_weighted_adapter(["one", "two"], weights, "sum", combination, svd_rank=6)
    for layer in tuner_layers(model):
        one, two, both = (layer.get_delta_weight(name) for name in ("one", "two", "sum"))
        assert_close(both, weights[0] * one + weights[1] * two)


@pytest.mark.parametrize("base", ["mlp", "embedding"])
@pytest.mark.parametrize("combination", WEIGHTED)
def test_weighted_adapter_and_its_sources_train_apart(base: str, state: str, combination: str) -> None:
    model, optimizers = two_adapters(base, state)
    model.add_weighted_adapter(["one", "two"], WEIGHTED[combination], "sum", combination)
    model.set_adapter("sum")
    optimizers["sum"] = adamw(model, state, adapter_name="sum", init="keep")
    for name in ("two", "sum", "one"):
        model.set_adapter(name)
        before = factors(model)
        train(model, optimizers[name], base, 1)
        assert changed(factors(model), before) == of_adapter(model, name).keys()


# ---- swapping ----


def save_another(base: str, folder: Path, **config: Any) -> PeftModel:
    """An adapter that was trained elsewhere."""
    model = adapted(base, **config)
    train(model, oplora.AdamW(model, lr=1e-2, seed=5), base, goal=5)
    model.save_pretrained(folder)
    return model


def swapped(base: str, state: str, folder: Path, r: int) -> tuple[PeftModel, oplora.AdamW]:
    """A model in training into which the adapter of another one was swapped, and its optimizer at a small rate."""
    other = save_another(base, folder, r=r, lora_alpha=2 * r)
    model, optimizer = trained(base, state)
    hotswap_adapter(model, folder, "default")
    assert_close(outputs(model, base), outputs(other, base))
    optimizer.param_groups[0]["lr"] = 1e-5
    return model, optimizer


swappable = pytest.mark.parametrize("base", [name for name in BASES if name != "embedding"])  # as PEFT has it


@pytest.mark.parametrize("r", [3, 2])
@swappable
def test_swapped_adapter_is_trained_on(base: str, r: int, state: str, tmp_path: Path) -> None:
    """PEFT swaps through .data, which counts no version."""
    model, optimizer = swapped(base, state, tmp_path, r)
    before = factors(model)
    with edits_allowed():
        train(model, optimizer, base, 1)
    assert_near(factors(model), before)


@swappable
def test_swapped_adapter_is_trained_on_by_a_new_optimizer(base: str, state: str, tmp_path: Path) -> None:
    model, _ = swapped(base, state, tmp_path, 2)
    before = factors(model)
    train(model, adamw(model, state, init="keep", lr=1e-5), base, 1)
    assert_near(factors(model), before)


def test_swapped_adapter_of_a_larger_rank_needs_a_new_optimizer(state: str, tmp_path: Path) -> None:
    model, optimizer = swapped("mlp", state, tmp_path, 5)
    model.set_adapter("default")  # the swap has frozen it
    before = factors(model)
    with pytest.raises(oplora.OPLoRAError, match=r"first\.default .* Make a new optimizer"):
        train(model, optimizer, "mlp", 1)
    assert_same_bits(factors(model), before)
    train(model, adamw(model, state, init="keep", lr=1e-5), "mlp", 1)
    assert_near(factors(model), before)


def test_merged_adapter_is_not_swapped_and_trains_on(state: str, tmp_path: Path) -> None:
    save_another("mlp", tmp_path)
    model, optimizer = trained("mlp", state)
    before = factors(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base weights"):
        hotswap_adapter(model, tmp_path, "default")
    model.unmerge_adapter()
    optimizer.param_groups[0]["lr"] = 1e-5
    train(model, optimizer, "mlp", 1)
    assert_near(factors(model), before)


# ---- transformers' own adapters ----


def injected(state: str) -> tuple[nn.Module, oplora.AdamW]:
    model = fresh("llama")
    model.add_adapter(config_of("llama"))
    optimizer = adamw(model, state)
    train(model, optimizer, "llama")
    return model, optimizer


def test_transformers_adapter_trains_the_same_bits(state: str) -> None:
    ours = injected(state)[0].get_adapter_state_dict()
    theirs = get_peft_model_state_dict(trained("llama", state)[0])
    assert_same_bits(ours, {name.removeprefix("base_model.model."): tensor for name, tensor in theirs.items()})


def test_transformers_saves_the_adapter_alone_and_loads_it(state: str, tmp_path: Path) -> None:
    model, _ = injected(state)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files(tmp_path).keys()
    assert not any(name.startswith("model") for name in files(tmp_path))
    again = fresh("llama")
    again.load_adapter(str(tmp_path))
    assert torch.equal(outputs(again, "llama"), outputs(model, "llama"))


def test_transformers_adapter_loads_as_pefts(state: str, tmp_path: Path) -> None:
    model, _ = injected(state)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(loaded("llama", tmp_path), "llama"), outputs(model, "llama"))


def test_transformers_disabled_adapters_give_the_base_outputs_exactly_and_refuse_the_step(state: str) -> None:
    model, optimizer = injected(state)
    expected = outputs(model, "llama")
    expected.square().mean().backward()
    model.disable_adapters()
    assert torch.equal(outputs(model, "llama"), outputs(fresh("llama"), "llama"))
    with pytest.raises(oplora.OPLoRAError, match="are disabled"):
        optimizer.step()
    model.enable_adapters()
    assert torch.equal(outputs(model, "llama"), expected)
    train(model, optimizer, "llama", 1)
    assert not torch.equal(outputs(model, "llama"), expected)


def test_transformers_second_adapter_trains_alone(state: str, tmp_path: Path) -> None:
    model, first = injected(state)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "second", is_trainable=True)
    model.set_adapter("second")
    second = adamw(model, state, adapter_name="second", init="keep")
    for name, optimizer in (("second", second), ("default", first)):
        model.set_adapter(name)
        before = factors(model)
        train(model, optimizer, "llama", 1)
        assert changed(factors(model), before) == of_adapter(model, name).keys()


def test_transformers_deleted_adapter_is_named_by_its_optimizer(state: str) -> None:
    model, optimizer = injected(state)
    model.add_adapter(config_of("llama"), "second")
    model.delete_adapter("default")
    with pytest.raises(oplora.OPLoRAError, match=r"no longer holds adapter 'default'. Make a new optimizer"):
        optimizer.step()
    model.set_adapter("second")
    train(model, adamw(model, state), "llama", 1)
