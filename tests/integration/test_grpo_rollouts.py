"""GRPO learns the same, however its answers are batched and whether or not the sampler is corrected for."""

import pytest

from rlhf_jax.metrics import read_metrics

pytestmark = pytest.mark.slow


def test_slots_and_corrections_change_nothing_where_sampler_and_scorer_agree(tiny, tmp_path):
    plain = read_metrics(tiny.run("grpo", tmp_path / "plain", "--steps", 4))
    other = read_metrics(
        tiny.run(
            "grpo",
            tmp_path / "other",
            "--steps",
            4,
            "--max-num-seqs",
            3,
            "--importance-sampling-correction",
            "tis",
        )
    )
    for ours, theirs in zip(plain[1:], other[1:], strict=True):
        assert theirs["is_ratio"] == pytest.approx(1, abs=1e-4)
        assert theirs["sampling_logp_diff"] < 1e-4
        for name in ("reward", "length", "loss", "kl"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-4), name
