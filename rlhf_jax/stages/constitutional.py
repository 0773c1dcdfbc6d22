"""Constitutional AI, the supervised stage: a policy learns from its own answers as it would revise them.

    rlhf constitutional --out runs/constitutional
    rlhf constitutional --out runs/harmless --model runs/chat --constitution principles.txt \\
        --data prompts.jsonl --max-new-tokens 256 --revisions 2
    rlhf constitutional --out runs/warmer --review-temperature 0.7 --answer-batch-size 64

The first trains a small decoder to answer, criticise, revise and judge on the embedded task, where its
teachers answer carelessly but criticise well; it answers training problems, names the first wrong line,
writes the answer again, and is fine-tuned on that. With 512 prompts held-out exact match of its most likely
answers rose from 64 to 96 % (three seeds, 3 minutes of CPU time each, on a machine shared with other work).
Nobody says which answers are right. `revisions.jsonl` holds prompts, answers, critiques with their
principles, and revisions; what was revised is not revised again by --resume. The policy's run folder is
`OUT/policy`; that of the judge, for `preferences.py --judge-model` and `--rewards OUT/judge.json`, is
`OUT/skills` or `--model`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.feedback.constitution import Principle, constitution_rows, read_constitution
from rlhf_jax.feedback.revisions import Review, Turn, make_review_fn
from rlhf_jax.generation import Sampling
from rlhf_jax.metrics import Progress, final_table
from rlhf_jax.models import Policy
from rlhf_jax.rewards.functions import call_reward, load_reward
from rlhf_jax.stages import common, embedded, inputs, sft
from rlhf_jax.stages.rounds import check_held, prompt_of
from rlhf_jax.tasks import arithmetic_reviews as reviews
from rlhf_jax.tasks.arithmetic import Split
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, load_policy

DATA = "arithmetic:0"
VERIFIER = "rlhf_jax.rewards.verifiers:exact_answer_reward"
RATES = {"slip_rate": 0.3, "late_slip_rate": 0.7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the supervised stage; --steps are those of learning from revisions.

    Attributes:
      model: run folder of a policy that can criticise and revise; empty to train one on the embedded task.
      constitution: text file with a principle a line, or JSONL; empty for that of the embedded task.
      prompts: which prompts; rewards only measure answers and revisions, and choose nothing.
      skill_steps: optimizer steps of learning the skills, where there is no `model`.
      skill_rows: conversations that they are learned from.
      skill_batch_size: rows a step, into each of which several conversations are packed.
      revised: how many prompts are answered and revised.
      revisions: rounds of critique and revision, each by a principle that is drawn.
      batch_size: rows of a training step.
      answer_batch_size: prompts that are answered at a time.
      learning_rate: of learning from revisions, at its peak; None for that of `sft`, and on the embedded
        task for 3e-4.
      temperature: of answers.
      review_temperature: of critiques and revisions; 0 for the most likely ones.
    """

    run: tyro.conf.OmitArgPrefixes[common.RunOptions] = common.RunOptions(
        Path("runs/constitutional"), steps=60
    )
    arch: common.ArchOptions = common.ArchOptions()
    optimizer: OptimizerConfig = OptimizerConfig(schedule="cosine", warmup_steps=5, end_lr_ratio=0.1)
    model: str = ""
    constitution: str = ""
    prompts: tyro.conf.OmitArgPrefixes[common.PromptOptions] = common.PromptOptions(
        data=DATA, rewards=(VERIFIER,), max_new_tokens=32, prompt_count=4_000, eval_count=512
    )
    skill_steps: int = 1_400
    skill_rows: int = 16_000
    skill_batch_size: int = 6
    revised: int = 1_024
    revisions: int = 1
    batch_size: int = 64
    answer_batch_size: int = 256
    learning_rate: float | None = None
    temperature: float = 1.0
    review_temperature: float = 0.0


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other, or the folder holds another run."""
    common.check(options, options.run, "constitutional")
    for name in (
        "skill_steps",
        "skill_rows",
        "skill_batch_size",
        "revised",
        "revisions",
        "answer_batch_size",
    ):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    if bool(options.model) != bool(options.constitution):
        raise UserError("--model and --constitution go together: the embedded task brings both of its own")
    if not options.model and options.prompts.data != DATA:
        raise UserError(f"--data {options.prompts.data} needs a policy: give --model and --constitution")
    check_held(options, options.run)


# Skills ---------------------------------------------------------------------------------------------


def train_skills(options: Options) -> Path:
    """The run folder of a decoder that answers, criticises, revises and judges; trained where it is not."""
    out, run = options.run.out / "skills", options.run
    splits: tuple[tuple[str, Split, int], ...] = (
        ("skills.jsonl", "train", options.skill_rows),
        ("skills_held_out.jsonl", "heldout", 512),
    )
    for name, split, count in splits:
        rows = reviews.skill_rows(reviews.REVIEW_LEVEL, split, mixture(count), run.seed, **RATES)
        files.write_lines(run.out / name, rows)
    with files.disk_errors(run.out / "tokenizer"):
        reviews.review_tokenizer().save(run.out / "tokenizer")
    stage = sft.Options(
        run=dataclasses.replace(
            run, out=out, steps=options.skill_steps, eval_every=0, report=False, resume=_begun(out)
        ),
        arch=options.arch,
        **embedded.FROM_SCRATCH,
        data=str(run.out / "skills.jsonl"),
        eval_data=str(run.out / "skills_held_out.jsonl"),
        tokenizer=str(run.out / "tokenizer"),
        packing=True,
        max_length=208,
        batch_size=options.skill_batch_size,
    )
    sft.run(common.brief(stage))
    return out


def mixture(rows: int) -> reviews.Mixture:
    """Shares of the skills: reviews teach three of them."""
    shares = (rows * part // 16 for part in (9, 4, 1, 2))
    return reviews.Mixture(*shares)


def _begun(folder: Path) -> bool:
    return files.is_folder(folder / "checkpoints")


# Revisions --------------------------------------------------------------------------------------------


def revise(
    options: Options, model: Policy, principles: Sequence[Principle], prompts: Sequence[PromptExample]
) -> list[Review]:
    """Reviews of the prompts, kept in `revisions.jsonl` batch by batch; those that are there are read."""
    path, size = options.run.out / "revisions.jsonl", options.answer_batch_size
    rows = files.read_lines(path, keys=("prompt", "answer", "turns", "finished"))
    kept = len(rows) if len(rows) == len(prompts) else len(rows) // size * size
    if kept < len(rows):  # a batch torn by a stop is made again
        files.write_lines(path, rows[:kept])
    review = make_review_fn(
        model,
        principles,
        rounds=options.revisions,
        max_new_tokens=options.prompts.max_new_tokens,
        seed=options.run.seed,
        sampling=Sampling(temperature=options.temperature),
        review_sampling=Sampling(temperature=options.review_temperature),
    )
    with Progress("revisions", len(prompts), quiet=options.run.quiet) as progress:
        for start in range(kept, len(prompts), size):
            found = review(prompts[start : start + size], start)
            files.append_lines(path, (one.row() for one in found))
            progress.update(min(start + size, len(prompts)))
    return [_review(row) for row in files.read_lines(path)]


def _review(row: dict[str, Any]) -> Review:
    turns = tuple(Turn(**turn) for turn in row["turns"])
    return Review(row["prompt"], row["answer"], turns, row["finished"])


def rows_of(prompts: Sequence[PromptExample], found: Sequence[Review]) -> list[dict[str, Any]]:
    """Rows to train on: prompts with their last revisions, but those that were cut or say nothing."""
    return [
        {"prompt": prompt_of(prompt), "completion": one.revision}
        for prompt, one in zip(prompts, found, strict=True)
        if one.finished and one.revision.strip() and "\ufffd" not in one.revision
    ]


def describe(options: Options, prompts: Sequence[PromptExample], found: Sequence[Review]) -> dict[str, float]:
    """Answers and revisions in numbers; what a verifier says of them is for the eye alone."""
    names = sorted({name for prompt in prompts for name in prompt.fields} - {"prompt"})
    fields = {name: [prompt.fields.get(name) for prompt in prompts] for name in names}
    fields["finished"] = [True] * len(prompts)
    verifier = load_reward(options.prompts.eval_reward or options.prompts.rewards[0])

    def score(texts: list[str]) -> np.ndarray:
        return call_reward(verifier, [prompt.text for prompt in prompts], texts, fields)

    before, after = score([one.answer for one in found]), score([one.revision for one in found])
    return {
        "answers": float(before.mean()),
        "revisions": float(after.mean()),
        "mended": float(np.mean(after > before)),
        "spoilt": float(np.mean(after < before)),
        "changed": float(np.mean([one.answer != one.revision for one in found])),
        "finished": float(np.mean([one.finished for one in found])),
    }


# Everything -------------------------------------------------------------------------------------------


def train(options: Options, start: files.Path, rows: list[dict[str, Any]]) -> Path:
    """The run folder of the policy that has learnt from revisions."""
    data, folder = options.run.out / "rows.jsonl", options.run.out / "policy"
    files.write_lines(data, rows)
    rate = options.learning_rate if options.learning_rate or options.model else 3e-4
    run = dataclasses.replace(options.run, out=folder, report=False, resume=_begun(folder))
    sft.run(
        sft.Options(
            run=run,
            model=str(start),
            data=str(data),
            batch_size=min(options.batch_size, len(rows)),
            optimizer=options.optimizer,
            learning_rate=rate,
        )
    )
    return folder


def run(options: Options) -> None:
    """All of it; leaves `policy`, and what it learned from."""
    check(options)
    out = options.run.out
    principles = (
        read_constitution(options.constitution) if options.constitution else list(reviews.CONSTITUTION)
    )
    describe_run(out, common.to_json(options), stage="constitutional")
    start = files.as_path(options.model) if options.model else train_skills(options)
    model = load(start)
    files.write_lines(out / "constitution.jsonl", constitution_rows(principles))
    where = files.relative(out, start) if files.exists(start) else options.model
    judge = {"kind": "rating", "model": where, "constitution": "constitution.jsonl"}
    files.write_json(out / "judge.json", judge)

    prompts = inputs.load_prompts(options.prompts, model, options.run.seed)
    drawn = BatchSampler(len(prompts), options.revised, options.run.seed).indices(0)
    chosen = [prompts.train[index] for index in drawn]
    before = prompts.answer(model.params)
    found = revise(options, model, principles, chosen)
    rows = rows_of(chosen, found)
    if not rows:
        raise UserError(f"none of {len(found)} revisions ends by itself: raise --max-new-tokens")
    numbers: dict[str, Any] = {"train": describe(options, chosen, found), "rows": len(rows)}
    params = load_policy(train(options, start, rows)).params
    if prompts.evaluate is not None:
        numbers["before"] = prompts.evaluate(model.params, model.params).metrics()
        numbers["after"] = prompts.evaluate(params, model.params).metrics()
    files.write_json(out / "results.json", numbers)
    common.finish(options.run, inputs.before_and_after("constitutional", before, prompts.answer(params)))
    if not options.run.quiet:
        show(options, numbers)


def show(options: Options, numbers: dict[str, Any]) -> None:
    """Prints what came of it."""
    rows = [(f"training prompts: {name}", f"{value:.1%}") for name, value in numbers["train"].items()]
    for when in ("before", "after"):
        held_out = numbers.get(when, {})
        scores = {name: value for name, value in held_out.items() if "score" in name}
        rows += [(f"held-out {name} {when}", f"{value:.1%}") for name, value in scores.items()]
    final_table(f"constitutional: {options.run.out / 'policy'}", ["what", "value"], rows)
