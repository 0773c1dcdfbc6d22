"""Cross-entropy on token log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import losses

LOGP = -np.random.default_rng(0).gamma(1.0, 1.0, (4, 6))
MASK = np.arange(6) < np.array([6, 2, 0, 5])[:, None]
REDUCTIONS = {
    "token": losses.token_mean,
    "sequence": losses.sequence_mean,
    "constant": losses.constant_length(6),
}


def naive(reduction: str) -> float:
    rows = [-LOGP[i][MASK[i]] for i in range(4) if MASK[i].any()]
    total = sum(row.sum() for row in rows)
    if reduction == "sequence":
        return float(np.mean([row.mean() for row in rows]))
    return float(total / (MASK.sum() if reduction == "token" else 6 * len(rows)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_gradient(reduction: str) -> None:
    with jax.enable_x64(True):
        poisoned, mask = jnp.asarray(np.where(MASK, LOGP, -np.inf)), jnp.asarray(MASK)

        def value(logp):
            return losses.cross_entropy_loss(logp, mask, reduce=REDUCTIONS[reduction])

        (loss, metrics), grad = jax.value_and_grad(value, has_aux=True)(poisoned)
    assert float(loss) == pytest.approx(naive(reduction), rel=1e-12)
    assert float(metrics["loss"]) == float(loss)
    np.testing.assert_array_equal(grad[~MASK], 0)
    # The loss is linear in the log-probabilities it counts.
    assert float(np.sum(np.asarray(grad)[MASK] * LOGP[MASK])) == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_and_bfloat16(reduction: str) -> None:
    logp, mask, reduce = jnp.asarray(LOGP, jnp.bfloat16), jnp.asarray(MASK), REDUCTIONS[reduction]
    loss, _ = losses.cross_entropy_loss(logp, mask, reduce=reduce)
    parts = [
        losses.cross_entropy_loss(
            logp[i : i + 2], mask[i : i + 2], reduce=reduce, denominator=reduce.total(mask)
        )[0]
        for i in (0, 2)
    ]
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-6)
    assert float(loss) == pytest.approx(naive(reduction), rel=1e-2)


def test_advantage_weights_match_a_loop_and_vanish_at_zero() -> None:
    advantages = np.random.default_rng(1).normal(size=LOGP.shape) * 3
    weights = np.minimum(np.exp(2.0 * advantages), 20.0)
    with jax.enable_x64(True):
        poisoned = [jnp.asarray(np.where(MASK, x, np.nan)) for x in (LOGP, advantages)]
        loss, metrics = losses.advantage_weighted_loss(
            *poisoned, jnp.asarray(MASK), inverse_temperature=2.0, max_weight=20.0
        )
        cloned, _ = losses.advantage_weighted_loss(*poisoned, jnp.asarray(MASK), inverse_temperature=0.0)
    assert float(loss) == pytest.approx(-(weights * LOGP)[MASK].mean(), rel=1e-12)
    assert float(metrics["weight"]) == pytest.approx(weights[MASK].mean(), rel=1e-12)
    assert float(cloned) == pytest.approx(naive("token"), rel=1e-12)
