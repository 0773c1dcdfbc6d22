"""The traceable form of the embedded task agrees with the text form."""

import functools

import jax
import numpy as np
import pytest
from tiers import few

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.tokenizers import byte_tokenizer, character_tokenizer, train_bpe
from rlhf_jax.rewards.verifiers import exact_answer
from rlhf_jax.tasks.arithmetic import (
    Level,
    arithmetic_tokenizer,
    demonstration_rows,
    num_problems,
    preference_rows,
    problem,
    prompt_rows,
)
from rlhf_jax.tasks.arithmetic_arrays import make_task

EASY, SIGNED = Level(3, 1, 9, "+"), Level(4, 1, 99, "+-")
ODD_LEVEL = Level(operands=2, low=0, high=102, operators="-+")
TAILED_LEVEL = Level(3, 1, 7, "+")  # seven problems beyond its last whole block
LENGTH = 72


@functools.cache
def task_of(level, make_tokenizer=arithmetic_tokenizer):
    return make_task(level, make_tokenizer())


@functools.cache
def jitted(level, method, make_tokenizer=arithmetic_tokenizer):
    static = {"sample": ("split", "batch"), "prompts": ("split",), "verify": ()}[method]
    return jax.jit(getattr(task_of(level, make_tokenizer), method), static_argnames=static)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("level", few([EASY, SIGNED, ODD_LEVEL, TAILED_LEVEL], SIGNED, TAILED_LEVEL))
def test_the_same_index_gives_the_same_ids(level, split):
    size = num_problems(level, split)
    drawn = np.random.default_rng(0).integers(size, size=200)
    indices = np.concatenate([np.arange(28), size - 1 - np.arange(28), drawn]).astype(np.int32)
    tokens, mask, answers = jitted(level, "prompts")(indices, split=split)
    assert tokens.shape == mask.shape == (256, task_of(level).prompt_length)
    tokenizer = arithmetic_tokenizer()
    for index, row, counts, answer in zip(
        indices, np.asarray(tokens), np.asarray(mask), answers, strict=True
    ):
        expected = problem(level, split, int(index))
        assert row[counts].tolist() == encode_prompt(tokenizer, expected.text)
        assert np.all(np.diff(counts.astype(int)) >= 0)  # padded on the left only
        assert np.all(row[~counts] == tokenizer.pad_id)
        assert answer == expected.answer


@pytest.mark.parametrize("level", [EASY, SIGNED])
def test_the_longest_prompt_and_completion_fit_exactly(level):
    task, tokenizer = task_of(level), arithmetic_tokenizer()
    widest = "-".join([str(level.high)] * level.operands) + "=?"
    assert task.prompt_length == len(encode_prompt(tokenizer, widest))
    rows = demonstration_rows(level, 500, 0, slip_rate=0.5)
    lengths = [len(tokenizer.encode(row["messages"][1]["content"])) + 1 for row in rows]
    assert task.completion_length - 4 <= max(lengths) <= task.completion_length


def test_sampling_is_uniform_reproducible_and_compiled_once():
    sample = jitted(EASY, "sample")
    size = num_problems(EASY, "heldout")
    draws = [sample(jax.random.key(seed), split="heldout", batch=2048) for seed in range(4)]
    assert sample._cache_size() == 1
    again = sample(jax.random.key(0), split="heldout", batch=2048)
    assert all(np.array_equal(a, b) for a, b in zip(draws[0], again, strict=True))
    assert not np.array_equal(draws[0][0], draws[1][0])
    rows, counts = np.unique(np.concatenate([tokens for tokens, _, _ in draws]), axis=0, return_counts=True)
    assert len(rows) == size
    expected = 4 * 2048 / size
    assert np.sum((counts - expected) ** 2 / expected) < size + 6 * np.sqrt(2 * size)  # chi-squared


def test_sampling_maps_over_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    sample = functools.partial(task_of(EASY).sample, split="train", batch=5)
    mapped, single = jax.jit(jax.vmap(sample))(keys), jax.jit(sample)
    for row, key in enumerate(keys):
        assert all(np.array_equal(many[row], one) for many, one in zip(mapped, single(key), strict=True))


def test_sampling_never_crosses_the_split():
    tokenizer = arithmetic_tokenizer()
    tokens, _, _ = jitted(EASY, "sample")(jax.random.key(1), split="train", batch=2048)
    prompts = {tokenizer.decode(row) for row in np.asarray(tokens)}
    heldout = [problem(EASY, "heldout", index).text for index in range(num_problems(EASY, "heldout"))]
    texts = {prompt.split("\n")[1] for prompt in prompts}
    assert all(text.endswith("=?") for text in texts)
    assert not texts & set(heldout)


# The verifier --------------------------------------------------------------------------------------


def mangled(ids, rng, vocab_size):
    """One of many ways to spoil, or only to respell, a completion without its end."""
    place = int(rng.integers(len(ids) + 1))
    token = int(rng.integers(vocab_size))
    return [
        lambda: ids,
        lambda: [*ids[:place], token, *ids[place:]],
        lambda: ids[:place] + ids[place + 1 :],
        lambda: [*ids[:place], token, *ids[place + 1 :]],
        lambda: ids[place:],
        lambda: ids[:place],
        lambda: ids + ids[place:],
        lambda: rng.permutation(ids).tolist(),
        lambda: rng.integers(vocab_size, size=place).tolist(),
    ][rng.integers(9)]()


def completions(tokenizer, level, count):
    """Ids of right, wrong, respelt, mangled and random completions, and true answers."""
    rng = np.random.default_rng(0)
    pairs = preference_rows(level, "train", count, 0)
    answers = [int(row["chosen"].rsplit(" ", 1)[1]) for row in pairs]
    marks = tokenizer.encode("#### 0")
    rows = []
    for row, answer in zip(pairs, answers, strict=True):
        short = f"#### {answer}"
        extras = [f"\n{short}", short, f"x{short}", f"\n#{short}", f"{short} ", f"#\n{short}", f"1\n{short}"]
        extras += [f"\n#### 0{answer}", f"\n#### +{answer}", f"\n####{answer}", f"\n#### {-answer}"]
        extras += [f"\n{short}0", f"\n#### 1{answer}", f"{short}\n{short}", f"\n####  {answer}"]
        text = [row["chosen"], row["chosen"], row["rejected"], extras[rng.integers(len(extras))]][
            rng.integers(4)
        ]
        ids = tokenizer.encode(text)
        if rng.random() < 0.2:  # spell the mark, and all else, character by character
            ids = [index for character in text for index in tokenizer.encode(character)]
        if rng.random() < 0.1:
            ids = marks[:1] + ids
        ids = mangled(ids, rng, tokenizer.vocab_size) if rng.random() < 0.6 else ids
        if rng.random() < 0.9:
            ids = [*ids, tokenizer.eos_id]
        rows.append(ids[:LENGTH])
    return rows, answers


def arrays_of(rows, pad_id):
    tokens = np.full((len(rows), LENGTH), pad_id, np.int32)
    mask = np.zeros((len(rows), LENGTH), bool)
    for place, ids in enumerate(rows):
        tokens[place, : len(ids)], mask[place, : len(ids)] = ids, True
    return tokens, mask


@pytest.mark.parametrize("make_tokenizer", [arithmetic_tokenizer, byte_tokenizer])
@pytest.mark.parametrize("level", [EASY, SIGNED])
def test_the_verifier_agrees_with_the_text_verifier(level, make_tokenizer):
    tokenizer = make_tokenizer()
    rows, answers = completions(tokenizer, level, 600 if level is EASY else 4000)
    tokens, mask = arrays_of(rows, tokenizer.pad_id)
    rewards = np.asarray(jitted(level, "verify", make_tokenizer)(tokens, mask, np.asarray(answers)))
    expected = [
        float(exact_answer(tokenizer.decode(ids), answer, finished=ids[-1:] == [tokenizer.eos_id]))
        for ids, answer in zip(rows, answers, strict=True)
    ]
    wrong = np.flatnonzero(rewards != expected)
    assert not len(wrong), [(tokenizer.decode(rows[i], skip_special=False), answers[i]) for i in wrong[:5]]
    assert 0.2 < np.mean(expected) < 0.8


def test_the_verifier_sees_only_unmasked_tokens():
    tokenizer, level = arithmetic_tokenizer(), SIGNED
    rows, answers = completions(tokenizer, level, 400)
    tokens, mask = arrays_of(rows, tokenizer.pad_id)
    verify = jitted(level, "verify")
    rewards = verify(tokens, mask, np.asarray(answers))
    rng = np.random.default_rng(0)
    junk = np.where(mask, tokens, rng.integers(-5, 10_000, size=tokens.shape))
    assert np.array_equal(verify(junk, mask, np.asarray(answers)), rewards)
    shifted = np.roll(junk, 9, axis=1), np.roll(mask, 9, axis=1)  # room is left at the end of most rows
    fits = ~mask[:, -9:].any(axis=1)
    assert np.array_equal(np.asarray(verify(*shifted, np.asarray(answers)))[fits], np.asarray(rewards)[fits])
    assert not np.any(verify(tokens, np.zeros_like(mask), np.asarray(answers)))
    assert np.mean(rewards) > 0.2


def test_rows_and_arrays_pose_the_same_problems():
    """A prompt of `prompt_rows` is among the arrays of its split, with the same answer."""
    tokenizer, level = arithmetic_tokenizer(), EASY
    indices = np.arange(num_problems(level, "heldout"), dtype=np.int32)
    tokens, mask, answers = jitted(level, "prompts")(indices, split="heldout")
    known = {
        tuple(row[counts].tolist()): int(answer)
        for row, counts, answer in zip(np.asarray(tokens), np.asarray(mask), answers, strict=True)
    }
    for row in prompt_rows(level, "heldout", 91, 0):
        assert known[tuple(encode_prompt(tokenizer, row["prompt"]))] == int(row["answer"])


def test_a_tokenizer_that_joins_characters_is_refused():
    joined = train_bpe(["12+34=? 12+34=? =? =? 0+0"] * 50, 300)
    worded = character_tokenizer("0123456789+-=?\n ", ["=?", "user", "assistant"])
    for tokenizer in (joined, worded):
        with pytest.raises(UserError, match="one token"):
            make_task(EASY, tokenizer)
