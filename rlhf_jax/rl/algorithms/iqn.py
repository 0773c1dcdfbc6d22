"""IQN: implicit quantile networks (Dabney et al. 2018b), on DQN's machinery.

Beside QR-DQN the levels of the quantiles are inputs, drawn anew for each loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray
from rlhf_jax.rl.algorithms import dqn, qr_dqn
from rlhf_jax.rl.algorithms.dqn import LossOutcome, ValueFns
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch, weighted_mean
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import ImplicitQuantiles, make_value_encoder

LevelsFn = Callable[[PRNGKeyArray, tuple[int, int]], Float[Array, "N K"]]
"""(key, shape) -> levels of quantiles, in (0, 1)."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: Adam behind gradient clipping.
      encoder: of the network; None for the default of the environment.
      num_levels: drawn for the values in training; N of the paper.
      num_target_levels: drawn for their targets; N'.
      num_policy_levels: at which actions are valued, K. The paper draws these too; here they are midpoints,
        whose mean has less noise.
      num_cosines: of the embedding of a level.
      double: the trained network chooses the next action, the target network values it.
      prioritized: sample transitions by the error of their mean.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module | None = None
    num_levels: int = 16
    num_target_levels: int = 16
    num_policy_levels: int = 32
    num_cosines: int = 64
    double: bool = False
    prioritized: bool = False


Hyper = qr_dqn.Hyper


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`."""

    learner: TrainState
    target_params: Params
    key: PRNGKeyArray


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state at step 0; the target network is the network."""
    return State(init_train_state(params, tx), params, key)


def make_update(
    config: Config,
    values: ValueFns,
    tx: optax.GradientTransformation,
    *,
    levels_fn: LevelsFn = jax.random.uniform,
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Dabney et al. 2018b, eq. 3).

    Args:
      values: with `every_fn` and `chosen_fn` that take levels as a last argument, or midpoints without it.
      levels_fn: draws levels.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, own_key, target_key = jax.random.split(state.key, 3)
        rows = batch.reward.shape[0]
        levels = levels_fn(own_key, (rows, config.num_levels))
        target_levels = levels_fn(target_key, (rows, config.num_target_levels))
        choosing_params = state.learner.params if config.double else state.target_params
        ranks = values.rank_fn(values.every_fn(choosing_params, batch.next_obs))
        after = values.every_fn(state.target_params, batch.next_obs, target_levels)
        next_quantiles = dqn.best_outputs(after, ranks)

        def loss_fn(params: Params) -> LossOutcome:
            chosen = values.chosen_fn(params, batch.obs, batch.action, levels)
            reduce = weighted_mean(batch.weight)
            return qr_dqn.quantile_loss(chosen, next_quantiles, batch, hyper, reduce, levels)

        return dqn.value_step(dataclasses.replace(state, key=key), hyper, loss_fn, tx)

    return update


def make_network(config: Config, env: Environment) -> ImplicitQuantiles:
    """Quantiles of every action at any level.

    Raises:
      UserError: actions are continuous, or there is no level or no cosine.
    """
    for name in ("num_levels", "num_target_levels", "num_policy_levels", "num_cosines"):
        if getattr(config, name) < 1:
            raise UserError(f"IQN: {name}={getattr(config, name)}: use at least 1.")
    num_actions = dqn.discrete_actions(env, "IQN")
    encoder = make_value_encoder(env, config.encoder)
    return ImplicitQuantiles(encoder, num_actions, config.num_cosines, config.num_policy_levels)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), make_network(config, env)
    values = dqn.network_fns(network, qr_dqn.rank_actions)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        params_key, key = jax.random.split(key)
        return init(
            network.init(params_key, jnp.zeros((1, *env.obs_shape), env.obs_dtype))["params"], tx, key
        )

    update = make_update(config, values, tx)
    algorithm = dqn.make_algorithm(env, network, values, tx, update)
    algorithm = dataclasses.replace(algorithm, init_fn=init_fn)
    return off_policy.make_run(config.run, env, env_params, algorithm, prioritized=config.prioritized)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
