"""Models that are none of ours, through every method, evaluation, a mesh and a sweep."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo, grpo_variants, ppo, preference, sft
from rlhf_jax.core.axes import MESH_AXES
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.jitted.algorithms import grpo_algorithm
from rlhf_jax.jitted.train import SeedState, TaskSetup, make_train
from rlhf_jax.rollout.sampler import make_evaluate_fn, make_generate_fn
from rlhf_jax.tasks.style import style_task

TASK = style_task(demonstrations=8)
TOKENIZER = TASK.tokenizer
VOCAB, WIDTH = TOKENIZER.vocab_size, 16
OPTIMIZER = OptimizerConfig("constant", warmup_steps=0, total_steps=10)
GOOD = 5
"""A token that rewards ask for."""


def decayed(states):
    time = jnp.arange(states.shape[1])
    return jnp.einsum("ts,bsd->btd", jnp.tril(0.6 ** jnp.abs(time[:, None] - time)), states)


class Module(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def hidden(self, tokens):
        return jnp.tanh(self.mix(decayed(self.embed(tokens))))

    def __call__(self, tokens):
        return self.head(self.hidden(tokens))


def hidden(params, tokens, positions, segment_ids):
    time = jnp.arange(tokens.shape[1])
    states = params["embed"][tokens]
    sees = (segment_ids[:, :, None] == segment_ids[:, None]) & (time[:, None] >= time)
    scores = jnp.einsum("btd,bsd->bts", states @ params["query"], states) - 0.1 * jnp.abs(
        positions[:, :, None] - positions[:, None]
    )
    return states + jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.where(sees, scores, -1e9)), states)


def plain(params, tokens, positions, segment_ids):
    return hidden(params, tokens, positions, segment_ids) @ params["out"]


def plain_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (VOCAB, WIDTH), "query": (WIDTH, WIDTH), "out": (WIDTH, VOCAB)}
    return {n: 0.3 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=True)}


AXES = {"embed": ("vocab", "embed"), "out": ("embed", "vocab")}
POLICIES = {
    "nnx": lambda: models.wrap(Module(rngs=nnx.Rngs(0)), None, TOKENIZER, hidden_fn="hidden"),
    "plain": lambda: models.wrap(plain, plain_params(), TOKENIZER, hidden_fn=hidden, axes=AXES),
}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request):
    return POLICIES[request.param]()


def rows(tokens):
    tokens = jnp.asarray(tokens)
    mask = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= 2, tokens.shape)
    return Sequences(
        tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens), mask
    )


def pair():
    rng = np.random.default_rng(0)
    chosen = rng.integers(2, VOCAB, (8, 6))
    rejected = chosen.copy()
    chosen[:, 2:], rejected[:, 2:] = GOOD, rng.integers(6, VOCAB, (8, 4))
    return rows(chosen), rows(rejected)


def prompt_examples():
    return [PromptExample(np.array([2 + n, 3, 4][: 2 + n % 2], np.int32), "", {}, "") for n in range(4)]


def reward_of(rollout, _=None):
    hits = (rollout.sequences.tokens == GOOD) & rollout.sequences.mask
    return np.asarray(hits.sum(axis=1) / np.maximum(rollout.sequences.mask.sum(axis=1), 1), np.float32)


def sample(policy, group_size):
    generate = make_generate_fn(policy, prompt_length=3, max_new_tokens=4, group_size=group_size)
    return generate, [prompt for prompt in prompt_examples() for _ in range(group_size)]


def test_supervised_fine_tuning_lowers_the_loss(policy):
    tx, (chosen, _) = make_optimizer(OPTIMIZER), pair()
    update = jax.jit(sft.make_update(sft.Config(), policy.make_logprob_fn_with_auxiliaries(), tx))
    state, losses = sft.init(policy.params, tx, jax.random.key(0)), []
    for _ in range(8):
        state, metrics = update(state, sft.Hyper(jnp.float32(0.03)), chosen)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_dpo_moves_the_margin(policy):
    tx, (chosen, rejected) = make_optimizer(OPTIMIZER), pair()
    logprob_fn = policy.make_logprob_fn()
    update = jax.jit(preference.make_update(preference.Config(), logprob_fn, tx))
    batch = preference.make_batch(logprob_fn, policy.params, chosen, rejected)
    state = preference.init(policy.params, tx, jax.random.key(0))
    losses = []
    for _ in range(6):
        state, metrics = update(state, preference.Hyper(learning_rate=jnp.float32(0.03), beta=1.0), batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses[-1] < 0.5 * losses[0]


def test_grpo_raises_the_reward(policy):
    member, tx = grpo_variants.grpo(group_size=8), make_optimizer(OPTIMIZER)
    generate, prompts = sample(policy, 8)
    logprob_fn = policy.make_logprob_fn()
    update = jax.jit(grpo.make_update(member.config, logprob_fn, tx))
    state = grpo.init(policy.params, tx, jax.random.key(0))
    make = jax.jit(functools.partial(grpo.make_batch, member.config, member.hyper))
    score = jax.jit(logprob_fn)
    hyper = jax.tree.map(jnp.float32, member.hyper)
    hyper = dataclasses.replace(hyper, learning_rate=jnp.float32(0.03))
    means = []
    for number in range(12):
        rollout = generate(state.learner.all_params, prompts, jax.random.key(number))
        rewards = reward_of(rollout)
        logps = [score(p, rollout.sequences).logp for p in (state.learner.all_params, policy.params)]
        np.testing.assert_allclose(np.where(rollout.sequences.mask, logps[0] - rollout.logp, 0), 0, atol=1e-5)
        state, _ = update(state, hyper, make(rollout, jnp.asarray(rewards), *logps)[0])
        means.append(float(rewards.mean()))
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.1


@pytest.mark.slow
def test_ppo_raises_the_reward(policy):
    tx = make_optimizer(OPTIMIZER)
    generate, prompts = sample(policy, 16)
    score = policy.make_actor_critic_fn()
    hyper = ppo.Hyper(learning_rate=jnp.float32(0.02), kl_coef=0.0)
    config = ppo.Config(num_ppo_epochs=4, num_minibatches=1)
    params = {"policy": policy.params, "value": policy.init_scalar_model(jax.random.key(1))}
    state = ppo.init(params, tx, jax.random.key(0), hyper)
    update = ppo.make_update(config, score, tx)
    ref_fn = policy.make_logprob_fn()

    @jax.jit
    def learn(state, rollout, rewards):
        scored = score(state.learner.all_params, rollout.sequences)
        ref_logp = ref_fn(policy.params, rollout.sequences).logp
        state, batch, _ = ppo.language_batch(config, state, hyper, rollout, scored, ref_logp, rewards)
        return update(state, hyper, batch)[0]

    means = []
    for number in range(14):
        rollout = generate(state.learner.all_params["policy"], prompts, jax.random.key(number))
        rewards = reward_of(rollout)
        state = learn(state, rollout, jnp.asarray(rewards))
        means.append(float(rewards.mean()))
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.2


def test_it_is_evaluated(policy):
    evaluate = make_evaluate_fn(policy, prompt_examples(), reward_of, max_new_tokens=4)
    found = evaluate(policy.params, policy.params)
    assert 0 <= found.score <= 1
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert evaluate(jax.tree.map(lambda leaf: 1.5 * leaf, policy.params), policy.params).kl != 0


def test_leaves_are_split_as_their_axes_say_and_others_are_said_to_be_whole():
    policy = POLICIES["plain"]()
    sizes = tuple(4 if axis == "fsdp" else 1 for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    shardings = distributed.tree_shardings(mesh, policy.params, policy.axes)
    specs = {name: sharding.spec for name, sharding in shardings.items()}
    assert specs == {"embed": P(None, "fsdp"), "query": P(None, None), "out": P("fsdp", None)}
    _, lines = distributed.describe_shardings(mesh, policy.params, policy.axes)
    assert lines == [f"query [{WIDTH}, {WIDTH}] is whole: no axes are named for it"]


@pytest.mark.slow
def test_learning_rates_are_swept_side_by_side(policy):
    task_setup = TaskSetup(TASK, policy, num_prompts=2, num_samples=4, heldout=4)
    member = grpo_variants.grpo(group_size=4)
    train = make_train(task_setup, grpo_algorithm(task_setup, member, OPTIMIZER), steps=2)

    def one(rate):
        hyper = jax.tree.map(jnp.float32, member.hyper)
        hyper = dataclasses.replace(hyper, learning_rate=rate)
        agent, history = train(SeedState(jax.random.key(0), policy.params), hyper)
        return agent.learner.params, history["score"]

    params, scores = jax.jit(jax.vmap(one))(jnp.array([0.0, 0.05]))
    assert scores.shape == (2,)
    still = jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a[0] == b)), params, policy.params))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a[1] != b)), params, policy.params))
    assert all(still)
    assert any(moved)
