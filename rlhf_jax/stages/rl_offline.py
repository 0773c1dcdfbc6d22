"""Learning from a log: behaviour cloning, CQL, IQL, AWAC, TD3+BC, decision transformer, GAIL, AIRL, DAgger.

    rlhf rl --algo ppo --env CartPole-v1 --out runs/cartpole
    rlhf rl-offline --collect runs/cartpole:50 random:500 --data runs/cartpole.npz
    rlhf rl-offline --data runs/cartpole.npz --algo iql --seeds 8 --out runs/cartpole_iql

A source is the run folder of a saved agent, or `random`, with a number of whole episodes; actions are
sampled. Only `gail`, `airl` and `dagger` step the environment while they learn, and look at none of its
rewards; the Q-learners have those of the log. `dagger` asks a saved agent, `--expert`, what it would have
done. Evaluation has its own episodes.
"""

import dataclasses
import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, PositiveInt, Seed
from rlhf_jax.evaluation.statistics import iqm_interval, mean_interval
from rlhf_jax.metrics.progress import final_table
from rlhf_jax.rl.envs import environments, transitions
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops.runs import Run
from rlhf_jax.stages import option_checks, rl, rl_agents, rl_rows
from rlhf_jax.training.run_folder import describe_run

ADVERSARIAL = ("gail", "airl")
STEPPING = (*ADVERSARIAL, "dagger")
ALGORITHMS = ("bc", "cql", "iql", "awac", "td3_bc", "decision_transformer", *STEPPING)
CHANCE = "random"
NAMES = ("algo", "env", "data", "expert", "seeds", "seed", "steps", "set", "chunks")

# Changes of the defaults for an environment, as after --set; GAIL's and AIRL's policy has PPO's of `rl_rows`.
SETTINGS: dict[tuple[str, str], tuple[str, ...]] = {
    ("iql", "Pendulum-v1"): ("hyper.inverse_temperature=0.1",),
    # The published 3e-4 is for a million updates: after 5,000 it returned -547, this -152 (seeds from 100).
    ("td3_bc", "Pendulum-v1"): ("hyper.learning_rate=1e-3", "hyper.actor_learning_rate=1e-3"),
}

SIDE_BY_SIDE = True
"""Whole runs under `vmap` are all that is computed (`distributed.runtime.choose_threads`)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of learning from a log.

    Attributes:
      data: the log, an .npz; with --collect, where it goes; None is refused.
      collect: sources SOURCE:EPISODES of a new log, a source being the run folder of rl.py or `random`.
      algo: bc, cql (discrete actions), iql, awac, td3_bc (continuous actions), decision_transformer, or gail,
        airl and dagger (which step the environment, and see no rewards).
      expert: run folder of the saved agent that dagger asks; None for the others.
      env: name of a gymnax environment, needed where all sources are `random`.
      seeds: agents, trained side by side on the same log.
      seed: of the first of them, and of the collection.
      steps: optimizer steps of each, environment steps with gail, airl and dagger; 0 for the usual number.
      set: changes of settings, such as hyper.expectile=0.9 or run.batch_size=64.
      out: the run folder; None for collecting only.
      render: write the first agent's episode as episode.gif.
      resume: go on from the newest whole checkpoint in the run folder, if there is one.
      chunks: parts of the run; metrics are written and agents saved after each.
      eval_episodes: of each agent, for each of two evaluations, deterministic and sampled.
      quiet: show no progress.
      log: where metrics go besides metrics.jsonl: any of tensorboard, wandb, trackio, mlflow.
    """

    data: Path | None = None
    collect: tuple[str, ...] = ()
    algo: str = "iql"
    expert: Path | None = None
    env: str = ""
    seeds: PositiveInt = 1
    seed: Seed = 0
    steps: Count = 0
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: Path | None = None
    render: bool = False
    resume: bool = False
    chunks: PositiveInt = 5
    eval_episodes: PositiveInt = 32
    quiet: bool = False
    log: tuple[str, ...] = ("tensorboard",)


def parse_source(text: str) -> tuple[str, int]:
    """(folder or `random`, episodes).

    Raises:
      UserError: it is not written so.
    """
    name, _, episodes = text.rpartition(":")
    if not name or not episodes.isdecimal() or not int(episodes):
        raise UserError(f"--collect {text!r}: write SOURCE:EPISODES, such as runs/cartpole:50 or random:500")
    return name, int(episodes)


def saved_agent(folder: Path, env: Environment, env_params: Any) -> tuple[Run, Any]:
    """(run, state) of the first agent of a run folder."""
    description = rl.read_description(folder)
    agent = rl_agents.make_agent(description["algo"], env, description["steps"], description["set"])
    course = agent.run(env, env_params)
    states = rl.restored(folder, course, agent.hyper, rl.seed_keys(description))
    return course, jax.tree.map(lambda x: x[0], states)


def make_expert(folder: Path | None, env: Environment, env_params: Any) -> Callable[[jax.Array], jax.Array]:
    """Actions of the saved agent of this folder.

    Raises:
      UserError: no folder is named, or its agent is of another environment or has a memory.
    """
    if folder is None:
        raise UserError("--algo dagger needs --expert: name the run folder of a saved agent")
    if (of := rl.read_description(folder)["env"]) != env.name:
        raise UserError(f"--expert {folder}: its agent is for {of}, not for {env.name}")
    course, state = saved_agent(folder, env, env_params)
    if jax.tree.leaves(course.initial_carry(1)):
        raise UserError(f"--expert {folder}: its agent has a memory: name one without")

    def expert_fn(obs: jax.Array) -> jax.Array:
        is_first = jnp.zeros(len(obs), bool)
        return course.act(state, obs, is_first, (), jax.random.key(0), deterministic=True)[0]

    return expert_fn


def collect_from(source: str, env_name: str, episodes: int, key: jax.Array) -> Transition:
    """The log of one source: the first agent of a folder, or chance."""
    env, env_params = environments.make(env_name)
    if source == CHANCE:
        act_fn = transitions.random_act_fn(env)
        return transitions.collect(act_fn, None, env, env_params, key, episodes=episodes)
    course, first = saved_agent(Path(source), env, env_params)
    return transitions.collect(
        course.act, first, env, env_params, key, episodes=episodes, initial_carry_fn=course.initial_carry
    )


def collect(options: Options, path: Path) -> None:
    """Collects a log from all sources, and tells what is in it.

    Raises:
      UserError: sources are of different environments, or of none.
    """
    sources = [parse_source(text) for text in options.collect]
    env_name = options.env
    for source, _ in sources:
        if source != CHANCE:
            of = rl.read_description(Path(source))["env"]
            if env_name not in ("", of):
                raise UserError(f"--collect {source}: its agent is for {of}, not for {env_name}")
            env_name = of
    if not env_name:
        raise UserError("--env is missing: chance alone does not tell which environment it is for")
    keys = jax.random.split(jax.random.key(options.seed), len(sources))
    logs, rows = [], []
    for (source, episodes), key in zip(sources, keys, strict=True):
        logs.append(collect_from(source, env_name, episodes, key))
        returns = transitions.episode_returns(logs[-1])
        rows.append((source, episodes, len(logs[-1].reward), returns.mean(), returns.min(), returns.max()))
    log = transitions.concatenate(logs)
    description = {"env": env_name, "sources": list(options.collect), "seed": options.seed}
    transitions.save(path, log, description)
    title = f"{path}: {env_name}, {len(log.reward):,} transitions"
    final_table(title, ("source", "episodes", "transitions", "mean return", "least", "most"), rows)


def settings_for(algo: str, env_name: str) -> tuple[str, ...]:
    """Changes of the defaults for this environment."""
    own = SETTINGS.get((algo, env_name), ())
    if algo not in ADVERSARIAL:
        return own
    settings, steps = rl_rows.settings_for("ppo", env_name, rl_rows.ROWS)
    changes = (*settings, *([f"total_steps={steps}"] if steps else []))
    parts = (change.partition("hyper.") for change in changes)
    return (
        *(f"hyper.policy.{end}" if sign else f"policy.{start}" for start, sign, end in parts),
        *own,
    )


def make_course(options: Options, env: Environment, env_params: Any, log: Transition) -> tuple[Any, Any]:
    """(run, hyper) of the algorithm on the log.

    Raises:
      UserError: there is no such algorithm or setting, or it does not fit the environment's actions.
    """
    if options.algo not in ALGORITHMS:
        raise UserError(f"unknown algorithm {options.algo!r}: choose among {', '.join(ALGORITHMS)}")
    module = importlib.import_module(f"rlhf_jax.rl.algorithms.{options.algo}")
    changes = list(settings_for(options.algo, env.name))
    if options.steps:
        where = "policy.total_steps" if options.algo in ADVERSARIAL else "run.total_steps"
        changes.append(f"{where if options.algo in STEPPING else 'run.updates'}={options.steps}")
    config, hyper = rl_agents.configured(module, (*changes, *options.set))
    if options.expert is not None and options.algo != "dagger":
        raise UserError(f"--expert is for dagger, not for {options.algo}: leave it out")
    more = (make_expert(options.expert, env, env_params),) if options.algo == "dagger" else ()
    return module.make_run(
        config, env, *((env_params,) if options.algo in STEPPING else ()), log, *more
    ), hyper


def train(options: Options, path: Path, folder: Path) -> None:
    """Trains all seeds on the log, evaluates them, and leaves a summary."""
    log, about = transitions.load(path)
    if not isinstance(name := about.get("env"), str):
        raise UserError(f"{path}: does not say which environment it is of: collect the log again")
    env, env_params = environments.make(name)
    transitions.check(log, env, of=options.env or name, path=path)
    options = dataclasses.replace(options, env=env.name)
    description = rl.described(options, folder, NAMES)
    course, hyper = make_course(options, env, env_params, log)
    keys = rl.seed_keys(description)
    describe_run(folder, option_checks.to_json(options), stage="rl")
    files.write_json(folder / rl.AGENT, description)
    control = rl.Options(
        seeds=options.seeds,
        resume=options.resume,
        chunks=options.chunks,
        eval_episodes=options.eval_episodes,
        quiet=options.quiet,
        log=options.log,
    )
    fingerprint = hashlib.sha256(files.read_bytes(path)).hexdigest()
    state, rate = rl.train(control, folder, course, hyper, keys, description, data_fingerprint=fingerprint)
    found = rl.evaluations(control, course, state, env, env_params, keys)
    returns = transitions.episode_returns(log)
    summary = {
        **description,
        "steps_per_second": rate,
        "steps_taken": course.updates * course.steps_per_update,
        "data_sources": about.get("sources", []),
        "data_transitions": len(log.reward),
        "data_return": float(returns.mean()),
        "data_best_return": float(returns.max()),
        "eval_episodes": options.eval_episodes,
        **found,
    }
    files.write_json(folder / "summary.json", summary)
    report(summary)
    if options.render:
        rl.render_first(folder, course, state, env, env_params, options.seed)


def report(summary: dict[str, Any]) -> None:
    """The numbers on standard output, a line a seed, then all together beside the log's."""
    both = ("evaluation_return", "evaluation_return_sampled")
    scores = np.array([summary[name] for name in both])
    rows: list[tuple[Any, ...]] = [
        (f"seed {summary['seed'] + i}", *(f"{x:.4g}" for x in column)) for i, column in enumerate(scores.T)
    ]
    rows.append(("mean", *(f"{mean_interval(row):.4g}" for row in scores)))
    rows.append(("IQM", *(f"{iqm_interval(summary[name]):.4g}" for name in both)))
    rows.append(("log: mean, best", f"{summary['data_return']:.4g}", f"{summary['data_best_return']:.4g}"))
    final_table(f"{summary['algo']} on {summary['data']}", ("", "deterministic", "sampled"), rows)


def run(options: Options) -> None:
    """Collects, trains, or both."""
    option_checks.check_numbers(options)
    if options.data is None:
        raise UserError("--data is missing: name the log, or with --collect where it goes")
    if options.out is None and not options.collect:
        raise UserError("--out is missing: name the folder to write to, or --collect sources for a log")
    if options.collect:
        collect(options, options.data)
    if options.out is not None:
        train(options, options.data, options.out)
