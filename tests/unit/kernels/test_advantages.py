import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kernels

REWARDS = np.array([[1.0, 0.0, 2.0, 0.5], [3.0, 3.0, 3.0, 3.0], [0.0, 1.0, 0.0, -4.0]])
MASK = np.array([[True, True, True, True], [True, True, True, True], [True, False, True, True]])
DIRTY = np.where(MASK, REWARDS, np.nan)


def by_groups(naive):
    """`naive(rewards of the group that count)`, put back in place."""
    results = np.zeros(REWARDS.shape)
    for n in range(len(REWARDS)):
        results[n, MASK[n]] = naive(REWARDS[n, MASK[n]])
    return results


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_group_relative_scales():
    everything = REWARDS[MASK]
    expected = {
        kernels.group_std: by_groups(lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4)),
        kernels.batch_std: by_groups(lambda r: (r - r.mean()) / (everything.std(ddof=1) + 1e-4)),
        kernels.unit_scale: by_groups(lambda r: r - r.mean()),
        kernels.group_mean: by_groups(lambda r: (r - r.mean()) / (r.mean() if r.mean() > 0 else np.inf)),
    }
    for scale_fn, advantages in expected.items():
        result = kernels.group_relative_advantages(jnp.asarray(DIRTY), jnp.asarray(MASK), scale_fn=scale_fn)
        np.testing.assert_allclose(result, advantages, rtol=0, atol=1e-12)


def test_the_spread_of_rewards_is_that_of_what_counts():
    np.testing.assert_array_equal(kernels.reward_spread(jnp.asarray(DIRTY), jnp.asarray(MASK)), [2, 0, 4])
    rewards, mask = jnp.array([[2.0, jnp.nan], [jnp.nan, jnp.inf]]), jnp.array([[True, False], [False] * 2])
    assert kernels.reward_spread(rewards, mask).tolist() == [0, 0]


def test_leave_one_out_is_the_mean_of_the_others():
    def naive(r):
        return [r[i] - np.delete(r, i).mean() for i in range(len(r))]

    result = kernels.leave_one_out_advantages(jnp.asarray(DIRTY), jnp.asarray(MASK))
    np.testing.assert_allclose(result, by_groups(naive), rtol=0, atol=1e-12)


def test_remax_subtracts_the_greedy_reward():
    greedy = np.array([1.0, 2.0, 3.0])
    result = kernels.remax_advantages(jnp.asarray(DIRTY), jnp.asarray(greedy), jnp.asarray(MASK))
    np.testing.assert_allclose(result, np.where(MASK, REWARDS - greedy[:, None], 0), atol=1e-12)


def test_optimal_baseline_weighs_by_length():
    lengths = np.array([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
    result = kernels.optimal_baseline_advantages(jnp.asarray(DIRTY), jnp.asarray(lengths), jnp.asarray(MASK))
    weights = lengths * MASK
    baseline = (weights * REWARDS).sum(-1) / weights.sum(-1)
    np.testing.assert_allclose(result, np.where(MASK, REWARDS - baseline[:, None], 0), atol=1e-12)
    equal = kernels.optimal_baseline_advantages(jnp.asarray(REWARDS), jnp.full(REWARDS.shape, 7))
    plain = kernels.group_relative_advantages(jnp.asarray(REWARDS), scale_fn=kernels.unit_scale)
    np.testing.assert_allclose(equal, plain, atol=1e-12, err_msg="equal lengths: the plain mean")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("right", [0, 1, 2, 4, 5])
def test_pass_at_k_is_the_mean_over_all_sets(k, right):
    """The definition, by enumeration of every set of k among 5 completions."""
    correct = np.arange(5) < right
    sets = list(itertools.combinations(range(5), k))
    passes = np.array([correct[list(s)].any() for s in sets])
    if passes.std() == 0:
        expected = np.zeros(5)
    else:
        normalised = (passes - passes.mean()) / (passes.std() + 1e-6)
        expected = [np.mean([x for s, x in zip(sets, normalised, strict=True) if i in s]) for i in range(5)]
    # A sixth completion that does not count.
    mask = jnp.arange(6) < 5
    result = kernels.pass_at_k_advantages(jnp.append(correct, True)[None], mask[None], k=k)
    np.testing.assert_allclose(result[0, :5], expected, rtol=0, atol=1e-10)
    assert result[0, 5] == 0


def test_pass_at_1_is_the_group_normalised_binary_reward():
    correct = np.array([[True, False, False, True, False]])
    reward = correct.astype(float)
    expected = (reward - reward.mean()) / (reward.std() + 1e-6)
    np.testing.assert_allclose(kernels.pass_at_k_advantages(jnp.asarray(correct), k=1), expected, atol=1e-12)


def test_reinforce_plus_plus_matches_naive_loop():
    rng = np.random.default_rng(0)
    mask = rng.random((3, 6)) > 0.3
    kl, rewards = rng.normal(size=(3, 6)), rng.normal(size=3)
    raw = np.zeros((3, 6))
    for b, t in np.argwhere(mask):
        raw[b, t] = rewards[b] - 0.1 * sum(kl[b, s] for s in range(t, 6) if mask[b, s])
    expected = np.where(mask, (raw - raw[mask].mean()) / math.sqrt(raw[mask].var() + 1e-8), 0)
    result = kernels.reinforce_plus_plus_advantages(
        jnp.asarray(rewards), jnp.asarray(np.where(mask, kl, np.inf)), jnp.asarray(mask), kl_coef=0.1
    )
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_reinforce_plus_plus_baseline_scales_the_centred_rewards():
    centred = by_groups(lambda r: r - r.mean())
    expected = centred / math.sqrt(centred[MASK].var() + 1e-8)
    result = kernels.reinforce_plus_plus_baseline_advantages(jnp.asarray(DIRTY), jnp.asarray(MASK))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "advantages",
    [
        kernels.group_relative_advantages,
        kernels.leave_one_out_advantages,
        lambda r, m: kernels.optimal_baseline_advantages(r, jnp.ones(r.shape, int), m),
        lambda r, m: kernels.pass_at_k_advantages(r > 0, m, k=1),
        kernels.reinforce_plus_plus_baseline_advantages,
    ],
)
def test_groups_of_one_and_of_none_get_zero(advantages):
    rewards, mask = (
        jnp.array([[2.0, jnp.nan], [jnp.nan, jnp.inf]]),
        jnp.array([[True, False], [False, False]]),
    )
    np.testing.assert_array_equal(advantages(rewards, mask), 0)
    np.testing.assert_array_equal(advantages(jnp.array([[2.0]]), jnp.array([[True]])), 0)


def test_advantages_have_no_gradient():
    grad = jax.grad(lambda r: jnp.sum(kernels.group_relative_advantages(r) ** 2))(jnp.asarray(REWARDS))
    np.testing.assert_array_equal(grad, 0)


def test_permuting_a_group_permutes_its_advantages():
    order = np.array([2, 0, 3, 1])
    advantages = kernels.group_relative_advantages(jnp.asarray(REWARDS))
    permuted = kernels.group_relative_advantages(jnp.asarray(REWARDS[:, order]))
    np.testing.assert_allclose(permuted, advantages[:, order], atol=1e-12)


def test_decoupled_advantages_are_those_of_loops():
    """Each reward within its group, then the sum within the batch (GDPO); some are not meant for a row."""
    rng = np.random.default_rng(3)
    terms, weights, mask = rng.normal(size=(3, 4, 2)) * [1, 100], [1.0, 0.3], rng.random((3, 4)) > 0.2
    terms[0, 1, 1] = terms[2, :, 0] = np.nan
    total = np.zeros((3, 4))
    for k, weight in enumerate(weights):
        for n in range(3):
            rows = [i for i in range(4) if mask[n, i] and not np.isnan(terms[n, i, k])]
            if not rows:
                continue
            values = terms[n, rows, k]
            total[n, rows] += weight * (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    expected = np.where(mask, (total - total[mask].mean()) / (total[mask].std(ddof=1) + 1e-4), 0)
    dirty = jnp.asarray(np.where(mask[..., None], terms, np.nan), jnp.float32)
    found = jax.jit(kernels.decoupled_advantages)(dirty, jnp.asarray(weights), jnp.asarray(mask))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    scaled = kernels.decoupled_advantages(
        dirty * jnp.array([1.0, 0.01]), jnp.asarray(weights), jnp.asarray(mask)
    )
    np.testing.assert_allclose(scaled, expected, rtol=2e-3, atol=1e-3)  # no reward drowns the other
