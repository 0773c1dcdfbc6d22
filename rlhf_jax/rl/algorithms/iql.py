"""Implicit Q-learning on a log (Kostrikov et al. 2022), for discrete and for continuous actions.

V(s) is an expectile of Q(s, a) over the actions of the log, Q(s, a) one step of TD towards it, and the policy
behaviour cloning weighted by exp(beta (Q - V)): no action that the log lacks is ever valued.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.supervised import advantage_weighted_loss
from rlhf_jax.losses.value import expectile_value_loss
from rlhf_jax.rl.algorithms.bc import PolicyFn
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.continuous import CriticFn, critic_step, default_encoder, policy_step, towards
from rlhf_jax.rl.loops.offline import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import linear, make_encoder
from rlhf_jax.rl.networks.q_networks import applied

ValueFn = Callable[[Params, Array], Float[Array, " N"]]
"""(params, obs) -> value of the state."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: of policy, value and critics: Adam behind gradient clipping.
      encoder: of each network.
      num_critics: how many; what counts is the least of their targets.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    num_critics: int = 2


@pytree_dataclass
class Hyper:
    """Hyperparameters of IQL that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      expectile: of Q over the log's actions that V is; 1/2 is their mean, towards 1 the best of them.
      inverse_temperature: beta, in 1 / units of reward; 0 is behaviour cloning.
      tau: how far target networks move at a time.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    expectile: Scalar = 0.8
    inverse_temperature: Scalar = 1.0
    tau: Scalar = 0.01


@pytree_dataclass
class State:
    """The agent; the whole run's state is `offline.State`."""

    policy: TrainState
    value: TrainState
    critics: TrainState
    target_critics: Params


def init(policy: Params, value: Params, critics: Params, tx: optax.GradientTransformation) -> State:
    """The state at step 0; target networks are copies."""
    return State(
        *(init_train_state(params, tx) for params in (policy, value, critics)), target_critics=critics
    )


def make_update(
    policy_fn: PolicyFn, value_fn: ValueFn, critic_fn: CriticFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)` (Kostrikov et al. 2022, Algorithm 1).

        V      : expectile loss of V(s) towards min_i Q'_i(s, a)                           (eq. 5)
        policy : -exp(beta (min_i Q'_i(s, a) - V(s))) log pi(a | s), the weight at most 100  (eq. 7)
        Q_i    : (Q_i(s, a) - r - discount V(s'))^2 / 2                                     (eq. 6)

    One optimizer step of each, in this order, each with what the one before has learnt.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        least = jnp.min(critic_fn(state.target_critics, batch.obs, batch.action), axis=0)
        mask = jnp.ones((1, least.shape[0]), bool)

        def value_loss(params: Params) -> tuple[Array, Metrics]:
            values = value_fn(params, batch.obs)
            return expectile_value_loss(values[None], least[None], mask, expectile=hyper.expectile)

        def policy_loss(params: Params) -> tuple[Array, Metrics]:
            return advantage_weighted_loss(
                policy_fn(params, batch.obs).logp(batch.action)[None],
                advantages[None],
                mask,
                inverse_temperature=hyper.inverse_temperature,
            )

        rate = hyper.learning_rate
        value, expectile_loss, _ = policy_step(state.value, value_loss, tx, learning_rate=rate)
        advantages = least - value_fn(value.params, batch.obs)
        policy, loss, seen = policy_step(state.policy, policy_loss, tx, learning_rate=rate)
        targets = batch.reward + batch.discount * value_fn(value.params, batch.next_obs)
        values_fn = towards(critic_fn, batch, targets)
        critics, metrics, *_ = critic_step(state.critics, values_fn, batch.weight, tx, learning_rate=rate)
        target = optax.incremental_update(critics.params, state.target_critics, hyper.tau)
        metrics = {
            **metrics,
            "expectile_loss": expectile_loss,
            "policy_loss": loss,
            "weight": seen["weight"],
            "advantage": jnp.mean(advantages),
        }
        return State(policy, value, critics, target), metrics

    return update


def make_run(config: Config, env: Environment, data: Transition) -> Run:
    """A run as `init` and `step`."""
    tx, policy = make_optimizer(config.optimizer), offline.make_policy(env, config.encoder)
    value = nn.Sequential([make_encoder(env, config.encoder), linear(1, 1.0)])
    init_critics, critic_fn = offline.make_critics(env, config.encoder, count=config.num_critics)
    policy_fn: PolicyFn = applied(policy)
    obs = offline.no_observation(env)

    def value_fn(params: Params, obs: Array) -> Float[Array, " N"]:
        return applied(value)(params, obs)[..., 0]

    def init_fn(key: PRNGKeyArray) -> State:
        policy_key, value_key, critic_key = jax.random.split(key, 3)
        params = policy.init(policy_key, obs)["params"], value.init(value_key, obs)["params"]
        return init(*params, init_critics(critic_key), tx)

    def act(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        distribution = policy_fn(state.policy.params, obs)
        return distribution.mode() if deterministic else distribution.sample(key)

    update = make_update(policy_fn, value_fn, critic_fn, tx)
    return offline.make_run(config.run, data, Algorithm(init_fn, update, act))


def make_train(config: Config, env: Environment, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, data))
