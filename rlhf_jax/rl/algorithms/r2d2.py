"""R2D2 (Kapturowski et al. 2019): recurrent Q-learning from replayed sequences, stored state and burn-in.

The actors are environments side by side and one epsilon, not many machines; the memory is a GRU, and its
inputs are the observations alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.returns import n_step_returns
from rlhf_jax.losses.value import rescale_values, squared_value_loss, unrescale_values
from rlhf_jax.rl.algorithms.dqn import (
    ExplorationNoise,
    LossOutcome,
    State,
    discrete_actions,
    epsilon_greedy_action,
    init,
    make_noise_fn,
    value_step,
)
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.off_policy import Algorithm, RecurrentObs, RunConfig
from rlhf_jax.rl.loops.replay import Replay, gather_windows, weighted_mean
from rlhf_jax.rl.loops.rollout import bootstrapped
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import Carry
from rlhf_jax.rl.networks.q_networks import make_value_encoder
from rlhf_jax.rl.networks.sequence_values import RecurrentActionValues

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "init",
    "make_batch",
    "make_run",
    "make_train",
    "make_update",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course; `batch_size` counts sequences, `n_step` the rewards before the bootstrap.
      optimizer: Adam behind gradient clipping.
      encoder: of the network; None for the default of the environment.
      memory_width: of the GRU; 0 for none.
      burn_in: steps at the beginning of a sequence that only bring the memory up to date.
      length: steps of a sequence that are learned from, behind those.
      double: the trained network chooses the next action, the target network values it.
      dueling: values of states and advantages of actions apart.
      prioritized: sample sequences by their errors.
      rescale: learn h(Q) of `rescale_values`, not Q.
    """

    run: RunConfig = RunConfig(num_envs=8, train_every=8, batch_size=32, n_step=5, capacity=50_000)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module | None = None
    memory_width: int = 64
    burn_in: int = 8
    length: int = 16
    double: bool = True
    dueling: bool = True
    prioritized: bool = True
    rescale: bool = True

    @property
    def window(self) -> int:
        """Steps of a sample: burn-in, those learned from, and the rewards that the last of them needs."""
        return self.burn_in + self.length + self.run.n_step - 1


@pytree_dataclass
class Hyper:
    """Hyperparameters of R2D2 that a sweep may vary (array leaves); `dqn.Hyper` says what is not said here.

    Attributes:
      max_error_share: of the largest error in a sequence's priority; the rest is of their mean.
    """

    learning_rate: Scalar = 5e-4
    gamma: Scalar = 0.99
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 100_000.0
    target_update_interval: Scalar = 100
    tau: Scalar = 1.0
    max_error_share: Scalar = 0.9
    priority_alpha: Scalar = 0.9
    priority_beta: Scalar = 0.6


@pytree_dataclass
class Batch:
    """Sampled sequences, [N, T].

    Attributes:
      seen: what happened; its obs is plain.
      is_first: first steps of episodes.
      carry: what the agent remembered at the beginning, when it acted (the stored state).
      weight: of each sequence in the loss.
    """

    seen: Transition
    is_first: Bool[Array, "N T"]
    carry: Carry
    weight: Float[Array, " N"]


def make_batch(replay: Replay, indices: Int[Array, " N"], *, length: int) -> Batch:
    """Sequences of `length` steps that begin with these transitions; weights are 1."""
    data = gather_windows(replay, indices, length=length)
    first = jax.tree.map(lambda x: x[:, 0], data.obs.carry)
    seen = dataclasses.replace(data, obs=data.obs.obs)
    return Batch(seen, data.obs.is_first, first, jnp.ones(indices.shape))


def values_of(
    config: Config, network: RecurrentActionValues, params: Params, batch: Batch
) -> tuple[Float[Array, "N L A"], Float[Array, "N L A"]]:
    """Values of what was seen behind the burn-in, and of what followed; no gradient through the burn-in."""

    def applied(method: str, *inputs: Any) -> Any:
        return network.apply({"params": params}, *inputs, method=method)

    start, carry, seen = config.burn_in, batch.carry, batch.seen
    if start:
        _, carry = applied("__call__", seen.obs[:, :start], batch.is_first[:, :start], carry)
        carry = jax.lax.stop_gradient(carry)
    return applied("both", seen.obs[:, start:], seen.next_obs[:, start:], batch.is_first[:, start:], carry)


def make_targets(
    config: Config, network: RecurrentActionValues, state: State, hyper: Hyper, batch: Batch
) -> Float[Array, "N L"]:
    """Targets of n steps by double Q-learning with rescaled values (Kapturowski et al. 2019, section 2.3).

    y_t = h(sum_{k<n} gamma^k r_{t+k} + gamma^n h^-1(Q'(s_{t+n}, argmax_a Q(s_{t+n}, a))))
    """
    valued = values_of(config, network, state.target_params, batch)
    choosing = values_of(config, network, state.learner.params, batch) if config.double else valued
    values, next_values = (
        jnp.take_along_axis(q, jnp.argmax(by, axis=-1, keepdims=True), axis=-1)[..., 0]
        for q, by in zip(valued, choosing, strict=True)
    )
    if config.rescale:
        values, next_values = unrescale_values(values), unrescale_values(next_values)
    seen = jax.tree.map(lambda x: x[:, config.burn_in :], batch.seen)
    rewards, discounts, last = bootstrapped(seen.reward, next_values, seen, gamma=hyper.gamma)
    mask = jnp.ones(rewards.shape, bool)
    returns = n_step_returns(rewards, values, discounts, last, mask, n=config.run.n_step)[:, : config.length]
    return rescale_values(returns) if config.rescale else returns


def make_update(
    config: Config, network: RecurrentActionValues, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`: one optimizer step.

    The loss is (Q - y)^2 / 2. The error of a sequence, its priority, is eta max_t |Q - y| + (1 - eta) mean_t
    |Q - y| (Kapturowski et al. 2019, section 2.3).
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        targets = make_targets(config, network, state, hyper, batch)
        learned = slice(config.burn_in, config.burn_in + config.length)
        code = jax.nn.one_hot(batch.seen.action[:, learned], network.num_actions)

        def loss_fn(params: Params) -> LossOutcome:
            values, _ = values_of(config, network, params, batch)
            chosen = jnp.sum(values[:, : config.length] * code, axis=-1)
            mask = jnp.ones(chosen.T.shape, bool)
            loss, metrics = squared_value_loss(chosen.T, targets.T, mask, reduce=weighted_mean(batch.weight))
            size = jnp.abs(chosen - targets)
            share = hyper.max_error_share
            return loss, (metrics, share * jnp.max(size, axis=1) + (1 - share) * jnp.mean(size, axis=1))

        return value_step(state, hyper, loss_fn, tx)

    return update


def make_network(config: Config, env: Environment) -> RecurrentActionValues:
    """Q of every action, with a memory.

    Raises:
      UserError: actions are continuous, or no step is learned from.
    """
    if config.length < 1 or config.burn_in < 0:
        raise UserError(
            f"R2D2: length={config.length} and burn_in={config.burn_in}: use at least 1 and 0 steps."
        )
    encoder = make_value_encoder(env, config.encoder)
    num_actions = discrete_actions(env, "R2D2")
    return RecurrentActionValues(encoder, num_actions, config.memory_width, config.dueling)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), make_network(config, env)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        inputs = (env.blank_obs(1, 1), jnp.zeros((1, 1), bool), network.initial_carry(1))
        return init(network.init(key, *inputs)["params"], tx)

    def greedy(state: State, seen: RecurrentObs) -> tuple[Int[Array, " B"], Carry]:
        variables = {"params": state.learner.params}
        values, carry = network.apply(variables, seen.obs, seen.is_first, seen.carry, method="act")
        return jnp.argmax(values, axis=-1), carry

    def act_fn(
        state: State, hyper: Hyper, seen: RecurrentObs, noise: ExplorationNoise, steps: Array
    ) -> tuple[Array, Carry]:
        best, carry = greedy(state, seen)
        return epsilon_greedy_action(best, hyper, noise, steps), carry

    def policy_fn(
        state: State, seen: RecurrentObs, key: PRNGKeyArray, deterministic: bool
    ) -> tuple[Array, Carry]:
        del key, deterministic  # the policy learnt is the greedy one
        return greedy(state, seen)

    def gather_fn(replay: Replay, indices: Int[Array, " N"], key: PRNGKeyArray, hyper: Hyper) -> Batch:
        del key, hyper
        return make_batch(replay, indices, length=config.window)

    algorithm = Algorithm(
        init_fn,
        make_noise_fn(network.num_actions),
        act_fn,
        act_fn,
        make_update(config, network, tx),
        policy_fn,
        gather_fn,
        network.initial_carry,
    )
    # To the loop a sample is so many steps long.
    course = dataclasses.replace(config.run, n_step=config.window)
    return off_policy.make_run(course, env, env_params, algorithm, prioritized=config.prioritized)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
