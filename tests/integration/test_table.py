"""The table of algorithms, small: resumes, is one page, and reproduces its frozen numbers."""

import dataclasses
import json

import jax
import numpy as np
import post_training
import post_training_methods as methods
import post_training_page
import post_training_rows
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import preference, unpaired
from rlhf_jax.algorithms.grpo_variants import grpo_variants
from rlhf_jax.core.errors import UserError
from rlhf_jax.jitted.train import SeedState, make_train
from rlhf_jax.sweep import Results

SMALL = {"seeds": 4, "search_seeds": 0, "steps": 8, "base_steps": 60, "width": 16, "layers": 1, "niceness": 0}
CELLS = ("raft", "dpo", "grpo")
# Made by this test's own run on Linux x86-64, Python 3.11, jax 0.10.2, 2026-11.
FROZEN = {
    "sampled_score": {"raft": -0.20921, "dpo": -0.20862, "grpo": -0.21427},
    "kl": {"raft": 0.03114, "dpo": 0.02413, "grpo": 0.01949},
}
TOLERANCE = {"sampled_score": 2e-4, "kl": 1e-3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    options = post_training.Options(out=out, tasks=("style",), algorithms=CELLS, quiet=True, **SMALL)
    post_training.run(options)
    return options


@pytest.mark.parametrize("number", FROZEN)
def test_frozen_numbers_tell_the_rows_apart(number):
    gaps = np.diff(sorted(FROZEN[number].values()))
    assert gaps.min() > 2 * TOLERANCE[number]


@pytest.mark.slow
def test_frozen_numbers(finished):
    done = post_training.summaries(finished.out)
    assert {name for _, name in done} == set(CELLS)
    for number, frozen in FROZEN.items():
        found = {name: float(np.mean(summary[number])) for (_, name), summary in done.items()}
        assert found == pytest.approx(frozen, abs=TOLERANCE[number])
    for summary in done.values():
        assert len(summary["sampled_score"]) == SMALL["seeds"] == len(set(summary["sampled_score"]))
        assert summary["learning_rate"] == 1e-3  # the middle one, without a search
        assert summary["generated"] == pytest.approx(np.full(4, summary["generated"][0]), rel=0.3)


def test_every_variant_and_every_loss_is_a_row():
    """Variants of GRPO, losses on pairs and on single answers, modifiers, RLAIF, distillation."""
    names = {algorithm.name for algorithm in post_training_rows.ALGORITHMS}
    assert grpo_variants().keys() | preference.pair_losses().keys() | unpaired.UNPAIRED_LOSSES.keys() <= names
    assert {"cdpo", "f_dpo_js", "f_dpo_forward_kl", "f_dpo_alpha", "rpo", "mpo", "wpo", "ld_dpo"} <= names
    assert {"rlaif_dpo", "rlaif_grpo", "distillation", "sequence_distillation", "gkd", "minillm"} <= names


@pytest.mark.slow
def test_every_row_is_a_run(monkeypatch):
    """Traced with all of its numbers, and not run."""
    options = post_training.Options(**SMALL)
    (task,) = (task for task in post_training_rows.TASKS if task.name == "style")
    setup = post_training.make_task_setup(task, options)
    params = jax.jit(lambda key: models.init_params(setup.policy.architecture, key))(jax.random.key(0))
    monkeypatch.setattr(methods, "teacher_of", lambda setup, steps: setup.policy.with_params(params))
    start = SeedState(jax.random.key(1), params)
    for row in post_training_rows.ALGORITHMS:
        train = make_train(setup, row.make(setup, post_training.schedule(2)), steps=2)
        _, history = jax.eval_shape(train, start, post_training.as_floats(row.hyper))
        assert history["sampled_score"].shape == (), row.name
        assert json.loads(json.dumps(post_training.plan(task, row, options)))["algorithm"] == row.name


@pytest.mark.parametrize("peak", [2e-5, 8e-4, 6e-3, 1.0, np.nan])
def test_the_search_goes_on_until_the_best_is_between_others(peak):
    tried = []

    def sweep_rates(rates):
        assert rates[: len(tried)] == tried  # new ones behind those that are done
        tried[:] = rates
        scores = -(np.log(np.asarray(rates) / peak) ** 2)
        return Results({}, {"sampled_score": np.stack([scores, scores + 0.1], axis=1)})

    means = post_training.search_rate(sweep_rates)
    best = post_training.best_rate(means)
    if 1e-5 < peak < 0.1:
        assert min(means) < best < max(means)
        assert abs(np.log(best / peak)) < np.log(3.4) / 2 + 0.1
    else:  # nothing to find, or beyond all
        assert best == post_training.RATES[0 if np.isnan(peak) else -1]
    assert 3 <= len(means) == len(tried) <= len(post_training.RATES)


@pytest.mark.slow
def test_what_is_done_is_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(post_training, "sweep", None)
    path = finished.out / "RESULTS.md"
    by_hand = "## What it shows\n\nThat words stay."
    path.write_text(path.read_text().replace("## What it shows", by_hand))
    post_training.run(finished)
    page = path.read_text()
    assert by_hand in page
    assert all(f" {name} |" in page for name in (*CELLS, "start"))
    assert post_training_page.cell(post_training.summaries(finished.out)["style", "grpo"]) in page
    assert (finished.out / post_training_page.PICTURE).stat().st_size > 10_000


@pytest.mark.slow
def test_another_machine_goes_on_from_the_cells_that_are_kept(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(post_training, "sweep", None)
    here = dataclasses.replace(finished, cells=tmp_path / "cells.json")
    post_training.keep(here)
    there = dataclasses.replace(here, out=tmp_path / "there")
    post_training.run(there)  # trains nothing
    assert post_training.summaries(there.out) == post_training.summaries(finished.out)
    assert post_training.start_scores(there.out) == post_training.start_scores(finished.out)
    held = json.loads(here.cells.read_text())
    assert {*post_training.PLANNED} <= held["cells"]["style/grpo"].keys()
    with pytest.raises(UserError, match="seeds 4, not 5"):
        post_training.run(dataclasses.replace(there, seeds=5))


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(finished):
    other = post_training.Options(**{**vars(finished), "seeds": 5})
    with pytest.raises(UserError, match=r"seeds 4, not 5.*choose another --out"):
        post_training.run(other)


def test_what_is_to_come_is_said_in_core_hours():
    done = [{"core_seconds": 60.0}, {"core_seconds": 300.0}, {"core_seconds": None}]
    assert post_training.budget(40, done) == "40 cells to run, 3.0 core-minutes each so far: 2.0 core-hours"
    assert post_training.budget(0, done) == "0 cells to run"
    assert post_training.budget(7, done[2:]) == "7 cells to run"


def test_list_runs_nothing(tmp_path, capsys):
    post_training.run(post_training.Options(out=tmp_path, list=True))
    shown = capsys.readouterr().out
    assert "grpo" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "--out is missing"), ({"tasks": ("stile",)}, "stile"), ({"seeds": 0}, "--seeds 0")],
)
def test_bad_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        post_training.run(post_training.Options(**{"out": tmp_path if options else None, **options}))


@pytest.mark.slow
def test_equal_budgets(finished):
    rows = {algorithm.name: algorithm for algorithm in post_training_rows.ALGORITHMS}
    task = post_training_rows.TASKS[0]
    options = post_training.Options(out=finished.out, steps=100)
    assert post_training.steps_of(task, rows["grpo"], options) == 100
    assert post_training.steps_of(task, rows["dapo"], options) == 50  # it samples twice as much a step
    plan = post_training.plan(task, rows["dapo"], options)
    assert json.loads(json.dumps(plan)) == plan
