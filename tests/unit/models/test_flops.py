"""Operations by description against those of the traced model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import models
from rlhf_jax.core.types import Sequences
from rlhf_jax.models import config as parts
from rlhf_jax.planning.hlo_analysis import matmul_flops

SIZES = {"vocab_size": 50, "width": 16, "num_layers": 3, "num_heads": 4, "intermediate_size": 24}


def latent_config():
    attention = parts.LatentAttention(4, 6, 8, 4, 2, 5)
    block = parts.Block(attention, parts.GatedFeedForward(24))
    return models.ModelConfig(50, 16, 3, (block,))


CONFIGS = {
    "llama": models.dense_config(**SIZES, num_kv_heads=2),
    "untied": models.dense_config(**SIZES, tie_word_embeddings=False, scan_layers=True),
    "latent": latent_config(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_as_it_is_traced(name):
    """Plain attention computes whole squares, of which causality needs the half with the diagonal."""
    config = dataclasses.replace(CONFIGS[name], attention_backend="plain")
    rows, length = 2, 8
    columns = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = Sequences(columns, columns, columns, jax.ShapeDtypeStruct((rows, length), jnp.bool_))
    params = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
    found = matmul_flops(jax.make_jaxpr(models.make_logprob_fn(config))(params, batch))
    formula = models.forward_flops(config, rows=rows, length=length)
    products = 2 * rows * length * models.matmul_params(config)
    assert found == products + (formula - products) * 2 * length / (length + 1)


@pytest.mark.parametrize(
    ("preset", "billions"), [("llama-1b", 1.236), ("llama-8b", 8.030), ("llama-70b", 70.55)]
)
def test_presets_have_as_many_parameters_as_their_makers_say(preset, billions):
    config = models.preset_config(preset, scan_layers=True)
    shapes = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.width
    norms = config.width * (2 * config.num_layers + 1)
    assert models.matmul_params(config) == count - looked_up - norms


def test_windows_experts_and_decoding():
    config = models.dense_config(**SIZES)
    [block] = config.pattern
    windowed = dataclasses.replace(
        config,
        pattern=(dataclasses.replace(block, attention=dataclasses.replace(block.attention, window=2)),),
    )
    whole, short = (models.forward_flops(c, rows=1, length=8) for c in (config, windowed))
    assert whole - short == 3 * 4 * 16 * (36 - 16)
    mixture = parts.MixtureOfExperts(8, 2, parts.GatedFeedForward(24))
    sparse = dataclasses.replace(config, pattern=(dataclasses.replace(block, feed_forward=mixture),))
    assert models.matmul_params(sparse) - models.matmul_params(config) == 3 * (3 * 16 * 24 + 16 * 8)
    # Reading all at once, or the second half after the first.
    halves = [models.forward_flops(config, rows=1, length=n, start=s) for s, n in ((0, 4), (4, 8))]
    assert sum(halves) == whole
    assert models.training_flops(config, rows=1, length=8) == 3 * whole
