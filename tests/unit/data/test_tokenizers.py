import json

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.templates import CHATML
from rlhf_jax.data.tokenizers import (
    SPECIAL_TOKENS,
    byte_tokenizer,
    character_tokenizer,
    load_tokenizer,
    train_bpe,
)

TEXTS = ["the cat sat on the mat, the cat sat", "12 + 34 = 46 and 12 + 12 = 24", "naïve café — 日本語"] * 3
BYTES = byte_tokenizer()
BPE = train_bpe(TEXTS, 320)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
tricky = st.sampled_from([*SPECIAL_TOKENS, "<|im_", "<", " ", "\n", "é", "the ", "12"])
tricky_text = st.lists(tricky).map("".join)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@settings(max_examples=150, deadline=None)
@given(text=any_text | tricky_text)
def test_any_text_round_trips_and_holds_no_special_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_tokens.values())


@settings(max_examples=50, deadline=None)
@given(st.text("0123456789+- =\n#", max_size=40))
def test_characters_round_trip(text):
    tokenizer = character_tokenizer("0123456789+- =\n#", ["####"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_character_ids_are_in_the_order_given():
    tokenizer = character_tokenizer("ab", ["abab"])
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 2, 6)
    assert tokenizer.encode("ab") == [3, 4]
    assert tokenizer.encode("aabab") == [3, 5]
    assert tokenizer.encode("a<|im_end|>b", special=True) == [3, 2, 4]


def test_every_character_is_one_token_but_words():
    tokenizer = character_tokenizer("user#", ["####", "user"])
    assert [tokenizer.token(index) for index in tokenizer.encode("users####ru#")] == [
        *("user", "s", "####", "r", "u", "#")
    ]


def test_a_foreign_character_is_named():
    with pytest.raises(UserError, match=r"character 'z' \(at 2 of the text\).*alphabet"):
        character_tokenizer("ab").encode("abz")


@pytest.mark.parametrize(
    ("alphabet", "words", "message"),
    [("aa", (), "'a' stands twice"), ("ab", ("a",), "stands twice"), ("ab", ("c",), "'c' is shorter")],
)
def test_bad_alphabets(alphabet, words, message):
    with pytest.raises(UserError, match=message):
        character_tokenizer(alphabet, words)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_lone_surrogate(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate.*at character 1"):
        tokenizer.encode("a\ud800")


def test_bytes_are_the_tokens_of_bytes():
    assert BYTES.vocab_size == 259
    assert len(BYTES.encode("日本")) == 6
    assert len(set(BYTES.encode("".join(map(chr, range(128)))))) == 128


def test_bpe_learns_pieces_keeps_digits_single_and_is_deterministic():
    assert len(BPE.encode("the cat sat")) < len("the cat sat") / 2
    assert [BPE.token(index) for index in BPE.encode("1234")] == list("1234")
    assert not [token for token in BPE.backend.get_vocab() if len(token) > 1 and any(map(str.isdigit, token))]
    assert train_bpe(TEXTS, 320).backend.to_str() == BPE.backend.to_str()
    assert train_bpe(iter(TEXTS), 320).vocab_size == BPE.vocab_size <= 320


@settings(max_examples=150, deadline=None)
@given(left=any_text | tricky_text, right=any_text | tricky_text)
def test_bpe_cut_after_a_newline(left, right):
    assert BPE.encode(left + "\n" + right) == BPE.encode(left + "\n") + BPE.encode(right)


def test_bpe_must_hold_the_bytes():
    with pytest.raises(UserError, match="vocab_size 258 cannot hold the 259"):
        train_bpe(TEXTS, 258)


def test_special_tokens_appear_only_when_asked_for():
    ids = BPE.encode("a<|im_end|>", special=True)
    assert ids[-1] == BPE.eos_id
    assert BPE.decode(ids) == "a"
    assert BPE.decode(ids, skip_special=False) == "a<|im_end|>"


def test_starts_are_indices_of_characters():
    text = "the é cat"
    ids, starts = BPE.encode_with_starts(text)
    assert len(ids) == len(starts)
    assert starts == sorted(starts)
    assert set(starts) <= set(range(len(text)))


def test_token_and_table():
    ids = BPE.encode("the <|im_end|>", special=True)
    table = BPE.table(ids, [False] * (len(ids) - 1) + [True]).splitlines()
    assert len(table) == len(ids)
    assert table[-1].split() == [str(len(ids) - 1), str(BPE.eos_id), "*", "<|im_end|>"]
    assert table[0].split() == ["0", str(ids[0]), BPE.token(ids[0])]
    assert "(no such token)" in BPE.table([10**6])
    with pytest.raises(UserError, match="no token 1000000 in a vocabulary"):
        BPE.token(10**6)


CHARACTERS = character_tokenizer("abc 12\n", ["user", "assistant"])


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, CHARACTERS], ids=["bytes", "bpe", "characters"])
def test_save_and_load(tokenizer, tmp_path):
    text = "ab 12\n<|im_end|>"
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode(text, special=True) == tokenizer.encode(text, special=True)
        facts = [
            (t.vocab_size, t.pad_id, t.eos_id, t.bos_id, t.chat_template, t.special_tokens, t.names)
            for t in (loaded, tokenizer)
        ]
        assert facts[0] == facts[1]


def write_config(folder, **config):
    BYTES.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_config_with_objects_a_list_of_templates_and_other_names(tmp_path):
    write_config(
        tmp_path,
        eos_token={"content": "<|pad|>", "special": True},
        bos_token="<|im_start|>",
        chat_template=[
            {"name": "tool_use", "template": "x"},
            {
                "name": "default",
                "template": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
            },
        ],
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template.startswith("{{ bos_token }}")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
    assert tokenizer.pad_id == tokenizer.eos_id


def test_the_end_of_turn_is_what_the_template_writes_after_an_answer(tmp_path):
    template = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    write_config(tmp_path, eos_token="<|pad|>", chat_template=template)
    assert load_tokenizer(tmp_path).eos_id == 2


def test_a_template_file_overrides_and_none_means_chatml(tmp_path):
    write_config(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHATML
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"


def test_a_broken_template_does_not_keep_a_tokenizer_from_loading(tmp_path):
    write_config(tmp_path, eos_token="<|im_end|>", chat_template="{{")
    assert load_tokenizer(tmp_path).eos_id == 2


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    for config, message in (("{", "not JSON"), ("[]", "not a JSON object")):
        BYTES.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
    write_config(tmp_path, eos_token="</s>")
    with pytest.raises(UserError, match="names no eos_token"):
        load_tokenizer(tmp_path)
