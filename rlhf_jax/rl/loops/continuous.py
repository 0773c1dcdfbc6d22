"""Continuous control, shared by DDPG, TD3, SAC and CrossQ: the box of actions, networks, steps of critics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import TrainState, apply_gradients
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops.off_policy import Algorithm
from rlhf_jax.rl.loops.replay import Batch, weighted_mean
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import Critics, applied


@dataclasses.dataclass(frozen=True)
class Box:
    """The bounds of actions.

    Attributes:
      low: least, in each dimension.
      high: greatest.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def half_range(self) -> Float[Array, " A"]:
        """Half of the distance between the bounds."""
        return (jnp.asarray(self.high) - jnp.asarray(self.low)) / 2

    def clip(self, action: Float[Array, "... A"]) -> Float[Array, "... A"]:
        """`action` inside the bounds."""
        return jnp.clip(action, jnp.asarray(self.low), jnp.asarray(self.high))

    def uniform(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "... A"]:
        """Actions anywhere in the box."""
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        return jax.random.uniform(key, (*shape, len(self.low)), minval=low, maxval=high)


def box_of(env: Environment, algorithm: str) -> Box:
    """The box of this environment's actions.

    Raises:
      UserError: actions are numbers, not vectors.
    """
    if env.discrete or len(env.action_shape) != 1:
        raise UserError(
            f"{algorithm} needs a vector of continuous actions, which {env.name} has not: use DQN or PPO."
        )
    return Box(env.action_low, env.action_high)


def default_encoder() -> nn.Module:
    """A ReLU MLP of two layers of 64."""
    return MLP((64, 64), nn.relu)


def make_encoder(env: Environment, encoder: nn.Module) -> ObsEncoder:
    """`encoder` behind the repair of observations.

    Raises:
      UserError: observations are images or numbers.
    """
    if env.num_states is not None or len(env.obs_shape) != 1:
        raise UserError(f"{env.name}: critics of continuous actions need vectors as observations: use PPO.")
    return ObsEncoder(encoder, env.obs_shape)


ActorFn = Callable[[Params, Array], Float[Array, "N A"]]
"""(params, obs) -> action, in the environment's units."""

CriticFn = Callable[[Params, Array, Float[Array, "N A"]], Float[Array, "C N"]]
"""(params, obs, action) -> a value from each critic."""


def critic_fns(env: Environment, encoder: nn.Module, box: Box, *, count: int) -> tuple[Any, CriticFn]:
    """(init(key) -> params, apply) of `count` critics."""
    critics = Critics(encoder, box.low, box.high, count)

    def init(key: PRNGKeyArray) -> Params:
        return critics.init(key, jnp.zeros((1, *env.obs_shape)), jnp.zeros((1, len(box.low))))["params"]

    return init, applied(critics)


def critic_step(
    learner: TrainState,
    values_fn: Callable[[Params], tuple[Float[Array, "C N"], Float[Array, " N"], Any]],
    weight: Float[Array, " N"],
    tx: optax.GradientTransformation,
    *,
    learning_rate: Scalar,
) -> tuple[TrainState, Metrics, Float[Array, " N"], Any]:
    """One optimizer step of all critics, targets common or own: (learner, metrics, errors, what else).

    Args:
      values_fn: params -> (values of each critic, targets, what else there is); targets get no gradient.
      weight: of each transition.
    """

    def loss_fn(params: Params) -> tuple[Array, tuple[Metrics, Array, Any]]:
        values, targets, extra = values_fn(params)
        returns = jax.lax.stop_gradient(jnp.broadcast_to(targets, values.shape))
        mask = jnp.ones_like(values, bool)
        loss, metrics = squared_value_loss(values, returns, mask, reduce=weighted_mean(weight))
        return loss, (metrics, jnp.mean(values - returns, axis=0), extra)

    (loss, (metrics, errors, extra)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learner.params)
    learner, guard = apply_gradients(learner, gradients, tx, learning_rate=learning_rate, loss=loss)
    return learner, {**metrics, **guard}, jax.lax.stop_gradient(errors), extra


def towards(critic_fn: CriticFn, batch: Batch, targets: Float[Array, "*C N"]) -> Callable[[Params], Any]:
    """The `values_fn` of `critic_step` for targets that are known."""
    return lambda params: (critic_fn(params, batch.obs, batch.action), targets, None)


def policy_step(
    learner: TrainState,
    loss_fn: Callable[[Params], tuple[Float[Array, ""], Any]],
    tx: optax.GradientTransformation,
    *,
    learning_rate: Scalar,
) -> tuple[TrainState, Float[Array, ""], Any]:
    """One optimizer step of an actor, or of a temperature: (learner, loss, what else the loss returned)."""
    (loss, extra), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learner.params)
    learner, _ = apply_gradients(learner, gradients, tx, learning_rate=learning_rate, loss=loss)
    return learner, loss, extra


def noisy_algorithm(
    box: Box,
    actor_fn: ActorFn,
    init_fn: Callable[[PRNGKeyArray, Any], Any],
    update_fn: Callable[..., Any],
) -> Algorithm:
    """Exploration of a deterministic policy around `update_fn`: uniform at first, then Gaussian noise.

    The agent's state must have `actor`, and `hyper` `action_noise_std`, in half ranges of the box.
    """

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> tuple[Array, Array]:
        normal_key, uniform_key = jax.random.split(key)
        return jax.random.normal(normal_key, (*shape, len(box.low))), box.uniform(uniform_key, shape)

    def explore_fn(state: Any, hyper: Any, obs: Array, noise: tuple[Array, Array], steps: Array) -> Array:
        del state, hyper, obs, steps
        return noise[1]

    def act_fn(state: Any, hyper: Any, obs: Array, noise: tuple[Array, Array], steps: Array) -> Array:
        del steps
        shift = hyper.action_noise_std * box.half_range * noise[0]
        return box.clip(actor_fn(state.actor.params, obs) + shift)

    def policy_fn(state: Any, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        del key, deterministic  # the policy has no chance of its own
        return actor_fn(state.actor.params, obs)

    return Algorithm(init_fn, noise_fn, explore_fn, act_fn, update_fn, policy_fn)
