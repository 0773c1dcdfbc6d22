"""Every layout computes what one device computes, and sends no more than it must."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import few

HERE = Path(__file__).parent
LAYOUTS = (
    "data=8",
    "fsdp=8",
    "tensor=4",
    "fsdp=4,tensor=2",
    "data=2,fsdp=2,tensor=2",
    "sequence=4",
    "sequence=4/ulysses",
    "expert=4",
    "pipeline=2",
    "pipeline=2,fsdp=2,tensor=2",
)
ALGORITHMS = ("sft", "dpo", "grpo", "ppo")
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
VOCAB, WIDTH = 40, 16  # as in parity.py: no other axis is 40 long


def run_on_eight(script, *arguments, timeout=900):
    """Runs a script of this folder on 8 CPU devices; XLA's own warnings are in its standard error."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "TF_CPP_MIN_LOG_LEVEL": "0"}
    process = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process


@functools.cache
def parity(dtype, *cases):
    process = run_on_eight("parity.py", dtype, *cases)
    assert "rematerialization" not in process.stderr.lower()
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert [f"{result['name']}:{result['mesh']}" for result in results] == list(cases)
    return results


def check_update(result, dtype):
    where = f"{result['name']} on {result['mesh']}, {dtype}"
    assert result["loss_error"] < TOLERANCE[dtype], where
    assert result["params_error"] < TOLERANCE[dtype], where
    assert result["repeats"], where
    assert result["collectives"], where
    for collective in result["collectives"]:
        for shape in collective["shapes"]:
            # Of what has an axis as long as the vocabulary only the (un)embedding travels, never logits.
            assert VOCAB not in shape or math.prod(shape) <= VOCAB * WIDTH, (where, collective)


def check_controls(results, dtype):
    right, *wrong = results
    assert max(right["loss_error"], right["params_error"]) < TOLERANCE[dtype]
    for result in wrong:
        assert result["params_error"] > 1e3 * TOLERANCE[dtype], result["name"]


def check_answers(result):
    assert result["same_tokens"], result
    assert result["logp_error"] < 1e-5


CONTROLS = [f"{name}:data=8" for name in ("by_hand", "mean_of_means", "missing_psum", "dropped_micro_batch")]


@pytest.mark.slow
def test_one_layout_of_each_kind_and_the_negative_controls():
    updates = ["sft:data=2,fsdp=2,tensor=2", "sft:expert=4"]
    results = parity("float64", *updates, "generate_gathered:data=2,fsdp=2,tensor=2", *CONTROLS)
    for result in results[:2]:
        check_update(result, "float64")
    check_answers(results[2])
    often, once = results[2]["gathers"]  # in units of all parameters, of which tensor=2 leaves each half
    assert once < 0.5 < 3 < often
    check_controls(results[3:], "float64")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_update_on_every_layout(algorithm, dtype):
    for result in parity(dtype, *(f"{algorithm}:{layout}" for layout in LAYOUTS)):
        check_update(result, dtype)


@pytest.mark.slow
def test_generation_on_every_layout():
    gathered = ["generate_gathered:fsdp=8", "generate_gathered:fsdp=4,tensor=2"]
    for result in parity("float32", *(f"generate:{layout}" for layout in LAYOUTS), *gathered):
        check_answers(result)


@pytest.mark.slow
def test_negative_controls_in_float32():
    check_controls(parity("float32", *CONTROLS), "float32")


# With 4 devices and 2 heads of keys, Ulysses repeats them; with `tensor`, each device has some heads.
@pytest.mark.parametrize("mesh", few(["sequence=4", "sequence=2,tensor=2"], "sequence=4"))
def test_attention_over_split_columns_is_attention(mesh):
    lines = [line.split() for line in run_on_eight("ring.py", mesh).stdout.splitlines()]
    assert [way for way, *_ in lines] == ["ring", "ring", "ulysses", "ulysses"]
    for _, *errors in lines:
        assert len(errors) == 4  # outputs, and the gradients of queries, keys, values
        assert max(map(float, errors)) < 1e-12


@pytest.mark.slow
def test_optimizer_state_is_never_gathered():
    """Parameters forward and backward and their gradients make up what is sent; moments would add half."""
    sent = json.loads(run_on_eight("gathered.py").stdout)
    assert sent["complaints"] == []
    assert 0.6 < sent["as it is"] / sent["on paper"] < 1.2
    assert sent["broken"] > sent["as it is"] + 0.4 * sent["on paper"]


@pytest.mark.slow
def test_layouts_send_what_they_should_on_paper():
    process = run_on_eight("../../tools/tables/comm_table.py")
    assert "warning" not in process.stderr
    rows = [line.split("|") for line in process.stdout.splitlines()[2:]]
    ratios = {row[1].strip(): float(row[-3]) for row in rows}
    assert list(ratios) == ["data=8", "fsdp=8", "tensor=4", "sequence=4", "expert=4"]
    assert all(0.6 < ratio < 1.3 for ratio in ratios.values()), ratios


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["sequence=4", "fsdp=2,sequence=2,tensor=2"])
def test_a_soft_prompt_before_split_columns(mesh):
    assert max(map(float, run_on_eight("prompted.py", mesh).stdout.split())) < 1e-12


@pytest.mark.slow
def test_splash_attention_on_a_mesh_is_attention():
    [line] = run_on_eight("ring.py", "splash").stdout.splitlines()
    _, *errors = line.split()
    assert len(errors) == 4
    assert max(map(float, errors)) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_log_probs_of_what_counts_alone(mesh):
    errors = run_on_eight("counted.py", mesh).stdout.split()
    assert len(errors) == 3
    assert max(map(float, errors)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_packed_answers(mesh):
    share, *errors = run_on_eight("packed.py", mesh).stdout.split()
    assert float(share) < 0.8
    assert max(map(float, errors)) < 1e-11
