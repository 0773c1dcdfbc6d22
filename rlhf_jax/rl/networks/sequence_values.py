"""Networks of action values along trajectories, with and without a memory, and how they explore."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Bool, Float
from rlhf_jax.rl.networks.distributions import Categorical
from rlhf_jax.rl.networks.networks import Carry, next_carry, unroll
from rlhf_jax.rl.networks.q_networks import ActionValues


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


class Features(nn.Module):
    """Identity, for a head whose inputs are features already."""

    def __call__(self, features: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The same."""
        return features


class RecurrentActionValues(nn.Module):
    """Q of every action along trajectories, with a GRU (Cho et al. 2014) between features and values.

    Attributes:
      torso: observations -> features.
      num_actions: A.
      width: of the GRU; 0 for no memory.
      dueling: a value of the state and advantages of mean 0.
    """

    torso: nn.Module
    num_actions: int
    width: int = 64
    dueling: bool = True

    def setup(self) -> None:
        """The GRU, and the values' own layers."""
        self.cell = nn.GRUCell(self.width) if self.width else None
        self.head = ActionValues(Features(), self.num_actions, dueling=self.dueling)

    def initial_carry(self, count: int) -> Carry:
        """Initial carry of `count` environments: zeros."""
        return jnp.zeros((count, self.width))

    def act(self, obs: Array, is_first: Bool[Array, " B"], carry: Carry) -> tuple[Float[Array, "B A"], Carry]:
        """Values in [B] environments, and what is remembered next."""
        features = self.torso(obs)
        if self.cell is not None:
            features = carry = next_carry(self.cell, carry, is_first, features)
        return self.head(features), carry

    def __call__(
        self, obs: Array, is_first: Bool[Array, "B T"], carry: Carry
    ) -> tuple[Float[Array, "B T A"], Carry]:
        """Values along [B, T] trajectories, which began with `carry`, and what is remembered at their end."""
        hidden = self._hidden(obs, is_first, carry)
        return self.head(hidden), carry if self.cell is None else hidden[:, -1]

    def both(
        self, obs: Array, next_obs: Array, is_first: Bool[Array, "B T"], carry: Carry
    ) -> tuple[Float[Array, "B T A"], Float[Array, "B T A"]]:
        """Values of `obs` and of `next_obs`, each of which follows the obs of its place."""
        hidden, after = self._hidden(obs, is_first, carry), self.torso(next_obs)
        if self.cell is not None:
            after, _ = self.cell(hidden, after)
        return self.head(hidden), self.head(after)

    def _hidden(self, obs: Array, is_first: Bool[Array, "B T"], carry: Carry) -> Float[Array, "B T D"]:
        features = self.torso(obs)
        return features if self.cell is None else unroll(self.cell, carry, is_first, features)
