"""What is generated: from whatever somebody hands an optimizer to layers, and to the groups that torch wants.

One rule, in this order. A module with PEFT's layers: those. Otherwise a tensor's name, which (name, tensor) pairs and
modules give, or its `original_name`: those belong together whose names differ in the tensor's own name alone. Otherwise
shapes: a down projection (r, in_features, ...) and an up projection (out_features, r, 1, ...) with r below in_features
are a pair, if they come in turn, or some downs before as many ups. Everything else is no adapter's, and plain.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import OPLoRATypeError, OPLoRAValueError
from .layers import AdaptedLayer, PlainLayer, check_parameter, refuse_flattened
from .peft import check_adapter_name, find_layers, has_peft_layers, memory_of, other_parameters, unwrapped
from .share import divide_again, is_zero
from .tensors import OTHER_NAMES, STARTS

__all__ = ["Found", "find", "layer_of"]


@dataclass(frozen=True)
class Found:
    """What is generated, the groups of all parameters, and the module, where one was handed over."""

    layers: Sequence[AdaptedLayer]
    groups: list[dict[str, Any]]
    model: nn.Module | None


@dataclass(frozen=True)
class PlainTwin:
    """Another Parameter over the memory of a layer's `index`-th tensor."""

    layer: str
    tensor: str
    index: int
    held: nn.Parameter

    def parameter(self) -> nn.Parameter:
        return self.held


def find(params: Any, adapter_name: str | None = None) -> Found:
    """The layers and groups of a module, or of tensors, (name, tensor) pairs or groups of either.

    Raises:
        OPLoRAError: nothing that can be generated; tensors whose shapes fit together in several ways.
    """
    check_adapter_name(adapter_name)
    if isinstance(params, nn.Module):
        return _of_module(unwrapped(params), adapter_name)
    groups = _as_groups(params)
    named, unnamed = _by_name(groups)
    layers: list[PlainLayer] = [*_layers_by_name(named, adapter_name), *_layers_by_shape(unnamed)]
    if not layers:
        refuse_flattened("the parameters are", (tensor for _, tensor in _all(groups)))
        raise OPLoRAValueError(_nothing(sum(len(group["params"]) for group in groups)))
    order = {id(tensor): i for i, (_, tensor) in enumerate(_all(groups))}
    layers.sort(key=lambda layer: order[id(layer.held[0])])
    return Found(layers, groups, None)


def _of_module(model: nn.Module, adapter_name: str | None) -> Found:
    """One group of what is generated, and one of everything else that is trainable."""
    divide_again(model)
    layers: Sequence[AdaptedLayer] = ()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not has_peft_layers(model):
        layers = _layers_by_name(trainable, adapter_name)
    if not layers:
        layers = find_layers(model, adapter_name)
    names = {id(p): name for name, p in model.named_parameters()}
    generated = [p for layer in layers for p in layer.with_twins(layer.parameters())]
    taken = {id(p) for p in generated}
    others = [p for p in other_parameters(model, adapter_name) if id(p) not in taken]
    groups = [{"params": [(names[id(p)], p) for p in some]} for some in (generated, others) if some]
    return Found(layers, groups, model)


# ---- what was handed over ----


def _as_groups(params: Any) -> list[dict[str, Any]]:
    """A list of groups of lists."""
    if isinstance(params, Tensor | dict) or not isinstance(params, Iterable):
        raise OPLoRATypeError(
            f"oplora: params is a {type(params).__name__}, expected a module (oplora.AdamW(model)), or an iterable of "
            "tensors, of (name, tensor) pairs or of groups of them, as torch's optimizers take."
        )
    if isinstance(params, set):
        raise OPLoRATypeError("oplora: params is a set, which has no order. Pass a list.")
    items = list(params)
    if not items:
        raise OPLoRAValueError("oplora: the list of parameters is empty. Pass the model, or its trainable parameters.")
    if not isinstance(items[0], dict):
        items = [{"params": items}]
    groups = [_as_group(i, item) for i, item in enumerate(items)]
    _refuse_mixtures(groups)
    return groups


def _as_group(i: int, group: Any) -> dict[str, Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise OPLoRATypeError(f"oplora: parameter group {i} is no dict with 'params' in it, as the others are.")
    params = group["params"]
    if isinstance(params, set):
        raise OPLoRATypeError(f"oplora: the params of group {i} are a set, which has no order. Pass a list.")
    if not isinstance(params, Iterable):
        raise OPLoRATypeError(
            f"oplora: the params of group {i} are a {type(params).__name__}, expected tensors, or (name, tensor) "
            "pairs, as model.parameters() gives them. A model itself goes without groups: oplora.AdamW(model)."
        )
    held = [params] if isinstance(params, Tensor) else list(params)
    for item in held:
        tensor = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(tensor, Tensor):
            raise OPLoRATypeError(
                f"oplora: the params of group {i} hold a {type(tensor).__name__}, expected tensors, or (name, tensor) "
                "pairs."
            )
    return {**group, "params": held}


def _refuse_mixtures(groups: Sequence[dict[str, Any]]) -> None:
    """Raises for what torch's optimizers do not take either, before anything is looked for."""
    items = [item for group in groups for item in group["params"]]
    if len({isinstance(item, tuple) for item in items}) > 1:
        raise OPLoRAValueError(
            "oplora: some parameters have names and some have none. Give all of them a name, or none."
        )
    tensors = [item[1] if isinstance(item, tuple) else item for item in items]
    places: dict[int, int] = {}
    for place, tensor in enumerate(tensors):
        if not (tensor.is_leaf or tensor.retains_grad):
            raise OPLoRAValueError(
                f"oplora: parameter {place}, of shape {tuple(tensor.shape)}, was computed from others, so steps on it "
                "would be lost. Pass what it was computed from."
            )
        if (first := places.setdefault(id(tensor), place)) != place:
            raise OPLoRAValueError(
                f"oplora: parameter {place}, of shape {tuple(tensor.shape)}, is parameter {first} once more (counted "
                "over all groups). Pass every parameter once."
            )


def _all(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str | None, Any]]:
    """Every tensor with its name, if it has one."""
    for group in groups:
        for item in group["params"]:
            name, tensor = item if isinstance(item, tuple) else (getattr(item, "original_name", None), item)
            yield name, tensor


def _by_name(groups: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, Any]], list[list[tuple[int, Any]]]]:
    """Trainable tensors with a name; and those without, with their places, group by group."""
    named: list[tuple[str, Any]] = []
    unnamed: list[list[tuple[int, Any]]] = []
    place = 0
    for group in groups:
        unnamed.append([])
        for name, tensor in _all([group]):
            if tensor.requires_grad:
                if name is None:
                    unnamed[-1].append((place, tensor))
                else:
                    named.append((name, tensor))
            place += 1
    return named, unnamed


# ---- by name ----


def _layers_by_name(named: Iterable[tuple[str, Any]], adapter_name: str | None) -> list[PlainLayer]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    named = list(named)
    pruned = {name.partition(".lora_E.")[0] for name, _ in named if ".lora_E." in name}  # AdaLoRA's, between the steps
    for name, tensor in named:
        if (parsed := _parsed(name)) is None or adapter_name not in (None, parsed[1]) or parsed[0] in pruned:
            continue
        layer, adapter, role = parsed
        held = found.setdefault((layer, adapter), {})
        if role in held:
            raise OPLoRAValueError(
                f"oplora: two tensors are {role} of layer {layer!r} ({name} is the second). Give each layer a name of "
                "its own."
            )
        check_parameter(layer, role, tensor)
        held[role] = tensor
    layers = []
    for (layer, adapter), held in found.items():
        roles = [role for role in STARTS if role in held]  # as they lie in a PEFT layer
        name = ".".join(part for part in (layer, adapter) if part)
        layers.append(PlainLayer(name, adapter, roles, [held[role] for role in roles]))
    return _without_twins(layers)


def layer_of(name: str) -> str | None:
    """The layer, with its adapter, whose tensor has this name; None for what is no adapter's."""
    parsed = _parsed(name)
    return None if parsed is None else ".".join(part for part in parsed[:2] if part)


def _parsed(name: str) -> tuple[str, str, str] | None:
    """(layer, adapter, tensor of STARTS) of a parameter's name: "model.q_proj.lora_A.default.weight"."""
    parts = name.replace("_orig_mod.", "").split(".")
    for i, part in enumerate(parts):
        role = part if part in STARTS else OTHER_NAMES.get(part)
        if role is None or (part in ("down", "up") and "lora" not in parts[i - 1]):
            continue
        return ".".join(parts[:i]), ".".join(p for p in parts[i + 1 :] if p != "weight"), role
    return None


def _without_twins(layers: list[PlainLayer]) -> list[PlainLayer]:
    """A tensor that lies in another's memory is that one's twin."""
    owners: dict[Any, tuple[PlainLayer, int]] = {}
    kept = []
    for layer in layers:
        own: list[int] = []
        for i, tensor in enumerate(layer.held):
            memory = memory_of(tensor)
            if memory in owners and tensor.numel():
                owner, index = owners[memory]
                owner.twins = [*owner.twins, PlainTwin(layer.name, layer.tensors[i], index, tensor)]
            else:
                owners[memory] = layer, len(own)
                own.append(i)
        if own:
            layer.tensors = tuple(layer.tensors[i] for i in own)
            layer.shapes = tuple(layer.shapes[i] for i in own)
            layer.held = [layer.held[i] for i in own]
            kept.append(layer)
    return kept


# ---- by shape ----


def _layers_by_shape(groups: Sequence[Sequence[tuple[int, Any]]]) -> list[PlainLayer]:
    """Pairs within each group; what is left, as LoRA+ puts A and B into groups of their own, over all groups."""
    matrices = [[item for item in group if item[1].dim() >= 2] for group in groups]
    everywhere = [item for group in matrices for item in group]
    pairs, left = [], []
    for group in matrices:
        some = [item for item in group if _fits_any(item, everywhere)]
        paired = _in_runs(some)
        pairs += paired
        left += [] if paired else some
    if left and not (rest := _in_runs(left)):
        raise OPLoRAValueError(_ambiguous(left))
    return [_pair(*pair) for pair in [*pairs, *(rest if left else [])]]


def _fits(down: Any, up: Any) -> bool:
    r = down.shape[0]
    return bool(up.shape[1:].numel() == up.shape[1] == r and r < down.shape[1:].numel())


def _fits_any(item: tuple[int, Any], others: Sequence[tuple[int, Any]]) -> bool:
    return any(_fits(item[1], other) or _fits(other, item[1]) for _, other in others if other is not item[1])


def _in_runs(some: Sequence[tuple[int, Any]]) -> list[tuple[Any, Any]]:
    """In turn, or a few downs before their ups (kohya's split layers), or all downs before all ups; none where that
    does not come out even."""
    pairs: list[tuple[Any, Any]] = []
    while 2 * len(pairs) < len(some):
        rest = some[2 * len(pairs) :]
        runs = (_all_fit(rest[:k], rest[k : 2 * k]) for k in range(1, len(rest) // 2 + 1))
        if not (run := next((run for run in runs if run), [])):
            return _all_fit(some[: len(some) // 2], some[len(some) // 2 :])
        pairs += run
    return pairs


def _all_fit(downs: Sequence[tuple[int, Any]], ups: Sequence[tuple[int, Any]]) -> list[tuple[Any, Any]]:
    """The pairs, or none where not all are."""
    if len(downs) != len(ups) or not all(_fits(d[1], u[1]) for d, u in zip(downs, ups, strict=True)):
        return []
    return list(zip(downs, ups, strict=True))


def _pair(down: tuple[int, Any], up: tuple[int, Any]) -> PlainLayer:
    """Of the pair the one that is zero starts at zero: LoRA's up, but an embedding's down."""
    name = f"parameters {down[0]} and {up[0]}"
    tensors = [down[1], up[1]]
    for tensor in tensors:
        check_parameter(name, "a tensor", tensor)
    zero = [is_zero(tensor) for tensor in tensors]
    roles = ("lora_embedding_A", "lora_embedding_B") if zero == [True, False] else ("lora_A", "lora_B")
    return PlainLayer(name, "", roles, tensors)


def _ambiguous(left: Sequence[tuple[int, Any]]) -> str:
    listed = ", ".join(f"{place}: {tuple(tensor.shape)}" for place, tensor in left[:6])
    return (
        f"oplora: {len(left)} tensors without names could be adapters, but their shapes do not tell which belong "
        f"together ({listed}{', ...' if len(left) > 6 else ''}; number and shape). Pass the model, "
        "oplora.AdamW(model), or model.named_parameters(); after get_peft_model, as a model without an adapter has "
        "none to find. Tensors without names are paired where each down projection (r, in_features) comes before its "
        "up projection (out_features, r), or all downs before all ups. A tensor's `original_name` is its name too, as "
        "in 'q_proj.lora_A.weight' and 'q_proj.lora_B.weight'."
    )


def _nothing(count: int) -> str:
    return (
        f"oplora: there is no adapter among the {count} parameters: no names that end as in 'lora_A.weight' and "
        "'lora_B.weight', no pair of a down projection (r, in_features) and an up projection (out_features, r), or "
        "none that is trainable. Add one first, model = get_peft_model(model, LoraConfig(...)), or use "
        "torch.optim.AdamW."
    )
