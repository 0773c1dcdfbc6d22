"""TD3 (Fujimoto et al. 2018): two critics, smoothed targets, delayed policy updates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.continuous import (
    ActorFn,
    Box,
    CriticFn,
    box_of,
    critic_fns,
    critic_step,
    default_encoder,
    make_encoder,
    noisy_algorithm,
    policy_step,
    towards,
)
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import DeterministicActor, applied


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: of actor and critics: Adam behind gradient clipping.
      encoder: of actor and critics.
      num_critics: how many; the target is the least of them.
      policy_delay: critic steps before each step of the actor and of all target networks; each has its own
        part of the batch, so it divides `run.batch_size`.
    """

    run: RunConfig = RunConfig(total_steps=20_000, train_every=2, batch_size=256, capacity=20_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    num_critics: int = 2
    policy_delay: int = 2


@pytree_dataclass
class Hyper:
    """Hyperparameters of TD3 that a sweep may vary (array leaves).

    Noise is in half ranges of the box of actions.

    Attributes:
      learning_rate: of the critics.
      actor_learning_rate: of the actor.
      gamma: discount per step.
      tau: how far target networks move at a time.
      action_noise_std: of the noise on actions.
      target_policy_noise: of the noise on the target's actions.
      target_noise_clip: bound of that noise.
    """

    learning_rate: Scalar = 1e-3
    actor_learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.98
    tau: Scalar = 0.005
    action_noise_std: Scalar = 0.1
    target_policy_noise: Scalar = 0.2
    target_noise_clip: Scalar = 0.5


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`."""

    actor: TrainState
    critics: TrainState
    target_actor: Params
    target_critics: Params
    key: PRNGKeyArray


def init(actor: Params, critics: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state at step 0; target networks are copies."""
    learners = init_train_state(actor, tx), init_train_state(critics, tx)
    return State(*learners, target_actor=actor, target_critics=critics, key=key)


ActorLossFn = Callable[[Any, Float[Array, "N A"], Float[Array, " N"], Batch], Float[Array, ""]]
"""(hyper, mu(s), Q_1(s, mu(s)), batch) -> loss of the actor."""


def deterministic_actor_loss(
    hyper: Any, action: Float[Array, "N A"], values: Float[Array, " N"], batch: Batch
) -> Float[Array, ""]:
    """-mean Q_1(s, mu(s))."""
    del hyper, action, batch
    return -jnp.mean(values)


def make_update(
    config: Any,
    actor_fn: ActorFn,
    critic_fn: CriticFn,
    box: Box,
    tx: optax.GradientTransformation,
    *,
    actor_loss_fn: ActorLossFn = deterministic_actor_loss,
) -> Callable[[State, Any, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Fujimoto et al. 2018, Algorithm 1).

        target = r + discount min_i Q'_i(s', clip(mu'(s') + clip(noise)))

    One update is `policy_delay` steps of the critics and one of the actor: no branch on a count of updates.
    """

    def smoothed(state: State, hyper: Any, obs: Array, key: PRNGKeyArray) -> Float[Array, "N A"]:
        action = actor_fn(state.target_actor, obs)
        noise = hyper.target_policy_noise * jax.random.normal(key, action.shape)
        bounded = jnp.clip(noise, -hyper.target_noise_clip, hyper.target_noise_clip)
        return box.clip(action + box.half_range * bounded)

    def update_actor(state: State, hyper: Any, batch: Batch) -> State:
        def loss_fn(params: Params) -> tuple[Array, None]:
            action = actor_fn(params, batch.obs)
            values = critic_fn(state.critics.params, batch.obs, action)[0]
            return actor_loss_fn(hyper, action, values, batch), None

        actor, _, _ = policy_step(state.actor, loss_fn, tx, learning_rate=hyper.actor_learning_rate)
        rate = hyper.tau
        return dataclasses.replace(
            state,
            actor=actor,
            target_actor=optax.incremental_update(actor.params, state.target_actor, rate),
            target_critics=optax.incremental_update(state.critics.params, state.target_critics, rate),
        )

    def update_critics(state: State, hyper: Any, part: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, noise_key = jax.random.split(state.key)
        next_action = smoothed(state, hyper, part.next_obs, noise_key)
        next_values = jnp.min(critic_fn(state.target_critics, part.next_obs, next_action), axis=0)
        targets = part.reward + part.discount * next_values
        values_fn = towards(critic_fn, part, targets)
        critics, metrics, errors, _ = critic_step(
            state.critics, values_fn, part.weight, tx, learning_rate=hyper.learning_rate
        )
        return dataclasses.replace(state, critics=critics, key=key), metrics, errors

    def update(state: State, hyper: Any, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        parts = jax.tree.map(lambda x: x.reshape(config.policy_delay, -1, *x.shape[1:]), batch)

        def step(state: State, part: Batch) -> tuple[State, tuple[Metrics, Array]]:
            state, metrics, errors = update_critics(state, hyper, part)
            return state, (metrics, errors)

        state, (metrics, errors) = jax.lax.scan(step, state, parts)
        state = update_actor(state, hyper, jax.tree.map(lambda x: x[-1], parts))
        return state, off_policy.over_steps(metrics), errors.reshape(-1)

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actions are no vector, or the batch cannot be parted.
    """
    box, tx = box_of(env, "TD3"), make_optimizer(config.optimizer)
    check_parts("TD3", config)
    actor = make_actor(config, env)
    actor_fn = applied(actor)
    init_critics, critic_fn = critic_fns(env, config.encoder, box, count=config.num_critics)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        actor_key, critic_key, key = jax.random.split(key, 3)
        params = actor.init(actor_key, jnp.zeros((1, *env.obs_shape)))["params"]
        return init(params, init_critics(critic_key), tx, key)

    update = make_update(config, actor_fn, critic_fn, box, tx)
    algorithm = noisy_algorithm(box, actor_fn, init_fn, update)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def check_parts(algorithm: str, config: Any) -> None:
    """Raises: UserError where `policy_delay` does not divide `run.batch_size`."""
    if config.run.batch_size % config.policy_delay:
        raise UserError(
            f"{algorithm}: policy_delay={config.policy_delay} does not divide run.batch_size="
            f"{config.run.batch_size}: choose a multiple."
        )


def make_actor(config: Any, env: Environment) -> DeterministicActor:
    """Actor network for this environment."""
    box = box_of(env, "TD3")
    return DeterministicActor(make_encoder(env, config.encoder), box.low, box.high)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
