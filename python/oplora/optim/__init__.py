"""AdamW: which tensors are stepped with which numbers, and what is saved."""

from .adamw import AdamW

__all__ = ["AdamW"]
