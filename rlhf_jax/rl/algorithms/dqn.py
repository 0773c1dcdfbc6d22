"""Deep Q-learning (Mnih et al. 2015) with its common extensions, each a switch.

Double (van Hasselt et al. 2016), dueling (Wang et al. 2016), prioritised replay (Schaul et al. 2016) and
n-step targets (`Run.n_step`). The network is Q(s) -> all actions or Q(s, a) -> scalar. What C51 and QR-DQN
share with it stands here too: they differ in what the network gives and in the loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

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
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import Array, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.reductions import Reduction
from rlhf_jax.losses.value import huber_value_loss
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.exploration import linear_decay
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch, weighted_mean
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.q_networks import ActionInputValue, ActionValues, applied, make_value_encoder

Outputs: TypeAlias = Float[Array, "N A ..."]
LossOutcome: TypeAlias = tuple[Float[Array, ""], tuple[Metrics, Float[Array, " N"]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course.
      optimizer: Adam behind gradient clipping.
      encoder: of the network; None for the default of the environment.
      double: the trained network chooses the next action, the target network values it.
      dueling: values of states and advantages of actions apart.
      prioritized: sample transitions by their error.
      action_input: Q(s, a) -> scalar instead of Q(s) -> all actions.
    """

    run: RunConfig = RunConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    encoder: nn.Module | None = None
    double: bool = True
    dueling: bool = False
    prioritized: bool = False
    action_input: bool = False


@pytree_dataclass
class Hyper:
    """Hyperparameters of DQN that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      epsilon_start: share of random actions at first.
      epsilon_end: and at last.
      epsilon_steps: steps over which it falls linearly.
      target_update_interval: updates between moves of the target network.
      tau: how far it moves then; 1 copies.
      huber_delta: error beyond which the loss is linear, in units of reward; a large number squares all. With
        returns far above it values may grow without bound: an end of the episode pulls them down no harder
        than any other error pulls them up.
      priority_alpha: how much errors matter in sampling; 0 is uniform.
      priority_beta: how much of that bias is corrected; 1 is all.
    """

    learning_rate: Scalar = 2.5e-4
    gamma: Scalar = 0.99
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 250_000.0
    target_update_interval: Scalar = 50
    tau: Scalar = 1.0
    huber_delta: Scalar = 100.0
    priority_alpha: Scalar = 0.6
    priority_beta: Scalar = 0.4


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`."""

    learner: TrainState
    target_params: Params


@dataclasses.dataclass(frozen=True)
class ValueFns:
    """The network as callables.

    Attributes:
      every_fn: (params, obs) -> outputs of every action [N, A, ...].
      chosen_fn: (params, obs, action) -> of one action each [N, ...].
      rank_fn: outputs [N, A, ...] -> numbers [N, A] of which the highest is the best action.
    """

    every_fn: Callable[..., Outputs]
    chosen_fn: Callable[..., Float[Array, "N ..."]]
    rank_fn: Callable[[Outputs], Float[Array, "N A"]]


ExplorationNoise: TypeAlias = tuple[Array, Array]
"""Uniform shares, and random actions."""

ErrorFn: TypeAlias = Callable[
    [Float[Array, "N ..."], Float[Array, "N ..."], Batch, Any, Reduction], LossOutcome
]
"""(outputs of the action taken, of the next action by the target network, batch, hyper, reduction) ->
(loss, (metrics, error of each transition))."""


def init(params: Params, tx: optax.GradientTransformation) -> State:
    """The state at step 0; the target network is the network."""
    return State(init_train_state(params, tx), params)


def td_loss(
    chosen: Float[Array, " N"], next_values: Float[Array, " N"], batch: Batch, hyper: Any, reduce: Reduction
) -> LossOutcome:
    """Huber loss of Q(s, a) - (r + discount Q'(s', a'))  (Mnih et al. 2015, Algorithm 1).

    `hyper` must have `huber_delta`.
    """
    targets = batch.reward + batch.discount * next_values
    mask = jnp.ones_like(targets, bool)[None]
    loss, metrics = huber_value_loss(
        chosen[None], targets[None], mask, delta=hyper.huber_delta, reduce=reduce
    )
    return loss, (metrics, chosen - targets)


def make_value_update(
    values: ValueFns, tx: optax.GradientTransformation, error_fn: ErrorFn, *, double: bool
) -> Callable[[State, Any, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`: one optimizer step.

    The next action is the best by the target network, or, when `double`, by the network in training.
    """

    def update(state: State, hyper: Any, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        after = values.every_fn(state.target_params, batch.next_obs)
        choosing = values.every_fn(state.learner.params, batch.next_obs) if double else after
        next_values = best_outputs(after, values.rank_fn(choosing))
        reduce = weighted_mean(batch.weight)

        def loss_fn(params: Params) -> LossOutcome:
            chosen = values.chosen_fn(params, batch.obs, batch.action)
            return error_fn(chosen, next_values, batch, hyper, reduce)

        return value_step(state, hyper, loss_fn, tx)

    return update


def best_outputs(outputs: Outputs, ranks: Float[Array, "N A"]) -> Float[Array, "N ..."]:
    """The outputs of the action that ranks highest."""
    return jax.vmap(lambda row, action: row[action])(outputs, jnp.argmax(ranks, axis=1))


def value_step(
    state: Any, hyper: Any, loss_fn: Callable[[Params], LossOutcome], tx: optax.GradientTransformation
) -> tuple[Any, Metrics, Float[Array, " N"]]:
    """One optimizer step of the network, and the target network's where it is due.

    Args:
      state: with `learner` and `target_params`; what else it has stays.
      hyper: with `learning_rate`, `target_update_interval` and `tau`.
      loss_fn: parameters -> (loss, (metrics, error of each transition)).
    """
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (metrics, errors)), gradients = gradient_fn(state.learner.params)
    learner, guard = apply_gradients(
        state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
    )
    target = optax.incremental_update(learner.params, state.target_params, hyper.tau)
    due = learner.steps % jnp.asarray(hyper.target_update_interval, jnp.int32) == 0
    target = tree_where(due, target, state.target_params)
    errors = jax.lax.stop_gradient(errors)
    metrics = {**metrics, "error_size": jnp.mean(jnp.abs(errors)), **guard}
    return dataclasses.replace(state, learner=learner, target_params=target), metrics, errors


def make_update(
    config: Config, values: ValueFns, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`, errors being those of each transition."""
    return make_value_update(values, tx, td_loss, double=config.double)


def make_network(config: Config, env: Environment) -> nn.Module:
    """Q for this environment.

    Raises:
      UserError: its actions are continuous, or dueling was asked of Q(s, a) -> scalar.
    """
    encoder = make_value_encoder(env, config.encoder)
    num_actions = discrete_actions(env, "DQN")
    if not config.action_input:
        return ActionValues(encoder, num_actions, dueling=config.dueling)
    if config.dueling:
        raise UserError("DQN: dueling needs all actions at once; use action_input=False.")
    return ActionInputValue(encoder, num_actions)


def discrete_actions(env: Environment, algorithm: str) -> int:
    """Number of discrete actions.

    Raises:
      UserError: they are continuous.
    """
    if env.num_actions is None:
        raise UserError(f"{algorithm} needs discrete actions and {env.name} has continuous ones: use SAC.")
    return env.num_actions


def network_fns(
    network: nn.Module, rank_fn: Callable[[Outputs], Float[Array, "N A"]] = lambda outputs: outputs
) -> ValueFns:
    """The callables of a Flax network with a method `chosen`."""
    return ValueFns(applied(network), applied(network, "chosen"), rank_fn)


def make_algorithm(
    env: Environment,
    network: nn.Module,
    values: ValueFns,
    tx: optax.GradientTransformation,
    update_fn: Callable[..., Any],
) -> Algorithm:
    """Epsilon-greedy exploration around `update_fn`."""

    def init_fn(key: PRNGKeyArray, hyper: Any) -> State:
        del hyper
        return init(network.init(key, jnp.zeros((1, *env.obs_shape), env.obs_dtype))["params"], tx)

    def greedy(state: State, obs: Array) -> Int[Array, " B"]:
        return jnp.argmax(values.rank_fn(values.every_fn(state.learner.params, obs)), axis=-1)

    def act_fn(state: State, hyper: Any, obs: Array, noise: ExplorationNoise, steps: Array) -> Array:
        return epsilon_greedy_action(greedy(state, obs), hyper, noise, steps)

    def policy_fn(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        del key, deterministic  # the policy learnt is the greedy one
        return greedy(state, obs)

    noise_fn = make_noise_fn(discrete_actions(env, "DQN"))
    return Algorithm(init_fn, noise_fn, act_fn, act_fn, update_fn, policy_fn)


def make_noise_fn(num_actions: int) -> Callable[[PRNGKeyArray, tuple[int, int]], ExplorationNoise]:
    """Random numbers of `epsilon_greedy_action` for many steps at once."""

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> ExplorationNoise:
        share_key, action_key = jax.random.split(key)
        return jax.random.uniform(share_key, shape), jax.random.randint(action_key, shape, 0, num_actions)

    return noise_fn


def epsilon_greedy_action(
    greedy: Int[Array, " B"], hyper: Any, noise: ExplorationNoise, steps: Array
) -> Int[Array, " B"]:
    """The greedy action, or any; epsilon falls linearly, as `hyper` says."""
    shares, anything = noise
    epsilon = linear_decay(steps, start=hyper.epsilon_start, end=hyper.epsilon_end, steps=hyper.epsilon_steps)
    return jnp.where(shares < epsilon, anything, greedy)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), make_network(config, env)
    values = network_fns(network)
    algorithm = make_algorithm(env, network, values, tx, make_update(config, values, tx))
    return off_policy.make_run(config.run, env, env_params, algorithm, prioritized=config.prioritized)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
