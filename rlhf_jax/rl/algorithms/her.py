"""Hindsight experience replay (Andrychowicz et al. 2017) on DQN: learning from goals that were not meant."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int, PRNGKeyArray, Scalar
from rlhf_jax.rl.algorithms import dqn
from rlhf_jax.rl.algorithms.dqn import State, init
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.envs.goals import Goals
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch, Replay, gather, gather_windows
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import ActionValues, make_value_encoder

__all__ = ["Config", "Hyper", "State", "init", "make_run", "make_train", "relabel"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for bit flipping.

    Attributes:
      run: its course; targets are of one step.
      optimizer: Adam behind gradient clipping.
      encoder: of the network.
      double: the trained network chooses the next action, the target network values it.
      dueling: values of states and advantages of actions apart.
    """

    run: RunConfig = RunConfig(total_steps=100_000, num_envs=8, train_every=8, updates=4, capacity=50_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=lambda: MLP((128, 128), nn.relu))
    double: bool = True
    dueling: bool = False


@pytree_dataclass
class Hyper:
    """Hyperparameters of HER that a sweep may vary (array leaves); `dqn.Hyper` says what is not said here.

    Attributes:
      relabel_rate: share of transitions whose goal is replaced; 0 is DQN. Four for each one that is not, the
        paper's k = 4, are 0.8.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.98
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 20_000.0
    target_update_interval: Scalar = 1
    tau: Scalar = 0.01
    huber_delta: Scalar = 100.0
    relabel_rate: Scalar = 0.8


def relabel(
    goals: Goals,
    replay: Replay,
    indices: Int[Array, " N"],
    key: PRNGKeyArray,
    *,
    gamma: Scalar,
    relabel_rate: Scalar,
    horizon: int,
) -> Batch:
    """Transitions, some with a goal that was reached later in their episode (section 3.2 and 4.5, `future`).

    The new goal is what was achieved by this step or by one behind it, each alike, up to the end of the
    episode or of what is on record. Reward and end are those that the goal would have brought.

    Args:
      goals: of the environment.
      indices: numbers of transitions.
      relabel_rate: share of transitions whose goal is replaced.
      horizon: steps of the longest episode.
    """
    batch = gather(replay, indices, gamma=gamma)
    rows, num_envs = replay.data.reward.shape
    row = indices // num_envs
    later = gather_windows(replay, indices, length=min(horizon, rows))
    ended = jnp.cumsum(later.done, axis=1) - later.done  # ends before each step
    # Rows behind the newest hold the oldest, or nothing.
    known = jnp.arange(later.done.shape[1]) < ((replay.position - 1 - row) % rows + 1)[:, None]
    share_key, place_key = jax.random.split(key)
    count = jnp.sum((ended == 0) & known, axis=1)
    place = jnp.floor(jax.random.uniform(place_key, count.shape) * count).astype(jnp.int32)
    outcome = jax.vmap(lambda obs, place: obs[place])(later.next_obs, place)
    goal = goals.achieved_goal(outcome)
    reached = goals.reached(goals.achieved_goal(batch.next_obs), goal)
    changed = Batch(
        obs=goals.replace_goal(batch.obs, goal),
        action=batch.action,
        reward=reached.astype(batch.reward.dtype) - 1,
        discount=jnp.where(reached, 0, gamma),
        next_obs=goals.replace_goal(batch.next_obs, goal),
        weight=batch.weight,
    )
    chosen = jax.random.uniform(share_key, count.shape) < relabel_rate

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, changed, batch)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: the environment has no goals, actions are continuous, or targets are of several steps.
    """
    num_actions = dqn.discrete_actions(env, "HER on DQN")
    if not isinstance(env.raw, Goals):
        raise UserError(f"HER needs an environment with goals and {env.name} has none: use BitFlipping-8.")
    if config.run.n_step != 1:
        raise UserError(f"HER: run.n_step={config.run.n_step}: rewards change with the goal, so use 1.")
    tx = make_optimizer(config.optimizer)
    network = ActionValues(make_value_encoder(env, config.encoder), num_actions, dueling=config.dueling)
    values, goals = dqn.network_fns(network), env.raw
    update = dqn.make_value_update(values, tx, dqn.td_loss, double=config.double)

    def gather_fn(replay: Replay, indices: Int[Array, " N"], key: PRNGKeyArray, hyper: Hyper) -> Batch:
        options = {"gamma": hyper.gamma, "relabel_rate": hyper.relabel_rate, "horizon": env.max_steps}
        return relabel(goals, replay, indices, key, **options)

    algorithm = dqn.make_algorithm(env, network, values, tx, update)
    algorithm = dataclasses.replace(algorithm, gather_fn=gather_fn)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
