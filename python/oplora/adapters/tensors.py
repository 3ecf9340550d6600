"""The trainable tensors of adapters by name: how each starts, and which two are the A and B of a product B A.

A new adapter type is a row or more of STARTS.
"""

from enum import Enum
from typing import Final

__all__ = ["OTHER_NAMES", "PAIRS", "STARTS", "Start"]


class Start(Enum):
    """How the rows of W2 that predict a tensor start, and with them the tensor."""

    RANDOM = "random"  # both at random
    ZERO = "zero"  # both at zero
    KEPT = "kept"  # the rows at zero; the tensor keeps the value that it has, and the generator adds to it


# PEFT's names of a layer's trainable tensors, in the order in which v holds them. Of LoRA's pair one starts at zero, so
# that training starts at the base model.
STARTS: Final = {
    "lora_A": Start.RANDOM,
    "lora_B": Start.ZERO,
    "lora_embedding_A": Start.ZERO,
    "lora_embedding_B": Start.RANDOM,
    "lora_magnitude_vector": Start.KEPT,  # DoRA
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), Start.KEPT),  # VeRA
    "ia3_l": Start.KEPT,  # (IA)^3
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), Start.KEPT),  # LoHa
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b"), Start.KEPT),  # LoKr
    **dict.fromkeys(("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), Start.KEPT),
    **dict.fromkeys(("oft_R", "oft_embedding_R"), Start.KEPT),  # OFT
    **dict.fromkeys(("boft_R", "boft_s"), Start.KEPT),  # BOFT
    **dict.fromkeys(("lily_A", "lily_B", "lily_router"), Start.KEPT),  # Lily
    **dict.fromkeys(("randlora_lambda", "randlora_gamma"), Start.KEPT),  # RandLoRA
    "hra_u": Start.KEPT,  # HRA
    "c3a_kernel": Start.KEPT,  # C3A
    "miss_block": Start.KEPT,  # MiSS
    "fourierft_spectrum": Start.KEPT,  # FourierFT
    **dict.fromkeys(("delora_A", "delora_B", "delora_lambda"), Start.KEPT),  # DeLoRA
    **dict.fromkeys(("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), Start.KEPT),  # GraLoRA
    **dict.fromkeys(("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"), Start.KEPT),  # VB-LoRA
}
PAIRS: Final = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))

# what others than PEFT call A and B: kohya's scripts and LyCORIS, torchtune, diffusers' old layers
OTHER_NAMES: Final = {
    **dict.fromkeys(("lora_down", "lora_a", "down"), "lora_A"),
    **dict.fromkeys(("lora_up", "lora_b", "up"), "lora_B"),
}
