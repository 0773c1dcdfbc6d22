"""Choosing one of N samples: by score, or by what their answers agree on.

Samples of a prompt stand along the last axis. Answers are ids: two samples agree where their ids are equal,
whatever the numbers. A sample without an answer is masked; it is never chosen while there is another one.
Every function returns the *place* of the chosen sample, so that its text, score or verdict can be taken.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean, masked_mean, masked_sum
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar

Aggregate = Literal["minimum", "product", "mean", "last"]


def best_of_n(scores: Float[Array, "*B N"], mask: Bool[Array, "*B N"] | None = None) -> Int[Array, "*B"]:
    """Best-of-n: the sample with the highest score; the earliest of those that tie.

    Args:
      scores: of a reward model, of a process reward model (`process_scores`), or `likelihood_scores`.
      mask: samples that may be chosen (all by default); the others may hold NaN. 0 where there is none.
    """
    allowed = jnp.ones(scores.shape, bool) if mask is None else mask
    return jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)


def majority_vote(answers: Int[Array, "*B N"], mask: Bool[Array, "*B N"] | None = None) -> Int[Array, "*B"]:
    """Self-consistency (Wang et al. 2023): the answer that most chains of thought end in.

    Ties go to the answer that was given first; the place is that of its first sample.

    Args:
      mask: samples with an answer (all by default). 0 where there is none.
    """
    return weighted_vote(answers, jnp.ones(answers.shape), mask)


def weighted_vote(
    answers: Int[Array, "*B N"], weights: Float[Array, "*B N"], mask: Bool[Array, "*B N"] | None = None
) -> Int[Array, "*B"]:
    """The answer with the greatest total weight (Li et al. 2023, for weights from a verifier).

        argmax_a sum_n w_n 1[a_n = a]

    Ties go to the answer that was given first; the place is that of its first sample.

    Args:
      weights: not negative, such as a verifier's probabilities or `length_normalized_probs`.
      mask: samples with an answer (all by default); the others may hold NaN weights. 0 where there is none.
    """
    allowed = jnp.ones(answers.shape, bool) if mask is None else mask
    agree = answers[..., :, None] == answers[..., None, :]
    # A matrix product would sum equal votes in another order for each answer, and ties would be rounding.
    votes = jnp.sum(jnp.where(agree, clean(weights, allowed)[..., None, :], 0), axis=-1)
    return best_of_n(votes, allowed)


def likelihood_scores(
    logp: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, length_power: Scalar = 1.0
) -> Float[Array, "*B"]:
    """Length-normalized log-likelihood of samples under the policy, in nats: sum_t logp_t / length^power.

    Args:
      mask: the sampled tokens.
      length_power: 0 for the log-likelihood, 1 for its mean over tokens.
    """
    lengths = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(logp.dtype)
    return masked_sum(logp, mask, axis=-1) / lengths**length_power


def length_normalized_probs(
    logp: Float[Array, "*B N T"], mask: Bool[Array, "*B N T"]
) -> Float[Array, "*B N"]:
    """Weights of chains of thought for `weighted_vote`: exp of the mean logp (Wang et al. 2023, eq. 1)."""
    return jnp.exp(likelihood_scores(logp, mask))


def process_scores(
    step_logits: Float[Array, "*B T"], mask: Bool[Array, "*B T"], *, aggregate: Aggregate = "product"
) -> Float[Array, "*B"]:
    """A solution's score from those of its steps (Lightman et al. 2023; Snell et al. 2024).

    Args:
      step_logits: log-odds that each step is right, by a process reward model.
      mask: the places that hold a step; the others may hold NaN.
      aggregate: `minimum`, `product` (that all are right, were they independent), `mean`, or `last`.

    Returns:
      Probabilities; 1 (0 for `mean`) for a solution without steps.
    """
    log_prob = jax.nn.log_sigmoid(clean(step_logits, mask))
    if aggregate == "product":
        return jnp.exp(masked_sum(log_prob, mask, axis=-1))
    if aggregate == "minimum":
        return jnp.exp(jnp.min(jnp.where(mask, log_prob, 0), axis=-1))
    if aggregate == "mean":
        return masked_mean(jnp.exp(log_prob), mask, axis=-1)
    places = jnp.max(jnp.where(mask, jnp.arange(mask.shape[-1]), 0), axis=-1)
    last = jnp.take_along_axis(log_prob, places[..., None], axis=-1)[..., 0]
    return jnp.where(jnp.any(mask, axis=-1), jnp.exp(last), 1)
