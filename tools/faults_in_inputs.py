"""Kinds of faults in what a run is given: each function draws one case, does it, and judges it."""

import contextlib
import functools
import importlib
import json
import pathlib
import random
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from fault_world import COMMAND_LINES, Found, World, judged, kind

from rlhf_jax.cli.commands import COMMANDS, stage_module
from rlhf_jax.cli.options import options_of, required_flags
from rlhf_jax.cli.parsing import parse
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.cleaning import rules
from rlhf_jax.data.documents import documents_of
from rlhf_jax.data.examples import (
    labeled_examples,
    preference_examples,
    prompt_examples,
    supervised_examples,
)
from rlhf_jax.data.pairs import solution_pairs
from rlhf_jax.data.process_rewards import process_examples
from rlhf_jax.data.rankings import ranking_examples
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.evaluation.benchmarks import read_problems, read_questions
from rlhf_jax.rewards.functions import score_rows
from rlhf_jax.rollout.http_json import HTTPOptions, post_json
from rlhf_jax.sandbox.workers import LimitedWorker

# Inputs ---------------------------------------------------------------------------------------------

ODD = [
    None,
    True,
    0,
    -1,
    10**400,
    1e308,
    "",
    " ",
    "\ud800",
    "\x00",
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
]
TEXTS = [
    "NaN",
    "Infinity",
    "1e400",
    '"\\ud800"',
    "{",
    "[" * 3000,
    '{"a": 1, "a": 2}',
    "\ufeff",
    "\u2028",
    "//",
]


def mutated_json(text: str, rng: random.Random) -> str:
    """JSON, or lines of it, with a value replaced, or with text put where it does not belong."""
    if rng.random() < 0.3:
        place = rng.randrange(len(text) + 1)
        return text[:place] + rng.choice(TEXTS) + text[place + rng.choice([0, 1, 7]) :]
    lines = [text] if text.lstrip().startswith(("{\n", "[\n", "[]")) else text.splitlines()
    number = rng.randrange(len(lines) or 1)
    data: Any = json.loads(lines[number] if lines else "{}")
    places = list(_places(data))
    if not places:
        return rng.choice(TEXTS)
    parent, key = rng.choice(places)
    if rng.random() < 0.2 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = rng.choice(ODD)
    lines[number : number + 1] = [json.dumps(data)]
    return "\n".join(lines)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(data) if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])


_CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
_CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
READERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "conversations": (
        supervised_examples,
        {"messages": [*_CHAT, _CALL], "tools": [{"function": {"name": "f"}}]},
    ),
    "completions": (supervised_examples, {"prompt": "1+1?", "completion": "2"}),
    "questions": (supervised_examples, {"question": "1+1?", "answer": "#### 2"}),
    "preferences": (preference_examples, {"prompt": "p", "chosen": "a", "rejected": "b", "preference": 0.7}),
    "labels": (labeled_examples, {"prompt": "p", "completion": "a", "label": True}),
    "rankings": (ranking_examples, {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [0, 1, 2]}),
    "prompts": (prompt_examples, {"messages": _CHAT[:1], "answer": "2", "kind": "sum"}),
    "steps": (
        lambda rows, tokenizer, max_length: process_examples(rows, tokenizer),
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
    ),
    "problems": (
        lambda rows, *_, **__: read_problems(rows),
        {"question": "1+1?", "answer": "#### 2", "solution": "It is 2.", "subject": "sums"},
    ),
    "choices": (
        lambda rows, *_, **__: read_questions(rows),
        {"question": "1+1?", "choices": {"text": ["2", "3"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
    "solutions": (
        lambda rows, *_, **__: solution_pairs(rows, most=2, seed=0),
        {
            "question": "1+1?",
            "a": {"solution": "2", "is_correct": True},
            "b": {"solution": "3", "is_correct": False},
        },
    ),
    "documents": (lambda rows, *_, **__: documents_of(rows), {"text": "one two three"}),
    "cleaning": (lambda rows, *_, **__: cleaned(rows), {"prompt": "1+1?", "completion": "2", "label": True}),
}


def cleaned(rows: list[Row]) -> int:
    """How many rows are left."""
    kept, dropped = rules.readable(rows)
    return len(rules.drop_faulty(kept, rules.Limits(language="en", script="LATIN"))[0]) + len(dropped)


@kind
def rows(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Rows of every kind of data with a value, or their text, mutated."""
    name = rng.choice(list(READERS))
    make, row = READERS[name]
    lines = [json.dumps(row), mutated_json(json.dumps(row), rng), json.dumps(row)]
    path = scratch / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    outcome, said = judged(lambda: make(read_rows(str(path)), byte_tokenizer(), max_length=1 << 14))
    return f"{name}: {lines[1][:200]}", outcome, said


@kind
def command_lines(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Command lines with a word changed, dropped, doubled, or a stranger's."""
    words = world_words(rng)
    place = rng.randrange(1, len(words))
    match rng.choice(["typo", "drop", "double", "odd", "foreign"]):
        case "typo":
            word = words[place]
            at = rng.randrange(len(word))
            words[place] = word[:at] + rng.choice("abcxyz-=.0") + word[at + 1 :]
        case "drop":
            del words[place]
        case "double":
            words.insert(place, words[place])
        case "odd":
            words[place] = rng.choice(["", "-", "--", "nan", "None", "{}", "\x1b[31m", "ü", "1e999", "--=1"])
        case "foreign":
            words.insert(
                place, rng.choice(["--num-generations", "--bf16", "--lr", "--fp16=1", "-h2", "@file"])
            )
    name, options_type = words[0], _options(words[0])
    outcome, said = judged(lambda: parse(options_type, words[1:], name=f"rlhf {name}"))
    return shlex.join(words), outcome, said


def world_words(rng: random.Random) -> list[str]:
    """A command line that is right."""
    line = COMMAND_LINES[rng.choice(list(COMMAND_LINES))]
    return [*shlex.split(line.format(sft="runs/sft")), "--out", "runs/x"]


def _options(command: str) -> Any:
    return importlib.import_module(stage_module(command)).Options


@functools.cache
def _numbers() -> list[tuple[str, str, bool]]:
    names = [name for group in COMMANDS.values() for name in group if name not in ("benchmark", "generate")]
    found = [(name, option) for name in names for option in options_of(_options(name))]
    numbers = [(name, o) for name, o in found if isinstance(o.default, int | float) and o.type is not bool]
    return [(name, option.flag, isinstance(option.default, int)) for name, option in numbers]


@kind
def extremes(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Extreme numbers for any numeric option: not a number is never taken, nor what float32 cannot hold."""
    name, flag, is_count = rng.choice(_numbers())
    counts = ["99999999999999999999", "-9999999999", "9999999999"]
    value = rng.choice(counts if is_count else ["nan", "1e308", "-1e308", "-inf", "1e39", "-1e39"])
    given = [word for needed in required_flags(_options(name)) if needed != flag for word in (needed, "x")]
    outcome, said = judged(lambda: parse(_options(name), [*given, flag, value], name=f"rlhf {name}"))
    return f"{name} {flag} {value}", outcome if said else "silent", said


@kind
def rewards(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Reward functions that return or raise anything."""
    values = [
        *ODD,
        float("nan"),
        float("inf"),
        1e25,
        -1e16,
        1j,
        object(),
        b"1",
        np.float16(1),
        np.array([1.0, 2]),
    ]
    errors = [SystemExit(0), KeyError(), GeneratorExit(), MemoryError(), StopIteration(), UserError("mine")]
    chosen = rng.choice(["value", "row", "raise"])
    value, error, place = rng.choice(values), rng.choice(errors), rng.randrange(3)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> Any:
        if chosen == "raise":
            raise error
        if chosen == "value":
            return value
        return [value if row == place else 1.0 for row in range(len(completions))]

    def finite() -> bool:
        return bool(np.isfinite(score_rows(reward, ["p"] * 3, ["a", "b", "c"], {}).rewards).all())

    outcome, said = judged(finite, True)
    return f"{chosen} {type(value).__name__} {type(error).__name__}", outcome, said


@kind
def servers(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Servers that answer with torn, endless, malformed or redirecting HTTP."""
    body = rng.choice([b"{}", b"[" * 100_000, b"\xff\xfe", b'{"a": NaN}', rng.randbytes(50), b""])
    status = rng.choice(
        ["200 OK", "302 Found\r\nLocation: http://127.0.0.1:1/", "500 X", "200", "999 \xff", "abc"]
    )
    length = rng.choice([len(body), len(body) + 9, 1 << 40, -1, "x"])
    more = rng.choice(["", "Transfer-Encoding: chunked\r\n", "X: " + "y" * 70_000 + "\r\n", "A: b\r\n" * 200])
    head = f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n".encode("latin-1")
    drips = rng.random() < 0.2

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    for piece in [bytes([byte]) for byte in head + body] if drips else [head + body]:
                        connection.sendall(piece)
                        time.sleep(0.01 if drips else 0)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options, began = HTTPOptions(url, timeout=0.4, retries=1, backoff=0.0), time.monotonic()
        outcome, said = judged(lambda: post_json("/v1/completions", {}, options))
        listener.shutdown(socket.SHUT_RDWR)
    if time.monotonic() - began > 5:
        outcome = "unexplained"
    return f"{status[:20]!r} length {length} {more[:12]!r} {body[:10]!r}{' dripped' * drips}", outcome, said


@kind
def workers(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Tasks that kill, fork, fill memory or never end in a limited process: the next is served."""
    tasks = [
        ("os:_exit", 3), ("os:abort", None), ("signal:raise_signal", 9), ("time:sleep", 9**9),
        ("os:system", "sleep 99 &"),
        ("builtins:bytearray", 1 << 40), ("math:factorial", 10**7),
        ("builtins:eval", "__import__('os').fork()"),
        ("builtins:eval", "[__import__('os').write(f, b'x' * 99) for f in range(3, 9) if f in (3, 4, 5)]"),
    ]  # fmt: skip
    function, task = rng.choice(tasks)
    worker = LimitedWorker(function, seconds=0.5, cpu_seconds=1)
    first = worker.run([task])[0]
    worker.close()
    after = LimitedWorker("builtins:abs", seconds=20)
    second = after.run([-5])[0]
    after.close()
    right = second.value == 5 and first.status in ("timeout", "memory", "killed", "crashed", "done")
    return f"{function} {task}", "right" if right else "unexplained", str((first, second))
