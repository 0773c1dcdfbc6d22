"""Networks of two levels, the upper of which draws by chance what the lower one acts by: options."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.networks.distributions import Distribution
from rlhf_jax.rl.networks.networks import CategoricalHead, GaussianHead, linear, make_encoder


@pytree_dataclass
class OptionCarry:
    """The option that an environment follows.

    Attributes:
      option: which.
      begun: it was chosen at this step, the one before having ended.
    """

    option: Int[Array, "..."]
    begun: Bool[Array, "..."]


@pytree_dataclass
class OptionOutputs:
    """All that is learned of O options in each state.

    Attributes:
      policies: of each option; parameters are [..., O, A].
      values: Q of state and option.
      terminations: chance that each ends on arrival here.
    """

    policies: Distribution
    values: Float[Array, "... O"]
    terminations: Float[Array, "... O"]


class OptionActorCritic(nn.Module):
    """Options (Bacon et al. 2017): a policy, an end and a value each; the choice of one is epsilon-greedy.

    Epsilon is a parameter that no gradient moves: whoever acts puts a number in its place.

    Attributes:
      actor_torso: observations -> features of policies and ends.
      actor_head: features -> distribution with the parameters of all options beside each other.
      num_options: O.
      critic_torso: observations -> features of the values; None where they share the actor's.
    """

    actor_torso: nn.Module
    actor_head: nn.Module
    num_options: int
    critic_torso: nn.Module | None = None

    def setup(self) -> None:
        """The layers of values and ends; greedy until told otherwise."""
        self.critic_head = linear(self.num_options, 1.0)
        self.termination_head = linear(self.num_options, 0.01)
        self.epsilon = self.param("epsilon", nn.initializers.zeros, ())

    def initial_carry(self, count: int) -> OptionCarry:
        """Initial carry of `count` environments: any option, as one is chosen where an episode begins."""
        return OptionCarry(jnp.zeros(count, jnp.int32), jnp.zeros(count, bool))

    def draw(
        self, obs: Array, is_first: Bool[Array, " B"], carry: OptionCarry, key: PRNGKeyArray | None
    ) -> OptionCarry:
        """The same option, or another where it ends; without a key it ends where that is the likelier."""
        outputs = self.outputs(obs)
        ending = of_option(outputs.terminations, carry.option)
        if key is None:
            begun, chosen = is_first | (ending > 0.5), jnp.argmax(outputs.values, axis=-1)
        else:
            end_key, option_key = jax.random.split(key)
            begun = is_first | jax.random.bernoulli(end_key, ending)
            chances = option_chances(outputs.values, epsilon=self.epsilon)
            chosen = jax.random.categorical(option_key, jnp.log(chances))
        return OptionCarry(jnp.where(begun, chosen, carry.option), begun)

    def act(
        self, obs: Array, is_first: Bool[Array, " B"], carry: OptionCarry
    ) -> tuple[Distribution, OptionCarry]:
        """The distribution of actions under the options of [B] environments, which they keep."""
        del is_first
        return policy_of(self._policies(self.actor_torso(obs)), carry.option), carry

    def __call__(self, obs: Array, is_first: Bool[Array, "B T"], carry: OptionCarry) -> OptionOutputs:
        """All that is learned of each option along [B, T] trajectories."""
        del is_first, carry
        return self.outputs(obs)

    def outputs(self, obs: Array) -> OptionOutputs:
        """The same for observations with any leading axes."""
        features = self.actor_torso(obs)
        ends = nn.sigmoid(self.termination_head(features))
        values = self.critic_head(self.critic_torso(obs) if self.critic_torso else features)
        return OptionOutputs(self._policies(features), values, ends)

    def _policies(self, features: Float[Array, "... D"]) -> Distribution:
        joint = self.actor_head(features)
        return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], self.num_options, -1), joint)


def of_option(numbers: Float[Array, "... O"], option: Int[Array, "..."]) -> Float[Array, "..."]:
    """The number of the option in each place."""
    # A product with a one-hot code: its gradient is no scatter, which CPUs and TPUs are slow at.
    return jnp.sum(numbers * jax.nn.one_hot(option, numbers.shape[-1]), axis=-1)


def policy_of(policies: Distribution, option: Int[Array, "..."]) -> Distribution:
    """The policy of the option in each place."""
    return jax.tree.map(lambda x: of_option(jnp.swapaxes(x, -1, -2), option[..., None]), policies)


def option_chances(values: Float[Array, "... O"], *, epsilon: Scalar) -> Float[Array, "... O"]:
    """Chance of each option under the epsilon-greedy policy over options."""
    count = values.shape[-1]
    return epsilon / count + (1 - epsilon) * jax.nn.one_hot(jnp.argmax(values, axis=-1), count)


def make_option_actor_critic(
    env: Environment, encoder: nn.Module, *, num_options: int, shared: bool = False
) -> OptionActorCritic:
    """Options for this environment, whose torsos are two of `encoder`, or one shared."""
    if env.num_actions is not None:
        head: nn.Module = CategoricalHead(num_options * env.num_actions)
    else:
        head = GaussianHead(num_options * int(np.prod(env.action_shape)))
    critic = None if shared else make_encoder(env, encoder)
    return OptionActorCritic(make_encoder(env, encoder), head, num_options, critic)


DrawsCarry: TypeAlias = OptionActorCritic
"""Networks that draw a part of their memory before they act (`draw`); it is recorded with each action."""
