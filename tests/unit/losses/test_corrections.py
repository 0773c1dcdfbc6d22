"""Corrections: weights, acceptance rules, their product, presets, and what is measured before they act."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.losses import corrections
from rlhf_jax.losses.policy_weights import second_moment_mask

B, T = 6, 5
ESTIMATORS = {"k1": lambda x: -x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(x) - 1 - x}
LEVELS = {"token": None, "seq_sum": sum, "seq_mean": lambda row: sum(row) / len(row), "seq_max": max}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(seed=0, scale=0.4):
    """(old log-probs, the sampler's, mask): answers of one to T tokens, and one row without any."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) > 0.3
    mask[:, 0], mask[2] = True, False
    old = rng.normal(size=(B, T)) - 1
    return old, old - scale * rng.normal(size=(B, T)), mask


def arrays(old, sampler, mask):
    """What the functions get: NaN wherever nothing counts."""
    dirty = (jnp.asarray(np.where(mask, x, np.nan)) for x in (old, sampler))
    return (*dirty, jnp.asarray(mask))


def naive_statistic(name, old, sampler, mask):
    """One number for each token, in loops."""
    level, estimator = name.rsplit("_", 1)
    found = np.zeros((B, T))
    for b in range(B):
        row = {t: ESTIMATORS[estimator](old[b, t] - sampler[b, t]) for t in range(T) if mask[b, t]}
        for t in row:
            found[b, t] = row[t] if LEVELS[level] is None else LEVELS[level](list(row.values()))
    return found


def naive_rule(name, old, sampler, mask, low, high):
    statistic = naive_statistic(name, old, sampler, mask)
    if name.endswith("k1"):
        return mask & (math.log(low) <= statistic) & (statistic <= math.log(high))
    return mask & (statistic <= high)


def naive_weight(name, old, sampler, mask, low, high):
    level, kind = name.split("_")
    found = np.zeros((B, T))
    for b, t in zip(*np.nonzero(mask), strict=True):
        row = [old[b, s] - sampler[b, s] for s in range(T) if mask[b, s]]
        log_ratio = {"token": old[b, t] - sampler[b, t], "sequence": sum(row), "geometric": np.mean(row)}
        ratio = math.exp(log_ratio[level])
        clipped = min(max(ratio, low), high)
        found[b, t] = clipped if kind == "truncate" or clipped == ratio else 0
    return found


# Rules and weights -----------------------------------------------------------------------------------


def test_rules_have_the_names_of_verl_s():
    levels = {"token": 3, "seq_sum": 3, "seq_mean": 3, "seq_max": 2}
    expected = [f"{level}_k{k}" for level, count in levels.items() for k in range(4 - count, 4)]
    assert list(corrections.RULES) == expected


@pytest.mark.parametrize("name", corrections.RULES)
def test_rules_are_those_of_naive_loops(name):
    case = draw()
    statistic = naive_statistic(name, *case)[case[2]]
    # Thresholds between values, so that something passes and something does not.
    low, high = (
        np.exp(np.quantile(statistic, [0.2, 0.7])) if name.endswith("k1") else (0, np.median(statistic))
    )
    found = corrections.RULES[name](*arrays(*case), low=low, high=high)
    np.testing.assert_array_equal(found, naive_rule(name, *case, low, high))
    assert 0 < np.sum(found) < np.sum(case[2])


@pytest.mark.parametrize("name", corrections.WEIGHTS)
def test_weights_are_those_of_naive_loops(name):
    case = draw()
    found = corrections.WEIGHTS[name](*arrays(*case), low=0.8, high=1.2)
    expected = naive_weight(name, *case, 0.8, 1.2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    outside = naive_weight(name, *case, 0, np.inf) != expected
    assert 0 < outside.sum() < case[2].sum()  # some are bound, some are not


@pytest.mark.slow
def test_packed_rows_are_those_of_the_same_sequences_alone():
    """Two sequences to a row against one to a row, through every rule and every measure."""
    rng = np.random.default_rng(1)
    old, mask = rng.normal(size=(4, 3)), np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1]], bool)
    sampler = old + 0.3 * rng.normal(size=old.shape)
    ids = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 2]], 2, axis=0))
    alone = [jnp.asarray(x) for x in (old, sampler, mask)]
    packed = [x.reshape(2, 6) for x in alone]
    for name, rule in corrections.RULES.items():
        low, high = (0.9, 1.1) if name.endswith("k1") else (0, 0.02)
        bounds = {"low": low, "high": high}
        found = rule(*packed, segment_ids=ids, **bounds)
        np.testing.assert_array_equal(found.reshape(4, 3), rule(*alone, **bounds), err_msg=name)
    one, other = corrections.off_policy_metrics(*packed, ids), corrections.off_policy_metrics(*alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), one, other)


# Products --------------------------------------------------------------------------------------------


def test_a_product_of_rules_has_a_threshold_each():
    case = draw()
    rules = ("token_k1", "seq_max_k2")
    correction = corrections.Correction(
        corrections.WEIGHTS["token_truncate"], tuple(corrections.RULES[name] for name in rules)
    )
    weights, accepted, metrics = corrections.apply_correction(
        correction,
        *arrays(*case),
        is_clip_high=1.1,
        rejection_low=jnp.array([0.7, 0.0]),
        rejection_high=jnp.array([1.5, 0.3]),
    )
    expected = naive_rule("token_k1", *case, 0.7, 1.5) & naive_rule("seq_max_k2", *case, 0, 0.3)
    assert 0 < expected.sum() < naive_rule("token_k1", *case, 0.7, 1.5).sum()
    np.testing.assert_array_equal(accepted, expected)
    np.testing.assert_allclose(weights, naive_weight("token_truncate", *case, 0, 1.1), atol=1e-12)
    np.testing.assert_allclose(metrics["rejected"], 1 - expected.sum() / case[2].sum())
    np.testing.assert_allclose(metrics["is_ratio"], np.asarray(weights)[expected].mean())


def test_thresholds_are_traced_and_may_be_swept():
    correction = corrections.find_correction("seq_is_rs").correction
    case = arrays(*draw())

    @jax.jit
    def kept(high):
        bounds = {"is_clip_high": high, "rejection_low": 1 / high, "rejection_high": high}
        applied = corrections.apply_correction(correction, *case, **bounds)
        return jnp.sum(applied[0]), jnp.sum(applied[1])

    for high in (1.05, 3.0):
        weights, accepted = kept(high)
        together = jax.vmap(kept)(jnp.array([1.05, 3.0]))
        place = int(high == 3.0)
        np.testing.assert_allclose((together[0][place], together[1][place]), (weights, accepted))
    assert kept(1.05)[1] < kept(3.0)[1]
    assert kept._cache_size() == 1


# Numbers published: (weight, its bounds; rule, its bounds; whether the ratio is to the sampler).
GEO, K3 = ("seq_mean_k1", 0.999, 1.001), ("seq_mean_k3", 0.0, 0.01)
PUBLISHED = {
    "metrics": (None, None, False),
    "tis": (("token_truncate", 0, 2), None, False),
    "mis": (("token_mask", 0, 2), None, False),
    **{name: ((name, 0, 3), None, False) for name in ("token_truncate", "token_mask")},
    **{name: ((name, 0, 3), None, False) for name in ("sequence_truncate", "sequence_mask")},
    **{name: ((name, 0, 3), None, False) for name in ("geometric_truncate", "geometric_mask")},
    "icepop": (("token_mask", 0.5, 5), None, False),
    "seq_is": (("sequence_truncate", 0, 2), None, False),
    "seq_is_rs": (("sequence_truncate", 0, 2), ("seq_sum_k1", 0.5, 2), False),
    "geo_rs": (None, GEO, False),
    "geo_rs_token_tis": (("token_truncate", 0, 2), GEO, False),
    "geo_rs_seq_tis": (("sequence_truncate", 0, 2), GEO, False),
    "k3_rs": (None, K3, False),
    "k3_rs_token_tis": (("token_truncate", 0, 2), K3, False),
    "k3_rs_seq_tis": (("sequence_truncate", 0, 2), K3, False),
    "bypass": (None, None, True),
    "bypass_geo_rs": (None, GEO, True),
    "bypass_k3_rs": (None, K3, True),
}


def test_presets_are_all_here():
    assert corrections.PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_do_what_is_published(name):
    weight, rule, bypass = PUBLISHED[name]
    preset = corrections.find_correction(name)
    found = []
    for scale in (0.001, 0.8):  # some answers pass the narrow rules, some weights reach the bounds
        case = draw(scale=scale)
        weights, accepted, _ = corrections.apply_correction(
            preset.correction, *arrays(*case), **preset.thresholds
        )
        if weight is None:
            assert weights is None
        else:
            np.testing.assert_allclose(weights, naive_weight(weight[0], *case, *weight[1:]), atol=1e-12)
        np.testing.assert_array_equal(accepted, naive_rule(rule[0], *case, *rule[1:]) if rule else case[2])
        found.append(np.sum(accepted))
    assert preset.correction.bypass == bypass
    if rule:
        assert found[0] > found[1]


def test_rules_take_the_place_of_a_preset_s():
    other = corrections.find_correction("geo_rs_token_tis", ["token_k1", "seq_max_k3"]).correction
    assert other.rules == (corrections.RULES["token_k1"], corrections.RULES["seq_max_k3"])
    assert other.weight_fn is corrections.WEIGHTS["token_truncate"]
    with pytest.raises(UserError, match=r"correction 'tiss' is none of .*nearest name is tis"):
        corrections.find_correction("tiss")
    with pytest.raises(UserError, match=r"rule 'token_k4' is none of .*nearest name is token_k"):
        corrections.find_correction("tis", ["token_k4"])


# Measures --------------------------------------------------------------------------------------------


def test_measures_are_those_of_raw_ratios():
    old, sampler, mask = draw()
    found = corrections.off_policy_metrics(*arrays(old, sampler, mask))
    ratio = np.exp(old - sampler)[mask]
    rows = [(old - sampler)[b][mask[b]] for b in range(B) if mask[b].any()]
    answers = np.exp([row.sum() for row in rows])
    expected = {
        "ess": answers.sum() ** 2 / (len(answers) * (answers**2).sum()),
        "chi2_token": (ratio**2).mean() - 1,
        "chi2_sequence": (answers**2).mean() - 1,
        "perplexity_gap": -np.mean([row.mean() for row in rows]),
        "ratio_q01": np.quantile(ratio, 0.01),
        "ratio_q50": np.quantile(ratio, 0.5),
        "ratio_q99": np.quantile(ratio, 0.99),
    }
    assert found.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(found[name], number, rtol=1e-12, err_msg=name)
    truncating = corrections.find_correction("tis").correction
    _, _, metrics = corrections.apply_correction(truncating, *arrays(old, sampler, mask), is_clip_high=1.0)
    assert metrics["is_ratio"] < 1
    np.testing.assert_allclose(metrics["ratio_q99"], expected["ratio_q99"])


def test_measures_of_nothing_and_of_extremes_are_finite():
    old, sampler, mask = draw()
    nothing = corrections.off_policy_metrics(*arrays(old, sampler, mask & False))
    assert all(float(value) == 0 for value in nothing.values())
    far = corrections.off_policy_metrics(
        *(x.astype(jnp.float32) for x in arrays(1e4 * old, sampler, mask)[:2]), mask
    )
    assert all(np.isfinite(value) for value in far.values())


# M2PO --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 10.0])
def test_the_second_moment_is_cut_as_by_dropping_the_worst_one_after_the_other(threshold):
    old, sampler, mask = draw()
    advantages = np.array([1.0, -1.0, 2.0, -0.5, 0.0, 1.0])
    log_ratio = old - sampler
    bounded = [(b, t) for b, t in zip(*np.nonzero(mask), strict=True) if advantages[b] * log_ratio[b, t] > 0]
    kept = sorted(bounded, key=lambda place: abs(log_ratio[place]))
    while kept and np.mean([log_ratio[place] ** 2 for place in kept]) > threshold:
        kept.pop()
    expected = mask.copy()
    for place in set(bounded) - set(kept):
        expected[place] = False
    mask_fn = functools.partial(second_moment_mask, threshold=threshold)
    found = mask_fn(*arrays(old, sampler, mask)[:2], jnp.asarray(advantages), jnp.asarray(mask))
    np.testing.assert_array_equal(found, expected)
    order = np.random.default_rng(0).permutation(B)
    permuted = mask_fn(*(x[order] for x in arrays(old, sampler, mask)[:2]), advantages[order], mask[order])
    np.testing.assert_array_equal(permuted, expected[order])
