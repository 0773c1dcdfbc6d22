"""PPO and GRPO with answers packed are the same runs, from fewer columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax as rj
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics

ROWS = [{"prompt": "+".join(str(n % 10) for n in range(1 + number % 2 * 40)) + "=?"} for number in range(16)]
PLAIN = {"max_new_tokens": 24, "steps": 2, "batch_size": 4, "learning_rate": 1e-3, "num_minibatches": 2}
PLAIN |= {"micro_batches": 2, "quiet": True, "report": False}
SETTINGS = {**PLAIN, "adapter": rj.lora(rank=2)}


def short(prompts, completions, **fields):
    return [-len(text) + 0.1 * (text.count("1") - text.count("2")) for text in completions]


def trained(tiny, stage, out, **settings):
    policy = rj.load(tiny.finished("sft"))
    run = getattr(rj, stage)(policy, ROWS, rewards=[short], out=out, **{**SETTINGS, **settings})
    return run.policy.params, read_metrics(out)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "settings"), [("grpo", {"group_size": 4, "kl_coef": 0.1}), ("ppo", {})])
def test_a_packed_run_is_the_same_run(tiny, tmp_path, stage, settings):
    expected, its = trained(tiny, stage, tmp_path / "plain", **settings)
    found, metrics = trained(tiny, stage, tmp_path / "packed", packing=True, **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found, expected)
    for step, other in zip(metrics, its, strict=True):
        assert step["columns_per_token"] < 0.8 * other["columns_per_token"]
        assert step["reward"] == pytest.approx(other["reward"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"reference": "each_step", "micro_batches": 2}, {"loss": "kto"}])
def test_packed_preferences_are_the_same_run(tiny, tmp_path, settings):
    policy = rj.load(tiny.finished("sft"))
    pairs = [{**row, "chosen": "1+1=2", "rejected": "2" * (1 + n)} for n, row in enumerate(ROWS)]
    common = {"steps": 3, "batch_size": 8, "learning_rate": 1e-3, "quiet": True, "report": False, **settings}
    runs = [rj.dpo(policy, pairs, out=tmp_path / str(on), packing=on, **common) for on in (True, False)]
    found, expected = (run.policy.params for run in runs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), found, expected)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, policy.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_what_is_not_packed_is_refused(tiny, tmp_path):
    def one_a_row(params, tokens):
        return params["table"][tokens]

    size = rj.load(tiny.finished("sft")).vocab_size
    plain = rj.wrap(one_a_row, {"table": jnp.zeros((size, size))}, rj.load(tiny.finished("sft")).tokenizer)
    with pytest.raises(UserError, match="packing puts several samples in a row"):
        rj.grpo(plain, ROWS, rewards=[short], out=tmp_path, packing=True, **PLAIN)
    with pytest.raises(UserError, match="replay_share have lengths of other steps"):
        rj.grpo(plain, ROWS, rewards=[short], packing=True, replay_share=0.5, batch_size=4, out=tmp_path)
