"""Tabular prediction, control, search and inverse RL against exact dynamic programming.

    python experiments/studies/tabular/tabular_methods.py --out runs/tabular  # minutes on a CPU core
    python experiments/studies/tabular/tabular_methods.py --out runs/quick --seeds 4 --episodes 5

Prediction: n-step TD, TD(lambda) online and offline, and Monte Carlo on the random walk of 19 states (Sutton
& Barto 2018, figures 7.2 and 12.6). Control: SARSA, expected SARSA and Q-learning on FrozenLake, and
Q-learning from a log of random moves, against the optimal values. Inverse RL: which reward
demonstrations explain. Every seed of every setting is one lane of one compiled program.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Float, PRNGKeyArray
from rlhf_jax.evaluation.statistics import iqm_interval
from rlhf_jax.metrics.pages import commands, kept_remarks, made, when_and_with
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.rl.envs import mazes
from rlhf_jax.rl.tabular import control, dynamic_programming as dp, inverse, prediction
from rlhf_jax.search import astar
from rlhf_jax.stages import option_checks
from rlhf_jax.training.run_folder import describe_run

STATES = 19
LENGTH = 1000
"""Steps after which an episode of the walk is cut; hardly any is as long."""
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
N_STEPS = (1, 2, 4, 8, 16, 64)
LAMBDAS = (0.0, 0.4, 0.8, 0.9, 0.95, 1.0)
GAMMA = 0.95
"""Of control and inverse RL."""
TEMPERATURE = 0.1
"""Of the demonstrators."""
TARGETS = {
    "SARSA": control.sarsa_target,
    "expected SARSA": control.expected_sarsa_target,
    "Q-learning": control.q_learning_target,
}
SMALL_LAKE = ("SFF", "FHF", "FFG")
"""Small enough to try each of its policies."""
PAGE, PICTURE = "README.md", "tabular.svg"

Values = Float[Array, " S"]
Rule = Callable[[Values, prediction.Episode, Array], Values]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the study.

    Attributes:
      out: folder of the run.
      page: where the page goes, with its picture beside it; None for the folder of the run.
      seeds: walks behind each point, and runs of control.
      episodes: of each walk.
      steps: transitions of each run of control, and in the log.
    """

    out: Path = Path("runs/tabular")
    page: Path | None = None
    seeds: int = 100
    episodes: int = 10
    steps: int = 200_000


# Prediction ------------------------------------------------------------------------------------------


def rules() -> dict[str, dict[str, Rule]]:
    """Rules `(values, episode, learning_rate) -> values` by panel and name; none discounts."""

    def offline(targets: Callable[[Values, prediction.Episode], Array]) -> Rule:
        return lambda values, episode, rate: prediction.offline_update(
            values, episode, targets(values, episode), learning_rate=rate
        )

    def n_step(n: int, values: Values, episode: prediction.Episode, rate: Array) -> Values:
        return prediction.n_step_td(values, episode, n=n, learning_rate=rate, gamma=1.0)

    def traces(lambda_: float, values: Values, episode: prediction.Episode, rate: Array) -> Values:
        return prediction.td_lambda(values, episode, learning_rate=rate, gamma=1.0, lambda_=lambda_)

    n_step_offline = functools.partial(prediction.n_step_targets, gamma=1.0)
    forward_view = functools.partial(prediction.lambda_targets, gamma=1.0)
    monte_carlo = functools.partial(prediction.monte_carlo_targets, gamma=1.0)
    return {
        "n-step TD": {f"n = {n}": functools.partial(n_step, n) for n in N_STEPS},
        "n-step TD, offline": {f"n = {n}": offline(functools.partial(n_step_offline, n=n)) for n in N_STEPS},
        "TD(lambda)": {f"lambda = {x:g}": functools.partial(traces, x) for x in LAMBDAS},
        "TD(lambda), offline": {
            f"lambda = {x:g}": offline(functools.partial(forward_view, lambda_=x)) for x in LAMBDAS[:-1]
        }
        | {"Monte Carlo": offline(monte_carlo)},
    }


def prediction_errors(options: Options) -> dict[str, dict[str, np.ndarray]]:
    """Root mean squared error of each rule for each of `RATES`; infinite where it diverges."""
    walk = dp.random_walk(STATES, left_reward=-1.0)
    exact, inner = dp.chain_values(walk, gamma=1.0), ~walk.terminal
    keys = jax.vmap(jax.random.key)(np.arange(options.seeds))

    def walks(key: PRNGKeyArray) -> prediction.Episode:
        return prediction.sample_episodes(walk, key, episodes=options.episodes, length=LENGTH)

    episodes = jax.jit(jax.vmap(walks))(keys)

    def error(values: Float[Array, "E S"]) -> Array:
        return jnp.mean(jnp.sqrt(jnp.mean(jnp.square(values - exact), axis=-1, where=inner)))

    def of(rule: Rule) -> np.ndarray:
        def one(rate: Array, episodes: prediction.Episode) -> Array:
            return error(prediction.learn(lambda v, e: rule(v, e, rate), jnp.zeros(STATES + 2), episodes)[1])

        by_rate = jax.jit(jax.vmap(jax.vmap(one, in_axes=(None, 0)), in_axes=(0, None)))
        means = np.asarray(by_rate(jnp.asarray(RATES), episodes), np.float64).mean(axis=1)
        return np.where(np.isfinite(means), means, np.inf)

    found = {panel: {name: of(rule) for name, rule in members.items()} for panel, members in rules().items()}

    def first_visits(episodes: prediction.Episode) -> Array:
        rule = functools.partial(prediction.first_visit_monte_carlo, gamma=1.0)
        return error(prediction.learn(rule, prediction.init_averages(STATES + 2), episodes)[1].values)

    averaged = float(np.mean(jax.jit(jax.vmap(first_visits))(episodes)))
    found["Monte Carlo, mean of first visits"] = {"no rate": np.full(len(RATES), averaged)}
    return found


# Control ---------------------------------------------------------------------------------------------


def shortfall(lake: dp.DecisionProcess, action_values: Float[Array, "S A"]) -> Array:
    """Value at the start that the greedy policy lacks of the best."""
    best = dp.policy_iteration(lake, gamma=GAMMA)[1]
    ours = dp.policy_values(lake, dp.greedy_policy(action_values), gamma=GAMMA)
    return lake.start @ (best - ours)


def control_shortfalls(options: Options) -> dict[str, list[float]]:
    """What the greedy policy of each seed lacks of the best value of FrozenLake, after `options.steps`."""
    lake = dp.frozen_lake()
    keys = jax.vmap(jax.random.key)(np.arange(options.seeds))
    config = control.Config(steps=options.steps, num_logs=1)
    hyper = control.Hyper(gamma=GAMMA, epsilon_end=0.1, epsilon_steps=options.steps / 2)

    def learnt(target_fn: control.TargetFn, key: PRNGKeyArray) -> Array:
        state, _ = control.make_train(config, lake, target_fn)(key, hyper)
        return shortfall(lake, state.action_values)

    def from_log(key: PRNGKeyArray) -> Array:
        q = control.learn_from_log(
            jnp.zeros(lake.rewards.shape[:2]), random_log(lake, key, options.steps), gamma=GAMMA, sweeps=200
        )
        return shortfall(lake, q)

    found = {name: jax.jit(jax.vmap(functools.partial(learnt, fn)))(keys) for name, fn in TARGETS.items()}
    found["Q-learning from a log of random moves"] = jax.jit(jax.vmap(from_log))(keys)
    return {name: np.asarray(values, np.float64).tolist() for name, values in found.items()}


def random_log(lake: dp.DecisionProcess, key: PRNGKeyArray, size: int) -> control.Log:
    """Transitions from states and actions drawn alike."""
    state_key, action_key, next_key = jax.random.split(key, 3)
    count, actions, _ = lake.rewards.shape
    states = jax.random.choice(state_key, count, (size,), p=~lake.terminal / jnp.sum(~lake.terminal))
    chosen = jax.random.randint(action_key, (size,), 0, actions)
    after = jax.random.categorical(next_key, jnp.log(lake.transitions[states, chosen]))
    rewards = lake.rewards[states, chosen, after]
    return control.Log(states, chosen, rewards, after, lake.terminal[after])


def policy_search_difference() -> float:
    """Largest difference between policy iteration and the best of all policies, on a lake of nine fields."""
    lake = dp.frozen_lake(SMALL_LAKE)
    _, every = dp.search_policies(lake, gamma=GAMMA)
    _, iterated, _ = dp.policy_iteration(lake, gamma=GAMMA)
    return float(jnp.max(jnp.abs(every - iterated)))


# Shortest paths --------------------------------------------------------------------------------------


def shortest_paths() -> dict[str, tuple[int, int, int]]:
    """(moves by A*, states that it expands, moves by value iteration), with an estimate and without."""
    found = {}
    for name, rows in (("Dyna maze", mazes.DYNA_MAZE), ("four rooms", mazes.FOUR_ROOMS)):
        maze, width, letters = mazes.maze(rows), len(rows[0]), "".join(rows)
        start, goal = letters.index("S"), letters.index("G")
        after = jnp.argmax(maze.transitions, axis=-1)
        values, _ = dp.value_iteration(maze, gamma=GAMMA)
        moves = round(1 + float(jnp.log(values[start]) / jnp.log(GAMMA)))

        def successors(state: Array, after: Array = after) -> tuple[Array, Array, Array]:
            return after[state], jnp.ones(4), after[state] != state

        def distance(states: Array, width: int = width, goal: int = goal) -> Array:
            down, right = states // width - goal // width, states % width - goal % width
            return (jnp.abs(down) + jnp.abs(right)).astype(jnp.float32)

        def nothing(states: Array) -> Array:
            return jnp.zeros(len(states))

        for how, estimate in (("Dijkstra", nothing), ("A*, city blocks", distance)):
            route = astar.a_star(successors, estimate, start, goal, num_states=len(letters))
            path = astar.route_states(route, start, goal)
            found[f"{name}, {how}"] = (len(path) - 1, int(route.expanded), moves)
    return found


def paths_table() -> str:
    """Moves and expanded states of each search."""
    lines = ["| maze | moves | states expanded | moves by value iteration |", "|---|---|---|---|"]
    lines += [f"| {name} | {a} | {b} | {c} |" for name, (a, b, c) in shortest_paths().items()]
    return "\n".join(lines)


# Inverse RL ------------------------------------------------------------------------------------------


def inverse_shortfalls(options: Options, counts: Sequence[int]) -> dict[int, list[float]]:
    """What the policy behind so many demonstrations lacks of the demonstrators' value, by their count."""
    lake = dp.frozen_lake(slippery=False)
    config, size = inverse.Config(updates=500), len(lake.start)
    hyper = inverse.Hyper(gamma=GAMMA, temperature=TEMPERATURE, weight_decay=1e-3)

    def soft_optimal(process: dp.DecisionProcess) -> Float[Array, "S A"]:
        q, _, _ = inverse.soft_value_iteration(process, gamma=GAMMA, temperature=TEMPERATURE)
        return jax.nn.softmax(q / TEMPERATURE)

    demonstrator = dp.induced_chain(lake, soft_optimal(lake))
    theirs = lake.start @ dp.chain_values(demonstrator, gamma=GAMMA)

    def lacks(count: int, key: PRNGKeyArray) -> Array:
        episodes = prediction.sample_episodes(demonstrator, key, episodes=count, length=100)
        demonstrated = inverse.demonstrated_arrivals(episodes, num_states=size, gamma=GAMMA)
        state, _ = inverse.make_train(config, lake, demonstrated)(hyper)
        found = soft_optimal(inverse.with_rewards(lake, state.params, jnp.eye(size)))
        return theirs - lake.start @ dp.policy_values(lake, found, gamma=GAMMA)

    keys = jax.vmap(jax.random.key)(np.arange(min(options.seeds, 16)))
    found = {count: jax.jit(jax.vmap(functools.partial(lacks, count)))(keys) for count in counts}
    return {count: np.asarray(values, np.float64).tolist() for count, values in found.items()}


# Page ------------------------------------------------------------------------------------------------

HEAD = """# Tabular methods against exact solutions

Written by `experiments/studies/tabular/tabular_methods.py`."""


def prediction_table(errors: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """The best rate of each method."""
    lines = ["| method | setting | best rate | root mean squared error |", "|---|---|---|---|"]
    for panel, members in errors.items():
        for name, row in members.items():
            best = int(np.argmin(row))
            lines.append(f"| {panel} | {name} | {RATES[best]:g} | {row[best]:.3f} |")
    return "\n".join(lines)


def control_table(rows: Mapping[Any, Sequence[float]], heading: str) -> str:
    """Means with intervals over seeds, and the worst seed."""
    lines = [f"| {heading} | lacks | worst seed |", "|---|---|---|"]
    lines += [
        f"| {name} | {iqm_interval(np.asarray(row)):.4f} | {max(row):.4f} |" for name, row in rows.items()
    ]
    return "\n".join(lines)


def draw(path: Path, errors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Error over learning rate, a panel a family, with names at the curves."""
    names = [panel for panel in errors if "first" not in panel]
    with picture(path, 2, 2, height=2.8, sharex=True, sharey=True) as panels:
        for axes, panel in zip(panels, names, strict=True):
            lines = {}
            for name, row in errors[panel].items():
                shown = np.where(row < 0.56, row, np.nan)
                (lines[name.removeprefix("lambda = ")],) = axes.plot(RATES, shown)
            axes.set(title=panel, xlim=(0, 1.15), ylim=(0.15, 0.56))
            name_ends(axes, lines)
        figure = panels[0].get_figure()
        figure.supxlabel("learning rate")
        figure.supylabel("root mean squared error")


def page_text(
    options: Options,
    errors: Mapping[str, Mapping[str, np.ndarray]],
    lacking: Mapping[str, Sequence[float]],
    explained: Mapping[int, Sequence[float]],
    remarks: str,
) -> str:
    """The page; `remarks` say in words what it shows."""
    cell = made(options.out)
    parts = [
        HEAD,
        remarks,
        "## Prediction",
        f"A random walk of {STATES} states with -1 at the left end and 1 at the right, no discount; errors "
        f"against the exact values, over the first {options.episodes} episodes of {options.seeds} walks that "
        "all methods share. Offline methods change nothing before an episode ends.",
        f"![error over learning rate]({PICTURE})",
        prediction_table(errors),
        "## Control",
        f"FrozenLake 4 x 4, slippery, discount {GAMMA:g}, {options.steps:,} transitions, {options.seeds} "
        "seeds: what the greedy policy lacks of the best value at the start (interquartile mean with its 95 "
        "% bootstrap interval). Policy iteration and the best of all policies of a lake of nine fields "
        f"differ by {policy_search_difference():.1e}.",
        control_table(lacking, "algorithm"),
        "## Shortest paths",
        "A* in the mazes of the planning study, its estimate the distance in city blocks, or nothing.",
        paths_table(),
        "## Inverse RL",
        f"The same lake without slips. Demonstrators are soft-optimal at a temperature of {TEMPERATURE:g}; "
        "what the policy, that is soft-optimal for the reward which maximum entropy finds behind so many of "
        "their episodes, lacks of their value at the start.",
        control_table(explained, "demonstrations"),
        f"## Made\n\n{when_and_with([cell])}.",
        commands([cell]),
    ]
    return "\n\n".join(parts) + "\n"


def run(options: Options) -> None:
    """All three, then the page."""
    for name in ("seeds", "episodes", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give at least 1")
    files.hold(options.out, "--out")
    describe_run(options.out, option_checks.to_json(options), stage="tabular")
    errors, lacking = prediction_errors(options), control_shortfalls(options)
    explained = inverse_shortfalls(options, (1, 10, 100))
    page = options.page or options.out / PAGE
    files.write_text(page, page_text(options, errors, lacking, explained, kept_remarks(page)))
    draw(page.with_name(PICTURE), errors)
    print(f"Page: {page}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
