import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.runs import Run
from rlhf_jax.stages import rl, rl_agents

TINY = (
    "rollout.num_envs=2",
    "rollout.num_steps=16",
    "update.num_ppo_epochs=1",
    "update.num_minibatches=1",
    "hyper.learning_rate=1e-3",
    "network.encoder=mlp",
)


def options(**changes):
    return rl.Options(
        **{
            "env": "CartPole-v1",
            "seeds": 2,
            "steps": 5 * 32,
            "set": TINY,
            "chunks": 3,
            "eval_episodes": 2,
            "quiet": True,
            **changes,
        }
    )


@pytest.mark.slow
def test_train_load_and_render(tmp_path, capsys):
    out = tmp_path / "run"
    rl.run(options(out=out))
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["evaluation_return"]) == len(summary["evaluation_return_sampled"]) == 2
    assert all(8 <= score <= 500 for score in summary["evaluation_return"])
    assert summary["steps_per_second"] > 0
    assert summary["environment_steps"] == 160
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [64, 128, 160]
    rl.run(rl.Options(load=out, render=True, eval_episodes=2))
    again = json.loads((out / "evaluation.json").read_text())
    assert again["evaluation_return"] == summary["evaluation_return"]
    assert (out / "episode.gif").read_bytes()[:3] == b"GIF"
    (out / "digests.json").unlink()  # folders of old have none
    old = json.loads((out / "agent.json").read_text())
    old["set"] = [change.replace("network.encoder=", "network.body=") for change in old["set"]]
    (out / "agent.json").write_text(json.dumps(old))
    assert rl.read_description(out)["set"] == [*TINY]
    with pytest.raises(UserError, match="holds agents for CartPole-v1, not for Acrobot-v1"):
        rl.run(rl.Options(load=out, env="Acrobot-v1"))
    with pytest.raises(UserError, match="already holds a run"):
        rl.run(options(out=out))
    with pytest.raises(UserError, match=r"its run has --seeds 2, not 3"):
        rl.run(options(out=out, resume=True, seeds=3))
    assert "ppo on CartPole-v1, 2 seeds" in capsys.readouterr().out


@pytest.mark.slow
def test_the_debug_mode_trains_too(tmp_path):
    rl.run(options(out=tmp_path, debug=True, chunks=1, seeds=1, set=(*TINY, "network.memory_width=4")))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["evaluation_return"]) == 1


def test_chunks_hold_all_updates():
    assert rl.chunk_sizes(976, 20) == [49] * 19 + [45]
    assert rl.chunk_sizes(3, 20) == [1, 1, 1]
    assert sum(rl.chunk_sizes(101, 7)) == 101


def test_means_over_no_episode_are_left_out():
    history = {
        "episodes": np.zeros((2, 3), int),
        "episode_return_sum": np.zeros((2, 3)),
        "episode_length_sum": np.zeros((2, 3)),
        "loss": np.ones((2, 3)),
        "steps": np.arange(6).reshape(2, 3),
    }
    assert rl.summed(history) == {"episodes": 0, "loss": 1.0, "steps": 5}


def trained(tmp_path, step):
    """Two seeds of 12 updates, whose states are (a count, the seed)."""
    keys = jax.vmap(jax.random.key)(np.arange(2))

    def init(key, hyper):
        return jnp.float32(0), jax.random.key_data(key)[-1]

    run = Run(init, step, lambda *_: None, updates=12, steps_per_update=1)
    return rl.train(options(log=()), tmp_path, run, None, keys, {})


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    def step(state, _):
        count, seed = state
        return (jnp.where(count == 9, jnp.inf, count + 1), seed), {"steps": count}

    with pytest.raises(UserError, match=r"step 3: 1 parts of the state are not finite .* lower the learning"):
        trained(tmp_path, step)
    assert CheckpointManager(tmp_path / "checkpoints").steps() == [1, 2]


def test_one_seed_that_learns_nothing_any_more_ends_the_run(tmp_path):
    def step(state, _):
        count, seed = state
        in_a_row = jnp.where(seed == 1, jnp.int32(count) + 1, 0)
        return (count + 1, seed), {"steps": count, "consecutive_skipped": in_a_row, "skipped": in_a_row}

    with pytest.raises(UserError, match=r"step 3: .* not finite 12 times in a row"):
        trained(tmp_path, step)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algo": "pppo"}, "unknown algorithm 'pppo': the nearest name is 'ppo'"),
        ({"env": "Cartpole"}, "unknown environment 'Cartpole': the nearest name is"),
        ({"algo": "sac"}, "sac is for continuous actions and CartPole-v1 has discrete ones"),
        ({"algo": "dqn", "env": "Pendulum-v1"}, "dqn is for discrete actions and Pendulum-v1"),
        ({"algo": "her"}, "her is for environments with goals and CartPole-v1 has none"),
        ({"algo": "her", "env": "BitFlipping-99"}, "give 1 to 30 bits"),
        ({"algo": "maxq", "env": "CartPole-v1"}, "numbered states and CartPole-v1 has none"),
        ({"set": ("hyper.lr=1",)}, "no setting 'lr': choose among learning_rate"),
        ({"algo": "ppo", "set": ("network.body=mlp",)}, "'body' has another name: write network.encoder=mlp"),
        ({"algo": "ppo", "set": ("network.encoder=mpl",)}, "no encoder 'mpl': choose among mlp, relu_mlp"),
        (
            {"algo": "ppo", "set": ("network.encoder=mlp:8,a",)},
            "mlp:8,a': give the widths of an MLP's layers",
        ),
        ({"algo": "ppo", "set": ("network.encoder=minatar_conv:8",)}, "give the widths of an MLP's layers"),
        ({"set": ("rollout.num_envs=many",)}, "'many' is no int"),
        ({"set": ("rollout.num_envs=0",)}, "num_envs=0': 0 is out of range: give 1 or more"),
        ({"set": ("hyper.learning_rate=nan",)}, "nan is out of range: give a number from 0 to 1,000"),
        ({"set": ("hyper.learning_rate=inf",)}, "inf is out of range: give a number from 0 to 1,000"),
        ({"set": ("hyper.gamma=1e308",)}, "1e308 is out of range: give a number"),
        ({"set": ("total_steps",)}, "write it as NAME=VALUE"),
        ({"out": None}, "--out is missing"),
        ({"env": ""}, "--env is missing"),
        ({"seeds": 0}, "--seeds 0 is out of range: give 1 or more"),
        ({"load": "nowhere"}, "no agent can be read"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, sentence):
    changes = {name: pathlib.Path(value) if name == "load" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=sentence):
        rl.run(options(**{"out": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algo", few([*rl_agents.EITHER, *rl_agents.DISCRETE], "ppo", "c51"))
def test_every_algorithm_has_settings_and_a_run(algo):
    env, params = environments.make("CartPole-v1")
    agent = rl_agents.make_agent(algo, env, 100_000, ())
    run = agent.run(env, params)
    assert 50_000 <= run.updates * run.steps_per_update <= 100_000
    state = jax.eval_shape(run.init, jax.random.key(0), agent.hyper)
    _, metrics = jax.eval_shape(run.step, state, agent.hyper)
    assert {"steps", "episodes", "episode_return_sum", "episode_length_sum"} <= set(metrics)


@pytest.mark.parametrize("algo", few([*rl_agents.EITHER, *rl_agents.CONTINUOUS], "sac"))
def test_every_algorithm_for_continuous_actions_too(algo):
    env, params = environments.make("Pendulum-v1")
    agent = rl_agents.make_agent(algo, env, 0, ())
    run = agent.run(env, params)
    state = jax.eval_shape(run.init, jax.random.key(0), agent.hyper)
    jax.eval_shape(run.step, state, agent.hyper)
