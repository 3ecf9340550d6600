"""oplora.AdamW in transformers' Trainer and TRL's SFTTrainer, with nothing changed in either."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_bits, factors, options_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import oplora

VOCABULARY, SEQUENCE, BATCH, STEPS = 64, 12, 8, 8  # three batches are an epoch
SAVED, KILLED = 4, 6  # steps: the checkpoint lies within the second epoch
MAX_NORM = 0.05  # exceeded by all steps but the first
IN_ORDER = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}

every_state = pytest.mark.parametrize("state", ["lean", "exact", "auto"])


def make_model(dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A Llama of two layers with random weights and LoRA, always from the same seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(LlamaForCausalLM(config).to(dtype), lora)


def sequences() -> Tensor:
    """Counting on from random numbers."""
    starts = torch.randint(VOCABULARY, (3 * BATCH, 1), generator=torch.Generator().manual_seed(3))
    return (starts + torch.arange(SEQUENCE)) % VOCABULARY


def examples() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in sequences()]


def settings(**changes: Any) -> dict[str, Any]:
    common = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return common | changes


def as_optimizer(model: PeftModel, **options: Any) -> dict[str, Any]:
    return {"optimizers": (oplora.AdamW(model, lr=1e-2, **options), None)}


def as_class(model: PeftModel, **options: Any) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (oplora.AdamW, {"model": model, "lr": 1e-2, **options})}


def make_trainer(folder: Path, model: PeftModel, handed: dict[str, Any], **changes: Any) -> Trainer:
    """handed: the optimizer, as as_optimizer or as_class hands it over; changes: of the arguments."""
    arguments = TrainingArguments(str(folder), **settings(**changes))
    return Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples()[:BATCH], **handed)


def run(trainer: Trainer) -> list[float]:
    """The loss of every step."""
    trainer.train()
    return logged(trainer.state.log_history, "loss")


def logged(history: list[dict[str, float]], name: str) -> list[float]:
    return [entry[name] for entry in history if name in entry]


def loop(
    model: PeftModel, optimizer: torch.optim.Optimizer, clip: Callable[[], Tensor]
) -> tuple[list[float], list[float]]:
    """A loop written by hand over the examples in their order: its losses, and the norms that `clip` returned."""
    losses, norms = [], []
    for step in range(STEPS):
        ids = sequences().split(BATCH)[step % 3]
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss
        loss.backward()
        norms.append(clip().item())
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, norms


# ---- handing it over ----


@every_state
def test_class_and_arguments_train_as_the_optimizer_itself(tmp_path: Path, state: str) -> None:
    model, twin = make_model(), make_model()
    losses = run(make_trainer(tmp_path, model, as_optimizer(model, **options_of(state))))
    assert run(make_trainer(tmp_path, twin, as_class(twin, **options_of(state)))) == losses
    assert_same_bits(factors(model), factors(twin))
    assert losses[-1] < losses[0] - 0.04


# ---- checkpoints ----


class Kill(TrainerCallback):
    """Ends the process as the kernel does when memory runs out."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def run_with_checkpoints(
    folder: Path, state: str, hand_over: Callable[..., dict[str, Any]], kill: bool, resume: bool
) -> None:
    model = make_model()
    handed = hand_over(model, **options_of(state), weight_decay=0.1)
    trainer = make_trainer(folder, model, handed, save_strategy="steps", save_steps=SAVED)
    if kill:
        trainer.add_callback(Kill())
    trainer.train(resume_from_checkpoint=resume)


def exit_code_in_new_process(*arguments: Any) -> int | None:
    """Of run_with_checkpoints, forked from a process that has imported the libraries and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["oplora.optim", "transformers.models.llama.modeling_llama", "transformers.trainer"])
    process = context.Process(target=run_with_checkpoints, args=arguments, daemon=True)
    process.start()
    process.join(120)
    return process.exitcode


def last_checkpoint(folder: Path) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """The losses of all steps, the adapter, and the generators' tensors."""
    checkpoint = folder / f"checkpoint-{STEPS}"
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    tensors = {
        f"{number}.{key}": value
        for number, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }
    return logged(history, "loss"), load_file(checkpoint / "adapter_model.safetensors"), tensors


@pytest.mark.parametrize("hand_over", [as_optimizer, as_class])
@every_state
def test_killed_and_resumed_run_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, state: str, hand_over: Callable[..., dict[str, Any]]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_with_checkpoints(whole, state, hand_over, False, False)
    assert exit_code_in_new_process(broken, state, hand_over, True, False) == -signal.SIGKILL
    assert [path.name for path in broken.iterdir()] == [f"checkpoint-{SAVED}"]
    assert exit_code_in_new_process(broken, state, hand_over, False, True) == 0
    losses, adapter, generators = last_checkpoint(broken)
    whole_losses, whole_adapter, whole_generators = last_checkpoint(whole)
    assert len(losses) == STEPS
    assert losses == whole_losses
    assert_same_bits(adapter, whole_adapter)
    assert_same_bits(generators, whole_generators)


def test_run_of_another_optimizer_continues_without_its_optimizer_file(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_model(), {}, save_strategy="steps", save_steps=SAVED).train()
    checkpoint, handed = tmp_path / f"checkpoint-{SAVED}", {"optimizer_cls_and_kwargs": oplora.for_trainer()}
    with pytest.raises(oplora.OPLoRAError, match=r"another optimizer saved it.*continues from the values"):
        make_trainer(tmp_path, make_model(), handed).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "optimizer.pt").unlink()
    held: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, model: PeftModel, **others: Any) -> None:
            held.append({name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()})

    trainer = make_trainer(tmp_path, make_model(), handed)
    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(held[0], load_file(checkpoint / "adapter_model.safetensors"))
    assert len(held) == STEPS - SAVED


@every_state
def test_best_model_loaded_at_the_end_is_gone_on_from(tmp_path: Path, state: str) -> None:
    model = make_model()
    handed = as_optimizer(model, **options_of(state))
    trainer = make_trainer(
        tmp_path,
        model,
        handed,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (2, STEPS))
    assert_same_bits(get_peft_model_state_dict(model), best)

    optimizer = handed["optimizers"][0]
    optimizer.param_groups[0]["lr"] = 1e-4
    ids = sequences()
    model(input_ids=ids, labels=ids).loss.backward()
    adopted = pytest.warns(UserWarning, match=r"the factors of 6 layer\(s\) were changed since the last step")
    with adopted if state == "exact" else nullcontext():
        optimizer.step()
    for name, tensor in get_peft_model_state_dict(model).items():
        assert 0 < (tensor - best[name]).abs().max() < 0.1 * (last[name] - best[name]).abs().max()


# ---- the Trainer's options ----


@every_state
def test_accumulated_small_batches_step_as_one_large_batch(tmp_path: Path, state: str) -> None:
    losses, adapters = [], []
    for parts in (1, 4):
        model = make_model(dropout=0.0, dtype=torch.float64)
        handed = as_optimizer(model, **options_of(state))
        batch = {"per_device_train_batch_size": BATCH // parts, "gradient_accumulation_steps": parts}
        losses.append(run(make_trainer(tmp_path, model, handed, **batch)))
        adapters.append(factors(model))
        entries = handed["optimizers"][0].state_dict()["state"].values()
        assert {int(entry["step"]) for entry in entries if "step" in entry} == {STEPS}
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # float32, whatever the model is
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-10, atol=1e-12)


@every_state
def test_max_grad_norm_of_the_trainer_clips_the_norm_of_the_factors_gradients(tmp_path: Path, state: str) -> None:
    model, twin = make_model(dropout=0.0), make_model(dropout=0.0)
    optimizer = oplora.AdamW(twin, lr=1e-2, **options_of(state))
    losses, norms = loop(twin, optimizer, lambda: nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM))
    assert min(norms[1:]) > MAX_NORM
    trainer = make_trainer(
        tmp_path, model, as_optimizer(model, **options_of(state)), max_grad_norm=MAX_NORM, **IN_ORDER
    )
    assert run(trainer) == losses
    assert logged(trainer.state.log_history, "grad_norm") == norms
    assert_same_bits(factors(model), factors(twin))


@every_state
def test_max_grad_norm_of_the_optimizer_clips_the_norm_of_the_generators_gradients(tmp_path: Path, state: str) -> None:
    model, twin = make_model(dropout=0.0), make_model(dropout=0.0)
    optimizer = oplora.AdamW(twin, lr=1e-2, **options_of(state))
    losses, norms = loop(twin, optimizer, lambda: optimizer.clip_grad_norm_(MAX_NORM))
    assert min(norms[1:]) > MAX_NORM
    handed = as_optimizer(model, **options_of(state), max_grad_norm=MAX_NORM)
    assert run(make_trainer(tmp_path, model, handed, max_grad_norm=0.0, **IN_ORDER)) == losses
    assert_same_bits(factors(model), factors(twin))


@every_state
def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, state: str) -> None:
    losses, adapters, forwards = [], [], []
    for checkpointing in (False, True):
        model, calls = make_model(), []
        model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        handed = as_optimizer(model, **options_of(state))
        losses.append(run(make_trainer(tmp_path, model, handed, gradient_checkpointing=checkpointing)))
        adapters.append(factors(model))
        forwards.append(len(calls))
    assert forwards == [STEPS, 2 * STEPS]
    assert losses[0] == losses[1]
    assert_same_bits(adapters[0], adapters[1])


@every_state
def test_bfloat16_autocast_trains_factors_in_float32(tmp_path: Path, state: str) -> None:
    model, dtypes = make_model(), set()
    model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").register_forward_hook(
        lambda _, inputs, output: dtypes.add(output.dtype)
    )
    losses = run(make_trainer(tmp_path, model, as_optimizer(model, **options_of(state)), bf16=True))
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in factors(model).values()} == {torch.float32}
    assert losses[-1] < losses[0] - 0.04


# ---- TRL ----


@every_state
def test_sft_trainer_trains_as_the_trainer_does(tmp_path: Path, state: str) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, twin = make_model(dropout=0.0), make_model(dropout=0.0)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    tokenizer = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}))
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **settings(bf16=False)),
        train_dataset=datasets.Dataset.from_dict({"input_ids": sequences().tolist()}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0"),
        **as_optimizer(model, **options_of(state)),
    )
    losses = run(trainer)
    expected = run(make_trainer(tmp_path, twin, as_optimizer(twin, **options_of(state))))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.04
    assert_same_bits({name: p.detach() for name, p in model.named_parameters() if name in base}, base)
