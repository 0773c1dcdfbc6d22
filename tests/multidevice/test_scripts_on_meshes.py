"""The scripts on meshes and in several processes: the same numbers as on one device."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rlhf_jax.checkpoint import read_manifest
from rlhf_jax.checkpoint.manifest import DamagedError, list_steps, verify

COMMON = ("--steps", "4", "--save-every", "2", "--quiet", "--no-report")
COMMON += ("--optimizer.warmup-steps", "0", "--optimizer.total-steps", "8")
EMBEDDED = ("--data", "arithmetic:1", "--optimizer.b2", "0.95", "--optimizer.schedule", "cosine")
SFT = (*EMBEDDED, "--learning-rate", "3e-3", "--optimizer.end-lr-ratio", "0.02", "--arch.width", "32")
SFT += ("--demonstrations", "300", "--batch-size", "16", "--eval-count", "16")
PAIRS = (
    *EMBEDDED,
    "--optimizer.end-lr-ratio",
    "0.1",
    "--batch-size",
    "8",
    "--pair-count",
    "100",
    "--eval-count",
    "16",
)
ENDLESS = ("--steps", "100000", "--optimizer.schedule", "constant", "--heartbeat-timeout", "10")
JUDGED = (*PAIRS, "--learning-rate", "5e-4")
DPO = (*PAIRS, "--learning-rate", "1e-4", "--beta", "2")
PROMPTS = ("--data", "arithmetic:1", "--learning-rate", "3e-4", "--optimizer.epsilon", "1e-4")
PROMPTS += (
    "--optimizer.b2",
    "0.99",
    "--max-new-tokens",
    "6",
    "--prompt-count",
    "60",
    "--eval-count",
    "8",
    "--samples",
    "3",
)
EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"
GRPO = (*PROMPTS, "--rewards", EXACT)
PPO = (*PROMPTS, "--eval-reward", EXACT, "--num-ppo-epochs", "1", "--num-minibatches", "2")
PPO += ("--cliprange-value", "0.5", "--value-coef", "0.5", "--kl-coef", "0.2")


def command(script, out, *options):
    return [sys.executable, "-m", "rlhf_jax", script, "--out", str(out), *COMMON, *map(str, options)]


def start(arguments, *, devices):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(script, out, *options, devices=8):
    process = start(command(script, out, *options), devices=devices)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return metrics_of(out)


def metrics_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time")} for line in lines]


def assert_same_metrics(found, expected, *, tolerance=1e-4):
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if not isinstance(value, str):
                np.testing.assert_allclose(mine[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.slow
def test_every_stage_on_a_mesh(tmp_path):
    """Supervised, then what starts from it; each stage on its own mesh and on one device."""
    sft, rewards = tmp_path / "sft", tmp_path / "rewards"
    layouts = {"mesh": ("data=2,fsdp=2,tensor=2", "fsdp=8", "fsdp=4,tensor=2", "data=4,sequence=2", "auto")}
    layouts["one"] = ("",) * 5
    found = {}
    for name, (of_sft, of_rewards, of_dpo, of_ppo, of_grpo) in layouts.items():
        first = name == "mesh"
        here = tmp_path / name
        found[name] = [
            run("sft", sft if first else here / "sft", *SFT, "--mesh", of_sft),
            run(
                "reward-model",
                rewards if first else here / "rewards",
                *("--model", sft, *JUDGED, "--mesh", of_rewards),
            ),
            run("dpo", here / "dpo", "--model", sft, *DPO, "--mesh", of_dpo),
            run("dpo", here / "each", "--model", sft, *DPO, "--mesh", of_dpo, "--reference", "each_step"),
            run(
                "ppo",
                here / "ppo",
                *("--model", sft, "--reward-model", rewards, "--batch-size", "16"),
                *(*PPO, "--mesh", of_ppo),
            ),
            run(
                "grpo",
                here / "grpo",
                *("--model", sft, "--batch-size", "4", "--group-size", "4", *GRPO, "--mesh", of_grpo),
            ),
        ]
    for mesh, one in zip(found["mesh"], found["one"], strict=True):
        assert_same_metrics(mesh, one, tolerance=2e-3)


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_data(tmp_path):
    whole = run("sft", tmp_path / "whole", *SFT, "--mesh", "fsdp=8")
    out = tmp_path / "moved"
    run("sft", out, *SFT, "--mesh", "fsdp=8", "--steps", "2")
    moved = run("sft", out, *SFT, "--mesh", "data=2,tensor=2", "--resume")
    assert_same_metrics(moved[-1:], whole[-1:])
    held = read_manifest(out / "checkpoints")
    assert held.config["run"]["mesh"] == "data=2,tensor=2"
    assert len(held.extra["data"]) == 64


def hosts(count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [f"localhost:{port},{count},{index}" for index in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_learn_what_one_learns(tmp_path, count):
    out = tmp_path / "several"
    processes = [
        start(command("sft", out, *SFT, "--mesh", "fsdp=4", "--coordinator", host), devices=4 // count)
        for host in hosts(count)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, errors
    alone = run("sft", tmp_path / "alone", *SFT, "--mesh", "fsdp=4", devices=4)
    assert_same_metrics(metrics_of(out), alone)
    # What several processes saved, one goes on with, on another mesh.
    lines = run("sft", out, *SFT, "--resume", "--steps", "5")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]


def run_in_two(script, out, *options):
    """A stage in two processes of two devices each."""
    processes = [
        start(command(script, out, *options, "--mesh", "fsdp=4", "--coordinator", host), devices=2)
        for host in hosts(2)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors[0][-3000:]
    return metrics_of(out)


@pytest.mark.slow
def test_stages_in_two_processes_are_those_in_one(tmp_path, monkeypatch):
    """Pairs, rollouts and rewards of which each process has its own rows."""
    (tmp_path / "some_rewards.py").write_text(
        "def odd(prompts, completions, **_):\n    return [len(set(text)) % 2 for text in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sft, judged = tmp_path / "sft", tmp_path / "rewards"
    run("sft", sft, *SFT, devices=1)
    run("reward-model", judged, "--model", sft, *JUDGED, devices=1)
    from_sft = ("--model", sft)
    stages = {
        "reward_model": ("reward-model", *from_sft, *JUDGED),
        "process_reward": (
            "process-reward",
            *from_sft,
            *EMBEDDED,
            "--learning-rate",
            "1e-3",
            "--batch-size",
            "8",
        ),
        "dpo": ("dpo", *from_sft, *DPO),
        "dpo_each": ("dpo", *from_sft, *DPO, "--reference", "each_step"),
        "ppo": ("ppo", *from_sft, "--reward-model", judged, "--batch-size", "8", *PPO),
        "grpo": ("grpo", *from_sft, "--batch-size", "4", "--group-size", "2", *GRPO),
        "dapo": (
            *("grpo", *from_sft, "--batch-size", "4", "--group-size", "2", *GRPO),
            *("--algorithm", "dapo", "--dynamic-sampling-max-rounds", "3"),
            *("--rewards", "some_rewards:odd"),
        ),
        "a_star_po": (
            *("grpo", *from_sft, "--batch-size", "4", "--group-size", "2", *GRPO),
            *("--algorithm", "a_star_po", "--reference-samples", "2", "--rewards", "some_rewards:odd"),
        ),
    }
    for name, (script, *options) in stages.items():
        two = run_in_two(script, tmp_path / f"{name}_two", *options)
        one = run(script, tmp_path / f"{name}_one", *options, "--mesh", "fsdp=4", devices=4)
        assert_same_metrics(two, one, tolerance=2e-3)


def whole_steps(out):
    found = []
    for step, path in list_steps(out / "checkpoints").items():
        with contextlib.suppress(DamagedError):  # still being written
            verify(path)
            found.append(step)
    return found


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_leaves_a_whole_checkpoint(tmp_path):
    out = tmp_path / "run"
    processes = [
        start(
            command("sft", out, *SFT, "--mesh", "fsdp=2", "--coordinator", host, *ENDLESS),
            devices=1,
        )
        for host in hosts(2)
    ]
    try:
        deadline = time.monotonic() + 200
        while not whole_steps(out):
            assert time.monotonic() < deadline
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        errors = processes[0].communicate(timeout=60)[1]
        assert time.monotonic() - killed < 40
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 75, errors
    assert "another process of this run has ended" in errors
    assert whole_steps(out)
