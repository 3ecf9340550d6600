"""One step of all engines: which layers step, that all of them do or none, and what processes tell each other.

oplora.AdamW decides what is stepped with which numbers; here it happens: gather() finds the layers that have gradients
and continues from what others wrote into them, step() moves them, on the CPU or on GPUs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import (
    AdaptedLayer,
    Pieces,
    Share,
    is_divided,
    precondition_gradients,
    refuse_divided,
    refuse_in_pieces,
    refuse_to_step,
)
from ..engines import (
    Batch,
    DeviceEngine,
    Disjoint,
    Engine,
    Factors,
    LayerState,
    Mesh,
    Processes,
    Rate,
    Recipe,
    Shards,
    keep_starts,
    warn_adopted,
)
from ..errors import OPLoRARuntimeError
from .listing import Listing
from .plain import Plain
from .refusals import place_of_divided, refuse_devices
from .saved import load_layer

__all__ = ["Stepper", "refuse_nonfinite"]


class Stepper:
    """The engines of an optimizer, with what is plainly stepped beside them. Making it writes what starts anew.

    every: all parameters of the optimizer; init: "paper" or "keep", as in oplora.AdamW; shard: whether processes divide
    the layers; delta: of the preconditioner, None without; elsewhere: where the generators are, if not beside their
    factors; model: that the layers are of, where one was handed over; pieces: that the layers are, where they are.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        recipe: Recipe,
        every: Sequence[nn.Parameter],
        *,
        init: str,
        shard: bool,
        delta: float | None,
        elsewhere: torch.device | None,
        model: nn.Module | None,
        pieces: Pieces | None = None,
    ) -> None:
        self.layers, self.recipe, self._delta, self._elsewhere = layers, recipe, delta, elsewhere
        self.pieces = pieces
        self.listing, self.plain = Listing(layers, model, () if pieces is None else pieces.rows), Plain()
        self.shards: Shards | None = None
        ties = self._divided_ties(every)
        if shard:
            if self.mesh is not None:
                raise OPLoRARuntimeError(
                    "oplora.AdamW: shard=True divides whole generators, and here fully_shard or tensor parallelism has "
                    "divided the tensors: every process keeps its part of the state anyway. Leave shard out."
                )
            shards = Shards([sum(tie.sizes) for tie in ties])
            self.shards = None if shards.count == 1 else shards
        self._device = ties[0].placed
        self.engines: list[Engine] = []
        self._left: list[Engine] = []  # whose generators have moved on, and whose captured steps may still be replayed
        if self.shards is not None:
            ties = [tie for tie in ties if self.shards.owns(tie.position)]
        self._take(self.together(lambda: self._made(ties, init)))
        for engine in self.engines:
            engine.begin()
        self.share_factors()

    def _made(self, ties: Sequence[Factors], init: str | None = None) -> list[Engine]:
        refuse_devices(ties, self._delta)
        if init is not None:
            keep_starts(ties, init)
        engines = self.recipe.make(ties)
        if self.mesh is not None and self.finds_rate:
            self.mesh.listen([state.listening(i) for state, i in _by_position(engines)])
        return engines

    # ---- tensors that processes divide ----

    @property
    def processes(self) -> Processes | None:
        """Those that step together."""
        return self.shards or self.mesh

    def _divided_ties(self, every: Sequence[nn.Parameter]) -> list[Factors]:
        """Of all layers, of which a process may have a part; `every` parameter of the optimizer as it is now."""
        self._layouts = [_layout_of(p) for layer in self.layers for p in layer.parameters()]
        divided = [any(map(is_divided, layer.parameters())) for layer in self.layers]
        of_here = [Share(layer) if some else layer for layer, some in zip(self.layers, divided, strict=True)]
        self._shares = [layer for layer in of_here if isinstance(layer, Share)]
        if self.pieces is None:
            self.mesh = Mesh.of(every, self.layers)
        else:
            self.mesh = Disjoint(self.pieces.group, self.pieces.device, self.layers)
        if self.adds_up and self._delta is not None:
            refuse_divided(self.layers, "precondition multiplies by all of a layer's A and B: leave it out")
        home = self._home(of_here)
        ties = [Factors.of(layer, i, home) for i, layer in enumerate(of_here)]
        if self.adds_up:
            self._place(ties)
        if self._agrees:
            assert self.mesh is not None
            nonzero = [bool(p.detach().count_nonzero()) for tie in ties for p in tie.layer.parameters()]
            for tie, begun in zip(ties, self.listing.by_layer(self.mesh.any(nonzero)), strict=True):
                tie.begun = begun
        return ties

    def _home(self, layers: Sequence[AdaptedLayer]) -> torch.device | None:
        """Where the layers' generators are to be, if not beside their factors."""
        return place_of_divided(layers, self._elsewhere) if self.adds_up else self._elsewhere

    def _place(self, ties: Sequence[Factors]) -> None:
        """Tells the layers which of their rows are here, and which of these count."""
        assert self.mesh is not None
        for tie, layer in zip(ties, self.layers, strict=True):
            counts = map(self.mesh.counts, layer.parameters())
            tie.places = [[*tie.layer.rows_here(i), int(counted)] for i, counted in enumerate(counts)]

    @property
    def adds_up(self) -> bool:
        """Whether processes divide tensors of generators that want sums over all rows of a layer."""
        return bool(self._shares) and not self.finds_rate

    @property
    def _agrees(self) -> bool:
        """Whether processes have to agree on what tensors start from."""
        return self.mesh is not None and (self.finds_rate or self.adds_up)

    def follow_division(self, own: Sequence[nn.Parameter], every: Sequence[nn.Parameter]) -> None:
        """Goes on with what this process has of tensors that fully_shard has divided, or gathered, since."""
        for share, some in zip(self._shares, self._of_shares(own), strict=True):
            share.hold(some)
        if self._layouts == [_layout_of(p) for p in own]:
            return
        before = [(state, state.published()) for state in self.states]
        if self.shards is not None:
            raise OPLoRARuntimeError(
                "oplora: fully_shard has divided the factors of an optimizer with shard=True, which divides whole "
                "generators. Leave shard out: every process then keeps its part of the state."
            )
        ties = self._divided_ties(every)
        for tie in ties:
            tie.kept = [True] * len(tie.shapes)  # begin() is to write nothing
        self._take(self._made(ties))
        for engine in self.engines:
            engine.begin()
        for state, (old, entries) in zip(self.states, before, strict=True):
            state.factors.kept = old.factors.kept
            load_layer(state, state.received(entries))

    def in_pieces(self, groups: Sequence[dict[str, Any]]) -> "Stepper":
        """Goes on with the pieces that DeepSpeed's ZeRO has put into the groups, and puts what is stepped there."""
        if not self.finds_rate:
            refuse_in_pieces(self.layers, f"state {self.recipe.kind!r}")
        if self.shards is not None:
            raise OPLoRARuntimeError(
                "oplora: DeepSpeed's ZeRO has divided the factors of an optimizer with shard=True, which divides whole "
                "generators. Leave shard out: every process then keeps its part of the state."
            )
        before = self.states
        pieces = Pieces(self.layers, groups, self.listing.groups)
        every = [p for group in groups for p in group["params"]]
        new = Stepper(
            pieces.layers,
            self.recipe,
            every,
            init="keep",
            shard=False,
            delta=self._delta,
            elsewhere=self._elsewhere,
            model=None,
            pieces=pieces,
        )
        for old, state in zip(before, new.states, strict=True):
            if old.steps:
                load_layer(state, state.received(old.entries()))
        return new

    def _of_shares(self, own: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        wholes = {id(share.whole) for share in self._shares}
        pairs = zip(self.layers, self.listing.by_layer(own), strict=True)
        return [some for layer, some in pairs if id(layer) in wholes]

    def agree_on_starts(self) -> bool:
        """Has every process keep a start where one does, so that all save the same; whether something is new here."""
        if self.mesh is None or self.pieces is not None or not self._agrees:
            return False
        bases = self.mesh.any([base is not None for state in self.states for base in state.factors.bases])
        is_new = False
        for state, begun in zip(self.states, self.listing.by_layer(bases), strict=True):
            state.factors.begun = begun
            for i, (base, shape) in enumerate(zip(state.factors.bases, state.factors.shapes, strict=True)):
                if begun[i] and base is None:
                    tie, is_new = state.factors, True
                    tie.bases[i] = torch.zeros(shape, dtype=tie.dtype, device=tie.device)
        return is_new

    def _take(self, engines: list[Engine]) -> None:
        self._left += [engine for engine in self.engines if engine.is_captured]
        self.engines, self._device = engines, engines[0].placed
        self.states = sorted((s for e in engines for s in e.states), key=lambda state: state.factors.position)
        first = [0]
        for layer in self.layers:
            first.append(first[-1] + len(layer.tensors))
        positions = [[state.factors.position for state in engine.states] for engine in engines]
        self._places = [[f for i in some for f in range(first[i], first[i + 1])] for some in positions]

    @property
    def is_on_device(self) -> bool:
        return isinstance(self.engines[0], DeviceEngine)

    @property
    def is_captured(self) -> bool:
        """Whether a step was captured in a CUDA graph."""
        return any(engine.is_captured for engine in self.engines)

    def renew_captured(self) -> None:
        for engine in self.engines:
            engine.renew_captured()

    @property
    def finds_rate(self) -> bool:
        return self.recipe.kind == "rate"

    @property
    def found(self) -> Tensor:
        """What is known of the rate; engines.FOUND names the numbers."""
        state = self.engines[0].state
        assert isinstance(state, Rate)
        return state.found

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self._device

    def of_engine(self, engine: int, own: list[Any]) -> list[Any]:
        """Of a list with an item for each generated tensor those of one engine."""
        places = self._places[engine]
        return own if len(places) == len(own) and len(self.engines) == 1 else [own[f] for f in places]

    def assign(self, n_groups: int, own: list[nn.Parameter]) -> None:
        """Which group every layer, and every tensor of it, has its numbers from."""
        groups, self._n_groups = self.listing.group_of(own), n_groups
        for i, engine in enumerate(self.engines):
            of_factors = self.of_engine(i, groups)
            engine.numbers.assign([of_factors[f] for f in engine.first_factor[:-1]], of_factors, n_groups)

    def set_numbers(self, numbers: Sequence[Any]) -> None:
        """Of every group."""
        for engine in self.engines:
            engine.numbers.set(numbers)

    # ---- what steps ----

    def gather(self, own: list[nn.Parameter]) -> list[Batch]:
        """The layers that have gradients, by engine; edits of their factors are absorbed on the way."""
        if self.pieces is not None:
            self.pieces.take_gradients()
        whole, own = own, self._here(own)
        held = [self.of_engine(i, own) for i in range(len(self.engines))]
        changed = [engine.has_changed(some) for engine, some in zip(self.engines, held, strict=True)]
        if any(changed) and self._have_moved(held):
            self._follow(whole)
            own = self._here(whole)
            held = [self.of_engine(i, own) for i in range(len(self.engines))]
            changed = [True] * len(held)
        # all layers, also those of other processes: they refuse together
        if any(changed) or self.listing.any_folded():
            refuse_to_step(self.layers, self.listing.by_layer(whole))
        for engine, some, has_changed in zip(self.engines, held, changed, strict=True):
            if has_changed:
                engine.look(some)
        batches = [engine.batch(some) for engine, some in zip(self.engines, held, strict=True)]
        stepping = [batch for batch in batches if batch is not None]
        if adopted := [name for batch in stepping for name in batch.engine.absorb(batch)]:
            warn_adopted(adopted)
        return stepping

    def _here(self, own: list[nn.Parameter]) -> list[nn.Parameter]:
        """The tensors as this process has them."""
        if not self._shares:
            return own
        shares = {id(share.whole): share for share in self._shares}
        pairs = zip(self.layers, self.listing.by_layer(own), strict=True)
        return [
            p for layer, some in pairs for p in (shares[id(layer)].with_gradients() if id(layer) in shares else some)
        ]

    def take_stale(self) -> list[LayerState]:
        """The layers of which something new is kept (a base, a master) since the last call."""
        stale = [layer for engine in self.engines if engine.stale for layer in engine.stale]
        for engine in self.engines:
            engine.stale = []
        return stale

    def release(self, batches: Sequence[Batch]) -> None:
        """Lets go of what gather() has found."""
        for batch in batches:
            batch.release()
        if self.pieces is not None:
            self.pieces.release()

    def _have_moved(self, held: Sequence[list[nn.Parameter]]) -> bool:
        """Whether factors are on another device than their generators were made for."""
        return any(
            some[f].device != engine.placed
            for engine, some in zip(self.engines, held, strict=True)
            for f in engine.first_factor[:-1]
        )

    def _follow(self, own: list[nn.Parameter]) -> None:
        """The model was moved (model.to(device), accelerator.prepare): the generators go where the factors are now."""
        before = self.states
        home = self._home([state.factors.layer for state in before])
        ties = [Factors.of(state.factors.layer, state.factors.position, home) for state in before]
        for tie, state in zip(ties, before, strict=True):
            tie.kept, tie.begun, tie.places = state.factors.kept, state.factors.begun, state.factors.places
        self._take(self._made(ties))
        for old, new in zip(before, self.states, strict=True):
            new.take_over(old)
        self.assign(self._n_groups, own)

    def precondition(self, batches: Sequence[Batch]) -> None:
        if self._delta is None:
            return
        for batch in batches:
            of_layers = [state.factors.layer for state in batch.states]
            held, pushed = batch.by_state(batch.parameters), batch.by_state(batch.gradients)
            scaled = precondition_gradients(of_layers, held, pushed, self._delta)
            batch.gradients = [g for some in scaled for g in some]

    # ---- stepping ----

    def step_on_host(self, batches: Sequence[Batch], reports: list[Tensor] | None) -> list[str]:
        """Whose gradient holds NaN or infinity; nothing was stepped then."""
        where = self.plain.nonfinite()
        if self.adds_up:
            return self._step_adding_up(batches, where)
        # several dtypes or processes: none may step before the gradients of all are known to be finite
        if reports is None and (len(batches) > 1 or self.processes is not None or self.finds_rate):
            reports = [batch.engine.measure(batch) for batch in batches]
        if self.mesh is not None and reports is not None and self.finds_rate:
            where = self._merged(batches, reports, where)
        else:
            if reports is not None:
                pairs = zip(batches, reports, strict=True)
                where += [name for batch, report in pairs for name in batch.nonfinite(report)]
            where = self._agreed(where)
        if where:
            return where
        if reports is not None and self.finds_rate and (batches or self.shards is not None):
            self._find_rate(batches, reports, None)
        for i, batch in enumerate(batches):
            done, report = batch.engine.step(batch, None if reports is None else reports[i])
            if not done:
                return batch.nonfinite(report)
        return []

    def _step_adding_up(self, batches: Sequence[Batch], where: list[str]) -> list[str]:
        """As step_on_host, where sums over a layer's rows cross processes; nothing is changed before the last has."""
        reports = [batch.engine.measure(batch) for batch in batches]
        told = self._add_up(batches, reports, torch.tensor([len(where)], dtype=torch.float64, device="cpu"))
        where += [name for batch, report in zip(batches, reports, strict=True) for name in batch.nonfinite(report)]
        if where or bool(told):
            return where or ["parameters outside the adapters, in another process,"]
        assert self.mesh is not None
        sums = [batch.engine.reduce(batch, report) for batch, report in zip(batches, reports, strict=True)]
        if any(sums):
            self.mesh.add(batches, sums, sum(view.shape[1] for view in sums[0]), torch.zeros(1, device="cpu"))
        for batch, report in zip(batches, reports, strict=True):
            batch.engine.step(batch, report)
        return []

    def _add_up(self, batches: Sequence[Batch], reports: Sequence[Tensor], more: Tensor) -> Tensor:
        """Makes of reports of rows that are here those of whole layers, in one message, which adds up `more` too."""
        assert self.mesh is not None
        pairs = list(zip(batches, reports, strict=True))
        summands = [batch.engine.state.summands(batch, report) for batch, report in pairs]
        more = self.mesh.add(batches, summands, self.engines[0].state.summed, more)
        if not any(bool(views[0][:, 1].any()) for views in summands):  # how many entries are not finite
            for batch, report in pairs:
                batch.engine.finish_measuring(batch, report)
        return more

    def step_on_device(self, batches: Sequence[Batch], reports: list[Tensor] | None) -> Tensor | None:
        """Launches the step. Whether it is refused is decided on the device, for all devices and parameters alike.

        Returns the verdict (int32, on the device) for what is stepped beside; None if there can be none.
        """
        veto = self.plain.verdict(self.engines[0].device)
        engines = [batch.engine for batch in batches if isinstance(batch.engine, DeviceEngine)]
        # several devices or processes: none may step before the gradients of all are known to be finite
        if len(batches) > 1 or self.processes is not None or self.finds_rate:
            reports = [batch.engine.measure(batch) for batch in batches] if reports is None else reports
            found = [engine.refused for engine in engines] + ([] if veto is None else [veto])
            veto = _any_of(found, self.engines[0].device)
            if self.processes is not None:
                veto = veto.clone()  # which becomes the verdict of all
                if self.mesh is not None and self.finds_rate:
                    veto = self.mesh.merge(batches, reports, veto)
                else:
                    self.processes.any_refuses(veto)
                if not batches and isinstance(first := self.engines[0], DeviceEngine):
                    first.count_refusal(veto)  # nothing is launched here that would
            if self.finds_rate and (batches or self.shards is not None):
                self._find_rate(batches, reports, veto)
        for engine, batch in zip(engines, batches, strict=True):
            # its own measurement it has in its reports
            vetoed = None if veto is None or veto is engine.refused else veto.to(engine.device, non_blocking=True)
            engine.launch(batch, reports is not None, vetoed)
        return engines[0].refused if engines else veto

    def _find_rate(self, batches: Sequence[Batch], reports: Sequence[Tensor], refused: Tensor | None) -> None:
        """By what the gradients of all layers tell, in the model's order, for any number of engines and processes."""
        heard = self._heard(batches, reports)
        if self.shards is not None:
            self.shards.sum(heard)
        for engine in self.engines:
            assert isinstance(engine.state, Rate)
            on_device = None if refused is None else refused.to(engine.device)
            engine.state.find(heard.to(engine.device), on_device)

    def _heard(self, batches: Sequence[Batch], reports: Sequence[Tensor]) -> Tensor:
        """What the gradients of every layer tell; nothing where it has none."""
        device = self.engines[0].device
        some = []
        for batch, report in zip(batches, reports, strict=True):
            assert isinstance(batch.engine.state, Rate)
            some.append(batch.engine.state.heard(batch, report))
        if len(some) == 1 and len(some[0]) == len(self.layers):
            return some[0].to(device, non_blocking=True)
        heard = torch.zeros(len(self.layers), 3, dtype=torch.float64, device=device)
        for batch, told in zip(batches, some, strict=True):
            heard.index_copy_(0, batch.positions.to(device, non_blocking=True), told.to(device, non_blocking=True))
        return heard

    def refusals(self) -> tuple[int, list[str]]:
        """How many steps devices have refused since the last call, as far as they have told, and whose gradient it
        was."""
        # processes that own other layers must raise in the same step, so they all ask for the last one
        wait = self.processes is not None
        refused = max(e.new_refusals(wait=wait) for e in self.engines if isinstance(e, DeviceEngine))
        if not refused:
            return 0, []
        reports = ((state, state.report) for state in self.states)
        where = [f"layer {state.name}" for state, report in reports if report is not None and report[1] != 0]
        return refused, where or ["a layer, or of parameters outside the adapters,"]

    def squares(self, batches: Sequence[Batch], reports: list[Tensor]) -> Tensor:
        """||.||^2 of every gradient of generators and of what is plainly stepped, of all processes, where the factors
        are."""
        norms = self.plain.norms(None if self.mesh is None else self.mesh.counts)
        others = [norm.square().view(-1).to(self.device, non_blocking=True) for norm in norms]
        if self.mesh is None:
            return torch.cat([self._squares(batches, reports), *others])
        other = torch.cat([torch.zeros(1, dtype=torch.float64, device=self.device), *others]).sum().view(1)
        if self.finds_rate:
            return self.mesh.merge_squares(batches, reports, other)
        if self.adds_up:
            added = self._add_up(batches, reports, other)
            return torch.cat([self._squares(batches, reports), added])
        return torch.cat([self._squares(batches, reports), self.mesh.sum(other.to(self._told_at)).to(self.device)])

    def _squares(self, batches: Sequence[Batch], reports: list[Tensor]) -> Tensor:
        squares = [
            batch.engine.state.square(batch, report).to(self.device, non_blocking=True)
            for batch, report in zip(batches, reports, strict=True)
        ]
        positions = [state.factors.position for batch in batches for state in batch.states]
        if positions == list(range(len(self.layers))):
            return torch.cat(squares)
        # the model's order, on which the bits of their sum depend, for any number of processes
        everywhere = torch.zeros(len(self.layers), dtype=torch.float64, device=self.device)
        if squares:
            by_position = dict(zip(positions, torch.cat(squares).unbind(), strict=True))
            everywhere = torch.stack([by_position.get(i, zero) for i, zero in enumerate(everywhere.unbind())])
        return everywhere if self.shards is None else self.shards.sum(everywhere)

    # ---- processes ----

    def share_factors(self) -> None:
        if self.pieces is not None:
            self.pieces.write()
        if self.shards is not None:
            self.shards.send([layer.parameters() for layer in self.layers])

    def together(self, call: Callable[[], Any]) -> Any:
        """call(); where it raises in one process of a sharded optimizer it raises in all."""
        processes = self.processes
        return call() if processes is None else processes.together(call, self._told_at)

    @property
    def _told_at(self) -> torch.device:
        """Where what processes tell each other lies."""
        return self.device if self.mesh is None else self.mesh.device

    def _agreed(self, where: list[str]) -> list[str]:
        """What is not finite; where processes step together not empty if it is so in any of them."""
        if self.processes is None:
            return where
        refused = torch.tensor([len(where)], device=self._told_at)
        anywhere = bool(self.processes.any_refuses(refused))
        return where or (["a layer of another process"] if anywhere else [])

    def _merged(self, batches: Sequence[Batch], reports: Sequence[Tensor], plain: list[str]) -> list[str]:
        """As _agreed, of the reports, which then tell of all processes' entries, and of what is plainly stepped."""
        assert self.mesh is not None
        refused = self.mesh.merge(batches, reports, torch.tensor([len(plain)], dtype=torch.int32, device="cpu"))
        if not bool(refused):
            return []
        where = [name for batch, report in zip(batches, reports, strict=True) for name in batch.nonfinite(report)]
        return plain + where or ["parameters outside the adapters, in another process,"]


def _by_position(engines: Sequence[Engine]) -> list[tuple[Rate, int]]:
    """The states of state rate and the layers' numbers in them, in the model's order."""
    states = sorted((s for engine in engines for s in engine.states), key=lambda state: state.factors.position)
    return [(state.engine.state, state.index) for state in states if isinstance(state.engine.state, Rate)]


def _layout_of(parameter: Any) -> Any:
    """How processes divide a tensor; None for a whole one."""
    if not is_divided(parameter):
        return None
    return tuple(parameter.device_mesh.mesh.flatten().tolist()), parameter.device_mesh.shape, parameter.placements


def refuse_nonfinite(where: Sequence[str], earlier: int = 0) -> None:
    """earlier: how many steps ago that was known to a device alone."""
    when = f" ({earlier} earlier step{'s' if earlier > 1 else ''}, which the device refused)" if earlier else ""
    raise OPLoRARuntimeError(
        f"oplora: the gradient of {where[0]} {f'and {len(where) - 1} more ' if len(where) > 1 else ''}"
        f"holds NaN or infinity{when}. Nothing was changed: call zero_grad() and continue with the next batch, "
        "or pass skip_nonfinite=True to skip such steps. If it happens often, clip gradients (max_grad_norm), or where "
        "you chose a learning rate, lower it."
    )


def _any_of(verdicts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether one of them is set, where the first lies; on `device` where there is none."""
    if not verdicts:
        return torch.zeros(1, dtype=torch.int32, device=device)
    if len(verdicts) == 1:
        return verdicts[0]
    return torch.cat([one.to(verdicts[0].device, non_blocking=True) for one in verdicts]).amax(0, keepdim=True)
