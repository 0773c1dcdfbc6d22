"""A policy with vision: what it samples is what it scores, and images go the way of tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.models.vision.config import PixelShuffle, VisionConfig
from rlhf_jax.rollout.sampler import make_generate_fn

SIZE = 8


@functools.cache
def make_policy(**options):
    tokenizer = byte_tokenizer().with_special(["<image>"])
    vision = VisionConfig(tokenizer.special_tokens["<image>"], SIZE, 2, 12, 1, 2, 16, PixelShuffle(2))
    shape = {"vocab_size": tokenizer.vocab_size, "width": 16, "num_layers": 2, "num_heads": 2}
    shape["tie_word_embeddings"] = False  # tied, the likeliest token is the one before
    config = models.dense_config(**shape, vision=vision, **options)
    params = models.init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)  # so that images matter
    return models.make_policy(config, params, tokenizer)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def prompts(policy=None):
    policy = policy or make_policy()
    rows = [
        {"prompt": "one", "images": [IMAGES[0]]},
        {"prompt": "none at all"},
        {"prompt": "two", "images": [IMAGES[1], IMAGES[2]]},
    ]
    return prompt_examples(as_rows(rows), policy.tokenizer, max_length=999)


SCANNED = {"scan_layers": True, "remat": "full"}


@pytest.mark.parametrize(
    "options", [pytest.param({}, id="plain"), pytest.param(SCANNED, id="scanned", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_the_sampler_says_of_its_answers_what_the_trainer_says(options):
    policy = make_policy(**options)
    asked = [prompt for prompt in prompts(policy) for _ in range(2)]
    longest = max(len(prompt.ids) for prompt in asked)
    room = {"prompt_length": longest, "num_images": 2, "max_new_tokens": 4, "group_size": 2}
    rollout = make_generate_fn(policy, **room)(policy.params, asked, jax.random.key(1))
    sequences = rollout.sequences
    assert sequences.images.present.tolist() == [[True, False]] * 2 + [[False] * 2] * 2 + [[True] * 2] * 2
    assert np.array_equal(sequences.images.pixels[4], IMAGES[1:])
    logprob_fn = jax.jit(policy.make_logprob_fn())
    scored = np.asarray(logprob_fn(policy.params, sequences).logp)
    np.testing.assert_allclose(
        np.asarray(rollout.logp)[sequences.mask], scored[np.asarray(sequences.mask)], atol=1e-5
    )
    black = dataclasses.replace(sequences.images, pixels=np.zeros_like(sequences.images.pixels))
    unseen = logprob_fn(policy.params, dataclasses.replace(sequences, images=black)).logp
    gap = np.abs(np.asarray(unseen) - scored).max(axis=1)
    assert (gap[[0, 1, 4, 5]] > 1e-2).all()
    assert (gap[2:4] == 0).all()


def test_gradients_reach_the_encoder():
    asked = prompts()[:1]
    room = {"prompt_length": len(asked[0].ids), "num_images": 1, "max_new_tokens": 2}
    rollout = make_generate_fn(make_policy(), **room)(make_policy().params, asked, jax.random.key(1))
    logprob_fn = make_policy().make_logprob_fn()
    mask = rollout.sequences.mask

    def loss(params):
        return (logprob_fn(params, rollout.sequences).logp * mask).sum()

    gradient = jax.jit(jax.grad(loss))(make_policy().params)
    assert np.abs(gradient["vision"]["patches"]["kernel"]).max() > 0


def test_a_conversation_may_hold_an_image():
    parts = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "?"}]
    asked = [{"role": "user", "content": parts}]
    first = make_policy().chat(asked, max_new_tokens=8, temperature=0)
    asked[0]["content"][0]["image"] = IMAGES[1]
    assert make_policy().chat(asked, max_new_tokens=8, temperature=0) != first


def test_images_for_which_there_is_no_room_are_refused():
    generate = make_generate_fn(make_policy(), prompt_length=99, num_images=1, max_new_tokens=1)
    with pytest.raises(UserError, match="2 images and there is room for 1"):
        generate(make_policy().params, prompts(), jax.random.key(0))
    with pytest.raises(UserError, match="continuous batching reads no images"):
        make_generate_fn(make_policy(), prompt_length=99, num_images=1, max_new_tokens=1, max_num_seqs=2)


def test_an_image_token_that_text_could_write_is_refused():
    vision = dataclasses.replace(make_policy().config.vision, image_token_id=9)
    config = dataclasses.replace(make_policy().config, vision=vision)
    with pytest.raises(UserError, match="no special token"):
        models.make_policy(config, make_policy().params, make_policy().tokenizer)


def test_a_layout_without_a_place_for_vision_is_refused(tmp_path):
    with pytest.raises(UserError, match="no GGUF file of"):
        make_policy().save(tmp_path / "model.gguf")
