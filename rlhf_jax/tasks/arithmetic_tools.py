"""The embedded task with numbers too large for the head, and a calculator.

    prompt      473+298=?
    assistant   <tool_call>
                {"name": "calculator", "arguments": {"expression": "473+298"}}
                </tool_call>
    tool        771
    assistant   #### 771

Some writers answer at once instead, and are wrong: what pays is left for RL to find out. Prompts are those
of `arithmetic.prompt_rows` at this level.
"""

import numpy as np

from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.tasks.arithmetic import Level, Problem, Row, arithmetic_tokenizer, draw_problems

TOOL_LEVEL = Level(operands=2, low=100, high=999, operators="+-")

_CALL_WORDS = ("<tool_call>", "</tool_call>", '{"name": "calculator", "arguments": {"expression": "', '"}}')


def tool_demonstration_rows(level: Level, count: int, seed: int, *, call_rate: float) -> list[Row]:
    """Rows for supervised fine-tuning: `messages` with calls and the calculator's replies, and `answer`.

    Args:
      call_rate: share of the writers who use the calculator; the others guess within 200 of the answer.
    """
    rng = np.random.default_rng([seed, *b"tool demonstration"])
    rows = []
    for problem in draw_problems(rng, level, "train", count):
        if rng.random() < call_rate:
            turns = calculator_turns(problem)
        else:
            guess = problem.answer + int(rng.integers(-200, 201))
            turns = [{"role": "assistant", "content": f"{ANSWER_MARK} {guess}"}]
        messages = [{"role": "user", "content": problem.text}, *turns]
        rows.append({"messages": messages, "answer": str(problem.answer)})
    return rows


def calculator_turns(problem: Problem) -> list[Row]:
    """The turns of a writer who calls the calculator and copies what it says."""
    call = {"name": "calculator", "arguments": {"expression": problem.text.removesuffix("=?")}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": str(problem.answer)},
        {"role": "assistant", "content": f"{ANSWER_MARK} {problem.answer}"},
    ]


def tool_tokenizer() -> Tokenizer:
    """The embedded task's characters, and the fixed parts of a call as one token each."""
    return arithmetic_tokenizer(_CALL_WORDS)
