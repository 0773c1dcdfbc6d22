"""The callables that updates know, made from logits of whole rows: for models that give nothing else.

All of them hold [B, T, V]; those of `logprob_fns`, for decoders of ours, do not.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from rlhf_jax.core.protocols import CandidateFn, DistributionFn, GreedyMatchFn, LogitsFn, LogprobFn, TopKFn
from rlhf_jax.core.types import Array, Bool, Float, Int, Params, Scalar, Sequences, TokenLogprobs


def shift(values: Shaped[Array, "B T *rest"]) -> Shaped[Array, "B T *rest"]:
    """The one-column shift: what the state at t-1 says moves to the token at t, which is chosen in it.

    Column 0 has no state before it and gets 0.
    """
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (values.ndim - 2)))


def _logits(logits_fn: LogitsFn, params: Params, sequences: Sequences) -> Float[Array, "B T V"]:
    rows = sequences.tokens, sequences.positions, sequences.segment_ids
    return logits_fn(params, *rows, **sequences.image_inputs)


def logprobs_from_logits_fn(
    logits_fn: LogitsFn, *, temperature: Scalar = 1.0, collision: bool = False
) -> LogprobFn:
    """`logprobs(params, sequences) -> TokenLogprobs` of any model that gives logits (values are 0).

    Holds [B, T, V]; models of ours never do (`make_logprob_fn`).

    Args:
      temperature: the one that rollouts were sampled at, so that log-probs are the sampler's.
      collision: give collision probabilities, too.
    """

    def logprobs(params: Params, sequences: Sequences) -> TokenLogprobs:
        logits = _logits(logits_fn, params, sequences)
        logp = jax.nn.log_softmax(logits / temperature, axis=-1)
        following = jnp.roll(sequences.tokens, -1, axis=1)[..., None]
        taken = jnp.take_along_axis(logp, following, axis=-1)[..., 0]
        # A token that is forbidden, at -inf, adds nothing to the entropy.
        entropy = -jnp.sum(jnp.where(logp > -jnp.inf, jnp.exp(logp) * logp, 0), axis=-1)
        scored = TokenLogprobs(shift(taken), shift(entropy), jnp.zeros_like(taken))
        if sequences.candidates is not None:
            of_candidates = jnp.take_along_axis(shift(logp), sequences.candidates, axis=-1)
            scored = dataclasses.replace(scored, candidate_logp=of_candidates)
        if not collision:
            return scored
        squares = jax.lax.stop_gradient(jnp.sum(jnp.exp(2 * logp), axis=-1))
        return dataclasses.replace(scored, collision=shift(squares))

    return logprobs


def greedy_match_from_logits_fn(logits_fn: LogitsFn) -> GreedyMatchFn:
    """`make_greedy_match_fn` of any model that gives logits."""
    logprobs = logprobs_from_logits_fn(logits_fn)

    def match(params: Params, sequences: Sequences) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
        logits = _logits(logits_fn, params, sequences)
        guesses = shift(jnp.argmax(logits, axis=-1))
        return logprobs(params, sequences).logp, guesses == sequences.tokens

    return match


def distribution_from_logits_fn(logits_fn: LogitsFn, *, temperature: Scalar = 1.0) -> DistributionFn:
    """`make_distribution_fn` of any model that gives logits."""

    def logp(params: Params, sequences: Sequences) -> Float[Array, "B T V"]:
        logits = _logits(logits_fn, params, sequences)
        return jax.nn.log_softmax(shift(logits / temperature), axis=-1)

    return logp


def top_k_from_logits_fn(logits_fn: LogitsFn, k: int) -> TopKFn:
    """`make_top_k_fn` of any model that gives logits."""
    distribution_fn = distribution_from_logits_fn(logits_fn)

    def top_k(params: Params, sequences: Sequences, temperature: Scalar = 1.0) -> tuple[Array, Array]:
        logp = jax.nn.log_softmax(distribution_fn(params, sequences) / temperature, axis=-1)
        return jax.lax.stop_gradient(jax.lax.top_k(logp, k))

    return top_k


def candidates_from_logits_fn(logits_fn: LogitsFn) -> CandidateFn:
    """`make_candidate_fn` of any model that gives logits."""
    distribution_fn = distribution_from_logits_fn(logits_fn)

    def candidates(
        params: Params, sequences: Sequences, token_ids: Int[Array, "B T K"], temperature: Scalar = 1.0
    ) -> tuple[Array, Array]:
        logp = distribution_fn(params, sequences)
        tempered = jax.nn.log_softmax(logp / temperature, axis=-1)
        taken = jnp.take_along_axis(logp, sequences.tokens[..., None], axis=-1)[..., 0]
        return jnp.take_along_axis(tempered, token_ids, axis=-1), taken

    return candidates
