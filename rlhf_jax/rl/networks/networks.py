"""Networks of control: encoders, heads, and feed-forward and recurrent actor-critics.

An encoder maps [N, *obs_shape] to features [N, D]; `ObsEncoder` brings observations into that form, whatever
their leading axes. Encoders and heads are Flax modules, which are frozen dataclasses: a config may hold them.
Attributes called `torso` and `body` are names in the parameters' paths of saved agents.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax.core.types import Array, Bool, Float
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.networks.distributions import Categorical, DiagonalGaussian, Distribution, TanhGaussian

Activation: TypeAlias = Callable[[Array], Array]
Carry: TypeAlias = Any
ROOT_2 = math.sqrt(2)


def linear(width: int, scale: float, name: str | None = None) -> nn.Dense:
    """A dense layer with orthogonal weights of this scale and bias 0."""
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale), name=name)


class MLP(nn.Module):
    """Dense layers, each followed by the activation.

    Attributes:
      widths: of the layers.
      activation: after each.
      output: width of a last layer without activation; 0 for none.
      output_scale: of its orthogonal weights.
      layer_norm: normalize before each activation (Ba et al. 2016).
    """

    widths: tuple[int, ...] = (64, 64)
    activation: Activation = nn.tanh
    output: int = 0
    output_scale: float = 1.0
    layer_norm: bool = False

    @nn.compact
    def __call__(self, inputs: Float[Array, "N ..."]) -> Float[Array, "N D"]:
        """Features, or outputs."""
        hidden = inputs.reshape(inputs.shape[0], -1)
        for width in self.widths:
            hidden = linear(width, ROOT_2)(hidden)
            hidden = self.activation(nn.LayerNorm()(hidden) if self.layer_norm else hidden)
        return linear(self.output, self.output_scale)(hidden) if self.output else hidden


def patches(inputs: Float[Array, "N H W C"], size: int) -> Float[Array, "N h w D"]:
    """The `size` x `size` surroundings of each inner place, D = size^2 C.

    A dense layer on them is a convolution. With XLA's own, PPO on MinAtar took eight to nine times as long on
    CPU.
    """
    height, width = (length - size + 1 for length in inputs.shape[1:3])
    shifts = itertools.product(range(size), repeat=2)
    return jnp.concatenate([inputs[:, y : y + height, x : x + width] for y, x in shifts], axis=-1)


class MinAtarConv(nn.Module):
    """One 3 x 3 convolution and one dense layer (Young & Tian 2019, section 4.1).

    Attributes:
      channels: of the convolution.
      width: of the dense layer.
      activation: after both.
      layer_norm: normalize before each activation.
    """

    channels: int = 16
    width: int = 128
    activation: Activation = nn.relu
    layer_norm: bool = False

    @nn.compact
    def __call__(self, inputs: Float[Array, "N H W C"]) -> Float[Array, "N D"]:
        """Features."""

        def layer(width: int, inputs: Array) -> Array:
            hidden = linear(width, ROOT_2)(inputs)
            return self.activation(nn.LayerNorm()(hidden) if self.layer_norm else hidden)

        planes = layer(self.channels, patches(inputs, 3))
        return layer(self.width, planes.reshape(inputs.shape[0], -1))


class ObsEncoder(nn.Module):
    """A body behind the repair of observations: any leading axes, float32, state numbers one-hot.

    Attributes:
      body: [N, *obs_shape] -> [N, D].
      obs_shape: of one observation.
      num_states: where observations are numbers of states.
    """

    body: nn.Module
    obs_shape: tuple[int, ...]
    num_states: int | None = None

    def __call__(self, obs: Array) -> Float[Array, "... D"]:
        """Features of each observation."""
        leading = obs.shape[: obs.ndim - len(self.obs_shape)]
        flat = obs.reshape(-1, *self.obs_shape)
        if self.num_states is None:
            flat = flat.astype(jnp.float32)
        else:
            flat = jax.nn.one_hot(flat, self.num_states)
        features = self.body(flat)
        return features.reshape(*leading, features.shape[-1])


class CategoricalHead(nn.Module):
    """Logits of discrete actions; almost uniform at first."""

    num_actions: int

    @nn.compact
    def __call__(self, features: Float[Array, "... D"]) -> Categorical:
        """The distribution of actions."""
        return Categorical(linear(self.num_actions, 0.01)(features))


class GaussianHead(nn.Module):
    """A Gaussian whose mean depends on the state and whose standard deviation does not.

    Attributes:
      dimensions: of an action.
      log_std: at first.
    """

    dimensions: int
    log_std: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "... D"]) -> DiagonalGaussian:
        """The distribution of actions, in the environment's units."""
        mean = linear(self.dimensions, 0.01)(features)
        log_std = self.param("log_std", nn.initializers.constant(self.log_std), (self.dimensions,))
        return DiagonalGaussian(mean, jnp.broadcast_to(log_std, mean.shape))


class TanhGaussianHead(nn.Module):
    """A Gaussian squashed into the box of actions; mean and standard deviation depend on the state.

    Attributes:
      low: of the box.
      high: of the box.
      log_std_range: bounds of log_std.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    log_std_range: tuple[float, float] = (-5.0, 2.0)

    @nn.compact
    def __call__(self, features: Float[Array, "... D"]) -> TanhGaussian:
        """The distribution of actions, in the environment's units."""
        mean, raw = jnp.split(linear(2 * len(self.low), 0.01)(features), 2, axis=-1)
        least, greatest = self.log_std_range
        log_std = least + (greatest - least) * 0.5 * (jnp.tanh(raw) + 1)
        return TanhGaussian(mean, log_std, jnp.asarray(self.low), jnp.asarray(self.high))


class ActorCritic(nn.Module):
    """A policy and a value function, without memory.

    Attributes:
      actor_torso: observations -> features of the actor.
      actor_head: features -> distribution of actions.
      critic_torso: observations -> features of the critic; None where it shares the actor's.
    """

    actor_torso: nn.Module
    actor_head: nn.Module
    critic_torso: nn.Module | None = None

    def setup(self) -> None:
        """The value's own layer."""
        self.critic_head = linear(1, 1.0)

    def initial_carry(self, count: int) -> Carry:
        """Initial carry of `count` environments: empty."""
        del count
        return ()

    def act(self, obs: Array, is_first: Bool[Array, " B"], carry: Carry) -> tuple[Distribution, Carry]:
        """The distribution of actions in [B] environments, and what they remember next."""
        del is_first
        return self.actor_head(self.actor_torso(obs)), carry

    def __call__(
        self, obs: Array, is_first: Bool[Array, "B T"], carry: Carry
    ) -> tuple[Distribution, Float[Array, "B T"]]:
        """Distributions and values along [B, T] trajectories, which began with `carry`."""
        del is_first, carry
        features = self.actor_torso(obs)
        return self.actor_head(features), self._value(obs if self.critic_torso else features)

    def next_value(
        self, obs: Array, next_obs: Array, is_first: Bool[Array, "B T"], carry: Carry
    ) -> Float[Array, "B T"]:
        """Values of `next_obs`, each as what follows `obs`."""
        del obs, is_first, carry
        return self._value(next_obs if self.critic_torso else self.actor_torso(next_obs))

    def _value(self, inputs: Array) -> Float[Array, "..."]:
        features = self.critic_torso(inputs) if self.critic_torso else inputs
        return self.critic_head(features)[..., 0]


def next_carry(
    cell: nn.Module, carry: Carry, is_first: Bool[Array, " B"], features: Float[Array, "B D"]
) -> Float[Array, "B D"]:
    """Carry of a GRU after one step; it forgets where an episode starts."""
    return cell(jnp.where(is_first[..., None], 0, carry), features)[0]


def unroll(
    cell: nn.Module, carry: Carry, is_first: Bool[Array, "B T"], features: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """Carry of a GRU after each step of [B, T] trajectories, which began with `carry`."""

    def step(cell: nn.Module, carry: Carry, inputs: tuple[Array, Array]):
        carry = next_carry(cell, carry, *inputs)
        return carry, carry

    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
    return scan(cell, carry, (is_first, features))[1]


class RecurrentActorCritic(nn.Module):
    """A policy and a value function that share a torso and a GRU (Cho et al. 2014).

    The GRU forgets where an episode starts, also in the middle of a trajectory.

    Attributes:
      torso: observations -> features, of both.
      actor_head: what the GRU holds -> distribution of actions.
      width: of the GRU.
    """

    torso: nn.Module
    actor_head: nn.Module
    width: int = 64

    def setup(self) -> None:
        """The GRU, and the value's own layer."""
        self.cell = nn.GRUCell(self.width)
        self.critic_head = linear(1, 1.0)

    def initial_carry(self, count: int) -> Carry:
        """Initial carry of `count` environments: zeros."""
        return jnp.zeros((count, self.width))

    def act(self, obs: Array, is_first: Bool[Array, " B"], carry: Carry) -> tuple[Distribution, Carry]:
        """The distribution of actions in [B] environments, and what they remember next."""
        carry = next_carry(self.cell, carry, is_first, self.torso(obs))
        return self.actor_head(carry), carry

    def __call__(
        self, obs: Array, is_first: Bool[Array, "B T"], carry: Carry
    ) -> tuple[Distribution, Float[Array, "B T"]]:
        """Distributions and values along [B, T] trajectories, which began with `carry`."""
        hidden = unroll(self.cell, carry, is_first, self.torso(obs))
        return self.actor_head(hidden), self.critic_head(hidden)[..., 0]

    def next_value(
        self, obs: Array, next_obs: Array, is_first: Bool[Array, "B T"], carry: Carry
    ) -> Float[Array, "B T"]:
        """Values of `next_obs`, each as what follows `obs`."""
        hidden = unroll(self.cell, carry, is_first, self.torso(obs))
        after, _ = self.cell(hidden, self.torso(next_obs))
        return self.critic_head(after)[..., 0]


def make_actor_critic(env: Environment, encoder: nn.Module, *, shared: bool = False) -> ActorCritic:
    """An actor-critic for this environment, whose torsos are two of `encoder`, or one shared.

    Heads are categorical for discrete actions and Gaussian for continuous ones.
    """
    critic = None if shared else make_encoder(env, encoder)
    return ActorCritic(make_encoder(env, encoder), make_head(env), critic)


def make_recurrent_actor_critic(
    env: Environment, encoder: nn.Module, *, width: int = 64
) -> RecurrentActorCritic:
    """An actor-critic with memory for this environment."""
    return RecurrentActorCritic(make_encoder(env, encoder), make_head(env), width)


def make_encoder(env: Environment, encoder: nn.Module) -> ObsEncoder:
    """A copy of `encoder` behind the repair of this environment's observations."""
    return ObsEncoder(encoder.clone(), env.obs_shape, env.num_states)


def make_head(env: Environment) -> nn.Module:
    """Categorical for discrete actions, Gaussian for continuous ones, of a single agent."""
    if env.num_actions is not None:
        return CategoricalHead(env.num_actions)
    return GaussianHead(int(np.prod(env.action_shape)) // env.num_agents)


def default_encoder(env: Environment) -> nn.Module:
    """The convolution for MinAtar's planes, a tanh MLP of two layers of 64 for the rest."""
    return MinAtarConv() if env.name.endswith("-MinAtar") else MLP()
