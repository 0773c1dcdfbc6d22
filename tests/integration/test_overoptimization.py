"""The study of overoptimisation, small: its stages, what a second call does again, and its page."""

import json

import numpy as np
import overoptimization
import overoptimization_page as page
import pytest
from overoptimization_study import RULES

from rlhf_jax.core.errors import UserError
from rlhf_jax.evaluation.overoptimization import REINFORCEMENT_LEARNING
from rlhf_jax.sweep import running as sweep_running

SMALL = {
    "seeds": 2,
    "sizes": (8,),
    "width": 8,
    "pairs": (16, 64),
    "held_out_pairs": 32,
    "members": 2,
    "base_steps": 20,
    "reward_steps": 20,
    "num_samples": 8,
    "prompts": 8,
    "ppo_steps": 4,
    "dpo_steps": 4,
    "num_evals": 2,
}


@pytest.mark.slow
def test_every_stage_and_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    options = overoptimization.Options(out=tmp_path, quiet=True, **SMALL)
    overoptimization.run(options)
    study = page.read(tmp_path)
    assert set(study.curves) == {"best_of_n/8", "best_of_n/ensemble", "ppo/8", "ppo/ensemble", "dpo"}
    for name, curves in study.curves.items():
        assert len(curves) == (4 if name.endswith("ensemble") else 2)
        for curve in curves:
            assert np.all(curve.gold[:, 0] == 0)  # the start
            assert np.all(curve.distance[:, 1:] > curve.distance[:, :1])
            if name.startswith("best_of_n"):
                assert np.all(np.diff(curve.proxy, axis=1) > 0)  # more samples, a better best
    worst, mean = (study.curves["best_of_n/ensemble"][RULES.index(rule)] for rule in ("worst", "mean"))
    assert not np.allclose(worst.gold, mean.gold)
    text = (tmp_path / "OVEROPTIMISATION.md").read_text()
    assert all((tmp_path / f"{name}.svg").stat().st_size > 5_000 for name in page.PICTURES)
    assert all(f"({name}.svg)" in text for name in page.PICTURES)

    def refuse(_):
        raise AssertionError("a stage that is done was done again")

    monkeypatch.setattr(overoptimization.jax, "block_until_ready", refuse)
    monkeypatch.setattr(sweep_running, "_compile_once", lambda *_: refuse)
    (tmp_path / "OVEROPTIMISATION.md").write_text("# Old\n\n## What it shows\n\nA finding.\n\n## Made\n\nx\n")
    overoptimization.run(options)
    again = (tmp_path / "OVEROPTIMISATION.md").read_text()
    assert "A finding." in again
    assert again.replace("\n\nA finding.", "") == text
    with pytest.raises(UserError, match=r"seeds 2, not 3.*choose another --out"):
        overoptimization.run(overoptimization.Options(out=tmp_path, **{**SMALL, "seeds": 3}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--out is missing"),
        ({"seeds": 0}, "--seeds 0"),
        ({"members": 1}, "--members 1: give at least 2"),
        ({"pairs": (64, 16)}, "least amount of pairs first"),
        ({"pairs": (300,)}, "300 pairs"),
        ({"num_evals": 7}, "--num-evals 7"),
    ],
)
def test_bad_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        overoptimization.run(overoptimization.Options(**{"out": tmp_path if options else None, **options}))
    assert not list(tmp_path.iterdir())


def synthetic_folder(folder, seeds=3):
    """What the stages leave, with known coefficients."""
    rng = np.random.default_rng(0)
    plan = {
        "seeds": seeds,
        "sizes": [8],
        "pairs": [16, 64],
        "num_samples": 64,
        "members": 2,
        "uncertainty_coef": 0.5,
    }
    folder.joinpath("plan.json").write_text(json.dumps(plan))
    about = {"started": "2026-11-21T00:00:00", "command": "python x.py", "versions": {"jax": "0"}}
    folder.joinpath("config.json").write_text(json.dumps(about))
    n = np.arange(1, 65)
    d = np.sqrt(np.log(n) - (n - 1) / n)
    gold = 3 + 2 * d * (1.5 - 0.4 * d)  # deviation 2
    for name in ("rewards", "best_of_n"):
        folder.joinpath(name).mkdir()
    for number in range(2):
        accuracy = {"1/gold_accuracy": rng.uniform(0.6, 0.9, seeds)}
        np.savez(folder / "rewards" / f"8-{number}.npz", **accuracy)
    for name, count in (("8", 2), ("ensemble", 4)):
        curves = {key: np.broadcast_to(x, (seeds, count, 64)) for key, x in (("gold", gold), ("proxy", d))}
        np.savez(folder / "best_of_n" / f"{name}.npz", deviation=np.full(seeds, 2.0), **curves)
    return d


@pytest.mark.slow
def test_the_page_recovers_what_the_folder_holds(tmp_path):
    d = synthetic_folder(tmp_path)
    study = page.read(tmp_path)
    curve = study.curves["best_of_n/8"][1]
    assert curve.label == "64 pairs"
    np.testing.assert_allclose(curve.distance[0, -1], d[-1], rtol=1e-5)
    np.testing.assert_allclose(
        curve.gold[0], 1.5 * curve.distance[0] - 0.4 * curve.distance[0] ** 2, atol=1e-5
    )
    found = page.fits(study)["best_of_n/8", "64 pairs"]
    assert (found.alpha.mean, found.beta.mean) == pytest.approx((1.5, 0.4), abs=1e-4)
    assert found.peak_kl.mean == pytest.approx((1.5 / 0.8) ** 2, rel=1e-3)
    text = page.page_text(study, "## What it shows\n\nThis.")
    assert "This." in text
    assert "| best_of_n, 8 | 64 pairs | 1.50 [1.50, 1.50] | 0.40 [0.40, 0.40] |" in text
    assert page.form_of("dpo") is page.form_of("ppo/8") is REINFORCEMENT_LEARNING
