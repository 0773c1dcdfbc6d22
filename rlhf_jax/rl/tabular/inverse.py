"""Inverse reinforcement learning by maximum entropy (Ziebart et al. 2008), exact on tabular processes.

Which reward explains demonstrations? Of all policies that meet as many features as the demonstrators did, the
one of most entropy is softmax-optimal for a reward linear in the features, and that reward's weights are what
is looked for. Chances outside the policy are no choice of its own, so the entropy is the causal one (Ziebart
et al. 2010); where moves are certain it is the 2008 paper's over paths.

    r(s, a, s') = features(s') w                      reward on arrival
    loss(w)     = E_start[V_w] - w . counts of the demonstrations
    gradient    = counts of the policy of w - counts of the demonstrations

V_w is the soft value, the loss convex. Counts are discounted sums over an episode of the features of the
states arrived at. Weights are known up to what no policy can change.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.rl.tabular.dynamic_programming import DecisionProcess, action_values, induced_chain
from rlhf_jax.rl.tabular.prediction import Episode

State = TrainState


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      updates: gradient steps of a whole run.
      max_sweeps: of soft value iteration, in each.
    """

    updates: int = 500
    max_sweeps: int = 1000
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)


@pytree_dataclass
class Hyper:
    """Hyperparameters of maximum-entropy inverse RL that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step, below 1, or 1 where every policy ends.
      temperature: units of reward for one nat of entropy: how sure the demonstrators are taken to be.
      weight_decay: of loss + weight_decay |w|^2 / 2; keeps weights finite where demonstrators never err.
      tolerance: of soft value iteration.
    """

    learning_rate: Scalar = 0.1
    gamma: Scalar = 0.95
    temperature: Scalar = 1.0
    weight_decay: Scalar = 0.0
    tolerance: Scalar = 1e-6


def soft_value_iteration(
    process: DecisionProcess,
    *,
    gamma: Scalar,
    temperature: Scalar = 1.0,
    tolerance: Scalar = 1e-6,
    max_sweeps: int = 1000,
) -> tuple[Float[Array, "S A"], Float[Array, " S"], Int[Array, ""]]:
    """Optimal values where entropy is worth something: v <- temperature log sum_a exp(q(s, a) / temperature).

    The optimal policy is softmax(q / temperature); as the temperature goes to 0 this is value iteration.

    Args:
      tolerance: stop once no value moved by more.
      max_sweeps: stop after so many.

    Returns:
      (action values, values, sweeps); values are 0 in terminal states.
    """

    def backup(values: Float[Array, " S"]) -> tuple[Float[Array, "S A"], Float[Array, " S"]]:
        q = action_values(process, values, gamma=gamma)
        soft = temperature * jax.nn.logsumexp(q / temperature, axis=-1)
        return q, jnp.where(process.terminal, 0, soft)

    def moving(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        return (carry[1] > tolerance) & (carry[2] < max_sweeps)

    def sweep(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, _, sweeps = carry
        new = backup(values)[1]
        return new, jnp.max(jnp.abs(new - values)), sweeps + 1

    zeros = jnp.zeros_like(process.start)
    infinity = jnp.asarray(jnp.inf, zeros.dtype)
    values, _, sweeps = jax.lax.while_loop(moving, sweep, (zeros, infinity, jnp.int32(0)))
    return *backup(values), sweeps


def arrivals(process: DecisionProcess, policy: Float[Array, "S A"], *, gamma: Scalar) -> Float[Array, " S"]:
    """Expected discounted arrivals in each state, exactly: E sum_t gamma^t [s_{t+1} = s].

    Args:
      policy: action probabilities.
      gamma: below 1, or 1 where every episode ends with certainty.
    """
    chain = induced_chain(process, policy)
    onwards = chain.transitions * ~chain.terminal[:, None]
    starting = jnp.where(chain.terminal, 0, chain.start)
    # Visits d = start + gamma d P over the states that go on; arrivals are d P, terminal states included.
    system = jnp.eye(len(starting), dtype=starting.dtype) - gamma * (onwards * ~chain.terminal[None, :]).T
    return jnp.linalg.solve(system, starting) @ onwards


def demonstrated_arrivals(episodes: Episode, *, num_states: int, gamma: Scalar) -> Float[Array, " S"]:
    """The same of demonstrations [E, T], averaged over episodes."""
    weights = jnp.where(episodes.mask, gamma ** jnp.arange(episodes.mask.shape[1]), 0.0)
    code = jax.nn.one_hot(episodes.next_states, num_states)
    return jnp.einsum("et,ets->s", weights, code) / episodes.mask.shape[0]


def with_rewards(
    process: DecisionProcess, weights: Float[Array, " K"], features: Float[Array, "S K"]
) -> DecisionProcess:
    """The process with the reward of these weights on arrival in each state."""
    rewards = jnp.broadcast_to(features @ weights, process.rewards.shape)
    return dataclasses.replace(process, rewards=rewards)


def loss_and_gradient(
    process: DecisionProcess,
    weights: Float[Array, " K"],
    features: Float[Array, "S K"],
    demonstrated: Float[Array, " S"],
    *,
    gamma: Scalar,
    temperature: Scalar = 1.0,
    tolerance: Scalar = 1e-6,
    max_sweeps: int = 1000,
) -> tuple[Float[Array, ""], Float[Array, " K"]]:
    """(loss, its exact gradient) of weights, as at the top of this file.

    Args:
      features: of each state.
      demonstrated: discounted arrivals of the demonstrators, who start as the process does.
    """
    q, values, _ = soft_value_iteration(
        with_rewards(process, weights, features),
        gamma=gamma,
        temperature=temperature,
        tolerance=tolerance,
        max_sweeps=max_sweeps,
    )
    policy = jax.nn.softmax(q / temperature)
    loss = jnp.sum(process.start * values) - demonstrated @ (features @ weights)
    return loss, (arrivals(process, policy, gamma=gamma) - demonstrated) @ features


def init(features: Float[Array, "S K"], tx: optax.GradientTransformation) -> State:
    """The state at step 0: no state is better than another."""
    return init_train_state(jnp.zeros(features.shape[1], features.dtype), tx)


def make_update(
    config: Config, process: DecisionProcess, features: Float[Array, "S K"], tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Float[Array, " S"]], tuple[State, Metrics]]:
    """`update(state, hyper, demonstrated) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, demonstrated: Float[Array, " S"]) -> tuple[State, Metrics]:
        weights = state.params
        loss, gradient = loss_and_gradient(
            process,
            weights,
            features,
            demonstrated,
            gamma=hyper.gamma,
            temperature=hyper.temperature,
            tolerance=hyper.tolerance,
            max_sweeps=config.max_sweeps,
        )
        apart = jnp.max(jnp.abs(gradient))
        gradient = gradient + hyper.weight_decay * weights
        state, guard = apply_gradients(state, gradient, tx, learning_rate=hyper.learning_rate, loss=loss)
        return state, {"loss": loss, "counts_apart": apart, **guard}

    return update


def make_train(
    config: Config,
    process: DecisionProcess,
    demonstrated: Float[Array, " S"],
    features: Float[Array, "S K"] | None = None,
) -> Callable[[Hyper], tuple[State, Metrics]]:
    """`train(hyper) -> (state, history)`: the weights that explain the demonstrations; no key is needed.

    Args:
      demonstrated: from `demonstrated_arrivals`, with the gamma of `hyper`.
      features: of each state; None for a weight of its own for each.
    """
    known = jnp.eye(len(process.start), dtype=process.start.dtype) if features is None else features
    tx = make_optimizer(config.optimizer)
    update = make_update(config, process, known, tx)

    def train(hyper: Hyper) -> tuple[State, Metrics]:
        def step(state: State, _: None) -> tuple[State, Metrics]:
            return update(state, hyper, demonstrated)

        return jax.lax.scan(step, init(known, tx), length=config.updates)

    return train
