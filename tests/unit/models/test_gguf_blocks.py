"""Kernels in the blocks of a GGUF file: to the bit what the file says, under adapters and through runs."""

import shutil

import gguf
import jax
import numpy as np
import pytest
from gguf_files import GOLDEN, gguf_tokenizer
from tiers import few

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.models import adapters, gguf_blocks, gguf_writing, hf
from rlhf_jax.models.gguf_blocks import blocks_of, keep_blocks
from rlhf_jax.models.loading import load_checkpoint
from rlhf_jax.training.loading import load

KINDS = ("q8_0", "q4_0", "q4_1")
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return gguf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def files(tokenizer, tmp_path_factory):
    """A decoder in each kind, by the path of the file."""
    folder = tmp_path_factory.mktemp("files")
    config = models.dense_config(
        vocab_size=64, width=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128
    )
    params = models.init_params(config, jax.random.key(0))
    for kind in (*KINDS, "f16"):
        gguf_writing.save(folder / f"{kind}.gguf", config, params, tokenizer, outtype=kind)
    return folder


def as_matrix(blocks):
    """The values of a matrix in blocks."""
    times = blocks.values.shape[1] // blocks.scale.shape[1]
    wide = [np.repeat(part, times, axis=1) for part in (blocks.scale, blocks.offset) if part is not None]
    return blocks.values.astype(np.float32) * wide[0] + (wide[1] if len(wide) > 1 else 0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_are_what_llama_cpp_s_package_makes_of_them(kind):
    matrix = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    matrix[0] = 0
    matrix[1, :32] = 3  # one value: no spread
    of_kind = gguf.GGMLQuantizationType[kind]
    stored = gguf.quantize(matrix, of_kind)
    blocks = blocks_of(kind, stored)
    found = as_matrix(blocks)
    exact = gguf.dequantize(stored, of_kind)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6 if blocks.offset is not None else 0)
    assert np.abs(found - matrix).max() > 1e-4
    assert blocks_of("Q2_K", stored) is None


# Places of the numbers that many blocks share, as float16.
SHARED = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", SHARED)
def test_blocks_of_k_are_what_llama_cpp_s_package_makes_of_them(kind):
    """The package cannot write these: every byte that is no number is a possible one."""
    rng = np.random.default_rng(0)
    of_kind = gguf.GGMLQuantizationType[kind]
    length, size = gguf.GGML_QUANT_SIZES[of_kind]
    stored = rng.integers(0, 256, (6, 3, size), dtype=np.uint8)
    for place in SHARED[kind]:
        numbers = rng.normal(size=(6, 3, 1)).astype(np.float16)
        stored[..., place : place + 2] = numbers.view(np.uint8).reshape(6, 3, 2)
    stored = stored.reshape(6, 3 * size)
    blocks = blocks_of(kind, stored)
    assert blocks.values.shape == (6, 3 * length)
    np.testing.assert_allclose(as_matrix(blocks), gguf.dequantize(stored, of_kind), rtol=2e-6, atol=2e-4)
    assert blocks.values.dtype.name == ("int4" if kind == "Q4_K" else "int8")


def test_a_gpt2_whose_matrices_stand_the_other_way_round(tmp_path, tokenizer):
    config, params = hf.load(GOLDEN / "hf_gpt2", scan_layers=True)
    path = tmp_path / "gpt2.gguf"
    gguf_writing.save(path, config, params, tokenizer, outtype="q8_0")
    _, params, _ = load_checkpoint(path, scan_layers=True)
    held = keep_blocks(params, path)
    assert any(name.endswith("kernel_values") for name in named_leaves(held))
    back = named_leaves(adapters.dequantize(held))
    for name, exact in named_leaves(params).items():
        np.testing.assert_array_equal(back[name], exact, err_msg=name)


@pytest.mark.parametrize("scan", few([False, True], True))
@pytest.mark.parametrize("kind", few(KINDS, "q4_1"))
def test_a_base_in_blocks_computes_what_the_file_says(files, kind, scan):
    path = files / f"{kind}.gguf"
    config, params, _ = load_checkpoint(path, scan_layers=scan)
    held = keep_blocks(params, path)
    kernels = [name for name in named_leaves(params) if name.endswith("/kernel")]
    assert not [name for name in named_leaves(held) if name.endswith("/kernel")]
    back = named_leaves(adapters.dequantize(held))
    for name, exact in named_leaves(params).items():
        atol = 1e-6 if kind == "q4_1" and name in kernels else 0
        np.testing.assert_allclose(back[name], exact, rtol=0, atol=atol, err_msg=name)
    tokens = np.arange(12).reshape(2, 6)
    logits = jax.jit(lambda params: models.forward(config, params, tokens))
    np.testing.assert_allclose(logits(held), logits(params), atol=2e-5)
    bits = {leaf.dtype.name for name, leaf in named_leaves(held).items() if name.endswith("values")}
    assert bits == {"int8" if kind == "q8_0" else "int4"}


def test_layers_of_several_kinds_stay_as_they_are_where_they_are_stacked(files, monkeypatch):
    path = files / "q8_0.gguf"
    _, params, _ = load_checkpoint(path, scan_layers=True)
    _, plain, _ = load_checkpoint(path, scan_layers=False)
    real, seen = gguf_blocks.blocks_of, []

    def all_but_the_first(kind, stored):
        seen.append(kind)
        return real(kind, stored) if len(seen) > 1 else None

    monkeypatch.setattr(gguf_blocks, "blocks_of", all_but_the_first)
    left = []
    for tree in (params, plain):
        seen.clear()
        left.append([name for name in named_leaves(keep_blocks(tree, path)) if name.endswith("/kernel")])
    assert left == [["layers/attention/query/kernel"], ["layer_0/attention/query/kernel"]]


def test_what_has_no_blocks_is_said(files):
    _, params, _ = load_checkpoint(files / "f16.gguf")
    with pytest.raises(UserError, match="no kernel is in Q8_0, Q4_0, Q4_1"):
        keep_blocks(params, files / "f16.gguf")
    with pytest.raises(UserError, match="no GGUF file"):
        keep_blocks(params, GOLDEN / "hf_llama")


@pytest.mark.slow
def test_a_run_trains_an_adapter_on_the_blocks_goes_on_and_comes_back(files, tmp_path):
    path = shutil.copy(files / "q4_1.gguf", tmp_path / "base.gguf")
    words = {"adapter": rj.lora(rank=2, quantize="gguf"), "batch_size": 2, "learning_rate": 1e-2}
    words["optimizer"] = OptimizerConfig(total_steps=4)
    run = rj.sft(rj.load(path), ROWS, steps=4, out=tmp_path / "run", **words)
    rj.sft(rj.load(path), ROWS, steps=2, out=tmp_path / "half", **words)
    again = rj.sft(rj.load(path), ROWS, steps=4, out=tmp_path / "half", resume=True, **words)
    jax.tree.map(np.testing.assert_array_equal, again.policy.params, run.policy.params)
    merged, base = adapters.merge_adapter(run.policy.params), load(path).params
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run").params, merged)
    kernels = [jax.tree.leaves(tree["layer_0"]["feed_forward"]["up"]) for tree in (merged, base)]
    assert np.abs(kernels[0][0] - kernels[1][0]).max() > 1e-4
    with pytest.raises(UserError, match="no GGUF file"):
        rj.sft(load(tmp_path / "run"), ROWS, steps=1, out=tmp_path / "third", **words)
