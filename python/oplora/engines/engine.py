"""What all engines share: the generators of one dtype and device, a step's numbers, and layers that step together.

An engine is one state (lean.py, exact.py: what is kept of a generator, and the core's calls for it) on one kind of
device (host.py, device.py: how a step runs there).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate, repeat
from operator import attrgetter, is_not
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import STARTS, Start, by_layer
from .factors import Factors
from .memory import CPU
from .settings import Settings
from .written import marks

__all__ = ["Batch", "Engine", "Entry", "LayerState", "Numbers", "State", "StepNumbers"]

GroupNumbers = Sequence[float | Tensor]  # lr, weight_decay, hidden_lr, beta1, beta2, eps, as a parameter group has them
_dtype, _layout, _is_fresh = attrgetter("dtype"), attrgetter("layout"), attrgetter("is_fresh")


class StepNumbers(NamedTuple):
    """Of a layer at a step: ||h||^2, how many units are on, ||g||^2, ||.||^2 of the hidden path's gradient, and the sum
    of h or a bound on it."""

    h_square: float
    live: float
    g_square: float
    hidden_square: float
    h_sum: float


class State(ABC):
    """What is kept of all generators of an engine, in arenas that the core walks; KEYS are their names."""

    KIND: str
    KEYS: tuple[str, ...]
    STARTS_FROM_FACTORS = True  # whether a step adds to what the factors hold, or they are an output alone
    IS_LINEAR = True  # whether a report of scaled gradients can be made from that of the gradients
    DOUBTS = True  # whether absorb() finds out itself if values are others, where nobody knows who wrote them
    settings: Settings
    ties: Sequence[Factors]
    sizes: Tensor  # int64, a row a layer, as the ops of this state want them

    @abstractmethod
    def report_size(self, i: int) -> int:
        """Numbers of layer i in the core's report."""

    @abstractmethod
    def pieces(self, i: int) -> dict[str, Tensor]:
        """Layer i's part of each arena, by its key: views."""

    @abstractmethod
    def of_tensors(self, i: int) -> list[dict[str, Tensor]]:
        """What layer i keeps for every entry of its tensors, a dict a tensor, in the tensors' shapes: views."""

    @abstractmethod
    def of_layer(self, i: int) -> dict[str, Any]:
        """Everything else of layer i: views, and numbers that tell how it began."""

    @abstractmethod
    def take_settings(self, i: int, saved: dict[str, Any]) -> None:
        """How layer i began, from what of_layer told when it was saved."""

    @abstractmethod
    def forget_moments(self, i: int) -> None:
        """Takes layer i's moments to zero, as far as of_layer does not show them under names of their own."""

    def speaker(self, i: int) -> int:
        """Which of layer i's tensors has the lr that is told of the layer: the first that starts at zero, as B does."""
        starts = [STARTS[tensor] for tensor in self.ties[i].layer.tensors]
        return starts.index(Start.ZERO) if Start.ZERO in starts else 0

    @abstractmethod
    def step_numbers(self, report: Tensor) -> StepNumbers:
        """Of a layer's report; NaN for what this state does not have."""

    @abstractmethod
    def stats(self, report: Tensor | None) -> dict[str, float]:
        """What oplora.stats tells of this state alone; NaN without a report."""

    @abstractmethod
    def square(self, batch: "Batch", report: Tensor) -> Tensor:
        """||.||^2 of each generator's gradient: ||g||^2 (||h||^2 + 1) for W2 and c2, and that of the hidden path."""

    @abstractmethod
    def scale(self, batch: "Batch", report: Tensor, scale: Tensor) -> None:
        """Makes of a measured report what it would have been for gradients times `scale`."""

    # ---- where processes divide the tensors, and add up what each has of a sum over rows ----

    @property
    def summed(self) -> int:
        """Numbers of a layer that a measurement sums."""
        raise NotImplementedError

    def summands(self, batch: "Batch", report: Tensor) -> list[Tensor]:
        """Of what was measured of the rows that are here: views of a row a layer, the first of ||g||^2 and how many
        entries are not finite."""
        raise NotImplementedError

    def finish_measuring(self, batch: "Batch", gradients: list[Tensor], report: Tensor) -> None:
        """Makes of added up summands the report of the whole layers."""
        raise NotImplementedError

    def reduce(self, batch: "Batch", gradients: list[Tensor], numbers: "Numbers", report: Tensor) -> list[Tensor]:
        """More summands, that a step wants after it was measured; nothing is changed."""
        return []

    @abstractmethod
    def watches(self, engine: "Engine") -> bool:
        """Whether a step has to know of values that somebody else wrote into the factors: where they are an output
        alone. Where they are an input too, the step starts from whatever they hold."""

    def begin(self, state: "LayerState") -> None:
        """Ties the factors to a new generator: each keeps its value, or takes what is generated."""
        v = state.engine.generate(state)
        state.factors.begin(v, state.factors.kept)
        self.begin_masters(state, v)

    def begin_masters(self, state: "LayerState", v: Sequence[Tensor]) -> None:  # noqa: B027
        """For factors of another dtype, which have just been written from v, what was rounded, if it is kept."""

    def make_masters(self, state: "LayerState", parameters: Sequence[nn.Parameter]) -> None:
        """For factors of another dtype than the generator's what steps add to, if the state starts from factors."""
        for i, parameter in enumerate(parameters):
            if parameter.dtype == state.factors.dtype:  # also after the model was moved back
                state.masters[i] = None
            elif state.masters[i] is None:
                state.keep_master(i, parameter.detach())

    @abstractmethod
    def absorb(self, state: "LayerState", parameters: list[nn.Parameter]) -> bool:
        """Goes on from what somebody wrote into the factors since the last step; whether users should hear of it."""

    def beside(self, i: int, f: int) -> list[Tensor]:
        """Of the f-th tensor of layer i what a step without its gradient is to leave as it is, if it is frozen."""
        return []

    def settle(self, state: "LayerState", f: int, parameter: nn.Parameter) -> None:  # noqa: B027
        """After a step that moved the layer's other tensors, and not this one: it is frozen."""

    def unseen(self, state: "LayerState", parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """What absorb() would make of each tensor's entry; without DOUBTS."""
        raise NotImplementedError

    def replace(self, state: "LayerState", parameters: Sequence[nn.Parameter], edited: Sequence[bool]) -> None:
        """Goes on from values that some tensors came with when they took the place of others; without DOUBTS."""
        raise NotImplementedError


class Numbers:
    """The numbers of a step, on the engine's device: of every layer as the core's oplora_adamw, and lr and weight_decay
    of every factor. They are written when a group's change."""

    def __init__(self, n_layers: int, n_factors: int, weight_ratio: float, device: torch.device) -> None:
        self.adamw = torch.zeros(n_layers, 7, dtype=torch.float64, device=device)
        self.adamw[:, 0] = self.weight_ratio = weight_ratio
        self.rates = torch.zeros(n_factors, 2, dtype=torch.float64, device=device)
        self._of_layers, self._of_factors = (torch.zeros(0, dtype=torch.int64, device=device) for _ in range(2))
        # lr, weight_decay, hidden_lr, beta1, beta2, eps and weight_decay again
        self.groups = torch.zeros(0, 7, dtype=torch.float64, device=device)
        self._known: list[list[float | None]] = []
        self._former: list[Tensor] = []  # of other numbers of groups, for CUDA graphs that read them

    @property
    def steps(self) -> Tensor:
        """That each layer has done."""
        return self.adamw.view(torch.int64)[:, 6]

    def assign(self, of_layers: Sequence[int], of_factors: Sequence[int], n_groups: int) -> None:
        """Which group's numbers every layer and every factor has."""
        device = self.rates.device
        layers, factors = (torch.tensor(some, dtype=torch.int64, device=device) for some in (of_layers, of_factors))
        if len(self._known) == n_groups:  # in place, and with the numbers: a captured step may read them before set()
            self._of_layers.copy_(layers)
            self._of_factors.copy_(factors)
        else:
            if self._known:
                self._former += [self._of_layers, self._of_factors, self.groups]
            self._of_layers, self._of_factors = layers, factors
            self.groups = torch.zeros(n_groups, 7, dtype=torch.float64, device=device)
        self._known = [[None] * 6 for _ in range(n_groups)]

    def set(self, groups: Sequence[GroupNumbers]) -> None:
        """A tensor is copied on the device at every step, also at each replay of a captured one."""
        changed = False
        for g, numbers in enumerate(groups):
            for i, number in enumerate(numbers):
                if isinstance(number, Tensor):
                    self.groups[g, i].copy_(number)
                    self._known[g][i] = None
                elif number != self._known[g][i]:
                    self.groups[g, i].fill_(number)
                    self._known[g][i] = number
                else:
                    continue
                changed = True
        if changed:
            self.groups[:, 6].copy_(self.groups[:, 1])  # the hidden path's decay is its group's
            self.rates.copy_(self.groups[:, :2].index_select(0, self._of_factors))
            self.adamw[:, 1:6].copy_(self.groups[:, 2:].index_select(0, self._of_layers))


class LayerState:
    """One layer's generator, as its engine keeps it: layer `index` of the engine's."""

    def __init__(self, engine: "Engine", index: int, factors: Factors) -> None:
        self.engine, self.index, self.factors = engine, index, factors
        self.is_fresh = True  # no step was made
        self.masters: list[Tensor | None] = [None] * len(factors.shapes)
        self.last_report: tuple[Tensor, int] | None = None  # of a batch that is no longer the engine's latest

    @property
    def name(self) -> str:
        return self.factors.layer.name

    @property
    def steps(self) -> int:
        """How many steps were done; on a GPU this waits for it."""
        return int(self.engine.numbers.steps[self.index])

    @property
    def report_size(self) -> int:
        return self.engine.state.report_size(self.index)

    @property
    def measured(self) -> tuple[Tensor, int] | None:
        """The core's last report that this layer is in, and where its part begins."""
        latest = self.engine.latest
        if latest is not None and latest.report is not None and self.index in latest.begins:
            return latest.report, latest.begins[self.index]
        return self.last_report

    @property
    def report(self) -> Tensor | None:
        """The core's numbers of the last step; oplora_core.h says what is where."""
        if self.measured is None:
            return None
        everything, begin = self.measured
        return everything[begin : begin + self.report_size].cpu()

    def pieces(self) -> dict[str, Tensor]:
        return self.engine.state.pieces(self.index)

    def copied(self, value: Tensor) -> Tensor:
        """As the generator holds it: in the order in which the core walks it, whatever its strides (channels_last)."""
        tie = self.factors
        return value.to(tie.device, tie.dtype, copy=True, memory_format=torch.contiguous_format)

    def keep_master(self, i: int, value: Tensor) -> None:
        self.masters[i] = self.copied(value)

    @property
    def lr(self) -> Tensor:
        """Of the group of the tensor that speaks for the layer, as the last step had it; where the rate is found the
        share of it."""
        engine = self.engine
        return engine.numbers.rates[engine.first_factor[self.index] + engine.state.speaker(self.index), 0]

    def step_numbers(self, report: Tensor) -> StepNumbers:
        return self.engine.state.step_numbers(report)

    def stats(self, report: Tensor | None) -> dict[str, float]:
        return self.engine.state.stats(report)

    def entries(self) -> list["Entry"]:
        """What is kept for each of the layer's tensors; what is not of their shapes lies with the first.

        base: what the tensor holds beyond what is generated; master: its value before rounding. Either may be missing.
        """
        return self._with_rest(self._of_tensors())

    def published(self) -> list["Entry"]:
        """entries(), as optimizer.state shows them: where processes divide the tensors, as the tensors are divided."""
        layer = self.factors.layer
        held = [
            Entry({name: layer.published(i, value) for name, value in entry.items()})
            for i, entry in enumerate(self._of_tensors())
        ]
        return self._with_rest(held)

    def received(self, saved: Sequence[Any]) -> list[Any]:
        """Of what published() tells, in whatever processes, what entries() tells here."""
        layer, own = self.factors.layer, {"factor", "base", "master", *self.engine.state.of_tensors(self.index)[0]}
        return [
            {name: layer.received(i, value) if name in own else value for name, value in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for i, entry in enumerate(saved)
        ]

    def _of_tensors(self) -> list["Entry"]:
        held = [Entry(some) for some in self.engine.state.of_tensors(self.index)]
        for entry, base, master in zip(held, self.factors.bases, self.masters, strict=True):
            for name, tensor in (("base", base), ("master", master)):
                if tensor is not None:
                    entry[name] = tensor
        return held

    def _with_rest(self, held: list["Entry"]) -> list["Entry"]:
        held[0]["step"] = self.engine.numbers.steps[self.index]
        for name, value in self.engine.state.of_layer(self.index).items():
            held[0][name] = value
        return held

    def unseen(self) -> list[dict[str, Any]]:
        """Of tensors into which somebody has written since the last step what the next one would make of their entries
        (None: it would drop it). Saved in the place of these, as a resumed run cannot tell; nothing changes here."""
        engine, tensors = self.engine, self.factors.layer.parameters()
        if engine.state.DOUBTS or self.is_fresh:  # find out by themselves
            return []
        first = engine.first_factor[self.index]
        pairs = zip(engine.marks[first : first + len(tensors)], marks(tensors), strict=True)
        return engine.state.unseen(self, tensors) if any(a is not None and a != b for a, b in pairs) else []

    def take_over(self, old: "LayerState") -> None:
        """Goes on from where `old`, the same layer's state on another device, is."""
        device, state = self.factors.device, self.engine.state
        for key, piece in self.pieces().items():
            piece.copy_(old.pieces()[key])
        state.take_settings(self.index, old.engine.state.of_layer(old.index))
        self.engine.numbers.steps[self.index] = old.steps
        self.factors.bases = [None if base is None else base.to(device) for base in old.factors.bases]
        self.masters = [None if master is None else master.to(device) for master in old.masters]
        self.is_fresh = old.is_fresh

    def reset(self) -> None:
        """Forgets all moments, as a torch optimizer does whose state was cleared."""
        for entry in self.entries():
            for name, value in entry.items():
                if isinstance(value, Tensor) and ("moments" in name or "exp_avg" in name):
                    value.zero_()
        self.engine.state.forget_moments(self.index)
        self.engine.numbers.steps[self.index] = 0


class Entry(dict[str, Any]):
    """optimizer.state of one tensor: live views of what the core walks, so that writing an item writes there."""

    @torch.no_grad()
    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(mine := self.get(name), Tensor):
            super().__setitem__(name, value)
        elif value is not mine:
            mine.copy_(value if isinstance(value, Tensor) else torch.as_tensor(value, device=mine.device))

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __ior__(self, other: Any) -> "Entry":  # type: ignore[override, misc]
        self.update(other)
        return self


class Batch:
    """Layers that step together. It is made once, and its gradients and parameters are set at every step."""

    def __init__(self, engine: "Engine", indices: tuple[int, ...]) -> None:
        self.engine, self.indices = engine, indices
        self.states = [engine.states[i] for i in indices]
        self.factors = [f for i in indices for f in range(engine.first_factor[i], engine.first_factor[i + 1])]
        self.is_whole = len(indices) == len(engine.states)
        self.sizes = engine.state.sizes[list(indices)].contiguous()
        self.rows = torch.tensor([(i, engine.first_factor[i]) for i in indices], dtype=torch.int64, device=CPU)
        # of the layers in the engine and in the model, on the device: indexing by lists would wait for it
        self.places = torch.tensor(indices, dtype=torch.int64, device=engine.device)
        of_model = [state.factors.position for state in self.states]
        self.positions = torch.tensor(of_model, dtype=torch.int64, device=engine.device)
        self.report_sizes = [engine.state.report_size(i) for i in indices]
        self.begins = dict(zip(indices, accumulate(self.report_sizes, initial=0), strict=False))
        count_places = [begin + 1 for begin in self.begins.values()]
        self._count_places = torch.tensor(count_places, dtype=torch.int64, device=CPU)
        self.units = engine.state.settings.hidden_width * len(indices)  # of all layers' h
        self.parameters: list[nn.Parameter] = []
        self.gradients: list[Tensor] = []
        self.sources: list[Tensor] = []  # what the gradients were made from, or are
        self.frozen: list[tuple[LayerState, int, nn.Parameter]] = []  # that keep their values while their layers step
        self.report: Tensor | None = None
        self.dh: Tensor | None = None  # dL/dh of all layers, if measured
        self.sums: Tensor | None = None  # that processes add up

    def release(self) -> None:
        """Lets go of the gradients, which zero_grad() is to free, and of tensors that may be replaced."""
        self.parameters, self.gradients, self.sources, self.frozen = [], [], [], []

    def pick(self, of_factors: Sequence[Any]) -> Any:
        """Of a list with an item for each factor of the engine those of this batch."""
        return of_factors if self.is_whole else [of_factors[f] for f in self.factors]

    def by_state(self, of_factors: Sequence[Any]) -> list[list[Any]]:
        """A list for each layer, of a list with an item for each factor of this batch."""
        return by_layer([state.factors.layer for state in self.states], of_factors)

    def bases(self) -> list[Tensor | None]:
        """A base or None for each factor; none at all where none has one."""
        bases = [base for state in self.states for base in state.factors.bases]
        return bases if any(map(is_not, bases, repeat(None))) else []

    def every_base(self) -> list[Tensor | None]:
        return self.bases() or [None] * len(self.factors)

    def new_report(self) -> Tensor:
        """Room for the core's numbers of every layer, one behind the other."""
        return torch.zeros(sum(self.report_sizes), dtype=torch.float64, device=self.engine.device)

    def nonfinite(self, report: Tensor) -> list[str]:
        """The layers whose gradients hold NaN or infinity."""
        counts = report.cpu()[self._count_places].tolist()
        return [f"layer {state.name}" for state, count in zip(self.states, counts, strict=True) if count != 0]

    def scaled(self) -> list[Tensor]:
        """Gradients that were made from what the Parameters hold, and are scaled when that is."""
        sources = {id(source) for source in self.sources}
        return [gradient for gradient in self.gradients if id(gradient) not in sources]


def _frozen(batch: Batch) -> list[tuple[LayerState, int, nn.Parameter]]:
    """Of layers that step what was frozen since: no torch optimizer moves it. A tensor that has no gradient in this
    step alone counts as one whose gradient is zero."""
    found = []
    for state, own in zip(batch.states, batch.by_state(batch.parameters), strict=True):
        if all(p.requires_grad or p.grad is not None for p in own):
            continue
        layer = state.factors.layer
        tied = {twin.index for twin in layer.twins}
        for f, (listed, p) in enumerate(zip(layer.listed(), own, strict=True)):
            if p.grad is None and not listed.requires_grad and f not in tied:
                found.append((state, f, p))
    return found


def _differ(before: Tensor, now: Tensor) -> bool:
    """Whether a tensor in another's place is known to hold something else than that, in its own dtype."""
    tells = before.device == now.device and before.untyped_storage().size() > 0
    return tells and not torch.equal(before.detach().to(now.dtype), now.detach())


class Engine(ABC):
    """The generators of one state, dtype and device.

    looks_for_edits: whether a step on this kind of device has to be told that a master and its factor disagree.
    """

    looks_for_edits = True

    def __init__(self, state: State, ties: Sequence[Factors], weight_ratio: float) -> None:
        self.state = state
        self.dtype, self.device, self.placed = ties[0].dtype, ties[0].device, ties[0].placed
        self.states = [LayerState(self, i, tie) for i, tie in enumerate(ties)]
        self.first_factor = [0]
        for tie in ties:
            self.first_factor.append(self.first_factor[-1] + len(tie.shapes))
        self.numbers = Numbers(len(ties), self.first_factor[-1], weight_ratio, self.device)
        self.has_twins = any(tie.layer.twins for tie in ties)
        self.latest: Batch | None = None  # that stepped
        self.marks: list[Any] = [None] * self.first_factor[-1]  # of what was last written into each factor
        self._batches: dict[tuple[int, ...], Batch] = {}
        self.stale: list[LayerState] = []  # of which something new is kept since somebody asked
        self._is_watched = True
        self.writes_in_place = False  # the core reads and writes the factors themselves
        self._looked_at: tuple[list[nn.Parameter], list[int], list[torch.dtype]] = [], [], []
        self.looks = 0  # how often that was

    # ---- what steps together ----

    def has_changed(self, parameters: list[nn.Parameter]) -> bool:
        """Whether a tensor is another object, lies elsewhere or has another dtype than when look() was called."""
        known, addresses, dtypes = self._looked_at
        return (
            len(known) != len(parameters)
            or any(map(is_not, known, parameters))
            or list(map(Tensor.data_ptr, parameters)) != addresses
            or list(map(_dtype, parameters)) != dtypes
        )

    def look(self, parameters: list[nn.Parameter]) -> None:
        """Takes note of tensors that were replaced, moved or cast."""
        self.looks += 1
        known, _, dtypes = self._looked_at
        self._looked_at = parameters, list(map(Tensor.data_ptr, parameters)), list(map(_dtype, parameters))
        for state, own in zip(self.states, self.by_layer(parameters), strict=True):
            self.state.make_masters(state, own)
        if self.state.DOUBTS or not known:
            self.marks = [None] * len(self.marks)
        else:
            self._follow_values(known, dtypes, parameters)
        self._is_watched, self.stale = self.state.watches(self), list(self.states)
        masters = [master for state in self.states for master in state.masters]
        in_place = (p.dtype == self.dtype and p.is_contiguous() for p in parameters)
        self.writes_in_place = all(in_place) and all(master is None for master in masters)

    def _follow_values(
        self, known: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype], parameters: list[nn.Parameter]
    ) -> None:
        """A fingerprint holds for a tensor that lies elsewhere, and for another in its place; where there is none
        (on a GPU, of another dtype) tensors that were replaced are compared with those before."""
        pairs = list(zip(self.marks, dtypes, parameters, strict=True))
        self.marks = [mark if isinstance(mark, int) and p.dtype == dtype else None for mark, dtype, p in pairs]
        edited = [
            mark is None and p is not before and _differ(before, p)
            for mark, before, p in zip(self.marks, known, parameters, strict=True)
        ]
        own = zip(self.states, self.by_layer(parameters), self.by_layer(edited), strict=True)
        for state, some, of_layer in own:
            if any(of_layer):
                self.state.replace(state, some, of_layer)

    def forget(self, layer: LayerState, wrote: bool) -> None:
        """Another hand has put the layer's state back, and maybe how it began, which batches have noted; and the
        factors, if it wrote them. What is in them then is remembered where values tell, so that the same values, as
        when the model is loaded after the optimizer, are no edit."""
        self._batches.clear()
        own = layer.factors.layer.parameters()
        tells = wrote and not self.state.DOUBTS and not layer.is_fresh and own[0].device.type == "cpu"
        first = self.first_factor[layer.index]
        self.marks[first : first + len(own)] = marks(own) if tells else [None] * len(own)
        self.forget_reports()

    @property
    def is_captured(self) -> bool:
        """Whether a CUDA graph may read what is kept here."""
        return False

    def renew_captured(self) -> None:  # noqa: B027
        """Has captured steps continue from what was loaded, or from what others wrote."""

    def by_layer(self, of_factors: Sequence[Any]) -> list[list[Any]]:
        return by_layer([state.factors.layer for state in self.states], of_factors)

    def batch(self, parameters: list[nn.Parameter]) -> Batch | None:
        """The layers that have gradients, with these; edits of their factors are still to be absorbed."""
        gradients: list[Any] = [p.grad for p in parameters]
        if self.has_twins or NoneType in set(map(type, gradients)):
            own = self.by_layer(parameters)
            stepping = [s.factors.gradients(p, cast=self.casts) for s, p in zip(self.states, own, strict=True)]
            indices = tuple(i for i, some in enumerate(stepping) if some is not None)
            ready = [g for some in stepping for g in some or ()]
            sources = [g for i in indices for g in self.states[i].factors.sources(own[i])]
        else:
            indices = tuple(range(len(self.states)))
            sources, ready = gradients, self._ready(parameters, gradients)
        if not indices:
            return None
        if (batch := self._batches.get(indices)) is None:
            if len(self._batches) > 16:  # whoever trains another set of layers at every step
                self._batches.clear()
            batch = self._batches[indices] = Batch(self, indices)
        batch.parameters, batch.gradients, batch.sources = batch.pick(parameters), ready, sources
        batch.dh = batch.sums = None
        batch.frozen = [] if sources is gradients else _frozen(batch)
        return batch

    @property
    def casts(self) -> bool:
        """Whether gradients are cast to the generator's dtype before the step."""
        return True

    def _ready(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> list[Tensor]:
        """Dense, contiguous, in the dtype that the step takes."""
        is_dense = set(map(_layout, gradients)) == {torch.strided} and all(map(Tensor.is_contiguous, gradients))
        if is_dense and (not self.casts or set(map(_dtype, gradients)) == {self.dtype}):
            return gradients
        own = self.by_layer(parameters)
        some = [s.factors.gradients(p, cast=self.casts) for s, p in zip(self.states, own, strict=True)]
        return [g for of_layer in some for g in of_layer or ()]

    def absorb(self, batch: Batch) -> list[str]:
        """Goes on from what somebody wrote into the factors; the layers whose users should hear of it."""
        if self._is_watched:
            known = batch.pick(self.marks)
            now = marks(batch.parameters)
            if now == known:
                return []
            doubts = self.state.DOUBTS
            changed = [a != b and (doubts or a is not None) for a, b in zip(known, now, strict=True)]
            of_states = zip(batch.states, batch.by_state(changed), strict=True)
            touched = [any(some) or state.is_fresh for state, some in of_states]
        elif not any(map(_is_fresh, batch.states)):
            return []
        else:
            touched = [state.is_fresh for state in batch.states]
        own = zip(batch.states, batch.by_state(batch.parameters), touched, strict=True)
        some = [(state, parameters) for state, parameters, was in own if was]
        self.stale += [state for state, _ in some]
        return [state.name for state, parameters in some if self.state.absorb(state, parameters)]

    def hold(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """What belongs to the batch's frozen tensors, and copies of it."""
        held: list[Tensor] = []
        for state, f, parameter in batch.frozen:
            master = state.masters[f]
            held += [parameter.detach(), *([] if master is None else [master]), *self.state.beside(state.index, f)]
        return [(tensor, tensor.clone()) for tensor in held]

    def put_back(self, batch: Batch, held: Sequence[tuple[Tensor, Tensor]]) -> None:
        """After a step."""
        for tensor, before in held:
            tensor.copy_(before)
        for state, f, parameter in batch.frozen:
            self.state.settle(state, f, parameter)

    def finish(self, batch: Batch, report: Tensor) -> None:
        """After a step: tells autograd what was written, and remembers it."""
        torch.autograd.graph.increment_version(batch.parameters)
        if self.latest is not batch:
            self._leave_latest()
        self.latest, batch.report = batch, report
        for state in batch.states:
            state.is_fresh = False
        if self._is_watched:
            now = marks(batch.parameters)
            if batch.is_whole:
                self.marks = now
            else:
                for f, mark in zip(batch.factors, now, strict=True):
                    self.marks[f] = mark

    def _leave_latest(self) -> None:
        if self.latest is not None:
            for state in self.latest.states:
                state.last_report = state.measured
            self.latest.report = None

    def forget_reports(self) -> None:
        self.latest = None
        for state in self.states:
            state.last_report = None

    # ---- stepping ----

    @torch.no_grad()
    def begin(self) -> None:
        """Ties the factors to new generators."""
        for state in self.states:
            self.state.begin(state)
        self.look([p for state in self.states for p in state.factors.layer.parameters()])

    @abstractmethod
    def measure(self, batch: Batch) -> Tensor:
        """The core's report of the batch's gradients (float64; oplora_core.h says what is where, also which are not
        finite). The next step() takes it instead of measuring again."""

    def finish_measuring(self, batch: Batch, report: Tensor) -> None:
        """Where processes divide the tensors: of a report whose summands were added up."""
        raise NotImplementedError

    def reduce(self, batch: Batch, report: Tensor) -> list[Tensor]:
        """Where processes divide the tensors: what they add up before step(), beside what was measured."""
        raise NotImplementedError

    @abstractmethod
    def step(self, batch: Batch, report: Tensor | None) -> tuple[bool, Tensor]:
        """One AdamW step of the batch's layers and their next factors; the report of `measure` saves a pass.

        Returns whether it was done, which it is not where a gradient is not finite, and the report.
        """

    @abstractmethod
    def generate(self, state: LayerState) -> list[Tensor]:
        """v, a piece for each of the layer's factors, without their bases."""
