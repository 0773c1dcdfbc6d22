"""Soft actor-critic with a learned temperature (Haarnoja et al. 2018b, "Algorithms and Applications")."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.continuous import (
    Box,
    CriticFn,
    box_of,
    critic_fns,
    critic_step,
    default_encoder,
    make_encoder,
    policy_step,
)
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import TanhGaussian
from rlhf_jax.rl.networks.q_networks import SquashedGaussianActor, applied

ActorFn = Callable[[Params, Array], TanhGaussian]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: of actor, critics and temperature: Adam behind gradient clipping.
      encoder: of actor and critics.
      num_critics: how many; the target is the least of them.
      learn_temperature: move the temperature so that the entropy stays near `Hyper.target_entropy`.
    """

    run: RunConfig = RunConfig(total_steps=20_000, train_every=1, capacity=20_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    num_critics: int = 2
    learn_temperature: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of SAC that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the critics and the temperature.
      actor_learning_rate: of the actor.
      gamma: discount per step.
      tau: how far target networks move at a time.
      temperature: units of reward for one nat of entropy; where a learned one starts.
      target_entropy: in nats per dimension, for actions scaled to [-1, 1].
    """

    learning_rate: Scalar = 1e-3
    actor_learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    tau: Scalar = 0.005
    temperature: Scalar = 1.0
    target_entropy: Scalar = -1.0


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`.

    Attributes:
      temperature: its params are the temperature's logarithm.
    """

    actor: TrainState
    critics: TrainState
    temperature: TrainState
    target_critics: Params
    key: PRNGKeyArray


def init(
    actor: Params, critics: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, hyper: Hyper
) -> State:
    """The state at step 0; target networks are copies."""
    log_temperature = jnp.log(jnp.asarray(hyper.temperature, jnp.float32))
    return State(
        actor=init_train_state(actor, tx),
        critics=init_train_state(critics, tx),
        temperature=init_train_state(log_temperature, tx),
        target_critics=critics,
        key=key,
    )


def make_update(
    config: Config, actor_fn: ActorFn, critic_fn: CriticFn, box: Box, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Haarnoja et al. 2018b, Algorithm 1).

    target      = r + discount (min_i Q'_i(s', a') - temperature log pi(a' | s')),  a' ~ pi
    actor       : temperature log pi(a | s) - min_i Q_i(s, a),  a ~ pi
    temperature : -log(temperature) (log pi(a | s) + target entropy)
    """

    def improve(state: State, hyper: Hyper, batch: Batch, key: PRNGKeyArray):
        temperature = jnp.exp(state.temperature.params)

        def loss_fn(params: Params) -> tuple[Array, Array]:
            action, logp = actor_fn(params, batch.obs).sample_and_logp(key)
            value = jnp.min(critic_fn(state.critics.params, batch.obs, action), axis=0)
            return jnp.mean(temperature * logp - value), jnp.mean(logp)

        return policy_step(state.actor, loss_fn, tx, learning_rate=hyper.actor_learning_rate)

    def adjust(state: State, hyper: Hyper, logp: Float[Array, ""]) -> TrainState:
        # Densities are per unit of action: a wider box has more entropy for the same shape.
        goal = len(box.low) * hyper.target_entropy + jnp.sum(jnp.log(box.half_range))

        def loss_fn(log_temperature: Array) -> tuple[Array, None]:
            return -log_temperature * jax.lax.stop_gradient(logp + goal), None

        return policy_step(state.temperature, loss_fn, tx, learning_rate=hyper.learning_rate)[0]

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, next_key, actor_key = jax.random.split(state.key, 3)
        next_action, next_logp = actor_fn(state.actor.params, batch.next_obs).sample_and_logp(next_key)
        least = jnp.min(critic_fn(state.target_critics, batch.next_obs, next_action), axis=0)
        next_values = least - jnp.exp(state.temperature.params) * next_logp
        targets = batch.reward + batch.discount * next_values
        critics, metrics, errors = critic_step(
            state.critics, critic_fn, batch, targets, tx, learning_rate=hyper.learning_rate
        )
        state = dataclasses.replace(state, critics=critics, key=key)
        actor, actor_loss, logp = improve(state, hyper, batch, actor_key)
        metrics = {
            **metrics,
            "actor_loss": actor_loss,
            "entropy": -logp,
            "temperature": jnp.exp(state.temperature.params),
        }
        target = optax.incremental_update(critics.params, state.target_critics, hyper.tau)
        temperature = adjust(state, hyper, logp) if config.learn_temperature else state.temperature
        state = dataclasses.replace(state, actor=actor, temperature=temperature, target_critics=target)
        return state, metrics, errors

    return update


def make_actor(config: Config, env: Environment) -> SquashedGaussianActor:
    """Actor network for this environment."""
    box = box_of(env, "SAC")
    return SquashedGaussianActor(make_encoder(env, config.encoder), box.low, box.high)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    box, tx = box_of(env, "SAC"), make_optimizer(config.optimizer)
    actor = make_actor(config, env)
    actor_fn: ActorFn = applied(actor)
    init_critics, critic_fn = critic_fns(env, config.encoder, box, count=config.num_critics)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        actor_key, critic_key, key = jax.random.split(key, 3)
        params = actor.init(actor_key, jnp.zeros((1, *env.obs_shape)))["params"]
        return init(params, init_critics(critic_key), tx, key, hyper)

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> tuple[PRNGKeyArray, Array]:
        policy_key, uniform_key = jax.random.split(key)
        return jax.random.split(policy_key, shape), box.uniform(uniform_key, shape)

    def explore_fn(state: State, hyper: Hyper, obs: Array, noise: tuple[Any, Array], steps: Array) -> Array:
        del state, hyper, obs, steps
        return noise[1]

    def act_fn(state: State, hyper: Hyper, obs: Array, noise: tuple[Any, Array], steps: Array) -> Array:
        del hyper, steps
        return actor_fn(state.actor.params, obs).sample(noise[0][0])

    def policy_fn(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        distribution = actor_fn(state.actor.params, obs)
        return distribution.mode() if deterministic else distribution.sample(key)

    update = make_update(config, actor_fn, critic_fn, box, tx)
    algorithm = Algorithm(init_fn, noise_fn, explore_fn, act_fn, update, policy_fn)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
