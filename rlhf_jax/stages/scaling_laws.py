"""Scaling laws fitted to runs: loss against size and tokens, compute-optimal sizes, critical batch size.

    rlhf scaling-laws runs/size/* --out runs/scaling_laws
    rlhf scaling-laws runs/size/* --out runs/scaling_laws --flops 1e12 1e15
    rlhf scaling-laws a.jsonl b.jsonl c.jsonl d.jsonl e.jsonl f.jsonl --params 1e6 1e6 4e6 4e6 16e6 16e6 \\
        --loss eval_loss --tokens num_tokens --tokens-total
    rlhf scaling-laws runs/batch/* --out runs/batch_sizes --target-losses 3.0 2.7

A run is one point: its parameters, the tokens that it saw, and its last loss. Fitted are the forms of
Hoffmann et al. 2022 (Chinchilla) and Kaplan et al. 2020, with bootstrap intervals over runs, and a parabola
for each budget of operations with which three sizes were trained (IsoFLOP). A learning rate that falls must
have come to its end with the last loss: half a longer run is no run of half the length. With --target-losses
the runs differ in batch size instead, and the critical one is fitted. Leaves scaling.json and scaling.svg in
--out.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import ArrayLike

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Positive, PositiveInt, Seed
from rlhf_jax.evaluation import scaling_laws as laws
from rlhf_jax.evaluation.critical_batch import CriticalBatch, fit_critical_batch
from rlhf_jax.evaluation.statistics import Interval, bootstrap_intervals
from rlhf_jax.metrics import final_table
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.stages.scaling_runs import Measured, read_run

FITS: dict[str, Callable[[ArrayLike, ArrayLike, ArrayLike], laws.Law]] = {
    "chinchilla": laws.fit_chinchilla,
    "kaplan": laws.fit_kaplan,
}
FORMULAS = {
    "chinchilla": "Chinchilla: L = E + A / N^alpha + B / D^beta",
    "kaplan": "Kaplan: L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
}
_LEAST_RUNS, _LEAST_DIFFERENT = 6, 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the fit.

    Attributes:
      folders: of runs of `rlhf pretrain` or `rlhf sft`, or files of metrics, a JSON object a line.
      out: folder of scaling.json and scaling.svg.
      params: parameters of each run, in their order; none to count those of its model.json.
      embeddings: count embedding matrices among the parameters; Kaplan et al. do not.
      loss: metric that is fitted, in nats a token; its last value counts.
      tokens: metric that counts tokens.
      tokens_total: it counts them from the beginning of the run, not those of a step.
      flops: budgets of operations for which size, tokens and loss are foretold.
      isoflop_gap: budgets of runs belong together up to this share above the next smaller one.
      target_losses: losses to which steps are counted; the critical batch size is fitted then.
      resamples: of the runs, for intervals; the time grows with it.
      seed: of the resamples.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("runs/scaling_laws")
    params: tuple[Positive, ...] = ()
    embeddings: bool = False
    loss: str = "eval/loss"
    tokens: str = "tokens"
    tokens_total: bool = False
    flops: tuple[Positive, ...] = ()
    isoflop_gap: Positive = 0.15
    target_losses: tuple[Positive, ...] = ()
    resamples: PositiveInt = 200
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A law with what follows from it.

    Attributes:
      law: fitted to all runs.
      numbers: its parameters, the exponent of the optimal size, and forecasts, with intervals over runs.
      error: root mean squared error of log L.
      undetermined: numbers that the runs do not say.
    """

    law: laws.Law
    numbers: dict[str, Interval]
    error: float
    undetermined: list[str]


def read_runs(options: Options) -> list[Measured]:
    """The runs that the options name.

    Raises:
      UserError: there are none, or `--params` has not one for each; as `read_run`.
    """
    if not options.folders:
        raise UserError("no run is given: give run folders, or files of metrics with --params")
    if options.params and len(options.params) != len(options.folders):
        raise UserError(
            f"--params has {len(options.params)} numbers for {len(options.folders)} runs: give one for each, "
            "in their order"
        )
    given: Sequence[float | None] = options.params or [None] * len(options.folders)
    return [
        read_run(
            path,
            # Batch sizes are compared whatever the size.
            params=math.nan if count is None and options.target_losses else count,
            embeddings=options.embeddings,
            loss=options.loss,
            tokens=options.tokens,
            total=options.tokens_total,
        )
        for path, count in zip(options.folders, given, strict=True)
    ]


# Laws ----------------------------------------------------------------------------------------------


def points(runs: Sequence[Measured]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, L) of runs, [R] each."""
    rows = [(run.params, run.tokens[-1], run.losses[-1]) for run in runs]
    params, tokens, losses = np.array(rows, np.float64).T
    return params, tokens, losses


def check_points(params: np.ndarray, tokens: np.ndarray) -> None:
    """Raises: UserError where no law can be fitted."""
    for name, values in (("sizes", params), ("numbers of tokens", tokens)):
        if (count := len(np.unique(values))) < _LEAST_DIFFERENT:
            raise UserError(f"the runs are of {count} {name}: give runs of {_LEAST_DIFFERENT} or more")
    if len(params) < _LEAST_RUNS:
        raise UserError(f"{len(params)} runs are too few to fit five numbers: give {_LEAST_RUNS} or more")


def law_numbers(law: laws.Law, flops: Sequence[float]) -> dict[str, float]:
    """Parameters of a law, the exponent of the optimal size, and the optimum of each budget."""
    numbers = {**dataclasses.asdict(law), "optimal N ~ C^": law.params_exponent}
    for budget in flops:
        params, tokens = law.optimum(budget)
        numbers |= {f"N at {budget:.3g}": params, f"D at {budget:.3g}": tokens}
        numbers[f"L at {budget:.3g}"] = float(law(params, tokens))
    return numbers


def fit_law(name: str, columns: tuple[np.ndarray, ...], options: Options) -> Fitted:
    """One of `FITS`, with intervals over runs; resamples of too few sizes are left out."""
    fit_fn = FITS[name]
    law = fit_fn(*columns)
    names = list(law_numbers(law, options.flops))

    def numbers(*some: np.ndarray) -> list[float]:
        try:
            return list(law_numbers(fit_fn(*some), options.flops).values())
        except ValueError:
            return [math.nan] * len(names)

    intervals = bootstrap_intervals(
        *columns, statistic_fn=numbers, resamples=options.resamples, seed=options.seed
    )
    params, tokens, losses = columns
    error = float(np.sqrt(np.mean((np.log(law(params, tokens)) - np.log(losses)) ** 2)))
    return Fitted(law, dict(zip(names, intervals, strict=True)), error, laws.undetermined(law))


def show_laws(
    runs: Sequence[Measured], fitted: Mapping[str, Fitted], isoflops: Sequence[laws.IsoFLOP]
) -> None:
    """Tables of runs, laws and budgets."""
    rows = [
        (run.name, f"{run.params:,.0f}", f"{run.tokens[-1]:,.0f}", f"{run.flops:.3g}", run.losses[-1])
        for run in runs
    ]
    final_table(f"{len(runs)} runs", ["run", "parameters N", "tokens D", "operations 6ND", "loss"], rows)
    for name, found in fitted.items():
        cells = [(number, *ends(interval)) for number, interval in found.numbers.items()]
        title = f"{FORMULAS[name]}; error of log L {found.error:.2%}"
        final_table(title, ["number", "fit", "95 % from", "to"], cells)
        for number in found.undetermined:
            print(f"{number} is at an end of its range: these runs do not determine it")
    if isoflops:
        cells = [
            (f"{one.flops:.3g}", len(one.runs), f"{one.params:.3g}", one.loss, "yes" if one.inside else "no")
            if one.curvature > 0
            else (f"{one.flops:.3g}", len(one.runs), None, None, "no minimum")
            for one in isoflops
        ]
        columns = ["operations", "runs", "N of least loss", "loss there", "between the sizes"]
        final_table("IsoFLOP parabolas", columns, cells)
        if (exponent := isoflop_exponent(isoflops)) is not None:
            print(f"their minima between the sizes: N ~ C^{exponent:.3f}")


def isoflop_exponent(isoflops: Sequence[laws.IsoFLOP]) -> float | None:
    """a of N ~ C^a through the minima that lie between the sizes; None of fewer than two."""
    inside = [(one.flops, one.params) for one in isoflops if one.inside]
    return laws.fit_power_law(*zip(*inside, strict=True))[1] if len(inside) > 1 else None


def ends(interval: Interval) -> tuple[str, str, str]:
    """Cells of an interval."""
    return f"{interval.mean:.4g}", f"{interval.low:.4g}", f"{interval.high:.4g}"


def draw_laws(
    path: Path, columns: tuple[np.ndarray, ...], law: laws.Law, isoflops: Sequence[laws.IsoFLOP]
) -> None:
    """Loss against tokens with the law's curve for each size, and against size for each budget."""
    params, tokens, losses = columns
    with picture(path, 1, 2 if isoflops else 1, height=3.2, sharey=True) as panels:
        along = np.geomspace(tokens.min(), tokens.max(), 50)
        lines = {}
        for size in np.unique(params):
            (line,) = panels[0].plot(along, law(size, along))
            rows = params == size
            dots = {"markersize": 3.5, "clip_on": False, "color": line.get_color()}
            panels[0].plot(tokens[rows], losses[rows], "o", **dots)
            lines[f"N = {size:.3g}"] = line
        panels[0].set(xscale="log", xlabel="tokens D", ylabel="loss", title="runs, and Chinchilla's law")
        name_ends(panels[0], lines)
        lines = {}
        for one in isoflops:
            rows = list(one.runs)
            along = np.geomspace(params[rows].min(), params[rows].max(), 50)
            # One that opens downward has no size of least loss, and is no more than its dots.
            (line,) = panels[1].plot(along, one(along), linestyle="-" if one.curvature > 0 else "")
            dots = {"markersize": 3.5, "clip_on": False, "color": line.get_color()}
            panels[1].plot(params[rows], losses[rows], "o", **dots)
            lines[f"C = {one.flops:.3g} FLOPs"] = line
        if isoflops:
            panels[1].set(xscale="log", xlabel="parameters N", title="equal budgets, and their parabolas")
            name_ends(panels[1], lines)


# Batch sizes ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BatchFit:
    """Steps to one loss by batch size.

    Attributes:
      target: the loss.
      rows: (tokens of a batch, steps, run) of the run of that batch size that came there first.
      numbers: least steps, least tokens and critical batch size, with intervals over batch sizes.
      law: fitted to the rows.
    """

    target: float
    rows: list[tuple[int, float, str]]
    numbers: dict[str, Interval]
    law: CriticalBatch


def fit_batches(runs: Sequence[Measured], target: float, options: Options) -> BatchFit:
    """Critical batch size of a loss; of each batch size the fastest run counts, as of the best learning rate.

    Raises:
      UserError: runs of fewer than three batch sizes came to the loss.
    """
    best: dict[int, tuple[float, str]] = {}
    for run in runs:
        steps = run.steps_to(target)
        if not math.isnan(steps):
            best[run.batch_tokens] = min(best.get(run.batch_tokens, (math.inf, "")), (steps, run.name))
    if len(best) < _LEAST_DIFFERENT:
        lowest = min(float(run.losses.min()) for run in runs)
        raise UserError(
            f"--target-losses {target:g}: runs of {len(best)} batch sizes came so low (the lowest loss is "
            f"{lowest:.4g}): give a higher loss, or runs of more batch sizes"
        )
    rows = [(size, steps, name) for size, (steps, name) in sorted(best.items())]

    def numbers(sizes: np.ndarray, steps: np.ndarray) -> list[float]:
        try:
            law = fit_critical_batch(sizes, steps)
        except ValueError:
            return [math.nan] * 3
        return [law.min_steps, law.min_examples, law.batch_size]

    columns = np.array([row[0] for row in rows], np.float64), np.array([row[1] for row in rows])
    intervals = bootstrap_intervals(
        *columns, statistic_fn=numbers, resamples=options.resamples, seed=options.seed
    )
    names = ["least steps", "least tokens", "critical batch size, tokens"]
    return BatchFit(target, rows, dict(zip(names, intervals, strict=True)), fit_critical_batch(*columns))


def show_batches(fits: Sequence[BatchFit]) -> None:
    """Tables of each loss."""
    for fit in fits:
        cells = [(f"{size:,}", f"{steps:.4g}", f"{size * steps:.4g}", name) for size, steps, name in fit.rows]
        columns = ["tokens a batch", "steps", "tokens", "fastest run"]
        final_table(f"steps to a loss of {fit.target:g}", columns, cells)
        numbers = [(name, *ends(interval)) for name, interval in fit.numbers.items()]
        final_table("(S / S_min - 1)(E / E_min - 1) = 1", ["number", "fit", "95 % from", "to"], numbers)
        if math.isnan(fit.law.batch_size):
            print("the steps do not bend: all batch sizes are on one side of the critical one")


def draw_batches(path: Path, fits: Sequence[BatchFit]) -> None:
    """Steps against batch size, a curve for each loss."""
    with picture(path, 1, 1, height=3.2) as (axes,):
        lines = {}
        for fit in fits:
            sizes = [row[0] for row in fit.rows]
            (points,) = axes.plot(sizes, [row[1] for row in fit.rows], "o", markersize=3.5)
            along = np.geomspace(min(sizes), max(sizes), 50)
            (line,) = axes.plot(along, fit.law(along), color=points.get_color())
            lines[f"loss {fit.target:g}"] = points if math.isnan(fit.law.batch_size) else line
        axes.set(xscale="log", yscale="log", xlabel="tokens a batch", ylabel="steps to the loss")
        name_ends(axes, lines)


# The command ---------------------------------------------------------------------------------------


def run(options: Options) -> None:
    """Fits, prints the tables, and leaves numbers and picture in `--out`."""
    runs = read_runs(options)
    if options.target_losses:
        fits = [fit_batches(runs, target, options) for target in options.target_losses]
        show_batches(fits)
        files.write_json(options.out / "scaling.json", {"batch_sizes": [_plain(fit) for fit in fits]})
        draw_batches(options.out / "scaling.svg", fits)
    else:
        columns = points(runs)
        check_points(*columns[:2])
        fitted = {name: fit_law(name, columns, options) for name in FITS}
        isoflops = laws.fit_isoflops(*columns, gap=options.isoflop_gap)
        show_laws(runs, fitted, isoflops)
        rows = [
            {"run": run.name, "params": n, "tokens": d, "flops": run.flops, "loss": loss}
            for run, n, d, loss in zip(runs, *(values.tolist() for values in columns), strict=True)
        ]
        found = {name: _plain(fit) for name, fit in fitted.items()}
        record = {"runs": rows, **found, "isoflops": [_plain(one) for one in isoflops]}
        record["isoflop_exponent"] = isoflop_exponent(isoflops)
        files.write_json(options.out / "scaling.json", record)
        draw_laws(options.out / "scaling.svg", columns, fitted["chinchilla"].law, isoflops)
    print(f"{options.out / 'scaling.json'}, {options.out / 'scaling.svg'}")


def _plain(found: Any) -> dict[str, Any]:
    """A dataclass as JSON: NaN and infinity, which JSON does not have, as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain(dataclasses.asdict(found))
