"""Floor 1: losses as pure functions of arrays; `(loss, metrics)` out."""

from rlhf_jax.losses.preference import dpo_loss
from rlhf_jax.losses.reductions import (
    Reduction,
    constant_length,
    packed_sequence_mean,
    sequence_mean,
    token_mean,
)
from rlhf_jax.losses.reward import bradley_terry_loss
from rlhf_jax.losses.supervised import cross_entropy_loss

__all__ = [
    "Reduction",
    "bradley_terry_loss",
    "constant_length",
    "cross_entropy_loss",
    "dpo_loss",
    "packed_sequence_mean",
    "sequence_mean",
    "token_mean",
]
