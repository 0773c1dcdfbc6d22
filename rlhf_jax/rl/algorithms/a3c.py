"""Asynchronous advantage actor-critic (A3C; Mnih et al. 2016, Algorithm S3), its workers in turn.

Each worker acts in environments of its own, takes the gradient at its copy of the parameters, changes the
shared parameters by it, and copies them: with W workers every gradient is W - 1 changes old when it arrives.
Turns stand in for threads, so that a run is one program and repeats to the bit. With one worker it is A2C.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    init_train_state,
    make_optimizer,
    with_total_steps,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int, Metrics, Params, PRNGKeyArray
from rlhf_jax.rl.algorithms import a2c
from rlhf_jax.rl.algorithms.a2c import Batch, Hyper, default_hyper
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig, as_rows, compute_gae, make_logprob_fn
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn

__all__ = ["Config", "Hyper", "State", "default_hyper", "init", "make_run", "make_train"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those of A2C for CartPole.

    Attributes:
      num_workers: W.
      total_steps: environment steps of a run, of all workers together.
      rollout: of one worker at its turn.
      network: the actor-critic.
      optimizer: of the shared parameters, with statistics that all workers share.
    """

    num_workers: int = 16
    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=8, num_steps=8)
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = a2c.Config().optimizer


@pytree_dataclass
class State:
    """Training state of A3C.

    Attributes:
      learner: the shared parameters.
      copies: of the parameters, each worker's, stacked.
      turn: the worker whose turn it is.
    """

    learner: TrainState
    copies: Params
    turn: Int[Array, ""]


def init(params: Params, tx: optax.GradientTransformation, num_workers: int) -> State:
    """The state at step 0, where all copies are alike."""
    copies = jax.tree.map(lambda x: jnp.repeat(x[None], num_workers, axis=0), params)
    return State(init_train_state(params, tx), copies, jnp.int32(0))


def own_copy(state: State) -> Params:
    """Parameters of the worker whose turn it is."""
    return jax.tree.map(lambda x: x[state.turn], state.copies)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`; a step is the turn of one worker.

    Raises:
      UserError: observations are to be normalised, of which each worker would have its own statistics.
    """
    if config.rollout.normalize_obs or config.rollout.normalize_rewards:
        raise UserError("A3C: workers share no statistics: leave out normalize_obs and normalize_rewards")
    network = on_policy.make_network(config.network, env)
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    tx = make_optimizer(with_total_steps(config.optimizer, updates))
    step = a2c.make_gradient_step(make_logprob_fn(network), tx)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        params = own_copy(state)
        values, advantages, returns = compute_gae(
            network,
            params,
            experience,
            gamma=hyper.gamma,
            gae_lambda=hyper.gae_lambda,
            bootstrap_truncation=config.rollout.bootstrap_truncation,
        )
        mask = jnp.ones(values.shape, bool)
        batch = Batch(experience.inputs, mask, experience.logp, values, advantages, returns)
        learner, metrics = step(state.learner, params, hyper, as_rows(network, batch))
        copies = jax.tree.map(lambda all_, one: all_.at[state.turn].set(one), state.copies, learner.params)
        return State(learner, copies, (state.turn + 1) % config.num_workers), metrics

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        del key, hyper
        return init(params, tx, config.num_workers)

    learning = on_policy.Learning(init_agent, learn, actor_params_fn=own_copy)
    return on_policy.make_run(
        network,
        env,
        env_params,
        config.rollout,
        learning,
        total_steps=config.total_steps,
        num_workers=config.num_workers,
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
