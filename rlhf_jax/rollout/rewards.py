"""Rewards of rollouts: terms from functions of texts and from reward models, weighted and summed."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.arguments import told, typed
from rlhf_jax.core.axes import constrain
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Finite
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import ScalarModel
from rlhf_jax.rewards.calls import ALL_AT_ONCE, RewardCalls
from rlhf_jax.rewards.functions import RewardFn, Scored, score_rows
from rlhf_jax.rollout.sampler import completion_texts

Rewards = Annotated[Sequence[Any], "a list of functions or reward models, each alone or as (it, weight)"]
TermFn = Callable[[Rollout, Sequence[PromptExample], Sequence[str], np.ndarray], Scored]
"""(rollout, prompts, completions, rows) -> the scores of these rows."""


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One of the rewards that are summed.

    Attributes:
      name: of the function or of the reward model's folder, with `@KIND` where it has a kind; no two are
        the same.
      score_fn: what it says of some rows.
      weight: in the sum.
      kind: it counts in rows whose field `kind` is this; None for all rows.
    """

    name: str
    score_fn: TermFn
    weight: float = 1.0
    kind: str | None = None

    def rows(self, prompts: Sequence[PromptExample]) -> np.ndarray:
        """Numbers of the rows in which it counts."""
        counts = [self.kind in (None, prompt.fields.get("kind")) for prompt in prompts]
        return np.flatnonzero(counts)


@dataclasses.dataclass(frozen=True)
class RolloutReward:
    """`reward(rollout, prompts) -> [B]`, the weighted sum of its terms.

    Attributes:
      terms: rewards of whole completions; without any, no row can be scored.
      tokenizer: what completions are read with.
      texts_fn: (tokenizer, rollout) -> the completions.
      fields_fn: (tokenizer, rollout) -> what reward functions are given beside the fields of the rows.
    """

    terms: tuple[RewardTerm, ...]
    tokenizer: Tokenizer
    texts_fn: Callable[[Tokenizer, Rollout], list[str]] = completion_texts
    fields_fn: Callable[[Tokenizer, Rollout], Mapping[str, list[Any]]] = lambda *_: {}

    def __call__(self, rollout: Rollout, prompts: Sequence[PromptExample]) -> np.ndarray:
        """The rewards alone; NaN without terms."""
        return self.score(rollout, prompts).rewards if self.terms else np.full(len(prompts), np.nan)

    def score(self, rollout: Rollout, prompts: Sequence[PromptExample]) -> Scored:
        """The rewards, which rows some term could not score, and what each term says."""
        completions = self.texts_fn(self.tokenizer, rollout)
        prompts = _with_fields(prompts, self.fields_fn(self.tokenizer, rollout))
        rewards, unscorable = np.zeros(len(prompts), np.float32), np.full(len(prompts), not self.terms)
        terms: dict[str, np.ndarray] = {}
        for term in self.terms:
            rows = term.rows(prompts)
            part = term.score_fn(rollout, prompts, completions, rows)
            terms[term.name] = np.full(len(prompts), np.nan, np.float32)
            terms[term.name][rows] = part.rewards
            rewards[rows] += np.float32(term.weight) * part.rewards
            unscorable[rows] |= part.unscorable
        return Scored(rewards, unscorable, terms)

    def check_kinds(self, prompts: Sequence[PromptExample]) -> None:
        """Raises: UserError where a term is meant for a kind of prompts that none is of."""
        for term in self.terms:
            if not len(term.rows(prompts)):
                known = sorted({str(prompt.fields.get("kind")) for prompt in prompts})
                raise UserError(
                    f"reward '{term.name}': no prompt has '{term.kind}' in its field kind (there are "
                    f"{', '.join(known)}): mend the reward or the data"
                )


def _with_fields(
    prompts: Sequence[PromptExample], fields: Mapping[str, list[Any]]
) -> Sequence[PromptExample]:
    if not fields:
        return prompts
    rows = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
    pairs = zip(prompts, rows, strict=True)
    return [dataclasses.replace(prompt, fields=prompt.fields | row) for prompt, row in pairs]


def make_reward_fn(
    rewards: Sequence[RewardFn | tuple[RewardFn, float] | ScalarModel | RewardTerm],
    tokenizer: Tokenizer,
    *,
    calls: RewardCalls = ALL_AT_ONCE,
) -> RolloutReward:
    """The weighted sum of rewards.

    Args:
      rewards: each a function (`rewards.functions`) or a reward model, alone or with its weight, or a term
        that says all of it.
      calls: how functions are called.

    Raises:
      UserError: there is none, or one is nothing of the kind.
    """
    typed("rewards", Rewards, rewards)
    if not rewards:
        raise UserError("no reward is given: name one, such as my_rewards:exact_match")
    terms: list[RewardTerm] = []
    for reward in rewards:
        term = _as_term(reward, calls)
        if term.name in {other.name for other in terms}:  # such as reward models of two runs
            term = dataclasses.replace(term, name=f"{term.name}_{len(terms) + 1}")
        terms.append(term)
    return RolloutReward(tuple(terms), tokenizer)


def _as_term(reward: Any, calls: RewardCalls) -> RewardTerm:
    if isinstance(reward, RewardTerm):
        return reward
    function, weight = reward if isinstance(reward, tuple) and len(reward) == 2 else (reward, 1.0)
    if isinstance(function, ScalarModel):
        return RewardTerm("reward_model", model_term(function), _weight(weight))
    if not callable(function):
        raise UserError(
            f"reward {told(function)} is no function: give one that takes (prompts, completions, **fields) "
            "and returns a number for each completion, or a reward model, such as run.reward_model"
        )
    name = getattr(function, "__name__", type(function).__name__)
    return RewardTerm(name, function_term(function, calls), _weight(weight))


def _weight(weight: Any) -> float:
    return float(typed("the weight of a reward", Finite, weight))


def function_term(reward_fn: RewardFn, calls: RewardCalls = ALL_AT_ONCE) -> TermFn:
    """Reward term of a function of texts, over rows of a rollout."""

    def term(
        rollout: Rollout, prompts: Sequence[PromptExample], completions: Sequence[str], rows: np.ndarray
    ) -> Scored:
        numbers: list[int] = rows.tolist()
        fields = reward_fields(rollout, prompts)
        chosen = {name: [values[row] for row in numbers] for name, values in fields.items()}
        asked = [prompts[row] for row in numbers]
        texts, said = [prompt.text for prompt in asked], [completions[row] for row in numbers]
        if not said:
            return Scored(np.zeros(0, np.float32), np.zeros(0, bool))
        return score_rows(reward_fn, texts, said, chosen, where=[p.where for p in asked], calls=calls)

    return term


def reward_fields(rollout: Rollout, prompts: Sequence[PromptExample]) -> dict[str, list[Any]]:
    """Keyword arguments of reward functions: fields of the rows, and what is known of each completion."""
    names = {name for prompt in prompts for name in prompt.fields} - {"prompt"}
    fields: dict[str, Any] = {name: [p.fields.get(name) for p in prompts] for name in sorted(names)}
    mask, finished = map(distributed.local_values, (rollout.sequences.mask, rollout.finished))
    fields["finished"] = finished.tolist()
    fields["token_count"] = mask.sum(axis=1).tolist()
    # Completions begin in one column, where each row has its first token.
    fields["token_limit"] = [mask.shape[1] - int(mask.any(axis=0).argmax())] * len(prompts)
    return fields


def model_term(model: ScalarModel) -> TermFn:
    """Reward term of a reward model, over rows of a rollout; its tokenizer is the policy's."""
    reward_fn = model.body.make_reward_fn()
    score = jax.jit(lambda params, rows: constrain(reward_fn(params, rows), "batch"))

    def term(rollout: Rollout, _: Sequence[PromptExample], __: Sequence[str], rows: np.ndarray) -> Scored:
        rewards = distributed.local_values(score(model.params, rollout.sequences))[rows]
        return Scored(rewards, np.zeros(len(rewards), bool))

    return term
