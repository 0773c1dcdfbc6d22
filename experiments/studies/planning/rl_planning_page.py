"""The page and the picture of the studies of planning ahead, from what their runs left behind."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import Array, Float
from rlhf_jax.evaluation.statistics import iqm_interval
from rlhf_jax.metrics.pages import commands, when_and_with
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.rl.algorithms import dyna, options as rl_options
from rlhf_jax.rl.envs import mazes
from rlhf_jax.rl.tabular import dynamic_programming
from rlhf_jax.sweep.plots import curve_with_band

ENVIRONMENT, SOLVED = "Pendulum-v1", -200.0
SLIP, GAMMA = 1 / 3, 0.9
MOVED_GOAL = 9 * 13 + 3  # in the room below the start
PICTURE = "rl_planning.svg"
Histories = Mapping[str, Mapping[str, np.ndarray]]


def four_rooms() -> list[dynamic_programming.DecisionProcess]:
    """The rooms with the first goal, and with the second."""
    first = mazes.maze(mazes.FOUR_ROOMS, slip=SLIP)
    return [first, mazes.with_goal(first, MOVED_GOAL)]


def option_sets() -> dict[str, rl_options.OptionSet]:
    """What may be chosen among."""
    hallway = rl_options.hallway_options(mazes.FOUR_ROOMS, slip=SLIP, gamma=GAMMA)
    actions = rl_options.primitive_options(four_rooms()[0])
    return {"actions": actions, "hallways": hallway, "both": rl_options.joined(hallway, actions)}


def best_value() -> float:
    """Exact value of the maze's start."""
    maze = mazes.maze(mazes.DYNA_MAZE)
    values, _ = dynamic_programming.value_iteration(maze, gamma=float(dyna.Hyper().gamma))
    return float(jnp.sum(maze.start * values))


def steps_until_optimal(found: Mapping[str, np.ndarray], best: float) -> np.ndarray:
    """Real steps of each seed until its greedy policy has the optimum's value; NaN where it never has."""
    reached = found["greedy_value"] >= best * (1 - 1e-4)
    steps = np.cumsum(found["length"], axis=1)
    return np.where(reached.any(axis=1), steps[np.arange(len(steps)), reached.argmax(axis=1)], np.nan)


def training_returns(found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(steps [U], mean return of the episodes of training that ended in each report [S, U])."""
    ended = found["episodes"]
    returns = np.where(ended > 0, found["episode_return_sum"] / np.maximum(ended, 1), np.nan)
    return found["steps"].mean(axis=0), returns


def steps_until_solved(found: Mapping[str, np.ndarray]) -> float:
    """Real steps after which the IQM over seeds of the training returns first is above `SOLVED`."""
    steps, returns = training_returns(found)
    above = curve_with_band(returns)[0] >= SOLVED
    return float(steps[above.argmax()]) if above.any() else float("nan")


def shortest(process: dynamic_programming.DecisionProcess) -> float:
    """Expected steps of an optimal policy from the start, exactly."""
    values, _ = dynamic_programming.value_iteration(process, gamma=GAMMA)
    policy = dynamic_programming.greedy_policy(
        dynamic_programming.action_values(process, values, gamma=GAMMA)
    )
    each = dataclasses.replace(process, rewards=jnp.ones_like(process.rewards))
    free = jnp.where(mazes.free_cells(mazes.FOUR_ROOMS), False, True)
    each = dataclasses.replace(each, terminal=each.terminal | free)  # walls lead nowhere
    return float(jnp.sum(process.start * dynamic_programming.policy_values(each, policy, gamma=1.0)))


def exact_table() -> str:
    """What each set of options could reach, and in how many sweeps."""
    process = four_rooms()[0]
    optimum, _ = dynamic_programming.value_iteration(process, gamma=GAMMA)
    lines = ["| chosen among | value of the start | of the optimum | sweeps |", "|---|---|---|---|"]
    for name, chosen in option_sets().items():
        q, sweeps = rl_options.smdp_value_iteration(process, chosen, gamma=GAMMA)
        value = _of_start(process, rl_options.best_values(q, chosen.initiations))
        best = _of_start(process, optimum)
        lines.append(f"| {name} | {value:.4f} | {value / best:.1%} | {int(sweeps)} |")
    return "\n".join(lines)


def _of_start(process: dynamic_programming.DecisionProcess, values: Float[Array, " S"]) -> float:
    return float(jnp.sum(process.start * values))


HEAD = """# Studies of planning ahead

Written by `experiments/studies/planning/rl_planning.py`. Numbers are interquartile means over seeds with 95 %
bootstrap intervals."""
DYNA_TEXT = """## Dyna in a maze

{seeds} seeds, {episodes} episodes, learning rate .1, gamma .95, epsilon .1, as in Sutton & Barto (2018),
figure 8.2; the shortest way has 14 steps. After each episode the greedy policy is evaluated exactly; `real
steps until optimal` is where it first has the value that dynamic programming gives."""
CONTROL_TEXT = """## A learned model on Pendulum

{seeds} seeds. `mpc` learns an ensemble of networks from real transitions and plans by the cross-entropy
method at every step; `sac` has the settings of the table of results. Return of the episodes of training, and
after it of {episodes} episodes of its own for each seed, actions deterministic; `above {solved:g}` is where
the interquartile mean of the training returns first is."""
ROOMS_TEXT = """## Four rooms

Moves fail with a chance of 1/3 (in one of the other three directions), the goal pays 1, gamma is .9 (Sutton,
Precup & Singh 1999). By exact value iteration over what may be chosen, from the corner of the first room to
the goal in the last, in a room's middle, where no hallway option ends:"""
LEARNT_TEXT = """{seeds} seeds; after {episodes} episodes the goal moves to another room, and what was
learned stays. Mean steps an episode; an optimal policy takes {first:.1f} to the first goal and {second:.1f}
to the second, exactly."""


def dyna_table(found: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """A line for each learner in the maze."""
    lines = [
        "| planner | real steps in all | last ten episodes | real steps until optimal | seeds that are |",
        "|---|---|---|---|---|",
    ]
    best = best_value()
    for name, histories in found.items():
        lengths, until = histories["length"], steps_until_optimal(histories, best)
        done = until[~np.isnan(until)]
        shown = f"{iqm_interval(done):,.0f}" if len(done) else "-"
        last = iqm_interval(lengths[:, -10:].mean(axis=1))
        total = iqm_interval(lengths.sum(axis=1))
        lines.append(f"| {name} | {total:,.0f} | {last:.1f} | {shown} | {len(done)} of {len(until)} |")
    return "\n".join(lines)


def control_table(found: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """A line for each algorithm on Pendulum."""
    lines = [
        f"| algorithm | real steps | above {SOLVED:g} after | return after training | least seed |",
        "|---|---|---|---|---|",
    ]
    for algo, histories in found.items():
        scores, until = histories["evaluation_return"], steps_until_solved(histories)
        reached = "never" if np.isnan(until) else f"{until:,.0f}"
        taken = int(histories["steps"].max())
        lines.append(f"| {algo} | {taken:,} | {reached} | {iqm_interval(scores):.0f} | {scores.min():.0f} |")
    return "\n".join(lines)


def rooms_table(found: Mapping[str, np.ndarray], episodes: int) -> str:
    """A line for each learner in the four rooms."""
    fifth = max(episodes // 5, 1)
    parts = {
        "first episode": slice(0, 1),
        f"episodes 1-{fifth}": slice(0, fifth),
        f"last {fifth} before": slice(episodes - fifth, episodes),
        f"{fifth} after the goal moved": slice(episodes, episodes + fifth),
        f"last {fifth}": slice(2 * episodes - fifth, 2 * episodes),
    }
    lines = [f"| learner | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for name, lengths in found.items():
        cells = (f"{iqm_interval(lengths[:, part].mean(axis=1)):.0f}" for part in parts.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, mazes_found: Any, control: Any, rooms: Mapping[str, np.ndarray]) -> None:
    """The three studies, one below the other."""

    def line(axes: Any, x: np.ndarray, runs: np.ndarray) -> Any:
        centre, low, high = curve_with_band(runs)
        (drawn,) = axes.plot(x, centre, linewidth=1.3)
        axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        return drawn

    with picture(path, 3, 1, height=2.4) as (maze, pendulum, four):
        found = {
            name: line(maze, np.arange(1, held["length"].shape[1] + 1), held["length"])
            for name, held in mazes_found.items()
        }
        maze.axhline(14, color="0.4", linestyle=":", linewidth=1)
        maze.set(title="Dyna in a maze (dotted: the shortest way)", xlabel="episode", yscale="log")
        maze.set(ylabel="steps of the episode")
        name_ends(maze, found)
        found = {algo: line(pendulum, *training_returns(held)) for algo, held in control.items()}
        pendulum.set(title=ENVIRONMENT, xlabel="real steps", ylabel="return of training episodes")
        name_ends(pendulum, found)
        found = {
            name: line(four, np.arange(1, lengths.shape[1] + 1), lengths) for name, lengths in rooms.items()
        }
        half = next(iter(rooms.values())).shape[1] // 2
        for number, process in enumerate(four_rooms()):
            ends = (number * half + 0.5, (number + 1) * half + 0.5)
            four.plot(ends, [shortest(process)] * 2, color="0.4", linestyle=":", linewidth=1)
        four.axvline(half + 0.5, color="0.4", linewidth=0.6)
        four.set(title="Four rooms, the goal moves half way (dotted: the shortest way)", xlabel="episode")
        four.set(ylabel="steps of the episode", yscale="log")
        name_ends(four, found)


def page_text(
    found: tuple[Histories, Histories, Mapping[str, np.ndarray]],
    cells: Sequence[Mapping[str, Any]],
    remarks: str,
    *,
    eval_episodes: int,
) -> str:
    """The page; `remarks` say in words what it shows, `cells` are the summaries of all runs."""
    in_maze, control, rooms = found
    seeds, episodes = next(iter(in_maze.values()))["length"].shape
    control_seeds = len(next(iter(control.values()))["evaluation_return"])
    first, second = map(shortest, four_rooms())
    parts = [
        HEAD,
        f"![planning]({PICTURE})",
        remarks,  # to the next heading
        DYNA_TEXT.format(seeds=seeds, episodes=episodes),
        dyna_table(in_maze),
        CONTROL_TEXT.format(seeds=control_seeds, episodes=eval_episodes, solved=SOLVED),
        control_table(control),
        ROOMS_TEXT,
        exact_table(),
        LEARNT_TEXT.format(seeds=seeds, episodes=episodes, first=first, second=second),
        rooms_table(rooms, episodes),
        f"## Made\n\n{when_and_with(cells)}.",
        commands(cells),
    ]
    return "\n\n".join(parts) + "\n"
