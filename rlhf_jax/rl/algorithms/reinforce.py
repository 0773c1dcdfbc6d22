"""REINFORCE with and without baseline (Williams 1992; Sutton & Barto 2018, sections 13.3 and 13.4).

Monte Carlo returns of whole episodes. Without baseline nothing is known of what lies beyond the time limit,
so an episode that is cut counts with what it got; with the learned baseline, the value of the last
observation is added there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.returns import discounted_returns
from rlhf_jax.kernels.whitening import whiten
from rlhf_jax.rl.algorithms import a2c
from rlhf_jax.rl.algorithms.a2c import Batch, State, init, make_update
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import episodic, on_policy
from rlhf_jax.rl.loops.episodic import Episodes
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import Network, call, make_logprob_fn
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
      updates: optimizer steps of a run.
      episodes: in each update.
      max_steps: at which an episode is cut; None for the environment's own limit.
      baseline: subtract a learned value from the returns.
      whiten_advantages: bring advantages to mean 0 and variance 1 over the batch, which without baseline
        subtracts the mean return.
      network: the policy, and the baseline.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
    """

    updates: int = 150
    episodes: int = 8
    max_steps: int | None = None
    baseline: bool = True
    whiten_advantages: bool = False
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule="linear", warmup_steps=0, clip_norm=0.5, b2=0.999, epsilon=1e-5
    )


@pytree_dataclass
class Hyper:
    """Hyperparameters of REINFORCE that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      value_coef: weight of the value loss; 0 where there is no baseline.
      entropy_coef: weight of the entropy bonus.
    """

    learning_rate: Scalar = 1e-2
    gamma: Scalar = 0.99
    value_coef: Scalar = 0.5
    entropy_coef: Scalar = 0.0


def default_hyper(**changes: Any) -> Hyper:
    """The defaults as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**changes))


def make_batch(config: Config, network: Network, params: Params, hyper: Hyper, seen: Episodes) -> Batch:
    """Monte Carlo returns, and what is left of them above the baseline."""
    inputs, mask, transition = seen.inputs, seen.mask, seen.transition
    cut = jnp.zeros(mask.shape[0])
    values = jnp.zeros(mask.shape)
    if config.baseline:
        obs, is_first, carry = inputs.obs, inputs.is_first, inputs.carry
        values = call(network, params, obs, is_first, carry)[1]
        after = call(network, params, obs, transition.next_obs, is_first, carry, method="next_value")
        last = mask & ~jnp.concatenate([mask[:, 1:], jnp.zeros_like(mask[:, :1])], axis=1)
        cut = jnp.sum(after, axis=1, where=last & ~transition.terminated)
    returns = discounted_returns(transition.reward, transition.discounts(hyper.gamma), cut, mask)
    advantages = returns - jax.lax.stop_gradient(values)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Batch(inputs, mask, seen.logp, values, advantages, returns)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    network = on_policy.make_network(config.network, env)
    tx = make_optimizer(with_total_steps(config.optimizer, config.updates))
    update = make_update(make_logprob_fn(network), tx)

    def start(key: PRNGKeyArray):
        return jax.vmap(env.reset, (0, None))(jax.random.split(key, config.episodes), env_params)

    def learn(state: State, hyper: Hyper, seen: Episodes) -> tuple[State, Metrics]:
        value_coef = jnp.asarray(hyper.value_coef) * config.baseline
        weights = a2c.Hyper(hyper.learning_rate, hyper.gamma, 1.0, value_coef, hyper.entropy_coef)
        return update(state, weights, make_batch(config, network, state.learner.params, hyper, seen))

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        del key, hyper
        return init(params, tx)

    return episodic.make_run(
        network,
        env,
        env_params,
        episodic.Learning(init_agent, start, learn),
        updates=config.updates,
        episodes=config.episodes,
        max_steps=config.max_steps or env.max_steps,
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
