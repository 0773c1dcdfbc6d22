"""C51: categorical distributions of the return (Bellemare et al. 2017), on DQN's machinery."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Scalar
from rlhf_jax.losses.reductions import Reduction
from rlhf_jax.losses.value import categorical_value_loss, project_categorical
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
      num_atoms: of the distribution, at least 2.
      double: the trained network chooses the next action, the target network values it.
      dueling: logits of states and of advantages apart.
      prioritized: sample transitions by their loss.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module | None = None
    num_atoms: int = 51
    double: bool = False
    dueling: bool = False
    prioritized: bool = False


@pytree_dataclass
class Hyper:
    """Hyperparameters of C51 that a sweep may vary (array leaves); `dqn.Hyper` says what is not said here.

    Attributes:
      v_min: the lowest atom, in units of reward.
      v_max: the highest.
    """

    learning_rate: Scalar = 5e-4
    gamma: Scalar = 0.99
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 250_000.0
    target_update_interval: Scalar = 50
    tau: Scalar = 1.0
    v_min: Scalar = -100.0
    v_max: Scalar = 100.0
    priority_alpha: Scalar = 0.6
    priority_beta: Scalar = 0.4


def atoms_of(count: int, hyper: Any) -> Float[Array, " N"]:
    """The support of the distributions, from `hyper.v_min` to `hyper.v_max`."""
    return jnp.linspace(hyper.v_min, hyper.v_max, count)


def rank_actions(logits: Float[Array, "... N"]) -> Float[Array, "..."]:
    """Expected returns in numbers of atoms: the order of actions does not depend on the support."""
    return jax.nn.softmax(logits) @ jnp.arange(logits.shape[-1], dtype=logits.dtype)


def categorical_loss(
    chosen: Float[Array, "N K"],
    next_logits: Float[Array, "N K"],
    batch: Batch,
    hyper: Any,
    reduce: Reduction,
) -> LossOutcome:
    """Cross-entropy to the projected target (Bellemare et al. 2017, eq. 7 and Algorithm 1).

    The error of a transition is its KL from the target, as in Rainbow (Hessel et al. 2018).
    """
    atoms = atoms_of(chosen.shape[-1], hyper)
    positions = batch.reward[:, None] + batch.discount[:, None] * atoms
    targets = project_categorical(positions, jax.nn.softmax(next_logits), atoms)
    mask = jnp.ones_like(batch.reward, bool)[None]
    loss, metrics = categorical_value_loss(chosen[None], targets[None], atoms, mask, reduce=reduce)
    log_targets = jnp.log(jnp.where(targets > 0, targets, 1))
    divergence = jnp.sum(targets * (log_targets - jax.nn.log_softmax(chosen)), axis=-1)
    return loss, (metrics, divergence)


def make_update(
    config: Config, values: ValueFns, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`, errors being those of each transition."""
    return dqn.make_value_update(values, tx, categorical_loss, double=config.double)


def make_network(config: Any, env: Environment) -> ActionValues:
    """Logits of every action.

    Args:
      config: with `encoder`, `num_atoms` and `dueling`, as Rainbow's has too.

    Raises:
      UserError: actions are continuous, or there are fewer than 2 atoms.
    """
    if config.num_atoms < 2:
        raise UserError(f"C51: num_atoms={config.num_atoms} is no distribution: use at least 2.")
    num_actions = dqn.discrete_actions(env, "C51")
    return ActionValues(
        make_value_encoder(env, config.encoder), num_actions, config.num_atoms, config.dueling
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
