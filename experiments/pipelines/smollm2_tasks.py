"""Five kinds of small tasks with verifiers, of which a model of 135 million parameters can do some.

Each kind makes rows of `prompt`, `completion` (a demonstration), `answer` and `kind`. Four want a number,
which is the last one of an answer, as GSM8K is judged; the fifth asks for words of a list under a constraint:
lower case, at most so many words, JSON, a beginning. Held-out prompts are none of those that are trained on.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.rewards.verifiers import gsm8k_answer

ENDING = " End with 'Answer: ' and the number."
WORDS = [
    "banana",
    "cheese",
    "letter",
    "street",
    "garden",
    "window",
    "yellow",
    "summer",
    "winter",
    "bottle",
    "coffee",
    "kitchen",
    "mountain",
    "river",
    "village",
    "science",
    "picture",
    "teacher",
    "student",
    "morning",
    "evening",
    "holiday",
    "weather",
    "journey",
    "station",
    "library",
    "museum",
    "market",
    "bridge",
    "forest",
    "island",
    "planet",
    "rocket",
    "engine",
    "circle",
    "triangle",
    "number",
    "pepper",
    "butter",
    "orange",
    "tomato",
    "potato",
    "carrot",
    "cherry",
    "almond",
    "walnut",
    "feather",
    "leather",
    "thunder",
    "whisper",
    "hammer",
    "ladder",
    "basket",
    "blanket",
    "pillow",
    "mirror",
    "candle",
    "lantern",
    "sailor",
    "farmer",
    "doctor",
]
LISTS = {
    "fruits": ["Apple", "Pear", "Plum", "Grape", "Fig", "Cherry", "Mango", "Lemon", "Peach", "Melon"],
    "animals": ["Dog", "Cat", "Horse", "Sheep", "Goat", "Lion", "Tiger", "Wolf", "Bear", "Fox"],
    "colors": ["Red", "Blue", "Green", "Yellow", "Black", "White", "Purple", "Orange", "Brown", "Pink"],
    "tools": ["Hammer", "Saw", "Drill", "Wrench", "Chisel", "Pliers", "Ruler", "Shovel", "Rake", "Axe"],
    "cities": ["Paris", "London", "Rome", "Madrid", "Berlin", "Vienna", "Athens", "Lisbon", "Oslo", "Dublin"],
    "metals": ["Iron", "Copper", "Gold", "Silver", "Zinc", "Tin", "Lead", "Nickel", "Cobalt", "Titanium"],
}
BEGINNINGS = ["Sure", "Certainly", "Hello", "Well", "Today", "Indeed"]
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

Row = dict[str, Any]


# Tasks ---------------------------------------------------------------------------------------------


def gcd_task(rng: np.random.Generator) -> Row:
    """A greatest common divisor, by taking it out of both numbers."""
    while True:
        divisor, first, second = int(rng.integers(2, 8)), *map(int, rng.integers(1, 10, 2))
        if first != second and math.gcd(first, second) == 1:
            break
    a, b = divisor * first, divisor * second
    return {
        "prompt": f"What is the greatest common divisor of {a} and {b}?{ENDING}",
        "completion": f"{a} = {divisor} * {first} and {b} = {divisor} * {second}. Answer: {divisor}",
        "answer": divisor,
    }


def sum_task(rng: np.random.Generator) -> Row:
    """A sum of two terms."""
    a, b = map(int, rng.integers(5, 100, 2))
    return {"prompt": f"What is {a} + {b}?{ENDING}", "completion": f"Answer: {a + b}", "answer": a + b}


def letter_task(rng: np.random.Generator) -> Row:
    """How often a letter occurs in a word, which is spelled first."""
    word = str(rng.choice(WORDS))
    letter = str(rng.choice([*word, "z"]))
    count = word.count(letter)
    return {
        "prompt": f"How many times does the letter {letter} occur in the word {word}?{ENDING}",
        "completion": f"{'-'.join(word)}. Answer: {count}",
        "answer": count,
    }


def product_task(rng: np.random.Generator) -> Row:
    """A product, by tens and ones."""
    a, b = int(rng.integers(2, 10)), int(rng.integers(11, 30))
    tens, ones = b - b % 10, b % 10
    return {
        "prompt": f"What is {a} * {b}?{ENDING}",
        "completion": f"{a} * {tens} = {a * tens}, {a} * {ones} = {a * ones}. Answer: {a * b}",
        "answer": a * b,
    }


def instruction_task(rng: np.random.Generator) -> Row:
    """Some words of a list, under a constraint that a program can check."""
    topic = str(rng.choice(sorted(LISTS)))
    words = [str(word) for word in rng.permutation(LISTS[topic])[:5]]
    count, form = int(rng.integers(2, 5)), str(rng.choice(["lower", "words", "json", "start"]))
    chosen, most, start = words[:count], count + int(rng.integers(0, 4)), str(rng.choice(BEGINNINGS))
    plain = ", ".join(chosen)
    ask, completion = {
        "lower": ("Write in lower case letters only.", plain.lower()),
        "words": (f"Use at most {most} words.", plain),
        "json": ("Answer with a JSON list of strings and nothing else.", json.dumps(chosen)),
        "start": (f"Begin with the word {start}.", f"{start}, {plain}"),
    }[form]
    return {
        "prompt": f"Name {NUMBERS[count]} of these {topic}: {', '.join(words)}. {ask}",
        "completion": completion,
        "answer": {"form": form, "words": words, "count": count, "most": most, "start": start},
    }


TASKS: dict[str, Callable[[np.random.Generator], Row]] = {
    "gcd": gcd_task,
    "sum": sum_task,
    "letters": letter_task,
    "product": product_task,
    "instruction": instruction_task,
}


def held_out_rows(count: int, seed: int) -> list[Row]:
    """Rows of all kinds in turn, no two with the same prompt."""
    return _rows(count, [seed, *b"held out"], set(), unique=True)


def training_rows(count: int, seed: int, held_out: Sequence[Row]) -> list[Row]:
    """Rows of all kinds in turn, of none of the held-out prompts."""
    return _rows(count, [seed, *b"train"], {row["prompt"] for row in held_out}, unique=False)


def _rows(count: int, entropy: Sequence[int], taken: set[str], *, unique: bool) -> list[Row]:
    rng, rows, kinds = np.random.default_rng(list(entropy)), [], list(TASKS)
    while len(rows) < count:
        kind = kinds[len(rows) % len(kinds)]
        row = {**TASKS[kind](rng), "kind": kind}
        if row["prompt"] not in taken:
            rows.append(row)
            if unique:
                taken.add(row["prompt"])
    return rows


# Verifiers -----------------------------------------------------------------------------------------


def instruction_followed(text: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a text names exactly so many words of the list and obeys the constraint."""
    spoken = re.findall(r"[a-z]+", text.lower())
    named = [word.lower() for word in wanted["words"] if word.lower() in spoken]
    if len(named) != wanted["count"]:
        return False
    match wanted["form"]:
        case "lower":
            return text == text.lower()
        case "words":
            return len(text.split()) <= wanted["most"]
        case "start":
            return text.startswith(wanted["start"])
        case _:
            return _is_list_of_strings(text, wanted["count"])


def _is_list_of_strings(text: str, count: int) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and len(value) == count and all(isinstance(each, str) for each in value)


def mixture_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    kind: Sequence[str],
    answer: Sequence[Any],
    finished: Sequence[bool] | None = None,
    **_: object,
) -> list[float]:
    """1 where the completion ended by itself and its kind's verifier accepts it, else 0."""
    ended = finished if finished is not None else [True] * len(completions)
    verify = {"instruction": instruction_followed}
    rows = zip(completions, kind, answer, ended, strict=True)
    return [
        float(bool(end) and verify.get(name, gsm8k_answer)(text, wanted)) for text, name, wanted, end in rows
    ]
