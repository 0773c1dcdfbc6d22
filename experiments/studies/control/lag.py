"""What old actors cost: A2C whose experience is so many updates old, with and without V-trace, and A3C.

    python experiments/studies/control/lag.py --out runs/lag

All seeds and lags of a method are one program. Each method is kept in --out, so that an interrupted study
goes on. Cells are evaluation returns of deterministic policies, the IQM over seeds with its 95 % interval.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.core import files
from rlhf_jax.evaluation.statistics import iqm_interval
from rlhf_jax.rl.algorithms import a2c, a3c, impala
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.runs import Run, make_train_fn


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the study.

    Attributes:
      out: where returns are kept.
      env: name of a gymnax environment.
      lags: updates by which actors are old.
      seeds: agents of each cell.
      seed: of the first.
      steps: environment steps of each.
    """

    out: Path
    env: str = "CartPole-v1"
    lags: tuple[int, ...] = (0, 1, 4, 16, 64)
    seeds: int = 16
    seed: int = 0
    steps: int = 200_000


def methods(options: Options, env: Any) -> dict[str, tuple[Run, list[Any]]]:
    """Name -> (run, its settings at each lag); A3C's lag is one less than its workers."""
    lagging: list[Any] = [impala.default_hyper(lag=lag) for lag in options.lags]
    config = impala.Config(max_lag=max(options.lags), total_steps=options.steps)
    uncorrected = dataclasses.replace(config, correct=False)
    made = {
        "V-trace": (impala.make_run(config, *env), lagging),
        "uncorrected": (impala.make_run(uncorrected, *env), lagging),
    }
    for lag in options.lags:
        config = a3c.Config(num_workers=lag + 1, total_steps=options.steps)
        made[f"A3C, {lag + 1} workers"] = a3c.make_run(config, *env), [a2c.default_hyper()]
    return made


def returns_of(options: Options, env: Any, run: Run, settings: list[Any]) -> np.ndarray:
    """Mean evaluation returns [settings, seeds]."""
    keys = jax.random.split(jax.random.key(options.seed), options.seeds)
    train, (environment, env_params) = make_train_fn(run), env

    def one(key: jax.Array, hyper: Any) -> jax.Array:
        state, _ = train(key, hyper)
        key = jax.random.fold_in(key, 1)
        returns, _ = evaluate(run, state, environment, env_params, key, episodes=32, deterministic=True)
        return jnp.mean(returns)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *settings)
    over_seeds = jax.vmap(one, (0, None))
    return np.asarray(jax.jit(jax.vmap(over_seeds, (None, 0)))(keys, stacked))


def main() -> None:
    """Runs what is missing, and prints the table."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    options.out.mkdir(parents=True, exist_ok=True)
    env = environments.make(options.env)
    for name, (run, settings) in methods(options, env).items():
        path = options.out / f"{name.replace(', ', '_').replace(' ', '_')}.json"
        if not path.exists():
            files.write_json(path, {"returns": returns_of(options, env, run, settings).tolist()})
        cells = [iqm_interval(np.asarray(row)) for row in files.read_json(path)["returns"]]
        print(f"| {name} | " + " | ".join(f"{cell:.4g}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
