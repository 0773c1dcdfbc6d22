"""Every variant of TRL's GRPO and GMPO trainers, in value and gradient."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.losses.policy import grpo_loss
from rlhf_jax.losses.policy_ratios import sequence_log_ratio, token_log_ratio
from rlhf_jax.losses.policy_surrogates import (
    cispo_surrogate,
    clip_surrogate,
    geometric_mean_surrogate,
    sapo_surrogate,
    vespo_surrogate,
)
from rlhf_jax.losses.policy_weights import off_policy_mask, top_entropy_mask
from rlhf_jax.losses.reductions import constant_length, sequence_mean, sequence_sum, token_mean

PATH = pathlib.Path(__file__).parents[2] / "golden" / "losses_policy_trl.npz"
GOLDEN = dict(np.load(PATH))
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
VARIANTS = json.loads(str(GOLDEN["variants"]))


def surrogate_of(settings):
    if settings.get("trainer") == "gmpo":
        return geometric_mean_surrogate
    if settings["delta"] is not None:
        return functools.partial(clip_surrogate, delta=settings["delta"])
    soft = {"cispo": cispo_surrogate, "sapo": sapo_surrogate, "vespo": vespo_surrogate}
    return soft.get(settings["loss_type"], clip_surrogate)


def reduction_of(settings):
    if settings.get("trainer") == "gmpo":
        return sequence_mean
    by_type = {
        "grpo": sequence_mean,
        "sapo": sequence_mean,
        "dr_grpo": constant_length(settings["max_completion_length"]),
        "luspo": sequence_sum,
    }
    return by_type.get(settings["loss_type"], token_mean)


def weights_of(settings, inputs):
    if settings["top_entropy_quantile"] < 1:
        return top_entropy_mask(inputs["entropy"], inputs["mask"], fraction=settings["top_entropy_quantile"])
    if settings["off_policy_mask_threshold"] is not None:
        return off_policy_mask(
            *(inputs[name] for name in ("logp", "old_logp", "advantages", "mask")),
            threshold=settings["off_policy_mask_threshold"],
        )
    return None


def loss_of(settings, inputs, logp, entropy):
    cispo = settings["loss_type"] == "cispo"
    # TRL's CISPO has one bound, and it is the weight itself.
    epsilon_low = 1.0 if cispo else settings["epsilon_low"]
    epsilon_high = settings["epsilon_high"] - 1 if cispo else settings["epsilon_high"]
    sequence_level = settings["importance_sampling_level"] == "sequence"
    policy_loss, _ = grpo_loss(
        logp,
        inputs["old_logp"],
        inputs["ref_logp"],
        inputs["advantages"],
        inputs["mask"],
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        kl_coef=settings["beta"],
        weights=weights_of(settings, inputs),
        ratio_fn=sequence_log_ratio if sequence_level else token_log_ratio,
        surrogate_fn=surrogate_of(settings),
        kl_ratio_correction=settings["use_bias_correction_kl"],
        reduce=reduction_of(settings),
    )
    # TRL's bonus is a mean over tokens whatever the reduction of the rest.
    return policy_loss - settings["entropy_coef"] * token_mean(entropy, inputs["mask"])


@pytest.mark.parametrize("dtype", few(TOLERANCE, "float64"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_trl(variant, dtype):
    settings, tolerance = VARIANTS[variant], TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
        names = ("logp", "old_logp", "ref_logp", "entropy", "advantages")
        inputs = {name: jnp.asarray(GOLDEN[name], dtype) for name in names}
        inputs["mask"] = jnp.asarray(GOLDEN["mask"])
        value, (grad, grad_entropy) = jax.value_and_grad(
            functools.partial(loss_of, settings, inputs), argnums=(0, 1)
        )(inputs["logp"], inputs["entropy"])
    np.testing.assert_allclose(value, GOLDEN[f"{variant}/value"], rtol=0, atol=tolerance)
    mask = GOLDEN["mask"]
    np.testing.assert_allclose(grad, np.where(mask, GOLDEN[f"{variant}/grad"], 0), rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        grad_entropy, np.where(mask, GOLDEN[f"{variant}/grad_entropy"], 0), rtol=0, atol=tolerance
    )
