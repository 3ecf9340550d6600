"""oplora.AdamW in LLaMA-Factory, by the start script of docs/trainers.md. Skipped where llamafactory is missing: its
pins are its own, so `pip install llamafactory` is for an environment of its own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import oplora

pytest.importorskip("llamafactory")
VOCABULARY, STEPS = 64, 20


def base() -> LlamaForCausalLM:
    """Of two layers, with random weights, always from the same seed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes))


def write_model(folder: Path) -> str:
    base().save_pretrained(folder)
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0").save_pretrained(folder)
    return str(folder)


def write_data(folder: Path) -> str:
    """Counting on."""
    folder.mkdir()
    numbers = [[str((start + i) % 60 + 2) for i in range(12)] for start in range(24)]
    rows = [{"instruction": " ".join(some[:4]), "input": "", "output": " ".join(some[4:])} for some in numbers]
    (folder / "counting.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"counting": {"file_name": "counting.json"}}))
    return str(folder)


def test_start_script_trains_an_adapter_that_peft_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.train.sft import trainer
    from llamafactory.train.tuner import run_exp

    made: list[Any] = []

    def create(model: Any, args: Any, finetuning_args: Any) -> Any:
        made.append((model, oplora.AdamW(model)))
        return made[-1][1]

    monkeypatch.setattr(trainer, "create_custom_optimizer", create)
    run_exp(
        {
            "model_name_or_path": write_model(tmp_path / "model"),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "q_proj,v_proj,down_proj",
            "lora_rank": 4,
            "dataset": "counting",
            "dataset_dir": write_data(tmp_path / "data"),
            "template": "empty",
            "cutoff_len": 32,
            "output_dir": str(tmp_path / "adapter"),
            "per_device_train_batch_size": 8,
            "max_steps": STEPS,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
        }
    )
    model, optimizer = made[0]
    assert {entry["step"].item() for entry in optimizer.state.values() if "step" in entry} == {STEPS}
    history = json.loads((tmp_path / "adapter/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.04
    read = PeftModel.from_pretrained(base(), tmp_path / "adapter").state_dict()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(read[re.sub(r"^.*?base_model", "base_model", n)], p) for n, p in trained.items())
