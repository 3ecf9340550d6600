"""AdamW with a generator behind every adapter: the one changed line."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import find, require_pairs
from .clipping import Clipped, scale_gradients
from .engines import Batch, LayerState, Recipe, Settings
from .errors import OPLoRAError, OPLoRARuntimeError, OPLoRAValueError
from .groups import (
    check_defaults,
    complete,
    numbers_of,
    refuse_numbers,
    refuse_options,
    seen,
    with_names,
)
from .presets import preset_of
from .refusals import (
    W2_STARTS,
    Unstepped,
    check_generator_device,
    check_positive,
    check_state,
    refuse_foreign_adapter,
    refuse_mixed,
)
from .saved import Loaded, check_layers, check_names, from_0_1, load_layer, refuse_without_generators, without_gaps
from .stepping import Stepper, refuse_nonfinite

__all__ = ["AdamW"]

log = logging.getLogger("oplora")


class AdamW(torch.optim.Optimizer):
    """AdamW which trains each layer's LoRA factors through a generator (OP-LoRA), and all else as torch's AdamW does.

    Behind the factors of a layer stands h = ReLU(W1 z + c1), [A | B] = W2 h + c2; what DoRA, VeRA, IA3 and the other
    adapters of docs/adapters.md train besides or instead is generated likewise. A step takes the gradients that
    backward left in A and B, moves z, W1, c1, W2 and c2 as torch.optim.AdamW would if autograd ran through the
    generator, and writes the next A and B in place. Nothing else changes: forward, backward, saving and loading are
    PEFT's, and the adapter is an ordinary LoRA at every moment.

    The step runs where the factors are, on the CPU or on a GPU. On a GPU the host does not wait for it: a gradient with
    NaN or infinity stops the step on the device, and the next call of step() raises. A step can be captured in a CUDA
    graph, after a few that were not; lr as a tensor on the device is then read at every replay.

    Args:
        params: a model with adapters, whose trainable parameters are all stepped; or, as torch's optimizers take them,
            tensors, (name, tensor) pairs, or groups of either with rates, decays and betas of their own. Tensors that
            belong together are found by PEFT's layers, by names or by shapes (docs/adapters.md); repr() tells what was
            found. A and B of one layer may be in groups with other rates and decays, not with other betas and eps.
        lr: learning rate of W2 (at the default width), c2 and all other trainable parameters.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        hidden_width: H, the units of a generator. State "exact" takes 12 (H + 1) bytes a factor entry, "lean" 16
            whatever H is. W2's rate is 32 lr / H, so that one lr serves every width.
        latent_width: Z, the length of z.
        latent_std: standard deviation of z's start.
        preset: of init and hidden_lr_ratio, where they are not given. "paper": init="paper", ratio 1. "flat":
            init="keep", and for z, W1 and c1 a rate of 0.01 at the highest lr of a schedule, at most 5e-6 over it
            (schedules scale both), with which lr matters little: docs/evidence.md.
        hidden_lr_ratio: the learning rate of z, W1 and c1 is their group's lr times this; the group of a layer's first
            tensor. It is read and set in param_groups, as lr is.
        state: how the generators are kept. "lean": W2 as its seeded start and a change of rank weight_rank, its
            moments as factors; "exact": all of W2 and both its moments. docs/lean.md compares them.
        start: of W2's random rows. "sign": +-1/sqrt(3 H), one random bit each; "uniform": the paper's. By default
            "sign" for state "lean", whose step makes them anew each time, and "uniform" for "exact".
        weight_rank, moment_rank: of state "lean", 1 to 8 each. A factor entry takes 4 weight_rank + 2 moment_rank + 6
            bytes, and 4 more in a tensor that keeps a start other than zero. oplora.stats tells what the truncations
            drop.
        init: "paper": A starts from its generator's random numbers and B at zero, which are written now. "keep": every
            factor keeps the value it has, and the generator adds to it, from nothing on: W2 starts at 0. Layers whose
            B is not zero (a trained adapter, PiSSA, OLoRA) and EVA's are kept in either case, with a warning; so are,
            without one, all tensors that are not LoRA's A and B.
        precondition: delta > 0 (1e-6) scales the gradients of A by (B^T B + delta I)^-1 and those of B by
            (A A^T + delta I)^-1 before they flow into the generator (OP-ScaledAdamW).
        max_grad_norm: clip_grad_norm_ to it in every step, for loops that only clip the factors' own gradients.
        shard: under torch.distributed keep the generators of some layers in each process (docs/loops.md). The factors
            are those of shard=False to the bit. On a GPU the host then waits for it once a step.
        adapter_name: generate this adapter only; by default every adapter that is trainable.
        seed: of the generators' starts; the same on every replica.
        skip_nonfinite: skip a step whose gradient holds NaN or infinity, instead of raising. Neither changes anything.
        generator_device: of state "exact" with factors on a GPU. None keeps the generators there too, "cpu" in host
            memory: the CPU makes the step, and only the factors and their gradients cross the bus.
        options: foreach, fused and capturable of torch.optim.AdamW mean nothing here; amsgrad, maximize and
            differentiable are refused.

    Raises:
        OPLoRAError: no trainable adapter, tensors that could belong together in several ways, factors without values or
            on a device without kernels, arguments out of range, more state than memory.

    Source: Teterwak, Saenko, Plummer, Lim: "OP-LoRA: The Blessing of Dimensionality", arXiv 2412.10362.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
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
        **options: Any,
    ) -> None:
        refuse_options(options)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_defaults(defaults, hidden_lr_ratio)
        check_state(state, weight_rank, moment_rank)
        check_positive(precondition=precondition, max_grad_norm=max_grad_norm)
        self._preset, self._hidden_lr_ratio = preset_of(preset), hidden_lr_ratio
        settings = Settings(hidden_width, latent_width, latent_std, seed, W2_STARTS[state] if start is None else start)
        self._max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite

        found = find(params, adapter_name)
        if precondition is not None:
            require_pairs(found.layers)
        self._layers, self._model = found.layers, found.model
        self._recipe = Recipe(settings, state, (weight_rank, moment_rank))
        self._entries: dict[Tensor, dict[str, Any]] = {}  # that were put into self.state
        self._given: Any = None  # the groups' numbers, as they were checked
        self._is_ready = False  # super().__init__ adds the groups
        super().__init__(found.groups, defaults)
        refuse_numbers(self.param_groups)
        refuse_mixed(found.layers, self.param_groups)
        self._stepper = Stepper(
            found.layers,
            self._recipe,
            init=self._preset.init if init is None else init,
            shard=shard,
            delta=precondition,
            elsewhere=check_generator_device(generator_device, state),
        )
        self._unstepped = None if self._model is None else Unstepped(self._model, adapter_name, self._all())
        self._clipped: Clipped | None = None
        self._is_consolidated, self._is_fresh, self._is_ready = False, True, True
        self._refresh()
        self.register_state_dict_pre_hook(AdamW._before_saving)
        self.register_state_dict_post_hook(AdamW._complete_saved)
        log.info("oplora: %s", self._summary())

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
        stepper = self._stepper
        batches = self._gather()
        self._refuse_nothing(batches)
        reports = self._reports(batches)
        stepper.set_numbers(self._numbers())
        if stepper.is_on_device:
            self._tell_refusals()
            verdict = stepper.step_on_device(batches, reports)
            stepper.plain.step_on_device(self.param_groups, self.state, verdict)
        elif where := stepper.step_on_host(batches, reports):
            if not self.skip_nonfinite:
                refuse_nonfinite(where)
            return loss
        else:
            stepper.plain.step(self.param_groups, self.state)
        stepper.share_factors()
        self._clipped, self._is_fresh = None, False
        self._drop_consolidated()
        return loss

    def _gather(self) -> list[Batch]:
        batches = self._stepper.gather(self._refresh())
        for layer in self._stepper.take_stale():
            self._publish_layer(layer)
        return batches

    def _tell_refusals(self) -> None:
        """Raises for steps that a device refused since it was last asked; it tells when it has got there."""
        refused, where = self._stepper.refusals()
        if refused and not self.skip_nonfinite:
            refuse_nonfinite(where, refused)

    def _refuse_nothing(self, batches: Sequence[Batch]) -> None:
        if self._model is None or self._unstepped is None:
            return
        if not batches and all(p.grad is None for p in self._stepper.listing.generated()):
            refuse_foreign_adapter(self._model, self._layers)
        self._unstepped.warn()

    def _numbers(self) -> list[Any]:
        """Of every group, checked where somebody has changed one."""
        given = [seen(group) for group in self.param_groups]
        if given != self._given:
            refuse_numbers(self.param_groups)
            refuse_mixed(self._layers, self.param_groups)
            self._given = given
        return [numbers_of(group, self._preset) for group in self.param_groups]

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
        squares = [self._stepper.squares(batches, reports)]
        squares += [norm.square() for norm in torch._foreach_norm([g.double() for g in others])] if others else []
        device = squares[0].device
        norm = torch.cat([square.view(-1).to(device, non_blocking=True) for square in squares]).sum().sqrt()
        scale = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
        factors = [p.grad for p in self._stepper.listing.generated() if p.grad is not None]
        scale_gradients([*factors, *others, *(g for batch in batches for g in batch.scaled())], scale)
        for batch, report in zip(batches, reports, strict=True):
            batch.engine.state.scale(batch, report, scale.to(report.device, non_blocking=True))
        self._clipped = Clipped(batches, reports)
        return norm

    def _reports(self, batches: Sequence[Batch]) -> list[Tensor] | None:
        """What clip_grad_norm_ found, if the gradients are still those that it left."""
        if self._clipped is not None and self._clipped.hold(batches):
            return self._clipped.reports
        self._stepper.precondition(batches)
        return None

    # ---- parameters and groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are stepped by plain AdamW: a generator stands behind what the optimizer was made
        with."""
        named = bool(self.param_groups) and "param_names" in self.param_groups[0]
        if self._is_ready and named:
            param_group = with_names(param_group, len(self._all()))
        super().add_param_group(param_group)
        if self._is_ready:
            self._refresh()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._refresh()
        super().zero_grad(set_to_none)

    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _refresh(self) -> list[nn.Parameter]:
        """The generated tensors as they are now; what was replaced, moved or added since the last time is followed."""
        stepper = self._stepper
        own = stepper.listing.now()
        if stepper.listing.has_changed(own, self.param_groups):
            replaced = stepper.listing.update(own, self.param_groups)
            for old in [p for p in self.state if id(p) in replaced]:
                self.state[replaced[id(old)]] = self.state.pop(old)
            stepper.plain.hold(stepper.listing.others())
            for g in set(stepper.listing.group_of(own)):
                complete(self.param_groups[g], self._preset, self._hidden_lr_ratio)
            self._given = None
            stepper.assign(len(self.param_groups), own)
            self._publish()
        held = list(map(self.state.get, self._entries))
        if not held or not all(held) or any(map(is_not, held, self._entries.values())):
            self._take_entries()
        return own

    def _publish(self) -> None:
        """Puts what is kept of every generated tensor where torch keeps it: optimizer.state."""
        self._entries.clear()
        for layer in self._stepper.states:
            self._publish_layer(layer)
        self._stepper.plain.begin(self.state)

    def _publish_layer(self, layer: LayerState) -> None:
        for parameter, entry in zip(layer.factors.layer.parameters(), layer.entries(), strict=True):
            self.state[parameter] = self._entries[parameter] = entry

    def _take_entries(self) -> None:
        """Somebody has put other dicts into optimizer.state (a copy of the optimizer, a trainer that moves what is in
        them): what they hold is taken. Or cleared it: the moments begin anew, as in any torch optimizer; what W2 has
        learnt is in the adapter and stays."""
        for layer in self._stepper.states:
            put = [self.state.get(parameter) for parameter in layer.factors.layer.parameters()]
            if not all(put):
                layer.reset()
                continue
            for entry, theirs in zip(layer.entries(), put, strict=True):
                entry.update({name: value for name, value in theirs.items() if name in entry})
        self._publish()

    # ---- saving ----

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that copies step (torch's holds the groups and its own state only)."""
        held = {name: value for name, value in self.__dict__.items() if name != "step"}  # a scheduler's, of this object
        return {**held, "_clipped": None, "_entries": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.keys() != {"state", "param_groups"}:  # a copy
            super().__setstate__(state)
            return
        loaded = {p: value.entry for p, value in state["state"].items() if isinstance(value, Loaded)}
        rest = {p: value for p, value in state["state"].items() if not isinstance(value, Loaded)}
        super().__setstate__({**state, "state": defaultdict(dict, rest)})
        for layer in self._stepper.states:
            load_layer(layer, [loaded[p] for p in layer.factors.layer.parameters()])
        self._clipped, self._given = None, None
        for g in set(self._stepper.listing.group_of(self._stepper.listing.now())):
            complete(self.param_groups[g], self._preset, self._hidden_lr_ratio)
        self._publish()

    def _before_saving(self) -> None:
        if self._stepper.shards is not None and not self._is_fresh and not self._is_consolidated:
            raise OPLoRARuntimeError(
                "oplora: this process has its own share of the generators only. Call "
                "optimizer.consolidate_state_dict(to=0) in every process first, then state_dict() in process 0 (with "
                "to=None in every process, as torch.distributed.checkpoint wants it)."
            )
        self._refresh()

    def _complete_saved(self, saved: dict[str, Any]) -> None:
        """Adds the factors themselves, and makes plain dicts of the live ones, which torch.load(weights_only=True)
        reads."""
        numbers = self._numbers_of_tensors()
        for parameter in self._stepper.listing.now():
            if (number := numbers[id(parameter)]) in saved["state"]:
                saved["state"][number] = {"factor": parameter.detach(), **saved["state"][number]}

    def _numbers_of_tensors(self) -> dict[int, int]:
        """What state_dict() calls each of them, by id."""
        return {id(p): i for i, p in reversed([*enumerate(self._all())])}

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Gathers a sharded optimizer's generators in host memory of process `to` (None: of every process), whose next
        state_dict() is that of an optimizer with shard=False. Every process must call it; without shard it does
        nothing."""
        stepper = self._stepper
        if stepper.shards is None:
            return
        self._drop_consolidated()
        numbers, everything = self._numbers_of_tensors(), self._all()
        own = [p for layer in stepper.states for p in layer.factors.layer.parameters()]
        share = {numbers[id(p)]: {"factor": p.detach(), **self.state[p]} for p in own}
        gathered = stepper.shards.gather(share, to)
        if gathered is not None:
            self.state.update({everything[i]: entry for i, entry in gathered.items() if i not in share})
        self._is_consolidated = gathered is not None

    def _drop_consolidated(self) -> None:
        if self._is_consolidated:
            own = {id(p) for layer in self._stepper.states for p in layer.factors.layer.parameters()}
            for parameter in self._stepper.listing.now():
                if id(parameter) not in own:
                    self.state.pop(parameter, None)
        self._is_consolidated = False

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state, and writes the factors that belong to it into the model; checkpoints of version 0.1 too.
        Where the optimizer is sharded every process must call it.

        Raises:
            OPLoRAError: the state is of another model, rank, width or kind; nothing was changed.
        """
        self._refresh()
        last = self.register_load_state_dict_pre_hook(AdamW._hold)  # behind everybody else's
        try:
            super().load_state_dict(state_dict)
        except OPLoRAError:
            raise
        except (ValueError, KeyError) as error:
            raise OPLoRAValueError(
                f"oplora: the state_dict's parameter groups do not fit the model: {error}. Build the model and the "
                "optimizer as in the run that was saved."
            ) from error
        finally:
            last.remove()
        self._stepper.share_factors()

    def _hold(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Checks what is loaded of the generators, in every process, before anything is changed."""
        if "generators" in saved:
            saved = from_0_1(saved, self._layers)
        refuse_without_generators(saved)
        check_names(self.param_groups, saved["param_groups"])
        theirs = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
        number = dict(zip(map(id, self._all()), theirs, strict=False))
        state, layers = dict(saved["state"]), self._stepper.states
        tensors = [layer.factors.layer.parameters() for layer in layers]
        of_layers = [[without_gaps(state.get(number.get(id(p), -1))) for p in some] for some in tensors]
        if len(theirs) == len(self._all()):  # otherwise torch says what does not fit
            self._stepper.together(lambda: check_layers(layers, of_layers))
        every = [state.pop(number.get(id(p), -1), None) for p in self._stepper.listing.now()]
        for p, entry in zip(chain.from_iterable(tensors), chain.from_iterable(of_layers), strict=True):
            state[number.get(id(p), -1)] = Loaded(entry)
        # of a sharded optimizer: whether it was given its own share alone, as state_dict() of a fresh one has it
        self._is_fresh = self._is_fresh and sum(entry is not None for entry in every) == sum(map(len, tensors))
        self._is_consolidated = False
        return {**saved, "state": state}

    # ---- telling ----

    def _summary(self) -> str:
        settings, kind = self._recipe.settings, self._recipe.kind
        tensors = self._stepper.listing.now()
        entries, plain = sum(p.numel() for p in tensors), sum(1 for p in self._stepper.plain if p.requires_grad)
        begun = any(not all(state.factors.kept) for state in self._stepper.states)
        written = "; A is what the generators start with, not what it was before (init='paper')" if begun else ""
        return (
            f"{len(self._layers)} generators (state {kind}, hidden_width {settings.hidden_width}, preset "
            f"{self._preset.name}) behind {len(tensors)} tensors of {entries:,} entries; {plain} other parameters"
            f"{written}"
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-2]}\n{self._summary()}\n)"
