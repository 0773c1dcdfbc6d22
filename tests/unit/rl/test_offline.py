"""Learning from logs: identities of the updates, files and their mistakes, whole runs on a solved bandit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, init_train_state, make_optimizer
from rlhf_jax.rl.algorithms import bc, cql, dqn, gail, iql, ppo
from rlhf_jax.rl.envs import environments, transitions
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.rollout import RolloutConfig
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import applied
from rlhf_jax.stages import rl_offline

CARTPOLE, CARTPOLE_PARAMS = environments.make("CartPole-v1")
PENDULUM, PENDULUM_PARAMS = environments.make("Pendulum-v1")
BODY = MLP((8,), nn.relu)
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))
SHORT = offline.RunConfig(updates=4, batch_size=16, num_logs=2)


@pytest.fixture(scope="module")
def log() -> Transition:
    act = transitions.random_act_fn(CARTPOLE)
    return transitions.collect(act, None, CARTPOLE, CARTPOLE_PARAMS, jax.random.key(0), episodes=6)


def bandit(env: environments.Environment, actions: np.ndarray, rewards: np.ndarray) -> Transition:
    """One-step episodes from one state, in the shapes of `env`."""
    count = len(actions)
    obs, yes = np.zeros((count, *env.obs_shape), np.float32), np.ones(count, bool)
    return Transition(obs, actions, rewards.astype(np.float32), yes, ~yes, obs)


def test_collected_episodes_are_whole(log):
    ends = np.flatnonzero(log.done)
    returns = transitions.episode_returns(log)
    assert len(ends) == 6
    assert ends[-1] == len(log.reward) - 1
    np.testing.assert_array_equal(returns, np.diff(ends, prepend=-1))  # CartPole pays 1 a step
    inside = ~log.done[:-1]
    np.testing.assert_array_equal(log.next_obs[:-1][inside], log.obs[1:][inside])


def test_files_come_back_and_mistakes_are_one_sentence(log, tmp_path):
    path = tmp_path / "logs" / "log.npz"
    transitions.save(path, log, {"env": "CartPole-v1", "sources": ["random:6"]})
    again, about = transitions.load(path, CARTPOLE)
    jax.tree.map(np.testing.assert_array_equal, again, log)
    assert about["sources"] == ["random:6"]
    with pytest.raises(UserError, match="is a log of CartPole-v1, not of Pendulum-v1"):
        transitions.load(path, PENDULUM)
    with pytest.raises(UserError, match="no log of transitions can be read"):
        transitions.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(UserError, match="no log of transitions can be read"):
        transitions.load(tmp_path / "text.npz")
    broken = {
        "actions are not all in 0 ... 1": {"action": log.action + 1},
        "reward holds numbers that are not finite": {"reward": log.reward * np.nan},
        "obs has shape": {"obs": log.obs[:, :3]},
        "its last episode has no end": {"terminated": log.terminated & False},
    }
    for sentence, changes in broken.items():
        transitions.save(path, dataclasses.replace(log, **changes), about)
        with pytest.raises(UserError, match=sentence):
            transitions.load(path, CARTPOLE)


@pytest.mark.slow
def test_without_conservatism_cql_is_dqn(log):
    replay = offline.as_replay(log)
    batch = offline.sample(replay, jax.random.key(1), batch_size=16, gamma=0.9)
    network = dqn.make_network(dqn.Config(encoder=BODY), CARTPOLE)
    values = dqn.network_fns(network)
    state = dqn.init(network.init(jax.random.key(0), batch.obs)["params"], TX)
    hyper = cql.Hyper(cql_alpha=0.0)
    plain = dqn.Hyper(learning_rate=1e-3, target_update_interval=1, tau=0.01)
    expected, _, _ = jax.jit(dqn.make_update(dqn.Config(), values, TX))(state, plain, batch)
    update = jax.jit(cql.make_update(cql.Config(), values, TX))
    found, metrics = update(state, hyper, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    more, _ = update(state, cql.Hyper(cql_alpha=5.0), batch)
    penalties = [float(update(s, hyper, batch)[1]["conservative_penalty"]) for s in (state, more)]
    assert penalties[1] < penalties[0] == pytest.approx(float(metrics["conservative_penalty"]))


@pytest.mark.slow
def test_with_no_temperature_the_policy_of_iql_is_cloned(log):
    replay = offline.as_replay(log)
    batch = offline.sample(replay, jax.random.key(1), batch_size=16, gamma=0.9)
    policy, value = offline.make_policy(CARTPOLE, BODY), MLP((8,), output=1)
    init_critics, critic_fn = offline.make_critics(CARTPOLE, BODY, count=2)
    keys = jax.random.split(jax.random.key(0), 3)
    params = [m.init(k, batch.obs)["params"] for m, k in zip((policy, value), keys[:2], strict=True)]
    critics = init_critics(keys[2])

    def value_fn(params, obs):
        return applied(value)(params, obs)[..., 0]

    update = jax.jit(iql.make_update(applied(policy), value_fn, critic_fn, TX))
    state = iql.init(*params, critics, TX)
    hyper = iql.Hyper(inverse_temperature=0.0, learning_rate=1e-3)
    found, metrics = update(state, hyper, batch)
    cloned, _ = jax.jit(bc.make_update(applied(policy), TX))(bc.init(params[0], TX), bc.Hyper(), batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.policy.params, cloned.params)
    # The critics' targets are those of the value function that has just learnt.
    targets = batch.reward + batch.discount * value_fn(found.value.params, batch.next_obs)
    q = critic_fn(critics, batch.obs, batch.action)
    np.testing.assert_allclose(metrics["value_loss"], np.mean((q - targets) ** 2) / 2, rtol=1e-4)


@pytest.mark.slow
def test_iql_prefers_what_paid_where_cloning_does_as_was_done():
    """A bandit of which the log has the better arm one time in five."""
    actions = np.resize([0, 0, 0, 0, 1], 200).astype(np.int32)
    data = bandit(CARTPOLE, actions, actions * 3.0)
    run_config = offline.RunConfig(updates=400, batch_size=64, num_logs=1)
    obs = jnp.zeros((1, 4))
    chances = []
    for module, hyper in (
        (bc, bc.Hyper(learning_rate=1e-2)),
        (iql, iql.Hyper(learning_rate=1e-2, tau=0.1)),
    ):
        run = module.make_run(module.Config(run=run_config, encoder=BODY), CARTPOLE, data)
        state, _ = jax.jit(make_train_fn(run))(jax.random.key(0), hyper)
        policy = state.agent.policy.params if module is iql else state.agent.params
        logits = applied(offline.make_policy(CARTPOLE, BODY))(policy, obs).logits
        chances.append(float(jax.nn.softmax(logits)[0, 1]))
    assert 0.1 < chances[0] < 0.3
    assert chances[1] > 0.6


def test_runs_on_continuous_actions_and_mistakes(log):
    data = bandit(PENDULUM, np.linspace(-2, 2, 40, dtype=np.float32)[:, None], np.ones(40))
    run = iql.make_run(iql.Config(run=SHORT, encoder=BODY), PENDULUM, data)
    state = jax.eval_shape(lambda key: make_train_fn(run)(key, iql.Hyper()), jax.random.key(0))[0]
    action, _ = jax.eval_shape(
        lambda s: run.act(
            s, jnp.zeros((3, 3)), jnp.zeros(3, bool), (), jax.random.key(0), deterministic=True
        ),
        state,
    )
    assert action.shape == (3, 1)
    with pytest.raises(UserError, match="CQL needs discrete actions"):
        cql.make_run(cql.Config(), PENDULUM, data)
    with pytest.raises(UserError, match="updates=1 is less than num_logs=2"):
        bc.make_run(bc.Config(run=dataclasses.replace(SHORT, updates=1)), CARTPOLE, log)
    with pytest.raises(UserError, match="no transitions"):
        offline.as_replay(jax.tree.map(lambda x: x[:0], log))


def tiny_gail(steps: int = 64) -> gail.Config:
    rollout = RolloutConfig(num_envs=2, num_steps=16)
    update = ppo.ppo.Config(num_ppo_epochs=1, num_minibatches=1)
    return gail.Config(ppo.Config(total_steps=steps, rollout=rollout, update=update), BODY, batch_size=16)


@pytest.mark.slow
def test_gail_pays_for_looking_like_the_log(log):
    """The discriminator learns to tell two clusters; what is paid is -log(1 - D)."""
    init_fn, logit_fn = gail.make_discriminator(CARTPOLE, BODY)
    learner = init_train_state(init_fn(jax.random.key(0)), TX)
    action = jnp.zeros(16, jnp.int32)
    pairs = gail.ImitationBatch(jnp.ones((16, 4)), action, -jnp.ones((16, 4)), action)
    hyper = dataclasses.replace(gail.default_hyper(), discriminator_learning_rate=1e-2)
    update = gail.make_update(logit_fn, TX)
    learner, history = jax.jit(
        lambda learner: jax.lax.scan(lambda s, _: update(s, hyper, pairs), learner, length=60)
    )(learner)
    logits = [logit_fn(learner.params, obs, action) for obs in (pairs.obs, pairs.policy_obs)]
    for paid, told in zip(map(gail.imitation_reward, logits), map(jax.nn.sigmoid, logits), strict=True):
        np.testing.assert_allclose(paid, -jnp.log1p(-told), rtol=1e-4, atol=1e-6)
    assert logits[0].min() > 0 > logits[1].max()
    np.testing.assert_array_equal(history["discriminator_accuracy"][-1], 1)
    run = gail.make_run(tiny_gail(), CARTPOLE, CARTPOLE_PARAMS, log)
    shapes = jax.eval_shape(lambda key: make_train_fn(run)(key, gail.default_hyper()), jax.random.key(0))
    assert shapes[1]["imitation_reward"].shape == (2,)
    normalised = dataclasses.replace(tiny_gail().policy, rollout=RolloutConfig(normalize_obs=True))
    with pytest.raises(UserError, match="normalize_obs"):
        gail.make_run(gail.Config(normalised), CARTPOLE, CARTPOLE_PARAMS, log)


@pytest.mark.slow
def test_the_script_collects_trains_and_resumes(tmp_path, capsys):
    data, out = tmp_path / "log.npz", tmp_path / "run"
    options = rl_offline.Options(
        data=data,
        collect=("random:8",),
        env="CartPole-v1",
        algo="bc",
        seeds=2,
        steps=4,
        set=("run.batch_size=16", "run.num_logs=2"),
        chunks=2,
        eval_episodes=2,
        quiet=True,
        out=out,
    )
    rl_offline.run(options)
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["evaluation_return"]) == len(summary["evaluation_return_sampled"]) == 2
    assert summary["steps_taken"] == 4
    assert summary["data_return"] == pytest.approx(summary["data_transitions"] / 8)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [2, 4]
    printed = capsys.readouterr().out
    assert "seed 1" in printed
    assert "log: mean, best" in printed
    again = dataclasses.replace(options, collect=())
    with pytest.raises(UserError, match="already holds a run"):
        rl_offline.run(again)
    with pytest.raises(UserError, match="its run has --algo bc, not iql"):
        rl_offline.run(dataclasses.replace(again, resume=True, algo="iql"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": None}, "--data is missing"),
        ({"out": None}, "--out is missing"),
        ({"collect": ("random",)}, "write SOURCE:EPISODES"),
        ({"collect": ("random:0",)}, "write SOURCE:EPISODES"),
        ({"collect": ("random:5",)}, "--env is missing"),
        ({"collect": ("nowhere:5",)}, "no agent can be read"),
        ({"seeds": 0}, "--seeds 0 is out of range: give 1 or more"),
        ({}, "no log of transitions can be read"),
    ],
)
def test_mistakes_of_the_script_are_one_sentence(tmp_path, changes, sentence):
    options = rl_offline.Options(data=tmp_path / "log.npz", out=tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        rl_offline.run(dataclasses.replace(options, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", [bc, cql, iql])
def test_cartpole_from_a_log_of_half_blind_balancing(module):
    """The log's policy balances, but half of its actions are anything."""

    def act(state, obs, is_first, carry, key, *, deterministic):
        chance_key, action_key = jax.random.split(key)
        balancing = (obs[:, 2] + obs[:, 3] > 0).astype(jnp.int32)
        anything = jax.random.randint(action_key, balancing.shape, 0, 2)
        return jnp.where(jax.random.bernoulli(chance_key, 0.5, balancing.shape), anything, balancing), carry

    key = jax.random.key(0)
    log = transitions.collect(act, None, CARTPOLE, CARTPOLE_PARAMS, key, episodes=200)
    run = module.make_run(module.Config(), CARTPOLE, log)
    state, _ = jax.jit(make_train_fn(run))(key, module.Hyper())
    returns, _ = evaluate(run, state, CARTPOLE, CARTPOLE_PARAMS, key, episodes=16, deterministic=True)
    assert returns.mean() > 1.5 * transitions.episode_returns(log).mean()
