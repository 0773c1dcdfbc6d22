"""CrossQ: soft actor-critic with batch normalization in place of target networks (Bhatt et al. 2024)."""

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
from rlhf_jax.rl.algorithms import sac, td3
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.continuous import Box, box_of, critic_step, default_encoder
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.batch_norm import BatchNormMLP, BatchStats, apply_eval, apply_train, split_stats
from rlhf_jax.rl.networks.q_networks import Critics, applied


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: of actor, critics and temperature: Adam whose first moment is short (b1 0.5), behind gradient
        clipping.
      encoder: of the actor; it has no batch normalization.
      critic_encoder: of the critics, a network with batch normalization. The paper's are 2,048 wide.
      num_critics: how many; the target is the least of them.
      policy_delay: critic steps before each step of actor and temperature; each has its own part of the
        batch, so it divides `run.batch_size`.
      learn_temperature: move the temperature so that the entropy stays near `Hyper.target_entropy`.
    """

    run: RunConfig = RunConfig(total_steps=20_000, train_every=3, batch_size=768, capacity=20_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b1=0.5, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    critic_encoder: nn.Module = dataclasses.field(default_factory=BatchNormMLP)
    num_critics: int = 2
    policy_delay: int = 3
    learn_temperature: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of CrossQ that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the critics and the temperature.
      actor_learning_rate: of the actor.
      gamma: discount per step.
      temperature: units of reward for one nat of entropy; where a learned one starts.
      target_entropy: in nats per dimension, for actions scaled to [-1, 1].
    """

    learning_rate: Scalar = 1e-3
    actor_learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    temperature: Scalar = 1.0
    target_entropy: Scalar = -1.0


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`.

    Attributes:
      batch_stats: running statistics of the critics.
      temperature: its params are the temperature's logarithm.
    """

    actor: TrainState
    critics: TrainState
    batch_stats: BatchStats
    temperature: TrainState
    key: PRNGKeyArray


def init(
    actor: Params, critics: Any, tx: optax.GradientTransformation, key: PRNGKeyArray, hyper: Hyper
) -> State:
    """The state at step 0.

    Args:
      critics: parameters and running statistics, as `Critics.init` gives them.
    """
    params, stats = split_stats(critics)
    log_temperature = jnp.log(jnp.asarray(hyper.temperature, jnp.float32))
    learners = (init_train_state(actor, tx), init_train_state(params, tx))
    return State(*learners, stats, init_train_state(log_temperature, tx), key)


def make_update(
    config: Config, actor_fn: sac.ActorFn, critics: Critics, box: Box, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Bhatt et al. 2024, section 3.1).

        Q(s, a), Q(s', a') = one pass of the critics over both, whose statistics are of the two together
        target = r + discount (min_i Q_i(s', a') - temperature log pi(a' | s')),  a' ~ pi, without gradient

    There is no target network. The actor's step looks at critics with running statistics. One update is
    `policy_delay` steps of the critics and one of actor and temperature.
    """

    def update_critics(state: State, hyper: Hyper, part: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, next_key = jax.random.split(state.key)
        next_action, next_logp = actor_fn(state.actor.params, part.next_obs).sample_and_logp(next_key)
        obs = jnp.concatenate([part.obs, part.next_obs])
        action = jnp.concatenate([part.action, next_action])

        def values_fn(params: Params) -> tuple[Array, Array, BatchStats]:
            both, stats = apply_train(critics, params, state.batch_stats, obs, action)
            values, next_values = jnp.split(both, 2, axis=1)
            return values, sac.soft_targets(state.temperature.params, part, next_values, next_logp), stats

        learner, metrics, errors, stats = critic_step(
            state.critics, values_fn, part.weight, tx, learning_rate=hyper.learning_rate
        )
        state = dataclasses.replace(state, critics=learner, batch_stats=stats, key=key)
        return state, metrics, errors

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        parts = jax.tree.map(lambda x: x.reshape(config.policy_delay, -1, *x.shape[1:]), batch)

        def step(state: State, part: Batch) -> tuple[State, tuple[Metrics, Array]]:
            state, metrics, errors = update_critics(state, hyper, part)
            return state, (metrics, errors)

        state, (metrics, errors) = jax.lax.scan(step, state, parts)
        key, actor_key = jax.random.split(state.key)
        obs = parts.obs[-1]

        def value_fn(action: Array) -> Float[Array, "C N"]:
            return apply_eval(critics, state.critics.params, state.batch_stats, obs, action)

        actor, temperature, of_actor = sac.improve_policy(
            config, state, hyper, obs, actor_key, actor_fn, value_fn, box, tx
        )
        state = dataclasses.replace(state, actor=actor, temperature=temperature, key=key)
        return state, {**off_policy.over_steps(metrics), **of_actor}, errors.reshape(-1)

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actions are no vector, or the batch cannot be parted.
    """
    box, tx = box_of(env, "CrossQ"), make_optimizer(config.optimizer)
    td3.check_parts("CrossQ", config)
    actor = sac.make_actor(config, env)
    actor_fn: sac.ActorFn = applied(actor)
    critics = Critics(config.critic_encoder, box.low, box.high, config.num_critics)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        actor_key, critic_key, key = jax.random.split(key, 3)
        obs = jnp.zeros((1, *env.obs_shape))
        params = actor.init(actor_key, obs)["params"]
        return init(params, critics.init(critic_key, obs, jnp.zeros((1, len(box.low)))), tx, key, hyper)

    update = make_update(config, actor_fn, critics, box, tx)
    algorithm = sac.stochastic_algorithm(box, actor_fn, init_fn, update)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
