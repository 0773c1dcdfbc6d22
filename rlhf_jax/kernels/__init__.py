"""Floor 1: returns, advantages, KL, whitening and log-probabilities as pure functions of arrays."""

from rlhf_jax.kernels.advantages import (
    batch_std,
    group_relative_advantages,
    group_std,
    leave_one_out_advantages,
    unit_scale,
)
from rlhf_jax.kernels.controllers import adaptive_kl_update
from rlhf_jax.kernels.kl import k1, k2, k3
from rlhf_jax.kernels.returns import generalized_advantage_estimation
from rlhf_jax.kernels.whitening import whiten

__all__ = [
    "adaptive_kl_update",
    "batch_std",
    "generalized_advantage_estimation",
    "group_relative_advantages",
    "group_std",
    "k1",
    "k2",
    "k3",
    "leave_one_out_advantages",
    "unit_scale",
    "whiten",
]
