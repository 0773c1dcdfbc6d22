"""Modifiers of preference losses: f-divergences (f-DPO), likelihood (RPO), mixes (MPO), WPO, LD-DPO.

Three of them make a loss of losses, whose numbers are those of its parts and its own:

    with_divergence(dpo_loss, alpha_divergence_score)          # alpha
    with_nll(simpo_loss)                                       # rpo_alpha
    mixed_loss({"dpo": dpo_loss, "bco_pair": bco_pair_loss})   # dpo_weight, bco_pair_weight
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, full_precision
from rlhf_jax.losses.pair_logps import (
    PairLogps,
    PairLossFn,
    PairLossTraits,
    log_ratios,
    loss_parameters,
    per_token,
    policy_logps,
    power_score,
    takes_weights,
    traits_of,
)

# f-divergences -------------------------------------------------------------------------------------


def forward_kl_score(log_ratio: Float[Array, "B"]) -> Float[Array, "B"]:
    """f-DPO score of the forward KL divergence (Wang et al. 2023): f'(u) = 1 - 1 / u, u = exp(log_ratio).

    The paper drops the constant; with it, a ratio of 1 scores 0. Below a log-ratio of -30 the score goes
    on along its tangent, to stay finite with a gradient.

    Args:
      log_ratio: policy minus reference log-probability, in nats.
    """
    return power_score(full_precision(log_ratio), 1.0)


def js_score(log_ratio: Float[Array, "B"]) -> Float[Array, "B"]:
    """f-DPO score of the Jensen-Shannon divergence (Wang et al. 2023): f'(u) = log(2 u / (1 + u)).

    Args:
      log_ratio: policy minus reference log-probability, in nats.
    """
    return jnp.log(2.0) + jax.nn.log_sigmoid(full_precision(log_ratio))


def alpha_divergence_score(log_ratio: Float[Array, "B"], *, alpha: Scalar) -> Float[Array, "B"]:
    """f-DPO score of the alpha divergence (Wang et al. 2023): f'(u) = (1 - u^-alpha) / alpha.

    alpha = 0 is reverse KL (DPO itself), alpha = 1 forward KL. TRL's `f_alpha_divergence_coef` is 1 - alpha.
    Above -alpha log_ratio = 30 the score goes on along its tangent.

    Args:
      log_ratio: policy minus reference log-probability, in nats.
      alpha: order of the divergence; may be traced, 0 included.
    """
    return power_score(full_precision(log_ratio), alpha)


# Of single responses -------------------------------------------------------------------------------


def wpo_weight(
    logp: Float[Array, "B T"], log_collision: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """WPO's aligned weight of a response: how on-policy it is (Zhou et al. 2024, eq. 2).

        exp(1/|y| sum_t [log p(y_t) - log sum_v p(v)^2])

    A pair's weight is the product of its two responses': pass it as `weights`. As in the paper it may be
    above 1; TRL caps it there. With p_h the policy at half its temperature, log sum_v p(v)^2 at the place of
    y_t is 2 log p(y_t) - log p_h(y_t).

    Args:
      logp: policy log-probability of each token, in nats.
      log_collision: log sum over the vocabulary of p(v)^2 at each token: the expected p of a sample.
      mask: response tokens.
    Returns:
      Weights, without gradient; 1 for an empty response.
    """
    logp, log_collision, mask = check_shapes(
        "wpo_weight", logp=(logp, "B T"), log_collision=(log_collision, "B T"), mask=(mask, "B T")
    )
    aligned = cleaned(logp, mask) - cleaned(log_collision, mask)
    return jax.lax.stop_gradient(jnp.exp(masked_mean(aligned, mask, axis=-1)))


def length_desensitized_logp(
    logp: Float[Array, "B T"], mask: Bool[Array, "B T"], shared_length: Int[Array, "B"], *, alpha: Scalar
) -> Float[Array, "B"]:
    """LD-DPO's log-probability of a response, in which the tail counts less (Liu et al. 2024).

        sum_{t <= l} log p(y_t) + a sum_{t > l} log p(y_t)

    Use it for policy and reference alike, with l the shorter length of the pair.

    Args:
      logp: log-probability of each token, in nats.
      mask: response tokens; they are counted in order, wherever they stand.
      shared_length: l, tokens that count fully.
      alpha: a in [0, 1], weight of the tokens beyond; 1 is the plain sum.
    """
    logp, mask, shared_length = check_shapes(
        "length_desensitized_logp",
        logp=(logp, "B T"),
        mask=(mask, "B T"),
        shared_length=(shared_length, "B"),
    )
    shared = jnp.cumsum(mask, axis=-1) <= shared_length[:, None]
    return jnp.sum(cleaned(logp, mask) * jnp.where(shared, 1, alpha), axis=-1)


# Losses of losses ----------------------------------------------------------------------------------


def with_divergence(loss_fn: PairLossFn, score_fn: Callable[..., Float[Array, "B"]]) -> PairLossFn:
    """A loss under another f-divergence than the reverse KL (f-DPO, Wang et al. 2023): f'(u) for log u.

    Args:
      loss_fn: on log-ratios.
      score_fn: log-ratio -> f'(u): `forward_kl_score`, `js_score`, `alpha_divergence_score`; its numbers are
        numbers of the loss.
    Raises:
      UserError: a loss that does not compare log-ratios of single responses.
    """
    if traits_of(loss_fn).uses_plain_logps:
        raise UserError(
            f"{_name(loss_fn)} does not compare log-ratios to the reference: it has no f-divergence"
        )
    numbers = loss_parameters(score_fn)

    def loss(pairs: PairLogps, /, **options: Any) -> tuple[Float[Array, ""], Metrics]:
        own = {name: options.pop(name) for name in numbers if name in options}
        chosen, rejected, _ = log_ratios(_name(loss_fn), pairs, options.get("mask"), None, None)
        zeros = jnp.zeros_like(chosen)
        scored = dataclasses.replace(
            pairs,
            policy_chosen=score_fn(chosen, **own),
            policy_rejected=score_fn(rejected, **own),
            ref_chosen=zeros,
            ref_rejected=zeros,
        )
        return loss_fn(scored, **options)

    return _declared(loss, f"{_name(loss_fn)} with {_name(score_fn)}", [loss_fn], numbers)


def with_nll(loss_fn: PairLossFn) -> PairLossFn:
    """A loss plus the likelihood of the chosen response per token (RPO, Pang et al. 2024, eq. 1).

        L - a log p(y_c) / len_c

    The number a is `rpo_alpha`, 1 by default as in the paper; TRL's likelihood is the mean over all tokens
    of the batch instead. Weights of pairs hold for both terms. With LD-DPO the log-probability is that of
    LD-DPO.
    """

    def loss(
        pairs: PairLogps, /, *, rpo_alpha: Scalar = 1.0, **options: Any
    ) -> tuple[Float[Array, ""], Metrics]:
        rest, metrics = loss_fn(pairs, **options)
        rows = (options.get(name) for name in ("mask", "weights", "denominator"))
        chosen, rejected, mean = policy_logps("with_nll", pairs, *rows)
        nll = mean(-per_token("with_nll", pairs, chosen, rejected)[0])
        total = rest + rpo_alpha * nll
        return total, jax.lax.stop_gradient({**metrics, "loss": total, "rpo_nll": nll})

    own = loss_parameters(loss)
    return _declared(loss, f"{_name(loss_fn)} with NLL", [loss_fn], own, uses_plain_logps=True)


def mixed_loss(loss_fns: Mapping[str, PairLossFn]) -> PairLossFn:
    """Weighted sum of losses on the same pairs (MPO, Wang et al. 2024).

        sum_i w_i L_i

    The weight of the loss by the name `dpo` is the number `dpo_weight`, 1 by default. Beta is that of all,
    and so is a number that several of them have.

    Args:
      loss_fns: by name.
    """

    def loss(pairs: PairLogps, /, **options: Any) -> tuple[Float[Array, ""], Metrics]:
        given = {name: options.pop(f"{name}_weight", 1.0) for name in loss_fns}
        numbers = {name: options.pop(name) for name in shared if name in options}
        results = {}
        for name, loss_fn in loss_fns.items():
            own = {key: numbers[key] for key in loss_parameters(loss_fn) if key in numbers}
            results[name] = loss_fn(pairs, **options, **own)
        return weighted_sum(results, given)

    shared = {key for loss_fn in loss_fns.values() for key in loss_parameters(loss_fn)}
    weights = {f"{name}_weight": 1.0 for name in loss_fns}
    return _declared(loss, " + ".join(loss_fns), list(loss_fns.values()), weights)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", str(function))


def _declared(
    loss: Callable[..., Any],
    name: str,
    parts: list[PairLossFn],
    own: Mapping[str, Any],
    *,
    uses_plain_logps: bool = False,
) -> PairLossFn:
    """The loss of losses with the name, the numbers and the traits that callers read."""
    numbers = {key: value for part in parts for key, value in loss_parameters(part).items()}
    both = numbers.keys() & own.keys()
    if both:
        raise UserError(f"{name}: {min(both)} is a number of both: bind one with functools.partial")
    keywords = {**numbers, **own} | ({"weights": None} if all(map(takes_weights, parts)) else {})
    kind = inspect.Parameter.KEYWORD_ONLY
    signature = inspect.Signature([inspect.Parameter(k, kind, default=v) for k, v in keywords.items()])
    traits = {
        field.name: any(getattr(traits_of(part), field.name) for part in parts)
        for field in dataclasses.fields(PairLossTraits)
    }
    traits["uses_plain_logps"] |= uses_plain_logps
    for attribute, value in {
        "__name__": name,
        "__signature__": signature,
        "traits": PairLossTraits(**traits),
    }.items():
        setattr(loss, attribute, value)
    return loss


def weighted_sum(
    losses: Mapping[str, tuple[Float[Array, ""], Metrics]], weights: Mapping[str, Scalar]
) -> tuple[Float[Array, ""], Metrics]:
    """Sum of losses with weights, as MPO (Wang et al. 2024) mixes preference, quality and likelihood losses.

    Args:
      losses: results of loss functions by name.
      weights: weight of each.
    Returns:
      (loss, metrics), with the `loss` of the sum and every loss's own metrics as `name/metric`.
    Raises:
      UserError: names of losses and weights differ.
    """
    if losses.keys() != weights.keys():
        raise UserError(
            f"weighted_sum: losses {sorted(losses)} need weights of the same names, not {sorted(weights)}."
        )
    total = jnp.sum(jnp.stack([weights[name] * loss for name, (loss, _) in losses.items()]))
    metrics = {f"{name}/{key}": value for name, (_, own) in losses.items() for key, value in own.items()}
    return total, metrics | {"loss": jax.lax.stop_gradient(total)}
