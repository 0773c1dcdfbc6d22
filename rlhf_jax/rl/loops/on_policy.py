"""The run that algorithms with a value function share: collect a rollout, learn from it, again and again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int, Metrics, Params, PRNGKeyArray
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops.rollout import (
    Experience,
    Network,
    RolloutConfig,
    VectorEnvState,
    collect,
    init_params,
    init_vector_env,
    make_act_fn,
)
from rlhf_jax.rl.loops.runs import Run
from rlhf_jax.rl.networks.networks import default_encoder, make_actor_critic, make_recurrent_actor_critic


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The actor-critic.

    Attributes:
      encoder: what turns observations into features; None for the environment's usual one.
      shared: actor and critic share their body.
      memory_width: of a GRU between the body, then shared, and the heads; 0 for none.
    """

    encoder: nn.Module | None = None
    shared: bool = False
    memory_width: int = 0


def make_network(config: NetworkConfig, env: Environment) -> Network:
    """The actor-critic of `config` for this environment."""
    encoder = config.encoder or default_encoder(env)
    if config.memory_width:
        return make_recurrent_actor_critic(env, encoder, width=config.memory_width)
    return make_actor_critic(env, encoder, shared=config.shared)


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      agent: the algorithm's own state.
      envs: its environments.
      steps: environment steps taken.
    """

    agent: Any
    envs: VectorEnvState = dataclasses.field(metadata={"saved_as": "worlds"})
    key: PRNGKeyArray
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Learning:
    """Callables of an on-policy algorithm, from which a run is made.

    Attributes:
      init_fn: (params, key, hyper) -> agent.
      learn_fn: (agent, hyper, experience) -> (agent, metrics).
      params_fn: agent -> parameters.
      actor_params_fn: agent -> parameters that act in the next rollout; None for those of `params_fn`.
    """

    init_fn: Callable[[Params, PRNGKeyArray, Any], Any]
    learn_fn: Callable[[Any, Any, Experience], tuple[Any, Metrics]]
    params_fn: Callable[[Any], Params] = lambda agent: agent.learner.params
    actor_params_fn: Callable[[Any], Params] | None = None


def count_updates(total_steps: int, config: RolloutConfig) -> int:
    """Whole rollouts in `total_steps`.

    Raises:
      UserError: there is none.
    """
    updates = total_steps // (config.num_envs * config.num_steps)
    if updates < 1:
        raise UserError(
            f"total_steps={total_steps} is less than one rollout of num_envs={config.num_envs} x "
            f"num_steps={config.num_steps}: raise it"
        )
    return updates


def make_run(
    network: Network,
    env: Environment,
    env_params: Any,
    config: RolloutConfig,
    learning: Learning,
    *,
    total_steps: int,
    num_workers: int | None = None,
) -> Run:
    """A run of `learning`; `hyper` must have `gamma`.

    Args:
      num_workers: rollouts are collected in turn by so many workers, each in environments of its own, which
        the state holds stacked; None for one worker.
    """
    actor_params_fn = learning.actor_params_fn or learning.params_fn
    per_update = config.num_envs * config.num_steps

    def init(key: PRNGKeyArray, hyper: Any) -> State:
        key, params_key, agent_key, env_key = jax.random.split(key, 4)
        params = init_params(network, env, params_key)

        def start(key: PRNGKeyArray) -> VectorEnvState:
            return init_vector_env(network, env, env_params, config, key)

        keys = env_key if num_workers is None else jax.random.split(env_key, num_workers)
        envs = (start if num_workers is None else jax.vmap(start))(keys)
        return State(learning.init_fn(params, agent_key, hyper), envs, key, jnp.int32(0))

    def step(state: State, hyper: Any) -> tuple[State, Metrics]:
        key, rollout_key = jax.random.split(state.key)
        turn = None if num_workers is None else (state.steps // per_update) % num_workers
        envs = state.envs if turn is None else jax.tree.map(lambda x: x[turn], state.envs)
        envs, experience, episodes = collect(
            network,
            env,
            env_params,
            config,
            actor_params_fn(state.agent),
            envs,
            rollout_key,
            gamma=hyper.gamma,
        )
        if turn is not None:
            envs = jax.tree.map(lambda all_, own: all_.at[turn].set(own), state.envs, envs)
        agent, metrics = learning.learn_fn(state.agent, hyper, experience)
        steps = state.steps + per_update
        return State(agent, envs, key, steps), {"steps": steps, **episodes, **metrics}

    return Run(
        init=init,
        step=step,
        act=make_act_fn(network, lambda state: learning.params_fn(state.agent)),
        updates=count_updates(total_steps, config),
        steps_per_update=per_update,
        initial_carry=network.initial_carry,
    )
