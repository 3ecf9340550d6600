"""The flags of finetune_vlm.py."""

import argparse
import os
from pathlib import Path

import torch
from plumbing import add_preset, number, parser_of
from vlm_model import DTYPES

PROJECTOR_WIDTH, LANGUAGE_WIDTH = 768, 32  # the paper's for LLaVA's projector, and for everything else
LR = 5e-5  # where none is found


def flags_of(doc: str) -> argparse.Namespace:
    """doc: what --help begins with."""
    parser = parser_of(doc)
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
    add("--r", type=number(int, 1), default=16, help="rank")
    add("--lora-alpha", type=float, default=32, help="the adapter's output is scaled by alpha / r")
    add("--lora-dropout", type=float, default=0.0, help="on the adapter's input")

    add = parser.add_argument_group("OP-LoRA").add_argument
    add_preset(add, "--lr")
    add(
        "--hidden-width",
        type=number(int, 1),
        help="units of a generator, for presets paper and flat (default: 768 for --targets projector, else 32)",
    )

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=float, help=f"peak learning rate; preset auto needs none, its size does not matter (else: {LR:g})")
    add("--lr-schedule", default="cosine", help="of transformers: cosine, linear, constant_with_warmup, ...")
    add("--warmup", type=number(int, 0), default=0, help="steps in which the rate rises")
    add("--epochs", type=float, default=1.0, help="passes over the data")
    add("--steps", type=number(int, 1), help="steps of the optimizer, instead of --epochs")
    add("--batch-size", type=number(int, 1), default=1, help="answers in a forward pass")
    add("--grad-accumulation", type=number(int, 1), default=16, help="forward passes to a step")
    add("--max-length", type=number(int, 2), help="tokens of an example with its picture; a longer answer is cut")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm; 0: don't")
    add("--seed", type=number(int, 0), default=0, help="of the adapter, the generators, the split and the order")

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
    add("--logging-steps", type=number(int, 1), default=1, metavar="N", help="steps between training losses")
    add("--eval-steps", type=number(int, 1), default=100, metavar="N", help="steps between held-out losses")
    add("--held-out-count", type=number(int, 1), default=64, metavar="N", help="pictures kept back, a tenth at most")
    add("--sample-steps", type=number(int, 0), default=100, metavar="N", help="steps between sample answers; 0: none")
    add("--samples", type=number(int, 0), default=4, metavar="N", help="sample answers at a time")
    add("--max-new-tokens", type=number(int, 1), default=32, metavar="N", help="of a sample answer")
    add(
        "--accuracy-count",
        type=number(int, 0),
        default=64,
        metavar="N",
        help="held-out questions, before and after",
    )
    add("--save-steps", type=number(int, 0), default=100, metavar="N", help="steps between checkpoints; 0: none")
    add("--keep-checkpoints", type=number(int, 1), default=1, metavar="N", help="older ones are removed")
    add(
        "--resume-from-checkpoint",
        nargs="?",
        const="last",
        metavar="FOLDER",
        help="continue from that checkpoint, without FOLDER from the last in --output",
    )
    add("--workers", type=number(int, 0), default=0, help="processes that read pictures")
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
