"""diffusers' format: one file for all components of a pipeline, read by pipeline.load_lora_weights.

Without metadata diffusers takes alpha = r for every layer, and programs that read its files ignore the metadata. So the
scale is folded into B, and the file means the same to all.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from torch import Tensor

from ...errors import OPLoRATypeError
from .layers import COMPONENTS, Component, LoRALayer, path_in_file
from .saving import place, write_file

__all__ = ["FILE", "save"]

FILE: Final = "pytorch_lora_weights.safetensors"


def save(components: Iterable[Component], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for component in components:
        if component.name not in COMPONENTS:
            raise OPLoRATypeError(
                f"oplora.save_adapter: diffusers loads no layers of {component.name} from a file; it loads those of "
                f'{", ".join(COMPONENTS)}. Save it apart: with format="peft", or Wan\'s second transformer as '
                "{'transformer': pipeline.transformer_2}, for load_lora_weights(..., load_into_transformer_2=True)."
            )
        for layer in component.layers:
            tensors |= _tensors(component.name, layer)
    write_file(tensors, {"format": "pt"}, place(path, FILE))


def _tensors(component: str, layer: LoRALayer) -> dict[str, Tensor]:
    is_text = component.startswith("text_encoder")
    name = path_in_file(component, layer.name)
    tensors = {f"{component}.{name}.lora_A.weight": layer.lora_A, f"{component}.{name}.lora_B.weight": layer.folded()}
    if layer.magnitude is not None:
        # transformers loads the text encoder's, diffusers the rest, and each wants its own name for it
        key = f"{component}.{name}.lora_magnitude_vector{'.weight' if is_text else ''}"
        tensors[key] = layer.magnitude_of_peft()
    return tensors
