"""The command line, ``oplora`` or ``python -m oplora``: ``merge``, which needs no torch, and ``export``, ``plot`` and
``doctor``."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from . import __version__
from .errors import OPLoRAError
from .files.merge_checkpoint import merge_checkpoint

MERGE = """\
Fold a LoRA adapter into its base model on disk: W + (alpha / r) B A for every adapted weight, in the base's
own dtype. The memory needed is one layer's, whatever the size of the model. OUT appears complete or not at
all."""

FILES = """\
OUT gets the base folder's other files too (config, tokenizer, generation settings), but no hidden files and
no weights in other formats: they would still be the unmerged ones.

exit status: 0 done; 2 refused, with the reason on stderr; 130 interrupted. Nothing is left in OUT but for 0.

example: oplora merge models/Llama-3.2-1B my-adapter models/Llama-3.2-1B-mine"""


EXPORT = """\
Write an adapter in the format of other programs. SOURCE is a folder that PEFT wrote, a folder of such folders called
unet, text_encoder and so on, a file that oplora.save_adapter wrote, diffusers' pytorch_lora_weights.safetensors, or
kohya's file, which needs --base. OUT is a folder, or NAME.safetensors."""

FORMATS = """\
formats:
  peft       for PeftModel.from_pretrained, a folder a component; of an adapter that is in this format already, of any
             model, its folder or its one file
  plain      the same, of PEFT's format alone, with rank and alpha one number and the scales in B: for llama.cpp's
             converter and other readers that take lora_alpha for all layers
  diffusers  pytorch_lora_weights.safetensors, for pipeline.load_lora_weights
  kohya      pytorch_lora_weights_kohya.safetensors, for ComfyUI, sd-scripts and others: SD 1.x, 2.x, SDXL, Flux

exit status: 0 done; 2 refused, with the reason on stderr; 130 interrupted. What OUT held is untouched but for 0.

example: oplora export runs/mine loras/mine.safetensors --format kohya --base models/sdxl"""


PLOT = """\
Draw what oplora.Monitor wrote into the folder RUN: the loss, and the rate of the factors with a mark where preset
"auto" has found it; where every layer has a generator, both terms of the paper's section 3.2 over the layers, and for
every layer over time."""

PICTURE = """\
exit status: 0 done; 2 refused, with the reason on stderr; 130 interrupted. It needs matplotlib.

example: oplora plot runs/mine"""


DOCTOR = """\
Tell what is installed, which kernels load, which instruction set and whether a GPU is used, and train twenty steps of
a tiny model on the CPU and on the GPU. What is wrong stands at the end, with how to mend it."""

HEALTH = """\
exit status: 0 all is well; 2 something is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated run tidies up as an interrupted one does
    try:
        with _own_warnings_told():
            code: int = options.run_command(options) or 0
        sys.stdout.flush()
        return code
    except OPLoRAError as error:
        _tell(error)
        return 2
    except BrokenPipeError:  # who was told has gone, as `head` goes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # of a path that cannot be looked at, or a full disk behind stdout
        print(f"oplora: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("oplora: interrupted. Nothing was written.", file=sys.stderr)
        return 130


def _tell(what: Exception | Warning | str) -> None:
    said = str(what).removeprefix("oplora.save_adapter: ").removeprefix("oplora plot: ")
    print(f"oplora: {said}", file=sys.stderr)


@contextmanager
def _own_warnings_told() -> Iterator[None]:
    """As errors are, without the line of the launcher from which they came."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, *where: Any, **more: Any) -> None:
            if str(message).startswith("oplora"):
                _tell(message)
            else:
                others(message, *where, **more)

        warnings.showwarning = show
        yield


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oplora",
        description="Work on LoRA adapters on disk, and look at runs and at the installation.",
    )
    parser.add_argument("--version", action="version", version=f"oplora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=raw)

    _add_merge(command("merge", "fold an adapter into its base model", MERGE, FILES))
    _add_export(command("export", "write an adapter in another format", EXPORT, FORMATS))
    _add_plot(command("plot", "draw the picture of a run", PLOT, PICTURE))
    command("doctor", "tell what is installed and what is wrong", DOCTOR, HEALTH).set_defaults(run_command=_doctor)
    return parser


def _doctor(_options: argparse.Namespace) -> int:
    from .doctor import report  # needs torch

    return 0 if report() else 2


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder with monitor.jsonl, or the file itself")
    parser.add_argument("out", metavar="OUT", nargs="?", help="picture to write; by default monitor.png in RUN")
    parser.set_defaults(run_command=_plot)


def _plot(options: argparse.Namespace) -> None:
    from .watching.plot import plot_run

    print(plot_run(options.run, options.out))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the adapter")
    parser.add_argument("out", metavar="OUT", help="folder or file to write")
    parser.add_argument("--format", required=True, choices=("peft", "plain", "diffusers", "kohya"))
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="folder of the pipeline that the adapter is for: checks that they fit; kohya's format needs it for "
        "DoRA, and to be read",
    )
    parser.add_argument(
        "--component",
        metavar="NAME",
        help="what a PEFT folder adapts, where it does not say: unet, transformer, text_encoder, text_encoder_2",
    )
    parser.set_defaults(run_command=_export)


def _export(options: argparse.Namespace) -> None:
    from .files.export import export_adapter  # needs torch

    export_adapter(options.source, options.out, options.format, options.base, options.component)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base",
        metavar="BASE",
        help="folder with model.safetensors, or its index and shards; or one .safetensors file",
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder with adapter_config.json and adapter_model.safetensors, as save_pretrained writes it, or one "
        "file that oplora.save_adapter wrote",
    )
    parser.add_argument("out", metavar="OUT", help="new folder for the merged model")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier model in OUT; it stays until the new one is complete",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    parser.set_defaults(
        run_command=lambda o: merge_checkpoint(o.base, o.adapter, o.out, overwrite=o.overwrite, progress=not o.quiet)
    )


if __name__ == "__main__":
    sys.exit(main())
