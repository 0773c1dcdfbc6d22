"""What each preference loss is at special points, and the modifiers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax import losses
from rlhf_jax.core.errors import UserError
from rlhf_jax.losses import PairLogps

ZEROS = jnp.zeros(3)
LOG2 = math.log(2)
AT_EQUALITY = {
    losses.dpo_loss: LOG2,
    losses.robust_dpo_loss: LOG2,
    losses.hinge_loss: 1.0,
    losses.nca_loss: 2 * LOG2,
    losses.bco_pair_loss: 2 * LOG2,
    losses.sppo_loss: 2 * (1 / (2 * 0.1)) ** 2,
    losses.aot_loss: LOG2,
    losses.aot_unpaired_loss: LOG2,
    losses.apo_zero_loss: 1.0,
    losses.apo_down_loss: 1.0,
    losses.discopop_loss: 0.5 * LOG2 + 0.5,
}


def random_pairs(seed: int = 0, count: int = 5) -> list[jax.Array]:
    return [jnp.asarray(x) for x in np.random.default_rng(seed).normal(-5, 2, (4, count))]


@pytest.mark.parametrize("loss", AT_EQUALITY, ids=lambda loss: loss.__name__)
def test_value_where_policy_equals_reference(loss) -> None:
    policy = random_pairs()[:2]
    value, metrics = loss(PairLogps(*policy, *policy), beta=0.1)
    assert float(value) == pytest.approx(AT_EQUALITY[loss], rel=1e-6)
    assert float(metrics["margin"]) == 0
    assert float(metrics["accuracy"]) == 0


def test_metrics_of_dpo() -> None:
    chosen, rejected = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.0, 0.0, 4.0])
    loss, metrics = losses.dpo_loss(PairLogps(chosen, rejected, ZEROS, ZEROS), beta=0.5)
    margins = 0.5 * np.array([1.0, -2.0, -1.0])
    assert float(loss) == pytest.approx(np.mean(np.log1p(np.exp(-margins))), rel=1e-6)
    assert float(metrics["chosen_reward"]) == pytest.approx(0.5 * 2 / 3)
    assert float(metrics["rejected_reward"]) == pytest.approx(0.5 * 4 / 3)
    assert float(metrics["margin"]) == pytest.approx(margins.mean())
    assert float(metrics["accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["gradient_coefficient"]) == pytest.approx(
        np.mean(1 / (1 + np.exp(margins))), rel=1e-6
    )


def test_gradient_coefficient_is_the_gradient_over_beta() -> None:
    pairs = random_pairs()
    grad = jax.grad(lambda chosen: losses.dpo_loss(PairLogps(chosen, *pairs[1:]), beta=0.3)[0])(pairs[0])
    coefficient = losses.dpo_loss(PairLogps(*pairs), beta=0.3)[1]["gradient_coefficient"]
    assert float(-jnp.sum(grad) / 0.3) == pytest.approx(float(coefficient), rel=1e-5)


def test_robust_dpo_is_unbiased_under_flips() -> None:
    pairs, flip = random_pairs(), 0.2
    swapped = [pairs[1], pairs[0], pairs[3], pairs[2]]
    robust = functools.partial(losses.robust_dpo_loss, label_smoothing=flip)
    expected = (1 - flip) * robust(PairLogps(*pairs))[0] + flip * robust(PairLogps(*swapped))[0]
    assert float(expected) == pytest.approx(float(losses.dpo_loss(PairLogps(*pairs))[0]), rel=1e-5)


def test_exo_vanishes_where_the_preferences_are_the_labels() -> None:
    smoothing, beta = 0.1, 0.5
    margin = math.log((1 - smoothing) / smoothing) / beta
    pairs = PairLogps(ZEROS + margin, ZEROS, ZEROS, ZEROS)
    loss, _ = losses.exo_loss(pairs, beta=beta, label_smoothing=smoothing)
    assert float(loss) == pytest.approx(0, abs=1e-6)


def test_ipo_vanishes_at_its_margin() -> None:
    length = jnp.array([4, 2, 5])
    chosen = length * (1 / (2 * 0.1))
    assert float(
        losses.ipo_loss(PairLogps(chosen, ZEROS, ZEROS, ZEROS, length, length), beta=0.1)[0]
    ) == pytest.approx(0, abs=1e-10)


def test_aot_is_dpo_where_the_orders_agree() -> None:
    ordered = [jnp.sort(x) for x in random_pairs()]
    chosen, _, ref, _ = ordered
    zeros = jnp.zeros_like(chosen)
    pairs = PairLogps(chosen, zeros, ref, zeros)
    aot = losses.aot_loss(pairs, beta=0.3)[0]
    assert float(aot) == pytest.approx(float(losses.dpo_loss(pairs, beta=0.3)[0]), rel=1e-6)


def test_alpha_po_tends_to_simpo() -> None:
    chosen, rejected = random_pairs()[:2]
    length = jnp.full(5, 4)
    pairs = PairLogps(chosen, rejected, chosen_length=length, rejected_length=length)
    simpo = losses.simpo_loss(pairs)[0]
    for alpha, tolerance in ((0.0, 1e-7), (1e-3, 1e-2)):
        alpha_po = losses.alpha_po_loss(pairs, alpha=alpha)[0]
        assert float(alpha_po) == pytest.approx(float(simpo), rel=tolerance)


def test_cpo_is_dpo_with_a_uniform_reference() -> None:
    chosen, rejected = random_pairs()[:2]
    uniform = jnp.full(5, -7.0)
    cpo = losses.cpo_loss(PairLogps(chosen, rejected), nll_weight=0.0)[0]
    assert float(cpo) == pytest.approx(
        float(losses.dpo_loss(PairLogps(chosen, rejected, uniform, uniform))[0]), rel=1e-6
    )


def test_orpo_keeps_its_digits_at_both_ends() -> None:
    one = jnp.ones(1, int)
    for chosen in (-1e-5, -1e-3, -0.69, -0.7, -50.0):
        pairs = PairLogps(jnp.array([chosen]), jnp.array([-1.0]), chosen_length=one, rejected_length=one)
        _, metrics = losses.orpo_loss(pairs)
        log_odds = [x - math.log(-math.expm1(x)) for x in (float(np.float32(chosen)), -1.0)]
        assert float(metrics["log_odds_ratio"]) == pytest.approx(log_odds[0] - log_odds[1], rel=1e-5)


def test_discopop_is_right_where_its_factors_overflow() -> None:
    # At b D = -200 the mixing weight is exp(-4000) and the exponential exp(200): their product is 0.
    loss, _ = losses.discopop_loss(PairLogps(ZEROS - 2000.0, ZEROS, ZEROS, ZEROS), beta=0.1)
    assert float(loss) == pytest.approx(200.0, rel=1e-6)


def test_kto_kl_is_cut_off_at_zero_and_has_no_gradient() -> None:
    policy = jnp.array([-1.0, -2.0, jnp.nan])
    mask = jnp.array([True, True, False])
    assert float(losses.kto_kl(policy, policy - 0.5, mask=mask)) == pytest.approx(0.5)
    assert float(losses.kto_kl(policy, policy + 0.5, mask=mask)) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: losses.kto_kl(x, policy - 0.5, mask=mask))(policy), 0)


def test_reference_points_of_unpaired_losses_have_no_gradient() -> None:
    policy, desirable = jnp.array([1.0, 2.0, -3.0]), jnp.array([True, True, False])
    assert float(jax.grad(lambda kl: losses.kto_loss(policy, ZEROS, desirable, kl)[0])(0.5)) == 0
    assert float(jax.grad(lambda shift: losses.bco_loss(policy, ZEROS, desirable, shift=shift)[0])(0.5)) == 0
    shifted = losses.bco_loss(policy, ZEROS, desirable, shift=0.5)[0]
    assert float(shifted) != float(losses.bco_loss(policy, ZEROS, desirable, shift=0.0)[0])


def test_unpaired_metrics_give_the_means_of_each_class() -> None:
    policy, desirable = jnp.array([1.0, 2.0, -3.0]), jnp.array([True, True, False])
    _, metrics = losses.bco_loss(policy, ZEROS, desirable, shift=0.0, beta=1.0)
    assert float(metrics["reward"]) == pytest.approx(0.0, abs=1e-7)
    assert float(metrics["chosen_reward"] / metrics["desirable_fraction"]) == pytest.approx(1.5)
    assert float(metrics["rejected_reward"] / (1 - metrics["desirable_fraction"])) == pytest.approx(-3.0)


def test_nash_md_gradient_is_the_regularised_score() -> None:
    policy, ref = jnp.array([-3.0, -4.0, jnp.nan]), jnp.array([-3.5, -2.0, 0.0])
    preference, mask = jnp.array([0.9, 0.2, 0.5]), jnp.array([True, True, False])

    def value(logp):
        return losses.nash_md_loss(logp, ref, preference, beta=0.1, mask=mask)

    grad, metrics = jax.grad(value, has_aux=True)(policy)
    expected = [-(0.9 - 0.5 - 0.1 * 0.5) / 2, -(0.2 - 0.5 - 0.1 * -2.0) / 2, 0]
    np.testing.assert_allclose(grad, expected, rtol=1e-6)
    assert float(metrics["kl"]) == pytest.approx((0.5 - 2.0) / 2)
    assert float(metrics["preference"]) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("score", "derivative"),
    [
        (losses.forward_kl_score, lambda u: 1 - 1 / u),
        (losses.js_score, lambda u: math.log(2 * u / (1 + u))),
        (functools.partial(losses.alpha_divergence_score, alpha=0.4), lambda u: (1 - u**-0.4) / 0.4),
        (functools.partial(losses.alpha_divergence_score, alpha=0.0), math.log),
        (functools.partial(losses.alpha_divergence_score, alpha=1.0), lambda u: 1 - 1 / u),
    ],
    ids=["forward_kl", "js", "alpha_0.4", "alpha_0", "alpha_1"],
)
def test_divergence_scores(score, derivative) -> None:
    log_ratios = np.array([-4.0, -0.5, 0.0, 0.3, 5.0])
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            score(jnp.asarray(log_ratios)), [derivative(math.exp(x)) for x in log_ratios], atol=1e-12
        )
        check_grads(score, (jnp.asarray(log_ratios),), order=1, modes=["rev"])
    extremes = jnp.array([-1e4, -100.0, 100.0, 1e4], jnp.float32)
    values, slopes = score(extremes), jax.vmap(jax.grad(lambda x: score(x[None])[0]))(extremes)
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    assert (np.diff(values) >= 0).all()
    assert (slopes[:2] > 0).all()


def test_wpo_weight_is_the_geometric_mean_of_aligned_probabilities() -> None:
    probabilities = jnp.array([[0.5, 0.2, 0.3], [0.7, 0.2, 0.1]])
    tokens, mask = jnp.array([[0, 2, 0]]), jnp.array([[True, True, False]])
    logp = jnp.log(probabilities[jnp.array([[0, 1, 1]]), tokens]).at[0, 2].set(jnp.nan)
    collision = jnp.log(jnp.sum(probabilities**2, axis=-1))[jnp.array([[0, 1, 1]])]
    expected = math.sqrt(0.5 / 0.38 * 0.1 / 0.54)
    assert float(losses.wpo_weight(logp, collision, mask)[0]) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda x: losses.wpo_weight(x, collision, mask)[0])(logp), 0)


def test_length_desensitized_logp_discounts_the_tail() -> None:
    logp = jnp.array([[jnp.nan, -1.0, -2.0, -4.0, -8.0]])
    mask = jnp.array([[False, True, True, False, True]])
    value, grad = jax.value_and_grad(
        lambda x: losses.length_desensitized_logp(x, mask, jnp.array([2]), alpha=0.25)[0]
    )(logp)
    assert float(value) == -1 - 2 - 0.25 * 8
    np.testing.assert_array_equal(grad, [[0, 1, 1, 0, 0.25]])
    plain = losses.length_desensitized_logp(logp, mask, jnp.array([1]), alpha=1.0)
    assert float(plain[0]) == -11


def test_weighted_sum_adds_losses_and_keeps_their_metrics() -> None:
    pairs = PairLogps(*random_pairs())
    parts = {"dpo": losses.dpo_loss(pairs), "bco": losses.bco_pair_loss(pairs)}
    loss, metrics = losses.weighted_sum(parts, {"bco": 0.5, "dpo": 2.0})
    assert float(loss) == pytest.approx(float(2 * parts["dpo"][0] + 0.5 * parts["bco"][0]), rel=1e-6)
    assert float(metrics["bco/accuracy"]) == float(parts["bco"][1]["accuracy"])
    assert float(metrics["loss"]) == float(loss)
    with pytest.raises(UserError, match="same names"):
        losses.weighted_sum(parts, {"dpo": 1.0})


def test_no_valid_pair_gives_zero_and_no_gradient() -> None:
    nan, mask = jnp.full(3, jnp.nan), jnp.zeros(3, bool)
    loss, grad = jax.value_and_grad(lambda x: losses.dpo_loss(PairLogps(x, nan, nan, nan), mask=mask)[0])(nan)
    assert float(loss) == 0
    np.testing.assert_array_equal(grad, 0)
