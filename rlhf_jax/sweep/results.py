"""Sweep results: every setting and every seed apart, as arrays and as one tidy table."""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import PathLike


@dataclasses.dataclass(frozen=True)
class Results:
    """Metrics of H settings x S seeds.

    Attributes:
      hypers: value of each hyperparameter in each setting, [H].
      metrics: [H, S] or, where a metric has a value for each update, [H, S, U].
    """

    hypers: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]

    @property
    def varied(self) -> list[str]:
        """Hyperparameters that are not the same in all settings."""
        return [name for name, values in self.hypers.items() if np.any(values != values[0])]

    def label(self, setting: int) -> str:
        """Label of a setting: the values that are varied, as text."""
        parts = [f"{name}={self.hypers[name][setting]:g}" for name in self.varied]
        return ", ".join(parts) or "all equal"

    def scores(self, metric: str) -> np.ndarray:
        """[H, S]: the metric of each run; the last value of one that has a value for each update.

        Raises:
          UserError: there is no such metric.
        """
        if metric not in self.metrics:
            raise UserError(f"no metric {metric!r}: choose among {', '.join(self.metrics)}")
        values = self.metrics[metric]
        return values if values.ndim == 2 else values[..., -1]

    def table(self) -> Any:
        """A `pyarrow.Table` with a row for each setting, seed and update.

        Columns are `setting`, `seed`, `update` (from 1), the hyperparameters and the metrics. A metric with
        one value a run stands in the row of the last update and is null in the others.
        """
        import pyarrow as pa

        settings, seeds = next(iter(self.metrics.values())).shape[:2]
        updates = max([values.shape[2] for values in self.metrics.values() if values.ndim == 3], default=1)
        index = np.indices((settings, seeds, updates)).reshape(3, -1)
        columns: dict[str, Any] = {"setting": index[0], "seed": index[1], "update": index[2] + 1}
        columns |= {name: values[index[0]] for name, values in self.hypers.items()}
        for name, values in self.metrics.items():
            if values.ndim == 3:
                columns[name] = values.reshape(-1)
            else:
                columns[name] = pa.array(np.repeat(values.reshape(-1), updates), mask=index[2] < updates - 1)
        return pa.table(columns)

    def write(self, path: PathLike) -> None:
        """Writes the table as Parquet; the folder is made if missing.

        Raises:
          UserError: the disk is full or read-only.
        """
        import pyarrow.parquet as pq

        table = self.table()
        with files.writing(path) as local:
            pq.write_table(table, local)
