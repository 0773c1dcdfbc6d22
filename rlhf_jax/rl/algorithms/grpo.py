"""GRPO (Shao et al. 2024) on control: groups of episodes from one initial state, no value function.

The update is that of `algorithms.grpo`: an initial state is a prompt, an episode an answer, an action a
token, and the undiscounted return the reward. What differs within a group is what the policy sampled, and
the environment's own chance.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms.grpo import Batch, Hyper, State, init, make_update
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Metrics, Params, PRNGKeyArray, TokenLogprobs
from rlhf_jax.losses.reductions import token_mean
from rlhf_jax.rl.envs.environments import Environment, EnvState
from rlhf_jax.rl.loops import episodic, on_policy
from rlhf_jax.rl.loops.episodic import Episodes
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import Inputs, make_logprob_fn
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
      updates: rounds of episodes and learning.
      groups: initial states in each update.
      max_steps: at which an episode is cut; None for the environment's own limit.
      update: group size, epochs, mini-batches, and which member of the family. Rows are whole episodes.
      network: the policy; its value head is not trained.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
    """

    updates: int = 120
    groups: int = 2
    max_steps: int | None = None
    update: grpo.Config = grpo.Config(group_size=8, num_iterations=4, reduce=token_mean)
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule="linear", warmup_steps=0, clip_norm=0.5, b2=0.999, epsilon=1e-5
    )


@pytree_dataclass
class Actions:
    """Actions in the place of token sequences: network inputs and a mask."""

    inputs: Inputs
    mask: Bool[Array, "B T"]


def default_hyper(**changes: Any) -> Hyper:
    """The numbers usual on CartPole, as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**{"learning_rate": 2e-3, "kl_coef": 0.0, **changes}))


def make_initial_states(
    env: Environment, env_params: Any, key: PRNGKeyArray, *, groups: int, size: int
) -> EnvState:
    """`groups` initial states, each `size` times in a row."""
    states = jax.vmap(env.reset, (0, None))(jax.random.split(key, groups), env_params)
    return jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), states)


def make_batch(config: grpo.Config, seen: Episodes) -> tuple[Batch, Metrics]:
    """Advantages within each group of neighbouring episodes."""
    advantages, metrics = grpo.compute_advantages(config, seen.returns, seen.mask)
    sequences: Any = Actions(seen.inputs, seen.mask)
    return Batch(sequences, seen.logp, None, advantages), metrics


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    if config.update.num_kept or config.update.correction is not None:
        raise UserError("update: episodes are neither pruned nor corrected: leave out num_kept, correction")
    network = on_policy.make_network(config.network, env)
    score_inputs = make_logprob_fn(network)
    steps = config.updates * config.update.num_iterations * config.update.num_minibatches
    tx = make_optimizer(with_total_steps(config.optimizer, steps))

    def logprob_fn(params: Params, actions: Actions) -> TokenLogprobs:
        return score_inputs(params, actions.inputs)

    update = make_update(config.update, logprob_fn, tx)

    def start(key: PRNGKeyArray) -> EnvState:
        return make_initial_states(env, env_params, key, groups=config.groups, size=config.update.group_size)

    def learn(state: State, hyper: Hyper, seen: Episodes) -> tuple[State, Metrics]:
        batch, described = make_batch(config.update, seen)
        state, metrics = update(state, hyper, batch)
        return state, {**described, **metrics}

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        return init(params, tx, key)

    return episodic.make_run(
        network,
        env,
        env_params,
        episodic.Learning(init_agent, start, learn),
        updates=config.updates,
        episodes=config.groups * config.update.group_size,
        max_steps=config.max_steps or env.max_steps,
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
