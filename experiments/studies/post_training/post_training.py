"""The table: every post-training algorithm, same tasks, same budget, seeds and intervals.

    # everything: about a day in the background of two cores, in any number of pieces
    python experiments/studies/post_training/post_training.py --out runs/table
    python experiments/studies/post_training/post_training.py --out runs/table --tasks style --algorithms dpo
    grpo
    python experiments/studies/post_training/post_training.py --out runs/table --list

All algorithms start from the same policy of a seed and sample as many answers. Each takes the best of three
learning rates on seeds of the search's own, which goes on as long as the best is the least or the greatest of
those tried. A cell that is done is not run again, and one that was stopped goes on after its last chunk; each
leaves `summary.json`, every seed apart, and `results.parquet`. With `--cells cells.json` what is done is also
kept in one file, from which another machine goes on. It runs at low priority, all tasks of a row before the
next row, and says how many cells are to come and how many core-hours those before it took.
"""

import dataclasses
import fnmatch
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import post_training_methods
import post_training_page
import post_training_rows
from post_training_rows import AlgorithmRow, TaskRow

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.trees import map_named, named_leaves
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.jitted.algorithms import supervised_algorithm
from rlhf_jax.jitted.train import SeedState, TaskSetup, make_train
from rlhf_jax.metrics import pages
from rlhf_jax.metrics.pages import PLAN, SUMMARY, held_summary, made
from rlhf_jax.metrics.progress import final_table
from rlhf_jax.stages import option_checks
from rlhf_jax.sweep import Results, product, sweep
from rlhf_jax.training.run_folder import describe_run

SEARCH_SEEDS_FROM = 1_000
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = RATES[3:6]
# What `plan` says of a cell.
PLANNED = (
    "task",
    "algorithm",
    "hyper",
    "steps",
    "base_steps",
    "width",
    "layers",
    "seeds",
    "search_seeds",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      out: folder of the cells, of the page and of its pictures.
      tasks: patterns of names; none for all.
      algorithms: patterns of names, such as 'grpo*'; none for all.
      seeds: of each cell.
      search_seeds: of each learning rate in the search, apart from those of the cell; 0 for no search and
        1e-3.
      steps: of an algorithm that samples 64 answers a step, for a quick look; 0 for each task's own.
      base_steps: supervised steps before, for a quick look; 0 for each task's own.
      width: of the model, for a quick look; 0 for each task's own.
      layers: of the model, for a quick look; 0 for each task's own.
      chunk: runs at once, in one program.
      cells: a file that keeps the summaries of all cells, beyond the folder: what is in it is not run again;
        None for none.
      page: where the page goes, with its pictures beside it; None for the folder of the cells.
      list: print the cells and what is done of them, and run nothing.
      niceness: how far it gives way to other programs, as `nice`.
      quiet: show no progress.
    """

    out: Path | None = None
    tasks: tuple[str, ...] = ()
    algorithms: tuple[str, ...] = ()
    seeds: int = 8
    search_seeds: int = 2
    steps: int = 0
    base_steps: int = 0
    width: int = 0
    layers: int = 0
    chunk: int = 4
    cells: Path | None = None
    page: Path | None = None
    list: bool = False
    niceness: int = 10
    quiet: bool = False


def chosen(name: str, patterns: tuple[str, ...], rows: Sequence[Any]) -> list[Any]:
    """The rows whose names match.

    Raises:
      UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise UserError(f"--{name} {pattern!r} matches nothing: choose among {names}")
    return [row for row in rows if not patterns or any(fnmatch.fnmatch(row.name, p) for p in patterns)]


# Policies to start from ------------------------------------------------------------------------------


def make_task_setup(row: TaskRow, options: Options) -> TaskSetup:
    """The task of a row with its model."""
    task = row.make()
    config = models.dense_config(
        vocab_size=task.tokenizer.vocab_size,
        width=options.width or row.width,
        num_layers=options.layers or row.layers,
        num_heads=4,
        num_kv_heads=4,
        tie_word_embeddings=True,
    )
    policy = models.make_policy(config, None, task.tokenizer)
    return TaskSetup(
        task, policy, num_prompts=64 // post_training_methods.GROUP, num_samples=post_training_methods.GROUP
    )


def schedule(steps: int) -> OptimizerConfig:
    """The optimizer of a run, the same for all algorithms."""
    return OptimizerConfig(
        "linear", warmup_steps=max(steps // 20, 1), total_steps=steps, b2=0.99, epsilon=1e-4
    )


def make_starts(row: TaskRow, task_setup: TaskSetup, options: Options, seeds: np.ndarray) -> SeedState:
    """Each seed's policy after supervised training, [seeds]; kept in the folder of the task."""
    steps = options.base_steps or row.base_steps
    keys = jax.vmap(jax.random.key)(seeds.astype(np.uint32))
    assert options.out is not None
    path = options.out / row.name / f"base-{seeds[0]}-{len(seeds)}-{steps}.npz"
    method = supervised_algorithm(task_setup, sft.Config(), schedule(steps))
    train = make_train(task_setup, method, steps=steps)

    def begin(key: jax.Array) -> Any:
        start = SeedState(key, models.init_params(task_setup.policy.architecture, jax.random.fold_in(key, 1)))
        agent, history = train(start, sft.Hyper(learning_rate=row.base_learning_rate))
        return agent.learner.params, history

    def shape_of(key: jax.Array) -> Any:
        return models.init_params(task_setup.policy.architecture, key)

    def trained() -> Any:
        params, history = jax.jit(jax.vmap(begin), compiler_options=compiler_options())(keys)
        scores = {name: np.asarray(history[name]).tolist() for name in ("score", "sampled_score", "length")}
        files.write_json(path.with_suffix(".json"), {"seeds": len(seeds), **scores})
        return params

    return SeedState(keys, kept(path, trained, jax.eval_shape(jax.vmap(shape_of), keys)))


def kept(path: Path, make: Callable[[], Any], like: Any) -> Any:
    """A pytree of arrays from the file where it is kept; made, and kept there, where it is not or is damaged.

    Args:
      like: its structure and shapes.
    """
    leaves = named_leaves(like)
    try:
        if files.exists(path):
            held = files.read_arrays(path, keys=leaves, remedy="it is made again")
            if all(held[name].shape == leaf.shape for name, leaf in leaves.items()):
                return map_named(lambda name, _: jnp.asarray(held[name]), like)
    except files.DamagedFile as error:
        files.made_again(error)
    tree = make()
    files.write_arrays(path, named_leaves(tree))
    return tree


# Cells -----------------------------------------------------------------------------------------------


def steps_of(row: TaskRow, algorithm: AlgorithmRow, options: Options) -> int:
    """Steps in which an algorithm samples as much as the others."""
    return max(round((options.steps or row.steps) / algorithm.cost), 1)


def plan(row: TaskRow, algorithm: AlgorithmRow, options: Options) -> dict[str, Any]:
    """What decides a cell's numbers, as JSON."""
    hyper = {name: float(leaf) for name, leaf in named_leaves(algorithm.hyper).items()}
    return {
        "task": row.name,
        "algorithm": algorithm.name,
        "hyper": {**hyper, "learning_rate": list(RATES)},
        "steps": steps_of(row, algorithm, options),
        "base_steps": options.base_steps or row.base_steps,
        "width": options.width or row.width,
        "layers": options.layers or row.layers,
        "seeds": options.seeds,
        "search_seeds": options.search_seeds,
    }


def run_cell(
    row: TaskRow,
    algorithm: AlgorithmRow,
    task_setup: TaskSetup,
    starts_fn: Callable[[np.ndarray], SeedState],
    options: Options,
    folder: Path,
) -> bool:
    """Searches the learning rate, runs the seeds, and leaves the cell's summary; False where it was there."""
    planned = plan(row, algorithm, options)
    if held_summary(folder, planned) is not None:
        return False
    resumed = (folder / PLAN).exists()
    files.write_json(folder / PLAN, planned)
    describe_run(folder, option_checks.to_json(options), stage="table", cell=f"{row.name}/{algorithm.name}")
    steps = planned["steps"]
    train = make_train(task_setup, algorithm.make(task_setup, schedule(steps)), steps=steps)
    common_options: dict[str, Any] = {"chunk_size": options.chunk, "quiet": options.quiet}
    began, began_cpu = time.perf_counter(), time.process_time()

    def sweep_rates(rates: Sequence[float], seeds: np.ndarray, folder: Path) -> Results:
        hypers = product(as_floats(algorithm.hyper), learning_rate=rates)
        return sweep(train, starts_fn(seeds), hypers, folder=folder, **common_options)

    rate, search = FIRST_RATES[len(FIRST_RATES) // 2], {}
    if options.search_seeds:
        seeds = SEARCH_SEEDS_FROM + np.arange(options.search_seeds)
        search = search_rate(lambda rates: sweep_rates(rates, seeds, folder / "search"))
        rate = best_rate(search)
    results = sweep_rates([rate], np.arange(options.seeds), folder / f"rate_{rate:g}")
    names = [name for name, values in results.metrics.items() if values.ndim == 2]
    scores = {name: results.scores(name)[0].tolist() for name in names}
    seconds = None if resumed else time.perf_counter() - began
    chosen_rate = {"learning_rate": rate, "search": {f"{r:g}": search[r] for r in sorted(search)}}
    chosen_rate["seconds"] = seconds
    chosen_rate["core_seconds"] = None if resumed else time.process_time() - began_cpu
    files.write_json(folder / SUMMARY, {**planned, **chosen_rate, **scores, **made(folder)})
    jax.clear_caches()  # or memory grows with every cell
    return True


def search_rate(sweep_rates: Callable[[Sequence[float]], Results]) -> dict[float, float]:
    """Mean score of each learning rate that was tried; one that left the numbers scores -inf.

    Begins with `FIRST_RATES`, and goes on along `RATES` as long as the best is at an end of what was tried.
    """
    rates = list(FIRST_RATES)
    while True:
        found = sweep_rates(rates).scores("sampled_score")
        means = dict(zip(rates, np.nan_to_num(found, nan=-np.inf).mean(axis=1).tolist(), strict=True))
        best = RATES.index(best_rate(means))
        beside = [rate for rate in RATES[max(best - 1, 0) : best + 2] if rate not in means]
        if not beside:
            return means
        rates += beside


def best_rate(means: dict[float, float]) -> float:
    """The learning rate of the highest score, the least of several."""
    return max(means, key=lambda rate: (means[rate], -rate))


def as_floats(hyper: Any) -> Any:
    """Hyperparameters as float32 leaves."""
    return jax.tree.map(jnp.float32, hyper)


def take_kept(options: Options) -> None:
    """Puts the cells of the file that keeps them into the folder, where it lacks them."""
    assert options.out is not None
    starts = pages.take_kept(options.cells, options.out, PLANNED).get("starts", {})
    for task, score in starts.items():
        if not files.exists(path := options.out / task / f"base-0-{options.seeds}-kept.json"):
            files.write_json(path, score)


def keep(options: Options) -> None:
    """Writes all cells of the folder into the file that keeps them."""
    assert options.out is not None
    cells = {f"{task}/{algorithm}": cell for (task, algorithm), cell in summaries(options.out).items()}
    pages.keep(options.cells, cells, starts=start_scores(options.out))


def summaries(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Of the cells that are done, by task and algorithm."""
    found = {}
    for row in post_training_rows.TASKS:
        for algorithm in post_training_rows.ALGORITHMS:
            path = out / row.name / algorithm.name / SUMMARY
            if path.exists():
                found[row.name, algorithm.name] = files.read_json(path)
    return found


def start_scores(out: Path) -> dict[str, dict[str, Any]]:
    """What the policies to start from score, by task."""
    paths = {row.name: sorted((out / row.name).glob("base-0-*.json")) for row in post_training_rows.TASKS}
    return {name: files.read_json(found[-1]) for name, found in paths.items() if found}


def budget(missing: int, done: Sequence[dict[str, Any]]) -> str:
    """How many cells are to come, and for how many core-hours, by those that are done."""
    taken = [summary["core_seconds"] for summary in done if summary.get("core_seconds")]
    if not taken or not missing:
        return f"{missing} cells to run"
    mean = float(np.mean(taken)) / 60
    return (
        f"{missing} cells to run, {mean:.1f} core-minutes each so far: {missing * mean / 60:.1f} core-hours"
    )


def run_cells(rows: Sequence[TaskRow], algorithms: Sequence[AlgorithmRow], options: Options) -> None:
    """The cells that are missing, all tasks of a row before the next row; writes the page after each."""
    assert options.out is not None
    page = options.page or options.out / "RESULTS.md"
    setups = {row.name: make_task_setup(row, options) for row in rows}
    starts: dict[tuple[str, int], SeedState] = {}
    count = len(rows) * len(algorithms)
    for number, (algorithm, row) in enumerate(itertools.product(algorithms, rows)):
        task_setup = setups[row.name]

        def starts_fn(seeds: np.ndarray, row: TaskRow = row, task_setup: TaskSetup = task_setup) -> SeedState:
            key = row.name, int(seeds[0])
            if key not in starts:
                starts[key] = make_starts(row, task_setup, options, seeds)
            return starts[key]

        if not options.quiet:
            print(f"[{number + 1}/{count}] {algorithm.name} on {row.name}", flush=True)
        folder = options.out / row.name / algorithm.name
        if run_cell(row, algorithm, task_setup, starts_fn, options, folder):
            keep(options)
            done = summaries(options.out)
            post_training_page.write(page, done, start_scores(options.out))
            if not options.quiet:
                print(budget(count - number - 1, list(done.values())), flush=True)


def run(options: Options) -> None:
    """All cells asked for, then the page."""
    if options.out is None:
        raise UserError("--out is missing: name the folder of the cells")
    for name, least in (("seeds", 1), ("search_seeds", 0), ("chunk", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")
    rows = chosen("tasks", options.tasks, post_training_rows.TASKS)
    algorithms = chosen("algorithms", options.algorithms, post_training_rows.ALGORITHMS)
    page = options.page or options.out / "RESULTS.md"
    if not options.list:
        files.hold(options.out, "--out")
        os.nice(max(options.niceness - os.nice(0), 0))
        take_kept(options)
        run_cells(rows, algorithms, options)
    done = summaries(options.out)
    if not options.list:
        post_training_page.write(page, done, start_scores(options.out))
    lines = [
        (algorithm.name, *(post_training_page.cell(done.get((row.name, algorithm.name))) for row in rows))
        for algorithm in algorithms
    ]
    final_table("Held-out score, IQM over seeds", ("algorithm", *(row.name for row in rows)), lines)
    missing = sum((row.name, algorithm.name) not in done for row in rows for algorithm in algorithms)
    print(budget(missing, list(done.values())))
    if not options.list:
        print(f"Page: {page}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
