"""transformers' Trainer and TRL's SFTTrainer under FSDP2, by accelerate's plugin, in two processes on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.state import DistributedType
from peft import LoraConfig, PeftModel
from ranks import Ranks, leave_it_to_accelerate
from test_fsdp2 import Bits, whole
from test_trainer import examples, make_model, sequences, settings
from transformers import Trainer, TrainingArguments

import oplora

STEPS = 20
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    group = Ranks(leave_it_to_accelerate, ("peft", "accelerate", "transformers"))
    yield group
    group.stop(wait=False)


def arguments(kind: Any, folder: Path, **changes: Any) -> Any:
    """With FSDP2, which accelerate takes on GPUs only: it is told that these processes have some."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    fsdp = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
    fsdp |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}
    configured = {"accelerator_config": {"use_configured_state": True}, "fsdp": True, "fsdp_config": fsdp}
    common = settings(max_steps=STEPS, per_device_train_batch_size=4, **configured)
    return kind(str(folder), **{**common, **changes})


def finish(trainer: Trainer, folder: Path) -> tuple[list[float], Bits]:
    trainer.train()
    held = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert held and all(hasattr(p, "device_mesh") for p in held.values())
    trainer.save_model(str(folder / "adapter"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: whole(p) for name, p in held.items()}


def run_trainer(folder: Path) -> tuple[list[float], Bits]:
    settings_ = arguments(TrainingArguments, folder)
    handed = oplora.for_trainer(settings_)
    model = make_model(dropout=0.0)
    return finish(Trainer(model, settings_, train_dataset=examples(), optimizer_cls_and_kwargs=handed), folder)


def run_sft(folder: Path) -> tuple[list[float], Bits]:
    import trl
    from datasets import Dataset
    from test_transformers_and_trl import tokenizer

    settings_ = arguments(trl.SFTConfig, folder, bf16=False)
    trainer = trl.SFTTrainer(
        make_model().unload(),
        settings_,
        train_dataset=Dataset.from_dict({"input_ids": sequences().tolist()}),
        processing_class=tokenizer(),
        peft_config=LORA,
        optimizer_cls_and_kwargs=oplora.for_trainer(settings_),
    )
    return finish(trainer, folder)


@pytest.mark.parametrize("run", [run_trainer, run_sft])
def test_trainers_train_under_fsdp2_and_save_what_peft_reads(ranks: Ranks, run: Any, tmp_path: Path) -> None:
    if run is run_sft:
        pytest.importorskip("trl")
    for losses, bits in ranks.run(run, tmp_path):
        assert len(losses) == STEPS and losses[-1] < losses[0] - 0.04
        read = PeftModel.from_pretrained(make_model().unload(), tmp_path / "adapter").state_dict()
        for name, tensor in bits.items():
            assert torch.equal(read[name.replace("_orig_mod.", "")], tensor), name
