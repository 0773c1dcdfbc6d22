"""Networks of two levels, the upper of which draws what the lower one acts by: options, and goals."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.networks.distributions import Categorical, Distribution
from rlhf_jax.rl.networks.networks import ROOT_2, CategoricalHead, GaussianHead, linear, make_encoder


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


@pytree_dataclass
class GoalCarry:
    """The last c goals of an environment and the latent states in which they were set, the newest first.

    Zeros stand for those before the episode began.
    """

    goals: Float[Array, "... c D"]
    states: Float[Array, "... c D"]


@pytree_dataclass
class ManagerOutputs:
    """The upper level in each state.

    Attributes:
      states: latent, in which goals are directions.
      goals: of length 1.
      values: of the environment's rewards.
    """

    states: Float[Array, "... D"]
    goals: Float[Array, "... D"]
    values: Float[Array, "..."]


class FeudalActorCritic(nn.Module):
    """FeUdal networks (Vezhnevets et al. 2017, section 3) without memory but for the goals.

    Percepts are shared; the manager sets a goal at every step, and the worker's policy is softmax(U w), U of
    the percepts and w a linear map, without bias, of the sum of the last c goals. Both levels' values share a
    body of their own, whose large gradients would otherwise be all that percepts learn from.

    Epsilon is a parameter that no gradient moves: whoever acts puts a number in its place.

    Attributes:
      torso: observations -> percepts of both levels.
      critic_torso: observations -> features of both levels' values.
      num_actions: A.
      horizon: c.
      goal_dim: D, of goals and latent states.
      embedding_dim: of w.
    """

    torso: nn.Module
    critic_torso: nn.Module
    num_actions: int
    horizon: int
    goal_dim: int
    embedding_dim: int

    def setup(self) -> None:
        """Both levels' layers; no random goals until told otherwise."""
        self.state_layer = linear(self.goal_dim, ROOT_2)
        self.goal_layer = linear(self.goal_dim, 1.0)
        self.manager_critic, self.critic_head = linear(1, 1.0), linear(1, 1.0)
        self.action_layer = linear(self.num_actions * self.embedding_dim, 0.1)
        self.goal_embedding = nn.Dense(self.embedding_dim, use_bias=False)
        self.epsilon = self.param("epsilon", nn.initializers.zeros, ())

    def initial_carry(self, count: int) -> GoalCarry:
        """Initial carry of `count` environments: no goals."""
        nothing = jnp.zeros((count, self.horizon, self.goal_dim))
        return GoalCarry(nothing, nothing)

    def draw(
        self, obs: Array, is_first: Bool[Array, " B"], carry: GoalCarry, key: PRNGKeyArray | None
    ) -> GoalCarry:
        """The carry with this step's goal, with probability epsilon any; without a key the manager's own."""
        states, goals = self._goals(self.torso(obs))
        if key is not None:
            any_key, goal_key = jax.random.split(key)
            anything = unit(jax.random.normal(goal_key, goals.shape))
            explore = jax.random.uniform(any_key, is_first.shape) < self.epsilon
            goals = jnp.where(explore[:, None], anything, goals)

        def pushed(old: Float[Array, "B c D"], new: Float[Array, "B D"]) -> Float[Array, "B c D"]:
            kept = jnp.where(is_first[:, None, None], 0, old[:, :-1])
            return jnp.concatenate([new[:, None], kept], axis=1)

        return GoalCarry(pushed(carry.goals, goals), pushed(carry.states, states))

    def act(self, obs: Array, is_first: Bool[Array, " B"], carry: GoalCarry) -> tuple[Categorical, GoalCarry]:
        """The distribution of actions under the goals of [B] environments, which they keep."""
        del is_first
        return self._policy(self.torso(obs), carry.goals), carry

    def __call__(
        self, obs: Array, is_first: Bool[Array, "B T"], carry: GoalCarry
    ) -> tuple[Categorical, Float[Array, "B T"], ManagerOutputs]:
        """Policies, the worker's values, and the manager, along [B, T] trajectories.

        Args:
          carry: [B, T] goals that each action was taken with; or those of one step, for all.
        """
        del is_first
        percepts, features = self.torso(obs), self.critic_torso(obs)
        recorded = carry.goals if carry.goals.ndim == 4 else carry.goals[:, None]
        states, goals = self._goals(percepts)
        manager = ManagerOutputs(states, goals, self.manager_critic(features)[..., 0])
        return self._policy(percepts, recorded), self.critic_head(features)[..., 0], manager

    def _goals(self, percepts: Float[Array, "... P"]) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
        """Latent states, and the manager's goals in them."""
        states = nn.relu(self.state_layer(percepts))
        return states, unit(self.goal_layer(states))

    def _policy(self, percepts: Float[Array, "... P"], goals: Float[Array, "... c D"]) -> Categorical:
        told = self.goal_embedding(jax.lax.stop_gradient(jnp.sum(goals, axis=-2)))
        embeddings = self.action_layer(percepts).reshape(*percepts.shape[:-1], self.num_actions, -1)
        return Categorical(jnp.sum(embeddings * told[..., None, :], axis=-1))


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """x at length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


DrawsCarry: TypeAlias = OptionActorCritic | FeudalActorCritic
"""Networks that draw a part of their memory before they act (`draw`); it is recorded with each action."""
