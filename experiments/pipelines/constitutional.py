"""Constitutional AI to its end: revisions, AI labels beside those of people, a preference model, RL.

    python experiments/pipelines/constitutional.py --out runs/cai
    python experiments/pipelines/constitutional.py --out runs/three --seeds 3
    python experiments/pipelines/constitutional.py --out runs/short --no-compare
    python experiments/pipelines/constitutional.py --out runs/mine --model ~/Llama-3.2-1B-Instruct \\
        --constitution principles.txt --sft-data helpful.jsonl --preference-data helpful_pairs.jsonl \\
        --prompts prompts.jsonl --red-team red_team.jsonl --adapter.kind lora

A small decoder learns from people who want to help: they answer problems carelessly, and seldom refuse
red-teamers, who ask for sums that must not be worked out (`rlhf_jax.tasks.arithmetic_harm`). It has also
learnt to criticise, revise, judge and grade. From there (Bai et al. 2022): it revises its answers to
red-teamers and learns from that and from what people wrote (SL-CAI); it labels which of two of its answers
does less harm; a preference model learns these labels together with people's, which are of help alone; and
RL against it ends in RL-CAI. Beside that, from the same start, and left out with --no-compare: DPO on
people's labels alone and on both, PPO and GRPO by the preference model, GRPO by the judge's ratings and by
rules that it grades (RBR, Mu et al. 2024). Help and harm of every policy are measured on held-out prompts.
The run folder holds every stage's own, `summary.json` and `report.html`. With --model it is the same on data
of one's own.
"""

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import constitutional_own
import numpy as np
import own_data
import pipeline_stages
import tyro
from constitutional_stages import LABELS, NO_POLICIES, REWARD_MODEL, RULES, Data, Stages, policy_folder

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt, ShareInside
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.feedback.constitution import constitution_rows
from rlhf_jax.feedback.judges import load_reward_file
from rlhf_jax.metrics import final_table, format_seconds, write_report
from rlhf_jax.rollout.sampler import Evaluation, make_evaluate_fn
from rlhf_jax.stages import adapting, constitutional, option_checks, option_groups, sft
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.tasks import arithmetic, arithmetic_harm as harm, arithmetic_reviews as reviews
from rlhf_jax.training.run_folder import describe_run, load_policy

HELPFUL = "rlhf_jax.rewards.verifiers:exact_answer_reward"
HARMLESS = "rlhf_jax.tasks.arithmetic_harm:harmless_reward"
LEVEL = reviews.REVIEW_LEVEL
RATES: dict[str, Any] = {"slip_rate": 0.3, "late_slip_rate": 0.7}
REFUSAL_RATE = 0.2
MAX_NEW_TOKENS = 32
SAMPLES = 8
RECIPE = {
    "revised": 512,
    "revision_steps": 60,
    "reward_steps": 160,
    "ppo_steps": 25,
    "dpo_steps": 120,
    "grpo_steps": 40,
}
"""Numbers for the embedded task."""
REVISIONS: dict[str, Any] = {
    "optimizer": OptimizerConfig(schedule="cosine", warmup_steps=5, end_lr_ratio=0.1),
    "learning_rate": 3e-4,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of constitutional AI.

    Attributes:
      out: the run folder.
      seeds: how many independent runs.
      first_seed: the first seed; the others follow it.
      resume: go on with the run in the folder where it stopped.
      arch: the decoder of the embedded task.
      skill_steps: optimizer steps of learning the embedded task's skills.
      skill_rows: conversations that they are learned from.
      skill_batch_size: rows a step, into each of which several conversations are packed.
      revised: how many red-team prompts are answered and revised; None for 512, and for all of one's own.
      revision_steps: optimizer steps of learning from revisions; here and below None is the recipe's number
        (60, 160, 25, 120 and 40), and one pass over data of one's own.
      human_share: share of what people wrote in every batch of learning from revisions.
      labelled: red-team prompts of the embedded task whose answers are compared, two pairs each.
      labels_of: whose answers are compared: those of the policy at the start, or of SL-CAI as in the paper,
        which on the embedded task hardly does harm any more, so that there is little to compare.
      human_pairs: pairs of the embedded task that people labelled.
      reward_steps: optimizer steps of the preference model.
      ppo_steps: rollouts of PPO.
      dpo_steps: optimizer steps of DPO.
      grpo_steps: rollouts of GRPO.
      compare: also train DPO, PPO and GRPO from the start, by labels, ratings and rules.
      ranked: ranked rows of each kind to fit the rules to, and held-out ones to measure them on.
      prompt_count: prompts of each kind.
      eval_prompts: held-out prompts of each kind on which every policy is measured.
      quiet: show no progress.
      constitution: text file with a principle a line, or JSONL, for a model of one's own.
      red_team: prompts whose answers are revised and labelled; empty for `prompts`.
      own: a model and data of one's own; rewards only measure.
      adapter: what is trained of that model.
    """

    out: Path = Path("runs/cai")
    seeds: int = 1
    first_seed: int = 0
    resume: bool = False
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    skill_steps: PositiveInt = 4_000
    skill_rows: PositiveInt = 48_000
    skill_batch_size: PositiveInt = 6
    revised: PositiveInt | None = None
    revision_steps: PositiveInt | None = None
    human_share: ShareInside = 0.5
    labelled: PositiveInt = 512
    labels_of: constitutional_own.LabelsOf = "start"
    human_pairs: PositiveInt = 4_000
    reward_steps: PositiveInt | None = None
    ppo_steps: PositiveInt | None = None
    dpo_steps: PositiveInt | None = None
    grpo_steps: PositiveInt | None = None
    compare: bool = True
    ranked: PositiveInt = 256
    prompt_count: PositiveInt = 3_500
    eval_prompts: PositiveInt = 512
    quiet: bool = False
    constitution: str = ""
    red_team: str = ""
    own: tyro.conf.OmitArgPrefixes[own_data.OwnData] = own_data.OwnData()
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other, or the folder holds another run."""
    pipeline_stages.check(options, ())
    option_checks.check_numbers(options)
    constitutional_own.check(options)
    if not options.own.model and options.labelled > options.prompt_count:
        raise UserError(
            f"--labelled {options.labelled}: there are {options.prompt_count} prompts: raise --prompt-count"
        )


# Data of the embedded task -----------------------------------------------------------------------------


def skill_rows(split: arithmetic.Split, count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of all skills: a third for graders, whose verdicts are one token, and a fifth of harm."""
    shares = reviews.Mixture(*(count * part // 20 for part in (6, 1, 2, 7)))
    rows = reviews.skill_rows(LEVEL, split, shares, seed, **RATES)
    rows += harm.skill_rows(LEVEL, split, count * 4 // 20, seed, **RATES, refusal_rate=REFUSAL_RATE)
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def held_out_prompts(options: Options, kind: str) -> list[dict[str, Any]]:
    """Held-out prompts of a kind, the same for every policy and seed."""
    return harm.prompt_rows(LEVEL, "heldout", options.eval_prompts, 0, kind=kind)


def ranked_rows(options: Options, split: arithmetic.Split, seed: int) -> list[dict[str, Any]]:
    """Ranked answers."""
    return harm.ranked_rows(LEVEL, split, options.ranked, seed)


def write_data(options: Options, folder: Path, seed: int) -> Data:
    """The rows that the stages of a seed read, as files, and the tokenizer."""
    count = options.prompt_count
    red_team = harm.prompt_rows(LEVEL, "train", count, seed, kind=harm.RED_TEAM)
    problems = harm.prompt_rows(LEVEL, "train", count, seed + 1, kind=harm.PROBLEM)
    fitted = ranked_rows(options, "train", seed)
    rows: dict[str, Sequence[dict[str, Any]]] = {
        "skills": skill_rows("train", options.skill_rows, seed),
        "skills_held_out": skill_rows("heldout", 512, seed),
        "red_team": red_team,
        "red_team_held_out": held_out_prompts(options, harm.RED_TEAM),
        "labelled": red_team[-options.labelled :],
        "prompts": [row for both in zip(problems, red_team, strict=True) for row in both],
        "held_out": held_out_prompts(options, harm.PROBLEM),
        "demonstrations": arithmetic.demonstration_rows(LEVEL, count, seed, **RATES),
        "pairs": harm.helpful_pairs(LEVEL, "train", options.human_pairs, seed),
        "held_out_pairs": harm.helpful_pairs(LEVEL, "heldout", 256, seed),
        "ranked": [*fitted, *ranked_rows(options, "heldout", seed)],
        "propositions": [{"name": n, "question": asked} for n, asked in harm.PROPOSITIONS.items()],
        "constitution": constitution_rows([harm.PRINCIPLE]),
    }
    for name, some in rows.items():
        files.write_lines(folder / "data" / f"{name}.jsonl", some)
    harm.harm_tokenizer().save(folder / "data" / "tokenizer")
    start = str(folder / "skills")
    lines = folder / "data" / "lines"
    constitutional.write_judge(lines, start, reviews.CONSTITUTION)
    of_data = {field.name for field in dataclasses.fields(Data)}
    paths: dict[str, Any] = {name: str(folder / "data" / f"{name}.jsonl") for name in rows if name in of_data}
    return Data(
        **paths,
        start=start,
        # Each of the judge's two questions where it has an answer: how many lines of a refusal are right?
        ratings=(f"{lines / 'judge.json'}@{harm.PROBLEM}", f"{folder / 'sl_cai/judge.json'}@{harm.RED_TEAM}"),
        max_new_tokens=MAX_NEW_TOKENS,
        settings={
            "sft": REVISIONS,
            "reward": pipeline_stages.REWARD_MODEL,
            "ppo": pipeline_stages.PPO,
            "dpo": pipeline_stages.DPO,
            "grpo": pipeline_stages.GRPO,
        },
        fitted=len(fitted),
        harmless=HARMLESS,
        helpful=HELPFUL,
    )


def train_skills(options: Options, folder: Path, seed: int) -> None:
    """A decoder that helps carelessly, and criticises, revises, judges and grades."""
    run = pipeline_stages.run_options(options, folder / "skills", seed, options.skill_steps)
    stage = sft.Options(
        run=dataclasses.replace(run, eval_every=0),
        arch=options.arch,
        data=str(folder / "data" / "skills.jsonl"),
        eval_data=str(folder / "data" / "skills_held_out.jsonl"),
        tokenizer=str(folder / "data" / "tokenizer"),
        packing=True,
        max_length=208,
        batch_size=options.skill_batch_size,
        **pipeline_stages.SFT,
    )
    sft.run(option_checks.brief(stage))


# Measuring -----------------------------------------------------------------------------------------------


def held_out_evaluations(options: Options, start: str) -> list[Callable[..., Evaluation]]:
    """(exact match on problems, harmlessness with red-teamers), on the same prompts for every policy."""
    model = load_policy(start)
    return [
        make_evaluate_fn(
            model,
            prompt_examples(as_rows(held_out_prompts(options, kind)), model.tokenizer, max_length=1 << 30),
            make_reward_fn([reward], model.tokenizer),
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for kind, reward in ((harm.PROBLEM, HELPFUL), (harm.RED_TEAM, HARMLESS))
    ]


def numbers_of(problems: Evaluation, red_team: Evaluation) -> dict[str, Any]:
    """What is kept of a policy's answers to both kinds of prompts."""
    half = SAMPLES // 2
    both = problems, red_team
    return {
        "exact_match": problems.score,
        "sampled_exact_match": problems.sampled_score,
        "harm": 1 - red_team.score,
        "sampled_harm": 1 - red_team.sampled_score,
        "refused": float(np.mean([text == harm.REFUSAL for text in problems.completions])),
        "kl": problems.kl,
        "length": problems.length,
        "completions": [text for found in both for text in found.completions[:half]],
        "correct": [bool(reward) for found in both for reward in found.rewards[:half]],
        "numbers": [number for found in both for number in found.numbers],
    }


def pairs_in_order(rules: Path, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of ranked pairs that the rules put in order, by the kind of the row; equal scores do not."""
    reward = load_reward_file(rules)
    texts = [(row["prompt"], text) for row in rows for text in row["completions"]]
    scores = iter(reward(*zip(*texts, strict=True)))
    found = collections.defaultdict[str, list[bool]](list)
    for row in rows:
        answers = [(rank, next(scores)) for rank in row["ranks"]]
        pairs = itertools.permutations(answers, 2)
        found[row["kind"]] += [ours > theirs for (rank, ours), (other, theirs) in pairs if rank < other]
    return {f"in_order_{kind}": float(np.mean(right)) for kind, right in sorted(found.items())}


def run_seed(options: Options, seed: int) -> pipeline_stages.Results:
    """Trains all stages of one seed and measures their policies."""
    folder = options.out / f"seed_{seed}"
    data = write_data(options, folder, seed)
    looks = functools.cache(lambda: held_out_evaluations(options, data.start))
    reference = functools.cache(lambda: load_policy(data.start).params)

    def measure(name: str) -> dict[str, Any]:
        if name == LABELS:
            counts = files.read_json(folder / name / "counts.json", keys=("pairs",))
            return {"pairs": counts["pairs"], **counts.get("judge", {})}
        if name == REWARD_MODEL:
            return {"pair_accuracy": pipeline_stages.last_metric(folder / name, "eval/pair_accuracy")}
        if name == RULES:
            return pairs_in_order(folder / name / "rules.json", ranked_rows(options, "heldout", seed))
        params = load_policy(policy_folder(options, folder, name)).params
        known = None if name == "skills" else reference()
        return numbers_of(*(look(params, known, SAMPLES // 2) for look in looks()))

    stages = {
        "skills": functools.partial(train_skills, options, folder, seed),
        **Stages(options, data, folder, seed).in_order(),
    }
    return pipeline_stages.run_seed(folder, stages, measure)


# What comes out ------------------------------------------------------------------------------------------


def show(options: Options, summary: dict[str, Any], policies: Sequence[str], seconds: float) -> None:
    """Prints help and harm of every policy, and what the judge and the rules are worth."""
    over = f"{options.seeds} seeds" if options.seeds > 1 else f"{options.eval_prompts} prompts of each kind"
    rows = []
    for name in policies:
        cells = [name]
        for number in ("exact_match", "harm"):
            share = pipeline_stages.share_interval(summary[name][number], options.eval_prompts)
            sampled = pipeline_stages.mean(summary[name][f"sampled_{number}"])
            cells += [f"{share.mean:.1%}", f"[{share.low:.1%}, {share.high:.1%}]", f"{sampled:.1%}"]
        refused, kl, took = (
            pipeline_stages.mean(summary[name][number]) for number in ("refused", "kl", "seconds")
        )
        rows.append([*cells, f"{refused:.1%}", f"{kl:.2f}", format_seconds(took)])
    of_shares = ["95 % interval", "sampled"]
    columns = ["policy", "help", *of_shares, "harm", *of_shares, "refused problems", "KL, nats", "wall time"]
    final_table(f"Held-out prompts, most likely answers; interval over {over}", columns, rows)
    found = [
        (f"{stage}: {number}", f"{pipeline_stages.mean(values):.3g}")
        for stage in NO_POLICIES
        for number, values in summary.get(stage, {}).items()
        if number != "seconds"
    ]
    final_table("Labels, preference model and rules", ["what", "mean"], found)
    print(f"Wall time: {format_seconds(seconds)}")


def run(options: Options) -> None:
    """All seeds, then the table and the report."""
    began = time.perf_counter()
    check(options)
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    if options.own.model:
        describe_run(options.out, option_checks.to_json(options), stage="constitutional_ai", seeds=seeds)
        results = pipeline_stages.run_seeds(options, lambda seed: constitutional_own.run_seed(options, seed))
        files.write_json(options.out / "summary.json", pipeline_stages.summarise(results))
        return own_data.show(options, results, policy_folder)
    given = {name: getattr(options, name) for name in RECIPE if getattr(options, name) is not None}
    options = dataclasses.replace(options, **{**RECIPE, **given})
    task = {"name": "arithmetic_harm", **dataclasses.asdict(LEVEL), **RATES, "refusal_rate": REFUSAL_RATE}
    describe_run(
        options.out, option_checks.to_json(options), stage="constitutional_ai", seeds=seeds, task=task
    )
    results = pipeline_stages.run_seeds(options, lambda seed: run_seed(options, seed))
    summary = pipeline_stages.summarise(results)
    files.write_json(options.out / "summary.json", summary)
    policies = [name for name in results[0] if name not in NO_POLICIES]
    half = SAMPLES // 2
    prompts = [
        row for kind in (harm.PROBLEM, harm.RED_TEAM) for row in held_out_prompts(options, kind)[:half]
    ]
    cards = pipeline_stages.sample_cards(prompts, results[0], policies)
    files.write_json(options.out / "samples.json", cards)
    titles = {
        "sampled_exact_match": "Sampled",
        "harm": "Harm",
        "sampled_harm": "Harm, sampled",
        "refused": "Refused problems",
    }
    rows = pipeline_stages.table_rows(summary, policies, options.eval_prompts, shares=titles)
    over = "seeds" if options.seeds > 1 else "prompts"
    report = write_report(options.out, rows, interval=f"95 % interval over {over}")
    show(options, summary, policies, time.perf_counter() - began)
    print(f"Report: {report}")


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
