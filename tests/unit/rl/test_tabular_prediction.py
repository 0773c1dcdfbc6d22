"""Learning the values of a chain: identities between the rules, naive loops, exact values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.rl.tabular import dynamic_programming, prediction

WALK = dynamic_programming.random_walk(5)
EXACT = dynamic_programming.chain_values(WALK, gamma=1.0)
START = jnp.where(WALK.terminal, 0, 0.5)


def episodes_of(seed: int, count: int, length: int = 60) -> prediction.Episode:
    return prediction.sample_episodes(WALK, jax.random.key(seed), episodes=count, length=length)


def pick(episodes: prediction.Episode, index: int) -> prediction.Episode:
    return jax.tree.map(lambda x: x[index], episodes)


def steps_of(episode: prediction.Episode) -> list[tuple[int, float, int, bool]]:
    columns = (episode.states, episode.rewards, episode.next_states, episode.terminated)
    rows = zip(*(np.asarray(x)[np.asarray(episode.mask)] for x in columns), strict=True)
    return [(int(s), float(r), int(t), bool(d)) for s, r, t, d in rows]


def test_episodes_walk_by_one_and_end_once():
    episodes = episodes_of(0, 50)
    jumps = jnp.abs(episodes.next_states - episodes.states)[episodes.mask]
    assert jnp.all(jumps == 1)
    assert jnp.all(jnp.sum(episodes.terminated, axis=1) <= 1)
    ended = episodes.terminated & WALK.terminal[episodes.next_states]
    assert jnp.all(ended == episodes.terminated)
    # A step after the end does not count, and none before it is left out.
    assert jnp.all(episodes.mask[:, 1:] == (episodes.mask & ~episodes.terminated)[:, :-1])


def test_first_visit_monte_carlo_against_a_loop():
    episodes = episodes_of(1, 20)
    known, _ = prediction.learn(
        functools.partial(prediction.first_visit_monte_carlo, gamma=0.9),
        prediction.init_averages(7),
        jax.tree.map(lambda x: x[jnp.any(episodes.terminated, axis=1)], episodes),
    )
    returns: dict[int, list[float]] = {s: [] for s in range(7)}
    for e in range(20):
        steps = steps_of(pick(episodes, e))
        if not steps[-1][3]:
            continue
        seen = set()
        for t, (s, *_) in enumerate(steps):
            if s not in seen:
                seen.add(s)
                returns[s].append(sum(0.9**k * step[1] for k, step in enumerate(steps[t:])))
    for s in range(7):
        assert known.visits[s] == len(returns[s])
        np.testing.assert_allclose(known.values[s], np.mean(returns[s] or [0.0]), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 100])
def test_online_n_step_td_against_a_loop(n):
    episodes = episodes_of(2, 6, length=12)  # some are cut
    rule = functools.partial(prediction.n_step_td, n=n, learning_rate=0.2, gamma=0.9)
    values, _ = prediction.learn(rule, START, episodes)
    expected = np.asarray(START, np.float64).copy()
    for e in range(6):
        steps = steps_of(pick(episodes, e))
        for t, (s, *_) in enumerate(steps):
            window = steps[t : t + n]
            target = sum(0.9**k * step[1] for k, step in enumerate(window))
            if not window[-1][3]:
                target += 0.9 ** len(window) * expected[window[-1][2]]
            expected[s] += 0.2 * (target - expected[s])
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_td0_is_one_step_td():
    episodes = episodes_of(3, 10)
    options = {"learning_rate": 0.1, "gamma": 0.95}
    one, _ = prediction.learn(functools.partial(prediction.td_lambda, **options), START, episodes)
    other, _ = prediction.learn(functools.partial(prediction.n_step_td, n=1, **options), START, episodes)
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("length", few([8, 80], 8))
def test_forward_view_is_backward_view_offline(lambda_, length):
    episode = pick(episodes_of(4, 3, length=length), 1)
    forward = prediction.offline_update(
        START,
        episode,
        prediction.lambda_targets(START, episode, lambda_=lambda_, gamma=0.9),
        learning_rate=0.1,
    )
    backward = prediction.td_lambda(
        START, episode, learning_rate=0.1, gamma=0.9, lambda_=lambda_, online=False
    )
    np.testing.assert_allclose(forward, backward, atol=1e-5)


def test_ends_of_the_spectrum():
    episode = pick(episodes_of(5, 1), 0)
    mc = prediction.monte_carlo_targets(START, episode, gamma=0.9)
    np.testing.assert_allclose(
        prediction.n_step_targets(START, episode, n=60, gamma=0.9)[episode.mask], mc[episode.mask], atol=1e-5
    )
    np.testing.assert_allclose(
        prediction.lambda_targets(START, episode, lambda_=1.0, gamma=0.9)[episode.mask],
        mc[episode.mask],
        atol=1e-5,
    )
    td = prediction.n_step_targets(START, episode, n=1, gamma=0.9)
    np.testing.assert_allclose(
        prediction.lambda_targets(START, episode, lambda_=0.0, gamma=0.9)[episode.mask],
        td[episode.mask],
        atol=1e-6,
    )


RULES = {
    "td0": functools.partial(prediction.td_lambda, learning_rate=0.02, gamma=1.0),
    "td_lambda": functools.partial(prediction.td_lambda, learning_rate=0.01, gamma=1.0, lambda_=0.8),
    "n_step": functools.partial(prediction.n_step_td, n=3, learning_rate=0.01, gamma=1.0),
    "offline": functools.partial(
        prediction.td_lambda, learning_rate=0.01, gamma=1.0, lambda_=0.5, online=False
    ),
}


@pytest.mark.parametrize("name", few(RULES, "td_lambda", "n_step"))
def test_rules_find_the_exact_values_over_seeds(name):
    """The mean over 16 seeds, jitted and vmapped, after 400 episodes."""

    def run(key):
        episodes = prediction.sample_episodes(WALK, key, episodes=400, length=100)
        return prediction.learn(RULES[name], START, episodes)[0]

    values = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(6), 16))
    np.testing.assert_allclose(jnp.mean(values, axis=0), EXACT, atol=0.03)


def test_first_visit_monte_carlo_finds_the_exact_values():
    rule = functools.partial(prediction.first_visit_monte_carlo, gamma=1.0)
    episodes = episodes_of(7, 3000, length=120)
    known, _ = jax.jit(lambda e: prediction.learn(rule, prediction.init_averages(7), e))(episodes)
    np.testing.assert_allclose(known.values, EXACT, atol=0.04)


@pytest.mark.slow
def test_lake_policy_is_predicted():
    """The uniform policy on the slippery lake, as the chain it induces."""
    lake = dynamic_programming.frozen_lake()
    chain = dynamic_programming.induced_chain(lake, jnp.full((16, 4), 0.25))
    exact = dynamic_programming.chain_values(chain, gamma=1.0)
    episodes = prediction.sample_episodes(chain, jax.random.key(8), episodes=4000, length=100)
    rule = functools.partial(prediction.first_visit_monte_carlo, gamma=1.0)
    known, _ = jax.jit(lambda e: prediction.learn(rule, prediction.init_averages(16), e))(episodes)
    np.testing.assert_allclose(known.values, exact, atol=0.06)


@pytest.mark.slow
def test_bias_falls_and_variance_grows_from_td_to_monte_carlo():
    episodes = episodes_of(9, 2000)

    def target(episode, n):
        return prediction.n_step_targets(START * 0, episode, n=n, gamma=1.0)[0]

    by_n = [jax.vmap(functools.partial(target, n=n))(episodes) for n in (1, 4, 60)]
    bias = [abs(float(jnp.mean(x) - EXACT[3])) for x in by_n]
    variance = [float(jnp.var(x)) for x in by_n]
    assert bias[0] > bias[1] > bias[2]
    assert bias[2] < 0.03
    assert variance[0] < variance[1] < variance[2]
