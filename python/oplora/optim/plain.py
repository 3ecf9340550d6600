"""The parameters that are no adapter's (biases, modules_to_save): torch.optim.AdamW steps them, in the same call."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OPLoRATypeError

__all__ = ["Plain"]

NUMBERS = ("lr", "betas", "eps", "weight_decay")


class Plain:
    """torch.optim.AdamW over some of the parameters of each group, with the state of the optimizer around it."""

    def __init__(self) -> None:
        self.of_groups: list[list[nn.Parameter]] = []
        self._inner: torch.optim.AdamW | None = None

    def hold(self, of_groups: Sequence[list[nn.Parameter]]) -> None:
        """Which of each group's parameters."""
        self.of_groups, self._inner = list(of_groups), None

    def __iter__(self) -> Any:
        return (p for some in self.of_groups for p in some)

    def gradients(self) -> list[Tensor]:
        """Raises for sparse ones, which torch's AdamW would refuse when others have been stepped."""
        gradients = [p.grad for p in self if p.grad is not None]
        for gradient in gradients:
            if gradient.layout != torch.strided:
                raise OPLoRATypeError(
                    f"oplora: the gradient of a parameter outside the adapters, of shape {tuple(gradient.shape)}, is "
                    f"sparse ({gradient.layout}), which AdamW does not step. Build the embedding with sparse=False. "
                    "Nothing was changed."
                )
        return gradients

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
                state[p] = {"step": torch.tensor(0.0), **zeros}

    def step(self, groups: Sequence[dict[str, Any]], state: Any) -> None:
        if (inner := self._with_numbers(groups)) is not None:
            inner.state = state
            inner.step()

    def step_on_device(self, groups: Sequence[dict[str, Any]], state: Any, verdict: Tensor | None) -> None:
        """As step(), by torch's fused AdamW, which leaves everything as it is where found_inf is 1."""
        if (inner := self._with_numbers(groups)) is None:
            return
        inner.state = state
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
        for inner, (group, _) in zip(self._inner.param_groups, held, strict=True):
            inner.update({name: group[name] for name in NUMBERS})
        return self._inner
