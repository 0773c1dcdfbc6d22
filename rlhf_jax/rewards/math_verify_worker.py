"""Worker process for math-verify. Nothing else imports this: the package is an extra."""

# basedpyright: reportMissingImports=false
import logging

from math_verify import LatexExtractionConfig, parse, verify as math_verify

logging.disable(logging.CRITICAL)  # it logs every answer that it cannot read


def verify(task: tuple[str, str]) -> bool | None:
    """True if (completion, reference) agree; None where math-verify reads nothing in the reference."""
    completion, reference = task
    # Its own time-outs are alarms, which sympy's deeper loops can miss; the process has limits instead.
    expected = parse(f"\\boxed{{{reference}}}", [LatexExtractionConfig()], parsing_timeout=None)
    if not expected:
        return None
    return bool(math_verify(expected, parse(completion, parsing_timeout=None), timeout_seconds=None))


verify(("It is $\\frac{1}{2}$.", "0.5"))  # loads sympy's modules, before the clock of the first task runs
