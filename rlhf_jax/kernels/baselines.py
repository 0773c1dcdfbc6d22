"""Baselines that are no mean of rewards: optimal for tokens, and optimal values of prompts."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import clean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Scalar
from rlhf_jax.kernels.advantages import GROUPS_HINT
from rlhf_jax.kernels.prepare import cleaned_constant, mask_or_all


def score_energy(
    logp: Float[Array, "B T"], collision: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Squared norm of the gradient of log pi(y_t) by its logits (OTB, arXiv 2602.07078).

        |e_y - pi|^2 = 1 - 2 pi(y_t) + sum_v pi(v)^2

    A stand-in for the squared norm by all parameters that needs no backward pass.

    Args:
      logp: log-probability in nats of each token.
      collision: sum of the squared probabilities of all tokens.
      mask: tokens that count.

    Returns:
      Energies, in [0, 2], 0 where masked; no gradient.
    """
    logp, collision, mask = check_shapes(
        "score_energy", logp=(logp, "B T"), collision=(collision, "B T"), mask=(mask, "B T")
    )
    energy = 1 - 2 * jnp.exp(cleaned_constant(logp, mask)) + cleaned_constant(collision, mask)
    return clean(jnp.maximum(energy, 0), mask)


def optimal_token_baseline_advantages(
    rewards: Float[Array, "N G"],
    energy: Float[Array, "B T"],
    token_mask: Bool[Array, "B T"],
    mask: Bool[Array, "N G"] | None = None,
) -> Float[Array, "B T"]:
    """Optimal token baseline: each place of an answer has its own (OTB, arXiv 2602.07078).

        A_it = r_i - sum_j W_jt r_j / sum_j W_jt,   W_it = sum_{s <= t} energy_is

    Sums are over the completions of the group that have a t-th token. A completion that is alone there has
    no baseline, as in verl.

    Args:
      rewards: one reward for each completion.
      energy: squared norms of the scores of tokens, or a stand-in (`score_energy`).
      token_mask: tokens of the completions; the t-th is the t-th that counts.
      mask: completions that count.

    Returns:
      Advantages of tokens, 0 where masked; no gradient.
    """
    rewards, mask = check_shapes(
        "optimal_token_baseline_advantages", rewards=(rewards, "N G", GROUPS_HINT), mask=(mask, "N G")
    )
    energy, token_mask = check_shapes(
        "optimal_token_baseline_advantages", energy=(energy, "B T"), token_mask=(token_mask, "B T")
    )
    mask = mask_or_all(mask, rewards)
    rewards = cleaned_constant(rewards, mask)
    token_mask = token_mask & mask.reshape(-1, 1)
    place = jnp.cumsum(token_mask, axis=1) - 1  # of a token among those that count
    front = jnp.argsort(~token_mask, axis=1, stable=True)
    path = jnp.cumsum(jnp.take_along_axis(cleaned_constant(energy, token_mask), front, axis=1), axis=1)
    running = jnp.take_along_axis(token_mask, front, axis=1)
    grouped = (*rewards.shape, energy.shape[1])
    weights, running = clean(path, running).reshape(grouped), running.reshape(grouped)
    total = jnp.sum(weights, axis=1)
    mean = jnp.sum(weights * rewards[..., None], axis=1) / jnp.where(total > 0, total, 1)
    baseline = jnp.where(jnp.sum(running, axis=1) > 1, mean, 0)
    of_rows = jnp.repeat(baseline, rewards.shape[1], axis=0)
    at_tokens = jnp.take_along_axis(of_rows, jnp.maximum(place, 0), axis=1)
    compared = jnp.repeat(jnp.sum(mask, axis=1) > 1, rewards.shape[1])
    return clean(rewards.reshape(-1, 1) - at_tokens, token_mask & compared[:, None])


def optimal_values(
    rewards: Float[Array, "N G"], mask: Bool[Array, "N G"] | None = None, *, beta: Scalar
) -> Float[Array, " N"]:
    """Optimal values of prompts from samples of the reference (A*-PO, arXiv 2505.20686, stage 1).

        V*(x) = beta log (1/G) sum_i exp(r_i / beta)

    They are those of the objective E[r] - beta KL(pi || ref); beta -> infinity gives the mean reward of the
    reference, beta -> 0 the largest.

    Args:
      rewards: of completions that the reference wrote.
      mask: completions that count.
      beta: beta_1 in the paper, which may differ from that of the regression.

    Returns:
      Values, 0 for a prompt of which no completion counts; no gradient.
    """
    rewards, mask = check_shapes("optimal_values", rewards=(rewards, "N G", GROUPS_HINT), mask=(mask, "N G"))
    mask = mask_or_all(mask, rewards)
    tempered = clean(cleaned_constant(rewards, mask) / beta, mask, -jnp.inf)
    count = jnp.sum(mask, axis=1)
    sound = jnp.where(count[:, None] > 0, tempered, 0)
    values = beta * (jax.nn.logsumexp(sound, axis=1) - jnp.log(jnp.maximum(count, 1)))
    return jnp.where(count > 0, values, 0)
