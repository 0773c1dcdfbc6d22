import os

import pytest

from rlhf_jax.distributed import runtime


@pytest.fixture
def threads(monkeypatch):
    """What `choose_threads` leaves in the environment, where that has `held`, for so many CPU devices."""

    def chosen(held=None, *, devices=1, **options):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}" * (devices > 1))
        monkeypatch.setenv("PJRT_NPROC", held or "")
        if held is None:
            monkeypatch.delenv("PJRT_NPROC")
        runtime.choose_threads(**options)
        return os.environ.get("PJRT_NPROC")

    return chosen


def test_runs_side_by_side_have_one_thread_and_several_devices_enough(threads):
    assert threads(side_by_side=True) == "1"
    assert threads() is None
    cores = os.cpu_count() or 1
    assert threads(devices=4, side_by_side=True) == threads(devices=4) == str(max(8, cores))
    assert threads(devices=8) == str(max(16, cores))


def test_a_choice_made_before_stays(threads):
    assert threads("3", side_by_side=True) == threads("3", devices=8) == "3"
