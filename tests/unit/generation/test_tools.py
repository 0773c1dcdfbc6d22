"""A tool that writes into answers while they are sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.generation import Sampling, generate, token_bias
from rlhf_jax.tasks import calculator

CONFIG = models.dense_config(vocab_size=11, width=16, num_layers=2, num_heads=2)
EOS, PAD, BELL = 1, 0, 3
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def echo(tokens, length):
    """Behind a bell: the number of tokens so far up to 10, then a 2."""
    last = jnp.take_along_axis(tokens, jnp.maximum(length - 1, 0)[:, None], axis=1)[:, 0]
    rings = (last == BELL) & (length > 0)
    reply = jnp.stack([jnp.minimum(length, 10), jnp.full_like(length, 2), jnp.full_like(length, -1)], axis=1)
    return jnp.where(rings[:, None], reply, -1)


def first_word(tokens, length):
    """Writes 4, 5 before the first token, and nothing else."""
    return jnp.where((length == 0)[:, None], jnp.asarray([4, 5]), -1)


def silent(tokens, length):
    return jnp.full((tokens.shape[0], 1), -1)


@functools.cache
def setup():
    params = models.init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, params)
    lengths = jnp.array([5, 2, 4, 1])
    mask = jnp.arange(5) >= 5 - lengths[:, None]
    return params, jnp.where(mask, jax.random.randint(jax.random.key(1), (4, 5), 4, 11), PAD), mask


def sample(tool_fn, key, **options):
    return _sample(*setup(), key, tool_fn=tool_fn, **options)


@functools.partial(jit, static_argnames=("tool_fn", "early_end", "group_size"))
def _sample(params, prompts, mask, key, tool_fn, early_end=True, group_size=1):
    options = {"max_new_tokens": 16, "eos_id": EOS, "pad_id": PAD, "group_size": group_size}
    bias = token_bias(11, {BELL: 3.0, EOS: -2.0})
    return generate(
        *models.make_decode_fns(CONFIG),
        params,
        prompts,
        mask,
        key,
        sampling=Sampling(bias=bias),
        early_end=early_end,
        tool_fn=tool_fn,
        **options,
    )


def replay(rollout, width=5):
    """(tokens, which are the policy's own) of each answer."""
    rows = rollout.sequences
    columns = (np.asarray(leaf)[:, width:] for leaf in (rows.tokens, rows.mask, rows.segment_ids))
    for tokens, own, there in zip(*columns, strict=True):
        yield tokens[there > 0].tolist(), own[there > 0].tolist()


def test_a_tool_writes_behind_what_rings_it_and_only_there():
    rung = 0
    for tokens, own in replay(sample(echo, jax.random.key(2), group_size=4)):
        place = 0
        while place < len(tokens):
            assert own[place]
            bell = tokens[place] == BELL
            place += 1
            if bell:
                reply = [min(place, 10), 2][: len(tokens) - place]
                assert tokens[place : place + 2] == reply
                assert not any(own[place : place + 2])
                rung, place = rung + 1, place + 2
    assert rung > 20


def test_log_probs_are_of_own_tokens_and_agree_with_rescoring():
    params, _, _ = setup()
    rollout = sample(echo, jax.random.key(3))
    score = jit(models.make_logprob_fn(CONFIG))(params, rollout.sequences)
    own = rollout.sequences.mask
    np.testing.assert_allclose(rollout.logp, jnp.where(own, score.logp, 0), atol=1e-5)
    assert np.all(np.asarray(rollout.filtered_logp)[~np.asarray(own)] == 0)
    by_tool = (rollout.sequences.segment_ids > 0) & ~own & (jnp.arange(own.shape[1]) >= 5)
    assert int(by_tool.sum()) > 6


def test_a_tool_may_speak_first_and_need_not_speak():
    first = sample(first_word, jax.random.key(4))
    np.testing.assert_array_equal(first.sequences.tokens[:, 5:7], np.tile([4, 5], (4, 1)))
    assert not np.any(first.sequences.mask[:, :7])
    assert np.all(first.sequences.mask[:, 7])
    alone, beside = sample(None, jax.random.key(4)), sample(silent, jax.random.key(4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone, beside)


@pytest.mark.parametrize("seed", [5, 6])
def test_running_all_steps_gives_the_same_rollout(seed):
    runs = [sample(echo, jax.random.key(seed), early_end=early_end) for early_end in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *runs)


@pytest.mark.slow
def test_the_calculator_answers_what_a_policy_writes():
    task = calculator.calculator_task(train=8, heldout=8, demonstrations=8, habits={"both": 1.0})
    tokenizer = task.tokenizer
    config = models.dense_config(vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=1)
    likely = {tokenizer.encode(character)[0]: 3.0 for character in "12+*="}

    @jit
    def answer(params, key):
        return generate(
            *models.make_decode_fns(config),
            params,
            jnp.asarray(task.heldout.tokens),
            jnp.asarray(task.heldout.mask),
            key,
            max_new_tokens=task.completion_length,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            sampling=Sampling(bias=token_bias(tokenizer.vocab_size, likely, banned=(tokenizer.eos_id,))),
            group_size=32,
            tool_fn=task.tool_fn,
        )

    rollout = answer(models.init_params(config, jax.random.key(0)), jax.random.key(1))
    numbers = 0
    for tokens, own in replay(rollout, task.heldout.tokens.shape[1]):
        line, place = [], 0
        while place < len(tokens):
            assert own[place]
            written, place = tokenizer.decode([tokens[place]], skip_special=False), place + 1
            if written != "=":
                line = [] if written == "\n" else [*line, written]
                continue
            found = calculator.evaluate("".join(line))
            reply = tokenizer.encode(("?" if found is None else str(found)) + "\n")[: len(tokens) - place]
            assert tokens[place : place + len(reply)] == reply
            assert not any(own[place : place + len(reply)])
            line, place, numbers = [], place + len(reply), numbers + (found is not None)
    assert numbers > 10
