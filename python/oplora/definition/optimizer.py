"""The optimizers of torch over the generators, held from outside like any optimizer over the factors.

    loss.backward()     fills the gradients of A and B
    step()              pushes them through the generators (generators.py), steps the generators' parameters by an
                        optimizer of the class that was asked for, and writes the next A and B

What holds an optimizer looks at its param_groups: there are the factors, whose gradients a scaler unscales and a loop
clips or drops. So between two steps no gradient is anywhere else.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..adapters import other_parameters, unwrapped
from ..errors import OPLoRARuntimeError, OPLoRATypeError, OPLoRAValueError
from ..optim.groups import complete, rates_of
from ..optim.listing import differ
from ..optim.presets import Preset, preset_of
from ..optim.refusals import Unstepped
from ..optim.saved import without_gaps
from ..optim.stepping import refuse_nonfinite
from .generators import Generator, Generators

__all__ = ["GeneratorOptimizer", "create_oplora_optimizer"]

WHAT_WORKS: Final = (
    "Use a class that steps matrices and vectors by their gradients alone, as torch.optim.AdamW, Adam, SGD, RMSprop "
    "and Adafactor do, with arguments that it knows."
)


class GeneratorOptimizer(torch.optim.Optimizer):
    """An optimizer of any such class over generators, whose param_groups hold the factors that are generated.

    Group 0 has the factors, its lr that of W2 and c2, and hidden_lr_ratio: the rate of z, W1 and c1 is lr times this.
    Group 1, if there is one, has the model's other trainable parameters. All other numbers (weight_decay, momentum,
    betas, ...) are those of the class. They may be changed between steps, as schedulers do.

    Attributes:
        generators: oplora.Generators. After a backward() of theirs by hand their gradients may be clipped; step() adds
            those of the factors and leaves none behind.
        inner: the optimizer of the class, over the generators' parameters and the others.

    Args:
        optimizer_cls: a subclass of torch.optim.Optimizer; optimizer_kwargs are its arguments.
        others: parameters that are stepped as they are.
        skip_nonfinite: skip a step whose gradient holds NaN or infinity, instead of raising. Neither changes anything.
        unstepped: what of the model is to be warned about if it gets gradients.
    """

    def __init__(
        self,
        generators: Generators,
        optimizer_cls: type[torch.optim.Optimizer],
        others: Iterable[nn.Parameter] = (),
        *,
        lr: float | Tensor,
        preset: Preset,
        hidden_lr_ratio: float | None = None,
        skip_nonfinite: bool = False,
        unstepped: Unstepped | None = None,
        **optimizer_kwargs: Any,
    ) -> None:
        self.generators, self.skip_nonfinite, self._has_stepped = generators, skip_nonfinite, False
        self._preset, self._arguments = preset, {"lr": lr, **optimizer_kwargs}
        self._unstepped = unstepped
        groups: list[dict[str, Any]] = [
            {"params": [p for g in generators for p in (g.W2, g.c2)]},
            {"params": [p for g in generators for p in (g.z, g.W1, g.c1)]},
        ]
        if others := list(others):
            groups.append({"params": others})
        self.inner = optimizer_cls(groups, lr=lr, **optimizer_kwargs)  # type: ignore[call-arg]
        self._devices = self._generators_devices()
        self._listed = self._factors()
        first, _, *rest = self.inner.param_groups
        factors = {**first, "params": list(self._listed)}
        complete(factors, preset, hidden_lr_ratio)
        super().__init__([factors, *rest], dict(self.inner.defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are stepped as they are."""
        super().add_param_group(param_group)
        if len(self.param_groups) >= len(self.inner.param_groups):  # not so while the first groups are added
            added = self.param_groups[-1]
            self.inner.add_param_group({**added, "params": list(added["params"])})

    def __repr__(self) -> str:
        shapes = [generator.W2.shape for generator in self.generators]
        entries, hidden_width = sum(N for N, _ in shapes), shapes[0][1]
        others = sum(len(group["params"]) for group in self.param_groups[1:])
        head = f"{type(self).__name__} ("
        what = f"{type(self.inner).__name__} over the generators of {len(shapes)} layers: {entries} factor entries"
        what += f", hidden_width {hidden_width}{f'; {others} other parameters' if others else ''}"
        return head + what + super().__repr__().removeprefix(head)

    # ---- stepping ----

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients in the factors, or in the generators after their backward(). Layers without any
        stay as they are. closure: evaluated once, before the step; its value is returned.

        Raises:
            OPLoRAError: a merged or disabled layer, a NaN or infinite gradient (unless skip_nonfinite), a rate that is
                no number. Nothing was changed then, and the message names the layer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._list_factors()
        for group in self.param_groups:
            _refuse_texts(**{name: value for name, value in group.items() if isinstance(value, str | float)})
            for name in ("lr", "weight_decay"):
                if name in self.inner.defaults:
                    _check_rate(name, group[name])
        _check_rate("hidden_lr_ratio", self.param_groups[0]["hidden_lr_ratio"])
        self.generators.refuse_to_step()
        self._refuse_sparse()
        if self._unstepped is not None:
            self._unstepped.warn(self.param_groups)
        try:
            self.generators.push()
            if not self._refuse_nonfinite(self._nonfinite()):
                self._step_inner()
        finally:
            self.generators.zero_grad()
        return loss

    def _step_inner(self) -> None:
        if self._devices != (devices := self._generators_devices()):
            self.inner.load_state_dict(self.inner.state_dict())  # torch puts a state where its parameter is
            self._devices = devices
        stepped = [generator for generator in self.generators if generator.W2.grad is not None]
        first, hidden, *_ = self.inner.param_groups
        group = self.param_groups[0]
        shared = group.keys() & first.keys() - {"params", "lr"}
        # what the class itself keeps in its groups may differ between the two; what differs here somebody has set
        changed = {key: group[key] for key in shared if _differs(group[key], first[key])}
        lr, hidden_lr = rates_of(group, self._preset)
        first.update(changed, lr=lr)
        hidden.update(changed, lr=hidden_lr)
        self.inner.param_groups[2:] = self.param_groups[1:]
        self.inner.step()
        self._has_stepped = True
        group.update({key: first[key] for key in shared})
        for generator in stepped:
            generator.refresh()

    def _refuse_sparse(self) -> None:
        """Raises for sparse gradients outside the adapters that the class does not step, before others are stepped."""
        sparse = [p for group in self.param_groups[1:] for p in group["params"] if p.grad is not None]
        sparse = [p for p in sparse if p.grad is not None and p.grad.layout != torch.strided]
        if not sparse:
            return
        probe = nn.Parameter(torch.zeros(2, 2))
        probe.grad = torch.zeros(2, 2).to_sparse()
        try:
            type(self.inner)([probe], **self._arguments).step()
        except Exception as error:
            raise OPLoRATypeError(
                f"oplora: the gradient of a parameter outside the adapters, of shape {tuple(sparse[0].shape)}, is "
                f"sparse, which {type(self.inner).__name__} does not step. Build the embedding with sparse=False. "
                "Nothing was changed."
            ) from error

    @torch.compiler.disable
    def zero_grad(self, set_to_none: bool = True) -> None:
        self._list_factors()
        super().zero_grad(set_to_none)
        self.generators.zero_grad()

    def _generators_devices(self) -> list[torch.device]:
        return [generator.W2.device for generator in self.generators]

    def _factors(self) -> list[nn.Parameter]:
        """Every layer's tensors as the model holds them now, one layer after the other, twins too."""
        layers = (generator.factors.layer for generator in self.generators)
        return [p for layer in layers for p in layer.with_twins(layer.parameters())]

    def _list_factors(self) -> None:
        """Puts the factors into their group again, as PEFT may have replaced some."""
        group, factors = self.param_groups[0], self._factors()
        if differ(group["params"], factors) and differ(group["params"], self._listed):
            raise OPLoRARuntimeError(
                "oplora: somebody put other parameters in the place of the factors in optimizer.param_groups, as "
                "DeepSpeed's ZeRO and FSDP do with their shards; the factors would get no gradients. Train without it, "
                "or keep the adapter out of it."
            )
        self._listed = factors
        group["params"] = list(factors)  # a list of its own: accelerate writes into it

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What is to be stepped, by where it is. Without W2's, which is h g^T: g is that of c2."""
        for generator in self.generators:
            where = f"layer {generator.factors.layer.name}"
            parameters = (generator.c2, generator.z, generator.W1, generator.c1)
            yield from ((where, p.grad) for p in parameters if p.grad is not None)
        for group in self.param_groups[1:]:
            where = "parameters outside the adapters (biases, modules_to_save)"
            yield from ((where, p.grad) for p in group["params"] if p.grad is not None)

    def _nonfinite(self) -> list[str]:
        """Where gradients hold NaN or infinity."""
        gradients = [(where, g._values() if g.is_sparse else g) for where, g in self._gradients()]
        if not gradients:
            return []
        norms = torch._foreach_norm([gradient for _, gradient in gradients], math.inf)
        wide = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
        finite = torch.stack([norm.to(norms[0].device, wide) for norm in norms]).isfinite()
        if bool(finite.all()):
            return []
        return list(
            dict.fromkeys(where for (where, _), fine in zip(gradients, finite.tolist(), strict=True) if not fine)
        )

    def _refuse_nonfinite(self, where: list[str]) -> bool:
        if where and not self.skip_nonfinite:
            refuse_nonfinite(where)
        return bool(where)

    # ---- saving ----

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """What _entries tells; nothing before the first step, so that who needs to know what there will be makes one
        (torch.distributed.checkpoint)."""
        self._list_factors()
        return self._entries() if self._has_stepped else {}

    @state.setter
    def state(self, state: Any) -> None:
        """torch's constructor sets an empty one."""

    def _entries(self) -> dict[Tensor, dict[str, Any]]:
        """Under each layer's first tensor the generator, and what the class keeps for it ("W2", "W2.exp_avg", ...);
        under other parameters what it keeps for those. Made anew at each look, of the live tensors."""
        entries = {p: self.inner.state.get(p, {}) for group in self.param_groups for p in group["params"]}
        for generator in self.generators:
            parameters, held = generator.factors.layer.parameters(), generator.factors.state_dict()
            for parameter, base, factor in zip(parameters, held["bases"], held["factors"], strict=True):
                entries[parameter] = {"factor": factor} | ({} if base is None else {"base": base})
            for name, parameter in generator.named_parameters():
                entries[parameters[0]][name] = parameter.detach()
                for key, value in self.inner.state.get(parameter, {}).items():
                    entries[parameters[0]][f"{name}.{key}"] = value
        return entries

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that copies step (torch's holds the groups and its own state only)."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}  # a scheduler's, of this object

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the generators in "state", and "inner": what `inner` is and its groups' numbers. Resuming from
        it, and from the model and data at the same place, continues bit for bit."""
        self._list_factors()
        ours = self.register_state_dict_post_hook(_with_generators, prepend=True)  # before those of others
        try:
            return super().state_dict()
        finally:
            ours.remove()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state, and writes the factors that belong to it into the model. Those of oplora 0.1 (the inner
        optimizer's, and "generators") and of torch.distributed.checkpoint ("state" and "param_groups" only) load too.

        Raises:
            OPLoRAError: the state is of another model, rank, width or optimizer; nothing was changed.
        """
        self._list_factors()
        ours = self.register_load_state_dict_pre_hook(_load_generators)  # after those of others
        try:
            super().load_state_dict(state_dict)
        finally:
            ours.remove()


def create_oplora_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float | Tensor,
    hidden_width: int = 32,
    latent_width: int = 128,
    latent_std: float = 0.01,
    preset: str = "paper",
    hidden_lr_ratio: float | None = None,
    init: str | None = None,
    adapter_name: str | None = None,
    seed: int = 0,
    skip_nonfinite: bool = False,
    **optimizer_kwargs: Any,
) -> GeneratorOptimizer:
    """An optimizer class of torch's kind over the generators of a model's LoRA factors, and over its other trainable
    parameters. Its param_groups hold the factors and the others; loops, schedulers and scalers need not know more.

    Args:
        model: as for oplora.AdamW.
        optimizer_cls: for instance torch.optim.SGD; its other arguments are passed on by name. It has to step matrices
            and vectors by their gradients alone: not LBFGS, which calls a closure, nor Muon, which takes matrices only.
        lr: learning rate of W2, c2 and of the other trainable parameters; z, W1 and c1 get lr * hidden_lr_ratio.
        hidden_width: as in oplora.AdamW, but that the rate of W2 is lr at every width: 32 / hidden_width is right for
            Adam's kind only, and weight decay would follow.
        preset: "paper", or "flat", which is for Adam's kind too. As in oplora.AdamW, like all that follow:
        latent_width: the length of z.
        latent_std: standard deviation of z's start.
        hidden_lr_ratio: the rate of z, W1 and c1, as a multiple of lr.
        init: "paper" or "keep".
        adapter_name: generate this adapter only.
        seed: of the generators' starts.
        skip_nonfinite: skip a step whose gradient holds NaN or infinity, instead of raising.
        optimizer_kwargs: of optimizer_cls.

    Gradients are clipped where they are: those of A and B before step(), or those of the generators between
    optimizer.generators.backward() and step().

    Raises:
        OPLoRAError: no model or trainable adapter, arguments out of range, a class that cannot step the generators.
    """
    _check_arguments(
        model,
        optimizer_cls,
        hidden_lr_ratio,
        lr=lr,
        latent_std=latent_std,
        seed=seed,
        optimizer_kwargs=optimizer_kwargs,
    )
    if preset == "auto":
        raise OPLoRAValueError(
            "oplora.create_oplora_optimizer: preset is 'auto', which finds the rate of oplora.AdamW's own steps. Pass "
            "preset='paper' or 'flat', or take oplora.AdamW."
        )
    chosen = preset_of(preset, {"hidden_width": hidden_width, "init": None})
    widths: dict[str, Any] = {"hidden_width": hidden_width, "latent_width": latent_width, "latent_std": latent_std}
    init = chosen.init if init is None else init
    generators = Generators(model, init=init, adapter_name=adapter_name, seed=seed, **widths)
    others = list(other_parameters(model, adapter_name))
    generated = [p for g in generators for p in g.factors.layer.with_twins(g.factors.layer.parameters())]
    return GeneratorOptimizer(
        generators,
        optimizer_cls,
        others,
        unstepped=Unstepped(unwrapped(model), adapter_name, [*generated, *others]),
        lr=lr,
        preset=chosen,
        hidden_lr_ratio=hidden_lr_ratio,
        skip_nonfinite=skip_nonfinite,
        **optimizer_kwargs,
    )


# ---- arguments ----


def _check_arguments(
    model: Any, optimizer_cls: Any, hidden_lr_ratio: Any, *, lr: Any, optimizer_kwargs: dict[str, Any], **numbers: Any
) -> None:
    """Raises before anything is written into the model."""
    if not isinstance(model, nn.Module):
        raise OPLoRATypeError(
            f"oplora.create_oplora_optimizer: expected the model itself, got {type(model).__name__}. Pass the PEFT "
            "model, as in oplora.create_oplora_optimizer(model, torch.optim.SGD, lr=0.1): the layers are found in it."
        )
    _refuse_texts(lr=lr, hidden_lr_ratio=hidden_lr_ratio, **numbers, **optimizer_kwargs)
    _check_rate("lr", lr)
    for name, rate in (("weight_decay", optimizer_kwargs.get("weight_decay")), ("hidden_lr_ratio", hidden_lr_ratio)):
        if rate is not None:
            _check_rate(name, rate)
    _refuse_classes(optimizer_cls, lr=lr, **optimizer_kwargs)


def _refuse_texts(**numbers: Any) -> None:
    """Numbers as texts, and NaN, alone or among several."""
    for name, value in numbers.items():
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, str) and _is_number(number):
                raise OPLoRATypeError(
                    f"oplora: {name} is {value!r}, a string; expected a number. YAML reads 1e-4 as a string, and "
                    "1.0e-4 as a number."
                )
            if isinstance(number, float) and math.isnan(number):
                raise OPLoRAValueError(f"oplora: {name} is {value!r}, expected a number.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_rate(name: str, rate: Any) -> None:
    if isinstance(rate, Tensor):
        if rate.numel() != 1:
            raise OPLoRATypeError(f"oplora: {name} is a tensor of shape {tuple(rate.shape)}, expected one number.")
        if rate.device.type != "cpu":  # to read it the host would wait
            return
        rate = rate.item()
    if not isinstance(rate, Real) or isinstance(rate, bool):
        raise OPLoRATypeError(f"oplora: {name} is {rate!r}, expected a number of at least 0.")
    if not 0 <= float(rate) < math.inf:
        raise OPLoRAValueError(f"oplora: {name} is {rate!r}, expected a number of at least 0.")


def _refuse_classes(optimizer_cls: Any, **arguments: Any) -> None:
    """Raises for what cannot be made over matrices and vectors, before anything is written into the model."""
    name = getattr(optimizer_cls, "__name__", repr(optimizer_cls))
    begin = f"oplora.create_oplora_optimizer: {name} cannot step the generators"
    some = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (3,))]
    closure = inspect.signature(getattr(optimizer_cls, "step", _refuse_classes)).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise OPLoRATypeError(f"{begin}: its step() calls a closure as often as it likes. {WHAT_WORKS}")
    try:
        made = optimizer_cls([{"params": [p]} for p in some], **arguments)
    except Exception as error:
        kind = OPLoRAValueError if isinstance(error, ValueError) else OPLoRATypeError
        raise kind(f"{begin}: {str(error).rstrip('.')}. {WHAT_WORKS}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise OPLoRATypeError(f"{begin}: it makes {type(made).__name__}, no torch.optim.Optimizer. {WHAT_WORKS}")


def _differs(some: Any, other: Any) -> bool:
    return some is not other and (isinstance(some, Tensor) or isinstance(other, Tensor) or some != other)


# ---- saved states ----


def _with_generators(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(optimizer, GeneratorOptimizer)
    index = {id(p): i for i, p in enumerate(_parameters(optimizer))}
    state = {index[id(p)]: entries for p, entries in optimizer._entries().items()}
    inner = {
        "class": type(optimizer.inner).__name__,
        "layers": [generator.factors.layer.name for generator in optimizer.generators],
        "param_groups": optimizer.inner.state_dict()["param_groups"],
    }
    return {**saved, "state": state, "inner": inner}


def _load_generators(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Loads what is not torch's, after a look at everything; returns what is torch's."""
    assert isinstance(optimizer, GeneratorOptimizer)
    if "generators" in saved:
        generators, inner = saved["generators"], {key: saved[key] for key in ("state", "param_groups")}
        _check_groups(optimizer.inner.param_groups, inner["param_groups"])
        groups = _from_inner(optimizer.param_groups, inner["param_groups"])
    else:
        groups = saved["param_groups"]
        _check_inner(optimizer, saved.get("inner", {}))
        _check_groups(optimizer.param_groups, groups)
        generators, inner = _from_entries(optimizer, saved["state"], groups)
        inner["param_groups"] = saved.get("inner", inner)["param_groups"]
    optimizer.generators.check_state(generators)
    optimizer.generators.load_state_dict(generators)
    for generator in optimizer.generators:  # torch.distributed.checkpoint loses bases that were not there
        generator.factors.adopt_edits(generator.factors.layer.parameters(), generator.generate)
    optimizer.inner.load_state_dict(inner)
    optimizer._has_stepped = bool(optimizer.inner.state)
    return {"state": {}, "param_groups": groups}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_inner(optimizer: GeneratorOptimizer, saved: dict[str, Any]) -> None:
    name, layers = type(optimizer.inner).__name__, [generator.factors.layer.name for generator in optimizer.generators]
    if saved.get("class", name) != name:
        raise OPLoRAValueError(
            f"oplora: this state_dict is of {saved['class']} over generators, and this optimizer has {name}. Make it "
            "with the class of the run that was saved."
        )
    if different := sorted(set(saved.get("layers", layers)) ^ set(layers)):
        raise OPLoRAValueError(
            f"oplora: the saved generators are of other layers: {different[0]} is in one of the two only. Build the "
            "model with the adapter of the run that was saved."
        )


def _check_groups(mine: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    expected, got = ([len(group["params"]) for group in groups] for groups in (mine, saved))
    if expected != got:
        raise OPLoRAValueError(
            f"oplora: the state_dict's parameter groups do not fit the model: they have {got} tensors, expected "
            f"{expected}. Build the model and the optimizer as in the run that was saved."
        )


def _from_entries(
    optimizer: GeneratorOptimizer, state: dict[Any, dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state_dicts of the generators and of the inner optimizer, from the entries under each tensor's number."""
    numbers = [number for group in groups for number in group["params"]]
    placed = zip(_parameters(optimizer), numbers, strict=True)
    kept = {p: without_gaps(state[number]) for p, number in placed if number in state}
    generators: dict[str, Any] = {}
    for name, generator in optimizer.generators.named_modules():
        if not isinstance(generator, Generator):
            continue
        of_factors = [kept.pop(parameter, {}) for parameter in generator.factors.layer.parameters()]
        entries = of_factors[0]
        for key, parameter in generator.named_parameters():
            if key not in entries:
                raise OPLoRAValueError("oplora: this state_dict has no generators; it was saved by another optimizer.")
            generators[f"{name}.{key}"] = entries[key]
            kept[parameter] = {k.removeprefix(f"{key}."): v for k, v in entries.items() if k.startswith(f"{key}.")}
        bases, factors = ([own.get(key) for own in of_factors] for key in ("base", "factor"))
        generators[f"{name}._extra_state"] = {"bases": bases, "factors": factors}
    inner_state = {i: kept[p] for i, p in enumerate(_parameters(optimizer.inner)) if kept.get(p)}
    inner_groups = [
        {**mine, **{key: value for key, value in of.items() if key != "params"}}
        for mine, of in zip(optimizer.inner.state_dict()["param_groups"], [groups[0], *groups], strict=True)
    ]
    return generators, {"state": inner_state, "param_groups": inner_groups}


def _from_inner(mine: Sequence[dict[str, Any]], inner: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of one that was saved by oplora 0.1: an optimizer over the generators alone."""
    first, hidden, *others = inner
    ratio = hidden["lr"] / first["lr"] if first["lr"] else mine[0]["hidden_lr_ratio"]
    begin, groups = 0, []
    for group, numbers in zip(mine, ({**first, "hidden_lr_ratio": ratio}, *others), strict=True):
        end = begin + len(group["params"])
        groups.append({**numbers, "params": list(range(begin, end))})
        begin = end
    return groups
