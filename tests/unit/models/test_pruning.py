"""Pruning against loops over weights, and zeros that survive training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.core.types import Sequences
from rlhf_jax.models import dense_config, forward, init_params, pruning, stack_layers


@pytest.fixture(scope="module")
def config():
    return dense_config(
        vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=12
    )


@pytest.fixture(scope="module")
def params(config):
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


@pytest.fixture(scope="module")
def scores():
    draw = np.random.default_rng(0).random
    return {
        "layer_0": {"query": {"kernel": jnp.asarray(draw((8, 6)))}},
        "layer_1": {"down": {"kernel": jnp.asarray(draw((12, 4)))}},
    }


def lowest(values, count):
    """Places of the lowest values, by sorting pairs."""
    return {place for _, place in sorted((float(v), i) for i, v in enumerate(values))[:count]}


def test_each_output_loses_its_lowest_weights(scores):
    masks = pruning.keep_masks(scores, sparsity=0.4, granularity="output")
    for name, mask in named_leaves(masks).items():
        leaf = np.asarray(named_leaves(scores)[name])
        for column in range(leaf.shape[1]):
            pruned = set(np.flatnonzero(~np.asarray(mask)[:, column]))
            assert pruned == lowest(leaf[:, column], int(0.4 * len(leaf)))


def test_a_layer_and_all_layers_lose_their_lowest_weights(scores):
    masks = named_leaves(pruning.keep_masks(scores, sparsity=0.25, granularity="layer"))
    leaves = named_leaves(scores)
    for name, mask in masks.items():
        assert set(np.flatnonzero(~np.asarray(mask))) == lowest(leaves[name].ravel(), leaves[name].size // 4)
    everything = np.concatenate([np.ravel(leaf) for leaf in leaves.values()])
    kept = pruning.keep_masks(scores, sparsity=0.25, granularity="global")
    flat = np.concatenate([np.ravel(mask) for mask in named_leaves(kept).values()])
    assert set(np.flatnonzero(~flat)) == lowest(everything, everything.size // 4)


def test_n_of_every_m_inputs_of_an_output_stay(scores):
    masks = named_leaves(pruning.keep_n_of_m(scores, n=2, m=4))
    for name, mask in masks.items():
        leaf, mask = np.asarray(named_leaves(scores)[name]), np.asarray(mask)
        for start in range(0, len(leaf), 4):
            for column in range(leaf.shape[1]):
                group = mask[start : start + 4, column]
                assert set(np.flatnonzero(~group)) == lowest(leaf[start : start + 4, column], 2)


def test_equal_scores_lose_exactly_as_many():
    masks = pruning.keep_masks({"a": {"kernel": jnp.ones((10, 3))}}, sparsity=0.5, granularity="layer")
    assert int(masks["a"]["kernel"].sum()) == 15


@pytest.mark.slow
def test_stacked_layers_compete_apart(config, params):
    scores = pruning.magnitude_scores(params)
    alone = pruning.keep_masks(scores, sparsity=0.5, granularity="layer")
    stacked = pruning.keep_masks(stack_layers(config, scores), sparsity=0.5, granularity="layer")
    for name, mask in named_leaves(stack_layers(config, alone)).items():
        assert np.array_equal(mask, named_leaves(stacked)[name])


def naive_norms(config, params, tokens):
    """Inputs of the first block's layers, by hand, from the decoder's own parameters."""
    hidden = np.asarray(params["embedding"])[tokens]
    block = params["layer_0"]
    scale = np.asarray(block["attention_norm"]["scale"])
    normed = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + config.pattern[0].norm.epsilon) * scale
    return (normed**2).sum(axis=(0, 1))


def test_inputs_are_measured_where_there_are_tokens(config, params):
    tokens = np.array([[1, 2, 3, 4], [5, 6, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = Sequences(jnp.asarray(tokens), jnp.arange(4) * segments, segments, segments > 0)
    measure = jax.jit(lambda part: pruning.input_square_sums(config, params, part))
    parts = [measure(jax.tree.map(lambda x, i=i: x[i : i + 1], rows)) for i in (0, 1)]
    sums = jax.tree.map(lambda a, b: np.asarray(a) + np.asarray(b), *parts)
    assert jax.tree.structure(sums) == jax.tree.structure(pruning.linear_kernels(params))
    expected = sum(naive_norms(config, params, part) for part in (tokens[:1], tokens[1:, :2]))
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(sums["layer_0"]["attention"][name]["kernel"], expected, rtol=1e-5)
    scores = named_leaves(pruning.wanda_scores(params, sums))
    name = "layer_1/feed_forward/down/kernel"
    weight, sums_of = np.asarray(named_leaves(params)[name]), np.asarray(named_leaves(sums)[name])
    np.testing.assert_allclose(scores[name], np.abs(weight) * np.sqrt(sums_of)[:, None], rtol=1e-6)


@pytest.mark.slow
def test_pruned_weights_stay_exactly_zero_and_the_others_learn(config, params):
    masks = pruning.keep_masks(pruning.magnitude_scores(params), sparsity=0.5, granularity="output")
    pruned = pruning.apply_masks(params, masks)
    tx = pruning.preserve_sparsity(optax.adamw(0.1, weight_decay=0.1))
    state, tokens = tx.init(pruned), jnp.asarray([[1, 2, 3, 4]])

    @jax.jit
    def step(params, state):
        def loss(params):
            logp = jax.nn.log_softmax(forward(config, params, tokens))
            return -jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1).mean()

        gradients = jax.grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    trained = pruned
    for _ in range(3):
        trained, state = step(trained, state)
    before, after = named_leaves(pruned), named_leaves(trained)
    for name, mask in named_leaves(masks).items():
        mask = np.asarray(mask)
        assert not np.asarray(after[name])[~mask].any()
        assert (np.asarray(after[name]) != np.asarray(before[name]))[mask].all()
    assert pruning.kernel_sparsity(trained)[""] == pytest.approx(0.5, abs=0.05)
    assert not np.array_equal(after["embedding"], before["embedding"])


def test_heads_of_scalar_models_are_left_alone():
    head = {"head": {"kernel": jnp.zeros(3), "bias": jnp.zeros(())}}
    assert pruning.linear_kernels(head) == {}
    updates, _ = pruning.preserve_sparsity(optax.sgd(1.0)).update(
        head, pruning.preserve_sparsity(optax.sgd(1.0)).init(head)
    )
    assert jax.tree.structure(updates) == jax.tree.structure(head)


def test_mistakes_are_said(scores):
    with pytest.raises(UserError, match="nothing goes into layer_0/query/kernel"):
        pruning.wanda_scores(scores, {"layer_1": {"down": {"kernel": jnp.ones(12)}}})
    with pytest.raises(UserError, match="no share of weights"):
        pruning.keep_masks(scores, sparsity=1.0)
    with pytest.raises(UserError, match="which 5 does not divide"):
        pruning.keep_n_of_m(scores, n=2, m=5)
    with pytest.raises(UserError, match="keeps none or too many"):
        pruning.keep_n_of_m(scores, n=0, m=4)
