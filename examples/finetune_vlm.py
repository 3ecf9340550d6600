"""Fine-tunes a vision-language model on questions about pictures, with OP-LoRA or LoRA.

    python examples/finetune_vlm.py --model ./llava-1.5-7b-hf --data cars.jsonl --load-in-4bit
    python examples/finetune_vlm.py --model ./llava-1.5-7b-hf --data cars.jsonl --targets projector --method lora

Takes the models of transformers that AutoModelForImageTextToText and AutoProcessor load and whose processor has a
chat template. The loop is transformers' Trainer; the two methods differ in one line, the optimizer (make_optimizer):
OP-LoRA finds its learning rate, LoRA takes --lr. The adapter that comes out is an ordinary LoRA: at the end it is
loaded into a fresh model by PEFT alone, and must give the logits of the model that was trained. docs/vlm.md describes
the data, the flags and the output.
"""

import argparse
import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from plumbing import LABELS, Curves, differences, draw, found_lr, settings_of, sync, trainable, versions, write_json
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from vlm_answers import Samples, autocast, exact_match
from vlm_data import Batches, Skipped, load_data
from vlm_flags import flags_of
from vlm_model import DTYPES, RunError, add_adapter, check_model_class, load_base, load_processor

import oplora

OUR_STATE = "finetune_vlm.json"
# what a resumed run may change: it has no influence on the losses but for rounding, or is checked otherwise
FREE_SETTINGS = {
    *("model", "data", "held_out", "image_folder", "output", "resume_from_checkpoint", "report_to", "trust_pictures"),
    "device",
    *("save_steps", "keep_checkpoints", "sample_steps", "samples", "max_new_tokens", "accuracy_count", "workers"),
}


# ---- the method: all that differs ----


def make_optimizer(model: PeftModel, args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.method == "lora":
        return torch.optim.AdamW(trainable(model), lr=args.lr, weight_decay=args.weight_decay)
    return oplora.AdamW(
        model,
        lr=args.lr,
        weight_decay=args.weight_decay,
        hidden_width=args.hidden_width,
        preset=args.preset,
        max_grad_norm=args.max_grad_norm or None,  # it trains the generators, so their gradients' norm counts
        seed=args.seed,
    )


# ---- training ----


class StopAtNan(TrainerCallback):
    def on_log(self, _: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not abs(loss) < float("inf"):
            advice = "--preset paper takes --lr" if "found_lr" in logs else "lower --lr"
            raise RunError(f"the loss is {loss} at step {state.global_step}; {advice}.")


class WholeCheckpoints(Trainer):
    """Trainer whose checkpoints get their name when all is in them: a full disk or a kill leaves the last one."""

    ours: dict[str, Any]  # what finetune_vlm.json holds beside the samples
    samples: Samples
    _beside: Path | None = None

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        if "loss" in logs and (found := found_lr(self.optimizer)) is not None:
            logs["found_lr"] = found
        super().log(logs, *more, **named)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._beside is None else str(self._beside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._beside = output / "unfinished"
        try:
            if self.args.should_save:
                shutil.rmtree(self._beside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish(output, name)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save reports failed writes as RuntimeError
            shutil.rmtree(self._beside, ignore_errors=True)
            last = get_last_checkpoint(self.args.output_dir) if output.is_dir() else None
            kept = (
                f"{last} is whole, and --resume-from-checkpoint continues from it"
                if last
                else "None was written before"
            )
            raise RunError(
                f"writing {output / name} failed ({error}). {kept}. Free some space, or choose another --output."
            ) from error
        finally:
            self._beside = None

    def _finish(self, output: Path, name: str) -> None:
        new = self._beside / name
        (new / OUR_STATE).write_text(json.dumps(self.ours | {"samples": self.samples.taken}, indent=1) + "\n")
        sync(new)
        if (output / name).exists():  # of the run that is resumed
            (output / name).rename(self._beside / "old")
        new.rename(output / name)
        shutil.rmtree(self._beside)
        rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit)


def training_arguments(args: argparse.Namespace, resuming: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.output),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accumulation,
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        lr_scheduler_type=args.lr_schedule,
        warmup_steps=args.warmup,
        max_grad_norm=0.0 if args.method == "oplora" else args.max_grad_norm,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=not resuming,
        prediction_loss_only=True,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 1,
        save_total_limit=args.keep_checkpoints,
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=args.device != "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=args.report_to,
        seed=args.seed,
    )


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    there = get_last_checkpoint(str(args.output)) if args.output.is_dir() else None
    wanted = args.resume_from_checkpoint
    if wanted is None:
        if there is not None:
            raise RunError(
                f"{there} is of an earlier run. Continue it by --resume-from-checkpoint, or choose another --output."
            )
        return None
    found = there if wanted == "last" else wanted
    if found is None or not Path(found).is_dir():
        where = f"{args.output} holds no checkpoint" if wanted == "last" else f"there is no folder {wanted}"
        raise RunError(f"nothing to resume: {where}; --save-steps writes them.")
    return Path(found)


def load_our_state(checkpoint: Path, ours: dict[str, Any], model: PeftModel) -> dict[str, Any]:
    """What the checkpoint's run was; refuses one that does not fit."""
    try:
        saved = json.loads((checkpoint / OUR_STATE).read_text(encoding="utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{checkpoint} is no checkpoint of this script: {error}") from error
    if saved["architecture"] != ours["architecture"]:
        raise RunError(
            f"{checkpoint} is of a {saved['architecture']}, the model is a {ours['architecture']}. Give the model that "
            "was trained."
        )
    if other := differences(saved["settings"], ours["settings"], FREE_SETTINGS):
        raise RunError(f"{checkpoint} is of a run with other settings: {', '.join(other)}.")
    if saved["answers"] != ours["answers"]:
        raise RunError(f"{checkpoint} was trained on {saved['answers']} answers, the data has {ours['answers']}.")
    here = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    if differing := sorted(name for name in here.keys() | shapes.keys() if here.get(name) != shapes.get(name)):
        name = differing[0]
        raise RunError(
            f"{checkpoint} is of another model of this class: {name} is {shapes.get(name, 'not in it')}, here "
            f"{here.get(name, 'not there')} ({len(differing)} tensors differ). Give the model that was trained."
        )
    return saved


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, saves the adapter, and returns the record that becomes losses.json."""
    resumed = checkpoint_to_resume(args)
    check_model_class(args)
    processor = load_processor(args)
    train_on, held_out, skipped = load_data(args)
    model = add_adapter(load_base(args), args)
    model.print_trainable_parameters()
    batches = Batches(processor, model.get_base_model(), args)

    ours = {"settings": settings_of(args), "architecture": type(model.get_base_model()).__name__}
    ours["answers"] = len(train_on)
    saved = load_our_state(resumed, ours, model) if resumed is not None else {}
    trainer = WholeCheckpoints(
        model=model,
        args=training_arguments(args, resumed is not None),
        train_dataset=train_on,
        eval_dataset=held_out,
        data_collator=batches,
        processing_class=processor,
        optimizers=(make_optimizer(model, args), None),
    )
    trainer.samples = Samples(batches, held_out[: args.samples], args)
    trainer.samples.taken = saved.get("samples", [])
    trainer.add_callback(trainer.samples)
    trainer.add_callback(StopAtNan())
    if args.method == "oplora":
        trainer.add_callback(oplora.Monitor(args.output, every=args.logging_steps))
    main_process = trainer.is_world_process_zero()
    accuracy = [saved["accuracy_before"] if saved else exact_match(model, batches, held_out, args)]
    trainer.ours = ours | {"accuracy_before": accuracy[0]}
    trainer.train(resume_from_checkpoint=str(resumed) if resumed is not None else None)
    if not any("eval_loss" in e and e["step"] == trainer.state.global_step for e in trainer.state.log_history):
        trainer.evaluate()

    history, samples = trainer.state.log_history, trainer.samples.taken
    if not main_process:
        return {}
    probe = batches(held_out[: args.batch_size])
    logits = logits_of(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False), probe, args)
    trained = adapter_of(model)
    oplora.save_adapter(model, args.output / "adapter")
    trainer.accelerator.free_memory()
    del trainer, model  # a second model may not fit beside the first
    gc.collect()
    torch.cuda.empty_cache()
    fresh = reload(trained, logits, probe, args)
    accuracy.append(exact_match(fresh, batches, held_out, args))
    return record_of(history, samples, accuracy, skipped, ours)


@torch.no_grad()
def logits_of(model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> Tensor:
    batch = {key: value.to(args.device) for key, value in batch.items()}
    model.requires_grad_(False)  # torch.matmul sums in another order where a weight wants a gradient
    with autocast(args):
        return model.eval()(**batch, use_cache=False).logits.float().cpu()


def reload(trained: dict[str, Tensor], logits: Tensor, batch: dict[str, Tensor], args: argparse.Namespace) -> PeftModel:
    """The adapter in a fresh model, by PEFT alone: its tensors must be the trained ones bit for bit, its logits to
    rounding."""
    folder = args.output / "adapter"
    fresh = PeftModel.from_pretrained(load_base(args), folder).eval()
    loaded = adapter_of(fresh)
    theirs = logits_of(fresh, batch, args)
    difference = (logits - theirs).abs().max().item()
    same = loaded.keys() == trained.keys() and all(torch.equal(trained[name], loaded[name]) for name in trained)
    if not same or difference > 16 * torch.finfo(DTYPES[args.dtype]).eps * logits.abs().max().item():
        raise RunError(
            f"{folder} in a fresh model is not the adapter that was trained: the largest difference of the logits is "
            f"{difference:.3g}."
        )
    print(
        f"{folder}: loaded into a fresh model by PEFT, its {len(loaded)} tensors are equal bit for bit, "
        f"{logits.numel():,} logits differ by {difference:.2g} at most",
        flush=True,
    )
    return fresh


def adapter_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


# ---- results ----


def record_of(
    history: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    accuracy: list[float | None],
    skipped: Skipped,
    ours: dict[str, Any],
) -> dict[str, Any]:
    def logged(name: str, beside: str) -> list[list[Any]]:
        return [[entry["step"], entry[name]] for entry in history if beside in entry]

    return ours | {
        "versions": versions(torch, transformers, peft),
        "train_loss": logged("loss", "loss"),
        "learning_rate": logged("learning_rate", "loss"),
        "found_lr": logged("found_lr", "found_lr"),
        "held_out_loss": logged("eval_loss", "eval_loss"),
        "exact_match": dict(zip(("before", "after"), accuracy, strict=True)),
        "samples": samples,
        "skipped": skipped,
    }


def print_summary(record: dict[str, Any]) -> None:
    (_, before), (_, after) = record["held_out_loss"][0], record["held_out_loss"][-1]
    print(f"held-out loss: {before:.4f} before, {after:.4f} after training")
    if record["found_lr"]:
        print(f"learning rate: found {record['found_lr'][-1][1]:.1e}")
    if None not in record["exact_match"].values():
        print("exact match: {before:.3f} before, {after:.3f} after training".format(**record["exact_match"]))


# ---- command line ----


def parse_arguments() -> argparse.Namespace:
    return flags_of(__doc__)


def main() -> None:
    args = parse_arguments()
    try:
        record = train(args)
        if record:  # in the first process
            write_json(args.output / "losses.json", record)
            curves = Curves(
                record["train_loss"], record["held_out_loss"], record["found_lr"] or record["learning_rate"]
            )
            draw(args.output / "loss_curves.png", {LABELS[args.method]: curves}, "loss of the answers' tokens")
            print_summary(record)
            print(f"written: {args.output}: adapter, losses.json, loss_curves.png")
    except (RunError, oplora.OPLoRAError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
