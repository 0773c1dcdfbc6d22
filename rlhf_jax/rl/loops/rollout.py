"""Experience of a policy in several environments at once: values, advantages, and rows for an update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Metrics,
    Params,
    PRNGKeyArray,
    Scalar,
    TokenLogprobs,
)
from rlhf_jax.kernels.returns import generalized_advantage_estimation
from rlhf_jax.kernels.whitening import Moments
from rlhf_jax.rl.envs.environments import Environment, EnvState, Transition, episode_metrics, take_statistics
from rlhf_jax.rl.envs.normalization import (
    RewardScale,
    add_observations,
    init_observation_moments,
    init_reward_scale,
    normalize_observations,
    scale_rewards,
)
from rlhf_jax.rl.loops.runs import ActFn
from rlhf_jax.rl.networks.hierarchies import DrawsCarry
from rlhf_jax.rl.networks.multi_agent import JointActorCritic
from rlhf_jax.rl.networks.networks import ActorCritic, Carry, RecurrentActorCritic
from rlhf_jax.rl.networks.sequence_values import EpsilonGreedy

Network = ActorCritic | RecurrentActorCritic | JointActorCritic | EpsilonGreedy | DrawsCarry


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Rollout settings: environments, steps, normalization, bootstrapping.

    Attributes:
      num_envs: environments stepped together.
      num_steps: steps of each in one rollout.
      normalize_obs: bring observations to mean 0 and variance 1 by what was seen so far.
      normalize_rewards: divide rewards by the deviation of their discounted sum.
      bootstrap_truncation: add the value of the last observation where an episode was cut; False is the
        common mistake of taking a cut for an end, kept to show what it costs.
    """

    num_envs: int = 4
    num_steps: int = 128
    normalize_obs: bool = False
    normalize_rewards: bool = False
    bootstrap_truncation: bool = True


@pytree_dataclass
class VectorEnvState:
    """The environments of a run, and what is known of them.

    Attributes:
      states: of the environments, [B].
      carry: what the policy remembers in each.
      obs_moments: None where observations are not normalised.
      reward_scale: None where rewards are not.
    """

    states: EnvState
    carry: Carry = dataclasses.field(metadata={"saved_as": "memory"})
    obs_moments: Moments | None
    reward_scale: RewardScale | None


@pytree_dataclass
class Inputs:
    """Network inputs for scoring actions.

    Attributes:
      obs: normalised where the run does so.
      is_first: first steps of episodes.
      carry: at the first step of each row.
    """

    obs: Array
    action: Array
    is_first: Bool[Array, "B T"]
    carry: Carry


@pytree_dataclass
class Experience:
    """One rollout, [B, T]. `transition` holds observations as the network sees them, and scaled rewards.

    Attributes:
      carry: before the first step.
      drawn: with which each action was taken, of networks that draw it (`DrawsCarry`); else nothing.
    """

    transition: Transition
    is_first: Bool[Array, "B T"]
    carry: Carry
    logp: Float[Array, "B T"]
    drawn: Carry = ()

    @property
    def inputs(self) -> Inputs:
        """Network inputs of these steps."""
        return Inputs(self.transition.obs, self.transition.action, self.is_first, self.carry)


def call(network: Network, params: Params, *inputs: Any, method: str = "__call__") -> Any:
    """A method of the network, as a function of its parameters."""
    return network.apply({"params": params}, *inputs, method=method)


def draw_carry(
    network: Network,
    params: Params,
    obs: Array,
    is_first: Bool[Array, " B"],
    carry: Carry,
    key: PRNGKeyArray | None,
) -> Carry:
    """The memory to act with, of networks that draw a part of it, such as an option; of others, the carry.

    Args:
      key: None for the likeliest.
    """
    if not isinstance(network, DrawsCarry):
        return carry
    # Not the key of the action, which keeps the chance that it has without a memory of this kind.
    key = None if key is None else jax.random.fold_in(key, 1)
    return call(network, params, obs, is_first, carry, key, method="draw")


def init_params(network: Network, env: Environment, key: PRNGKeyArray) -> Params:
    """Initial parameters of the network."""
    return network.init(key, env.blank_obs(1, 1), jnp.zeros((1, 1), bool), network.initial_carry(1))["params"]


def init_vector_env(
    network: Network, env: Environment, env_params: Any, config: RolloutConfig, key: PRNGKeyArray
) -> VectorEnvState:
    """Environments at the beginning of an episode."""
    states = jax.vmap(env.reset, (0, None))(jax.random.split(key, config.num_envs), env_params)
    return VectorEnvState(
        states,
        network.initial_carry(config.num_envs),
        init_observation_moments(env.obs_shape) if config.normalize_obs else None,
        init_reward_scale(config.num_envs) if config.normalize_rewards else None,
    )


def normalize_obs(obs: Array, moments: Moments | None) -> Array:
    """Observations as the network gets them."""
    return obs if moments is None else normalize_observations(obs, moments)


def collect(
    network: Network,
    env: Environment,
    env_params: Any,
    config: RolloutConfig,
    params: Params,
    envs: VectorEnvState,
    key: PRNGKeyArray,
    *,
    gamma: Scalar,
) -> tuple[VectorEnvState, Experience, Metrics]:
    """`config.num_steps` steps in each environment.

    Statistics of observations are those before the rollout, for acting and learning alike; they count the
    rollout afterwards.

    Returns:
      (envs, experience, metrics): sums over the episodes that finished.
    """
    step_key, reset_key = jax.random.split(key)
    steps, count = config.num_steps, config.num_envs
    # Resets for every step, drawn at once: no random numbers for them inside the loop over time.
    reset_keys = jax.random.split(reset_key, (steps, count))
    fresh = jax.vmap(jax.vmap(env.reset, (0, None)), (0, None))(reset_keys, env_params)

    def step(scan_state: tuple[EnvState, Carry], now: tuple[PRNGKeyArray, EnvState]):
        states, carry = scan_state
        act_key, env_key = jax.random.split(now[0])
        is_first = states.episode_length == 0
        obs = normalize_obs(states.obs, envs.obs_moments)
        carry = draw_carry(network, params, obs, is_first, carry, act_key)
        drawn = carry if isinstance(network, DrawsCarry) else ()
        distribution, carry = call(network, params, obs, is_first, carry, method="act")
        action = distribution.sample(act_key)
        states, transition = jax.vmap(env.auto_reset_step, (0, 0, 0, None, 0))(
            jax.random.split(env_key, count), states, action, env_params, now[1]
        )
        return (states, carry), (transition, is_first, distribution.logp(action), drawn)

    keys = jax.random.split(step_key, steps)
    scan_state, by_time = jax.lax.scan(step, (envs.states, envs.carry), (keys, fresh))
    transition, is_first, logp, drawn = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_time)
    states, statistics = take_statistics(scan_state[0])
    moments, scale = envs.obs_moments, envs.reward_scale
    if moments is not None:
        moments = add_observations(moments, transition.obs)
    if scale is not None:
        scale, rewards = scale_rewards(scale, transition.reward, transition.done, gamma=gamma)
        transition = dataclasses.replace(transition, reward=rewards)
    transition = dataclasses.replace(
        transition,
        obs=normalize_obs(transition.obs, envs.obs_moments),
        next_obs=normalize_obs(transition.next_obs, envs.obs_moments),
    )
    experience = Experience(transition, is_first, envs.carry, logp, drawn)
    return VectorEnvState(states, scan_state[1], moments, scale), experience, episode_metrics(statistics)


def compute_gae(
    network: Network,
    params: Params,
    experience: Experience,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    bootstrap_truncation: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Values of the observations, GAE(lambda) advantages and lambda-returns; not whitened, no gradient."""
    values, next_values = values_of(network, params, experience)
    advantages, returns = gae_of(
        experience.transition.reward,
        values,
        next_values,
        experience.transition,
        gamma=gamma,
        gae_lambda=gae_lambda,
        bootstrap_truncation=bootstrap_truncation,
    )
    return values, advantages, returns


def values_of(
    network: Network, params: Params, experience: Experience
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Values of the observations, and of those that followed."""
    seen, is_first, carry = experience.transition, experience.is_first, experience.carry
    _, values = call(network, params, seen.obs, is_first, carry)
    return values, call(network, params, seen.obs, seen.next_obs, is_first, carry, method="next_value")


def gae_of(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    next_values: Float[Array, "B T"],
    seen: Transition,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
    bootstrap_truncation: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """GAE(lambda) advantages and lambda-returns of a rollout.

    Where an episode was cut, the value of its true last observation is what the future is worth:

        delta_t = r_t + gamma [not terminated] V(next_obs_t) - V(obs_t)
        A_t     = delta_t + gamma lambda [not done] A_{t+1}

    which is GAE with gamma V(next_obs_t) added to the reward of a cut step, and discount 0 there.

    Args:
      next_values: of what followed each step, `seen.next_obs`.
      seen: where episodes ended or were cut.
    """
    rewards, discounts, last = bootstrapped(
        rewards, next_values, seen, gamma=gamma, bootstrap_truncation=bootstrap_truncation
    )
    mask = jnp.ones(rewards.shape, bool)
    return generalized_advantage_estimation(rewards, values, discounts, last, mask, gae_lambda=gae_lambda)


def bootstrapped(
    rewards: Float[Array, "B T"],
    next_values: Float[Array, "B T"],
    seen: Transition,
    *,
    gamma: Scalar,
    bootstrap_truncation: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, " B"]]:
    """Rewards with what a cut episode's future is worth, discounts, and the value behind the last step."""
    if bootstrap_truncation:
        rewards = rewards + jnp.where(seen.truncated, gamma * next_values, 0)
    return rewards, jnp.where(seen.done, 0.0, gamma), next_values[:, -1]


def as_rows(network: Network, tree: Any) -> Any:
    """[B, T] as rows of an update: single steps [B T, 1], or whole trajectories for a network with memory."""
    if isinstance(network, RecurrentActorCritic):
        return tree
    return jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), tree)


def make_logprob_fn(network: Network) -> LogprobFn:
    """`logprob_fn(params, inputs: Inputs) -> TokenLogprobs`."""

    def score(params: Params, inputs: Inputs) -> TokenLogprobs:
        distribution, values = call(network, params, inputs.obs, inputs.is_first, inputs.carry)
        return TokenLogprobs(distribution.logp(inputs.action), distribution.entropy(), values)

    return score


def make_act_fn(network: Network, params_fn: Callable[[Any], Params]) -> ActFn:
    """Acting function of a network and its parameters.

    Args:
      params_fn: state of a run -> parameters. Where the state has `envs`, observations are normalised as
        they say.
    """

    def act(
        state: Any,
        obs: Array,
        is_first: Bool[Array, " B"],
        carry: Carry,
        key: PRNGKeyArray,
        *,
        deterministic: bool,
    ) -> tuple[Array, Carry]:
        seen = normalize_obs(obs, state.envs.obs_moments if hasattr(state, "envs") else None)
        params = params_fn(state)
        carry = draw_carry(network, params, seen, is_first, carry, None if deterministic else key)
        distribution, carry = call(network, params, seen, is_first, carry, method="act")
        return distribution.mode() if deterministic else distribution.sample(key), carry

    return act
