"""verl's rollout corrections, rule by rule and preset by preset, and its losses of DPPO and GPG."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import corrections
from rlhf_jax.losses.policy import grpo_loss
from rlhf_jax.losses.policy_surrogates import dppo_kl_surrogate, dppo_tv_surrogate, log_likelihood_surrogate
from rlhf_jax.losses.reductions import token_mean

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[2] / "golden" / "corrections_verl.npz"))
PRESETS = [name for name in corrections.PRESETS if f"{name}/mask" in GOLDEN]
THRESHOLDS = json.loads(str(GOLDEN["thresholds"]))
LOGPS = ("old_logp", "sampler_logp", "logp")
ARGUMENTS = ("old_logp", "sampler_logp", "mask")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arrays(*names):
    """NaN wherever nothing counts."""
    dirty = {name: np.where(GOLDEN["mask"], GOLDEN[name], np.nan) for name in LOGPS}
    values = ({**GOLDEN, **dirty}[name] for name in names)
    return [jnp.asarray(x) for x in values]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_verl_s(name):
    preset = corrections.find_correction(name)
    weights, accepted, _ = corrections.apply_correction(
        preset.correction, *arrays(*ARGUMENTS), **preset.thresholds
    )
    np.testing.assert_array_equal(accepted, GOLDEN[f"{name}/mask"])
    assert GOLDEN[f"{name}/mask"].any()
    assert (weights is None) == (f"{name}/weights" not in GOLDEN)
    if weights is not None:
        np.testing.assert_allclose(weights, GOLDEN[f"{name}/weights"], rtol=0, atol=1e-12)


def test_ten_presets_and_eleven_rules_are_compared():
    assert (len(PRESETS), THRESHOLDS.keys()) == (10, corrections.RULES.keys())


@pytest.mark.parametrize("name", THRESHOLDS)
def test_rules_are_verl_s(name):
    bounds = [float(number) for number in THRESHOLDS[name].split("_")]
    low, high = bounds if len(bounds) == 2 else (0.0, *bounds)
    expected = GOLDEN[f"rule_{name}/mask"]
    found = corrections.RULES[name](*arrays(*ARGUMENTS), low=low, high=high)
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected.sum() < GOLDEN["mask"].sum()


def test_measures_are_verl_s():
    found = corrections.off_policy_metrics(*arrays(*ARGUMENTS))
    names = {"chi2_token": "chi2_token", "chi2_sequence": "chi2_seq", "perplexity_gap": "log_ppl_diff"}
    for ours, theirs in names.items():
        # verl's masked means add 1e-8 to their denominators.
        np.testing.assert_allclose(found[ours], GOLDEN[f"metrics/{theirs}"], rtol=1e-8, err_msg=ours)


@pytest.mark.parametrize(
    ("surrogate_fn", "name", "options"),
    [
        (dppo_tv_surrogate, "dppo_tv", {"epsilon_low": 0.03, "epsilon_high": 0.05}),
        (dppo_kl_surrogate, "dppo_kl", {"epsilon_low": 0.004, "epsilon_high": 0.008}),
        (log_likelihood_surrogate, "gpg", {}),
    ],
)
def test_losses_are_verl_s_in_value_and_gradient(surrogate_fn, name, options):
    logp, old_logp, advantages, mask = arrays("logp", "old_logp", "advantages", "mask")
    if name.startswith("dppo"):
        options = {**options, "surrogate_params": {"max_ratio": 1.4}}

    def loss(x):
        parts = {"surrogate_fn": surrogate_fn, "reduce": token_mean, **options}
        return grpo_loss(x, old_logp, None, advantages, mask, **parts)[0]

    value, grad = jax.value_and_grad(loss)(logp)
    np.testing.assert_allclose(value, GOLDEN[f"{name}/value"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(grad, GOLDEN[f"{name}/grad"], rtol=0, atol=1e-10)
