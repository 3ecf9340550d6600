"""What is generated: the tensors of adapters, found in PEFT's layers, by names, or by shapes."""

from .layers import AdaptedLayer, PlainLayer, by_layer, check_layers, is_divided, refuse_to_step
from .pairing import Found, find, layer_of
from .peft import find_layers, foreign_gradient, foreign_tensors, other_parameters, unwrapped
from .pieces import Pieces, are_in_pieces, refuse_in_pieces
from .precondition import precondition_gradients, require_pairs
from .share import Share, divided_like, gradient_here, here, known_or_found, refuse_divided
from .tensors import STARTS, Start

__all__ = [
    "STARTS",
    "AdaptedLayer",
    "Found",
    "Pieces",
    "PlainLayer",
    "Share",
    "Start",
    "are_in_pieces",
    "by_layer",
    "check_layers",
    "divided_like",
    "find",
    "find_layers",
    "foreign_gradient",
    "foreign_tensors",
    "gradient_here",
    "here",
    "is_divided",
    "known_or_found",
    "layer_of",
    "other_parameters",
    "precondition_gradients",
    "refuse_divided",
    "refuse_in_pieces",
    "refuse_to_step",
    "require_pairs",
    "unwrapped",
]
