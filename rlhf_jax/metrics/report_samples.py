"""Samples and completions of a report: what policies wrote, what it is worth, and what each token says."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core.files import Path
from rlhf_jax.core.numerics import is_finite_number
from rlhf_jax.metrics.completions import (
    COMPLETIONS,
    NUMBERS,
    TOKEN,
    TOKEN_NUMBERS,
    column_names,
    read_completions,
)
from rlhf_jax.metrics.headline import display
from rlhf_jax.metrics.progress import format_number

_MOST_TEXT = 4000
_MOST_SAMPLES = 40
_MOST_TABLES = 5  # steps whose completions are shown
_OF_SAMPLES = {"logp": "log-prob", "kl": "KL"}
_END = "\u25a0"  # a sign for the token that ends an answer, which has no text


def sample_views(samples: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Entries of `samples.json` as the template shows them, those on which policies differ first.

    Args:
      colours: of policies.
    """
    return [_sample_view(sample, colours) for sample in _by_disagreement(samples)[:_MOST_SAMPLES]]


def _sample_view(sample: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, Any]:
    completions = sample.get("completions", {})
    return {
        "prompt": _shorten(sample.get("prompt", "")),
        "answer": _shorten(sample.get("answer", "")),
        "completions": [
            {
                "name": display(method),
                "colour": colours.get(method, "var(--c0)"),
                "text": _shorten(completion.get("text", "")),
                "tokens": _tokens(completion),
                "correct": completion.get("correct"),
                "reward": _number(completion.get("reward")),
                "numbers": ", ".join(
                    f"{title} {value}"
                    for name, title in _OF_SAMPLES.items()
                    if (value := _number(completion.get(name)))
                ),
            }
            for method, completion in completions.items()
        ],
    }


def _by_disagreement(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those on which the policies differ first: an even split says more than one dissenter."""

    def spread(sample: Mapping[str, Any]) -> float:
        completions = list(sample.get("completions", {}).values())
        values = [one.get("correct", one.get("reward")) for one in completions]
        known = [float(value) for value in values if isinstance(value, int | float)]
        return float(np.std(known)) if known else 0.0

    return sorted(samples, key=spread, reverse=True)


def completions_view(folder: Path) -> dict[str, Any]:
    """The best and the worst completion of a few steps, first and last among them."""
    tables = read_completions(folder)
    steps = sorted(tables)
    places = np.linspace(0, len(steps) - 1, min(_MOST_TABLES, len(steps)))
    chosen = sorted({steps[round(place)] for place in places})
    rows = [(step, row) for step in chosen for row in _ends_of(tables[step])]
    names = column_names([row for _, row in rows])
    columns = [name for name in names if name in NUMBERS or name.startswith("reward/")]
    return {
        "completions": [
            {
                "step": step,
                "prompt": _shorten(row.get("prompt", "")),
                "completion": _shorten(row.get("completion", "")),
                "tokens": _tokens(row),
                "numbers": [_number(row.get(name)) or "-" for name in columns],
            }
            for step, row in rows
        ],
        "completion_columns": columns,
        "completions_folder": COMPLETIONS,
    }


def _ends_of(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    scored = sorted((row for row in rows if row.get("reward") is not None), key=lambda row: row["reward"])
    return [scored[-1], scored[0]] if len(scored) > 1 else list(rows[:1])


def _tokens(row: Mapping[str, Any]) -> str | None:
    """JSON of [text, advantage, KL, log-prob] of each token, for the script of the page; None without them.

    A token without a text, which a later one completes, is left out.
    """
    texts = row.get(f"{TOKEN}text")
    if not texts or sum(map(len, texts)) > _MOST_TEXT:
        return None
    texts = [*texts[:-1], texts[-1] or _END]
    missing = [None] * len(texts)
    columns = [row.get(f"{TOKEN}{name}") or missing for name in TOKEN_NUMBERS]
    found = [(text, *map(_rounded, values)) for text, *values in zip(texts, *columns, strict=True) if text]
    return json.dumps(found, separators=(",", ":"))


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _number(value: Any) -> str | None:
    return format_number(value) if is_finite_number(value) else None


def _shorten(text: Any) -> str:
    text = str(text)
    more = len(text) - _MOST_TEXT
    return text if more <= 0 else f"{text[:_MOST_TEXT]} … ({more} more characters)"
