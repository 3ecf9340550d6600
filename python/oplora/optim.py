"""AdamW with a generator behind every adapted layer: the one changed line."""

from collections.abc import Callable, Iterable, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import check_layers, find_layers, foreign_gradient, other_parameters, refuse_to_step
from .checks import (
    W2_STARTS,
    check_arguments,
    check_generator_device,
    check_positive,
    refuse_devices,
    refuse_more_than_memory,
)
from .device import DeviceLayers
from .errors import OPLoRARuntimeError, OPLoRAValueError
from .exact import ExactState
from .factors import Factors, keep_starts, warn_adopted
from .lean import LeanState
from .precondition import precondition as precondition_gradients
from .precondition import require_pairs
from .presets import settle
from .sharding import Shards
from .start import Settings, weight_rate
from .state import Layers, State, kind_of

__all__ = ["AdamW"]


class AdamW(torch.optim.Optimizer):
    """AdamW for a model with LoRA adapters, which trains each layer's factors through a generator (OP-LoRA).

    Behind the factors of a layer stands h = ReLU(W1 z + c1), [A | B] = W2 h + c2; what DoRA, VeRA, IA3 and the other
    adapters of docs/adapters.md train besides or instead is generated likewise. A step takes the gradients that
    backward left in A and B, moves z, W1, c1, W2 and c2 as torch.optim.AdamW would if autograd ran through the
    generator, and writes the next A and B in place. Nothing else changes: forward, backward, saving and loading are
    PEFT's, and the adapter is an ordinary LoRA at every moment. Any other trainable parameter of the model (biases,
    modules_to_save) is stepped by torch.optim.AdamW in the same call.

    The step runs where the factors are, on the CPU or on a GPU. On a GPU the host does not wait for it: a gradient with
    NaN or infinity stops the step on the device, and the next call of step() raises. A step can be captured in a CUDA
    graph, after a few that were not; lr as a tensor on the device is then read at every replay.

    Args:
        model: a PEFT model, or any nn.Module that holds PEFT's adapter layers.
        lr: learning rate of W2 (at the default width), c2 and all other trainable parameters.
        betas, eps, weight_decay: as in torch.optim.AdamW, for all parameters.
        hidden_width: H, the units of a generator. State "exact" takes 12 (H + 1) bytes a factor entry, "lean" 16
            whatever H is. W2's rate is 32 lr / H, so that one lr serves every width.
        latent_width: Z, the length of z.
        latent_std: standard deviation of z's start.
        preset: of init and hidden_lr_ratio, where they are not given. "paper": init="paper", ratio 1. "flat":
            init="keep", and for z, W1 and c1 a rate of 0.01 whatever lr is, at most 5e-6 / lr (schedules scale both),
            with which lr matters little: docs/evidence.md.
        hidden_lr_ratio: the learning rate of z, W1 and c1 is lr times this. They move all of A and B together.
        state: how the generators are kept. "lean": W2 as its seeded start and a change of rank weight_rank, its
            moments as factors; "exact": all of W2 and both its moments. docs/lean.md compares them.
        start: of W2's random rows. "sign": +-1/sqrt(3 H), one random bit each; "uniform": the paper's. By default
            "sign" for state "lean", whose step makes them anew each time, and "uniform" for "exact".
        weight_rank, moment_rank: of state "lean", 1 to 8 each. A factor entry takes 4 weight_rank + 2 moment_rank + 6
            bytes, and 4 more in a tensor that keeps a start other than zero. oplora.stats tells what the truncations
            drop.
        init: "paper": A starts from its generator's random numbers and B at zero. "keep": every factor keeps the value
            it has, and the generator adds to it, from nothing on: W2 starts at 0. Layers whose B is not zero (a trained
            adapter, PiSSA, OLoRA) and EVA's are kept in either case, with a warning; so are, without one, all tensors
            that are not LoRA's A and B.
        precondition: delta > 0 (1e-6) scales the gradients of A by (B^T B + delta I)^-1 and those of B by
            (A A^T + delta I)^-1 before they flow into the generator (OP-ScaledAdamW).
        max_grad_norm: clip_grad_norm_ to it in every step, for loops that only clip the factors' own gradients.
        shard: under torch.distributed keep the generators of some layers in each process (docs/loops.md). The factors
            are those of shard=False to the bit. On a GPU the host then waits for it once a step.
        adapter_name: step this adapter only; by default every adapter that is trainable.
        seed: of the generators' starts; the same on every replica.
        skip_nonfinite: skip a step whose gradient holds NaN or infinity, instead of raising. Neither changes anything.
        generator_device: of state "exact" with factors on a GPU. None keeps the generators there too, "cpu" in host
            memory: the CPU makes the step, and only the factors and their gradients cross the bus.

    Raises:
        OPLoRAError: no trainable adapter, factors without values or on a device without kernels, arguments out of
            range, more state than memory.

    Source: Teterwak, Saenko, Plummer, Lim: "OP-LoRA: The Blessing of Dimensionality", arXiv 2412.10362.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        hidden_width: int = 32,
        latent_width: int = 128,
        latent_std: float = 0.01,
        preset: str = "paper",
        hidden_lr_ratio: float | None = None,
        state: str = "lean",
        start: str | None = None,
        weight_rank: int = 2,
        moment_rank: int = 1,
        init: str | None = None,
        precondition: float | None = None,
        max_grad_norm: float | None = None,
        shard: bool = False,
        adapter_name: str | None = None,
        seed: int = 0,
        skip_nonfinite: bool = False,
        generator_device: str | torch.device | None = None,
    ) -> None:
        init, hidden_lr_ratio = settle(preset, init, hidden_lr_ratio, lr)
        check_arguments(lr, betas, eps, weight_decay, hidden_lr_ratio, state, weight_rank, moment_rank)
        check_positive(precondition=precondition, max_grad_norm=max_grad_norm)
        self._generator_device = check_generator_device(generator_device, state)
        settings = Settings(hidden_width, latent_width, latent_std, seed, W2_STARTS[state] if start is None else start)
        self._model, self._layers = model, find_layers(model, adapter_name)
        if precondition is not None:
            require_pairs(self._layers)
        self._precondition, self._max_grad_norm = precondition, max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        factors = [Factors.of(layer, i, self._generator_device) for i, layer in enumerate(self._layers)]
        shards = Shards([sum(f.sizes) for f in factors]) if shard else None
        self._shards = None if shards is None or shards.count == 1 else shards
        if self._shards is not None:
            factors = [f for f in factors if self._shards.owns(f.position)]
        self._weight_rate = weight_rate(hidden_width)
        self._kind, self._settings, self._ranks = state, settings, (weight_rank, moment_rank)
        keeps, self._states = self._together(lambda: (keep_starts(factors, init), self._make_states(factors)))
        for generator, keep in zip(self._states, keeps, strict=True):
            generator.begin(keep)
        self._share_factors()
        self._measured: tuple[list[tuple[int, int]], list[Layers], list[Tensor]] | None = None
        self._consolidated: dict[str, Any] | None = None  # of a sharded optimizer, all processes' generators
        self._is_fresh = True  # no step was made

        # one group for the factors, one for the rest; the schedulers see both
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(self._flat([layer.parameters() for layer in self._layers]), defaults)
        self._listed = list(self.param_groups[0]["params"])
        self.param_groups[0]["hidden_lr_ratio"] = hidden_lr_ratio
        others = list(other_parameters(model, adapter_name))
        self._plain = torch.optim.AdamW(others, **defaults) if others else None  # type: ignore[arg-type]
        if self._plain is not None:
            self.param_groups += self._plain.param_groups

    def _make_states(self, factors: list[Factors]) -> list[State]:
        refuse_devices(factors, self._precondition)
        refuse_more_than_memory(factors, self._settings, self._kind, self._ranks)
        if self._kind == "lean":
            return [*LeanState.make_all(factors, self._settings, self._ranks)]
        return [*ExactState.make_all(factors, self._settings)]

    # ---- stepping ----

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
        if self._max_grad_norm is not None:
            self.clip_grad_norm_(self._max_grad_norm)
        stepping, reports = self._ready()
        if self._on_device:
            self._step_on_device([layers for layers in stepping if isinstance(layers, DeviceLayers)], reports)
        elif not self._step_on_host(stepping, reports):
            return loss
        self._share_factors()
        self._measured, self._consolidated, self._is_fresh = None, None, False
        return loss

    def _step_on_host(self, stepping: list[Layers], reports: list[Tensor] | None) -> bool:
        """Whether it was done, which it is not where a gradient holds NaN or infinity."""
        where = self._nonfinite_others()
        # several dtypes or processes: none may step before the gradients of all are known to be finite
        if reports is None and (len(stepping) > 1 or self._shards is not None):
            reports = [layers.measure() for layers in stepping]
        if reports is not None:
            where += [
                name for layers, report in zip(stepping, reports, strict=True) for name in layers.nonfinite(report)
            ]
        if self._refuse_nonfinite(self._agreed(where)):
            return False
        for i, layers in enumerate(stepping):
            done, report = layers.step(self._numbers(), None if reports is None else reports[i])
            if not done:
                self._refuse_nonfinite(layers.nonfinite(report))
                return False
        if self._plain is not None:
            self._plain.param_groups, self._plain.state = self.param_groups[1:], self.state
            self._plain.step()
        return True

    @property
    def _on_device(self) -> bool:
        return self._states[0].shared is not None

    def _step_on_device(self, stepping: list[DeviceLayers], reports: list[Tensor] | None) -> None:
        """Launches the step. Whether it is refused is decided on the device, for all devices and parameters alike."""
        self._tell_refusals()
        veto = self._verdict_on_others()
        # several devices or processes: none may step before the gradients of all are known to be finite
        if len(stepping) > 1 or self._shards is not None:
            reports = [layers.measure() for layers in stepping] if reports is None else reports
            found = [layers.shared.verdict[:1] for layers in stepping] + ([] if veto is None else [veto])
            found = found or [torch.zeros(1, dtype=torch.int32, device=self._states[0].factors.device)]
            veto = torch.cat([verdict.to(found[0].device, non_blocking=True) for verdict in found]).amax(
                0, keepdim=True
            )
            if self._shards is not None:
                self._shards.any_refuses(veto)
                if not stepping:  # nothing is launched here that would count it
                    self._states[0].shared.count_refusal(veto)
        for layers in stepping:
            on_device = None if veto is None else veto.to(layers.shared.device, non_blocking=True)
            layers.launch(self._numbers(), reports is not None, on_device)
        if self._plain is not None:
            verdict = stepping[0].shared.verdict[:1] if stepping else veto
            self._step_others_on_device(self._plain, verdict)

    def _step_others_on_device(self, plain: torch.optim.AdamW, verdict: Tensor | None) -> None:
        """torch's fused AdamW leaves everything as it is where found_inf is 1, without telling the host."""
        plain.param_groups, plain.state = self.param_groups[1:], self.state
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        for group in plain.param_groups:
            group["capturable"] = group["capturable"] or capturing
            if not group["fused"]:  # made on the CPU, or for it: counts of steps are kept beside the parameters now
                group.update(fused=True, foreach=False)
                for parameter in group["params"]:
                    saved = plain.state.get(parameter, {})
                    if isinstance(saved.get("step"), Tensor):
                        saved["step"] = saved["step"].to(parameter.device, torch.float32)
        plain.found_inf = None if verdict is None else verdict.float().view(())  # type: ignore[attr-defined]
        plain.step()

    def _tell_refusals(self) -> None:
        """Raises for steps that a device refused since it was last asked; it tells when it has got there."""
        devices = {id(state.shared): state.shared for state in self._states}.values()
        # processes that own other layers must raise in the same step, so they all ask for the last one
        refused = max(shared.new_refusals(wait=self._shards is not None) for shared in devices)
        if refused and not self.skip_nonfinite:
            reports = ((state, state.report) for state in self._states)
            where = [f"layer {s.name}" for s, report in reports if report is not None and report[1] != 0]
            self._refuse_nonfinite(where or ["a layer, or of parameters outside the adapters,"], refused)

    def _verdict_on_others(self) -> Tensor | None:
        """1 (int32) if a gradient outside the adapters is not finite, else 0; None if there is no such gradient."""
        if not (gradients := [p.grad for p in self._others() if p.grad is not None]):
            return None
        norms = [norm.float() for norm in torch._foreach_norm(gradients, float("inf"))]
        device = self._states[0].factors.device
        finite = torch.stack([norm.to(device, non_blocking=True) for norm in norms]).isfinite().all()
        return finite.logical_not().to(torch.int32).view(1)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients so that the norm of all parameters' gradients, the generators' z, W1, c1, W2, c2 and the
        other trainable ones, is at most max_norm; as torch.nn.utils.clip_grad_norm_ over them would.

        The norm is exact and costs one read of W2, which the next step() then saves: ||dW2|| = ||g|| ||h||.

        Returns:
            The norm before clipping, a 0-d float64 tensor where the factors are: on a GPU nothing waits for it. If it
            is not finite the gradients are left as they are, and step() refuses them.
        """
        stepping, measured = self._ready()
        reports = [layers.measure() for layers in stepping] if measured is None else measured
        others = [p.grad for p in self._others() if p.grad is not None]
        squares = [self._squares(stepping, reports)]
        squares += [norm.square() for norm in torch._foreach_norm([g.double() for g in others])] if others else []
        device = squares[0].device
        norm = torch.cat([square.view(-1).to(device, non_blocking=True) for square in squares]).sum().sqrt()
        scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        factors = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for gradient in factors + others:
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        for kind, gradients in by_kind.items():
            torch._foreach_mul_(gradients, scale.to(*kind, non_blocking=True))
        for layers, report in zip(stepping, reports, strict=True):
            sources = {id(source) for source in layers.sources}
            for gradient in layers.gradients:
                if id(gradient) not in sources:
                    gradient.mul_(scale.to(gradient.device, gradient.dtype, non_blocking=True))
            layers.scale(report, scale.to(report.device, non_blocking=True))
        # of 16 bits the gradients were rounded when they were scaled, so they are measured again
        exact = all(source.element_size() > 2 for layers in stepping for source in layers.sources)
        self._measured = (self._versions(stepping), stepping, reports) if exact else None
        return norm

    def _squares(self, stepping: list[Layers], reports: list[Tensor]) -> Tensor:
        """||.||^2 of every generator's gradient, of all processes, where the factors are."""
        device = self._states[0].factors.placed
        squares = [
            layers.square(report).to(device, non_blocking=True)
            for layers, report in zip(stepping, reports, strict=True)
        ]
        positions = [state.factors.position for layers in stepping for state in layers.states]
        if positions == list(range(len(self._layers))):
            return torch.cat(squares)
        # the model's order, on which the bits of their sum depend, for any number of processes
        everywhere = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        if squares:
            by_position = dict(zip(positions, torch.cat(squares).unbind(), strict=True))
            everywhere = torch.stack([by_position.get(i, zero) for i, zero in enumerate(everywhere.unbind())])
        return everywhere if self._shards is None else self._shards.sum(everywhere)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are stepped by plain AdamW."""
        super().add_param_group(param_group)
        if hasattr(self, "_plain") and len(self.param_groups) > 1:
            added = self.param_groups[-1]
            if self._plain is None:
                self._plain = torch.optim.AdamW([added])
            else:
                self._plain.add_param_group({**added, "params": list(added["params"])})
            self.param_groups[-1] = self._plain.param_groups[-1]

    def _numbers(self) -> Sequence[float | Tensor]:
        """lr, weight_ratio, hidden_lr, beta1, beta2, eps, weight_decay: as Layers.step takes them."""
        group = self.param_groups[0]
        lr = group["lr"] if self._on_device and isinstance(group["lr"], Tensor) else float(group["lr"])
        rates = [lr, self._weight_rate, lr * group["hidden_lr_ratio"]]
        return [*rates, *group["betas"], group["eps"], group["weight_decay"]]

    def _others(self) -> Iterable[nn.Parameter]:
        return (p for group in self.param_groups[1:] for p in group["params"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._list_parameters()
        super().zero_grad(set_to_none)

    def _flat(self, held: list[list[nn.Parameter]]) -> list[nn.Parameter]:
        """Every layer's tensors one after the other, twins too."""
        return [p for layer, some in zip(self._layers, held, strict=True) for p in layer.with_twins(some)]

    def _list_parameters(self) -> list[list[nn.Parameter]]:
        """Puts the factors as they are now into their group, as PEFT may have replaced some; and every layer's own."""
        of_layers = [layer.parameters() for layer in self._layers]
        group, held = self.param_groups[0], self._flat(of_layers)
        if _differ(group["params"], held) and _differ(group["params"], self._listed):
            raise OPLoRARuntimeError(
                "oplora: somebody put other parameters in the place of the factors in optimizer.param_groups, as "
                "DeepSpeed's ZeRO and FSDP do with their shards; the factors would get no gradients. Train without it "
                "(oplora.AdamW(model, shard=True) divides the optimizer's state under DistributedDataParallel), or "
                "keep the adapter out of it."
            )
        if _differ(held, self._listed):
            check_layers(self._layers)
            self._listed = held
        group["params"] = list(held)  # a list of its own: accelerate writes into it
        return of_layers

    def _ready(self) -> tuple[list[Layers], list[Tensor] | None]:
        """The layers that have gradients, by dtype and device, and their reports if they were measured already; edits
        of their factors are absorbed on the way."""
        stepping = self._stepping()
        if self._measured is not None:
            versions, measured, reports = self._measured
            if versions == self._versions(stepping):
                return measured, reports
        if self._precondition is not None:
            for layers in stepping:
                layers.gradients = self._preconditioned(layers, self._precondition)
        return stepping, None

    @staticmethod
    def _versions(stepping: list[Layers]) -> list[tuple[int, int]]:
        """Of the gradients, by which it is known that they are still those that clip_grad_norm_ left."""
        return [(source.data_ptr(), source._version) for layers in stepping for source in layers.sources]

    @staticmethod
    def _preconditioned(layers: Layers, delta: float) -> list[Tensor]:
        of_layers = [state.factors.layer for state in layers.states]
        tensors, gradients = iter(layers.parameters), iter(layers.gradients)
        held = [[next(tensors) for _ in layer.tensors] for layer in of_layers]
        pushed = [[next(gradients) for _ in layer.tensors] for layer in of_layers]
        return [g for some in precondition_gradients(of_layers, held, pushed, delta) for g in some]

    def _stepping(self) -> list[Layers]:
        """The layers that have gradients, by dtype and device; edits of their factors are absorbed on the way."""
        of_layers = self._list_parameters()
        refuse_to_step(self._layers, of_layers)  # all layers, also those of other processes: they refuse together
        held = [of_layers[state.factors.position] for state in self._states]
        if any(s.factors.placed != parameters[0].device for s, parameters in zip(self._states, held, strict=True)):
            self._follow_moves()
        by_kind: dict[Any, Layers] = {}
        adopted = []
        for state, parameters in zip(self._states, held, strict=True):
            factors = state.factors
            gradients = factors.gradients(parameters, cast=state.shared is None)
            if gradients is None:
                continue
            if state.absorb_edits(parameters):
                adopted.append(state.name)
            kind = kind_of(factors)
            if kind not in by_kind:
                by_kind[kind] = state.new_layers()
            by_kind[kind].add(state, parameters, gradients, factors.sources(parameters))
        if adopted:
            warn_adopted(adopted)
        idle = not by_kind and all(parameter.grad is None for parameter in self._listed)
        if idle and (other := foreign_gradient(self._model, self._layers)) is not None:
            raise OPLoRARuntimeError(
                f"oplora: none of this optimizer's factors has a gradient, but adapter {other!r} has: it was added or "
                "made active after the optimizer. Make one for it, oplora.AdamW(model, adapter_name="
                f"{other!r}), or go back with model.set_adapter({self._layers[0].adapter!r}). Nothing was changed."
            )
        return list(by_kind.values())

    def _share_factors(self) -> None:
        if self._shards is not None:
            self._shards.send([layer.parameters() for layer in self._layers])

    def _agreed(self, where: list[str]) -> list[str]:
        """What is not finite; of a sharded optimizer not empty if it is so in any process."""
        if self._shards is None:
            return where
        refused = torch.tensor([len(where)], device=self._states[0].factors.placed)
        anywhere = bool(self._shards.any_refuses(refused))
        return where or (["a layer of another process"] if anywhere else [])

    def _follow_moves(self) -> None:
        """The model was moved (model.to(device), accelerator.prepare): the generators go where the factors are now."""
        factors = [Factors.of(s.factors.layer, s.factors.position, self._generator_device) for s in self._states]
        states = self._make_states(factors)
        for old, new in zip(self._states, states, strict=True):
            old.factors.move(new.factors.placed, new.factors.device)
            new.factors = old.factors
            new.take_over(old)
        self._states, self._measured = states, None

    def _nonfinite_others(self) -> list[str]:
        gradients = [p.grad for p in self._others() if p.grad is not None]
        if not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients, float("inf")))).all()):
            return []
        return ["parameters outside the adapters (biases, modules_to_save)"]

    def _refuse_nonfinite(self, where: list[str], earlier: int = 0) -> bool:
        """earlier: how many steps ago that was known to a device alone."""
        if where and not self.skip_nonfinite:
            when = f" ({earlier} earlier step{'s' if earlier > 1 else ''}, which the device refused)" if earlier else ""
            raise OPLoRARuntimeError(
                f"oplora: the gradient of {where[0]} {f'and {len(where) - 1} more ' if len(where) > 1 else ''}"
                f"holds NaN or infinity{when}. Nothing was changed: call zero_grad() and go on with the next batch, "
                "lower the learning rate, or pass skip_nonfinite=True to skip such steps."
            )
        return bool(where)

    # ---- saving ----

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that copies step (torch's holds the groups and its own state only)."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}  # a scheduler's, of this object

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict, and under "generators" each layer's generator by name. Resuming from it, and from the
        model and data at the same place, continues bit for bit.

        Raises:
            OPLoRAError: a sharded optimizer that was stepped since consolidate_state_dict: this process has one share.
        """
        if self._shards is not None and not self._is_fresh and self._consolidated is None:
            raise OPLoRARuntimeError(
                "oplora: this process has its own share of the generators only. Call "
                "optimizer.consolidate_state_dict(to=0) in every process first, then state_dict() in process 0."
            )
        saved = super().state_dict()
        saved["generators"] = self._consolidated or {state.name: state.state_dict() for state in self._states}
        return saved

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Gathers a sharded optimizer's generators in host memory of process `to` (None: of every process), whose next
        state_dict() is that of an optimizer with shard=False. Every process must call it; without shard it does
        nothing."""
        if self._shards is not None:
            gathered = self._shards.gather({state.name: state.state_dict() for state in self._states}, to)
            self._consolidated = gathered and {layer.name: gathered[layer.name] for layer in self._layers}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state, and writes the factors that belong to it into the model. Where the optimizer is sharded
        every process must call it.

        Raises:
            OPLoRAError: the state is of another model, rank, width or kind; nothing was changed.
        """
        saved = state_dict.get("generators")
        if saved is None:
            raise OPLoRAValueError(
                "oplora: this state_dict has no generators: it was saved by another optimizer. Load it there, or start "
                "anew with init='keep', which goes on from the adapter's present values."
            )
        mine = {state.name: state for state in self._states}
        self._together(lambda: self._check_generators(saved))
        try:
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "generators"})
        except (ValueError, KeyError) as error:
            raise OPLoRAValueError(
                f"oplora: the state_dict's parameter groups do not fit the model: {error}. Build the model and the "
                "optimizer as in the run that was saved."
            ) from error
        for name, state in mine.items():
            state.load_state(saved[name])
        self._share_factors()
        self._measured = self._consolidated = None
        self._is_fresh = self._is_fresh and saved.keys() == mine.keys()

    def _check_generators(self, saved: dict[str, Any]) -> None:
        mine, everything = {state.name: state for state in self._states}, [layer.name for layer in self._layers]
        if saved.keys() not in (mine.keys(), set(everything)):
            raise OPLoRAValueError(_other_layers(everything, saved.keys()))
        for name, state in mine.items():
            state.factors.layer.refuse_if_folded()
            state.check_state(saved[name])

    def _together(self, call: Callable[[], Any]) -> Any:
        """call(); where it raises in one process of a sharded optimizer it raises in all."""
        if self._shards is None:
            return call()
        return self._shards.together(call, self._layers[0].parameters()[0].device)


def _differ(some: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> bool:
    return len(some) != len(others) or any(map(is_not, some, others))


def _other_layers(mine: Iterable[str], saved: Iterable[str]) -> str:
    mine, saved = set(mine), set(saved)
    lacking, extra = sorted(mine - saved), sorted(saved - mine)
    parts = [f"it lacks {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"] if lacking else []
    parts += [f"it has {', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''} besides"] if extra else []
    return (
        f"oplora: the saved generators are of other layers: {'; '.join(parts)}. Build the model with the adapter "
        "(names, target_modules) of the run that was saved."
    )
