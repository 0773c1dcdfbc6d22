"""The studies of control: whole and small, and what their estimators must do."""

import jax
import numpy as np
import pytest
import rl_studies
from tiers import few

from rlhf_jax.core.errors import UserError


@pytest.mark.parametrize("length", few([1, 3, 8], 3))
def test_importance_weights_are_unbiased_and_their_clipping_is_not(length):
    found = rl_studies.estimates(jax.random.key(0), episodes=40_000, length=length)
    means = {name: float(np.mean(values)) for name, values in found.items()}
    errors = {name: float(np.std(values)) / 200 for name, values in found.items()}
    for name in ("whole episode", "each decision", "each decision, with V"):
        assert abs(means[name] - rl_studies.OTHER) < 5 * errors[name] + 1e-6
    assert means["no weights"] == pytest.approx(rl_studies.ACTED, abs=0.01)
    for name in ("V-trace", "Retrace"):
        assert rl_studies.ACTED < means[name] < rl_studies.OTHER + 1e-6
        assert errors[name] < errors["each decision, with V"]
    if length > 1:
        assert errors["each decision"] < errors["whole episode"]


def test_the_worth_of_weighted_episodes_is_that_of_samples():
    returns = rl_studies.estimates(jax.random.key(1), episodes=200_000, length=4)
    good = np.asarray(returns["no weights"])
    weights = np.asarray(returns["whole episode"])[good > 0] / good[good > 0]
    nothing_good = np.sum(good == 0) * ((1 - rl_studies.OTHER) / (1 - rl_studies.ACTED)) ** 8
    share = len(good) / (np.sum(weights**2) + nothing_good)
    assert share == pytest.approx(rl_studies.effective_share(4), rel=0.02)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_studies, "ENVIRONMENTS", ("CartPole-v1",))
    monkeypatch.setattr(rl_studies, "GAMMAS", (0.5, 1.0))
    monkeypatch.setattr(rl_studies, "LAMBDAS", (0.0, 1.0))
    return rl_studies.Options(out=tmp_path, seeds=2, steps=2048, chunk=8, episodes=500, quiet=True)


@pytest.mark.slow
def test_a_small_run_writes_the_page_and_is_not_done_again(small, monkeypatch):
    rl_studies.run(small)
    page = (small.out / rl_studies.PAGE).read_text()
    assert "| CartPole-v1: gamma | lambda 0 | lambda 1 |" in page
    assert "| V-trace |" in page
    for picture in (rl_studies.GAE_PICTURE, rl_studies.WEIGHTS_PICTURE):
        assert (small.out / picture).stat().st_size > 10_000
    monkeypatch.setattr(rl_studies, "sweep", None)
    rl_studies.run(small)
    assert (small.out / rl_studies.PAGE).read_text() == page
    with pytest.raises(UserError, match=r"seeds 2, not 3.*choose another --out"):
        rl_studies.run(rl_studies.Options(**{**vars(small), "seeds": 3}))


@pytest.mark.parametrize(("options", "said"), [({}, "--out is missing"), ({"steps": 0}, "--steps 0")])
def test_bad_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        rl_studies.run(rl_studies.Options(**{"out": tmp_path if options else None, **options}))
