"""The tools that convert and inspect models, as functions."""

import dataclasses
import pathlib
import shutil
import string

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.optimizers import OPTIMIZERS
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.data.tokenizers import character_tokenizer, load_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.models.positions import Llama3Scaling, Rope, YarnScaling, ntk_theta, rotary_frequencies
from rlhf_jax.stages import convert, inspect

ROOT = pathlib.Path(__file__).resolve().parents[3]
LLAMA = ROOT / "tests" / "golden" / "hf_llama"


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer that fits its vocabulary of 64."""
    shutil.copytree(LLAMA, tmp_path / "llama")
    character_tokenizer(string.digits + string.ascii_lowercase).save(tmp_path / "llama")
    return tmp_path / "llama"


def test_convert_there_and_back(folder, tmp_path):
    convert.to_run(convert.Options(folder, tmp_path / "run"))
    convert.to_hugging_face(convert.Options(tmp_path / "run", tmp_path / "back"))
    original = load_file(folder / "model.safetensors")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert original.keys() == again.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(again[name], tensor)
    assert hf.load_config(tmp_path / "back") == hf.load_config(folder)
    ids = load_tokenizer(folder).encode("abc")
    assert load_tokenizer(tmp_path / "back").encode("abc") == ids


def test_convert_refuses_a_tokenizer_of_another_model(folder, tmp_path):
    character_tokenizer(string.printable).save(folder)
    with pytest.raises(UserError, match="not of one model"):
        convert.to_run(convert.Options(folder, tmp_path / "run"))


@pytest.mark.slow
def test_inspected_activations_shrink_with_remat_and_grow_with_rows(folder):
    config = inspect.read_config(inspect.Options(folder))
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    sizes = {
        remat: inspect.activation_bytes(dataclasses.replace(config, remat=remat), params, 2, 16)
        for remat in ("none", "dots", "attention", "full")
    }
    assert sizes["none"] > sizes["dots"] > sizes["attention"] > sizes["full"] > 0
    twice = inspect.activation_bytes(dataclasses.replace(config, remat="full"), params, 4, 16)
    assert twice == 2 * sizes["full"]


def test_inspected_memory_of_optimizers_and_adapters(folder):
    """Against sums by hand: 2 bytes a number, 4 a moment, of which AdamW has two, Lion and SGD one."""
    config = inspect.read_config(inspect.Options(folder))
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizers = {name: make_optimizer(OptimizerConfig(optimizer=name)) for name in OPTIMIZERS}
    state = {name: inspect.fixed_bytes(params, params, tx)[2] for name, tx in optimizers.items()}
    assert inspect.fixed_bytes(params, params, optimizers["sgd"])[:2] == (2 * numbers, 2 * numbers)
    assert 0 <= state["sgd"] - 4 * numbers < 64  # beside step counters
    assert 0 <= state["adamw"] - 8 * numbers < 64
    assert 0 <= state["lion"] - 4 * numbers < 64
    assert state["adafactor"] < state["muon"] < state["adamw"]
    factors = inspect.lora_params(params, 3)
    # Two layers of query and output (32 -> 32), key and value (32 -> 16), gate, up and down (32 and 48).
    sides = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    assert sum(leaf.size for leaf in factors.values()) == 2 * 3 * sides
    whole, trained, _ = inspect.fixed_bytes(params, factors, optimizers["sgd"])
    assert whole == 2 * numbers + trained


def test_stretched_rotations():
    """Each way keeps the fastest pair and slows the slowest by the factor."""
    plain = rotary_frequencies(Rope(), 64)
    np.testing.assert_allclose(plain, [10_000 ** (-i / 32) for i in range(32)], rtol=1e-6)
    for rope in (
        Rope(ntk_theta(10_000.0, factor=8, head_dim=64)),
        Rope(scaling=Llama3Scaling(8.0, 1.0, 4.0, 2048)),
        Rope(scaling=YarnScaling(8.0, 2048)),
    ):
        ratio = plain / rotary_frequencies(rope, 64)
        np.testing.assert_allclose([ratio[0], ratio[-1]], [1, 8], rtol=1e-5)
        assert np.all(np.diff(ratio) >= -1e-5)
