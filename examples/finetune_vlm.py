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
import os
import platform
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

import oplora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {"lora": "LoRA", "oplora": "OP-LoRA"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# what the families call the module between the vision tower and the language model
PROJECTORS = ("multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "aligner")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTOR_WIDTH, LANGUAGE_WIDTH = 768, 32  # the paper's for LLaVA's projector, and for everything else
LR = 5e-5  # where none is found
IGNORED = -100  # the label of tokens without loss
OUR_STATE = "finetune_vlm.json"
# what a resumed run may change: it has no influence on the losses but for rounding, or is checked otherwise
FREE_SETTINGS = {
    *("model", "data", "held_out", "image_folder", "output", "resume_from_checkpoint", "report_to", "trust_pictures"),
    "device",
    *("save_steps", "keep_checkpoints", "sample_steps", "samples", "max_new_tokens", "accuracy_count", "workers"),
}


class RunError(Exception):
    """What a user can mend: the message says what and where."""


# ---- the method: all that differs ----


def make_optimizer(model: PeftModel, args: argparse.Namespace) -> torch.optim.Optimizer:
    if args.method == "lora":
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.weight_decay
        )
    return oplora.AdamW(
        model,
        lr=args.lr,
        weight_decay=args.weight_decay,
        hidden_width=args.hidden_width,
        preset=args.preset,
        max_grad_norm=args.max_grad_norm or None,  # it trains the generators, so their gradients' norm counts
        seed=args.seed,
    )


def found_lr(optimizer: Any) -> float | None:
    """The rate that OP-LoRA has found by now, of which a schedule makes less; None where it was given."""
    found = next((state["found"] for state in optimizer.state.values() if "found" in state), None)
    return None if found is None else float(found[0])


# ---- model ----


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


# ---- data ----


@dataclass(frozen=True)
class Example:
    """One answer about one picture; questions and answers before it in the conversation are its prompt."""

    picture: Path
    turns: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        return self.turns[-1][1]


class Skipped(dict[str, list[str]]):
    """Names of what was left out, by reason."""

    def add(self, reason: str, name: str) -> None:
        self.setdefault(reason, []).append(name)

    def report(self) -> str:
        parts = []
        for reason, names in self.items():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{len(names)} {reason} ({', '.join(names[:5])}{more})")
        return f"skipped {sum(map(len, self.values()))} rows: {'; '.join(parts)}"


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSON list or of JSON lines, each with its place for messages."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read the data {path}: {error}") from error
    is_list = text.lstrip().startswith("[")
    pieces = [("", text)] if is_list else [(f"line {i}", s) for i, s in enumerate(text.splitlines(), 1) if s.strip()]
    for place, piece in pieces:
        try:
            parsed = json.loads(piece)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}{place and f', {place}'}: no JSON: {error}") from error
        rows = [(f"row {i}", row) for i, row in enumerate(parsed, 1)] if is_list else [(place, parsed)]
        for where, row in rows:
            if not isinstance(row, dict):
                raise RunError(f"{path}, {where}: a {type(row).__name__}, expected an object with image and answer.")
            yield where, row


def conversation_of(row: dict[str, Any], default_question: str) -> list[tuple[str, str]]:
    """The row's questions and answers, in the order they were asked; an answer that is missing is empty."""
    if "conversations" not in row:
        return [(text_of(row.get("question")) or default_question, text_of(row.get("answer")))]
    turns: list[tuple[str, str]] = []
    question, messages = "", row["conversations"]
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            return []
        value = text_of(message.get("value")).replace("<image>", "").strip()
        if message.get("from") in ("human", "user"):
            question = value
        elif message.get("from") in ("gpt", "assistant"):
            turns.append((question or default_question, value))
            question = ""
    return turns


def text_of(value: Any) -> str:
    return "" if value is None else str(value).strip()


def read_examples(path: Path, args: argparse.Namespace, skipped: Skipped) -> list[Example]:
    folder = args.image_folder or path.parent
    examples: list[Example] = []
    sound: dict[Path, bool] = {}
    for where, row in tqdm(list(read_rows(path)), desc=f"checking {path.name}", disable=args.trust_pictures):
        name = row.get("image")
        if not isinstance(name, str) or not name:
            skipped.add("with several pictures" if isinstance(name, list) else "without a picture", where)
            continue
        turns = conversation_of(row, args.question)
        if not turns or not all(answer for _, answer in turns):
            skipped.add("without an answer", where)
            continue
        picture = folder / name
        if picture not in sound:
            sound[picture] = args.trust_pictures or decodes(picture)
        if not sound[picture]:
            skipped.add("with a picture that does not decode", name)
            continue
        examples += [Example(picture, tuple(turns[: i + 1])) for i in range(len(turns))]
    return examples


def decodes(picture: Path) -> bool:
    try:
        with Image.open(picture) as image:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, but not drawn
            image.load()
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def load_picture(picture: Path) -> Image.Image:
    """RGB, upright; what is transparent becomes white."""
    try:
        with Image.open(picture) as file:
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RunError(f"the picture {picture} does not decode: {error}") from error


def split(examples: list[Example], args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """To train on and held out, by pictures: no held-out picture is trained on."""
    pictures = sorted({example.picture for example in examples})
    random.Random(args.seed).shuffle(pictures)
    count = min(args.held_out_count, max(1, len(pictures) // 10))
    held_out = set(pictures[:count])
    return [e for e in examples if e.picture not in held_out], [e for e in examples if e.picture in held_out]


def load_data(args: argparse.Namespace) -> tuple[list[Example], list[Example], Skipped]:
    skipped = Skipped()
    train_on, held_out = read_examples(args.data, args, skipped), []
    if args.held_out is None:
        train_on, held_out = split(train_on, args)
    else:
        held_out = read_examples(args.held_out, args, skipped)
    if skipped:
        print(skipped.report(), flush=True)
    if not train_on or not held_out:
        need = "two pictures, one to train on and one to hold out" if args.held_out is None else "one row each"
        raise RunError(
            f"{args.data} leaves {len(train_on)} answers to train on and {len(held_out)} held out; it takes at least "
            f"{need}. Rows want an image that decodes and an answer; pictures are looked for in "
            f"{args.image_folder or args.data.parent}."
        )
    print(f"{len(train_on)} answers to train on, {len(held_out)} held out", flush=True)
    return train_on, held_out, skipped


# ---- from examples to tensors ----


class Batches:
    """Makes tensors of examples: the processor expands the image tokens, and only the answer has labels."""

    def __init__(self, processor: transformers.ProcessorMixin, model: nn.Module, args: argparse.Namespace) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.dtype, self.max_length = DTYPES[args.dtype], args.max_length
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.stops = stop_tokens(self.tokenizer, model)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        prompts = [self.prompt(example) for example in examples]
        texts = [self.with_answer(*pair) for pair in zip(examples, prompts, strict=True)]
        batch = self.process(texts, examples)
        ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
        labels = torch.full_like(ids, IGNORED)
        for i, (example, prompt, text) in enumerate(zip(examples, prompts, texts, strict=True)):
            answer = self.answer_ids(prompt, text)
            begin = lengths[i] - len(answer)
            if ids[i, begin : lengths[i]].tolist() != answer:
                raise RunError(
                    f"{type(self.processor).__name__} changes the text behind the picture, so the answer's tokens "
                    "cannot be told from the prompt's: this script cannot train it."
                )
            self.check_length(example, begin, lengths[i])
            labels[i, begin : lengths[i]] = ids[i, begin : lengths[i]]
        batch["labels"] = labels
        per_token = [key for key, value in batch.items() if value.shape == ids.shape]
        return {key: value[:, : self.max_length] if key in per_token else value for key, value in batch.items()}

    def prompt(self, example: Example) -> str:
        return self.render(messages_of(example)[:-1], add_generation_prompt=True)

    def with_answer(self, example: Example, prompt: str) -> str:
        """The prompt, the answer, and the token that ends an answer, which some templates leave out."""
        text = self.render(messages_of(example), add_generation_prompt=False)
        text = (text if text.startswith(prompt) else prompt + example.answer).rstrip()
        return text if text.endswith(self.stops) else text + self.stops[0]

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def process(self, texts: list[str], examples: Sequence[Example]) -> dict[str, Tensor]:
        """To the right of the shorter texts comes padding."""
        images = [[load_picture(example.picture)] for example in examples]
        batch = self.processor(
            text=texts,
            images=images,
            padding=True,
            padding_side="right",
            add_special_tokens=self.adds_special_tokens(texts[0]),
            return_tensors="pt",
        )
        return {key: t.to(self.dtype) if t.is_floating_point() else t for key, t in batch.items()}

    def adds_special_tokens(self, text: str) -> bool:
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def answer_ids(self, prompt: str, text: str) -> list[int]:
        """What follows on the tokens that text and prompt share; the picture lies within those."""
        prompt_ids, ids = (
            self.tokenizer(t, add_special_tokens=self.adds_special_tokens(t), verbose=False)["input_ids"]
            for t in (prompt, text)
        )
        shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
        return ids[shared:]

    def check_length(self, example: Example, prompt: int, whole: int) -> None:
        if self.max_length is not None and prompt >= self.max_length:
            raise RunError(
                f"{example.picture}: its prompt has {prompt} tokens with the picture's, which --max-length "
                f"{self.max_length} would cut, and image tokens cannot be cut. Raise --max-length, or give smaller "
                "pictures if the model's number of image tokens depends on their size."
            )
        if min(whole, self.max_length or whole) > self.positions:
            raise RunError(
                f"{example.picture}: its prompt and answer have {whole} tokens with the picture's, the model has "
                f"{self.positions} positions. Shorten the text, or pass --max-length {self.positions} to cut the "
                "answer's end."
            )


def messages_of(example: Example) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for i, (question, answer) in enumerate(example.turns):
        picture = [{"type": "image"}] if i == 0 else []
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def stop_tokens(tokenizer: transformers.PreTrainedTokenizerBase, model: nn.Module) -> tuple[str, ...]:
    """The tokens at which the model's generation ends, the tokenizer's own first."""
    ids = model.generation_config.eos_token_id
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    tokens = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(ids)]
    tokens = [token for token in tokens if token]
    if not tokens:
        raise RunError("neither the tokenizer nor the model's generation config names a token that ends an answer.")
    return tuple(dict.fromkeys(tokens))


# ---- answers ----


@torch.no_grad()
def answer(model: nn.Module, batches: Batches, example: Example, args: argparse.Namespace) -> str:
    """What the model answers, greedily."""
    training = model.training
    model.eval()
    prompt = batches.process([batches.prompt(example)], [example])
    prompt = {key: value.to(args.device) for key, value in prompt.items()}
    tokenizer = batches.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with autocast(args):
        out = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=pad)
    model.train(training)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def autocast(args: argparse.Namespace) -> Any:
    """The precision that Trainer runs the model in."""
    if args.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, DTYPES[args.dtype])


def exact_match(
    model: nn.Module, batches: Batches, held_out: Sequence[Example], args: argparse.Namespace
) -> float | None:
    """The share of held-out questions answered word for word; None where answers are too long to ask for that."""
    asked = held_out[: args.accuracy_count]
    lengths = [len(batches.tokenizer(e.answer, add_special_tokens=False)["input_ids"]) for e in asked]
    if not asked or max(lengths) > args.max_new_tokens:
        return None
    right = [
        plain(answer(model, batches, e, args)) == plain(e.answer) for e in tqdm(asked, desc="answering", leave=False)
    ]
    return sum(right) / len(right)


def plain(text: str) -> str:
    """Without what does not make an answer wrong: case, spaces, a full stop."""
    return " ".join(text.casefold().split()).rstrip(".")


class Samples(TrainerCallback):
    """Answers to a few held-out questions, printed and kept."""

    def __init__(self, batches: Batches, examples: Sequence[Example], args: argparse.Namespace) -> None:
        self.batches, self.examples, self.args = batches, examples, args
        self.taken: list[dict[str, Any]] = []

    def on_train_begin(self, _: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.args.sample_steps and state.global_step == 0:
            self.take(model, state)

    def on_step_end(self, _: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.args.sample_steps and state.global_step % self.args.sample_steps == 0:
            self.take(model, state)

    def take(self, model: nn.Module, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        for example in self.examples:
            said = answer(model, self.batches, example, self.args)
            picture, question = example.picture.name, example.turns[-1][0]
            self.taken.append(
                {"step": state.global_step, "picture": picture, "question": question, "answer": said}
                | {"expected": example.answer}
            )
            print(f"[step {state.global_step}] {picture}: {question} {said!r}, expected {example.answer!r}", flush=True)


class StopAtNan(TrainerCallback):
    def on_log(self, _: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not abs(loss) < float("inf"):
            advice = "--preset paper takes --lr" if "found_lr" in logs else "lower --lr"
            raise RunError(f"the loss is {loss} at step {state.global_step}; {advice}.")


# ---- training ----


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
                f"{last} is whole, and --resume-from-checkpoint goes on from it" if last else "None was written before"
            )
            raise RunError(
                f"writing {output / name} failed ({error}). {kept}. Free some space, or choose another --output."
            ) from error
        finally:
            self._beside = None

    def _finish(self, output: Path, name: str) -> None:
        new = self._beside / name
        (new / OUR_STATE).write_text(json.dumps(self.ours | {"samples": self.samples.taken}, indent=1) + "\n")
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
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
                f"{there} is of an earlier run. Go on with it by --resume-from-checkpoint, or choose another --output."
            )
        return None
    found = there if wanted == "last" else wanted
    if found is None or not Path(found).is_dir():
        where = f"{args.output} holds no checkpoint" if wanted == "last" else f"there is no folder {wanted}"
        raise RunError(f"nothing to resume: {where}; --save-steps writes them.")
    return Path(found)


def load_our_state(checkpoint: Path, ours: dict[str, Any], model: PeftModel) -> dict[str, Any]:
    """What the checkpoint's run was; refuses one that does not go on from there."""
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
    mine, theirs = ours["settings"], saved["settings"]
    other = [name for name in mine if name not in FREE_SETTINGS and mine[name] != theirs.get(name)]
    if other:
        differences = ", ".join(f"--{n.replace('_', '-')} was {theirs.get(n)}, is {mine[n]}" for n in other)
        raise RunError(f"{checkpoint} is of a run with other settings: {differences}.")
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


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
    packages = (oplora, torch, transformers, peft)
    return ours | {
        "versions": {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages},
        "train_loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "learning_rate": [[entry["step"], entry["learning_rate"]] for entry in history if "loss" in entry],
        "found_lr": [[entry["step"], entry["found_lr"]] for entry in history if "found_lr" in entry],
        "held_out_loss": [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry],
        "exact_match": dict(zip(("before", "after"), accuracy, strict=True)),
        "samples": samples,
        "skipped": skipped,
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    beside = path.with_name(f"unfinished-{path.name}")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def draw(path: Path, record: dict[str, Any], label: str) -> None:
    panels = 2 if record["found_lr"] else 1
    figure, axes = plt.subplots(1, panels, figsize=(3 + 4 * panels, 4.2), squeeze=False, layout="constrained")
    axis = axes[0, 0]
    axis.plot(*zip(*record["train_loss"], strict=True), alpha=0.6, linewidth=0.9, label=f"{label}, training")
    axis.plot(*zip(*record["held_out_loss"], strict=True), "o-", label=f"{label}, held out")
    axis.set(xlabel="step", ylabel="loss of the answers' tokens")
    axis.legend()
    if record["found_lr"]:
        steps, found = zip(*record["found_lr"], strict=True)
        axes[0, 1].semilogy(steps, found, color="tab:green")
        axes[0, 1].set(xlabel="step", ylabel="learning rate", title=f"found: {found[-1]:.1e} at the end")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_summary(record: dict[str, Any]) -> None:
    (_, before), (_, after) = record["held_out_loss"][0], record["held_out_loss"][-1]
    print(f"held-out loss: {before:.4f} before, {after:.4f} after training")
    if record["found_lr"]:
        print(f"learning rate: found {record['found_lr'][-1][1]:.1e}")
    if None not in record["exact_match"].values():
        print("exact match: {before:.3f} before, {after:.3f} after training".format(**record["exact_match"]))


# ---- command line ----


def at_least(low: int) -> Any:
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return int(text)

    return number


def parse_arguments() -> argparse.Namespace:
    summary, *rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog="\n\n".join(rest), formatter_class=HelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--model", required=True, help="vision-language model of transformers, name or folder")
    add("--data", type=Path, required=True, help="JSON lines (image, question, answer), or LLaVA's JSON")
    add("--held-out", type=Path, help="the same for the held-out loss (default: pictures kept back from --data)")
    add("--image-folder", type=Path, help="where the pictures are (default: beside --data)")
    add("--question", default="What is shown in the picture?", help="for rows without a question")
    add("--method", choices=("lora", "oplora"), default="oplora", help="what to train")
    add("--chat-template", type=Path, help="Jinja file for a processor that has none")

    add = parser.add_argument_group("adapter").add_argument
    add("--targets", choices=("projector", "language", "both"), default="both", help="which layers to adapt")
    add("--target-modules", nargs="+", metavar="NAME", help="which layers to adapt, by the ends of their names")
    add("--r", type=at_least(1), default=16, help="rank")
    add("--lora-alpha", type=float, default=32, help="the adapter's output is scaled by alpha / r")
    add("--lora-dropout", type=float, default=0.0, help="on the adapter's input")

    add = parser.add_argument_group("OP-LoRA").add_argument
    add(
        "--preset",
        choices=("auto", "paper", "flat"),
        default="auto",
        help="auto finds the learning rate; paper and flat have a generator in every layer and take --lr",
    )
    add(
        "--hidden-width",
        type=at_least(1),
        help="units of a generator, for presets paper and flat (default: 768 for --targets projector, else 32)",
    )

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=float, help=f"peak learning rate; preset auto needs none, its size does not matter (else: {LR:g})")
    add("--lr-schedule", default="cosine", help="of transformers: cosine, linear, constant_with_warmup, ...")
    add("--warmup", type=at_least(0), default=0, help="steps in which the rate rises")
    add("--epochs", type=float, default=1.0, help="passes over the data")
    add("--steps", type=at_least(1), help="steps of the optimizer, instead of --epochs")
    add("--batch-size", type=at_least(1), default=1, help="answers in a forward pass")
    add("--grad-accumulation", type=at_least(1), default=16, help="forward passes to a step")
    add("--max-length", type=at_least(2), help="tokens of an example with its picture; a longer answer loses its end")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm; 0: don't")
    add("--seed", type=at_least(0), default=0, help="of the adapter, the generators, the split and the order")

    add = parser.add_argument_group("memory").add_argument
    add("--dtype", choices=DTYPES, help="of the base model (default: bfloat16 where the device has it)")
    add("--load-in-4bit", action="store_true", help="language model in nf4 (bitsandbytes)")
    add(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute activations twice instead of keeping them",
    )
    add("--device", help="cpu, or a GPU (default: the GPU if there is one)")

    add = parser.add_argument_group("running").add_argument
    add("--output", type=Path, default=Path("runs/vlm"), help="folder for all results")
    add("--logging-steps", type=at_least(1), default=1, metavar="N", help="steps between training losses")
    add("--eval-steps", type=at_least(1), default=100, metavar="N", help="steps between held-out losses")
    add("--held-out-count", type=at_least(1), default=64, metavar="N", help="pictures kept back, a tenth at most")
    add("--sample-steps", type=at_least(0), default=100, metavar="N", help="steps between sample answers; 0: none")
    add("--samples", type=at_least(0), default=4, metavar="N", help="sample answers at a time")
    add("--max-new-tokens", type=at_least(1), default=32, metavar="N", help="of a sample answer")
    add("--accuracy-count", type=at_least(0), default=64, metavar="N", help="held-out questions asked before and after")
    add("--save-steps", type=at_least(0), default=100, metavar="N", help="steps between checkpoints; 0: none")
    add("--keep-checkpoints", type=at_least(1), default=1, metavar="N", help="older ones are removed")
    add(
        "--resume-from-checkpoint",
        nargs="?",
        const="last",
        metavar="FOLDER",
        help="go on from that checkpoint, without FOLDER from the last in --output",
    )
    add("--workers", type=at_least(0), default=0, help="processes that read pictures")
    add("--trust-pictures", action="store_true", help="do not decode every picture before training")
    add("--report-to", default="none", help="Trainer's: tensorboard, wandb, ...")
    return with_defaults(parser, parser.parse_args())


def with_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    finds_lr = args.method == "oplora" and args.preset == "auto"
    if args.lr is None and not finds_lr:
        args.lr = LR
    if finds_lr and args.hidden_width is not None:
        parser.error("--hidden-width is for --preset paper and flat; auto, the default, has no generator in a layer")
    if args.preset != "auto" and args.hidden_width is None:
        projector_only = args.targets == "projector" and not args.target_modules
        args.hidden_width = PROJECTOR_WIDTH if projector_only else LANGUAGE_WIDTH
    if args.device is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if args.dtype is None:
        on_gpu = args.device != "cpu" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported())
        args.dtype = "bfloat16" if on_gpu else "float32"
    if args.epochs <= 0:
        parser.error(f"--epochs {args.epochs} is not more than 0")
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each flag that has one, and the docstring as it stands."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default else action.help


def main() -> None:
    args = parse_arguments()
    try:
        record = train(args)
        if record:  # in the first process
            write_json(args.output / "losses.json", record)
            draw(args.output / "loss_curves.png", record, LABELS[args.method])
            print_summary(record)
            print(f"written: {args.output}: adapter, losses.json, loss_curves.png")
    except (RunError, oplora.OPLoRAError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
