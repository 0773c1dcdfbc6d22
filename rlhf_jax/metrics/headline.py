"""Headline of a run: its result in one sentence."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.metrics.plots import Curve, are_shares, trend
from rlhf_jax.metrics.progress import format_number

# Scores on held-out prompts, by what the headline calls them.
_HELD_OUT = {"exact_match": "exact match", "eval/exact_match": "exact match", "eval/score": "held-out score"}
STAGE_NAMES = {"sft": "SFT", "reward_model": "Reward model", "ppo": "PPO", "dpo": "DPO", "grpo": "GRPO"}
"""Stages of RLHF in their order, and what people call them."""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One method's result on held-out prompts. NaN stands for what was not measured.

    Attributes:
      method: its key in `summary.json`, such as "grpo".
      exact_match: mean and interval (mean, low, high), shares between 0 and 1.
      kl: KL divergence from the policy to its reference, in nats a completion.
      length: mean completion length in tokens.
      seconds: wall time.
      shares: more numbers between 0 and 1, by the titles of their columns, which are those of all rows.
    """

    method: str
    exact_match: tuple[float, float, float]
    kl: float
    length: float
    seconds: float
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)


def display(method: str) -> str:
    """The name of a stage or method, for people."""
    return STAGE_NAMES.get(method, method.replace("_", " "))


def base_row(rows: Sequence[TableRow]) -> TableRow:
    """The row that the others are compared with: where they started from."""
    return next((row for row in rows if row.method == "sft"), rows[0])


def headline(table: Sequence[TableRow], curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> str:
    """The result in one sentence."""
    rows = [row for row in table if math.isfinite(row.exact_match[0])]
    if rows:
        return _best_of(rows)
    for stage, metrics in reversed(list(curves.items())):
        for name in _telling(metrics):
            if name in metrics:
                return f"{display(stage)}: {_first_and_last(name, metrics[name])}"
    return "Run report"


def _best_of(rows: Sequence[TableRow]) -> str:
    """`PPO and GRPO answer 97 % of the held-out prompts right, 52 points more than SFT`."""
    first, best = base_row(rows), max(rows, key=lambda row: row.exact_match[0])
    score, low, _ = best.exact_match
    equals = [row for row in rows if math.isclose(row.exact_match[0], score, abs_tol=1e-9)]
    close = [
        row for row in rows if row not in equals and row is not first and low <= row.exact_match[0] < score
    ]
    verb = "answers" if len(equals) == 1 else "answer"
    said = f"{_listed(equals)} {verb} {100 * score:.0f}\u00a0% of the held-out prompts right"
    if first not in equals:
        gain = 100 * (score - first.exact_match[0])
        said += f", {gain:.0f} points more than {display(first.method)}"
    if close:
        said += f"; {_listed(close)} {'is' if len(close) == 1 else 'are'} within the interval"
    return said


def _listed(rows: Sequence[TableRow]) -> str:
    *names, last = [display(row.method) for row in rows]
    return f"{', '.join(names)} and {last}" if names else last


def _telling(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the metrics that say whether a stage got better; the loss of a policy gradient does not."""
    sampled = "length" in metrics and not metrics.keys().isdisjoint(("reward", "win_rate"))
    return (*_HELD_OUT, *(("reward", "win_rate") if sampled else ("loss",)))


def _first_and_last(name: str, curves: Sequence[Curve]) -> str:
    before = float(np.mean([curve.values[0] for curve in curves]))
    if name in _HELD_OUT:  # few points, each of many prompts
        after = float(np.mean([curve.values[-1] for curve in curves]))
    else:
        after = float(trend(curves).values[-1])
    words = _HELD_OUT.get(name, name.replace("_", " "))
    shown = format_score if name in _HELD_OUT and are_shares(curves) else format_number
    return f"{words} {shown(before)} at first, {shown(after)} at the end"


def format_score(share: float) -> str:
    """A share as people read it: `43.8 %`."""
    return f"{100 * share:.1f}\u00a0%"
