"""Rewards by name with weights, and evaluation of a policy on fixed prompts."""

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.generation import Sampling
from rlhf_jax.rewards.calls import RewardCalls
from rlhf_jax.rollout.sampler import completion_texts, make_evaluate_fn, make_generate_fn
from rlhf_jax.rollout.samples import Sample
from rlhf_jax.stages.reward_specs import make_ensemble_fn, make_optional_reward_fn, make_reward_fn
from rlhf_jax.training.run_folder import write_model_files

TOKENIZER = character_tokenizer("0123456789+=")
CONFIG = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2)
POLICY = models.make_policy(CONFIG, None, TOKENIZER)
PROMPTS = [
    PromptExample(
        np.array(TOKENIZER.encode(text), np.int32), text, {"prompt": text, "answer": answer}, f"a:{i}"
    )
    for i, (text, answer) in enumerate([("1+2=", "3"), ("7=", "7"), ("12+13=", "25")], start=1)
]
MODULE = """
def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]

def right(prompts, completions, *, answer, finished, **_):
    return [float(c == a and f) for c, a, f in zip(completions, answer, finished)]

def sevens(prompts, completions, **_):
    return [float(text.count("7")) for text in completions]

def unsure(prompts, completions, **_):
    return [None if text == "7" else 1.0 for text in completions]

def room(prompts, completions, *, token_count, token_limit, **_):
    return [limit - count for count, limit in zip(token_count, token_limit)]

def raises(prompts, completions, **_):
    return [1 / (text != "7") for text in completions]

def nan(prompts, completions, **_):
    return [float("nan") if text == "7" else 0.0 for text in completions]

def short(prompts, completions, **_):
    return [0.0]
"""


@pytest.fixture(autouse=True)
def rewards_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "toy_rewards.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop("toy_rewards", None)


def answered(*texts, finished=True):
    """A rollout that holds these completions of the prompts, the end of turn included."""
    width = 8
    tokens, mask = np.zeros((2, len(texts), width), np.int32)
    for row, text in enumerate(texts):
        ids = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    positions = np.tile(np.arange(width), (len(texts), 1))
    sequences = Sequences(*map(jnp.asarray, (tokens, positions, mask, mask.astype(bool))))
    return Rollout(sequences, jnp.zeros(mask.shape), jnp.full(len(texts), finished))


ANSWERS = answered("3", "7", "251")


def test_completions_are_texts_without_the_end():
    assert completion_texts(TOKENIZER, ANSWERS) == ["3", "7", "251"]


def test_rewards_add_up_by_their_weights():
    one = make_reward_fn(["toy_rewards:right"], TOKENIZER)
    np.testing.assert_array_equal(one(ANSWERS, PROMPTS), [1, 1, 0])
    np.testing.assert_array_equal(one(answered("3", "7", "25", finished=False), PROMPTS), [0, 0, 0])
    several = make_reward_fn(
        ["toy_rewards:right=2", "toy_rewards:length=-0.5", "toy_rewards:sevens"], TOKENIZER
    )
    np.testing.assert_allclose(several(ANSWERS, PROMPTS), [1.5, 2.5, -1.5])


def test_rewards_by_rows_are_those_of_all_at_once():
    def single(prompts, completions, **fields):
        assert [len(values) for values in fields.values()] == [1] * len(fields)
        return [float(fields["answer"] == completions)]

    specs = ["toy_rewards:right=2", "toy_rewards:length=-0.5", (single, 1.0)]
    by_rows = make_reward_fn(specs, TOKENIZER, calls=RewardCalls(2))(ANSWERS, PROMPTS)
    np.testing.assert_allclose(by_rows, [2.5, 2.5, -1.5])


KINDS = [
    dataclasses.replace(prompt, fields=prompt.fields | {"kind": kind})
    for prompt, kind in zip(PROMPTS, ("sum", "talk", "sum"), strict=True)
]


def test_a_reward_for_one_kind_of_prompts_never_sees_the_others():
    specs = ["toy_rewards:right@sum=2", "toy_rewards:length", "toy_rewards:nan@talk=0"]
    with pytest.raises(UserError, match=r"returned nan for row 0 \(a:2\)"):
        make_reward_fn(specs, TOKENIZER)(ANSWERS, KINDS)
    reward = make_reward_fn(specs[:2], TOKENIZER)
    scored = reward.score(ANSWERS, KINDS)
    np.testing.assert_array_equal(scored.rewards, [3, 1, 3])
    np.testing.assert_array_equal(scored.terms["right@sum"], [1, np.nan, 0])
    np.testing.assert_array_equal(scored.terms["length"], [1, 1, 3])
    reward.check_kinds(KINDS)
    with pytest.raises(
        UserError, match=r"'right@sum': no prompt has 'sum' in its field kind \(there are None"
    ):
        reward.check_kinds(PROMPTS)


def test_equal_names_of_rewards_are_told_apart():
    scored = make_reward_fn(["toy_rewards:sevens", "toy_rewards:sevens=-1"], TOKENIZER).score(
        ANSWERS, PROMPTS
    )
    np.testing.assert_array_equal(scored.rewards, 0)
    assert list(scored.terms) == ["sevens", "sevens_2"]


def test_what_cannot_be_scored_is_counted():
    scored = make_reward_fn(["toy_rewards:unsure=2", "toy_rewards:sevens"], TOKENIZER).score(ANSWERS, PROMPTS)
    assert scored.unscorable.tolist() == [False, True, False]
    np.testing.assert_array_equal(scored.rewards, [2, 1, 2])


def test_rewards_know_tokens_and_their_limit():
    mask = np.asarray(ANSWERS.sequences.mask)
    limit = mask.shape[1] - int(np.flatnonzero(mask.any(axis=0))[0])
    room = make_reward_fn(["toy_rewards:room"], TOKENIZER)(ANSWERS, PROMPTS)
    np.testing.assert_array_equal(room, limit - mask.sum(axis=1))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "no reward is given"),
        (["toy_rewards:right=much"], "'much' is no weight, write for example toy_rewards:right=0.5"),
        (["toy_rewards:right=nan"], "'nan' is no weight"),
        (["toy_rewards:right="], "'' is no weight"),
        (["toy_rewards:lenght"], "the nearest name is length"),
        (["other_toy:right"], "no module other_toy"),
        (["no/such/run"], "there is no such folder"),
    ],
)
def test_specs_that_name_nothing_are_refused(specs, message):
    with pytest.raises(UserError, match=message):
        make_reward_fn(specs, TOKENIZER)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"raised ZeroDivisionError .*row 1 \(a:2\), completion '7'"),
        ("nan", r"returned nan for row 1 \(a:2\), completion '7'"),
        ("short", r"of shape \(1,\): expected 3 finite numbers"),
    ],
)
def test_functions_that_misbehave_are_named_with_the_row(name, message):
    reward = make_reward_fn(["toy_rewards:length", f"toy_rewards:{name}=0.1"], TOKENIZER)
    with pytest.raises(UserError, match=message) as refused:
        reward(ANSWERS, PROMPTS)
    assert f"toy_rewards:{name}" in str(refused.value)


@functools.cache
def reward_params(seed=1):
    return jax.jit(lambda key: models.init_scalar_model(CONFIG, key))(jax.random.key(seed))


def write_reward_model(folder, tokenizer=TOKENIZER, seed=1):
    params = reward_params(seed)
    write_model_files(folder, models.make_policy(CONFIG, None, tokenizer), "reward_model")
    with CheckpointManager(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, sft.init(params, optax.identity(), jax.random.key(2)))
    return params


@pytest.mark.slow
def test_a_reward_model_is_a_reward_like_another(tmp_path):
    """Even in a folder whose name looks like a weight."""
    folder = tmp_path / "lr=0.5"
    params = write_reward_model(folder)
    expected = np.asarray(jax.jit(models.make_reward_fn(CONFIG))(params, ANSWERS.sequences))
    assert np.std(expected) > 0
    alone = make_reward_fn([str(folder)], TOKENIZER)
    np.testing.assert_allclose(alone(ANSWERS, PROMPTS), expected, rtol=1e-5)
    mixed = make_reward_fn([f"{folder}=3", "toy_rewards:length"], TOKENIZER)
    np.testing.assert_allclose(mixed(ANSWERS, PROMPTS), 3 * expected + np.array([1, 1, 3]), rtol=1e-5)


@pytest.mark.slow
def test_several_reward_models_are_combined(tmp_path):
    folders = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders, 1):
        write_reward_model(folder, seed=seed)
    scores = np.stack([make_reward_fn([str(folder)], TOKENIZER)(ANSWERS, PROMPTS) for folder in folders])
    assert np.abs(scores[0] - scores[1]).min() > 1e-3
    reward = make_ensemble_fn(folders, TOKENIZER, lambda scores: scores[0] - 2 * scores[1])
    np.testing.assert_allclose(reward(ANSWERS, PROMPTS), scores[0] - 2 * scores[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alphabet", ["0123456789+", "9876543210+="])
def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path, alphabet):
    """Of another size, or of the same size with other ids."""
    write_reward_model(tmp_path / "run", character_tokenizer(alphabet))
    with pytest.raises(UserError, match=r"tokenizer .* is not the policy's"):
        make_reward_fn([str(tmp_path / "run")], TOKENIZER)


def test_without_rewards_no_row_can_be_scored():
    rollout = answered("3", "7", "25")
    nothing = make_optional_reward_fn([], TOKENIZER)
    assert nothing.score(rollout, PROMPTS).unscorable.all()
    assert np.isnan(nothing(rollout, PROMPTS)).all()
    assert not make_reward_fn(["toy_rewards:length"], TOKENIZER).score(rollout, PROMPTS).unscorable.any()
    found = [Sample("p", None, "text", reward).completion() for reward in (math.nan, 0.5, 1.0)]
    assert found[0] == {"text": "text"}
    assert found[1:] == [{"text": "text", "reward": 0.5}, {"text": "text", "reward": 1.0, "correct": True}]


# Evaluation ---------------------------------------------------------------------------------------------


@functools.cache
def policy(seed):
    """Far from uniform, so that its answers differ."""
    params = models.init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)


@functools.cache
def make_evaluate(batch_size):
    reward = make_reward_fn(["toy_rewards:length", "toy_rewards:sevens=0.1"], TOKENIZER)
    return make_evaluate_fn(POLICY, PROMPTS, reward, max_new_tokens=5, batch_size=batch_size)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_size_of_its_batches():
    whole = make_evaluate(256)(policy(0), None)
    assert len(whole.completions) == len(whole.rewards) == 3
    np.testing.assert_allclose(whole.score, whole.rewards.mean(), rtol=1e-6)
    expected = [len(text) + 0.1 * text.count("7") for text in whole.completions]
    np.testing.assert_allclose(whole.rewards, expected, rtol=1e-6)
    assert 0 <= whole.finished <= 1 <= whole.length <= 5
    parts = make_evaluate(2)(policy(0), None)
    assert parts.completions == whole.completions
    np.testing.assert_array_equal(parts.rewards, whole.rewards)
    assert (parts.score, parts.length, parts.finished) == (whole.score, whole.length, whole.finished)
    assert parts.sampled_score == whole.sampled_score


@pytest.mark.slow
def test_kl_is_zero_to_itself_and_that_of_the_samples_to_another():
    evaluate, params, other = make_evaluate(256), policy(0), policy(1)
    same, different = evaluate(params, params), evaluate(params, other)
    assert same.kl == 0
    assert same.metrics().keys() == {"score", "sampled_score", "kl", "length", "finished"}
    generate = make_generate_fn(POLICY, prompt_length=6, max_new_tokens=5)
    sampled = generate(params, PROMPTS, jax.random.key(0))
    mask = np.asarray(sampled.sequences.mask)
    ref_logp = np.asarray(jax.jit(models.make_logprob_fn(CONFIG))(other, sampled.sequences).logp)
    expected = np.where(mask, np.asarray(sampled.logp) - ref_logp, 0).sum(axis=1).mean()
    np.testing.assert_allclose(different.kl, expected, rtol=1e-3)
    assert abs(different.kl) > 0.1
    assert evaluate(params, other) is not different
    np.testing.assert_array_equal(evaluate(params, other).rewards, different.rewards)


def test_sampling_may_differ_from_call_to_call():
    generate = make_generate_fn(POLICY, prompt_length=6, max_new_tokens=5)
    greedy = make_generate_fn(POLICY, prompt_length=6, max_new_tokens=5, sampling=Sampling(temperature=0.0))
    found = generate(policy(0), PROMPTS, jax.random.key(0), Sampling(temperature=0.0))
    expected = greedy(policy(0), PROMPTS, jax.random.key(1))
    assert completion_texts(TOKENIZER, found) == completion_texts(TOKENIZER, expected)


@pytest.mark.parametrize("rule", [{"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"typical_p": 0.5}])
def test_answers_from_a_part_of_the_distribution_are_refused(rule):
    generate = make_generate_fn(POLICY, prompt_length=6, max_new_tokens=5)
    with pytest.raises(UserError, match=rf"{next(iter(rule))} leaves tokens out .* at a temperature alone"):
        generate(policy(0), PROMPTS, jax.random.key(0), Sampling(**rule))


def test_filters_are_allowed_where_nothing_is_learned_from_log_probs():
    options = {"prompt_length": 6, "max_new_tokens": 5, "allow_filters": True}
    rollout = make_generate_fn(POLICY, **options, sampling=Sampling(top_k=1))(
        policy(0), PROMPTS, jax.random.key(0)
    )
    greedy = make_generate_fn(POLICY, **options)(
        policy(0), PROMPTS, jax.random.key(0), Sampling(temperature=0.0)
    )
    np.testing.assert_array_equal(rollout.sequences.tokens, greedy.sequences.tokens)


@pytest.mark.slow
def test_groups_and_slots_give_the_answers_of_plain_batches():
    chosen = [prompt for prompt in PROMPTS for _ in range(2)]
    options = {"prompt_length": 6, "max_new_tokens": 5}
    grouped = make_generate_fn(POLICY, group_size=2, **options)
    plain = make_generate_fn(POLICY, **options)
    in_slots = make_generate_fn(POLICY, max_num_seqs=4, **options)
    expected = plain(policy(0), chosen, jax.random.key(3))
    for fn in (grouped, in_slots):
        found = fn(policy(0), chosen, jax.random.key(3))
        np.testing.assert_array_equal(found.sequences.tokens, expected.sequences.tokens)
        np.testing.assert_allclose(found.logp, expected.logp, atol=1e-5)
    with pytest.raises(ValueError, match="groups of 2"):
        grouped(policy(0), PROMPTS[:2], jax.random.key(3))


def test_a_prompt_that_does_not_fit_is_refused():
    generate = make_generate_fn(POLICY, prompt_length=4, max_new_tokens=5)
    with pytest.raises(UserError, match="prompt 2 has 6 tokens where 1 to 4 fit"):
        generate(policy(0), PROMPTS, jax.random.key(0))
