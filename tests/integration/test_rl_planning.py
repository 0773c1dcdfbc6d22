"""The studies of planning ahead: whole and small, and what their pages say of runs."""

import numpy as np
import pytest
import rl_planning
import rl_planning_page as page

from rlhf_jax.core.errors import UserError


def test_real_steps_until_the_greedy_policy_is_optimal():
    found = {
        "length": np.array([[10, 20, 30], [5, 5, 5]]),
        "greedy_value": np.array([[0.1, 0.5, 0.5], [0.1, 0.2, 0.3]]),
    }
    np.testing.assert_array_equal(page.steps_until_optimal(found, 0.5), [30, np.nan])


def test_steps_until_solved_and_reports_without_an_episode():
    found = {
        "steps": np.array([[200, 400, 600]] * 4),
        "episodes": np.array([[0, 1, 2]] * 4),
        "episode_return_sum": np.array([[0.0, -300.0, -380.0]] * 4),
    }
    steps, returns = page.training_returns(found)
    assert np.isnan(returns[:, 0]).all()
    assert steps.tolist() == [200, 400, 600]
    assert page.steps_until_solved(found) == 600
    assert np.isnan(page.steps_until_solved({**found, "episode_return_sum": found["steps"] * -3.0}))


@pytest.mark.parametrize(("options", "said"), [({}, "--out is missing"), ({"seeds": 0}, "--seeds 0")])
def test_bad_options(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        rl_planning.run(rl_planning.Options(**{"out": tmp_path if options else None, **options}))


@pytest.mark.slow
def test_a_small_run_writes_the_page_and_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_planning, "CONTROL", {"mpc": (400, 2), "sac": (1400, 2)})
    monkeypatch.setattr(rl_planning, "PLANNING_STEPS", (0, 2))
    few = {"seeds": 2, "control_seeds": 2, "episodes": 4, "eval_episodes": 1}
    small = rl_planning.Options(out=tmp_path, quiet=True, **few)
    rl_planning.run(small)
    text = (tmp_path / rl_planning.PAGE).read_text()
    for line in ("| 2 planning steps |", "| mpc | 400 |", "| hallways |", "| feudal |"):
        assert line in text
    assert (tmp_path / rl_planning.PICTURE).stat().st_size > 10_000
    monkeypatch.setattr(rl_planning, "sweep", None)
    rl_planning.run(small)
    assert (tmp_path / rl_planning.PAGE).read_text() == text
    with pytest.raises(UserError, match=r"seeds 2, not 3.*choose another --out"):
        rl_planning.run(rl_planning.Options(**{**vars(small), "seeds": 3}))
