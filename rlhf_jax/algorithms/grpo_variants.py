"""Variants of GRPO, and its relatives: all that differs between them, in one function each.

Policy gradients are in `policy_gradient_variants`, regressions in `regression_variants`; they stand here too.

A variant function takes the static choices of `grpo.Config` that are not its own (`group_size=`, ...), and
what it needs of its own, and returns a `GRPOVariant`. A new one is in `grpo_variants()`, and so in the
choices of every command, once it is written here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_jax.algorithms import group_advantages, policy_gradient_variants
from rlhf_jax.algorithms.grpo import Config, Hyper
from rlhf_jax.algorithms.grpo_variant import GRPOVariant, with_correction as with_correction
from rlhf_jax.algorithms.policy_gradient_variants import (
    gpg as gpg,
    opo as opo,
    otb as otb,
    reinforce as reinforce,
    reinforce_plus_plus as reinforce_plus_plus,
    reinforce_plus_plus_baseline as reinforce_plus_plus_baseline,
    reinforce_without_baseline as reinforce_without_baseline,
    remax as remax,
    rloo as rloo,
)
from rlhf_jax.algorithms.regression_variants import a_star_po as a_star_po, dro as dro
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path, load_function, nearest_name
from rlhf_jax.losses.corrections import Correction
from rlhf_jax.losses.policy import SurrogateFn
from rlhf_jax.losses.policy_ratios import (
    sequence_log_ratio,
    sequence_token_log_ratio,
)
from rlhf_jax.losses.policy_surrogates import (
    cispo_surrogate,
    dppo_kl_surrogate,
    dppo_tv_surrogate,
    geometric_mean_surrogate,
    importance_surrogate,
    sapo_surrogate,
    vespo_surrogate,
)
from rlhf_jax.losses.reductions import constant_length, sequence_sum, token_mean

VariantFn = Callable[..., GRPOVariant]
MetricFn = Callable[[group_advantages.GroupStats], Any]


def grpo_variants() -> dict[str, VariantFn]:
    """Variant functions by name: `grpo`, `dapo`, `reinforce++`, ...

    They are the public functions of this module, and of those that it takes them from, that return a
    `GRPOVariant` and are called by keywords alone.
    """
    return {
        name.replace("_plus_plus_", "++-").replace("_plus_plus", "++"): function
        for name, function in (vars(policy_gradient_variants) | globals()).items()
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
    """GSPO-token (Zheng et al. 2025): GSPO with a gradient for each token's own advantage.

    Gradient: GSPO's where the advantages of an answer's tokens are equal, on policy and off.
    """
    hyper = Hyper(epsilon_low=3e-4, epsilon_high=4e-4, kl_coef=0.0)
    return GRPOVariant(Config(ratio_fn=sequence_token_log_ratio, **static), hyper)


def luspo(**static: Any) -> GRPOVariant:
    """LUSPO (arXiv 2602.05261): GSPO with answers weighted by their length.

    The bounds are the paper's (section 5.1), as TRL quotes them; wider than GSPO's.

    Gradient: biased: prompts over the spread of their rewards.
    """
    hyper = Hyper(epsilon_low=2e-3, epsilon_high=2.5e-3, kl_coef=0.0)
    return GRPOVariant(Config(ratio_fn=sequence_log_ratio, reduce=sequence_sum, **static), hyper)


def gmpo(**static: Any) -> GRPOVariant:
    """GMPO (Zhao et al. 2025): the geometric mean of an answer's ratios, bounds in log space; no KL.

    Gradient: on policy GRPO's without the KL.
    """
    hyper = Hyper(epsilon_low=0.4, epsilon_high=0.4, kl_coef=0.0)
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
      k: size of the sets, less than group_size: all answers are one set, which has no other beside it.
    """
    made = GRPOVariant(Config(advantage_fn=functools.partial(group_advantages.passing, k), **static))
    if not 1 <= k < made.config.group_size:
        raise UserError(
            f"k={k} of group_size {made.config.group_size}: sets of k answers are compared with each other: "
            "give k from 1 to group_size - 1, or larger groups"
        )
    return made


def lite_ppo(**static: Any) -> GRPOVariant:
    """Lite PPO (Liu et al. 2025, arXiv 2508.08221): less the group's mean, over the batch's deviation; no KL.

    Gradient: biased: answers over the batch's tokens, all over the spread of its rewards.
    """
    config = Config(advantage_fn=group_advantages.SCALES["batch"], reduce=token_mean, **static)
    return GRPOVariant(config, Hyper(kl_coef=0.0))


def gdpo(**static: Any) -> GRPOVariant:
    """GDPO (arXiv 2601.05242): each reward normalized within its group before they are summed.

    The KL in the reward has no say in it.

    Gradient: biased: answers over their length, rewards over their own spread and the batch's.
    """
    return GRPOVariant(Config(advantage_fn=group_advantages.normalized_apart, **static), needs_terms=True)


def gfpo(*, num_kept: int = 0, metric_fn: MetricFn = group_advantages.shortest, **static: Any) -> GRPOVariant:
    """GFPO (Shrivastava et al. 2025, arXiv 2508.09726): of each group, the answers that a metric prefers.

    As in DAPO the loss is a mean over the tokens of all answers, those of advantage 0 among them. Its runs
    have an entropy bonus of 0.001, too.

    Gradient: biased: as BNPO's, of the shortest answers of each group alone.

    Args:
      num_kept: answers of each group that count, with mean and deviation among them, so two or more; 0 for
        half of them.
      metric_fn: `group_advantages.shortest` or `most_efficient`, or any function of `GroupStats`.
    """
    keep, size = num_kept or _half(static), static.get("group_size", Config.group_size)
    if size > 1 and not 2 <= keep <= size:
        raise UserError(
            f"num_kept {keep}: the answers that count are compared with each other: give from 2 to "
            f"group_size, {size}"
        )
    advantage_fn = functools.partial(group_advantages.of_the_best, keep=keep, metric_fn=metric_fn)
    return GRPOVariant(Config(advantage_fn=advantage_fn, reduce=token_mean, **static), Hyper(kl_coef=1e-3))


def cppo(*, num_kept: int = 0, **static: Any) -> GRPOVariant:
    """CPPO (Lin et al. 2025, arXiv 2503.22342): answers of small advantage are pruned before the update.

    Gradient: biased: as GRPO's, of the answers that differ most.

    Args:
      num_kept: answers of each group that are learned from; 0 for half of them.
    """
    return GRPOVariant(Config(num_kept=num_kept or _half(static), **static))


def _half(static: dict[str, Any]) -> int:
    """Of the answers of a group, but two at least."""
    size = static.get("group_size", Config.group_size)
    return min(size, max(2, size // 2))


def dppo_tv(*, max_completion_length: int, **static: Any) -> GRPOVariant:
    """DPPO (arXiv 2602.04879) with binary total variation: a bound of probabilities in the place of a clip.

    The divergence is from the sampler; advantages and reduction are Dr. GRPO's, as in the authors' runs.

    Gradient: on policy Dr. GRPO's.

    Args:
      max_completion_length: the constant that replaces lengths, in tokens.
    """
    return _dppo(dppo_tv_surrogate, 0.15, max_completion_length, static)


def dppo_kl(*, max_completion_length: int, **static: Any) -> GRPOVariant:
    """DPPO (arXiv 2602.04879) with binary KL.

    Gradient: on policy Dr. GRPO's.

    Args:
      max_completion_length: the constant that replaces lengths, in tokens.
    """
    return _dppo(dppo_kl_surrogate, 0.05, max_completion_length, static)


def _dppo(surrogate_fn: SurrogateFn, bound: float, length: int, static: dict[str, Any]) -> GRPOVariant:
    config = Config(
        advantage_fn=group_advantages.SCALES["none"],
        surrogate_fn=surrogate_fn,
        correction=Correction(bypass=True),
        reduce=constant_length(length),
        **static,
    )
    return GRPOVariant(config, Hyper(epsilon_low=bound, epsilon_high=bound, kl_coef=0.0))


def m2po(**static: Any) -> GRPOVariant:
    """M2PO (Zheng et al. 2025, arXiv 2510.01161): no clip; the second moment of the drift is bounded instead.

    Gradient: on policy BNPO's without the KL.
    """
    config = Config(
        surrogate_fn=importance_surrogate, correction=Correction(bypass=True), reduce=token_mean, **static
    )
    return GRPOVariant(config, Hyper(kl_coef=0.0, second_moment_threshold=0.04))


def clip_cov(**static: Any) -> GRPOVariant:
    """Clip-Cov (Cui et al. 2025, arXiv 2505.22617): a few tokens of high covariance have no gradient.

    Gradient: biased: as BNPO's without the KL, less a random few of the tokens that lower the entropy most.
    """
    config = Config(surrogate_fn=importance_surrogate, reduce=token_mean, **static)
    return GRPOVariant(config, Hyper(kl_coef=0.0, clip_cov_fraction=2e-4))


def kl_cov(**static: Any) -> GRPOVariant:
    """KL-Cov (Cui et al. 2025, arXiv 2505.22617): a KL on tokens of high covariance instead of a clip.

    Gradient: on policy BNPO's without the KL.
    """
    config = Config(surrogate_fn=importance_surrogate, reduce=token_mean, **static)
    return GRPOVariant(config, Hyper(kl_coef=0.0, kl_cov_fraction=2e-3))
