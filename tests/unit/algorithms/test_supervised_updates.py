"""Learning from demonstrations and from pairs: SFT, reward models, DPO."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabular

from rlhf_jax.algorithms import preference, reward, sft
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer

TX = make_optimizer(OptimizerConfig(clip_norm=100.0))
LENGTHS = (5, 3, 4, 5, 2, 5, 4, 3)


def train(update, state, hyper, batch, steps):
    def step(state, _):
        return update(state, hyper, batch)

    return jax.jit(lambda state: jax.lax.scan(step, state, None, length=steps))(state)


def test_sft_reaches_the_frequencies_of_the_data():
    batch = tabular.rows(0, LENGTHS)
    counts = np.zeros((tabular.VOCAB, tabular.VOCAB))
    for row, length in zip(np.asarray(batch.tokens), LENGTHS, strict=True):
        np.add.at(counts, (row[:length], row[1 : length + 1]), 1)
    update = jax.jit(sft.make_update(sft.Config(), tabular.score, TX))
    state = sft.init(tabular.init(), TX, jax.random.key(0))
    state, metrics = train(update, state, sft.Hyper(learning_rate=0.1), batch, 400)
    share = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(state.learner.params["logits"]), share, atol=0.02)
    best = -np.sum(counts[counts > 0] * np.log(share[counts > 0])) / counts.sum()
    np.testing.assert_allclose(metrics["loss"][-1], best, atol=0.01)
    assert metrics["loss"][0] > best + 0.3
    assert int(metrics["tokens"][-1]) == counts.sum() == sum(LENGTHS)


def test_sft_gradient_is_that_of_the_mean_over_tokens():
    """One step of plain gradient descent against the derivative written out."""
    batch, params = tabular.rows(0, LENGTHS), tabular.init()
    tx = optax.identity()
    update = jax.jit(sft.make_update(sft.Config(), tabular.score, tx))
    state, _ = update(sft.init(params, tx, jax.random.key(0)), sft.Hyper(learning_rate=1.0), batch)
    gradient = np.zeros((tabular.VOCAB, tabular.VOCAB))
    chances = np.asarray(jax.nn.softmax(params["logits"]))
    for row, length in zip(np.asarray(batch.tokens), LENGTHS, strict=True):
        for before, token in itertools.pairwise(row[: length + 1]):
            gradient[before] += (chances[before] - np.eye(tabular.VOCAB)[token]) / sum(LENGTHS)
    np.testing.assert_allclose(
        state.learner.params["logits"], np.asarray(params["logits"]) - gradient, rtol=1e-5, atol=1e-6
    )


def test_sft_says_the_loss_of_each_source():
    """Means over the tokens of each source, however the batch is cut, and none where a source is absent."""
    batch, params = tabular.rows(0, LENGTHS), tabular.init()
    sources = jnp.asarray([0, 1, 1, 0, 0, 1, 0, 1])
    config = sft.Config(micro_batches=2, sources=("a", "b", "c"))
    state = sft.init(params, TX, jax.random.key(0))
    _, metrics = jax.jit(sft.make_update(config, tabular.score, TX))(state, sft.Hyper(), batch, sources)
    logp, mask = np.asarray(tabular.score(params, batch).logp), np.asarray(batch.mask)
    for number, name in enumerate("ab"):
        of_source = mask & (np.asarray(sources) == number)[:, None]
        np.testing.assert_allclose(metrics[f"loss/{name}"], -logp[of_source].mean(), rtol=1e-5)
    assert np.isnan(metrics["loss/c"])
    np.testing.assert_allclose(metrics["loss"], -logp[mask].mean(), rtol=1e-5)


def separable_pairs(count=64):
    """The response with more 4s is preferred."""
    a, b = tabular.rows(1, [4] * count), tabular.rows(2, [4] * count)

    def fours(s):
        return jnp.sum((s.tokens == 4) & (s.segment_ids > 0), axis=1)

    swap = (fours(b) > fours(a))[:, None]
    chosen, rejected = (
        jax.tree.map(lambda x, y: jnp.where(swap, x, y), *order) for order in ((b, a), (a, b))
    )
    kept = np.flatnonzero(np.asarray(fours(chosen) > fours(rejected)))
    return jax.tree.map(lambda x: x[kept], (chosen, rejected))


def test_reward_model_learns_a_separable_preference_and_keeps_scores_centred():
    update = jax.jit(reward.make_update(reward.Config(), tabular.reward, TX))
    pairs = reward.Pairs(*separable_pairs())
    state = reward.init(tabular.init(), TX, jax.random.key(0))
    state, metrics = train(update, state, reward.Hyper(learning_rate=0.05), pairs, 300)
    assert metrics["accuracy"][0] < 0.95
    assert metrics["accuracy"][-1] == 1.0
    values = np.asarray(state.learner.params["value"])
    assert values[4] > values[:4].max() + 1
    chosen, rejected = reward.score_pairs(tabular.reward, state.learner.params, pairs)
    assert abs(float(jnp.mean(chosen + rejected))) < 1.0
    np.testing.assert_allclose(metrics["margin"][-1], jnp.mean(chosen - rejected), rtol=0.02)


def test_dpo_starts_at_log_two_and_moves_towards_the_chosen():
    chosen, rejected = separable_pairs()
    params, tx = tabular.init(), optax.identity()
    batch = preference.make_batch(tabular.score, params, chosen, rejected)
    update = jax.jit(preference.make_update(preference.Config(), tabular.score, tx))
    state = preference.init(params, tx, jax.random.key(0))
    hyper = preference.Hyper(learning_rate=1e-3, beta=0.3)
    after, metrics = update(state, hyper, batch)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], 0, atol=1e-6)
    # At equality the gradient is -beta / 2 that of the mean difference of the log-probs.

    def mean_difference(params):
        of_chosen, of_rejected = preference.response_logp(tabular.score, params, chosen, rejected)
        return jnp.mean(of_chosen - of_rejected)

    expected = jax.tree.map(lambda p, g: p + 1e-3 * 0.15 * g, params, jax.grad(mean_difference)(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), after.learner.params, expected
    )
    assert float(update(after, hyper, batch)[1]["loss"]) < float(metrics["loss"])


def test_dpo_learns_a_separable_preference():
    chosen, rejected = separable_pairs()
    params = tabular.init()
    batch = preference.make_batch(tabular.score, params, chosen, rejected)
    update = jax.jit(preference.make_update(preference.Config(), tabular.score, TX))
    state = preference.init(params, TX, jax.random.key(0))
    state, metrics = train(update, state, preference.Hyper(learning_rate=0.05, beta=0.5), batch, 200)
    assert metrics["accuracy"][-1] > 0.97
    before, after = (jax.nn.softmax(p["logits"])[:, 4].mean() for p in (params, state.learner.params))
    assert after > 2 * before


def test_response_log_probs_are_sums_over_responses_alone():
    chosen, rejected = tabular.rows(1, LENGTHS), tabular.rows(2, LENGTHS[::-1])
    longer = dataclasses.replace(chosen, mask=chosen.mask.at[:, 1].set(False))
    found = preference.response_logp(tabular.score, tabular.init(), longer, rejected)
    for sequences, logp in zip((longer, rejected), found, strict=True):
        tokens, mask = np.asarray(sequences.tokens), np.asarray(sequences.mask)
        table = np.asarray(jax.nn.log_softmax(tabular.init()["logits"]))
        for b in range(len(LENGTHS)):
            expected = sum(table[tokens[b, t - 1], tokens[b, t]] for t in np.flatnonzero(mask[b]))
            np.testing.assert_allclose(logp[b], expected, rtol=1e-5)
