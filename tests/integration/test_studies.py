"""The studies of one setting: what they are made of, a small one run, and its page."""

import json

import numpy as np
import pytest
import settings

from rlhf_jax.core.errors import UserError

ABOUT = {"command": "python x.py", "started": "2026-11-21T00:00:00", "versions": {"jax": "0"}}


def test_studies_are_well_formed():
    names = [study.name for study in settings.STUDIES]
    assert len(set(names)) == len(names)
    for study in settings.STUDIES:
        labels = [label for variant in study.variants for label in variant.labels()]
        assert study.usual in labels
        assert len(set(labels)) == len(labels) > 2
        for variant in study.variants:
            assert len({len(values) for values in variant.swept.values()}) <= 1
            assert all(hasattr(variant.hyper, name) for name in variant.swept)


def test_the_page_says_who_beats_the_usual_setting():
    study = next(study for study in settings.STUDIES if study.name == "dpo_beta")
    score = np.array([[0.1, 0.2], [0.5, 0.6], [0.3, 0.4], [0.0, 0.9], [0.3, 0.4]])
    summary = {
        "settings": study.variants[0].labels(),
        "kl": (score * 2).tolist(),
        "length": (score * 9).tolist(),
    }
    done = {"dpo_beta": {**summary, **ABOUT, "sampled_score": score.tolist()}}
    done["dpo_beta"] |= {"seeds": 2, "steps": 1, "base_steps": 1, "width": 8}
    text = settings.page_text(done, "## What it shows\n\nThat.")
    assert "That." in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["0.03"].endswith("| 0.00 [0.00, 0.00] |")
    assert rows["0.1"].endswith("| 1.00 [1.00, 1.00] |")
    assert rows["0.3"].endswith("| - |")
    assert "| 0.50 [" in rows["3"]
    assert "(study_dpo_beta.svg)" in text
    assert "grpo" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "--out is missing"), ({"studies": ("dpa",)}, "dpo_beta"), ({"seeds": 0}, "--seeds 0")],
)
def test_bad_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        settings.run(settings.Options(**{"out": tmp_path if options else None, **options}))


@pytest.mark.slow
def test_a_small_study(tmp_path, monkeypatch):
    options = settings.Options(
        out=tmp_path,
        studies=("dpo_beta", "grpo_epochs"),
        seeds=2,
        steps=4,
        base_steps=10,
        width=8,
        quiet=True,
    )
    settings.run(options)
    swept = json.loads((tmp_path / "dpo_beta" / "summary.json").read_text())
    assert np.shape(swept["sampled_score"]) == (5, 2)
    kl = np.mean(swept["kl"], axis=1)
    assert len(set(kl)) == 5  # beta does something
    assert np.shape(json.loads((tmp_path / "grpo_epochs" / "summary.json").read_text())["kl"]) == (3, 2)
    text = (tmp_path / "STUDIES.md").read_text()
    assert "study_dpo_beta.svg" in text
    assert (tmp_path / "study_grpo_epochs.svg").stat().st_size > 5_000
    monkeypatch.setattr(settings, "sweep", None)  # what is done is not done again
    settings.run(options)
    assert (tmp_path / "STUDIES.md").read_text() == text
