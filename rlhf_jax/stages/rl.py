"""Reinforcement learning on gymnax and JaxMARL: several seeds at once, trained, evaluated, saved.

    rlhf rl --algo ppo --env CartPole-v1 --seeds 16 --out runs/cartpole
    rlhf rl --algo sac --env Pendulum-v1 --set hyper.gamma=0.98 --out runs/pendulum
    rlhf rl --load runs/cartpole --render
    rlhf rl --algo mappo --env mpe_simple_spread --seeds 4 --out runs/spread

Evaluation has its own episodes. CartPole with PPO and 16 seeds takes about a minute and a half on two CPU
cores; every seed should reach 500.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, PositiveInt, Seed
from rlhf_jax.core.types import Metrics
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.evaluation.statistics import interquartile_mean, mean_interval
from rlhf_jax.metrics import final_table, make_loggers
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.runs import Run, run_updates
from rlhf_jax.stages import option_checks, rl_agents, rl_render
from rlhf_jax.training import LoopConfig, run_loop
from rlhf_jax.training.run_folder import describe_run

AGENT = "agent.json"

SIDE_BY_SIDE = True
"""Whole runs under `vmap` are all that is computed (`distributed.runtime.choose_threads`)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of reinforcement learning.

    Attributes:
      algo: ppo, ppo_penalty, a2c, a3c, impala, trpo, reinforce, grpo, option_critic, dqn, c51, qr_dqn, iqn,
        rainbow, r2d2, pqn, muzero, feudal_networks, her (environments with goals), maxq (environments with
        numbered states), ddpg, td3, sac, crossq, mpo or mpc; for several agents ippo, mappo, maddpg, vdn or
        qmix.
      env: name of an environment of gymnax, of `rl.envs.goals`, such as BitFlipping-12, of
        `rl.envs.processes` (Taxi, HallwayRooms), or of `rl.envs.multi_agent`, such as mpe_simple_spread,
        smax_3m or overcooked_cramped_room; with --load, that of the saved agent.
      seeds: agents, trained side by side.
      seed: of the first of them.
      steps: environment steps of each; 0 for the usual number.
      set: changes of settings, such as hyper.learning_rate=1e-3 or rollout.num_envs=8.
      out: the run folder; None for that of `load`.
      load: evaluate the agents of this run folder instead of training; None for training.
      render: write the first agent's episode as episode.gif.
      resume: go on from the newest whole checkpoint in the run folder, if there is one.
      chunks: parts of the run; metrics are written and agents saved after each.
      eval_episodes: of each agent, for each of two evaluations, deterministic and sampled.
      debug: check every action; slower.
      quiet: show no progress.
      log: where metrics go besides metrics.jsonl: any of tensorboard, wandb, trackio, mlflow.
    """

    algo: str = "ppo"
    env: str = ""
    seeds: PositiveInt = 1
    seed: Seed = 0
    steps: Count = 0
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: Path | None = None
    load: Path | None = None
    render: bool = False
    resume: bool = False
    chunks: PositiveInt = 20
    eval_episodes: PositiveInt = 32
    debug: bool = False
    quiet: bool = False
    log: tuple[str, ...] = ("tensorboard",)


def summed(history: Metrics) -> Metrics:
    """Metrics [S, U] of a chunk as one number each, over seeds too: sums add up, the rest are means."""
    counts = ("episode", "skipped", "consecutive_skipped")
    means = {name: x.mean() for name, x in history.items() if not name.startswith(counts)}
    # A run on a log has no episodes.
    known = {"episodes": history["episodes"].sum()} if "episodes" in history else {}
    if known.get("episodes", 0) > 0:  # an average over no episode is no number, and not 0 either
        known["episode_return"] = history["episode_return_sum"].sum() / known["episodes"]
        known["episode_length"] = history["episode_length_sum"].sum() / known["episodes"]
    skipped = {"skipped": history["skipped"][:, -1].sum()} if "skipped" in history else {}
    if (in_a_row := "consecutive_skipped") in history:  # of the seed that is worst off, at the end
        skipped[in_a_row] = history[in_a_row][:, -1].max()
    return {**known, **means, **skipped, "steps": history["steps"].max()}


def chunk_sizes(updates: int, chunks: int) -> list[int]:
    """Updates of each chunk: all alike, but for a shorter last one."""
    size = -(-updates // min(chunks, updates))
    return [min(size, updates - start) for start in range(0, updates, size)]


def compiled_once(function: Any, donate: bool = True) -> Any:
    """`function`, jitted; its first argument's memory is used again for the result."""
    return jax.jit(function, donate_argnums=0 if donate else None, compiler_options=compiler_options())


def train(
    options: Options,
    folder: Path,
    run: Run,
    hyper: Any,
    keys: jax.Array,
    description: dict[str, Any],
    *,
    data_fingerprint: str | None = None,
) -> tuple[Any, float | None]:
    """The trained states of all seeds, and environment steps per second without compilation."""

    def several(state: Any, updates: int) -> tuple[Any, Metrics]:
        one = functools.partial(run_updates, run, updates=updates)
        return jax.vmap(lambda state: one(state, hyper))(state)

    wrap = environments.checked if options.debug else compiled_once
    sizes = chunk_sizes(run.updates, options.chunks)
    programs = {size: wrap(functools.partial(several, updates=size)) for size in set(sizes)}
    compiled, seconds, done = {}, [], []

    def step(state: Any, number: int) -> tuple[Any, Metrics]:
        size = sizes[number]
        if size not in compiled:
            program = programs[size]
            compiled[size] = program if options.debug else program.lower(state).compile()
        began = time.perf_counter()
        state, history = jax.block_until_ready(compiled[size](state))
        seconds.append(time.perf_counter() - began)
        done.append(size * run.steps_per_update * options.seeds)
        return state, summed(jax.device_get(history))

    state = run_loop(
        jax.jit(jax.vmap(lambda key: run.init(key, hyper)))(keys),
        step,
        LoopConfig(len(sizes), save_every=1, quiet=options.quiet),
        stage="rl",
        folder=folder,
        resume=options.resume,
        run_config=description,
        data_fingerprint=data_fingerprint,
        loggers=make_loggers(options.log, folder, stage="rl", config=description, resume=options.resume),
    )
    return state, sum(done) / sum(seconds) if seconds else None


def evaluations(
    options: Options, run: Run, state: Any, env: Environment, env_params: Any, keys: jax.Array
) -> dict[str, list[float]]:
    """Mean return of each seed, acting deterministically and by samples."""
    found = {}
    for name, deterministic in (("evaluation_return", True), ("evaluation_return_sampled", False)):

        def one(state: Any, key: jax.Array, deterministic: bool = deterministic) -> jax.Array:
            returns, _ = evaluate(
                run,
                state,
                env,
                env_params,
                key,
                episodes=options.eval_episodes,
                deterministic=deterministic,
            )
            return returns.mean()

        # Not the training's keys: an evaluation on seen beginnings would flatter.
        own = jax.vmap(functools.partial(jax.random.fold_in, data=1 + deterministic))(keys)
        found[name] = (
            np.asarray(compiled_once(jax.vmap(one), donate=False)(state, own)).astype(float).tolist()
        )
    return found


def render_first(folder: Path, run: Run, state: Any, env: Environment, env_params: Any, seed: int) -> None:
    """An episode of the first agent as `episode.gif`."""
    first = jax.tree.map(lambda x: x[0], state)
    path = folder / "episode.gif"
    rl_render.render(env, *rl_render.record(run, first, env, env_params, seed), path)
    print(f"Episode: {path}")


def report(summary: dict[str, Any]) -> None:
    """The numbers on standard output."""
    rows = []
    for name in ("evaluation_return", "evaluation_return_sampled"):
        scores = summary[name]
        interval = f"{mean_interval(scores):.4g}"
        rows.append((name, interval, interquartile_mean(scores), min(scores), max(scores)))
    title = f"{summary['algo']} on {summary['env']}, {summary['seeds']} seeds"
    final_table(title, ("", "mean", "IQM", "least", "most"), rows)


def read_description(folder: Path) -> dict[str, Any]:
    """Training settings of `folder`.

    Raises:
      UserError: it holds no agent.
    """
    path = folder / AGENT
    keys = ("algo", "env", "seeds", "seed", "steps")
    remedy = "no agent can be read: give the folder that a run wrote with --out"
    description = files.read_json(path, keys=keys, remedy=remedy)
    return {**description, "set": [rl_agents.current_name(change) for change in description.get("set", ())]}


def loaded(options: Options, folder: Path) -> dict[str, Any]:
    """The description of the saved agents.

    Raises:
      UserError: they are of another environment.
    """
    description = read_description(folder)
    if options.env and options.env != description["env"]:
        raise UserError(
            f"{folder} holds agents for {description['env']}, not for {options.env}: leave out --env"
        )
    return description


def described(
    options: Any,
    folder: Path,
    names: tuple[str, ...] = ("algo", "env", "seeds", "seed", "steps", "set", "chunks"),
) -> dict[str, Any]:
    """The description of the agents about to be trained, of `names` of the options.

    Raises:
      UserError: the folder holds others, which --resume cannot go on with, or any without --resume.
    """
    if not (options.resume or CheckpointManager(folder / "checkpoints").latest_step() is None):
        raise UserError(f"{folder} already holds a run: add --resume, or choose another --out")
    description = {name: option_checks.to_json(getattr(options, name)) for name in names}
    if options.resume and files.exists(folder / AGENT):
        before = read_description(folder)
        for name in names:
            if before.get(name) != description[name]:
                raise UserError(
                    f"{folder}: its run has --{name} {before.get(name)}, not {description[name]}: give "
                    "--resume the same options, or choose another --out"
                )
    return description


def seed_keys(description: dict[str, Any]) -> jax.Array:
    """The keys of the agents of a description, one a seed."""
    seeds = range(description["seed"], description["seed"] + description["seeds"])
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def restored(folder: Path, run: Run, hyper: Any, keys: jax.Array) -> Any:
    """The saved states of all seeds."""
    like = jax.eval_shape(jax.vmap(lambda key: run.init(key, hyper)), keys)
    with CheckpointManager(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(like)[1]


def check(options: Options) -> Path:
    """The run folder, after a look at the options.

    Raises:
      UserError: an option is missing or out of range.
    """
    option_checks.check_numbers(options)
    folder = options.load or options.out
    if folder is None:
        raise UserError("--out is missing: name the folder to write to, or --load a run folder")
    if not options.load and not options.env:
        raise UserError("--env is missing: name an environment, such as CartPole-v1")
    return folder


def run(options: Options) -> None:
    """Trains or loads, evaluates, and leaves a summary."""
    folder = check(options)
    description = loaded(options, folder) if options.load else described(options, folder)
    env, env_params = rl_agents.make_environment(description["env"])
    if options.render and env.num_agents > 1:
        raise UserError(f"--render draws one agent, and {env.name} has {env.num_agents}: leave it out")
    agent = rl_agents.make_agent(description["algo"], env, description["steps"], description["set"])
    course = agent.run(env, env_params)
    keys = seed_keys(description)
    speed = {}
    if options.load:
        state = restored(folder, course, agent.hyper, keys)
    else:
        describe_run(folder, option_checks.to_json(options), stage="rl")
        files.write_json(folder / AGENT, description)
        state, rate = train(options, folder, course, agent.hyper, keys, description)
        speed = {"steps_per_second": rate, "environment_steps": course.updates * course.steps_per_update}
    found = evaluations(options, course, state, env, env_params, keys)
    summary = {**description, **speed, "eval_episodes": options.eval_episodes, **found}
    target = options.out or folder
    files.write_json(target / ("evaluation.json" if options.load else "summary.json"), summary)
    report(summary)
    if options.render:
        render_first(target, course, state, env, env_params, description["seed"])
