"""GGUF files of the random checkpoints, tensor by tensor as llama.cpp's converter writes them."""

import json
import pathlib
import string

import gguf
import numpy as np
from safetensors.numpy import load_file

from rlhf_jax.models.loading import load_checkpoint

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
TOKENS = np.array([[3, 14, 15, 9, 2, 6, 5, 35]])

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


PHI3 = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
OLMO2 = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GPT2 = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT2_NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
OTHERS = {"gemma2": GEMMA, "gemma3": GEMMA, "phi3": PHI3, "olmo2": OLMO2, "gpt2": GPT2}


def gguf_name(arch, name):
    if name in NAMES | GPT2_NAMES:
        return (NAMES | GPT2_NAMES)[name]
    _, _, layer, *middle, kind = name.split(".")
    table = LAYER | OTHERS.get(arch, {})
    return f"blk.{layer}.{table['.'.join(middle)]}.{kind}"


def interleaved(tensor, heads):
    """What llama.cpp's converter makes of a Llama's queries and keys, row by row."""
    rows = tensor.reshape(heads, -1, *tensor.shape[1:])
    half = rows.shape[1] // 2
    order = [place for pair in range(half) for place in (pair, pair + half)]
    return rows[:, order].reshape(tensor.shape)


def write_gguf(path, arch, source, *, quantize=None):
    """A GGUF file of a Hugging Face folder, as its format says."""
    data = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    if arch == "gpt2":
        return write_gpt2(writer, data, load_file(source / "model.safetensors"))
    heads = data["num_attention_heads"]
    kv_heads = data.get("num_key_value_heads") or heads
    writer.add_block_count(data["num_hidden_layers"])
    writer.add_context_length(data["max_position_embeddings"])
    writer.add_embedding_length(data["hidden_size"])
    writer.add_feed_forward_length(data["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(data["rms_norm_eps"])
    rope = data.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope.get("rope_theta") or data["rope_theta"])
    writer.add_key_length(data.get("head_dim") or data["hidden_size"] // heads)
    if rope.get("partial_rotary_factor", 1) != 1:
        writer.add_rope_dimension_count(round(rope["partial_rotary_factor"] * data["hidden_size"] / heads))
    if arch.startswith("gemma"):
        writer.add_sliding_window(data["sliding_window"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if data.get(field):
            getattr(writer, f"add_{field}")(data[field])
    add_vocabulary(writer, data["vocab_size"])
    for name, tensor in load_file(source / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if arch == "llama" and ".q_proj." in name:
            tensor = interleaved(tensor, heads)
        if arch == "llama" and ".k_proj." in name:
            tensor = interleaved(tensor, kv_heads)
        if arch.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        if quantize is None or tensor.ndim == 1 or tensor.shape[-1] % 32:  # blocks are of 32
            writer.add_tensor(gguf_name(arch, name), tensor)
        else:
            kind = gguf.GGMLQuantizationType[quantize]
            writer.add_tensor(gguf_name(arch, name), gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gpt2(writer, data, tensors):
    """That of a GPT-2, whose matrices llama.cpp's converter transposes."""
    writer.add_block_count(data["n_layer"])
    writer.add_context_length(data["n_positions"])
    writer.add_embedding_length(data["n_embd"])
    writer.add_feed_forward_length(data["n_inner"] or 4 * data["n_embd"])
    writer.add_head_count(data["n_head"])
    writer.add_layer_norm_eps(data["layer_norm_epsilon"])
    add_vocabulary(writer, data["vocab_size"])
    for name, tensor in tensors.items():
        matrix = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        writer.add_tensor(gguf_name("gpt2", name), np.ascontiguousarray(tensor.T if matrix else tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tokenizer(folder):
    """That of a GGUF file with 64 tokens."""
    write_gguf(folder / "model.gguf", "llama", GOLDEN / "hf_llama")
    return load_checkpoint(folder / "model.gguf")[2]


def add_vocabulary(writer, size):
    """A vocabulary of letters and the space as GPT-2 writes it, filled up to `size`, with one merge."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *string.ascii_lowercase, "Ġ", "ab"]
    tokens += [f"[unused{number}]" for number in range(size - len(tokens))]
    types = [3, 3, 3, *(1 for _ in tokens[3:])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
