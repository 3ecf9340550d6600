"""What `oplora.wrap` puts into a model."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import OPLoRAValueError

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["OPLoRAConfig", "check_adapter_name"]


@dataclass(frozen=True)
class OPLoRAConfig:
    """The LoRA that wrap() injects. Every field means what it means in peft.LoraConfig; the generators' settings are
    arguments of oplora.AdamW, as they are no part of the adapter.

    Attributes:
        r: rank of the factors lora_A (r, in_features) and lora_B (out_features, r).
        lora_alpha: the adapter's output is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora).
        target_modules: names or a regular expression of the layers to adapt; "all-linear" takes every nn.Linear and
            Conv1D; in transformers' models not the output layer.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        rank_pattern, alpha_pattern: other ranks and alphas for layers whose name matches the key.
        use_rslora: see lora_alpha.
        use_dora: train each row's magnitude beside A and B (DoRA; the paper takes hidden_width=4 for it).
        bias: "none", "all" or "lora_only": which biases are trained too.
        modules_to_save: layers trained and saved in full beside the adapter.
        init_lora_weights: PEFT's start of the factors, from which preset "auto" trains, and any with init="keep".
        task_type: "CAUSAL_LM", "SEQ_CLS", ..., or None.
        adapter_name: the adapter's name in the model.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | list[str] = "all-linear"
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    task_type: str | None = None
    adapter_name: str = "default"

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(pattern := getattr(self, name), dict):
                _refuse(name, pattern, "a dictionary of layers' names, {} for none")
        for name, rank in {"rank r": self.r, **_named("rank", self.rank_pattern)}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                _refuse(name, rank, "a whole number of at least 1")
        for name, alpha in {"lora_alpha": self.lora_alpha, **_named("alpha", self.alpha_pattern)}.items():
            if not _is_number(alpha) or not 0 < alpha < math.inf:
                _refuse(name, alpha, "a number above 0")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            _refuse("lora_dropout", self.lora_dropout, "[0, 1)")
        if self.bias not in ("none", "all", "lora_only"):
            _refuse("bias", self.bias, "'none', 'all' or 'lora_only'")
        if not self.target_modules:
            raise OPLoRAValueError("oplora.OPLoRAConfig: target_modules is empty; name layers, or pass 'all-linear'.")
        if isinstance(self.modules_to_save, str):  # PEFT takes its letters for names, and trains nearly everything
            _refuse("modules_to_save", self.modules_to_save, f"a list of names, [{self.modules_to_save!r}]")
        check_adapter_name(self.adapter_name, "oplora.OPLoRAConfig")

    def to_peft(self) -> "LoraConfig":
        """The same as PEFT's config, which is what the adapter's file holds."""
        from peft import LoraConfig

        fields = asdict(self)
        del fields["adapter_name"]
        return LoraConfig(**fields)


def check_adapter_name(name: object, where: str) -> None:
    """PEFT makes a module of this name in every layer."""
    if not isinstance(name, str) or not name or "." in name:
        raise OPLoRAValueError(f"{where}: adapter_name is {name!r}, expected a name without dots.")


def _named(what: str, pattern: dict[str, Any]) -> dict[str, Any]:
    return {f"{what} {name}": value for name, value in pattern.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise OPLoRAValueError(f"oplora.OPLoRAConfig: {name} is {value!r}, expected {expected}.")
