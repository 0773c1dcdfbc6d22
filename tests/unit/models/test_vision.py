"""Patch encoders, projectors and image features among embeddings, against loops in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Images, Sequences
from rlhf_jax.models.vision.config import LinearProjector, MLPProjector, PixelShuffle, VisionConfig
from rlhf_jax.models.vision.encoder import VisionTower, place_features, to_patches

IMAGE = 5  # the image token
VISION = VisionConfig(
    image_token_id=IMAGE,
    image_size=8,
    patch_size=2,
    width=12,
    num_layers=2,
    num_heads=3,
    intermediate_size=20,
)
CASES = {
    "linear": VISION,
    "mlp": dataclasses.replace(VISION, projector=MLPProjector(10), activation="gelu"),
    "pixel_shuffle": dataclasses.replace(VISION, projector=PixelShuffle(2)),
    "mean": dataclasses.replace(VISION, pooling="mean", projector=LinearProjector(bias=True)),
    "attention": dataclasses.replace(VISION, pooling="attention", mean=(0.1, 0.4, 0.6), std=(0.2, 0.3, 0.5)),
}


def moved(params, seed=0):
    """Parameters off their initial values, so that every bias and scale shows."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params)


def gelu(x, activation):
    if activation == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(leaves, x):
    return x @ leaves["kernel"] + leaves.get("bias", 0)


def normed(leaves, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * leaves["scale"] + leaves["bias"]
    )


def attended(leaves, queries, patches, heads):
    """Every head apart, every query apart."""
    q, k, v = (linear(leaves[n], x) for n, x in (("query", queries), ("key", patches), ("value", patches)))
    size = q.shape[-1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        for row in range(len(q)):
            scores = np.array([q[row, own] @ key[own] for key in k]) / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[row, own] = weights / weights.sum() @ v[:, own]
    return linear(leaves["output"], out)


def mlp(leaves, x, activation):
    return linear(leaves["down"], gelu(linear(leaves["up"], x), activation))


def features_by_hand(config, params, image):
    """One image, patch by patch."""
    scaled = (image / 255 - np.array(config.mean)) / np.array(config.std)
    size, side = config.patch_size, config.image_size // config.patch_size
    patches = []
    for row in range(side):
        for column in range(side):
            pixels = [
                scaled[row * size + y, column * size + x, channel]
                for y in range(size)
                for x in range(size)
                for channel in range(3)
            ]
            patches.append(linear(params["patches"], np.array(pixels)))
    hidden = np.stack(patches) + params["position_embedding"]
    for index in range(config.num_layers):
        layer = params[f"layer_{index}"]
        inner = normed(layer["attention_norm"], hidden, config.norm_epsilon)
        hidden = hidden + attended(layer["attention"], inner, inner, config.num_heads)
        inner = normed(layer["feed_forward_norm"], hidden, config.norm_epsilon)
        hidden = hidden + mlp(layer["feed_forward"], inner, config.activation)
    hidden = normed(params["final_norm"], hidden, config.norm_epsilon)
    if config.pooling == "mean":
        hidden = hidden.mean(0, keepdims=True)
    if config.pooling == "attention":
        pool = params["pool"]
        pooled = attended(pool, pool["probe"], hidden, config.num_heads)
        inner = normed(pool["norm"], pooled, config.norm_epsilon)
        hidden = pooled + mlp(pool["feed_forward"], inner, config.activation)
    if isinstance(config.projector, PixelShuffle):
        factor = config.projector.factor
        grid = hidden.reshape(side, side, -1)
        joined = [
            np.concatenate([grid[y + dy, x + dx] for dy in range(factor) for dx in range(factor)])
            for y in range(0, side, factor)
            for x in range(0, side, factor)
        ]
        return linear(params["projector"], np.stack(joined))
    if isinstance(config.projector, MLPProjector):
        return mlp(params["projector"], hidden, config.projector.activation)
    return linear(params["projector"], hidden)


@pytest.mark.parametrize("case", few(CASES, *list(CASES)[:2]))
def test_the_tower_is_what_loops_over_patches_heads_and_queries_compute(case):
    config = CASES[case]
    tower = VisionTower(config, 7, "float32", "float32")
    images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    params = moved(tower.init(jax.random.key(0), images)["params"])
    got = tower.apply({"params": params}, images)
    assert got.shape == (2, config.tokens_per_image, 7)
    wide = jax.tree.map(lambda x: x.astype(np.float64), params)
    expected = np.stack([features_by_hand(config, wide, image) for image in images])
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_patches_are_squares_in_reading_order():
    grid = np.arange(4 * 4).reshape(1, 4, 4, 1)
    patches = to_patches(grid, 2)
    assert patches[0, 0, 1].tolist() == [2, 3, 6, 7]
    assert patches[0, 1, 0].tolist() == [8, 9, 12, 13]


def test_features_stand_in_the_places_of_image_tokens_in_their_order():
    embeddings = jnp.zeros((2, 6, 1))
    places = jnp.array([[1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0]], bool)
    features = jnp.arange(1.0, 9.0).reshape(2, 4, 1)
    got = place_features(embeddings, places, features, jnp.array([4, 2]))[..., 0]
    # Beyond the last feature, the embedding stays.
    assert got.tolist() == [[1, 2, 0, 3, 4, 0], [0, 0, 5, 6, 0, 0]]


CONFIG = models.dense_config(vocab_size=11, width=16, num_layers=2, num_heads=2, vision=VISION)


def rows(seed=0):
    """A row of two images and one of a single image, left-padded with the image token itself."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (2, 2, 8, 8, 3), np.uint8)
    images = Images(pixels, np.array([[True, True], [True, False]]))
    first = [1, *[IMAGE] * 16, 2, *[IMAGE] * 16, 3, 4]
    second = [*[IMAGE] * 17, 1, *[IMAGE] * 16, 3, 4]
    tokens = np.array([first, second + [4] * (len(first) - len(second))], np.int32)

    segments = np.ones_like(tokens)
    segments[1, :17] = 0
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    return Sequences(tokens, positions, segments, segments > 0, images=images)


@pytest.mark.slow
def test_images_reach_what_follows_them_and_padding_reaches_nothing():
    params = models.init_params(CONFIG, jax.random.key(0))
    sequences = rows()
    logprob_fn = jax.jit(models.make_logprob_fn(CONFIG))
    logp = np.asarray(logprob_fn(params, sequences).logp)
    pixels = sequences.images.pixels.copy()
    pixels[0, 1] = 255 - pixels[0, 1]  # the second image of the first row
    pixels[1, 1] = 255 - pixels[1, 1]  # one that is not there
    other = dataclasses.replace(sequences, images=Images(pixels, sequences.images.present))
    changed = np.abs(np.asarray(logprob_fn(params, other).logp) - logp) > 1e-7
    assert not changed[0, :18].any()
    assert changed[0, -1]
    assert not changed[1].any()
    hidden = models.hidden_states(
        CONFIG, params, sequences.tokens, sequences.positions, sequences.segment_ids
    )
    assert np.isfinite(hidden).all()  # text alone goes through the same parameters


def test_a_model_of_text_alone_refuses_images():
    config = models.dense_config(vocab_size=11, width=16, num_layers=1, num_heads=2)
    params = models.init_params(config, jax.random.key(0))
    with pytest.raises(UserError, match="reads no images"):
        models.make_logprob_fn(config)(params, rows())


def test_a_configuration_with_vision_survives_json():
    config = dataclasses.replace(CONFIG, vision=CASES["pixel_shuffle"])
    assert models.config_from_dict(models.config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "patch_size=3 must divide image_size=8"),
        ({"num_heads": 5}, "num_heads=5 width=12"),
        ({"projector": PixelShuffle(3)}, r"PixelShuffle\(factor=3\)"),
        ({"projector": PixelShuffle(2), "pooling": "mean"}, "pooling='none'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(VISION, **change)


def test_multi_token_prediction_and_vision_exclude_each_other():
    with pytest.raises(UserError, match="mtp_depth=0"):
        dataclasses.replace(CONFIG, mtp_depth=1)
