"""Adapters on quantised bases, on the CPU: bitsandbytes' 4-bit and 8-bit layers and torchao's int8 weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, factors, options_of
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import oplora
from oplora.__main__ import main

TARGETS = ["q_proj", "v_proj", "down_proj"]
BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, double, bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
QUANTISED_LAYERS = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "torchao": "TorchaoLoraLinear"}  # PEFT's

every_state = pytest.mark.parametrize("state", ["lean", "exact", "auto"])
every_kind = pytest.mark.parametrize("kind", [*BITSANDBYTES, "torchao"])
of_float32 = pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
of_weights_alone = pytest.mark.parametrize("kind", ["nf4", "torchao"])  # int8 quantises what a layer is given, too


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in full precision, as files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def quantised_base(kind: str, checkpoint: Path) -> nn.Module:
    config: Any
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(**BITSANDBYTES[kind])
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, dtype=dtype, device_map="cpu")
    # in evaluation bitsandbytes may repack 4-bit weights, and round their scales, for the CPU's own instructions
    return base.train()


def full_precision(checkpoint: Path) -> nn.Module:
    return LlamaForCausalLM.from_pretrained(checkpoint).train()


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))


def adapted_base(kind: str, checkpoint: Path) -> nn.Module:
    model = adapted(quantised_base(kind, checkpoint))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == QUANTISED_LAYERS[kind.partition(",")[0]]
    return model


def tokens() -> Tensor:
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_state
@every_kind
def test_training_on_a_quantised_base_lowers_the_loss(kind: str, state: str, checkpoint: Path) -> None:
    model = adapted_base(kind, checkpoint)
    losses = train(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 10)
    assert losses[-1] < 0.95 * losses[0]


@of_float32
def test_factors_on_a_quantised_base_train_as_generators_under_torch_adamw_do(kind: str, checkpoint: Path) -> None:
    model, twin = adapted_base(kind, checkpoint), adapted_base(kind, checkpoint)
    ours = oplora.AdamW(model, lr=1e-2, state="exact")
    theirs = oplora.create_oplora_optimizer(twin, torch.optim.AdamW, lr=1e-2, weight_decay=1e-2)
    assert train(model, ours, 5) == pytest.approx(train(twin, theirs, 5), rel=1e-5)


def dequantised(weight: Tensor) -> Tensor:
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


@every_state
@of_weights_alone
def test_training_on_a_quantised_base_is_training_on_its_dequantised_weights(
    kind: str, state: str, checkpoint: Path
) -> None:
    quantised, plain = quantised_base(kind, checkpoint), full_precision(checkpoint)
    for name, parameter in plain.named_parameters():
        weight = quantised.get_parameter(name)
        parameter.data.copy_(weight if type(weight) is nn.Parameter else dequantised(weight))
    results = []
    for base in (quantised, plain):
        model = adapted(base)
        results.append(train(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 5))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def base_bytes(model: nn.Module) -> dict[str, Tensor]:
    """Weights as they are kept, and what dequantises them."""
    held = {}
    for name, value in model.state_dict().items():
        if "lora_" in name or not isinstance(value, Tensor):
            continue
        parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []  # of torchao's tensors
        held |= {f"{name}.{part}": getattr(value, part).clone() for part in parts} or {name: value.clone()}
    return held


@every_state
@every_kind
def test_quantised_base_keeps_its_bytes(kind: str, state: str, checkpoint: Path) -> None:
    model = adapted_base(kind, checkpoint)
    before = base_bytes(model)
    train(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 3)
    assert_same_bits(base_bytes(model), before)


@every_state
@every_kind
def test_adapter_reloads_into_a_fresh_quantised_base_with_equal_outputs(
    kind: str, state: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = adapted_base(kind, checkpoint)
    train(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 3)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(quantised_base(kind, checkpoint), tmp_path)
    assert torch.equal(logits(fresh.train()), logits(model))


@every_kind
def test_adapter_of_a_quantised_base_merges_into_the_unquantised_checkpoint(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = adapted_base(kind, checkpoint)
    train(model, oplora.AdamW(model), 20)
    oplora.save_adapter(model, tmp_path / "adapter")
    arguments = ["merge", str(checkpoint), str(tmp_path / "adapter"), str(tmp_path / "merged"), "--quiet"]
    assert main(arguments) == 0
    expected = logits(PeftModel.from_pretrained(full_precision(checkpoint), tmp_path / "adapter").train())
    difference = (logits(full_precision(tmp_path / "merged")) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@every_state
@every_kind
def test_resume_on_a_quantised_base_is_bit_for_bit(kind: str, state: str, checkpoint: Path) -> None:
    model, fresh = adapted_base(kind, checkpoint), adapted_base(kind, checkpoint)
    optimizer = oplora.AdamW(model, lr=1e-2, **options_of(state))
    train(model, optimizer, 2)
    resumed = oplora.AdamW(fresh, lr=1.0, **options_of(state))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(fresh, resumed, 2) == train(model, optimizer, 2)
    assert_same_bits(factors(fresh), factors(model))


@every_state
@every_kind
def test_gradient_checkpointing_on_a_quantised_base_gives_the_same_bits(
    kind: str, state: str, checkpoint: Path
) -> None:
    results = []
    for checkpointing in (False, True):
        base = prepare_model_for_kbit_training(
            quantised_base(kind, checkpoint),
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        model = adapted(base)
        losses = train(model, oplora.AdamW(model, lr=1e-2, **options_of(state)), 3)
        results.append((losses, factors(model)))
    assert results[0][0] == results[1][0]
    assert_same_bits(results[0][1], results[1][1])


# ---- LoftQ: the adapter starts as what quantising has lost ----


@torch.no_grad()
def loftq_started(checkpoint: Path) -> nn.Module:
    """As peft.replace_lora_weights_loftq starts it, whose own arithmetic asks for a GPU."""
    model, original = adapted_base("nf4", checkpoint), full_precision(checkpoint)
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        lost = original.get_submodule(name).weight.detach() - dequantised(layer.base_layer.weight)
        U, s, Vh = torch.linalg.svd(lost)
        rank, scaling = layer.r["default"], layer.scaling["default"]
        root = s[:rank].sqrt()
        layer.lora_A["default"].weight.copy_(root[:, None] * Vh[:rank])
        layer.lora_B["default"].weight.copy_(U[:, :rank] * root / scaling)
    return model


def test_loftq_start_is_nearer_to_full_precision_than_the_quantised_base(checkpoint: Path) -> None:
    truth = logits(full_precision(checkpoint))
    errors = [(logits(model) - truth).norm() for model in (loftq_started(checkpoint), adapted_base("nf4", checkpoint))]
    assert errors[0] < errors[1]


@every_state
def test_loftq_start_is_left_bit_for_bit(state: str, checkpoint: Path) -> None:
    model = loftq_started(checkpoint)
    before, output = factors(model), logits(model)
    oplora.AdamW(model, init="keep", **options_of(state))
    assert_same_bits(factors(model), before)
    assert torch.equal(logits(model), output)


@every_state
def test_training_from_a_loftq_start_lowers_the_loss(state: str, checkpoint: Path) -> None:
    model = loftq_started(checkpoint)
    losses = train(model, oplora.AdamW(model, lr=1e-2, init="keep", **options_of(state)), 10)
    assert losses[-1] < 0.95 * losses[0]


@every_state
def test_adapter_trained_from_a_loftq_start_reloads_with_equal_outputs(
    state: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = loftq_started(checkpoint)
    train(model, oplora.AdamW(model, lr=1e-2, init="keep", **options_of(state)), 3)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(quantised_base("nf4", checkpoint), tmp_path)
    assert torch.equal(logits(fresh.train()), logits(model))
