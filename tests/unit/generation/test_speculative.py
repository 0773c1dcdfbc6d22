"""Speculative decoding has the model's own distribution, whatever guesses; slots are filled in any order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.generation import (
    Sampling,
    continuous_batching_generate,
    draft_model_proposer,
    generate,
    lookahead_proposer,
    prompt_lookup_proposer,
    regex_automaton,
    speculative_decode,
    stop_automaton,
)

EOS, PAD = 1, 0
# Small programs that run once: they are compiled quickly rather than well.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CONFIG = models.dense_config(vocab_size=11, width=16, num_layers=1, num_heads=2)
SMALL = models.dense_config(vocab_size=11, width=8, num_layers=1, num_heads=2)
OPTIONS = {"eos_id": EOS, "pad_id": PAD}


def far_from_uniform(config, seed):
    params = models.init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, params)


def prompts_of(lengths, width=5):
    mask = jnp.arange(width) >= width - jnp.array(lengths)[:, None]
    return jnp.where(mask, jax.random.randint(jax.random.key(1), mask.shape, 2, 11), PAD), mask


def proposers(toy, other):
    return {
        "model": draft_model_proposer(
            other.prefill, other.extend, other.table, num_speculative_tokens=3, eos_id=EOS
        ),
        "prompt": prompt_lookup_proposer(num_speculative_tokens=3, longest=2),
        "lookahead": lookahead_proposer(num_speculative_tokens=3, num_slots=4),
    }


@functools.partial(jit, static_argnums=(0, 1, 2), static_argnames="steps")
def speculate(toy, rows, proposer, sampling, key, prompt, steps=4):
    prompts = jnp.broadcast_to(prompt, (rows, len(prompt)))
    return speculative_decode(
        toy.prefill,
        toy.extend,
        toy.table,
        prompts,
        prompts > 0,
        key,
        proposer=proposer,
        max_new_tokens=steps,
        sampling=sampling,
        **OPTIONS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "prompt", "lookahead"])
def test_speculative_samples_have_the_target_distribution(name, toy, make_toy, check_distribution):
    proposer = proposers(toy, make_toy(seed=7))[name]
    prompt = jnp.array([2, 3, 4, 2, 3])
    sampling = Sampling(temperature=0.9)
    rollout, acceptance = speculate(toy, 100_000, proposer, sampling, jax.random.key(0), prompt)

    def probs(logits, _):
        weights = np.exp(logits / 0.9)
        return weights / weights.sum()

    expected = toy.enumerate((2, 3), 4, probs)
    check_distribution(rollout, expected)
    share = acceptance.num_accepted_tokens.sum() / acceptance.num_draft_tokens.sum()
    assert 0.02 < share < 0.95
    mask = np.asarray(rollout.sequences.mask)[:100]
    tokens = np.asarray(rollout.sequences.tokens)[:100]
    found = np.where(mask, rollout.filtered_logp[:100], 0).sum(axis=1)
    wanted = [expected[tuple(row[kept].tolist())] for row, kept in zip(tokens, mask, strict=True)]
    np.testing.assert_allclose(np.exp(found), wanted, rtol=1e-4)


@pytest.mark.slow
def test_rules_hold_in_speculative_samples_too(toy, make_toy, check_distribution):
    proposer = proposers(toy, make_toy(seed=7))["model"]
    sampling = Sampling(top_k=3, presence_penalty=0.7, min_new_tokens=1)
    rollout, _ = speculate(toy, 30_000, proposer, sampling, jax.random.key(4), jnp.array([2, 3]), steps=3)

    def probs(logits, said):
        logits = logits - 0.7 * (np.bincount(np.array(said, int), minlength=5) > 0)
        if not said:
            logits[EOS] = -np.inf
        logits = np.where(np.isin(np.arange(5), np.argsort(-logits)[:3]), logits, -np.inf)
        return np.exp(logits) / np.exp(logits).sum()

    check_distribution(rollout, toy.enumerate((2, 3), 3, probs))


@pytest.fixture(scope="module")
def decoder():
    """A decoder, prompts of unequal lengths, and greedy and sampled answers to them."""
    params, (prompts, mask) = far_from_uniform(CONFIG, 0), prompts_of([5, 2, 4, 1, 3, 5, 2])
    plain = jit(functools.partial(generate, *models.make_decode_fns(CONFIG), max_new_tokens=14, **OPTIONS))
    greedy = plain(params, prompts, mask, jax.random.key(0), sampling=Sampling(temperature=0.0))
    sampled = plain(params, prompts, mask, jax.random.key(0), sampling=Sampling(temperature=1.0))
    return params, prompts, mask, greedy, sampled


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("model", "prompt")), "itself", "lookahead"],
)
def test_greedy_speculative_is_greedy(name, decoder):
    params, prompts, mask, greedy, _ = decoder
    draft = SMALL if name == "model" else CONFIG
    proposer = {
        "model": lambda: draft_model_proposer(
            models.make_decode_fns(draft)[0],
            models.make_extend_fn(draft),
            far_from_uniform(draft, 0),
            num_speculative_tokens=3,
            eos_id=EOS,
        ),
        "prompt": lambda: prompt_lookup_proposer(num_speculative_tokens=3),
        "lookahead": lambda: lookahead_proposer(num_speculative_tokens=3),
    }[name if name != "itself" else "model"]()

    @jit
    def run(params):
        return speculative_decode(
            models.make_decode_fns(CONFIG)[0],
            models.make_extend_fn(CONFIG),
            params,
            prompts,
            mask,
            jax.random.key(0),
            proposer=proposer,
            max_new_tokens=14,
            sampling=Sampling(temperature=0.0),
            **OPTIONS,
        )

    found, acceptance = run(params)
    np.testing.assert_array_equal(found.sequences.tokens, greedy.sequences.tokens)
    np.testing.assert_array_equal(found.finished, greedy.finished)
    np.testing.assert_allclose(found.logp, greedy.logp, atol=1e-4)
    lengths = np.asarray(greedy.sequences.mask.sum(axis=1))
    checks = np.asarray(acceptance.num_drafts)
    assert (checks <= lengths).all()
    if name == "itself":  # every guess is right: four tokens a check
        np.testing.assert_array_equal(checks, -(-(lengths - 1) // 4))


@pytest.mark.parametrize(("slots", "refill"), [(3, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_slots_are_filled_in_any_order_and_change_nothing(decoder, slots, refill):
    params, prompts, mask, _, sampled = decoder
    lengths = np.asarray(sampled.sequences.mask.sum(axis=1))
    assert len(set(lengths.tolist())) > 2

    @functools.partial(jit, static_argnames=("slots", "refill"))
    def run(params, slots, refill):
        return continuous_batching_generate(
            models.make_decode_fns(CONFIG)[0],
            models.make_extend_fn(CONFIG),
            params,
            prompts,
            mask,
            jax.random.key(0),
            max_num_seqs=slots,
            prefill_batch_size=refill,
            max_new_tokens=14,
            **OPTIONS,
        )

    found = run(params, slots, refill)
    np.testing.assert_array_equal(found.sequences.tokens, sampled.sequences.tokens)
    np.testing.assert_array_equal(found.sequences.mask, sampled.sequences.mask)
    np.testing.assert_array_equal(found.finished, sampled.finished)
    np.testing.assert_allclose(found.logp, sampled.logp, atol=1e-5)


@pytest.mark.slow
def test_continuous_batches_obey_automata(toy):
    tokenizer = character_tokenizer("ab")
    sampling = Sampling(
        constraint=regex_automaton(tokenizer, "(ab|b)*"), stop=stop_automaton(tokenizer, ["bb"])
    )
    prompts = jnp.broadcast_to(jnp.array([2, 3]), (40, 2))
    options = {"max_new_tokens": 8, "eos_id": 2, "pad_id": PAD, "sampling": sampling}
    inputs = toy.table, prompts, prompts > 0, jax.random.key(0)
    found = jit(
        functools.partial(continuous_batching_generate, toy.prefill, toy.extend, max_num_seqs=7, **options)
    )(*inputs)
    plain = jit(functools.partial(generate, toy.prefill, toy.decode, **options))(*inputs)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    rows = zip(*jax.device_get((found.sequences.tokens, found.sequences.mask)), strict=True)
    texts = [tokenizer.decode(row[kept]) for row, kept in rows]
    assert all("aa" not in text and text.find("bb") in (-1, len(text) - 2) for text in texts)
    assert len(set(texts)) > 3
