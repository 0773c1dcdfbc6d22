"""The tables of results in control and of several agents, row after row, each as one page with curves.

    python experiments/studies/control/rl_table.py --out runs/rl_table  # everything: days on a CPU
    python experiments/studies/control/rl_table.py --out runs/rl_table --rows 'CartPole-v1/*' --seeds 4
    python experiments/studies/control/rl_table.py --out runs/rl_table --list
    python experiments/studies/control/rl_table.py --out runs/several_agents --table several_agents

A row that is done is not run again; where more seeds are asked for, those are added. One that was stopped
goes on after its last chunk of seeds. Each row leaves `summary.json`, every seed apart, and
`results.parquet`, every seed and update apart; a page and pictures show what there is so far. With
`--cells rows.json` what is done is also kept in one file, from which another machine goes on.
"""

import dataclasses
import fnmatch
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import rl_page

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Metrics
from rlhf_jax.metrics import pages
from rlhf_jax.metrics.pages import PLAN, SUMMARY, held_summary, made
from rlhf_jax.metrics.progress import final_table
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.runs import Train, make_train_fn
from rlhf_jax.stages import option_checks, rl_agents
from rlhf_jax.stages.rl_rows import Row
from rlhf_jax.sweep import product, sweep
from rlhf_jax.training.run_folder import describe_run

TIMES = ("seconds", "cpu_seconds")
# What `plan` says of a row.
PLANNED = ("env", "algo", "variant", "settings", "steps", "seeds", "eval_episodes")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      out: folder of the rows, of the page and of the curves.
      table: control, or several_agents, which needs the extra marl.
      rows: patterns of names, such as 'CartPole-v1/*'; none for all.
      seeds: of each row, unless the row has fewer.
      steps: environment steps of each seed, for a quick look; 0 for each row's own.
      eval_episodes: of each seed, for each of two evaluations, deterministic and sampled.
      cells: a file that keeps the summaries of all rows, beyond the folder: what is in it is not run again;
        None for none.
      list: print the rows and what is done of them, and run nothing.
      page: where the page goes, with the curves beside it; None for the folder of the rows.
      quiet: show no progress.
    """

    out: Path | None = None
    table: Literal["control", "several_agents"] = "control"
    rows: tuple[str, ...] = ()
    seeds: int = 16
    steps: int = 0
    eval_episodes: int = 32
    cells: Path | None = None
    list: bool = False
    page: Path | None = None
    quiet: bool = False


def chosen(patterns: tuple[str, ...], rows: tuple[Row, ...]) -> list[Row]:
    """The rows whose names match.

    Raises:
      UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise UserError(f"--rows {pattern!r} matches no row: choose among {names}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row.name, p) for p in patterns)]


def make_train(row: Row, steps: int, eval_episodes: int) -> tuple[Train, Any]:
    """(train, hyper) of a row; a history ends with the returns of its own evaluation episodes."""
    env, env_params = rl_agents.make_environment(row.env)
    agent = rl_agents.make_agent(row.algo, env, steps, row.settings)
    course = agent.run(env, env_params)

    def train(key: jax.Array, hyper: Any) -> tuple[Any, Metrics]:
        run_key, *keys = jax.random.split(key, 3)
        state, history = make_train_fn(course)(run_key, hyper)
        for name, test_key in zip(("evaluation_return", "evaluation_return_sampled"), keys, strict=True):
            returns, _ = evaluate(
                course,
                state,
                env,
                env_params,
                test_key,
                episodes=eval_episodes,
                deterministic=name == "evaluation_return",
            )
            history = {**history, name: returns.mean()}
        return state, history

    return train, agent.hyper


def plan(row: Row, options: Options) -> dict[str, Any]:
    """What decides a row's numbers, as JSON."""
    return {
        "env": row.env,
        "algo": row.algo,
        "variant": row.variant,
        "settings": list(row.settings),
        "steps": options.steps or row.done_steps or row.steps,
        "seeds": min(options.seeds, row.seeds or options.seeds),
        "eval_episodes": options.eval_episodes,
    }


def seconds_before(folder: Path, held: dict[str, Any] | None) -> dict[str, float | None]:
    """What the seeds of a row have taken so far; None after a stop, of which nothing is known."""
    if not (folder / "chunks").exists():
        return dict.fromkeys(TIMES, 0.0)
    begun = files.read_json(folder / PLAN, keys=("seeds",))["seeds"]
    return held if held is not None and held["seeds"] == begun else dict.fromkeys(TIMES, None)


def run_row(row: Row, options: Options, folder: Path) -> None:
    """Runs what is missing of a row, and leaves its summary."""
    planned = plan(row, options)
    held = held_summary(folder, planned, growing="seeds")
    if held is not None and held["seeds"] == planned["seeds"]:
        return
    before = seconds_before(folder, held)
    files.write_json(folder / PLAN, planned)
    describe_run(folder, option_checks.to_json(options), stage="rl_table", row=row.name)
    train, hyper = make_train(row, planned["steps"], options.eval_episodes)
    keys = jax.vmap(jax.random.key)(np.arange(planned["seeds"], dtype=np.uint32))
    began = time.perf_counter(), time.process_time()
    results = sweep(
        train, keys, product(hyper), chunk_size=row.chunk or None, folder=folder, quiet=options.quiet
    )
    spent = time.perf_counter() - began[0], time.process_time() - began[1]
    times = {
        name: None if known is None else known + seconds
        for name, seconds, known in zip(TIMES, spent, map(before.get, TIMES), strict=True)
    }
    scores = {name: results.scores(name)[0].tolist() for name in results.metrics if "evaluation" in name}
    taken = int(results.scores("steps").mean())
    found = {"steps_taken": taken, "curve": rl_page.curve(folder), **times, **scores}
    files.write_json(folder / SUMMARY, {**planned, **found, **made(folder)})
    jax.clear_caches()  # or memory grows with every row


def summaries(out: Path, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Of the rows that are done, by name."""
    paths = {row.name: out / row.name / SUMMARY for row in rows}
    return {name: files.read_json(path) for name, path in paths.items() if files.exists(path)}


def show(out: Path, rows: list[Row]) -> None:
    """The rows on standard output."""
    done = summaries(out, rows)
    lines = []
    for row in rows:
        found = rl_page.iqm(done[row.name]) if row.name in done else None
        lines.append((row.name, f"{row.steps:,}", row.to_beat, f"{found:.4g}" if found else "-"))
    final_table("Evaluation return", ("row", "steps", "to beat", "IQM"), lines)


def run(options: Options) -> None:
    """All rows asked for, then the page."""
    if options.out is None:
        raise UserError("--out is missing: name the folder of the rows")
    for name in ("seeds", "eval_episodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    table = rl_page.TABLES[options.table]
    rows = chosen(options.rows, table.rows)
    if not options.list:
        page = options.page or options.out / table.page
        files.hold(options.out, "--out")
        pages.take_kept(options.cells, options.out, PLANNED)
        for number, row in enumerate(rows, 1):
            if not options.quiet:
                print(f"[{number}/{len(rows)}] {row.name}", flush=True)
            run_row(row, options, options.out / row.name)
            done = summaries(options.out, list(table.rows))
            pages.keep(options.cells, done)
            rl_page.write(page, done, table)
        print(f"Page: {page}")
    show(options.out, rows)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
