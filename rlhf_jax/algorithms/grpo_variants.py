"""Variants of GRPO, and its relatives: all that differs between them, in one function each.

A variant function takes the static choices of `grpo.Config` that are not its own (`group_size=`, ...), and
what it needs of its own, and returns a `GRPOVariant`. A new one is in `grpo_variants()`, and so in the
choices of every command, once it is written here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.algorithms import group_advantages
from rlhf_jax.algorithms.group_advantages import AdvantageFn
from rlhf_jax.algorithms.grpo import Config, Hyper
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path, load_function, nearest_name
from rlhf_jax.losses.corrections import Correction, Preset, find_correction
from rlhf_jax.losses.policy_ratios import (
    sequence_log_ratio,
    sequence_token_log_ratio,
    token_log_ratio,
)
from rlhf_jax.losses.policy_surrogates import (
    cispo_surrogate,
    geometric_mean_surrogate,
    sapo_surrogate,
    vespo_surrogate,
)
from rlhf_jax.losses.reductions import constant_length, sequence_sum, token_mean


@dataclasses.dataclass(frozen=True)
class GRPOVariant:
    """A variant of GRPO: all that differs from the others. Whoever trains with one obeys every field.

    Attributes:
      config: its static choices.
      hyper: the hyperparameters it is published with, where its paper says something of them.
      needs_greedy: it compares with the reward of the greedy answer.
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
    needs_no_group: bool = False
    dynamic_sampling_max_rounds: int = 1
    oversampling: int = 1
    overlong_penalty_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuses groups of one where answers are compared with each other, and parts that do not fit."""
        if self.config.group_size == 1 and not self.needs_no_group:
            raise UserError(
                "group_size 1: the algorithm compares the answers to one prompt, so give 2 or more, or take "
                "one that compares none (reinforce, reinforce++, remax)"
            )
        if self.config.surrogate_fn in (geometric_mean_surrogate, vespo_surrogate) and (
            self.config.ratio_fn is not token_log_ratio
        ):
            raise UserError(
                "ratio_fn: GMPO and VESPO make an answer's ratio of those of its tokens: leave it"
            )


VariantFn = Callable[..., GRPOVariant]


def grpo_variants() -> dict[str, VariantFn]:
    """Variant functions by name: `grpo`, `dapo`, `reinforce++`, ...

    They are the public functions of this module that return a `GRPOVariant` and are called by keywords alone.
    """
    return {
        name.replace("_plus_plus_", "++-").replace("_plus_plus", "++"): function
        for name, function in globals().items()
        if inspect.isfunction(function) and not name.startswith("_") and _is_variant(function)
    }


def _is_variant(function: VariantFn) -> bool:
    signature = inspect.signature(function)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    keywords = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    return signature.return_annotation is GRPOVariant and bool(kinds) and kinds <= keywords


def find_variant(variant: str | VariantFn) -> VariantFn:
    """A variant's function by its name, by a path `module:function`, or itself.

    Raises:
      UserError: no such name or path; with the nearest name.
    """
    if not isinstance(variant, str):
        return variant
    table = grpo_variants()
    if variant in table:
        return table[variant]
    if is_import_path(variant):
        return load_function(variant, kind="algorithm", example="my_variants:mine")
    raise UserError(
        f"algorithm '{variant}' is neither one of {', '.join(table)} nor a path module:function"
        + nearest_name(variant, table)
    )


def make_variant(
    variant: str | VariantFn,
    *,
    changes: Mapping[str, Any] | None = None,
    max_completion_length: int | None = None,
    **static: Any,
) -> GRPOVariant:
    """A variant of GRPO with changes, by name, by a path `module:function`, or by its function.

    Args:
      changes: what replaces the published hyperparameters and the fields of variant and `Config`; None leaves
        one as it is. What the variant's function takes itself goes there: the KL of the policy gradients
        (REINFORCE, RLOO, ...) stands in the reward, so their `kl_coef` does.
      max_completion_length: tokens of the longest answer, for variants that need it (Dr. GRPO).
      static: fields of `grpo.Config`.
    """
    function = find_variant(variant)
    own = inspect.signature(function).parameters
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    if "max_completion_length" in own:
        static["max_completion_length"] = max_completion_length
    made = function(**static, **{name: given.pop(name) for name in [*given] if name in own})
    made = dataclasses.replace(made, **_taken(given, GRPOVariant))
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, **_taken(given, Config)))
    return dataclasses.replace(made, hyper=dataclasses.replace(made.hyper, **given))


def _taken(given: dict[str, Any], options: type) -> dict[str, Any]:
    """Takes from `given` what is a field of `options`."""
    names = {field.name for field in dataclasses.fields(options)} & given.keys()
    return {name: given.pop(name) for name in names}


# Policy gradients -----------------------------------------------------------------------------------------
#
# One step on policy the clip of the surrogate never acts: what is left is E[A sum_t grad log pi(y_t)], the
# sum over an answer's tokens and the mean over answers. The KL stands in the reward, before the baseline.


def _policy_gradient(
    advantage_fn: AdvantageFn, kl_coef: float, static: dict[str, Any]
) -> tuple[Config, Hyper]:
    config = Config(advantage_fn=advantage_fn, reduce=sequence_sum, **static)
    return config, Hyper(kl_coef=0.0, reward_kl_coef=kl_coef)


def reinforce(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """REINFORCE (Williams 1992), with the mean reward of the batch as baseline.

    Gradient: that of E[r], times 1 - 1/B for B answers in a batch, whose mean holds the answer's own reward.

    Args:
      kl_coef: weight of the KL in the reward.
    """
    return GRPOVariant(
        *_policy_gradient(group_advantages.batch_baseline, kl_coef, static), needs_no_group=True
    )


def reinforce_without_baseline(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """REINFORCE (Williams 1992) on bare rewards.

    Gradient: that of E[r], unbiased.

    Args:
      kl_coef: weight of the KL in the reward.
    """
    return GRPOVariant(*_policy_gradient(group_advantages.no_baseline, kl_coef, static), needs_no_group=True)


def reinforce_plus_plus(*, kl_coef: float = 0.01, **static: Any) -> GRPOVariant:
    """REINFORCE++ (Hu et al. 2025): the KL in the reward of each token; returns whitened over the batch.

    Gradient: biased: advantages over the spread of the batch, answers over its tokens.

    Args:
      kl_coef: weight of the KL in the reward.
    """
    config = Config(advantage_fn=group_advantages.whitened_returns, reduce=token_mean, **static)
    return GRPOVariant(config, Hyper(kl_coef=0.0, reward_kl_coef=kl_coef), needs_no_group=True)


def reinforce_plus_plus_baseline(**static: Any) -> GRPOVariant:
    """REINFORCE++ with the group's mean as baseline (Hu et al. 2025).

    Gradient: biased: advantages over the spread of the batch, answers over its tokens.
    """
    return GRPOVariant(
        Config(advantage_fn=group_advantages.whitened_within_groups, reduce=token_mean, **static)
    )


def rloo(*, kl_coef: float = 0.05, **static: Any) -> GRPOVariant:
    """RLOO (Ahmadian et al. 2024): the baseline is the mean of the other answers.

    Gradient: that of E[r], unbiased.

    Args:
      kl_coef: weight of the KL in the reward, which the baseline sees as well (TRL's `RLOOConfig`: 0.05).
    """
    return GRPOVariant(*_policy_gradient(group_advantages.leave_one_out, kl_coef, static))


def remax(*, kl_coef: float = 0.05, **static: Any) -> GRPOVariant:
    """ReMax (Li et al. 2024): the baseline is the reward of the most likely answer.

    Gradient: that of E[r], unbiased.

    Args:
      kl_coef: weight of the KL in the reward, as RLOO's; the baseline has none.
    """
    made = _policy_gradient(group_advantages.greedy_baseline, kl_coef, static)
    return GRPOVariant(*made, needs_greedy=True, needs_no_group=True)


def opo(*, kl_coef: float = 0.0, **static: Any) -> GRPOVariant:
    """OPO (Hao et al. 2025): the length-weighted baseline, exactly on policy.

    Gradient: biased by the answer's own reward in the baseline, which vanishes in large groups.

    Args:
      kl_coef: weight of the KL in the reward; the paper has none.
    """
    return GRPOVariant(*_policy_gradient(group_advantages.optimal_baseline, kl_coef, static))


# GRPO and its descendants ---------------------------------------------------------------------------------


def grpo(**static: Any) -> GRPOVariant:
    """GRPO (Shao et al. 2024).

    Gradient: biased: answers over their length, prompts over the spread of their rewards.
    """
    return GRPOVariant(Config(**static))


def bnpo(**static: Any) -> GRPOVariant:
    """GRPO with the mean over all tokens of the batch instead of within each answer.

    Gradient: biased: answers over the batch's tokens, prompts over the spread of their rewards.
    """
    return GRPOVariant(Config(reduce=token_mean, **static))


def dr_grpo(*, max_completion_length: int, **static: Any) -> GRPOVariant:
    """Dr. GRPO (Liu et al. 2025): neither lengths nor the spread of a group's rewards are divided by.

    Gradient: that of E[r], times (1 - 1/G) / max_completion_length.

    Args:
      max_completion_length: the constant that replaces lengths, in tokens.
    """
    config = Config(
        advantage_fn=group_advantages.SCALES["none"], reduce=constant_length(max_completion_length), **static
    )
    return GRPOVariant(config, Hyper(kl_coef=0.0))


def dapo(
    *, dynamic_sampling_max_rounds: int = 8, overlong_penalty_coef: float = 1.0, **static: Any
) -> GRPOVariant:
    """DAPO (Yu et al. 2025): clip-higher, token mean, no KL, dynamic sampling, soft overlong punishment.

    Gradient: biased as BNPO's; prompts whose answers are all alike are drawn again.

    Args:
      dynamic_sampling_max_rounds: rounds of sampling in a step at most; the paper sets no bound.
      overlong_penalty_coef: weight of the penalty (eq. 13 there).
    """
    return GRPOVariant(
        Config(reduce=token_mean, **static),
        Hyper(epsilon_high=0.28, kl_coef=0.0),
        dynamic_sampling_max_rounds=dynamic_sampling_max_rounds,
        oversampling=2,
        overlong_penalty_coef=overlong_penalty_coef,
    )


def gspo(**static: Any) -> GRPOVariant:
    """GSPO (Zheng et al. 2025): one ratio for a whole answer.

    Gradient: on policy GRPO's without the KL.
    """
    hyper = Hyper(epsilon_low=3e-4, epsilon_high=4e-4, kl_coef=0.0)
    return GRPOVariant(Config(ratio_fn=sequence_log_ratio, **static), hyper)


def gspo_token(**static: Any) -> GRPOVariant:
    """GSPO-token (Zheng et al. 2025, section 4.3): GSPO with a gradient for each token's own advantage.

    Gradient: GSPO's where the advantages of an answer's tokens are equal, on policy and off.
    """
    hyper = Hyper(epsilon_low=3e-4, epsilon_high=4e-4, kl_coef=0.0)
    return GRPOVariant(Config(ratio_fn=sequence_token_log_ratio, **static), hyper)


def luspo(**static: Any) -> GRPOVariant:
    """LUSPO (arXiv 2602.05261): GSPO with answers weighted by their length.

    Gradient: biased: prompts over the spread of their rewards.
    """
    hyper = Hyper(epsilon_low=3e-4, epsilon_high=4e-4, kl_coef=0.0)
    return GRPOVariant(Config(ratio_fn=sequence_log_ratio, reduce=sequence_sum, **static), hyper)


def gmpo(**static: Any) -> GRPOVariant:
    """GMPO (Zhao et al. 2025): the geometric mean of an answer's ratios, bounds in log space.

    Gradient: on policy GRPO's.
    """
    hyper = Hyper(epsilon_low=0.4, epsilon_high=0.4)
    return GRPOVariant(Config(surrogate_fn=geometric_mean_surrogate, **static), hyper)


def cispo(**static: Any) -> GRPOVariant:
    """CISPO (Chen et al. 2025): the weight is clipped, no token loses its gradient.

    Gradient: on policy BNPO's without the KL.
    """
    hyper = Hyper(epsilon_low=1.0, epsilon_high=0.28, kl_coef=0.0)
    return GRPOVariant(Config(surrogate_fn=cispo_surrogate, reduce=token_mean, **static), hyper)


def sapo(**static: Any) -> GRPOVariant:
    """SAPO (Gao et al. 2025): a soft gate instead of a clip.

    Gradient: on policy GRPO's without the KL.
    """
    return GRPOVariant(Config(surrogate_fn=sapo_surrogate, **static), Hyper(kl_coef=0.0))


def vespo(**static: Any) -> GRPOVariant:
    """VESPO (arXiv 2602.10693): a smooth weight of the whole answer's ratio.

    Gradient: on policy BNPO's without the KL.
    """
    return GRPOVariant(Config(surrogate_fn=vespo_surrogate, reduce=token_mean, **static), Hyper(kl_coef=0.0))


def max_rl(**static: Any) -> GRPOVariant:
    """MaxRL (arXiv 2602.02710): advantages over the group's mean reward, for rewards of 0 and 1.

    Gradient: that of -sum_{k < G} (1 - p)^k / k, which nears log p, p being the share of right answers.
    """
    config = Config(advantage_fn=group_advantages.SCALES["mean"], reduce=sequence_sum, **static)
    return GRPOVariant(config, Hyper(kl_coef=0.0))


def pass_at_k(*, k: int = 2, **static: Any) -> GRPOVariant:
    """Training for pass@k (Chen et al. 2025, arXiv 2508.10751): GRPO on the rewards of sets of k answers.

    An answer passes where its reward is above 0; the KL in the reward has no say in it.

    Gradient: biased as GRPO's, towards pass@k: prompts of which all sets pass have none.

    Args:
      k: size of the sets, at most group_size.
    """
    made = GRPOVariant(Config(advantage_fn=functools.partial(group_advantages.passing, k), **static))
    if not 1 <= k <= made.config.group_size:
        raise UserError(f"k={k}: give a number from 1 to group_size, {made.config.group_size}")
    return made


# Off policy -------------------------------------------------------------------------------------------------


def with_correction(
    variant: GRPOVariant, correction: str | Correction, *, rules: Sequence[str] = (), **thresholds: Any
) -> GRPOVariant:
    """A variant with a correction for a sampler that is not the policy, as of rollouts of an older policy.

    Args:
      correction: a preset by its name (`losses.corrections.PRESETS`: "tis", "icepop", ...), or one's own.
      rules: names of acceptance rules (`losses.corrections.RULES`) in the place of the correction's.
      thresholds: `is_clip_low`, `is_clip_high`, `rejection_low`, `rejection_high`; None for the preset's.

    Raises:
      UserError: an unknown name, or rules without a threshold.
    """
    given = {name: value for name, value in thresholds.items() if value is not None}
    if rules and "rejection_high" not in given:
        raise UserError(f"rules {', '.join(rules)}: each has its own scale, so give rejection_high as well")
    preset = find_correction(correction, rules) if isinstance(correction, str) else Preset(correction, {})
    return dataclasses.replace(
        variant,
        config=dataclasses.replace(variant.config, correction=preset.correction),
        hyper=dataclasses.replace(variant.hyper, **{**preset.thresholds, **given}),
    )
