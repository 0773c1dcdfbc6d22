import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.generation import Sampling, continuous_batching_generate, generate

TOKENIZER = character_tokenizer("0123456789+=")
CONFIG = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2)
ENDS = {"max_new_tokens": 5, "eos_id": TOKENIZER.eos_id, "pad_id": TOKENIZER.pad_id}
WIDTH = 8


class Recurrent(nnx.Module):
    """Logits of a decaying sum of embeddings: causal, and aware of order."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(TOKENIZER.vocab_size, WIDTH, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, TOKENIZER.vocab_size, rngs=rngs)

    def hidden(self, tokens):
        states, time = self.embed(tokens), jnp.arange(tokens.shape[1])
        decay = jnp.tril(0.7 ** jnp.abs(time[:, None] - time))
        for layer in self.layers:
            decay = jnp.tril(
                0.7 ** jnp.abs(jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1]))
            )
            states = states + jnp.tanh(layer(jnp.einsum("ts,bsd->btd", decay, states)))
        return states

    def __call__(self, tokens):
        return self.head(self.hidden(tokens))


class Bigram(linen.Module):
    @linen.compact
    def __call__(self, tokens, positions, segment_ids):
        return linen.Dense(TOKENIZER.vocab_size)(linen.Embed(TOKENIZER.vocab_size, 4)(tokens))


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(models.init_params, CONFIG))(jax.random.key(0))


@pytest.fixture(scope="module")
def own(params):
    return models.make_policy(CONFIG, params, TOKENIZER)


@pytest.fixture(scope="module")
def foreign(own):
    """The same decoder as a function that knows no cache."""

    def apply(params, tokens, positions, segment_ids):
        return models.logits(
            CONFIG, params, models.hidden_states(CONFIG, params, tokens, positions, segment_ids)
        )

    return models.wrap(
        apply, own.params, TOKENIZER, hidden_fn=functools.partial(models.hidden_states, CONFIG)
    )


@pytest.fixture(scope="module")
def module():
    return Recurrent(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def nnx_policy(module):
    return models.wrap(module, None, TOKENIZER, hidden_fn="hidden")


def padded_rows():
    """Three rows, padded on either side."""
    segments = np.zeros((3, 9), np.int32)
    for row, (start, end) in enumerate([(0, 9), (3, 9), (0, 5)]):
        segments[row, start:end] = 1
    tokens = np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, segments.shape)
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    return Sequences(*map(jnp.asarray, (tokens, positions, segments, segments > 0)))


def prompts():
    return left_pad([TOKENIZER.encode(text) for text in ("1+2=", "=", "90+")], 4, pad_id=TOKENIZER.pad_id)


def sampled(policy, *, group_size=1, temperature=1.0):
    run = functools.partial(generate, policy.prefill, policy.decode, group_size=group_size, **ENDS)
    return jax.jit(run)(policy.params, *prompts(), jax.random.key(3), sampling=Sampling(temperature))


def close(ours, theirs, mask=True, atol=1e-5):
    np.testing.assert_allclose(np.where(mask, ours, 0), np.where(mask, theirs, 0), atol=atol)


def test_functions_of_a_foreign_model_are_those_of_ours(own, foreign):
    rows = padded_rows()
    inside = np.array(rows.segment_ids > 0) & (np.array(rows.positions) > 0)
    ours, theirs = (p.make_logprob_fn(temperature=0.7)(p.params, rows) for p in (own, foreign))
    close(ours.logp, theirs.logp, inside)
    close(ours.entropy, theirs.entropy, inside)
    (logp, match), (their_logp, their_match) = (
        p.make_greedy_match_fn()(p.params, rows) for p in (own, foreign)
    )
    close(logp, their_logp, inside)
    np.testing.assert_array_equal(np.array(match)[inside], np.array(their_match)[inside])
    for policy in (own, foreign):
        np.testing.assert_allclose(policy.logits(rows.tokens), own.logits(rows.tokens), atol=1e-5)


@pytest.mark.parametrize("name", ["make_actor_critic_fn", "make_shared_trunk_actor_critic_fn"])
def test_values_stand_on_hidden_states(own, foreign, name):
    rows, value = padded_rows(), own.init_scalar_model(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, foreign.init_scalar_model(jax.random.key(1)), value)
    both = {"policy": own.params, "value": value}
    ours, theirs = (getattr(p, name)()(both, rows) for p in (own, foreign))
    close(ours.value, theirs.value, np.array(rows.segment_ids > 0))
    assert float(jnp.std(theirs.value)) > 0


@pytest.mark.parametrize("group_size", few([1, 2], 2))
@pytest.mark.slow
def test_sampling_without_a_cache_samples_the_same(own, foreign, group_size):
    ours, theirs = (sampled(policy, group_size=group_size) for policy in (own, foreign))
    np.testing.assert_array_equal(ours.sequences.tokens, theirs.sequences.tokens)
    close(ours.logp, theirs.logp)


@pytest.mark.slow
def test_slots_are_refilled_without_a_cache(foreign):
    run = functools.partial(
        continuous_batching_generate, foreign.prefill, foreign.extend, max_num_seqs=2, **ENDS
    )
    rollout = jax.jit(run)(foreign.params, *prompts(), jax.random.key(3))
    whole = sampled(foreign)
    np.testing.assert_array_equal(rollout.sequences.tokens, whole.sequences.tokens)
    close(rollout.logp, whole.logp)


@pytest.mark.parametrize("name", ["foreign", "nnx_policy"])
def test_sampler_and_scorer_agree(name, request):
    policy = request.getfixturevalue(name)
    rollout = sampled(policy, temperature=0.8)
    rescored = policy.make_logprob_fn(temperature=0.8)(policy.params, rollout.sequences)
    close(rescored.logp, rollout.logp, np.array(rollout.sequences.mask))


def test_greedy_tokens_are_the_argmax_of_the_module_on_the_row_alone(module, nnx_policy):
    rows = jax.device_get(sampled(nnx_policy, temperature=0.0).sequences)
    for row, there, mask in zip(rows.tokens, rows.segment_ids > 0, rows.mask, strict=True):
        alone, new = row[there], int(mask.sum())
        guesses = np.argmax(module(alone[None])[0], axis=-1)
        np.testing.assert_array_equal(alone[-new:], guesses[-new - 1 : -1])


def test_a_module_without_masks_reads_rows_as_if_alone(module, nnx_policy):
    rows = padded_rows()
    logits = nnx_policy.logits_fn(nnx_policy.params, rows.tokens, rows.positions, rows.segment_ids)
    for row in range(3):
        kept = np.array(rows.segment_ids[row] > 0)
        np.testing.assert_allclose(logits[row][kept], module(rows.tokens[row][kept][None])[0], atol=1e-5)


def test_packed_rows_are_refused_by_a_module_without_masks(nnx_policy):
    rows = padded_rows()
    packed = dataclasses.replace(rows, segment_ids=rows.segment_ids.at[:, 4:].set(2))
    assert not nnx_policy.takes_packed_rows
    with pytest.raises(UserError, match="one sample a row"):
        nnx_policy.make_logprob_fn()(nnx_policy.params, packed)
    assert np.isnan(jax.jit(nnx_policy.make_logprob_fn())(nnx_policy.params, packed).logp).any()


def test_parameters_are_nested_dictionaries_with_texts_for_keys(nnx_policy):
    assert set(nnx_policy.params) == {"embed", "layers", "head"}
    assert set(nnx_policy.params["layers"]) == {"0", "1"}
    doubled = jax.tree.map(lambda leaf: 2 * leaf, nnx_policy.params)
    tokens = padded_rows().tokens
    assert np.max(np.abs(nnx_policy.with_params(doubled).logits(tokens) - nnx_policy.logits(tokens))) > 0.1


def test_a_linen_module_brings_its_variables():
    module, rows = Bigram(), padded_rows()
    variables = module.init(jax.random.key(0), rows.tokens, rows.positions, rows.segment_ids)
    policy = models.wrap(module, variables, TOKENIZER)
    expected = module.apply(variables, rows.tokens, rows.positions, rows.segment_ids)
    np.testing.assert_allclose(policy.logits(rows.tokens), expected, atol=1e-6)


def test_texts_go_in_and_come_out(own, nnx_policy):
    for policy in (own, nnx_policy):
        greedy = policy.generate(["1+2=", "9"], max_new_tokens=3, temperature=0.0)
        assert greedy == policy.generate(["1+2=", "9"], max_new_tokens=3, temperature=0.0, seed=5)
        assert all(isinstance(text, str) and len(text) <= 3 for text in greedy)
    with pytest.raises(UserError, match="give a list"):
        own.generate("1+2=", max_new_tokens=3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((lambda p, t, q: t, {}), {}, "it must take"),
        ((lambda p, t: t, {}), {}, "must give"),
        ((lambda p, t: jnp.zeros((*t.shape, 2)), {}), {}, "tokenizer of this model"),
        ((lambda p, t: jnp.zeros((*t.shape, 99)), {}), {"decode": lambda *_: None}, "go together"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, message):
    with pytest.raises(UserError, match=message):
        models.wrap(*arguments, TOKENIZER, **options)


def test_what_a_foreign_model_lacks_is_said(tmp_path):
    policy = models.wrap(lambda p, t: p["table"][t], {"table": jnp.zeros((20, 20))}, TOKENIZER)
    with pytest.raises(UserError, match="hidden_fn"):
        policy.make_value_fn()
    with pytest.raises(UserError, match="no Hugging Face layout"):
        policy.save(tmp_path / "out")
    assert policy.training_flops(rows=2, length=4) == 0
