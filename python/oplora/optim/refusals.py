"""What oplora.AdamW refuses: arguments and devices before anything is made, and steps that would train nothing."""

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Final

import torch
from torch import nn

from ..adapters import AdaptedLayer, foreign_gradient, foreign_tensors
from ..engines import Factors
from ..errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError, warn
from ..kernels import require_kernels, runs_on_device

__all__ = [
    "Unstepped",
    "check_generator_device",
    "check_positive",
    "place_of_divided",
    "refuse_devices",
    "refuse_foreign_adapter",
    "refuse_mixed",
]

HOST_MEMORY: Final = torch.device("cpu")
_requires_grad = attrgetter("requires_grad")


def check_positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < float("inf")):
            raise OPLoRAValueError(f"oplora.AdamW: {name} is {value!r}, expected a number above 0, or None.")


def check_generator_device(device: str | torch.device | None, state: str) -> torch.device | None:
    if device is None:
        return None
    if torch.device(device).type != "cpu":
        raise OPLoRAValueError(
            f"oplora.AdamW: generator_device is {device!r}, expected 'cpu', or None: beside the factors."
        )
    if state != "exact":
        raise OPLoRAValueError(
            "oplora.AdamW: generator_device='cpu' is for state='exact', whose size asks for it. State 'lean' is as "
            "small as LoRA's: leave generator_device out."
        )
    return torch.device(device)


def refuse_devices(factors: Sequence[Factors], precondition: float | None) -> None:
    for f in factors:
        if f.device.type != "cpu" and not runs_on_device(f.device):
            raise OPLoRATypeError(
                f"oplora.AdamW: the factors of layer {f.layer.name} are on {f.device}; the fused step runs on CPU and "
                "CUDA tensors. Use oplora.create_oplora_optimizer(model, torch.optim.AdamW, lr=...): it trains the "
                "same generators on any device."
            )
        if runs_on_device(f.device) and f.dtype != torch.float32:
            raise OPLoRATypeError(
                f"oplora.AdamW: the factors of layer {f.layer.name} are {f.dtype} on {f.device}, where the fused step "
                "takes float32, bfloat16 and float16. Convert the adapter, or use oplora.create_oplora_optimizer."
            )
        halves = any(p.dtype == torch.float16 for p in f.layer.parameters())
        if runs_on_device(f.device) and precondition is not None and halves:
            raise OPLoRATypeError(
                f"oplora.AdamW: the factors of layer {f.layer.name} are float16, whose range preconditioned gradients "
                "pass. Convert the adapter to float32 or bfloat16, or leave precondition out."
            )
    if runs_on_device(factors[0].device):
        require_kernels(factors[0].device)
    if len({runs_on_device(f.device) for f in factors}) > 1:
        raise OPLoRATypeError(
            "oplora.AdamW: some layers' factors are on the CPU and some on a GPU; the step runs on one kind. Move the "
            "adapter to one of them."
        )


def place_of_divided(layers: Sequence[AdaptedLayer], asked: torch.device | None) -> torch.device | None:
    """Where generators are whose layers' rows processes divide: the kernels of a GPU want whole layers, so there they
    are in host memory."""
    if asked is not None or not runs_on_device(layers[0].parameters()[0].device):
        return asked
    warn(
        "oplora: the factors are divided among processes (FSDP2, tensor parallelism). The generators of presets "
        "'paper' and 'flat' are kept in host memory then, and the CPU steps them. Preset 'auto' steps on the GPU."
    )
    return HOST_MEMORY


def refuse_mixed(layers: Sequence[AdaptedLayer], groups: Sequence[dict[str, Any]]) -> None:
    """Raises where tensors of one generator are in groups of other betas or eps: they share their moments."""
    if len({(tuple(group["betas"]), float(group["eps"])) for group in groups}) == 1:
        return
    group_of = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
    for layer in layers:
        first, *others = (group_of[id(p)] for p in layer.parameters())
        for g, tensor in zip(others, layer.tensors[1:], strict=True):
            for name in ("betas", "eps"):
                ours, theirs = groups[g][name], groups[first][name]
                if (tuple(ours) != tuple(theirs)) if name == "betas" else (ours != theirs):
                    raise OPLoRAValueError(
                        f"oplora.AdamW: {tensor} of layer {layer.name} is in parameter group {g} with {name} {ours}, "
                        f"{layer.tensors[0]} in group {first} with {theirs}. Tensors of one generator share its "
                        "moments: give their groups the same; rates and decays may differ."
                    )


def refuse_foreign_adapter(model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Raises where another adapter than the optimizer's has gradients, and none of its own: nobody is to train nothing
    unawares."""
    if (other := foreign_gradient(model, layers)) is not None:
        raise OPLoRARuntimeError(
            f"oplora: none of this optimizer's factors has a gradient, but adapter {other!r} has: it was added or "
            "made active after the optimizer. Make one for it, oplora.AdamW(model, adapter_name="
            f"{other!r}), or go back with model.set_adapter({layers[0].adapter!r}). Nothing was changed."
        )


class Unstepped:
    """Parameters of the model that are in no group, as they were frozen when the optimizer was made from the model. One
    that has a gradient later is not trained, as with any optimizer; here somebody hears of it."""

    def __init__(self, model: nn.Module, adapter_name: str | None, held: Iterable[nn.Parameter]) -> None:
        taken = {id(p) for p in held} | {id(p) for p in foreign_tensors(model, adapter_name)}
        self._frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in taken]
        self._model = model

    def warn(self, groups: Sequence[dict[str, Any]]) -> None:
        """Once, where there is one that nobody has put into a group since."""
        if not any(map(_requires_grad, self._frozen)):
            return
        held = {id(p) for group in groups for p in group["params"]}
        self._frozen = [p for p in self._frozen if id(p) not in held]
        found = {id(p) for p in self._frozen if p.requires_grad and p.grad is not None}
        names = [name for name, p in self._model.named_parameters() if id(p) in found]
        if not names:
            return
        self._frozen = []
        warn(
            f"oplora: {len(names)} parameters have gradients that this optimizer does not step ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}): they were frozen when it was made. Give them to it, "
            "optimizer.add_param_group({'params': [...]}), make the optimizer after unfreezing, or make it from "
            "model.parameters(), which torch's optimizers step as soon as they have gradients."
        )
