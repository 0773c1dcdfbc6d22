"""Observations and rewards brought to unit scale, by statistics that all environments of a run share.

Statistics are part of the run's state: each environment axis adds to the same ones, so that one environment
or a thousand give the same normaliser, and a saved agent carries its own.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Scalar
from rlhf_jax.kernels.whitening import Moments, add_to_moments, init_moments, normalize

CLIP = 10.0


def init_observation_moments(obs_shape: tuple[int, ...]) -> Moments:
    """Moments of nothing, for each entry of an observation."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, obs_shape), init_moments())


def add_observations(moments: Moments, obs: Array) -> Moments:
    """`moments` and those of `obs` [..., *obs_shape] together."""
    shape = moments.mean.shape
    rows = obs.reshape(-1, moments.mean.size).astype(jnp.float32)
    flat = jax.tree.map(lambda x: x.reshape(-1), moments)
    added = jax.vmap(add_to_moments, in_axes=(0, 1, 1))(flat, rows, jnp.ones(rows.shape, bool))
    return jax.tree.map(lambda x: x.reshape(shape), added)


def normalize_observations(obs: Array, moments: Moments) -> Float[Array, "..."]:
    """Each entry with mean 0 and variance 1, cut at +-10."""
    return jnp.clip(normalize(obs.astype(jnp.float32), moments), -CLIP, CLIP)


@pytree_dataclass
class RewardScale:
    """Reward scale: the deviation of the discounted sum of rewards so far, by which rewards are divided.

    Attributes:
      running: of each environment, sum_k gamma^k r_{t-k} within the episode.
      moments: of all of them, over environments and time.
    """

    running: Float[Array, " B"]
    moments: Moments


def init_reward_scale(num_envs: int) -> RewardScale:
    """A scale of 1."""
    return RewardScale(jnp.zeros(num_envs), init_moments())


def scale_rewards(
    scale: RewardScale, rewards: Float[Array, "B T"], done: Bool[Array, "B T"], *, gamma: Scalar
) -> tuple[RewardScale, Float[Array, "B T"]]:
    """The scale with these rewards counted, and the rewards divided by it, cut at +-10; not shifted.

    The divisor is the deviation of R_t = gamma R_{t-1} + r_t (Engstrom et al. 2020, Algorithm 1).
    """

    def step(running: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = now
        running = gamma * running + reward
        return jnp.where(ended, 0, running), running

    running, sums = jax.lax.scan(step, scale.running, (rewards.T, done.T))
    moments = add_to_moments(scale.moments, sums, jnp.ones(sums.shape, bool))
    scaled = normalize(rewards, moments, shift_mean=False)
    return RewardScale(running, moments), jnp.clip(scaled, -CLIP, CLIP)
