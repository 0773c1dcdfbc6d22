"""Generative adversarial imitation learning (Ho & Ermon 2016): PPO on the reward of a discriminator.

The discriminator tells state-action pairs of a log from the policy's own; the policy is paid for being taken
for the log. The environment is stepped, but its reward is not looked at.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.reward import process_reward_loss
from rlhf_jax.rl.algorithms import ppo
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline, on_policy
from rlhf_jax.rl.loops.off_policy import over_steps
from rlhf_jax.rl.loops.rollout import Experience
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import MLP

LogitFn = Callable[[Params, Array, Array], Float[Array, " N"]]
"""(params, obs, action) -> logit of the chance that a pair is the log's."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      policy: PPO's, with the length of the run; observations may not be normalised, as the log's are not.
      encoder: of the discriminator.
      optimizer: of the discriminator.
      discriminator_steps: in each of PPO's updates.
      batch_size: pairs of the log in each, and as many of the policy's.
    """

    policy: ppo.Config = ppo.Config()
    encoder: nn.Module = dataclasses.field(default_factory=MLP)
    optimizer: OptimizerConfig = OptimizerConfig(b1=0.5, b2=0.999)
    discriminator_steps: int = 4
    batch_size: int = 256


@pytree_dataclass
class Hyper:
    """Hyperparameters of GAIL that a sweep may vary (array leaves).

    Attributes:
      policy: PPO's.
      discriminator_learning_rate: of the discriminator.
    """

    policy: ppo.Hyper
    discriminator_learning_rate: Scalar = 3e-4

    @property
    def gamma(self) -> Scalar:
        """Discount per step."""
        return self.policy.gamma


@pytree_dataclass
class State:
    """The agent; the whole run's state is `on_policy.State`."""

    policy: ppo.State
    discriminator: TrainState
    key: PRNGKeyArray


@pytree_dataclass
class ImitationBatch:
    """State-action pairs of the log and of the policy, N of each: a batch of the discriminator.

    Attributes:
      obs: of the log.
      action: of the log.
      policy_obs: of the policy.
      policy_action: of the policy.
    """

    obs: Array
    action: Array
    policy_obs: Array
    policy_action: Array


def default_hyper() -> Hyper:
    """The numbers usual on CartPole, as float32 scalars."""
    return jax.tree.map(jnp.float32, Hyper(ppo.default_hyper()))


def init(
    policy: ppo.State, discriminator: Params, tx: optax.GradientTransformation, key: PRNGKeyArray
) -> State:
    """The state at step 0."""
    return State(policy, init_train_state(discriminator, tx), key)


def imitation_reward(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log(1 - D) = log(1 + exp(logit)), D being the chance of the log (Ho & Ermon 2016, Algorithm 1).

    The paper's D is the chance of the policy and -log D what it earns, which is the same. It is never
    negative: where episodes end early by mistake that helps, where they should end soon it harms.
    """
    return jax.nn.softplus(logits)


def make_update(
    logit_fn: LogitFn, tx: optax.GradientTransformation
) -> Callable[[TrainState, Hyper, ImitationBatch], tuple[TrainState, Metrics]]:
    """`update(discriminator, hyper, pairs) -> (discriminator, metrics)`; the policy's is PPO's.

        loss = -log D(log's pair) - log(1 - D(policy's pair))

    averaged over both kinds. It is the binary cross-entropy of `process_reward_loss`, with labels 1 and 0.
    """

    def update(learner: TrainState, hyper: Hyper, pairs: ImitationBatch) -> tuple[TrainState, Metrics]:
        obs = jnp.concatenate([pairs.obs, pairs.policy_obs])
        action = jnp.concatenate([pairs.action, pairs.policy_action])
        labels = jnp.arange(len(obs)) < len(pairs.obs)

        def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
            logits = logit_fn(params, obs, action)[None]
            mask = jnp.ones(logits.shape, bool)
            return process_reward_loss(logits, labels[None].astype(logits.dtype), mask)

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learner.params)
        learner, _ = apply_gradients(
            learner, gradients, tx, learning_rate=hyper.discriminator_learning_rate, loss=loss
        )
        return learner, {f"discriminator_{name}": x for name, x in metrics.items()}

    return update


def make_discriminator(env: Environment, encoder: nn.Module) -> tuple[Any, LogitFn]:
    """(init(key) -> params, logits) of one critic; actions are cut to the box, as the environment does."""
    init_critic, critic_fn = offline.make_critics(env, encoder, count=1)

    def logit_fn(params: Params, obs: Array, action: Array) -> Float[Array, " N"]:
        if not env.discrete:
            action = jnp.clip(action, jnp.asarray(env.action_low), jnp.asarray(env.action_high))
        return critic_fn(params, obs, action)[0]

    return init_critic, logit_fn


def make_run(config: Config, env: Environment, env_params: Any, data: Transition) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: observations are to be normalised, or the log is empty.
    """
    if config.policy.rollout.normalize_obs:
        raise UserError("GAIL: policy.rollout.normalize_obs=true would not fit the log's: leave it false.")
    network, learning = ppo.make_learning(config.policy, env)
    init_discriminator, logit_fn = make_discriminator(env, config.encoder)
    tx, log = make_optimizer(config.optimizer), offline.as_replay(data)
    discriminate = make_update(logit_fn, tx)

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        key, policy_key, discriminator_key = jax.random.split(key, 3)
        policy = learning.init_fn(params, policy_key, hyper.policy)
        return init(policy, init_discriminator(discriminator_key), tx, key)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        key, sample_key = jax.random.split(state.key)
        seen = experience.transition
        obs, action = (x.reshape(-1, *x.shape[2:]) for x in (seen.obs, seen.action))

        def step(learner: TrainState, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
            log_key, own_key = jax.random.split(key)
            batch = offline.sample(log, log_key, batch_size=config.batch_size, gamma=1.0)
            own = jax.random.randint(own_key, (config.batch_size,), 0, len(obs))
            return discriminate(
                learner, hyper, ImitationBatch(batch.obs, batch.action, obs[own], action[own])
            )

        keys = jax.random.split(sample_key, config.discriminator_steps)
        discriminator, told = jax.lax.scan(step, state.discriminator, keys)
        rewards = imitation_reward(logit_fn(discriminator.params, obs, action)).reshape(seen.reward.shape)
        paid = dataclasses.replace(experience, transition=dataclasses.replace(seen, reward=rewards))
        policy, metrics = learning.learn_fn(state.policy, hyper.policy, paid)
        metrics = {**metrics, **over_steps(told), "imitation_reward": jnp.mean(rewards)}
        return State(policy, discriminator, key), metrics

    return on_policy.make_run(
        network,
        env,
        env_params,
        config.policy.rollout,
        on_policy.Learning(init_agent, learn, lambda state: state.policy.learner.params),
        total_steps=config.policy.total_steps,
    )


def make_train(config: Config, env: Environment, env_params: Any, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params, data))
