"""PQN, parallelized Q-network (Gallici et al. 2025): Q(lambda) without replay and without target network.

Layer normalization holds the values together, and many environments at once take the place of the replay.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
    with_total_steps,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.returns import lambda_returns
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.algorithms.dqn import discrete_actions
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.exploration import linear_decay
from rlhf_jax.rl.loops.on_policy import Learning
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig, bootstrapped, call
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import MLP, MinAtarConv, make_encoder
from rlhf_jax.rl.networks.q_networks import ActionValues
from rlhf_jax.rl.networks.sequence_values import EpsilonGreedy


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for CartPole.

    Attributes:
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from.
      encoder: of the network; None for an MLP, or MinAtar's convolution, with layer normalization.
      num_epochs: over each rollout.
      num_minibatches: of each epoch.
      optimizer: Adam behind gradient clipping; a schedule without `total_steps` is stretched over the run.
    """

    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=32, num_steps=64)
    encoder: nn.Module | None = None
    num_epochs: int = 4
    num_minibatches: int = 16
    optimizer: OptimizerConfig = OptimizerConfig(schedule="linear", warmup_steps=0, clip_norm=10.0, b2=0.999)


@pytree_dataclass
class Hyper:
    """Hyperparameters of PQN that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      lambda_: of the returns; 0 is the one-step target of Q-learning.
      epsilon_start: share of random actions at first.
      epsilon_end: and at last.
      epsilon_steps: steps over which it falls linearly.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    lambda_: Scalar = 0.95
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 100_000.0


@pytree_dataclass
class State:
    """Training state of PQN.

    Attributes:
      steps: environment steps learned from.
      epsilon: share of random actions in the next rollout.
    """

    learner: TrainState
    steps: Int[Array, ""]
    epsilon: Float[Array, ""]
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Steps of a rollout, [N], and what their values should be."""

    obs: Array
    action: Int[Array, " N"]
    returns: Float[Array, " N"]


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, hyper: Hyper) -> State:
    """The state at step 0."""
    return State(init_train_state(params, tx), jnp.int32(0), jnp.float32(hyper.epsilon_start), key)


def acting_params(state: State) -> Params:
    """Parameters with the epsilon of now."""
    return {**state.learner.params, "epsilon": state.epsilon}


def make_batch(network: EpsilonGreedy, params: Params, hyper: Hyper, experience: Experience) -> Batch:
    """Lambda-returns of the greedy policy's values, by the network in training.

        G_t = r_t + gamma_t [lambda G_{t+1} + (1 - lambda) max_a Q(s_{t+1}, a)]

    They go on behind actions that were not greedy, as in Peng's Q(lambda).
    """
    seen, is_first, carry = experience.transition, experience.is_first, experience.carry
    values, next_values = (
        jnp.max(call(network, params, obs, is_first, carry), axis=-1) for obs in (seen.obs, seen.next_obs)
    )
    rewards, discounts, last = bootstrapped(seen.reward, next_values, seen, gamma=hyper.gamma)
    mask = jnp.ones(rewards.shape, bool)
    returns = lambda_returns(rewards, values, discounts, last, mask, lambda_=hyper.lambda_)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), Batch(seen.obs, seen.action, returns))


def make_update(
    config: Config, network: EpsilonGreedy, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one rollout.

    loss = (Q(s, a) - G)^2 / 2
    """

    def step(
        carry: tuple[TrainState, Hyper], part: Batch
    ) -> tuple[tuple[TrainState, Hyper], Metrics, Bool[Array, ""]]:
        learner, hyper = carry

        def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
            values = call(network, params, part.obs, (), ())
            # A product with a one-hot code: its gradient is no scatter, which CPUs and TPUs are slow at.
            chosen = jnp.sum(values * jax.nn.one_hot(part.action, values.shape[-1]), axis=-1)
            mask = jnp.ones(chosen.shape, bool)[None]
            return squared_value_loss(chosen[None], part.returns[None], mask)

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learner.params)
        learner, guard = apply_gradients(learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss)
        return (learner, hyper), {**metrics, **guard}, jnp.bool_(False)

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, order_key = jax.random.split(state.key)
        (learner, _), metrics = scan_minibatches(
            step,
            (state.learner, hyper),
            batch,
            order_key,
            epochs=config.num_epochs,
            minibatches=config.num_minibatches,
        )
        steps = state.steps + batch.action.shape[0]
        epsilon = linear_decay(
            steps, start=hyper.epsilon_start, end=hyper.epsilon_end, steps=hyper.epsilon_steps
        )
        del metrics["epochs_done"]  # all of them, always
        return State(learner, steps, jnp.asarray(epsilon, jnp.float32), key), {**metrics, "epsilon": epsilon}

    return update


def make_network(config: Config, env: Environment) -> EpsilonGreedy:
    """Q of every action, and how it acts.

    Raises:
      UserError: actions are continuous.
    """
    num_actions = discrete_actions(env, "PQN")
    return EpsilonGreedy(ActionValues(make_encoder(env, config.encoder or default_encoder(env)), num_actions))


def default_encoder(env: Environment) -> nn.Module:
    """The convolution for MinAtar's planes, an MLP of two layers of 128 for the rest, layers normalized."""
    if env.name.endswith("-MinAtar"):
        return MinAtarConv(layer_norm=True)
    return MLP((128, 128), nn.relu, layer_norm=True)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    network = make_network(config, env)
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    optimizer_steps = updates * config.num_epochs * config.num_minibatches
    tx = make_optimizer(with_total_steps(config.optimizer, optimizer_steps))
    update = make_update(config, network, tx)

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        return init(params, tx, key, hyper)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        return update(state, hyper, make_batch(network, state.learner.params, hyper, experience))

    learning = Learning(init_agent, learn, acting_params)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
