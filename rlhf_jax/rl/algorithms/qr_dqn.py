"""QR-DQN: quantiles of the return (Dabney et al. 2018), on DQN's machinery."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Scalar
from rlhf_jax.losses.reductions import Reduction
from rlhf_jax.losses.value import quantile_value_loss
from rlhf_jax.rl.algorithms import dqn
from rlhf_jax.rl.algorithms.dqn import LossOutcome, State, ValueFns, init
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import ActionValues, make_value_encoder

__all__ = [
    "Config",
    "Hyper",
    "State",
    "init",
    "make_run",
    "make_train",
    "make_update",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: Adam behind gradient clipping.
      encoder: of the network; None for the default of the environment.
      num_quantiles: how many.
      double: the trained network chooses the next action, the target network values it.
      dueling: quantiles of states and of advantages apart.
      prioritized: sample transitions by the error of their mean.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module | None = None
    num_quantiles: int = 32
    double: bool = False
    dueling: bool = False
    prioritized: bool = False


@pytree_dataclass
class Hyper:
    """Hyperparameters of QR-DQN that a sweep may vary (array leaves); `dqn.Hyper` says what is not said here.

    Attributes:
      huber_delta: error beyond which the loss is linear, in units of reward. Dabney et al. 2018 take 1, with
        rewards clipped to 1; with returns far above it, values may grow without bound.
    """

    learning_rate: Scalar = 2.5e-4
    gamma: Scalar = 0.99
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 250_000.0
    target_update_interval: Scalar = 50
    tau: Scalar = 1.0
    huber_delta: Scalar = 10.0
    priority_alpha: Scalar = 0.6
    priority_beta: Scalar = 0.4


def rank_actions(quantiles: Float[Array, "... N"]) -> Float[Array, "..."]:
    """Expected returns: quantiles at midpoints have equal mass."""
    return jnp.mean(quantiles, axis=-1)


def quantile_loss(
    chosen: Float[Array, "N K"],
    next_quantiles: Float[Array, "N K"],
    batch: Batch,
    hyper: Any,
    reduce: Reduction,
    levels: Float[Array, "N K"] | None = None,
) -> LossOutcome:
    """Quantile Huber loss to the quantiles of r + discount Z(s', a') (Dabney et al. 2018, eq. 10).

    Args:
      levels: of `chosen`; None for midpoints.
    """
    targets = batch.reward[:, None] + batch.discount[:, None] * next_quantiles
    mask = jnp.ones_like(batch.reward, bool)[None]
    loss, metrics = quantile_value_loss(
        chosen[None],
        targets[None],
        mask,
        levels=None if levels is None else levels[None],
        delta=hyper.huber_delta,
        reduce=reduce,
    )
    return loss, (metrics, jnp.mean(chosen, axis=-1) - jnp.mean(targets, axis=-1))


def make_update(
    config: Config, values: ValueFns, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`, errors being those of each transition."""
    return dqn.make_value_update(values, tx, quantile_loss, double=config.double)


def make_network(config: Config, env: Environment) -> ActionValues:
    """Quantiles of every action.

    Raises:
      UserError: actions are continuous, or there is no quantile.
    """
    if config.num_quantiles < 1:
        raise UserError(f"QR-DQN: num_quantiles={config.num_quantiles}: use at least 1.")
    num_actions = dqn.discrete_actions(env, "QR-DQN")
    return ActionValues(
        make_value_encoder(env, config.encoder), num_actions, config.num_quantiles, config.dueling
    )


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), make_network(config, env)
    values = dqn.network_fns(network, rank_actions)
    algorithm = dqn.make_algorithm(env, network, values, tx, make_update(config, values, tx))
    return off_policy.make_run(config.run, env, env_params, algorithm, prioritized=config.prioritized)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
