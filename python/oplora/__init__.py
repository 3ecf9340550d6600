"""LoRA fine-tuning without a learning rate, in one changed line: ``optimizer = oplora.AdamW(model)``.

The names below are the whole public interface. They load on first use, so that ``oplora merge`` and ``oplora._core``
need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import OPLoRAError

if TYPE_CHECKING:
    from .config import OPLoRAConfig
    from .definition import Generators, create_oplora_optimizer
    from .files.export import save_adapter
    from .model import merge, wrap
    from .ops import generate
    from .optim import AdamW, for_trainer
    from .watching.cmmd import cmmd
    from .watching.monitor import Monitor
    from .watching.stats import stats

__version__ = "0.2.0.dev0"  # the one place: pyproject.toml reads it
__all__ = [
    "AdamW",
    "Generators",
    "Monitor",
    "OPLoRAConfig",
    "OPLoRAError",
    "cmmd",
    "create_oplora_optimizer",
    "for_trainer",
    "generate",
    "merge",
    "save_adapter",
    "stats",
    "wrap",
]

_HOME = {
    "AdamW": "optim",
    "Generators": "definition",
    "Monitor": "watching.monitor",
    "OPLoRAConfig": "config",
    "cmmd": "watching.cmmd",
    "create_oplora_optimizer": "definition",
    "for_trainer": "optim",
    "generate": "ops",
    "merge": "model",
    "save_adapter": "files.export",
    "stats": "watching.stats",
    "wrap": "model",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'oplora' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
