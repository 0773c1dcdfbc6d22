"""Preference, reward and distillation losses against TRL's, frozen by tools/goldens/make_goldens.py."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import losses

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
PREFERENCE = dict(np.load(GOLDEN / "losses_preference_trl.npz"))
DISTILLATION = dict(np.load(GOLDEN / "losses_distillation_trl.npz"))
CASES = json.loads(str(PREFERENCE["cases"]))
POLICY = ("policy_chosen_logp", "policy_rejected_logp")
REF = ("ref_chosen_logp", "ref_rejected_logp")
LENGTHS = ("chosen_length", "rejected_length")
COMPUTED_IN_FLOAT32 = ("orpo", "dpo_alpha")
# These have tests of their own below.
SPECIAL = ("kto", "kto_kl_at_0", "dpo_ld", "dpo_weighted", "reward", "reward_margin")


def tolerance(case: str, x64: bool) -> dict[str, float]:
    return (
        {"rtol": 1e-12, "atol": 1e-14}
        if x64 and case not in COMPUTED_IN_FLOAT32
        else {"rtol": 1e-6, "atol": 1e-6}
    )


def inputs(x64: bool) -> dict[str, Any]:
    dtype = jnp.float64 if x64 else jnp.float32
    floats = {k: v for k, v in PREFERENCE.items() if "/" not in k and k != "cases"}
    return {k: jnp.asarray(v, dtype) if v.dtype == np.float64 else jnp.asarray(v) for k, v in floats.items()}


def loss_named(name: str) -> Any:
    """The frozen files have the names of the time when they were made."""
    return getattr(losses, name.replace("normalised", "normalized").replace("generalised", "generalized"))


def scored(kwargs: dict[str, Any], chosen: Any, rejected: Any) -> tuple[Any, Any]:
    name, alpha = kwargs.pop("score"), kwargs.pop("alpha", None)
    score = getattr(losses, f"{name}_score")
    score = score if alpha is None else functools.partial(score, alpha=alpha)
    return score(chosen), score(rejected)


@pytest.mark.parametrize("x64", few([False, True], True), ids=["float32", "float64"])
@pytest.mark.parametrize("case", [name for name in CASES if name not in SPECIAL])
def test_paired_losses_match_trl(case: str, x64: bool) -> None:
    with jax.enable_x64(x64):
        data = inputs(x64)
        reference_free = case in ("cpo", "simpo", "alpha_po", "orpo")
        ref = (None, None) if reference_free else tuple(data[name] for name in REF)
        lengths = tuple(data[name] for name in LENGTHS)

        def value(logps: Any) -> Any:
            kwargs = dict(CASES[case]["kwargs"])
            chosen, rejected, others = *jnp.split(logps, 2), ref
            if "score" in kwargs:
                chosen, rejected = scored(kwargs, chosen - ref[0], rejected - ref[1])
                others = (jnp.zeros_like(chosen),) * 2
            pairs = losses.PairLogps(chosen, rejected, *others, *lengths)
            return loss_named(CASES[case]["function"])(pairs, **kwargs)[0]

        loss, grad = jax.value_and_grad(value)(jnp.concatenate([data[name] for name in POLICY]))
    np.testing.assert_allclose(loss, PREFERENCE[f"{case}/value"], **tolerance(case, x64))
    np.testing.assert_allclose(grad, PREFERENCE[f"{case}/grad"], **tolerance(case, x64))


@pytest.mark.parametrize("case", ["kto", "kto_kl_at_0"])
def test_kto_matches_trl(case: str) -> None:
    kwargs = dict(CASES[case]["kwargs"])
    sign = kwargs.pop("kl_sign")
    with jax.enable_x64(True):
        data = inputs(True)
        estimate = sign * (data["kl_logp"] - data["kl_ref_logp"])
        kl = losses.kto_kl(estimate, jnp.zeros_like(estimate))
        loss, grad = jax.value_and_grad(
            lambda logp: losses.kto_loss(logp, data["ref_chosen_logp"], data["label"], kl, **kwargs)[0]
        )(data["policy_chosen_logp"])
    np.testing.assert_allclose(loss, PREFERENCE[f"{case}/value"], rtol=1e-12)
    np.testing.assert_allclose(grad, PREFERENCE[f"{case}/grad"], rtol=1e-12)


@pytest.mark.parametrize("case", ["reward", "reward_margin"])
def test_bradley_terry_matches_trl(case: str) -> None:
    kwargs = dict(CASES[case]["kwargs"])
    with jax.enable_x64(True):
        data = inputs(True)
        kwargs |= {"margin": data["margin"]} if "margin" in kwargs else {}
        loss, grad = jax.value_and_grad(
            lambda rewards: losses.bradley_terry_loss(*jnp.split(rewards, 2), **kwargs)[0]
        )(jnp.concatenate([data[name] for name in POLICY]))
    np.testing.assert_allclose(loss, PREFERENCE[f"{case}/value"], rtol=1e-12)
    np.testing.assert_allclose(grad, PREFERENCE[f"{case}/grad"], rtol=1e-11)


@pytest.mark.parametrize("case", ["dpo_ld", "dpo_weighted"])
def test_token_level_modifiers_match_trl(case: str) -> None:
    with jax.enable_x64(True):
        data = inputs(True)
        mask, shared = data["token_mask"], jnp.minimum(data["chosen_length"], data["rejected_length"])

        def value(tokens: Any) -> Any:
            if case == "dpo_ld":
                logps = [
                    losses.length_desensitized_logp(x, m, shared, alpha=0.3)
                    for x, m in zip(tokens, mask, strict=True)
                ]
                weights = None
            else:
                logps = jnp.sum(tokens * mask, axis=-1)
                weights = jnp.prod(jax.vmap(losses.wpo_weight)(tokens, data["log_collision"], mask), axis=0)
            pairs = losses.PairLogps(*logps, *(data[name] for name in REF))
            return losses.dpo_loss(pairs, beta=0.1, weights=weights)[0]

        loss, grad = jax.value_and_grad(value)(data["token_logp"])
    expected = PREFERENCE[f"{case}/token_grad"].reshape(2, 7, 8) * np.asarray(mask)
    np.testing.assert_allclose(loss, PREFERENCE[f"{case}/value"], rtol=1e-12)
    np.testing.assert_allclose(grad, expected, rtol=1e-11, atol=1e-15)


def distillation_losses(name: str, student: Any, teacher: Any, mask: Any, tokens: Any) -> Any:
    if name.startswith("top_k_"):
        top = jnp.argsort(-student, axis=-1)[..., :3]
        tops = (jnp.take_along_axis(x, top, axis=-1) for x in (student, teacher))
        student, teacher = losses.top_k_distributions(*tops, mask)
        return loss_named(name.removeprefix("top_k_"))(student, teacher, mask)
    if name == "sampled_reverse_kl_loss":
        student, teacher = (
            jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in (student, teacher)
        )
    kwargs = {"beta": 0.3} if name == "generalised_js_loss" else {}
    return loss_named(name)(student, teacher, mask, **kwargs)


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in DISTILLATION if "/" in key}))
def test_distillation_losses_match_trl(name: str) -> None:
    with jax.enable_x64(True):
        data = {key: jnp.asarray(value) for key, value in DISTILLATION.items()}
        teacher = jax.nn.log_softmax(data["teacher_logits"])

        def value(logits: Any) -> Any:
            student = jax.nn.log_softmax(logits)
            return distillation_losses(name, student, teacher, data["mask"], data["tokens"])[0]

        loss, grad = jax.value_and_grad(value)(data["student_logits"])
    # TRL's sampled loss is a surrogate: only its gradient means something.
    if name != "sampled_reverse_kl_loss":
        np.testing.assert_allclose(loss, DISTILLATION[f"{name}/value"], rtol=1e-12)
    np.testing.assert_allclose(grad, DISTILLATION[f"{name}/grad"], rtol=1e-10, atol=1e-14)
