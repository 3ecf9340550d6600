"""``python -m oplora merge`` into models whose tensors are called or tied otherwise in memory than on disk."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_merge_checkpoint import gpt2, llama, randomise
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from oplora.errors import OPLoRAError
from oplora.files import model_layout
from oplora.files.merge_checkpoint import merge_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import merge_architectures

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(9)[None]


def adapt(model: nn.Module, folder: Path, **config: Any) -> PeftModel:
    """The adapted model, saved with its base under `folder`."""
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 3, **config}))
    randomise(adapted)
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def merge(folder: Path) -> Path:
    merge_checkpoint(folder / "base", folder / "adapter", folder / "out", progress=False)
    return folder / "out"


def assert_same_logits(adapted: nn.Module, merged: nn.Module) -> None:
    ours, theirs = merged.eval()(TOKENS).logits, adapted(TOKENS).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ---- every architecture: a sample of benchmarks/merge_architectures.py ----

SAMPLE = {
    "renamed": "vit",
    "renamed, and another hierarchy": "llava",
    "a part with names of its own": "qwen2_vl",
    "in another number of tensors": "phi3",
    "experts in one tensor in memory": "mixtral",
    "tied, and biases tied": "bert",
    "Conv1D": "gpt2",
    "an encoder and a decoder": "whisper",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_merge_equals_peft_on_a_model(tmp_path: Path, name: str) -> None:
    classes = dict(merge_architectures.architectures())[SAMPLE[name]]
    rows = merge_architectures.merge_one(SAMPLE[name], classes, tmp_path)
    assert {row["adapter"]: row["result"] for row in rows} == {"layers": "right", "embedding": "right"}


def test_table_of_all_architectures_has_no_wrong_one_and_few_refused() -> None:
    rows = json.loads(merge_architectures.RESULTS.read_text())["rows"]
    layers = [row["result"] for row in rows if row["adapter"] == "layers"]
    assert not [row for row in rows if row["result"] in ("wrong", "crash")]
    assert len(layers) > 500
    assert layers.count("right") >= 0.95 * (layers.count("right") + layers.count("refused"))


# ---- ties ----

TIED = {
    "the embedding replaced": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the head replaced": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both replaced": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "the embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "both adapted": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
}
TIED_AS_ONE = {
    "both replaced as one": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both adapted as one": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("case", TIED)
def test_merged_model_is_untied_where_the_adapter_parts_what_was_one(tmp_path: Path, case: str) -> None:
    adapted = adapt(llama(tie_word_embeddings=True), tmp_path, **TIED[case])
    merged = LlamaForCausalLM.from_pretrained(merge(tmp_path))
    assert_same_logits(adapted, merged)
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize("case", TIED_AS_ONE)
def test_merged_model_stays_tied_where_the_adapter_changed_both_as_one(tmp_path: Path, case: str) -> None:
    adapted = adapt(llama(tie_word_embeddings=True), tmp_path, **TIED_AS_ONE[case], ensure_weight_tying=True)
    merged = LlamaForCausalLM.from_pretrained(merge(tmp_path))
    assert_same_logits(adapted, merged)
    assert merged.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_untying_a_sharded_model_adds_the_head_to_its_index(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    adapted = adapt(model, tmp_path, **TIED["the embedding replaced"])
    (tmp_path / "base/model.safetensors").unlink()
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert_same_logits(adapted, LlamaForCausalLM.from_pretrained(merge(tmp_path)))
    before, after = (
        json.loads((tmp_path / part / "model.safetensors.index.json").read_text()) for part in ("base", "out")
    )
    assert after["weight_map"].keys() - before["weight_map"].keys() == {"lm_head.weight"}
    assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == 97 * 24 * 4


def test_biases_that_are_one_stay_so_when_they_are_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    model = BertForMaskedLM(BertConfig(vocab_size=97, **size))
    adapted = adapt(model, tmp_path, target_modules=["query"], bias="all")
    merged = BertForMaskedLM.from_pretrained(merge(tmp_path))
    assert_same_logits(adapted, merged)
    assert merged.config.tie_word_embeddings


def test_ties_that_no_configuration_ends_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, **size))
    adapt(model, tmp_path, target_modules=["q"], modules_to_save=["shared"])
    with pytest.raises(
        OPLoRAError, match=r"shared\.weight.*changes 'shared\.weight'.*one with other tensors.*with PEFT"
    ):
        merge(tmp_path)


def test_without_transformers_an_embedding_that_may_be_tied_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(llama(tie_word_embeddings=True), tmp_path, **TIED["the embedding replaced"])
    monkeypatch.setattr(model_layout, "is_installed", lambda: False)
    with pytest.raises(OPLoRAError, match=r"embed_tokens\.weight.*transformers can tell.*Install it, or untie"):
        merge(tmp_path)


def test_without_transformers_a_name_that_is_not_on_disk_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_architectures.merge_one("vit", dict(merge_architectures.architectures())["vit"], tmp_path)
    monkeypatch.setattr(model_layout, "is_installed", lambda: False)
    with pytest.raises(OPLoRAError, match="On disk it may have another name, which transformers tells: install it"):
        merge_checkpoint(tmp_path / "base", tmp_path / "layers", tmp_path / "out", progress=False)


def test_layers_whose_names_are_on_disk_need_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(llama(tie_word_embeddings=True), tmp_path, target_modules=["q_proj", "down_proj"])
    monkeypatch.setattr(model_layout, "candidates", lambda *_: pytest.fail("it was asked"))
    merge(tmp_path)


def test_square_conv1d_beside_a_linear_layer_is_transposed_as_the_model_has_it(tmp_path: Path) -> None:
    adapted = adapt(gpt2(), tmp_path, target_modules=["attn.c_proj", "lm_head"])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    assert_same_logits(adapted, GPT2LMHeadModel.from_pretrained(merge(tmp_path)))


# ---- what the base has not ----


@pytest.mark.parametrize("labels", [1, 2, 5])
def test_new_head_comes_into_the_merged_model_with_its_labels(tmp_path: Path, labels: int) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels, pad_token_id=0)
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(merge(tmp_path), pad_token_id=0)
    assert_same_logits(adapted.eval(), merged)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]


def test_new_head_of_another_width_is_refused_by_name(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: t[:, 1:].contiguous() if "score" in k else t for k, t in tensors.items()}, path)
    with pytest.raises(OPLoRAError, match=r"score\.weight.*has it in the shape \(2, 24\).*Save BASE with the head"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_new_head_over_layers_that_nobody_has_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    BertForMaskedLM(BertConfig(vocab_size=97, **size)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")  # its pooler is random
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(OPLoRAError, match=r"lack 'bert\.pooler\.dense\.bias', which a BertForSequenceClassification"):
        merge(tmp_path)


def test_router_of_a_mixture_is_replaced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=97, intermediate_size=40, num_local_experts=3, **size))
    adapted = adapt(model, tmp_path, target_modules=["q_proj"], modules_to_save=["gate"])
    assert_same_logits(adapted, MixtralForCausalLM.from_pretrained(merge(tmp_path)))
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert names == load_file(tmp_path / "base/model.safetensors").keys()


# ---- parameters that are no layer's weight ----


def moe(dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    size = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    }
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}  # square: shapes tell nothing
    config = Qwen3MoeConfig(vocab_size=97, intermediate_size=40, decoder_sparse_step=1, **size, **experts)
    return Qwen3MoeForCausalLM(config).to(dtype)


EXPERTS = {
    "one of two": {"target_parameters": ["experts.down_proj"]},
    "both, one inside the other": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "with ranks and scales of their own": {
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 3},
        "alpha_pattern": {r".*\.down_proj": 7},
    },
    "what all-linear makes of a mixture": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_merged_each_on_disk(tmp_path: Path, case: str) -> None:
    adapted = adapt(moe(), tmp_path, **{"target_modules": ["q_proj"], **EXPERTS[case]})
    merged = Qwen3MoeForCausalLM.from_pretrained(merge(tmp_path))
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_experts_without_transformers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(moe(), tmp_path, target_modules=[], **EXPERTS["one of two"])
    monkeypatch.setattr(model_layout, "is_installed", lambda: False)
    with pytest.raises(OPLoRAError, match=r"experts\.lora_A\.weight.*only transformers can tell.*Install it"):
        merge(tmp_path)


# ---- keys and dtypes of other writers ----


def rewritten(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    path = folder / "adapter/adapter_model.safetensors"
    save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path)


WRITERS: dict[str, Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]] = {
    "the adapter's name": lambda name, tensor: (name.replace(".weight", ".default.weight"), tensor),
    "torch.compile": lambda name, tensor: (name.replace("layers.", "_orig_mod.layers."), tensor),
    "torch.compile of a layer": lambda name, tensor: (name.replace("q_proj.", "q_proj._orig_mod."), tensor),
    "float64": lambda name, tensor: (name, tensor.double()),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_of_other_writers_are_read(tmp_path: Path, writer: str) -> None:
    adapted = adapt(llama(), tmp_path, target_modules=["q_proj"])
    rewritten(tmp_path, WRITERS[writer])
    assert_same_logits(adapted, LlamaForCausalLM.from_pretrained(merge(tmp_path)))


def test_float64_factors_are_whole_in_a_float64_base(tmp_path: Path) -> None:
    adapt(llama(torch.float64), tmp_path, target_modules=["q_proj"])
    generator = torch.Generator().manual_seed(0)
    rewritten(tmp_path, lambda name, tensor: (name, torch.randn(tensor.shape, generator=generator).double() / 3))
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    out = load_file(merge(tmp_path) / "model.safetensors")
    with safe_open(tmp_path / "base/model.safetensors", "pt") as base:
        for name in (name for name in factors if "lora_A" in name):
            target = name.removeprefix("base_model.model.").replace("lora_A.", "")
            exact = base.get_tensor(target) + 1.5 * factors[name.replace("lora_A", "lora_B")] @ factors[name]
            assert (out[target] - exact).abs().max() <= 1e-14
