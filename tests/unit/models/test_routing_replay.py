"""Routing replay: the experts of a rollout are those of the update, bit for bit where nothing has changed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.generation import continuous_batching_generate, generate
from rlhf_jax.models import routing_replay
from rlhf_jax.models.decoder import Decoder

VOCAB, EXPERTS, PICKED, LAYERS, PROMPT, NEW = 13, 4, 2, 2, 4, 5


def config_of(scan_layers, router):
    dense = models.dense_config(vocab_size=VOCAB, width=8, num_layers=LAYERS, num_heads=2)
    mixture = models.MixtureOfExperts(EXPERTS, PICKED, models.GatedFeedForward(6), router)
    block = dataclasses.replace(dense.pattern[0], feed_forward=mixture)
    return dataclasses.replace(dense, pattern=(block,), scan_layers=scan_layers)


def params_of(config):
    params = jax.jit(functools.partial(models.init_params, config))(jax.random.key(0))
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)


def rollout_of(config, params, max_num_seqs=None):
    """Two answers to each of two prompts; with `max_num_seqs`, each in the room that another has left."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, PROMPT))
    mask = np.array([[True] * 4, [False, True, True, True]])
    prefill, decode, extend = routing_replay.make_recording_fns(config)
    ends = {"max_new_tokens": NEW, "eos_id": 0, "pad_id": 0}
    if max_num_seqs is None:
        sample = functools.partial(generate, prefill, decode, group_size=2, **ends)
    else:
        tokens, mask = (np.repeat(x, 2, axis=0) for x in (tokens, mask))
        sample = functools.partial(
            continuous_batching_generate, prefill, extend, max_num_seqs=max_num_seqs, **ends
        )
    return jax.jit(sample)(params, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(1))


@functools.partial(jax.jit, static_argnums=0)
def chosen_by(config, params, sequences):
    """[B, T, R, k], of a forward pass over whole rows."""
    variables = {"params": params}
    if sequences.experts is not None:
        variables["replay"] = routing_replay._to_replay(params, sequences.experts)
    inputs = sequences.tokens, sequences.positions, sequences.segment_ids
    _, kept = Decoder(config).apply(variables, *inputs, mutable=["routing"])
    return routing_replay._recorded(kept["routing"], params, sequences.tokens.shape)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_experts_of_the_rollout_are_taken_whatever_the_routers_would_choose(scan_layers):
    config = config_of(scan_layers, models.SoftmaxRouter())
    params = params_of(config)
    rollout = rollout_of(config, params)
    sequences, present = rollout.sequences, np.asarray(rollout.sequences.segment_ids) > 0
    experts = np.asarray(sequences.experts)
    assert experts.shape == (4, PROMPT + NEW, LAYERS, PICKED)
    # Unchanged parameters: the same choices, and the same log-probs to the bit.
    own = dataclasses.replace(sequences, experts=None)
    assert np.array_equal(chosen_by(config, params, own)[present], experts[present])
    logprob_fn = jax.jit(models.make_logprob_fn(config))
    mask = np.asarray(sequences.mask)
    with_replay, without = (np.asarray(logprob_fn(params, x).logp)[mask] for x in (sequences, own))
    np.testing.assert_array_equal(with_replay, without)
    np.testing.assert_allclose(with_replay, np.asarray(rollout.logp)[mask], rtol=1e-4, atol=1e-5)

    # Routers that would choose others: the experts stay those of the rollout.
    def turned(path, leaf):
        return -leaf if "router" in jax.tree_util.keystr(path) else leaf

    changed = jax.tree_util.tree_map_with_path(turned, params)
    assert not np.array_equal(chosen_by(config, changed, own)[present], experts[present])
    assert np.array_equal(chosen_by(config, changed, sequences)[present], experts[present])
    moved, free = (np.asarray(logprob_fn(changed, x).logp)[mask] for x in (sequences, own))
    assert np.abs(moved - free).max() > 1e-3


@pytest.mark.slow
def test_answers_that_make_room_for_each_other_keep_their_experts():
    config = config_of(True, models.SoftmaxRouter())
    params = params_of(config)
    whole, refilled = rollout_of(config, params), rollout_of(config, params, max_num_seqs=2)
    present = np.asarray(whole.sequences.segment_ids) > 0
    assert not np.asarray(whole.finished).all() or present.sum(axis=1).ptp() > 0  # they end apart
    np.testing.assert_array_equal(refilled.sequences.tokens, whole.sequences.tokens)
    found, expected = (np.asarray(rollout.sequences.experts) for rollout in (refilled, whole))
    assert np.array_equal(found[present], expected[present])
    assert routing_replay.recorded_shape(config, params) == (LAYERS, PICKED)


def test_weights_are_the_scores_of_the_given_experts_and_carry_gradient():
    """A router against a loop over tokens; where nothing is given it chooses for itself."""
    spec = config_of(True, models.SoftmaxRouter()).pattern[0].feed_forward
    router, rng = models.mlp.Router(spec, jnp.float32), np.random.default_rng(2)
    flat, kernel = rng.normal(size=(6, 8)), rng.normal(size=(8, EXPERTS))
    given = np.array([[0, 3], [2, 1], [1, 0], [3, 2], [-1, -1], [2, 0]])

    @jax.jit
    def route(kernel):
        variables = {"params": {"kernel": kernel}, "replay": {"chosen": jnp.asarray(given)}}
        return router.apply(variables, jnp.asarray(flat))

    weights, chosen = route(jnp.asarray(kernel))
    for token in range(6):
        scores = np.exp(flat[token] @ kernel) / np.exp(flat[token] @ kernel).sum()
        experts = given[token] if given[token, 0] >= 0 else np.argsort(-scores)[:PICKED]
        np.testing.assert_array_equal(chosen[token], experts)
        expected = scores[experts] / scores[experts].sum() if spec.router.renormalize else scores[experts]
        np.testing.assert_allclose(weights[token], expected, rtol=1e-5)
    gradient = jax.grad(lambda kernel: route(kernel)[0][:4, 0].sum())(jnp.asarray(kernel))
    assert np.abs(gradient).max() > 1e-2


def test_a_model_without_experts_is_refused():
    dense = models.dense_config(vocab_size=VOCAB, width=8, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="no mixture of experts"):
        routing_replay.make_recording_fns(dense)
