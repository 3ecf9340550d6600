"""Merges an adapter into every architecture of transformers, tiny, and compares with PEFT's own merge.

Of each architecture that its configuration can make tiny (tiny_models.py): the model is saved, adapted by PEFT, the
adapter saved, both merged on disk, and what transformers loads of the merged folder is compared with what PEFT's
`merge_and_unload()` makes of the adapted model. Two adapters each:

    layers      LoRA on every linear and convolutional layer, and on embeddings that are tied to nothing
    embedding   LoRA on one layer, and the input embedding in modules_to_save

    right       the greatest difference of a tensor is at most 1e-6 of its greatest entry
    refused     by a message, which is in the row
    wrong       neither
    PEFT        fails at one of its own steps, so there is nothing to compare with
    not tiny    the configuration's defaults make no model of at most 100 million parameters here

Rows are written after each architecture. Those that the file has are made again where they are not right, and all if
versions changed.
"""

import argparse
import collections
import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from harness import written_beside
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import NotTinyError, architectures, build
from torch import nn
from transformers.pytorch_utils import Conv1D

from oplora import OPLoRAError
from oplora.files.merge_checkpoint import merge_checkpoint

RESULTS: Final = Path(__file__).parent / "results" / "merge_architectures.json"
TOLERANCE: Final = 1e-6
SECONDS: Final = 240
BYTES: Final = 8 << 30
LAYERS: Final = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
MAMBAS: Final = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}  # PEFT refuses some of their layers
Row = dict[str, Any]


class PeftError(Exception):
    """PEFT's own way fails."""


# ---- one architecture ----


def merge_one(kind: str, class_names: list[str], folder: Path) -> list[Row]:
    try:
        model = build(kind, class_names)
        with _blaming(NotTinyError):
            model.save_pretrained(folder / "base")
    except NotTinyError as error:
        return [{"adapter": name, "result": "not tiny", "why": str(error)} for name in ADAPTERS]
    kind_of_rows = {"class": type(model).__name__}
    return [{**kind_of_rows, "adapter": name, **_compare(type(model), folder, name)} for name in ADAPTERS]


def _compare(model_class: Any, folder: Path, adapter: str) -> Row:
    path, out = folder / adapter, folder / f"{adapter}-out"
    try:
        with _blaming(PeftError):
            base = _load(model_class, folder / "base")
            start = {name: tensor.clone() for name, tensor in _tensors(base).items()}
            if (config := ADAPTERS[adapter](base)) is None:
                return {"result": "PEFT", "why": "no layer that PEFT adapts"}
            merged = _save_adapter(base, config, path).merge_and_unload()
            expected = _tensors(merged)
    except PeftError as error:
        return {"result": "PEFT", "why": str(error)}
    try:
        merge_checkpoint(folder / "base", path, out, progress=False)
        found = _tensors(_load(model_class, out))
    except OPLoRAError as error:
        return {"result": "refused", "why": str(error).replace(str(folder), "")[:400]}
    except Exception as error:
        return {"result": "crash", "why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    if found.keys() != expected.keys():
        return {"result": "wrong", "why": f"other tensors: {sorted(found.keys() ^ expected.keys())[:3]}"}
    worst, difference = _worst(found, expected)
    if difference > TOLERANCE:  # what the model's own code makes of weights when it loads them is PEFT's difference too
        merged.save_pretrained(folder / f"{adapter}-peft")
        worst, difference = _worst(found, _tensors(_load(model_class, folder / f"{adapter}-peft")))
    changed = sum(_difference(start[name], tensor) > 1e-4 for name, tensor in expected.items())
    is_right = difference <= TOLERANCE and changed > 0
    row: Row = {"result": "right" if is_right else "wrong", "difference": difference, "changed": changed}
    if is_right:
        return row
    if (why := _why_not_pefts_either(model_class, folder, path, expected)) is not None:
        return {"result": "PEFT", "why": why}
    return {**row, "why": f"{worst} differs"}


def _why_not_pefts_either(model_class: Any, folder: Path, path: Path, expected: dict[str, torch.Tensor]) -> str | None:
    """What keeps PEFT from making the model of the file that it wrote of it, if anything does."""
    try:
        loaded = PeftModel.from_pretrained(_load(model_class, folder / "base"), str(path)).merge_and_unload()
        worst, difference = _worst(_tensors(loaded), expected)
    except Exception as error:
        return f"does not load what it saved: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return f"loads another {worst} than it saved" if difference > TOLERANCE else None


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().float() for name, tensor in model.state_dict().items()}


def _load(model_class: Any, folder: Path) -> nn.Module:
    torch.manual_seed(2)  # of what the checkpoint has not
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def _save_adapter(model: nn.Module, config: LoraConfig, path: Path) -> PeftModel:
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    try:
        adapted.save_pretrained(path)
    except NotImplementedError:  # a model that does not tell its embeddings, whose own weights PEFT would save too
        adapted.save_pretrained(path, save_embedding_layers=False)
    return adapted


def _worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[str, float]:
    differences = {name: _difference(found[name], tensor) for name, tensor in expected.items()}
    worst = max(differences, key=differences.__getitem__)
    return worst, differences[worst]


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the greatest entry; entries that are the same, NaN and infinity among them, differ by nothing."""
    if one.shape != other.shape:
        return float("inf")
    differing = torch.where((one == other) | (one.isnan() & other.isnan()), 0, (one - other).abs())
    greatest = float(differing.max()) if differing.numel() else 0.0
    return greatest / max(float(other[other.isfinite()].abs().max()), 1e-30) if greatest else 0.0


def _tied(model: Any) -> set[str]:
    """LoRA on one of several modules that are one changes all of them when PEFT merges it, which is another model."""
    return set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())


def _on_layers(model: Any) -> LoraConfig | None:
    tied = _tied(model)
    kind = getattr(model.config, "model_type", None)
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in LAYERS and getattr(module, "groups", 1) == 1 and f"{name}.weight" not in tied and name
        if kind not in MAMBAS or name.rpartition(".")[2] not in ("out_proj", "conv1d")
    ]
    return LoraConfig(r=2, lora_alpha=3, target_modules=names) if names else None


def _on_embedding(model: Any) -> LoraConfig | None:
    linear = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D) and name]
    layers = [name for name in linear if f"{name}.weight" not in _tied(model)]
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    names = [name for name, module in model.named_modules() if module is embedding and name]
    inside = [name for name in layers if not any(f"{name}.".startswith(f"{other}.") for other in names)]
    return LoraConfig(r=2, target_modules=inside[:1], modules_to_save=names[:1]) if inside and names else None


ADAPTERS: Final[dict[str, Callable[[Any], LoraConfig | None]]] = {"layers": _on_layers, "embedding": _on_embedding}


class _blaming:
    """Any error inside becomes one of another kind, its message in a line."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            text = str(error).strip().splitlines() or [""]
            raise self.kind(f"{type(error).__name__}: {text[0][:200]}") from error


# ---- all of them ----


def sweep(path: Path, only: list[str] | None = None, fresh: bool = False) -> Iterator[Row]:
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}
    old = json.loads(path.read_text()) if path.exists() and not fresh else {}
    rows: list[Row] = old.get("rows", []) if old.get("versions") == versions else []
    again = {row["architecture"] for row in rows if row["result"] in ("wrong", "refused", "crash")}
    rows = [row for row in rows if row["architecture"] not in again]
    known = {row["architecture"] for row in rows}
    for kind, class_names in architectures():
        if kind in known or (only and kind not in only):
            continue
        new = [{"architecture": kind, **row} for row in _in_a_child(kind, class_names)]
        rows += new
        text = ",\n".join(json.dumps(row) for row in rows)
        with written_beside(path) as beside:
            beside.write_text(f'{{"versions": {json.dumps(versions)}, "rows": [\n{text}\n]}}\n')
        yield from new


def _in_a_child(kind: str, class_names: list[str]) -> list[Row]:
    """So that what a model does to the process, or that it never ends, is its own affair."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rows.json")
        child = os.fork()
        if not child:
            code = 1
            try:
                signal.alarm(SECONDS)
                resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                result.write_text(json.dumps(merge_one(kind, class_names, Path(folder))))
                code = 0
            except BaseException:
                Path(folder, "error").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if result.exists() and status == 0:
            return list(json.loads(result.read_text()))
        error = Path(folder, "error")
        why = (
            error.read_text().strip().splitlines()[-1]
            if error.exists()
            else f"killed by {-os.waitstatus_to_exitcode(status)}"
        )
        return [{"adapter": name, "result": "crash", "why": why} for name in ADAPTERS]


def table(rows: list[Row]) -> str:
    lines = [
        "| adapter | right | refused | wrong | of | PEFT fails | not tiny |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for name in ADAPTERS:
        count = collections.Counter(row["result"] for row in rows if row["adapter"] == name)
        wrong = count["wrong"] + count["crash"]
        tried = count["right"] + count["refused"] + wrong
        figures = (count["right"], count["refused"], wrong, tried, count["PEFT"], count["not tiny"])
        lines.append(f"| {name} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, as configurations have them")
    parser.add_argument("--fresh", action="store_true", help="make all rows again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for row in sweep(options.out, options.only, options.fresh):
        print(*(f"{row[name]}" for name in ("architecture", "adapter", "result")), row.get("why", ""), flush=True)
    print(table(json.loads(options.out.read_text())["rows"]))


if __name__ == "__main__":
    sys.exit(main())
