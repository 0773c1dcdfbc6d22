"""Advantage-weighted actor-critic on a log (AWAC; Nair et al. 2020), for discrete and for continuous actions.

The critics are those of the policy itself, whose actions the target samples; the policy imitates the actions
of the log, those that are better than its own more. IQL differs in that no action outside the log is valued.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.supervised import advantage_weighted_loss
from rlhf_jax.rl.algorithms.bc import PolicyFn
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.continuous import CriticFn, critic_step, default_encoder, policy_step, towards
from rlhf_jax.rl.loops.offline import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import applied


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: of policy and critics: Adam behind gradient clipping.
      encoder: of each network.
      num_critics: how many; what counts is the least of them.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    num_critics: int = 2


@pytree_dataclass
class Hyper:
    """Hyperparameters of AWAC that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      inverse_temperature: 1 / lambda, in 1 / units of reward; 0 is behaviour cloning.
      tau: how far target networks move at a time.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    inverse_temperature: Scalar = 1.0
    tau: Scalar = 0.005


@pytree_dataclass
class State:
    """The agent; the whole run's state is `offline.State`."""

    policy: TrainState
    critics: TrainState
    target_critics: Params
    key: PRNGKeyArray


def init(policy: Params, critics: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state at step 0; target networks are copies."""
    return State(init_train_state(policy, tx), init_train_state(critics, tx), critics, key)


def make_update(
    policy_fn: PolicyFn, critic_fn: CriticFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)` (Nair et al. 2020, Algorithm 1).

        target : r + discount min_i Q'_i(s', a'),  a' ~ pi
        policy : -exp((min_i Q_i(s, a) - V(s)) / lambda) log pi(a | s), the weight at most 100,
                 V(s) = min_i Q_i(s, a''),  a'' ~ pi

    One optimizer step of the critics, then one of the policy with what they have learnt.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, next_key, own_key = jax.random.split(state.key, 3)
        rate = hyper.learning_rate

        def least(params: Params, obs: Array, action: Array) -> Array:
            return jnp.min(critic_fn(params, obs, action), axis=0)

        next_action = policy_fn(state.policy.params, batch.next_obs).sample(next_key)
        targets = batch.reward + batch.discount * least(state.target_critics, batch.next_obs, next_action)
        values_fn = towards(critic_fn, batch, targets)
        critics, metrics, *_ = critic_step(state.critics, values_fn, batch.weight, tx, learning_rate=rate)
        own_action = policy_fn(state.policy.params, batch.obs).sample(own_key)
        values = least(critics.params, batch.obs, own_action)
        advantages = least(critics.params, batch.obs, batch.action) - values

        def policy_loss(params: Params) -> tuple[Array, Metrics]:
            return advantage_weighted_loss(
                policy_fn(params, batch.obs).logp(batch.action)[None],
                advantages[None],
                jnp.ones((1, len(advantages)), bool),
                inverse_temperature=hyper.inverse_temperature,
            )

        policy, loss, seen = policy_step(state.policy, policy_loss, tx, learning_rate=rate)
        target = optax.incremental_update(critics.params, state.target_critics, hyper.tau)
        metrics = {
            **metrics,
            "policy_loss": loss,
            "weight": seen["weight"],
            "advantage": jnp.mean(advantages),
        }
        return State(policy, critics, target, key), metrics

    return update


def make_run(config: Config, env: Environment, data: Transition) -> Run:
    """A run as `init` and `step`."""
    tx, policy = make_optimizer(config.optimizer), offline.make_policy(env, config.encoder)
    init_critics, critic_fn = offline.make_critics(env, config.encoder, count=config.num_critics)
    policy_fn: PolicyFn = applied(policy)

    def init_fn(key: PRNGKeyArray) -> State:
        policy_key, critic_key, key = jax.random.split(key, 3)
        params = policy.init(policy_key, offline.no_observation(env))["params"]
        return init(params, init_critics(critic_key), tx, key)

    def act(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        distribution = policy_fn(state.policy.params, obs)
        return distribution.mode() if deterministic else distribution.sample(key)

    update = make_update(policy_fn, critic_fn, tx)
    return offline.make_run(config.run, data, Algorithm(init_fn, update, act))


def make_train(config: Config, env: Environment, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, data))
