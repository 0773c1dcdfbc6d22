"""Plans for slices of TPUs that are not there. Needs the TPU compiler (pip install 'rlhf_jax[tpu-plan]')."""

import concurrent.futures
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from rlhf_jax import models
from rlhf_jax.models import config_to_dict

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not here"),
]


def plan(folder, *words):
    """What `rlhf plan` says of a decoder wide enough for the kernels, as JSON."""
    config = models.dense_config(
        vocab_size=1024, width=512, num_layers=3, num_heads=4, num_kv_heads=4, intermediate_size=1024
    )
    (folder / "model.json").write_text(json.dumps({"kind": "policy", "config": config_to_dict(config)}))
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


def test_generation_and_four_models_on_a_slice(tmp_path):
    words = ("--algo", "ppo", "--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=2", "--batch", "8")
    found = plan(tmp_path, *words, "--length", "256", "--new-tokens", "64", "--hlo", str(tmp_path / "hlo"))
    assert list(found["programs"]) == ["update", "generation", "reward"]
    assert all(program["complaints"] == [] for program in found["programs"].values())
    assert found["kv_cache_bytes"] > 0
    assert "tpu_custom_call" in (tmp_path / "hlo" / "update.hlo.txt").read_text()


def test_a_mesh_whose_axis_is_part_of_the_torus(tmp_path):
    words = ("--topology", "v6e:8x8", "--mesh", "fsdp=16,tensor=4", "--batch", "16", "--length", "256")
    assert plan(tmp_path, *words)["devices"] == 64


def test_a_mesh_that_is_not_the_slice(tmp_path):
    with pytest.raises(AssertionError, match="uses 2 of the 4 devices of --topology v5e:2x2"):
        plan(tmp_path, "--topology", "v5e:2x2", "--mesh", "fsdp=2")
    with pytest.raises(AssertionError, match="--topology v5e:3x3: there is no such slice"):
        plan(tmp_path, "--topology", "v5e:3x3")


def test_two_plans_at_the_same_time(tmp_path):
    """The compiler's lock is that of a TPU, which no plan uses."""

    def one(batch):
        folder = tmp_path / batch
        folder.mkdir()
        words = ("--topology", "v5e:2x2", "--mesh", "auto", "--batch", batch, "--length", "256")
        return plan(folder, *words)["options"]["batch"]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, ("4", "8"))) == [4, 8]
