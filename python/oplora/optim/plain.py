"""The parameters that are no adapter's (biases, modules_to_save): torch.optim.AdamW steps them, in the same call."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import divided_like, gradient_here, here, is_divided
from ..errors import OPLoRATypeError

__all__ = ["Plain", "placed_like"]

NUMBERS = ("lr", "betas", "eps", "weight_decay")


class Plain:
    """torch.optim.AdamW over some of the parameters of each group, with the state of the optimizer around it.

    Of DTensors it steps what this process has, as ordinary tensors: torch's kernels take no mixture of both.
    """

    def __init__(self) -> None:
        self.of_groups: list[list[nn.Parameter]] = []
        self._inner: torch.optim.AdamW | None = None
        self._is_divided = False

    def hold(self, of_groups: Sequence[list[nn.Parameter]]) -> None:
        """Which of each group's parameters."""
        self.of_groups, self._inner = list(of_groups), None
        self._is_divided = any(is_divided(p) for some in of_groups for p in some)

    def __getstate__(self) -> dict[str, Any]:
        """Without the optimizer that steps them, which has the state in it: a copy makes its own."""
        return {**self.__dict__, "_inner": None}

    def __iter__(self) -> Any:
        return (p for some in self.of_groups for p in some)

    def gradients(self) -> list[Tensor]:
        """Of what is here, but for those without a number in them. Raises for sparse ones, which torch's AdamW would
        refuse when others have been stepped."""
        found = map(gradient_here, self) if self._is_divided else (p.grad for p in self)
        gradients = [g for g in found if g is not None and g.numel()]
        for gradient in gradients:
            if gradient.layout != torch.strided:
                raise OPLoRATypeError(
                    f"oplora: the gradient of a parameter outside the adapters, of shape {tuple(gradient.shape)}, is "
                    f"sparse ({gradient.layout}), which AdamW does not step. Build the embedding with sparse=False. "
                    "Nothing was changed."
                )
        return gradients

    def norms(self, counted: Callable[[nn.Parameter], bool] | None) -> list[Tensor]:
        """Of the gradients that are here, of all parameters or of those that are counted here."""
        gradients = self.gradients()
        if counted is not None:
            some = [gradient_here(p) for p in self if counted(p)]
            gradients = [g for g in some if g is not None and g.numel()]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in gradients]
        return list(torch._foreach_norm([g.double() for g in real])) if real else []

    def nonfinite(self) -> list[str]:
        gradients = self.gradients()
        if not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients, float("inf")))).all()):
            return []
        return ["parameters outside the adapters (biases, modules_to_save)"]

    def verdict(self, device: torch.device) -> Tensor | None:
        """1 (int32) if a gradient is not finite, else 0; None if there is no gradient. Nothing waits for it."""
        if not (gradients := self.gradients()):
            return None
        norms = [norm.float() for norm in torch._foreach_norm(gradients, float("inf"))]
        finite = torch.stack([norm.to(device, non_blocking=True) for norm in norms]).isfinite().all()
        return finite.logical_not().to(torch.int32).view(1)

    def begin(self, state: dict[Any, Any]) -> None:
        """AdamW's state of every trainable parameter, as its first step would make it: who reads or saves the
        optimizer's state before then finds all of it."""
        for p in self:
            if p.requires_grad and not state.get(p) and not p.is_meta:
                zeros = {
                    key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in ("exp_avg", "exp_avg_sq")
                }
                # whatever torch's defaults are now: bfloat16 counts to 256
                state[p] = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu"), **zeros}

    def step(self, groups: Sequence[dict[str, Any]], state: Any) -> None:
        if (inner := self._with_numbers(groups)) is not None:
            inner.state = self._state_of(inner, state)
            inner.step()

    def step_on_device(self, groups: Sequence[dict[str, Any]], state: Any, verdict: Tensor | None) -> None:
        """As step(), by torch's fused AdamW, which leaves everything as it is where found_inf is 1."""
        if (inner := self._with_numbers(groups)) is None:
            return
        inner.state = state = self._state_of(inner, state)
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for group in inner.param_groups:
            group["capturable"] = group["capturable"] or capturing
            if not group["fused"]:  # made on the CPU, or for it: counts of steps are kept beside the parameters now
                group.update(fused=True, foreach=False)
                self._move_counts(group["params"], state)
        inner.found_inf = None if verdict is None else verdict.float().view(())  # type: ignore[attr-defined]
        inner.step()

    def _move_counts(self, parameters: Iterable[nn.Parameter], state: Any) -> None:
        for parameter in parameters:
            saved = state.get(parameter, {})
            if isinstance(saved.get("step"), Tensor):
                saved["step"] = saved["step"].to(parameter.device, torch.float32)

    def _with_numbers(self, groups: Sequence[dict[str, Any]]) -> torch.optim.AdamW | None:
        held = [(group, some) for group, some in zip(groups, self.of_groups, strict=True) if some]
        if not held:
            return None
        if self._inner is None:
            self._inner = torch.optim.AdamW([{"params": list(some)} for _, some in held])
        if self._is_divided:
            for inner, (_, some) in zip(self._inner.param_groups, held, strict=True):
                inner["params"] = [_stand_in(p) for p in some]
        for inner, (group, _) in zip(self._inner.param_groups, held, strict=True):
            inner.update({name: group[name] for name in NUMBERS})
        return self._inner

    def _state_of(self, inner: torch.optim.AdamW, state: Any) -> Any:
        """What inner steps with: of DTensors what is here of their state."""
        if not self._is_divided:
            return state
        self.begin(state)  # also of those that were unfrozen since
        stand_ins = (p for group in inner.param_groups for p in group["params"])
        own = ({name: here(value) for name, value in state.get(p, {}).items()} for p in self)
        return defaultdict(dict, zip(stand_ins, own, strict=True))


def placed_like(parameter: nn.Parameter, held: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a parameter that has become a DTensor, divided as it is."""
    if not is_divided(parameter):
        return held
    return {
        name: divided_like(parameter, value)
        if name != "step" and isinstance(value, Tensor) and not is_divided(value)
        else value
        for name, value in held.items()
    }


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """An ordinary Parameter over what this process has of one, with its gradient."""
    stand_in = nn.Parameter(here(parameter.detach()), requires_grad=parameter.requires_grad)
    gradient = gradient_here(parameter)
    if gradient is not None and gradient.dtype != stand_in.dtype:
        stand_in.grad_dtype = None
    stand_in.grad = gradient
    return stand_in
