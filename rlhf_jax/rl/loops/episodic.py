"""The run that algorithms without bootstrapping share: whole episodes, learn from them, again and again.

Episodes start afresh for every update and run to their end or to the time limit, side by side and masked
after their end. Taking only the episodes that happen to end within a rollout would favour short ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray
from rlhf_jax.rl.envs.environments import Environment, EnvState, Transition
from rlhf_jax.rl.loops.rollout import Inputs, Network, call, init_params, make_act_fn
from rlhf_jax.rl.loops.runs import Run


@pytree_dataclass
class Episodes:
    """One episode a row.

    Attributes:
      transition: [B, T]; anything after the end.
      mask: steps up to the end, that one included.
      logp: log-probability of each action under the policy that took it, in nats.
      inputs: what a network needs to score them.
    """

    transition: Transition
    mask: Bool[Array, "B T"]
    logp: Float[Array, "B T"]
    inputs: Inputs

    @property
    def returns(self) -> Float[Array, " B"]:
        """Undiscounted return of each episode."""
        return jnp.sum(self.transition.reward, axis=1, where=self.mask)


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      agent: the algorithm's own state.
      steps: environment steps that counted; those after the end of an episode do not.
    """

    agent: Any
    key: PRNGKeyArray
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Learning:
    """Callables of an episodic algorithm, from which a run is made.

    Attributes:
      init_fn: (params, key, hyper) -> agent, whose `learner.params` are the parameters.
      start_fn: key -> [B] environments at the beginning of an episode.
      learn_fn: (agent, hyper, episodes) -> (agent, metrics).
    """

    init_fn: Callable[[Params, PRNGKeyArray, Any], Any]
    start_fn: Callable[[PRNGKeyArray], EnvState]
    learn_fn: Callable[[Any, Any, Episodes], tuple[Any, Metrics]]


def collect_episodes(
    network: Network,
    env: Environment,
    env_params: Any,
    params: Params,
    states: EnvState,
    key: PRNGKeyArray,
    *,
    max_steps: int,
) -> Episodes:
    """One episode from each of `states`, cut after `max_steps`."""
    count = states.episode_length.shape[0]
    carry = network.initial_carry(count)

    def step(scan_state: tuple[EnvState, Any, Array], key: PRNGKeyArray):
        states, carry, alive = scan_state
        act_key, env_key = jax.random.split(key)
        is_first = states.episode_length == 0
        distribution, carry = call(network, params, states.obs, is_first, carry, method="act")
        action = distribution.sample(act_key)
        # What comes after the end is masked, so going on from anywhere will do: no reset is drawn.
        states, transition = jax.vmap(env.auto_reset_step, (0, 0, 0, None, 0))(
            jax.random.split(env_key, count), states, action, env_params, states
        )
        seen = (transition, alive, is_first, distribution.logp(action))
        return (states, carry, alive & ~transition.done), seen

    scan_state = (states, carry, jnp.ones(count, bool))
    by_time = jax.lax.scan(step, scan_state, jax.random.split(key, max_steps))[1]
    transition, mask, is_first, logp = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_time)
    return Episodes(transition, mask, logp, Inputs(transition.obs, transition.action, is_first, carry))


def make_run(
    network: Network,
    env: Environment,
    env_params: Any,
    learning: Learning,
    *,
    updates: int,
    episodes: int,
    max_steps: int,
) -> Run:
    """A run of `learning`.

    Args:
      episodes: in each update.
      max_steps: of an episode.
    """

    def init(key: PRNGKeyArray, hyper: Any) -> State:
        key, params_key, agent_key = jax.random.split(key, 3)
        params = init_params(network, env, params_key)
        return State(learning.init_fn(params, agent_key, hyper), key, jnp.int32(0))

    def step(state: State, hyper: Any) -> tuple[State, Metrics]:
        key, start_key, rollout_key = jax.random.split(state.key, 3)
        params, states = state.agent.learner.params, learning.start_fn(start_key)
        seen = collect_episodes(network, env, env_params, params, states, rollout_key, max_steps=max_steps)
        agent, metrics = learning.learn_fn(state.agent, hyper, seen)
        length = jnp.sum(seen.mask)
        statistics = {
            "episodes": jnp.int32(episodes),
            "episode_return_sum": jnp.sum(seen.returns),
            "episode_length_sum": length,
        }
        steps = state.steps + length
        return State(agent, key, steps), {"steps": steps, **statistics, **metrics}

    return Run(
        init=init,
        step=step,
        act=make_act_fn(network, lambda state: state.agent.learner.params),
        updates=updates,
        steps_per_update=episodes * max_steps,
        initial_carry=network.initial_carry,
    )
