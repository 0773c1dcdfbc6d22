"""The exact KL in GRPO's loss: of whole distributions, against enumeration and the sampled estimates."""

import dataclasses
import itertools

import gradient_bias as tool
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import few

from rlhf_jax import losses, models
from rlhf_jax.algorithms import grpo
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.losses.reductions import sequence_sum
from rlhf_jax.models.logprob_fns import make_top_k_fn
from rlhf_jax.rollout.step import make_grpo_train_step

PREFIX = {(): 0, (1,): 1, (2,): 2, (1, 1): 3, (1, 2): 4, (2, 1): 5, (2, 2): 6}
BETA = 0.3


def expected(kl_fn):
    """Gradient [7, 3] of the KL of each answer, weighted by the probability of the answer."""
    toy, sequences = tool.make_toy(), tool.sequences_of(tool.ANSWERS)
    shares = tool.probabilities(toy.old)[:, None]

    def mean(table):
        return jnp.sum(jnp.where(sequences.mask, shares * kl_fn(table, jnp.asarray(toy.ref), sequences), 0))

    return jax.grad(mean)(jnp.asarray(toy.old))


def dense(table, sequences):
    """[B, T, V] log-probs of the toy's tokens."""
    rows = [[PREFIX.get(tuple(row[1:t]), 0) for t in range(4)] for row in np.asarray(sequences.tokens)]
    return jax.nn.log_softmax(table)[jnp.asarray(rows)]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_the_expected_gradient_is_that_of_the_kl_at_each_prefix(float64):
    """sum over prefixes of the chance to reach them, held, times the gradient of the KL of what follows."""
    toy = tool.make_toy()
    old = np.exp(jax.nn.log_softmax(toy.old))
    reached = {
        prefix: np.prod([old[PREFIX[prefix[:t]], prefix[t]] for t in range(len(prefix))])
        for n in range(3)
        for prefix in itertools.product((1, 2), repeat=n)
    }

    def held(table):
        total = 0.0
        for prefix, chance in reached.items():
            row, ref = (jax.nn.log_softmax(x)[PREFIX[prefix]] for x in (table, jnp.asarray(toy.ref)))
            total += chance * jnp.sum(jnp.exp(row) * (row - ref))
        return total

    def exact(table, ref, sequences):
        return losses.top_k_kl(dense(table, sequences), dense(ref, sequences), sequences.mask)

    wanted = jax.grad(held)(jnp.asarray(toy.old))
    assert np.abs(wanted).max() > 0.05
    np.testing.assert_allclose(expected(exact), wanted, atol=1e-13)


def tiny_model(vocab=7):
    config = models.dense_config(vocab_size=vocab, width=8, num_layers=1, num_heads=2, num_kv_heads=1)
    params = [models.init_params(config, jax.random.key(seed)) for seed in (0, 1)]
    tokens = jax.random.randint(jax.random.key(2), (4, 6), 0, vocab)
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
    mask = positions >= jnp.array([2, 3, 2, 4])[:, None]
    return config, params, Sequences(tokens, positions, jnp.ones_like(tokens), mask)


def kl_by_hand(policy, reference):
    """[B, T] of [B, T, V] log-probs, in NumPy."""
    policy, reference = np.asarray(policy, np.float64), np.asarray(reference, np.float64)
    return np.sum(np.exp(policy) * (policy - reference), axis=-1)


@pytest.mark.parametrize("temperature", few([1.0, 0.7], 0.7))
def test_all_candidates_are_the_kl_of_the_distributions_and_few_are_less(temperature):
    config, (params, reference), rows = tiny_model()
    full = jax.jit(models.make_distribution_fn(config, temperature=temperature))
    wanted = kl_by_hand(full(params, rows), full(reference, rows))
    score = jax.jit(models.make_logprob_fn(config, temperature=temperature))
    found = []
    for k in (7, 3, 1):
        ref_logp, candidates = jax.jit(make_top_k_fn(config, k))(reference, rows, temperature)
        asked = dataclasses.replace(rows, candidates=candidates)
        found.append(losses.top_k_kl(score(params, asked).candidate_logp, ref_logp, rows.mask))
    counts = np.asarray(rows.mask)
    np.testing.assert_allclose(np.asarray(found[0])[counts], wanted[counts], atol=2e-5)
    assert np.all(np.asarray(found[1])[counts] < wanted[counts])
    assert np.all(np.asarray(found[2]) <= np.asarray(found[1]) + 1e-6)


@pytest.mark.slow
def test_models_that_give_logits_only_say_the_same_of_candidates():
    config, (params, _), rows = tiny_model()
    asked = dataclasses.replace(rows, candidates=jnp.broadcast_to(jnp.array([4, 0]), (4, 6, 2)))
    ours = models.make_logprob_fn(config, temperature=0.5)(params, asked)
    theirs = models.logprobs_from_logits_fn(models.make_logits_fn(config), temperature=0.5)(params, asked)
    np.testing.assert_allclose(ours.candidate_logp[:, 1:], theirs.candidate_logp[:, 1:], atol=2e-5)
    counts = np.asarray(rows.mask)
    np.testing.assert_allclose(np.asarray(ours.logp)[counts], np.asarray(theirs.logp)[counts], atol=2e-5)
    assert not np.asarray(ours.logp)[~counts].any()  # nobody asked for the others


@pytest.mark.slow
def test_a_step_with_the_exact_kl_alone_goes_down_that_kl():
    """Rewards that are all equal teach nothing: what is left is the gradient of the KL by hand."""
    config, (params, reference), rows = tiny_model()
    tx, score = optax.identity(), jax.jit(models.make_logprob_fn(config))
    settings = grpo.Config(group_size=2, reduce=sequence_sum)
    step = make_grpo_train_step(settings, score, tx, top_k_fn=make_top_k_fn(config, 7))
    state = grpo.init(params, tx, jax.random.key(0))
    rollout = rollout_of(score, params, rows)
    new, metrics = jax.jit(step)(
        state, grpo.Hyper(learning_rate=1.0, kl_coef=BETA), reference, rollout, jnp.ones(4)
    )
    full = jax.jit(models.make_distribution_fn(config))
    ref = full(reference, rows)

    def by_hand(params):
        logp = full(params, rows)
        kl = jnp.sum(jnp.exp(logp) * (logp - ref), axis=-1)
        return BETA * jnp.sum(jnp.where(rows.mask, kl, 0)) / 4

    moved = jax.tree.map(lambda a, b: a - b, params, new.learner.params)
    gradient = jax.grad(by_hand)(params)
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, gradient)
    per_token = kl_by_hand(full(params, rows), ref)[np.asarray(rows.mask)].mean()
    np.testing.assert_allclose(metrics["kl_loss"], per_token, rtol=1e-4)


def rollout_of(score, params, rows):
    return Rollout(rows, score(params, rows).logp, jnp.ones(len(rows.tokens), bool))


def test_what_the_exact_kl_needs_is_said():
    config, (params, reference), rows = tiny_model()
    logp, _ = make_top_k_fn(config, 3)(reference, rows)
    batch = grpo.Batch(rows, logp[..., 0], None, jnp.zeros(4), ref_candidate_logp=logp)
    with pytest.raises(UserError, match="candidates"):
        grpo.batch_loss(grpo.Config(), grpo.Hyper(), models.make_logprob_fn(config)(params, rows), batch)
    with pytest.raises(UserError, match="replay"):
        make_grpo_train_step(
            grpo.Config(num_replayed=1), models.make_logprob_fn(config), optax.identity(), top_k_fn=print
        )
