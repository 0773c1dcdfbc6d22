"""Floor 1: returns, advantages, KL, whitening and log-probabilities as pure functions of arrays."""

from rlhf_jax.kernels.advantages import (
    batch_std,
    group_relative_advantages,
    group_std,
    leave_one_out_advantages,
    optimal_baseline_advantages,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    reward_spread,
    unit_scale,
)
from rlhf_jax.kernels.controllers import adaptive_kl_update, fixed_kl_update
from rlhf_jax.kernels.kl import entropy, forward_kl, jensen_shannon, k1, k2, k3, reverse_kl
from rlhf_jax.kernels.logprobs import dense_token_logprobs, token_logprobs
from rlhf_jax.kernels.off_policy import VTrace, retrace, vtrace
from rlhf_jax.kernels.recurrence import (
    associative_following,
    following_unmasked,
    next_unmasked,
    sequential_following,
    time_major,
)
from rlhf_jax.kernels.returns import (
    discounted_returns,
    generalized_advantage_estimation,
    lambda_returns,
    n_step_returns,
    token_rewards,
    upgo_returns,
)
from rlhf_jax.kernels.whitening import (
    Moments,
    batch_moments,
    init_moments,
    merge_moments,
    moments_variance,
    normalize,
    whiten,
)

__all__ = [
    "Moments",
    "VTrace",
    "adaptive_kl_update",
    "associative_following",
    "batch_moments",
    "batch_std",
    "dense_token_logprobs",
    "discounted_returns",
    "entropy",
    "fixed_kl_update",
    "following_unmasked",
    "forward_kl",
    "generalized_advantage_estimation",
    "group_relative_advantages",
    "group_std",
    "init_moments",
    "jensen_shannon",
    "k1",
    "k2",
    "k3",
    "lambda_returns",
    "leave_one_out_advantages",
    "merge_moments",
    "moments_variance",
    "n_step_returns",
    "next_unmasked",
    "normalize",
    "optimal_baseline_advantages",
    "pass_at_k_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "retrace",
    "reverse_kl",
    "reward_spread",
    "sequential_following",
    "time_major",
    "token_logprobs",
    "token_rewards",
    "unit_scale",
    "upgo_returns",
    "vtrace",
    "whiten",
]
