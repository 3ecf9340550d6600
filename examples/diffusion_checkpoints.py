"""The checkpoints of finetune_diffusion.py, which are whole or not there, and what a resumed run may not change."""

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import plumbing
import transformers
from diffusers.training_utils import _collate_lora_metadata
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from plumbing import differences, sync
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "pytorch_lora_weights.safetensors"
PROGRESS = "progress.json"
# what a resumed run may change: it has no influence on the course of the training
FREE_SETTINGS = {
    *("model", "variant", "revision", "data", "output", "workers", "kohya", "gradient_checkpointing"),
    *("cache_latents", "cache_text", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
    *("validation_prompt", "negative_prompt", "validation_steps", "num_validation_images", "inference_steps"),
    *("validation_guidance", "eval_steps"),
}


class Checkpoints:
    """Folders checkpoint-N: the adapter in the format of diffusers, accelerate's state, and the losses so far."""

    def __init__(self, run: Any) -> None:
        self.run, self.folder = run, run.args.output

    def all(self) -> list[Path]:
        found = [p for p in self.folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def find(self) -> Path | None:
        wanted = self.run.args.resume_from_checkpoint
        if wanted is None:
            return None
        if wanted == "latest":
            if not self.all():
                sys.exit(
                    f"error: nothing to resume: {self.folder} holds no checkpoint. --checkpointing-steps writes them."
                )
            return self.all()[-1]
        path = next((p for p in (Path(wanted), self.folder / wanted) if p.is_dir()), None)
        if path is None:
            there = " ".join(p.name for p in self.all()) or "none"
            sys.exit(f"error: no checkpoint {wanted}; in {self.folder} there is {there}.")
        return path

    def last_stays(self) -> str:
        if not self.all():
            return ""
        return f"\n{self.all()[-1]} stays: the same command with --resume-from-checkpoint latest continues from it."

    # ---- saving ----

    def save(self, step: int) -> None:
        accelerator, target = self.run.accelerator, self.folder / f"checkpoint-{step}"
        new = self.folder / f"unfinished-{target.name}"
        try:
            if accelerator.is_main_process:
                self._remove_unfinished()
                new.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(new))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                progress = {"settings": settings_of(self.run), "history": self.run.history}
                (new / PROGRESS).write_text(json.dumps(progress))
                sync(new)
                if target.exists():  # of an earlier run, or of this one before it was resumed from an older one
                    target.rename(self.folder / f"unfinished-old-{target.name}")
                new.rename(target)
                self._prune()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
            with suppress(OSError):
                self._remove_unfinished()
            sys.exit(
                f"error: {target} could not be written: {error}. Free some space, or give --checkpoints-total-limit."
                f"{self.last_stays()}"
            )
        accelerator.wait_for_everyone()

    def _prune(self) -> None:
        """Whatever moment the run is killed at, none is left in part under a name that is looked for."""
        limit = self.run.args.checkpoints_total_limit
        for old in self.all()[:-limit] if limit else []:
            old.rename(self.folder / f"unfinished-{old.name}")
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        for folder in self.folder.glob("unfinished-*checkpoint-*"):
            shutil.rmtree(folder)

    def save_adapters(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        """accelerate's hook: instead of the model, which is frozen but for them."""
        weights.clear()
        if not self.run.accelerator.is_main_process:
            return
        components = self.run.components
        layers = {f"{name}_lora_layers": adapter_weights(module) for name, module in components.items()}
        self.run.pipeline.save_lora_weights(folder, **layers, **_collate_lora_metadata(components))

    # ---- loading ----

    def resume(self) -> None:
        """Puts all back as it was at the checkpoint."""
        path = self.find()
        if path is None:
            return
        try:
            progress = json.loads((path / PROGRESS).read_text())
            saved, history = progress["settings"], progress["history"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"error: {path} is no checkpoint of this script: {error}. Choose another.")
        refuse_other_settings(saved, settings_of(self.run), path)
        try:
            self.run.accelerator.load_state(str(path))
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            sys.exit(
                f"error: {path} does not fit {self.run.args.model}: {error}\nGive the --model that it was trained on, "
                "or another --output; the checkpoint is unchanged."
            )
        self.run.history = history
        if self.run.args.show_progress:
            print(f"{path}: continuing after step {len(history['train_loss'])}", flush=True)

    def load_adapters(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        saved = load_file(Path(folder) / WEIGHTS)
        for name, component in self.run.components.items():
            prefix = f"{name}."
            mine = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
            wanted = adapter_weights(component).keys()
            if mine.keys() != wanted:
                differ = sorted(mine.keys() ^ wanted)
                raise ValueError(
                    f"{name}: {len(differ)} adapter weights are in one of them only, {differ[0]} among them"
                )
            magnitude = "lora_magnitude_vector"  # PEFT has it without
            named = {key.replace(f"{magnitude}.weight", magnitude): value for key, value in mine.items()}
            set_peft_model_state_dict(component, named)


def adapter_weights(component: nn.Module) -> dict[str, Tensor]:
    """Under the names that diffusers reads: of text encoders it leaves it to transformers, which asks for .weight."""
    weights = get_peft_model_state_dict(component)
    is_encoder = isinstance(component, transformers.PreTrainedModel)
    return {
        f"{key}.weight" if is_encoder and key.endswith("lora_magnitude_vector") else key: value
        for key, value in weights.items()
    }


def settings_of(run: Any) -> dict[str, Any]:
    values = plumbing.settings_of(run.args)
    del values["show_progress"]
    facts = {
        "architecture": run.architecture.name,
        "processes": run.accelerator.num_processes,
        "precision": run.precision,
        "pictures": run.pictures.digest(),
    }
    return values | facts


def refuse_other_settings(saved: dict[str, Any], mine: dict[str, Any], checkpoint: Path) -> None:
    free = FREE_SETTINGS | ({"steps"} if mine["lr_scheduler"].startswith("constant") else set())
    if other := differences(saved, mine, free):
        sys.exit(
            f"error: {checkpoint} is of a run with other settings: {', '.join(other)}. Resume with those of the "
            "checkpoint, or start anew with another --output; the checkpoint is unchanged."
        )
