"""Every rule against a naive NumPy one, and samples against the enumerated distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation import Sampling, generate, processors, sample_token
from rlhf_jax.generation.processors import Context
from rlhf_jax.generation.sampling import full_logp, process_logits, row_keys

EOS, PAD, STEPS = 1, 0, 3


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def only(probs, kept):
    probs = np.where(np.isin(np.arange(len(probs)), kept), probs, 0)
    return probs / probs.sum()


def naive_top_k(probs, k):
    return only(probs, np.argsort(-probs, kind="stable")[:k])


def naive_nucleus(probs, p, order):
    kept, mass = [], 0.0
    for token in order:
        if mass < p or not kept:
            kept.append(token)
        mass += probs[token]
    return only(probs, kept)


def naive_top_p(probs, p):
    return naive_nucleus(probs, p, np.argsort(-probs, kind="stable"))


def naive_min_p(probs, p):
    return only(probs, np.flatnonzero(probs >= p * probs.max()))


def naive_typical(probs, p):
    entropy = -np.sum(probs * np.log(probs))
    return naive_nucleus(probs, p, np.argsort(np.abs(-np.log(probs) - entropy), kind="stable"))


def naive_repetition(logits, seen, penalty):
    return [x if t not in seen else x / penalty if x > 0 else x * penalty for t, x in enumerate(logits)]


PROMPT = (2, 3)
BIAS = np.array([0.0, 0.5, -np.inf, 0.0, -1.0])
CASES = {
    "temperature": (Sampling(temperature=0.6), lambda x, _: softmax(x / 0.6)),
    "greedy": (Sampling(temperature=0.0), lambda x, _: naive_top_k(softmax(x), 1)),
    "top_k": (Sampling(top_k=2), lambda x, _: naive_top_k(softmax(x), 2)),
    "top_p": (Sampling(top_p=0.7), lambda x, _: naive_top_p(softmax(x), 0.7)),
    "min_p": (Sampling(min_p=0.3), lambda x, _: naive_min_p(softmax(x), 0.3)),
    "typical_p": (Sampling(typical_p=0.6), lambda x, _: naive_typical(softmax(x), 0.6)),
    "in_turn": (
        Sampling(temperature=1.4, top_k=3, top_p=0.8, min_p=0.2),
        lambda x, _: naive_min_p(naive_top_p(naive_top_k(softmax(x / 1.4), 3), 0.8), 0.2),
    ),
    "repetition": (
        Sampling(repetition_penalty=1.8),
        lambda x, said: softmax(naive_repetition(x, {*PROMPT, *said}, 1.8)),
    ),
    "frequency": (
        Sampling(frequency_penalty=0.9),
        lambda x, said: softmax(x - 0.9 * np.bincount(said, minlength=5)),
    ),
    "presence": (
        Sampling(presence_penalty=1.1),
        lambda x, said: softmax(x - 1.1 * (np.bincount(said, minlength=5) > 0)),
    ),
    "bias_and_ban": (Sampling(bias=jnp.array(BIAS)), lambda x, _: softmax(x + BIAS)),
    "min_length": (
        Sampling(min_new_tokens=2),
        lambda x, said: softmax(np.where((np.arange(5) == EOS) & (len(said) < 2), -np.inf, x)),
    ),
    "forced": (
        Sampling(forced_tokens=jnp.array([4, -1, 2])),
        lambda x, said: np.eye(5)[(4, 0, 2)[len(said)]] if len(said) in (0, 2) else softmax(x),
    ),
}


# Small programs that run once: they are compiled quickly rather than well.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnums=(0, 1), static_argnames="steps")
def sample(toy, rows, sampling, key, steps=STEPS):
    prompts = jnp.broadcast_to(jnp.array(PROMPT), (rows, 2))
    return generate(
        toy.prefill,
        toy.decode,
        toy.table,
        prompts,
        prompts > 0,
        key,
        max_new_tokens=steps,
        eos_id=EOS,
        pad_id=PAD,
        sampling=sampling,
    )


LIKE_OTHERS = ("greedy", "top_k", "top_p", "presence")  # "in_turn" and "frequency" go the same ways


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in CASES]
)
def test_samples_have_the_enumerated_distribution(name, toy, check_distribution):
    sampling, probs = CASES[name]
    rollout = sample(toy, 20_000, sampling, jax.random.key(3))
    expected = toy.enumerate(PROMPT, STEPS, lambda logits, said: probs(logits, np.array(said, int)))
    check_distribution(rollout, expected)
    # Both log-probs add up to those of the enumeration: of the filtered, and of the full distribution.
    mask = np.asarray(rollout.sequences.mask)
    rows = zip(np.asarray(rollout.sequences.tokens[:200]), mask[:200], strict=True)
    tokens = [tuple(row[kept].tolist()) for row, kept in rows]
    found = np.where(mask, rollout.filtered_logp, 0).sum(axis=1)[:200]
    np.testing.assert_allclose(np.exp(found), [expected[t] for t in tokens], rtol=1e-4)
    temperature = float(sampling.temperature) or 1.0
    full = toy.enumerate(PROMPT, STEPS, lambda logits, _: softmax(logits / temperature))
    found = np.where(mask, rollout.logp, 0).sum(axis=1)[:200]
    np.testing.assert_allclose(np.exp(found), [full[t] for t in tokens], rtol=1e-4)


def test_equally_likely_tokens_do_not_slip_through():
    logits = jnp.zeros((1, 6))
    assert (processors.top_k(logits, 2) > -jnp.inf).tolist() == [[True, True, False, False, False, False]]
    assert (processors.top_p(logits, 0.5) > -jnp.inf).sum() == 3
    assert (processors.top_k(logits, 0) > -jnp.inf).sum() == 1
    assert (processors.top_p(logits, 0.0) > -jnp.inf).sum() == 1
    assert (processors.min_p(logits, 2.0) > -jnp.inf).sum() == 6


def test_rules_that_forbid_everything_end_the_answer(toy):
    everything = processors.token_bias(5, banned=(0, 1, 2, 3, 4))
    rollout = sample(toy, 2, Sampling(bias=everything), jax.random.key(0))
    np.testing.assert_array_equal(rollout.sequences.tokens[:, 2:], [[EOS, PAD, PAD]] * 2)
    np.testing.assert_array_equal(rollout.filtered_logp, np.zeros((2, 5)))
    assert rollout.finished.all()


def test_reported_log_probs_are_of_both_distributions():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    context = Context(jnp.zeros((1, 3), int), jnp.ones((1, 1), bool), jnp.zeros(1, int))
    sampling = Sampling(temperature=0.5, top_k=2)
    processed = process_logits(logits, sampling, context, eos_id=3)
    draw = jit(lambda key: sample_token(row_keys(key, 1), logits, processed, sampling))
    for seed in range(5):
        token, logp, filtered_logp = draw(jax.random.key(seed))
        np.testing.assert_allclose(logp, full_logp(logits, sampling)[0, token], rtol=1e-6)
        np.testing.assert_allclose(jnp.exp(filtered_logp), [[0.8, 0.2][token[0]]], rtol=1e-5)


@pytest.mark.slow
def test_rows_draw_independently_of_their_neighbours(toy):
    many = sample(toy, 8, Sampling(), jax.random.key(5), steps=6)
    few = sample(toy, 3, Sampling(), jax.random.key(5), steps=6)
    np.testing.assert_array_equal(many.sequences.tokens[:3], few.sequences.tokens)
    assert len(np.unique(np.asarray(many.sequences.tokens), axis=0)) > 3
    last = sample(toy, 2, Sampling(), row_keys(jax.random.key(5), 2, first=6), steps=6)
    np.testing.assert_array_equal(many.sequences.tokens[6:], last.sequences.tokens)


def test_a_group_reads_its_prompt_once(toy):
    """And draws what its rows would have drawn on their own."""
    prompts = jnp.array([[2, 3], [4, 2]])
    options = {"max_new_tokens": 6, "eos_id": EOS, "pad_id": PAD}
    rows = []

    def prefill(params, tokens, *rest):
        rows.append(len(tokens))
        return toy.prefill(params, tokens, *rest)

    def both(key):
        table, repeated = toy.table, prompts.repeat(3, axis=0)
        grouped = generate(prefill, toy.decode, table, prompts, prompts > 0, key, group_size=3, **options)
        return grouped, generate(toy.prefill, toy.decode, table, repeated, repeated > 0, key, **options)

    grouped, plain = jit(both)(jax.random.key(1))
    assert rows[0] == 2
    jax.tree.map(np.testing.assert_array_equal, grouped, plain)
