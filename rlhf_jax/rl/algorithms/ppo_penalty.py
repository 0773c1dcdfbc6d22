"""PPO with an adaptive KL penalty instead of the clip (Schulman et al. 2017, section 4), on control.

Configs, rollouts and batches are those of `rl.ppo`; the coefficient lives in `State.kl_coef`, starts at
`Hyper.kl_coef` and holds KL(pi_old || pi) near `Hyper.kl_target`, in nats per action.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import ppo as shared
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.types import Array, Float, Metrics, Scalar
from rlhf_jax.kernels.kl import k3
from rlhf_jax.rl.algorithms import ppo
from rlhf_jax.rl.algorithms.ppo import Batch, Config, Hyper, State, init
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "default_hyper",
    "init",
    "make_run",
    "make_train",
    "make_update",
    "next_penalty",
]


PENALTY_RANGE = (1e-4, 1e4)


def default_hyper(**changes: Any) -> Hyper:
    """The numbers usual on CartPole, as float32 scalars, with `changes`."""
    return ppo.default_hyper(**{"kl_coef": 1.0, "kl_target": 0.01, **changes})


def next_penalty(coef: Scalar, kl: Scalar, *, target: Scalar) -> Float[Array, ""]:
    """The rule of Schulman et al. 2017, section 4: double beyond 1.5 target, halve below target / 1.5.

    A KL that is not finite leaves the coefficient as it was. It stays within 1e-4 and 1e4, from where it
    finds back soon: a policy that has stopped moving would halve it to nothing.
    """
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return jnp.clip(jnp.asarray(coef) * jnp.where(jnp.isfinite(kl), factor, 1.0), *PENALTY_RANGE)


def make_update(
    config: shared.Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one batch, then the coefficient."""
    penalized = dataclasses.replace(config, policy_loss_fn=shared.penalized)
    learn = shared.make_update(penalized, logprob_fn, tx)

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        learnt, metrics = learn(state, dataclasses.replace(hyper, penalty_coef=state.kl_coef), batch)
        # The whole batch under the new policy: what the mini-batches saw was still moving.
        after = logprob_fn(learnt.learner.all_params, batch.inputs).logp
        kl = masked_mean(k3(batch.old_logp, after), batch.mask)
        kl_coef = next_penalty(state.kl_coef, kl, target=hyper.kl_target)
        return dataclasses.replace(learnt, kl_coef=kl_coef), {**metrics, "kl": kl, "kl_coef": state.kl_coef}

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    return ppo.make_run(config, env, env_params, make_update=make_update)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
