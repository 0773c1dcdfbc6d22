"""What jobs of several stages share: the stages of a seed in order, none run twice, and tables over seeds."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.evaluation.statistics import Interval, mean_interval, wilson_interval
from rlhf_jax.metrics import TableRow, read_metrics
from rlhf_jax.stages import embedded, option_groups

EVALUATIONS = 3
"""Of every stage, on held-out data."""
SLOW = OptimizerConfig(schedule="cosine", warmup_steps=10, end_lr_ratio=0.1)
SAMPLED = OptimizerConfig("linear", warmup_steps=5, b2=0.99, epsilon=1e-4)
# What suits models of some hundred thousand parameters on the built-in tasks, where the defaults of the
# stages, which are for models of billions, would hardly move them.
SFT: dict[str, Any] = embedded.FROM_SCRATCH
REWARD_MODEL: dict[str, Any] = {"optimizer": SLOW, "learning_rate": 5e-4}
DPO: dict[str, Any] = {"optimizer": SLOW, "learning_rate": 1e-4, "beta": 2.0}
GRPO: dict[str, Any] = {"optimizer": SAMPLED, "learning_rate": 3e-4, "kl_coef": 0.02}
PPO: dict[str, Any] = {
    **GRPO,
    "num_ppo_epochs": 1,
    "num_minibatches": 2,
    "cliprange_value": 0.5,
    "value_coef": 0.5,
    "kl_coef": 0.2,
}
ROUNDS: dict[str, Any] = {
    "optimizer": OptimizerConfig(schedule="cosine", warmup_steps=5, end_lr_ratio=0.1),
}
TEXTS = ("completions", "correct", "numbers")
"""Results that are no numbers."""

Results = dict[str, dict[str, Any]]
"""Stage -> what was measured of it."""


class Job(Protocol):
    """What the options of every such job have."""

    @property
    def out(self) -> Path:
        """The folder of the job."""
        ...

    @property
    def seeds(self) -> int:
        """How many."""
        ...

    @property
    def first_seed(self) -> int:
        """The others follow it."""
        ...

    @property
    def resume(self) -> bool:
        """Whether to go on."""
        ...

    @property
    def quiet(self) -> bool:
        """Whether to show no progress."""
        ...


class OneSeed:
    """A job that runs once, with its `seed`."""

    seed: int

    @property
    def seeds(self) -> int:
        """One run."""
        return 1

    @property
    def first_seed(self) -> int:
        """The only one."""
        return self.seed


def check(job: Job, counts: Sequence[str]) -> None:
    """Raises: UserError where a count is not positive, or the folder holds another run."""
    for name in ("seeds", *counts):
        if getattr(job, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(job, name)} is not positive: give at least 1")
    if (job.out / "config.json").exists() and not job.resume:
        raise UserError(f"{job.out} already holds a run: add --resume, or choose another --out")


def run_options(job: Job, folder: Path, seed: int, steps: int | None) -> option_groups.RunOptions:
    """How one of the stages runs; one pass over its data where `steps` is None, evaluated at the end."""
    return option_groups.RunOptions(
        folder,
        seed,
        resume=job.resume,
        steps=steps,
        eval_every=math.ceil((steps or 0) / EVALUATIONS),
        quiet=job.quiet,
        report=False,
    )


def run_seed(
    folder: Path, stages: Mapping[str, Callable[[], Any]], measure: Callable[[str], dict[str, Any]]
) -> Results:
    """Runs and measures the stages of one seed in order; what was measured is not run again.

    Args:
      measure: name of a stage that was run -> its results.
    """
    results_file = folder / "results.json"
    results = files.read_json(results_file, otherwise={}, keys=())
    for name, run in stages.items():
        if name in results:
            continue
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        results[name] = {"seconds": seconds, **measure(name)}
        files.write_json(results_file, results)
    return results


def run_seeds(job: Job, run_one: Callable[[int], Results]) -> list[Results]:
    """The results of every seed."""
    results = []
    for seed in range(job.first_seed, job.first_seed + job.seeds):
        results.append(run_one(seed))
        jax.clear_caches()  # or memory grows with every seed
    return results


def last_metric(folder: Path, name: str) -> float:
    """The newest value of a metric of a stage."""
    return next(line[name] for line in reversed(read_metrics(folder)) if name in line)


def summarise(results: Sequence[Results]) -> dict[str, dict[str, list[float]]]:
    """Stage -> number -> one value a seed, of what every seed has."""

    def common(name: str, held: Sequence[Mapping[str, Any]]) -> bool:
        return name not in TEXTS and all(name in each for each in held)

    return {
        stage: {name: [seed[stage][name] for seed in results] for name in numbers if common(name, seeds)}
        for stage, numbers in results[0].items()
        if len(seeds := [seed[stage] for seed in results if stage in seed]) == len(results)
    }


def share_interval(values: Sequence[float], trials: int) -> Interval:
    """95 % interval of a share: over seeds, or with one seed over its trials."""
    if len(values) == 1:
        return wilson_interval(round(values[0] * trials), trials)
    found = mean_interval(values)
    return dataclasses.replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def table_rows(
    summary: Mapping[str, Mapping[str, Sequence[float]]],
    policies: Sequence[str],
    trials: int,
    *,
    shares: Mapping[str, str] = {},
) -> list[TableRow]:
    """A row for every policy, over seeds.

    Args:
      trials: held-out prompts of a seed.
      shares: more numbers between 0 and 1, with the titles of their columns.
    """
    rows = []
    for name in policies:
        numbers = summary[name]
        match = share_interval(numbers["exact_match"], trials)
        rows.append(
            TableRow(
                name,
                (match.mean, match.low, match.high),
                *(mean(numbers[column]) for column in ("kl", "length", "seconds")),
                shares={title: mean(numbers[share]) for share, title in shares.items()},
            )
        )
    return rows


def sample_cards(
    prompts: Sequence[Mapping[str, Any]], results: Results, policies: Sequence[str]
) -> list[dict[str, Any]]:
    """What every policy of a seed says to the first held-out prompts, as `samples.json` has it."""
    return [
        {
            "prompt": prompt["prompt"],
            "answer": prompt["answer"],
            "completions": {
                name: {
                    "text": results[name]["completions"][row],
                    "correct": results[name]["correct"][row],
                    **results[name]["numbers"][row],
                }
                for name in policies
            },
        }
        for row, prompt in enumerate(prompts)
    ]
