"""What is saved of the generators: checked before anything is changed, and put back; checkpoints of version 0.1 too.

A state_dict is torch's: {"state": {number of a tensor: {...}}, "param_groups": [...]}. A generated tensor's dict is
its engines.Entry, as plain tensors and numbers, and "factor", the tensor's own value, so that resuming restores its
very bits. Without it, as torch.distributed.checkpoint flattens by what is in optimizer.state, the model's values
count. Version 0.1 had the generators under a key of their own, by the layer's name.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..adapters import layer_of
from ..engines import LayerState, entries_of_0_1
from ..errors import OPLoRATypeError, OPLoRAValueError

__all__ = [
    "Loaded",
    "check_layers",
    "check_names",
    "from_0_1",
    "in_the_order_of",
    "load_layer",
    "refuse_without_generators",
    "without_gaps",
]

KINDS = {"weight_change": "lean", "weight": "exact", "generated": "rate"}  # by a key that only the one has
MADE_WITH = {  # an optimizer of each kind
    "lean": "state='lean' (presets 'paper' and 'flat')",
    "exact": "state='exact'",
    "rate": "preset='auto'",
}
SETTINGS = ("hidden_width", "latent_width", "weight_rank", "moment_rank", "sign")
BEGUN = {"listens": (1, 1 << 62), "seed": (-(1 << 63), 1 << 64), "layer": (0, 1 << 32), "random": (0, 1 << 62)}


DAMAGED = "The checkpoint is damaged or was edited: take another one."


class Loaded:
    """What was saved of a layer's tensor, wrapped so that torch's load_state_dict hands it on as it is: it would cast
    everything to the parameter's dtype."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry


def without_gaps(entry: Any) -> Any:
    """torch.distributed.checkpoint, which has flattened an entry, puts an empty dict where nothing was saved."""
    if not isinstance(entry, Mapping):
        return entry
    return {name: value for name, value in entry.items() if not isinstance(value, Mapping) or value}


# ---- checking ----


def check_names(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raises where tensors have names on both sides, and these are of other layers."""
    names = [chain.from_iterable(group.get("param_names", ()) for group in some) for some in (groups, saved)]
    ours, theirs = ({layer for name in some if (layer := layer_of(name)) is not None} for some in names)
    if ours and theirs and ours != theirs:
        raise OPLoRAValueError(_other_layers(ours, theirs))


def in_the_order_of(groups: Sequence[Mapping[str, Any]], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state for groups whose tensors are in another order: torch goes by places, and here a tensor's own
    value comes along, which would be written into another layer. Where every tensor has a name, names tell.

    Raises:
        OPLoRAError: an adapter's tensor is in a group in which it was not.
    """
    theirs: Sequence[dict[str, Any]] = saved["param_groups"]
    if [len(group["params"]) for group in theirs] != [len(group["params"]) for group in groups]:
        return saved  # torch says what does not fit
    ordered = []
    for g, (ours, group) in enumerate(zip(groups, theirs, strict=True)):
        names, known = ([_plain_name(name) for name in some.get("param_names", ())] for some in (ours, group))
        if names != known and set(names) == set(known) and len(known) == len(group["params"]):
            places = [known.index(name) for name in names]
            group = {**group, **{key: [group[key][i] for i in places] for key in ("params", "param_names")}}
            known = names
        for mine, other in zip(names, known, strict=False):
            if layer_of(mine) != layer_of(other):
                raise OPLoRAValueError(
                    f"oplora: parameter group {g} has {mine} where the saved one has {other}. Make the groups of the "
                    "same tensors as in the run that was saved. Nothing was changed."
                )
        ordered.append(group)
    return {**saved, "param_groups": ordered}


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")


def refuse_without_generators(saved: Mapping[str, Any]) -> None:
    """Raises for what another optimizer has saved."""
    entries = saved["state"].values() if isinstance(saved.get("state"), Mapping) else ()
    if not any(isinstance(entry, Mapping) and not KINDS.keys().isdisjoint(entry) for entry in entries):
        raise OPLoRAValueError(
            "oplora: this state_dict has no generators: another optimizer saved it. Load it into that optimizer. Or "
            "load nothing: a new oplora.AdamW continues from the values that the adapter has."
        )


def check_layers(layers: Sequence[LayerState], saved: Sequence[Sequence[Any]]) -> None:
    """Raises unless load_layer of all of them will go through; changes nothing. saved: an item a tensor of a layer."""
    for layer, entries in zip(layers, saved, strict=True):
        layer.factors.layer.refuse_if_folded()
        _check_layer(layer, entries)


def _check_layer(layer: LayerState, saved: Sequence[Any]) -> None:
    _check_kind(layer, saved)
    columns = next(key for key, kind in KINDS.items() if kind == layer.engine.state.KIND)
    first = 0 if columns == "generated" else 1  # of a row factor's dimensions: the columns
    shapes = [list(getattr(entry[columns], "shape", ())[first:]) for entry in saved]
    if shapes != (mine := [list(shape) for shape in layer.factors.shapes]):
        raise OPLoRAValueError(
            f"oplora: the saved state of layer {layer.name} has shapes {shapes}, this optimizer {mine}. Build the "
            "adapter (r, rank_pattern) and the optimizer with the settings of the run that was saved."
        )
    entries = layer.entries()
    for name in SETTINGS:
        if name in entries[0] and saved[0][name] != entries[0][name]:
            shown = {"sign": "start"}.get(name, name)
            theirs, ours = (_shown(name, some[0][name]) for some in (saved, entries))
            raise OPLoRAValueError(
                f"oplora: the saved state of layer {layer.name} has {shown} {theirs}, this optimizer {ours}. Build "
                "the adapter (r, rank_pattern) and the optimizer with the settings of the run that was saved."
            )
    for own, entry, shape in zip(entries, saved, layer.factors.shapes, strict=True):
        for name, value in own.items():
            if isinstance(value, Tensor) and name not in ("base", "master", "step"):
                _check_like(f"{name} of layer {layer.name}", entry[name], value)
        for name in ("factor", "base", "master"):
            if name in entry and getattr(entry[name], "shape", None) != shape:
                raise OPLoRAValueError(f"oplora: the saved {name} of layer {layer.name} is not of the tensor's shape.")
    _check_begun(layer, saved[0], entries[0])


def _check_kind(layer: LayerState, saved: Sequence[Any]) -> None:
    kind = layer.engine.state.KIND
    factor = {"factor"} if any(isinstance(entry, dict) and "factor" in entry for entry in saved) else set[str]()
    for own, entry in zip(layer.entries(), saved, strict=True):
        if not isinstance(entry, dict):
            raise OPLoRAValueError(
                f"oplora: the saved state of layer {layer.name} is a {type(entry).__name__}; it is not of "
                f"{MADE_WITH[kind]}."
            )
        theirs = next((KINDS[key] for key in KINDS if key in entry), None)
        if theirs not in (None, kind):
            raise OPLoRAValueError(
                f"oplora: the saved state of layer {layer.name} is of an optimizer with {MADE_WITH[theirs]}, this one "
                f"has {MADE_WITH[kind]}. One cannot be converted into the other. To resume, make the optimizer with "
                f"the arguments of the run that was saved. To continue with {MADE_WITH[kind]}, load the saved adapter "
                "and no state: A and B keep their values, the moments begin at 0."
            )
        wanted = (own.keys() | factor) - {"base", "master"}
        if missing := wanted - entry.keys():
            raise OPLoRAValueError(
                f"oplora: the saved state of layer {layer.name} lacks {', '.join(sorted(missing))}; it is not of "
                f"an optimizer with {MADE_WITH[kind]}."
            )


def _check_begun(layer: LayerState, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Numbers that tell how a generator began, and how far it is."""
    for name, (least, end) in BEGUN.items():
        if name in own and not (isinstance(saved[name], int) and least <= saved[name] < end):
            raise OPLoRAValueError(f"oplora: the saved {name} of layer {layer.name} is {saved[name]!r}. {DAMAGED}")
    latent_std = saved.get("latent_std", 0.0)
    if not isinstance(latent_std, int | float) or not 0 <= latent_std < float("inf"):
        raise OPLoRAValueError(f"oplora: the saved latent_std of layer {layer.name} is {latent_std!r}. {DAMAGED}")
    step = saved["step"]
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
    if not isinstance(number, int | float) or number < 0 or number != int(number):
        raise OPLoRAValueError(f"oplora: the saved step of layer {layer.name} is {step!r}. {DAMAGED}")


def _check_like(what: str, saved: Any, mine: Tensor) -> None:
    if not isinstance(saved, Tensor):
        raise OPLoRATypeError(f"oplora: the saved {what} is a {type(saved).__name__}, expected a tensor.")
    if saved.shape != mine.shape or saved.dtype != mine.dtype:
        raise OPLoRAValueError(
            f"oplora: the saved {what} is {saved.dtype} of shape {tuple(saved.shape)}, expected {mine.dtype} of shape "
            f"{tuple(mine.shape)}. It was saved from another model, rank, width or dtype."
        )


def _shown(name: str, value: Any) -> str:
    return repr("sign" if value else "uniform") if name == "sign" else str(value)


# ---- putting back ----


@torch.no_grad()
def load_layer(layer: LayerState, saved: Sequence[dict[str, Any]]) -> None:
    """Takes the state, and writes the factors that belong to it into the model."""
    tie = layer.factors
    for own, entry in zip(layer.entries(), saved, strict=True):
        for name, value in own.items():
            if isinstance(value, Tensor) and name not in ("base", "master"):
                own[name] = entry[name]
    layer.engine.state.take_settings(layer.index, saved[0])
    tie.bases = [
        None if (base := entry.get("base")) is None else base.to(tie.device, tie.dtype, copy=True).contiguous()
        for entry in saved
    ]
    parameters = tie.layer.parameters()
    for i, (parameter, entry) in enumerate(zip(parameters, saved, strict=True)):
        factor, master = entry.get("factor", parameter.detach()), entry.get("master")
        exact = factor if master is None else master  # also where the model was of another dtype then
        parameter.detach().copy_(factor if factor.dtype == parameter.dtype else exact)
        if layer.masters[i] is not None:
            layer.keep_master(i, exact)
    layer.is_fresh = int(layer.engine.numbers.steps[layer.index]) == 0
    tie.forget()
    layer.engine.forget(layer, wrote="factor" in saved[0])
    if layer.engine.state.KIND == "exact" and "factor" in saved[0]:
        layer.engine.state.absorb(
            layer, parameters
        )  # a base that torch.distributed.checkpoint, with none here, left out


# ---- version 0.1 ----


def from_0_1(saved: dict[str, Any], layers: Iterable[Any]) -> dict[str, Any]:
    """A state_dict of 0.1 in the present form. layers: the model's, in order, with their numbers of tensors and twins.

    Its first group were the factors, layer by layer with their twins, its second everything else.
    """
    generators, state, number = dict(saved["generators"]), dict(saved["state"]), 0
    mine = {layer.name for layer in layers}
    if not isinstance(saved["generators"], Mapping) or generators.keys() - mine:
        raise OPLoRAValueError(_other_layers(mine, set(generators)))
    for layer in layers:
        if layer.name in generators:
            entries = entries_of_0_1(layer.name, generators[layer.name])
            state |= {number + i: entry for i, entry in enumerate(entries)}
        number += len(layer.with_twins(layer.parameters()))
    rest = {key: value for key, value in saved.items() if key not in ("state", "generators")}
    return {"state": state, **rest}


def _other_layers(mine: set[str], saved: set[str]) -> str:
    lacking, extra = sorted(mine - saved), sorted(saved - mine)
    parts = [f"it lacks {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"] if lacking else []
    parts += [f"it has {', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''} besides"] if extra else []
    return (
        f"oplora: the saved generators are of other layers: {'; '.join(parts)}. Build the model with the adapter "
        "(names, target_modules) of the run that was saved."
    )
