"""AdamW: which tensors are stepped with which numbers, and what is saved."""

from .adamw import AdamW
from .trainers import for_trainer

__all__ = ["AdamW", "for_trainer"]
