"""The vision-language model of finetune_vlm.py: loading it, and the layers that get an adapter."""

import argparse
from collections.abc import Sequence

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what the families call the module between the vision tower and the language model
PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "aligner")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class RunError(Exception):
    """What a user can mend: the message says what and where."""


def load_base(args: argparse.Namespace) -> transformers.PreTrainedModel:
    quantised = {}
    if args.load_in_4bit:
        # the parts that are small or see the picture stay as they are; regular expressions, matched from the start
        kept = (*PROJECTORS, "vision_tower", "vision_model", "visual")
        skipped = [*(rf"(?:.*\.)?{name}" for name in kept), "lm_head"]
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[args.dtype],
            llm_int8_skip_modules=skipped,
        )
        quantised["device_map"] = {"": args.device}
    try:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=DTYPES[args.dtype], **quantised)
    except (OSError, ValueError, ImportError) as error:
        raise RunError(f"cannot load the model {args.model}: {error}") from error
    return model if args.load_in_4bit else model.to(args.device)


def check_model_class(args: argparse.Namespace) -> None:
    """Before any weight is read."""
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot load the model {args.model}: {error}") from error
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return
    what = ", ".join(config.architectures or [config.model_type])
    kind = "a model that reads text only" if type(config) in AutoModelForCausalLM._model_mapping else "another kind"
    hint = "; examples/finetune_llm.py trains it" if kind.startswith("a model") else ""
    raise RunError(
        f"{args.model} is {what}, {kind}{hint}. Expected is a vision-language model that transformers' "
        "AutoModelForImageTextToText knows: LLaVA, LLaVA-NeXT, Qwen2-VL, Idefics3, SmolVLM, InternVL, ..."
    )


def load_processor(args: argparse.Namespace) -> transformers.ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(args.model)
        if args.chat_template is not None:
            processor.chat_template = args.chat_template.read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError, UnicodeDecodeError) as error:
        raise RunError(f"cannot load the processor of {args.model}: {error}") from error
    if not hasattr(processor, "image_processor"):
        raise RunError(
            f"{args.model} brings {type(processor).__name__} and no processor for pictures (preprocessor_config.json "
            "or processor_config.json); take these files from the model's page."
        )
    if processor.chat_template is None:
        raise RunError(
            f"the processor of {args.model} ({type(processor).__name__}) has no chat template, so nobody knows how its "
            "prompts look. Give one with --chat-template FILE (Jinja)."
        )
    return processor


def find_targets(model: transformers.PreTrainedModel, args: argparse.Namespace) -> list[str]:
    """Names for LoraConfig.target_modules, each of them the end of at least one layer's name."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if args.target_modules:
        unknown = [t for t in args.target_modules if not any(f".{name}".endswith(f".{t}") for name in linear)]
        if unknown:
            there = " ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise RunError(f"the model has no target module {' '.join(unknown)}; it has {there}.")
        return args.target_modules
    found = []
    if args.targets in ("projector", "both"):
        projector = [shortened for name in linear if (shortened := below_projector(name)) is not None]
        if not projector:
            raise RunError(
                f"{type(model).__name__} has no linear layer in a module called {', '.join(PROJECTORS[:-1])} or "
                f"{PROJECTORS[-1]}. Name its projector's layers with --target-modules; it has {ends(linear)}."
            )
        found += projector
    if args.targets in ("language", "both"):
        decoder = name_of(model, model.get_decoder())
        language = [n for n in linear if n.startswith(f"{decoder}.") and n.rsplit(".", 1)[-1] in ATTENTION]
        if not language:
            raise RunError(
                f"the language model of {type(model).__name__} ({decoder}) has none of the layers "
                f"{' '.join(ATTENTION)}. Name its layers with --target-modules; it has {ends(linear)}."
            )
        parents = decoder.count(".")
        found += [name.split(".", parents)[parents] for name in language]
    return found


def below_projector(name: str) -> str | None:
    """The name from the projector on, so that it fits wherever the projector hangs; None if it lies elsewhere."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part in PROJECTORS:
            return ".".join(parts[i:])
    return None


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def ends(names: Sequence[str]) -> str:
    """Of layers numbered 0, 1, 2, ... the first."""
    return ", ".join(name for name in names if not any(p.isdigit() and p != "0" for p in name.split(".")))


def add_adapter(model: transformers.PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    config = LoraConfig(
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=find_targets(model, args),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)  # both methods start from the same A
    return get_peft_model(model, config)
