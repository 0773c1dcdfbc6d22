"""Plans for TPUs and GPUs that are not there, by their own compilers (the extras tpu-plan and gpu-plan)."""

import concurrent.futures
import importlib.util
import json
import os
import subprocess
import sys

import attention_table
import pytest

from rlhf_jax import models
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.training.run_folder import write_model_files

pytestmark = pytest.mark.slow
for_tpus = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="pip install rlhf_jax[tpu-plan]"
)
for_gpus = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="pip install rlhf_jax[gpu-plan]"
)


def plan(folder, *words):
    """What `rlhf plan` says of a decoder wide enough for the kernels, as JSON."""
    config = models.dense_config(
        vocab_size=1024, width=512, num_layers=3, num_heads=4, num_kv_heads=4, intermediate_size=1024
    )
    write_model_files(folder, models.make_policy(config, None, byte_tokenizer()), "policy")
    process = subprocess.run(
        [sys.executable, "-m", "rlhf_jax", "plan", "--model", str(folder), "--json", "-", *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@for_tpus
@pytest.mark.parametrize(
    ("topology", "kind", "count"),
    [
        ("v4:2x2x1", "TPU v4", 4),
        ("v5e:2x2", "TPU v5 lite", 4),
        ("v5p:2x2x1", "TPU v5", 4),
        ("v6e:2x2", "TPU v6 lite", 4),
        ("tpu7x:2x2x1", "TPU7x", 8),
        ("v5p:8x8x8", "TPU v5", 512),
    ],
)
def test_every_generation(tmp_path, topology, kind, count):
    words = ("--mesh", "auto", "--batch", str(count), "--length", "256", "--topology", topology)
    found = plan(tmp_path, *words)
    assert (found["device_kind"], found["devices"], found["fits"]) == (kind, count, True)
    update = found["programs"]["update"]
    assert update["complaints"] == []
    assert update["collectives"]
    # Attention runs in the TPU's own kernel on every device: forward, again, and two passes backward.
    assert min(update["roofline_seconds"].values()) > 0
    assert update["temporary_bytes"] > 0


@for_tpus
def test_generation_and_four_models_on_a_slice(tmp_path):
    words = ("--algo", "ppo", "--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=2", "--batch", "8")
    found = plan(tmp_path, *words, "--length", "256", "--new-tokens", "64", "--hlo", str(tmp_path / "hlo"))
    assert list(found["programs"]) == ["update", "generation", "reward"]
    assert all(program["complaints"] == [] for program in found["programs"].values())
    assert found["kv_cache_bytes"] > 0
    assert "tpu_custom_call" in (tmp_path / "hlo" / "update.hlo.txt").read_text()


@for_tpus
def test_a_mesh_whose_axis_is_part_of_the_torus(tmp_path):
    words = ("--topology", "v6e:8x8", "--mesh", "fsdp=16,tensor=4", "--batch", "16", "--length", "256")
    assert plan(tmp_path, *words)["devices"] == 64


@for_tpus
def test_a_mesh_that_is_not_the_slice(tmp_path):
    with pytest.raises(AssertionError, match="uses 2 of the 4 devices of --topology v5e:2x2"):
        plan(tmp_path, "--topology", "v5e:2x2", "--mesh", "fsdp=2")
    with pytest.raises(AssertionError, match="--topology v5e:3x3: there is no such slice"):
        plan(tmp_path, "--topology", "v5e:3x3")


@for_tpus
def test_two_plans_at_the_same_time(tmp_path):
    """The compiler's lock is that of a TPU, which no plan uses."""

    def one(batch):
        folder = tmp_path / batch
        folder.mkdir()
        words = ("--topology", "v5e:2x2", "--mesh", "auto", "--batch", batch, "--length", "256")
        return plan(folder, *words)["options"]["batch"]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, ("4", "8"))) == [4, 8]


@for_gpus
@pytest.mark.parametrize(
    ("topology", "kind", "count"),
    [
        ("a100:8", "NVIDIA A100-SXM4-80GB", 8),
        ("h100:4", "NVIDIA H100 80GB HBM3", 4),
        ("h200:16", "NVIDIA H200 141GB HBM3e", 16),
        ("b200:8", "NVIDIA B200", 8),
        ("gb200:8", "NVIDIA GB200", 8),
    ],
)
def test_every_kind_of_gpu(tmp_path, topology, kind, count):
    words = ("--mesh", f"fsdp={count}", "--batch", str(count), "--length", "256", "--topology", topology)
    found = plan(tmp_path, *words, "--hlo", str(tmp_path / "hlo"))
    assert (found["device_kind"], found["devices"], found["fits"]) == (kind, count, True)
    update = found["programs"]["update"]
    assert {"all-gather", "reduce-scatter"} <= set(update["collectives"])
    assert min(update["roofline_seconds"].values()) > 0
    assert "__cublas$" in (tmp_path / "hlo" / "update.hlo.txt").read_text()


@for_gpus
def test_memory_of_long_rows_on_a_gpu(tmp_path):
    """Logits are never held whole: twice the columns take less than three times the memory."""
    held = []
    for length in ("1024", "2048"):
        folder = tmp_path / length
        folder.mkdir()
        words = ("--topology", "h100:1", "--mesh", "", "--batch", "1", "--length", length)
        held.append(plan(folder, *words)["programs"]["update"]["temporary_bytes"])
    assert held[1] < 3 * held[0]


@pytest.mark.parametrize(
    "topology", [pytest.param("v5e:2x2", marks=for_tpus), pytest.param("h100:1", marks=for_gpus)]
)
def test_no_kind_of_attention_holds_whole_squares(topology):
    """Compiled apart from the tests' own devices, since the plugins are read before JAX begins."""
    words = [sys.executable, attention_table.__file__, "--topologies", topology, "--length", "4096"]
    process = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in process.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == list(attention_table.LAYERS)
    square = attention_table.HEADS * 4096**2 * 4 / 2**20
    for _, name, auto, plain, _ in rows:
        assert float(plain.replace(",", "")) > square, name
        assert float(auto.replace(",", "")) < float(plain.replace(",", "")) / 2, name
