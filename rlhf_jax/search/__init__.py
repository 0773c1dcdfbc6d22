"""More compute at inference: choosing among samples, and searching over steps. Models are callables here."""

from rlhf_jax.search.accuracy import (
    best_of_n_accuracy,
    best_of_n_kl,
    best_of_n_value,
    pass_at_k,
    vote_accuracy,
)
from rlhf_jax.search.choosing import (
    best_of_n,
    chain_weights,
    likelihood_scores,
    majority_vote,
    process_scores,
    weighted_vote,
)

__all__ = [
    "best_of_n",
    "best_of_n_accuracy",
    "best_of_n_kl",
    "best_of_n_value",
    "chain_weights",
    "likelihood_scores",
    "majority_vote",
    "pass_at_k",
    "process_scores",
    "vote_accuracy",
    "weighted_vote",
]
