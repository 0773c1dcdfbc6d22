"""Checkpoints and whole run folders in an object store: a real S3 server, in a process of its own."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.checkpoint import CheckpointManager, drafts
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import read_rows
from rlhf_jax.metrics import make_loggers, read_metrics, write_report
from rlhf_jax.tasks import arithmetic
from rlhf_jax.training import LoopConfig, run_loop
from rlhf_jax.training.run_folder import describe_run, load_policy, read_held_run, write_model_files

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bucket():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            _wait_for(server, port)
            import s3fs

            s3fs.S3FileSystem().mkdir("bucket")
            yield "s3://bucket"
        finally:
            server.kill()
            server.wait()


def _wait_for(server, port):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert server.poll() is None, "the server did not start"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def make_state(step):
    weights = np.random.default_rng(step).normal(size=(200, 300)).astype(np.float32)
    return {"w": jnp.asarray(weights), "host": np.arange(5) * step, "key": jax.random.key(step)}


def assert_is_state(state, step):
    expected = make_state(step)
    assert np.asarray(state["w"]).tobytes() == np.asarray(expected["w"]).tobytes()
    assert state["host"].tobytes() == expected["host"].tobytes()
    assert jnp.array_equal(jax.random.key_data(state["key"]), jax.random.key_data(expected["key"]))


def names(folder):
    return {path.name for path in files.list_folder(files.as_path(folder))}


def test_what_is_saved_comes_back_and_old_steps_go(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = f"{bucket}/round-trip"
    with CheckpointManager(folder, max_to_keep=2) as saver:
        for step in (1, 2, 3):
            saver.save(step, make_state(step), extra={"step": step})
        saver.save(3, make_state(4), extra={"step": 4})
        saver.wait()
        assert saver.steps() == [2, 3]
        step, state, extra = saver.restore(make_state(0))
    assert (step, extra) == (3, {"step": 4})
    assert_is_state(state, 4)
    assert names(folder) == {"step_00000002", "step_00000003"}
    assert names(f"{folder}/step_00000003") == {"manifest.json", "arrays_2"}
    with CheckpointManager(folder) as saver, pytest.raises(UserError, match="holds the newer step 3"):
        saver.save(1, make_state(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["flip", "truncate", "remove", "manifest", "extra"])
def test_damage_is_found_and_the_older_step_is_taken(bucket, kind):
    folder = files.as_path(f"{bucket}/damage-{kind}")
    with CheckpointManager(folder) as saver:
        saver.save(1, make_state(1), wait=True)
        saver.save(2, make_state(2), wait=True)
    step_folder = folder / "step_00000002"
    damaged = files.list_files(step_folder)[random.Random(kind).randrange(3)]
    path = step_folder / ("manifest.json" if kind == "manifest" else damaged)
    content = bytearray(files.read_bytes(path))
    content[len(content) // 2] ^= 1
    if kind == "truncate":
        content = content[:-1]
    if kind == "remove":
        files.remove_file(path)
    elif kind == "extra":
        path = path.with_name(path.name + "x")
        files.write_whole(path, b"x")
    else:
        files.write_whole(path, bytes(content))
    warnings = []
    with CheckpointManager(folder, warn=warnings.append) as saver:
        step, state, _ = saver.restore(make_state(0))
    if kind == "extra":  # what a step does not name is not brought from the store at all
        assert (step, warnings) == (2, [])
    else:
        assert step == 1
        assert len(warnings) == 1
        assert path.name in warnings[0]
    assert_is_state(state, step)


def test_a_store_that_is_gone_fails_the_save_in_a_sentence(bucket, monkeypatch):
    folder = f"{bucket}/gone"
    with CheckpointManager(folder) as saver:
        saver.save(1, make_state(1), wait=True)

        def gone(*_):
            raise OSError(5, "no answer")

        with monkeypatch.context() as patch:
            patch.setattr(drafts.files, "upload", gone)
            with pytest.raises(UserError, match=r"step 2 could not be saved.*no answer"):
                saver.save(2, make_state(2), wait=True)
        assert saver.steps() == [1]
        assert names(folder) == {"step_00000001"}
        saver.save(3, make_state(3), wait=True)
        assert saver.steps() == [1, 3]
    nowhere = CheckpointManager("s3://no-such-bucket/x")
    with pytest.raises(UserError, match="step 1 could not be saved in `s3://no-such-bucket/x`"):
        nowhere.save(1, make_state(1), wait=True)


KILLED = """
import os, signal, sys
import jax, numpy as np
import s3fs
from rlhf_jax.checkpoint import CheckpointManager

folder, left = sys.argv[1], int(sys.argv[2])

def make_state(step):
    weights = np.random.default_rng(step).normal(size=(200, 300)).astype(np.float32)
    return {"w": jax.numpy.asarray(weights), "host": np.arange(5) * step, "key": jax.random.key(step)}

def counted(call):
    async def counts(self, *args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return await call(self, *args, **kwargs)
    return counts

for name in ("_put_file", "_pipe_file", "_rm_file", "_bulk_delete"):
    setattr(s3fs.S3FileSystem, name, counted(getattr(s3fs.S3FileSystem, name)))
with CheckpointManager(folder, max_to_keep=1) as saver:
    start = saver.latest_step() or 0
    for step in range(start + 1, start + 20):
        for _ in range(2):  # the second replaces the first
            saver.save(step, make_state(step), wait=True)
        print("whole", step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_step(bucket):
    folder, whole, generator = f"{bucket}/killed", 0, random.Random(0)
    for left in [generator.randint(1, 160) for _ in range(4)]:
        command = [sys.executable, "-c", KILLED, folder, str(left)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert process.returncode == -signal.SIGKILL, process.stderr
        whole = max([whole, *(int(line.split()[1]) for line in process.stdout.splitlines())])
        warnings = []
        reader = CheckpointManager(folder, warn=warnings.append)
        if whole:
            step, state, _ = reader.restore(make_state(0))
            assert step >= whole
            assert_is_state(state, step)
        assert warnings == []
    assert whole > 0
    with CheckpointManager(folder, max_to_keep=1) as saver:
        saver.save(whole + 5, make_state(1), wait=True)
    assert names(folder) == {f"step_{whole + 5:08d}"}


def take_step(state, step):
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (4,))
    return {"x": state["x"] * 0.9 + noise}, {"loss": jnp.sum(state["x"]), "tokens": 4}


def test_a_run_goes_on_as_if_it_had_not_been_stopped(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(folder, step_fn=take_step, **options):
        config = LoopConfig(8, save_every=3, quiet=True)
        start = {"x": jnp.zeros(4)}
        place = files.as_path(folder)
        loggers = make_loggers(("tensorboard",), place, stage="toy", resume=options.get("resume", False))
        return run_loop(start, step_fn, config, stage="toy", folder=place, loggers=loggers, **options)

    def stopped(state, step):
        if step == 5:
            raise ZeroDivisionError
        return take_step(state, step)

    with pytest.raises(ZeroDivisionError):
        run(f"{bucket}/loop", stopped)
    with pytest.raises(UserError, match="already holds a run at step 3"):
        run(f"{bucket}/loop")
    resumed, unbroken = run(f"{bucket}/loop", resume=True), run(tmp_path / "local")
    assert np.asarray(resumed["x"]).tobytes() == np.asarray(unbroken["x"]).tobytes()
    remote, local = (read_metrics(folder) for folder in (f"{bucket}/loop", tmp_path / "local"))
    assert [(line["step"], line["loss"]) for line in remote] == [(x["step"], x["loss"]) for x in local]
    assert any("tfevents" in name for name in files.list_files(files.as_path(f"{bucket}/loop/tensorboard")))
    assert str(write_report(f"{bucket}/loop")) == f"{bucket}/loop/report.html"
    assert b"toy" in files.read_bytes(f"{bucket}/loop/report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["local"]


def test_a_run_folder_gives_its_policy_back(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, tokenizer = files.as_path(f"{bucket}/policy"), arithmetic.arithmetic_tokenizer()
    config = models.dense_config(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1
    )
    params = models.init_params(config, jax.random.key(0))
    write_model_files(folder, models.make_policy(config, params, tokenizer), "policy")
    describe_run(folder, {"seed": 3}, stage="sft")
    with CheckpointManager(folder / "checkpoints") as saver:
        saver.save(1, {"learner": {"params": params}}, wait=True)
    model = load_policy(folder)
    assert model.tokenizer.backend.to_str() == tokenizer.backend.to_str()
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert read_held_run(folder, "sft", resume=True) == {"seed": 3}
    with pytest.raises(UserError, match="already holds a run at step 1"):
        read_held_run(folder, "sft", resume=False)
    assert list(tmp_path.iterdir()) == []


def test_data_is_read_from_the_store(bucket):
    files.write_whole(f"{bucket}/data/rows.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')
    rows = read_rows(f"{bucket}/data/rows.jsonl")
    assert [(row.fields["prompt"], row.where) for row in rows] == [
        ("a", f"{bucket}/data/rows.jsonl:1"),
        ("b", f"{bucket}/data/rows.jsonl:2"),
    ]
    with pytest.raises(UserError, match=r"no such file; did you mean s3://bucket/data/rows.jsonl\?"):
        read_rows(f"{bucket}/data/row.jsonl")


PROCESSES = """
import sys, jax
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=120)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rlhf_jax.checkpoint import CheckpointManager

mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
weights = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)

def make_state(step):
    value, sharding = weights * step, NamedSharding(mesh, P("a"))
    shards = jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])
    return {"w": shards, "n": np.arange(3) * step}

with CheckpointManager(folder) as manager:
    for step in (1, 2):
        manager.save(step, make_state(step))
    step, restored, _ = manager.restore(make_state(0))
assert step == 2
for shard in restored["w"].addressable_shards:
    assert (np.asarray(shard.data) == 2 * weights[shard.index]).all()
print("process", index, "restored", step)
"""


def test_two_processes_without_a_common_disk(bucket, tmp_path):
    """Each writes its shards on its own disk; the store is where they come together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in (0, 1):
        own = tmp_path / str(index)
        own.mkdir()
        command = [sys.executable, "-c", PROCESSES, str(index), str(port), f"{bucket}/two"]
        environment = os.environ | {"TMPDIR": str(own)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, output in enumerate(outputs):
        assert f"process {index} restored 2" in output, output
        assert list((tmp_path / str(index)).glob("rlhf_jax*")) == []
    like = {"w": jnp.zeros((16, 24)), "n": np.zeros(3, int)}
    _, restored, _ = CheckpointManager(f"{bucket}/two").restore(like)
    assert np.array_equal(restored["w"], 2 * np.arange(16 * 24, dtype=np.float32).reshape(16, 24))
