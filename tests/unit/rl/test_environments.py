import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rl.envs import environments

NAMES = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]  # it needs a download


def roll(name, steps, key, params=None):
    env, default = environments.make(name)
    params = default if params is None else params
    state = env.reset(jax.random.fold_in(key, 1), params)

    def step(state, key):
        action_key, step_key = jax.random.split(key)
        action = env.raw.action_space(params).sample(action_key)
        state, transition = env.step(step_key, state, action, params)
        return state, (transition, state.obs)

    return jax.jit(lambda s: jax.lax.scan(step, s, jax.random.split(key, steps)))(state)


@pytest.mark.parametrize("name", NAMES)
def test_every_environment_steps_with_repaired_shapes_and_dtypes(name):
    env, params = environments.make(name)
    state = jax.eval_shape(env.reset, jax.random.key(0), params)
    action = jax.ShapeDtypeStruct(env.action_shape, jnp.int32 if env.discrete else jnp.float32)
    after, transition = jax.eval_shape(env.step, jax.random.key(0), state, action, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), after
    )
    assert transition.reward.dtype == jnp.float32
    assert transition.reward.shape == transition.terminated.shape == transition.truncated.shape == ()
    assert transition.next_obs.shape == env.obs_shape
    assert len(env.action_low) == (0 if env.discrete else np.prod(env.action_shape))


def test_time_limit_truncates_and_keeps_the_true_last_observation():
    name = "Pendulum-v1"
    _, params = environments.make(name)
    state, (transitions, seen) = roll(name, 12, jax.random.key(0), params.replace(max_steps_in_episode=5))
    np.testing.assert_array_equal(np.flatnonzero(transitions.truncated), [4, 9])
    assert not transitions.terminated.any()
    ends = np.asarray(transitions.truncated)
    # Within an episode the next observation is what the policy sees; at its end a new episode begins.
    np.testing.assert_array_equal(transitions.next_obs[~ends], seen[~ends])
    assert np.all(np.any(transitions.next_obs[ends] != seen[ends], axis=-1))
    # The last observation follows from the one before by the physics: at most dt * max_speed further.
    angle = lambda obs: np.arctan2(obs[..., 1], obs[..., 0])  # noqa: E731
    turned = np.angle(np.exp(1j * (angle(transitions.next_obs) - angle(transitions.obs))))
    assert np.all(np.abs(turned) <= 0.05 * 8 + 1e-5)
    assert int(state.finished.episodes) == 2
    assert int(state.finished.length_sum) == 10
    np.testing.assert_allclose(state.finished.return_sum, transitions.reward[:10].sum(), rtol=1e-5)
    np.testing.assert_allclose(state.episode_return, transitions.reward[10:].sum(), rtol=1e-5)


def test_termination_is_not_truncation():
    state, (transitions, _) = roll("CartPole-v1", 200, jax.random.key(1))
    assert transitions.terminated.sum() > 3
    assert not transitions.truncated.any()
    np.testing.assert_array_equal(transitions.discounts(0.9) == 0, transitions.terminated)
    ends = np.flatnonzero(transitions.terminated)
    assert int(state.finished.length_sum) == ends[-1] + 1
    assert float(state.finished.return_sum) == ends[-1] + 1


def test_both_flags_at_once_mean_terminated():
    _, (transitions, _) = roll("DeepSea-bsuite", 24, jax.random.key(0))
    assert transitions.terminated.sum() == 3
    assert not transitions.truncated.any()


def test_steps_agree_with_gymnax_itself():
    raw, params = gymnax.make("Acrobot-v1")
    env, _ = environments.make("Acrobot-v1")
    key = jax.random.key(3)
    state = env.reset(key, params)
    obs, inner = raw.reset_env(key, params)
    for number in range(5):
        action, key = jnp.int32(number % 3), jax.random.fold_in(key, number)
        state, transition = env.step(key, state, action, params)
        obs, inner, reward, *_ = raw.step(key, inner, action, params)
        np.testing.assert_allclose(state.obs, obs, atol=1e-6)
        assert transition.reward == reward


def test_statistics_are_taken_once():
    env, params = environments.make("CartPole-v1")
    states = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(0), 3), params)
    finished = environments.EpisodeStatistics(jnp.arange(3), jnp.ones(3), jnp.arange(3) * 2)
    states, total = environments.take_statistics(environments.dataclasses.replace(states, finished=finished))
    assert (int(total.episodes), float(total.return_sum), int(total.length_sum)) == (3, 3.0, 6)
    assert int(environments.take_statistics(states)[1].episodes) == 0


def test_minatar_planes_are_binary():
    env, params = environments.make("Breakout-MinAtar")
    obs, _ = env.raw.reset_env(jax.random.key(0), params)
    assert set(np.unique(obs)) <= {0.0, 1.0}
    assert env.reset(jax.random.key(0), params).obs.dtype == bool


def test_unknown_name_tells_the_nearest():
    with pytest.raises(UserError, match=r"'Cartpole-v1': the nearest name is 'CartPole-v1'"):
        environments.make("Cartpole-v1")


def test_make_twice_gives_the_same_object():
    assert environments.make("CartPole-v1")[0] is environments.make("CartPole-v1")[0]


def test_action_of_the_wrong_kind_is_one_sentence():
    env, params = environments.make("CartPole-v1")
    state = env.reset(jax.random.key(0), params)
    with pytest.raises(UserError, match=r"CartPole-v1 takes integer actions of shape \(\), not float32"):
        env.step(jax.random.key(0), state, jnp.zeros(1), params)


def test_debug_mode_finds_an_action_out_of_range():
    env, params = environments.make("CartPole-v1")

    def run(actions):
        def step(state, action):
            return env.step(jax.random.key(0), state, action, params)

        return jax.lax.scan(step, env.reset(jax.random.key(0), params), actions)[1].reward

    assert environments.checked(run)(jnp.array([0, 1, 1])).shape == (3,)
    with pytest.raises(UserError, match="CartPole-v1: there is no action 2"):
        environments.checked(run)(jnp.array([0, 2, 1]))
    jax.jit(run)(jnp.array([0, 2, 1]))  # outside the debug mode nothing is checked, and nothing paid
