import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.data import templates
from rlhf_jax.data.chat import encode_conversation, encode_prompt
from rlhf_jax.data.tokenizers import SPECIAL_TOKENS, Tokenizer, byte_tokenizer, character_tokenizer, train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["assistant user the cat\n\nsat on  the mat\n  indented < 12 + 34"] * 4, 330)
CHARACTERS = character_tokenizer("abcdefghijklmnopqrstuvwxyz<|_> \n0123456789", ["assistant", "user"])
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [BYTES, BPE, CHARACTERS], ids=["bytes", "bpe", "characters"]
)

UNMARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is 1"},
    {"role": "assistant", "content": "it is one"},
    {"role": "tool", "content": "a tool result"},
    {"role": "assistant", "content": "so be it"},
]


def variant(tokenizer, template, **names):
    return Tokenizer(tokenizer.backend, {**tokenizer.names, **names}, template)


def with_specials(*tokens):
    """A byte-level tokenizer with more special tokens."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(list(tokens))
    return backend


def counted(tokenizer, encoded):
    """The text of the tokens that count, run by run."""
    runs, previous = [], False
    for index, counts in zip(encoded.ids, encoded.mask, strict=True):
        if counts and not previous:
            runs.append([])
        if counts:
            runs[-1].append(index)
        previous = counts
    return [tokenizer.decode(run, skip_special=False) for run in runs]


@TOKENIZERS
@pytest.mark.parametrize("template", [templates.CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_layout_and_mask_of_many_turns(tokenizer, template):
    tokenizer = variant(tokenizer, template)
    encoded = encode_conversation(tokenizer, CONVERSATION)
    assert tokenizer.decode(encoded.ids, skip_special=False) == "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION
    )
    assert counted(tokenizer, encoded) == ["it is one<|im_end|>", "so be it<|im_end|>"]
    assert encode_conversation(variant(tokenizer, templates.CHATML), CONVERSATION) == encoded


PIECES = ["<|im_", "end|>", "<", "|", " ", "  ", "\n", "\n\n", "the ", "cat", "12", "user"]
contents = st.lists(st.sampled_from([*SPECIAL_TOKENS, *PIECES])).map("".join)


@TOKENIZERS
@pytest.mark.parametrize("template", [templates.CHATML, UNMARKED], ids=["marked", "unmarked"])
@settings(max_examples=60, deadline=None)
@given(prompt=contents, completion=contents, after=contents)
def test_prompt_then_completion_then_end_is_the_conversation(tokenizer, template, prompt, completion, after):
    tokenizer = variant(tokenizer, template)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    sampled = [*encode_prompt(tokenizer, prompt), *tokenizer.encode(completion), tokenizer.eos_id]
    encoded = encode_conversation(tokenizer, turns)
    assert encoded.ids == sampled + tokenizer.encode("\n")
    # The next turn's prompt goes on from exactly the tokens that were sampled.
    longer = encode_prompt(tokenizer, [*turns, {"role": "user", "content": after}])
    assert longer[: len(sampled)] == sampled


@TOKENIZERS
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(contents, min_size=1, max_size=4))
def test_messages_never_become_special_tokens(tokenizer, texts):
    messages = [{"role": "user", "content": text} for text in texts]
    encoded = encode_conversation(tokenizer, messages)
    assert [encoded.ids.count(index) for index in (0, 1, 2)] == [0, len(texts), len(texts)]
    assert tokenizer.decode(encoded.ids, skip_special=False) == "".join(
        f"<|im_start|>user\n{text}<|im_end|>\n" for text in texts
    )
    assert not any(encoded.mask)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]}],
        [{"role": "user", "content": "<|im_"}, {"role": "user", "content": "end|>"}],
    ],
    ids=["parts", "two messages"],
)
def test_forgeries_by_parts_and_neighbours(messages):
    template = "{% for m in messages %}{{ m.role ~ m.content | trim }}{% endfor %}"
    side_by_side = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    for source in (template, side_by_side):
        encoded = encode_conversation(variant(BYTES, source), messages)
        assert not set(encoded.ids) & set(BYTES.special_tokens.values())


def test_tool_calls_are_the_assistants_words():
    call = {"name": "w", "arguments": {"at": "<é>"}}
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "tool_calls": [{"name": "umbrella"}]},
    ]
    encoded = encode_conversation(BYTES, messages)
    assert counted(BYTES, encoded) == [
        '<tool_call>\n{"name": "w", "arguments": {"at": "<é>"}}\n</tool_call><|im_end|>',
        'It rains.\n<tool_call>\n{"name": "umbrella", "arguments": {}}\n</tool_call><|im_end|>',
    ]


def test_marks_without_the_end_of_turn_are_completed():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    assert counted(BYTES, encode_conversation(variant(BYTES, template), CONVERSATION)) == [
        *("it is one<|im_end|>", "so be it<|im_end|>")
    ]


# Layouts in the manner of well-known families; none has generation marks.

GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start>' + role + '\n' + m.content | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
INSTRUCT_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<A>' + (m.content if loop.index0 > ns.last "
    "else m.content.split('</think>')[-1]) + '<end>' }}{% else %}{{ '<U>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<A><think>' }}{% endif %}"
)
LAST_TURN_RETURNS = (
    "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}{{ m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)
CLOSES_THE_TEXT = (
    "{% for m in messages %}{{ '<U>' if m.role == 'user' else '<A>' }}{{ m.content + '<end>' }}{% endfor %}"
    "{{ '<A>' if add_generation_prompt else '</s>' }}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>x</think>ho"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>y</think>ha"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (GEMMA_LIKE, ["<think>x</think>ho<end>", "<think>y</think>ha<end>"]),
        (INSTRUCT_LIKE, [" <think>x</think>ho</s>", " <think>y</think>ha</s>"]),
        (LAST_TURN_RETURNS, ["<think>x</think>ho<end>", "<think>y</think>ha</s>"]),
        (CLOSES_THE_TEXT, ["<think>x</think>ho<end>", "<think>y</think>ha<end>"]),
        # Old thoughts are dropped, and the generation prompt opens a thought which the old turn has not.
        (THINKING, ["ho<end>", "y</think>ha<end>"]),
    ],
    ids=["gemma-like", "instruct-like", "another end last", "end of text", "thinking"],
)
def test_masks_without_marks(template, expected):
    backend = with_specials("<s>", "</s>", "<start>", "<end>", "<A>", "<U>")
    end = "</s>" if template in (INSTRUCT_LIKE, LAST_TURN_RETURNS) else "<end>"
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": end}, template)
    encoded = encode_conversation(tokenizer, CHAT)
    assert counted(tokenizer, encoded) == expected
    prompt = encode_prompt(tokenizer, CHAT[:3])
    assert encoded.ids[: len(prompt)] == prompt


def test_a_tokenizer_that_puts_a_space_before_every_text():
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

    alphabet = {character: index for index, character in enumerate("\u2581abcdefghijklmnopqrstuvwxyz<|_>\n")}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = Tokenizer(backend, {"eos_token": "<|im_end|>"})
    assert not tokenizer.separable
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    encoded = encode_conversation(tokenizer, messages)
    assert encoded.ids == tokenizer.encode(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n", special=True
    )
    assistant = [index for index, counts in zip(encoded.ids, encoded.mask, strict=True) if counts]
    assert [tokenizer.token(index) for index in assistant] == ["h", "o", "<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hi"], "message 0 is not an object"),
        ([{"content": "x"}], "message 0 has no role"),
        ([{"role": 3, "content": "x"}], "message 0 has no role"),
        ([{"role": "user"}], r"message 0 \(user\) has no text"),
        ([{"role": "user", "content": None}], "has no text"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}], r"message 1 \(assistant\)"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part that is neither text nor an image"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the model reads none"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(UserError, match=message):
        encode_conversation(BYTES, messages)


@pytest.mark.parametrize("role", ["wizard", "User", "user<|im_end|>"])
def test_a_role_that_no_template_knows_is_refused(role):
    messages = [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]
    for encode in (encode_conversation, encode_prompt):
        with pytest.raises(
            UserError, match=r"message 1 has the role .*: give one of system, user, assistant, tool"
        ):
            encode(BYTES, messages)


def test_a_role_that_the_template_names_is_taken():
    source = "{% for m in messages %}{{ 'T' if m.role == 'observation' else 'U' }}{{ m.content }}{% endfor %}"
    encoded = encode_prompt(variant(BYTES, source), [{"role": "observation", "content": "a"}])
    assert BYTES.decode(encoded) == "Ta"


def test_a_prompt_does_not_end_with_the_assistant():
    with pytest.raises(UserError, match="ends with an assistant message"):
        encode_prompt(BYTES, CONVERSATION)
    with pytest.raises(UserError, match="non-empty list"):
        encode_prompt(BYTES, [])


# Templates by strangers -----------------------------------------------------------------------------

LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}"
BOMBS = {
    "string": ("{{ 'a' * 10**10 }}", "MiB"),
    "loop": (LOOP, "ran for more than"),
    "doubling": (DOUBLING, "MiB|ran for more than"),
    "list": ("{{ [1] * 10**10 }}", "MiB"),
    "format": ("{{ '%9999999999d' % 3 }}", "MiB|failed"),
    "number": ("{{ 9 ** (9 ** 9) }}", "ran for more than"),
    "text": ("{{ lipsum(n=10**9) }}", "ran for more than|MiB"),
    "output": ("{{ 'a' * 20000000 }}", "characters|ran for more than"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
}


@pytest.mark.parametrize(("template", "message"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_within_two_seconds(template, message):
    encode_prompt(variant(BYTES, UNMARKED), "warm")
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        encode_prompt(variant(BYTES, template), "hi")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{% for %}", "syntax error in line 2"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ undefined_name.field }}", "undefined_name"),
        ("{% include '/etc/passwd' %}", "failed|refused"),
    ],
)
def test_broken_and_forbidden_templates(template, message):
    with pytest.raises(UserError, match=message):
        encode_prompt(variant(BYTES, template), "hi")


def test_messages_that_are_not_json():
    with pytest.raises(UserError, match="not plain JSON"):
        encode_prompt(variant(BYTES, UNMARKED), [{"role": "user", "content": "a", "extra": {1, 2}}])


def test_filters_that_templates_use():
    template = (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{{ m | tojson }}{% break %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "<é>"}]
    ids = encode_prompt(variant(BYTES, template), messages)
    assert BYTES.decode(ids) == '{"role": "user", "content": "<é>"}4True'


def test_threads_share_the_worker():
    tokenizer, results = variant(BYTES, UNMARKED), {}

    def work(number):
        results[number] = [encode_prompt(tokenizer, f"{number}") for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [encode_prompt(BYTES, f"{number}")] * 20 for number in range(4)}


SCRIPT = """
from rlhf_jax.data import templates
print(templates.render("{{ 1 }}", [{}], ("", ""))[0], templates._worker.pid)
"""


def test_the_worker_ends_with_its_process():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    text, pid = done.stdout.split()
    assert text == "1"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_ctrl_c_leaves_the_worker_alone():
    tokenizer = variant(BYTES, UNMARKED)
    ids = encode_prompt(tokenizer, "hi")
    pid = templates._worker.pid
    os.kill(pid, signal.SIGINT)
    time.sleep(0.05)
    assert encode_prompt(tokenizer, "hi") == ids
    assert templates._worker.pid == pid


def test_the_built_in_template_needs_no_worker_and_data_no_jax():
    script = (
        "import sys; from rlhf_jax.data import chat, templates, tokenizers\n"
        "chat.encode_prompt(tokenizers.byte_tokenizer(), 'hi')\n"
        "print(templates._worker.pid, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]


def test_a_template_whose_turns_have_no_end_is_warned_of_once(caplog):
    """What is learnt from it would be a policy that can't stop."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    backend, names = BYTES.backend, BYTES.names
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for end, warnings in (("<|im_end|>", 0), ("", 1), ("", 1)):
        tokenizer = Tokenizer(backend, names, template.replace("}}\n", "}}" + end + "\n"))
        encode_conversation(tokenizer, turns)
        encode_conversation(tokenizer, turns[:1])
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == warnings
        assert all("ends an assistant's turn without '<|im_end|>'" in sentence for sentence in said)
