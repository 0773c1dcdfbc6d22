"""Regressions of log-ratios on rewards, in GRPO's update: DRO, A*-PO. See `algorithms.grpo_variants`.

The optimum of E[r] - tau KL(pi || ref) has r - V = tau log pi / ref at every answer: both fit that equation.
"""

from typing import Any

from rlhf_jax.algorithms import group_advantages
from rlhf_jax.algorithms.grpo import Config, Hyper
from rlhf_jax.algorithms.grpo_variant import GRPOVariant
from rlhf_jax.core.types import Scalar
from rlhf_jax.losses.corrections import Correction
from rlhf_jax.losses.policy_surrogates import advantage_regression_surrogate, dro_surrogate
from rlhf_jax.losses.reductions import sequence_sum


def dro(*, tau: Scalar = 1.0, **static: Any) -> GRPOVariant:
    """DRO (Richemond et al. 2024): the group's mean for its value function, the sampler for its reference.

    Gradient: on policy that of E[r], times 1 - 1/G.

    Args:
      tau: how strongly an answer is held to where it was.
    """
    config = Config(
        advantage_fn=group_advantages.SCALES["none"],
        surrogate_fn=dro_surrogate,
        correction=Correction(bypass=True),
        reduce=sequence_sum,
        **static,
    )
    return GRPOVariant(config, Hyper(kl_coef=0.0, surrogate_params={"tau": tau}))


def a_star_po(*, beta: Scalar = 1e-3, reference_samples: int = 8, **static: Any) -> GRPOVariant:
    """A*-PO (Brantley et al. 2025, arXiv 2505.20686): log-ratios to the reference regressed on r - V*.

    Gradient: that of E[r] - beta KL(policy, reference), times 2 beta.

    Args:
      beta: of the KL to the reference (beta_2 in the paper).
      reference_samples: answers of the reference to each prompt, from which V* is estimated.
    """
    config = Config(
        advantage_fn=group_advantages.less_values,
        surrogate_fn=advantage_regression_surrogate,
        ratio_to_reference=True,
        reduce=sequence_sum,
        **static,
    )
    return GRPOVariant(
        config,
        Hyper(kl_coef=0.0, surrogate_params={"beta": beta}),
        reference_samples=reference_samples,
        needs_no_group=True,
    )
