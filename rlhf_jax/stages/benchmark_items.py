"""The benchmarks that `benchmark.py` offers: their options, and their rows as requests and prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from rlhf_jax.core.ranges import Count, Length, Range
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import SupervisedExample, labeled_examples
from rlhf_jax.data.sources import Row
from rlhf_jax.evaluation.benchmarks import (
    NO_SUBJECT,
    Form,
    Problem,
    Question,
    chat_prompt,
    choice_turns,
    plain_prompt,
    read_problems,
    read_questions,
)
from rlhf_jax.evaluation.likelihood import opening_ids, plain_request
from rlhf_jax.models import Policy
from rlhf_jax.stages import embedded, inputs

EMBEDDED_COUNT = 512
QUESTION = "Question: "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Multiple choice by likelihood: the answer that a model finds likeliest.

    Attributes:
      data: rows with `question`, `choices`, `answer` and perhaps `subject`: a path, tfds:NAME[:SPLIT], or
        arithmetic:LEVEL (held-out problems; choices are whole solutions).
      form: letters (choices are listed, a letter is the answer), answers (whole answers are compared), or
        continuation (the question goes on as a choice).
      shots: worked examples before each question.
      shots_data: rows that they are taken from; empty for the others of `data`.
      chat: lay prompts out with the model's chat template, whose end of turn then belongs to an answer.
      count: items at most; 0 for all.
    """

    data: str
    form: Form = "letters"
    shots: Count = 0
    shots_data: str = ""
    chat: bool = False
    count: Count = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Generative item: graded by what the model writes.

    Attributes:
      data: rows with `question` or `prompt`, and `answer`: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      reward: the verifier, a reward function by path; empty for exact answers on the embedded task and
        GSM8K's rule elsewhere.
      shots: worked examples before each question.
      shots_data: rows that they are taken from; empty for the others of `data`.
      chat: lay prompts out with the model's chat template.
      count: items at most; 0 for all.
      max_new_tokens: tokens of an answer.
      stop: texts at which an answer ends.
    """

    data: str
    reward: str = ""
    shots: Count = 0
    shots_data: str = ""
    chat: bool = False
    count: Count = 0
    max_new_tokens: Length = 256
    stop: tuple[str, ...] = (QUESTION.strip(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness:
    """Tasks of lm-evaluation-harness (pip install lm_eval), which fetches their data itself.

    Attributes:
      tasks: their names.
      shots: worked examples before each question; -1 for what the task says.
      limit: items of a task at most; 0 for all.
      include: folder with tasks of your own.
      chat: lay prompts out with the model's chat template.
      max_length: tokens of a prompt with what is scored; longer ones lose their beginning.
    """

    tasks: tuple[str, ...]
    shots: Annotated[int, Range(-1)] = -1
    limit: Count = 0
    include: str = ""
    chat: bool = False
    max_length: Length = 2048


Task = (
    Annotated[Choices, tyro.conf.subcommand("choices")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Harness, tyro.conf.subcommand("harness")]
)


# Multiple choice -----------------------------------------------------------------------------------


def load_questions(task: Choices, seed: int) -> tuple[list[Question], list[Question]]:
    """(questions, what shots are taken from)."""

    def read(spec: str, split: embedded.Split) -> list[Question]:
        count = task.count or EMBEDDED_COUNT
        return read_questions(
            inputs.load_rows(spec, lambda level: embedded.choice_rows(level, split, count, seed))
        )

    questions = read(task.data, "heldout")
    pool = questions
    if task.shots and (task.shots_data or embedded.find_level(task.data)):
        pool = read(task.shots_data or task.data, "train")
    return questions[: task.count or None], pool


def choice_requests(
    task: Choices, model: Policy, question: Question, shots: Sequence[Question]
) -> tuple[list[SupervisedExample], list[str]]:
    """(a request for each choice, what each of them answers)."""
    turns, asked, answers = choice_turns(question, shots, task.form)
    if task.chat:
        messages = chat_prompt(turns, asked)
        rows = [
            Row({"prompt": messages, "completion": said, "label": True}, question.where) for said in answers
        ]
        examples = labeled_examples(rows, model.tokenizer, max_length=inputs.UNBOUNDED)
        return [example.after(example) for example in examples], answers
    words: dict[str, str] = {}
    if task.form == "letters":
        about = "" if question.subject == NO_SUBJECT else f" about {question.subject.replace('_', ' ')}"
        words["opening"] = f"The following are multiple choice questions (with answers){about}.\n\n"
    elif task.form == "answers":
        words["question"] = QUESTION
    else:
        words["answer"] = ""
    prompt = plain_prompt(turns, asked, **words)
    return [plain_request(model.tokenizer, prompt, f" {said}", question.where) for said in answers], answers


# Answers -------------------------------------------------------------------------------------------


def load_problems(task: Generate, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(problems, what shots are taken from)."""
    count = task.count or EMBEDDED_COUNT

    def worked(level: embedded.Level) -> list[dict[str, Any]]:
        return embedded.worked_rows(level, EMBEDDED_COUNT, seed)

    problems = read_problems(
        inputs.load_rows(task.data, lambda level: embedded.prompt_rows(level, "heldout", count, seed))
    )
    pool = problems
    if task.shots and (task.shots_data or embedded.find_level(task.data)):
        pool = read_problems(inputs.load_rows(task.shots_data or task.data, worked))
    return problems[: task.count or None], [problem for problem in pool if problem.solution]


def default_reward(data: str) -> str:
    """The verifier where none is named."""
    name = "exact_answer_reward" if embedded.find_level(data) else "gsm8k_reward"
    return f"rlhf_jax.rewards.verifiers:{name}"


def prompt_ids(task: Generate, model: Policy, problem: Problem, shots: Sequence[Problem]) -> list[int]:
    """The prompt of a problem."""
    turns = [(shot.text, shot.solution) for shot in shots]
    if task.chat:
        return encode_prompt(model.tokenizer, chat_prompt(turns, problem.text))
    ids = model.tokenizer.encode(plain_prompt(turns, problem.text, question=QUESTION))
    return [*opening_ids(model.tokenizer, ids), *ids]
