"""Returns, V-trace and Retrace against loops written from the papers, over the unmasked steps only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kernels

SHAPE = (4, 9)


@pytest.fixture
def example():
    """Random trajectories with masked steps, terminations, and one row without any step."""
    rng = np.random.default_rng(0)
    rewards, values, q_values = rng.normal(size=(3, *SHAPE))
    mask = rng.random(SHAPE) > 0.3
    mask[-1] = False
    return {
        "rewards": rewards,
        "values": values,
        "q_values": q_values,
        "discounts": 0.9 * (rng.random(SHAPE) > 0.2),
        "log_rhos": 0.5 * rng.normal(size=SHAPE),
        "bootstrap_value": rng.normal(size=SHAPE[0]),
        "mask": mask,
    }


def by_rows(example, naive):
    """`naive(steps)` on each row's unmasked steps, as a dict of lists; results put back in place."""
    results = np.zeros(SHAPE)
    for b in range(SHAPE[0]):
        at = np.flatnonzero(example["mask"][b])
        names = ("rewards", "values", "q_values", "discounts", "log_rhos")
        steps = {name: example[name][b, at] for name in names}
        steps["values_after"] = np.append(steps["values"], example["bootstrap_value"][b])[1:]
        results[b, at] = naive(steps, example["bootstrap_value"][b])
    return results


def naive_discounted(steps, last):
    returns = []
    for reward, discount in zip(steps["rewards"][::-1], steps["discounts"][::-1], strict=True):
        last = reward + discount * last
        returns.insert(0, last)
    return returns


def naive_n_step(steps, last, n):
    """Sutton & Barto 2018, eq. 7.1: n discounted rewards, then the value n steps on."""
    del last
    returns = []
    for start in range(len(steps["rewards"])):
        total, weight = 0.0, 1.0
        for t in range(start, min(start + n, len(steps["rewards"]))):
            total += weight * steps["rewards"][t]
            weight *= steps["discounts"][t]
        returns.append(total + weight * steps["values_after"][t])
    return returns


def naive_lambda(steps, last, lambda_):
    """Sutton & Barto 2018, eq. 12.18 as the weighted sum of n-step returns, not the recursion."""
    length = len(steps["rewards"])
    by_n = [naive_n_step(steps, last, n) for n in range(1, length + 1)]
    returns = []
    for t in range(length):
        left = length - t
        weights = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, left)] + [lambda_ ** (left - 1)]
        returns.append(sum(w * by_n[n][t] for n, w in enumerate(weights)))
    return returns


def naive_gae(steps, last, lambda_):
    """Schulman et al. 2016, eq. 16: the sum over later TD errors, written out."""
    del last
    deltas = steps["rewards"] + steps["discounts"] * steps["values_after"] - steps["values"]
    length = len(deltas)
    return [
        sum(np.prod(lambda_ * steps["discounts"][s:t]) * deltas[t] for t in range(s, length))
        for s in range(length)
    ]


def naive_upgo(steps, last):
    """AlphaStar: follow the return while the next step's one-step estimate is no worse than its value."""
    length, returns = len(steps["rewards"]), [0.0] * len(steps["rewards"])
    q = steps["rewards"] + steps["discounts"] * steps["values_after"]
    for t in reversed(range(length)):
        after = last
        if t + 1 < length:
            after = returns[t + 1] if q[t + 1] >= steps["values"][t + 1] else steps["values"][t + 1]
        returns[t] = steps["rewards"][t] + steps["discounts"][t] * after
    return returns


def naive_vtrace(steps, last, lambda_, clip_rho, clip_c):
    """Espeholt et al. 2018, eq. 1: the sum over later steps, written out."""
    del last
    ratio, length = np.exp(steps["log_rhos"]), len(steps["rewards"])
    rho, c = np.minimum(clip_rho, ratio), lambda_ * np.minimum(clip_c, ratio)
    deltas = rho * (steps["rewards"] + steps["discounts"] * steps["values_after"] - steps["values"])
    return [
        steps["values"][s]
        + sum(
            np.prod(steps["discounts"][s:t]) * np.prod(c[s:t]) * deltas[t]  # empty products are 1
            for t in range(s, length)
        )
        for s in range(length)
    ]


def naive_retrace(steps, last, lambda_):
    """Munos et al. 2016, eq. 3: the sum over later steps, written out."""
    del last
    c = lambda_ * np.minimum(1, np.exp(steps["log_rhos"]))
    length = len(steps["rewards"])
    deltas = steps["rewards"] + steps["discounts"] * steps["values_after"] - steps["q_values"]
    return [
        steps["q_values"][s]
        + sum(
            np.prod(steps["discounts"][s:t]) * np.prod(c[s + 1 : t + 1]) * deltas[t] for t in range(s, length)
        )
        for s in range(length)
    ]


CASES = {
    "discounted": (
        lambda e: kernels.discounted_returns(e["rewards"], e["discounts"], e["bootstrap_value"], e["mask"]),
        naive_discounted,
    ),
    "n_step": (lambda e: valued(e, kernels.n_step_returns, n=3), functools.partial(naive_n_step, n=3)),
    "lambda": (
        lambda e: valued(e, kernels.lambda_returns, lambda_=0.7),
        functools.partial(naive_lambda, lambda_=0.7),
    ),
    "gae": (
        lambda e: valued(e, kernels.generalized_advantage_estimation, gae_lambda=0.8)[0],
        functools.partial(naive_gae, lambda_=0.8),
    ),
    "upgo": (lambda e: valued(e, kernels.upgo_returns), naive_upgo),
    "vtrace": (
        lambda e: off_policy_targets(e, lambda_=0.9, clip_rho=1.2, clip_c=1.1),
        functools.partial(naive_vtrace, lambda_=0.9, clip_rho=1.2, clip_c=1.1),
    ),
    "retrace": (
        lambda e: kernels.retrace(
            *(e[x] for x in ("log_rhos", "rewards", "q_values", "values", "discounts", "bootstrap_value")),
            e["mask"],
            lambda_=0.8,
        ),
        functools.partial(naive_retrace, lambda_=0.8),
    ),
}


def valued(e, kernel, **options):
    names = ("rewards", "values", "discounts", "bootstrap_value", "mask")
    return kernel(*(e[name] for name in names), **options)


def off_policy(e, **options):
    return valued(e, functools.partial(kernels.vtrace, e["log_rhos"]), **options)


def off_policy_targets(e, **options):
    return off_policy(e, **options).targets


def on_device(example, dirt=np.nan):
    """The example as arrays with `dirt` in the masked entries."""
    at_steps = lambda x: x.ndim == 2 and x.dtype != bool  # noqa: E731
    return {
        name: jnp.asarray(np.where(example["mask"], x, dirt) if at_steps(x) else x)
        for name, x in example.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_matches_naive_loop_and_skips_masked_steps(case, example):
    ours, naive = CASES[case]
    with jax.enable_x64(True):
        result = jax.jit(ours)(on_device(example))
    np.testing.assert_allclose(result, by_rows(example, naive), rtol=0, atol=1e-12)


def test_vtrace_advantages_match_the_paper_for_lambda_1(example):
    with jax.enable_x64(True):
        result = off_policy(on_device(example), clip_rho=1.2, clip_pg_rho=1.1)
    targets = by_rows(example, functools.partial(naive_vtrace, lambda_=1, clip_rho=1.2, clip_c=1))
    expected = np.zeros(SHAPE)
    for b in range(SHAPE[0]):
        at = np.flatnonzero(example["mask"][b])
        after = np.append(targets[b, at], example["bootstrap_value"][b])[1:]
        rho = np.minimum(1.1, np.exp(example["log_rhos"][b, at]))
        q = example["rewards"][b, at] + example["discounts"][b, at] * after
        expected[b, at] = rho * (q - example["values"][b, at])
    np.testing.assert_allclose(result.advantages, expected, rtol=0, atol=1e-12)


def test_identities(example):
    """Lambda 0 and 1, n past the end, and V-trace and Retrace on policy, say the same as simpler returns."""
    with jax.enable_x64(True):
        e = on_device(example)
        mask, values = example["mask"], np.where(example["mask"], example["values"], 0)
        monte_carlo = CASES["discounted"][0](e)
        one_step = valued(e, kernels.n_step_returns, n=1)
        td_lambda = valued(e, kernels.lambda_returns, lambda_=0.8)
        gae, gae_returns = valued(e, kernels.generalized_advantage_estimation, gae_lambda=0.8)
        on_policy = e | {"log_rhos": jnp.zeros(SHAPE)}
        vtrace = off_policy(on_policy, lambda_=0.8)
        q_is_v = on_policy | {"q_values": on_policy["values"]}
        same = {
            "lambda 1 is Monte Carlo": (valued(e, kernels.lambda_returns, lambda_=1.0), monte_carlo),
            "lambda 0 is one step": (valued(e, kernels.lambda_returns, lambda_=0.0), one_step),
            "n >= T is Monte Carlo": (valued(e, kernels.n_step_returns, n=20), monte_carlo),
            "GAE is the lambda return minus the value": (gae, np.where(mask, td_lambda - values, 0)),
            "GAE's returns are lambda returns": (gae_returns, td_lambda),
            "V-trace on policy is TD(lambda)": (vtrace.targets, td_lambda),
            "V-trace advantages on policy are GAE": (vtrace.advantages, gae),
            "Retrace on policy with Q = V is TD(lambda)": (
                valued(
                    q_is_v,
                    lambda r, v, *rest: kernels.retrace(
                        q_is_v["log_rhos"], r, q_is_v["q_values"], v, *rest, lambda_=0.8
                    ),
                ),
                td_lambda,
            ),
            "UPGO with hopeless values is Monte Carlo": (
                valued(e | {"values": e["values"] - 1e3}, kernels.upgo_returns),
                monte_carlo,
            ),
        }
    for name, (a, b) in same.items():
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11, err_msg=name)


def test_time_major_is_the_same_function_of_transposed_arrays(example):
    e = on_device(example, dirt=0.0)
    names = ("rewards", "values", "discounts", "bootstrap_value", "mask")
    batch_major = kernels.generalized_advantage_estimation(*(e[n] for n in names), gae_lambda=0.9)
    transposed = [e[n].T if e[n].ndim == 2 else e[n] for n in names]
    time_major = kernels.time_major(kernels.generalized_advantage_estimation)(*transposed, gae_lambda=0.9)
    for a, b in zip(batch_major, time_major, strict=True):
        np.testing.assert_array_equal(a, b.T)


def test_associative_scan_is_the_sequential_one():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        coefficients, offsets = jnp.asarray(rng.uniform(-1, 1, (2, 3, 77)))
        last = jnp.asarray(rng.normal(size=3))
        sequential = kernels.sequential_following(coefficients, offsets, last)
        associative = kernels.associative_following(coefficients, offsets, last)
    np.testing.assert_allclose(sequential, associative, rtol=0, atol=1e-12)


def test_results_have_no_gradient_and_are_float32_for_bfloat16(example):
    e = on_device(example, dirt=0.0)
    half = {n: x.astype(jnp.bfloat16) if x.dtype != bool else x for n, x in e.items()}

    def total(values):
        return sum(jnp.sum(x) for x in jax.tree.leaves(off_policy(half | {"values": values})))

    result = off_policy(half)
    assert result.targets.dtype == result.advantages.dtype == jnp.float32
    np.testing.assert_array_equal(jax.grad(total)(half["values"]).astype(np.float32), 0)


def test_vtrace_and_retrace_take_extreme_ratios(example):
    e = on_device(example) | {"log_rhos": jnp.where(jnp.arange(SHAPE[1]) % 2, 1e4, -1e4) + jnp.zeros(SHAPE)}
    for result in (*jax.tree.leaves(off_policy(e)), CASES["retrace"][0](e)):
        assert jnp.isfinite(result).all()


def test_lambda_may_be_traced_and_vmapped(example):
    e = on_device(example)
    several = jax.vmap(lambda x: valued(e, kernels.lambda_returns, lambda_=x))(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(several[1], valued(e, kernels.lambda_returns, lambda_=0.5), rtol=1e-6)


def test_token_rewards_put_the_reward_on_the_last_unmasked_token():
    mask = jnp.array([[True, False, True, False], [False, False, False, False]])
    kl = jnp.array([[0.5, jnp.nan, 2.0, jnp.nan], [jnp.nan] * 4])
    result = kernels.token_rewards(jnp.array([10.0, jnp.nan]), kl, mask, kl_coef=0.1)
    np.testing.assert_allclose(result, [[-0.05, 0, 9.8, 0], [0, 0, 0, 0]], rtol=1e-6)
