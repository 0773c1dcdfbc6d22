"""Retrieval-augmented generation: an index made offline, passages found online, answers with their sources.

    rlhf rag --out runs/notes --model ~/Llama-3.2-1B-Instruct --documents notes/ --ask "When does it open?"
    rlhf rag --out runs/asked --model runs/sft --index runs/notes/index --questions questions.jsonl
    rlhf rag --out runs/closed --model runs/sft --index runs/notes/index --questions questions.jsonl --top-k 0

Documents are .txt and .md files, folders of them, or rows with `text`; they are cut into passages of whole
sentences, which BM25 ranks. Rows of --questions have `question`, and `answer` where it is known. The run
folder gets `index/`, and with questions `answers.jsonl` and `results.json`: how often the answer stood in a
passage, was given, and was given with its source.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, Length, PositiveInt
from rlhf_jax.data.examples import PromptExample, prompt_examples
from rlhf_jax.data.sources import Row, read_rows, reference_of
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.generation import Sampling
from rlhf_jax.metrics.progress import Progress, final_table
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import completion_texts, make_generate_fn
from rlhf_jax.stages import inputs, option_checks
from rlhf_jax.tool_use import Chunk, RetrievalIndex, numbered_prompt, read_answer, split_document
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run

TEXTS = (".txt", ".md")
INSTRUCTION = (
    "Answer the question from the numbered passages alone, and name those that you use, as [1]. "
    "Where none of them answers it, say: unknown"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of retrieval-augmented generation.

    Attributes:
      out: the run folder.
      model: the policy that answers: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache.
      documents: files or folders to make the index of.
      index: folder of an index that another run made, instead of documents.
      questions: rows with `question`, and `answer` where it is known.
      ask: one question, instead of a file of them; the answer and its sources are printed.
      instruction: what the policy is told before the passages; nothing with --top-k 0.
      unknown: what it says where no passage answers; such answers are counted.
      top_k: passages that a question gets at most; 0 to ask without any.
      chunk_size: words of a passage at most.
      chunk_overlap: words of the end of a passage that begin the next one too.
      max_new_tokens: tokens of an answer.
      batch_size: questions at a time.
      quiet: show no progress.
    """

    out: Path = Path("runs/rag")
    model: str
    documents: tuple[str, ...] = ()
    index: str = ""
    questions: str = ""
    ask: str = ""
    instruction: str = INSTRUCTION
    unknown: str = "unknown"
    top_k: Count = 4
    chunk_size: PositiveInt = 100
    chunk_overlap: Count = 0
    max_new_tokens: Length = 128
    batch_size: PositiveInt = 16
    quiet: bool = False


def check(options: Options) -> None:
    """Raises: UserError where options contradict each other."""
    if bool(options.documents) == bool(options.index):
        raise UserError("give the passages: either --documents, or the --index that another run made of them")
    if bool(options.ask) == bool(options.questions):
        raise UserError("give something to answer: either --ask, or a file of --questions")
    option_checks.check_numbers(options)
    if options.chunk_overlap >= options.chunk_size:
        raise UserError(f"--chunk-overlap {options.chunk_overlap} is not below --chunk-size: lower it")


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
        yield text, str(reference_of(row, "source") or row.where)


def make_index(
    documents: Iterable[tuple[str, str]], *, chunk_size: int, chunk_overlap: int = 0
) -> RetrievalIndex:
    """An index of documents, (text, source) each, cut into passages as `split_document` does."""
    size = {"chunk_size": chunk_size, "chunk_overlap": chunk_overlap}
    chunks = [chunk for text, source in documents for chunk in split_document(text, source, **size)]
    if not chunks:
        raise UserError("--documents hold no text: give some")
    return RetrievalIndex(chunks)


# Answers -------------------------------------------------------------------------------------------


def says(chunk: Chunk, question: dict[str, str]) -> bool:
    """True if the answer stands in a passage."""
    return question["answer"].casefold() in chunk.text.casefold()


def read_questions(path: str) -> list[dict[str, str]]:
    """Questions of a file, with their answers where they are known.

    Raises:
      UserError: a row has no question, or a field is no text.
    """
    questions = []
    for row in read_rows(path):
        fields = {name: row.fields[name] for name in ("question", "answer") if name in row.fields}
        if "question" not in fields or not all(isinstance(text, str) for text in fields.values()):
            raise UserError(f"{row.where}: `question` must be there, and it and `answer` text: mend the row")
        questions.append(fields)
    return questions


def answer_all(options: Options, model: Policy, examples: Sequence[PromptExample]) -> list[str]:
    """The most likely answer to each prompt."""
    generate = make_generate_fn(
        model,
        prompt_length=max(len(example.ids) for example in examples),
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(temperature=0.0),
    )
    answers: list[str] = []
    with Progress("answers", len(examples), quiet=options.quiet) as progress:
        for part in inputs.parts(len(examples), min(options.batch_size, len(examples))):
            chosen = [examples[place] for place in part]
            answers += completion_texts(model.tokenizer, generate(model.params, chosen, jax.random.key(0)))
            progress.update(min(len(answers), len(examples)))
    return answers[: len(examples)]


def encode(options: Options, model: Policy, questions: Sequence[dict[str, str]], given: Sequence[Any]):
    """Prompts as tokens."""
    instruction = options.instruction if options.top_k else ""
    prompts = [
        numbered_prompt(question["question"], chunks, instruction)
        for question, chunks in zip(questions, given, strict=True)
    ]
    rows = [Row({"prompt": prompt}, f"question {number}") for number, prompt in enumerate(prompts, 1)]
    return prompt_examples(rows, model.tokenizer, max_length=inputs.UNBOUNDED)


def judge(question: dict[str, str], given: Sequence[Chunk], text: str, unknown: str) -> dict[str, Any]:
    """An answer as answers.jsonl has it; right or wrong only where the right one is known.

    Args:
      unknown: what is said where no passage answers.
    """
    answer = read_answer(text, len(given))
    cited = [given[place] for place in answer.cited]
    judged: dict[str, Any] = {}
    if "answer" in question:
        judged = {
            "answer": question["answer"],
            "found": any(says(chunk, question) for chunk in given),
            "right": answer.text.casefold() == question["answer"].casefold(),
            "sourced": any(says(chunk, question) for chunk in cited),
            "unknown": answer.text.casefold() == unknown.casefold(),
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


def measure(options: Options, model: Policy, index: RetrievalIndex) -> list[dict[str, Any]]:
    """Answers to all questions, judged where their answers are known."""
    questions = read_questions(options.questions)
    found = [index.search(question["question"], options.top_k) for question in questions]
    texts = answer_all(options, model, encode(options, model, questions, found))
    rows = zip(questions, found, texts, strict=True)
    return [judge(question, chunks, text, options.unknown) for question, chunks, text in rows]


def share(successes: int, trials: int) -> str:
    """A proportion in words."""
    if not trials:
        return "-"
    interval = wilson_interval(successes, trials)
    return f"{interval.mean:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    rows = [
        ("answer among the passages", share(result["found"], result["judged"])),
        ("right", share(result["right"], result["judged"])),
        ("right and sourced", share(result["right_and_sourced"], result["judged"])),
        ("says unknown where it is not", share(result["admitted"], result["unfound"])),
        ("citations of passages that were not there", str(result["invented_citations"])),
    ]
    final_table(f"{result['questions']} questions; 95 % Wilson intervals", ["what", "share"], rows)


def ask(options: Options, model: Policy, index: RetrievalIndex) -> None:
    """Answers one question, with the passages it names."""
    given = index.search(options.ask, options.top_k)
    examples = encode(options, model, [{"question": options.ask}], [given])
    text = answer_all(options, model, examples)[0]
    answer = read_answer(text, len(given))
    print(answer.text)
    for place, chunk in enumerate(given):
        print(f"{'*' if place in answer.cited else ' '} [{place + 1}] {chunk.source}: {chunk.text}")
    if answer.hallucinated_citations:
        print(f"The answer names {answer.hallucinated_citations} passages that it was not given.")


def run(options: Options) -> None:
    """Makes the index, answers, and writes what came of it."""
    check(options)
    describe_run(options.out, option_checks.to_json(options), stage="rag")
    model = load(options.model)
    if options.index:
        index = RetrievalIndex.load(Path(options.index))
    else:
        size = {"chunk_size": options.chunk_size, "chunk_overlap": options.chunk_overlap}
        index = make_index(read_documents(options.documents), **size)
        index.save(options.out / "index")
    if options.ask:
        ask(options, model, index)
        return
    judged = measure(options, model, index)
    files.write_lines(options.out / "answers.jsonl", judged)
    result = summary(judged)
    files.write_json(options.out / "results.json", result)
    if not options.quiet:
        show(result)
