"""What post-training may cost: general answers, prose, facts, instructions that are never trained on.

Nothing here is among the tasks that a policy is trained on. `smollm2_abilities.json` holds answers to general
questions and plain prose, whose log-likelihood is taken, and questions with four choices, the right one
first, of which the likeliest a token is taken. Short instructions about the form of an answer each have a
rule that says whether they were followed.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import SupervisedExample, supervised_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.evaluation.likelihood import (
    Likelihood,
    choose,
    make_continuation_fn,
    rolling_requests,
    score_requests,
)
from rlhf_jax.models import Policy
from rlhf_jax.rollout.texts import make_answer_texts_fn

HELD = Path(__file__).with_suffix(".json")
WINDOW = 256
BATCH = 16
NEW_TOKENS = 40

TOPICS = ("dogs", "rain", "music", "bread", "trees", "the moon", "trains", "winter")
Rule = Callable[[str], bool]
INSTRUCTIONS: Mapping[str, tuple[str, Rule]] = {
    "upper": ("Write one short sentence about {topic} in capital letters only.", lambda text: text.isupper()),
    "quotes": (
        "Write one short sentence about {topic}. Put your whole answer in double quotes.",
        lambda text: len(text) > 2 and text[0] == text[-1] == '"',
    ),
    "ending": (
        "Write one short sentence about {topic}. End your answer with the word DONE.",
        lambda text: text.rstrip(".!").endswith("DONE"),
    ),
    "question": (
        "Ask me one short question about {topic}.",
        lambda text: text.endswith("?") and text.count("?") == 1,
    ),
    "brief": ("Say something about {topic} in at most eight words.", lambda text: 0 < len(text.split()) <= 8),
}
"""Kinds of instructions, and whether an answer follows them."""


def instructions() -> list[tuple[str, Rule]]:
    """Every kind about every topic."""
    return [(ask.format(topic=topic), rule) for topic in TOPICS for ask, rule in INSTRUCTIONS.values()]


def measure(policy: Policy) -> dict[str, float]:
    """`chat` and `prose` in nats a token; shares of the `panel` and the `instructions` that are right."""
    tokenizer, held = policy.tokenizer, files.read_json(HELD, keys=("conversations", "prose", "panel"))
    score = jax.jit(make_continuation_fn(policy.make_greedy_match_fn()))

    def likelihoods(requests: Sequence[SupervisedExample]) -> list[Likelihood]:
        batches = score_requests(score, policy.params, requests, batch_size=BATCH)
        found = {place: one for batch in batches for place, one in batch.items()}
        return [found[place] for place in range(len(requests))]

    def answers(rows: Sequence[Mapping[str, str]]) -> list[Likelihood]:
        return likelihoods(supervised_examples(as_rows(rows), tokenizer, max_length=1 << 20))

    def chosen(asked: Mapping[str, Any]) -> int:
        rows = [{"prompt": asked["question"], "completion": choice} for choice in asked["choices"]]
        return choose(answers(rows), asked["choices"]).tokens

    prose = [window for text in held["prose"] for window in rolling_requests(tokenizer, text, WINDOW)]
    return {
        "chat": nats_a_token(answers(held["conversations"])),
        "prose": nats_a_token(likelihoods(prose)),
        "panel": float(np.mean([chosen(asked) == 0 for asked in held["panel"]])),
        "instructions": followed(policy),
    }


def nats_a_token(found: Sequence[Likelihood]) -> float:
    """Mean log-likelihood over all tokens."""
    return sum(each.logp for each in found) / sum(each.tokens for each in found)


def followed(policy: Policy) -> float:
    """Share of the instructions that the likeliest answers follow."""
    asked = instructions()
    prompts = [encode_prompt(policy.tokenizer, prompt) for prompt, _ in asked]
    answer = make_answer_texts_fn(policy, max_new_tokens=NEW_TOKENS, batch_size=BATCH)
    said = {place: one for batch in answer(prompts, jax.random.key(0)) for place, one in batch.items()}
    obeyed = [
        said[place].finished and rule(said[place].text.strip()) for place, (_, rule) in enumerate(asked)
    ]
    return float(np.mean(obeyed))
