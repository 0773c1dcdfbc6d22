"""Adversarial inverse reinforcement learning (Fu et al. 2018): PPO on a reward that is told from a log.

Beside GAIL the discriminator has a form from which a reward is read: what it knows of the policy is taken
out. The environment is stepped, but its reward is not looked at.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, TrainState, apply_gradients, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.reward import process_reward_loss
from rlhf_jax.rl.algorithms import ppo
from rlhf_jax.rl.algorithms.gail import (
    Hyper,
    PolicySteps,
    State,
    StepLogpFn,
    default_hyper,
    init,
    make_discriminator,
    make_imitation_run,
)
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import MLP, linear, make_encoder
from rlhf_jax.rl.networks.q_networks import applied

RewardFn = Callable[[Params, Transition], Float[Array, " N"]]
"""(params, steps) -> a number each."""

__all__ = ["Config", "Hyper", "State", "default_hyper", "init", "make_run", "make_train", "make_update"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      policy: PPO's, with the length of the run; observations may not be normalised, as the log's are not.
      encoder: of the reward, and of its shaping.
      optimizer: of the discriminator.
      discriminator_steps: in each of PPO's updates.
      batch_size: steps of the log in each, and as many of the policy's.
      state_only: the reward looks at the state, not at the action, so that it may hold under other dynamics.
    """

    policy: ppo.Config = ppo.Config()
    encoder: nn.Module = dataclasses.field(default_factory=MLP)
    optimizer: OptimizerConfig = OptimizerConfig(b1=0.5, b2=0.999)
    discriminator_steps: int = 1
    batch_size: int = 256
    state_only: bool = False


class StateValue(nn.Module):
    """A number for each state.

    Attributes:
      torso: observation -> features.
    """

    torso: nn.Module

    @nn.compact
    def __call__(self, obs: Array) -> Float[Array, " N"]:
        """The numbers."""
        return linear(1, 1.0)(self.torso(obs))[..., 0]


@pytree_dataclass
class RewardParams:
    """Parameters of the discriminator.

    Attributes:
      reward: of g, the reward that is sought.
      shaping: of h, the potential that explains away what comes later.
    """

    reward: Params
    shaping: Params


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """The discriminator's functions.

    Attributes:
      init_fn: key -> `RewardParams`.
      reward_fn: (params of g, steps) -> g.
      potential_fn: (params of h, obs) -> h.
    """

    init_fn: Callable[[PRNGKeyArray], RewardParams]
    reward_fn: RewardFn
    potential_fn: Callable[[Params, Array], Float[Array, " N"]]


def make_reward_model(config: Config, env: Environment) -> RewardModel:
    """g(s), or g(s, a) unless `config.state_only`, and h(s)."""
    network = StateValue(make_encoder(env, config.encoder))
    potential_fn = applied(network)
    init_pair, pair_fn = make_discriminator(env, config.encoder)

    def init_state(key: PRNGKeyArray) -> Params:
        return network.init(key, offline.no_observation(env))["params"]

    def init_fn(key: PRNGKeyArray) -> RewardParams:
        reward_key, shaping_key = jax.random.split(key)
        init_reward = init_state if config.state_only else init_pair
        return RewardParams(init_reward(reward_key), init_state(shaping_key))

    def reward_fn(params: Params, seen: Transition) -> Float[Array, " N"]:
        if config.state_only:
            return potential_fn(params, seen.obs)
        return pair_fn(params, seen.obs, seen.action)

    return RewardModel(init_fn, reward_fn, potential_fn)


def shaped_reward(
    model: RewardModel, params: RewardParams, seen: Transition, *, gamma: Scalar
) -> Float[Array, " N"]:
    """The shaped reward f(s, a, s') = g + gamma h(s') - h(s)  (Fu et al. 2018, eq. 4).

    h of a state in which the episode has terminated is 0.
    """
    before, after = (model.potential_fn(params.shaping, obs) for obs in (seen.obs, seen.next_obs))
    return model.reward_fn(params.reward, seen) + seen.discounts(gamma) * after - before


def make_update(
    model: RewardModel, tx: optax.GradientTransformation
) -> Callable[[TrainState, Hyper, PolicySteps, PolicySteps], tuple[TrainState, Metrics]]:
    """`update(discriminator, hyper, log, own) -> (discriminator, metrics)`; the policy's is PPO's.

        loss = -log D(log's step) - log(1 - D(policy's step)),  D = exp(f) / (exp(f) + pi(a | s))

    averaged over both kinds: the binary cross-entropy of the logits f - log pi, with labels 1 and 0.
    """

    def update(
        learner: TrainState, hyper: Hyper, log: PolicySteps, own: PolicySteps
    ) -> tuple[TrainState, Metrics]:
        steps = jax.tree.map(lambda *parts: jnp.concatenate(parts), log, own)
        labels = jnp.arange(len(steps.logp)) < len(log.logp)

        def loss_fn(params: RewardParams) -> tuple[Float[Array, ""], Metrics]:
            logits = shaped_reward(model, params, steps.seen, gamma=hyper.gamma) - steps.logp
            mask = jnp.ones(logits.shape, bool)[None]
            return process_reward_loss(logits[None], labels[None].astype(logits.dtype), mask)

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learner.params)
        learner, _ = apply_gradients(
            learner, gradients, tx, learning_rate=hyper.discriminator_learning_rate, loss=loss
        )
        return learner, {f"discriminator_{name}": x for name, x in metrics.items()}

    return update


def make_run(config: Config, env: Environment, env_params: Any, data: Transition) -> Run:
    """A run as `init` and `step`; the policy is paid log D - log(1 - D) = f - log pi.

    Raises:
      UserError: observations are to be normalised, the policy has a memory, or the log is empty.
    """
    if config.policy.network.memory_width:
        raise UserError("AIRL: policy.network.memory_width: steps of a log are taken one by one: leave it 0.")
    model = make_reward_model(config, env)
    update = make_update(model, make_optimizer(config.optimizer))

    def discriminate(
        learner: TrainState, hyper: Hyper, log: Transition, own: PolicySteps, logp_fn: StepLogpFn
    ) -> tuple[TrainState, Metrics]:
        return update(learner, hyper, PolicySteps(log, logp_fn(log)), own)

    def reward_fn(params: RewardParams, hyper: Hyper, own: PolicySteps) -> Float[Array, " N"]:
        return shaped_reward(model, params, own.seen, gamma=hyper.gamma) - own.logp

    return make_imitation_run(config, env, env_params, data, model.init_fn, discriminate, reward_fn)


def make_train(config: Config, env: Environment, env_params: Any, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params, data))
