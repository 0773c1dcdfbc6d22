"""GGUF files that are written: tensors as llama.cpp's converter makes them, and the same function back."""

import dataclasses
import json
import shutil
import string

import gguf
import jax
import numpy as np
import pytest
from gguf_files import GOLDEN, TOKENS, gguf_tokenizer, write_gguf
from tiers import few
from tokenizers import (
    Regex,
    Tokenizer as Backend,
    decoders,
    models as bpe,
    normalizers,
    pre_tokenizers,
    trainers,
)

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import CHATML, Tokenizer, character_tokenizer, train_bpe
from rlhf_jax.models import adapters, gguf_writing, hf
from rlhf_jax.models.gguf_tokenizer import tokenizer_of
from rlhf_jax.models.gguf_vocabulary import PROBE, metadata_of
from rlhf_jax.models.loading import load_checkpoint
from rlhf_jax.stages import convert
from rlhf_jax.training.loading import load

DENSE = {"vocab_size": 64, "width": 64, "num_layers": 1, "num_heads": 2, "context_length": 64}
SCALE_OF_A_HEAD = {"query_pre_attn_scalar": 16}  # GGUF has no field for another
CHANGES = {"gemma2": SCALE_OF_A_HEAD, "gemma3": SCALE_OF_A_HEAD}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return gguf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dense():
    """Matrices whose rows are whole blocks, but for `narrow`."""
    config = models.dense_config(**DENSE)
    return config, models.init_params(config, jax.random.key(0))


def changed_folder(source, path, **changes):
    shutil.copytree(source, path)
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, **changes}))
    return path


def fields_of(path):
    reader = gguf.GGUFReader(path)
    return {name: (field.types, field.contents()) for name, field in reader.fields.items()}


def kinds_of(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt2"])
def test_a_file_has_the_tensors_and_metadata_of_one_written_by_hand(tmp_path, tokenizer, arch):
    source = changed_folder(GOLDEN / f"hf_{arch}", tmp_path / "hf", **CHANGES.get(arch, {}))
    write_gguf(tmp_path / "expected.gguf", arch, source)
    config, params = hf.load(source)
    gguf_writing.save(tmp_path / "ours.gguf", config, params, tokenizer, outtype="f32")
    ours, expected = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("ours", "expected"))
    tensors = {tensor.name: tensor for tensor in ours.tensors}
    assert tensors.keys() == {tensor.name for tensor in expected.tensors}
    for tensor in expected.tensors:
        np.testing.assert_array_equal(tensors[tensor.name].data, tensor.data, err_msg=tensor.name)
    found = fields_of(tmp_path / "ours.gguf")
    for name, (types, value) in fields_of(tmp_path / "expected.gguf").items():
        if not name.startswith("GGUF."):  # how many tensors and keys there are
            assert found[name] == (types, value), name
    # What llama.cpp asks for besides.
    length = config.blocks[0].attention.head_dim
    for name in ("attention.value_length", "rope.dimension_count") if arch != "gpt2" else ():
        assert found[f"{arch}.{name}"] == ([gguf.GGUFValueType.UINT32], length)
    assert found["tokenizer.chat_template"][1] == CHATML
    assert found["general.file_type"][1] == gguf.LlamaFileType.ALL_F32


@pytest.mark.parametrize(
    "case",
    few(
        [
            "llama",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3",
            "llama3",
            "qwen2_yarn",
            "phi3",
            "olmo2",
            "gpt2",
            "phi3_half",
        ],
        "phi3_half",
    ),
)
def test_a_file_of_float32_is_read_back_as_the_same_function(tmp_path, tokenizer, case):
    """Also a Phi-3 of which positions turn half of a head."""
    changes = CHANGES.get(case, {})
    if case == "phi3_half":
        rope = {"partial_rotary_factor": 0.5, "rope_theta": 1e4, "rope_type": "default"}
        case, changes = "phi3", {"rope_parameters": rope}
    if case == "llama3":
        rope = json.loads((GOLDEN / "hf_llama3" / "config.json").read_text())["rope_parameters"]
        changes = {"rope_parameters": {**rope, "original_max_position_embeddings": 8192}}
    config, params = hf.load(
        changed_folder(GOLDEN / f"hf_{case}", tmp_path / "hf", **changes), scan_layers=True
    )
    models.make_policy(config, params, tokenizer).save(tmp_path / "model.gguf", outtype="f32")
    policy = load(tmp_path / "model.gguf", scan_layers=True)
    expected = models.forward(config, params, TOKENS)
    np.testing.assert_allclose(policy.logits(TOKENS), expected, atol=1e-5)
    assert policy.config == config


# The most that rounding loses, in shares of the largest entry of a block; blocks have scales of 11 bits.
LOST = {
    "f16": 2**-11,
    "bf16": 2**-8,
    "q8_0": 1 / 254 + 2**-11,
    "q4_0": 1 / 8 + 2**-11,
    "q4_1": 2 / 30 + 2**-9,
}


@pytest.mark.parametrize("outtype", LOST)
def test_matrices_lose_what_the_format_does_and_vectors_nothing(tmp_path, tokenizer, dense, outtype):
    config, params = dense
    params = {**params, "final_norm": {"scale": params["final_norm"]["scale"] + 1 / 3}}
    gguf_writing.save(tmp_path / "model.gguf", config, params, tokenizer, outtype=outtype)
    _, read, _ = load_checkpoint(tmp_path / "model.gguf", scan_layers=False)
    np.testing.assert_array_equal(read["final_norm"]["scale"], params["final_norm"]["scale"])
    for name in ("up", "gate", "down"):
        kernel, exact = (np.asarray(p["layer_0"]["feed_forward"][name]["kernel"]).T for p in (read, params))
        blocks = np.abs(exact).reshape(-1, 32).max(1, keepdims=True)
        error = np.abs(kernel - exact).reshape(-1, 32)
        assert error.max() > 0, name
        assert (error <= LOST[outtype] * blocks).all(), name
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    assert kinds["blk.0.ffn_up.weight"] == outtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if outtype.startswith("q") else outtype.upper())


def test_matrices_that_are_no_whole_blocks_are_f16(tmp_path, tokenizer):
    source = GOLDEN / "hf_qwen3"  # 48 columns in `down`
    config, params = hf.load(source)
    gguf_writing.save(tmp_path / "model.gguf", config, params, tokenizer, outtype="q8_0")
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


# Tokenizers ------------------------------------------------------------------------------------------

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(kind):
    """A tokenizer as those of the models are, learnt from a text in which all of them differ."""
    backend = Backend(bpe.BPE(ignore_merges=kind == "llama-bpe"))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))]
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if kind in ("llama-bpe", "qwen2"):
        pattern = WORDS % ("{1,3}" if kind == "llama-bpe" else "")
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([PROBE] * 4, trainer)
    return Tokenizer(backend, {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_way_of_cutting_texts_gets_its_name(kind):
    tokenizer = byte_level(kind)
    metadata = metadata_of(tokenizer, 640, "x.gguf")
    assert metadata["ggml.pre"] == kind
    back = tokenizer_of(metadata, "x.gguf")
    text = "It's 2026: 12 naïve cafés,\n\n  x = 3141 🚀 " + "السلام ٣٤"
    assert back.encode(text) == tokenizer.encode(text)
    assert (back.eos_id, back.bos_id, back.chat_template) == (tokenizer.eos_id, tokenizer.bos_id, CHATML)
    assert metadata["ggml.token_type"][:4] == [3, 3, 3, 1]
    assert metadata["ggml.token_type"][tokenizer.vocab_size :] == [5] * (640 - tokenizer.vocab_size)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_goes_out_and_comes_back(prefix):
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcder",
        "ab",
        "▁ab",
        "abc",
    ]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "ab"), ("ab", "c")]
    backend = Backend(bpe.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(backend, names, "{{ messages[0]['content'] }}")
    metadata = metadata_of(tokenizer, len(tokens), "x.gguf")
    assert metadata["ggml.model"] == "llama"
    assert metadata["ggml.add_space_prefix"] is prefix
    assert [metadata["ggml.token_type"][index] for index in (3, len(tokens) - 1)] == [6, 1]
    assert tokenizer_of(metadata, "x.gguf").encode("abc ab 🚀bad") == tokenizer.encode("abc ab 🚀bad")


def test_what_opens_a_text_is_kept(tokenizer):
    assert metadata_of(tokenizer, 64, "x.gguf")["ggml.add_bos_token"] is False
    described = metadata_of(byte_level("gpt-2"), 600, "x.gguf")
    opening = tokenizer_of({**described, "ggml.add_bos_token": True}, "x.gguf")
    assert metadata_of(opening, 600, "x.gguf")["ggml.add_bos_token"] is True


def test_a_tokenizer_of_ours_goes_out_under_the_name_of_one_that_cuts_alike():
    tokenizer = train_bpe([PROBE, "the cat's hat 12 34", "the rat"] * 4, 420)
    back = tokenizer_of(metadata_of(tokenizer, 420, "x.gguf"), "x.gguf")
    text = "The cat's  hat,\n\n 1234 the\trat's🚀"
    assert back.encode(text) == tokenizer.encode(text)
    assert back.pad_id == tokenizer.pad_id


def test_tokenizers_that_gguf_has_no_name_for_are_refused():
    with pytest.raises(UserError, match="of the kind WordLevel, only for BPE"):
        metadata_of(character_tokenizer(string.digits), 64, "x.gguf")
    tokenizer = byte_level("gpt-2")
    tokenizer.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="in none of the ways that GGUF has a name for"):
        metadata_of(tokenizer, 600, "x.gguf")


# What cannot be written --------------------------------------------------------------------------------


def test_models_that_gguf_has_no_place_for_are_refused_and_nothing_is_written(tmp_path, tokenizer, dense):
    config, params = dense
    path = tmp_path / "model.gguf"

    def refused(config, params, reason, **options):
        with pytest.raises(UserError, match=reason):
            gguf_writing.save(path, config, params, tokenizer, **options)
        assert not list(tmp_path.iterdir())

    prefix = adapters.init_adapter(adapters.PrefixTuning(2), params, jax.random.key(0))
    refused(config, prefix, "has an adapter.*nor a GGUF file")
    refused(*hf.load(GOLDEN / "hf_mixtral"), "MixtralForCausalLM has parts that no GGUF file of llama, qwen2")
    refused(*hf.load(GOLDEN / "hf_gemma2"), r"attention.scale=0.2\d* \(a reader would take 0.25\)")
    refused(*hf.load(GOLDEN / "hf_llama_linear"), r"feed_forward.bias=True \(a reader would take False\)")
    refused(config, params, "outtype='q5' is unknown: choose one of f32, f16", outtype="q5")
    few = {**params, "embedding": params["embedding"][:32]}
    refused(dataclasses.replace(config, vocab_size=32), few, "has 64 tokens and the model 32")
    huge = {**params, "embedding": params["embedding"].at[3, 3].set(1e5)}
    refused(config, huge, r"`token_embd.weight` holds numbers that F16 cannot \(1e\+05\)")


def test_an_older_file_stays_where_writing_fails(tmp_path, tokenizer, dense):
    config, params = dense
    path = tmp_path / "model.gguf"
    gguf_writing.save(path, config, params, tokenizer)
    before = path.read_bytes()
    huge = {**params, "unembedding": params["embedding"] * 1e9}
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    with pytest.raises(UserError, match="F16 cannot"):
        gguf_writing.save(path, untied, huge, tokenizer)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["model.gguf"]


def test_an_outtype_is_of_files_that_end_in_gguf(tmp_path, tokenizer, dense):
    with pytest.raises(UserError, match=r"outtype='q8_0' is of GGUF files: give a path that ends in \.gguf"):
        models.make_policy(*dense, tokenizer).save(tmp_path / "folder", outtype="q8_0")


def test_convert_goes_from_gguf_to_a_run_and_to_gguf(tmp_path):
    write_gguf(tmp_path / "source.gguf", "llama", GOLDEN / "hf_llama")
    convert.run(convert.Options(tmp_path / "source.gguf", tmp_path / "run"))
    convert.run(convert.Options(tmp_path / "run", tmp_path / "back.gguf", outtype="f32"))
    source, back = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("source", "back")
    )
    assert source.keys() == back.keys()
    for name, data in source.items():
        np.testing.assert_array_equal(back[name], data, err_msg=name)
    for options, reason in (
        ({"out": tmp_path / "folder", "outtype": "f16"}, "--outtype is for GGUF files"),
        ({"out": tmp_path / "x.gguf", "dtype": "float32"}, "--outtype says what"),
        ({"out": tmp_path / "x.gguf", "adapter": True}, "holds a whole model"),
    ):
        with pytest.raises(UserError, match=reason):
            convert.run(convert.Options(tmp_path / "run", **options))
