"""Points of scaling laws: parameters, tokens and loss of runs, from their folders or files of metrics."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import models
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.evaluation.critical_batch import first_reached
from rlhf_jax.evaluation.scaling_laws import OPERATIONS
from rlhf_jax.metrics import read_metrics
from rlhf_jax.training.run_folder import read_architecture

_EMBEDDINGS = ("embedding", "unembedding", "position_embedding")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
      name: its folder or file, as given.
      params: trained numbers.
      steps: at which the loss is known [T].
      tokens: seen until then [T].
      losses: [T].
    """

    name: str
    params: float
    steps: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray

    @property
    def flops(self) -> float:
        """Operations of the whole run, 6 N D."""
        return OPERATIONS * self.params * float(self.tokens[-1])

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return round(float(self.tokens[-1] / self.steps[-1]))

    def steps_to(self, loss: float) -> float:
        """Steps until the loss first was so low; NaN where it never was."""
        return first_reached(self.steps.tolist(), self.losses.tolist(), loss)


def read_run(
    path: Path, *, params: float | None, embeddings: bool, loss: str, tokens: str, total: bool
) -> Measured:
    """A run's numbers.

    Args:
      path: a run folder, or a file such as its metrics.jsonl.
      params: of its model; None to count those of the folder's model.json.
      embeddings: count embedding matrices as well.
      loss: name of the metric.
      tokens: name of the metric.
      total: `tokens` counts from the beginning, not those of a step.

    Raises:
      UserError: there are no metrics, a metric is not among them or is no number, or the folder does not say
        how many parameters there are.
    """
    lines = read_metrics(path)
    if not lines:
        raise UserError(
            f"{path} has no metrics: give a folder that a run wrote with --out, or a metrics.jsonl"
        )
    known = _column(path, lines, loss, "--loss")
    seen = _column(path, lines, tokens, "--tokens")
    if not total:
        # A line may stand for several steps, of which it tells the last.
        gaps = np.diff(seen[:, 0], prepend=min(0.0, seen[0, 0] - 1))
        seen[:, 1] = np.cumsum(seen[:, 1] * gaps)
    known = known[known[:, 0] >= seen[0, 0]]  # before the first step no token is seen
    if not len(known):
        raise UserError(
            f"{path}: {loss} is only known before the first step: train longer, or give another --loss"
        )
    places = np.searchsorted(seen[:, 0], known[:, 0], side="right") - 1
    count = params if params is not None else count_params(path, embeddings=embeddings)
    return Measured(str(path), count, known[:, 0], seen[places, 1], known[:, 1])


def count_params(folder: Path, *, embeddings: bool) -> float:
    """Parameters of a run's model, without its embedding matrices where `embeddings` is False.

    Raises:
      UserError: the folder has no model.json.
    """
    if not files.is_file(files.as_path(folder) / "model.json"):
        raise UserError(f"{folder} has no model.json that says how large the model is: give --params")
    leaves = named_leaves(models.param_shapes(read_architecture(folder)))
    kept = [leaf for name, leaf in leaves.items() if embeddings or name.rpartition("/")[2] not in _EMBEDDINGS]
    return float(sum(math.prod(leaf.shape) for leaf in kept))


def _column(path: Path, lines: Sequence[dict[str, Any]], name: str, flag: str) -> np.ndarray:
    """(step, value) of the lines that have the metric [T, 2]."""
    found = [(line["step"], line[name]) for line in lines if name in line and "step" in line]
    if not found:
        names = sorted({key for line in lines for key in line} - {"stage", "step", "time"})
        shown = ", ".join(names[:12]) or "nothing"
        raise UserError(f"{path}: no line with a step has {name}: give {flag} one of {shown}")
    try:
        values = np.array(found, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{path}: {name} is not a number in every line: give another {flag}") from None
    if not np.all(np.isfinite(values)) or np.any(values[:, 1] <= 0):
        raise UserError(f"{path}: {name} is not above 0 and finite in every line: leave the run out")
    return values
