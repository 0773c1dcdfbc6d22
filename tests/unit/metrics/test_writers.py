import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import METRICS_FILE, JSONLLogger, TensorBoardLogger, read_metrics


def without_time(lines):
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def read_events(path):
    from tensorboardX.proto.event_pb2 import Event

    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        events.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return events


def write_steps(folder, steps, stage="sft", **options):
    with JSONLLogger(folder, stage=stage, **options) as writer:
        for step in steps:
            writer.log({"loss": 1 / (step + 3), "count": step}, step)


def test_floats_keep_all_their_bits(tmp_path):
    value = np.float32(0.1) * np.float32(1.0000001)
    with JSONLLogger(tmp_path, stage="sft") as writer:
        writer.log({"a": jnp.asarray(value), "b": float(np.nextafter(0.3, 1)), "c": jnp.bfloat16(0.3)}, 1)
    (line,) = read_metrics(tmp_path)
    assert np.float32(line["a"]).tobytes() == value.tobytes()
    assert line["b"] == np.nextafter(0.3, 1)
    assert line["c"] == float(jnp.bfloat16(0.3))


def test_every_line_is_strict_json_whatever_the_values(tmp_path):
    with JSONLLogger(tmp_path, stage="sft") as writer:
        writer.log({"nan": jnp.nan, "inf": -jnp.inf, "count": jnp.int32(3), "done": True}, 1)

    def refuse(name):
        raise AssertionError(name)

    line = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=refuse)
    assert repr([line["nan"], line["inf"], line["count"], line["done"]]) == "[None, None, 3, True]"
    assert list(line) == ["stage", "step", "time", "nan", "inf", "count", "done"]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    with JSONLLogger(tmp_path, stage="sft") as writer:
        writer.log({"loss": 0.5}, 1)
        assert read_metrics(tmp_path)[0]["loss"] == 0.5


def test_resumed_file_equals_an_unbroken_one(tmp_path):
    for folder in ("unbroken", "killed"):
        write_steps(tmp_path / folder, range(1, 4), stage="sft")
    write_steps(tmp_path / "unbroken", range(1, 8), stage="ppo", resume_step=-1)

    write_steps(tmp_path / "killed", range(1, 6), stage="ppo", resume_step=-1)
    with open(tmp_path / "killed" / METRICS_FILE, "ab") as file:
        file.write(b'{"stage": "ppo", "step": 6, "ti')
    write_steps(tmp_path / "killed", range(4, 8), stage="ppo", resume_step=3)

    killed, unbroken = read_metrics(tmp_path / "killed"), read_metrics(tmp_path / "unbroken")
    assert without_time(killed) == without_time(unbroken)
    assert [line["step"] for line in killed] == [1, 2, 3, 1, 2, 3, 4, 5, 6, 7]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [METRICS_FILE]


def test_without_resume_step_whole_lines_stay_and_the_torn_one_goes(tmp_path):
    write_steps(tmp_path, [1, 2], stage="sft")
    before = (tmp_path / METRICS_FILE).read_bytes()
    # Whole JSON, but without its newline: the kill came before the last byte.
    (tmp_path / METRICS_FILE).write_bytes(before + b'{"stage": "sft", "step": 3}')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], stage="sft")
    assert (tmp_path / METRICS_FILE).read_bytes().startswith(before)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_damaged_line_is_named_and_left_alone(tmp_path):
    write_steps(tmp_path, [1, 2])
    damaged = (tmp_path / METRICS_FILE).read_bytes().replace(b'"count": 1', b'"count": 1,,')
    (tmp_path / METRICS_FILE).write_bytes(damaged)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a JSON object"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        JSONLLogger(tmp_path, stage="sft", resume_step=1)
    assert (tmp_path / METRICS_FILE).read_bytes() == damaged


@pytest.mark.parametrize("step", ["2", [2], {"a": 2}, -1, 1.5, 2**53, None])
def test_a_step_that_is_no_number_of_steps_is_named(step, tmp_path):
    line = json.dumps({"stage": "sft", "step": step, "loss": 1.0})
    (tmp_path / METRICS_FILE).write_text(f'{{"stage": "sft", "step": 1, "loss": 1.0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: the step is .*, not a number of steps"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("loss", np.zeros(2), r"shape \(2,\)"), ("step", 1.0, "taken by the writer")],
)
def test_a_metric_that_cannot_be_written_is_refused(tmp_path, name, value, message):
    with JSONLLogger(tmp_path, stage="sft") as writer, pytest.raises(ValueError, match=message):
        writer.log({name: value}, 1)
    assert read_metrics(tmp_path) == []


def test_tensorboard_events_can_be_read_back(tmp_path):
    logger = TensorBoardLogger(tmp_path / "sft")
    logger.log({"loss": 0.5, "bad": float("nan")}, 1)
    logger.log({"loss": 0.25}, 2)
    logger.close()
    (path,) = (tmp_path / "sft").iterdir()
    assert ".tfevents." in path.name
    version, *events = read_events(path)
    assert version.file_version == "brain.Event:2"
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [(1, "loss", 0.5), (2, "loss", 0.25)]


def test_tensorboard_shows_a_table_among_its_texts(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_table("completions", [{"prompt": "a|b", "completion": "`x`\n# y", "reward": 0.5}, {}], 3)
    logger.close()
    (path,) = tmp_path.iterdir()
    (event,) = [event for event in read_events(path) if event.HasField("summary")]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (3, "completions/text_summary")
    assert value.metadata.plugin_data.plugin_name == "text"
    assert value.tensor.string_val[0].decode().splitlines() == [
        "| prompt | completion | reward |",
        "| --- | --- | --- |",
        "| `a\\|b` | `'x' # y` | 0.5 |",
        "|  |  |  |",
    ]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    for steps in ([1, 2, 3], [2, 3]):
        logger = TensorBoardLogger(tmp_path)
        for step in steps:
            logger.log({"loss": 1 / step}, step)
        logger.close()
    files = sorted(tmp_path.iterdir())
    starts = [[e.step for e in read_events(file) if e.HasField("session_log")] for file in files]
    assert starts == [[1], [2]]
    assert read_events(files[1])[1].session_log.status == read_events(files[1])[1].session_log.START


def test_tensorboard_writes_nothing_before_the_first_step(tmp_path):
    TensorBoardLogger(tmp_path / "sft").close()
    assert not (tmp_path / "sft").exists()


def test_a_file_where_the_folder_should_be_is_a_user_error(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        JSONLLogger(tmp_path / "run", stage="sft")


class FullDisk:
    """Takes `room` bytes in small bites, then reports that no space is left."""

    def __init__(self, room):
        self.room, self.taken = room, b""

    def write(self, data):
        bite = data[: min(7, self.room - len(self.taken))]
        if not bite:
            raise OSError(28, "No space left on device")
        self.taken += bite
        return len(bite)

    def close(self):
        pass


def test_a_full_disk_is_a_user_error_and_short_writes_are_finished(tmp_path):
    with JSONLLogger(tmp_path, stage="sft") as writer:
        writer._lines.close()
        writer._lines = disk = FullDisk(room=150)
        writer.log({"loss": 0.5}, 1)
        assert json.loads(disk.taken)["loss"] == 0.5
        disk.room = len(disk.taken) + 10
        with pytest.raises(UserError, match="No space left"):
            writer.log({"loss": 0.5}, 2)
