"""AdamW with a generator behind every adapter: the one changed line."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..adapters import find, here, require_pairs
from ..engines import FOUND, Batch
from ..errors import warn
from ..kernels import is_capturing
from .clipping import Clipped, scale_gradients
from .groups import (
    check_defaults,
    highest_share,
    numbers_of,
    refuse_numbers,
    refuse_options,
    seen,
    shares_of,
)
from .presets import preset_of, recipe_of
from .refusals import (
    Unstepped,
    check_generator_device,
    check_positive,
    refuse_foreign_adapter,
    refuse_mixed,
)
from .resumable import Resumable
from .stepping import Stepper, refuse_nonfinite

__all__ = ["AdamW"]

log = logging.getLogger("oplora")

TOLD_AFTER: Final = 100  # steps: what rate was found


class AdamW(Resumable):
    """AdamW for models with LoRA, without a learning rate to choose.

        optimizer = oplora.AdamW(model)                     # after get_peft_model
        optimizer = oplora.AdamW(model, max_grad_norm=1.0)  # clips gradients in every step

    It takes the place of torch.optim.AdamW and steps every trainable parameter of the model. The gradients tell the
    learning rate: lr can be left out, and `found_lr` is what was found (docs/rate.md). Forward, backward, saving and
    loading are PEFT's, and the adapter is an ordinary LoRA at every moment.

    How: behind the factors of a layer stands a generator, [A | B] = W2 h + c2 (OP-LoRA). Under presets "paper" and
    "flat" h = ReLU(W1 z + c1), under "auto" all layers share one h. A step takes the gradients that backward left in A
    and B, moves the generator as torch.optim.AdamW would if autograd ran through it, and writes the next A and B in
    place. What DoRA, VeRA, IA3 and the other adapters of docs/adapters.md train is generated in the same way; biases
    and modules_to_save get plain AdamW.

    Under fully_shard (FSDP2) and tensor parallelism a process steps the part of every tensor that it has, and keeps
    that part's state; on a GPU the generators of presets "paper" and "flat" are then in host memory. Under DeepSpeed's
    ZeRO preset "auto" does the same, and the other presets refuse (docs/loops.md).

    The step runs where the factors are, on the CPU or on a GPU. On a GPU the host does not wait for it: a gradient with
    NaN or infinity stops the step on the device, and the next call of step() raises. A step can be captured in a CUDA
    graph, after a few that were not; lr as a tensor on the device is then read at every replay (the ratio of preset
    "flat" stays that of the first lr).

    Args:
        params: a model with adapters. Or, as torch's optimizers take them, tensors, (name, tensor) pairs, or groups of
            either with their own lr, weight_decay, betas and eps. Tensors that belong together are found by PEFT's
            layers, by names or by shapes (docs/adapters.md); print(optimizer) tells what was found. A and B of one
            layer may be in groups with different lr and weight_decay, but not with different betas and eps.
        lr: under preset "auto" its size does not matter: only the course of a schedule and the ratios between groups
            do; by default 1.0. Under the others the learning rate of W2 (at the default width), c2 and all other
            trainable parameters; by default 1e-3.
        betas: as in torch.optim.AdamW; by default (0.9, 0.999). Under preset "auto" (0.9, 0.99), and beta1 is the share
            of the average in the factors.
        eps: as in torch.optim.AdamW; for factors at least 1e-19, so that 0 is no division by zero.
        weight_decay: as in torch.optim.AdamW.
        preset: "auto": one hidden unit for all layers, whose gradient finds the learning rate, and factors that are
            averages; 16 bytes for each number in A and B, gradient included (docs/rate.md). "paper": a generator in
            every layer, as in the paper. "flat": the same with init="keep", and for z, W1 and c1 a rate of 0.01 at the
            highest lr of a schedule, at most 5e-6 over it (schedules scale both). By default "auto"; or "paper" where
            an argument of generators is given, which are those from hidden_width on, without seed.
        max_grad_norm: in every step clip the gradients to this norm, as clip_grad_norm_ does.
        skip_nonfinite: skip a step whose gradient holds NaN or infinity, instead of raising an error. Either way such a
            step changes nothing.
        adapter_name: train this adapter only; by default every adapter that is trainable.
        shard: under torch.distributed each process keeps the generators of some of the layers (docs/loops.md). The
            factors are those of shard=False to the bit. On a GPU the host then waits for it once a step.
        hidden_width: H, the units of a generator, 32. State "exact" takes 12 (H + 1) bytes for each number in A and B,
            "lean" 16 at any H. W2's rate is 32 lr / H, so that one lr serves every width.
        latent_width: Z, the length of z, 128.
        latent_std: standard deviation of z's start, 0.01.
        hidden_lr_ratio: the learning rate of z, W1 and c1 is their group's lr times this; their group is that of the
            layer's first tensor. It is read and set in param_groups, as lr is. By default the preset's.
        state: how the generators are kept. "lean", the default: W2 as its seeded start and a change of rank
            weight_rank, its moments as factors; "exact": all of W2 and both its moments. docs/lean.md compares them.
        start: of W2's random rows. "sign": +-1/sqrt(3 H), one random bit each; "uniform": the paper's. By default
            "sign" for state "lean", which computes them again in each step, and "uniform" for "exact".
        weight_rank: of state "lean", 1 to 8, by default 2. A number in A and B takes 4 weight_rank + 2 moment_rank + 6
            bytes, and 4 more in a tensor that keeps a start other than zero. oplora.stats tells what the truncations
            drop.
        moment_rank: of state "lean", 1 to 8, by default 1.
        init: "paper": A gets random numbers from its generator and B zero, at once. "keep": every factor keeps the
            value that it has, and the generator adds to it, beginning with W2 = 0. Layers whose B is not zero (a
            trained adapter, PiSSA, OLoRA) and EVA's are kept in either case, with a warning; so are, without one, all
            tensors that are not LoRA's A and B. Preset "auto" keeps all of them.
        precondition: delta > 0 (1e-6) scales the gradients of A by (B^T B + delta I)^-1 and those of B by
            (A A^T + delta I)^-1 before they flow into the generator (OP-ScaledAdamW).
        seed: of the generators' starts; the same on every replica.
        generator_device: of state "exact" with factors on a GPU. None keeps the generators there too, "cpu" in host
            memory: the CPU makes the step, and only the factors and their gradients cross the bus.
        options: foreach, fused and capturable of torch.optim.AdamW are accepted and change nothing; amsgrad, maximize
            and differentiable are refused.

    Raises:
        OPLoRAError: no trainable adapter, tensors that could belong together in several ways, factors without values or
            on a device without kernels, arguments out of range, more state than memory.

    Source: Teterwak, Saenko, Plummer, Lim: "OP-LoRA: The Blessing of Dimensionality", arXiv 2412.10362.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        preset: str | None = None,
        hidden_width: int | None = None,
        latent_width: int | None = None,
        latent_std: float | None = None,
        hidden_lr_ratio: float | None = None,
        state: str | None = None,
        start: str | None = None,
        weight_rank: int | None = None,
        moment_rank: int | None = None,
        init: str | None = None,
        precondition: float | None = None,
        max_grad_norm: float | None = None,
        shard: bool = False,
        adapter_name: str | None = None,
        seed: int | None = None,
        skip_nonfinite: bool = False,
        generator_device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        refuse_options(options)
        of_generators = {
            "hidden_width": hidden_width,
            "latent_width": latent_width,
            "latent_std": latent_std,
            "hidden_lr_ratio": hidden_lr_ratio,
            "state": state,
            "start": start,
            "weight_rank": weight_rank,
            "moment_rank": moment_rank,
            "init": init,
            "precondition": precondition,
            "seed": seed,
            "generator_device": generator_device,
        }
        chosen = preset_of(preset, of_generators)
        defaults = {
            "lr": chosen.lr if lr is None else lr,
            "betas": chosen.betas if betas is None else betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        check_defaults(defaults, hidden_lr_ratio)
        check_positive(precondition=precondition, max_grad_norm=max_grad_norm)
        recipe = recipe_of(chosen, of_generators)
        elsewhere = check_generator_device(generator_device, recipe.kind)
        found = find(params, adapter_name)
        if precondition is not None:
            require_pairs(found.layers)
        super().__init__(found.groups, defaults)
        refuse_numbers(self.param_groups)
        refuse_mixed(found.layers, self.param_groups)

        self._max_grad_norm, self.skip_nonfinite, self._model = max_grad_norm, skip_nonfinite, found.model
        self._clipped: Clipped | None = None
        self._given: Any = None  # the groups' numbers when they were last checked
        self._steps_until_told = TOLD_AFTER
        self._has_gradients = self._is_silent = False  # whether a step had any; whether it was said that none has
        self._captured: list[Tensor] = []  # numbers of groups that CUDA graphs read
        init = chosen.init if init is None else init
        stepper = Stepper(
            found.layers,
            recipe,
            self._all(),
            init=init,
            shard=shard,
            delta=precondition,
            elsewhere=elsewhere,
            model=found.model,
        )
        self._begin(stepper, chosen, hidden_lr_ratio)
        self._unstepped = None if found.model is None else Unstepped(found.model, adapter_name, self._all())
        log.info("oplora: %s", self._summary())

    # ---- stepping ----

    @torch.compiler.disable  # the calls of a compiled loop: there is nothing in them to trace
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients in the factors; see the class. Layers without any gradient stay as they are.

        Raises:
            OPLoRAError: a merged or disabled layer, a NaN or infinite gradient (unless skip_nonfinite). Nothing was
                changed then, and the message names the layer. On a GPU the gradient is an earlier step's, which the
                device refused.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._awaits_more():
            return loss
        if self._max_grad_norm is not None:
            self.clip_grad_norm_(self._max_grad_norm)
        batches = self._gather()
        try:
            if self._step(batches):
                self._is_fresh, self._has_gradients = False, self._has_gradients or bool(batches)
                self._publish_stale()
                self._drop_consolidated()
                self._count_for_log()
        finally:
            self._clipped = None
            self._stepper.release(batches)
        return loss

    def _step(self, batches: list[Batch]) -> bool:
        """Whether it was done, or a device will see to it."""
        stepper = self._stepper
        self._refuse_nothing(batches)
        reports = self._reports(batches)
        numbers = self._numbers()
        stepper.set_numbers(numbers)
        if stepper.is_on_device:
            self._tell_refusals()
            verdict = stepper.step_on_device(batches, reports)
            stepper.plain.step_on_device(self._plain_groups(numbers), self.state, verdict)
        elif where := stepper.step_on_host(batches, reports):
            if not self.skip_nonfinite:
                refuse_nonfinite(where)
            return False
        else:
            stepper.plain.step(self._plain_groups(numbers), self.state)
        stepper.share_factors()
        return True

    def _plain_groups(self, numbers: Sequence[Any]) -> Sequence[dict[str, Any]]:
        """The groups as plain AdamW steps them: at the rate that was found, where one is."""
        if not self._preset.finds_rate or not any(True for _ in self._stepper.plain):
            return self.param_groups
        rate: Any = self._stepper.found[0]
        rate = rate.float() if self._stepper.is_on_device else float(rate)
        return [{**group, "lr": share * rate} for group, (share, *_) in zip(self.param_groups, numbers, strict=True)]

    def _gather(self) -> list[Batch]:
        own = self._refresh()  # may make another stepper
        batches: list[Batch] = self._stepper.gather(own)
        self._publish_stale()
        return batches

    def _publish_stale(self) -> None:
        for layer in self._stepper.take_stale():
            self._publish_layer(layer)

    def _tell_refusals(self) -> None:
        """Raises for steps that a device refused since it was last asked; it tells when it has got there."""
        refused, where = self._stepper.refusals()
        if refused and not self.skip_nonfinite:
            refuse_nonfinite(where, refused)

    def _forget(self) -> None:
        self._clipped = self._given = None

    def _refuse_nothing(self, batches: Sequence[Batch]) -> None:
        if not batches and not self._has_gradients:
            self._warn_of_nothing()
        if self._model is None or self._unstepped is None:
            return
        if not batches and all(p.grad is None for p in self._stepper.listing.generated()):
            refuse_foreign_adapter(self._model, self._stepper.layers)
        self._unstepped.warn(self.param_groups)

    def _warn_of_nothing(self) -> None:
        """Once, where a step finds nothing to do and none before it found anything: whoever trains a model that was
        made anew is to hear of it. torch's optimizers keep silent there."""
        if any(p.grad is not None for p in self._all()):
            self._has_gradients = True
        elif not self._is_silent:
            self._is_silent = True
            warn(
                f"oplora: step() found no gradient in any of this optimizer's {len(self._all())} parameters, now or "
                "before. Was it made of another model than the one that is trained? Make it last, after "
                "get_peft_model. Where a trainer makes the model itself (model_init, peft_config) pass it "
                "optimizer_cls_and_kwargs=oplora.for_trainer(args) instead."
            )

    def _numbers(self) -> list[Any]:
        """Of every group, checked where somebody has changed one."""
        given = [seen(group) for group in self.param_groups]
        if given != self._given:
            refuse_numbers(self.param_groups)
            refuse_mixed(self._stepper.layers, self.param_groups)
            self._given = given
        if self._is_captured():
            tensors = [v for group in self.param_groups for v in group.values() if isinstance(v, Tensor)]
            self._captured += [v for v in tensors if all(v is not known for known in self._captured)]
        if self._preset.finds_rate:
            return list(shares_of(self.param_groups))
        return [numbers_of(group, self._preset) for group in self.param_groups]

    @torch.compiler.disable
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that the norm of all parameters' gradients, the generators' z, W1, c1, W2, c2 and the
        other trainable ones, is at most max_norm; as torch.nn.utils.clip_grad_norm_ over them would.

        The norm is exact and costs one read of W2, which the next step() then saves: ||dW2|| = ||g|| ||h||.

        Returns:
            The norm before clipping, a 0-d float64 tensor where the factors are: on a GPU nothing waits for it. If it
            is not finite the gradients are left as they are, and step() refuses them.
        """
        batches = self._gather()
        reports = self._reports(batches)
        if reports is None:
            reports = [batch.engine.measure(batch) for batch in batches]
        others = self._stepper.plain.gradients()
        squares = self._stepper.squares(batches, reports)
        device, norm = squares.device, torch.sqrt(squares.sum())
        scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        is_on_device = self._stepper.is_on_device or device.type != "cpu"  # where reading the scale would wait
        if is_on_device or float(scale) != 1.0:
            factors = [here(p.grad) for p in self._stepper.listing.generated() if p.grad is not None]
            scale_gradients([*factors, *others, *(g for batch in batches for g in batch.scaled())], scale)
            for batch, report in zip(batches, reports, strict=True):
                batch.engine.state.scale(batch, report, scale.to(report.device, non_blocking=True))
        # processes that add sums up measure again: one alone might find that its gradients are others now
        self._clipped = None if self._stepper.adds_up else Clipped(batches, reports)
        for batch in batches:
            batch.release()
        return norm

    def _reports(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """What clip_grad_norm_ found, if the gradients are still those that it left."""
        if self._clipped is not None and self._clipped.hold(batches):
            return self._clipped.reports
        self._stepper.precondition(batches)
        return None

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        self._clipped = None  # it holds gradients
        super().zero_grad(set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_clipped": None, "_captured": []}

    # ---- telling ----

    @property
    def found_lr(self) -> float:
        """The rate that preset "auto" has found, of the group that has the highest now; NaN before the first step and
        for other presets. oplora.stats tells it for every layer. On a GPU the host waits for it."""
        found = self._found()
        return math.nan if found is None else found["rate"] * highest_share(self.param_groups)

    def _found(self) -> dict[str, float] | None:
        """As engines.FOUND names it; None where nothing was found yet, or a device cannot be asked."""
        if not self._preset.finds_rate or self._is_captured():
            return None
        found = dict(zip(FOUND, self._stepper.found.tolist(), strict=True))
        return found if found["steps"] > 0 else None

    def _is_captured(self) -> bool:
        return is_capturing(self._stepper.device)

    def _count_for_log(self) -> None:
        """A line when the search has had time; steps that are captured in a CUDA graph are not counted, nor replays."""
        if not self._preset.finds_rate or self._steps_until_told == 0 or self._is_captured():
            return
        self._steps_until_told -= 1
        if self._steps_until_told == 0 and log.isEnabledFor(logging.INFO) and (found := self._found()) is not None:
            log.info("oplora found %.1e%s", found["rate"], "" if found["turned"] > 0 else " (still searching)")

    def _summary(self) -> str:
        recipe, tensors = self._stepper.recipe, self._stepper.listing.now()
        entries, plain = sum(p.numel() for p in tensors), sum(1 for p in self._stepper.plain if p.requires_grad)
        begun = any(not all(state.factors.kept) for state in self._stepper.states)
        written = "; A was replaced by the generators' start (init='paper')" if begun else ""
        what = f"layers: {len(self._stepper.layers)}, adapter tensors: {len(tensors)}, numbers in them: {entries:,}"
        what += f", other parameters: {plain}"
        if self._preset.finds_rate:
            return f"preset auto, which finds the learning rate; {what}"
        width = recipe.settings.hidden_width
        return f"preset {self._preset.name}, state {recipe.kind}, hidden_width {width}; {what}{written}"

    def __repr__(self) -> str:
        """torch's, without the tensors' names, and what was found."""
        found, unsaid = self._found(), {"params", "param_names"} | ({"peak_lr"} if self._preset.finds_rate else set())
        rate = "" if found is None else f"; rate {found['rate']:.1e} found"
        lines = [f"{type(self).__name__} (", f"{self._summary()}{rate}"]
        for i, group in enumerate(self.param_groups):
            numbers = {k: v for k, v in group.items() if k not in unsaid}
            told = ", ".join(f"{name}: {value}" for name, value in sorted(numbers.items()))
            lines.append(f"Parameter Group {i}: {len(group['params'])} tensors, {told}")
        return "\n    ".join(lines) + "\n)"
