"""Answers from documents: a small decoder that learns to read passages about people it has never met.

    python experiments/pipelines/retrieval.py --out runs/retrieval
    python experiments/pipelines/retrieval.py --out runs/more --sft-steps 2000 --top-k 5

People, their documents and the questions about them are made up (`rlhf_jax.tasks.facts`). The decoder learns
by `rlhf sft` to answer from what BM25 finds, with the source, or to say "unknown"; then `rlhf rag` asks it
about people whom it meets in the documents only, with 0, 1, ... passages a question. In 6 minutes of CPU time
74 % of its answers with four passages are right and name the right source. The run folder holds the policy's,
that of each number of passages, and `results.json`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_stages

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import final_table
from rlhf_jax.retrieval.chunks import numbered_prompt
from rlhf_jax.stages import option_checks, option_groups, rag, sft
from rlhf_jax.stages.entry import Given
from rlhf_jax.tasks import facts
from rlhf_jax.training.run_folder import describe_run

WORLDS = 8
"""In how many worlds the people to train on live; in each, other things are true of them."""
CHUNK_SIZE = 6
"""Words of a passage: a sentence about one of the people."""


@dataclasses.dataclass(frozen=True)
class Options(pipeline_stages.OneSeed):
    """Options of answers from documents.

    Attributes:
      out: the run folder.
      seed: decides the people, the order of the data, and initial weights.
      resume: go on with the run in the folder where it stopped.
      arch: the decoder.
      people: people whose documents are indexed, none of whom was trained on.
      top_k: passages that a question gets at most; each number from 0 to this is measured.
      missing_rate: share of the training questions whose answer is in no passage, to learn to say so.
      sft_steps: optimizer steps of the policy.
      max_new_tokens: tokens of an answer.
      batch_size: questions at a time.
      quiet: show no progress.
    """

    out: Path = Path("runs/retrieval")
    seed: int = 0
    resume: bool = False
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    people: int = 128
    top_k: int = 4
    missing_rate: float = 0.15
    sft_steps: int = 1400
    max_new_tokens: int = 20
    batch_size: int = 64
    quiet: bool = False


def check(options: Options) -> None:
    """Raises: UserError where an option is out of range."""
    pipeline_stages.check(options, ("people", "top_k", "sft_steps", "max_new_tokens", "batch_size"))
    if not 0 <= options.missing_rate <= 1:
        raise UserError(f"--missing-rate {options.missing_rate} is no share: give one from 0 to 1")
    if options.people > (most := facts.num_people("heldout")):
        raise UserError(f"--people {options.people}: there are {most} who are held out: lower it")


# Data ------------------------------------------------------------------------------------------------


def held_out(options: Options) -> list[facts.Person]:
    """The people whose documents are indexed."""
    return facts.people("heldout", options.people, options.seed)


def documents_of(people: Sequence[facts.Person]) -> Iterator[tuple[str, str]]:
    """(text, source) of their documents."""
    return ((person.document, person.name) for person in people)


def questions_about(people: Sequence[facts.Person]) -> list[dict[str, str]]:
    """All questions about them, as rows of a file."""
    return [
        {"question": question, "answer": answer}
        for person in people
        for question, answer in person.questions()
    ]


def training_rows(options: Options) -> list[dict[str, str]]:
    """Questions about people of several worlds, with the passages that are found, and sourced answers."""
    rng = np.random.default_rng([options.seed, *b"passages"])
    rows = []
    for world in range(WORLDS):
        people = facts.people("train", facts.num_people("train"), options.seed * WORLDS + world)
        index = rag.make_index(documents_of(people), chunk_size=CHUNK_SIZE)
        for question in questions_about(people):
            found = index.search(question["question"], options.top_k + 1)
            if rng.random() < options.missing_rate:
                found = [chunk for chunk in found if not rag.says(chunk, question)]
            given = found[: rng.integers(options.top_k + 1)]
            sources = [number for number, chunk in enumerate(given, 1) if rag.says(chunk, question)]
            completion = f"{question['answer']} [{sources[0]}]" if sources else facts.UNKNOWN
            rows.append({"prompt": numbered_prompt(question["question"], given), "completion": completion})
    return rows


# Stages ----------------------------------------------------------------------------------------------


def train_policy(options: Options) -> Path:
    """The run folder of a policy that answers from passages."""
    out = options.out / "sft"
    facts.facts_tokenizer().save(options.out / "tokenizer")
    stage = sft.Options(
        run=pipeline_stages.run_options(options, out, options.seed, options.sft_steps),
        arch=options.arch,
        data="made-up people",
        tokenizer=str(options.out / "tokenizer"),
        **pipeline_stages.SFT,
    )
    sft.run(option_checks.brief(stage), Given(rows=training_rows(options)))
    return out


def ask(options: Options, policy: Path) -> dict[int, dict[str, Any]]:
    """What `rlhf rag` counts with 0, 1, ... passages a question."""
    people = held_out(options)
    documents, questions = options.out / "documents.jsonl", options.out / "questions.jsonl"
    files.write_lines(documents, [{"text": text, "source": source} for text, source in documents_of(people)])
    files.write_lines(questions, questions_about(people))
    results = {}
    for count in range(options.top_k + 1):
        out = options.out / f"passages_{count}"
        stage = rag.Options(
            out=out,
            model=str(policy),
            documents=(str(documents),),
            questions=str(questions),
            instruction="",
            unknown=facts.UNKNOWN,
            top_k=count,
            chunk_size=CHUNK_SIZE,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            quiet=True,
        )
        rag.run(stage)
        results[count] = files.read_json(out / "results.json")
    return results


def run(options: Options) -> None:
    """Both stages, and the table."""
    check(options)
    describe_run(options.out, option_checks.to_json(options), stage="retrieval")
    results = ask(options, train_policy(options))
    files.write_json(options.out / "results.json", results)
    if options.quiet:
        return
    final_table(
        "Held-out questions by passages given; 95 % Wilson intervals",
        ["passages", "answer among them", "right", "right and sourced", "says unknown where it is not"],
        [
            [
                str(count),
                *(rag.share(row[name], row["judged"]) for name in ("found", "right", "right_and_sourced")),
                rag.share(row["admitted"], row["unfound"]),
            ]
            for count, row in results.items()
        ],
    )


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
