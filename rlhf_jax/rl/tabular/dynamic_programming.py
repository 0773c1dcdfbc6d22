"""Markov chains and decision processes as arrays, and their exact solutions by dynamic programming.

A terminal state ends the episode on arrival: its value is 0 and its own row of the arrays is never used.
All values are in units of reward, at the start of the transition whose reward comes first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar


@pytree_dataclass
class MarkovChain:
    """A Markov reward process.

    Attributes:
      transitions: P(next state | state); rows sum to 1.
      rewards: of each transition.
      start: distribution of the first state.
      terminal: states that end the episode.
    """

    transitions: Float[Array, "S S"]
    rewards: Float[Array, "S S"]
    start: Float[Array, " S"]
    terminal: Bool[Array, " S"]


@pytree_dataclass
class DecisionProcess:
    """A Markov decision process.

    Attributes:
      transitions: P(next state | state, action); rows sum to 1.
      rewards: of each transition.
      start: distribution of the first state.
      terminal: states that end the episode.
    """

    transitions: Float[Array, "S A S"]
    rewards: Float[Array, "S A S"]
    start: Float[Array, " S"]
    terminal: Bool[Array, " S"]


def random_walk(states: int, *, left_reward: float = 0.0, right_reward: float = 1.0) -> MarkovChain:
    """A walk left or right with equal chances (Sutton & Barto 2018, example 6.2).

    State 0 and state `states + 1` are terminal, with a reward on arrival; it starts in the middle.
    """
    size = states + 2
    inner = np.arange(1, states + 1)
    transitions, rewards = np.eye(size, dtype=np.float32), np.zeros((size, size), np.float32)
    transitions[inner, inner] = 0
    transitions[inner, inner - 1] = transitions[inner, inner + 1] = 0.5
    rewards[1, 0], rewards[states, states + 1] = left_reward, right_reward
    places = np.arange(size)
    return MarkovChain(
        transitions=jnp.asarray(transitions),
        rewards=jnp.asarray(rewards),
        start=jax.nn.one_hot((states + 1) // 2, size),
        terminal=jnp.asarray((places == 0) | (places == states + 1)),
    )


LAKE_4X4 = ("SFFF", "FHFH", "FFFH", "HFFG")
"""Start, frozen, hole, goal."""

MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
"""(down, right) of the actions left, down, right, up."""


def frozen_lake(rows: tuple[str, ...] = LAKE_4X4, *, slippery: bool = True) -> DecisionProcess:
    """FrozenLake: reach G for a reward of 1, fall into no H; actions are left, down, right, up.

    On slippery ice a move goes where it was meant to, or to either side of that, a third each.

    Args:
      rows: the map, of S, F, H and G; a move off its edge stays in place.
      slippery: False makes every move certain.

    Raises:
      UserError: rows of different lengths, or other letters.
    """
    letters = "".join(rows)
    width = len(rows[0])
    if set(letters) - set("SFHG") or "S" not in letters or any(len(row) != width for row in rows):
        raise UserError(f"FrozenLake map {rows}: give rows of one length, of S, F, H and G, with an S.")
    transitions = np.zeros((len(letters), 4, len(letters)), np.float32)
    slips = (-1, 0, 1) if slippery else (0,)
    for place in range(len(letters)):
        for action in range(4):
            for slip in slips:
                down, right = MOVES[(action + slip) % 4]
                row = min(max(place // width + down, 0), len(rows) - 1)
                column = min(max(place % width + right, 0), width - 1)
                transitions[place, action, row * width + column] += 1 / len(slips)
    letter = np.array(list(letters))
    start = (letter == "S").astype(np.float32)
    return DecisionProcess(
        transitions=jnp.asarray(transitions),
        rewards=jnp.broadcast_to(jnp.asarray(letter == "G", jnp.float32), transitions.shape),
        start=jnp.asarray(start / start.sum()),
        terminal=jnp.asarray((letter == "H") | (letter == "G")),
    )


def induced_chain(process: DecisionProcess, policy: Float[Array, "S A"]) -> MarkovChain:
    """The chain that remains once `policy` (action probabilities) chooses the actions."""
    joint = policy[:, :, None] * process.transitions
    transitions = jnp.sum(joint, axis=1)
    rewards = jnp.sum(joint * process.rewards, axis=1)
    return MarkovChain(
        transitions=transitions,
        rewards=jnp.where(transitions > 0, rewards / jnp.where(transitions > 0, transitions, 1), 0),
        start=process.start,
        terminal=process.terminal,
    )


def chain_values(chain: MarkovChain, *, gamma: Scalar) -> Float[Array, " S"]:
    """Exact values: v = (I - gamma P)^{-1} r (Sutton & Barto 2018, section 4.1).

    Args:
      gamma: below 1, or 1 where every episode ends with certainty.
    """
    rewards = jnp.sum(chain.transitions * chain.rewards, axis=1)
    onwards = chain.transitions * ~chain.terminal[:, None] * ~chain.terminal[None, :]
    system = jnp.eye(len(rewards), dtype=rewards.dtype) - gamma * onwards
    return jnp.linalg.solve(system, jnp.where(chain.terminal, 0, rewards))


def policy_values(
    process: DecisionProcess, policy: Float[Array, "S A"], *, gamma: Scalar
) -> Float[Array, " S"]:
    """Exact values of `policy`."""
    return chain_values(induced_chain(process, policy), gamma=gamma)


def action_values(
    process: DecisionProcess, values: Float[Array, " S"], *, gamma: Scalar
) -> Float[Array, "S A"]:
    """One Bellman backup (Sutton & Barto 2018, eq. 4.6).

        q(s, a) = sum_s' P(s' | s, a) [r(s, a, s') + gamma v(s')]

    0 in terminal states.
    """
    next_values = jnp.where(process.terminal, 0, values)
    backup = jnp.sum(process.transitions * (process.rewards + gamma * next_values), axis=-1)
    return jnp.where(process.terminal[:, None], 0, backup)


def greedy_policy(action_values: Float[Array, "S A"]) -> Float[Array, "S A"]:
    """Probability 1 on the best action, the first of equals."""
    return jax.nn.one_hot(jnp.argmax(action_values, axis=-1), action_values.shape[-1])


def value_iteration(
    process: DecisionProcess, *, gamma: Scalar, tolerance: Scalar = 1e-6, max_sweeps: int = 10_000
) -> tuple[Float[Array, " S"], Int[Array, ""]]:
    """Optimal values by repeated backups (Sutton & Barto 2018, eq. 4.10): v <- max_a q(s, a).

    Args:
      gamma: below 1, or 1 where the best policies end.
      tolerance: stop once no value moved by more; the values are then within
        `tolerance * gamma / (1 - gamma)` of the optimum.
      max_sweeps: stop after so many.

    Returns:
      (values, sweeps).
    """

    def backup(values: Float[Array, " S"]) -> Float[Array, " S"]:
        return jnp.max(action_values(process, values, gamma=gamma), axis=-1)

    return fixed_point(backup, jnp.zeros_like(process.start), tolerance=tolerance, max_sweeps=max_sweeps)


def fixed_point(
    backup: Callable[[Float[Array, "..."]], Float[Array, "..."]],
    values: Float[Array, "..."],
    *,
    tolerance: Scalar,
    max_sweeps: int,
) -> tuple[Float[Array, "..."], Int[Array, ""]]:
    """(values, sweeps): `backup` again and again, until none moves by more than `tolerance`."""

    def moving(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        return (carry[1] > tolerance) & (carry[2] < max_sweeps)

    def sweep(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values, _, sweeps = carry
        new = backup(values)
        return new, jnp.max(jnp.abs(new - values)), sweeps + 1

    infinity = jnp.asarray(jnp.inf, values.dtype)
    values, _, sweeps = jax.lax.while_loop(moving, sweep, (values, infinity, jnp.int32(0)))
    return values, sweeps


def policy_iteration(
    process: DecisionProcess, *, gamma: Scalar, tolerance: Scalar = 1e-6, max_rounds: int = 1000
) -> tuple[Int[Array, " S"], Float[Array, " S"], Int[Array, ""]]:
    """Optimal policy by exact evaluation and greedy improvement (Sutton & Barto 2018, section 4.3).

    Args:
      gamma: below 1, or 1 where every policy ends.
      tolerance: an action is exchanged only for one better by more, so that ties end the search.
      max_rounds: stop after so many.

    Returns:
      (actions, values, rounds).
    """
    num_actions = process.rewards.shape[1]

    def evaluate(actions: Int[Array, " S"]) -> Float[Array, " S"]:
        return policy_values(process, jax.nn.one_hot(actions, num_actions), gamma=gamma)

    def improving(carry: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        return carry[1] & (carry[2] < max_rounds)

    def improve(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        actions, _, rounds = carry
        q = action_values(process, evaluate(actions), gamma=gamma)
        kept = jnp.take_along_axis(q, actions[:, None], axis=-1)[:, 0]
        better = jnp.max(q, axis=-1) > kept + tolerance
        return jnp.where(better, jnp.argmax(q, axis=-1), actions), jnp.any(better), rounds + 1

    first = jnp.zeros(len(process.start), jnp.int32)
    actions, _, rounds = jax.lax.while_loop(improving, improve, (first, jnp.bool_(True), jnp.int32(0)))
    return actions, evaluate(actions), rounds


def search_policies(
    process: DecisionProcess, *, gamma: Scalar, batch_size: int = 1024
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """The best of all A^S deterministic policies, each evaluated exactly: an oracle for small processes.

    Actions in terminal states do not matter, and are not enumerated.

    Args:
      gamma: below 1, or 1 where every policy ends.
      batch_size: policies evaluated at a time.

    Returns:
      (actions, values) of the policy with the highest sum of values; an optimal one is best in every state.

    Raises:
      UserError: more than 2^24 policies.
    """
    size, num_actions = process.rewards.shape[:2]
    free = np.flatnonzero(~np.asarray(process.terminal))
    count = num_actions ** len(free)
    if count > 2**24:
        raise UserError(f"Exhaustive search: {count} policies are too many; use policy_iteration.")
    powers = np.zeros(size, np.int64)
    powers[free] = num_actions ** np.arange(len(free))
    weights = jnp.asarray(np.maximum(powers, 1), jnp.int32)

    def actions_of(index: Int[Array, ""]) -> Int[Array, " S"]:
        return jnp.where(process.terminal, 0, index // weights % num_actions)

    def values_of(index: Int[Array, ""]) -> Float[Array, " S"]:
        return policy_values(process, jax.nn.one_hot(actions_of(index), num_actions), gamma=gamma)

    totals = jax.lax.map(
        lambda index: jnp.sum(values_of(index)), jnp.arange(count, dtype=jnp.int32), batch_size=batch_size
    )
    best = jnp.argmax(totals).astype(jnp.int32)
    return actions_of(best), values_of(best)


def search_tree(
    process: DecisionProcess, state: Int[Array, ""], *, depth: int, gamma: Scalar
) -> Float[Array, " A"]:
    """Action values of one state by the whole tree of futures `depth` actions deep, values 0 below.

    Exhaustive: (A S)^depth leaves. Value iteration reaches the same numbers from the leaves upwards.
    """
    after = process.transitions[state]
    continuing = gamma * ~process.terminal
    deeper: Float[Array, " S"] = jnp.zeros_like(process.start)
    if depth > 1:
        children = jnp.arange(len(process.start))
        branches = jax.vmap(lambda child: search_tree(process, child, depth=depth - 1, gamma=gamma))
        deeper = jnp.max(branches(children), axis=-1)
    values = jnp.sum(after * (process.rewards[state] + continuing * deeper), axis=-1)
    return jnp.where(process.terminal[state], 0, values)
