"""Language models and texts.

reference   SmolLM2-135M-Instruct on the language reference that Python brings along: blocks of 64 tokens, 48 of them
            to validate and 96 to test, never trained on
glosses     SmolLM2-135M-Instruct on WordNet: which of 25 categories ("animal", "artifact", ...) a noun is of, from
            its definition; the answer is one token, the loss is its cross entropy, the accuracy that of the likeliest
            of the 25
small       a LLaMA of four layers that has read the King James Bible, byte by byte, on the same language reference
other       a GPT-2 of four layers that has read the same, if not as long, on the same
"""

import hashlib
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import finetune_llm
import harness

WORDNET = Path("/usr/share/wordnet/data.noun")
CATEGORIES = (
    *("act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food"),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)
MOST_TOKENS = 40  # of a gloss; longer ones are left out
Texts = dict[str, Tensor]  # blocks (count, tokens) by split


# ---- blocks of text ----


def split_blocks(blocks: Tensor, validation: int, test: int) -> Texts:
    """Every block belongs to one split, drawn once."""
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    parts = blocks[order].split([len(blocks) - validation - test, validation, test])
    return dict(zip(("train", "validation", "test"), parts, strict=True))


@lru_cache(1)
def reference_blocks(folder: str, length: int) -> Texts:
    tokenizer = finetune_llm.load_tokenizer(Namespace(model=folder))
    ids = torch.tensor(tokenizer(finetune_llm.read_text(None))["input_ids"])
    return split_blocks(ids[: len(ids) // length * length].view(-1, length), 48, 96)


def smollm2() -> nn.Module:
    folder = finetune_llm.packaged_model()
    return finetune_llm.load_base(Namespace(model=folder, dtype="float32", device="cpu"))


class Blocks:
    """The mean cross entropy of the next token in batches of blocks."""

    def __init__(self, seed: int, load: Callable[[], tuple[nn.Module, Texts]], batch: int) -> None:
        self.base, self.texts = load()
        self.batch = batch
        self.order = finetune_llm.block_order(len(self.texts["train"]), seed)

    def loss(self, model: nn.Module) -> Tensor:
        return mean_loss(model, self.texts["train"][list(islice(self.order, self.batch))])

    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        settings = Namespace(device=next(model.parameters()).device, batch_size=8)
        return {"loss": finetune_llm.evaluate(model, self.texts[split], settings)}


def mean_loss(model: nn.Module, blocks: Tensor) -> Tensor:
    ids = blocks.to(next(model.parameters()).device)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def smollm2_on_reference() -> tuple[nn.Module, Texts]:
    return smollm2(), reference_blocks(finetune_llm.packaged_model(), 64)


# ---- WordNet ----


def glosses() -> list[tuple[str, str, int]]:
    """Of every noun sense: its id, its definition, the index of its category."""
    if not WORDNET.exists():
        sys.exit("error: WordNet is not installed. Run\n    apt-get install wordnet-base")
    items = []
    for line in WORDNET.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        head, gloss = line.split(" | ", 1)
        offset, category = head.split()[:2]
        if category != "03":  # the unique beginners, which are of no category
            items.append((offset, gloss.split(";")[0].strip(), int(category) - 4))
    return items


def split_of(identifier: str) -> str:
    """By a hash: one in twenty to validate, one in twenty to test."""
    number = hashlib.sha256(identifier.encode()).digest()[0] % 20
    return {0: "validation", 1: "test"}.get(number, "train")


@lru_cache(1)
def gloss_items(folder: str, measured: int, trained: int) -> tuple[dict[str, list[tuple[list[int], int]]], Tensor]:
    """By split prompts and categories, so many of them; and the 25 tokens that answer."""
    tokenizer = finetune_llm.load_tokenizer(Namespace(model=folder))
    items: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for identifier, gloss, category in glosses():
        items[split_of(identifier)].append((gloss, category))
    answers = torch.tensor([tokenizer(" " + name)["input_ids"] for name in CATEGORIES])
    encoded = {}
    for split, some in items.items():
        order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0)).tolist()
        some = [some[i] for i in order[: 2 * (trained if split == "train" else measured)]]
        prompts = tokenizer([f"Definition: {gloss}\nCategory:" for gloss, _ in some])["input_ids"]
        short = [(ids, c) for ids, (_, c) in zip(prompts, some, strict=True) if len(ids) <= MOST_TOKENS]
        encoded[split] = short[: trained if split == "train" else measured]
    return encoded, answers.squeeze(1)


class Glosses:
    """The cross entropy of the category's token after a definition."""

    def __init__(self, seed: int, batch: int, measured: int = 300, trained: int = 4000) -> None:
        self.base = smollm2()
        self.items, self.answers = gloss_items(finetune_llm.packaged_model(), measured, trained)
        self.batch = batch
        self.order = finetune_llm.block_order(len(self.items["train"]), seed)

    def loss(self, model: nn.Module) -> Tensor:
        scores, categories = self.scores(model, [self.items["train"][i] for i in islice(self.order, self.batch)])
        return F.cross_entropy(scores, self.answers.to(scores.device)[categories])

    def scores(self, model: nn.Module, items: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Of the next token (count, vocabulary); and the categories. Prompts are filled up in front."""
        device = next(model.parameters()).device
        longest = max(len(ids) for ids, _ in items)
        ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in items], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in items], device=device)
        scores: Tensor = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1]
        return scores, torch.tensor([category for _, category in items], device=device)

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        items = sorted(self.items[split], key=lambda item: len(item[0]))
        loss, right = 0.0, 0
        for begin in range(0, len(items), 20):
            scores, categories = self.scores(model, items[begin : begin + 20])
            answers = self.answers.to(scores.device)
            loss += F.cross_entropy(scores, answers[categories], reduction="sum").item()
            right += int((scores[:, answers].argmax(1) == categories).sum())
        return {"loss": loss / len(items), "accuracy": right / len(items)}


# ---- a small model of our own ----


def bible() -> str:
    try:
        verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        sys.exit("error: the King James Bible is not installed. Run\n    apt-get install bible-kjv bible-kjv-text")
    return "\n".join(line.split(" ", 1)[-1] for line in verses.splitlines())


def in_bytes(text: str, length: int) -> Tensor:
    ids = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].view(-1, length)


def new_llama(layers: int, hidden: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def new_gpt2(layers: int, hidden: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": layers, "n_embd": hidden, "n_head": max(1, hidden // 32), "n_positions": 256}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **sizes, **dropout))


def read_bible(model: nn.Module, steps: int = 2500, batch: int = 16, length: int = 96) -> None:
    """About ten minutes of a core."""
    blocks = in_bytes(bible(), length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = lambda step: min((step + 1) / 100, (steps - step) / (steps - 100))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order = finetune_llm.block_order(len(blocks), 0)
    harness.learn(model, lambda: mean_loss(model, blocks[list(islice(order, batch))]), optimizer, scheduler, steps)


@lru_cache(1)
def small_texts() -> Texts:
    return split_blocks(in_bytes(finetune_llm.read_text(None), 96), 200, 400)


def small_on_reference() -> tuple[nn.Module, Texts]:
    model = new_llama(4, 128)
    return harness.pretrained(model, partial(read_bible, model), "small-llama"), small_texts()


def other_on_reference() -> tuple[nn.Module, Texts]:
    model = new_gpt2(4, 128)
    return harness.pretrained(model, partial(read_bible, model, steps=1500), "small-gpt2"), small_texts()


def toy_on_counting() -> tuple[nn.Module, Texts]:
    blocks = (torch.arange(40)[:, None] + torch.arange(16)) % 64
    return new_llama(2, 32), split_blocks(blocks, 4, 4)


REFERENCE = partial(Blocks, load=smollm2_on_reference, batch=2)
GLOSSES = partial(Glosses, batch=6)
SMALL = partial(Blocks, load=small_on_reference, batch=8)
OTHER = partial(Blocks, load=other_on_reference, batch=8)
TOY = partial(Blocks, load=toy_on_counting, batch=2)
