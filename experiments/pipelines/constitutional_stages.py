"""Stages of constitutional AI, from a helpful policy to RL-CAI, on the embedded task or on one's own data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline_stages

from rlhf_jax.core import files
from rlhf_jax.stages import (
    constitutional,
    dpo,
    grpo,
    option_checks,
    option_groups,
    ppo,
    preferences,
    reward_model,
    rule_rewards,
)

if TYPE_CHECKING:
    from constitutional import Options as Job

LABELS = "ai_labels"
RULES = "rules"
REWARD_MODEL = "reward_model"
NO_POLICIES = (LABELS, REWARD_MODEL, RULES)
ANSWERED_AT_ONCE = 64
SAMPLES_PER_PROMPT, PAIRS_PER_PROMPT = 4, 2


@dataclasses.dataclass(frozen=True)
class Data:
    """What the stages of a seed read.

    Attributes:
      start: the helpful policy, which revises and judges, and which all methods start from.
      constitution: the principles.
      red_team: prompts whose answers are revised.
      red_team_held_out: the same, to measure on; empty for none.
      labelled: prompts whose answers are compared by the judge.
      prompts: prompts of RL.
      held_out: the same, to measure on.
      demonstrations: helpful answers that people wrote; empty for none.
      pairs: pairs that people labelled for helpfulness.
      held_out_pairs: the same, to measure on.
      ranked: ranked answers to prompts, for rules; empty for no rules.
      fitted: rows of them that rules are fitted to; those behind are held out.
      propositions: what the rules ask.
      ratings: rewards of the judge's ratings.
      harmless: the reward function that measures harm; empty where none is known.
      helpful: what measures help while RL runs; empty for nothing.
      max_new_tokens: of an answer.
      settings: of the methods (sft, reward, ppo, dpo, grpo) beside their defaults.
      report: write a page for every stage.
    """

    start: str
    constitution: str
    red_team: str
    red_team_held_out: str
    labelled: str
    prompts: str
    held_out: str
    demonstrations: str
    pairs: str
    held_out_pairs: str
    ratings: tuple[str, ...]
    max_new_tokens: int
    settings: Mapping[str, Mapping[str, Any]]
    ranked: str = ""
    fitted: int = 0
    propositions: str = ""
    harmless: str = ""
    helpful: str = ""
    report: bool = False


# Labels ------------------------------------------------------------------------------------------------


def mix_labels(folder: Path, data: Data) -> tuple[str, str]:
    """(pairs that the judge labelled, with those of people behind them; the held-out ones of both)."""
    paths = []
    for name, human in (("pairs", data.pairs), ("held_out", data.held_out_pairs)):
        path = folder / "data" / f"mixed_{name}.jsonl"
        by_judge = files.read_lines(folder / LABELS / f"{name}.jsonl")
        files.write_lines(path, [*by_judge, *files.read_lines(Path(human))])
        paths.append(str(path))
    return paths[0], paths[1]


# Stages ------------------------------------------------------------------------------------------------


def policy_folder(job: Any, folder: Path, name: str) -> str:
    """Where a policy is; empty for stages that leave none."""
    if name in NO_POLICIES:
        return ""
    if name == "start":
        return job.own.model
    return str(folder / name / "policy" if name == "sl_cai" else folder / name)


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a seed; each reads the folders of those before it.

    Attributes:
      job: the options of the whole.
      data: what it reads.
      folder: of the seed.
      seed: its number.
    """

    job: "Job"
    data: Data
    folder: Path
    seed: int

    def run(self, name: str, steps: int | None) -> option_groups.RunOptions:
        """How a stage runs."""
        made = pipeline_stages.run_options(self.job, self.folder / name, self.seed, steps)
        return dataclasses.replace(made, report=self.data.report)

    def prompts(self, *rewards: str) -> option_groups.PromptOptions:
        """Prompts of RL, and what their answers are worth."""
        return option_groups.PromptOptions(
            self.data.prompts,
            self.data.held_out,
            rewards,
            eval_reward=self.data.helpful or self.reward,
            eval_count=self.job.eval_prompts,
            max_new_tokens=self.data.max_new_tokens,
        )

    @property
    def reward(self) -> str:
        """The preference model."""
        return str(self.folder / REWARD_MODEL)

    def revise(self) -> None:
        """SL-CAI: learns from its own revisions, and from what people wrote."""
        data, job = self.data, self.job
        asked = option_groups.PromptOptions(
            data.red_team,
            data.red_team_held_out,
            eval_reward=data.harmless,
            eval_count=job.eval_prompts,
            max_new_tokens=data.max_new_tokens,
        )
        made = constitutional.Options(
            run=dataclasses.replace(self.run("sl_cai", job.revision_steps), eval_every=0),
            model=data.start,
            constitution=data.constitution,
            prompts=asked,
            revised=job.revised or 0,
            extra_data=data.demonstrations,
            extra_share=job.human_share if data.demonstrations else None,
            adapter=job.adapter,
            **data.settings["sft"],
        )
        constitutional.run(option_checks.brief(made))

    def label(self) -> None:
        """AI labels: which of two of its own answers is better, by the constitution."""
        data, job = self.data, self.job
        answers = data.start if job.labels_of == "start" else policy_folder(job, self.folder, "sl_cai")
        made = preferences.Options(
            out=self.folder / LABELS,
            model=answers,
            prompts=option_groups.PromptOptions(
                data.labelled, eval_reward=data.harmless, max_new_tokens=data.max_new_tokens
            ),
            judge_model=data.start,
            constitution=data.constitution,
            samples_per_prompt=SAMPLES_PER_PROMPT,
            pairs_per_prompt=PAIRS_PER_PROMPT,
            batch_size=min(ANSWERED_AT_ONCE, len(files.read_lines(Path(data.labelled)))),
            seed=self.seed,
            quiet=job.quiet,
        )
        preferences.run(made)

    def mixed_pairs(self) -> option_groups.PairOptions:
        """AI labels, as sure as the judge was, with those of people."""
        return option_groups.PairOptions(
            *mix_labels(self.folder, self.data), eval_count=self.job.eval_prompts, soft_labels=True
        )

    def human_pairs(self) -> option_groups.PairOptions:
        """Labels of people alone."""
        return option_groups.PairOptions(
            self.data.pairs, self.data.held_out_pairs, eval_count=self.job.eval_prompts
        )

    def prefer(self) -> None:
        """The preference model, from labels of both."""
        made = reward_model.Options(
            run=self.run(REWARD_MODEL, self.job.reward_steps),
            model=self.data.start,
            pairs=self.mixed_pairs(),
            adapter=self.job.adapter,
            **self.data.settings["reward"],
        )
        reward_model.run(option_checks.brief(made))

    def train_ppo(self, name: str, start: str) -> None:
        """PPO by the preference model."""
        made = ppo.Options(
            run=self.run(name, self.job.ppo_steps),
            model=start,
            reward_model=(self.reward,),
            prompts=self.prompts(),
            adapter=self.job.adapter,
            **self.data.settings["ppo"],
        )
        ppo.run(option_checks.brief(made))

    def train_dpo(self, name: str, pairs_fn: Callable[[], option_groups.PairOptions]) -> None:
        """DPO on pairs."""
        made = dpo.Options(
            run=self.run(name, self.job.dpo_steps),
            model=self.data.start,
            pairs=pairs_fn(),
            adapter=self.job.adapter,
            **self.data.settings["dpo"],
        )
        dpo.run(option_checks.brief(made))

    def train_grpo(self, name: str, *rewards: str) -> None:
        """GRPO by rewards."""
        made = grpo.Options(
            run=self.run(name, self.job.grpo_steps),
            model=self.data.start,
            prompts=self.prompts(*rewards),
            adapter=self.job.adapter,
            **self.data.settings["grpo"],
        )
        grpo.run(option_checks.brief(made))

    def fit_rules(self) -> None:
        """Weights of propositions that the start policy grades; fitted anew where they are not there."""
        out = self.folder / RULES
        if files.exists(out / "rules.json"):
            return
        rule_rewards.run(
            rule_rewards.Options(
                out=out,
                grader=self.data.start,
                propositions=self.data.propositions,
                data=self.data.ranked,
                count=self.data.fitted,
                quiet=self.job.quiet,
            )
        )

    def in_order(self) -> dict[str, Callable[[], Any]]:
        """The stages by name."""
        part, start = functools.partial, self.data.start
        tuned = policy_folder(self.job, self.folder, "sl_cai")
        stages: dict[str, Callable[[], Any]] = {
            "sl_cai": self.revise,
            LABELS: self.label,
            REWARD_MODEL: self.prefer,
            "rl_cai": part(self.train_ppo, "rl_cai", tuned),
        }
        if not self.job.compare:
            return stages
        stages |= {
            "dpo_human": part(self.train_dpo, "dpo_human", self.human_pairs),
            "dpo_ai": part(self.train_dpo, "dpo_ai", self.mixed_pairs),
            "ppo_ai": part(self.train_ppo, "ppo_ai", start),
            "grpo_ai": part(self.train_grpo, "grpo_ai", self.reward),
            "grpo_ratings": part(self.train_grpo, "grpo_ratings", *self.data.ratings),
        }
        if self.data.ranked:
            rules = str(self.folder / RULES / "rules.json")
            stages |= {RULES: self.fit_rules, "grpo_rules": part(self.train_grpo, "grpo_rules", rules)}
        return stages
