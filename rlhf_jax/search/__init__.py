"""More compute at inference: choosing among samples, and searching over steps. Models are callables here."""

from rlhf_jax.search.choosing import (
    best_of_n,
    length_normalized_probs,
    likelihood_scores,
    majority_vote,
    process_scores,
    weighted_vote,
)

__all__ = [
    "best_of_n",
    "length_normalized_probs",
    "likelihood_scores",
    "majority_vote",
    "process_scores",
    "weighted_vote",
]
