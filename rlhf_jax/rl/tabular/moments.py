"""Exact mean and variance of advantage estimates on a Markov chain: what gamma and lambda trade.

Nothing is sampled. From the state that a step leads to, the rest of the estimate has a first and a second
moment, each the solution of linear equations (as for the variance of TD targets, Sobel 1982).
"""

import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Scalar
from rlhf_jax.rl.tabular.dynamic_programming import MarkovChain


def advantage_moments(
    chain: MarkovChain, values: Float[Array, " S"], *, gamma: Scalar, gae_lambda: Scalar
) -> tuple[Float[Array, "S S"], Float[Array, "S S"]]:
    """(mean, variance) of GAE(gamma, lambda) over what follows each transition s -> s'.

        A = delta + gamma lambda A',   delta = r + gamma V(s') - V(s)   (Schulman et al. 2016, eq. 16)

    Args:
      values: V, exact or not; of terminal states they are taken for 0.
      gamma: with lambda below 1, or 1 where every episode ends with certainty.

    Returns:
      Rows and columns of terminal states hold what a step out of or into them would give.
    """
    goes_on = ~chain.terminal
    values = jnp.where(goes_on, values, 0)
    deltas = chain.rewards + gamma * values[None, :] - values[:, None]
    decay = gamma * gae_lambda
    first = _expected(chain, deltas, decay)
    squares = jnp.square(deltas) + 2 * deltas * decay * first[None, :]
    second = _expected(chain, squares, decay**2)
    variance = decay**2 * (second - jnp.square(first))
    return deltas + decay * first[None, :], jnp.broadcast_to(variance[None, :], deltas.shape)


def _expected(chain: MarkovChain, terms: Float[Array, "S S"], decay: Scalar) -> Float[Array, " S"]:
    """x(s) = E[term(s, s') + decay x(s')], 0 in terminal states."""
    onwards = chain.transitions * ~chain.terminal[:, None] * ~chain.terminal[None, :]
    means = jnp.where(chain.terminal, 0, jnp.sum(chain.transitions * terms, axis=1))
    return jnp.linalg.solve(jnp.eye(len(means)) - decay * onwards, means)


def bias_and_variance(
    chain: MarkovChain,
    values: Float[Array, " S"],
    exact: Float[Array, " S"],
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(squared bias, variance) of GAE against the undiscounted advantage r + exact(s') - exact(s).

    What an estimate is off by whatever follows a state moves no policy gradient, and is no bias here.
    Averaged over the transitions of states that are not terminal, each state with the same weight.
    """
    mean, variance = advantage_moments(chain, values, gamma=gamma, gae_lambda=gae_lambda)
    off = mean - (chain.rewards + exact[None, :] - exact[:, None])
    off -= jnp.sum(chain.transitions * off, axis=1, keepdims=True)
    inner = ~chain.terminal
    weights = chain.transitions * inner[:, None] / jnp.sum(inner)
    return jnp.sum(weights * jnp.square(off)), jnp.sum(weights * variance)
