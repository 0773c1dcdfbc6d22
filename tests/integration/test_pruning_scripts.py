"""A pruned policy as a run folder, fine-tuned by SFT with its zeros kept, and the study of both."""

import json

import numpy as np
import pruning as prune_study
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.models import pruning
from rlhf_jax.stages import prune
from rlhf_jax.training.run_folder import load_policy


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "run"
    choice = prune.PruneOptions(method="wanda", pattern="2:4")
    prune.run(
        prune.Options(
            out=out, model=str(tiny.finished("sft")), prune=choice, data="arithmetic:1", rows=8, quiet=True
        )
    )
    return out


def kernels(folder):
    return {
        k: np.asarray(v) for k, v in named_leaves(pruning.linear_kernels(load_policy(folder).params)).items()
    }


@pytest.mark.slow
def test_sft_trains_what_is_left_and_a_resume_keeps_the_zeros(tiny, pruned, tmp_path):
    before = kernels(pruned)
    for kernel in before.values():
        groups = kernel.reshape(kernel.shape[0] // 4, 4, -1)
        assert (np.count_nonzero(groups, axis=1) == 2).all()
    words = ("--model", pruned, "--adapter.preserve-sparsity", "--learning-rate", 1e-2)
    words += ("--optimizer.warmup-steps", 0, "--optimizer.schedule", "constant")
    out = tiny.run("sft", tmp_path / "run", *words, "--steps", 2)
    tiny.run("sft", out, *words, "--steps", 4, "--resume")
    for name, kernel in kernels(out).items():
        kept = before[name] != 0
        assert not kernel[~kept].any()
        # Some have no way to the output left, and so no gradient.
        assert (kernel[kept] != before[name][kept]).mean() > 0.8
    assert json.loads((pruned / "zeros.json").read_text())[""] == 0.5


def test_mistakes_are_said_before_anything_runs(tiny, pruned, tmp_path):
    base = str(tiny.finished("sft"))
    with pytest.raises(UserError, match="no zero weights"):
        tiny.run("sft", tmp_path / "a", "--model", base, "--adapter.preserve-sparsity")
    with pytest.raises(UserError, match="means nothing to"):
        tiny.run(
            "sft", tmp_path / "b", "--model", pruned, "--adapter.preserve-sparsity", "--adapter.kind", "lora"
        )
    with pytest.raises(UserError, match="is not N:M"):
        prune.PruneOptions(pattern="half").masks(load_policy(pruned).params, None)
    with pytest.raises(UserError, match="already holds a run"):
        prune.run(prune.Options(out=pruned, model=base))


@pytest.mark.slow
def test_the_study_leaves_a_table_and_a_picture_and_does_no_cell_twice(tiny, tmp_path):
    options = prune_study.Options(
        out=tmp_path / "study",
        models=(str(tiny.finished("sft")),),
        sparsities=(0.0, 0.5),
        steps=3,
        batch_size=4,
        demonstrations=16,
        rows=8,
        eval_count=4,
        quiet=True,
    )
    prune_study.run(options)
    cells = (tmp_path / "study" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(cell)["zeros"] for cell in cells] == [0.0, pytest.approx(0.5), pytest.approx(0.5)]
    prune_study.run(options)
    assert (tmp_path / "study" / "cells.jsonl").read_text().splitlines() == cells
    assert (tmp_path / "study" / "pruning.svg").stat().st_size > 5000
    assert "| 50 % |" in (tmp_path / "study" / "pruning.md").read_text()
