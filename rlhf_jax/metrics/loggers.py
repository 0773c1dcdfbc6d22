"""Experiment trackers: where the metrics of a run go besides `metrics.jsonl`.

A logger has two methods, `log` and `close`. Any callable can stand for one (`print`, `wandb.log`, a list's
`append`). The trackers below open at the first step that is logged, so that a run that is refused leaves
nothing behind, and import their package then.

Steps that a resumed run does again are logged again: their numbers are the same to the bit, and a point that
a killed process had not sent yet is not lost.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rlhf_jax.core import files
from rlhf_jax.core.arguments import check_call
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.completions import column_names
from rlhf_jax.metrics.tensorboard import TensorBoardLogger

PROJECT = "rlhf_jax"
"""The project (MLflow: experiment) where the tracker's own environment variable names no other."""

IDS_FILE = "trackers.json"
"""In the run folder: the trackers' ids of its runs, by which a resumed run goes on with them."""


@runtime_checkable
class Logger(Protocol):
    """Destination of metrics.

    A logger serves one run: the training loop closes it at the end. One that has a method
    `log_table(name, rows, step)` is given the tables of completions, too.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the metrics of one step; they may be NaN or infinite."""
        ...

    def close(self) -> None:
        """Hands over what is still buffered."""
        ...


@dataclasses.dataclass(frozen=True)
class CallableLogger:
    """Logger that calls `function(metrics, step)`, or `function(metrics)` where it takes one argument."""

    function: Callable[..., Any]
    takes_step: bool

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Calls the function with a dict of its own."""
        self.function(dict(metrics), *([step] if self.takes_step else []))

    def close(self) -> None:
        """Nothing is buffered."""


@runtime_checkable
class TableLogger(Protocol):
    """Destination of tables, such as those of completions."""

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Takes the rows of one table at one step; rows may lack columns that others have."""
        ...


def as_logger(thing: Logger | Callable[..., Any]) -> Logger:
    """The logger itself, or one that calls `thing(metrics)` or `thing(metrics, step)`.

    Raises:
      UserError: it is neither.
    """
    if not isinstance(thing, type):
        if isinstance(thing, Logger):
            return thing
        if callable(thing):
            takes_two = _takes_two(thing)
            check_call("loggers", thing, *(("metrics", "step") if takes_two else ("metrics",)))
            return CallableLogger(thing, takes_two)
    raise UserError(
        f"loggers: {thing!r} is no logger: give an object with log(metrics, step) and close(), or a function "
        "of the metrics, such as print"
    )


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        return False
    try:
        signature.bind({}, 0)
    except TypeError:
        return False
    return True


# By name -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Description of a run for a tracker.

    Attributes:
      folder: the run folder.
      stage: such as "grpo".
      config: nested options of the run.
      resume: go on with the tracker's run of this folder and stage, where there is one.
    """

    folder: Path
    stage: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resume: bool = False

    @property
    def name(self) -> str:
        """Name of the run, for people."""
        folder = files.resolved(self.folder).name
        return folder if folder == self.stage else f"{folder} {self.stage}"

    def recall(self, tracker: str) -> str | None:
        """The id under which `tracker` knows the run that is resumed; None for a new one."""
        return _read_ids(self.folder).get(f"{tracker}/{self.stage}") if self.resume else None

    def remember(self, tracker: str, identity: str) -> None:
        """Keeps the id in the run folder."""
        ids = _read_ids(self.folder) | {f"{tracker}/{self.stage}": identity}
        files.write_json(self.folder / IDS_FILE, ids)


def _read_ids(folder: Path) -> dict[str, str]:
    path = folder / IDS_FILE
    ids = files.read_json(path, otherwise={}, remedy="remove it, and the trackers begin new runs")
    if not isinstance(ids, dict) or not all(isinstance(value, str) for value in ids.values()):
        raise UserError(f"{path}: no JSON object of strings: remove the file")
    return ids


class WandbLogger:
    """Weights & Biases logger. `WANDB_MODE=offline` works without a network.

    The project is that of `WANDB_PROJECT`, else `rlhf_jax`; files lie in the run folder.
    """

    def __init__(self, info: RunInfo) -> None:
        self._info, self._run = info, None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger`."""
        self._run = self._run or self._open()
        self._run.log(dict(metrics), step=step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `TableLogger`."""
        import wandb

        self._run = self._run or self._open()
        columns: list[Any] = column_names(rows)
        data: list[Any] = [[row.get(column) for column in columns] for row in rows]
        self._run.log({name: wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=step)

    def close(self) -> None:
        """Waits until all is handed over."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self) -> Any:
        import wandb

        info = self._info
        held = info.recall("wandb")
        identity = held or uuid.uuid4().hex[:12]
        info.remember("wandb", identity)
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=info.name,
            id=identity,
            resume="allow",
            config=None if held else dict(info.config),
            dir=str(info.folder),
        )


class TrackioLogger:
    """Trackio logger. The project is that of `TRACKIO_PROJECT`, else `rlhf_jax`."""

    def __init__(self, info: RunInfo) -> None:
        self._info, self._run = info, None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger`."""
        self._run = self._run or self._open()
        self._run.log(dict(metrics), step=step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """See `TableLogger`."""
        import pandas
        import trackio

        self._run = self._run or self._open()
        frame = pandas.DataFrame([dict(row) for row in rows], columns=column_names(rows))
        self._run.log({name: trackio.Table(dataframe=frame)}, step=step)

    def close(self) -> None:
        """Waits until all is handed over."""
        if self._run is not None:
            with _printing_to_stderr():
                self._run.finish()
            self._run = None

    def _open(self) -> Any:
        import trackio

        info = self._info
        # Trackio knows a run by its name, which must therefore be no other's.
        name = info.recall("trackio") or f"{info.name} {uuid.uuid4().hex[:6]}"
        info.remember("trackio", name)
        with _printing_to_stderr():
            return trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=name,
                config=dict(info.config),
                resume="allow",
                embed=False,
            )


class MLflowLogger:
    """MLflow logger. `MLFLOW_TRACKING_URI` says where; without it, a file store in the run folder.

    The experiment is that of `MLFLOW_EXPERIMENT_NAME`, else `rlhf_jax`. What the server does not take is
    warned of and costs no run its life.
    """

    _most_params = 100  # in one request

    def __init__(self, info: RunInfo) -> None:
        self._info, self._client, self._run_id = info, None, ""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Logger`."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(1000 * time.time())
        values = [Metric(_mlflow_name(name), float(value), now, step) for name, value in metrics.items()]
        if self._client is None:
            self._open()
        assert self._client is not None
        try:
            self._client.log_batch(self._run_id, metrics=values)
        except MlflowException as error:
            warnings.warn(f"MLflow did not take step {step}: {error}", stacklevel=2)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """A JSON artifact; see `TableLogger`."""
        from mlflow.exceptions import MlflowException

        if self._client is None:
            self._open()
        assert self._client is not None
        columns = column_names(rows)
        table = json.dumps(
            [{name: row[name] for name in columns if name in row} for row in rows], default=str
        )
        try:
            self._client.log_text(self._run_id, table, f"{name}/{step:08d}.json")
        except MlflowException as error:
            warnings.warn(f"MLflow did not take the {name} of step {step}: {error}", stacklevel=2)

    def close(self) -> None:
        """Marks the run as ended."""
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None

    def _open(self) -> None:
        from mlflow.tracking import MlflowClient

        info = self._info
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            # MLflow prefers a database, which its small package cannot open, and asks for this word instead.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (files.resolved(info.folder) / "mlflow").as_uri()
        self._client = client = MlflowClient(tracking_uri=uri)
        held = info.recall("mlflow")
        if held:
            self._run_id = held
            client.update_run(held, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        self._run_id = client.create_run(experiment_id, run_name=info.name).info.run_id
        info.remember("mlflow", self._run_id)
        self._log_params(client)

    def _log_params(self, client: Any) -> None:
        from mlflow.entities import Param

        flat = [Param(_mlflow_name(name), text[:6000]) for name, text in _flat(self._info.config)]
        for start in range(0, len(flat), self._most_params):
            client.log_batch(self._run_id, params=flat[start : start + self._most_params])


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


@contextlib.contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Standard output is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
LOGGER_NAMES = tuple(_PACKAGES)
"""What `make_loggers` knows; `metrics.jsonl` is written in any case."""


def make_loggers(
    names: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    stage: str,
    config: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> list[Logger]:
    """Loggers by name, for the command line.

    Args:
      names: of `LOGGER_NAMES`.
      folder: the run folder.
      stage: such as "grpo".
      config: the run's options, shown by the trackers.
      resume: go on with the trackers' runs of this folder, where there are any.

    Raises:
      UserError: there is no such logger, or its package is not installed.
    """
    info = RunInfo(files.as_path(folder), stage, config or {}, resume)
    return [_make_logger(name, info) for name in dict.fromkeys(names)]


def _make_logger(name: str, info: RunInfo) -> Logger:
    if name not in _PACKAGES:
        raise UserError(f"there is no logger {name!r}: choose from {', '.join(LOGGER_NAMES)}")
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        raise UserError(f"the logger {name} needs a package that is missing: pip install 'rlhf_jax[{name}]'")
    if name == "wandb" or (name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI")):
        files.as_local(info.folder, f"with --log {name}, a run folder is")
    if name == "tensorboard":
        return TensorBoardLogger(info.folder / "tensorboard" / info.stage)
    return {"wandb": WandbLogger, "trackio": TrackioLogger, "mlflow": MLflowLogger}[name](info)
