"""Options of the GRPO family for answers that are not the policy's: corrections, rejection, and masks."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import tyro

from rlhf_jax.algorithms.grpo_variants import GRPOVariant, with_correction
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveOrInf, Range, Weight
from rlhf_jax.losses.corrections import PRESETS, RULES

CorrectionName = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="NAME",
        help="weights and acceptance rules against what the sampler reported, by their name in TRL or verl: "
        f"none, {', '.join(PRESETS)}. tis with --one-step-off-policy, the algorithm's own without.",
    ),
]
RuleNames = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="RULE ...",
        help=f"in the place of the correction's own rules, with --rejection-high: {', '.join(RULES)}.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicyOptions:
    """Options of corrections and masks.

    Attributes:
      importance_sampling_correction: a name of `losses.corrections.PRESETS`; None for tis with
        --one-step-off-policy, and for the algorithm's own without.
      rejection_rules: names of `losses.corrections.RULES`.
      is_clip_low: least importance weight; None for the correction's own.
      is_clip_high: largest importance weight; None for the correction's own.
      rejection_low: lower thresholds of the rules, one for all or one for each; none for its own.
      rejection_high: upper thresholds, likewise.
      off_policy_threshold: nats a token from which on answers of negative advantage are dropped as too
        unlikely (DeepSeek-V3.2, OPSM); None for never.
      second_moment_threshold: nats squared at which the drift of the batch is cut; None for 0.04 with m2po,
        and never with the others.
      top_entropy_fraction: share of the tokens, those of highest entropy, to learn from; None for all.
    """

    importance_sampling_correction: CorrectionName = None
    rejection_rules: RuleNames = ()
    is_clip_low: Weight | None = None
    is_clip_high: PositiveOrInf | None = None
    rejection_low: tuple[Weight, ...] = ()
    rejection_high: tuple[PositiveOrInf, ...] = ()
    off_policy_threshold: Weight | None = None
    second_moment_threshold: Weight | None = None
    top_entropy_fraction: Annotated[float, Range(0, 1, above=True)] | None = None

    @property
    def masks(self) -> dict[str, float | None]:
        """Options that are leaves of the variant's hyperparameters, which has its own where they are None."""
        names = ("off_policy_threshold", "second_moment_threshold", "top_entropy_fraction")
        return {name: getattr(self, name) for name in names}


def corrected(
    variant: GRPOVariant, options: OffPolicyOptions, *, one_step_off_policy: bool = False
) -> GRPOVariant:
    """The variant with the correction that the options name.

    Raises:
      UserError: the options do not fit each other.
    """
    _check(options)
    own = variant.config.correction
    default = "tis" if one_step_off_policy and own is None else ""
    name = options.importance_sampling_correction or default or ("metrics" if options.rejection_rules else "")
    thresholds = {
        "is_clip_low": options.is_clip_low,
        "is_clip_high": options.is_clip_high,
        "rejection_low": _numbers(options.rejection_low),
        "rejection_high": _numbers(options.rejection_high),
    }
    if name not in ("", "none"):
        return with_correction(variant, name, rules=options.rejection_rules, **thresholds)
    given = [f"--{option.replace('_', '-')}" for option, number in thresholds.items() if number is not None]
    if given or options.rejection_rules:
        raise UserError(
            f"{', '.join([*given, *['--rejection-rules'] * bool(options.rejection_rules)])}: there is no "
            "correction: name one with --importance-sampling-correction"
        )
    return variant


def _numbers(given: tuple[float, ...]) -> jnp.ndarray | float | None:
    """None for none, a number for one, an array for several."""
    if len(given) > 1:
        return jnp.asarray(given, jnp.float32)
    return given[0] if given else None


def _check(options: OffPolicyOptions) -> None:
    count = len(options.rejection_rules)
    for name in ("rejection_low", "rejection_high"):
        given = len(getattr(options, name))
        if given > 1 and given != count:
            raise UserError(
                f"--{name.replace('_', '-')}: {given} thresholds for {count} rules: give one for all, or one "
                "for each of --rejection-rules"
            )
    fraction = options.top_entropy_fraction
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"--top-entropy-fraction {fraction:g}: give a share above 0, up to 1")
