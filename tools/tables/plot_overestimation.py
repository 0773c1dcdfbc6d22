"""How far DQN believes in too much, with and without double Q-learning, as one figure.

    python tools/tables/plot_overestimation.py --out overestimation.svg

In this world rewards are pure noise: whatever a policy does, its value is 0. What the network says the best
action is worth is then overestimation alone: the maximum over actions picks the errors that flatter
(van Hasselt et al. 2016).
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, PRNGKeyArray
from rlhf_jax.distributed.runtime import choose_threads, compiler_options
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.rl.algorithms import dqn
from rlhf_jax.rl.envs.environments import adapt
from rlhf_jax.rl.loops.off_policy import RunConfig

ACTIONS, DIMENSIONS = 8, 2


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw.

    Attributes:
      out: the figure; its ending says the format.
      seeds: lines behind each mean.
      steps: environment steps of each run.
      num_logs: points of each line.
    """

    out: pathlib.Path = pathlib.Path("overestimation.svg")
    seeds: int = 8
    steps: int = 20_000
    num_logs: int = 20


@pytree_dataclass
class Params:
    """Of the environment."""

    max_steps_in_episode: int = 50


class Noise:
    """An environment in gymnax's manner: every place and every reward is drawn at random."""

    def reset_env(self, key: PRNGKeyArray, params: Any) -> tuple[Array, Array]:
        """A place, and 0 steps."""
        del params
        return jax.random.uniform(key, (DIMENSIONS,), minval=-1.0), jnp.int32(0)

    def step_env(self, key: PRNGKeyArray, state: Array, action: Array, params: Any):
        """Another place, a standard normal reward, no end."""
        del action
        place_key, reward_key = jax.random.split(key)
        place, _ = self.reset_env(place_key, params)
        return place, state + 1, jax.random.normal(reward_key), jnp.bool_(False), {}

    def is_truncated(self, state: Array, params: Any) -> Array:
        """Cut after some steps."""
        return state >= params.max_steps_in_episode

    def action_space(self, params: Any) -> Any:
        """A few actions, none of which does anything."""
        from gymnax.environments import spaces

        del params
        return spaces.Discrete(ACTIONS)

    def observation_space(self, params: Any) -> Any:
        """A square."""
        from gymnax.environments import spaces

        del params
        return spaces.Box(-1.0, 1.0, (DIMENSIONS,))


def curves(options: Options, *, double: bool) -> tuple[Array, Array]:
    """(steps [T], mean max Q over places [seeds, T])."""
    params = Params()
    env = adapt("Noise", Noise(), params)
    config = dqn.Config(
        run=RunConfig(
            total_steps=options.steps,
            learning_starts=500,
            capacity=2000,
            train_every=4,
            batch_size=32,
            num_logs=options.num_logs,
        ),
        double=double,
    )
    run, network = dqn.make_run(config, env, params), dqn.make_network(config, env)
    hyper = dqn.Hyper(learning_rate=1e-3, gamma=0.9, epsilon_steps=options.steps / 2)
    places = jax.random.uniform(jax.random.key(1), (500, DIMENSIONS), minval=-1.0)

    def whole(key: PRNGKeyArray) -> tuple[Array, Array]:
        def step(state: Any, _: None):
            state = run.step(state, hyper)[0]
            values = network.apply({"params": state.agent.learner.params}, places)
            return state, (state.steps, jnp.mean(jnp.max(jnp.asarray(values), axis=-1)))

        return jax.lax.scan(step, run.init(key, hyper), length=options.num_logs)[1]

    keys = jax.random.split(jax.random.key(0), options.seeds)
    steps, values = jax.jit(jax.vmap(whole), compiler_options=compiler_options())(keys)
    return steps[0], values


def draw(options: Options) -> None:
    """Trains, and writes the figure."""
    choose_threads(side_by_side=True)
    found = {"DQN": curves(options, double=False), "double DQN": curves(options, double=True)}
    with picture(options.out, 1, 1, height=3.2) as (axes,):
        lines = {}
        for label, (steps, values) in found.items():
            (lines[label],) = axes.plot(steps, jnp.mean(values, axis=0))
            axes.plot(steps, values.T, color=lines[label].get_color(), alpha=0.25, linewidth=0.8)
            lines["value of every policy"] = axes.plot(steps, 0 * steps, color="grey", linestyle=":")[0]
            print(f"{label}: max Q {jnp.mean(values[:, -5:]):.2f} where the value is 0")
        axes.set(xlabel="steps", ylabel="max Q, mean over places", title="rewards are noise")
        name_ends(axes, lines)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    draw(tyro.cli(Options))
