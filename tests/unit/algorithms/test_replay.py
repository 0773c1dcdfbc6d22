"""Replay of groups: which are kept, and that a replayed one is learned from as of when it was written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular

from rlhf_jax.algorithms import grpo, grpo_variants
from rlhf_jax.algorithms.replay import init_replay, replay_groups
from rlhf_jax.core.errors import UserError
from rlhf_jax.rollout.step import make_grpo_train_step

G, N, WIDTH = 2, 3, 6
LENGTHS = (1, 5, 2, 4, 3, 3)
TX = optax.identity()


def batch_of(number, mask=None):
    """A batch whose log-probs and advantages say which it is, NaN where nothing counts."""
    sequences = tabular.rows(number, LENGTHS)
    logp = jnp.where(sequences.mask, -1.0 - number - jnp.arange(N * G)[:, None] / 10, jnp.nan)
    return grpo.Batch(sequences, logp, None, 1.0 * number + jnp.arange(N * G) / 10)


def test_the_buffer_keeps_the_latest_groups_that_differ():
    """Beside a list from which the oldest fall out."""
    keep = jax.jit(
        lambda replay, batch, differs, key: replay_groups(replay, batch, differs, key, num_groups=2)
    )
    replay, expected = init_replay(capacity=4, rows=G, length=WIDTH), []
    pattern = [(1, 0, 1), (0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 1, 0)]
    for number, differs in enumerate(pattern):
        before = {round(float(x), 4) for x in np.asarray(jnp.max(replay.batch.advantages, axis=1))}
        batch = batch_of(number + 1)
        replay, merged, metrics = keep(replay, batch, jnp.asarray(differs, bool), jax.random.key(number))
        assert int(metrics["replayed"]) == min(len(expected), 2)
        taken = np.asarray(merged.advantages)[N * G :]
        counted = np.asarray(merged.sequences.mask)[N * G :]
        assert counted.any(axis=1).sum() == G * min(len(expected), 2)
        drawn = {round(float(x), 4) for x in taken[counted]}
        assert drawn <= before
        assert len(drawn) == G * min(len(expected), 2)  # no group twice
        expected += [number + 1 + n * G / 10 for n in range(N) if differs[n]]
        expected = expected[-4:]
        first = np.asarray(jnp.max(replay.batch.advantages, axis=1)).reshape(4, G)[:, 0]
        np.testing.assert_allclose(sorted(first[np.asarray(replay.filled)]), sorted(expected), rtol=1e-6)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(replay))
    assert keep._cache_size() == 1
    assert int(replay.cursor) == sum(map(sum, pattern)) % 4


def test_experts_of_a_rollout_are_replayed_with_it():
    """R3: a replayed answer goes through the experts of the step in which it was written."""
    replay = init_replay(capacity=4, rows=G, length=WIDTH, experts=(2, 1))
    assert np.all(np.asarray(replay.batch.sequences.experts) == -1)  # the router's own choice
    for number in (1, 2):
        batch = batch_of(number)
        experts = jnp.full((N * G, WIDTH, 2, 1), number)
        batch = dataclasses.replace(batch, sequences=dataclasses.replace(batch.sequences, experts=experts))
        differs = jnp.asarray([True, False, False])
        replay, merged, _ = replay_groups(replay, batch, differs, jax.random.key(0), num_groups=1)
    found = np.asarray(merged.sequences.experts)
    assert np.all(found[: N * G] == 2)
    assert np.all(found[N * G :] == 1)


def test_a_buffer_smaller_than_a_batch_is_refused():
    with pytest.raises(UserError, match="a buffer of 2 groups is smaller than the 3 of a batch"):
        replay_groups(
            init_replay(capacity=2, rows=G, length=WIDTH),
            batch_of(1),
            jnp.ones(N, bool),
            jax.random.key(0),
            num_groups=1,
        )


def stepping(config):
    step = make_grpo_train_step(config, tabular.score, TX)
    rewards = {1: jnp.asarray([1.0, 0.0, 0.5, 0.5, 0.2, 0.9]), 2: jnp.asarray([0.3, 0.3, 0.0, 1.0, 0.4, 0.6])}

    @jax.jit
    def run(state, hyper, sequences, rewards):
        rollout = tabular.rollout(state.learner.params, sequences, jnp.ones(N * G, bool))
        return step(state, hyper, tabular.init(7), rollout, rewards)

    return lambda state, hyper, number: run(state, hyper, tabular.rows(number, LENGTHS), rewards[number])


@pytest.mark.slow
def test_a_replayed_group_has_its_advantages_and_the_log_probs_of_its_time():
    hyper = dataclasses.replace(grpo_variants.make_variant("grpo").hyper, learning_rate=3.0, kl_coef=0.1)
    variant = grpo_variants.make_variant("grpo", group_size=G, num_replayed=2)
    plain = dataclasses.replace(variant.config, num_replayed=0)
    buffer = init_replay(capacity=4, rows=G, length=WIDTH)
    begin = grpo.init(tabular.init(), TX, jax.random.key(0), replay=buffer)
    first, metrics = stepping(variant.config)(begin, hyper, 1)
    alone, expected = stepping(plain)(grpo.init(tabular.init(), TX, jax.random.key(0)), hyper, 1)
    # With nothing in the buffer the step is as without one.
    np.testing.assert_allclose(
        first.learner.params["logits"], alone.learner.params["logits"], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert int(metrics["replayed"]) == 0
    second, metrics = stepping(variant.config)(first, hyper, 2)
    assert int(metrics["replayed"]) == 2
    np.testing.assert_allclose(metrics["reward"], 2.6 / 6, rtol=1e-5)  # of the fresh answers alone

    def rows(params, number, rewards):
        """The batch of a step, by itself: advantages of its own groups, log-probs of the policy then."""
        sequences = tabular.rows(number, LENGTHS)
        rollout = tabular.rollout(params, sequences, jnp.ones(N * G, bool))
        ref = tabular.score(tabular.init(7), sequences).logp
        old = tabular.score(params, sequences).logp
        return grpo.make_batch(plain, hyper, rollout, jnp.asarray(rewards), old, ref)[0]

    earlier = rows(tabular.init(), 1, [1.0, 0.0, 0.5, 0.5, 0.2, 0.9])
    differing = jax.tree.map(lambda leaf: leaf[jnp.asarray([0, 1, 4, 5])], earlier)
    fresh = rows(first.learner.params, 2, [0.3, 0.3, 0.0, 1.0, 0.4, 0.6])
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), fresh, differing)

    def loss(params):
        return grpo.batch_loss(plain, hyper, tabular.score(params, whole.sequences), whole)[0]

    gradient = jax.grad(loss)(first.learner.params)["logits"]
    found = first.learner.params["logits"] - second.learner.params["logits"]
    np.testing.assert_allclose(found, 3.0 * gradient, rtol=1e-4, atol=1e-6)
    # Had the log-probs been those of now, it would be another step.
    now = tabular.score(first.learner.params, whole.sequences).logp
    current = dataclasses.replace(whole, old_logp=now)
    other = jax.grad(lambda p: grpo.batch_loss(plain, hyper, tabular.score(p, whole.sequences), current)[0])(
        first.learner.params
    )["logits"]
    assert np.abs(other - gradient).max() > 1e-3
