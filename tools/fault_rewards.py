"""A reward for the runs that a campaign of faults damages."""

from collections.abc import Sequence


def mixed(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """The letters of an answer, in a way that few are alike: every run learns what a resume could miss."""
    return [sum(map(ord, text)) % 7 / 7 for text in completions]
