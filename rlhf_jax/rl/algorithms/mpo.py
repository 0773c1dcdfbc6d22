"""Maximum a posteriori policy optimization (Abdolmaleki et al. 2018) of continuous actions.

Samples of the old policy are weighted by their values (the E-step), and the policy becomes likelier to give
the better of them (the M-step), within bounds of KL for its mean and for its deviation apart. Values are
learned by one-step targets; the paper's critic uses Retrace.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.mpo import (
    lagrangian_losses,
    mpo_weights,
    temperature_dual_loss,
    weighted_likelihood_loss,
)
from rlhf_jax.rl.algorithms.sac import stochastic_algorithm
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
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import DiagonalGaussian
from rlhf_jax.rl.networks.q_networks import GaussianActor, applied

ActorFn = Callable[[Params, Array], DiagonalGaussian]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: of actor, critics and multipliers: Adam behind gradient clipping.
      encoder: of actor and critics.
      num_critics: how many; an action's value is the least of them.
      num_samples: actions of the old policy in each state, M.
    """

    run: RunConfig = RunConfig(total_steps=20_000, train_every=1, capacity=20_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module = dataclasses.field(default_factory=default_encoder)
    num_critics: int = 1
    num_samples: int = 20


@pytree_dataclass
class Hyper:
    """Hyperparameters of MPO that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the critics.
      actor_learning_rate: of the actor.
      dual_learning_rate: of temperature and multipliers.
      gamma: discount per step.
      target_update_interval: updates between copies of the policy to the old one, and of the critics.
      epsilon: bound of the KL of the weighted samples from the old policy, in nats.
      epsilon_mean: bound of the KL that a change of the mean alone makes.
      epsilon_std: bound of the KL that a change of the deviation alone makes.
      temperature: at first, in units of reward.
      multiplier: of both bounds at first.
    """

    learning_rate: Scalar = 1e-3
    actor_learning_rate: Scalar = 1e-3
    dual_learning_rate: Scalar = 1e-2
    gamma: Scalar = 0.99
    target_update_interval: Scalar = 100
    epsilon: Scalar = 0.1
    epsilon_mean: Scalar = 0.01
    epsilon_std: Scalar = 1e-4
    temperature: Scalar = 1.0
    multiplier: Scalar = 1.0


@pytree_dataclass
class Duals:
    """Temperature and multipliers, or what softplus makes them of: they stay above 0."""

    temperature: Float[Array, ""]
    mean: Float[Array, ""]
    std: Float[Array, ""]


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`.

    Attributes:
      duals: its params are `Duals` before softplus.
      old_actor: the policy whose samples are weighted.
    """

    actor: TrainState
    critics: TrainState
    duals: TrainState
    old_actor: Params
    target_critics: Params
    key: PRNGKeyArray


def init(
    actor: Params, critics: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, hyper: Hyper
) -> State:
    """The state at step 0; old policy and target networks are copies."""
    duals = Duals(*(_inverse_softplus(x) for x in (hyper.temperature, hyper.multiplier, hyper.multiplier)))
    return State(
        actor=init_train_state(actor, tx),
        critics=init_train_state(critics, tx),
        duals=init_train_state(duals, tx),
        old_actor=actor,
        target_critics=critics,
        key=key,
    )


def _inverse_softplus(value: Scalar) -> Float[Array, ""]:
    return jnp.log(jnp.expm1(jnp.asarray(value, jnp.float32)))


def make_update(
    config: Config, actor_fn: ActorFn, critic_fn: CriticFn, box: Box, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`: critics, weights, policy, multipliers.

    target = r + discount mean_i Q'(s', a'_i),  a'_i ~ old policy
    """

    def valued(params: Params, obs: Array, actions: Float[Array, "M N A"]) -> Float[Array, "M N"]:
        return jax.vmap(lambda action: jnp.min(critic_fn(params, obs, box.clip(action)), axis=0))(actions)

    def sampled(old: DiagonalGaussian, key: PRNGKeyArray) -> Float[Array, "M N A"]:
        return jax.vmap(old.sample)(jax.random.split(key, config.num_samples))

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        key, next_key, own_key = jax.random.split(state.key, 3)
        next_actions = sampled(actor_fn(state.old_actor, batch.next_obs), next_key)
        next_values = jnp.mean(valued(state.target_critics, batch.next_obs, next_actions), axis=0)
        critics, metrics, errors, _ = critic_step(
            state.critics,
            towards(critic_fn, batch, batch.reward + batch.discount * next_values),
            batch.weight,
            tx,
            learning_rate=hyper.learning_rate,
        )
        old = actor_fn(state.old_actor, batch.obs)
        actions = sampled(old, own_key)
        values = valued(state.target_critics, batch.obs, actions)
        actor, duals, of_policy = improve_policy(
            state, hyper, old, actions, values, lambda params: actor_fn(params, batch.obs), tx
        )
        due = critics.steps % jnp.asarray(hyper.target_update_interval, jnp.int32) == 0
        old_actor, target_critics = tree_where(
            due, (actor.params, critics.params), (state.old_actor, state.target_critics)
        )
        return State(actor, critics, duals, old_actor, target_critics, key), {**metrics, **of_policy}, errors

    return update


def improve_policy(
    state: State,
    hyper: Hyper,
    old: DiagonalGaussian,
    actions: Float[Array, "M N A"],
    values: Float[Array, "M N"],
    policy_fn: Callable[[Params], DiagonalGaussian],
    tx: optax.GradientTransformation,
) -> tuple[TrainState, TrainState, Metrics]:
    """One step of the policy, and one of temperature and multipliers: (actor, duals, metrics).

    The likelihood is taken twice, of the new mean with the old deviation and the other way round, so that
    each has its own bound (Abdolmaleki et al. 2018b).
    """
    duals = jax.tree.map(jax.nn.softplus, state.duals.params)
    weights = mpo_weights(values, temperature=duals.temperature)

    def parts(params: Params) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        new = policy_fn(params)
        return DiagonalGaussian(new.mean, old.log_std), DiagonalGaussian(old.mean, new.log_std)

    def actor_loss_fn(params: Params) -> tuple[Array, tuple[Array, Array]]:
        new_mean, new_std = parts(params)
        kl_mean, kl_std = old.kl(new_mean), old.kl(new_std)
        loss = weighted_likelihood_loss(new_mean.logp(actions) + new_std.logp(actions), weights)
        held_mean, _ = lagrangian_losses(kl_mean, multiplier=duals.mean, epsilon=hyper.epsilon_mean)
        held_std, _ = lagrangian_losses(kl_std, multiplier=duals.std, epsilon=hyper.epsilon_std)
        return loss + held_mean + held_std, (kl_mean, kl_std)

    actor, loss, (kl_mean, kl_std) = policy_step(
        state.actor, actor_loss_fn, tx, learning_rate=hyper.actor_learning_rate
    )

    def dual_loss_fn(raw: Duals) -> tuple[Array, None]:
        new = jax.tree.map(jax.nn.softplus, raw)
        dual = temperature_dual_loss(values, temperature=new.temperature, epsilon=hyper.epsilon)
        _, of_mean = lagrangian_losses(kl_mean, multiplier=new.mean, epsilon=hyper.epsilon_mean)
        _, of_std = lagrangian_losses(kl_std, multiplier=new.std, epsilon=hyper.epsilon_std)
        return dual + of_mean + of_std, None

    learner, _, _ = policy_step(state.duals, dual_loss_fn, tx, learning_rate=hyper.dual_learning_rate)
    metrics = {
        "actor_loss": loss,
        "temperature": duals.temperature,
        "kl_mean": jnp.mean(kl_mean),
        "kl_std": jnp.mean(kl_std),
        "entropy": jnp.mean(old.entropy()),
    }
    return actor, learner, metrics


def make_actor(config: Config, env: Environment) -> GaussianActor:
    """Actor network for this environment, with `config.encoder`."""
    box = box_of(env, "MPO")
    return GaussianActor(make_encoder(env, config.encoder), box.low, box.high)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    box, tx = box_of(env, "MPO"), make_optimizer(config.optimizer)
    actor = make_actor(config, env)
    actor_fn: ActorFn = applied(actor)
    init_critics, critic_fn = critic_fns(env, config.encoder, box, count=config.num_critics)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        actor_key, critic_key, key = jax.random.split(key, 3)
        params = actor.init(actor_key, jnp.zeros((1, *env.obs_shape)))["params"]
        return init(params, init_critics(critic_key), tx, key, hyper)

    sampling = stochastic_algorithm(box, actor_fn, init_fn, make_update(config, actor_fn, critic_fn, box, tx))

    def act_fn(*inputs: Any) -> Array:
        return box.clip(sampling.act_fn(*inputs))

    def policy_fn(*inputs: Any) -> Array:
        return box.clip(sampling.policy_fn(*inputs))

    # The replay holds actions as they were carried out.
    algorithm = dataclasses.replace(sampling, act_fn=act_fn, policy_fn=policy_fn)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
