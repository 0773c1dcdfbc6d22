"""Killed at any moment and started again, every stage ends as if nothing had happened, to the bit."""

import functools
import hashlib
import random
import signal
import time

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.checkpoint import restore_params
from rlhf_jax.metrics import read_metrics
from rlhf_jax.training.run_folder import load_policy, load_reward_model


def lines(folder):
    """All metrics but those that a clock gives; their text has every digit, so equal means equal bits."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time")}
        for line in read_metrics(folder)
    ]


def parameters_hash(stage, folder):
    if stage == "ppo":
        config = load_policy(folder).config
        shapes = {
            "policy": jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0)),
            "value": jax.eval_shape(functools.partial(models.init_scalar_model, config), jax.random.key(0)),
        }
        params = restore_params(folder / "checkpoints", shapes, name="learner/params")[1]
    else:
        params = (load_reward_model if stage == "reward_model" else load_policy)(folder).params
    content = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    assert sum(map(len, content)) > 1000
    return hashlib.sha256(b"".join(content)).hexdigest()


def kill_once(tiny, words, folder, step, pause):
    """Kills a stage `pause` seconds after `step` is in its log; False where it was over before."""
    process = tiny.process(words)
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and any(line.get("step", 0) >= step for line in read_metrics(folder)):
            time.sleep(pause)
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def check_equal(tiny, stage, folder):
    unbroken = tiny.finished(stage)
    assert [line["step"] for line in lines(folder)] == list(range(13))
    assert lines(folder) == lines(unbroken)
    assert parameters_hash(stage, folder) == parameters_hash(stage, unbroken)


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("reward_model", "dpo", "ppo", "grpo")]


@pytest.mark.parametrize("stage", ["sft", *SLOW])
def test_killed_and_restarted(tiny, stage, tmp_path):
    tiny.finished(stage)
    generator = random.Random(stage)
    for attempt in range(3):
        folder = tmp_path / f"killed_{attempt}"
        words = [stage.replace("_", "-"), *tiny.words(stage, folder)]
        if kill_once(tiny, words, folder, generator.randint(1, 8), generator.uniform(0, 0.02)):
            break
    reached = max((line["step"] for line in lines(folder)), default=0)
    assert reached < 12, "the run was over before it could be killed"
    tiny.run(stage, folder, "--resume")
    check_equal(tiny, stage, folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo", "ppo", "grpo"])
def test_killed_again_and_again(tiny, stage, seed, tmp_path):
    tiny.finished(stage)
    generator, folder, kills = random.Random(f"{stage} {seed}"), tmp_path / "run", 0
    for step in sorted(generator.sample(range(1, 12), 3)):
        words = [stage.replace("_", "-"), *tiny.words(stage, folder, "--resume")]
        kills += kill_once(tiny, words, folder, step, generator.uniform(0, 0.03))
    assert kills
    process = tiny.process([stage.replace("_", "-"), *tiny.words(stage, folder, "--resume")])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    check_equal(tiny, stage, folder)


@pytest.mark.slow
def test_resume_in_an_empty_folder_starts_from_scratch(tiny, tmp_path):
    folder = tiny.run("sft", tmp_path / "new", "--resume")
    check_equal(tiny, "sft", folder)


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(tiny, tmp_path):
    folder = tmp_path / "longer"
    constant = ("--optimizer.schedule", "constant")
    tiny.run("sft", folder, *constant, "--steps", 5)
    tiny.run("sft", folder, *constant, "--steps", 9, "--save-every", 2, "--resume")
    whole = tiny.run("sft", tmp_path / "whole", *constant, "--steps", 9)
    evaluated_at_the_end = {name for line in lines(whole) for name in line if name.startswith("eval/")}

    def trained(folder):
        return [{k: v for k, v in line.items() if k not in evaluated_at_the_end} for line in lines(folder)]

    assert trained(folder) == trained(whole)
    assert parameters_hash("sft", folder) == parameters_hash("sft", whole)
