"""Problems of the package reasoning-gym as rows: over a hundred generators, each with a verifier of its own.

A spec such as `reasoning-gym:gcd+chain_sum?max_terms=2:500:7` names generators, settings of each, how many
problems each makes, and their seed. The package's problems follow from these alone, so that a row only says
which problem it is, and `rewards.verifiers.reasoning_gym_reward` makes it again to score an answer.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import optional

PREFIX = "reasoning-gym:"
COUNT = 1000
_SPEC = re.compile(r"reasoning-gym:(?P<tasks>[^:]+)(?::(?P<count>\d{1,9}))?(?::(?P<seed>\d{1,9}))?")


@dataclasses.dataclass(frozen=True)
class Generator:
    """One generator of problems.

    Attributes:
      name: as reasoning-gym has it.
      settings: of it, beside the package's own.
      count: problems; some generators make other ones where they make more.
      seed: of all of them.
    """

    name: str
    settings: tuple[tuple[str, Any], ...]
    count: int
    seed: int

    def problems(self) -> Any:
        """The package's data set.

        Raises:
          UserError: there is no such generator, or its settings do not fit.
        """
        gym = optional("reasoning_gym", extra="reasoning-gym")
        try:
            return gym.create_dataset(self.name, size=self.count, seed=self.seed, **dict(self.settings))
        # A generator checks its settings by assertions and constructors of its own.
        except Exception as error:
            names = list(gym.factory.DATASETS)
            near = difflib.get_close_matches(self.name, names, n=1)
            if self.name not in names:
                hint = f"did you mean {near[0]}?" if near else "`reasoning_gym.factory.DATASETS` has all"
                raise UserError(f"reasoning-gym has no generator {self.name!r}; {hint}") from None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"reasoning-gym: {self.name} does not take {dict(self.settings)} ({reason}); "
                "look at its config class in the package"
            ) from None


def parse(spec: str) -> list[Generator]:
    """The generators that a spec names.

    Raises:
      UserError: it is not of the form reasoning-gym:NAME[?SETTING=VALUE&...][+NAME...][:COUNT[:SEED]].
    """
    match = _SPEC.fullmatch(spec)
    if match is None or match["count"] == "0":
        raise UserError(
            f"{spec}: write reasoning-gym:NAME[+NAME...][:COUNT[:SEED]], such as reasoning-gym:gcd:500:7"
        )
    count, seed = int(match["count"] or COUNT), int(match["seed"] or 0)
    found = []
    for task in match["tasks"].split("+"):
        name, _, query = task.partition("?")
        pairs = [pair.partition("=") for pair in query.split("&")] if query else []
        if not name.isidentifier() or any(not (key.isidentifier() and equals) for key, equals, _ in pairs):
            raise UserError(f"{spec}: {task!r} is not of the form NAME or NAME?SETTING=VALUE&SETTING=VALUE")
        if {"seed", "size"} & {key for key, _, _ in pairs}:
            raise UserError(f"{spec}: count and seed stand behind the names: reasoning-gym:{name}:500:7")
        found.append(Generator(name, tuple((key, _value(text)) for key, _, text in pairs), count, seed))
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read(spec: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(fields, place) of each row, one problem of each generator in turn.

    Fields are `prompt`, `answer` (one right answer; others may be right as well), `reasoning_gym` (the
    generator, as a spec) and `index`.

    Raises:
      UserError: the spec is malformed, or names what is not there; the package is not installed.
    """
    generators = [(one, _spec_of(one), one.problems()) for one in parse(spec)]
    for index in range(generators[0][0].count):
        for one, single, problems in generators:
            try:
                problem = problems[index]
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"reasoning-gym: {one.name} cannot make problem {index} of {one.count} with seed "
                    f"{one.seed} ({reason}); choose other settings"
                ) from None
            fields = {"prompt": problem["question"], "answer": problem["answer"]}
            yield {**fields, "reasoning_gym": single, "index": index}, f"{single}:{index}"


def _spec_of(one: Generator) -> str:
    query = "&".join(f"{name}={json.dumps(value)}" for name, value in one.settings)
    return f"{PREFIX}{one.name}{'?' * bool(query)}{query}:{one.count}:{one.seed}"
