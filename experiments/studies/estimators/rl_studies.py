"""Two studies of what lies beneath: what gamma and lambda trade, and what importance weights cost.

    python experiments/studies/estimators/rl_studies.py --out runs/rl_studies  # some minutes on a CPU core
    python experiments/studies/estimators/rl_studies.py --out runs/quick --seeds 2 --steps 20000

Bias and variance of advantages are exact, by linear equations on a random walk; PPO is trained with every
gamma and lambda in one program an environment; importance weights are tried on episodes of many lengths, of a
task whose value under any policy is known. What is done is not done again.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
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
from rlhf_jax.kernels.off_policy import retrace, vtrace
from rlhf_jax.kernels.returns import discounted_returns
from rlhf_jax.metrics.pages import PLAN, SUMMARY, commands, held_summary, kept_remarks, made, when_and_with
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.rl.tabular import dynamic_programming
from rlhf_jax.rl.tabular.moments import bias_and_variance
from rlhf_jax.stages import option_checks, rl_rows
from rlhf_jax.sweep import product, sweep
from rlhf_jax.training.run_folder import describe_run

sys.path.append(str(Path(__file__).resolve().parents[1] / "control"))
import rl_table

ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1")
GAMMAS = (0.9, 0.97, 0.99, 0.997, 1.0)
LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0)
WALK_GAMMAS = (0.8, 0.9, 0.97, 1.0)
LENGTHS = (1, 2, 4, 8, 16, 32, 64)
ACTED, OTHER = 0.5, 0.65
"""Chances of a good action: of the policy that acted, and of the one whose value is asked for."""

PAGE, GAE_PICTURE, WEIGHTS_PICTURE = "RL_STUDIES.md", "rl_study_gae.svg", "rl_study_importance.svg"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the studies.

    Attributes:
      out: folder of what is done.
      page: where the page goes, with its pictures beside it; None for the folder of what is done.
      seeds: of each gamma and lambda.
      steps: environment steps of each seed.
      chunk: runs at once, in one program.
      episodes: behind each estimate with importance weights.
      quiet: show no progress.
    """

    out: Path | None = None
    page: Path | None = None
    seeds: int = 8
    steps: int = 100_000
    chunk: int = 40
    episodes: int = 50_000
    quiet: bool = False


# Gamma and lambda ------------------------------------------------------------------------------------


def walk_errors() -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """(squared bias, variance) of GAE over lambda for each gamma, on a walk of 19 states.

    V is half of what it should be for its gamma, as in the midst of training.
    """
    walk = dynamic_programming.random_walk(19, left_reward=-1.0)
    exact = dynamic_programming.chain_values(walk, gamma=1.0)

    def of(gamma: float, gae_lambda: Array) -> tuple[Array, Array]:
        values = dynamic_programming.chain_values(walk, gamma=gamma) / 2
        return bias_and_variance(walk, values, exact, gamma=gamma, gae_lambda=gae_lambda)

    lambdas = jnp.asarray(LAMBDAS)
    found = {}
    for gamma in WALK_GAMMAS:
        bias, variance = jax.vmap(lambda x, gamma=gamma: of(gamma, x))(lambdas)
        found[gamma] = np.asarray(bias), np.asarray(variance)
    return found


def train_all(env: str, options: Options, folder: Path) -> None:
    """PPO with each gamma and lambda, settings as in the table of results; leaves `summary.json`."""
    planned = {"seeds": options.seeds, "steps": options.steps, "gammas": GAMMAS, "lambdas": LAMBDAS}
    planned = json.loads(json.dumps({"env": env, **planned}))
    if held_summary(folder, planned) is not None:
        return
    files.write_json(folder / PLAN, planned)
    describe_run(folder, option_checks.to_json(options), stage="rl_studies", cell=env)
    row = next(row for row in rl_rows.ROWS if (row.env, row.algo, row.variant) == (env, "ppo", ""))
    train, hyper = rl_table.make_train(row, options.steps, eval_episodes=32)
    keys = jax.vmap(jax.random.key)(np.arange(options.seeds, dtype=np.uint32))
    hypers = product(hyper, gamma=GAMMAS, gae_lambda=LAMBDAS)
    results = sweep(train, keys, hypers, chunk_size=options.chunk, folder=folder, quiet=options.quiet)
    scores = results.scores("evaluation_return").reshape(len(GAMMAS), len(LAMBDAS), -1)
    files.write_json(folder / SUMMARY, {**planned, "evaluation_return": scores.tolist(), **made(folder)})
    jax.clear_caches()


# Importance weights ----------------------------------------------------------------------------------


def estimates(key: PRNGKeyArray, *, episodes: int, length: int) -> dict[str, Float[Array, " E"]]:
    """Estimates of the other policy's value of the first state, one an episode."""
    good = jax.random.bernoulli(key, ACTED, (episodes, length))
    log_rhos = jnp.log(jnp.where(good, OTHER / ACTED, (1 - OTHER) / (1 - ACTED)))
    rewards, mask = good / length, jnp.ones_like(good)
    discounts = jnp.ones_like(rewards).at[:, -1].set(0.0)
    last = jnp.zeros(episodes)  # behind the end
    known = jnp.broadcast_to(ACTED * (1 - jnp.arange(length) / length), rewards.shape)
    following = jnp.pad(known[:, 1:], ((0, 0), (0, 1)))
    weight = jnp.exp(jnp.sum(log_rhos, axis=1))

    def traced(values: Array, clip: float) -> Array:
        bounds = {"clip_rho": clip, "clip_c": clip}
        return vtrace(log_rhos, rewards, values, discounts, last, mask, **bounds).targets[:, 0]

    q_values, expected = rewards + following, OTHER / length + following
    targets = retrace(log_rhos, rewards, q_values, expected, discounts, last, mask)
    first_trace = jnp.minimum(jnp.exp(log_rhos[:, 0]), 1)
    returns = discounted_returns(rewards, discounts, last, mask)[:, 0]
    return {
        "no weights": returns,
        "whole episode": weight * returns,
        "each decision": traced(jnp.zeros_like(rewards), jnp.inf),
        "each decision, with V": traced(known, jnp.inf),
        "V-trace": traced(known, 1.0),
        "Retrace": expected[:, 0] + first_trace * (targets - q_values)[:, 0],
    }


def importance_errors(episodes: int) -> dict[str, list[tuple[float, float]]]:
    """(bias, standard deviation) of each estimator for each length of `LENGTHS`."""
    found: dict[str, list[tuple[float, float]]] = {}
    for length in LENGTHS:
        for name, values in estimates(jax.random.key(length), episodes=episodes, length=length).items():
            sample = np.asarray(values, np.float64)
            found.setdefault(name, []).append((float(sample.mean() - OTHER), float(sample.std())))
    return found


def effective_share(length: int) -> float:
    """Episodes that weighted ones are worth, as a share: 1 / E[weight^2], exactly (Kong 1992)."""
    return (OTHER**2 / ACTED + (1 - OTHER) ** 2 / (1 - ACTED)) ** -length


# Page ------------------------------------------------------------------------------------------------

HEAD = """# Studies of what lies beneath

Written by `experiments/studies/estimators/rl_studies.py`."""
GAE_TEXT = """## Gamma and lambda

Above: squared bias and variance of GAE on a random walk of 19 states against the undiscounted advantage,
exact, with a V of half the true size; an error that is the same whatever follows a state is no bias. Below,
and in the tables: PPO, evaluation return after {steps:,} environment steps, interquartile mean over
{seeds} seeds with its 95 % bootstrap interval; gamma and lambda apart, the settings are those of
`rlhf_jax/stages/rl_rows.py`."""
WEIGHTS_TEXT = """## Importance weights

At each of so many steps an action is good, which pays 1 / length, or not. The policy that acted chose a good
one with a chance of {acted:g}; asked for is the value of one with a chance of {other:g}, which is {other:g}.
From one episode at a time: bias and standard deviation over {episodes:,} episodes. `V`, and the Q of Retrace,
are those of the policy that acted; lambda, gamma and the bounds of V-trace are 1. The last line is the share
of episodes that weighted whole ones are worth, 1 / E[weight^2], exactly."""


def _learning_table(summary: Mapping[str, Any]) -> str:
    lines = [
        f"| {summary['env']}: gamma | {' | '.join(f'lambda {x:g}' for x in LAMBDAS)} |",
        "|---" * (len(LAMBDAS) + 1) + "|",
    ]
    for gamma, scores in zip(GAMMAS, summary["evaluation_return"], strict=True):
        lines.append(f"| {gamma:g} | {' | '.join(f'{iqm_interval(cell):.0f}' for cell in scores)} |")
    return "\n".join(lines)


def _weights_table(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    lines = [
        f"| steps | {' | '.join(map(str, LENGTHS))} |",
        "|---" * (len(LENGTHS) + 1) + "|",
    ]
    for name, pairs in found.items():
        lines.append(f"| {name} | {' | '.join(f'{bias:+.3f}, {std:.2f}' for bias, std in pairs)} |")
    shares = (f"{100 * effective_share(length):.2g} %" for length in LENGTHS)
    lines.append(f"| worth | {' | '.join(shares)} |")
    return "\n".join(lines)


def page_text(
    options: Options,
    learnt: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Sequence[tuple[float, float]]],
    remarks: str,
) -> str:
    """The page; `remarks` say in words what it shows."""
    first = learnt[0]
    parts = [
        HEAD,
        remarks,
        GAE_TEXT.format(steps=first["steps"], seeds=first["seeds"]),
        f"![gamma and lambda]({GAE_PICTURE})",
        *map(_learning_table, learnt),
        WEIGHTS_TEXT.format(acted=ACTED, other=OTHER, episodes=options.episodes),
        f"![importance weights]({WEIGHTS_PICTURE})",
        _weights_table(weights),
        f"## Made\n\n{when_and_with(learnt)}.",
        commands(learnt),
    ]
    return "\n\n".join(parts) + "\n"


def draw_gae(path: Path, learnt: Mapping[str, np.ndarray]) -> None:
    """Bias and variance over lambda, and what PPO learns at each gamma and lambda.

    Args:
      learnt: return by environment, [gammas, lambdas].
    """
    rows = 1 + math.ceil(len(learnt) / 2)
    with picture(path, rows, 2, height=2.4) as (bias_axes, variance_axes, *maps):
        for axes, which, title in ((bias_axes, 0, "squared bias"), (variance_axes, 1, "variance")):
            lines = {}
            for gamma, errors in walk_errors().items():
                (lines[f"gamma {gamma:g}"],) = axes.plot(LAMBDAS, errors[which], "o-", markersize=3)
            axes.set(title=f"{title} of GAE on the walk", xlabel="lambda")
            if which == 0:
                axes.set(yscale="log", ylim=(1e-6, None))
            name_ends(axes, lines)
        for axes in maps[len(learnt) :]:
            axes.remove()
        for axes, (env, returns) in zip(maps, learnt.items(), strict=False):
            axes.grid(False)
            axes.pcolormesh(returns, cmap="viridis")
            for (row, column), value in np.ndenumerate(returns):
                colour = "black" if value > (returns.min() + returns.max()) / 2 else "white"
                axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", color=colour)
            axes.set_xticks(np.arange(len(LAMBDAS)) + 0.5, [f"{x:g}" for x in LAMBDAS])
            axes.set_yticks(np.arange(len(GAMMAS)) + 0.5, [f"{x:g}" for x in GAMMAS])
            axes.set(title=f"return of PPO, {env}", xlabel="lambda", ylabel="gamma")
            axes.invert_yaxis()


def draw_weights(path: Path, found: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Size of the bias and standard deviation of each estimator over policies."""
    with picture(path, 1, 2, height=2.6) as panels:
        for axes, which, title in zip(panels, (0, 1), ("bias", "standard deviation"), strict=True):
            lines = {}
            for name, pairs in found.items():
                shown = [pair[which] for pair in pairs]
                (lines[name],) = axes.plot(LENGTHS, shown, "o-", markersize=3)
            axes.set(title=title, xlabel="steps of an episode")
            axes.set_xscale("log", base=2)
            axes.set_xticks(LENGTHS, map(str, LENGTHS))
            if which == 1:  # of Retrace over one step there is none
                axes.set(yscale="log", ylim=(3e-3, None))
            name_ends(axes, lines)


def run(options: Options) -> None:
    """Both studies, then the page."""
    if options.out is None:
        raise UserError("--out is missing: name the folder of the studies")
    for name in ("seeds", "steps", "chunk", "episodes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: give at least 1")
    files.hold(options.out, "--out")
    learnt = []
    for env in ENVIRONMENTS:
        train_all(env, options, options.out / env)
        learnt.append(files.read_json(options.out / env / SUMMARY))
    weights = importance_errors(options.episodes)
    page = options.page or options.out / PAGE
    files.write_text(page, page_text(options, learnt, weights, kept_remarks(page)))
    found = {
        held["env"]: np.array(
            [[iqm_interval(cell).mean for cell in row] for row in held["evaluation_return"]]
        )
        for held in learnt
    }
    draw_gae(page.with_name(GAE_PICTURE), found)
    draw_weights(page.with_name(WEIGHTS_PICTURE), weights)
    print(f"Page: {page}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
