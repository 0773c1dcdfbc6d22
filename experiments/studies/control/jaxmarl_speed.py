"""Independent PPO here and by JaxMARL's own script, in turn: steps per second, and what both have learned.

    git clone https://github.com/FLAIROx/JaxMARL
    python experiments/studies/control/jaxmarl_speed.py --jaxmarl JaxMARL --out runs/jaxmarl_speed

Both run MPE simple spread with the settings of JaxMARL's `ippo_ff_mpe.yaml`, all seeds in one program. Theirs
is `baselines/IPPO/ippo_ff_mpe.py` as it stands. What it imports for its command line and its tracker is left
out; for distrax, which does not run on the present jax, stands a categorical distribution of ours.
"""

import dataclasses
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from rlhf_jax.algorithms import ppo
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.evaluation.statistics import iqm_interval, mean_interval
from rlhf_jax.metrics.pages import made
from rlhf_jax.metrics.progress import final_table
from rlhf_jax.rl.algorithms import ippo
from rlhf_jax.rl.envs import multi_agent
from rlhf_jax.rl.loops.rollout import RolloutConfig
from rlhf_jax.rl.networks.distributions import Categorical
from rlhf_jax.stages import option_checks
from rlhf_jax.training.run_folder import describe_run

SCRIPT = "baselines/IPPO/ippo_ff_mpe.py"
CONFIG = "baselines/IPPO/config/ippo_ff_mpe.yaml"
AGENTS = 3
LAST = 0.1

Train = Callable[[jax.Array], jax.Array]
"""keys [S] -> mean return of an agent in the episodes of the last tenth of training [S]."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the comparison.

    Attributes:
      jaxmarl: a checkout of JaxMARL's repository: its scripts are not in its wheel.
      out: folder of the summary.
      seeds: side by side, in each run.
      steps: environment steps of each seed.
      repeats: runs of each, in turn, with other seeds.
    """

    jaxmarl: Path | None = None
    out: Path | None = None
    seeds: PositiveInt = 16
    steps: PositiveInt = 500_000
    repeats: PositiveInt = 3


class OurCategorical:
    """What their script takes from distrax, on the distribution that ours has too."""

    def __init__(self, logits: jax.Array):
        """Keeps the distribution of these logits."""
        self._of = Categorical(logits)

    def sample(self, seed: jax.Array) -> jax.Array:
        """A sample."""
        return self._of.sample(seed)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """Log-probability of actions."""
        return self._of.logp(action)

    def entropy(self) -> jax.Array:
        """Entropy."""
        return self._of.entropy()


def stand_ins() -> dict[str, types.ModuleType]:
    """Modules for what their script imports and a run does not need."""
    contents: dict[str, dict[str, Any]] = {
        "distrax": {"Categorical": OurCategorical},
        "hydra": {"main": lambda **_: lambda function: function},
        "omegaconf": {"OmegaConf": None},
        "wandb": {"log": lambda _: None},
    }
    modules = {name: types.ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    return modules


def theirs(folder: Path, steps: int) -> Train:
    """Their script's run.

    Raises:
      UserError: the folder holds no such script.
    """
    path = folder / SCRIPT
    if not path.exists():
        raise UserError(f"--jaxmarl {folder} has no {SCRIPT}: name a checkout of JaxMARL's repository")
    sys.modules.update(stand_ins())
    spec = importlib.util.spec_from_file_location("jaxmarl_ippo", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = {**yaml.safe_load(files.read_text(folder / CONFIG)), "TOTAL_TIMESTEPS": steps}
    train = module.make_train(config)

    def run(key: jax.Array) -> jax.Array:
        # Their wrapper multiplies rewards by the number of agents.
        returns = train(key)["metrics"]["returned_episode_returns"] / AGENTS
        return jnp.mean(returns[-round(LAST * returns.size) :])

    return jax.vmap(run)


def ours(steps: int) -> Train:
    """The same settings here; but for time limits, from which ours bootstraps."""
    config = ippo.Config(
        total_steps=steps,
        rollout=RolloutConfig(num_envs=16, num_steps=128),
        agent_ids=False,
        normalize_values=False,
        update=ppo.Config(num_ppo_epochs=4, num_minibatches=4),
        optimizer=OptimizerConfig(schedule="linear", warmup_steps=0, clip_norm=0.5, b2=0.999, epsilon=1e-5),
    )
    hyper = ippo.default_hyper(learning_rate=2.5e-4, value_coef=0.5)
    train = ippo.make_train(config, multi_agent.make("mpe_simple_spread"), None)

    def run(key: jax.Array) -> jax.Array:
        _, history = train(key, hyper)
        last = round(LAST * history["steps"].size)
        return jnp.sum(history["episode_return_sum"][-last:]) / jnp.sum(history["episodes"][-last:])

    return jax.vmap(run)


def measure(programs: dict[str, Train], options: Options) -> dict[str, dict[str, list[float]]]:
    """Steps per second of each run without compilation, and returns of each seed; the programs take turns.

    Seconds are those of the clock, and those that the process had of the processors: other work counts not
    in these.
    """
    keys = jax.random.split(jax.random.key(0), (options.repeats, options.seeds))
    compiled = {
        name: jax.jit(train, compiler_options=compiler_options()).lower(keys[0]).compile()
        for name, train in programs.items()
    }
    names = ("rates", "cpu_rates", "returns")
    found: dict[str, dict[str, list[float]]] = {name: {of: [] for of in names} for name in programs}
    steps = options.seeds * options.steps
    for some in keys:
        for name, run in compiled.items():
            began = time.perf_counter(), time.process_time()
            returns = np.asarray(run(some))
            found[name]["rates"].append(steps / (time.perf_counter() - began[0]))
            found[name]["cpu_rates"].append(steps / (time.process_time() - began[1]))
            found[name]["returns"].extend(returns.astype(float).tolist())
            print(f"{name}: {found[name]['rates'][-1]:,.0f} steps/s", flush=True)
    return found


def run(options: Options) -> None:
    """Both, in turn, and a summary.

    Raises:
      UserError: an option is missing.
    """
    if options.jaxmarl is None or options.out is None:
        raise UserError("--jaxmarl and --out are needed: a checkout of JaxMARL, and a folder to write to")
    files.hold(options.out, "--out")
    describe_run(options.out, option_checks.to_json(options), stage="jaxmarl_speed")
    programs = {"ours": ours(options.steps), "JaxMARL's": theirs(options.jaxmarl, options.steps)}
    found = measure(programs, options)
    settings = {name: getattr(options, name) for name in ("seeds", "steps", "repeats")}
    files.write_json(options.out / "summary.json", {**settings, **found, **made(options.out)})
    rates = ("rates", "cpu_rates")
    rows = [
        (name, *(f"{mean_interval(of[rate]):,.0f}" for rate in rates), f"{iqm_interval(of['returns']):.2f}")
        for name, of in found.items()
    ]
    one, other = found.values()
    ratios = ([a / b for a, b in zip(one[rate], other[rate], strict=True)] for rate in rates)
    rows.append(("ours / theirs", *(f"{mean_interval(ratio):.3f}" for ratio in ratios), ""))
    columns = ("", "steps/s, all seeds", "steps/CPU s", "return")
    final_table("Independent PPO, MPE simple spread", columns, rows)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
