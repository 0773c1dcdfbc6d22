"""Losses that train reward models: on pairs, on rankings, on the steps of a solution."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, mask_or_all
from rlhf_jax.losses.pair_logps import paired, row_values
from rlhf_jax.losses.reductions import Reduction, RowMean, row_mean, token_mean


def bradley_terry_loss(
    chosen_reward: Float[Array, "B"],
    rejected_reward: Float[Array, "B"],
    *,
    margin: Scalar | Float[Array, "B"] = 0.0,
    centring: Scalar = 0.0,
    label_smoothing: Scalar | Float[Array, "B"] = 0.0,
    mask: Bool[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Bradley-Terry likelihood of pairs (Ouyang et al. 2022, eq. 1), with margin and centring.

        -(1 - e) log s(R_c - R_r - m) - e log s(R_r - R_c - m) + k (R_c + R_r)^2

    With e one minus a judge's preference, it is the cross-entropy of soft labels (Lee et al. 2023).

    Args:
      chosen_reward: scores R_c of the preferred responses.
      rejected_reward: scores R_r of the others.
      margin: m, by how much the preferred score must lead: one number or one per pair (Llama 2, Touvron
        et al. 2023, eq. 2).
      centring: coefficient k that draws scores towards mean 0 (Eisenstein et al. 2023).
      label_smoothing: probability e that the rejected response is the better one: one number or one per pair.
      mask: pairs that count (all by default); the others may hold NaN.
      denominator: what the sum over pairs is divided by (their number by default).
    Returns:
      (loss, metrics), with the scores, their margin (R_c - R_r, without m) and the accuracy.
    """
    chosen, rejected, mask = check_shapes(
        "bradley_terry_loss",
        chosen_reward=(chosen_reward, "B"),
        rejected_reward=(rejected_reward, "B"),
        mask=(mask, "B"),
    )
    mask = mask_or_all(mask, chosen)
    chosen, rejected = cleaned(chosen, mask), cleaned(rejected, mask)
    margin = row_values("bradley_terry_loss", "margin", margin, chosen, mask)
    flipped = row_values("bradley_terry_loss", "label_smoothing", label_smoothing, chosen, mask)
    lead, log_sigmoid = chosen - rejected, jax.nn.log_sigmoid
    losses = -(1 - flipped) * log_sigmoid(lead - margin) - flipped * log_sigmoid(-lead - margin)
    losses += centring * (chosen + rejected) ** 2
    return paired(losses, chosen, rejected, row_mean(mask, None, denominator))


def hinge_ranking_loss(
    rewards: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"] | None = None,
    *,
    margin: Scalar = 1.0,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Hinge on the margins of ranked responses, to which rule-based rewards are fitted (Mu et al. 2024).

        mean over pairs in which a ranks before b of  relu(m - (R_a - R_b))

    Args:
      rewards: total scores R of the K responses to each prompt.
      ranks: the smaller the better; of equal ranks neither has to lead.
      mask: responses there are (all by default); the others may hold NaN.
      margin: m, by how much the better one must lead.
      denominator: what the sum over pairs is divided by (their number by default).
    Returns:
      (loss, metrics): `accuracy` is the share of pairs that the scores order rightly.
    """
    rewards, ranks, mask = check_shapes(
        "hinge_ranking_loss", rewards=(rewards, "B K"), ranks=(ranks, "B K"), mask=(mask, "B K")
    )
    mask = mask_or_all(mask, rewards)
    rewards = cleaned(rewards, mask)
    pairs = ranked_pairs(ranks, mask)
    lead = rewards[:, :, None] - rewards[:, None, :]
    mean = row_mean(pairs, None, denominator)
    loss = mean(jax.nn.relu(margin - lead))
    return loss, {"loss": jax.lax.stop_gradient(loss), "accuracy": mean((lead > 0).astype(lead.dtype))}


def ranked_pairs(ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """Ranked pairs: responses [b, i] that rank before [b, j]."""
    return mask[:, :, None] & mask[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])


def all_pairs_loss(
    rewards: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"] | None = None,
    *,
    margin: Scalar | Float[Array, "B"] = 0.0,
    centring: Scalar = 0.0,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Bradley-Terry likelihood of all pairs of K ranked responses (Ouyang et al. 2022, eq. 1).

        mean over prompts of  1 / C(K, 2) sum over a before b of  -log s(R_a - R_b - m) + k (R_a + R_b)^2

    Every prompt counts alike, however many responses it has. Of equal ranks neither has to lead: such pairs
    are in neither sum nor count. Of two responses it is `bradley_terry_loss`, metrics included.

    Args:
      rewards: scores R of the K responses to each prompt.
      ranks: the smaller the better.
      mask: responses there are (all by default); the others may hold NaN.
      margin: m, by how much the better score must lead: one number or one per prompt.
      centring: coefficient k that draws scores towards mean 0, as of `bradley_terry_loss`.
      denominator: what the sum over prompts is divided by (by default the number of those with two
        responses of different rank).
    Returns:
      (loss, metrics), all means over prompts of means over pairs: the scores of the better and of the worse
      responses as `chosen_reward` and `rejected_reward`, their `margin` and the `accuracy`.
    """
    rewards, ranks, mask, margin = _ranked("all_pairs_loss", rewards, ranks, mask, margin)
    mean = _mean_over_pairs(ranks, mask, denominator)
    better, worse = jnp.broadcast_arrays(rewards[:, :, None], rewards[:, None, :])
    losses = -jax.nn.log_sigmoid(better - worse - margin[:, None, None]) + centring * (better + worse) ** 2
    return paired(losses, better, worse, mean)


def plackett_luce_loss(
    rewards: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"] | None = None,
    *,
    margin: Scalar | Float[Array, "B"] = 0.0,
    centring: Scalar = 0.0,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Plackett-Luce likelihood of rankings (Plackett 1975; Rafailov et al. 2023, appendix A.3).

        -sum_a [R_a - log(exp R_a + sum_{b after a} exp(R_b + m))] + k mean_{a before b} (R_a + R_b)^2

    Responses of equal rank are not compared: each is chosen from itself and those behind it. So a best one
    before equal others is the softmax of the best of K. Of two responses it is `bradley_terry_loss`.

    Args: as of `all_pairs_loss`; `mask` may leave out any of a row.

    Returns:
      (loss, metrics): the loss of a ranking is a sum over its responses, the metrics are those of
      `all_pairs_loss`.
    """
    rewards, ranks, mask, margin = _ranked("plackett_luce_loss", rewards, ranks, mask, margin)
    mean = _mean_over_pairs(ranks, mask, denominator)
    better, worse = jnp.broadcast_arrays(rewards[:, :, None], rewards[:, None, :])
    # The lowest finite number stands for -inf, whose logsumexp with itself has a NaN gradient.
    lowest = jnp.asarray(jnp.finfo(rewards.dtype).min, rewards.dtype)
    behind = jnp.where(ranked_pairs(ranks, mask), worse + margin[:, None, None], lowest)
    itself = jnp.eye(rewards.shape[1], dtype=bool)
    normalizer = jax.nn.logsumexp(jnp.where(itself, better, behind), axis=2)
    # One number a ranking; as every pair's, the mean over its pairs gives it back.
    losses = jnp.sum(normalizer - rewards, axis=1, where=mask)[:, None, None]
    return paired(losses + centring * (better + worse) ** 2, better, worse, mean)


def _ranked(
    name: str, rewards: Any, ranks: Any, mask: Any, margin: Any
) -> tuple[Float[Array, "B K"], Int[Array, "B K"], Bool[Array, "B K"], Float[Array, "B"]]:
    """The arguments in full precision, one margin to each prompt; rewards are 0 where masked."""
    rewards, ranks, mask = check_shapes(
        name, rewards=(rewards, "B K"), ranks=(ranks, "B K"), mask=(mask, "B K")
    )
    mask = mask_or_all(mask, rewards)
    rewards = cleaned(rewards, mask)
    margin = row_values(name, "margin", margin, rewards[:, 0], jnp.any(mask, axis=1))
    return rewards, ranks, mask, margin


def _mean_over_pairs(
    ranks: Int[Array, "B K"], mask: Bool[Array, "B K"], denominator: Scalar | None
) -> RowMean:
    """The mean over prompts of the mean over each one's ranked pairs; without such a pair none counts."""
    pairs = ranked_pairs(ranks, mask)
    counts = jnp.sum(pairs, axis=(1, 2))
    mean = row_mean(counts > 0, None, denominator)
    return lambda values: mean(jnp.sum(values, axis=(1, 2), where=pairs) / jnp.maximum(counts, 1))


def process_reward_loss(
    step_logits: Float[Array, "B T"],
    labels: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Process reward model: cross-entropy of the labels of steps (Lightman et al. 2023; Wang et al. 2024).

        -y log s(z) - (1 - y) log s(-z)

    Args:
      step_logits: z at the last token of each step.
      labels: y in [0, 1]: whether the step is right, or the share of continuations that came out right.
      mask: the last token of each step; the other entries may hold NaN.
      reduce: how steps become one number.
      denominator: replaces the reduction's own, for micro-batches and shards.
    Returns:
      (loss, metrics): `accuracy` of z > 0 against y > 1/2.
    """
    logits, labels, mask = check_shapes(
        "process_reward_loss", step_logits=(step_logits, "B T"), labels=(labels, "B T"), mask=(mask, "B T")
    )
    logits, labels = cleaned(logits, mask), cleaned(labels, mask)
    losses = -labels * jax.nn.log_sigmoid(logits) - (1 - labels) * jax.nn.log_sigmoid(-logits)
    right = ((logits > 0) == (labels > 0.5)).astype(losses.dtype)
    loss = reduce(losses, mask, denominator=denominator)
    accuracy = reduce(right, mask, denominator=denominator)
    return loss, {"loss": jax.lax.stop_gradient(loss), "accuracy": accuracy}
