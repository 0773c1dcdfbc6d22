"""Options of parts of GRPO: covariance, regression, coefficients that move, and replay."""

import dataclasses
from typing import Annotated, Any

from rlhf_jax.algorithms.grpo_variant import GRPOVariant
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Positive, PositiveInt, PositiveOrInf, Range, Share, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Options of groups that are learned from again.

    Attributes:
      replay_share: groups of earlier steps whose rewards differ that each step learns from again, as a share
        of --batch-size, beside its own.
      replay_capacity: groups that are kept for it, the latest; None for four steps' worth.
    """

    replay_share: Share = 0.0
    replay_capacity: PositiveInt | None = None

    def count(self, batch_size: int) -> int:
        """Groups of a step that are replayed."""
        return round(self.replay_share * batch_size)

    def capacity(self, batch_size: int) -> int:
        """Groups that are kept."""
        return self.replay_capacity or 4 * batch_size

    def check(self, batch_size: int) -> None:
        """Raises: UserError where nothing would be replayed, or less than a step is kept."""
        share, count = self.replay_share, self.count(batch_size)
        if (share or self.replay_capacity) and not count:
            raise UserError(
                f"--replay-share {share:g}: that is no group of --batch-size {batch_size}: give more, or "
                "leave --replay-capacity out as well"
            )
        if count and self.capacity(batch_size) < batch_size:
            raise UserError(
                f"--replay-capacity {self.replay_capacity}: give --batch-size {batch_size} or more"
            )


PartOfTokens = Annotated[float, Range(0, 1, above=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantOptions:
    """Options of parts that single variants have, and that most go with any.

    Attributes:
      clip_cov_fraction: share of the tokens that is detached, of those whose covariance of log-prob and
        advantage is high; None for 2e-4 with clip_cov, and none with the others.
      clip_cov_low: least covariance of a token that may be detached; None for 1.
      clip_cov_high: largest one; None for 5.
      kl_cov_fraction: share of the tokens, those of highest covariance, that a KL holds to the old policy;
        None for 2e-3 with kl_cov, and none with the others.
      kl_cov_coef: weight of that KL; None for 1.
      advantage_beta: of the KL to the reference in a_star_po's regression; None for 1e-3.
      value_beta: of the optimal values of prompts that a_star_po compares with; None for 0.5.
      reference_samples: answers of the reference to each prompt, from which a_star_po estimates them before
        training; None for 8.
      target_entropy: nats a token that a moving entropy bonus holds the policy at; its weight begins at
        --entropy-coef. None for a fixed weight.
      entropy_coef_step: what that weight moves by in a step; None for 0.005.
      kl_target: nats an answer that the KL to the reference is held at, by moving its weight; None for a
        fixed weight.
      kl_horizon: answers over which that weight reacts; None for 10,000.
    """

    clip_cov_fraction: PartOfTokens | None = None
    clip_cov_low: Weight | None = None
    clip_cov_high: PositiveOrInf | None = None
    kl_cov_fraction: PartOfTokens | None = None
    kl_cov_coef: Weight | None = None
    advantage_beta: Positive | None = None
    value_beta: Positive | None = None
    reference_samples: PositiveInt | None = None
    target_entropy: Positive | None = None
    entropy_coef_step: Positive | None = None
    kl_target: Positive | None = None
    kl_horizon: Positive | None = None

    @property
    def leaves(self) -> dict[str, float | None]:
        """Options that are leaves of the variant's hyperparameters, which has its own where they are None."""
        own = {"advantage_beta", "reference_samples"}
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in own}

    @property
    def parameters(self) -> dict[str, tuple[str, Any]]:
        """Options that are parameters of one variant's function: flag -> (parameter, value)."""
        return {
            "--advantage-beta": ("beta", self.advantage_beta),
            "--reference-samples": ("reference_samples", self.reference_samples),
        }

    def check(self, variant: GRPOVariant) -> None:
        """Raises: UserError where a number has nothing to act on in the variant that they have made."""
        hyper = variant.hyper
        needs = {
            "clip_cov_low": ("--clip-cov-fraction", hyper.clip_cov_fraction),
            "clip_cov_high": ("--clip-cov-fraction", hyper.clip_cov_fraction),
            "kl_cov_coef": ("--kl-cov-fraction", hyper.kl_cov_fraction),
            "value_beta": ("--algorithm a_star_po", variant.reference_samples or None),
            "entropy_coef_step": ("--target-entropy", hyper.target_entropy),
            "kl_horizon": ("--kl-target", hyper.kl_target),
            "kl_target": ("--kl-coef", hyper.kl_coef or hyper.reward_kl_coef or hyper.advantage_kl_coef),
        }
        for name, (needed, value) in needs.items():
            if getattr(self, name) is not None and value is None:
                raise UserError(f"--{name.replace('_', '-')} acts on nothing here: give {needed} as well")
