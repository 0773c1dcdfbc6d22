"""Answers scored several a row give the same log-probs, gradients and steps as one a row."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Images, Rollout
from rlhf_jax.data.packing import completion_rows
from rlhf_jax.models.logprob_fns import make_actor_critic_fn, make_logprob_fn
from rlhf_jax.rollout.packed_rows import lay_out, layouts_of, packed
from rlhf_jax.rollout.step import make_grpo_train_step, make_ppo_train_step

PROMPT, NEW, VOCAB = 9, 8, 11
CONFIG = models.dense_config(
    vocab_size=VOCAB, width=16, num_layers=2, num_heads=4, num_kv_heads=2, compute_dtype="float64"
)
CONFIG = dataclasses.replace(CONFIG, param_dtype="float64")
PROMPTS = (1, 4, 9, 2, 3, 6, 1, 5)
ANSWERS = (3, 8, 2, 1, 8, 5, 0, 4)
LENGTHS = np.add(PROMPTS, ANSWERS)
TX = optax.sgd(1.0)
lengths_of_batches = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def rows(seed=0, prompts=PROMPTS, answers=ANSWERS):
    rng = np.random.default_rng(seed)
    drawn = [[rng.integers(0, VOCAB, n) for n in counts] for counts in (prompts, answers)]
    return jax.tree.map(jnp.asarray, completion_rows(*drawn, prompt_length=PROMPT, max_new_tokens=NEW))


def params_of(seed=0):
    wide = models.init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda x: x.astype(jnp.float64), wide)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, expected)


@hypothesis.given(lengths_of_batches, st.integers(1, 4))
def test_every_token_has_a_place_of_its_own(lengths, multiple_of):
    layout = lay_out(np.asarray(lengths), most=40, multiple_of=multiple_of)
    assert layout.sample.shape[1] <= 4 * 40
    assert layout.sample.shape[0] % multiple_of == 0
    assert list(layout.room) == sorted(lengths, reverse=True)
    places = zip(layout.sample[layout.segment > 0], layout.token[layout.segment > 0], strict=True)
    assert sorted(places) == [(n, t) for n, length in enumerate(layout.room) for t in range(length)]
    for number, (row, start, length) in enumerate(zip(layout.row, layout.start, layout.room, strict=True)):
        own = slice(start, start + length)
        assert (layout.sample[row, own] == number).all()
        assert (layout.token[row, own] == np.arange(length)).all()
        assert len({*layout.segment[row, own]}) == 1
    # Two neighbours of one segment would see each other.
    beside = layout.sample[:, 1:] != layout.sample[:, :-1]
    assert (beside == (layout.segment[:, 1:] != layout.segment[:, :-1])).all()


@hypothesis.given(lengths_of_batches)
def test_first_fit_leaves_no_two_rows_that_fit_into_one(lengths):
    layout = lay_out(np.asarray(lengths), most=40)
    used = np.sum(layout.segment > 0, axis=1)
    used = np.sort(used[used > 0])
    assert len(used) == 1 or used[0] + used[1] > layout.sample.shape[1]


@pytest.mark.parametrize("names", ["logp", "entropy"])
def test_log_probs_and_their_gradient(names):
    params, sequences = params_of(), rows()
    plain, layouts = make_logprob_fn(CONFIG, temperature=0.7), layouts_of(LENGTHS, [], most=PROMPT + NEW)
    assert layouts[0].sample.size < sequences.tokens.size

    def weighted(score_fn, params):
        weights = jnp.cos(jnp.arange(sequences.tokens.size)).reshape(sequences.tokens.shape)
        return jnp.sum(jnp.where(sequences.mask, getattr(score_fn(params, sequences), names), 0) * weights)

    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, fn=fn: weighted(fn, p)))(params)
        for fn in (packed(plain, layouts), plain)
    )
    assert abs(expected[0]) > 0.1
    close(found, expected)


def test_one_layout_serves_all_shorter_batches_in_any_order():
    params, plain = params_of(), make_logprob_fn(CONFIG)
    layout = lay_out(LENGTHS, most=PROMPT + NEW)
    sequences = rows(1, tuple(reversed([max(n - 2, 1) for n in PROMPTS])), tuple(reversed(ANSWERS)))
    found, expected = (fn(params, sequences).logp for fn in (packed(plain, [layout]), plain))
    close(jnp.where(sequences.mask, found, 0), jnp.where(sequences.mask, expected, 0))
    longer = rows(1, [9] * 8, [8] * 8)
    assert jnp.isnan(packed(plain, [layout])(params, longer).logp).any()  # and never half a sample in silence


def test_batches_of_other_sizes_are_read_as_they_are():
    params, plain = params_of(), make_logprob_fn(CONFIG)
    sequences = jax.tree.map(lambda x: x[:3], rows())
    found = packed(plain, layouts_of(LENGTHS, [4], most=PROMPT + NEW))(params, sequences)
    assert jnp.array_equal(found.logp, plain(params, sequences).logp)


def test_images_are_refused():
    pixels = jnp.zeros((8, 1, 4, 4, 3), jnp.uint8)
    sequences = dataclasses.replace(rows(), images=Images(pixels, jnp.ones((8, 1), bool)))
    with pytest.raises(UserError, match="images"):
        packed(make_logprob_fn(CONFIG), [lay_out(LENGTHS, most=17)])(params_of(), sequences)


def rollout_of(params):
    sequences = rows()
    logp = make_logprob_fn(CONFIG)(params, sequences).logp
    return Rollout(sequences, jnp.where(sequences.mask, logp - 0.05, 0), jnp.arange(8) % 3 > 0)


SPLITS = {
    "once": {},
    "micro": {"micro_batches": 2},
    "shuffled": {"num_minibatches": 2, "micro_batches": 2, "num_iterations": 2},
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_of_grpo(split):
    splits, params = SPLITS[split], params_of()
    config, hyper = grpo.Config(group_size=4, **splits), grpo.Hyper(learning_rate=0.02, kl_coef=0.1)
    step = jax.jit(make_grpo_train_step(config, make_logprob_fn(CONFIG), TX))
    rollout, rewards = rollout_of(params), jnp.linspace(-1, 1, 8) ** 3
    sizes = [8 // splits.get("num_minibatches", 1) // splits.get("micro_batches", 1)]
    run = lambda *layouts: step(  # noqa: E731
        grpo.init(params, TX, jax.random.key(0)), hyper, params_of(1), rollout, rewards, layouts=layouts
    )
    (found, metrics), (expected, its) = run(*layouts_of(LENGTHS, sizes, most=17)), run()
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected.learner.params, params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert 1 < metrics.pop("columns_per_token") < its.pop("columns_per_token") == 8 * 17 / sum(ANSWERS)
    close(found.learner.params, expected.learner.params)
    close(metrics, its)


def test_a_step_of_ppo():
    policy = params_of()
    head = {"kernel": jnp.cos(jnp.arange(16.0)) / 4, "bias": jnp.zeros(())}
    params = {"policy": policy, "value": {"decoder": params_of(3), "head": head}}
    config = ppo.Config(num_ppo_epochs=2, num_minibatches=2)
    step = jax.jit(make_ppo_train_step(config, make_actor_critic_fn(CONFIG), make_logprob_fn(CONFIG), TX))
    rollout, rewards = rollout_of(policy), jnp.linspace(-1, 1, 8) ** 3
    run = lambda *layouts: step(  # noqa: E731
        ppo.init(params, TX, jax.random.key(0), ppo.Hyper()),
        ppo.Hyper(learning_rate=0.02),
        params_of(1),
        rollout,
        rewards,
        layouts=layouts,
    )
    (found, metrics), (expected, its) = run(*layouts_of(LENGTHS, [4], most=17)), run()
    assert 1 < metrics.pop("columns_per_token") < its.pop("columns_per_token") == 8 * 17 / sum(ANSWERS)
    close(found.learner.params, expected.learner.params)
    close(metrics, its)
