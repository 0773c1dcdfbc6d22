"""Advantage actor-critic, synchronous (Mnih et al. 2016, of which this is the batched form).

One gradient step a rollout: the policy gradient with n-step or GAE advantages, value loss, entropy bonus.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms.ppo import Batch
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
    with_total_steps,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.whitening import whiten
from rlhf_jax.losses.policy import reinforce_loss
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig, as_rows, compute_gae, make_logprob_fn
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
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for CartPole.

    Attributes:
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from.
      network: the actor-critic.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
      whiten_advantages: bring advantages to mean 0 and variance 1 over the rollout.
    """

    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=8, num_steps=8)
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule="linear", warmup_steps=0, clip_norm=0.5, b2=0.999, epsilon=1e-5
    )
    whiten_advantages: bool = False


@pytree_dataclass
class Hyper:
    """Hyperparameters of A2C that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      gae_lambda: lambda of GAE; 1 bootstraps only at the rollout's end and at truncations.
      value_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus.
    """

    learning_rate: Scalar = 2e-3
    gamma: Scalar = 0.99
    gae_lambda: Scalar = 1.0
    value_coef: Scalar = 0.5
    entropy_coef: Scalar = 0.0


@pytree_dataclass
class State:
    """Training state of A2C."""

    learner: TrainState


def default_hyper(**changes: Any) -> Hyper:
    """The defaults as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**changes))


def init(params: Params, tx: optax.GradientTransformation) -> State:
    """The state at step 0."""
    return State(init_train_state(params, tx))


def make_gradient_step(
    logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(learner, params, hyper, batch) -> (learner, metrics)`: a step by the gradient at `params`.

    loss = policy loss + value_coef value loss - entropy_coef entropy, means over unmasked steps.
    `hyper` has both coefficients and the learning rate.
    """

    def step(learner: TrainState, params: Params, hyper: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
            score = logprob_fn(params, batch.inputs)
            policy_loss, policy_metrics = reinforce_loss(
                score.logp, batch.old_logp, batch.advantages, batch.mask
            )
            value_loss, value_metrics = squared_value_loss(score.value, batch.returns, batch.mask)
            entropy = jnp.sum(score.entropy, where=batch.mask) / jnp.maximum(jnp.sum(batch.mask), 1)
            loss = policy_loss + hyper.value_coef * value_loss - hyper.entropy_coef * entropy
            return loss, {"loss": loss, "entropy": entropy, **policy_metrics, **value_metrics}

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        learner, guard = apply_gradients(learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss)
        return learner, {**metrics, **guard}

    return step


def make_update(
    logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""
    step = make_gradient_step(logprob_fn, tx)

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        learner, metrics = step(state.learner, state.learner.params, hyper, batch)
        return State(learner), metrics

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    network = on_policy.make_network(config.network, env)
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    tx = make_optimizer(with_total_steps(config.optimizer, updates))
    update = make_update(make_logprob_fn(network), tx)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        values, advantages, returns = compute_gae(
            network,
            state.learner.params,
            experience,
            gamma=hyper.gamma,
            gae_lambda=hyper.gae_lambda,
            bootstrap_truncation=config.rollout.bootstrap_truncation,
        )
        mask = jnp.ones(values.shape, bool)
        advantages = whiten(advantages, mask) if config.whiten_advantages else advantages
        batch = Batch(experience.inputs, mask, experience.logp, values, advantages, returns)
        return update(state, hyper, as_rows(network, batch))

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        del key, hyper
        return init(params, tx)

    learning = on_policy.Learning(init_agent, learn)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
