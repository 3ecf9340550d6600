"""The data of finetune_vlm.py: pictures with questions and answers, and the tensors that are made of them."""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm
from vlm_model import DTYPES, RunError

IGNORED = -100  # the label of tokens without loss


# ---- rows and pictures ----


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
