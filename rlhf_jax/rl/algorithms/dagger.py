"""DAgger, dataset aggregation (Ross et al. 2011): cloning an expert where the learner itself goes.

The learner acts, the expert says what it would have done there, and all that was seen so far is cloned. The
environment's rewards are not looked at.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.algorithms import bc
from rlhf_jax.rl.algorithms.bc import PolicyFn, State, init
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import off_policy, offline
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch, Replay, gather
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import applied

ExpertFn = Callable[[Array], Array]
"""obs [N, ...] -> what the expert would do in each."""

__all__ = ["Config", "ExpertFn", "Hyper", "State", "aggregated", "init", "make_run", "make_train"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course; the replay holds all of it, whatever `capacity` says.
      optimizer: Adam behind gradient clipping.
      encoder: of the policy; None for the environment's usual one.
    """

    run: RunConfig = RunConfig(total_steps=20_000, learning_starts=0, num_envs=4, train_every=25, updates=25)
    optimizer: OptimizerConfig = OptimizerConfig(b2=0.999)
    encoder: nn.Module | None = None


@pytree_dataclass
class Hyper:
    """Hyperparameters of DAgger that a sweep may vary (array leaves).

    Attributes:
      expert_decay: p, where the expert acts in the learner's place in a share p^i of the steps of the i-th
        collection, counted from 0; 0 for the first collection alone, 1 for all, which is cloning.
    """

    learning_rate: Scalar = 1e-3
    expert_decay: Scalar = 0.0


def aggregated(
    log: Replay, replay: Replay, indices: Int[Array, " N"], key: PRNGKeyArray, expert_fn: ExpertFn
) -> Batch:
    """A batch of the log and of what was seen since, as if they were one set; actions are the expert's.

    Args:
      log: what was seen before.
      replay: what was seen since.
      indices: numbers of transitions in the replay, some of which stay unused.
    """
    share_key, place_key = jax.random.split(key)
    seen = gather(replay, indices, gamma=1.0)
    count, others = log.size, replay.size * replay.data.reward.shape[1]
    of_log = jax.random.uniform(share_key, indices.shape) < count / (count + others)
    place = jax.random.randint(place_key, indices.shape, 0, count)

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(of_log.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    batch = jax.tree.map(pick, gather(log, place, gamma=1.0), seen)
    return dataclasses.replace(batch, action=expert_fn(batch.obs).astype(batch.action.dtype))


def make_run(config: Config, env: Environment, env_params: Any, data: Transition, expert_fn: ExpertFn) -> Run:
    """A run as `init` and `step` (Ross et al. 2011, Algorithm 3.1).

    Args:
      data: a log with which the set begins, best the expert's; its actions are not looked at.

    Raises:
      UserError: the log is empty.
    """
    tx, network = make_optimizer(config.optimizer), offline.make_policy(env, config.encoder)
    policy_fn: PolicyFn = applied(network)
    log, clone = offline.as_replay(data), bc.make_update(policy_fn, tx)
    per_collection = config.run.steps_per_training

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        return init(network.init(key, offline.no_observation(env))["params"], tx)

    def act_fn(state: State, hyper: Hyper, obs: Array, noise: Float[Array, " B"], steps: Array) -> Array:
        share = jnp.asarray(hyper.expert_decay, jnp.float32) ** (steps // per_collection)
        learner, expert = policy_fn(state.params, obs).mode(), expert_fn(obs)
        chosen = (noise < share).reshape(-1, *[1] * (learner.ndim - 1))
        return jnp.where(chosen, expert.astype(learner.dtype), learner)

    def update_fn(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        state, metrics = clone(state, bc.Hyper(hyper.learning_rate), batch)
        return state, metrics, jnp.zeros_like(batch.weight)  # nothing is sampled by its error

    def policy(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        distribution = policy_fn(state.params, obs)
        return distribution.mode() if deterministic else distribution.sample(key)

    def gather_fn(replay: Replay, indices: Int[Array, " N"], key: PRNGKeyArray, hyper: Hyper) -> Batch:
        del hyper
        return aggregated(log, replay, indices, key, expert_fn)

    algorithm = Algorithm(init_fn, jax.random.uniform, act_fn, act_fn, update_fn, policy, gather_fn)
    course = dataclasses.replace(config.run, capacity=config.run.total_steps)
    return off_policy.make_run(course, env, env_params, algorithm)


def make_train(
    config: Config, env: Environment, env_params: Any, data: Transition, expert_fn: ExpertFn
) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params, data, expert_fn))
