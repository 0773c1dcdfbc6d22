"""FeUdal networks (FuN; Vezhnevets et al. 2017): a manager sets directions in a latent space, a worker goes.

    manager   -A^M cos(s_{t+c} - s_t, g_t)                  transition policy gradient
    worker    -A^W log pi(a_t | s_t, g_{t-c+1} ... g_t)     advantages of r + alpha r^I
    r^I_t     mean over i = 1 ... c of cos(s_{t+1} - s_{t+1-i}, g_{t+1-i})

The manager's returns are of the environment's rewards; no gradient passes from the worker to the goals.
Both levels are feed-forward where the paper has LSTMs, and where the episode or the rollout ends within c
steps, s_{t+c} is the last state before that. Batched and synchronous, as A2C.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, Scalar
from rlhf_jax.kernels.whitening import whiten
from rlhf_jax.losses.hierarchies import cosine_similarity, goal_loss
from rlhf_jax.losses.policy import reinforce_loss
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.algorithms import a2c
from rlhf_jax.rl.algorithms.dqn import discrete_actions
from rlhf_jax.rl.algorithms.option_critic import State, init, make_two_level_run
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig, call, gae_of
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.hierarchies import FeudalActorCritic
from rlhf_jax.rl.networks.networks import default_encoder, make_encoder

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "default_hyper",
    "init",
    "make_batch",
    "make_feudal_loss",
    "make_network",
    "make_run",
    "make_train",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for CartPole.

    Attributes:
      horizon: c, steps for which a goal is a direction.
      goal_dim: of goals and latent states.
      embedding_dim: of goals as the worker is told them.
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from; several times as many steps as the horizon.
      encoder: of the percepts; None for the environment's usual one.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
      whiten_advantages: bring each level's to mean 0 and variance 1 over the rollout, so that neither has the
        percepts to itself.
    """

    horizon: int = 5
    goal_dim: int = 16
    embedding_dim: int = 16
    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=8, num_steps=16)
    encoder: nn.Module | None = None
    optimizer: OptimizerConfig = a2c.Config().optimizer
    whiten_advantages: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of FeUdal networks that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step of the worker.
      manager_gamma: and of the manager.
      lambda_: of both levels' advantages; 1 bootstraps only at the rollout's end and at truncations.
      value_coef: weight of both value losses.
      entropy_coef: weight of the entropy bonus of the worker's policy.
      intrinsic_coef: alpha, weight of the reward for going where the goals point.
      epsilon: share of random goals.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    manager_gamma: Scalar = 0.99
    lambda_: Scalar = 0.95
    value_coef: Scalar = 0.5
    entropy_coef: Scalar = 0.01
    intrinsic_coef: Scalar = 0.1
    epsilon: Scalar = 0.05


@pytree_dataclass
class Batch:
    """A rollout, [B, T], with what was made of it.

    Attributes:
      experience: what happened.
      directions: where the latent state went within the horizon of each step's goal.
      advantages: the worker's.
      returns: of the worker, intrinsic rewards included.
      manager_advantages: the manager's.
      manager_returns: of the environment's rewards alone.
      intrinsic: rewards of going where the goals point.
    """

    experience: Experience
    directions: Float[Array, "B T D"]
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    manager_advantages: Float[Array, "B T"]
    manager_returns: Float[Array, "B T"]
    intrinsic: Float[Array, "B T"]


def default_hyper(**changes: Any) -> Hyper:
    """The defaults as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**changes))


def last_within(done: Bool[Array, "B T"], *, horizon: int) -> Int[Array, "B T"]:
    """The last step of each goal's horizon: c - 1 steps on, or the last of the episode or the rollout."""
    steps = jnp.arange(done.shape[1])
    ends = jnp.where(done, steps, done.shape[1] - 1)
    next_end = jax.lax.cummin(ends, axis=1, reverse=True)
    return jnp.minimum(next_end, steps + horizon - 1)


def make_batch(
    network: FeudalActorCritic,
    params: Params,
    hyper: Hyper,
    experience: Experience,
    *,
    bootstrap_truncation: bool = True,
) -> Batch:
    """Directions, intrinsic rewards, and both levels' advantages; no gradient."""
    seen, is_first, drawn = experience.transition, experience.is_first, experience.drawn
    _, values, manager = call(network, params, seen.obs, is_first, drawn)
    _, next_values, next_manager = call(network, params, seen.next_obs, is_first, drawn)
    last = last_within(seen.done, horizon=network.horizon)
    reached = jnp.take_along_axis(next_manager.states, last[..., None], axis=1)
    moved = next_manager.states[..., None, :] - drawn.states
    # Slots from before the episode have no goal, and a cosine of 0.
    intrinsic = jnp.mean(cosine_similarity(moved, drawn.goals), axis=-1)

    def advantages(
        rewards: Array, values: Array, next_values: Array, gamma: Scalar
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        return gae_of(
            rewards,
            values,
            next_values,
            seen,
            gamma=gamma,
            gae_lambda=hyper.lambda_,
            bootstrap_truncation=bootstrap_truncation,
        )

    paid = seen.reward + hyper.intrinsic_coef * intrinsic
    own = advantages(paid, values, next_values, hyper.gamma)
    above = advantages(seen.reward, manager.values, next_manager.values, hyper.manager_gamma)
    batch = Batch(experience, reached - manager.states, *own, *above, intrinsic)
    return jax.lax.stop_gradient(batch)


def make_feudal_loss(
    network: FeudalActorCritic, *, whiten_advantages: bool = False
) -> Callable[[Params, Hyper, Batch], tuple[Float[Array, ""], Metrics]]:
    """Loss of FeUdal networks: `loss_fn(params, hyper, batch) -> (loss, metrics)`.

    loss = policy loss + goal loss + value_coef both value losses - entropy_coef entropy, means over steps.
    """

    def loss_fn(params: Params, hyper: Hyper, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        experience = batch.experience
        seen = experience.transition
        policy, values, manager = call(network, params, seen.obs, experience.is_first, experience.drawn)
        mask = jnp.ones(values.shape, bool)
        advantages, manager_advantages = (
            whiten(x, mask) if whiten_advantages else x for x in (batch.advantages, batch.manager_advantages)
        )
        policy_loss, policy_metrics = reinforce_loss(
            policy.logp(seen.action), experience.logp, advantages, mask
        )
        value_loss, value_metrics = squared_value_loss(values, batch.returns, mask)
        manager_value_loss, _ = squared_value_loss(manager.values, batch.manager_returns, mask)
        direction_loss, goal_metrics = goal_loss(batch.directions, manager.goals, manager_advantages, mask)
        entropy = jnp.mean(policy.entropy())
        loss = policy_loss + direction_loss + hyper.value_coef * (value_loss + manager_value_loss)
        loss = loss - hyper.entropy_coef * entropy
        metrics = {"loss": loss, "entropy": entropy, **policy_metrics, **value_metrics, **goal_metrics}
        metrics["manager_value_loss"] = manager_value_loss
        return loss, {**metrics, "intrinsic_reward": jnp.mean(batch.intrinsic)}

    return loss_fn


def make_network(config: Config, env: Environment) -> FeudalActorCritic:
    """The two levels of `config` for this environment.

    Raises:
      UserError: actions are continuous.
    """
    encoder = config.encoder or default_encoder(env)
    return FeudalActorCritic(
        torso=make_encoder(env, encoder),
        critic_torso=make_encoder(env, encoder),
        num_actions=discrete_actions(env, "FeUdal networks"),
        horizon=config.horizon,
        goal_dim=config.goal_dim,
        embedding_dim=config.embedding_dim,
    )


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    network = make_network(config, env)
    loss_fn = make_feudal_loss(network, whiten_advantages=config.whiten_advantages)
    return make_two_level_run(config, network, make_batch, loss_fn, env, env_params)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
