"""TD3+BC on a log: TD3 whose policy also stays near the log's actions (Fujimoto & Gu 2021)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, PRNGKeyArray, Scalar
from rlhf_jax.rl.algorithms import td3
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.continuous import Box, box_of, critic_fns, default_encoder
from rlhf_jax.rl.loops.offline import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import applied


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course. An update takes `policy_delay` steps of the critics, each with its part of the batch.
      optimizer: of actor and critics: Adam behind gradient clipping.
      encoder: of actor and critics.
      num_critics: how many; the target is the least of them.
      policy_delay: critic steps before each step of the actor and of all target networks; divides
        `run.batch_size`.
    """

    run: RunConfig = RunConfig(batch_size=256)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    num_critics: int = 2
    policy_delay: int = 2


@pytree_dataclass
class Hyper:
    """Hyperparameters of TD3+BC that a sweep may vary (array leaves).

    Noise is in half ranges of the box of actions.

    Attributes:
      learning_rate: of the critics.
      actor_learning_rate: of the actor.
      gamma: discount per step.
      tau: how far target networks move at a time.
      alpha: weight of values against distance from the log's actions; 0 is behaviour cloning by squares.
      target_policy_noise: of the noise on the target's actions.
      target_noise_clip: bound of that noise.
    """

    learning_rate: Scalar = 3e-4
    actor_learning_rate: Scalar = 3e-4
    gamma: Scalar = 0.99
    tau: Scalar = 0.005
    alpha: Scalar = 2.5
    target_policy_noise: Scalar = 0.2
    target_noise_clip: Scalar = 0.5


def make_actor_loss(box: Box) -> td3.ActorLossFn:
    """-lambda mean Q_1(s, mu(s)) + mean (mu(s) - a)^2,  lambda = alpha / mean |Q_1(s, mu(s))|.

    Actions are in half ranges of their box, and lambda gets no gradient. The squares are a mean over
    dimensions too, as in the authors' program.
    """

    def loss_fn(
        hyper: Hyper, action: Float[Array, "N A"], values: Float[Array, " N"], batch: Batch
    ) -> Float[Array, ""]:
        weight = hyper.alpha / jax.lax.stop_gradient(jnp.maximum(jnp.mean(jnp.abs(values)), 1e-8))
        away = (action - batch.action) / box.half_range
        return jnp.mean(away**2) - weight * jnp.mean(values)

    return loss_fn


def normalizer(data: Transition) -> Any:
    """obs -> (obs - mean) / (std + 1e-3), with the log's mean and deviation."""
    obs = np.asarray(data.obs)
    mean, scale = obs.mean(axis=0), obs.std(axis=0) + 1e-3
    return lambda obs: (obs - mean) / scale


def make_run(config: Config, env: Environment, data: Transition) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actions are no vector, or the batch cannot be parted.
    """
    box, tx = box_of(env, "TD3+BC"), make_optimizer(config.optimizer)
    td3.check_parts("TD3+BC", config)
    normalize = normalizer(data)
    data = dataclasses.replace(data, obs=normalize(data.obs), next_obs=normalize(data.next_obs))
    actor = td3.make_actor(config, env)
    actor_fn = applied(actor)
    init_critics, critic_fn = critic_fns(env, config.encoder, box, count=config.num_critics)

    def init_fn(key: PRNGKeyArray) -> td3.State:
        actor_key, critic_key, key = jax.random.split(key, 3)
        params = actor.init(actor_key, jnp.zeros((1, *env.obs_shape)))["params"]
        return td3.init(params, init_critics(critic_key), tx, key)

    update = td3.make_update(config, actor_fn, critic_fn, box, tx, actor_loss_fn=make_actor_loss(box))

    def update_fn(state: td3.State, hyper: Hyper, batch: Batch) -> tuple[td3.State, Metrics]:
        state, metrics, _ = update(state, hyper, batch)
        return state, metrics

    def act(state: td3.State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        del key, deterministic  # the policy has no chance of its own
        return actor_fn(state.actor.params, normalize(obs))

    return offline.make_run(config.run, data, Algorithm(init_fn, update_fn, act))


def make_train(config: Config, env: Environment, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, data))
