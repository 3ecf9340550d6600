"""The command line: ``python -m oplora merge BASE ADAPTER OUT``. Needs no torch."""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from .checkpoint import merge_checkpoint
from .errors import OPLoRAError

MERGE = """\
Fold a LoRA adapter into its base model on disk: W + (alpha / r) B A for every adapted weight, in the base's
own dtype. The memory needed is one layer's, whatever the size of the model. OUT appears complete or not at
all."""

FILES = """\
OUT gets the base folder's other files too (config, tokenizer, generation settings), but no hidden files and
no weights in other formats: they would still be the unmerged ones.

exit status: 0 done; 2 refused, with the reason on stderr; 130 interrupted. Nothing is left in OUT but for 0.

example: python -m oplora merge models/Llama-3.2-1B my-adapter models/Llama-3.2-1B-mine"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated run tidies up as an interrupted one does
    try:
        options.run(options)
    except OPLoRAError as error:
        print(f"oplora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("oplora: interrupted. Nothing was written.", file=sys.stderr)
        return 130
    return 0


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oplora", description="Work on OP-LoRA and LoRA adapters on disk.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_merge(
        commands.add_parser(
            "merge",
            help="fold an adapter into its base model",
            description=MERGE,
            epilog=FILES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    return parser


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        metavar="BASE",
        help="folder with model.safetensors, or its index and shards; or one .safetensors file",
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder with adapter_config.json and adapter_model.safetensors, as save_pretrained writes it",
    )
    parser.add_argument("out", metavar="OUT", help="new folder for the merged model")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier model in OUT; it stays until the new one is complete",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    parser.set_defaults(
        run=lambda o: merge_checkpoint(o.base, o.adapter, o.out, overwrite=o.overwrite, progress=not o.quiet)
    )


if __name__ == "__main__":
    sys.exit(main())
