"""PPO-ptx: the loss on text in every mini-batch against loops, and what it keeps that PPO alone loses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax.algorithms import ppo
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences, TokenLogprobs

PLAIN = optax.identity()  # an update is the gradient times the learning rate
LENGTHS = (5, 2, 3, 1)
TEXT = tabular.rows(8, (4, 1, 5, 2, 3, 3, 2, 5))


def experience(seed=0):
    sequences, rng = tabular.rows(seed, LENGTHS), np.random.default_rng(seed)
    logp = tabular.score(tabular.init(), sequences).logp
    values, advantages, returns = (jnp.asarray(rng.normal(size=logp.shape), jnp.float32) for _ in range(3))
    return ppo.Batch(sequences, sequences.mask, logp, values, advantages, returns)


def worthless():
    """A batch that teaches PPO nothing: no advantage, and values that stay."""
    batch = experience()
    return dataclasses.replace(batch, advantages=jnp.zeros_like(batch.advantages))


def update_once(config, hyper, batch, text, tx=PLAIN, micro_batches=1):
    config = dataclasses.replace(config, micro_batches=micro_batches)
    update = jax.jit(ppo.make_update(config, tabular.score, tx, tabular.score))
    return update(ppo.init(tabular.init(), tx, jax.random.key(0), hyper), hyper, batch, text)


def text_gradient(logits, tokens, mask):
    """Loss and gradient of the mean negative log-likelihood of the counted tokens, one after the other."""
    gradient, loss, count = np.zeros_like(logits), 0.0, int(mask.sum())
    for row, column in zip(*np.nonzero(mask), strict=True):
        before, token = tokens[row, column - 1], tokens[row, column]
        chances = np.exp(logits[before]) / np.exp(logits[before]).sum()
        gradient[before] += (chances - np.eye(tabular.VOCAB)[token]) / count
        loss -= np.log(chances[token]) / count
    return loss, gradient


def test_the_loss_on_text_is_added_with_its_weight():
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1)
    hyper = ppo.Hyper(learning_rate=0.1, ptx_coef=3.0)
    alone, of_ppo = update_once(config, hyper, experience(), None)
    both, metrics = update_once(config, hyper, experience(), TEXT)
    start = np.asarray(tabular.init()["logits"], np.float64)
    loss, gradient = text_gradient(start, np.asarray(TEXT.tokens), np.asarray(TEXT.mask))
    expected = alone.learner.params["logits"] - 0.1 * 3.0 * gradient
    np.testing.assert_allclose(both.learner.params["logits"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(both.learner.params["value"], alone.learner.params["value"])
    np.testing.assert_allclose(metrics["ptx_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], of_ppo["loss"] + 3 * loss, rtol=1e-5)


@pytest.mark.parametrize("micro_batches", few([1, 2], 2))
def test_every_optimizer_step_learns_from_its_own_share_of_the_text(micro_batches):
    config, hyper = (
        ppo.Config(num_ppo_epochs=2, num_minibatches=2),
        ppo.Hyper(learning_rate=0.5, value_coef=0),
    )
    state, metrics = update_once(config, hyper, worthless(), TEXT, micro_batches=micro_batches)
    logits, losses = np.asarray(tabular.init()["logits"], np.float64), []
    tokens, mask = np.asarray(TEXT.tokens), np.asarray(TEXT.mask)
    for step in range(4):
        loss, gradient = text_gradient(logits, tokens[step::4], mask[step::4])
        logits, losses = logits - 0.5 * 27.8 * gradient, [*losses, loss]
    np.testing.assert_allclose(state.learner.params["logits"], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(metrics["ptx_loss"], np.mean(losses), rtol=1e-4)


def test_rows_of_answers_and_of_text_may_stand_in_any_order():
    config, hyper = ppo.Config(num_ppo_epochs=1, num_minibatches=1), ppo.Hyper(learning_rate=0.1)
    expected, _ = update_once(config, hyper, experience(), TEXT)
    answers = jax.tree.map(lambda x: x[jnp.array([2, 0, 3, 1])], experience())
    text = jax.tree.map(lambda x: x[jnp.array([7, 1, 4, 0, 6, 2, 5, 3])], TEXT)
    found, _ = update_once(config, hyper, answers, text, micro_batches=2)
    for name, leaf in expected.learner.params.items():
        np.testing.assert_allclose(found.learner.params[name], leaf, rtol=1e-5, atol=1e-6)


def test_text_that_cannot_be_shared_out_or_scored_is_refused():
    config = ppo.Config(num_ppo_epochs=3, num_minibatches=2)
    with pytest.raises(UserError, match="8 rows cannot be shared out: give a multiple of 6"):
        update_once(config, ppo.Hyper(), experience(), TEXT)
    with pytest.raises(UserError, match="micro_batches=2 does not divide the 1 rows"):
        update_once(config, ppo.Hyper(), experience(), jax.tree.map(lambda x: x[:6], TEXT), micro_batches=2)
    update = jax.jit(ppo.make_update(config, tabular.score, PLAIN))
    state = ppo.init(tabular.init(), PLAIN, jax.random.key(0), ppo.Hyper())
    with pytest.raises(UserError, match="give make_update ptx_logprob_fn"):
        jax.jit(update)(state, ppo.Hyper(), experience(), jax.tree.map(lambda x: x[:6], TEXT))


# What it keeps -------------------------------------------------------------------------------------

VOCAB, PAID = 6, 5


def biased_score(params, sequences):
    """A table as in `tabular`, and a bias of each token, through which one text reaches all others."""
    before = jnp.roll(sequences.tokens, 1, axis=1)
    logp = jax.nn.log_softmax(params["logits"][before] + params["bias"])
    taken = jnp.take_along_axis(logp, sequences.tokens[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return TokenLogprobs(taken, entropy, jnp.zeros(taken.shape))


def text_of(key, params, first, rows):
    """One token behind `first`, drawn from the policy."""
    logits = params["logits"][first] + params["bias"]
    drawn = jax.random.categorical(key, logits, shape=(rows,))
    tokens = jnp.stack([jnp.full(rows, first), drawn], axis=1)
    there = jnp.ones(tokens.shape, jnp.int32)
    return Sequences(tokens, jnp.arange(2) * there, there, jnp.arange(2) * there > 0)


@pytest.mark.slow
def test_perplexity_on_text_is_kept_where_ppo_alone_loses_it():
    start = {"logits": jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)), "bias": jnp.zeros(VOCAB)}
    held_out = text_of(jax.random.key(9), start, 3, 2_000)
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1, whiten_advantages=False)

    def train(coef):
        hyper = ppo.Hyper(learning_rate=0.3, value_coef=0.0, ptx_coef=coef)
        update = jax.jit(ppo.make_update(config, biased_score, PLAIN, biased_score))

        def step(state, key):
            answer_key, text_key = jax.random.split(key)
            answers = text_of(answer_key, state.learner.params, 0, 64)
            rewards = (answers.tokens == PAID).astype(jnp.float32)
            logp, zeros = biased_score(state.learner.params, answers).logp, jnp.zeros(rewards.shape)
            advantages = rewards - jnp.mean(rewards[:, 1])
            batch = ppo.Batch(answers, answers.mask, logp, zeros, advantages, zeros)
            state, _ = update(state, hyper, batch, text_of(text_key, start, 3, 64))
            return state, jnp.mean(rewards[:, 1])

        state = ppo.init(start, PLAIN, jax.random.key(1), hyper)
        state, rewards = jax.lax.scan(step, state, jax.random.split(jax.random.key(2), 300))
        nats = -jnp.mean(biased_score(state.learner.params, held_out).logp[:, 1])
        return jnp.exp(nats), jnp.mean(rewards[-20:])

    before = float(jnp.exp(-jnp.mean(biased_score(start, held_out).logp[:, 1])))
    perplexity, reward = jax.jit(jax.vmap(train))(jnp.array([0.0, 1.0]))
    assert reward.min() > 0.95
    assert float(perplexity[0]) > 1.5 * before  # PPO alone says the paid token here too
    assert float(perplexity[1]) < 1.05 * before
