"""The generators as autograd sees them, and any torch optimizer over them: the oracle, and the way on every device."""

from .generators import Generator, Generators
from .optimizer import GeneratorOptimizer, create_oplora_optimizer

__all__ = ["Generator", "GeneratorOptimizer", "Generators", "create_oplora_optimizer"]
