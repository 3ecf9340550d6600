"""What is generated: the tensors of adapters, found in PEFT's layers, by names, or by shapes."""

from .layers import AdaptedLayer, by_layer, check_layers, refuse_to_step
from .pairing import Found, find, layer_of
from .peft import find_layers, foreign_gradient, foreign_tensors, other_parameters, unwrapped
from .precondition import precondition_gradients, require_pairs
from .tensors import STARTS, Start

__all__ = [
    "STARTS",
    "AdaptedLayer",
    "Found",
    "Start",
    "by_layer",
    "check_layers",
    "find",
    "find_layers",
    "foreign_gradient",
    "foreign_tensors",
    "layer_of",
    "other_parameters",
    "precondition_gradients",
    "refuse_to_step",
    "require_pairs",
    "unwrapped",
]
