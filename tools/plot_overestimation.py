"""How far DQN believes in too much, with and without double Q-learning, on CartPole, as one figure.

    python tools/plot_overestimation.py --out overestimation.svg

Along training: what the network says of the first state of an episode (max Q) and the discounted return that
the greedy policy then gets. No policy can get more than 1 / (1 - gamma).
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax.core.types import Array, PRNGKeyArray, Scalar
from rlhf_jax.rl import dqn, environments
from rlhf_jax.rl.off_policy import RunConfig

ENV, ENV_PARAMS = environments.make("CartPole-v1")
EPISODES = 16


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw.

    Attributes:
      out: the figure; its ending says the format.
      seeds: lines behind each mean.
      steps: environment steps of each run.
      reports: points of each line.
    """

    out: pathlib.Path = pathlib.Path("overestimation.svg")
    seeds: int = 8
    steps: int = 60_000
    reports: int = 30


def believed_and_true(run: Any, network: Any, state: Any, key: PRNGKeyArray, gamma: Scalar) -> Array:
    """[2]: mean max Q of first states, and mean discounted return from them."""
    envs = jax.vmap(ENV.reset, (0, None))(jax.random.split(key, EPISODES), ENV_PARAMS)
    believed = jnp.max(network.apply({"params": state.agent.learner.params}, envs.obs), axis=-1)

    def step(carry: tuple[Any, Array, Array], key: PRNGKeyArray):
        envs, factor, total = carry
        action, _ = run.act(state, envs.obs, jnp.zeros(EPISODES, bool), (), key, deterministic=True)
        keys = jax.random.split(key, EPISODES)
        envs, seen = jax.vmap(ENV.step, (0, 0, 0, None))(keys, envs, action, ENV_PARAMS)
        return (envs, gamma * factor * ~seen.done, total + factor * seen.reward), None

    carry = (envs, jnp.ones(EPISODES), jnp.zeros(EPISODES))
    (_, _, returns), _ = jax.lax.scan(step, carry, jax.random.split(key, ENV.max_steps))
    return jnp.stack([jnp.mean(believed), jnp.mean(returns)])


def curves(options: Options, *, double: bool) -> tuple[Array, Array]:
    """(steps [T], believed and true [seeds, T, 2])."""
    config = dqn.Config(
        run=RunConfig(total_steps=options.steps, learning_starts=1000, reports=options.reports),
        double=double,
    )
    run, network = dqn.make_run(config, ENV, ENV_PARAMS), dqn.make_network(config, ENV)
    hyper = dqn.Hyper(learning_rate=1e-3, epsilon_steps=options.steps / 2)

    def whole(key: PRNGKeyArray) -> tuple[Array, Array]:
        def step(state: Any, key: PRNGKeyArray):
            state, _ = run.step(state, hyper)
            return state, (state.steps, believed_and_true(run, network, state, key, hyper.gamma))

        keys = jax.random.split(jax.random.fold_in(key, 1), options.reports)
        return jax.lax.scan(step, run.init(key, hyper), keys)[1]

    steps, points = jax.jit(jax.vmap(whole))(jax.random.split(jax.random.key(0), options.seeds))
    return steps[0], points


def draw(options: Options) -> None:
    """Trains, and writes the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, double in zip(panels, (False, True), strict=True):
        steps, points = curves(options, double=double)
        for which, colour, label in ((0, "tab:red", "max Q"), (1, "tab:blue", "discounted return")):
            axes.plot(steps, points[:, :, which].T, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, jnp.median(points[:, :, which], axis=0), color=colour, label=label)
        axes.axhline(100, color="grey", linestyle=":", label="most that is possible")
        axes.set(xlabel="steps", title="double DQN" if double else "DQN", yscale="symlog")
        last = jnp.median(points[:, -5:, 0]), jnp.median(points[:, -5:, 1])
        print(f"{'double ' if double else ''}DQN: max Q {last[0]:.1f}, discounted return {last[1]:.1f}")
    panels[0].legend(frameon=False)
    figure.savefig(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    draw(tyro.cli(Options))
