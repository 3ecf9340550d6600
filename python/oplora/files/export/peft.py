"""PEFT's own format, written by PEFT and moved into place when it is whole.

A process that is killed on the way leaves the old adapter or the new one. Config and weights are two files, so where
the old config differs from the new one there is none for a moment, in which PEFT refuses the folder.
"""

import copy
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...adapters import unwrapped
from ...errors import OPLoRAFileError, OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError, warn
from .. import atomic
from ..peft_adapter import CONFIG, KEY_PREFIX, METADATA, WEIGHTS, read_fields
from ..tensor_file import read_tensor_file
from . import plain
from .layers import Component
from .saving import write_file, writing

__all__ = ["is_one", "save", "save_components", "save_copies"]

CARD: Final = "README.md"


def save(model: nn.Module, path: Path, *, is_plain: bool = False) -> None:
    """Every adapter of a PeftModel, or of a model that it was injected into; into a .safetensors file its only one.

    is_plain: with every scale folded into B, as plain.fold does.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = unwrapped(model)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    if not isinstance(model, PeftModel) and not (layers and getattr(model, "peft_config", None)):
        raise OPLoRATypeError(
            f"oplora.save_adapter: {type(model).__name__} has no adapter. Add one with peft.get_peft_model or "
            "add_adapter."
        )
    for name, layer in layers:
        if layer.merged:
            raise OPLoRARuntimeError(
                f"oplora.save_adapter: layer {name} is merged into its base. Call model.unmerge_adapter() first."
            )
    configs: Mapping[str, Any] = model.peft_config  # type: ignore[assignment]
    if not is_plain:
        _warn_of_scales(configs)

    def write(folder: str) -> None:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder)
        else:
            _save_injected(model, folder)
        if is_plain:
            plain.fold(Path(folder))

    if path.suffix == ".safetensors":
        _write_file(path, write, list(configs))
    else:
        _write_folder(path, write)


def save_copies(source: Path, path: Path, *, is_plain: bool) -> None:
    """What lies in PEFT's format already: a folder, a folder of them, or a file that stands alone."""
    sources = _adapters_in(source)
    if not sources:
        raise OPLoRAFileError(
            f'SOURCE {str(source)!r} holds no {CONFIG}, and format "plain" is made of PEFT\'s folders and files. Make '
            "one of it first: --format peft."
        )
    for adapter in sources:

        def write(new: str, adapter: Path = adapter) -> None:
            _copy(adapter, Path(new))
            if is_plain:
                plain.fold(Path(new), adapter)

        if path.suffix == ".safetensors":
            _write_file(path, write, [one.name for one in sources])
        else:
            _write_folder(path / adapter.relative_to(source), write)


def is_one(source: Path) -> bool:
    """Whether it is a single adapter in PEFT's format, which no place in a pipeline is asked for."""
    return _adapters_in(source) == [source]


def _adapters_in(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if METADATA in read_tensor_file(source).metadata() else []
    if (source / CONFIG).is_file():
        return [source]
    return [file.parent for file in sorted(source.glob(f"[!.]*/{CONFIG}"))]


def _copy(adapter: Path, new: Path) -> None:
    """As a folder."""
    files = [adapter] if adapter.is_file() else [adapter / CONFIG, adapter / WEIGHTS]
    for file in files:
        if not file.is_file():
            raise OPLoRAFileError(f"{file} is missing or no regular file.")
    weights = read_tensor_file(files[-1])  # says what is wrong with the file
    if adapter.is_file():
        (new / CONFIG).write_text(json.dumps(read_fields(adapter, weights)[1], indent=2, sort_keys=True))
        save_file(load_file(adapter), new / WEIGHTS, {"format": "pt"})
        return
    for file in files:
        shutil.copyfile(file, new / file.name)  # without the modes of a store that is read-only


def save_components(components: Iterable[Component], path: Path) -> None:
    """Adapters that were read from disk, a folder each, with their scales folded into B; a file holds one."""
    components = list(components)
    names = [_names_in_model(component) for component in components]
    for component, own in zip(components, names, strict=True):
        write = partial(_save_component, component, own)
        if path.suffix == ".safetensors":
            _write_file(path, write, [one.name for one in components])
        else:
            _write_folder(path / component.name, write)


def _names_in_model(component: Component) -> list[str]:
    """The layers' paths as the installed transformers has them; files have an earlier one's for text encoders."""
    names = [layer.name for layer in component.layers]
    if not component.name.startswith("text_encoder"):
        return names
    import transformers

    if not component.config:
        raise OPLoRAValueError(
            f"{component.name}: its layers are called otherwise in some versions of transformers. Name the pipeline's "
            "folder with --base, whose configuration tells."
        )
    model_class = getattr(transformers, component.kind)
    with torch.device("meta"):
        there = dict(model_class(model_class.config_class(**component.config)).named_modules())
    return [
        next(n for n in (name, f"text_model.{name}", name.removeprefix("text_model.")) if n in there) for name in names
    ]


def _save_component(component: Component, names: Sequence[str], folder: str) -> None:
    from peft import LoraConfig

    ranks = {name: layer.r for name, layer in zip(names, component.layers, strict=True)}
    r = statistics.mode(ranks.values())
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(names),
        use_dora=any(layer.magnitude is not None for layer in component.layers),
        inference_mode=True,
        auto_mapping={"base_model_class": component.kind} if component.kind else None,
    )
    config.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, layer in zip(names, component.layers, strict=True):
        tensors |= {f"{name}.lora_A.weight": layer.lora_A, f"{name}.lora_B.weight": layer.folded()}
        if layer.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = layer.magnitude_of_peft()
    save_file(_as_of_peft_model(tensors), Path(folder, WEIGHTS), {"format": "pt"})


def _write_folder(path: Path, write: Callable[[str], object]) -> None:
    """What `write` puts into a folder, in `path` when it is whole; what others have there stays."""
    with writing(atomic.files_in(path, CONFIG, _have_same_config), path, path) as new:
        if (path / CARD).is_file():
            shutil.copyfile(path / CARD, new / CARD)  # PEFT adds to the one that is there
        write(str(new))


def _write_file(path: Path, write: Callable[[str], object], adapters: Sequence[str]) -> None:
    """What `write` puts into a folder as one file: the tensors, with the configuration in the header."""
    if len(adapters) != 1:
        raise OPLoRAValueError(
            f"oplora.save_adapter: {path.name} is to hold {len(adapters)} adapters ({', '.join(adapters)}), and a file "
            "holds one. Give a folder: each then goes into a subfolder of its name."
        )
    with tempfile.TemporaryDirectory() as folder:  # what PEFT writes is small beside what it adapts
        write(folder)
        (config,) = Path(folder).rglob(CONFIG)
        tensors = load_file(config.with_name(WEIGHTS))
        text = json.dumps(json.loads(config.read_text()), sort_keys=True)
    write_file(tensors, {"format": "pt", METADATA: text}, path)


def _warn_of_scales(configs: Mapping[str, Any]) -> None:
    """Readers that take lora_alpha alone scale such an adapter wrongly, and none says so."""
    for adapter, config in configs.items():
        names = ("use_rslora", "alpha_pattern", "rank_pattern")
        if found := [name for name in names if getattr(config, name, None)]:
            warn(
                f"oplora.save_adapter: adapter {adapter!r} has {' and '.join(found)}, which PEFT reads. Readers that "
                "take lora_alpha for all layers, as llama.cpp's converter does, scale it wrongly without a word: save "
                'it for them with format="plain".'
            )


def _save_injected(model: Any, folder: str) -> None:
    """What PeftModel.save_pretrained writes for a model that it wraps."""
    from peft import get_peft_model_state_dict

    for adapter, config in model.peft_config.items():
        target = Path(folder, "" if adapter == "default" else adapter)
        target.mkdir(exist_ok=True)
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        save_file(_as_of_peft_model(state), target / WEIGHTS, {"format": "pt"})
        config = copy.copy(config)
        config.inference_mode = True
        if config.task_type is None:  # PEFT looks the model's class up by one or the other
            config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
        config.save_pretrained(str(target))


def _as_of_peft_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{KEY_PREFIX}{key}": tensor.detach().cpu().clone().contiguous() for key, tensor in state.items()}


def _have_same_config(*folders: Path) -> bool:
    """As PEFT reads them: what is a set there lies in the file in another order each run."""
    from peft import PeftConfig

    if not all((folder / CONFIG).is_file() for folder in folders):  # PEFT would ask the hub
        return False
    try:
        one, other = (PeftConfig.from_pretrained(str(folder)) for folder in folders)
    except (ValueError, KeyError, TypeError):  # it is no adapter that lies there
        return False
    return bool(one == other)
