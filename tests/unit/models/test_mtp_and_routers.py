"""Further tokens and routing: what the score function of likelihood training says beside log-probs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Sequences
from rlhf_jax.losses.moe import load_balance_loss, load_violation, router_z_loss
from rlhf_jax.losses.supervised import mtp_loss, mtp_masks

VOCAB, EXPERTS = 13, 4


@pytest.fixture(scope="module")
def config():
    dense = models.dense_config(vocab_size=VOCAB, width=8, num_layers=1, num_heads=2, mtp_depth=2)
    expert = models.GatedFeedForward(6)
    mixture = models.MixtureOfExperts(EXPERTS, 2, expert, models.SigmoidRouter())
    block = dataclasses.replace(dense.pattern[0], feed_forward=mixture)
    return dataclasses.replace(dense, pattern=(block,))


@pytest.fixture(scope="module")
def params(config):
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, models.init_params(config, jax.random.key(0)))


@pytest.fixture(scope="module")
def logprob_fn(config):
    return jax.jit(models.make_logprob_fn_with_auxiliaries(config))


def rows(tokens, segment_ids):
    segment_ids = jnp.asarray(segment_ids)
    before = jnp.concatenate([jnp.full_like(segment_ids[:, :1], -1), segment_ids[:, :-1]], axis=1)
    first = segment_ids != before
    column = jnp.arange(segment_ids.shape[1])
    starts = jax.lax.cummax(jnp.where(first, column, 0), axis=1)
    mask = (segment_ids > 0) & ~first
    return Sequences(jnp.asarray(tokens), column - starts, segment_ids, mask)


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, 12))
    segment_ids = np.array([[1] * 12, [1] * 7 + [2] * 5, [1] * 4 + [2] * 8, [1] * 9 + [0] * 3])
    return rows(tokens, segment_ids)


@pytest.mark.slow
def test_modules_are_those_of_the_report(config, params, batch, logprob_fn):
    """Depth by depth, from the equations, on the unpacked first row."""
    from rlhf_jax.models.blocks import ResidualBlocks
    from rlhf_jax.models.decoder import whole_context

    inputs = batch.tokens[:1], batch.positions[:1], batch.segment_ids[:1]

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    @jax.jit
    def foreseen(params, hidden):
        found = []
        for depth in (1, 2):
            module = params[f"further_{depth}"]
            length = 12 - depth
            embeddings = params["embedding"][inputs[0][:, depth:]]
            sides = (hidden[:, :length], "hidden_norm"), (embeddings, "embedding_norm")
            joined = jnp.concatenate([norm(x, module[name]["scale"]) for x, name in sides], axis=-1)
            context = whole_context(inputs[1][:, :length], inputs[2][:, :length])
            variables = {"params": module["block"]}
            blocks = ResidualBlocks(config, config.pattern)
            hidden = blocks.apply(variables, joined @ module["join"]["kernel"], (None,), context)[0]
            hidden = norm(hidden, module["final_norm"]["scale"])
            found.append(jax.nn.log_softmax(hidden @ params["embedding"].T))
        return found

    got = jax.device_get(logprob_fn(params, batch))
    hidden = jax.jit(lambda p: models.hidden_states(config, p, *inputs))(params)
    plain = jax.nn.log_softmax(hidden @ params["embedding"].T)
    tokens = np.asarray(inputs[0][0])
    for depth, logp in enumerate([plain, *foreseen(params, hidden)]):
        columns = np.arange(depth + 1, 12)
        wanted = np.asarray(logp)[0, columns - depth - 1, tokens[columns]]
        ours = got.logp if depth == 0 else got.mtp_logp[depth - 1]
        np.testing.assert_allclose(ours[0, columns], wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_packed_samples_foresee_what_they_foresee_alone(params, batch, logprob_fn):
    packed = logprob_fn(params, batch).mtp_logp
    masks = mtp_masks(batch.mask, batch.segment_ids, 2)
    alone = rows(
        jnp.roll(batch.tokens, -7, axis=1), jnp.where(jnp.arange(12) < 5, 1, 0) * jnp.ones((4, 1), int)
    )
    unpacked = logprob_fn(params, alone).mtp_logp
    for depth, mask in enumerate(masks, start=1):
        np.testing.assert_array_equal(
            mask[1], [column > depth and column != 7 and not 7 <= column <= 7 + depth for column in range(12)]
        )
        np.testing.assert_allclose(
            packed[depth - 1, 1, 8 + depth :], unpacked[depth - 1, 1, 1 + depth : 5], rtol=1e-4, atol=1e-5
        )


def test_further_loss_splits_and_ignores_what_is_masked(batch):
    logp = -jnp.abs(jax.random.normal(jax.random.key(1), (2, *batch.mask.shape)))
    masks = mtp_masks(batch.mask, batch.segment_ids, 2)
    dirty = jnp.where(jnp.stack(masks), logp, jnp.nan)
    loss, _ = mtp_loss(dirty, masks)
    wanted = np.mean(
        [-np.mean(np.asarray(one)[np.asarray(mask)]) for one, mask in zip(logp, masks, strict=True)]
    )
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    totals = [mask.sum() for mask in masks]
    parts = [
        mtp_loss(dirty[:, part], [mask[part] for mask in masks], denominators=totals)[0]
        for part in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(sum(parts), loss, rtol=1e-6)
    gradient = jax.grad(lambda x: mtp_loss(x, masks)[0])(dirty)
    assert bool(jnp.all(jnp.isfinite(gradient)))


@pytest.mark.slow
def test_routing_is_counted_over_tokens_that_are_there(config, params, batch, logprob_fn):
    routing = logprob_fn(params, batch).routing
    assert set(routing) == {"layer_0/feed_forward/router"}
    present = int((batch.segment_ids > 0).sum())
    other = dataclasses.replace(batch, tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 1))
    changed = logprob_fn(params, other).routing
    for path, sums in routing.items():
        assert float(sums.tokens) == present
        assert float(sums.assignments.sum()) == 2 * present
        np.testing.assert_allclose(sums.probabilities.sum(), present, rtol=1e-5)
        np.testing.assert_array_equal(sums.assignments, changed[path].assignments)
        np.testing.assert_allclose(sums.probabilities, changed[path].probabilities, rtol=1e-6)
    share = {path: np.asarray(sums.assignments) / (2 * present) for path, sums in routing.items()}
    mean = {path: np.asarray(sums.probabilities) / present for path, sums in routing.items()}
    wanted = np.mean([EXPERTS * np.sum(share[path] * mean[path]) for path in routing])
    np.testing.assert_allclose(load_balance_loss(routing), wanted, rtol=1e-5)
    wanted = np.mean([EXPERTS * one.max() - 1 for one in share.values()])
    np.testing.assert_allclose(load_violation(routing), wanted, rtol=1e-5)
    assert float(router_z_loss(routing)) > 0


def test_scanned_layers_route_alike(config, params, batch, logprob_fn):
    scanned = dataclasses.replace(config, scan_layers=True, mtp_depth=0)
    stacked = models.stack_layers(config, params)
    routing = jax.jit(lambda p: models.make_logprob_fn_with_auxiliaries(scanned)(p, batch).routing)(stacked)
    (sums,) = routing.values()
    assert list(routing) == ["layers/feed_forward/router"]
    for layer, one in enumerate(logprob_fn(params, batch).routing.values()):
        np.testing.assert_array_equal(sums.assignments[layer], one.assignments)
    moved = models.rebalance(stacked, routing, 0.1)["layers"]["feed_forward"]["router"]["bias"]
    np.testing.assert_allclose(jnp.abs(moved).max(), 0.1, rtol=1e-6)


@pytest.fixture(scope="module")
def updates(config):
    tx = make_optimizer(OptimizerConfig())
    score = models.make_logprob_fn_with_auxiliaries(dataclasses.replace(config, mtp_depth=0))
    return tx, {
        parts: jax.jit(sft.make_update(sft.Config(parts), score, tx, models.rebalance)) for parts in (1, 2)
    }


@pytest.mark.slow
def test_micro_batches_change_nothing(params, batch, updates):
    tx, by_parts = updates
    hyper = sft.Hyper(
        1e-3, sft.Auxiliary(router_aux_loss_coef=1.0, router_z_loss_coef=0.1, router_bias_update_rate=0.01)
    )
    (one, first), (two, second) = (
        by_parts[parts](sft.init(params, tx, jax.random.key(0)), hyper, batch) for parts in (1, 2)
    )
    for name in ("loss", "balance_loss", "router_z_loss", "load_violation", "gradient_norm"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, err_msg=name)
    biases = [state.learner.params["layer_0"]["feed_forward"]["router"]["bias"] for state in (one, two)]
    np.testing.assert_array_equal(*biases)
    assert float(jnp.abs(biases[0]).max()) == pytest.approx(0.01)


@pytest.mark.slow
def test_a_step_that_is_not_finite_moves_no_bias(params, batch, updates):
    tx, by_parts = updates
    broken = {**params, "embedding": params["embedding"].at[:].set(jnp.nan)}
    state, metrics = by_parts[1](sft.init(broken, tx, jax.random.key(0)), sft.Hyper(), batch)
    assert int(metrics["skipped"]) == 1
    assert not state.learner.params["layer_0"]["feed_forward"]["router"]["bias"].any()


@pytest.mark.parametrize("way", few(["loss", "bias"], "bias"))
@pytest.mark.slow
def test_the_load_of_a_collapsed_router_evens_out(params, batch, updates, way):
    """Two of four experts get every token at first; either cure spreads the tokens, and nothing else does."""
    tx, by_parts = updates
    collapsed = jax.tree.map(lambda x: x, params)
    router = collapsed["layer_0"]["feed_forward"]["router"]
    bias = router["bias"].at[:2].set(0.2)
    collapsed["layer_0"]["feed_forward"]["router"] = {"kernel": 0.02 * router["kernel"], "bias": bias}

    def violation(hyper):
        state = sft.init(collapsed, tx, jax.random.key(0))
        seen = []
        for _ in range(60):
            state, metrics = by_parts[1](state, hyper, batch)
            seen.append(float(metrics["load_violation"]))
        return seen[0], seen[-1]

    if way == "bias":
        cure = sft.Hyper(
            0.0, sft.Auxiliary(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, router_bias_update_rate=0.02)
        )
    else:
        cure = sft.Hyper(
            1e-2, sft.Auxiliary(router_aux_loss_coef=1.0, router_z_loss_coef=0.0, router_bias_update_rate=0.0)
        )
    begin, end = violation(cure)
    assert begin == pytest.approx(1.0)  # two of four experts get everything
    assert end < 0.5, (begin, end)
    nothing = violation(sft.Hyper(0.0, sft.Auxiliary(router_bias_update_rate=0.0)))
    assert nothing[1] == pytest.approx(1.0)
