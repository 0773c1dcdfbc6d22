"""Conservative Q-learning on a log of discrete actions: CQL(H) (Kumar et al. 2020).

DQN's update with a loss that also keeps the values of actions that the log lacks low; without that, values
of actions nobody tried are guesses, and the maximum over actions picks the luckiest guess.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.losses.reductions import Reduction
from rlhf_jax.losses.value import conservative_penalty
from rlhf_jax.rl.algorithms import dqn
from rlhf_jax.rl.algorithms.dqn import LossOutcome, State, ValueFns, init
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.offline import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import ActionValues, make_value_encoder

__all__ = ["Config", "Hyper", "State", "init", "make_run", "make_train", "make_update"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: Adam behind gradient clipping.
      encoder: of the network; None for the default of the environment.
      double: the trained network chooses the next action, the target network values it.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module | None = None
    double: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of CQL that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      cql_alpha: weight of the penalty, in units of reward; 0 is DQN on the log.
      target_update_interval: updates between moves of the target network.
      tau: how far it moves then; 1 copies.
      huber_delta: error beyond which the loss is linear, in units of reward.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    cql_alpha: Scalar = 1.0
    target_update_interval: Scalar = 1
    tau: Scalar = 0.01
    huber_delta: Scalar = 100.0


def conservative_loss(
    every: Float[Array, "N A"], next_values: Float[Array, " N"], batch: Batch, hyper: Hyper, reduce: Reduction
) -> LossOutcome:
    """Huber(Q(s, a) - target) + conservatism penalty(s, a) (Kumar et al. 2020, eq. 4)."""
    taken = jnp.arange(every.shape[-1]) == batch.action[:, None]
    chosen = jnp.sum(jnp.where(taken, every, 0), axis=-1)
    loss, (metrics, errors) = dqn.td_loss(chosen, next_values, batch, hyper, reduce)
    mask = jnp.ones((1, every.shape[0]), bool)
    penalty, more = conservative_penalty(every[None], batch.action[None], mask, reduce=reduce)
    return loss + hyper.cql_alpha * penalty, ({**metrics, **more}, errors)


def make_update(
    config: Config, values: ValueFns, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""
    # The loss needs the values of all actions where DQN's needs that of the one taken.
    every_fn = values.every_fn
    values = dataclasses.replace(values, chosen_fn=lambda params, obs, action: every_fn(params, obs))
    step = dqn.make_value_update(values, tx, conservative_loss, double=config.double)
    return lambda state, hyper, batch: step(state, hyper, batch)[:2]


def make_run(config: Config, env: Environment, data: Transition) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actions are continuous.
    """
    tx = make_optimizer(config.optimizer)
    if env.num_actions is None:
        raise UserError(f"CQL needs discrete actions and {env.name} has continuous ones: use IQL.")
    network = ActionValues(make_value_encoder(env, config.encoder), env.num_actions)
    values = dqn.network_fns(network)

    def init_fn(key: PRNGKeyArray) -> State:
        return init(network.init(key, offline.no_observation(env))["params"], tx)

    def act(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        del key, deterministic  # the policy learnt is the greedy one
        return jnp.argmax(values.every_fn(state.learner.params, obs), axis=-1)

    return offline.make_run(config.run, data, Algorithm(init_fn, make_update(config, values, tx), act))


def make_train(config: Config, env: Environment, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, data))
