"""The package math-verify behind a limit: where it is installed, and where it is not."""

import importlib.util

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rewards import verifiers

INSTALLED = importlib.util.find_spec("math_verify") is not None


@pytest.mark.skipif(not INSTALLED, reason="math-verify is not installed")
def test_math_verify_is_asked_in_a_process_under_limits(monkeypatch):
    texts = [r"so \boxed{\frac{1}{2}}", "it is 0.5", "no idea", r"\boxed{9^{9^{9^{9^9}}}}", r"\boxed{2/4}"]
    rewards = verifiers.math_verify_reward(["p"] * 5, texts, answer=["1/2"] * 5, other=[0] * 5)
    assert rewards[:3] == [1.0, 1.0, 0.0]
    assert rewards[3] in (0.0, None)
    assert rewards[4] == 1.0
    verifiers._math_verify_worker().close()


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    verifiers._math_verify_worker.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[math\]'"):
        verifiers.math_verify_reward(["p"], ["1"], answer=["1"])
