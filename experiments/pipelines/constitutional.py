"""Constitutional AI on the embedded task: a small policy that mends its own answers, judges and grades them.

    python experiments/pipelines/constitutional.py --out runs/cai
    python experiments/pipelines/constitutional.py --out runs/cai_512 --revised 512

A decoder learns to answer, criticise, revise, judge and grade (`rlhf sft`) from teachers who answer
carelessly but criticise well; it answers training problems, names the first wrong line, writes the answer
again, and is fine-tuned on that (`rlhf constitutional`). With 512 prompts held-out exact match of its most
likely answers rose from 64 to 96 % (three seeds, 3 minutes of CPU time each, on a machine shared with other
work). As a grader of propositions (`rlhf rule-rewards`) it has seen few such questions: the fitted rules put
60 to 78 % of held-out pairs in order. The run folder holds the stages' own: `skills`, `constitutional`,
`rules`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pipeline_stages

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.feedback.constitution import constitution_rows
from rlhf_jax.stages import constitutional, option_checks, option_groups, rule_rewards, sft
from rlhf_jax.stages.entry import Given
from rlhf_jax.tasks import arithmetic_reviews as reviews
from rlhf_jax.training.run_folder import describe_run

DATA = "arithmetic:0"
EXACT_MATCH = "rlhf_jax.rewards.verifiers:exact_answer_reward"
RATES = {"slip_rate": 0.3, "late_slip_rate": 0.7}
LEARNING: dict[str, Any] = {
    "optimizer": OptimizerConfig(schedule="cosine", warmup_steps=5, end_lr_ratio=0.1),
    "learning_rate": 3e-4,
}
"""From revisions."""
COUNTS = (
    "skill_steps",
    "skill_rows",
    "skill_batch_size",
    "steps",
    "revised",
    "batch_size",
    "prompt_count",
    "eval_prompts",
    "ranked",
)


@dataclasses.dataclass(frozen=True)
class Options(pipeline_stages.OneSeed):
    """Options of constitutional AI on the embedded task.

    Attributes:
      out: the run folder.
      seed: decides the data, initial weights, order and sampling.
      resume: go on with the run in the folder where it stopped.
      arch: the decoder.
      skill_steps: optimizer steps of learning the skills.
      skill_rows: conversations that they are learned from.
      skill_batch_size: rows a step, into each of which several conversations are packed.
      steps: optimizer steps of learning from revisions.
      revised: how many prompts are answered and revised.
      batch_size: rows of a step of learning from them.
      prompt_count: problems from which those are drawn.
      eval_prompts: held-out problems.
      ranked: ranked rows to fit the rules to, and held-out ones to measure them on.
      quiet: show no progress.
    """

    out: Path = Path("runs/cai")
    seed: int = 0
    resume: bool = False
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    skill_steps: int = 1_400
    skill_rows: int = 16_000
    skill_batch_size: int = 6
    steps: int = 60
    revised: int = 1_024
    batch_size: int = 64
    prompt_count: int = 4_000
    eval_prompts: int = 512
    ranked: int = 256
    quiet: bool = False


def mixture(rows: int) -> reviews.Mixture:
    """Shares of the skills: reviews teach three of them."""
    shares = (rows * part // 16 for part in (9, 4, 1, 2))
    return reviews.Mixture(*shares)


def train_skills(options: Options) -> Path:
    """The run folder of a decoder that answers, criticises, revises, judges and grades."""
    level, seed = reviews.REVIEW_LEVEL, options.seed
    rows = reviews.skill_rows(level, "train", mixture(options.skill_rows), seed, **RATES)
    held_out = reviews.skill_rows(level, "heldout", mixture(512), seed, **RATES)
    reviews.review_tokenizer().save(options.out / "tokenizer")
    run = pipeline_stages.run_options(options, options.out / "skills", options.seed, options.skill_steps)
    stage = sft.Options(
        run=dataclasses.replace(run, eval_every=0),
        arch=options.arch,
        data="skills",
        tokenizer=str(options.out / "tokenizer"),
        packing=True,
        max_length=208,
        batch_size=options.skill_batch_size,
        **pipeline_stages.SFT,
    )
    return sft.run(option_checks.brief(stage), Given(rows=rows, eval_rows=held_out)).folder


def revise(options: Options, skills: Path) -> None:
    """The supervised stage: the policy that has learnt from its own revisions."""
    constitution = options.out / "principles.jsonl"
    files.write_lines(constitution, constitution_rows(reviews.CONSTITUTION))
    run = pipeline_stages.run_options(options, options.out / "constitutional", options.seed, options.steps)
    constitutional.run(
        constitutional.Options(
            run=dataclasses.replace(run, eval_every=0),
            model=str(skills),
            constitution=str(constitution),
            prompts=option_groups.PromptOptions(
                data=DATA,
                rewards=(EXACT_MATCH,),
                max_new_tokens=32,
                prompt_count=options.prompt_count,
                eval_count=options.eval_prompts,
            ),
            revised=options.revised,
            batch_size=options.batch_size,
            **LEARNING,
        )
    )


def fit_rules(options: Options, skills: Path) -> None:
    """Weights of propositions that the policy grades; fitted anew where they are not there."""
    out = options.out / "rules"
    if (out / "rules.json").exists():
        return
    ranked, propositions = options.out / "ranked.jsonl", options.out / "propositions.jsonl"
    rows = [
        row
        for split in ("train", "heldout")
        for row in reviews.ranked_rows(reviews.REVIEW_LEVEL, split, options.ranked, options.seed)
    ]
    files.write_lines(ranked, rows)
    questions = reviews.PROPOSITIONS.items()
    files.write_lines(propositions, [{"name": name, "question": question} for name, question in questions])
    rule_rewards.run(
        rule_rewards.Options(
            out=out,
            grader=str(skills),
            propositions=str(propositions),
            data=str(ranked),
            count=options.ranked,
            quiet=options.quiet,
        )
    )


def run(options: Options) -> None:
    """All stages."""
    pipeline_stages.check(options, COUNTS)
    describe_run(options.out, option_checks.to_json(options), stage="constitutional_pipeline")
    skills = train_skills(options)
    revise(options, skills)
    fit_rules(options, skills)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
