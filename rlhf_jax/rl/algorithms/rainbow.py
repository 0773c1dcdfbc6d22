"""Rainbow (Hessel et al. 2018): C51 with n-step, double, dueling, prioritized replay and noisy networks.

`c51` with the same switches is Rainbow without noisy networks, and explores by random actions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.rl.algorithms import c51, dqn
from rlhf_jax.rl.algorithms.dqn import LossOutcome, ValueFns
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch, weighted_mean
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.noisy import NoisyParams, init_noisy, sample_params


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course; the number of steps before the bootstrap is `run.n_step`.
      optimizer: Adam behind gradient clipping.
      encoder: of the network; None for the default of the environment.
      num_atoms: of the distribution, at least 2.
      double: the trained network chooses the next action, the target network values it.
      dueling: logits of states and of advantages apart.
      prioritized: sample transitions by the KL from their target.
    """

    run: RunConfig = RunConfig(n_step=3)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module | None = None
    num_atoms: int = 51
    double: bool = True
    dueling: bool = True
    prioritized: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of Rainbow that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      target_update_interval: updates between moves of the target network.
      tau: how far it moves then; 1 copies.
      v_min: the lowest atom, in units of reward.
      v_max: the highest.
      sigma: of the noise at first, times the root of a layer's inputs; 0 for none, then or later.
      priority_alpha: how much errors matter in sampling; 0 is uniform.
      priority_beta: how much of that bias is corrected; 1 is all. The paper raises it from 0.4 to 1.
    """

    learning_rate: Scalar = 5e-4
    gamma: Scalar = 0.99
    target_update_interval: Scalar = 50
    tau: Scalar = 1.0
    v_min: Scalar = -100.0
    v_max: Scalar = 100.0
    sigma: Scalar = 0.5
    priority_alpha: Scalar = 0.5
    priority_beta: Scalar = 0.4


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`.

    Attributes:
      learner: its params are `NoisyParams`.
      target_params: `NoisyParams` too.
    """

    learner: TrainState
    target_params: NoisyParams
    key: PRNGKeyArray


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, hyper: Hyper) -> State:
    """The state at step 0; the target network is the network."""
    noisy = init_noisy(params, sigma=hyper.sigma)
    return State(init_train_state(noisy, tx), noisy, key)


def make_update(
    config: Config, values: ValueFns, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`, errors being those of each transition.

    C51's loss with n-step targets; the values of this step, those that choose the next action and those of
    the target network have noise of their own.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, own_key, choice_key, target_key = jax.random.split(state.key, 4)
        after = values.every_fn(sample_params(state.target_params, target_key), batch.next_obs)
        choosing = after
        if config.double:
            choosing = values.every_fn(sample_params(state.learner.params, choice_key), batch.next_obs)
        next_logits = dqn.best_outputs(after, values.rank_fn(choosing))

        def loss_fn(noisy: NoisyParams) -> LossOutcome:
            chosen = values.chosen_fn(sample_params(noisy, own_key), batch.obs, batch.action)
            return c51.categorical_loss(chosen, next_logits, batch, hyper, weighted_mean(batch.weight))

        return dqn.value_step(dataclasses.replace(state, key=key), hyper, loss_fn, tx)

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actions are continuous, or there are fewer than 2 atoms.
    """
    tx, network = make_optimizer(config.optimizer), c51.make_network(config, env)
    values = dqn.network_fns(network, c51.rank_actions)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        params_key, key = jax.random.split(key)
        params = network.init(params_key, jnp.zeros((1, *env.obs_shape), env.obs_dtype))["params"]
        return init(params, tx, key, hyper)

    def greedy(params: Params, obs: Array) -> Int[Array, " B"]:
        return jnp.argmax(values.rank_fn(values.every_fn(params, obs)), axis=-1)

    def act_fn(state: State, hyper: Hyper, obs: Array, noise: PRNGKeyArray, steps: Array) -> Array:
        del hyper, steps
        return greedy(sample_params(state.learner.params, noise[0]), obs)

    def policy_fn(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        noisy = state.learner.params
        return greedy(noisy.mean if deterministic else sample_params(noisy, key), obs)

    update = make_update(config, values, tx)
    algorithm = Algorithm(init_fn, jax.random.split, act_fn, act_fn, update, policy_fn)
    return off_policy.make_run(config.run, env, env_params, algorithm, prioritized=config.prioritized)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
