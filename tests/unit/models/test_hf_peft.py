"""Adapters of PEFT in and out: what PEFT's models compute with them, tensors that come back to the bit."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.models import adapters, hf
from rlhf_jax.models.hf import peft

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
CASES = {"lora": adapters.LoRA, "rslora": adapters.LoRA, "dora": adapters.DoRA}


@pytest.fixture(scope="module")
def base():
    return hf.load(GOLDEN / "hf_llama")


def logits(config, params, tokens):
    return np.asarray(jax.jit(models.forward, static_argnums=0)(config, params, tokens))


@pytest.mark.parametrize("case", few(CASES, "dora"))
def test_logits_are_those_of_peft_and_the_folder_comes_back(case, base, tmp_path):
    config, params = base
    folder = GOLDEN / f"peft_{case}"
    adapter, adapted = peft.load(folder, config, params)
    assert type(adapter) is CASES[case]
    expected = np.load(folder / "expected.npz")
    for tree in (adapted, adapters.merge_adapter(adapted)):
        np.testing.assert_allclose(logits(config, tree, expected["tokens"]), expected["logits"], atol=1e-4)
    scanned = dataclasses.replace(config, scan_layers=True)
    peft.save(
        tmp_path, scanned, models.stack_layers(config, adapted), rank_stabilized=adapter.rank_stabilized
    )
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    held = json.loads((folder / "adapter_config.json").read_text())
    for name, value in json.loads((tmp_path / "adapter_config.json").read_text()).items():
        if name == "target_modules":
            assert set(value) == set(held[name])
        elif name != "base_model_name_or_path":
            assert value == pytest.approx(held[name]) if name == "lora_alpha" else value == held[name], name


@pytest.mark.parametrize(
    "kind", few([adapters.PiSSA(3), adapters.AdaLoRA(4, 2)], adapters.PiSSA(3)), ids=["pissa", "adalora"]
)
@pytest.mark.slow
def test_others_become_plain_lora_of_the_same_function(kind, base, tmp_path):
    """Checked against PEFT where PEFT_CHECK names a folder for tools/goldens/make_goldens_peft.py."""
    config, params = base
    adapted = adapters.init_adapter(kind, params, jax.random.key(0))
    names = ("lora_a", "lora_b", "lora_singular")
    adapted = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.2 if path[-1].key in names else x, adapted
    )
    folder = Path(os.environ.get("PEFT_CHECK", tmp_path)) / type(kind).__name__
    peft.save(folder, config, adapted)
    read, again = peft.load(folder, config, params)
    assert read.rank == (6 if isinstance(kind, adapters.PiSSA) else 4)
    tokens = np.arange(16).reshape(2, 8)
    expected = logits(config, adapted, tokens)
    assert np.abs(expected - logits(config, params, tokens)).max() > 1e-2
    np.testing.assert_allclose(logits(config, again, tokens), expected, atol=2e-4)
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=expected)


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is 'IA3', and only 'LORA' is supported"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` is 'pissa'"),
        ({"init_lora_weights": "loftq"}, "`init_lora_weights` is 'loftq'"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` is True"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "`layer_replication` is"),
        ({"lora_bias": True}, "`lora_bias` is True"),
        ({"rank_pattern": {"q_proj": 3}}, "`rank_pattern` is"),
        ({"r": "4"}, "is no number"),
        ({"r": 3}, r"has shape \[4, 32\], and the base asks for \[3, 32\]"),
    ],
)
def test_what_is_not_supported_is_named(fields, message, base, tmp_path):
    folder = shutil.copytree(GOLDEN / "peft_lora", tmp_path / "adapter")
    change(folder, **fields)
    with pytest.raises(UserError, match=message) as refused:
        peft.load(folder, *base)
    assert "\n" not in str(refused.value)


def test_mistakes_are_sentences(base, tmp_path):
    config, params = base
    other = models.dense_config(vocab_size=64, width=32, num_layers=1, num_heads=4, num_kv_heads=2)
    small = models.init_params(other, jax.random.key(0))
    with pytest.raises(UserError, match="has no place in the base"):
        peft.load(GOLDEN / "peft_lora", other, small)
    with pytest.raises(UserError, match="there is no low-rank adapter to write"):
        peft.save(tmp_path, config, params)
    adapted = adapters.init_adapter(adapters.LoRA(2), params, jax.random.key(0))
    with pytest.raises(UserError, match="has an adapter, for which no Hugging Face model has a place"):
        hf.save(tmp_path, config, adapted)
    phi_config, phi = hf.load(GOLDEN / "hf_phi3")
    fused = adapters.init_adapter(adapters.LoRA(2), phi, jax.random.key(0))
    with pytest.raises(UserError, match="is a part of a larger tensor"):
        peft.save(tmp_path, phi_config, fused)
