import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences
from rlhf_jax.losses.reductions import packed_sequence_mean, sequence_mean, token_mean
from rlhf_jax.models import adapters, config, decoder

# Compiled: dispatched one by one, the operations of one pass are hundreds of programs.
init_params = jax.jit(models.init_params, static_argnums=0)
hidden_states = jax.jit(models.hidden_states, static_argnums=0)
cached_hidden_states = jax.jit(decoder.cached_hidden_states, static_argnums=0, static_argnames="fresh")

CONFIG = models.dense_config(vocab_size=13, width=16, num_layers=2, num_heads=4, num_kv_heads=2)


def _rows(lengths, *, width, seed=0):
    """One sample a row, right-padded with junk tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 13, (len(lengths), width)).astype(np.int32)
    valid = np.arange(width) < np.asarray(lengths)[:, None]
    positions = np.where(valid, np.arange(width), 0).astype(np.int32)
    mask = valid & (np.arange(width) >= 2)
    return Sequences(*map(jnp.asarray, (tokens, positions, valid.astype(np.int32), mask)))


def test_numpy_oracle_of_one_layer():
    """The whole forward pass against loops written from the papers."""
    config = dataclasses.replace(CONFIG, num_layers=1)
    params = init_params(config, jax.random.key(1))
    rows = _rows([5], width=5)
    hidden = hidden_states(config, params, rows.tokens, rows.positions, rows.segment_ids)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def rotate(x, position):
        out, half = np.empty_like(x), len(x) // 2
        for i in range(half):
            angle = position * 10_000 ** (-2 * i / len(x))
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    x, layer = p["embedding"][np.asarray(rows.tokens[0])], p["layer_0"]
    normed = norm(x, layer["attention_norm"]["scale"])
    q, k, v = (normed @ layer["attention"][n]["kernel"] for n in ("query", "key", "value"))
    heads = []
    for t in range(5):
        for h in range(4):
            group = slice((h // 2) * 4, (h // 2) * 4 + 4)
            query = rotate(q[t, h * 4 : h * 4 + 4], t)
            scores = np.array([query @ rotate(k[s, group], s) / 2 for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            heads.append((weights / weights.sum()) @ v[: t + 1, group])
    x = x + np.reshape(heads, (5, 16)) @ layer["attention"]["output"]["kernel"]
    normed = norm(x, layer["feed_forward_norm"]["scale"])
    gate, up = (normed @ layer["feed_forward"][n]["kernel"] for n in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["feed_forward"]["down"]["kernel"]
    np.testing.assert_allclose(hidden[0], norm(x, p["final_norm"]["scale"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "remats"),
    [(True, ["none", "dots"]), pytest.param(False, ["full", "attention"], marks=pytest.mark.slow)],
)
def test_scanned_and_rematerialised_layers_equal_unrolled(tied, remats):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = init_params(config, jax.random.key(0))
    rows = _rows([6, 4], width=6)

    def loss(config, params):
        return -jnp.sum(jnp.where(rows.mask, models.make_logprob_fn(config)(params, rows).logp, 0))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    value, gradient = value_and_grad(config, params)
    for remat in remats:
        scanned = dataclasses.replace(config, scan_layers=True, remat=remat)
        stacked = models.stack_layers(config, params)
        assert jax.tree.structure(stacked) == jax.tree.structure(
            jax.eval_shape(lambda c=scanned: models.init_params(c, jax.random.key(0)))
        )
        other, other_gradient = value_and_grad(scanned, stacked)
        np.testing.assert_allclose(other, value, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            models.unstack_layers(config, other_gradient),
            gradient,
        )


def test_patterns_of_several_blocks_alternate():
    block = CONFIG.pattern[0]
    wide = dataclasses.replace(block, feed_forward=models.GatedFeedForward(64))
    config = dataclasses.replace(CONFIG, num_layers=4, pattern=(block, wide))
    shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    for repeat in range(2):
        layer = shapes[f"layer_{repeat}"]
        assert layer["block_0_feed_forward"]["up"]["kernel"].shape == (
            16,
            block.feed_forward.intermediate_size,
        )
        assert layer["block_1_feed_forward"]["up"]["kernel"].shape == (16, 64)


def test_packed_equals_unpacked_in_loss_and_gradient():
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIG, param_dtype="float64", compute_dtype="float64")
        params = init_params(config, jax.random.key(0))
        rows = _rows([6, 4, 5], width=8)
        tokens, positions, segments, mask = (
            np.zeros((2, 11), dtype) for dtype in (np.int32, np.int32, np.int32, bool)
        )
        for row, start, length, segment, target in ((0, 0, 6, 1, 0), (1, 6, 4, 2, 0), (2, 0, 5, 1, 1)):
            span = slice(start, start + length)
            tokens[target, span] = rows.tokens[row, :length]
            positions[target, span] = np.arange(length)
            segments[target, span] = segment
            mask[target, span] = rows.mask[row, :length]
        packed = Sequences(*map(jnp.asarray, (tokens, positions, segments, mask)))
        score = models.make_logprob_fn(config)
        for plain, for_packed in (
            (token_mean, token_mean),
            (sequence_mean, packed_sequence_mean(packed.segment_ids, 2)),
        ):
            losses = [
                jax.jit(jax.value_and_grad(lambda p, r=r, reduce=reduce: reduce(-score(p, r).logp, r.mask)))(
                    params
                )
                for r, reduce in ((rows, plain), (packed, for_packed))
            ]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), losses[0], losses[1]
            )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cache_equals_no_cache(scan_layers):
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    params = init_params(config, jax.random.key(0))
    rows = _rows([7, 7], width=7)
    whole = hidden_states(config, params, rows.tokens, rows.positions, rows.segment_ids)
    cache, parts = models.init_cache(config, 2, 9), []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        span = (slice(None), slice(start, stop))
        columns = (rows.tokens[span], rows.positions[span], rows.segment_ids[span])
        # The first tokens need not look into a cache that is empty; left to look, they see the same.
        part, cache = cached_hidden_states(config, params, *columns, cache, fresh=start == 0 and scan_layers)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    assert cache.length == 7


def test_left_padding_right_padding_and_none_agree():
    params = init_params(CONFIG, jax.random.key(0))
    right = _rows([5], width=8)
    left = jax.tree.map(lambda x: jnp.roll(x, 3, axis=1), right)
    score = jax.jit(models.make_logprob_fn(CONFIG))
    expected = score(params, jax.tree.map(lambda x: x[:, :5], right)).logp[0, 1:]
    np.testing.assert_allclose(score(params, right).logp[0, 1:5], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(score(params, left).logp[0, 4:], expected, rtol=1e-5, atol=1e-6)


def test_heads_read_the_state_before_and_the_last_token():
    params = jax.jit(models.init_scalar_model, static_argnums=0)(CONFIG, jax.random.key(0))
    rows = _rows([6, 4], width=6)
    hidden = hidden_states(CONFIG, params["decoder"], rows.tokens, rows.positions, rows.segment_ids)
    scores = np.asarray(hidden) @ np.asarray(params["head"]["kernel"])
    values = jax.jit(models.make_value_fn(CONFIG))(params, rows)
    np.testing.assert_allclose(values[:, 1:], scores[:, :-1], rtol=1e-4, atol=1e-5)
    rewards = jax.jit(models.make_reward_fn(CONFIG))(params, rows)
    np.testing.assert_allclose(rewards, [scores[0, 5], scores[1, 3]], rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_keeps_float32_log_probs():
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    scored = jax.jit(models.make_logprob_fn(config))(params, _rows([6], width=6))
    assert scored.logp.dtype == jnp.float32
    full = jax.jit(models.make_logprob_fn(CONFIG))(params, _rows([6], width=6))
    np.testing.assert_allclose(scored.logp, full.logp, atol=0.05)


def test_configs_written_under_earlier_names_are_read():
    written = {
        "kind": "ModelConfig",
        "vocab_size": 13,
        "width": 16,
        "num_layers": 3,
        "tied_embeddings": False,
        "further_depth": 2,
        "prefix": [{"kind": "Block", "attention": {"kind": "Recurrence", "cell": "gru", "hidden_dim": 6}}],
        "pattern": [
            {
                "kind": "Block",
                "attention": {
                    "kind": "LatentAttention",
                    "num_heads": 2,
                    "query_rank": 5,
                    "latent_dim": 6,
                    "nope_dim": 7,
                    "rope_dim": 8,
                    "value_dim": 9,
                },
            }
        ],
    }
    expert, dense = {"kind": "GatedFeedForward", "hidden_dim": 24}, {"kind": "FeedForward", "hidden_dim": 32}
    router = {"kind": "SigmoidRouter", "renormalise": False}
    mixture = {"kind": "MixtureOfExperts", "num_experts": 4, "experts_per_token": 2, "expert": expert}
    written["prefix"][0]["feed_forward"] = dense
    written["pattern"][0]["feed_forward"] = {**mixture, "router": router}
    latent = config.LatentAttention(
        2, q_lora_rank=5, kv_lora_rank=6, qk_nope_head_dim=7, qk_rope_head_dim=8, v_head_dim=9
    )
    experts = models.MixtureOfExperts(
        4, 2, models.GatedFeedForward(intermediate_size=24), models.SigmoidRouter(renormalize=False)
    )
    recurrence = config.Recurrence("gru", hidden_size=6)
    assert models.config_from_dict(written) == models.ModelConfig(
        vocab_size=13,
        width=16,
        num_layers=3,
        prefix=(models.Block(recurrence, config.FeedForward(intermediate_size=32)),),
        pattern=(models.Block(latent, experts),),
        tie_word_embeddings=False,
        mtp_depth=2,
    )
    lora = {"kind": "LoRA", "rank": 4, "rank_stabilised": True}
    assert models.adapter_from_dict(lora) == adapters.LoRA(4, rank_stabilized=True)
    bits = {"kind": "Quantisation", "format": "nf4", "block": 16}
    assert models.adapter_from_dict(bits) == adapters.Quantization("nf4", block=16)


def test_config_round_trips_and_refuses_impossible_heads():
    assert models.config_from_dict(models.config_to_dict(CONFIG)) == CONFIG
    with pytest.raises(UserError, match="num_kv_heads=3"):
        models.dense_config(vocab_size=8, width=16, num_layers=1, num_heads=4, num_kv_heads=3)
    with pytest.raises(UserError, match="not divisible by num_heads=5"):
        models.dense_config(vocab_size=8, width=16, num_layers=1, num_heads=5)
    with pytest.raises(UserError, match="cannot be read"):
        models.config_from_dict({"width": 3})
