"""Networks of several agents: one for all or one each, critics of the whole, and mixers of values."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Bool, Float
from rlhf_jax.rl.envs.joint import JointObs
from rlhf_jax.rl.networks.distributions import Categorical, Distribution
from rlhf_jax.rl.networks.networks import Carry, linear

UNAVAILABLE = -1e10
"""The logit of an action that cannot be taken: its probability is 0 in float32, and 0 times it is finite."""


class Headed(nn.Module):
    """A head behind an encoder."""

    encoder: nn.Module
    head: nn.Module

    def __call__(self, inputs: Float[Array, "R D"]) -> Any:
        """Outputs of the head."""
        return self.head(self.encoder(inputs))


class PerAgent(nn.Module):
    """A network applied to each of N agents' inputs, of which each row is a case of its own.

    Attributes:
      network: [R, D] -> outputs [R, ...].
      shared: one set of parameters for all agents; False: each has its own.
      ids: agents that share parameters are told who they are, by a one-hot code behind their input.
    """

    network: nn.Module
    shared: bool = True
    ids: bool = True

    def __call__(self, inputs: Float[Array, "... N D"]) -> Any:
        """Outputs [..., N, ...]."""
        leading, agents = inputs.shape[:-1], inputs.shape[-2]
        if not self.shared:
            each = nn.vmap(
                lambda network, rows: network(rows),
                in_axes=1,
                out_axes=1,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            outputs = each(self.network, inputs.reshape(-1, agents, inputs.shape[-1]))
            return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[2:]), outputs)
        if self.ids:
            codes = jnp.broadcast_to(jnp.eye(agents, dtype=inputs.dtype), (*leading, agents))
            inputs = jnp.concatenate([inputs, codes], axis=-1)
        outputs = self.network(inputs.reshape(-1, inputs.shape[-1]))
        return jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), outputs)


def to_each_agent(state: Float[Array, "... S"], agents: int) -> Float[Array, "... N S"]:
    """The state of the world, for each agent."""
    return jnp.broadcast_to(state[..., None, :], (*state.shape[:-1], agents, state.shape[-1]))


def mask_logits(
    logits: Float[Array, "... A"], available: Bool[Array, "... A"] | None
) -> Float[Array, "... A"]:
    """Logits (or values) of which those of actions that cannot be taken are never the highest."""
    return logits if available is None else jnp.where(available, logits, UNAVAILABLE)


class JointActorCritic(nn.Module):
    """A policy and a value for each of several agents, without memory.

    Attributes:
      actor: what each sees -> distribution of its actions.
      critic: what each sees, or the state of the world, -> value [..., N, 1].
      central: the critic sees the state of the world.
    """

    actor: PerAgent
    critic: PerAgent
    central: bool

    def initial_carry(self, count: int) -> Carry:
        """Initial carry of `count` environments: empty."""
        del count
        return ()

    def act(self, obs: JointObs, is_first: Bool[Array, "..."], carry: Carry) -> tuple[Distribution, Carry]:
        """The distributions of actions [..., N], and what agents remember next: nothing."""
        del is_first
        return self._policy(obs), carry

    def __call__(
        self, obs: JointObs, is_first: Bool[Array, "..."], carry: Carry
    ) -> tuple[Distribution, Float[Array, "... N"]]:
        """Distributions and values of all agents."""
        del is_first, carry
        return self._policy(obs), self._value(obs)

    def next_value(
        self, obs: JointObs, next_obs: JointObs, is_first: Bool[Array, "..."], carry: Carry
    ) -> Float[Array, "... N"]:
        """Values of `next_obs`."""
        del obs, is_first, carry
        return self._value(next_obs)

    def _policy(self, obs: JointObs) -> Distribution:
        distribution = self.actor(obs.own)
        if isinstance(distribution, Categorical):
            return Categorical(mask_logits(distribution.logits, obs.available))
        return distribution

    def _value(self, obs: JointObs) -> Float[Array, "... N"]:
        seen = to_each_agent(obs.state, obs.own.shape[-2]) if self.central else obs.own
        return self.critic(seen)[..., 0]


class SumMixer(nn.Module):
    """Sum of the agents' values: Q_tot = sum_i Q_i (VDN, Sunehag et al. 2018)."""

    def __call__(self, values: Float[Array, "R N"], state: Float[Array, "R S"]) -> Float[Array, " R"]:
        """The joint value; the state does not matter."""
        del state
        return jnp.sum(values, axis=-1)


class MonotonicMixer(nn.Module):
    """Joint value that never falls when an agent's rises (QMIX, Rashid et al. 2018, eq. 5).

        Q_tot = |w_2(s)| elu(|W_1(s)| q + b_1(s)) + b_2(s)

    Weights and biases come from the state by hypernetworks: single linear layers, and for b_2 two with ReLU.

    Attributes:
      width: of the hidden layer.
      scale: of the hypernetworks' orthogonal weights at first. At 1 an agent's value counts many times in the
        joint one where states are large, as in MPE, and the overestimation of targets runs away.
    """

    width: int = 32
    scale: float = 0.1

    @nn.compact
    def __call__(self, values: Float[Array, "R N"], state: Float[Array, "R S"]) -> Float[Array, " R"]:
        """The joint value of values and state."""
        agents = values.shape[-1]
        first = jnp.abs(linear(agents * self.width, self.scale, "first_weights")(state))
        bias = linear(self.width, self.scale, "first_bias")(state)
        second = jnp.abs(linear(self.width, self.scale, "second_weights")(state))
        last = linear(1, self.scale, "last_bias")(
            nn.relu(linear(self.width, self.scale, "last_hidden")(state))
        )
        hidden = jnp.einsum("rn,rnw->rw", values, first.reshape(-1, agents, self.width)) + bias
        return jnp.sum(nn.elu(hidden) * second, axis=-1) + last[..., 0]


class JointValues(nn.Module):
    """Values of each agent's actions, and the mixer that makes one of those taken.

    Attributes:
      agents: what each sees -> values of its actions.
      mixer: (values [R, N], state [R, S]) -> joint value [R].
    """

    agents: PerAgent
    mixer: nn.Module

    def every(self, obs: JointObs) -> Float[Array, "R N A"]:
        """Values of every action of every agent; of those it cannot take, the lowest there are."""
        return mask_logits(self.agents(obs.own), obs.available)

    def mix(self, values: Float[Array, "R N"], obs: JointObs) -> Float[Array, " R"]:
        """The joint value of values of one action each."""
        return self.mixer(values, obs.state)

    def __call__(self, obs: JointObs) -> Float[Array, " R"]:
        """The joint value of the best actions."""
        return self.mix(jnp.max(self.every(obs), axis=-1), obs)
