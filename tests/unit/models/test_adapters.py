"""Every kind of adapter: silent at the start, equal when merged, right gradients, alone in what moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import map_named, merge, named_leaves, partition
from rlhf_jax.core.types import Sequences
from rlhf_jax.generation import generate
from rlhf_jax.models import adapters, decoder

CONFIG = models.dense_config(vocab_size=13, width=16, num_layers=2, num_heads=4, num_kv_heads=2)
KINDS = {
    "lora": adapters.LoRA(4),
    "rslora": adapters.LoRA(4, rank_stabilized=True, targets=".*attention/(query|value)"),
    "dora": adapters.DoRA(4),
    "pissa": adapters.PiSSA(4),
    "adalora": adapters.AdaLoRA(4, 2, total_steps=10, warmup_steps=2, final_steps=2),
    "prefix": adapters.PrefixTuning(3),
    "prompt": adapters.PromptTuning(3),
    "bottleneck": adapters.Bottleneck(4),
    "partial": adapters.Partial("layer_1/.*|final_norm.*"),
}
MERGEABLE = ("lora", "rslora", "dora", "pissa", "adalora")
every_kind = pytest.mark.parametrize("kind", few(KINDS, "lora", "prefix"))
forward = jax.jit(models.forward, static_argnums=0)
hidden_states = jax.jit(models.hidden_states, static_argnums=0)
cached_hidden_states = jax.jit(decoder.cached_hidden_states, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return jax.jit(models.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 13, (3, 8)).astype(np.int32)
    valid = np.arange(8) >= np.array([0, 2, 4])[:, None]
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
    return Sequences(*map(jnp.asarray, (tokens, positions, valid.astype(np.int32), valid)))


def logits_of(config, params):
    sequences = rows()
    return forward(config, params, sequences.tokens, mask=sequences.mask)


def stirred(tree, seed=5):
    """An adapter that has been trained: every trained leaf is somewhere else."""
    names = named_leaves(tree)
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))

    def stir(name, leaf):
        if not adapters.is_trained(KINDS["lora"])(name, leaf):
            return leaf
        return leaf + 0.3 * jax.random.normal(keys[name], leaf.shape, leaf.dtype)

    return map_named(stir, tree)


@every_kind
def test_at_the_start_no_logit_changes_and_the_base_is_shared(kind, params):
    adapted = adapters.init_adapter(KINDS[kind], params, jax.random.key(1))
    base = adapters.without_adapter(adapted)
    assert jax.tree.structure(base) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, base, params)))
    expected, found = logits_of(CONFIG, params), logits_of(CONFIG, adapted)
    if kind == "prompt":
        assert not np.allclose(found, expected, atol=1e-4)
    elif kind == "dora":  # lengths are divided by themselves
        np.testing.assert_allclose(found, expected, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, expected)
    if kind != "partial":
        assert np.abs(np.asarray(logits_of(CONFIG, stirred(adapted)) - expected)).max() > 1e-3


@pytest.mark.parametrize("kind", few(MERGEABLE, "dora"))
def test_merged_equals_unmerged(kind, params):
    with jax.enable_x64(True):
        wide = dataclasses.replace(CONFIG, param_dtype="float64", compute_dtype="float64")
        base = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        adapted = stirred(adapters.init_adapter(KINDS[kind], base, jax.random.key(1)))
        merged = adapters.merge_adapter(adapted)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        np.testing.assert_allclose(logits_of(wide, merged), logits_of(wide, adapted), atol=1e-12)


@pytest.mark.parametrize("kind", ["prefix", "prompt", "bottleneck"])
def test_what_cannot_be_merged_says_so(kind, params):
    adapted = adapters.init_adapter(KINDS[kind], params, jax.random.key(1))
    assert not adapters.can_merge(adapted)
    with pytest.raises(UserError, match="cannot be merged"):
        adapters.merge_adapter(adapted)


@pytest.mark.parametrize("kind", few(["dora", "prefix", "adalora", "prompt", "bottleneck"], "dora"))
@pytest.mark.slow
def test_scanned_equals_unrolled_and_packed_equals_unpacked(kind, params):
    adapted = adapters.init_adapter(KINDS[kind], params, jax.random.key(1))
    adapted = stirred(adapted)
    scanned = dataclasses.replace(CONFIG, scan_layers=True)
    stacked = models.stack_layers(CONFIG, adapted)
    expected = logits_of(CONFIG, adapted)
    np.testing.assert_allclose(logits_of(scanned, stacked), expected, atol=2e-5)
    fresh = adapters.init_adapter(KINDS[kind], models.stack_layers(CONFIG, params), jax.random.key(1))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stacked)

    tokens = rows().tokens[:2, :4]
    packed = tokens.reshape(1, 8)
    positions, segments = jnp.tile(jnp.arange(4), 2)[None], jnp.repeat(jnp.array([1, 2]), 4)[None]
    together = hidden_states(CONFIG, adapted, packed, positions, segments).reshape(2, 4, -1)
    apart = hidden_states(CONFIG, adapted, tokens, jnp.tile(jnp.arange(4), (2, 1)), jnp.ones_like(tokens))
    np.testing.assert_allclose(together, apart, atol=2e-5)


@pytest.mark.parametrize("kind", few(["lora", "prefix", "prompt"], "prefix"))
@pytest.mark.slow
def test_cached_equals_full(kind, params):
    """Tokens read one at a time through a cache end in the hidden states of the whole row."""
    adapted = stirred(adapters.init_adapter(KINDS[kind], params, jax.random.key(1)))
    sequences = rows()
    arrays = sequences.tokens, sequences.positions, sequences.segment_ids
    full = hidden_states(CONFIG, adapted, *arrays)
    cache = models.init_cache(CONFIG, 3, 8)
    first, cache = cached_hidden_states(CONFIG, adapted, *(x[:, :6] for x in arrays), cache)
    second, cache = cached_hidden_states(CONFIG, adapted, *(x[:, 6:7] for x in arrays), cache)
    found = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(found[sequences.mask[:, :7]], full[:, :7][sequences.mask[:, :7]], atol=2e-5)
    prefill, decode = models.make_decode_fns(CONFIG)
    greedy = jax.jit(functools.partial(generate, prefill, decode, max_new_tokens=2, eos_id=0, pad_id=0))
    rollout = greedy(adapted, sequences.tokens, sequences.mask, jax.random.key(0))
    score = jax.jit(models.make_logprob_fn(CONFIG))(adapted, rollout.sequences)
    mask = rollout.sequences.mask
    np.testing.assert_allclose(rollout.logp[mask], score.logp[mask], atol=1e-4)


def test_gradients_are_those_of_a_dense_change_of_the_kernel(params):
    """dL/dA = s dL/dW B', dL/dB = s A' dL/dW, with dL/dW that of the merged kernel."""
    with jax.enable_x64(True):
        wide = dataclasses.replace(CONFIG, param_dtype="float64", compute_dtype="float64")
        base = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        adapted = stirred(adapters.init_adapter(KINDS["lora"], base, jax.random.key(1)))
        score, sequences = models.make_logprob_fn(wide), rows()

        def loss(tree):
            return -jnp.sum(jnp.where(sequences.mask, score(tree, sequences).logp, 0))

        found = jax.jit(jax.grad(loss))(adapted)["layer_1"]["feed_forward"]["down"]
        dense = jax.jit(jax.grad(loss))(adapters.merge_adapter(adapted))["layer_1"]["feed_forward"]["down"]
        leaves = adapted["layer_1"]["feed_forward"]["down"]
        scale = leaves["lora_scale"]
        np.testing.assert_allclose(scale, 16 / 4)
        np.testing.assert_allclose(found["lora_a"], scale * dense["kernel"] @ leaves["lora_b"].T, atol=1e-10)
        np.testing.assert_allclose(found["lora_b"], scale * leaves["lora_a"].T @ dense["kernel"], atol=1e-10)


def test_dora_against_its_equation(params):
    adapted = stirred(adapters.init_adapter(KINDS["dora"], params, jax.random.key(1)))
    leaves = jax.tree.map(np.asarray, adapted["layer_0"]["attention"]["query"])
    change = leaves["kernel"] + leaves["lora_scale"] * leaves["lora_a"] @ leaves["lora_b"]
    expected = leaves["lora_magnitude"] * change / np.linalg.norm(change, axis=0)
    merged = adapters.merge_adapter(adapted)["layer_0"]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-6)


def test_pissa_starts_from_the_largest_singular_values(params):
    kernel = np.asarray(params["layer_0"]["attention"]["query"]["kernel"])
    adapted = adapters.init_adapter(KINDS["pissa"], params, jax.random.key(1))
    leaves = jax.tree.map(np.asarray, adapted["layer_0"]["attention"]["query"])
    left, singular, right = np.linalg.svd(kernel)
    best = (left[:, :4] * singular[:4]) @ right[:4]
    np.testing.assert_allclose(leaves["lora_scale"] * leaves["lora_a"] @ leaves["lora_b"], best, atol=1e-6)


def test_several_adapters_over_one_base_under_vmap(params):
    def adapted(seed):
        return stirred(adapters.init_adapter(KINDS["lora"], params, jax.random.key(seed)), seed)

    alone = [
        partition(adapted(seed), lambda name, leaf: adapters.is_adapter_leaf(name))[0] for seed in (1, 2)
    ]
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    sequences = rows()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def together(own, base):
        return models.forward(CONFIG, merge(own, base), sequences.tokens, mask=sequences.mask)

    for found, own in zip(together(several, params), alone, strict=True):
        np.testing.assert_allclose(found, logits_of(CONFIG, merge(own, params)), atol=2e-5)


@every_kind
@pytest.mark.slow
def test_only_what_is_trained_moves_and_the_loss_falls(kind, params):
    config = KINDS[kind]
    adapted = adapters.init_adapter(config, params, jax.random.key(1))
    trained, frozen = partition(adapted, adapters.is_trained(config))
    names = {name.rpartition("/")[2] for name in named_leaves(trained)}
    assert (
        names
        == {
            "lora": {"lora_a", "lora_b"},
            "rslora": {"lora_a", "lora_b"},
            "dora": {"lora_a", "lora_b", "lora_magnitude"},
            "pissa": {"lora_a", "lora_b"},
            "adalora": {"lora_a", "lora_b", "lora_singular"},
            "prefix": {"prefix_key", "prefix_value", "prefix_scale"},
            "prompt": {"prompt_embedding"},
            "bottleneck": {"bottleneck_down", "bottleneck_up"},
            "partial": {"kernel", "scale"},
        }[kind]
    )
    tx = make_optimizer(OptimizerConfig())
    if isinstance(config, adapters.AdaLoRA):
        tx = adapters.with_rank_budget(config, tx)
    update = jax.jit(sft.make_update(sft.Config(), models.make_logprob_fn(CONFIG), tx), donate_argnums=0)
    expected = jax.tree.map(np.array, frozen)
    state = sft.init(jax.tree.map(jnp.copy, trained), tx, jax.random.key(0), jax.tree.map(jnp.copy, frozen))
    losses = []
    for _ in range(12):
        state, metrics = update(state, sft.Hyper(jnp.float32(3e-2)), rows())
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, state.learner.frozen, expected)
    assert losses[-1] < losses[0] - 5e-3
    before = named_leaves(trained)
    still = [n for n, x in named_leaves(state.learner.params).items() if np.array_equal(x, before[n])]
    assert not [name for name in still if "singular" not in name]  # those out of budget are back at zero
    if isinstance(config, adapters.AdaLoRA):
        kept = [np.abs(leaf) > 1e-6 for n, leaf in named_leaves(state.learner.params).items() if "sing" in n]
        assert np.sum(kept) == 2 * len(kept)  # 4 ranks each at the start, 2 on average at the end
        assert len({int(row.sum()) for row in kept}) > 1  # and not the same number everywhere


def test_the_budget_falls_from_rank_to_target():
    config = adapters.AdaLoRA(6, 2, total_steps=100, warmup_steps=10, final_steps=30)
    budgets = [int(adapters.budget_at(config, jnp.int32(step), 5)) for step in range(101)]
    assert budgets[:11] == [30] * 11
    assert budgets[70:] == [10] * 31
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[40] == round(5 * (2 + 4 * 0.5**3))


# Few bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "bound"), few([("int8", 0.01), ("fp8", 0.05), ("int4", 0.13), ("nf4", 0.11)], ("nf4", 0.11))
)
def test_quantised_kernels_are_near_and_layers_compute_with_them(format, bound, params):
    config = adapters.Quantization(format)
    quantised = adapters.quantize(config, params)
    back = adapters.dequantize(quantised)
    leaves = quantised["layer_0"]["feed_forward"]["down"]
    assert leaves.keys() == {"kernel_values", "kernel_scale"}
    assert leaves["kernel_values"].shape == (48, 16)
    for name, leaf in named_leaves(back).items():
        exact = np.asarray(named_leaves(params)[name])
        error = np.linalg.norm(np.asarray(leaf) - exact) / np.linalg.norm(exact)
        assert (error == 0) if not name.endswith("kernel") else (0 < error < bound), (name, error)
    np.testing.assert_allclose(logits_of(CONFIG, quantised), logits_of(CONFIG, back), atol=1e-5)
    scanned = adapters.quantize(config, models.stack_layers(CONFIG, params))
    scan = dataclasses.replace(CONFIG, scan_layers=True)
    np.testing.assert_allclose(logits_of(scan, scanned), logits_of(CONFIG, quantised), atol=2e-5)


def test_nf4_is_the_nearest_of_its_sixteen_values(params):
    kernel = np.asarray(params["layer_0"]["feed_forward"]["down"]["kernel"])
    leaves = adapters.quantize(adapters.Quantization("nf4", block=16), params)["layer_0"]["feed_forward"]
    levels = np.unique(np.asarray(leaves["down"]["kernel_values"]).astype(int))
    assert levels.min() >= 0
    assert levels.max() <= 15
    half = ".07958030 .16093020 .24611230 .33791524 .44070983 .56261700 .72295684 1"
    other = "-1 -.69619280 -.52507305 -.39491749 -.28444138 -.18477343 -.09105004 0"
    table = np.array(f"{other} {half}".split(), float)
    blocks = kernel.reshape(3, 16, 16)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - table).argmin(axis=-1)
    expected = (table[nearest] * scale).reshape(48, 16)
    found = adapters.dequantize({"down": leaves["down"]})["down"]["kernel"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_adapter_on_a_quantised_base(params):
    quantised = adapters.quantize(adapters.Quantization("nf4"), params)
    with pytest.raises(UserError, match="only a plain base is quantised"):
        adapters.quantize(adapters.Quantization("int8"), quantised)
    for kind in ("lora", "dora", "prefix"):
        fresh = adapters.init_adapter(KINDS[kind], quantised, jax.random.key(1))
        np.testing.assert_allclose(logits_of(CONFIG, fresh), logits_of(CONFIG, quantised), atol=1e-6)
    adapted = stirred(adapters.init_adapter(KINDS["lora"], quantised, jax.random.key(1)))
    merged = adapters.merge_adapter(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(logits_of(CONFIG, merged), logits_of(CONFIG, adapted), atol=1e-4)


# Other architectures, and mistakes ---------------------------------------------------------------------


def latent_config():
    attention = models.LatentAttention(
        num_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
    )
    expert = models.GatedFeedForward(16)
    mixture = models.MixtureOfExperts(4, 2, expert, shared=expert)
    blocks = models.Block(attention, models.GatedFeedForward(16)), models.Block(attention, mixture)
    return models.ModelConfig(13, 16, 2, pattern=blocks)


@pytest.mark.slow
def test_latent_attention_and_experts():
    config = latent_config()
    params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
    expected = logits_of(config, params)
    adapted = adapters.init_adapter(KINDS["lora"], params, jax.random.key(1))
    assert "lora_a" not in adapted["layer_0"]["block_1_feed_forward"]["router"]
    np.testing.assert_array_equal(logits_of(config, adapted), expected)
    merged = adapters.merge_adapter(stirred(adapted))
    np.testing.assert_allclose(logits_of(config, merged), logits_of(config, stirred(adapted)), atol=1e-4)
    with pytest.raises(UserError, match="no attention layer with keys and values of its own"):
        adapters.init_adapter(KINDS["prefix"], params, jax.random.key(1))

    prompted = adapters.init_adapter(KINDS["prompt"], params, jax.random.key(1))
    sequences = rows()
    arrays = sequences.tokens, sequences.positions, sequences.segment_ids
    full = hidden_states(config, prompted, *arrays)
    cached, _ = cached_hidden_states(config, prompted, *arrays, models.init_cache(config, 3, 8))
    np.testing.assert_allclose(cached[sequences.mask], full[sequences.mask], atol=2e-5)


def test_a_soft_prompt_of_real_embeddings_is_those_tokens(params):
    """A prompt made of the embeddings of tokens 3 and 7 equals the tokens 3 and 7 before the row."""
    prompted = {**params, "prompt_embedding": params["embedding"][jnp.array([3, 7])]}
    tokens = rows().tokens[:1]
    longer = jnp.concatenate([jnp.array([[3, 7]]), tokens], axis=1)
    np.testing.assert_allclose(
        forward(CONFIG, prompted, tokens), forward(CONFIG, params, longer)[:, 2:], atol=2e-5
    )


def test_mistakes_are_sentences(params):
    key = jax.random.key(0)
    with pytest.raises(
        UserError, match="match no linear layer: they must match a whole path such as layer_0"
    ):
        adapters.init_adapter(adapters.LoRA(targets="q_proj"), params, key)
    with pytest.raises(UserError, match="is no regular expression"):
        adapters.LoRA(targets="(")
    with pytest.raises(UserError, match="rank 0 is not positive"):
        adapters.LoRA(0)
    with pytest.raises(UserError, match="rank 17 is more than layer_0/attention/output has"):
        adapters.init_adapter(adapters.PiSSA(17, targets=".*output"), params, key)
    with pytest.raises(UserError, match="target_rank 9 is above rank 8"):
        adapters.AdaLoRA(8, 9)
    with pytest.raises(UserError, match="leave none of 10 optimizer steps"):
        adapters.AdaLoRA(total_steps=10, warmup_steps=5, final_steps=5)
    adapted = adapters.init_adapter(KINDS["lora"], params, key)
    with pytest.raises(UserError, match="has an adapter already"):
        adapters.init_adapter(KINDS["prefix"], adapted, key)
