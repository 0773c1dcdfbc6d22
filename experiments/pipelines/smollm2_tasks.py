"""Eight kinds of small tasks with verifiers, of which a model of 135 million parameters can do some.

Six are generators of reasoning-gym, judged by its own verifiers. Two are made here: stories of two sums in
the manner of GSM8K, and words of a list under a constraint (lower case, at most so many words, JSON, a word
that has to occur, a beginning). Rows have `prompt`, `answer`, `kind`, what names a problem to reasoning-gym's
verifiers, and a `completion` that demonstrates it. An answer counts if its verifier accepts it wholly.
Held-out problems are of other seeds, and no prompt of theirs is trained on.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import reasoning_gym
from rlhf_jax.rewards.verifiers import gsm8k_answer, reasoning_gym_reward

GENERATORS = {
    "gcd": "gcd?min_value=2&max_value=60",
    "chain_sum": "chain_sum?min_terms=2&max_terms=2&max_digits=2",
    "products": "products?min_digits=1&max_digits=2",
    "letter_counting": "letter_counting?min_words=1&max_words=1",
    "prime_factorization": "prime_factorization?max_value=60",
    "needle_haystack": "needle_haystack?min_num_statements=2&max_num_statements=4",
}
BATCH = 1000
PROBLEM = ("prompt", "answer", "kind", "reasoning_gym", "index")
"""Fields of a row but its demonstration."""
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

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Lena", "Marie"]
THINGS = ["apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "stamps"]

Row = dict[str, Any]


# Problems ------------------------------------------------------------------------------------------


def story_task(rng: np.random.Generator) -> Row:
    """A story of two sums."""
    name, thing = str(rng.choice(NAMES)), str(rng.choice(THINGS))
    have, groups, each = int(rng.integers(5, 40)), int(rng.integers(2, 7)), int(rng.integers(2, 9))
    more = groups * each
    away = bool(rng.integers(2)) and have > more
    text, sign, answer = ("gives away", "-", have - more) if away else ("buys", "+", have + more)
    return {
        "prompt": f"{name} has {have} {thing} and {text} {groups} bags of {each} {thing} each. "
        f"How many {thing} does {name} have now?",
        "completion": f"{groups} * {each} = {more}, {have} {sign} {more} = {answer}. {tag(answer)}",
        "answer": answer,
    }


def instruction_task(rng: np.random.Generator) -> Row:
    """Some words of a list, under a constraint that a program can check."""
    topic = str(rng.choice(sorted(LISTS)))
    words = [str(word) for word in rng.permutation(LISTS[topic])[:5]]
    count, form = int(rng.integers(2, 5)), str(rng.choice(["lower", "words", "json", "contains", "start"]))
    chosen, most, start = words[:count], count + int(rng.integers(0, 4)), str(rng.choice(BEGINNINGS))
    plain = ", ".join(chosen)
    ask, completion = {
        "lower": ("Write in lower case letters only.", plain.lower()),
        "words": (f"Use at most {most} words.", plain),
        "json": ("Answer with a JSON list of strings and nothing else.", json.dumps(chosen)),
        "contains": (f"Include the word {start}.", f"{plain}. {start}"),
        "start": (f"Begin with the word {start}.", f"{start}, {plain}"),
    }[form]
    return {
        "prompt": f"Name {NUMBERS[count]} of these {topic}: {', '.join(words)}. {ask}",
        "completion": completion,
        "answer": {"form": form, "words": words, "count": count, "most": most, "start": start},
    }


OWN: dict[str, Callable[[np.random.Generator], Row]] = {"story": story_task, "instruction": instruction_task}
TASKS = (*GENERATORS, *OWN)


def held_out_rows(count: int, seed: int) -> list[Row]:
    """Rows of all kinds in turn, no two with the same prompt."""
    return _rows(count, 2 * seed, set(), unique=True)


def training_rows(count: int, seed: int, held_out: Sequence[Row]) -> list[Row]:
    """Rows of all kinds in turn, of none of the held-out prompts."""
    return _rows(count, 2 * seed + 1, {row["prompt"] for row in held_out}, unique=False)


def _rows(count: int, entropy: int, taken: set[str], *, unique: bool) -> list[Row]:
    kinds = [(kind, _problems(kind, entropy)) for kind in TASKS]
    rows: list[Row] = []
    for kind, problems in itertools.islice(itertools.cycle(kinds), count):
        row = next(row for row in problems if row["prompt"] not in taken)
        rows.append({"reasoning_gym": "", "index": 0, **row, "kind": kind})
        if unique:
            taken.add(row["prompt"])
    return rows


def _problems(kind: str, entropy: int) -> Iterator[Row]:
    """Problems of a kind without end; no two values of `entropy` share a seed."""
    if kind in OWN:
        rng = np.random.default_rng([entropy, *kind.encode()])
        while True:
            yield OWN[kind](rng)
    for batch in itertools.count(entropy * BATCH):
        for row, _ in reasoning_gym.read(f"{reasoning_gym.PREFIX}{GENERATORS[kind]}:{BATCH}:{batch}"):
            yield {**row, "completion": DEMONSTRATIONS[kind](row["prompt"], row["answer"])}


# Demonstrations ------------------------------------------------------------------------------------


def tag(answer: object) -> str:
    """The answer, where verifiers look for it."""
    return f"<answer>{answer}</answer>"


def _gcd(prompt: str, answer: str) -> str:
    parts = [f"{number} = {answer} * {number // int(answer)}" for number in _numbers(prompt)]
    return f"{', '.join(parts)}. {tag(answer)}"


def _product(prompt: str, answer: str) -> str:
    """By tens and ones of the second factor."""
    first, second = _numbers(prompt)
    tens, ones = second - second % 10, second % 10
    parts = [f"{first} * {part} = {first * part}" for part in (tens, ones) if part]
    return f"{', '.join(parts) or f'{first} * 0 = 0'}. {tag(answer)}"


def _factors(prompt: str, answer: str) -> str:
    """The number, and what is left of it after every factor."""
    left = [_numbers(prompt)[0]]
    for factor in _numbers(answer)[:-1]:
        left.append(left[-1] // factor)
    return f"{', '.join(map(str, left))}. {tag(answer)}"


def _letters(prompt: str, answer: str) -> str:
    """The word spelled first."""
    word = prompt.rsplit('"', 2)[1]
    return f"{'-'.join(word)}. {tag(answer)}"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


DEMONSTRATIONS: dict[str, Callable[[str, str], str]] = {
    "gcd": _gcd,
    "chain_sum": lambda _, answer: tag(answer),
    "products": _product,
    "letter_counting": _letters,
    "prime_factorization": _factors,
    "needle_haystack": lambda _, answer: tag(answer),
}


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
        case "contains":
            return wanted["start"].lower() in spoken
        case _:
            return _is_list_of_strings(text, wanted["count"])


def _is_list_of_strings(text: str, count: int) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and len(value) == count and all(isinstance(each, str) for each in value)


OWN_VERIFIERS: dict[str, Callable[[str, Any], bool]] = {
    "story": gsm8k_answer,
    "instruction": instruction_followed,
}


def mixture_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    kind: Sequence[str],
    answer: Sequence[Any],
    reasoning_gym: Sequence[str],
    index: Sequence[int],
    finished: Sequence[bool] | None = None,
    **_: object,
) -> list[float | None]:
    """1 where the completion ended by itself and its kind's verifier accepts it wholly, else 0."""
    ended = finished if finished is not None else [True] * len(completions)
    scores: dict[int, float | None] = {}
    if gym := [row for row, name in enumerate(kind) if name in GENERATORS]:
        found = reasoning_gym_reward(
            [prompts[row] for row in gym],
            [completions[row] for row in gym],
            reasoning_gym=[reasoning_gym[row] for row in gym],
            index=[index[row] for row in gym],
        )
        scores = dict(zip(gym, found, strict=True))
    rewards: list[float | None] = []
    for row, (text, name, wanted, end) in enumerate(zip(completions, kind, answer, ended, strict=True)):
        score = scores[row] if row in scores else float(OWN_VERIFIERS[name](text, wanted))
        rewards.append(None if score is None else float(bool(end) and score >= 1))
    return rewards
