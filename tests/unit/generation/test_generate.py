import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.data.packing import bucket_batches, left_pad
from rlhf_jax.generation import Sampling, generate

CONFIG = models.dense_config(vocab_size=11, width=16, num_layers=2, num_heads=2)
EOS, PAD = 1, 0


@functools.cache
def _setup():
    params = models.init_params(CONFIG, jax.random.key(0))
    # Larger weights, so that distributions are far from uniform.
    params = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, params)
    lengths = jnp.array([5, 2, 4, 1])
    mask = jnp.arange(5) >= 5 - lengths[:, None]
    prompts = jnp.where(mask, jax.random.randint(jax.random.key(1), (4, 5), 2, 11), PAD)
    return params, prompts, mask


# Small programs that run once: they are compiled quickly rather than well.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames=("max_new_tokens", "early_end"))
def _generate(params, prompts, mask, key, sampling, max_new_tokens=12, early_end=True):
    prefill, decode = models.make_decode_fns(CONFIG)
    return generate(
        prefill,
        decode,
        params,
        prompts,
        mask,
        key,
        max_new_tokens=max_new_tokens,
        eos_id=EOS,
        pad_id=PAD,
        sampling=sampling,
        early_end=early_end,
    )


@functools.partial(jit, static_argnames="temperature")
def _score(params, sequences, temperature=1.0):
    return models.make_logprob_fn(CONFIG, temperature=temperature)(params, sequences)


@pytest.mark.slow
def test_steps_after_the_end_of_all_rows_change_nothing():
    params, prompts, mask = _setup()
    rows = (params, prompts[:2], mask[:2], jax.random.key(5), Sampling(temperature=3.0))
    short, long = (_generate(*rows, max_new_tokens=64, early_end=early_end) for early_end in (True, False))
    assert bool(jnp.all(short.finished))
    assert int(short.sequences.mask.sum(axis=1).max()) < 60  # so the loop did end early
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), short, long)


@pytest.mark.parametrize("temperature", few([0.5, 1.0], 0.5))
def test_sampled_log_probs_agree_with_rescoring(temperature):
    params, prompts, mask = _setup()
    rollout = _generate(params, prompts, mask, jax.random.key(2), Sampling(temperature=temperature))
    score = _score(params, rollout.sequences, temperature)
    rescored = jnp.where(rollout.sequences.mask, score.logp, 0)
    np.testing.assert_allclose(rollout.logp, rescored, atol=1e-5)
    assert rollout.sequences.mask.sum() > 8


def test_filters_do_not_change_reported_log_probs():
    params, prompts, mask = _setup()
    rollout = _generate(params, prompts, mask, jax.random.key(3), Sampling(top_k=3, top_p=0.8))
    score = _score(params, rollout.sequences)
    np.testing.assert_allclose(rollout.logp, jnp.where(rollout.sequences.mask, score.logp, 0), atol=1e-5)


def test_greedy_takes_the_argmax_of_the_full_forward():
    params, prompts, mask = _setup()
    rollout = _generate(params, prompts, mask, jax.random.key(4), Sampling(temperature=0.0))
    rows = rollout.sequences

    @jit
    def argmax(params):
        hidden = models.hidden_states(CONFIG, params, rows.tokens, rows.positions, rows.segment_ids)
        return jnp.argmax(models.logits(CONFIG, params, hidden), axis=-1)

    best = argmax(params)
    sampled = np.asarray(rows.mask)
    np.testing.assert_array_equal(
        np.asarray(rows.tokens)[sampled], np.asarray(jnp.roll(best, 1, axis=1))[sampled]
    )


def test_rows_end_at_eos_and_are_padded_after_it():
    params, prompts, mask = _setup()
    for seed in range(5):
        rollout = _generate(params, prompts, mask, jax.random.key(seed), Sampling())
        tokens, sampled = (np.asarray(x)[:, 5:] for x in (rollout.sequences.tokens, rollout.sequences.mask))
        for row in range(4):
            ends = np.flatnonzero(tokens[row][sampled[row]] == EOS)
            length = sampled[row].sum()
            assert rollout.finished[row] == (len(ends) == 1)
            assert length == (ends[0] + 1 if rollout.finished[row] else 12)
            assert (tokens[row, length:] == PAD).all()
            assert sampled[row, :length].all()


def test_prompts_of_different_lengths_do_not_disturb_each_other():
    params, prompts, mask = _setup()
    together = _generate(params, prompts, mask, jax.random.key(0), Sampling(temperature=0.0))
    row, length = 1, 2
    short = prompts[row : row + 1, 5 - length :]
    alone = _generate(params, short, short > PAD, jax.random.key(9), Sampling(temperature=0.0))
    np.testing.assert_array_equal(alone.sequences.tokens[0, length:], together.sequences.tokens[row, 5:])


def test_prompts_of_many_lengths_compile_few_programs(toy):
    programs = []

    @jit
    def run(tokens, mask):
        programs.append(tokens.shape)
        fns = toy.prefill, toy.decode, toy.table
        return generate(*fns, tokens, mask, jax.random.key(0), max_new_tokens=2, eos_id=EOS, pad_id=PAD)

    lengths = range(2, 61)
    for columns, places in bucket_batches(lengths, size=8):
        run(*left_pad([[2] * lengths[place] for place in places], columns))
    assert programs == [(8, 16), (8, 32), (8, 64)]


def test_temperature_and_top_p_do_not_recompile():
    params, prompts, mask = _setup()
    _generate.clear_cache()
    for temperature in (0.5, 0.9):
        _generate(params, prompts, mask, jax.random.key(0), Sampling(temperature=jnp.float32(temperature)))
    assert _generate._cache_size() == 1


@pytest.mark.slow
def test_scalars_of_all_sampling_rules_do_not_trace_anew(toy):
    @jit
    @chex.assert_max_traces(n=1)
    def run(sampling, key):
        prompts = jnp.full((4, 2), 2)
        fns = toy.prefill, toy.decode, toy.table
        return generate(
            *fns, prompts, prompts > 0, key, max_new_tokens=6, eos_id=EOS, pad_id=PAD, sampling=sampling
        )

    drawn = []
    for number, temperature in enumerate((0.0, 0.7, 1.0)):
        sampling = Sampling(
            temperature=temperature,
            top_k=5 - number,
            top_p=0.8 + 0.1 * number,
            min_p=0.01 * number,
            typical_p=0.9 + 0.05 * number,
            repetition_penalty=1.0 + 0.2 * number,
            frequency_penalty=0.1 * number,
            presence_penalty=0.2 * number,
            min_new_tokens=number,
        )
        drawn.append(run(sampling, jax.random.key(number)).sequences.tokens)
    assert not jnp.array_equal(drawn[0], drawn[2])  # so the scalars did reach the program
