"""Scores answers of one or several systems in a file: any metric with its interval, and how systems differ.

    rlhf score --data answers.jsonl --systems ours theirs --reference right --metrics bleu rougeL
    rlhf score --data scores.jsonl --systems probability --reference label --metrics auc brier f1
    rlhf score --data pools.jsonl --systems correct --metrics pass@1 pass@4
    rlhf score --data gsm8k/model_solutions.jsonl --reference ground_truth --plot scores.png \\
        --systems 6b_finetuning.solution 175b_verification.solution --metrics bleu rouge1 rougeL

A system is a field of the rows, `outer.inner` where it stands in an object. Intervals are 95 % bootstraps
over rows; each further system is compared with the first on the same resamples. No model is needed.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Finite, PositiveInt, Range, Seed
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.evaluation import classification, text, win_rate
from rlhf_jax.evaluation.pass_at_k import pass_at_k
from rlhf_jax.evaluation.statistics import Comparison, Interval, bootstrap_interval, paired_bootstrap
from rlhf_jax.metrics.pictures import format_of, picture
from rlhf_jax.metrics.progress import Progress, final_table
from rlhf_jax.stages import option_checks

Columns = list[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Scoring options.

    Attributes:
      data: rows: a path, or tfds:NAME[:SPLIT].
      systems: fields with what each system says; the others are compared with the first.
      reference: field with what is right: a text or a list of texts, or true and false.
      metrics: of texts bleu, rouge1, rouge2, rougeL; of scores for a label auc, average_precision, brier, and
        at --threshold accuracy, precision, recall, f1; of lists of true and false pass@K; of preferences
        from 0 to 1 win_rate, and length_controlled_win_rate where --reference is a field with how much longer
        the first answer is than the second; of any numbers mean.
      threshold: scores at least this high say true.
      smoothing: of BLEU where an order has no n-gram right.
      resamples: draws of the bootstrap.
      confidence: of the intervals.
      seed: decides the draws.
      plot: where to draw the scores (.png, .svg, .pdf); empty for nowhere.
      json: write one JSON object to standard output.
    """

    data: str
    systems: tuple[str, ...]
    reference: str = ""
    metrics: tuple[str, ...]
    threshold: Finite = 0.5
    smoothing: text.Smoothing = "exp"
    resamples: PositiveInt = 1000
    confidence: Annotated[float, Range(0, 1, above=True, below=True)] = 0.95
    seed: Seed = 0
    plot: str = ""
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Metric:
    """Metric of a corpus: how rows become columns, and columns a number.

    Attributes:
      columns_fn: (what a system says, what is right) -> columns.
      statistic_fn: columns of any examples -> the number.
      needs_reference: whether anything must be right.
    """

    columns_fn: Callable[[Sequence[Any], Sequence[Any]], Columns]
    statistic_fn: Callable[..., float]
    needs_reference: bool = True


# Fields --------------------------------------------------------------------------------------------


def field(row: Row, name: str) -> Any:
    """The field of a row, in an object where the name has dots.

    Raises:
      UserError: there is none.
    """
    value: Any = row.fields
    for part in [name] if name in row.fields else name.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            known = ", ".join(sorted(row.fields))
            raise UserError(f"{row.where}: field {name!r} is missing (the row has: {known}): name another")
        value = value[part]
    return value


def numbers(values: Sequence[Any], name: str) -> np.ndarray:
    """Numbers, true and false counting as 1 and 0.

    Raises:
      UserError: something is neither.
    """
    for place, value in enumerate(values, start=1):
        if not isinstance(value, bool | int | float):
            raise UserError(f"field {name!r} of row {place} is {value!r:.40}: {name} must be a number")
    return np.array(values, np.float64)


def labels(values: Sequence[Any]) -> np.ndarray:
    """True and false, or 1 and 0."""
    found = numbers(values, "label")
    if not np.isin(found, (0, 1)).all():
        raise UserError("the reference must be true or false, or 1 or 0: name another field")
    return found.astype(bool)


def texts(values: Sequence[Any], name: str) -> list[Any]:
    """Texts, or lists of texts.

    Raises:
      UserError: something is neither.
    """
    for place, value in enumerate(values, start=1):
        several = value if isinstance(value, list) and value else [value]
        if not all(isinstance(each, str) for each in several):
            raise UserError(f"the {name} of row {place} is {value!r:.40}: BLEU and ROUGE need texts")
    return list(values)


# Metrics -------------------------------------------------------------------------------------------


def find_metric(options: Options, name: str) -> Metric:
    """The metric of that name.

    Raises:
      UserError: there is none.
    """

    def of_texts(columns_fn: Callable[..., np.ndarray]) -> Callable[..., Columns]:
        return lambda said, right: [columns_fn(texts(said, "system"), texts(right, "reference"))]

    def f1_of(columns_fn: Callable[..., np.ndarray]) -> Metric:
        return Metric(of_texts(columns_fn), lambda rows: float(np.mean(rows[:, 2])))

    def ranked(said: Sequence[Any], right: Sequence[Any]) -> Columns:
        return [numbers(said, "score"), labels(right)]

    def counted(said: Sequence[Any], right: Sequence[Any]) -> Columns:
        return [classification.confusion(numbers(said, "score") >= options.threshold, labels(right))]

    def preferred(said: Sequence[Any]) -> np.ndarray:
        values = numbers(said, "preference")
        if not ((values >= 0) & (values <= 1)).all():
            raise UserError("a preference must be from 0 to 1, 1/2 for a tie: name another field")
        return values

    known = {
        "bleu": Metric(
            of_texts(text.bleu_statistics), lambda rows: text.bleu(rows, smoothing=options.smoothing)
        ),
        "rouge1": f1_of(lambda *sides: text.rouge_n(*sides, order=1)),
        "rouge2": f1_of(lambda *sides: text.rouge_n(*sides, order=2)),
        "rougeL": f1_of(text.rouge_l),
        "auc": Metric(ranked, classification.roc_auc),
        "average_precision": Metric(ranked, classification.average_precision),
        "brier": Metric(ranked, classification.brier_score),
        "accuracy": Metric(counted, classification.accuracy),
        "precision": Metric(counted, classification.precision),
        "recall": Metric(counted, classification.recall),
        "f1": Metric(counted, classification.f1),
        "win_rate": Metric(lambda said, _: [preferred(said)], win_rate.win_rate, needs_reference=False),
        "length_controlled_win_rate": Metric(
            lambda said, right: [preferred(said), numbers(right, "length difference")],
            win_rate.length_controlled_win_rate,
        ),
        "mean": Metric(lambda said, _: [numbers(said, "number")], np.mean, needs_reference=False),
    }
    size = name.removeprefix("pass@")
    if size != name and size.isdecimal() and int(size) > 0:
        return Metric(lambda said, _: [pools(said, int(size))], np.mean, needs_reference=False)
    if name not in known:
        raise UserError(f"--metrics {name}: there is no such metric: choose from {', '.join(known)}, pass@K")
    return known[name]


def pools(values: Sequence[Any], size: int) -> np.ndarray:
    """pass@size of every row, which is a list of verdicts on its samples; rows may have more or fewer."""
    for place, value in enumerate(values, start=1):
        if not isinstance(value, list) or len(value) < size:
            raise UserError(f"row {place}: pass@{size} needs a list of {size} verdicts or more: add samples")
    counts, found = np.array([len(value) for value in values]), np.zeros(len(values))
    for count in np.unique(counts):
        places = np.flatnonzero(counts == count)
        verdicts = np.stack([labels(values[int(place)]) for place in places])
        found[places] = np.asarray(pass_at_k(jnp.asarray(verdicts)))[:, size - 1]
    return found


def score(
    options: Options, rows: Sequence[Row]
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Comparison]]]:
    """Scores of systems: of each metric each system's value, and how the others differ from the first."""
    metrics = {name: find_metric(options, name) for name in options.metrics}
    for name, metric in metrics.items():
        if metric.needs_reference and not options.reference:
            raise UserError(f"--metrics {name} needs --reference: name the field with what is right")
    right = [field(row, options.reference) for row in rows] if options.reference else []
    said = {system: [field(row, system) for row in rows] for system in options.systems}
    draw = {"confidence": options.confidence, "resamples": options.resamples, "seed": options.seed}
    values, differences = {}, {}
    with Progress("score", len(metrics) * len(said), quiet=options.json) as progress:
        for number, (name, metric) in enumerate(metrics.items()):
            columns: dict[str, Columns] = {}
            values[name], differences[name] = {}, {}
            for place, (system, answers) in enumerate(said.items()):
                columns[system] = metric.columns_fn(answers, right)
                values[name][system] = bootstrap_interval(
                    *columns[system], statistic_fn=metric.statistic_fn, **draw
                )
                if place:
                    differences[name][system] = paired_bootstrap(
                        columns[options.systems[0]], columns[system], statistic_fn=metric.statistic_fn, **draw
                    )
                progress.update(number * len(said) + place + 1)
    return values, differences


# Results -------------------------------------------------------------------------------------------


def plot(path: str, values: dict[str, dict[str, Interval]]) -> None:
    """A panel a metric: every system's value with its interval."""
    systems = list(next(iter(values.values())))
    with picture(path, 1, len(values), height=1.2 + 0.4 * len(systems), sharey=True) as panels:
        for axes, (name, found) in zip(panels, values.items(), strict=True):
            for place, interval in enumerate(found.values()):
                ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
                axes.errorbar(interval.mean, place, xerr=ends, fmt="o", capsize=3)
            axes.set(title=name, yticks=range(len(systems)), yticklabels=systems)
            axes.set_ylim(len(systems) - 0.5, -0.5)
            axes.margins(x=0.1)


def show(
    options: Options,
    count: int,
    values: dict[str, dict[str, Interval]],
    differences: dict[str, dict[str, Comparison]],
) -> None:
    """Prints the scores, then the differences."""
    sure = f"{options.confidence:.0%} bootstrap intervals over {count} rows"
    title = (
        f"{options.data}: {sure}; BLEU 13a, smoothing {options.smoothing}"
        if "bleu" in values
        else (f"{options.data}: {sure}")
    )
    rows = [[system, *(f"{values[name][system]:.3f}" for name in values)] for system in options.systems]
    final_table(title, ["system", *values], rows)
    others = options.systems[1:]
    if others:
        cells = [
            [system, *(difference_cell(found[system]) for found in differences.values())] for system in others
        ]
        final_table(f"Difference to {options.systems[0]}, paired", ["system", *differences], cells)


def difference_cell(found: Comparison) -> str:
    """A difference with its interval and p-value."""
    return f"{found.difference:+.3f} p={found.p_value:.3f}"


def run(options: Options) -> None:
    """Scores, and shows."""
    option_checks.check_numbers(options)
    if options.plot:
        format_of(options.plot)
    if len(set(options.systems)) < len(options.systems):
        raise UserError("--systems names a field twice: name each once")
    rows = read_rows(options.data)
    values, differences = score(options, rows)
    if options.plot:
        plot(options.plot, values)
    if options.json:
        found = {"rows": len(rows), "values": as_json(values), "differences": as_json(differences)}
        print(json.dumps(found, indent=1))
        return
    show(options, len(rows), values, differences)
    if options.plot:
        print(f"Figure: {options.plot}")


def as_json(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Intervals and comparisons as JSON types; NaN, which is none, as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        return None if value != value else value

    return {n: {s: plain(dataclasses.asdict(v)) for s, v in by.items()} for n, by in found.items()}
