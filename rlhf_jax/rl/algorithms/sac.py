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
    towards,
)
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import DiagonalGaussian, TanhGaussian
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

    target = r + discount (min_i Q'_i(s', a') - temperature log pi(a' | s')),  a' ~ pi
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, next_key, actor_key = jax.random.split(state.key, 3)
        next_action, next_logp = actor_fn(state.actor.params, batch.next_obs).sample_and_logp(next_key)
        next_values = critic_fn(state.target_critics, batch.next_obs, next_action)
        targets = soft_targets(state.temperature.params, batch, next_values, next_logp)
        critics, metrics, errors, _ = critic_step(
            state.critics,
            towards(critic_fn, batch, targets),
            batch.weight,
            tx,
            learning_rate=hyper.learning_rate,
        )
        state = dataclasses.replace(state, critics=critics, key=key)

        def value_fn(action: Array) -> Float[Array, "C N"]:
            return critic_fn(critics.params, batch.obs, action)

        actor, temperature, of_actor = improve_policy(
            config, state, hyper, batch.obs, actor_key, actor_fn, value_fn, box, tx
        )
        target = optax.incremental_update(critics.params, state.target_critics, hyper.tau)
        state = dataclasses.replace(state, actor=actor, temperature=temperature, target_critics=target)
        return state, {**metrics, **of_actor}, errors

    return update


def soft_targets(
    log_temperature: Float[Array, ""],
    batch: Batch,
    next_values: Float[Array, "C N"],
    next_logp: Float[Array, " N"],
) -> Float[Array, " N"]:
    """Soft Bellman targets r + discount (min_i Q_i(s', a') - temperature log pi(a' | s'))."""
    values = jnp.min(next_values, axis=0) - jnp.exp(log_temperature) * next_logp
    return batch.reward + batch.discount * values


def improve_policy(
    config: Any,
    state: Any,
    hyper: Any,
    obs: Array,
    key: PRNGKeyArray,
    actor_fn: ActorFn,
    value_fn: Callable[[Array], Float[Array, "C N"]],
    box: Box,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, TrainState, Metrics]:
    """One step of the actor, and one of the temperature: (actor, temperature, metrics).

        actor       : temperature log pi(a | s) - min_i Q_i(s, a),  a ~ pi
        temperature : -log(temperature) (log pi(a | s) + target entropy)

    Args:
      config: with `learn_temperature`.
      state: with `actor` and `temperature`.
      hyper: with both learning rates and the target entropy.
      value_fn: actions at `obs` -> a value from each critic.
    """
    temperature = jnp.exp(state.temperature.params)

    def actor_loss_fn(params: Params) -> tuple[Array, Array]:
        action, logp = actor_fn(params, obs).sample_and_logp(key)
        return jnp.mean(temperature * logp - jnp.min(value_fn(action), axis=0)), jnp.mean(logp)

    # Densities are per unit of action: a wider box has more entropy for the same shape.
    goal = len(box.low) * hyper.target_entropy + jnp.sum(jnp.log(box.half_range))
    actor, loss, logp = policy_step(state.actor, actor_loss_fn, tx, learning_rate=hyper.actor_learning_rate)

    def temperature_loss_fn(log_temperature: Array) -> tuple[Array, None]:
        return -log_temperature * jax.lax.stop_gradient(logp + goal), None

    learner = state.temperature
    if config.learn_temperature:
        learner = policy_step(learner, temperature_loss_fn, tx, learning_rate=hyper.learning_rate)[0]
    return actor, learner, {"actor_loss": loss, "entropy": -logp, "temperature": temperature}


def make_actor(config: Any, env: Environment) -> SquashedGaussianActor:
    """Actor network for this environment, with `config.encoder`."""
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

    update = make_update(config, actor_fn, critic_fn, box, tx)
    algorithm = stochastic_algorithm(box, actor_fn, init_fn, update)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def stochastic_algorithm(
    box: Box,
    actor_fn: Callable[[Params, Array], TanhGaussian | DiagonalGaussian],
    init_fn: Callable[[PRNGKeyArray, Any], Any],
    update_fn: Callable[..., Any],
) -> Algorithm:
    """Exploration by the policy's own chance around `update_fn`: uniform at first, then sampled.

    The agent's state must have `actor`.
    """

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> tuple[PRNGKeyArray, Array]:
        policy_key, uniform_key = jax.random.split(key)
        return jax.random.split(policy_key, shape), box.uniform(uniform_key, shape)

    def explore_fn(state: Any, hyper: Any, obs: Array, noise: tuple[Any, Array], steps: Array) -> Array:
        del state, hyper, obs, steps
        return noise[1]

    def act_fn(state: Any, hyper: Any, obs: Array, noise: tuple[Any, Array], steps: Array) -> Array:
        del hyper, steps
        return actor_fn(state.actor.params, obs).sample(noise[0][0])

    def policy_fn(state: Any, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        distribution = actor_fn(state.actor.params, obs)
        return distribution.mode() if deterministic else distribution.sample(key)

    return Algorithm(init_fn, noise_fn, explore_fn, act_fn, update_fn, policy_fn)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
