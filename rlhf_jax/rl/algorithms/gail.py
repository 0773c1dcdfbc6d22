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
from rlhf_jax.rl.loops.replay import sample_uniform
from rlhf_jax.rl.loops.rollout import Experience, Inputs, make_logprob_fn
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
    """Hyperparameters of GAIL and AIRL that a sweep may vary (array leaves).

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
    init_discriminator, logit_fn = make_discriminator(env, config.encoder)
    discriminate = make_update(logit_fn, make_optimizer(config.optimizer))

    def learn(
        learner: TrainState, hyper: Hyper, log: Transition, own: PolicySteps, logp_fn: StepLogpFn
    ) -> tuple[TrainState, Metrics]:
        del logp_fn
        pairs = ImitationBatch(log.obs, log.action, own.seen.obs, own.seen.action)
        return discriminate(learner, hyper, pairs)

    def reward_fn(params: Params, hyper: Hyper, own: PolicySteps) -> Float[Array, " N"]:
        del hyper
        return imitation_reward(logit_fn(params, own.seen.obs, own.seen.action))

    return make_imitation_run(config, env, env_params, data, init_discriminator, learn, reward_fn)


@pytree_dataclass
class PolicySteps:
    """Steps [N] and what the policy makes of them.

    Attributes:
      logp: log-probability that it gives, or gave, the action.
    """

    seen: Transition
    logp: Float[Array, " N"]


StepLogpFn = Callable[[Transition], Float[Array, " N"]]
"""Steps, each on its own -> log-probability of their actions under the policy of now, which has no memory."""


def make_imitation_run(
    config: Any,
    env: Environment,
    env_params: Any,
    data: Transition,
    init_discriminator: Callable[[PRNGKeyArray], Params],
    discriminate: Callable[
        [TrainState, Any, Transition, PolicySteps, StepLogpFn], tuple[TrainState, Metrics]
    ],
    reward_fn: Callable[[Params, Any, PolicySteps], Float[Array, " N"]],
) -> Run:
    """A run of PPO on the reward of a discriminator, the two in turn.

    Args:
      config: with the fields of `Config`.
      discriminate: (discriminator, hyper, steps of the log, the policy's, log-probabilities) ->
        (discriminator, metrics).
      reward_fn: (parameters of the discriminator, hyper, the policy's steps) -> rewards.

    Raises:
      UserError: observations are to be normalised, or the log is empty.
    """
    if config.policy.rollout.normalize_obs:
        raise UserError("policy.rollout.normalize_obs=true would not fit the log's: leave it false.")
    network, learning = ppo.make_learning(config.policy, env)
    tx, log, logprob_fn = make_optimizer(config.optimizer), offline.as_replay(data), make_logprob_fn(network)

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Any) -> State:
        key, policy_key, discriminator_key = jax.random.split(key, 3)
        policy = learning.init_fn(params, policy_key, hyper.policy)
        return init(policy, init_discriminator(discriminator_key), tx, key)

    def learn(state: State, hyper: Any, experience: Experience) -> tuple[State, Metrics]:
        key, sample_key = jax.random.split(state.key)
        steps = PolicySteps(experience.transition, experience.logp)
        own = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)

        def logp_fn(seen: Transition) -> Float[Array, " N"]:
            inputs = Inputs(seen.obs, seen.action, jnp.zeros(seen.reward.shape, bool), ())
            return logprob_fn(state.policy.learner.params, inputs).logp

        def step(learner: TrainState, key: PRNGKeyArray) -> tuple[TrainState, Metrics]:
            log_key, own_key = jax.random.split(key)
            chosen = jax.random.randint(own_key, (config.batch_size,), 0, len(own.logp))
            part = jax.tree.map(lambda x: x[chosen], own)
            indices = sample_uniform(log, log_key, batch_size=config.batch_size)
            of_log = jax.tree.map(lambda x: x[indices, 0], log.data)
            return discriminate(learner, hyper, of_log, part, logp_fn)

        keys = jax.random.split(sample_key, config.discriminator_steps)
        discriminator, told = jax.lax.scan(step, state.discriminator, keys)
        rewards = reward_fn(discriminator.params, hyper, own).reshape(experience.logp.shape)
        paid = dataclasses.replace(
            experience, transition=dataclasses.replace(experience.transition, reward=rewards)
        )
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
