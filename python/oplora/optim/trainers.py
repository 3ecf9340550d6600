"""transformers' Trainer, and all that are made of it (TRL, Unsloth, axolotl): the optimizer of the model they train.

Trainer makes its optimizer when training begins, from a class and arguments, or from a factory, which gets the model. A
model that it makes or wraps itself (model_init, SFTTrainer's peft_config) is there then, and not before.
"""

from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import OPLoRATypeError
from .adamw import AdamW
from .presets import Preset, preset_of

__all__ = ["for_trainer"]

GENERATORS = (
    *("hidden_width", "latent_width", "latent_std", "hidden_lr_ratio", "state", "start", "weight_rank", "moment_rank"),
    *("init", "precondition", "seed", "generator_device"),
)


def for_trainer(arguments: Any = None, **given: Any) -> tuple[Any, dict[str, Any]]:
    """What Trainer takes as optimizer_cls_and_kwargs, to make oplora.AdamW of the model that it trains.

        Trainer(model, arguments, optimizer_cls_and_kwargs=oplora.for_trainer(arguments), ...)

    Of a trainer that does not take it (TRL's DPO and GRPO) set the attribute before train():
    trainer.optimizer_cls_and_kwargs = oplora.for_trainer(trainer.args).

    Args:
        arguments: TrainingArguments. learning_rate reaches the optimizer, and weight_decay, adam_beta1, adam_beta2 and
            adam_epsilon where they are not as transformers has them by default, unless `given` says otherwise.
        given: arguments of oplora.AdamW.
    """
    if arguments is not None and not (is_dataclass(arguments) and hasattr(arguments, "learning_rate")):
        raise OPLoRATypeError(
            f"oplora.for_trainer: expected TrainingArguments, got {type(arguments).__name__}. The model is not needed: "
            "Trainer(model, args, optimizer_cls_and_kwargs=oplora.for_trainer(args))."
        )
    return _factory, {**({} if arguments is None else _taken(arguments, given)), **given}


def _factory() -> Any:
    """What is no optimizer's class Trainer takes for a factory: it calls what this returns with the model."""
    return _made


def _made(model: Any, arguments: Any = None, **given: Any) -> AdamW:
    """arguments: axolotl's trainers hand theirs over as well."""
    return AdamW(model, **{**({} if arguments is None else _taken(arguments, given)), **given})


def _taken(arguments: Any, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(arguments)}
    own = {name: getattr(arguments, name) for name in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")}
    changed = {name: value for name, value in own.items() if value != defaults[name]}
    taken: dict[str, Any] = {"lr": arguments.learning_rate}
    if "weight_decay" in changed:
        taken["weight_decay"] = changed["weight_decay"]
    if "adam_epsilon" in changed:
        taken["eps"] = changed["adam_epsilon"]
    if "adam_beta1" in changed or "adam_beta2" in changed:
        beta1, beta2 = _preset(given).betas
        taken["betas"] = changed.get("adam_beta1", beta1), changed.get("adam_beta2", beta2)
    return taken


def _preset(given: dict[str, Any]) -> Preset:
    return preset_of(given.get("preset"), {name: given.get(name) for name in GENERATORS})
