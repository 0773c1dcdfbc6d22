"""Families against what `transformers` computed with the checkpoint (tools/goldens/make_goldens_hf.py)."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import hf

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
CASES = sorted(folder.name.removeprefix("hf_") for folder in GOLDEN.glob("hf_*"))
DECODED = ("gemma3",)  # windows and whole rows
decoded = few(CASES, *DECODED)


@functools.cache
def _loaded(case):
    with np.load(GOLDEN / f"hf_{case}" / "expected.npz") as expected:
        return *hf.load(GOLDEN / f"hf_{case}"), dict(expected)


@functools.cache
def _forward(config):
    return jax.jit(functools.partial(models.forward, config))


@pytest.mark.parametrize("case", few(CASES, "llama3", "gemma3", "deepseek_v2", "mixtral", "gpt2", "phi3"))
def test_logits_with_left_right_and_no_padding(case):
    config, params, expected = _loaded(case)
    for side in ("none", "left", "right"):
        mask = expected[f"{side}_mask"]
        logits = _forward(config)(params, expected[f"{side}_tokens"], mask=mask)
        np.testing.assert_allclose(logits[mask], expected[f"{side}_logits"][mask], atol=1e-4)


@pytest.mark.parametrize("case", decoded)
def test_cached_generation_is_greedy_and_agrees_with_the_whole_pass(case):
    config, params, expected = _loaded(case)

    @jax.jit
    def sample_and_score(params, tokens, mask):
        prefill, decode = models.make_decode_fns(config)
        greedy = Sampling(temperature=0.0)
        rollout = generate(
            prefill,
            decode,
            params,
            tokens,
            mask,
            jax.random.key(0),
            max_new_tokens=32,
            eos_id=-1,
            pad_id=0,
            sampling=greedy,
        )
        return rollout, models.make_logprob_fn(config)(params, rollout.sequences).logp

    rollout, logp = sample_and_score(params, expected["left_tokens"], expected["left_mask"])
    np.testing.assert_array_equal(rollout.sequences.tokens[:, 12:], expected["greedy"])
    np.testing.assert_allclose(rollout.logp[:, 12:], logp[:, 12:], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_saved_tensors_are_those_that_were_loaded(case, tmp_path):
    config, params, _ = _loaded(case)
    hf.save(tmp_path, config, params)
    saved, original = (
        load_file(tmp_path / "model.safetensors"),
        load_file(GOLDEN / f"hf_{case}" / "model.safetensors"),
    )
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    again = hf.load_config(tmp_path)
    assert dataclasses.replace(again, param_dtype="float32") == config


def test_stacked_layers_and_small_files_round_trip(tmp_path):
    config, params, expected = _loaded("deepseek_v3")
    scanned = dataclasses.replace(config, scan_layers=True)
    stacked = models.stack_layers(config, params)
    logits = _forward(scanned)(stacked, expected["none_tokens"], mask=expected["none_mask"])
    np.testing.assert_allclose(logits, expected["none_logits"], atol=1e-4)
    hf.save(tmp_path, scanned, stacked, shard_bytes=50_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    _, again = hf.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    hf.save(tmp_path, config, params)  # one file takes the place of many
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["config.json", "model.safetensors"]


def test_dtype_is_the_files_or_the_one_asked_for(tmp_path):
    config, params = hf.load(GOLDEN / "hf_deepseek_v3", dtype="bfloat16")
    assert config.param_dtype == config.compute_dtype == "bfloat16"
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(params).items()}
    biases = {name for name in dtypes if name.endswith("router/bias")}
    assert len(biases) == 2
    assert all(dtype == (jnp.float32 if name in biases else jnp.bfloat16) for name, dtype in dtypes.items())
    hf.save(tmp_path, config, params)
    kept, again = hf.load(tmp_path)
    assert kept == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_mesh_places_parameters_on_its_devices():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    config, params = hf.load(GOLDEN / "hf_mixtral", mesh=mesh)
    for name, leaf in named_leaves(params).items():
        assert leaf.sharding.mesh == mesh, name
    jax.tree.map(np.testing.assert_array_equal, params, _loaded("mixtral")[1])
    assert config == _loaded("mixtral")[0]


@pytest.mark.parametrize("case", few(["gemma3", "bloom", "deepseek_v2"], "gemma3"))
def test_packed_rows_equal_separate_ones(case):
    """Windows, distances and experts know nothing of the neighbours in a row."""
    config, params, expected = _loaded(case)
    tokens = expected["none_tokens"]
    packed = jnp.concatenate([tokens[0, :9], tokens[1, :3]])[None]
    positions, segments = jnp.array([[*range(9), *range(3)]]), jnp.array([[1] * 9 + [2] * 3])
    hidden_states = jax.jit(models.hidden_states, static_argnums=0)
    hidden = hidden_states(config, params, packed, positions, segments)
    logits = jax.jit(models.logits, static_argnums=0)(config, params, hidden)[0]
    np.testing.assert_allclose(logits[:9], expected["none_logits"][0, :9], atol=1e-4)
    np.testing.assert_allclose(logits[9:], expected["none_logits"][1, :3], atol=1e-4)


@pytest.mark.parametrize("case", few(["deepseek_v3", "qwen3_moe"], "deepseek_v3"))
@pytest.mark.slow
def test_gradients_reach_router_and_chosen_experts(case):
    config, params, expected = _loaded(case)

    @jax.jit
    def gradient(params):
        forward = functools.partial(models.forward, config, tokens=expected["none_tokens"])
        return jax.grad(lambda p: jnp.mean(jax.nn.logsumexp(forward(p), axis=-1)))(params)

    for name, leaf in named_leaves(gradient(params)).items():
        assert np.isfinite(leaf).all(), name
        assert name.endswith("router/bias") != bool(np.any(leaf != 0)), name
