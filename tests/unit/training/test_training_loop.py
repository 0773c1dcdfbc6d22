"""The training loop: resuming, signals, divergence, evaluation, failing disks."""

import errno
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed import init_sharded, shardings_of
from rlhf_jax.metrics.completions import read_completions
from rlhf_jax.metrics.writers import read_metrics
from rlhf_jax.training import Interrupted, LoopConfig, loop as loop_module, run_loop

STEPS = 7


def initial_state():
    return {"weights": jnp.arange(3.0), "key": jax.random.key(5)}


def take_step(state, number):
    """Depends on the state, on its key and on the number of the step."""
    noise = jax.random.normal(jax.random.fold_in(state["key"], number), (3,))
    weights = 0.9 * state["weights"] + noise
    return {**state, "weights": weights}, {"loss": jnp.sum(weights**2), "tokens": jnp.int32(number + 1)}


def with_signals(*signals, at):
    """A step function that gets signals in the middle of step number `at`."""

    def step(state, number):
        if number == at:
            for one in signals:
                signal.raise_signal(one)  # in this thread, so that two of a kind are not taken for one
        return take_step(state, number)

    return step


def run(
    folder,
    step_fn=take_step,
    *,
    resume=False,
    eval_fn=None,
    on_step=(),
    loggers=(),
    completions_fn=None,
    **config,
):
    config = LoopConfig(**{"steps": STEPS, "quiet": True, **config})
    calls = {"eval_fn": eval_fn, "on_step": on_step, "loggers": loggers, "completions_fn": completions_fn}
    return run_loop(initial_state(), step_fn, config, stage="toy", folder=folder, resume=resume, **calls)


def without_times(folder):
    return [
        {name: value for name, value in line.items() if not name.startswith("time")}
        for line in read_metrics(folder)
    ]


def latest(folder):
    return CheckpointManager(folder / "checkpoints").latest_step()


@pytest.fixture
def usual_signals():
    """Python's own handling of Ctrl-C, which a process started in the background comes without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder, save_every=3)


def assert_is_unbroken(folder, state, unbroken):
    assert np.asarray(state["weights"]).tobytes() == np.asarray(unbroken[1]["weights"]).tobytes()
    assert without_times(folder) == without_times(unbroken[0])


def test_a_run_writes_a_line_a_step_and_its_last_checkpoint(unbroken):
    folder, state = unbroken
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert all(line["stage"] == "toy" and line["time/step_seconds"] > 0 for line in lines)
    assert all(line["time/tokens_per_second"] > 0 for line in lines)
    with CheckpointManager(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [6, 7]
        _, saved, _ = checkpoints.restore(initial_state())
    np.testing.assert_array_equal(saved["weights"], state["weights"])


@pytest.fixture
def without_nohup():
    """SIGHUP is heeded, even where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_can_be_resumed_bit_for_bit(tmp_path, capsys, unbroken, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, with_signals(number, at=3))
    assert (stopped.value.signal_number, stopped.value.step) == (number, 4)
    assert stopped.value.code == (130 if number == signal.SIGINT else 75)
    assert "Stopped after step 4, which is saved.\n" in capsys.readouterr().err
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert latest(tmp_path) == 4
    assert len(read_metrics(tmp_path)) == 4
    numbers = []

    def noted(state, number):
        numbers.append(number)
        return take_step(state, number)

    assert_is_unbroken(tmp_path, run(tmp_path, noted, resume=True), unbroken)
    assert numbers == [4, 5, 6]


def test_steps_done_after_the_checkpoint_are_done_again_with_the_same_result(tmp_path, unbroken):
    def dies(state, number):
        if number == 5:
            raise MemoryError
        return take_step(state, number)

    with pytest.raises(MemoryError):
        run(tmp_path, dies, save_every=3)
    assert latest(tmp_path) == 3
    assert len(read_metrics(tmp_path)) == 5
    assert_is_unbroken(tmp_path, run(tmp_path, resume=True), unbroken)


def test_a_second_signal_takes_its_usual_course(tmp_path, usual_signals):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, with_signals(signal.SIGINT, signal.SIGINT, at=2))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert latest(tmp_path) is None


@pytest.mark.parametrize("saved", [4, STEPS])
def test_a_signal_during_a_save_is_not_lost(tmp_path, monkeypatch, saved):
    save = CheckpointManager.save

    def interrupted(self, step, state, **options):
        if step == saved:
            os.kill(os.getpid(), signal.SIGINT)
        save(self, step, state, **options)

    monkeypatch.setattr(loop_module.CheckpointManager, "save", interrupted)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path, save_every=4)
    assert stopped.value.step == min(saved + 1, STEPS) == latest(tmp_path)


def test_another_thread_may_run_it(tmp_path):
    """Only the main thread may watch signals."""
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path, steps=2)))
    thread.start()
    thread.join()
    assert len(found) == 1
    assert latest(tmp_path) == 2


def test_a_folder_with_checkpoints_needs_resume(unbroken, tmp_path):
    folder = unbroken[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=r"step 7: give resume=True .* or choose another folder"):
        run(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    run(tmp_path, resume=True, steps=1)  # and resume needs none


def test_a_finished_run_resumes_to_its_end_without_a_step(unbroken):
    def never(state, number):
        raise AssertionError

    state = run(unbroken[0], never, resume=True)
    assert_is_unbroken(unbroken[0], state, unbroken)


def test_more_steps_go_on_from_a_finished_run(tmp_path):
    run(tmp_path, steps=3)
    state = run(tmp_path, steps=5, resume=True)
    again = run(tmp_path / "whole", steps=5)
    np.testing.assert_array_equal(state["weights"], again["weights"])


def skipping(*counts):
    def step(state, number):
        state, metrics = take_step(state, number)
        return state, {**metrics, "consecutive_skipped": jnp.int32(counts[number])}

    return step


def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(UserError, match=r"step 6: .* not finite 3 times in a row"):
        run(tmp_path, skipping(0, 1, 0, 1, 2, 3, 4), max_consecutive_skipped=3, save_every=2)
    assert latest(tmp_path) == 4
    assert len(read_metrics(tmp_path)) == 5
    run(tmp_path / "other", skipping(0, 1, 2, 0, 1, 2, 0), max_consecutive_skipped=3)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": jnp.nan, "gradient_norm": jnp.nan}, "the loss is not finite"),
        ({"loss": 1.0, "gradient_norm": jnp.inf}, "the gradients are not finite"),
        ({"loss": 1.0, "gradient_norm": 1.0}, "updates of the optimizer are not finite"),
    ],
)
def test_the_sentence_names_what_is_not_finite(tmp_path, metrics, said):
    def step(state, number):
        return state, {**metrics, "consecutive_skipped": number + 1}

    with pytest.raises(UserError, match=f"step 2: {said} 2 times in a row"):
        run(tmp_path, step, max_consecutive_skipped=2)


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    def step(state, number):
        state, metrics = take_step(state, number)
        weights = state["weights"].at[1].set(jnp.nan) if number == 4 else state["weights"]
        return {**state, "weights": weights}, metrics

    with pytest.raises(UserError, match=r"step 6: 1 parts of the state .* \(weights: 1 of its values\)"):
        run(tmp_path, step, save_every=2)
    assert latest(tmp_path) == 4


@pytest.mark.parametrize(("every", "expected"), [(3, [0, 3, 6, 7]), (0, [0, 7]), (7, [0, 7])])
def test_evaluations_come_at_the_start_at_their_steps_and_at_the_end(tmp_path, every, expected):
    seen, told = [], []

    def evaluate(state, step):
        seen.append(float(state["weights"][0]))
        told.append(step)
        return {"score": seen[-1]}

    final = run(tmp_path, eval_every=every, eval_fn=evaluate)
    lines = [line for line in read_metrics(tmp_path) if "eval/score" in line]
    assert [line["step"] for line in lines] == expected
    assert [line["eval/score"] for line in lines] == seen
    assert told == expected
    assert set(lines[0]) == {"stage", "step", "time", "eval/score"}
    assert seen[0] == float(initial_state()["weights"][0])
    assert seen[-1] == float(final["weights"][0])


def test_no_evaluation_at_the_start_where_none_is_wanted(tmp_path):
    run(tmp_path, eval_at_start=False, eval_fn=lambda state, step: {"score": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("stop", [2, 5])  # before the first checkpoint, and after it
def test_a_resumed_run_has_the_first_evaluation_once(tmp_path, stop):
    def evaluate(state, step):
        return {"score": float(state["weights"][0])}

    def dies(state, number):
        if number == stop:
            raise MemoryError
        return take_step(state, number)

    state = run(tmp_path / "whole", eval_fn=evaluate, eval_every=2, save_every=3)
    with pytest.raises(MemoryError):
        run(tmp_path / "broken", dies, eval_fn=evaluate, eval_every=2, save_every=3)
    broken = run(tmp_path / "broken", eval_fn=evaluate, eval_every=2, save_every=3, resume=True)
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "whole")
    assert np.asarray(broken["weights"]).tobytes() == np.asarray(state["weights"]).tobytes()


def test_an_evaluation_at_the_start_compiles_nothing_anew(tmp_path):
    """Where the step is jitted as the stages do it, the first state is laid out as the later ones are."""

    @jax.jit
    def measure(state):
        return {"score": jnp.sum(state["weights"])}

    state = init_sharded(initial_state)
    step = jax.jit(take_step, donate_argnums=0, out_shardings=(shardings_of(state), None))
    config = LoopConfig(steps=4, eval_every=2, quiet=True)
    run_loop(state, step, config, stage="toy", folder=tmp_path, eval_fn=lambda state, _: measure(state))
    assert (measure._cache_size(), step._cache_size()) == (1, 1)


# Callbacks and loggers -------------------------------------------------------------------------------


def test_each_step_calls_back_with_its_state_and_what_is_logged(tmp_path):
    seen, more = [], []
    state = run(
        str(tmp_path / "one"),
        on_step=lambda state, metrics, step: seen.append((float(state["weights"][0]), metrics, step)),
    )
    assert [step for *_, step in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert seen[-1][0] == float(state["weights"][0])
    lines = read_metrics(tmp_path / "one")
    assert [float(metrics["loss"]) for _, metrics, _ in seen] == [line["loss"] for line in lines]
    assert seen[0][1]["time/step_seconds"] == lines[0]["time/step_seconds"]
    run(tmp_path / "two", on_step=[lambda *_: more.append("a"), lambda *_: more.append("b")])
    assert more == ["a", "b"] * STEPS


class Kept:
    def __init__(self):
        self.lines, self.closed = [], 0

    def log(self, metrics, step):
        self.lines.append((step, metrics))

    def close(self):
        self.closed += 1


def test_loggers_get_what_the_file_gets_as_numbers_and_are_closed(tmp_path):
    kept, seen = Kept(), []
    run(tmp_path, loggers=[kept, seen.append], eval_fn=lambda state, step: {"score": jnp.float32(0.5)})
    own = ("stage", "step", "time")
    expected = [
        (line["step"], {name: value for name, value in line.items() if name not in own})
        for line in read_metrics(tmp_path)
    ]
    assert kept.lines == expected
    assert seen == [metrics for _, metrics in expected]
    assert {type(value) for _, metrics in kept.lines for value in metrics.values()} <= {float, int}
    assert kept.closed == 1


class Tables:
    """A logger that takes tables."""

    def __init__(self):
        self.found = []

    def log(self, metrics, step):
        pass

    def close(self):
        pass

    def log_table(self, name, rows, step):
        self.found.append((name, step, rows[0]["completion"]))


def test_completions_come_every_few_steps_and_at_the_end(tmp_path, capfd):
    asked = []

    def completions():
        asked.append(len(asked))
        return [{"prompt": "p", "completion": f"answer {len(asked)}", "reward": 0.5}]

    tables, options = Tables(), {"completions_fn": completions, "log_completions": 3, "quiet": False}
    run(tmp_path, loggers=[tables, lambda metrics: None], **options)
    expected = [(3, "answer 1"), (6, "answer 2"), (7, "answer 3")]
    assert tables.found == [("completions", *one) for one in expected]
    held = read_completions(tmp_path)
    assert [(step, rows[0]["completion"]) for step, rows in held.items()] == expected
    shown = capfd.readouterr().err
    assert "Completions at step 6" in shown
    assert "answer 3" in shown


def test_no_completions_where_none_are_wanted(tmp_path):
    run(tmp_path, completions_fn=lambda: pytest.fail("nobody wants them"))
    assert not (tmp_path / "completions").exists()


def test_loggers_are_closed_where_a_run_is_refused_or_dies(tmp_path, unbroken):
    kept, other = Kept(), Kept()
    with pytest.raises(UserError):
        run(unbroken[0], loggers=[kept])
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, loggers=[other], on_step=lambda *_: 1 / 0)
    assert (kept.closed, kept.lines) == (1, [])
    assert (other.closed, len(other.lines)) == (1, 1)


def test_a_save_that_fails_is_said_in_one_sentence(tmp_path, monkeypatch):
    def full_disk(path, text):
        if "step_00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_whole(path, text)

    write_whole = files.write_whole
    monkeypatch.setattr(files, "write_whole", full_disk)
    with pytest.raises(UserError, match="step 4 could not be saved"):
        run(tmp_path, save_every=2)
    assert latest(tmp_path) == 2


# Warnings --------------------------------------------------------------------------------------------


def test_trouble_is_said_once_and_kept_in_the_metrics_across_a_resume(tmp_path, capfd):
    def step(state, number):
        state, metrics = take_step(state, number)
        return state, {**metrics, "frac_reward_zero_std": jnp.float32(1.0 if 2 <= number < 9 else 0.1)}

    run(tmp_path / "whole", step, steps=16, quiet=False)
    said = capfd.readouterr().err
    assert said.count("warning: step 7: groups of equal rewards") == 1
    assert said.count("warning:") == 1
    run(tmp_path / "broken", step, steps=8)
    run(tmp_path / "broken", step, steps=16, resume=True, quiet=False)
    assert "warning:" not in capfd.readouterr().err  # the episode goes on
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "whole")
    steps = [line["step"] for line in read_metrics(tmp_path / "whole") if line.get("health/zero_std_groups")]
    assert steps == list(range(7, 14))
