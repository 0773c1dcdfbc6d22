"""Damage is found and named, failures belong to their step, and what was whole stays whole."""

import errno
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import stat
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoint import CheckpointManager, drafts, manager, manifest
from rlhf_jax.core.errors import UserError


def make_state(step: int) -> dict:
    key = jax.random.key(step)
    return {
        "params": {"kernel": jax.random.normal(key, (64, 64)), "bias": jnp.full((8,), step, jnp.bfloat16)},
        "key": key,
        "host": np.arange(50) * step,
    }


def assert_is_state(state: dict, step: int) -> None:
    expected = make_state(step)
    assert jnp.array_equal(jax.random.key_data(state.pop("key")), jax.random.key_data(expected.pop("key")))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, expected)
    )


def snapshot(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    with CheckpointManager(folder) as saver:
        saver.save(10, make_state(10), extra={"position": 10})
        saver.save(20, make_state(20), extra={"position": 20})
    return folder


@pytest.fixture
def damaged(two_steps, tmp_path):
    """A copy of both steps; the newest is there to be damaged."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def files_of(step_folder: Path) -> list[Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "extend":
        data += b"\0"
    elif kind == "zero":
        data = bytearray(len(data))
    path.unlink()
    if kind != "remove":
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("case", range(90))
def test_every_damage_is_found_or_harmless(damaged, case):
    rng = random.Random(case)
    files = files_of(damaged / "step_00000020")
    path = files[case % len(files)]
    damage(path, ["flip", "flip", "truncate", "extend", "zero", "remove"][case // len(files) % 6], rng)
    warnings: list[str] = []
    before = snapshot(damaged)
    step, state, extra = CheckpointManager(damaged, warn=warnings.append).restore(make_state(0))
    assert snapshot(damaged) == before
    assert_is_state(state, step)
    assert extra == {"position": step}
    if step == 10:
        assert len(warnings) == 1
        assert "step 20" in warnings[0]
        assert path.name in warnings[0]
    else:
        assert path.name == "manifest.json"  # white space is all that may change unseen


def test_without_hashes_a_flipped_bit_loads_silently(damaged, monkeypatch):
    """The control: it shows that the cases above are worth something."""
    monkeypatch.setattr(manifest, "verify", manifest.load_manifest)
    data = max(files_of(damaged / "step_00000020" / "arrays"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    step, state, _ = CheckpointManager(damaged).restore(make_state(0))
    assert step == 20
    with pytest.raises(AssertionError):
        assert_is_state(state, 20)


def test_no_whole_step_is_an_error(damaged, capsys):
    damage(files_of(damaged / "step_00000010" / "arrays")[0], "flip", random.Random(0))
    shutil.rmtree(damaged / "step_00000020" / "arrays")
    saver = CheckpointManager(damaged)
    with pytest.raises(UserError, match=r"every step in .*run` \(10, 20\) is damaged"):
        saver.restore(make_state(0))
    assert capsys.readouterr().err.count("warning: step ") == 2
    with pytest.raises(UserError, match=r"step 10 in .* is damaged \(arrays/.* has changed"):
        saver.restore(make_state(0), 10)
    with pytest.raises(UserError, match="holds no step 15: choose one of 10, 20"):
        saver.restore(make_state(0), 15)
    with pytest.raises(UserError, match="nowhere` holds no checkpoint"):
        CheckpointManager(damaged / "nowhere").restore(make_state(0))
    assert not (damaged / "nowhere").exists()


def test_a_step_under_another_name_is_not_that_step(damaged):
    (damaged / "step_00000020").rename(damaged / "step_00000030")
    step, _, _ = CheckpointManager(damaged, warn=lambda _: None).restore(make_state(0))
    assert step == 10
    assert CheckpointManager(damaged).steps() == [10]


KERNEL, BIAS = jnp.zeros((64, 64)), jnp.zeros(8, jnp.bfloat16)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"kernel": jnp.zeros((64, 32)), "bias": BIAS},
            r"leaf `params/kernel` is float32\[64, 64\] in the checkpoint but float32\[64, 32\] in this run",
        ),
        (
            {"kernel": KERNEL, "bias": jnp.zeros(8)},
            r"leaf `params/bias` is bfloat16\[8\] in the checkpoint but float32\[8\] in this run",
        ),
        ({"kernel": KERNEL}, r"`params/bias` \(bfloat16\[8\]\) is only in the checkpoint"),
        (
            {"kernel": KERNEL, "bias": BIAS, "gate": BIAS},
            r"`params/gate` \(bfloat16\[8\]\) is not in the checkpoint",
        ),
        ({"gate": BIAS}, r"`params/gate` .*\(and 2 more\)"),
    ],
)
def test_another_architecture_is_named(two_steps, params, message):
    with pytest.raises(UserError, match=message) as error:
        CheckpointManager(two_steps).restore(make_state(0) | {"params": params})
    assert "step 20 in" in str(error.value)
    assert "\n" not in str(error.value)


def test_old_steps_are_pruned_after_the_new_one_is_whole(tmp_path):
    with CheckpointManager(tmp_path, max_to_keep=2) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, make_state(step), wait=True)
            assert saver.steps() == [s for s in (step - 1, step) if s > 0]
            assert saver.latest_step() == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]
    with pytest.raises(UserError, match="max_to_keep=0"):
        CheckpointManager(tmp_path, max_to_keep=0)


def test_pruning_spares_the_step_just_saved_below_damaged_ones(damaged):
    damage(damaged / "step_00000020" / "manifest.json", "truncate", random.Random(0))
    with CheckpointManager(damaged, max_to_keep=1, warn=lambda _: None) as saver:
        step, state, _ = saver.restore(make_state(0))
        saver.save(15, state, wait=True)
        assert (step, saver.steps()) == (10, [15])
        saver.save(20, make_state(20), wait=True)  # takes the place of the damaged one
        assert saver.steps() == [20]
    assert_is_state(CheckpointManager(damaged).restore(make_state(0))[1], 20)


def test_a_step_below_a_newer_whole_one_is_refused(two_steps):
    before = snapshot(two_steps)
    with (
        CheckpointManager(two_steps) as saver,
        pytest.raises(UserError, match="holds the newer step 20: resume from"),
    ):
        saver.save(11, make_state(11))
    assert snapshot(two_steps) == before


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(damaged):
    """The older copy stands aside as `.replaced` until the newer one has its name."""
    shutil.rmtree(damaged / "step_00000010")
    (damaged / "step_00000020").rename(damaged / "step_00000020.replaced")
    with CheckpointManager(damaged) as saver:
        step, state, _ = saver.restore(make_state(0))
        assert_is_state(state, step)
        saver.save(20, make_state(21), wait=True)
        assert_is_state(saver.restore(make_state(0))[1], 21)
    assert [path.name for path in damaged.iterdir()] == ["step_00000020"]


def test_steps_of_earlier_versions_are_read(damaged):
    """Their manifests name no folder for the arrays; what their killed saves left goes with the next save."""
    path = damaged / "step_00000020" / "manifest.json"
    body = json.loads(path.read_text())
    assert body.pop("digest")
    assert body.pop("arrays") == "arrays"
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"digest": digest, **body}))
    shutil.copytree(damaged / "step_00000010", damaged / ".saving_00000030")
    with CheckpointManager(damaged) as saver:
        step, state, extra = saver.restore(make_state(0))
        assert (step, extra) == (20, {"position": 20})
        assert_is_state(state, 20)
        saver.save(30, make_state(30), wait=True)
    assert sorted(path.name for path in damaged.iterdir()) == [f"step_{n:08d}" for n in (10, 20, 30)]


def test_a_step_that_was_never_finished_is_no_checkpoint_and_goes_with_the_next_save(damaged):
    """As a kill leaves it: the mark and the arrays are there, the manifest is not."""
    torn = damaged / "step_00000020"
    (torn / "manifest.json").unlink()
    (torn / "unfinished").write_text("")
    warnings: list[str] = []
    with CheckpointManager(damaged, warn=warnings.append) as saver:
        step, state, _ = saver.restore(make_state(0))
        assert_is_state(state, step)
        assert (step, saver.steps(), warnings) == (10, [10], [])
        saver.save(15, make_state(15), wait=True)
    assert sorted(path.name for path in damaged.iterdir()) == ["step_00000010", "step_00000015"]


def test_a_step_saved_again_is_whole_at_every_moment(damaged, monkeypatch):
    """The older copy counts until the manifest of the newer one replaces its own."""
    seen = []
    seal = drafts.seal

    def looked_at(*args):
        seen.append(CheckpointManager(damaged).restore(make_state(0)))
        seal(*args)

    monkeypatch.setattr(drafts, "seal", looked_at)
    with CheckpointManager(damaged) as saver:
        saver.save(20, make_state(21), wait=True)
        step, state, _ = saver.restore(make_state(0))
    assert (seen[0][0], step) == (20, 20)
    assert_is_state(seen[0][1], 20)
    assert_is_state(state, 21)
    assert {path.name for path in (damaged / "step_00000020").iterdir()} == {"manifest.json", "arrays_2"}


def test_a_failure_after_the_manifest_is_written_takes_nothing_from_the_step(damaged, monkeypatch):
    """As where the answer of a store is lost on its way: what the manifest names must stay."""
    seal = drafts.seal

    def no_answer(*args):
        seal(*args)
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(drafts, "seal", no_answer)
    with CheckpointManager(damaged) as saver:
        fail_to_save(saver, 20, make_state(21), "Connection timed out")
        step, state, _ = saver.restore(make_state(0))
    assert step == 20
    assert_is_state(state, 21)


def test_a_file_that_no_manifest_names_is_damage(damaged):
    (damaged / "step_00000020" / "arrays" / "checkpoint").write_bytes(b"\xff")
    warnings: list[str] = []
    step, state, _ = CheckpointManager(damaged, warn=warnings.append).restore(make_state(0))
    assert step == 10
    assert_is_state(state, 10)
    assert "arrays/checkpoint is not of this step" in warnings[0]


def fail_to_save(saver: CheckpointManager, step: int, state: dict, reason: str) -> None:
    with pytest.raises(UserError, match=rf"step {step} could not be saved in `.*: {reason}; make") as error:
        saver.save(step, state, wait=True)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_grow_fails_its_step_and_no_other(damaged, capfd):
    """A limit on file size stops the array writer as a full disk does."""
    before = snapshot(damaged)
    big = {"w": np.random.default_rng(0).normal(size=(300, 300))}
    saver = CheckpointManager(damaged, max_to_keep=9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        saver.save(30, big)
        with pytest.raises(UserError, match=r"step 30 could not be saved.*: File too large"):
            saver.save(40, make_state(40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saver.steps() == [10, 20]
    assert {k: v[1] for k, v in snapshot(damaged).items()} == {k: v[1] for k, v in before.items()}
    saver.save(50, make_state(50), wait=True)
    assert saver.steps() == [10, 20, 50]
    assert_is_state(saver.restore(make_state(0))[1], 50)
    saver.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("module", "name"), [(drafts, "seal"), (manager, "commit"), (os, "fsync"), (Path, "mkdir")]
)
def test_a_full_disk_at_any_stage_fails_that_step_alone(damaged, monkeypatch, module, name):
    before = {k: v[1] for k, v in snapshot(damaged).items()}

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CheckpointManager(damaged) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, disk_full)
            fail_to_save(saver, 30, make_state(30), "No space left on device")
        assert {k: v[1] for k, v in snapshot(damaged).items()} == before
        saver.save(40, make_state(40), wait=True)
        assert saver.latest_step() == 40


def test_a_folder_that_cannot_be_made_or_written(tmp_path):
    (tmp_path / "file").write_text("here is a file already")
    with CheckpointManager(tmp_path / "file") as saver:
        fail_to_save(saver, 1, make_state(1), "File exists")
    with CheckpointManager(tmp_path / "file" / "below") as saver:
        fail_to_save(saver, 1, make_state(1), "Not a directory")
    with CheckpointManager("/proc/self/checkpoints") as saver:
        fail_to_save(saver, 1, make_state(1), "No such file or directory")
    assert (tmp_path / "file").read_text() == "here is a file already"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_a_read_only_folder(damaged):
    damaged.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with CheckpointManager(damaged) as saver:
            fail_to_save(saver, 30, make_state(30), "Permission denied")
            assert saver.steps() == [10, 20]
        damaged.chmod(0)
        with pytest.raises(UserError, match=r"cannot be read .Permission denied.: mend its permissions"):
            saver.steps()
    finally:
        damaged.chmod(stat.S_IRWXU)


def test_an_old_step_that_cannot_be_removed_is_only_a_warning(damaged, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    warnings: list[str] = []
    with CheckpointManager(damaged, max_to_keep=1, warn=warnings.append) as saver:
        monkeypatch.setattr(shutil, "rmtree", refuse)
        saver.save(30, make_state(30), wait=True)
        assert saver.steps() == [30]
    assert len(warnings) == 2
    assert "old step 10" in warnings[0]
    assert "busy" in warnings[0]


def test_a_failure_that_no_disk_caused_is_no_user_error(damaged):
    state = make_state(30)
    with CheckpointManager(damaged) as saver:
        state["params"]["kernel"].delete()
        with pytest.raises(RuntimeError, match=r"step 30 could not be saved .* deleted"):
            saver.save(30, state)
        saver.save(40, make_state(40), wait=True)
        assert saver.steps() == [10, 20, 40]


def test_a_failed_save_does_not_hide_what_broke_the_loop(damaged, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def loop():
        with CheckpointManager(damaged, warn=warnings.append) as saver:
            saver.save(30, make_state(30))
            raise ZeroDivisionError

    warnings: list[str] = []
    monkeypatch.setattr(drafts, "seal", disk_full)
    with pytest.raises(ZeroDivisionError):
        loop()
    assert len(warnings) == 1
    assert "step 30 could not be saved" in warnings[0]


def test_what_orbax_logs_of_an_error_that_is_raised_anyway_is_not_news():
    def record(filename):
        try:
            exec(compile("raise OSError(28, 'No space left on device')", filename, "exec"))
        except OSError:
            return logging.LogRecord("absl", logging.ERROR, "x.py", 1, "failed", (), sys.exc_info())

    assert manager._is_not_raised_here(record("/lib/mine.py"))
    assert not manager._is_not_raised_here(record("/lib/orbax/checkpoint/futures.py"))
    assert manager._is_not_raised_here(logging.LogRecord("absl", logging.INFO, "x.py", 1, "m", (), None))
