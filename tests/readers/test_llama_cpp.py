"""llama.cpp reads what this package writes: the adapters with its own converter, the merged model too.

Skipped unless there are

    pip install xllamacpp gguf sentencepiece          # llama.cpp as a module
    OPLORA_LLAMA_CPP=FOLDER                           # with convert_hf_to_gguf.py: vendor/llama.cpp of the sdist of
                                                      # llama-cpp-python (pip download --no-deps --no-binary
                                                      # llama-cpp-python llama-cpp-python)

Run with -s it prints the differences. xllamacpp prints much by itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import oplora
from oplora.files.merge_checkpoint import merge_checkpoint

xllamacpp = pytest.importorskip("xllamacpp")
sentencepiece = pytest.importorskip("sentencepiece")
LLAMA_CPP = Path(os.environ.get("OPLORA_LLAMA_CPP", "/nowhere"))
pytestmark = [
    pytest.mark.skipif(
        not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(), reason="OPLORA_LLAMA_CPP names no llama.cpp"
    ),
    pytest.mark.filterwarnings("ignore"),
]

PROMPT = [1, 17, 99, 5, 203, 44, 150, 8]
TOP = 200
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 40}},
    "rank_pattern": {"rank_pattern": {"down_proj": 8, "q_proj": 2}},
}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=False, **size, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform guesses, so that a difference shows
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def adapted(model: nn.Module, **config: Any) -> PeftModel:
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return peft.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a tokenizer, and as GGUF."""
    root = tmp_path_factory.mktemp("llama")
    base().save_pretrained(root / "base")
    text = root / "text.txt"
    text.write_text("\n".join(f"the {i} quick brown foxes jump over {i * 7} lazy dogs and {i}" for i in range(300)))
    settings = {"vocab_size": 320, "byte_fallback": True, "character_coverage": 1.0, "hard_vocab_limit": True}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(root / "base" / "tokenizer"), model_type="bpe", minloglevel=2, **settings
    )
    convert("convert_hf_to_gguf.py", str(root / "base"), "--outfile", str(root / "base.gguf"))
    return root


def convert(script: str, *arguments: str) -> None:
    command = [sys.executable, str(LLAMA_CPP / script), *arguments, "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def convert_adapter(adapter: Path, folder: Path) -> Path:
    out = adapter.with_suffix(".gguf")
    convert("convert_lora_to_gguf.py", "--base", str(folder / "base"), "--outfile", str(out), str(adapter))
    return out


def log_probabilities(model: Path, adapter: Path | None = None) -> dict[int, float]:
    """Of llama.cpp, of the likeliest tokens after the prompt."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_gpu_layers, params.cpuparams.n_threads = 128, 0, 1
    params.warmup = False
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    for seed in range(20):  # a token that is half a character is answered by nothing
        request = {"prompt": PROMPT, "n_predict": 1, "temperature": 1.0, "n_probs": TOP, "seed": seed}
        answer = server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if (told := answer["choices"][0]["logprobs"]) is not None:
            return {entry["id"]: entry["logprob"] for entry in told["content"][0]["top_logprobs"]}
    raise AssertionError(f"no token in {seed + 1} was told: {answer}")


def greatest_difference(model: nn.Module, found: dict[int, float]) -> float:
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert len(found) == TOP
    return max(abs(float(expected[token]) - value) for token, value in found.items())


def tell(what: str, difference: float) -> float:
    print(f"\nllama.cpp, {what}: greatest difference of the top {TOP} log-probabilities {difference:.5f}")
    return difference


def test_base_is_the_same_model(folder: Path) -> None:
    assert tell("base", greatest_difference(base(), log_probabilities(folder / "base.gguf"))) < 0.02


@pytest.mark.parametrize("case", CONFIGS)
def test_adapter_of_format_plain_is_the_model_that_was_saved(folder: Path, tmp_path: Path, case: str) -> None:
    model = adapted(base(), **CONFIGS[case])
    oplora.save_adapter(model, tmp_path / "adapter", format="plain")
    found = log_probabilities(folder / "base.gguf", convert_adapter(tmp_path / "adapter", folder))
    assert greatest_difference(base(), found) > 0.2  # the adapter does something
    assert tell(f"{case}, folded", greatest_difference(model, found)) < 0.02


@pytest.mark.parametrize("case", ["rsLoRA", "alpha_pattern"])
def test_adapter_of_format_peft_is_another_model_there(folder: Path, tmp_path: Path, case: str) -> None:
    """Why there is format="plain": where this fails, llama.cpp has learnt to read what PEFT writes."""
    model = adapted(base(), **CONFIGS[case])
    oplora.save_adapter(model, tmp_path / "adapter")
    found = log_probabilities(folder / "base.gguf", convert_adapter(tmp_path / "adapter", folder))
    assert tell(f"{case}, as PEFT writes it", greatest_difference(model, found)) > 0.1


@pytest.mark.parametrize("case", CONFIGS)
def test_merged_model_is_the_adapted_one(folder: Path, tmp_path: Path, case: str) -> None:
    model = adapted(base(), **CONFIGS[case])
    oplora.save_adapter(model, tmp_path / "adapter")
    merge_checkpoint(folder / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
    convert("convert_hf_to_gguf.py", str(tmp_path / "merged"), "--outfile", str(tmp_path / "merged.gguf"))
    difference = greatest_difference(model, log_probabilities(tmp_path / "merged.gguf"))
    assert tell(f"{case}, merged", difference) < 0.02
