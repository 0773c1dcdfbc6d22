"""Corrections for off-policy answers: an importance weight times acceptance rules, against the sampler.

A sampler whose numbers differ from the trainer's, or that holds an older policy, makes every answer a little
off policy. With the ratio rho_t = pi(y_t) / mu(y_t) of the policy at the start of the update to the sampler,

    correction = weight(rho) x rule_1(rho) x rule_2(rho) x ...

A weight (`policy_weights`: of a token, a sequence, or the geometric mean of a sequence; truncated or masked)
multiplies the surrogate and leaves the denominator. What a rule rejects is out of the loss, denominator
included. Thresholds are arguments, and may be traced.

The rules are those of verl's rollout correction (Liu et al. 2025, "When Speed Kills Stability"): an estimate
of KL(mu || pi), with k1 = -log rho, k2 = k1^2 / 2 and k3 = rho - 1 - log rho, of a token or as the sum, mean
or maximum over its sequence, within bounds.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import nearest_name
from rlhf_jax.core.masks import masked_mean, masked_quantile
from rlhf_jax.core.numerics import bounded_exp
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.kl import k2, k3
from rlhf_jax.kernels.prepare import cleaned_constant
from rlhf_jax.losses.policy import KLFn
from rlhf_jax.losses.policy_ratios import (
    sequence_average,
    sequence_log_ratio,
    sequence_maximum,
    sequence_total,
    sequence_total_log_ratio,
    token_log_ratio,
)
from rlhf_jax.losses.policy_weights import masked_importance_weights, truncated_importance_weights

LevelFn: TypeAlias = Callable[
    [Float[Array, "B T"], Bool[Array, "B T"], Int[Array, "B T"] | None], Float[Array, "B T"]
]
"""(values of tokens, mask, segment_ids) -> at each token, what is compared with a threshold."""


@runtime_checkable
class BoundedFn(Protocol):
    """A weight [B, T], or a rule, bool [B, T], between two thresholds."""

    def __call__(
        self,
        old_logp: Float[Array, "B T"],
        sampler_logp: Float[Array, "B T"],
        mask: Bool[Array, "B T"],
        /,
        *,
        low: Scalar,
        high: Scalar,
    ) -> Float[Array, "B T"] | Bool[Array, "B T"]:
        """The weight of each token, or whether it is accepted."""
        ...


@dataclasses.dataclass(frozen=True)
class Correction:
    """A weight times rules; the empty product corrects nothing, and is measured all the same.

    Attributes:
      weight_fn: importance weight of each token, one of `WEIGHTS` or any such function; None for 1.
      rules: what accepts tokens, of `RULES` or any such functions; all must.
      bypass: the surrogate's ratio is to the sampler instead of to the policy at the start of the update
        (verl's bypass mode), so that its clip bounds both drifts together.
    """

    weight_fn: BoundedFn | None = None
    rules: tuple[BoundedFn, ...] = ()
    bypass: bool = False


def of_token(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Float[Array, "B T"]:
    """Each token by itself."""
    del mask, segment_ids
    return values


def _cleaned_logps(
    name: str, old_logp: Float[Array, "B T"], sampler_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]]:
    """Both log-probs, clean and without gradient, and the mask."""
    old_logp, sampler_logp, mask = check_shapes(
        name, old_logp=(old_logp, "B T"), sampler_logp=(sampler_logp, "B T"), mask=(mask, "B T")
    )
    return cleaned_constant(old_logp, mask), cleaned_constant(sampler_logp, mask), mask


def ratio_rule(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: Scalar = 0.5,
    high: Scalar = 2.0,
    level_fn: LevelFn = of_token,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Rejection by k1: accepts log(low) <= level(-log rho) <= log(high), the bounds of a ratio.

    As in verl the ratio is that of the sampler to the policy, 1 / rho; with high = 1 / low it is the same
    either way. The mean over a sequence gives the geometric mean of its ratios, which no length inflates.

    Args:
      old_logp: log-probability in nats under the policy at the start of the update.
      sampler_logp: the same as the sampler reported it.
      mask: tokens that count.
      low: least ratio accepted.
      high: largest ratio accepted.
      level_fn: `of_token`, `sequence_total` or `sequence_average`.
      segment_ids: for packed rows; None when a row is a sequence.
    """
    old_logp, sampler_logp, mask = _cleaned_logps("ratio_rule", old_logp, sampler_logp, mask)
    statistic = level_fn(sampler_logp - old_logp, mask, segment_ids)
    return mask & (statistic >= jnp.log(low)) & (statistic <= jnp.log(high))


def divergence_rule(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: Scalar = 0.0,
    high: Scalar = 0.01,
    kl_fn: KLFn = k3,
    level_fn: LevelFn = of_token,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Rejection by k2 or k3, which are never negative: accepts level(kl) <= high, in nats.

    Args:
      old_logp: log-probability in nats under the policy at the start of the update.
      sampler_logp: the same as the sampler reported it.
      mask: tokens that count.
      low: has no say: a divergence cannot be too small.
      high: largest divergence accepted.
      kl_fn: `kernels.k2` or `kernels.k3`, an estimate of KL(mu || pi) at each token.
      level_fn: `of_token`, `sequence_total`, `sequence_average` or `sequence_maximum`.
      segment_ids: for packed rows; None when a row is a sequence.
    """
    del low
    old_logp, sampler_logp, mask = _cleaned_logps("divergence_rule", old_logp, sampler_logp, mask)
    return mask & (level_fn(kl_fn(sampler_logp, old_logp), mask, segment_ids) <= high)


def apply_correction(
    correction: Correction,
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    is_clip_low: Scalar = 0.0,
    is_clip_high: Scalar = 2.0,
    rejection_low: Scalar | Float[Array, " R"] = 0.5,
    rejection_high: Scalar | Float[Array, " R"] = 2.0,
) -> tuple[Float[Array, "B T"] | None, Bool[Array, "B T"], Metrics]:
    """The product of a correction, and how far off policy the answers are before it acts.

    Args:
      old_logp: log-probability in nats under the policy at the start of the update.
      sampler_logp: the same as the sampler reported it.
      mask: tokens that count.
      is_clip_low: least weight.
      is_clip_high: largest weight.
      rejection_low: lower threshold of the rules, one for all or one for each.
      rejection_high: upper threshold of the rules, likewise.

    Returns:
      (weights, accepted, metrics): weights are None where it has none; tokens are accepted by all rules;
      metrics are `off_policy_metrics`, `is_ratio`, the mean weight, and `rejected`, the share of tokens.
    """
    logps = (old_logp, sampler_logp, mask)
    lows, highs = (jnp.broadcast_to(x, (len(correction.rules),)) for x in (rejection_low, rejection_high))
    accepted = mask
    for place, rule in enumerate(correction.rules):
        accepted = accepted & rule(*logps, low=lows[place], high=highs[place])
    weights, metrics = None, off_policy_metrics(*logps)
    if correction.rules:
        metrics["rejected"] = masked_mean(1.0 - accepted, mask)
    if correction.weight_fn is not None:
        weights = correction.weight_fn(*logps, low=is_clip_low, high=is_clip_high)
        metrics["is_ratio"] = masked_mean(weights, accepted)
    return weights, accepted, metrics


def check_thresholds(
    correction: Correction,
    *,
    is_clip_low: Scalar,
    is_clip_high: Scalar,
    rejection_low: Scalar | Float[Array, " R"],
    rejection_high: Scalar | Float[Array, " R"],
) -> None:
    """Raises: UserError where no answer could be within the thresholds; traced ones are not looked at."""
    between = [getattr(rule, "func", rule) is ratio_rule for rule in correction.rules]
    for name, low, high, applies in (
        ("is_clip", is_clip_low, is_clip_high, [correction.weight_fn is not None]),
        ("rejection", rejection_low, rejection_high, between),
    ):
        if isinstance(low, Tracer) or isinstance(high, Tracer):
            continue
        if np.any(np.less(high, low) & np.array(applies, bool)):
            raise UserError(
                f"{name}_low {np.asarray(low).tolist()} is above {name}_high {np.asarray(high).tolist()}: no "
                f"ratio is between them, so nothing would be learned: give {name}_low the smaller one"
            )


def off_policy_metrics(
    old_logp: Float[Array, "B T"],
    sampler_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Metrics:
    """Off-policy diagnostics of answers, from raw ratios: nothing is truncated or rejected yet.

    Args:
      old_logp: log-probability in nats under the policy at the start of the update.
      sampler_logp: the same as the sampler reported it.
      mask: tokens that count.
      segment_ids: for packed rows; None when a row is a sequence.

    Returns:
      `ess`: Kish's effective sample size of the answers' weights, as a share of their number;
      `chi2_token`, `chi2_sequence`: chi-square divergence E_mu[rho^2] - 1 of the policy from the sampler;
      `perplexity_gap`: mean over answers of log perplexity(policy) - log perplexity(sampler), in nats;
      `ratio_q01`, `ratio_q50`, `ratio_q99`: quantiles of the tokens' ratios.
    """
    old_logp, sampler_logp, mask = _cleaned_logps("off_policy_metrics", old_logp, sampler_logp, mask)
    log_ratio = old_logp - sampler_logp
    ratio = bounded_exp(log_ratio)
    of_answer = bounded_exp(sequence_total(log_ratio, mask, segment_ids))
    # Tokens share the place of their answer evenly, so a sum over tokens is one over answers.
    count = sequence_total(mask.astype(ratio.dtype), mask, segment_ids)
    share = mask / jnp.maximum(count, 1)
    answers = jnp.maximum(jnp.sum(share), 1)
    first, second = (jnp.sum(share * weights) for weights in (of_answer, jnp.square(of_answer)))
    gap = sequence_average(-log_ratio, mask, segment_ids)
    return {
        "ess": jnp.square(first) / jnp.maximum(answers * second, jnp.finfo(ratio.dtype).tiny),
        "chi2_token": masked_mean(jnp.square(ratio), mask) - jnp.any(mask),
        "chi2_sequence": second / answers - jnp.any(mask),
        "perplexity_gap": jnp.sum(share * gap) / answers,
        **{
            f"ratio_q{q:02}": jnp.where(jnp.any(mask), masked_quantile(ratio, mask, q / 100), 0)
            for q in (1, 50, 99)
        },
    }


# By name ------------------------------------------------------------------------------------------------

_LEVELS = {
    "token": token_log_ratio,
    "sequence": sequence_total_log_ratio,
    "geometric": sequence_log_ratio,
}
WEIGHTS: dict[str, BoundedFn] = {
    f"{level}_{kind}": functools.partial(weights_fn, ratio_fn=ratio_fn)
    for level, ratio_fn in _LEVELS.items()
    for kind, weights_fn in (
        ("truncate", truncated_importance_weights),
        ("mask", masked_importance_weights),
    )
}
"""Weights by the names of TRL's modes; `geometric_*` are of the geometric mean of an answer's ratios."""

RULES: dict[str, BoundedFn] = {
    f"{name}_{estimator}": functools.partial(rule, level_fn=level_fn)
    for name, level_fn in (
        ("token", of_token),
        ("seq_sum", sequence_total),
        ("seq_mean", sequence_average),
        ("seq_max", sequence_maximum),
    )
    for estimator, rule in (
        ("k1", ratio_rule),
        ("k2", functools.partial(divergence_rule, kl_fn=k2)),
        ("k3", functools.partial(divergence_rule, kl_fn=k3)),
    )
    if (name, estimator) != ("seq_max", "k1")
}
"""Acceptance rules by verl's names."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A correction with the thresholds it is published with.

    Attributes:
      thresholds: of `apply_correction`, by name.
    """

    correction: Correction
    thresholds: Mapping[str, float]


def _preset(weight: str = "", rule: str = "", *, bypass: bool = False, **thresholds: float) -> Preset:
    rules = (RULES[rule],) if rule else ()
    return Preset(Correction(WEIGHTS[weight] if weight else None, rules, bypass), thresholds)


_GEO = {"rule": "seq_mean_k1", "rejection_low": 0.999, "rejection_high": 1.001}
_K3 = {"rule": "seq_mean_k3", "rejection_high": 0.01}
PRESETS: dict[str, Preset] = {
    "metrics": _preset(),
    # Yao et al. 2025; verl's decoupled_token_is.
    "tis": _preset("token_truncate", is_clip_high=2.0),
    "mis": _preset("token_mask", is_clip_high=2.0),
    # TRL's four modes, bounded at 3 as there, and the same of the geometric mean.
    **{name: _preset(name, is_clip_high=3.0) for name in WEIGHTS},
    # IcePop (Ling team 2025, arXiv 2510.18855), with verl's bounds.
    "icepop": _preset("token_mask", is_clip_low=0.5, is_clip_high=5.0),
    # verl's decoupled presets.
    "seq_is": _preset("sequence_truncate", is_clip_high=2.0),
    "seq_is_rs": _preset(
        "sequence_truncate", "seq_sum_k1", is_clip_high=2.0, rejection_low=0.5, rejection_high=2.0
    ),
    "geo_rs": _preset(**_GEO),
    "geo_rs_token_tis": _preset("token_truncate", is_clip_high=2.0, **_GEO),
    "geo_rs_seq_tis": _preset("sequence_truncate", is_clip_high=2.0, **_GEO),
    "k3_rs": _preset(**_K3),
    "k3_rs_token_tis": _preset("token_truncate", is_clip_high=2.0, **_K3),
    "k3_rs_seq_tis": _preset("sequence_truncate", is_clip_high=2.0, **_K3),
    # verl's bypass mode, whose surrogate compares with the sampler.
    "bypass": _preset(bypass=True),
    "bypass_geo_rs": _preset(bypass=True, **_GEO),
    "bypass_k3_rs": _preset(bypass=True, **_K3),
}
"""Corrections by name, as TRL 1.16 and verl 0.9 have them."""


def find_correction(name: str, rules: Sequence[str] = ()) -> Preset:
    """A preset by its name, with other rules in the place of its own.

    Raises:
      UserError: no such name; with the nearest one.
    """
    for given, table, kind in ((name, PRESETS, "correction"), *((rule, RULES, "rule") for rule in rules)):
        if given not in table:
            raise UserError(f"{kind} '{given}' is none of {', '.join(table)}{nearest_name(given, table)}")
    found = PRESETS[name]
    if not rules:
        return found
    others = dataclasses.replace(found.correction, rules=tuple(RULES[rule] for rule in rules))
    return dataclasses.replace(found, correction=others)
