import json

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import byte_tokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save(tmp_path)
    return tmp_path


def change(folder, name, edit):
    data = json.loads((folder / name).read_text())
    edit(data)
    (folder / name).write_text(json.dumps(data))


def vocabulary(token, index):
    return lambda data: data["model"]["vocab"].update({token: index})


def added(**fields):
    return lambda data: data["added_tokens"].append({**data["added_tokens"][0], **fields})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (vocabulary("\ud800", 259), r"'\\ud800' holds a lone surrogate"),
        (added(content="\ud800", id=259), r"'\\ud800' holds a lone surrogate"),
        (vocabulary("zz", 2**31), "'zz' has the id 2147483648, far beyond its 260 tokens"),
        (vocabulary("zz", 2**32 - 1), "'zz' has the id 4294967295, far beyond its 260 tokens"),
        (vocabulary("zz", 2**64), "'zz' has the id 18446744073709551616, far beyond its 260 tokens"),
        (vocabulary("zz", 600), "'zz' has the id 600, far beyond its 260 tokens"),
        (vocabulary("zz", -1), "'zz' has the id -1, no whole number from 0"),
        (vocabulary("zz", True), "'zz' has the id True, no whole number from 0"),
        (vocabulary("zz", 1.0), "'zz' has the id 1.0, no whole number from 0"),
        (vocabulary("zz", 0), r"the tokens '<\|pad\|>' and 'zz' have both the id 0"),
        (added(content="<q>", id=2**31), "'<q>' has the id 2147483648, far beyond its 260 tokens"),
        (added(content="<q>", id=1), r"the tokens '<\|im_start\|>' and '<q>' have both the id 1"),
        (added(id=7), r"'<\|pad\|>' has two ids, 0 and 7"),
        # The library would give it 259.
        (added(content="<q>", id=300), "'<q>' has the id 300 in the file and 259 beside the other tokens"),
        (lambda data: data["added_tokens"].append({"id": 259}), "has the content None, which is no text"),
        (lambda data: data.update(added_tokens={"a": 1}), "`added_tokens` is no list of tokens"),
        (lambda data: data.pop("model"), r"not a tokenizer.json \(Model missing"),
        (lambda data: data["model"].update(merges=5), r"not a tokenizer.json \(data did not match"),
        (
            lambda data: (data["model"].update(vocab={}), data.pop("added_tokens")),
            "not a tokenizer.json, as it has no tokens",
        ),
    ],
)
def test_ids_that_are_not_to_be_trusted(folder, edit, said):
    change(folder, "tokenizer.json", edit)
    with pytest.raises(UserError, match=rf"tokenizer.json: .*{said}") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_gaps_in_a_vocabulary_are_no_fault(folder):
    change(folder, "tokenizer.json", vocabulary("zz", 400))
    assert load_tokenizer(folder).vocab_size == 401


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'"a"', "not a JSON object"),
        (b"", "not JSON"),
        (b"\xff\xfe{}", "byte 1 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_json_of_the_wrong_shape(folder, name, content, said):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {said}"):
        load_tokenizer(folder)


def test_a_token_that_stands_twice_is_no_choice(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"vocab": {', '"vocab": {"!": 258,', 1))
    with pytest.raises(UserError, match=r"tokenizer.json: not JSON \('!' stands twice\)"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"chat_template": 5}, "chat_template is no text"),
        ({"chat_template": {"default": "x"}}, "chat_template is no text"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is no text"),
        ({"chat_template": [{"name": ["default"], "template": "x"}]}, "chat_template is no text"),
        # Silently another one, ChatML, in former times.
        (
            {"chat_template": [{"name": "tool_use", "template": "x"}]},
            "chat_template is no text, nor a list",
        ),
        ({"chat_template": "a\ud800"}, r"chat_template holds a lone surrogate \('\\ud800' at character 1\)"),
        ({"eos_token": 5}, "eos_token is 5, which is no text"),
        ({"eos_token": {"content": 3}}, "eos_token is {'content': 3}, which is no text"),
        ({"pad_token": ["a"]}, "pad_token is .'a'., which is no text"),
        ({"eos_token": "\ud800"}, "eos_token holds a lone surrogate"),
    ],
)
def test_fields_of_the_configuration(folder, fields, said):
    change(folder, "tokenizer_config.json", lambda config: config.update(fields))
    with pytest.raises(UserError, match=rf"tokenizer_config.json: {said}"):
        load_tokenizer(folder)


def test_a_template_that_is_not_utf_8(folder):
    (folder / "chat_template.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template.jinja: byte 5 is not UTF-8; save the file as UTF-8"):
        load_tokenizer(folder)
