"""What oplora.AdamW asks of its arguments and of the machine, before anything is made."""

import torch

from .device import free_memory, require_kernels, runs_on_device
from .errors import OPLoRAMemoryError, OPLoRATypeError, OPLoRAValueError
from .exact import ExactState
from .factors import Factors
from .lean import LeanState
from .start import Settings

__all__ = [
    "W2_STARTS",
    "check_arguments",
    "check_generator_device",
    "check_positive",
    "refuse_devices",
    "refuse_more_than_memory",
]

W2_STARTS = {"lean": "sign", "exact": "uniform"}  # of W2, by state, unless the user says otherwise


def check_arguments(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ratio: float,
    state: str,
    weight_rank: int,
    moment_rank: int,
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("hidden_lr_ratio", ratio)):
        if not 0 <= float(value) < float("inf"):
            raise OPLoRAValueError(f"oplora.AdamW: {name} is {value!r}, expected a number of at least 0.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise OPLoRAValueError(f"oplora.AdamW: betas are {betas!r}, expected two numbers in [0, 1).")
    if state not in W2_STARTS:
        raise OPLoRAValueError(f"oplora.AdamW: state is {state!r}, expected {' or '.join(map(repr, W2_STARTS))}.")
    for name, rank in (("weight_rank", weight_rank), ("moment_rank", moment_rank)):
        if not isinstance(rank, int) or not 1 <= rank <= 8:
            raise OPLoRAValueError(f"oplora.AdamW: {name} is {rank!r}, expected a whole number from 1 to 8.")


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


def refuse_devices(factors: list[Factors], precondition: float | None) -> None:
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


def refuse_more_than_memory(factors: list[Factors], settings: Settings, state: str, ranks: tuple[int, int]) -> None:
    """Before anything is allocated: the system may grant more than it has and kill the process later."""
    needed: dict[torch.device, int] = {}
    for f in factors:
        lean = state == "lean"
        some = LeanState.bytes_needed(f, settings, ranks) if lean else ExactState.bytes_needed(f, settings)
        needed[f.device] = needed.get(f.device, 0) + some
    for device, bytes_needed in needed.items():
        if bytes_needed <= (memory := free_memory(device)):
            continue
        if state == "lean":
            advice = f"State 'lean' takes {4 * ranks[0] + 2 * ranks[1] + 6} bytes a factor entry: lower the rank r"
        else:
            advice = (
                "State 'exact' takes 12 (hidden_width + 1) bytes a factor entry: use state='lean', or lower "
                f"hidden_width (now {settings.hidden_width}) or the rank r"
            )
            advice += ", or pass generator_device='cpu'" if runs_on_device(device) else ""
        has = "this machine has" if device.type == "cpu" else f"{device} has free"
        raise OPLoRAMemoryError(
            f"oplora.AdamW: the generators need {bytes_needed / 2**30:.1f} GiB, {has} {memory / 2**30:.1f} GiB. "
            f"{advice}."
        )
