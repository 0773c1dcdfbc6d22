"""A learned model in a latent space: representation, dynamics and prediction."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Int
from rlhf_jax.rl.networks.networks import MLP, linear


def unit_range(latent: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Latent states brought to [0, 1], each by its least and greatest entry (Schrittwieser et al. 2020)."""
    low, high = jnp.min(latent, axis=-1, keepdims=True), jnp.max(latent, axis=-1, keepdims=True)
    return (latent - low) / jnp.maximum(high - low, 1e-5)


class LatentModel(nn.Module):
    """MuZero's three functions, as dense layers.

    Attributes:
      torso: observations -> features.
      num_actions: A.
      width: of latent states, and of the layer in each function.
    """

    torso: nn.Module
    num_actions: int
    width: int = 64

    def setup(self) -> None:
        """The layers of the three functions."""
        self.embedding = linear(self.width, 1.0)
        self.transition = MLP((self.width,), nn.relu, output=self.width)
        self.reward = MLP((self.width,), nn.relu, output=1, output_scale=0.01)
        self.policy = MLP((self.width,), nn.relu, output=self.num_actions, output_scale=0.01)
        self.value = MLP((self.width,), nn.relu, output=1, output_scale=0.01)

    def represent(self, obs: Array) -> Float[Array, "N D"]:
        """Latent states of observations."""
        return unit_range(self.embedding(self.torso(obs)))

    def step(
        self, latent: Float[Array, "N D"], action: Int[Array, " N"]
    ) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
        """Latent states behind an action, and its rewards."""
        inputs = jnp.concatenate([latent, jax.nn.one_hot(action, self.num_actions)], axis=-1)
        return unit_range(latent + self.transition(inputs)), self.reward(inputs)[:, 0]

    def predict(self, latent: Float[Array, "N D"]) -> tuple[Float[Array, "N A"], Float[Array, " N"]]:
        """Policy logits and values of latent states."""
        return self.policy(latent), self.value(latent)[:, 0]

    def __call__(self, obs: Array, action: Int[Array, " N"]) -> tuple[Array, Array, Array]:
        """Rewards of actions, and logits and values behind them: all layers once."""
        latent, reward = self.step(self.represent(obs), action)
        return reward, *self.predict(latent)
