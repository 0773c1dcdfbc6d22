"""Benchmarks: multiple choice by log-likelihood, answers checked by a verifier, tasks of the common harness.

    rlhf benchmark --model runs/sft --out runs/mmlu choices --data mmlu.jsonl --shots 5
    rlhf benchmark --model ~/Llama-3.2-1B --out runs/arc choices --data arc.jsonl \\
        --form answers
    rlhf benchmark --model runs/sft --out runs/sums choices --data arithmetic:1 \\
        --form answers --chat
    rlhf benchmark --model runs/sft --out runs/gsm8k generate --data gsm8k/test.jsonl \\
        --shots 4 --shots-data gsm8k/train.jsonl
    rlhf benchmark --model runs/sft --out runs/harness harness --tasks hellaswag --limit 100

`--model` is a run folder or a Hugging Face folder. The run folder gets `results.jsonl`, a line an item with
all that was scored; `summary.json` and `results.svg` with Wilson intervals for every subject and all items,
and a bootstrap interval for the mean over subjects. A run that was stopped goes on with --resume. Shots never
hold the question that they stand before.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt, Seed
from rlhf_jax.data.pipeline import fingerprint
from rlhf_jax.evaluation.benchmarks import (
    choose_shots,
)
from rlhf_jax.evaluation.likelihood import (
    Likelihood,
    choose,
    make_continuation_fn,
    score_requests,
)
from rlhf_jax.evaluation.lm_eval import lm_eval_model
from rlhf_jax.metrics.pages import SUMMARY
from rlhf_jax.metrics.progress import Progress
from rlhf_jax.models import Policy
from rlhf_jax.rewards.functions import load_reward, score_rows
from rlhf_jax.rollout.texts import Answer, make_answer_texts_fn
from rlhf_jax.stages import benchmark_items as items, benchmark_page, option_checks
from rlhf_jax.stages.benchmark_page import RESULTS
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Benchmark options: the model, and the items.

    Attributes:
      model: a run folder, a Hugging Face folder, a GGUF file or a name in the hub cache.
      out: the run folder of the benchmark.
      batch_size: rows at a time.
      seed: decides which problems of the embedded task.
      against: run folder of the same benchmark with another model, to be compared with item by item.
      resume: go on with the benchmark in the folder.
      quiet: show no progress.
      task: the benchmark.
    """

    model: str
    out: Path
    batch_size: PositiveInt = 16
    seed: Seed = 0
    against: str = ""
    resume: bool = False
    quiet: bool = False
    task: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[items.Task]]


# Multiple choice -----------------------------------------------------------------------------------


def run_choices(
    options: Options, task: items.Choices, model: Policy, held: Sequence[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Lines of the results that are not held yet, as they come."""
    questions, pool = items.load_questions(task, options.seed)
    done = {line["index"] for line in held}
    shots = [choose_shots(pool, question, task.shots) for question in questions]
    parts = [items.choice_requests(task, model, q, s) for q, s in zip(questions, shots, strict=True)]
    owners = [(item, place) for item, (requests, _) in enumerate(parts) for place in range(len(requests))]
    requests = [request for several, _ in parts for request in several]
    ids = [np.asarray(request.ids, np.int32) for request in requests]
    check_data(options, fingerprint(ids, [question.answer for question in questions]))
    found: list[dict[int, Likelihood]] = [{} for _ in questions]
    score = jax.jit(make_continuation_fn(model.make_greedy_match_fn()))

    def line(item: int) -> dict[str, Any]:
        question, answers = questions[item], parts[item][1]
        likelihoods = [found[item][place] for place in range(len(answers))]
        return {
            "index": item,
            "where": question.where,
            "subject": question.subject,
            "answer": question.answer,
            "chosen": dataclasses.asdict(choose(likelihoods, answers)),
            "choices": [dataclasses.asdict(each) for each in likelihoods],
            "shots": [shot.where for shot in shots[item]],
        }

    with Progress("choices", len(questions), completed=len(done), quiet=options.quiet) as progress:
        scored = score_requests(
            score,
            model.params,
            requests,
            batch_size=options.batch_size,
            wanted=lambda place: owners[place][0] not in done,
        )
        for batch in scored:
            for request, likelihood in batch.items():
                item, place = owners[request]
                found[item][place] = likelihood
            whole = {owners[request][0] for request in batch}
            whole = [i for i in sorted(whole) if i not in done and len(found[i]) == len(parts[i][1])]
            done.update(whole)
            yield [line(item) for item in whole]
            progress.update(len(done))


# Answers -------------------------------------------------------------------------------------------


def run_answers(
    options: Options, task: items.Generate, model: Policy, held: Sequence[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Lines of the results that are not held yet, as they come."""
    problems, pool = items.load_problems(task, options.seed)
    done = {line["index"] for line in held}
    verify = load_reward(task.reward or items.default_reward(task.data))
    shots = [choose_shots(pool, problem, task.shots) for problem in problems]
    prompts = [items.prompt_ids(task, model, p, s) for p, s in zip(problems, shots, strict=True)]
    ids = [np.asarray(prompt, np.int32) for prompt in prompts]
    check_data(options, fingerprint(ids, [problem.fields for problem in problems]))
    answer = make_answer_texts_fn(
        model, max_new_tokens=task.max_new_tokens, stop=task.stop, batch_size=options.batch_size
    )

    def lines(said: dict[int, Answer]) -> list[dict[str, Any]]:
        places = sorted(said)
        asked = [problems[item] for item in places]
        names = sorted({name for problem in asked for name in problem.fields} - {"prompt"})
        fields = {name: [problem.fields.get(name) for problem in asked] for name in names}
        fields["finished"] = [said[item].finished for item in places]
        texts, where = [said[item].text for item in places], [problem.where for problem in asked]
        scored = score_rows(verify, [problem.text for problem in asked], texts, fields, where=where)
        return [
            {
                "index": item,
                "where": problems[item].where,
                "subject": problems[item].subject,
                "reward": float(scored.rewards[row]),
                "unscorable": bool(scored.unscorable[row]),
                **dataclasses.asdict(said[item]),
                "shots": [shot.where for shot in shots[item]],
            }
            for row, item in enumerate(places)
        ]

    with Progress("generate", len(problems), completed=len(done), quiet=options.quiet) as progress:
        for batch in answer(prompts, jax.random.key(options.seed), lambda place: place not in done):
            fresh = {item: said for item, said in batch.items() if item not in done}
            done.update(fresh)
            yield lines(fresh)
            progress.update(len(done))


# The run -------------------------------------------------------------------------------------------


def check_data(options: Options, found: str) -> None:
    """Raises: UserError where the folder's benchmark scored other items."""
    option_checks.check_same_data(options.out, found, begun=files.exists(options.out / RESULTS))


def check(options: Options) -> None:
    """Raises: UserError where the options make no sense, or the folder holds another benchmark."""
    task = options.task
    option_checks.check_numbers(options)
    if not any(files.exists(options.out / name) for name in (RESULTS, SUMMARY)):
        return
    if not options.resume:
        raise UserError(f"{options.out} already holds a benchmark: add --resume, or choose another --out")
    again = f"remove {options.out}, or choose another --out"
    held = files.read_json(options.out / "config.json", keys=("config",), remedy=again)["config"]
    if held.get("task", {}).keys() != option_checks.to_json(task).keys():
        raise UserError(f"{options.out} holds another kind of benchmark: choose another --out")
    option_checks.check_same_options(options, held, options.out)


def run(options: Options) -> None:
    """Scores what is not scored yet, and sums up."""
    check(options)
    model, task = load(options.model), options.task
    describe_run(options.out, option_checks.to_json(options), stage="benchmark")
    if isinstance(task, items.Harness):
        run_harness(options, task, model)
        return
    path = options.out / RESULTS
    held = files.read_lines(path, keys=("index", "subject"))
    make: Callable[..., Iterator[list[dict[str, Any]]]]
    make = run_choices if isinstance(task, items.Choices) else run_answers
    for lines in make(options, task, model, held):
        files.append_lines(path, lines)
    keys = ("index", "subject", "where")
    other = files.read_lines(Path(options.against) / RESULTS, keys=keys) if options.against else None
    benchmark_page.write(options.out, files.read_lines(path, keys=keys), other, quiet=options.quiet)


def run_harness(options: Options, task: items.Harness, model: Policy) -> None:
    """The harness's own loop; its results are kept as they are."""
    name = str(options.model)
    adapter = lm_eval_model(model, name=name, batch_size=options.batch_size, max_length=task.max_length)
    import lm_eval  # pyright: ignore[reportMissingImports] (optional)
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    found = lm_eval.simple_evaluate(
        model=adapter,
        tasks=list(task.tasks),
        num_fewshot=None if task.shots < 0 else task.shots,
        limit=task.limit or None,
        apply_chat_template=task.chat,
        task_manager=TaskManager(include_path=task.include or None),
        log_samples=False,
    )
    files.write_json(options.out / SUMMARY, {"results": found["results"], "versions": found["versions"]})
    if not options.quiet:
        benchmark_page.show_harness(found["results"])
