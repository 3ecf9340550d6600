"""How generators step: what is kept of them (lean, exact, rate), and where the step runs (host, device)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..kernels import runs_on_device
from .device import DeviceEngine
from .engine import Batch, Engine, LayerState, StepNumbers
from .exact import Exact
from .factors import Factors, keep_starts, warn_adopted
from .host import HostEngine, StagedEngine
from .lean import Lean
from .memory import refuse_more_than_memory
from .rate import FOUND, Rate
from .saved_0_1 import entries_of_0_1
from .settings import Settings, weight_ratio
from .sharding import Disjoint, Mesh, Processes, Shards
from .written import Written

__all__ = [
    "FOUND",
    "Batch",
    "DeviceEngine",
    "Disjoint",
    "Engine",
    "Factors",
    "LayerState",
    "Mesh",
    "Processes",
    "Rate",
    "Recipe",
    "Settings",
    "Shards",
    "StepNumbers",
    "Written",
    "entries_of_0_1",
    "keep_starts",
    "warn_adopted",
]


@dataclass(frozen=True)
class Recipe:
    """How engines are made: the state's name, and for "lean" weight_rank and moment_rank."""

    settings: Settings
    kind: str
    ranks: tuple[int, int]

    def make(self, ties: Sequence[Factors]) -> list[Engine]:
        """An engine for each dtype and device of the layers; their generators are there, the factors not yet tied.

        Raises:
            OPLoRAError: more state than memory.
        """
        self._refuse_more_than_memory(ties)
        by_kind: dict[Any, list[Factors]] = {}
        for tie in ties:
            by_kind.setdefault((tie.dtype, tie.device, tie.placed), []).append(tie)
        return [self._engine(some) for some in by_kind.values()]

    def _engine(self, ties: Sequence[Factors]) -> Engine:
        first, state = ties[0], self._state(ties)
        if runs_on_device(first.device):
            made: type[Engine] = DeviceEngine
        else:
            made = StagedEngine if runs_on_device(first.placed) else HostEngine
        return made(state, ties, weight_ratio(self.settings.hidden_width))

    def _state(self, ties: Sequence[Factors]) -> Lean | Exact | Rate:
        if self.kind == "rate":
            return Rate(ties, self.settings)
        return Lean(ties, self.settings, self.ranks) if self.kind == "lean" else Exact(ties, self.settings)

    def _refuse_more_than_memory(self, ties: Sequence[Factors]) -> None:
        if self.kind == "rate":
            needed = [(tie.device, Rate.bytes_needed(tie)) for tie in ties]
            advice = "Preset 'auto' takes 8 bytes a factor entry: lower the rank r"
        elif self.kind == "lean":
            needed = [(tie.device, Lean.bytes_needed(tie, self.settings, self.ranks)) for tie in ties]
            d, k = self.ranks
            advice = f"State 'lean' takes {4 * d + 2 * k + 6} bytes a factor entry: lower the rank r"
        else:
            needed = [(tie.device, Exact.bytes_needed(tie, self.settings)) for tie in ties]
            advice = (
                "State 'exact' takes 12 (hidden_width + 1) bytes a factor entry: use state='lean', or lower "
                f"hidden_width (now {self.settings.hidden_width}) or the rank r"
            )
            advice += ", or pass generator_device='cpu'" if any(runs_on_device(tie.device) for tie in ties) else ""
        refuse_more_than_memory(needed, advice)
