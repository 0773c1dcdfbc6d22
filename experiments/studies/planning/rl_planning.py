"""Three studies of planning ahead: Dyna in a maze, a learned model on Pendulum, a hierarchy in four rooms.

    python experiments/studies/planning/rl_planning.py --out runs/rl_planning  # some minutes on a CPU core
    python experiments/studies/planning/rl_planning.py --out runs/quick --seeds 2 --control-seeds 2

Dyna plans 0, 5 and 50 steps after each real one; an ensemble of networks with the cross-entropy method plans
on Pendulum, beside SAC; options and a feudal hierarchy look for a goal that is moved half way. Exact dynamic
programming says what could be had. What is done is not done again.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rl_planning_page import ENVIRONMENT, GAMMA, PICTURE, draw, four_rooms, option_sets, page_text

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Metrics, PRNGKeyArray
from rlhf_jax.metrics.pages import PLAN, SUMMARY, held_summary, kept_remarks, made
from rlhf_jax.rl.algorithms import dyna, feudal, options as rl_options
from rlhf_jax.rl.envs import environments, mazes
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.tabular.steps import whole_episodes
from rlhf_jax.stages import option_checks, rl_agents
from rlhf_jax.sweep import product, sweep
from rlhf_jax.training.run_folder import describe_run

PLANNING_STEPS = (0, 5, 50)
SWEEPING = "prioritised sweeping, 5"
CONTROL = {"mpc": (1_400, 6), "sac": (6_000, 25)}
"""Real steps and reports of each algorithm; reports of 200 steps are episodes of Pendulum."""
PAGE = "RL_PLANNING.md"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the studies.

    Attributes:
      out: folder of what is done.
      page: where the page goes, with its picture beside it; None for the folder of what is done.
      seeds: of each learner in the maze and in the four rooms.
      control_seeds: of each algorithm on Pendulum.
      episodes: in the maze; in the four rooms before the goal moves, and again after it.
      eval_episodes: of each seed on Pendulum, after training.
      quiet: show no progress.
    """

    out: Path | None = None
    page: Path | None = None
    seeds: int = 32
    control_seeds: int = 8
    episodes: int = 50
    eval_episodes: int = 4
    quiet: bool = False


def cell(name: str, train: Any, hypers: Any, seeds: int, options: Options, **described: Any) -> Path:
    """Runs every setting with every seed unless that is done; leaves histories and `summary.json`."""
    folder = Path(options.out or ".") / name
    planned = json.loads(json.dumps({"cell": name, "seeds": seeds, **described}))
    if held_summary(folder, planned) is None:
        files.write_json(folder / PLAN, planned)
        describe_run(folder, option_checks.to_json(options), stage="rl_planning", cell=name)
        keys = jax.vmap(jax.random.key)(np.arange(seeds, dtype=np.uint32))
        # A setting at a time: with those that plan less beside those that plan more, all would wait.
        results = sweep(train, keys, hypers, chunk_size=seeds, folder=folder, quiet=options.quiet)
        files.write_arrays(folder / "history.npz", results.metrics)
        files.write_json(folder / SUMMARY, {**planned, **made(folder)})
        jax.clear_caches()
    return folder


def history(folder: Path) -> dict[str, np.ndarray]:
    """Metrics of a cell, [settings, seeds, ...] each."""
    return files.read_arrays(folder / "history.npz", remedy=f"remove {folder}, and the cell is made again")


# Dyna -------------------------------------------------------------------------------------------------


def run_dyna(options: Options) -> dict[str, dict[str, np.ndarray]]:
    """Histories [S, E] of each learner in the maze."""
    maze = mazes.maze(mazes.DYNA_MAZE)
    config = dyna.Config(episodes=options.episodes)
    described = {"episodes": options.episodes, "planning_steps": PLANNING_STEPS}
    hypers = product(dyna.Hyper(), planning_steps=PLANNING_STEPS)
    uniform = cell("dyna", dyna.make_train(config, maze), hypers, options.seeds, options, **described)
    train = dyna.make_train(config, maze, dyna.prioritized_sweeping)
    described["planning_steps"] = (5,)
    sweeping = cell("sweeping", train, product(dyna.Hyper()), options.seeds, options, **described)
    found = {
        f"{steps} planning steps": {name: values[row] for name, values in history(uniform).items()}
        for row, steps in enumerate(PLANNING_STEPS)
    }
    return {**found, SWEEPING: {name: values[0] for name, values in history(sweeping).items()}}


# A learned model --------------------------------------------------------------------------------------


def run_control(options: Options) -> dict[str, dict[str, np.ndarray]]:
    """Histories [S, U] of each algorithm on Pendulum, `evaluation_return` [S] among them."""
    env, env_params = environments.make(ENVIRONMENT)
    found = {}
    for algo, (steps, reports) in CONTROL.items():
        changes = (f"run.num_logs={reports}",)
        agent = rl_agents.make_agent(algo, env, steps, changes)
        course = agent.run(env, env_params)

        def train(key: PRNGKeyArray, hyper: Any, course: Any = course) -> tuple[Any, Metrics]:
            run_key, test_key = jax.random.split(key)
            state, history = make_train_fn(course)(run_key, hyper)
            returns, _ = evaluate(
                course,
                state,
                env,
                env_params,
                test_key,
                episodes=options.eval_episodes,
                deterministic=True,
            )
            return state, {**history, "evaluation_return": returns.mean()}

        described = {"steps": steps, "reports": reports, "eval_episodes": options.eval_episodes}
        folder = cell(algo, train, product(agent.hyper), options.control_seeds, options, **described)
        found[algo] = {name: values[0] for name, values in history(folder).items()}
    return found


# Hierarchy --------------------------------------------------------------------------------------------


def hierarchies(episodes: int) -> dict[str, tuple[Any, Any]]:
    """(train, hyper) of each learner; the goal moves after so many episodes, what was learned stays."""
    sets = option_sets()
    config, feudal_config = rl_options.Config(episodes=episodes), feudal.Config(episodes=episodes)
    rules = {
        "actions (Q-learning)": (sets["actions"], rl_options.smdp_learning),
        "options and actions, SMDP": (sets["both"], rl_options.smdp_learning),
        "options and actions, intra-option": (sets["both"], rl_options.intra_option_learning),
    }
    places = four_rooms()
    regions = mazes.regions(mazes.FOUR_ROOMS)

    def moving(steps: Sequence[Any], init: Any) -> Any:
        def train(key: PRNGKeyArray, hyper: Any) -> tuple[Any, Metrics]:
            state, histories = init(key, hyper), []
            for step in steps:
                state, history = whole_episodes(step, state, hyper, episodes=episodes)
                histories.append(history)
            return state, jax.tree.map(lambda *x: jnp.concatenate(x), *histories)

        return train

    found = {}
    for name, (chosen, rule) in rules.items():
        steps = [rl_options.make_step(config, place, chosen, rule) for place in places]

        def init(key: PRNGKeyArray, hyper: Any, chosen: rl_options.OptionSet = chosen) -> Any:
            return rl_options.init(places[0], chosen, key, hyper)

        found[name] = (moving(steps, init), rl_options.Hyper(gamma=GAMMA))
    steps = [feudal.make_step(feudal_config, place, regions) for place in places]
    found["feudal"] = (
        moving(steps, lambda key, hyper: feudal.init(places[0], regions, key, hyper)),
        feudal.Hyper(gamma=GAMMA),
    )
    return found


def run_hierarchies(options: Options) -> dict[str, np.ndarray]:
    """Lengths [S, 2 E] of the episodes of each learner."""
    found = {}
    for number, (name, (train, hyper)) in enumerate(hierarchies(options.episodes).items()):
        described = {"learner": name, "episodes": options.episodes}
        folder = cell(f"rooms_{number}", train, product(hyper), options.seeds, options, **described)
        found[name] = history(folder)["length"][0]
    return found


def run(options: Options) -> None:
    """All studies, then the page."""
    if options.out is None:
        raise UserError("--out is missing: name the folder of the studies")
    for name in ("seeds", "control_seeds", "episodes", "eval_episodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    files.hold(options.out, "--out")
    found = run_dyna(options), run_control(options), run_hierarchies(options)
    names = ("dyna", "sweeping", *CONTROL, *(f"rooms_{number}" for number in range(len(found[2]))))
    cells = [files.read_json(options.out / name / SUMMARY) for name in names]
    page = options.page or options.out / PAGE
    text = page_text(found, cells, kept_remarks(page), eval_episodes=options.eval_episodes)
    files.write_text(page, text)
    draw(page.with_name(PICTURE), *found)
    print(f"Page: {page}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
