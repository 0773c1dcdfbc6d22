import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import jax.numpy as jnp
import pytest
from rich.console import Console
from tiers import few

from rlhf_jax.metrics import Progress, final_table, format_number, format_seconds
from rlhf_jax.metrics.progress import choose_shown


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def run(progress, clock, steps, seconds, metrics=None):
    for step in steps:
        clock.now += seconds
        progress.update(step, metrics or {})


def test_without_a_terminal_a_line_comes_every_few_seconds_and_at_the_end():
    console, clock = plain_console(), Clock()
    with Progress("sft", 10, console=console, clock=clock, seconds_between_lines=4.0) as progress:
        run(progress, clock, range(1, 11), 1.0, {"loss": jnp.float32(0.125)})
    lines = console.file.getvalue().splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["sft", "4/10", "40"],
        ["sft", "8/10", "80"],
        ["sft", "10/10", "100"],
    ]
    assert lines[0].endswith("1.0 steps/s  6.0 s left  loss 0.125")
    assert lines[-1].endswith("1.0 steps/s  done in 10 s  loss 0.125")


def test_the_rate_leaves_out_compilation_and_forgets_the_far_past():
    clock = Clock()
    progress = Progress("sft", 1000, quiet=True, clock=clock)
    clock.now += 60  # compilation
    run(progress, clock, range(1, 11), 5.0)
    assert progress.steps_per_second == pytest.approx(0.2)
    run(progress, clock, range(11, 400), 0.1)
    assert progress.steps_per_second == pytest.approx(10.0)


def test_the_rate_of_a_resumed_stage_counts_only_its_own_steps():
    clock = Clock()
    progress = Progress("sft", 1000, completed=900, quiet=True, clock=clock)
    run(progress, clock, [901, 902], 1.0)
    assert progress.steps_per_second == pytest.approx(1.0)


def test_slow_steps_still_have_a_rate():
    clock = Clock()
    progress = Progress("ppo", 10, quiet=True, clock=clock)
    run(progress, clock, [1, 2, 3], 120.0)
    assert progress.steps_per_second == pytest.approx(1 / 120)


def test_only_the_metrics_asked_for_are_shown():
    console, clock = plain_console(), Clock()
    progress = Progress("ppo", 1, console=console, clock=clock, shown=("kl", "missing", "reward"))
    progress.update(1, {"loss": 1.0, "reward": 0.5, "kl": 2e-5})
    assert console.file.getvalue().rstrip().endswith("kl 2.00e-05  reward 0.5")


def test_quiet_shows_nothing():
    console = plain_console()
    with Progress("sft", 1, console=console, quiet=True) as progress:
        progress.log("words")
        progress.update(1, {"loss": 1.0})
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar_and_lines_above_it():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress("sft", 2, console=console) as progress:
        progress.update(1, {"loss": 1.0})
        progress.log("exact match [held out] 41 %")
        progress.update(2, {"loss": 0.5})
    text = console.file.getvalue()
    for word in ("━", "loss 0.5", "2/2", "exact match [held out] 41 %"):
        assert word in text


def rendered(width, metrics, steps=(21,), note="", total=60):
    """The last frame of a bar in a terminal of this width, as plain text."""
    console, clock = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={}), Clock()
    progress = Progress("grpo", total, console=console, clock=clock)
    for step in steps:
        clock.now += 1.2
        progress.update(step, metrics, note=note)
    plain = Console(file=io.StringIO(), width=width, _environ={})
    plain.print(progress._bar.make_tasks_table(progress._bar.tasks))
    (line,) = plain.file.getvalue().splitlines()
    return line


RL = {"approx_kl": 1.24e-15, "clip_fraction": 0.0, "kl": 0.25, "length": 21.5, "loss": 3e-8, "reward": 0.75}
RL |= {"entropy": 0.125, "eval/score": 0.5, "eval/kl": 9.0, "time/tokens_per_second": 1000.0}


@pytest.mark.parametrize("width", [80, 120, 200])
def test_bar_and_steps_stay_at_any_width(width):
    line = rendered(width, RL, steps=(20, 21), note="rollout 61%, update 30%, MFU 0.412")
    assert len(line) <= width
    assert line.startswith("grpo")
    assert "━" in line
    assert line.index("21/60") == len("grpo".ljust(12)) + (12 if width < 100 else 28) + 2
    assert "…" not in line  # a number that is cut would be read as another
    assert "1.2 s/step" in line
    assert "reward 0.75" in line
    assert ("length 21.5" in line) == (width >= 120)
    assert ("MFU 0.412" in line) == (width >= 200)


IN_A_TERMINAL = """
import sys, time
from rlhf_jax.metrics.completions import CompletionsTable
from rlhf_jax.metrics.progress import Progress
row = {"prompt": "How many? " * 9, "completion": "Twelve. " * 9, "reward": 0.1235, "reward/format": -5e-8}
row |= {"reward/answer": 1.234e-15, "advantage": -1.234, "length": 123.0}
with Progress("grpo", 60) as progress:
    time.sleep(0.3)
    for step in (20, 21):
        time.sleep(0.3)
        progress.update(step, dict(reward=0.75, kl=0.25, length=21.5, loss=3e-8), note="rollout 61 %")
    progress.show(CompletionsTable([row], 21, 1))
    time.sleep(0.3)
"""


def frames_of(width):
    """The lines that a program shows in a terminal of this width, one for each frame."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment | {"TERM": "xterm-256color"},
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says at its end
        while part := os.read(master, 65536):
            shown += part
    os.close(master)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("width", few([80, 120, 200], 80))
def test_in_a_real_terminal_bar_steps_what_matters_and_whole_numbers_are_there(width):
    lines = frames_of(width)
    assert all(len(line) <= width for line in lines)
    frames = [line for line in lines if line.startswith("grpo")]
    (numbers,) = [line.split()[-5:] for line in lines if "-1.234" in line]
    assert numbers == ["0.1235", "-5.00e-08", "1.23e-15", "-1.234", "123"]
    assert all("━" in line for line in frames)
    assert "0/60 compiling the first step" in frames[0]
    assert "21/60" in frames[-1]
    assert "reward 0.75" in frames[-1]
    if width > 80:
        assert "kl 0.25  length 21.5" in frames[-1]


def test_the_first_step_is_said_to_compile():
    assert "0/60 compiling the first step" in rendered(80, {}, steps=())
    evaluated = rendered(80, {"eval/score": 0.5}, steps=(0,))
    assert "0/60 compiling the first step" in evaluated


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (RL, ["reward", "eval/score", "kl", "length", "entropy"]),
        ({"kl": 1, "length": 2, "reward": 3, "loss": 4}, ["reward", "kl", "length"]),
        ({"loss": 1, "win_rate": 2, "length": 3, "kl": 4, "accuracy": 5}, ["win_rate", "kl", "length"]),
        ({"accuracy": 1, "chosen_reward": 2, "loss": 3, "margin": 4}, ["loss", "accuracy", "margin"]),
        ({"reward": 1, "loss": 2, "margin": 3}, ["loss", "margin"]),
        ({"gradient_norm": 1, "loss": 2, "time/tokens_per_second": 3}, ["loss", "time/tokens_per_second"]),
        ({"a": 1, "time/step_seconds": 2, "health/x": 3, "b": 4}, ["a", "b"]),
    ],
)
def test_what_matters_to_a_stage_is_shown(metrics, shown):
    assert choose_shown(metrics) == shown


def test_the_last_evaluation_stays_in_sight():
    console, clock = plain_console(), Clock()
    progress = Progress("grpo", 3, console=console, clock=clock, seconds_between_lines=0.5)
    progress.update(0, {"eval/score": 0.25})
    run(progress, clock, [1], 1.0, {"reward": 1.0, "length": 2.0})
    run(progress, clock, [2], 1.0, {"reward": 1.0, "length": 2.0, "eval/score": 0.5})
    run(progress, clock, [3], 1.0, {"reward": 1.0, "length": 2.0})
    lines = console.file.getvalue().splitlines()
    assert [line.partition("score ")[2].split()[0] for line in lines] == ["0.25", "0.5", "0.5"]
    assert progress.steps_per_second == pytest.approx(1.0)


def test_the_final_table_keeps_every_cell_whole(capsys):
    rows = [("sft [red]x[/red]", 0.41234567, None), ("grpo " + "y" * 100, "97 %", 12)]
    final_table("Held-out", ("method", "exact match", "length"), rows)
    text = capsys.readouterr().out
    for word in ("Held-out", "sft [red]x[/red]", "0.4123", " - ", "y" * 100, "97 %", " 12 "):
        assert word in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00004, "0.04 ms"),
        (0.0992, "99 ms"),
        (0.0996, "0.10 s"),
        (0.424, "0.42 s"),
        (0.999, "1.0 s"),
        (9.97, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (86399, "1 d 00 h"),
        (273600, "3 d 04 h"),
    ],
)
def test_seconds_in_words(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (0.123456, "0.1235"),
        (12345.67, "12346"),
        (1e-5, "1.00e-05"),
        (-2.5e7, "-2.50e+07"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_in_four_digits(number, text):
    assert format_number(number) == text
