"""Export of trained adapters: from_model or from_disk reads layers, and a module a format writes them."""

import os
from pathlib import Path
from typing import Any, Final

from ...errors import OPLoRAFileError, OPLoRAValueError
from . import diffusers, from_disk, from_model, kohya, peft

__all__ = ["export_adapter", "save_adapter"]

PEFTS: Final = ("peft", "plain")
SAVERS: Final = {"diffusers": diffusers.save, "kohya": kohya.save}


def save_adapter(model: Any, path: str | os.PathLike[str], format: str = "peft") -> None:
    """Writes the adapter as a file that other programs load; nothing of the generators is in it.

    Args:
        model: a PeftModel; a model with an injected adapter (transformers' and diffusers' add_adapter); a diffusers
            pipeline; or a mapping of names to such models, {"unet": unet, "text_encoder": text_encoder}.
        path: the folder to write; files of the same names in it are replaced, each in one move once all are written.
            It may be the file itself, NAME.safetensors, where there is one adapter; in "peft" and "plain" its header
            then holds the configuration.
        format: "peft": adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained. Adapters with
            a name other than "default" go into a subfolder of that name, as PEFT does; the components of a pipeline or
            mapping into one each.
            "plain": the same for readers that take lora_alpha for all layers, as llama.cpp's converter: rank and alpha
            are one number, and what rsLoRA, alpha_pattern and rank_pattern make of them is folded into B.
            "diffusers": pytorch_lora_weights.safetensors, for pipeline.load_lora_weights. The scale is folded into B
            (alpha = r).
            "kohya": pytorch_lora_weights_kohya.safetensors, for ComfyUI, sd-scripts and others, of Stable Diffusion 1.x
            and 2.x, SDXL and Flux.
            The last two hold LoRA and DoRA on linear and convolutional layers, of the adapter that is active.

    A process that is killed leaves each adapter as it was or new. Where PEFT's configuration changes there is a
    moment, of three system calls, in which PEFT refuses the folder; a kill then leaves the new adapter in its
    `.oplora-*` folder.

    Raises:
        OPLoRAError: an unknown format, a model without adapter, merged layers, an adapter that the format cannot hold,
            or a folder that cannot be written; what was there before is untouched then.
    """
    path = _expanded(path)
    if format in SAVERS:
        SAVERS[format](from_model.read_components(model), path)
    elif format in PEFTS:
        parts = from_model.components_of(model)
        if path.suffix == ".safetensors" and len(parts) > 1:
            raise OPLoRAValueError(
                f"oplora.save_adapter: a file in PEFT's format holds the adapter of one model, and here are "
                f'{", ".join(parts)}. Give a folder, or format="diffusers".'
            )
        for name, component in parts.items():
            place = path if path.suffix == ".safetensors" else path / name
            peft.save(component, place, is_plain=format == "plain")
    else:
        known = ", ".join(map(repr, [*PEFTS, *SAVERS]))
        raise OPLoRAValueError(f"oplora.save_adapter: format is {format!r}, expected one of {known}.")


def _expanded(path: str | os.PathLike[str]) -> Path:
    expanded = Path(os.path.expanduser(path))
    if "\0" in str(expanded):
        raise OPLoRAFileError(f"{str(expanded)!r} is no usable path: it has a NUL in it.")
    return expanded


def export_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
) -> None:
    """What `python -m oplora export` does: an adapter on disk, in another format.

    Args:
        source, base, component: as for from_disk.read_components.
        out: the folder to write, or a .safetensors file.
        format: "peft", "plain", "diffusers" or "kohya". "plain" is made of PEFT's folders and of files that
            save_adapter wrote, of any model; "peft" makes a folder of such a file, and the other way round.
    """
    source, out = _expanded(source), _expanded(out)
    has_place = base is not None or component is not None
    if format == "plain" and has_place:
        raise OPLoRAValueError("--base and --component say nothing to format plain, which keeps the layers' names.")
    if format == "plain" or (format == "peft" and not has_place and peft.is_one(source)):
        peft.save_copies(source, out, is_plain=format == "plain")
        return
    components = from_disk.read_components(source, None if base is None else _expanded(base), component)
    if format == "peft":
        peft.save_components(components, out)
    else:
        SAVERS[format](components, out)
