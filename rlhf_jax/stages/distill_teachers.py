"""Teachers of distillation: one model, several, or the policy that sees what the student does not."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.algorithms import distillation
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.pipeline import fingerprint
from rlhf_jax.data.row_messages import prompt_messages
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import Policy
from rlhf_jax.stages.adapting import TrainableSplit
from rlhf_jax.stages.entry import Given
from rlhf_jax.stages.inputs import Prompts
from rlhf_jax.stages.reward_specs import check_same_vocabulary
from rlhf_jax.training.loading import load

SelfTeacher = Literal["current", "ema", "initial"]


def load_teachers(names: Sequence[str], given: Given) -> list[Policy]:
    """The teachers that were given or named, of one vocabulary; none where the policy teaches itself."""
    if given.teacher is None:
        teachers = [load(name) for name in names]
    else:
        teachers = [given.teacher] if isinstance(given.teacher, Policy) else list(given.teacher)
        names = ["teacher"] * len(teachers)
    for name, teacher in zip(names, teachers, strict=True):
        check_same_vocabulary(teacher.tokenizer, teachers[0].tokenizer, Path(name), "teacher")
    return teachers


def make_teacher_params_fn(
    self_teacher: SelfTeacher | None, split: TrainableSplit
) -> Callable[[distillation.State, Any], Sequence[Params]]:
    """`teacher_params(state, held)`: parameters of each teacher.

    Args:
      self_teacher: which version of the policy teaches; None for other models, whose parameters are `held`.
        Of `initial`, `held` is what the learner has lost: `split.original`.
    """

    def teacher_params(state: distillation.State, held: Any) -> Sequence[Params]:
        match self_teacher:
            case None:
                return held
            case "initial":
                return [split.reference(state.learner, held)]
            case _:
                return [state.teacher_params]

    return teacher_params


# What the teacher sees -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TeacherContext:
    """Prompts of the teacher, in which a field of the row stands beside what the student sees.

    Attributes:
      ids: of each prompt to train on, by the identity of its example.
      length: columns for the longest.
      pad_id: what stands before a shorter one.
    """

    ids: dict[int, np.ndarray]
    length: int
    pad_id: int

    def fingerprint(self) -> str:
        """Changes with any token of any prompt."""
        return fingerprint(self.ids.values())

    def prompts(self, chosen: Sequence[PromptExample]) -> distillation.TeacherPrompts:
        """Teacher prompts of some rows, where the mesh wants them."""
        rows = left_pad([self.ids[id(prompt)] for prompt in chosen], self.length, pad_id=self.pad_id)
        return distillation.TeacherPrompts(*distributed.shard_batch(rows))


def make_teacher_context(prompts: Prompts, tokenizer: Tokenizer, field: str, template: str) -> TeacherContext:
    """The teacher's prompts.

    Args:
      field: of the rows: a demonstration, a hint, feedback.
      template: of the last user message, with `{prompt}` and `{context}`.

    Raises:
      UserError: a row has no text there, or no user message.
    """
    ids = {}
    for prompt in prompts.train:
        context = prompt.fields.get(field)
        if not isinstance(context, str) or not context.strip():
            raise UserError(
                f"{prompt.where}: the field {field!r} of --teacher-context holds no text: give it one"
            )
        messages = with_context(prompt, context, template)
        ids[id(prompt)] = np.array(encode_prompt(tokenizer, messages), np.int32)
    return TeacherContext(ids, max(map(len, ids.values())), tokenizer.pad_id)


def with_context(prompt: PromptExample, context: str, template: str) -> list[dict[str, Any]]:
    """Messages of a prompt whose last user turn was put into the template together with the context."""
    messages = [dict(message) for message in prompt_messages(Row(prompt.fields, prompt.where))]
    turn = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if turn is None:
        raise UserError(f"{prompt.where}: there is no user message that --teacher-context could stand beside")
    before, after = template.split("{prompt}")
    # The parts are filled in one by one: a prompt may hold the word "{context}".
    turn["content"] = turn["content"].join(part.replace("{context}", context) for part in (before, after))
    return messages


def count_parameters(teachers: Sequence[Policy]) -> int:
    """Parameters of all teachers together."""
    return sum(leaf.size for teacher in teachers for leaf in jax.tree.leaves(teacher.params))
