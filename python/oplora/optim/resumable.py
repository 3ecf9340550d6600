"""A torch optimizer whose state are generators: found where torch keeps it, saved and loaded by torch's own calls."""

from collections import defaultdict
from itertools import chain
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import are_in_pieces
from ..engines import LayerState
from ..errors import OPLoRAError, OPLoRARuntimeError, OPLoRAValueError
from .groups import complete, with_names
from .plain import placed_like
from .presets import Preset
from .saved import (
    Loaded,
    check_layers,
    check_names,
    from_0_1,
    in_the_order_of,
    load_layer,
    refuse_without_generators,
    without_gaps,
)
from .stepping import Stepper

__all__ = ["Resumable"]


class Resumable(torch.optim.Optimizer):
    """What oplora.AdamW is as an object: its groups, its state, and what is saved of them.

    optimizer.state[p] of a generated tensor p is an engines.Entry: live views of what the core walks. It is there from
    the beginning, so that reading it, or saving it, changes nothing.
    """

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        self._stepper: Any = None  # a Stepper, once the groups are there
        self._entries: dict[Tensor, dict[str, Any]] = {}  # that were put into self.state
        self._seen: tuple[list[Tensor], list[Any]] = [], []  # what was in self.state, its keys and values
        super().__init__(groups, defaults)

    def _begin(self, stepper: Stepper, preset: Preset, hidden_lr_ratio: float | None) -> None:
        """With the generators behind what is in the groups."""
        self._stepper, self._preset, self._hidden_lr_ratio = stepper, preset, hidden_lr_ratio
        self._is_consolidated, self._is_fresh = False, True
        self._every_group = self.param_groups
        self._refresh()
        self.register_state_dict_pre_hook(Resumable._before_saving)  # type: ignore[arg-type]
        self.register_state_dict_post_hook(Resumable._complete_saved)  # type: ignore[arg-type]

    # ---- parameters and groups ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters that are stepped by plain AdamW: a generator stands behind what the optimizer was made
        with."""
        if self._stepper is not None and "param_names" in self.param_groups[0]:
            param_group = with_names(param_group, len(self._all()))
        super().add_param_group(param_group)
        if self._stepper is not None:
            self._refresh()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._refresh()
        super().zero_grad(set_to_none)

    def _all(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _refresh(self) -> list[nn.Parameter]:
        """The generated tensors as they are now; what was replaced, moved or added since the last time is followed."""
        stepper = self._stepper
        if stepper.pieces is not None:
            stepper.pieces.put_back(self.param_groups)
        own: list[nn.Parameter] = stepper.listing.now()
        self._every_group = self.param_groups
        if stepper.listing.has_changed(own, self.param_groups):
            if are_in_pieces(own):
                self._go_on_in_pieces()
                stepper = self._stepper
                own = stepper.listing.now()
            own, replaced = stepper.listing.update(own, self.param_groups)
            for old in [p for p in self.state if id(p) in replaced]:
                self.state[replaced[id(old)]] = placed_like(replaced[id(old)], self.state.pop(old))
            stepper.plain.hold(stepper.listing.others())
            self._complete_groups(own)
            self._forget()
            stepper.follow_division(own, self._all())
            stepper.assign(len(self.param_groups), own)
            self._publish()
        self._follow_entries()
        return own

    def _follow_entries(self) -> None:
        """Sees whether what is kept of the generated tensors is still where it was put. Where optimizer.state has the
        same dicts under the same tensors as at the last time, nothing is looked up."""
        keys, values = self._seen
        same = keys and len(keys) == len(self.state) and not any(map(is_not, self.state, keys))
        if same and not any(map(is_not, self.state.values(), values)) and all(self._entries.values()):
            return
        held = list(map(self.state.get, self._entries))
        if not held or not all(held) or any(map(is_not, held, self._entries.values())):
            self._take_entries()
        self._seen = list(self.state), list(self.state.values())

    def _go_on_in_pieces(self) -> None:
        """Goes on with what DeepSpeed's ZeRO has made of everything in the groups."""
        before = dict(self.state)
        self._stepper = self._stepper.in_pieces(self.param_groups)
        self.state.clear()
        self.state.update(self._stepper.pieces.of_state(before))

    def _awaits_more(self) -> bool:
        """DeepSpeed steps row by row: one group takes the place of all, or one row that of what is in a group. Puts all
        back; whether other rows follow, with whose gradients this one's are to be stepped."""
        if self._stepper.pieces is None and not are_in_pieces(self._stepper.listing.generated()[:1]):
            return False
        held = [group["params"] for group in self.param_groups]
        if all(any(group is known for known in self._every_group) for group in self.param_groups):
            self.param_groups = self._every_group
        self._refresh()
        awaits: bool = self._stepper.pieces.await_more(held, self.param_groups)
        return awaits

    def _complete_groups(self, own: list[nn.Parameter]) -> None:
        """What a group has beyond torch's if something in it is generated; where the rate is found, every group, as a
        step gives it to all of them."""
        every = range(len(self.param_groups)) if self._preset.finds_rate else self._stepper.listing.group_of(own)
        for g in set(every):
            complete(self.param_groups[g], self._preset, self._hidden_lr_ratio)

    def _forget(self) -> None:
        """Groups, tensors or their state are other ones: what is known of them is to be found out again."""

    def _publish(self) -> None:
        """Puts what is kept of every generated tensor where torch keeps it: optimizer.state."""
        self._entries.clear()
        for layer in self._stepper.states:
            self._publish_layer(layer)
        self._stepper.plain.begin(self.state)

    def _publish_layer(self, layer: LayerState) -> None:
        for parameter, entry in zip(layer.factors.layer.listed(), layer.published(), strict=True):
            self.state[parameter] = self._entries[parameter] = entry

    def _take_entries(self) -> None:
        """Somebody has put other dicts into optimizer.state (a copy of the optimizer, a trainer that moves what is in
        them): what they hold is taken. Or cleared it: the moments begin anew, as in any torch optimizer; what W2 has
        learnt is in the adapter and stays."""
        for layer in self._stepper.states:
            put: list[Any] = [self.state.get(parameter) for parameter in layer.factors.layer.listed()]
            if not all(put):
                layer.reset()
                continue
            for entry, theirs in zip(layer.published(), put, strict=True):
                entry.update({name: value for name, value in theirs.items() if name in entry})
        self._publish()

    # ---- saving ----

    def __getstate__(self) -> dict[str, Any]:
        """Everything, so that copies step (torch's holds the groups and its own state only)."""
        held = {name: value for name, value in self.__dict__.items() if name != "step"}  # a scheduler's, of this object
        state = defaultdict(dict, {p: _with_own_step(entry) for p, entry in self.state.items()})
        return {**held, "state": state, "_entries": {}, "_seen": ([], [])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.keys() != {"state", "param_groups"}:  # a copy
            super().__setstate__(state)
            return
        loaded = {p: value.entry for p, value in state["state"].items() if isinstance(value, Loaded)}
        rest = {p: value for p, value in state["state"].items() if not isinstance(value, Loaded)}
        if self._stepper.is_captured:
            rest = {p: _in_place(self.state.get(p, {}), value) for p, value in rest.items()}
        super().__setstate__({**state, "state": defaultdict(dict, rest)})
        self._every_group = self.param_groups
        for layer in self._stepper.states:
            load_layer(layer, [loaded[p] for p in layer.factors.layer.listed()])
        self._stepper.renew_captured()
        self._forget()
        self._complete_groups(self._stepper.listing.now())
        self._publish()

    def _before_saving(self) -> None:
        if self._stepper.shards is not None and not self._is_fresh and not self._is_consolidated:
            raise OPLoRARuntimeError(
                "oplora: this process has its own share of the generators only. Call "
                "optimizer.consolidate_state_dict(to=0) in every process first, then state_dict() in process 0 (with "
                "to=None in every process, as torch.distributed.checkpoint wants it)."
            )
        self._refresh()
        if self._stepper.agree_on_starts():
            self._publish()

    def _complete_saved(self, saved: dict[str, Any]) -> None:
        """Adds the factors themselves, and makes plain dicts of the live ones, which torch.load(weights_only=True)
        reads."""
        numbers = self._numbers_of_tensors()
        for parameter in self._stepper.listing.now():
            if (number := numbers[id(parameter)]) in saved["state"]:
                saved["state"][number] = {"factor": parameter.detach(), **saved["state"][number]}
        for layer in self._stepper.states:
            whole = layer.factors.layer
            for i, (parameter, unseen) in enumerate(zip(whole.listed(), layer.unseen(), strict=False)):
                entry = saved["state"][numbers[id(parameter)]]
                for name, value in unseen.items():
                    entry.pop(name, None)
                    if value is not None:
                        entry[name] = whole.published(i, value)

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
        own = [p for layer in stepper.states for p in layer.factors.layer.listed()]
        share = {numbers[id(p)]: {"factor": p.detach(), **self.state[p]} for p in own}
        gathered = stepper.shards.gather(share, to)
        if gathered is not None:
            self.state.update({everything[i]: entry for i, entry in gathered.items() if i not in share})
        self._is_consolidated = gathered is not None

    def _drop_consolidated(self) -> None:
        if self._is_consolidated:
            own = {id(p) for layer in self._stepper.states for p in layer.factors.layer.listed()}
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
        hold: Any = Resumable._hold
        last = self.register_load_state_dict_pre_hook(hold)  # behind everybody else's
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
            saved = from_0_1(saved, self._stepper.layers)
        refuse_without_generators(saved)
        check_names(self.param_groups, saved["param_groups"])
        saved = in_the_order_of(self.param_groups, saved)
        theirs = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
        number = dict(zip(map(id, self._all()), theirs, strict=False))
        state, layers = dict(saved["state"]), self._stepper.states
        tensors = [layer.factors.layer.listed() for layer in layers]
        of_layers = [
            layer.received([without_gaps(state.get(number.get(id(p), -1))) for p in some])
            for layer, some in zip(layers, tensors, strict=True)
        ]
        if len(theirs) == len(self._all()):  # otherwise torch says what does not fit
            self._stepper.together(lambda: check_layers(layers, of_layers))
        every = [state.pop(number.get(id(p), -1), None) for p in self._stepper.listing.now()]
        for p, entry in zip(chain.from_iterable(tensors), chain.from_iterable(of_layers), strict=True):
            state[number.get(id(p), -1)] = Loaded(entry or {})
        # of a sharded optimizer: whether it was given its own share alone, as state_dict() of a fresh one has it
        self._is_fresh = self._is_fresh and sum(entry is not None for entry in every) == sum(map(len, tensors))
        self._is_consolidated = False
        return {**saved, "state": state}


def _with_own_step(entry: dict[str, Any]) -> dict[str, Any]:
    """Without the view of a float table as integers, which torch.save refuses."""
    step = entry.get("step")
    return {**entry, "step": step.clone()} if isinstance(step, Tensor) else entry


def _in_place(mine: Any, saved: Any) -> Any:
    """What was saved of a plainly stepped parameter, in the tensors that a captured step reads and writes."""
    if not isinstance(mine, dict) or not isinstance(saved, dict):
        return saved
    return {name: _written(mine.get(name), value) for name, value in saved.items()}


def _written(mine: Any, saved: Any) -> Any:
    both = isinstance(mine, Tensor) and isinstance(saved, Tensor)
    return mine.copy_(saved) if both and mine.shape == saved.shape else saved
