"""What is wrong with a folder is said in one sentence that names the file and the tensor or field."""

import contextlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.models import hf

LLAMA = pathlib.Path(__file__).resolve().parents[2] / "golden" / "hf_llama"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(LLAMA / name, tmp_path)
    return tmp_path


def _change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _refused(folder, *words, **options):
    with pytest.raises(UserError) as caught:
        hf.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, ("T5ForConditionalGeneration", "not supported")),
        ({"architectures": None}, ("names no architecture",)),
        ({"hidden_size": None}, ("`hidden_size` is missing",)),
        ({"num_hidden_layers": -2}, ("`num_hidden_layers` is -2",)),
        ({"rms_norm_eps": "small"}, ("`rms_norm_eps` is 'small'",)),
        ({"hidden_act": "relu"}, ("`hidden_act` is 'relu'",)),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, ("`rope_scaling` is dynamic",)),
        ({"rope_parameters": {"rope_type": "spiral"}}, ("'spiral'",)),
        ({"quantization_config": {"bits": 4}}, ("quantised",)),
        ({"num_hidden_layers": 3}, ("`model.layers.2.input_layernorm.weight`", "8 more")),
        ({"num_hidden_layers": 1}, ("`model.layers.1.", "no place")),
        ({"intermediate_size": 40}, (".mlp.down_proj.weight`", "[32, 48]", "[32, 40]")),
    ],
)
def test_configs(folder, changes, words):
    _change_config(folder, **changes)
    _refused(folder, *words)


def test_missing_extra_misshapen_and_quantised_tensors(folder):
    _change_tensors(folder, lambda tensors: tensors.pop(QUERY))
    _refused(folder, f"`{QUERY}`", "in none of the safetensors files")
    _change_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros((16, 32), np.float32)}))
    _refused(folder, f"`{QUERY}`", "model.safetensors", "[16, 32]", "[32, 32]")
    _change_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros((32, 32), np.int8)}))
    _refused(folder, f"`{QUERY}` is I8", "model.safetensors")
    extra = {QUERY: np.zeros((32, 32), np.float32), "model.extra": np.zeros(1, np.float32)}
    _change_tensors(folder, lambda tensors: tensors.update(extra))
    _refused(folder, "`model.extra`", "no place")


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    _refused(folder, "model.safetensors", "not a whole safetensors file")


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff", "[" * 100_000])
def test_malformed_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    _refused(folder, "config.json")


def test_index_that_lies(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text("{}")
    _refused(folder, "weight_map")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    _refused(folder, "gone.safetensors", "no such file")
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    _refused(folder, "no such file")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    _refused(folder, "holds no tensor `a`")


def test_missing_files_and_wrong_options(folder):
    with pytest.raises(UserError, match="dtype='int8' is none of"):
        hf.load(folder, dtype="int8")
    (folder / "model.safetensors").unlink()
    _refused(folder, "no model.safetensors")
    (folder / "config.json").unlink()
    _refused(folder, "config.json: no such file")


def test_superfluous_output_matrix_of_tied_embeddings_is_passed_over(tmp_path):
    folder = LLAMA.with_name("hf_qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], hf.load(folder)[1])


def test_an_output_matrix_of_its_own_is_not_dropped(tmp_path):
    folder = LLAMA.with_name("hf_qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(0.01)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    _refused(tmp_path, "`lm_head.weight` is not the embedding", "`tie_word_embeddings`")
    _change_config(tmp_path, tie_word_embeddings=False)
    hf.load(tmp_path)


@pytest.mark.parametrize("window", [0, -1, True, "4", 10**18])
def test_windows_of_no_token(tmp_path, window):
    folder = LLAMA.with_name("hf_mistral")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    _change_config(tmp_path, sliding_window=window)
    _refused(tmp_path, f"`sliding_window` is {window!r}")


def _whole_numbers(data, way=()):
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _whole_numbers(value, (*way, name))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*way, name)


FOLDERS = sorted(path for path in LLAMA.parent.glob("hf_*") if (path / "model.safetensors").exists())


@pytest.mark.parametrize("source", FOLDERS, ids=lambda path: path.name)
def test_numbers_that_no_model_has_are_one_sentence_or_without_effect(source, tmp_path):
    shutil.copy(source / "model.safetensors", tmp_path)
    config = json.loads((source / "config.json").read_text())
    for *groups, name in _whole_numbers(config):
        changed = json.loads(json.dumps(config))
        inner = changed
        for group in groups:
            inner = inner[group]
        inner[name] = 10**18
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with contextlib.suppress(UserError):
            hf.load(tmp_path)


def test_the_older_scaling_wins_where_both_are_written(folder):
    _change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    plain = hf.load(folder)[0]
    _change_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    scaled = hf.load(folder)[0]
    _change_config(
        folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, rope_scaling=None
    )
    assert scaled == hf.load(folder)[0]
    assert scaled != plain


def test_names_without_the_optional_prefix(tmp_path):
    folder = LLAMA.with_name("hf_gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(bare, tmp_path / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], hf.load(folder)[1])


def test_models_that_no_family_has_are_not_saved(tmp_path):
    block = models.Block(models.Attention(2, 2, 8, None), models.GatedFeedForward(16))
    config = models.ModelConfig(11, 16, 1, (block,))
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    with pytest.raises(UserError, match="no supported Hugging Face family"):
        hf.save(tmp_path / "out", config, params)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config, params = hf.load(LLAMA)
    with pytest.raises(UserError, match="cannot be written"):
        hf.save(tmp_path / "file" / "out", config, params)


def test_fresh_dense_models_go_out_as_llamas(tmp_path):
    config = models.dense_config(vocab_size=11, width=16, num_layers=2, num_heads=2, num_kv_heads=1)
    params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
    hf.save(tmp_path, config, params)
    loaded, again = hf.load(tmp_path)
    assert loaded.architecture == "LlamaForCausalLM"
    jax.tree.map(np.testing.assert_array_equal, again, params)
