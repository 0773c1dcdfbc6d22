"""A variant of GRPO as data: all in which it differs from the others, and what corrects it off policy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf_jax.algorithms.group_advantages import OF_TOKENS
from rlhf_jax.algorithms.grpo import Config, Hyper
from rlhf_jax.core.errors import UserError
from rlhf_jax.losses.corrections import Correction, Preset, check_thresholds, find_correction
from rlhf_jax.losses.policy_ratios import token_log_ratio
from rlhf_jax.losses.policy_surrogates import (
    advantage_regression_surrogate,
    dppo_kl_surrogate,
    dppo_tv_surrogate,
    dro_surrogate,
    geometric_mean_surrogate,
    vespo_surrogate,
)

_OF_TOKENS = (
    geometric_mean_surrogate,
    vespo_surrogate,
    dppo_tv_surrogate,
    dppo_kl_surrogate,
    dro_surrogate,
    advantage_regression_surrogate,
)
"""Surrogates that take ratios of tokens."""


@dataclasses.dataclass(frozen=True)
class GRPOVariant:
    """A variant of GRPO: all that differs from the others. Whoever trains with one obeys every field.

    Attributes:
      config: its static choices.
      hyper: the hyperparameters it is published with, where its paper says something of them.
      needs_greedy: it compares with the reward of the greedy answer.
      needs_terms: it takes the terms of the reward apart.
      needs_collision: it asks how much the distribution of each token is of one token (`TokenLogprobs`).
      reference_samples: answers of the reference to each prompt from which the prompt's optimal value is
        estimated (A*-PO); 0 for none.
      needs_no_group: it does not compare the answers to one prompt, so a group may be a single one.
      dynamic_sampling_max_rounds: rounds of sampling in a step at most, until the batch is full of prompts
        whose answers differ in reward; 1 for none of it.
      oversampling: in whole runs under `jit`, where rounds cannot depend on rewards, how many times the
        prompts are drawn of which those whose answers differ are kept.
      overlong_penalty_coef: weight of the soft penalty on overlong answers, which is a part of the reward.
    """

    config: Config
    hyper: Hyper = Hyper()
    needs_greedy: bool = False
    needs_terms: bool = False
    needs_collision: bool = False
    reference_samples: int = 0
    needs_no_group: bool = False
    dynamic_sampling_max_rounds: int = 1
    oversampling: int = 1
    overlong_penalty_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuses groups of one where answers are compared with each other, and parts that do not fit."""
        if self.config.group_size == 1 and not self.needs_no_group:
            raise UserError(
                "group_size 1: the algorithm compares the answers to one prompt, so give 2 or more, or take "
                "one that compares none (reinforce, reinforce++, remax, a_star_po)"
            )
        if self.config.surrogate_fn in _OF_TOKENS and self.config.ratio_fn is not token_log_ratio:
            raise UserError(
                "ratio_fn: GMPO and VESPO make an answer's ratio of those of its tokens, and DPPO, DRO and "
                "A*-PO take a token's own: leave it"
            )
        if not 0 <= self.config.num_kept <= self.config.group_size:
            raise UserError(f"num_kept {self.config.num_kept}: give 0 for all, or up to group_size answers")
        if self.config.num_kept and self.config.advantage_fn in OF_TOKENS:
            raise UserError(
                "num_kept: answers are pruned by one advantage each, and reinforce++ and otb have one for "
                "each token: leave it"
            )


def with_correction(
    variant: GRPOVariant, correction: str | Correction, *, rules: Sequence[str] = (), **thresholds: Any
) -> GRPOVariant:
    """A variant with a correction for a sampler that is not the policy, as of rollouts of an older policy.

    Args:
      correction: a preset by its name (`losses.corrections.PRESETS`: "tis", "icepop", ...), or one's own.
      rules: names of acceptance rules (`losses.corrections.RULES`) in the place of the correction's.
      thresholds: `is_clip_low`, `is_clip_high`, `rejection_low`, `rejection_high`; None for the preset's.

    Raises:
      UserError: an unknown name, rules without a threshold, or thresholds with nothing between them.
    """
    given = {name: value for name, value in thresholds.items() if value is not None}
    if rules and "rejection_high" not in given:
        raise UserError(f"rules {', '.join(rules)}: each has its own scale, so give rejection_high as well")
    preset = find_correction(correction, rules) if isinstance(correction, str) else Preset(correction, {})
    own = variant.config.correction
    product = dataclasses.replace(
        preset.correction, bypass=preset.correction.bypass or (own is not None and own.bypass)
    )
    hyper = dataclasses.replace(variant.hyper, **{**preset.thresholds, **given})
    names = ("is_clip_low", "is_clip_high", "rejection_low", "rejection_high")
    check_thresholds(product, **{name: getattr(hyper, name) for name in names})
    config = dataclasses.replace(variant.config, correction=product)
    return dataclasses.replace(variant, config=config, hyper=hyper)
