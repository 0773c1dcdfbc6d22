"""Stop strings across the borders of tokens, regular expressions and JSON schemas as tables."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import byte_tokenizer, character_tokenizer, train_bpe
from rlhf_jax.generation import Sampling, generate, json_automaton, regex_automaton, stop_automaton
from rlhf_jax.generation.automata import allowed_tokens, next_state, token_bytes
from rlhf_jax.generation.loop import start_context
from rlhf_jax.generation.sampling import process_logits

WORDS = character_tokenizer("abc", ["ab", "bca", "cc"])
SENTENCE = "the answer of the other is 12, then 7; naïve übung - the end."
BPE = train_bpe([SENTENCE] * 20, 300)


def walk(automaton, ids):
    state = jnp.zeros(1, jnp.int32)
    for token in ids:
        state = next_state(automaton, state, jnp.array([token]))
    return state


@pytest.mark.parametrize("tokenizer", [BPE, byte_tokenizer(), WORDS], ids=["bpe", "bytes", "words"])
def test_bytes_of_tokens_make_up_the_text(tokenizer):
    texts = token_bytes(tokenizer)
    text = SENTENCE if tokenizer is not WORDS else "abcabccbca"
    assert b"".join(texts[token] for token in tokenizer.encode(text)).decode() == text
    assert texts[tokenizer.eos_id] is None


@pytest.mark.parametrize("strings", [["bc"], ["cab", "bb"], ["aa", "aabaac"]])
def test_stop_strings_are_found_wherever_tokens_begin(strings):
    """Every text of up to four tokens against `in`."""
    automaton = stop_automaton(WORDS, strings)
    texts = {token: WORDS.decode([token]) for token in range(3, WORDS.vocab_size)}
    tokens = np.array(list(itertools.product([0, *texts], repeat=4)))
    state = np.zeros(len(tokens), np.int32)
    for column in tokens.T:
        state = next_state(automaton, state, column)
    held = [any(s in "".join(texts.get(t, "") for t in row) for s in strings) for row in tokens]
    np.testing.assert_array_equal(np.asarray(automaton.final)[state], held)
    assert 0 < sum(held) < len(held)


def test_stop_strings_of_several_bytes():
    automaton = stop_automaton(BPE, ["ïve ü", "\n\n"])
    ids = BPE.encode(SENTENCE)
    final = [bool(automaton.final[walk(automaton, ids[:end])[0]]) for end in range(len(ids) + 1)]
    expected = ["ïve ü" in BPE.decode(ids[:end]) for end in range(len(ids) + 1)]
    assert final == expected
    assert final[-1]
    with pytest.raises(UserError, match="stop string is empty"):
        stop_automaton(BPE, ["a", ""])


@pytest.mark.parametrize("pattern", ["(ab|c)+", "a?(bca)*c{2}", "[ab]{2,3}"])
def test_a_regular_expression_allows_what_it_matches(pattern):
    """For every text of up to three tokens: allowed to the end, exactly if `re` matches it."""
    automaton = regex_automaton(WORDS, pattern)
    eos, texts = WORDS.eos_id, {t: WORDS.decode([t]) for t in range(3, WORDS.vocab_size)}
    allowed = np.array(allowed_tokens(automaton, jnp.arange(len(automaton.final)), eos_id=eos))
    table = np.array(
        jax.vmap(lambda s: next_state(automaton, jnp.full(WORDS.vocab_size, s), jnp.arange(9)))(
            jnp.arange(len(automaton.final))
        )
    )
    matched = 0
    for length in range(1, 4):
        for tokens in itertools.product(texts, repeat=length):
            state, said = 0, True
            for token in tokens:
                said, state = said and allowed[state, token], table[state, token]
            found = bool(said and allowed[state, eos])
            assert found == bool(re.fullmatch(pattern, "".join(texts[t] for t in tokens))), tokens
            matched += found
    assert matched
    assert not allowed[:, [0, 1]].any()


def test_a_model_held_to_a_schema_writes_json():
    """Whatever a random model would say."""
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ann", "bo"]}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
    }
    constraint = json_automaton(BPE, schema)
    assert constraint.table.shape[1] < BPE.vocab_size
    weights = jax.random.normal(jax.random.key(0), (BPE.vocab_size, BPE.vocab_size))
    # An integer is written digit by digit and may go on: let the end be likely where it is allowed.
    weights = weights.at[:, BPE.eos_id].set(6.0)
    prompts = jnp.full((16, 1), 5)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def sample(key):
        return generate(
            lambda params, tokens, *_: (params[tokens[:, -1]], jnp.zeros((len(tokens), 1))),
            lambda params, cache, token, position: (params[token], cache),
            weights,
            prompts,
            prompts > 0,
            key,
            max_new_tokens=60,
            eos_id=BPE.eos_id,
            pad_id=BPE.pad_id,
            sampling=Sampling(constraint=constraint, temperature=1.5),
        )

    rollout = sample(jax.random.key(2))
    assert rollout.finished.all()
    values = []
    rows = jax.device_get((rollout.sequences.tokens, rollout.sequences.mask))
    for tokens, mask in zip(*rows, strict=True):
        values.append(json.loads(BPE.decode(tokens[mask])))
        assert set(values[-1]) == {"name", "age"}
        assert values[-1]["name"] in ("ann", "bo")
        assert isinstance(values[-1]["age"], int)
    assert len({json.dumps(value) for value in values}) > 4
    assert (rollout.filtered_logp >= rollout.logp - 1e-5).all()


@pytest.mark.parametrize(("pattern", "message"), [("(", "regular expression"), ("x+", "regular expression")])
def test_expressions_that_cannot_be_written_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        regex_automaton(WORDS, pattern)
    with pytest.raises(UserError, match="JSON schema"):
        json_automaton(WORDS, {"type": "no such type"})


def test_a_stop_string_ends_the_row(toy):
    tokenizer = character_tokenizer("ab")  # ids 3 and 4; padding 0 and the end 1 or 2 as in the toy
    stop = stop_automaton(tokenizer, ["ab"])
    prompts = jnp.broadcast_to(jnp.array([2, 3]), (64, 2))
    rollout = generate(
        toy.prefill, toy.decode, toy.table, prompts, prompts > 0, jax.random.key(0),
        max_new_tokens=8, eos_id=1, pad_id=0, sampling=Sampling(stop=stop),
    )  # fmt: skip
    columns = jax.device_get((rollout.sequences.tokens, rollout.sequences.mask))
    rows = [row[mask].tolist() for row, mask in zip(*columns, strict=True)]
    stopped = [tokenizer.decode(row).endswith("ab") for row in rows]  # special tokens write nothing
    assert 5 < sum(stopped) < 60
    for row, by_string, finished in zip(rows, stopped, np.asarray(rollout.finished), strict=True):
        assert finished == (by_string or row[-1] == 1)
        assert "ab" not in tokenizer.decode(row[:-1])


def test_ids_beyond_the_tokenizer_are_never_allowed():
    """Vocabularies of models are padded, as those of Qwen."""
    sampling = Sampling(constraint=regex_automaton(WORDS, "ab|b"))
    size = WORDS.vocab_size + 5
    context = start_context(
        jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), bool), sampling, max_new_tokens=3, pad_id=WORDS.pad_id
    )
    logits = process_logits(jnp.zeros((1, size)), sampling, context, eos_id=WORDS.eos_id)
    assert np.isfinite(logits[0, : WORDS.vocab_size]).any()
    assert (np.asarray(logits)[0, WORDS.vocab_size :] == -np.inf).all()
