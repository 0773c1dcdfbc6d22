"""DDPG (Lillicrap et al. 2016), with Gaussian noise for exploration."""

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
    ActorFn,
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
      optimizer: of actor and critic: Adam behind gradient clipping.
      encoder: of actor and critic.
    """

    run: RunConfig = RunConfig(total_steps=20_000, train_every=1, capacity=20_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)


@pytree_dataclass
class Hyper:
    """Hyperparameters of DDPG that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the critic.
      actor_learning_rate: of the actor.
      gamma: discount per step.
      tau: how far target networks move at a time.
      action_noise_std: of the noise on actions, in half ranges of their box.
    """

    learning_rate: Scalar = 1e-3
    actor_learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.98
    tau: Scalar = 0.005
    action_noise_std: Scalar = 0.1


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`."""

    actor: TrainState
    critic: TrainState
    target_actor: Params
    target_critic: Params


def init(actor: Params, critic: Params, tx: optax.GradientTransformation) -> State:
    """The state at step 0; target networks are copies."""
    return State(init_train_state(actor, tx), init_train_state(critic, tx), actor, critic)


def make_update(
    config: Config, actor_fn: ActorFn, critic_fn: CriticFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Lillicrap et al. 2016, Algorithm 1).

    target = r + discount Q'(s', mu'(s')),  actor: -Q(s, mu(s))
    """
    del config

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        next_action = actor_fn(state.target_actor, batch.next_obs)
        next_values = critic_fn(state.target_critic, batch.next_obs, next_action)[0]
        targets = batch.reward + batch.discount * next_values
        values_fn = towards(critic_fn, batch, targets)
        critic, metrics, errors, _ = critic_step(
            state.critic, values_fn, batch.weight, tx, learning_rate=hyper.learning_rate
        )

        def loss_fn(params: Params) -> tuple[Array, None]:
            action = actor_fn(params, batch.obs)
            return -jnp.mean(critic_fn(critic.params, batch.obs, action)[0]), None

        actor, actor_loss, _ = policy_step(state.actor, loss_fn, tx, learning_rate=hyper.actor_learning_rate)
        rate = hyper.tau
        state = State(
            actor=actor,
            critic=critic,
            target_actor=optax.incremental_update(actor.params, state.target_actor, rate),
            target_critic=optax.incremental_update(critic.params, state.target_critic, rate),
        )
        return state, {**metrics, "actor_loss": actor_loss}, errors

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    box, tx = box_of(env, "DDPG"), make_optimizer(config.optimizer)
    actor = make_actor(config, env)
    actor_fn = applied(actor)
    init_critics, critic_fn = critic_fns(env, config.encoder, box, count=1)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        actor_key, critic_key = jax.random.split(key)
        params = actor.init(actor_key, jnp.zeros((1, *env.obs_shape)))["params"]
        return init(params, init_critics(critic_key), tx)

    update = make_update(config, actor_fn, critic_fn, tx)
    algorithm = noisy_algorithm(box, actor_fn, init_fn, update)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_actor(config: Config, env: Environment) -> DeterministicActor:
    """Actor network for this environment."""
    box = box_of(env, "DDPG")
    return DeterministicActor(make_encoder(env, config.encoder), box.low, box.high)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
