"""Which tensors an optimizer generates, as the layers hold them now, and in which of its parameter groups they are."""

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_not
from typing import Any

from torch import nn

from ..adapters import AdaptedLayer, PlainLayer, by_layer, check_layers, is_divided, known_or_found
from ..errors import OPLoRARuntimeError

__all__ = ["Listing", "differ"]

_merged_adapters, _is_disabled = attrgetter("merged_adapters"), attrgetter("_disable_adapters")


class Listing:
    """The generated tensors of all layers, one behind the other: `now()`. PEFT may replace them at any time.

    model: that the layers are of, where one was handed over; rows: what groups list, and only pieces of it are stepped.
    """

    def __init__(
        self, layers: Sequence[AdaptedLayer], model: nn.Module | None = None, rows: Sequence[Any] = ()
    ) -> None:
        self.layers, self._model, self._rows = layers, model, {id(row) for row in rows}
        self._places = [place for layer in layers for place in layer.places()]
        self._modules = list({id(module): module for layer in layers for module in layer.modules()}.values())
        self._has_twins = any(layer.twins for layer in layers)
        self._known: list[nn.Parameter] = []
        self.groups: list[list[nn.Parameter]] = []  # what is in each, at the last update()
        self._is_divided = False

    def now(self) -> list[nn.Parameter]:
        """The layers' own tensors."""
        try:
            own = [at[key]._parameters["weight"] if of_module else at[key] for at, key, of_module in self._places]
        except KeyError:
            return [p for layer in self.layers for p in layer.parameters()]  # which says what is gone
        return list(map(known_or_found, self._known, own)) if self._is_divided else own

    def _with_twins(self, own: list[nn.Parameter]) -> list[nn.Parameter]:
        if not self._has_twins:
            return own
        return [p for layer, some in zip(self.layers, self.by_layer(own), strict=True) for p in layer.with_twins(some)]

    def by_layer(self, own: Sequence[Any]) -> list[list[Any]]:
        """A list a layer, of a list with an item a tensor."""
        return by_layer(self.layers, own)

    def any_folded(self) -> bool:
        """Whether a layer is merged into its base, or switched off."""
        return any(map(_merged_adapters, self._modules)) or any(map(_is_disabled, self._modules))

    def has_changed(self, own: list[nn.Parameter], groups: Sequence[dict[str, Any]]) -> bool:
        """Whether a tensor, or what a group holds, is another than at the last update()."""
        known = self._known
        return (
            differ(own, known)
            or len(groups) != len(self.groups)
            or any(differ(group["params"], held) for group, held in zip(groups, self.groups, strict=True))
        )

    def update(
        self, own: list[nn.Parameter], groups: Sequence[dict[str, Any]]
    ) -> tuple[list[nn.Parameter], dict[int, nn.Parameter]]:
        """Puts tensors that PEFT or fully_shard has replaced into the places of those before. Returns the layers' own
        as they are now, and which were replaced: the new one by the id of the old.

        Raises:
            OPLoRAError: somebody else has put other tensors in their place.
        """
        there = self._in_the_same_places(groups)
        if there:
            for layer in self.layers:
                if isinstance(layer, PlainLayer):
                    layer.held[:] = [there.get(id(p), p) for p in layer.held]
            own = self.now()
        before = self._with_twins(self._known) if self._known else []
        after = self._with_twins(own)
        replaced = there | {id(old): new for old, new in zip(before, after, strict=False) if old is not new}
        if any(map(is_divided, replaced.values())):
            replaced |= self._divided_since(groups)
        for group in groups:
            group["params"] = [replaced.get(id(p), p) for p in group["params"]]  # a list of its own: accelerate writes
        listed = {id(p) for group in groups for p in group["params"]}
        if any(id(p) not in listed for p in after):
            raise OPLoRARuntimeError(
                "oplora: somebody put other parameters in the place of the factors in optimizer.param_groups, which "
                "would get no gradients. Make a new optimizer of the parameters that are trained now."
            )
        if differ(own, self._known):
            check_layers(self.layers)
        self._is_divided = any(map(is_divided, own))
        self._known, self.groups = own, [list(group["params"]) for group in groups]
        return own, replaced

    def _in_the_same_places(self, groups: Sequence[dict[str, Any]]) -> dict[int, nn.Parameter]:
        """What accelerate has put into the places of tensors that fully_shard has divided, by the ids of these."""
        if [len(group["params"]) for group in groups] != list(map(len, self.groups)):
            return {}
        pairs = zip(chain.from_iterable(self.groups), (p for group in groups for p in group["params"]), strict=True)
        return {id(old): new for old, new in pairs if new is not old and is_divided(new) and new.shape == old.shape}

    def _divided_since(self, groups: Sequence[dict[str, Any]]) -> dict[int, nn.Parameter]:
        """What fully_shard has made of all else that the optimizer has of the model, by the id of what was there."""
        if self._model is None:
            return {}
        present = dict(self._model.named_parameters())
        pairs = ((p, present.get(name)) for g in groups for name, p in zip(g["param_names"], g["params"], strict=True))
        return {id(old): new for old, new in pairs if new is not None and new is not old and is_divided(new)}

    def group_of(self, own: Iterable[nn.Parameter]) -> list[int]:
        """The number of each tensor's group."""
        groups = {id(p): g for g, held in enumerate(self.groups) for p in held}
        return [groups[id(p)] for p in own]

    def others(self) -> list[list[nn.Parameter]]:
        """Of each group what is not generated."""
        apart = {id(p) for p in self._with_twins(self._known)} | self._rows
        return [[p for p in held if id(p) not in apart] for held in self.groups]

    def generated(self) -> list[nn.Parameter]:
        """All of them as they were listed last, twins too."""
        return self._with_twins(self._known)


def differ(some: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> bool:
    return len(some) != len(others) or any(map(is_not, some, others))
