"""Published configurations, in shapes only: as many parameters as their makers' files hold."""

import dataclasses
import functools
import json
import math

import jax
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.models import hf

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _fields(architecture, vocab, width, hidden, layers, heads, kv_heads, **more):
    return {
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        **more,
    }


DEEPSEEK = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "tie_word_embeddings": False,
}
PRESETS = {
    "llama 3.1 8b": (
        _fields("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, rope_scaling=LLAMA3),
        8_030_261_248,
    ),
    "qwen 2.5 0.5b": (
        _fields("Qwen2ForCausalLM", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
    ),
    "qwen 3 0.6b": (
        _fields("Qwen3ForCausalLM", 151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "qwen 3 30b a3b": (
        _fields(
            "Qwen3MoeForCausalLM",
            151936,
            2048,
            6144,
            48,
            32,
            4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        ),
        30_532_122_624,
    ),
    "mistral 7b": (
        _fields("MistralForCausalLM", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096),
        7_241_732_096,
    ),
    "mixtral 8x7b": (
        _fields(
            "MixtralForCausalLM", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8, num_experts_per_tok=2
        ),
        46_702_792_704,
    ),
    "gemma 2 2b": (
        _fields(
            "Gemma2ForCausalLM",
            256000,
            2304,
            9216,
            26,
            8,
            4,
            head_dim=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        2_614_341_888,
    ),
    "gemma 3 1b": (
        _fields("Gemma3ForCausalLM", 262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512),
        999_885_952,
    ),
    "phi 3 mini": (
        _fields("Phi3ForCausalLM", 32064, 3072, 8192, 32, 32, 32, sliding_window=2047),
        3_821_079_552,
    ),
    "gpt 2": (
        {
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_ctx": 1024,
            "n_positions": 1024,
        },
        124_439_808,
    ),
    "bloom 560m": (
        {
            "architectures": ["BloomForCausalLM"],
            "vocab_size": 250880,
            "n_embed": 1024,
            "n_layer": 24,
            "num_attention_heads": 16,
        },
        559_214_592,
    ),
    "deepseek v2 lite": (
        _fields(
            "DeepseekV2ForCausalLM",
            102400,
            2048,
            10944,
            27,
            16,
            16,
            **{**DEEPSEEK, "q_lora_rank": None},
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            topk_method="greedy",
        ),
        15_706_484_224,
    ),
    "deepseek v3": (
        _fields(
            "DeepseekV3ForCausalLM",
            129280,
            7168,
            18432,
            61,
            128,
            128,
            **{**DEEPSEEK, "q_lora_rank": 1536},
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
        ),
        671_026_419_200,
    ),
}


@pytest.mark.parametrize("name", few(PRESETS, "llama 3.1 8b", "gemma 3 1b", "bloom 560m", "deepseek v3"))
def test_parameter_count(name, tmp_path):
    fields, count = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = dataclasses.replace(hf.load_config(tmp_path), scan_layers=True)
    shapes = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_patterns_are_found(tmp_path):
    fields, _ = PRESETS["gemma 3 1b"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = hf.load_config(tmp_path)
    windows = [block.attention.window for block in config.blocks]
    assert windows == [None if (index + 1) % 6 == 0 else 512 for index in range(26)]
    assert (len(config.prefix), len(config.pattern), config.num_repeats) == (2, 6, 4)
    thetas = {block.attention.position.theta for block in config.blocks if block.attention.window is None}
    assert thetas == {1_000_000.0}
