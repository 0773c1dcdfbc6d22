"""Accuracy against n, every n at once, from one pool of N samples a prompt.

Each function gives the expected accuracy of a method that draws n of the pool's N samples without
replacement. Over prompts and pools that is an unbiased estimate of the method with n fresh samples, and of
far less variance than drawing n once.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray


def pass_at_k(correct: Bool[Array, "*B N"]) -> Float[Array, "*B N"]:
    """pass@k for k = 1 ... N: whether one of k samples is right (Chen et al. 2021, eq. 1).

        1 - C(N - c, k) / C(N, k)

    Args:
      correct: which of the pool's samples are right; c is their number.
    """
    return best_of_n_accuracy(correct.astype(jnp.float32), correct)


def best_of_n_accuracy(
    scores: Float[Array, "*B N"], correct: Bool[Array, "*B N"], mask: Bool[Array, "*B N"] | None = None
) -> Float[Array, "*B N"]:
    """Expected accuracy of `choosing.best_of_n` for n = 1 ... N, exactly; see `best_of_n_value`.

    Args:
      scores: samples of equal score rank in the order of the pool.
      mask: samples that may be chosen (all by default); a subset without one is wrong.
    """
    allowed = jnp.ones(correct.shape, bool) if mask is None else mask
    return best_of_n_value(jnp.where(allowed, scores, -jnp.inf), (correct & allowed).astype(jnp.float32))


def best_of_n_value(scores: Float[Array, "*B N"], values: Float[Array, "*B N"]) -> Float[Array, "*B N"]:
    """Expected value of the sample with the highest score among n, for n = 1 ... N, exactly.

    The sample of rank i (from 0, by score) is the best of a random subset of n with probability

        P(i, n) = C(N - 1 - i, n - 1) / C(N, n)

    Args:
      scores: what the sample is chosen by; those of equal score rank in the order of the pool.
      values: what it is worth: a gold reward, the scores themselves, ...
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return jnp.take_along_axis(values, order, axis=-1) @ _rank_probabilities(values.shape[-1])


def best_of_n_kl(sizes: Int[Array, " K"]) -> Float[Array, " K"]:
    """KL of best-of-n to the policy that is sampled from, at most: log n - (n - 1) / n nats.

    Exact where all scores differ and no answer comes up twice (Stiennon et al. 2020); an upper
    bound otherwise (Beirami et al. 2024).
    """
    counts = jnp.asarray(sizes, jnp.float32)
    return jnp.log(counts) - (counts - 1) / counts


def _rank_probabilities(total: int) -> Float[Array, "N N"]:
    """P(i, n) as [rank, n - 1], by the ratio of neighbours (N - i - n) / (N - 1 - i): nothing overflows."""
    ranks, sizes = jnp.arange(total - 1)[:, None], jnp.arange(1, total + 1)
    ratios = jnp.maximum(total - ranks - sizes, 0) / (total - 1 - ranks)
    first = (sizes / total)[None]
    return first * jnp.concatenate([jnp.ones_like(first), jnp.cumprod(ratios, axis=0)])


def vote_accuracy(
    answers: Int[Array, "B N"],
    correct: Bool[Array, "B N"],
    key: PRNGKeyArray,
    *,
    weights: Float[Array, "B N"] | None = None,
    mask: Bool[Array, "B N"] | None = None,
    resamples: int = 100,
) -> Float[Array, "B N"]:
    """Expected accuracy of `choosing.weighted_vote` for n = 1 ... N, by resampling.

    Each resample orders the pool anew and votes with its first n samples, for every n. As a tie goes to the
    answer that was given first, tied answers win equally often.

    Args:
      weights: of the votes; 1 by default.
      mask: samples with an answer (all by default); a vote without one is wrong.
      resamples: orders a prompt; the error falls with their root.
    """
    total = answers.shape[-1]
    allowed = jnp.ones(answers.shape, bool) if mask is None else mask
    cast = clean(jnp.ones(answers.shape) if weights is None else weights, allowed)

    def one_order(row: tuple[Array, ...], key: PRNGKeyArray) -> Bool[Array, "N"]:
        order = jax.random.permutation(key, total)
        answer, right, vote, counts = (x[order] for x in row)
        agree = (answer[:, None] == answer[None]) & counts[:, None] & counts[None]
        # votes[n, i]: what the answer of sample i has after n + 1 samples; it stands from sample i on.
        votes = jnp.cumsum(jnp.where(agree, vote[:, None], 0), axis=0)
        stands = counts[None] & (jnp.arange(total)[None] <= jnp.arange(total)[:, None])
        chosen = jnp.argmax(jnp.where(stands, votes, -jnp.inf), axis=1)
        return right[chosen] & counts[chosen] & jnp.any(stands, axis=1)

    def one_prompt(item: tuple[tuple[Array, ...], PRNGKeyArray]) -> Float[Array, "N"]:
        row, key = item
        keys = jax.random.split(key, resamples)
        return jnp.mean(jax.vmap(one_order, (None, 0))(row, keys).astype(jnp.float32), axis=0)

    keys = jax.random.split(key, len(answers))
    return jax.lax.map(one_prompt, ((answers, correct, cast, allowed), keys))
