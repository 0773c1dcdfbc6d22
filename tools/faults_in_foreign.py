"""Kinds of faults in what others wrote: adapters, GGUF files, tables, constitutions, rules, tool calls."""

import functools
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq
from fault_world import ROOT, Found, World, judged, kind
from faults_in_inputs import ODD, READERS, mutated_json

from rlhf_jax import models
from rlhf_jax.data.sources import read_rows
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.feedback.constitution import read_constitution
from rlhf_jax.feedback.judges import load_reward_file
from rlhf_jax.models import hf
from rlhf_jax.models.hf import peft
from rlhf_jax.rewards.functions import score_rows
from rlhf_jax.tool_use.functions import make_tools
from rlhf_jax.tool_use.tools import Tool, answer_calls, calculator


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Bytes of which one bit is another."""
    changed = bytearray(content)
    changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """The beginning of bytes."""
    return content[: rng.randrange(len(content))]


@functools.cache
def _base() -> tuple[Any, Any]:
    return hf.load(ROOT / "tests" / "golden" / "hf_llama")


@kind
def adapters_of_others(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """PEFT folders whose JSON is mutated, or whose weights are cut, or for another base."""
    source = rng.choice(sorted((ROOT / "tests" / "golden").glob("peft_*")))
    folder = shutil.copytree(source, scratch / "adapter")
    path = folder / rng.choice(["adapter_config.json"] * 4 + ["adapter_model.safetensors"])
    if path.suffix == ".json":
        path.write_text(mutated_json(path.read_text(), rng), encoding="utf-8", errors="surrogatepass")
    else:
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")  # weights have no digest in this format
        part = rng.choice([cut, flipped])(content[:header], rng)
        path.write_bytes(part if len(part) < header else part + content[header:])
    outcome, said = judged(lambda: peft.load(folder, *_base())[0])
    return f"{source.name} {path.name}", outcome, said


@kind
def tables(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Rows as Parquet or as one JSON array, with a value or the bytes mutated."""
    name = rng.choice(list(READERS))
    make, row = READERS[name]
    if rng.random() < 0.5:
        path = scratch / "rows.json"
        text = json.dumps([row, row, row], indent=rng.choice([None, 1]))
        path.write_text(mutated_json(text, rng), encoding="utf-8", errors="surrogatepass")
    else:
        path, odd = scratch / "rows.parquet", dict(row)
        how = rng.choice(["value", "flip", "cut", "bytes"])
        if how == "value":
            odd[rng.choice(list(odd))] = rng.choice(ODD)
        if how == "bytes":
            odd[rng.choice(list(odd))] = rng.randbytes(5)
        try:
            table = pa.Table.from_pylist([odd] * 3)
            pq.write_table(table, path)
        except (pa.ArrowException, UnicodeError, OverflowError):
            return f"{name}: Arrow has no such value", "right", ""
        content = path.read_bytes()
        if how in ("flip", "cut"):
            path.write_bytes(flipped(content, rng) if how == "flip" else cut(content, rng))
    outcome, said = judged(lambda: make(read_rows(str(path)), byte_tokenizer(), max_length=1 << 14))
    return f"{name}: {path.name} {path.read_bytes()[:150]!r}", outcome, said


_PRINCIPLE = {
    "name": "right",
    "principle": "Be right.",
    "choices": ["A", "B"],
    "ratings": ["1", "2", "3"],
    "comparison": "{prompt} {first} {second}",
}
_RULES = {
    "kind": "rules",
    "grader": "",
    "propositions": [
        {"name": "varied", "function": "rlhf_jax.rewards.rules:repetition_reward", "weight": 0.5},
        {"name": "fit", "function": "rlhf_jax.rewards.rules:repetition_reward", "weight": -1.0},
    ],
}
_PIECES = [
    "{prompt}",
    "{first!z}",
    "{second:>999999999}",
    "{prompt:d}",
    "{",
    "}}",
    "{0}",
    "{prompt.__class__}",
    "{}",
]


@kind
def judges(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Constitutions, rules and descriptions of rewards with a value, a template, or their text mutated."""
    if rng.random() < 0.5:
        path, row = scratch / "principles.jsonl", dict(_PRINCIPLE)
        if rng.random() < 0.5:
            names = ["comparison", "rating", "critique", "revision", "principle"]
            row[rng.choice(names)] = " ".join(rng.choices(_PIECES, k=rng.randint(1, 4)))
            path.write_text(json.dumps(row))
        else:
            text = mutated_json(json.dumps(row), rng)
            path.write_text(text, encoding="utf-8", errors="surrogatepass")

        def ask() -> None:
            for principle in read_constitution(path):
                principle.compare("1+1?", "2", "3")
                principle.rate("1+1?", "2")

        return (path.read_bytes()[:200].decode(errors="replace"), *judged(ask))
    path = scratch / "judge.json"
    path.write_text(mutated_json(json.dumps(_RULES), rng), encoding="utf-8", errors="surrogatepass")

    def score() -> bool:
        return bool(score_rows(load_reward_file(path), ["p"] * 2, ["a b", "a a"], {}).rewards.shape == (2,))

    return (path.read_bytes()[:300].decode(errors="replace"), *judged(score, True))


def _tools(answer: Any, error: BaseException | None) -> list[Tool]:
    def lookup(key: str) -> str:
        """Looks a key up."""
        if error is not None:
            raise error
        return answer

    return make_tools([lookup, calculator()], seconds=0.5)


_CALLS = [
    {"name": "lookup", "arguments": {"key": "x"}},
    {"name": "calculator", "arguments": {"expression": "2^(3+1)/7"}},
]
_SUMS = ["9^9^9^9", "1/0", "2^-1000000", "1e999", "٣+1", "\x00", "0^0", "%", "√-1"]
_SUMS += ["(" * 3000, "1" * 4000, "-" * 3000]


@kind
def tools(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Calls of tools that are malformed, and tools that return or raise anything: a text for the model."""
    call = json.loads(json.dumps(rng.choice(_CALLS)))
    if call["name"] == "calculator" and rng.random() < 0.5:
        call["arguments"]["expression"] = rng.choice(_SUMS)
    text = json.dumps(call) if rng.random() < 0.3 else mutated_json(json.dumps(call), rng)
    frame = rng.choice(
        [
            "<tool_call>{}</tool_call>",
            "<tool_call>{}",
            "a <tool_call>{}</tool_call><tool_call>{}</tool_call>",
            "</tool_call>{}<tool_call></tool_call>",
            "<tool_call>" * 9 + "{}",
        ]
    )
    errors = [None, None, SystemExit(0), KeyError(), MemoryError(), GeneratorExit(), RecursionError("\ud800")]
    answer, error = rng.choice([*ODD, b"x", object(), float("nan"), "<tool_call>"]), rng.choice(errors)
    turn = frame.replace("{}", text)

    def answered() -> bool:
        answers = answer_calls(_tools(answer, error), turn)
        return all(isinstance(part, str) and len(part) <= 1000 for part in answers)

    outcome, said = judged(answered, True)
    return f"{turn[:200]!r} {answer!r:.40} {error!r:.40}", outcome, said


@kind
def gguf_files(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """GGUF files whose head is cut or has a flipped bit."""
    from rlhf_jax.models.gguf_writing import save
    from rlhf_jax.models.loading import load_checkpoint

    whole = world.root / "whole.gguf"
    if not whole.exists():
        tokenizer = byte_tokenizer()
        config = models.dense_config(
            vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2, num_kv_heads=1
        )
        save(whole, config, models.init_params(config, jax.random.key(0)), tokenizer)
    content = whole.read_bytes()
    change: Callable[[bytes, random.Random], bytes] = rng.choice([cut, flipped, flipped, flipped])
    most = len(content) if change is cut else 6000  # weights have no digest in this format
    path = scratch / "m.gguf"
    path.write_bytes(change(content[:most], rng) + (b"" if change is cut else content[most:]))
    outcome, said = judged(lambda: load_checkpoint(path)[0])
    return change.__name__, outcome, said
