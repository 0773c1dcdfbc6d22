"""Time by part, model FLOP/s, and traces that profilers open."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax.metrics.writers import read_metrics
from rlhf_jax.training import LoopConfig, Meter, run_loop
from rlhf_jax.training.timers import describe


def test_parts_and_mfu():
    meter = Meter(flops=3e9, peak_flops=1e12)
    assert meter.timed("rollout", lambda x: x + 1, 1) == 2
    for _ in range(2):
        with meter.timing("update"):
            time.sleep(0.02)
    found = meter.read(0.5, 100.0)
    assert list(found)[:2] == ["time/step_seconds", "time/tokens_per_second"]
    assert found["time/tokens_per_second"] == 200
    assert 0.04 <= found["time/update_seconds"] < 0.4
    assert found["time/mfu"] == pytest.approx(3e9 / found["time/update_seconds"] / 1e12)
    assert "time/data_seconds" not in found
    # It starts anew, and without the part the whole step counts.
    assert meter.read(0.5, None)["time/mfu"] == pytest.approx(6e-3)


def test_without_a_known_peak_there_is_no_mfu(monkeypatch):
    monkeypatch.setattr("rlhf_jax.training.timers.chip_of", lambda kind: None)
    assert "time/mfu" not in Meter(flops=1e9).read(1.0, None)


def test_device_memory_where_the_backend_counts_it(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7)])
    found = Meter().read(1.0, None)
    assert (found["time/memory_bytes"], found["time/memory_peak_bytes"]) == (7, 14)


def test_words_for_the_progress():
    times = {
        "time/step_seconds": 2.0,
        "time/rollout_seconds": 1.2,
        "time/update_seconds": 0.6,
        "time/mfu": 0.4,
    }
    assert describe(times) == "rollout 60%, update 30%, MFU 0.400"
    assert describe({"time/step_seconds": 2.0, "time/update_seconds": 1.9}) == ""


def test_a_profiled_run_writes_a_trace_and_logs_its_parts(tmp_path):
    meter = Meter(flops=1e6, peak_flops=1e12)
    double = jax.jit(lambda x: 2 * x)

    def step(state, number):
        return meter.timed("update", double, state), {"loss": jnp.float32(number)}

    config = LoopConfig(5, save_every=2, quiet=True, profile=2)
    run_loop(jnp.ones(3), step, config, stage="toy", folder=tmp_path, meter=meter)
    lines = read_metrics(tmp_path)
    assert all(line["time/update_seconds"] > 0 and line["time/mfu"] > 0 for line in lines)
    assert [("time/save_seconds" in line) for line in lines] == [False, False, True, False, True]
    [trace] = tmp_path.glob("profile/plugins/profile/*/*.trace.json.gz")
    [space] = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("step") == 2
    assert names.count("update") >= 2
    steps = sorted(
        e["args"]["step_num"] for e in events if e.get("name") == "step" and "step_num" in e.get("args", {})
    )
    assert [str(number) for number in steps] == ["2", "3"]
    assert space.stat().st_size > 0
