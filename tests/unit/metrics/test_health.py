"""Each known trouble is provoked, found once an episode, and not found where all is well."""

import math

import pytest

from rlhf_jax.metrics.health import HEALTH_CHECKS, HealthMonitor, Thresholds

HEALTHY = {
    "frac_reward_zero_std": 0.3,
    "kl": 2.0,
    "length": 30.0,
    "entropy": 0.5,
    "sampling_logp_diff": 1e-6,
    "clip_fraction": 0.1,
    "reward_outliers": 0.0,
    "unscorable_share": 0.2,
}
PROVOKED = {
    "zero_std_groups": {"frac_reward_zero_std": 1.0},
    "kl_explosion": {"kl": 40.0},
    "entropy_collapse": {"entropy": 0.01},
    "length_drift": {"length": 90.0},
    "sampler_mismatch": {"sampling_logp_diff": 0.2},
    "clipped_ratios": {"clip_fraction": 0.9},
    "reward_outliers": {"reward_outliers": 0.01},
    "unscored_answers": {"unscorable_share": 1.0},
}


def watch(*steps, **thresholds):
    """(steps and warnings, steps at which there is a health metric)"""
    monitor, begun, under_way = HealthMonitor(Thresholds(**thresholds)), [], []
    for number, metrics in enumerate(steps):
        warnings, found = monitor.see(metrics)
        begun += [(number, warning.check.name) for warning in warnings]
        under_way += [(number, name.removeprefix("health/")) for name in found]
    return begun, under_way


def test_all_is_well():
    assert watch(*[HEALTHY] * 50) == ([], [])
    assert watch(*[{"loss": 1.0}] * 50) == ([], [])
    noisy = [
        {**HEALTHY, "frac_reward_zero_std": step % 2, "entropy": 0.3 + 0.2 * (step % 2)} for step in range(50)
    ]
    assert watch(*noisy) == ([], [])


@pytest.mark.parametrize("name", [check.name for check in HEALTH_CHECKS])
def test_each_trouble_is_found_once_an_episode(name):
    bad = {**HEALTHY, **PROVOKED[name]}
    begun, under_way = watch(*[HEALTHY] * 10, *[bad] * 10, *[HEALTHY] * 20, *[bad] * 10)
    assert [which for _, which in begun] == [name, name]
    (first, _), (second, _) = begun
    assert 10 <= first < 15
    assert 40 <= second < 45
    steps = [step for step, which in under_way if which == name]
    assert steps[0] == first
    assert set(range(first, 20)) | set(range(second, 50)) <= set(steps)
    # The mean over five steps, and five steps without trouble after it.
    assert not {step for step in steps if 30 <= step < 40}
    assert {which for _, which in under_way} == {name}


def test_shorter_answers_are_a_drift_too():
    assert watch(*[HEALTHY] * 5, *[{**HEALTHY, "length": 5.0, "kl": 0.1}] * 10)[0][0][1] == "length_drift"


def test_the_sentence_says_what_and_how_to_mend_it():
    monitor = HealthMonitor()
    said = [str(warning) for _ in range(5) for warning in monitor.see({"frac_reward_zero_std": 0.95})[0]]
    assert said == [said[0]]
    assert "in 95% of the groups" in said[0]
    assert "raise the group size" in said[0]
    assert len({check.advice for check in HEALTH_CHECKS}) == len(HEALTH_CHECKS)


def test_thresholds_move_and_infinity_switches_off():
    bad = [{"sampling_logp_diff": 0.2}] * 6
    assert watch(*bad)[0] == [(4, "sampler_mismatch")]
    assert watch(*bad, window=2)[0] == [(1, "sampler_mismatch")]
    assert watch(*bad, sampling_logp_diff=math.inf)[0] == []


def test_what_is_missing_or_not_finite_is_left_out():
    steps = [
        {"sampling_logp_diff": value} for value in (None, math.nan, 0.2, math.inf, 0.2, 0.2, None, 0.2, 0.2)
    ]
    assert watch(*steps)[0] == [(8, "sampler_mismatch")]


def test_shown_the_same_again_it_goes_on_the_same():
    steps = [{**HEALTHY, **PROVOKED["kl_explosion"]}] * 3 + [HEALTHY] * 9 + [{**HEALTHY, "kl": 90.0}] * 5
    whole = watch(*steps)
    monitor = HealthMonitor()
    for metrics in steps[:8]:
        monitor.see(metrics)
    found = [set(monitor.see(metrics)[1]) for metrics in steps[8:]]
    expected = [{f"health/{name}" for at, name in whole[1] if at == step} for step in range(8, len(steps))]
    assert found == expected
    assert any(expected)
