"""Process rewards of rollouts: where steps end, as in the training data, and what the model says of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.data.process_rewards import process_examples
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import byte_tokenizer, train_bpe
from rlhf_jax.models import ScalarModel
from rlhf_jax.rollout.step_rewards import make_step_reward_fn
from rlhf_jax.tasks import arithmetic

ROWS = [
    {"prompt": "7+8+6=?", "completions": ["7+8=15", "15+6=20", "#### 20"], "labels": [1, 0, 1]},
    {"prompt": "2+2=?", "completions": ["#### 4"], "labels": [1]},
]
TOKENIZERS = {
    "characters": arithmetic.arithmetic_tokenizer(),
    "bytes": byte_tokenizer(),
    "bpe": train_bpe(["7+8=15\n15+6=20\n#### 20\n"] * 4, 280),
}


def solutions(tokenizer):
    """(a rollout of the solutions of `ROWS`, where their steps end)."""
    rows = jax.tree.map(
        jnp.asarray, pad_rows(process_examples([Row(row, "here") for row in ROWS], tokenizer), 64)
    )
    prompts = jnp.array([len(encode_prompt(tokenizer, row["prompt"])) for row in ROWS])
    answer = (jnp.arange(64) >= prompts[:, None]) & (rows.segment_ids > 0)
    sequences = dataclasses.replace(rows, mask=answer)
    return Rollout(sequences, jnp.zeros(answer.shape), jnp.ones(2, bool)), np.asarray(rows.mask)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_steps_end_where_those_of_the_data_end(name):
    tokenizer = TOKENIZERS[name]
    rollout, expected = solutions(tokenizer)
    config = models.dense_config(vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2)
    params = models.init_scalar_model(config, jax.random.key(0))
    policy = models.make_policy(config, params["decoder"], tokenizer)
    model = ScalarModel(policy, jax.tree.map(lambda x: x + 0.3, params["head"]))
    found = make_step_reward_fn(model, coef=2.0)(rollout)
    np.testing.assert_array_equal(found.ends, expected)
    logits = np.asarray(policy.make_process_reward_fn()(model.params, rollout.sequences))
    chances = 1 / (1 + np.exp(-logits[expected]))
    np.testing.assert_allclose(np.asarray(found.rewards)[expected], 2 * chances, rtol=1e-5)
    assert np.ptp(chances) > 1e-4
