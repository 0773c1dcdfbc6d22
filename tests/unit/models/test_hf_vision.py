"""Models with vision against what `transformers` computed (tools/goldens/make_goldens_vision.py)."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Images
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import hf

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
CASES = sorted(folder.name for folder in GOLDEN.glob("vision_*"))


@functools.cache
def loaded(case):
    with np.load(GOLDEN / case / "expected.npz") as expected:
        return *hf.load(GOLDEN / case), dict(expected)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_answers_are_those_of_transformers(case):
    config, params, expected = loaded(case)
    images = Images(expected["images"], expected["present"])
    tokens, mask = expected["tokens"], expected["mask"]

    @jax.jit
    def both(params):
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        rows = tokens, positions, mask.astype(np.int32)
        logits = models.make_logits_fn(config)(params, *rows, images=images)
        ends = {"max_new_tokens": 8, "eos_id": -1, "pad_id": 0, "sampling": Sampling(temperature=0.0)}
        fns = models.make_decode_fns(config)
        return logits, generate(*fns, params, tokens, mask, jax.random.key(0), images=images, **ends)

    logits, rollout = both(params)
    np.testing.assert_allclose(logits[mask], expected["logits"][mask], atol=1e-4)
    np.testing.assert_array_equal(rollout.sequences.tokens[:, tokens.shape[1] :], expected["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_was_loaded(case, tmp_path):
    config, params, _ = loaded(case)
    hf.save(tmp_path, config, params)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / case))
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor)
    written, read = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, GOLDEN / case))
    for name in ("architectures", "model_type", "image_token_id", "scale_factor"):
        assert written[name] == read[name]
    assert written["vision_config"].items() <= read["vision_config"].items()
    again, _ = hf.load(tmp_path)
    assert again == config


def test_stacked_layers_are_read_into_their_places():
    _config, params, _ = loaded(CASES[0])
    stacked, read = hf.load(GOLDEN / CASES[0], scan_layers=True)
    for ours, theirs in zip(
        jax.tree.leaves(models.unstack_layers(stacked, read)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def damaged(tmp_path, change, tensor=None):
    folder = GOLDEN / CASES[0]
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config)
    if tensor is not None:
        tensors[tensor] = tensors[tensor][..., :2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(held, tmp_path / "model.safetensors")
    return tmp_path


BAD = {
    "no text": (lambda c: c.pop("text_config"), "text_config"),
    "another decoder": (lambda c: c["text_config"].update(model_type="qwen2"), "only 'llama'"),
    "gray": (lambda c: c["vision_config"].update(num_channels=1), "num_channels"),
    "uneven": (lambda c: c.update(scale_factor=3), "PixelShuffle"),
    "no image token": (lambda c: c.pop("image_token_id"), "image_token_id"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_says_something_else_is_refused(case, tmp_path):
    change, message = BAD[case]
    with pytest.raises(UserError, match=message):
        hf.load(damaged(tmp_path, change))


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    name = "model.vision_model.embeddings.patch_embedding.weight"
    with pytest.raises(UserError, match=r"patch_embedding.weight.* has shape"):
        hf.load(damaged(tmp_path, lambda config: None, name))
