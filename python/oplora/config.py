"""What `oplora.wrap` puts into a model."""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .errors import OPLoRATypeError, OPLoRAValueError

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["OPLoRAConfig"]


@dataclass(frozen=True)
class OPLoRAConfig:
    """The LoRA that wrap() injects. Every field means what it means in peft.LoraConfig; the generators' settings are
    arguments of oplora.AdamW, as they are no part of the adapter.

    Attributes:
        r: rank of the factors lora_A (r, in_features) and lora_B (out_features, r).
        lora_alpha: the adapter's output is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora).
        target_modules: names or a regular expression of the layers to adapt; "all-linear" takes every nn.Linear and
            Conv1D but the output layer.
        lora_dropout: dropout on the adapter's input, in [0, 1).
        rank_pattern, alpha_pattern: other ranks and alphas for layers whose name matches the key.
        use_rslora: see lora_alpha.
        use_dora: train each row's magnitude beside A and B (DoRA; the paper takes hidden_width=4 for it).
        bias: "none", "all" or "lora_only": which biases are trained too.
        modules_to_save: layers trained and saved in full beside the adapter.
        init_lora_weights: PEFT's start of the factors; matters with init="keep" only.
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
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(patterns, dict):
                raise OPLoRATypeError(f"oplora.OPLoRAConfig: {name} is {patterns!r}, expected a dict.")
        alphas = {f"alpha_pattern[{name!r}]": alpha for name, alpha in self.alpha_pattern.items()}
        for name, value in {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout, **alphas}.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise OPLoRATypeError(f"oplora.OPLoRAConfig: {name} is {value!r}, expected a number.")
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise OPLoRAValueError(
                    f"oplora.OPLoRAConfig: rank {name} is {rank!r}, expected a whole number of at least 1."
                )
        if not 0 <= self.lora_dropout < 1:
            raise OPLoRAValueError(f"oplora.OPLoRAConfig: lora_dropout is {self.lora_dropout!r}, expected [0, 1).")
        if self.bias not in ("none", "all", "lora_only"):
            raise OPLoRAValueError(
                f"oplora.OPLoRAConfig: bias is {self.bias!r}, expected 'none', 'all' or 'lora_only'."
            )
        if not self.target_modules:
            raise OPLoRAValueError("oplora.OPLoRAConfig: target_modules is empty; name layers, or pass 'all-linear'.")

    def to_peft(self) -> "LoraConfig":
        """The same as PEFT's config, which is what the adapter's file holds."""
        from peft import LoraConfig

        fields = asdict(self)
        del fields["adapter_name"]
        return LoraConfig(**fields)
