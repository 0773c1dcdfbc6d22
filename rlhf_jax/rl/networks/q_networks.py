"""Networks of action values, in both forms, and actors and critics of continuous actions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Int
from rlhf_jax.losses.value import midpoints
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.networks.distributions import DiagonalGaussian, TanhGaussian
from rlhf_jax.rl.networks.networks import MLP, ROOT_2, MinAtarConv, ObsEncoder, TanhGaussianHead, linear


class ActionValues(nn.Module):
    """Q(s) -> all actions, or N numbers for each.

    Attributes:
      torso: observation -> features.
      num_actions: A.
      outputs: N, of distributional values; 0 for plain values, without that axis.
      dueling: a value of the state and advantages of mean 0 (Wang et al. 2016, eq. 9).
    """

    torso: nn.Module
    num_actions: int
    outputs: int = 0
    dueling: bool = False

    @nn.compact
    def __call__(self, obs: Array) -> Float[Array, "B A ..."]:
        """Values of every action."""
        features = self.torso(obs)
        width = max(self.outputs, 1)
        values = linear(self.num_actions * width, 1.0, "actions")(features)
        values = values.reshape(*features.shape[:-1], self.num_actions, width)
        if self.dueling:
            state_value = linear(width, 1.0, "state")(features)[..., None, :]
            values = state_value + values - jnp.mean(values, axis=-2, keepdims=True)
        return values if self.outputs else values[..., 0]

    def chosen(self, obs: Array, action: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Values of one action each."""
        values = self(obs)
        # A product with a one-hot code: its gradient is no scatter, which CPUs and TPUs are slow at.
        code = jax.nn.one_hot(action, self.num_actions, dtype=values.dtype)
        return jnp.einsum("ba,ba...->b...", code, values)


class ImplicitQuantiles(nn.Module):
    """Implicit quantile network: the return's quantile at any level, of every action.

        Z_tau(s, a) = f(psi(s) * phi(tau))_a,  phi_j(tau) = relu(sum_i cos(pi i tau) w_ij + b_j)

    (Dabney et al. 2018b, section 3 and eq. 4, with i from 1 as in the authors' code, not from 0: that term is
    a second bias.)

    Attributes:
      torso: observation -> features psi.
      num_actions: A.
      num_cosines: terms of the sum.
      num_levels: of the midpoints that values are at where no levels are given.
      width: of the layer behind the product.
    """

    torso: nn.Module
    num_actions: int
    num_cosines: int = 64
    num_levels: int = 32
    width: int = 64

    @nn.compact
    def __call__(self, obs: Array, levels: Float[Array, "B N"] | None = None) -> Float[Array, "B A N"]:
        """Quantiles of every action at these levels."""
        features = self.torso(obs)
        if levels is None:
            levels = jnp.broadcast_to(midpoints(self.num_levels), (features.shape[0], self.num_levels))
        cosines = jnp.cos(jnp.pi * levels[..., None] * jnp.arange(1, self.num_cosines + 1))
        embedded = nn.relu(linear(features.shape[-1], ROOT_2, "levels")(cosines))
        hidden = nn.relu(linear(self.width, ROOT_2, "join")(features[:, None] * embedded))
        return jnp.swapaxes(linear(self.num_actions, 1.0, "actions")(hidden), 1, 2)

    def chosen(
        self, obs: Array, action: Int[Array, " B"], levels: Float[Array, "B N"] | None = None
    ) -> Float[Array, "B N"]:
        """Quantiles of one action each."""
        code = jax.nn.one_hot(action, self.num_actions)
        return jnp.einsum("ba,ban->bn", code, self(obs, levels))


class ActionInputValue(nn.Module):
    """Q(s, a) -> scalar: the action is an input.

    Attributes:
      torso: observation -> features.
      num_actions: A.
      width: of the layer that joins features and action.
    """

    torso: nn.Module
    num_actions: int
    width: int = 64

    def setup(self) -> None:
        """Names the submodules of the network."""
        self.body = self.torso.clone(parent=None)
        self.join = MLP((self.width,), nn.relu, output=1)

    def __call__(self, obs: Array) -> Float[Array, "B A"]:
        """Values of every action, each by its own pass of the last layers."""
        features = self.body(obs)
        actions = jnp.arange(self.num_actions)
        return jax.vmap(lambda action: self._value(features, action), out_axes=-1)(actions)

    def chosen(self, obs: Array, action: Int[Array, " B"]) -> Float[Array, " B"]:
        """Values of one action each."""
        return self._value(self.body(obs), action)

    def _value(self, features: Float[Array, "B D"], action: Int[Array, "..."]) -> Float[Array, " B"]:
        code = jax.nn.one_hot(action, self.num_actions)
        code = jnp.broadcast_to(code, (*features.shape[:-1], self.num_actions))
        return self.join(jnp.concatenate([features, code], axis=-1))[..., 0]


class DeterministicActor(nn.Module):
    """mu(s), squashed into the box of actions.

    Attributes:
      torso: observation -> features.
      low: of the box.
      high: of the box.
    """

    torso: nn.Module
    low: tuple[float, ...]
    high: tuple[float, ...]

    @nn.compact
    def __call__(self, obs: Array) -> Float[Array, "B A"]:
        """An action each, in the environment's units."""
        raw = linear(len(self.low), 0.01)(self.torso(obs))
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        return (high + low) / 2 + (high - low) / 2 * jnp.tanh(raw)


class SquashedGaussianActor(nn.Module):
    """A Gaussian squashed into the box of actions.

    Attributes:
      torso: observation -> features.
      low: of the box.
      high: of the box.
    """

    torso: nn.Module
    low: tuple[float, ...]
    high: tuple[float, ...]

    @nn.compact
    def __call__(self, obs: Array) -> TanhGaussian:
        """The distribution of actions, in the environment's units."""
        return TanhGaussianHead(self.low, self.high)(self.torso(obs))


class GaussianActor(nn.Module):
    """A Gaussian whose mean lies in the box of actions; samples may leave it.

    Attributes:
      torso: observation -> features.
      low: of the box.
      high: of the box.
      std: at first, in half ranges of the box.
    """

    torso: nn.Module
    low: tuple[float, ...]
    high: tuple[float, ...]
    std: float = 0.5

    @nn.compact
    def __call__(self, obs: Array) -> DiagonalGaussian:
        """The distribution of actions, in the environment's units; mean and deviation depend on the state."""
        raw_mean, raw_std = jnp.split(linear(2 * len(self.low), 0.01)(self.torso(obs)), 2, axis=-1)
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        half_range = (high - low) / 2
        return DiagonalGaussian(
            (high + low) / 2 + half_range * jnp.tanh(raw_mean), raw_std + jnp.log(self.std * half_range)
        )


class Critics(nn.Module):
    """Several independent Q(s, a) of continuous actions.

    Attributes:
      encoder: of each, [N, D] -> [N, D].
      low: of the box of actions, which the critics see as [-1, 1].
      high: of the box.
      count: how many.
    """

    encoder: nn.Module
    low: tuple[float, ...]
    high: tuple[float, ...]
    count: int

    def setup(self) -> None:
        """Names the submodules of the network."""
        self.bodies = [self.encoder.clone(parent=None) for _ in range(self.count)]
        self.heads = [linear(1, 1.0) for _ in range(self.count)]

    def __call__(self, obs: Array, action: Float[Array, "B A"], **options: bool) -> Float[Array, "C B"]:
        """Value of each critic, [C, B].

        Args:
          options: of the encoder's call, such as `train` of batch normalization.
        """
        low, high = jnp.asarray(self.low), jnp.asarray(self.high)
        unit = (2 * action - (high + low)) / (high - low)
        inputs = jnp.concatenate([obs.reshape(obs.shape[0], -1).astype(jnp.float32), unit], axis=-1)
        pairs = zip(self.heads, self.bodies, strict=True)
        return jnp.stack([head(encoder(inputs, **options)) for head, encoder in pairs])[..., 0]


def applied(network: nn.Module, method: str | None = None) -> Callable[..., Any]:
    """`(params, *inputs) -> outputs` of the network, or of one of its methods."""
    return lambda params, *inputs: network.apply({"params": params}, *inputs, method=method)


def default_value_encoder(env: Environment) -> nn.Module:
    """The convolution for MinAtar's planes, a ReLU MLP of 120 and 84 for the rest."""
    return MinAtarConv() if env.name.endswith("-MinAtar") else MLP((120, 84), nn.relu)


def make_value_encoder(env: Environment, encoder: nn.Module | None) -> ObsEncoder:
    """`encoder`, or the default, behind the repair of this environment's observations."""
    return ObsEncoder(encoder or default_value_encoder(env), env.obs_shape, env.num_states)
