"""What samples and evaluations say of single tokens is what the model scores them with."""

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.rollout.sampler import make_evaluate_fn
from rlhf_jax.rollout.samples import make_samples_fn

TOKENIZER = character_tokenizer("0123456789+=")
CONFIG = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2)
PARAMS, TRAINED = (models.init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1))
POLICY = models.make_policy(CONFIG, PARAMS, TOKENIZER)
PROMPTS = [PromptExample(np.array(TOKENIZER.encode(text), np.int32), text, {}, "") for text in ("1+2=", "7=")]


def no_reward(rollout, prompts):
    return np.full(len(prompts), np.nan)


SCORE = jax.jit(POLICY.make_logprob_fn())


def scores(params, prompt, ids):
    """Log-probs of the tokens of a completion behind its prompt."""
    row = np.array([[*prompt.ids, *ids, *[TOKENIZER.pad_id] * (8 - len(prompt.ids) - len(ids))]])
    places = np.arange(8)[None]
    inside = (places >= len(prompt.ids)) & (places < len(prompt.ids) + len(ids))
    found = SCORE(params, Sequences(row, places, np.ones_like(row), inside))
    return np.asarray(found.logp)[inside]


def test_samples_have_the_numbers_of_their_tokens():
    answer = make_samples_fn(POLICY, PROMPTS, no_reward, max_new_tokens=4)
    before, after = answer(PARAMS), answer(TRAINED)
    assert all(
        {"text", "logp", "token/text", "token/logp"} == sample.completion().keys() for sample in before
    )
    for prompt, sample in zip(PROMPTS, after, strict=True):
        found = sample.completion()
        assert "".join(found["token/text"]) == found["text"]
        ids = TOKENIZER.encode(found["text"])
        if len(found["token/text"]) > len(ids):
            ids = [*ids, TOKENIZER.eos_id]
        own, theirs = (scores(params, prompt, ids) for params in (TRAINED, PARAMS))
        np.testing.assert_allclose(found["token/logp"], own, atol=1e-4)
        np.testing.assert_allclose(found["token/kl"], own - theirs, atol=1e-4)
        assert found["logp"] == pytest.approx(own.sum(), abs=1e-4)
        assert found["kl"] == pytest.approx((own - theirs).sum(), abs=1e-4)


def test_an_evaluation_describes_its_first_completions_alike():
    evaluate = make_evaluate_fn(POLICY, PROMPTS, no_reward, max_new_tokens=4)
    assert evaluate(TRAINED, PARAMS).numbers == []
    samples = make_samples_fn(POLICY, PROMPTS, no_reward, max_new_tokens=4)(TRAINED)
    found = evaluate(TRAINED, PARAMS, 2).numbers
    for sample, numbers in zip(samples, found, strict=True):
        assert numbers["token/text"] == sample.numbers["token/text"]
        for name in ("token/logp", "token/kl"):
            np.testing.assert_allclose(numbers[name], sample.numbers[name], atol=1e-4)
    (alone,) = evaluate(TRAINED, None, 1).numbers
    assert alone.keys() == {"logp", "token/text", "token/logp"}
