"""Feedback of a model: choices among a few words, comparisons, ratings, and propositions about an answer.

A model that answers a question by one word of a few is asked once, and its answer is a distribution: the
probabilities of the words' first tokens at the place where it would speak, normalised over them (Lee et al.
2023). Everything here works on texts: the model may have another tokenizer than the policy that it judges.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.numerics import is_finite_number
from rlhf_jax.core.types import Array, Bool, Float, Int, Params
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.feedback.constitution import Principle, check_template, read_constitution
from rlhf_jax.models import Policy
from rlhf_jax.rewards.functions import RewardFn, call_reward, load_reward
from rlhf_jax.training.loading import load

ChooseFn = Callable[[Sequence[str]], np.ndarray]

_COLUMNS = 16
"""Widths of batches are multiples of this, so that few are compiled."""


# Choices -------------------------------------------------------------------------------------------


def make_choose_fn(model: Policy, choices: Sequence[str], *, batch_size: int = 256) -> ChooseFn:
    """`choose(questions) -> [N, C]`: how probably the model answers each question by each choice.

    Args:
      choices: words that begin with different tokens; no other answer counts.
      batch_size: questions at a time.

    Raises:
      UserError: two choices begin with the same token, or several processes ask.
    """
    if jax.process_count() > 1:
        raise UserError("a model that judges is asked by one process: run without --coordinator")
    ids = _first_ids(model.tokenizer, choices)
    choose = jax.jit(_make_choice_fn(model, ids))

    def run(questions: Sequence[str]) -> np.ndarray:
        prompts = [encode_prompt(model.tokenizer, question) for question in questions]
        found = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            width = -(-max(map(len, part)) // _COLUMNS) * _COLUMNS
            missing = -len(part) % distributed.shards_of_batch(distributed.current_mesh())
            batch = left_pad(part + part[-1:] * missing, width, pad_id=model.tokenizer.pad_id)
            answers = choose(model.params, *distributed.shard_batch(batch))
            found.append(distributed.local_values(answers)[: len(part)])
        return np.concatenate(found) if found else np.zeros((0, len(choices)), np.float32)

    return run


def _first_ids(tokenizer: Tokenizer, choices: Sequence[str]) -> list[int]:
    ids = [tokenizer.encode(choice)[0] for choice in choices]
    for place, one in enumerate(ids):
        if one in ids[:place]:
            same = choices[ids.index(one)]
            raise UserError(
                f"the choices {same!r} and {choices[place]!r} begin with the same token: choose others"
            )
    return ids


def _make_choice_fn(model: Policy, ids: Sequence[int]) -> Callable[..., Float[Array, "B C"]]:
    def choose(params: Params, tokens: Int[Array, "B P"], mask: Bool[Array, "B P"]) -> Float[Array, "B C"]:
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        logits, _ = model.prefill(params, tokens, positions, mask.astype(jnp.int32), tokens.shape[1])
        return jax.nn.softmax(logits[:, jnp.asarray(ids)].astype(jnp.float32), axis=-1)

    return choose


# Comparisons and ratings ------------------------------------------------------------------------------


def make_model_judge(model: Policy, principles: Sequence[Principle]) -> RewardFn:
    """A judge as `judging.compare_by_judge` takes one: how probably a completion beats its opponent.

    The completion stands first in the question; asking the other way around as well, and averaging, is left
    to the one who asks. Of several principles it is the mean.
    """
    choose_fns = [make_choose_fn(model, principle.choices) for principle in principles]

    def judge(
        prompts: Sequence[str], completions: Sequence[str], *, opponents: Sequence[str], **_: object
    ) -> np.ndarray:
        texts = list(zip(prompts, completions, opponents, strict=True))
        asked = zip(principles, choose_fns, strict=True)
        return np.mean([choose([p.compare(*row) for row in texts])[:, 0] for p, choose in asked], axis=0)

    return judge


def make_rating_reward(model: Policy, principles: Sequence[Principle]) -> RewardFn:
    """The score that a judge expects to give, as a reward (direct RLAIF, Lee et al. 2023), in [-1, 1].

        sum_i v_i P(rating i | prompt, completion),    v from -1, the worst rating, to 1 in equal steps

    Of several principles it is the mean.
    """
    choose_fns = [make_choose_fn(model, principle.ratings) for principle in principles]
    values = [np.linspace(-1, 1, len(principle.ratings)) for principle in principles]

    def reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> np.ndarray:
        texts = list(zip(prompts, completions, strict=True))
        asked = zip(principles, choose_fns, values, strict=True)
        return np.mean([choose([p.rate(*row) for row in texts]) @ v for p, choose, v in asked], axis=0)

    return reward


# Propositions ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proposition:
    """Something that is true of an answer or not (Mu et al. 2024).

    Attributes:
      name: for tables.
      question: asked of a grader, with the places {prompt} and {answer}; the feature is how probably it says
        yes rather than no.
      function: instead of that, a reward function by path, whose value is the feature.
      weight: in the rule-based reward.
    """

    name: str
    question: str = ""
    function: str = ""
    weight: float = 0.0


FeaturesFn = Callable[[Sequence[str], Sequence[str], Mapping[str, Sequence[Any]]], np.ndarray]


def make_features_fn(propositions: Sequence[Proposition], grader: Policy | None) -> FeaturesFn:
    """`features(prompts, completions, fields) -> [N, F]`, one number per proposition.

    Raises:
      UserError: a question and no grader to answer it, or no such function.
    """
    asked = any(proposition.question for proposition in propositions)
    if asked and grader is None:
        raise UserError("propositions are asked as questions, and there is no grader: give --grader RUN")
    choose = make_choose_fn(grader, ("yes", "no")) if asked and grader else None
    functions = {p.name: load_reward(p.function) for p in propositions if p.function}

    def features(
        prompts: Sequence[str], completions: Sequence[str], fields: Mapping[str, Sequence[Any]]
    ) -> np.ndarray:
        columns = []
        for proposition in propositions:
            if choose is None or proposition.function:
                column = call_reward(functions[proposition.name], prompts, completions, fields)
            else:
                texts = zip(prompts, completions, strict=True)
                column = choose([proposition.question.format(prompt=p, answer=a) for p, a in texts])[:, 0]
            columns.append(column)
        return np.stack(columns, axis=1).astype(np.float32)

    return features


def make_rules_reward(propositions: Sequence[Proposition], grader: Policy | None) -> RewardFn:
    """sum_i w_i phi_i(prompt, completion): the rules' part of the reward; a reward model is added by name."""
    features, weights = make_features_fn(propositions, grader), np.array([p.weight for p in propositions])

    def reward(prompts: Sequence[str], completions: Sequence[str], **fields: Sequence[Any]) -> np.ndarray:
        return features(prompts, completions, fields) @ weights

    return reward


# Files ----------------------------------------------------------------------------------------------


def load_reward_file(path: Path) -> RewardFn:
    """A reward that a JSON file describes, in which paths are relative to its folder.

        {"kind": "rating", "model": RUN, "constitution": FILE}
        {"kind": "rules", "grader": RUN, "propositions": [{"name", "question" or "function", "weight"}, ...]}

    Raises:
      UserError: there is no such file, it describes no reward, or what it names is not there.
    """
    try:
        data = json.loads(files.read_text(path))
        kind = data["kind"]
        if kind not in ("rating", "rules"):
            raise ValueError(f"kind {kind!r} is neither rating nor rules")
        named = data["model"] if kind == "rating" else data.get("grader")
        folder = files.follow(path.parent, named) if named else None
        constitution = path.parent / (data["constitution"] if kind == "rating" else "")
        propositions = [] if kind == "rating" else [Proposition(**entry) for entry in data["propositions"]]
        if kind == "rules":
            check_propositions(propositions, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: describes no reward ({error}): see rlhf_jax.feedback.judges") from error
    model = load(folder if files.exists(folder) else named) if folder else None
    if kind == "rules" or model is None:
        return make_rules_reward(propositions, model)
    return make_rating_reward(model, read_constitution(constitution))


def check_propositions(propositions: Sequence[Proposition], where: Path) -> list[Proposition]:
    """Raises: UserError where one cannot be graded, or two have one name."""
    for place, proposition in enumerate(propositions):
        what = f"{where}: proposition {place + 1}"
        texts = (proposition.name, proposition.question, proposition.function)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{what}: its name, question and function are texts: give them as texts")
        if bool(proposition.question) == bool(proposition.function):
            raise UserError(f"{what}: give either a question or a function")
        if proposition.question:
            check_template(proposition.question, {"prompt", "answer"}, what)
        if not is_finite_number(proposition.weight) or proposition.name in [
            p.name for p in propositions[:place]
        ]:
            raise UserError(f"{what}: give it a name of its own, and a finite weight")
    if not propositions:
        raise UserError(f"{where}: holds no proposition: give at least one")
    return list(propositions)
