import dataclasses
import json

import jax
import numpy as np
import pytest
import rl_page
import rl_table

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.evaluation.statistics import Interval
from rlhf_jax.rl.envs import multi_agent
from rlhf_jax.stages import rl_agents, rl_rows
from rlhf_jax.stages.rl_rows import Row

TINY = (
    Row("CartPole-v1", "a2c", 64, 5.0, "a peer", ("rollout.num_envs=2",)),
    Row(
        "CartPole-v1",
        "reinforce",
        4000,
        501.0,
        "",
        ("episodes=2", "max_steps=20"),
        done_steps=80,
        note="slow",
    ),
    Row("Acrobot-v1", "ppo", 10, -1.0),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(rl_rows, "ROWS", TINY)


@pytest.mark.slow
def test_rows_run_once_and_make_a_page(tmp_path, tiny, capsys):
    options = rl_table.Options(out=tmp_path, rows=("CartPole*",), seeds=2, eval_episodes=2, quiet=True)
    rl_table.run(options)
    a2c, reinforce = (tmp_path / "CartPole-v1" / algo for algo in ("a2c", "reinforce"))
    first = json.loads((a2c / "summary.json").read_text())
    assert len(first["evaluation_return"]) == len(first["evaluation_return_sampled"]) == 2
    assert (first["steps_taken"], first["seeds"]) == (64, 2)
    assert first["seconds"] > 0
    page = (tmp_path / "RL_RESULTS.md").read_text()
    assert "| CartPole-v1 | reinforce | 80 of 4,000 | 2 |" in page
    assert "| Acrobot-v1 | ppo | 10 | - | not run |" in page
    assert "- CartPole-v1/reinforce: slow" in page
    assert (tmp_path / "rl_curves.svg").stat().st_size > 5000

    # A row without its summary was stopped: it goes on from its chunks; the other is left alone.
    (reinforce / "summary.json").unlink()
    (a2c / "chunks" / "0.npz").unlink()
    before = (a2c / "summary.json").stat().st_mtime_ns
    rl_table.run(options)
    assert (a2c / "summary.json").stat().st_mtime_ns == before
    again = json.loads((reinforce / "summary.json").read_text())
    with np.load(reinforce / "chunks" / "0.npz") as chunk:
        np.testing.assert_allclose(again["evaluation_return"], chunk["evaluation_return"])
    assert again["seconds"] is None
    capsys.readouterr()
    rl_table.run(dataclasses.replace(options, list=True, rows=()))
    assert "Acrobot-v1/ppo" in capsys.readouterr().out
    # More seeds are added to those that are done.
    rl_table.run(dataclasses.replace(options, seeds=3, rows=("CartPole-v1/a2c",)))
    more = json.loads((a2c / "summary.json").read_text())
    assert len(more["evaluation_return"]) == 3
    np.testing.assert_allclose(more["evaluation_return"][:2], first["evaluation_return"])
    assert more["cpu_seconds"] > first["cpu_seconds"]
    # Stopped among them, the row does not know what they took.
    begun = json.loads((a2c / "plan.json").read_text()) | {"seeds": 4}
    files.write_json(a2c / "plan.json", begun)
    rl_table.run(dataclasses.replace(options, seeds=4, rows=("CartPole-v1/a2c",)))
    stopped = json.loads((a2c / "summary.json").read_text())
    assert len(stopped["evaluation_return"]) == 4
    assert stopped["cpu_seconds"] is None
    with pytest.raises(UserError, match="holds this cell with seeds 4, not 1"):
        rl_table.run(dataclasses.replace(options, seeds=1))


@pytest.mark.slow
def test_another_machine_goes_on_from_the_rows_that_are_kept(tmp_path, tiny, monkeypatch):
    here = rl_table.Options(
        out=tmp_path / "here", cells=tmp_path / "rows.json", rows=("CartPole-v1/a2c",), seeds=2, quiet=True
    )
    rl_table.run(here)
    monkeypatch.setattr(rl_table, "sweep", None)
    there = dataclasses.replace(here, out=tmp_path / "there")
    rl_table.run(there)  # trains nothing
    pages = [(options.out / "RL_RESULTS.md").read_text() for options in (here, there)]
    assert pages[0] == pages[1]
    assert (there.out / "rl_curves.svg").stat().st_size > 5000
    curve = json.loads(here.cells.read_text())["cells"]["CartPole-v1/a2c"]["curve"]
    assert len(curve["steps"]) == len(curve["iqm"]) > 1
    with pytest.raises(UserError, match="seeds 2, not 1"):
        rl_table.run(dataclasses.replace(there, seeds=1))


def test_mistakes_are_one_sentence(tmp_path, tiny):
    with pytest.raises(UserError, match="--out is missing"):
        rl_table.run(rl_table.Options())
    with pytest.raises(UserError, match="'Pong' matches no row: choose among CartPole-v1/a2c"):
        rl_table.run(rl_table.Options(out=tmp_path, rows=("Pong",)))
    with pytest.raises(UserError, match="--seeds 0: give at least 1"):
        rl_table.run(rl_table.Options(out=tmp_path, seeds=0))


def takes_long(row):
    """Rows whose environment or search takes long to trace; without the extra some cannot be looked at."""
    of_jaxmarl = row.env in multi_agent.NAMES and not row.env.endswith("_game")
    return [pytest.mark.slow] if of_jaxmarl or row.env.endswith("-MinAtar") or row.algo == "muzero" else []


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=takes_long(row))
        for table in rl_page.TABLES.values()
        for row in table.rows
    ],
)
def test_every_row_has_settings_that_exist_and_its_steps(row):
    if takes_long(row):
        pytest.importorskip("jaxmarl")
    env, params = rl_agents.make_environment(row.env)
    agent = rl_agents.make_agent(row.algo, env, row.done_steps or row.steps, row.settings)
    run = agent.run(env, params)
    steps = run.updates * run.steps_per_update
    assert 0.85 * (row.done_steps or row.steps) <= steps <= row.steps  # warm-ups are not counted
    state = jax.eval_shape(run.init, jax.random.key(0), agent.hyper)
    if row.env.endswith("MinAtar"):
        _, metrics = jax.eval_shape(run.step, state, agent.hyper)
        assert "episode_return_sum" in metrics


def test_names_are_unique():
    for table in rl_page.TABLES.values():
        assert len({row.name for row in table.rows}) == len(table.rows)


def test_a_page_has_the_rows_of_its_table():
    page = rl_page.page_text({}, rl_page.TABLES["several_agents"])
    assert "rlhf_jax/stages/rl_joint_rows.py" in page
    assert "| climbing_game | qmix | 8,000 | - | not run | - | 11 (by enumeration) |" in page
    assert "CartPole" not in page


@pytest.mark.parametrize(
    ("low", "mean", "high", "said"),
    [(6, 7, 8, "yes"), (4, 6, 8, "yes, within"), (3, 4, 6, "within"), (1, 2, 3, "no")],
)
def test_what_counts_as_reached(low, mean, high, said):
    row = Row("CartPole-v1", "ppo", 1, 5.0)
    assert rl_page.verdict(row, Interval(mean, low, high)).startswith(said)
