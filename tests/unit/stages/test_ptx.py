"""Text for PPO-ptx: plain or as conversations, by path or as objects, in an order of the step alone."""

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.stages import ptx
from rlhf_jax.stages.option_groups import PtxOptions

TOKENIZER = byte_tokenizer()
POLICY = models.make_policy(
    models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2), None, TOKENIZER
)
TEXTS = [f"Text {number}: once upon a time." for number in range(20)]
CONVERSATIONS = [{"prompt": f"{number}?", "completion": f"It is {number}."} for number in range(20)]


def load(given=None, spec="", batch_size=2, length=32, seed=0):
    options = PtxOptions(ptx_data=spec, ptx_batch_size=batch_size, ptx_max_length=length)
    return ptx.load_text(options, POLICY, answers=3, mini_batches=2, seed=seed, given=given)


def counted(text):
    """What is predicted, row by row."""
    rows = zip(text.rows.tokens, text.rows.mask, strict=True)
    return [TOKENIZER.decode(row[kept].tolist()) for row, kept in rows]


def test_plain_text_is_predicted_whole(tmp_path):
    from_rows = load([{"text": text} for text in TEXTS])
    assert "".join(counted(from_rows)) == "".join(TEXTS)
    (tmp_path / "a.txt").write_text(TEXTS[0] * 10, encoding="utf-8")
    for spec in (tmp_path, tmp_path / "a.txt"):
        assert "".join(counted(load(spec=str(spec)))) == TEXTS[0] * 10


def test_of_conversations_the_answers_are_predicted_and_rows_are_packed():
    text = load(CONVERSATIONS, length=128)
    assert "".join(counted(text)) == "".join(row["completion"] for row in CONVERSATIONS)
    assert text.rows.segment_ids.max() > 1


def test_batches_and_fingerprints_are_functions_of_text_seed_and_step():
    text, again = load([{"text": text} for text in TEXTS]), load([{"text": text} for text in TEXTS])
    assert text.fingerprint() == again.fingerprint()
    changed = load([{"text": text} for text in [*TEXTS[:-1], "Text 19: once upon a tome."]])
    assert changed.fingerprint() != text.fingerprint()
    steps = [text.batch(number) for number in range(5)]
    jax.tree.map(np.testing.assert_array_equal, again.batch(3), steps[3])
    seen = np.concatenate([np.asarray(step.tokens) for step in steps])[: len(text.rows.tokens)]
    assert {row.tobytes() for row in seen} == {row.tobytes() for row in text.rows.tokens}  # each row once


def test_a_mini_batch_has_as_many_rows_as_answers_where_nothing_else_is_said():
    assert load() is None
    assert load(CONVERSATIONS, batch_size=None).batch(0).tokens.shape == (6, 32)


def test_too_little_text_and_rows_of_neither_kind_are_refused():
    with pytest.raises(UserError, match=r"takes 40 rows .* has 20 .*: lower --ptx-batch-size"):
        load(CONVERSATIONS, batch_size=20)
    with pytest.raises(UserError, match="row 1"):
        load([{"body": "text"}])
