"""What is between the sources and the formats: the adapted layers, whatever their keys are called in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import OPLoRATypeError, OPLoRAValueError
from ..peft_adapter import CHANGED_BASE
from ..tensor_file import StoredTensor, read_tensor_file

__all__ = [
    "COMPONENTS",
    "BaseWeights",
    "Component",
    "LoRALayer",
    "component_name",
    "kind_in",
    "path_in_file",
    "refuse_extras",
    "refuse_no_pair",
]

# a component's place in a pipeline, by its class: what a bare module is called in a file
NAMES: Final = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


FACTOR_DTYPES: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoRALayer:
    """One adapted layer: y = W0 x + scaling * B (A x), and with DoRA m / ||W0 + scaling * B A|| times that.

    Tensors are on the CPU, contiguous, and share no memory with the model; float32, or float64 if they were trained so.
    """

    name: str  # of the module in its component: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    lora_A: Tensor  # (r, in_features), or (r, in_channels, height, width)
    lora_B: Tensor  # (out_features, r), or (out_channels, r, 1, 1)
    scaling: float  # alpha / r, or alpha / sqrt(r)
    magnitude: Tensor | None = None  # DoRA's m, (out_features,)
    base_norm: Tensor | None = None  # DoRA: ||W0|| of each row, (out_features,)
    norm: Tensor | None = None  # DoRA: ||W0 + scaling * B A|| of each row, (out_features,)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def folded(self) -> Tensor:
        """scaling * B: with it the layer is one of alpha = r."""
        return self.lora_B * self.scaling

    def magnitude_of_peft(self) -> Tensor:
        """m in the shape that PEFT's layers have it in."""
        assert self.magnitude is not None
        return self.magnitude.view((1, -1, 1, 1) if self.lora_A.dim() == 4 else (-1,))


# the parts of a pipeline whose layers diffusers loads from a file; others' it leaves out without a word
COMPONENTS: Final = (
    *("unet", "transformer", "text_encoder", "text_encoder_2"),
    *("transformer_ref", "connectors", "text_conditioner"),  # of MiniMax-H3, LTX-2 and Anima
)


@dataclass(frozen=True)
class Component:
    name: str  # its place in a pipeline: "unet", "transformer", "text_encoder", "text_encoder_2"
    layers: tuple[LoRALayer, ...]
    kind: str  # the class of the module: "UNet2DConditionModel"; "" where a file does not tell
    config: Mapping[str, Any]  # of the module, as diffusers and transformers write it; may be empty


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a part of a pipeline on disk."""

    folder: Path
    tensors: Mapping[str, tuple[Path, StoredTensor]]

    @classmethod
    def of(cls, folder: Path) -> "BaseWeights":
        files = [read_tensor_file(path) for path in sorted(folder.glob("*.safetensors"))]
        return cls(folder, {tensor.name: (file.path, tensor) for file in files for tensor in file.tensors})

    def find(self, layer: str) -> tuple[Path, StoredTensor] | None:
        """The weight of a layer, whose path has a level more or less in some versions of transformers."""
        names = (layer, f"text_model.{layer}", layer.removeprefix("text_model."))
        return next((self.tensors[f"{n}.weight"] for n in names if f"{n}.weight" in self.tensors), None)

    def check(self, layer: LoRALayer) -> tuple[Path, StoredTensor]:
        """The weight of a layer, which is there and of its shape."""
        found = self.find(layer.name)
        what = f"the adapter's layer {layer.name}"
        if found is None:
            raise OPLoRAValueError(
                f"{self.folder} has no weight for {what}. The adapter was trained on another architecture."
            )
        there, wanted = found[1].shape, (layer.lora_B.shape[0], *layer.lora_A.shape[1:])
        if there != wanted:
            raise OPLoRAValueError(
                f"{self.folder}: {what} is for a weight of shape {wanted}, and there it is {there}. The adapter was "
                "trained on another architecture."
            )
        return found

    def norms(self, layer: LoRALayer) -> tuple[Tensor, Tensor]:
        """||W0|| and ||W0 + scaling * B A|| of each row."""
        found = self.check(layer)
        with safe_open(found[0], "pt") as file:
            weight = file.get_tensor(found[1].name).to(layer.lora_A.dtype).flatten(1)
        return weight.norm(dim=1), (weight + layer.folded().flatten(1) @ layer.lora_A.flatten(1)).norm(dim=1)


def kind_in(config: Mapping[str, Any]) -> str:
    """The class of a part of a pipeline, as its config.json has it; "" where it does not tell."""
    listed = config.get("architectures")
    kind = config.get("_class_name") or (listed[0] if isinstance(listed, list) and listed else "")
    return kind if isinstance(kind, str) else ""


def component_name(kind: str) -> str:
    """The place of a class in a pipeline."""
    if kind in NAMES or "Transformer2D" in kind or "Transformer3D" in kind:
        return NAMES.get(kind, "transformer")
    raise OPLoRAValueError(
        f"oplora.save_adapter: a {kind or 'model of unknown class'} has no place of its own in a diffusers pipeline; "
        f"known are {', '.join(NAMES)} and transformers. Name it, as in save_adapter({{'transformer': m}}, ...), "
        'or take format="peft".'
    )


def path_in_file(component: str, name: str) -> str:
    """A module's path as files have it: a level of CLIP's text encoders that transformers 5 left out is in them."""
    if component.startswith("text_encoder") and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def refuse_no_pair(where: Path, name: str, A: Tensor | None, B: Tensor | None, r: int | None = None) -> None:
    """Tensors from a file that are no LoRA of one layer, or not of rank r, where its configuration tells one."""
    if A is None or B is None:
        raise OPLoRAValueError(f"{where}: layer {name} has no lora_{'A' if A is None else 'B'}. The file is not whole.")
    for what, tensor in (("lora_A", A), ("lora_B", B)):
        if tensor.dtype not in FACTOR_DTYPES:
            raise OPLoRATypeError(
                f"{where}: {what} of layer {name} is {str(tensor.dtype).removeprefix('torch.')}, expected floats of 16 "
                "bits or more. Save the adapter in float32."
            )
    # B has less columns than A has rows in a convolution in groups
    fits = A.dim() == B.dim() > 1 and A.numel() > 0 < B.numel() and len(A) % B.shape[1] == 0
    if not fits or r not in (None, len(A)):
        raise OPLoRAValueError(
            f"{where}: layer {name} has lora_A of shape {tuple(A.shape)} and lora_B of {tuple(B.shape)}"
            f"{f', with rank {r} in its configuration' if r else ''}. They do not go together."
        )


def refuse_extras(where: str, config: Any) -> None:
    """What an adapter's configuration says of tensors that have no place beside A and B, or of another base."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise OPLoRATypeError(
            f"oplora.save_adapter: {where} started from init_lora_weights={start!r}, which changed the base's "
            'weights, so its factors do not fit the base that others have. Save it with format="peft".'
        )
    extras = {
        "modules_to_save": getattr(config, "modules_to_save", None),
        "lora_bias": getattr(config, "lora_bias", False),
    }
    if getattr(config, "bias", "none") != "none":
        extras["bias"] = config.bias
    for name, value in extras.items():
        if value:
            raise OPLoRATypeError(
                f"oplora.save_adapter: {where} was trained with {name}={value!r}, for which diffusers' and kohya's "
                'files have no place. Save it with format="peft".'
            )
