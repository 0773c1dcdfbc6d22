"""Bias and variance from TD(0) to Monte Carlo, on a random walk of 19 states, as one figure.

    python tools/tables/plot_tabular.py --out bias_variance.svg

Left: squared bias and variance of the n-step targets of a value function that knows nothing (all 0), averaged
over states. Right: what follows from them: the error of the values learnt in ten episodes by online n-step
TD, for each n at many learning rates (as in Sutton & Barto 2018, figure 7.2).
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax.core.types import Array, Float
from rlhf_jax.metrics.pictures import picture
from rlhf_jax.rl.tabular import dynamic_programming, prediction

WALK = dynamic_programming.random_walk(19, left_reward=-1.0)
EXACT = dynamic_programming.chain_values(WALK, gamma=1.0)
INNER = ~WALK.terminal
LENGTH = 600  # longer than nearly all episodes


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw.

    Attributes:
      out: the figure; its ending says the format.
      episodes: behind the left half.
      seeds: behind the right half, ten episodes each.
      most: the largest n is 2 to this power.
    """

    out: pathlib.Path = pathlib.Path("bias_variance.svg")
    episodes: int = 2000
    seeds: int = 100
    most: int = 9


def bias_and_variance(episodes: prediction.Episode, *, n: int) -> tuple[Array, Array]:
    """Squared bias and variance of the n-step targets, averaged over states."""
    blank = jnp.zeros(len(EXACT))
    target = functools.partial(prediction.n_step_targets, blank, n=n, gamma=1.0)
    targets = jax.vmap(lambda episode: target(episode))(episodes)
    count, total, squares = (
        jnp.zeros(len(EXACT)).at[episodes.states].add(jnp.where(episodes.mask, x, 0))
        for x in (jnp.ones_like(targets), targets, jnp.square(targets))
    )
    mean = total / jnp.maximum(count, 1)
    variance = squares / jnp.maximum(count, 1) - jnp.square(mean)
    weights = INNER / jnp.sum(INNER)
    return jnp.sum(weights * jnp.square(mean - EXACT)), jnp.sum(weights * variance)


def errors_learnt(keys: Array, rates: Float[Array, " R"], *, n: int) -> Float[Array, " R"]:
    """Root mean squared error over states, averaged over ten episodes and over seeds, for each rate."""

    def one(key: Array, rate: Array) -> Array:
        episodes = prediction.sample_episodes(WALK, key, episodes=10, length=LENGTH)
        rule = functools.partial(prediction.n_step_td, n=n, learning_rate=rate, gamma=1.0)
        _, values = prediction.learn(rule, jnp.zeros(len(EXACT)), episodes)
        return jnp.mean(jnp.sqrt(jnp.mean(jnp.square(values - EXACT)[:, INNER], axis=1)))

    return jnp.mean(jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, rates), axis=0)


def draw(options: Options) -> None:
    """Computes and writes the figure."""
    steps = [2**power for power in range(options.most + 1)]
    rates = jnp.linspace(0.02, 1.0, 25)
    key, seed_key = jax.random.split(jax.random.key(0))
    episodes = prediction.sample_episodes(WALK, key, episodes=options.episodes, length=LENGTH)
    keys = jax.random.split(seed_key, options.seeds)

    pairs = [jax.jit(functools.partial(bias_and_variance, n=n))(episodes) for n in steps]
    errors = {n: jax.jit(functools.partial(errors_learnt, n=n))(keys, rates) for n in steps}
    with picture(options.out, 1, 2, height=3.2) as (left, right):
        left.plot(steps, [float(bias) for bias, _ in pairs], "o-", label="squared bias")
        left.plot(steps, [float(variance) for _, variance in pairs], "s-", label="variance")
        left.set(xlabel="n (1: TD(0), to the right Monte Carlo)", title="targets of an ignorant V")
        left.set_xscale("log", base=2)
        left.legend(frameon=False)
        for n in steps:
            right.plot(rates, errors[n], label=f"n = {n}")
        right.set(
            xlabel="learning rate", ylabel="RMS error", ylim=(0.2, 0.6), title="values after 10 episodes"
        )
        right.legend(frameon=False, ncols=2)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    draw(tyro.cli(Options))
