"""A reference that follows the policy, as in TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656), for RL."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.train_state import TrainState
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import Array, Int, Params, Scalar


@pytree_dataclass
class SyncHyper:
    """Hyperparameters of a moving reference (array leaves).

    Attributes:
      mixup_alpha: share of the policy in a new reference; 1 takes its place (hard update), less mixes (soft).
      sync_steps: optimizer steps between two updates. With 1 and a small `mixup_alpha`, the reference is an
        exponential moving average of the policy.
    """

    mixup_alpha: Scalar = 0.6
    sync_steps: Scalar = 512


def init_reference(params: Params) -> Params:
    """The reference at step 0: a copy of what is trained of the policy."""
    return jax.tree.map(jnp.copy, params)


def sync_reference(
    reference: Params, params: Params, hyper: SyncHyper, *, before: Int[Array, ""], after: Int[Array, ""]
) -> Params:
    """Reference after an update: alpha pi + (1 - alpha) pi_ref once in `sync_steps`, else as it was.

    Parameters of 16 bits round a small share away: keep them in float32 for a moving average.

    Args:
      reference: what the reference has of its own, as `params`.
      params: what is trained of the policy, after the update.
      before: optimizer steps before the update, and `after`; a step that was skipped is none.
    """
    due = after // hyper.sync_steps > before // hyper.sync_steps
    mixed = optax.incremental_update(params, reference, hyper.mixup_alpha)
    mixed = jax.tree.map(lambda x, old: x.astype(old.dtype), mixed, reference)
    return tree_where(due, mixed, reference)


def with_params(learner: TrainState, params: Params) -> Params:
    """The whole model that `learner` would be with these parameters in the place of what it trains."""
    return dataclasses.replace(learner, params=params).all_params
