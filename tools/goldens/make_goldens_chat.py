# ruff: noqa: RUF001 (full-width bars are how DeepSeek writes its special tokens)
"""Freezes what `apply_chat_template` of `transformers` makes of conversations: tests/golden/chat_*/.

Five styles of chat, each with a small tokenizer of the same kind as the family's (byte-level BPE, or
SentencePiece-like BPE with byte fallback) and a template that writes the family's published format. To make
them again (in an environment of its own):

    pip install torch==2.13.0 transformers
    python tools/goldens/make_goldens_chat.py

chat_{style}/tokenizer.json, tokenizer_config.json   what a checkpoint's folder would hold
chat_{style}/expected.json                           list of cases: messages, tools, add_generation_prompt,
                                                     and the ids and the assistant mask that come out

The templates mark what the assistant wrote, from which `transformers` makes its mask; tests take the marks
away to see that the mask is found without them. Made with transformers 5.23.0.
"""

import json
import pathlib
from typing import Any

import tokenizers
import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
VOCAB = 400
TEXTS = [
    "What is the weather in Paris today? It is raining in Paris, and the wind is cold.",
    "The sum of 12 and 30 is 42.\n\nFirst add the tens, then add the ones.\n",
    '{"name": "get_weather", "arguments": {"city": "Paris"}} system user assistant model tool',
    "You are a helpful assistant. Answer briefly, in one sentence.",
] * 4
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Templates -----------------------------------------------------------------------------------------

CHATML = """\
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif -%}
Functions that may be called:
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor -%}
<|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' -%}
<|im_start|>assistant
{% generation -%}
{{- message.content or '' -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if message.content or not loop.first else '' -}}
<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>
{%- endfor -%}
<|im_end|>
{%- endgeneration -%}
{{- '\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- set start, middle = '<|start_header_id|>', '<|end_header_id|>\\n\\n' -%}
{%- if tools or messages[0].role == 'system' -%}
{{- start + 'system' + middle -}}
{%- if tools %}{{ 'Environment: ipython\\n' }}{% endif -%}
{{- messages[0].content | trim if messages[0].role == 'system' else '' }}{{ '<|eot_id|>' -}}
{%- endif -%}
{%- set first = namespace(user=true) -%}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'assistant' -%}
{{- start + 'assistant' + middle -}}
{%- generation -%}
{%- if message.tool_calls -%}
{%- set call = message.tool_calls[0].function -%}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
{%- else -%}
{{- message.content | trim -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endgeneration -%}
{%- elif message.role == 'tool' -%}
{{- start + 'ipython' + middle + message.content | tojson + '<|eot_id|>' -}}
{%- else -%}
{{- start + 'user' + middle -}}
{%- if tools and first.user %}{{ 'Functions:\\n\\n' + tools | tojson(indent=4) + '\\n\\n' }}{% endif -%}
{%- set first.user = false -%}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ start + 'assistant' + middle }}{% endif -%}
"""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{- raise_exception('this format has no system role') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('user and assistant must take turns') -}}
{%- endif -%}
{%- if message.role == 'assistant' -%}
{{- '<start_of_turn>model\\n' -}}
{%- generation %}{{ message.content | trim + '<end_of_turn>' }}{% endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<start_of_turn>' + message.role + '\\n' + message.content | trim + '<end_of_turn>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif -%}
"""

# Tools and the system's words stand before the last question, so that what comes before an answer is not
# what stood there when the answer was asked for.
MISTRAL = """\
{{- bos_token -}}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages if message.role != 'system' -%}
{%- set place = loop.index0 + (1 if system else 0) -%}
{%- if message.role == 'user' -%}
{%- if tools and place == last.user -%}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST] ' + (system if place == last.user else '') + message.content + '[/INST]' -}}
{%- elif message.role == 'tool' -%}
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + '}[/TOOL_RESULTS]' -}}
{%- else -%}
{%- generation -%}
{%- if message.tool_calls -%}
{{- '[TOOL_CALLS] [' -}}
{%- for call in message.tool_calls -%}
{{- call.function | tojson + (']' if loop.last else ', ') -}}
{%- endfor -%}
{{- eos_token -}}
{%- else -%}
{{- ' ' + message.content | trim + eos_token -}}
{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
"""

DEEPSEEK = """\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' %}{{ message.content }}{% endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
{%- elif message.role == 'assistant' -%}
{%- if loop.previtem.role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif -%}
{%- generation -%}
{{- (message.content or '').split('</think>')[-1] -}}
{%- for call in message.tool_calls or [] -%}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' -}}
{{- call.function.arguments | tojson + '\\n```<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<｜Assistant｜>' }}{% endif -%}
"""

# Conversations -------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
ASK, ANSWER = (
    {"role": "user", "content": "What is the sum of 12 and 30?"},
    {"role": "assistant", "content": "The sum is 42."},
)
MANY_TURNS = [
    ASK,
    ANSWER,
    {"role": "user", "content": "  Naïve café, 日本語 🙂\n\n  indented "},
    {"role": "assistant", "content": "Voilà: 日本語\n\n- first\n- second  "},
    *(ASK, ANSWER, ASK, ANSWER),
]
THOUGHT = [ASK, {"role": "assistant", "content": "<think>tens, ones</think>It is 42."}, ASK, ANSWER]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "type": "function",
    "id": "a1b2c3d4e",
    "function": {"name": "get_weather", "arguments": {"city": "Orléans <1>"}},
}
TOOL_TURNS = [
    {"role": "user", "content": "What is the weather in Orléans?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "get_weather", "content": "raining"},
    {"role": "assistant", "content": "It is raining in Orléans."},
    {"role": "user", "content": "And today?"},
    {"role": "assistant", "content": "It is raining."},
]
PLAIN = [([ASK, ANSWER], None), (MANY_TURNS, None), (THOUGHT, None)]
WITH_SYSTEM = [([SYSTEM, *messages], tools) for messages, tools in PLAIN]
WITH_TOOLS = [(TOOL_TURNS, None), (TOOL_TURNS, [TOOL]), ([SYSTEM, *TOOL_TURNS], [TOOL])]
EVERYTHING = [*PLAIN, *WITH_SYSTEM, *WITH_TOOLS]


def byte_level(special: list[str]) -> tokenizers.Tokenizer:
    """BPE over bytes, merged within words as newer families cut them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def sentence_piece(special: list[str], *, prefix_space: bool) -> tokenizers.Tokenizer:
    """BPE over characters with `▁` for spaces; characters it does not know become their bytes."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix_space:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", *special, *names], show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    # The bytes are ordinary tokens of the model, not text to look for.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in names]
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def deepseek_tokens() -> list[str]:
    """Full-width bars around names whose words are joined by the sign that stands for a space."""
    names = ["begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant"]
    names += ["tool▁call▁begin", "tool▁sep", "tool▁call▁end", "tool▁output▁begin", "tool▁output▁end"]
    return [f"<｜{name}｜>" for name in names]


def styles() -> dict[str, tuple[tokenizers.Tokenizer, dict[str, str], str, list[Any]]]:
    """Tokenizer, names of its tokens, template and conversations of each style."""
    llama = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    mistral = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    mistral += ["[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    gemma = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    deepseek = deepseek_tokens()
    return {
        "chatml": (
            byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
            {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
            CHATML,
            EVERYTHING,
        ),
        "llama3": (
            byte_level(llama),
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            LLAMA3,
            EVERYTHING,
        ),
        "gemma": (
            sentence_piece(gemma, prefix_space=False),
            {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
            GEMMA,
            PLAIN,
        ),
        "mistral": (
            sentence_piece(mistral, prefix_space=True),
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
            MISTRAL,
            EVERYTHING,
        ),
        "deepseek": (
            byte_level(deepseek),
            {"bos_token": deepseek[0], "eos_token": deepseek[1]},
            DEEPSEEK,
            EVERYTHING,
        ),
    }


def expect(tokenizer: Any, messages: list[Any], tools: Any, *, prompt: bool) -> dict[str, Any]:
    """One case."""
    encoded = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        add_generation_prompt=prompt,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    inputs = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
    if tokenizer.unk_token_id in encoded["input_ids"]:
        raise SystemExit("a character became the unknown token: byte fallback is not at work")
    return {**inputs, "ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}


def make(style: str, backend: Any, names: dict[str, str], template: str, conversations: list[Any]) -> None:
    """Writes one folder."""
    folder = GOLDEN / f"chat_{style}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    cases = []
    for messages, tools in conversations:
        cases.append(expect(tokenizer, messages, tools, prompt=False))
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        cases += [expect(tokenizer, messages[:turn], tools, prompt=True) for turn in turns]
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (folder / "expected.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    trained = sum(sum(case["mask"]) for case in cases)
    total = sum(len(case["ids"]) for case in cases)
    print(f"{style}: {len(cases)} cases, {total} ids, {trained} of assistants, {size / 1024:.0f} KiB")


if __name__ == "__main__":
    for style, parts in styles().items():
        make(style, *parts)
