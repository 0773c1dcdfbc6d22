"""Laws that every loss on [B, T] arrays obeys, checked on all of them at once.

One compiled program evaluates every loss, its gradients and its metrics, with the bounds, coefficients and
denominators as traced arguments. Hypothesis looks for inputs that break a law; the shape is always [4, 6],
so the program is compiled once, which is itself the last law. Losses on rows have theirs in
test_preference_laws.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tiers import few

from rlhf_jax.losses import (
    policy,
    policy_ratios,
    policy_surrogates,
    policy_weights,
    supervised,
    value,
)
from rlhf_jax.losses.reductions import (
    constant_length,
    packed_sequence_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)

B, T, N = 4, 6, 5
REDUCTIONS = {
    "token": token_mean,
    "sequence": sequence_mean,
    "constant": constant_length(10),
    "length": sequence_sum,
}
SCALARS = {"epsilon_low": 0.2, "epsilon_high": 0.28, "kl_coef": 0.1, "entropy_coef": 0.02, "dual_clip": 3.0}
ATOMS = np.linspace(-2, 2, N)


def grpo(reduce, **options):
    def loss(x, mask, s, denominator):
        return policy.grpo_loss(
            *(x[name] for name in ("logp", "old_logp", "ref_logp", "advantages")),
            mask,
            epsilon_low=s["epsilon_low"],
            epsilon_high=s["epsilon_high"],
            kl_coef=s["kl_coef"],
            entropy=x["entropy"],
            entropy_coef=s["entropy_coef"],
            reduce=REDUCTIONS[reduce],
            denominator=denominator,
            **options,
        )

    return loss, reduce


def weighted(x, mask, s, denominator):
    """Importance weights and the off-policy mask, multiplied."""
    weights = policy_weights.truncated_importance_weights(x["old_logp"], x["sampler_logp"], mask)
    weights *= policy_weights.masked_importance_weights(
        x["old_logp"], x["sampler_logp"], mask, ratio_fn=policy_ratios.sequence_total_log_ratio
    )
    weights *= policy_weights.off_policy_mask(
        x["logp"], x["sampler_logp"], x["advantages"], mask, threshold=s["epsilon_high"]
    )
    return grpo("token", weights=weights)[0](x, mask, s, denominator)


def held(x, mask, s, denominator):
    """A KL to the old policy on some of the tokens, which the batch has chosen."""
    chosen = mask & (x["sampler_logp"] > -1)
    options = {"old_kl_coef": s["kl_coef"], "old_kl_mask": chosen}
    return grpo("token", **options)[0](x, mask, s, denominator)


def plain(loss_fn, reduce, *names, **scalars):
    """A loss called with `x[name]` for each name, and with scalars taken from the traced ones."""

    def loss(x, mask, s, denominator):
        traced = {option: s[name] for option, name in scalars.items()}
        return loss_fn(
            *(x[name] for name in names), mask, reduce=REDUCTIONS[reduce], denominator=denominator, **traced
        )

    return loss, reduce


def hl_gauss(x, mask, s, denominator):
    edges = jnp.linspace(-2.5, 2.5, N + 1)
    target = value.gaussian_histogram(x["returns"], edges, sigma=s["epsilon_low"])
    return value.categorical_value_loss(
        x["logits"], target, jnp.asarray(ATOMS), mask, denominator=denominator
    )


def c51(x, mask, s, denominator):
    del s
    target = value.project_categorical(
        x["returns"][..., None], jnp.ones((B, T, 1)), jnp.asarray(ATOMS, x["returns"].dtype)
    )
    return value.categorical_value_loss(
        x["logits"], target, jnp.asarray(ATOMS), mask, denominator=denominator
    )


def conservative(x, mask, s, denominator):
    del s
    actions = jnp.where(x["returns"] > 0, 3, 1)
    return value.conservative_penalty(x["logits"], actions, mask, denominator=denominator)


CASES = {
    "reinforce": plain(policy.reinforce_loss, "constant", "logp", "old_logp", "advantages"),
    "ppo_clip": plain(
        policy.ppo_clip_loss,
        "token",
        "logp",
        "old_logp",
        "advantages",
        epsilon_low="epsilon_low",
        epsilon_high="epsilon_high",
        dual_clip="dual_clip",
    ),
    "ppo_penalty": plain(
        policy.ppo_penalty_loss, "sequence", "logp", "old_logp", "advantages", kl_coef="kl_coef"
    ),
    "grpo": grpo("sequence"),
    "grpo_kl_corrected": grpo("token", kl_ratio_correction=True),
    "gspo": grpo("sequence", ratio_fn=policy_ratios.sequence_log_ratio),
    "gspo_token": grpo("sequence", ratio_fn=policy_ratios.sequence_token_log_ratio),
    "luspo": grpo("length", ratio_fn=policy_ratios.sequence_log_ratio),
    "gmpo": grpo("sequence", surrogate_fn=policy_surrogates.geometric_mean_surrogate),
    "cispo": grpo("token", surrogate_fn=policy_surrogates.cispo_surrogate),
    "sapo": grpo("constant", surrogate_fn=policy_surrogates.sapo_surrogate),
    "vespo": grpo("token", surrogate_fn=policy_surrogates.vespo_surrogate),
    "unclipped": grpo("token", surrogate_fn=policy_surrogates.importance_surrogate),
    "gpg": grpo("token", surrogate_fn=policy_surrogates.log_likelihood_surrogate),
    "dppo_tv": grpo("constant", surrogate_fn=policy_surrogates.dppo_tv_surrogate),
    "dppo_kl": grpo("constant", surrogate_fn=policy_surrogates.dppo_kl_surrogate),
    "dro": grpo("length", surrogate_fn=policy_surrogates.dro_surrogate),
    "a_star_po": grpo("length", surrogate_fn=policy_surrogates.advantage_regression_surrogate),
    "held": (held, "token"),
    "weighted": (weighted, "token"),
    "squared": plain(value.squared_value_loss, "token", "values", "returns"),
    "clipped": plain(
        value.clipped_value_loss, "sequence", "values", "old_values", "returns", clip="epsilon_low"
    ),
    "huber": plain(value.huber_value_loss, "constant", "values", "returns", delta="epsilon_high"),
    "expectile": plain(value.expectile_value_loss, "sequence", "values", "returns", expectile="epsilon_low"),
    "conservative": (conservative, "token"),
    "advantage_weighted": plain(
        supervised.advantage_weighted_loss,
        "sequence",
        "logp",
        "advantages",
        inverse_temperature="epsilon_high",
        max_weight="dual_clip",
    ),
    "quantile": plain(value.quantile_value_loss, "token", "logits", "quantile_targets", delta="epsilon_high"),
    "c51": (c51, "token"),
    "hl_gauss": (hl_gauss, "token"),
}
LEARNT = ("logp", "entropy", "values", "logits")


@jax.jit
def evaluate(x, mask, scalars, totals):
    """{case: (loss, metrics, gradients by every array, zero for those that carry none)}."""
    results = {}
    for name, (loss_fn, reduction) in CASES.items():

        def of_inputs(inputs, loss_fn=loss_fn, reduction=reduction):
            return loss_fn(inputs, mask, scalars, totals[reduction])

        (loss, metrics), grads = jax.value_and_grad(of_inputs, has_aux=True)(x)
        results[name] = (loss, metrics, grads)
    return results


def draw_inputs(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(7, B, T))
    return {
        "logp": scale * rows[0] - 1,
        "old_logp": scale * (rows[0] + 0.4 * rows[1]) - 1,
        "ref_logp": scale * (rows[0] + 0.4 * rows[2]) - 1,
        "sampler_logp": scale * (rows[0] + 0.3 * rows[3]) - 1,
        "entropy": np.abs(rows[4]),
        "advantages": rng.normal(size=(B, 1)) * np.ones((B, T)),
        "values": scale * rows[5],
        "old_values": scale * (rows[5] + 0.3 * rows[1]),
        "returns": scale * rows[6],
        "logits": scale * rng.normal(size=(B, T, N)),
        "quantile_targets": scale * rng.normal(size=(B, T, 3)),
    }


def totals_of(mask):
    return {name: reduction.total(jnp.asarray(mask)) for name, reduction in REDUCTIONS.items()}


def run(x, mask, totals=None, scalars=SCALARS):
    arrays = {name: jnp.asarray(values, jnp.float32) for name, values in x.items()}
    scalars = {name: jnp.float32(s) for name, s in scalars.items()}
    results = evaluate(arrays, jnp.asarray(mask), scalars, totals_of(mask) if totals is None else totals)
    return jax.tree.map(np.asarray, results)


def assert_same(found, expected, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-6} | tolerance
    for name in CASES:
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, err_msg=name, **tolerance),
            found[name],
            expected[name],
        )


laws = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**16)
masks = st.lists(st.booleans(), min_size=B * T, max_size=B * T).map(lambda bits: np.reshape(bits, (B, T)))


@laws
@given(seed=seeds, mask=masks, dirt=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_masked_entries_may_hold_anything(seed, mask, dirt):
    x = draw_inputs(seed)
    dirty = {n: np.where(mask.reshape(mask.shape + (1,) * (a.ndim - 2)), a, dirt) for n, a in x.items()}
    found, expected = run(dirty, mask), run(x, mask)
    assert_same(found, expected, rtol=0, atol=0)
    for name, (loss, metrics, grads) in found.items():
        assert np.isfinite(loss), name
        assert all(np.isfinite(m) for m in metrics.values()), name
        for grad in grads.values():
            np.testing.assert_array_equal(grad[~mask], 0, err_msg=name)


@laws
@given(seed=seeds, mask=masks, order=st.permutations(range(B)))
def test_order_of_rows_does_not_matter(seed, mask, order):
    x, order = draw_inputs(seed), list(order)
    straight = run(x, mask)
    permuted = run({n: a[order] for n, a in x.items()}, mask[order])
    expected = {
        name: (loss, metrics, {n: g[order] for n, g in grads.items()})
        for name, (loss, metrics, grads) in straight.items()
    }
    assert_same(permuted, expected)


@laws
@given(seed=seeds, mask=masks, part=st.lists(st.integers(0, 2), min_size=B, max_size=B))
def test_micro_batches_sum_to_the_batch(seed, mask, part):
    """Loss, every metric and every gradient, given the denominator of the whole."""
    x, whole = draw_inputs(seed), totals_of(mask)
    parts = [run(x, mask & (np.array(part) == p)[:, None], whole) for p in range(3)]
    assert_same(jax.tree.map(lambda *a: sum(a), *parts), run(x, mask, whole))


@laws
@given(seed=seeds, columns=st.permutations(range(T)), length=st.integers(1, T))
def test_padding_does_not_matter(seed, columns, length):
    """The same tokens at the front of the row, or anywhere in it, in order, among masked entries."""
    x, places = draw_inputs(seed), sorted(columns[:length])
    front, spread = np.zeros((2, B, T), bool)
    front[:, :length] = spread[:, places] = True
    moved = {n: np.full_like(a, np.nan) for n, a in x.items()}
    for n in x:
        moved[n][:, places] = x[n][:, :length]
    at_front, spread_out = run(x, front), run(moved, spread)
    expected = {
        name: (loss, metrics, {n: relocated(g, length, places) for n, g in grads.items()})
        for name, (loss, metrics, grads) in at_front.items()
    }
    assert_same(spread_out, expected)


def relocated(values, length, places):
    result = np.zeros_like(values)
    result[:, places] = values[:, :length]
    return result


@laws
@given(seed=seeds, mask=masks, size=st.sampled_from([50.0, 1e4]))
def test_extremes_stay_finite(seed, mask, size):
    x = draw_inputs(seed, scale=size)
    signs = np.sign(np.random.default_rng(seed).normal(size=(B, T)))
    x |= {"logp": size * signs, "old_logp": -size * signs, "ref_logp": -size * signs}
    for name, (loss, metrics, grads) in run(x, mask).items():
        assert np.isfinite(loss), name
        assert all(np.isfinite(m) for m in metrics.values()), name
        assert all(np.isfinite(g).all() for g in grads.values()), name


@laws
@given(seed=seeds, mask=masks)
def test_only_what_is_learnt_carries_gradient(seed, mask):
    for name, (_, _, grads) in run(draw_inputs(seed), mask).items():
        for array, grad in grads.items():
            assert array in LEARNT or not grad.any(), (name, array)


def test_changing_scalars_changes_the_losses_but_not_the_program():
    x, mask = draw_inputs(0, scale=5.0), np.ones((B, T), bool)
    x["advantages"] = np.resize([1.0, -1.0], (B, T))
    losses = run(x, mask)
    for name in SCALARS:
        changed = run(x, mask, scalars=SCALARS | {name: 0.5 * SCALARS[name]})
        assert any(changed[case][0] != losses[case][0] for case in CASES), name
    assert evaluate._cache_size() == 1


def test_bounds_and_coefficients_may_be_vmapped():
    x = {n: jnp.asarray(a, jnp.float32) for n, a in draw_inputs(1).items()}
    mask = jnp.ones((B, T), bool)
    loss_fn, _ = CASES["grpo"]

    def loss(scale):
        return loss_fn(x, mask, {name: scale * s for name, s in SCALARS.items()}, None)[0]

    several = jax.vmap(loss)(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(several, [loss(0.5), loss(1.0)], rtol=1e-5)


def test_bfloat16_is_computed_in_float32():
    """The same numbers as float32 copies of the rounded inputs; gradients come back in bfloat16."""
    mask = np.random.default_rng(3).random((B, T)) > 0.2
    half = {n: jnp.asarray(a, jnp.bfloat16) for n, a in draw_inputs(2).items()}
    wide = {n: np.asarray(a, np.float32) for n, a in half.items()}
    scalars = {name: jnp.float32(s) for name, s in SCALARS.items()}
    in_half = jax.jit(evaluate.__wrapped__)  # a program of its own: `evaluate` is to be compiled once
    found = jax.tree.map(np.asarray, in_half(half, jnp.asarray(mask), scalars, totals_of(mask)))
    expected = run(wide, mask)
    for name in CASES:
        loss, metrics, grads = found[name]
        assert loss.dtype == np.float32, name
        np.testing.assert_allclose(loss, expected[name][0], rtol=2e-5, atol=2e-6, err_msg=name)
        for metric, result in metrics.items():
            np.testing.assert_allclose(result, expected[name][1][metric], rtol=2e-5, atol=2e-6)
        for array, grad in grads.items():
            assert grad.dtype == jnp.bfloat16
            np.testing.assert_allclose(
                grad.astype(np.float32), expected[name][2][array], rtol=1e-2, atol=1e-5, err_msg=name
            )


# Packing: the same sequences alone in their rows, and several to a row ----------------------------------

LENGTHS = (3, 2, 1, 4)
ROW, START, SEGMENT = (0, 0, 0, 1), (0, 3, 5, 0), (1, 2, 3, 1)


def packed(values, fill):
    result = np.full((2, T), fill, values.dtype)
    for b, length in enumerate(LENGTHS):
        result[ROW[b], START[b] : START[b] + length] = values[b, :length]
    return result


def packed_cases(segment_ids):
    """Every part that knows of sequences, told where they are (None: a row each)."""
    of_sequences = {"segment_ids": segment_ids}
    known = {
        "grpo": {},
        "gspo": {"ratio_fn": functools.partial(policy_ratios.sequence_log_ratio, **of_sequences)},
        "gspo_token": {"ratio_fn": functools.partial(policy_ratios.sequence_token_log_ratio, **of_sequences)},
        "gmpo": {
            "surrogate_fn": functools.partial(policy_surrogates.geometric_mean_surrogate, **of_sequences)
        },
        "vespo": {"surrogate_fn": functools.partial(policy_surrogates.vespo_surrogate, **of_sequences)},
        "dro": {"surrogate_fn": functools.partial(policy_surrogates.dro_surrogate, **of_sequences)},
        "a_star_po": {
            "surrogate_fn": functools.partial(
                policy_surrogates.advantage_regression_surrogate, **of_sequences
            )
        },
    }
    reduce = sequence_mean if segment_ids is None else packed_sequence_mean(segment_ids, 3)

    def evaluate_all(x, mask):
        def loss(logp, options):
            arrays = (x["old_logp"], x["ref_logp"], x["advantages"])
            weights = policy_weights.off_policy_mask(
                logp, x["sampler_logp"], x["advantages"], mask, threshold=0.1, **of_sequences
            )
            return policy.grpo_loss(
                logp, *arrays, mask, kl_coef=0.1, weights=weights, reduce=reduce, **options
            )

        return {
            name: jax.value_and_grad(functools.partial(loss, options=options), has_aux=True)(x["logp"])
            for name, options in known.items()
        }

    return jax.jit(evaluate_all)


@pytest.mark.parametrize("seed", few([0, 1], 0))
def test_packing_does_not_matter(seed):
    x = {n: a for n, a in draw_inputs(seed).items() if a.ndim == 2}
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    mask[0, 1] = False
    segments = packed(np.repeat(np.array(SEGMENT)[:, None], T, axis=1), 0)
    with jax.enable_x64(True):
        alone = packed_cases(None)(x, mask)
        together = packed_cases(jnp.asarray(segments))(
            {n: packed(a, np.nan) for n, a in x.items()}, packed(mask, False)
        )
    for name in alone:
        (loss, metrics), grad = alone[name]
        (packed_loss, packed_metrics), packed_grad = together[name]
        np.testing.assert_allclose(packed_loss, loss, rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(packed_grad, packed(np.asarray(grad), 0.0), rtol=0, atol=1e-12)
        for metric, result in metrics.items():
            np.testing.assert_allclose(packed_metrics[metric], result, rtol=0, atol=1e-12, err_msg=metric)
