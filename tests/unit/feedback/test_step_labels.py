"""Labels by rollouts: which beginnings are continued, and what becomes of the verdicts."""

import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import Row
from rlhf_jax.feedback import step_labels
from rlhf_jax.tasks import arithmetic

TOKENIZER = arithmetic.arithmetic_tokenizer()
POLICY = models.make_policy(
    models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=1), {}, TOKENIZER
)
OPTIONS = {"rollouts": 3, "max_new_tokens": 4, "batch_size": 8, "seed": 0, "quiet": True}


def test_a_step_is_right_where_some_continuation_is(monkeypatch):
    rows = arithmetic.judged_rows(arithmetic.LEVELS[1], "train", 5, 0, slip_rate=0.5)
    rows = [row | {"steps": row["completions"], "right": row["labels"]} for row in rows]
    truth = [list(np.minimum.accumulate(row["labels"][:-1])) for row in rows]
    seen = []

    def make_generate_fn(policy, *, prompt_length, max_new_tokens, group_size):
        def generate(params, prompts, key):
            assert len(prompts) == 8 * group_size
            assert all(len(prompt.ids) <= prompt_length for prompt in prompts)
            return None

        return generate

    def reward_fn(rollout, prompts):
        rewards = []
        for place, prompt in enumerate(prompts):
            assert prompt.fields.keys() == {"prompt", "answer", "steps", "right"}
            text = TOKENIZER.decode(prompt.ids.tolist())
            seen.append(text)
            lines = [line for line in prompt.fields["steps"] if line + "\n" in text]
            written = prompt.fields["right"][: len(lines)]
            rewards.append(
                float(all(written) and place % 3 == 1)
            )  # one continuation in three comes out right
        return np.array(rewards)

    monkeypatch.setattr(step_labels, "make_generate_fn", make_generate_fn)
    found = step_labels.label_by_rollouts([Row(row, "here") for row in rows], POLICY, reward_fn, **OPTIONS)
    assert [row.fields["labels"] for row in found] == [[*labels, None] for labels in truth]
    assert any(False in labels for labels in truth)
    assert any(True in labels for labels in truth)
    assert len(set(seen)) == sum(map(len, truth))
    assert all(text.endswith("\n") for text in seen)


def test_a_solution_without_steps_is_refused():
    rows = [Row({"prompt": "1+1=?", "completions": ["#### 2"], "answer": "2"}, "file:7")]
    with pytest.raises(UserError, match=r"file:7.*one step"):
        step_labels.label_by_rollouts(rows, POLICY, lambda *_: np.zeros(0), **OPTIONS)
