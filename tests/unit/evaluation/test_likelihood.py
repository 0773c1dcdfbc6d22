"""Likelihoods of continuations against whole distributions, and by identities."""

import itertools

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.data.tokenizers import train_bpe
from rlhf_jax.evaluation.likelihood import (
    Likelihood,
    choose,
    make_continuation_fn,
    plain_request,
    rolling_requests,
    score_requests,
)
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer

TOKENIZER = arithmetic_tokenizer()


@pytest.fixture(scope="module")
def model():
    """(scores of batches of four in rows of 16 or 32, log-probs of the whole vocabulary)."""
    config = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=16, num_layers=1, num_heads=2)
    params = models.init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x, params)  # far from uniform
    score_fn = jax.jit(make_continuation_fn(models.make_greedy_match_fn(config, chunk_size=24)))
    everything = jax.jit(models.make_distribution_fn(config))

    def score(requests, wanted=lambda place: True):
        found = {}
        for batch in score_requests(score_fn, params, requests, batch_size=4, wanted=wanted):
            found |= batch
        return found

    return score, lambda rows: everything(params, rows)


def test_likelihoods_are_those_of_the_whole_distribution(model):
    score, everything = model
    texts = [("1+1=", "2"), ("", "17"), ("5+4=?", "9\n#### 9"), ("1", "+2+3+4+5=?15"), ("1+1= ", "2")]
    requests = [plain_request(TOKENIZER, *pair) for pair in texts]
    found = score(requests)
    assert sorted(found) == list(range(len(texts)))
    for place, request in enumerate(requests):
        rows = pad_rows([request], 32)
        table, tokens = np.asarray(everything(rows))[0], np.asarray(rows.tokens)[0]
        places = np.flatnonzero(np.asarray(rows.mask)[0])
        assert found[place].logp == pytest.approx(sum(table[t, tokens[t]] for t in places), abs=1e-4)
        assert found[place].tokens == len(places)
        assert found[place].greedy == all(table[t].argmax() == tokens[t] for t in places)


def test_one_token_continuations_have_mass_one_and_one_is_greedy(model):
    score, everything = model
    rows = pad_rows([plain_request(TOKENIZER, "1+1", "=")], 32)
    table = np.asarray(everything(rows))[0, 3]
    requests = [plain_request(TOKENIZER, "1+1", chr(code)) for code in range(ord(" "), ord("~") + 1)]
    found = score(requests)
    mass = sum(np.exp(each.logp) for each in found.values())
    ids = [int(request.ids[-1]) for request in requests]
    assert mass == pytest.approx(np.exp(table[ids]).sum(), abs=1e-4)
    assert sum(each.greedy for each in found.values()) == (int(table.argmax()) in ids)


def test_only_wanted_batches_are_scored_and_give_the_same(model):
    score, _ = model
    requests = [plain_request(TOKENIZER, "1+2" * (place % 7), f"={place}") for place in range(19)]
    whole = score(requests)
    again = score(requests, wanted=lambda place: place == 11)
    assert 11 in again
    assert len(again) <= 4
    assert all(again[place] == whole[place] for place in again)


def test_a_long_text_in_windows_counts_every_token_once(model):
    score, _ = model
    text = "1+2+3=6\n#### 6"
    (whole,) = rolling_requests(TOKENIZER, text, 32)
    assert score([whole])[0].logp == score([plain_request(TOKENIZER, "", text)])[0].logp
    windows = rolling_requests(TOKENIZER, text, 5)
    counted = np.concatenate([window.ids[window.mask] for window in windows])
    assert TOKENIZER.decode(counted) == text
    assert all(len(window.ids) <= 5 for window in windows)
    assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(windows))


def test_where_a_continuation_begins():
    request = plain_request(TOKENIZER, "a ", "b")
    assert TOKENIZER.decode(request.ids[request.mask]) == " b"  # space goes with the word
    empty = plain_request(TOKENIZER, "", "b")
    assert empty.ids.tolist() == [TOKENIZER.eos_id, *TOKENIZER.encode("b")]
    bpe = train_bpe(["the cat sat on the mat"] * 3, 300)
    merged = plain_request(bpe, "the c", "at sat")
    assert bpe.decode(merged.ids) == "the cat sat"
    assert bpe.decode(merged.ids[merged.mask]) == " cat sat"  # one token is of both
    with pytest.raises(UserError, match="row 3: the continuation has no tokens"):
        plain_request(TOKENIZER, "a", "", "row 3")


def test_choices_by_each_norm():
    def likelihood(logp, tokens):
        return Likelihood(logp, tokens, False)

    chosen = choose([likelihood(-4.0, 2), likelihood(-5.0, 4), likelihood(-9.0, 5)], ["ab", "abc", "ä" * 6])
    assert (chosen.raw, chosen.tokens, chosen.bytes) == (0, 1, 2)
    assert choose([likelihood(-1.0, 1)] * 2, ["a", "b"]).raw == 0  # the earliest of those that tie
