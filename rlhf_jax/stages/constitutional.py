"""Constitutional AI, the supervised stage: a policy learns from its own answers as it would revise them.

    rlhf constitutional --out runs/harmless --model runs/chat --constitution principles.txt \\
        --data prompts.jsonl --max-new-tokens 256 --revisions 2
    rlhf constitutional --out runs/lora --model ~/Llama-3.2-1B-Instruct --constitution principles.txt \\
        --data prompts.jsonl --max-new-tokens 256 --adapter.kind lora
    rlhf constitutional --out runs/warmer --model runs/chat --constitution principles.jsonl \\
        --data prompts.jsonl --review-temperature 0.7 --answer-batch-size 64
    rlhf constitutional --out runs/both --model runs/chat --constitution principles.txt \\
        --data red_team.jsonl --extra-data helpful.jsonl --extra-share 0.5

The policy answers prompts, criticises each answer by a principle that is drawn, writes it again, and is
fine-tuned on that (Bai et al. 2022, section 3), beside --extra-data that people wrote to be helpful, lest it
learns to refuse everything. Nobody says which answers are right: --rewards, where given, only measure.
`revisions.jsonl` holds prompts, answers, critiques with their principles, and revisions; what was revised is
not revised again by --resume. The run folder of the policy that has learnt is `OUT/policy`; as a judge of
answers the one of --model serves, for `rlhf preferences --judge-model` and `--rewards OUT/judge.json`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path
from rlhf_jax.core.ranges import Count, GreedyTemperature, LearningRate, PositiveInt, ShareInside, Temperature
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.feedback.constitution import Principle, constitution_rows, read_constitution
from rlhf_jax.feedback.judges import load_reward_file
from rlhf_jax.feedback.revisions import Review, Turn, make_review_fn
from rlhf_jax.generation import Sampling
from rlhf_jax.metrics import Progress, final_table
from rlhf_jax.models import Policy
from rlhf_jax.rewards.calls import ALL_AT_ONCE, RewardCalls
from rlhf_jax.rewards.functions import RewardFn, call_reward, load_reward
from rlhf_jax.stages import adapting, defaults, edges, inputs, option_checks, option_groups, sft
from rlhf_jax.stages.entry import NOTHING, Given
from rlhf_jax.stages.rounds import check_held, folder_of, prompt_of
from rlhf_jax.stages.session import Session
from rlhf_jax.training.run_folder import describe_run, load_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the supervised stage; --steps are those of learning from revisions.

    Attributes:
      model: the policy, which can criticise and revise: a run folder, a Hugging Face folder, a GGUF file or a
        name in the hub cache.
      constitution: text file with a principle a line, or JSONL.
      prompts: which prompts; rewards only measure answers and revisions, and choose nothing.
      revised: how many prompts are answered and revised; 0 for all.
      revisions: rounds of critique and revision, each by a principle that is drawn.
      batch_size: rows of a training step.
      answer_batch_size: prompts that are answered at a time.
      learning_rate: of learning from revisions, at its peak; None for that of `rlhf sft`.
      temperature: of answers.
      review_temperature: of critiques and revisions; 0 for the most likely ones.
      extra_data: conversations that are learned from beside the revisions, as `rlhf sft --data` takes them,
        such as helpful answers that people wrote; empty for none.
      extra_share: their share of every batch; None for by the number of rows.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(
        Path("runs/constitutional")
    )
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.COSINE
    model: str
    constitution: str
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    revised: Count = 0
    revisions: PositiveInt = 1
    batch_size: PositiveInt = 64
    answer_batch_size: PositiveInt = 256
    learning_rate: LearningRate | None = None
    temperature: Temperature = 1.0
    review_temperature: GreedyTemperature = 0.0
    extra_data: str = ""
    extra_share: ShareInside | None = None


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other, or the folder holds another run."""
    option_checks.check(options, options.run, "constitutional")
    for name, least in (("revised", 0), ("revisions", 1), ("answer_batch_size", 1)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)}: give at least {least}")
    if options.extra_share is not None and not options.extra_data:
        raise UserError("--extra-share is that of --extra-data: give it, or leave the share out")
    check_held(options, options.run)


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


def text_reward(options: Options, given: Given) -> RewardFn | None:
    """The first reward, where it is a function of texts; reward models, which score tokens, are not."""
    first = [options.prompts.eval_reward] if options.prompts.eval_reward else []
    found = (first or inputs.rewards_of(options.prompts, given))[:1]
    reward: Any = found[0] if found else None
    if not isinstance(reward, str):
        return reward[0] if isinstance(reward, tuple) else reward
    name = reward.partition("=")[0].partition("@")[0]
    if name.endswith(".json"):
        return load_reward_file(Path(name))
    return load_reward(name) if is_import_path(name) else None


def describe(
    verifier: RewardFn | None,
    prompts: Sequence[PromptExample],
    found: Sequence[Review],
    calls: RewardCalls = ALL_AT_ONCE,
) -> dict[str, float]:
    """Answers and revisions in numbers; what a verifier says of them is for the eye alone."""
    numbers = {
        "changed": float(np.mean([one.answer != one.revision for one in found])),
        "finished": float(np.mean([one.finished for one in found])),
    }
    if verifier is None:
        return numbers
    names = sorted({name for prompt in prompts for name in prompt.fields} - {"prompt"})
    fields = {name: [prompt.fields.get(name) for prompt in prompts] for name in names}
    fields["finished"] = [True] * len(prompts)
    asked = [prompt.text for prompt in prompts]
    before, after = (
        call_reward(verifier, asked, texts, fields, calls=calls)
        for texts in ([one.answer for one in found], [one.revision for one in found])
    )
    return numbers | {
        "answers": float(before.mean()),
        "revisions": float(after.mean()),
        "mended": float(np.mean(after > before)),
        "spoilt": float(np.mean(after < before)),
    }


def mixture(options: Options, revisions: files.Path) -> str:
    """Training mixture as `rlhf sft --data` takes it: the revisions, and the extra data beside them."""
    if not options.extra_data:
        return str(revisions)
    if options.extra_share is None:
        return f"{revisions},{options.extra_data}"
    return f"{revisions}={1 - options.extra_share:g},{options.extra_data}={options.extra_share:g}"


def check_extra_data(options: Options) -> None:
    """Raises: UserError where the extra data cannot be read, before hours of revisions."""
    for source in inputs.split_mixture(options.extra_data) if options.extra_data else ():
        inputs.load_rows(source, lambda level: [])


# Everything -------------------------------------------------------------------------------------------


def train(options: Options, start: str, rows: list[dict[str, Any]]) -> files.Path:
    """The run folder of the policy that has learnt from revisions."""
    data, folder = options.run.out / "rows.jsonl", options.run.out / "policy"
    files.write_lines(data, rows)
    begun = files.is_folder(folder / "checkpoints")
    sft.run(
        sft.Options(
            run=dataclasses.replace(options.run, out=folder, report=False, resume=begun),
            model=start,
            data=mixture(options, data),
            batch_size=options.batch_size if options.extra_data else min(options.batch_size, len(rows)),
            adapter=options.adapter,
            optimizer=options.optimizer,
            learning_rate=options.learning_rate,
        )
    )
    return folder


def choose_prompts(options: Options, prompts: inputs.Prompts) -> list[PromptExample]:
    """The prompts that are answered and revised, in the order of the seed.

    Raises:
      UserError: there are not so many.
    """
    count = options.revised or len(prompts)
    if count > len(prompts):
        raise UserError(f"--revised {count}: there are {len(prompts)} prompts: lower it")
    drawn = BatchSampler(len(prompts), count, options.run.seed).indices(0)
    return [prompts.train[index] for index in drawn]


def write_judge(out: files.Path, start: str, principles: Sequence[Principle]) -> None:
    """The model and its principles as a reward, which may be moved together with `out`."""
    files.write_lines(out / "constitution.jsonl", constitution_rows(principles))
    # A name in the hub cache is no folder.
    model = files.relative(out, files.as_path(start)) if files.exists(start) else start
    files.write_json(
        out / "judge.json", {"kind": "rating", "model": model, "constitution": "constitution.jsonl"}
    )


def run(options: Options, given: Given = NOTHING) -> None:
    """All of it; leaves `policy`, and what it learned from."""
    check(options)
    check_extra_data(options)
    out = options.run.out
    principles = read_constitution(options.constitution)
    describe_run(out, option_checks.to_json(options), stage="constitutional")
    session = Session(options, given, "constitutional")
    model = session.policy
    start = options.model if given.policy is None else folder_of(model)
    write_judge(out, start, principles)

    prompts = session.load_prompts()
    chosen = choose_prompts(options, prompts)
    refuse_images(chosen, "the constitutional stage")
    asked = [np.asarray(prompt.ids) for prompt in chosen]
    begun = files.exists(out / "revisions.jsonl")
    option_checks.check_same_data(out, fingerprint(asked, constitution_rows(principles)), begun=begun)
    before = prompts.answer(model.params)
    found = revise(options, model, principles, chosen)
    rows = rows_of(chosen, found)
    if not rows:
        raise UserError(f"none of {len(found)} revisions ends by itself: raise --max-new-tokens")
    train_numbers = describe(text_reward(options, given), chosen, found, options.prompts.reward_calls)
    numbers: dict[str, Any] = {"train": train_numbers, "rows": len(rows)}
    params = load_policy(train(options, start, rows)).params
    if prompts.evaluate is not None:
        numbers["before"] = prompts.evaluate(model.params, model.params).metrics()
        numbers["after"] = prompts.evaluate(params, model.params).metrics()
    files.write_json(out / "results.json", numbers)
    edges.finish(options.run, inputs.before_and_after("constitutional", before, prompts.answer(params)))
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
