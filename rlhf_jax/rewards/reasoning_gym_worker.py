"""Worker process for the verifiers of reasoning-gym. Nothing else imports this: the package is an extra."""

# basedpyright: reportMissingImports=false
import functools
from typing import Any

import reasoning_gym  # noqa: F401 (loaded before the clock of the first task runs)

from rlhf_jax.data.reasoning_gym import parse


@functools.lru_cache(maxsize=64)
def _problems(spec: str) -> Any:
    return parse(spec)[0].problems()


def score(task: tuple[str, str, int]) -> float:
    """The worth of (answer, generator, index), from 0 to 1; 0 where the verifier cannot read the answer."""
    answer, spec, index = task
    problems = _problems(spec)
    problem = problems[index]
    try:
        return float(problems.score_answer(answer, problem))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, SyntaxError):
        return 0.0
