import os

from rlhf_jax.core import compilation


def test_threads_are_enough_and_a_choice_made_before_stays(monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    compilation.ensure_threads()
    assert int(os.environ["PJRT_NPROC"]) >= compilation.LEAST_THREADS
    monkeypatch.setenv("PJRT_NPROC", "3")
    compilation.ensure_threads()
    assert os.environ["PJRT_NPROC"] == "3"
