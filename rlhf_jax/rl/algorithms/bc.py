"""Behaviour cloning (Pomerleau 1989): the policy that makes the actions of a log likeliest.

The loss is the cross-entropy that trains language models on demonstrations, -log pi(a | s) in nats, of the
heads that the actor-critics have: categorical, or a Gaussian. Rewards are not looked at.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.offline import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import Distribution
from rlhf_jax.rl.networks.q_networks import applied

PolicyFn = Callable[[Params, Array], Distribution]
"""(params, obs) -> distribution of actions."""

State = TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: Adam behind gradient clipping.
      encoder: of the policy; None for the environment's usual one.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(b2=0.999)
    encoder: nn.Module | None = None


@pytree_dataclass
class Hyper:
    """Hyperparameters of behavior cloning that a sweep may vary (array leaves)."""

    learning_rate: Scalar = 1e-3


def init(params: Params, tx: optax.GradientTransformation) -> State:
    """The state at step 0."""
    return init_train_state(params, tx)


def make_update(
    policy_fn: PolicyFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
            distribution = policy_fn(params, batch.obs)
            logp = distribution.logp(batch.action)[None]
            loss, metrics = cross_entropy_loss(logp, jnp.ones(logp.shape, bool))
            return loss, {**metrics, "entropy": jnp.mean(distribution.entropy())}

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state, guard = apply_gradients(state, gradients, tx, learning_rate=hyper.learning_rate, loss=loss)
        return state, {**metrics, **guard}

    return update


def make_run(config: Config, env: Environment, data: Transition) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), offline.make_policy(env, config.encoder)
    policy_fn: PolicyFn = applied(network)

    def init_fn(key: PRNGKeyArray) -> State:
        return init(network.init(key, offline.no_observation(env))["params"], tx)

    def act(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        distribution = policy_fn(state.params, obs)
        return distribution.mode() if deterministic else distribution.sample(key)

    # No value is learnt, so nothing is discounted.
    algorithm = Algorithm(init_fn, make_update(policy_fn, tx), act, gamma_fn=lambda hyper: 1.0)
    return offline.make_run(config.run, data, algorithm)


def make_train(config: Config, env: Environment, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, data))
