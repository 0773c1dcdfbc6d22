"""Networks of action values along trajectories, with and without a memory, and how they explore."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Bool, Float
from rlhf_jax.rl.networks.distributions import Categorical
from rlhf_jax.rl.networks.networks import Carry


class EpsilonGreedy(nn.Module):
    """The best action, or with probability epsilon any.

    Epsilon is a parameter that no gradient moves: whoever acts puts a number in its place.

    Attributes:
      values: observations -> values of every action [..., A].
    """

    values: nn.Module

    def setup(self) -> None:
        """Greedy until told otherwise."""
        self.epsilon = self.param("epsilon", nn.initializers.zeros, ())

    def initial_carry(self, count: int) -> Carry:
        """Initial carry of `count` environments: empty."""
        del count
        return ()

    def act(self, obs: Array, is_first: Bool[Array, " B"], carry: Carry) -> tuple[Categorical, Carry]:
        """The distribution of actions in [B] environments, and what they remember next."""
        del is_first
        values = self.values(obs)
        count = values.shape[-1]
        greedy = jax.nn.one_hot(jnp.argmax(values, axis=-1), count)
        return Categorical(jnp.log(self.epsilon / count + (1 - self.epsilon) * greedy)), carry

    def __call__(self, obs: Array, is_first: Bool[Array, "B T"], carry: Carry) -> Float[Array, "B T A"]:
        """Values of every action along [B, T] trajectories."""
        del is_first, carry
        return self.values(obs)
