"""Loggers: each tracker's own package, offline, and what it wrote read back."""

import importlib.util
import json
import math
import struct
import time

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import JSONLLogger, Logger, TensorBoardLogger, as_logger, make_loggers
from rlhf_jax.metrics.loggers import IDS_FILE

CONFIG = {"optimizer": {"name": "adamw", "rate": 0.5}, "steps": 3}
STEPS = [(0, {"eval/score": 0.25}), (1, {"loss": 0.5}), (2, {"loss": 0.125, "reward/a@b": 2.0})]


TABLE = [{"prompt": "p|q", "completion": "`a`\nb", "reward": 0.5}, {"prompt": "r", "completion": "c"}]


def log_run(name, folder, steps=STEPS, table=None, **options):
    (logger,) = make_loggers([name], folder, stage="grpo", config=CONFIG, **options)
    for step, metrics in steps:
        logger.log(metrics, step)
    if table:
        logger.log_table("completions", table, steps[-1][0])
    logger.close()
    logger.close()


def identities(folder):
    return json.loads((folder / IDS_FILE).read_text())


# Callables -------------------------------------------------------------------------------------------


def test_any_function_of_metrics_is_a_logger(capsys):
    seen, kept = [], []
    for thing in (print, seen.append, lambda metrics, step: kept.append((step, metrics))):
        logger = as_logger(thing)
        assert isinstance(logger, Logger)
        logger.log({"loss": 0.5}, 3)
        logger.close()
    assert capsys.readouterr().out == "{'loss': 0.5} 3\n"
    assert (seen, kept) == ([{"loss": 0.5}], [(3, {"loss": 0.5})])


def test_an_optional_second_argument_gets_the_step():
    seen = []

    def like_wandb(data, step=None, commit=None):
        seen.append((data, step, commit))

    as_logger(like_wandb).log({"loss": 0.5}, 3)
    assert seen == [({"loss": 0.5}, 3, None)]


def test_a_function_gets_a_dict_of_its_own():
    def spoils(metrics):
        metrics.clear()

    metrics = {"loss": 0.5}
    as_logger(spoils).log(metrics, 1)
    assert metrics == {"loss": 0.5}


def test_a_logger_stays_itself(tmp_path):
    for logger in (TensorBoardLogger(tmp_path), JSONLLogger(tmp_path, stage="sft")):
        assert as_logger(logger) is logger
        logger.close()


@pytest.mark.parametrize("thing", ["wandb", 3, JSONLLogger])
def test_what_is_no_logger_is_said(thing):
    with pytest.raises(UserError, match="is no logger: give an object with log"):
        as_logger(thing)


def test_a_name_that_is_none_and_a_package_that_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no logger 'wand': choose from tensorboard, wandb, trackio, mlflow"):
        make_loggers(["wand"], tmp_path, stage="sft")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[wandb\]'"):
        make_loggers(["wandb"], tmp_path, stage="sft")


def test_what_is_never_logged_leaves_nothing(tmp_path):
    for logger in make_loggers(["tensorboard", "wandb", "trackio", "mlflow"], tmp_path, stage="sft"):
        logger.close()
    assert list(tmp_path.iterdir()) == []


def test_damaged_ids_are_named(tmp_path):
    (tmp_path / IDS_FILE).write_text('{"wandb/grpo": 3}')
    with pytest.raises(UserError, match=r"trackers\.json: no JSON object of strings"):
        log_run("wandb", tmp_path, resume=True)


# Trackers --------------------------------------------------------------------------------------------


def records_of(path):
    """The records of a .wandb file: a log in blocks of 32 KiB, whose pieces say whether more follow."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a head: the rest of the block is empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last piece
            yield whole
            whole = b""


def read_wandb(folder):
    """(name, config, step -> metrics) of each run file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        config, steps = {}, {}
        for record in map(Record.FromString, records_of(path)):
            if record.WhichOneof("record_type") == "run":
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
                }
                step = values.pop("_step", record.history.step.num)
                steps[step] = {name: v for name, v in values.items() if not name.startswith("_")}
        found.append((path.stem, config, steps))
    return found


@pytest.mark.slow
def test_wandb_keeps_each_step_and_the_config_and_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_run("wandb", tmp_path, table=TABLE)
    log_run("wandb", tmp_path, [(2, {"loss": 0.125}), (3, {"loss": 0.0})], resume=True)
    until = time.monotonic() + 20  # its own process may still be writing
    while not read_wandb(tmp_path)[1][2] and time.monotonic() < until:
        time.sleep(0.1)
    (first, config, steps), (second, _, more) = read_wandb(tmp_path)
    assert first == second == f"run-{identities(tmp_path)['wandb/grpo']}"
    assert config["optimizer"] == CONFIG["optimizer"]
    for name in [name for name in steps[2] if name.startswith("completions")]:
        del steps[2][name]  # of the table, whose rows are in a file
    assert steps == dict(STEPS)
    (path,) = (tmp_path / "wandb").rglob("completions_*.table.json")
    assert json.loads(path.read_text())["data"] == [["p|q", "`a`\nb", 0.5], ["r", "c", None]]
    assert more == {2: {"loss": 0.125}, 3: {"loss": 0.0}}
    log_run("wandb", tmp_path, [(0, {"loss": 1.0})])
    assert first != f"run-{identities(tmp_path)['wandb/grpo']}"


def test_trackio_keeps_each_step_and_the_config_and_goes_on_with_its_run(tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    log_run("trackio", tmp_path, table=TABLE)
    log_run("trackio", tmp_path, [(3, {"loss": 0.0})], resume=True)
    (run,) = trackio.Api().runs("mine")
    assert run.name == identities(tmp_path)["trackio/grpo"]
    assert run.config["optimizer"] == CONFIG["optimizer"]
    lines = sqlite_storage.SQLiteStorage.get_logs("mine", run.name)
    names = {"loss", "eval/score", "reward/a@b"}
    found = [(line["step"], {name: line[name] for name in names & line.keys()}) for line in lines]
    assert [one for one in found if one[1]] == [*STEPS, (3, {"loss": 0.0})]
    (table,) = [line["completions"]["_value"] for line in lines if "completions" in line]
    assert [row["prompt"] for row in table] == ["p|q", "r"]
    assert capsys.readouterr().out == ""
    log_run("trackio", tmp_path, [(0, {"loss": 1.0})])
    assert len(list(trackio.Api().runs("mine"))) == 2


def test_mlflow_keeps_each_step_and_the_config_and_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    log_run("mlflow", tmp_path, table=TABLE)
    log_run("mlflow", tmp_path, [(3, {"loss": math.nan})], resume=True)
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    identity = identities(tmp_path)["mlflow/grpo"]
    experiment = client.get_experiment_by_name("rlhf_jax")
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [identity]
    run = client.get_run(identity)
    assert run.data.params == {"optimizer.name": "adamw", "optimizer.rate": "0.5", "steps": "3"}
    assert run.info.status == "FINISHED"
    found = {
        name: [(point.step, point.value) for point in client.get_metric_history(identity, name)]
        for name in ("eval/score", "loss", "reward/a_b")
    }
    assert found["eval/score"] == [(0, 0.25)]
    assert found["loss"][:2] == [(1, 0.5), (2, 0.125)]
    assert math.isnan(found["loss"][2][1])
    assert found["reward/a_b"] == [(2, 2.0)]
    (artifact,) = (tmp_path / "mlflow").rglob("completions/00000002.json")
    assert json.loads(artifact.read_text()) == TABLE
