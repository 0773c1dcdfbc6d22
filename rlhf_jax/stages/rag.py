"""Retrieval-augmented generation: an index made offline, passages found online, answers with their sources.

    rlhf rag --out runs/rag
    rlhf rag --out runs/notes --model ~/Llama-3.2-1B-Instruct --documents notes/ \\
        --instruction "Answer from the numbered passages and cite them as [1]." --ask "When does it open?"
    rlhf rag --out runs/asked --model runs/sft --index runs/rag/index --questions questions.jsonl

The first trains a small decoder to answer from passages about made-up people, then asks it about people it
has never met: in 6 minutes of CPU time 75 % of its answers are right and name the right
source. The second asks a policy of yours (a run folder or a Hugging Face folder) about your
documents (.txt, .md, or rows with `text`); with `--questions` (rows with `question`, and `answer` where it is
known) it answers a file of them. The run folder gets `index/`, `answers.jsonl` and `results.json`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import PromptExample, prompt_examples
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.generation import Sampling
from rlhf_jax.metrics.progress import Progress, final_table
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import completion_texts, make_generate_fn
from rlhf_jax.stages import common, embedded, inputs, sft
from rlhf_jax.tasks import facts
from rlhf_jax.tool_use import Chunk, RetrievalIndex, numbered_prompt, read_answer, split_document
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run

TEXTS = (".txt", ".md")
WORLDS = 8
"""In how many worlds the people to train on live; in each, other things are true of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of retrieval-augmented generation.

    Attributes:
      out: the run folder.
      model: run folder or Hugging Face folder of the policy; empty to train one on the embedded people.
      documents: files or folders to make the index of; none for the embedded people.
      index: folder of an index that another run made, instead of documents.
      questions: rows with `question`, and `answer` where it is known; empty for the embedded ones.
      ask: one question; the answer and its sources are printed.
      instruction: what the policy is told before the passages.
      top_k: how many a question gets at most; without `ask`, each number from 0 to this is measured.
      chunk_size: words of a passage at most.
      chunk_overlap: words of the end of a passage that begin the next one too.
      people: embedded people whose documents are indexed, none of whom was trained on.
      missing_rate: share of the training questions whose answer is in no passage, to learn to say so.
      sft_steps: optimizer steps of the policy that is trained.
      max_new_tokens: tokens of an answer.
      batch_size: questions at a time.
      seed: decides the people, the order of the data, and initial weights.
      resume: go on with the training in the folder.
      quiet: show no progress.
    """

    out: Path = Path("runs/rag")
    model: str = ""
    documents: tuple[str, ...] = ()
    index: str = ""
    questions: str = ""
    ask: str = ""
    instruction: str = ""
    top_k: int = 4
    chunk_size: int = 6
    chunk_overlap: int = 0
    people: int = 128
    missing_rate: float = 0.15
    sft_steps: int = 1400
    max_new_tokens: int = 20
    batch_size: int = 64
    seed: int = 0
    resume: bool = False
    quiet: bool = False
    arch: common.ArchOptions = common.ArchOptions()


# Documents -----------------------------------------------------------------------------------------


def read_documents(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(text, source) of every document.

    Raises:
      UserError: a path is missing, or of a kind that is not read, or a row has no text.
    """
    for path in map(files.as_path, paths):
        is_folder = files.is_folder(path)
        inside = [path / name for name in files.list_files(path)] if is_folder else []
        found = [file for file in inside if file.suffix in TEXTS] if is_folder else [path]
        if not found:
            raise UserError(f"--documents {path}: no {' or '.join(TEXTS)} file in this folder: name another")
        for file in found:
            if file.suffix not in TEXTS:
                yield from _texts_of_rows(file)
                continue
            try:
                yield files.read_text(file), str(file.relative_to(path) if is_folder else file)
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file}: cannot be read as UTF-8 text ({error}): mend or leave it out"
                ) from None


def _texts_of_rows(file: files.Path) -> Iterator[tuple[str, str]]:
    for row in read_rows(file):
        text = row.fields.get("text")
        if not isinstance(text, str):
            raise UserError(f"{row.where}: no field `text`: give one, or remove the row")
        yield text, str(row.fields.get("source", row.where))


def make_index(options: Options, documents: Iterator[tuple[str, str]]) -> RetrievalIndex:
    """An index of documents cut into passages."""
    size = {"chunk_size": options.chunk_size, "chunk_overlap": options.chunk_overlap}
    chunks = [chunk for text, source in documents for chunk in split_document(text, source, **size)]
    if not chunks:
        raise UserError("--documents hold no text: give some")
    return RetrievalIndex(chunks)


def documents_of(people: Sequence[facts.Person]) -> Iterator[tuple[str, str]]:
    """Their documents."""
    return ((person.document, person.name) for person in people)


# The policy that is trained ------------------------------------------------------------------------


def training_rows(options: Options) -> list[dict[str, str]]:
    """Questions about people of several worlds, with the passages that are found, and sourced answers."""
    rng = np.random.default_rng([options.seed, *b"passages"])
    rows = []
    for world in range(WORLDS):
        people = facts.people("train", facts.num_people("train"), options.seed * WORLDS + world)
        index = make_index(options, documents_of(people))
        for question in questions_about(people):
            found = index.search(question["question"], options.top_k + 1)
            if rng.random() < options.missing_rate:
                found = [chunk for chunk in found if not says(chunk, question)]
            given = found[: rng.integers(options.top_k + 1)]
            sources = [number for number, chunk in enumerate(given, 1) if says(chunk, question)]
            completion = f"{question['answer']} [{sources[0]}]" if sources else facts.UNKNOWN
            rows.append({"prompt": numbered_prompt(question["question"], given), "completion": completion})
    return rows


def questions_about(people: Sequence[facts.Person]) -> list[dict[str, str]]:
    """All questions about them, as rows of a file."""
    return [
        {"question": question, "answer": answer}
        for person in people
        for question, answer in person.questions()
    ]


def says(chunk: Chunk, question: dict[str, str]) -> bool:
    """Whether the answer stands in a passage."""
    return question["answer"].casefold() in chunk.text.casefold()


def train_policy(options: Options) -> Path:
    """The run folder of a policy that answers from passages."""
    out, data = options.out / "sft", options.out / "training.json"
    files.write_json(data, training_rows(options))
    facts.facts_tokenizer().save(options.out / "tokenizer")
    stage = sft.Options(
        run=common.RunOptions(
            out,
            options.seed,
            resume=options.resume,
            steps=options.sft_steps,
            quiet=options.quiet,
            report=False,
        ),
        arch=options.arch,
        data=str(data),
        **embedded.FROM_SCRATCH,
        tokenizer=str(options.out / "tokenizer"),
    )
    sft.run(common.brief(stage))
    return out


# Answers -------------------------------------------------------------------------------------------


def read_questions(options: Options) -> list[dict[str, str]]:
    """Rows of the file, or questions about the embedded people who are held out.

    Raises:
      UserError: a row has no question, or a field is no text.
    """
    if not options.questions:
        return questions_about(held_out(options))
    questions = []
    for row in read_rows(options.questions):
        fields = {name: row.fields[name] for name in ("question", "answer") if name in row.fields}
        if "question" not in fields or not all(isinstance(text, str) for text in fields.values()):
            raise UserError(f"{row.where}: `question` must be there, and it and `answer` text: mend the row")
        questions.append(fields)
    return questions


def held_out(options: Options) -> list[facts.Person]:
    """The embedded people whose documents are indexed."""
    return facts.people("heldout", options.people, options.seed)


class Answerer:
    """A policy that answers from passages.

    Args:
      longest: tokens of the longest prompt.
    """

    def __init__(self, options: Options, model: Policy, longest: int) -> None:
        self._options, self._model = options, model
        self._generate = make_generate_fn(
            model,
            prompt_length=longest,
            max_new_tokens=options.max_new_tokens,
            sampling=Sampling(temperature=0.0),
        )

    def answer(self, examples: Sequence[PromptExample], name: str) -> list[str]:
        """The most likely answer to each prompt."""
        answers: list[str] = []
        with Progress(name, len(examples), quiet=self._options.quiet) as progress:
            for part in inputs.parts(len(examples), min(self._options.batch_size, len(examples))):
                chosen = [examples[place] for place in part]
                answers += completion_texts(
                    self._model.tokenizer, self._generate(self._model.params, chosen, jax.random.key(0))
                )
                progress.update(min(len(answers), len(examples)))
        return answers[: len(examples)]


def encode(options: Options, model: Policy, questions: Sequence[dict[str, str]], given: Sequence[Any]):
    """Prompts as tokens."""
    prompts = [
        numbered_prompt(question["question"], chunks, options.instruction)
        for question, chunks in zip(questions, given, strict=True)
    ]
    rows = [Row({"prompt": prompt}, f"question {number}") for number, prompt in enumerate(prompts, 1)]
    return prompt_examples(rows, model.tokenizer, max_length=inputs.UNBOUNDED)


def judge(question: dict[str, str], given: Sequence[Chunk], text: str) -> dict[str, Any]:
    """An answer as answers.jsonl has it; right or wrong only where the right one is known."""
    answer = read_answer(text, len(given))
    cited = [given[place] for place in answer.cited]
    judged: dict[str, Any] = {}
    if "answer" in question:
        judged = {
            "answer": question["answer"],
            "found": any(says(chunk, question) for chunk in given),
            "right": answer.text.casefold() == question["answer"].casefold(),
            "sourced": any(says(chunk, question) for chunk in cited),
            "unknown": answer.text.casefold() == facts.UNKNOWN,
        }
    return {
        "question": question["question"],
        "text": answer.text,
        "cited": [chunk.source for chunk in cited],
        "invented": answer.hallucinated_citations,
        "given": [chunk.source for chunk in given],
        **judged,
    }


def summary(judged: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all questions; `admitted` are those of the unfound to which the policy says so."""
    known = [row for row in judged if "right" in row]
    unfound = [row for row in known if not row["found"]]
    return {
        "questions": len(judged),
        "judged": len(known),
        "found": sum(row["found"] for row in known),
        "right": sum(row["right"] for row in known),
        "right_and_sourced": sum(row["right"] and row["sourced"] for row in known),
        "unfound": len(unfound),
        "admitted": sum(row["unknown"] for row in unfound),
        "invented_citations": sum(row["invented"] for row in judged),
    }


def measure(options: Options, model: Policy, index: RetrievalIndex) -> dict[int, list[dict[str, Any]]]:
    """Answers to all questions with 0, 1, ... passages."""
    questions = read_questions(options)
    found = [index.search(question["question"], options.top_k) for question in questions]
    prompts = {
        count: encode(options, model, questions, [chunks[:count] for chunks in found])
        for count in range(options.top_k + 1)
    }
    longest = max(len(example.ids) for examples in prompts.values() for example in examples)
    policy = Answerer(options, model, longest)
    judged = {}
    for count, examples in prompts.items():
        texts = policy.answer(examples, f"{count} passages")
        rows = zip(questions, found, texts, strict=True)
        judged[count] = [judge(question, chunks[:count], text) for question, chunks, text in rows]
    return judged


def share(successes: int, trials: int) -> str:
    """A proportion in words."""
    if not trials:
        return "-"
    interval = wilson_interval(successes, trials)
    return f"{interval.mean:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def show(results: dict[int, dict[str, Any]]) -> None:
    """Prints the table."""
    if not next(iter(results.values()))["judged"]:
        return
    final_table(
        "Held-out questions by passages given; 95 % Wilson intervals",
        ["passages", "answer among them", "right", "right and sourced", "says unknown where it is not"],
        [
            [
                count,
                *(share(row[name], row["judged"]) for name in ("found", "right", "right_and_sourced")),
                share(row["admitted"], row["unfound"]),
            ]
            for count, row in results.items()
        ],
    )


def ask(options: Options, model: Policy, index: RetrievalIndex) -> None:
    """Answers one question, with the passages it names."""
    given = index.search(options.ask, options.top_k)
    examples = encode(options, model, [{"question": options.ask}], [given])
    text = Answerer(options, model, len(examples[0].ids)).answer(examples, "answer")[0]
    answer = read_answer(text, len(given))
    print(answer.text)
    for place, chunk in enumerate(given):
        print(f"{'*' if place in answer.cited else ' '} [{place + 1}] {chunk.source}: {chunk.text}")
    if answer.hallucinated_citations:
        print(f"The answer names {answer.hallucinated_citations} passages that it was not given.")


def check(options: Options) -> None:
    """Raises: UserError where options contradict each other."""
    if options.documents and options.index:
        raise UserError("--documents and --index exclude each other: give one of them")
    if options.ask and options.questions:
        raise UserError("--ask and --questions exclude each other: give one of them")
    if not options.model and (options.documents or options.index or options.questions):
        raise UserError(
            "documents and questions of yours need a policy that can read them: name it with --model"
        )
    if (options.documents or options.index) and not (options.ask or options.questions):
        raise UserError("there is nothing to answer: give --ask or --questions")
    for name in ("top_k", "chunk_size", "max_new_tokens", "batch_size", "people", "sft_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} is below 1: raise it")
    if not 0 <= options.chunk_overlap < options.chunk_size:
        raise UserError(
            f"--chunk-overlap {options.chunk_overlap} is not from 0 to below --chunk-size: lower it"
        )
    if not 0 <= options.missing_rate <= 1:
        raise UserError(f"--missing-rate {options.missing_rate} is no share: give one from 0 to 1")
    if options.people > (most := facts.num_people("heldout")):
        raise UserError(f"--people {options.people}: there are {most} who are held out: lower it")


def run(options: Options) -> None:
    """Makes the index, answers, and writes what came of it."""
    check(options)
    describe_run(options.out, common.to_json(options), stage="rag")
    model = load(options.model or train_policy(options))
    if options.index:
        index = RetrievalIndex.load(Path(options.index))
    else:
        documents = (
            read_documents(options.documents) if options.documents else documents_of(held_out(options))
        )
        index = make_index(options, documents)
        index.save(options.out / "index")
    if options.ask:
        ask(options, model, index)
        return
    judged = measure(options, model, index)
    lines = ({"passages": count, **row} for count, rows in judged.items() for row in rows)
    files.write_lines(options.out / "answers.jsonl", lines)
    results = {count: summary(rows) for count, rows in judged.items()}
    files.write_json(options.out / "results.json", results)
    show(results)
