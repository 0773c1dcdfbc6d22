"""What a small policy sees: questions about shapes, things that are not there, and steps in a grid world.

    python experiments/studies/vision/vision.py --out runs/vision --parts shapes hallucination grid

    python experiments/studies/vision/vision.py --out runs/grid --parts grid --slip-rate 0.2 \\
        --learning-rate 1e-3 --sft-steps 800

Each part trains a new policy by imitation of demonstrations that err, and goes on from there:

    shapes         GRPO on the right answers; beside it, the same imitation without images
    hallucination  DPO against answers that name a thing too many
    grid           GRPO on steps that bring the agent nearer; beside it, the same imitation without images

Parts and seeds that are done are not done again. Leaves `cells.jsonl` and the table `vision.md`. Four minutes
of one core for each part and seed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import as_rows
from rlhf_jax.evaluation.statistics import mean_interval
from rlhf_jax.generation import Sampling
from rlhf_jax.metrics import Progress
from rlhf_jax.metrics.pages import made, when_and_with
from rlhf_jax.models import Policy
from rlhf_jax.models.vision.config import LinearProjector, VisionConfig
from rlhf_jax.rollout.sampler import completion_texts, make_generate_fn, most_images
from rlhf_jax.stages import option_checks
from rlhf_jax.tasks import grid_world, shapes
from rlhf_jax.training.run_folder import describe_run

Part = Literal["shapes", "hallucination", "grid"]
Cell = tuple[Part, int]
"""A part and its seed."""
Numbers = dict[str, float]
"""What was measured, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The study.

    Attributes:
      out: folder of the study.
      parts: which of them.
      seeds: how many, from 0 on.
      width: of encoder and decoder.
      demonstrations: how many are imitated.
      slip_rate: share of them that err.
      sft_steps: of imitation.
      learning_rate: of imitation, at its peak.
      steps: of GRPO or DPO.
      eval_count: held-out questions, or episodes.
      quiet: show no progress.
    """

    out: Path
    parts: tuple[Part, ...] = ("shapes", "hallucination", "grid")
    seeds: int = 1
    width: int = 64
    demonstrations: int = 8_000
    slip_rate: float = 0.4
    sft_steps: int = 700
    learning_rate: float = 2e-3
    steps: int = 40
    eval_count: int = 256
    quiet: bool = False


WATCHING = ("out", "parts", "seeds", "quiet")
"""Options that change nothing of a cell."""
COSINE = OptimizerConfig(schedule="cosine", warmup_steps=20, end_lr_ratio=0.05)


def new_policy(options: Options, seed: int) -> Policy:
    """A policy of random weights, whose patches are the cells of the grid."""
    tokenizer = shapes.shapes_tokenizer().with_special(["<image>"])
    vision = VisionConfig(
        tokenizer.special_tokens["<image>"],
        shapes.IMAGE_SIZE,
        shapes.CELL,
        options.width,
        num_layers=1,
        num_heads=4,
        intermediate_size=2 * options.width,
        projector=LinearProjector(bias=True),
        mean=(0.94, 0.94, 0.94),  # of the ground
        std=(0.25, 0.25, 0.25),
    )
    shape = {"vocab_size": tokenizer.vocab_size, "width": options.width, "num_layers": 2, "num_heads": 4}
    config = models.dense_config(**shape, vision=vision)
    return models.make_policy(config, models.init_params(config, jax.random.key(seed)), tokenizer)


def imitate(options: Options, rows: Sequence[dict[str, Any]], seed: int) -> Policy:
    """A new policy after supervised fine-tuning."""
    sizes = {"batch_size": 64, "steps": options.sft_steps}
    run = {"learning_rate": options.learning_rate, "optimizer": COSINE, "seed": seed, "quiet": True}
    return rj.sft(new_policy(options, seed), rows, **sizes, **run).policy


def reinforce(
    options: Options, policy: Policy, rows: Sequence[dict[str, Any]], reward: Any, seed: int
) -> Policy:
    """The policy after GRPO without a constraint."""
    sizes = {"batch_size": 32, "group_size": 8, "steps": options.steps, "max_new_tokens": 4}
    run = {"learning_rate": 1e-3, "kl_coef": 0.0, "seed": seed, "quiet": True}
    return rj.grpo(policy, rows, rewards=[reward], **sizes, **run).policy


def make_answer_fn(policy: Policy, *, max_new_tokens: int) -> Callable[..., list[str]]:
    """`answer(rows, temperature=1.0)`: a completion of each row; compiled once for each number of rows."""

    samplers = {
        number: make_generate_fn(policy, prompt_length=64, num_images=number, max_new_tokens=max_new_tokens)
        for number in (0, 1)
    }

    def answer(rows: Sequence[dict[str, Any]], temperature: float = 1.0) -> list[str]:
        prompts = prompt_examples(as_rows(rows), policy.tokenizer, max_length=64)
        sample = samplers[most_images(prompts)]
        rollout = sample(policy.params, prompts, jax.random.key(0), Sampling(temperature=temperature))
        return completion_texts(policy.tokenizer, rollout)

    return answer


# Parts ----------------------------------------------------------------------------------------------


def shapes_part(options: Options, seed: int) -> dict[str, Numbers]:
    """Share of right answers to questions for a thing and for its place, sampled at temperature 1."""
    asked: dict[str, Any] = {"questions": ["what", "where"], "most": 1}
    demonstrations = shapes.demonstration_rows(
        "train", options.demonstrations, seed, slip_rate=options.slip_rate, **asked
    )
    held = shapes.prompt_rows("heldout", options.eval_count, seed, **asked)

    def score(policy: Policy, rows: Sequence[dict[str, Any]]) -> Numbers:
        said = make_answer_fn(policy, max_new_tokens=4)(rows)
        right = shapes.right_answer([], said, answer=[row["answer"] for row in rows])
        return {"what": float(np.mean(right[::2])), "where": float(np.mean(right[1::2]))}

    blind = imitate(options, shapes.text_only(demonstrations), seed)
    policy = imitate(options, demonstrations, seed)
    prompts = shapes.prompt_rows("train", 4_000, seed + 1, **asked)
    improved = reinforce(options, policy, prompts, shapes.right_answer, seed)
    return {
        "SFT without images": score(blind, shapes.text_only(held)),
        "SFT": score(policy, held),
        "SFT, GRPO": score(improved, held),
    }


def hallucination_part(options: Options, seed: int) -> dict[str, Numbers]:
    """CHAIR of lists of things, sampled at temperature 1."""
    asked: dict[str, Any] = {"questions": ["name"], "most": 2}
    demonstrations = shapes.demonstration_rows(
        "train", options.demonstrations, seed, slip_rate=options.slip_rate, **asked
    )
    held = shapes.prompt_rows("heldout", options.eval_count, seed, **asked)

    def rates(policy: Policy) -> Numbers:
        said = make_answer_fn(policy, max_new_tokens=16)(held)
        return shapes.hallucination_rates(said, [row["objects"] for row in held])

    policy = imitate(options, demonstrations, seed)
    pairs = shapes.preference_rows("train", 4_000, seed + 1, **asked)
    sizes = {"batch_size": 32, "steps": 2 * options.steps}
    # With the likelihood of the chosen answer beside it, what is there goes on being named.
    run = {"learning_rate": 1e-4, "rpo_alpha": 1.0, "seed": seed, "quiet": True}
    return {"SFT": rates(policy), "SFT, DPO": rates(rj.dpo(policy, pairs, **sizes, **run).policy)}


def grid_part(options: Options, seed: int) -> dict[str, Numbers]:
    """Share of single steps that lead nearer, and of episodes that end on the thing that was named."""
    demonstrations = grid_world.rows(
        "train", options.demonstrations, seed, slip_rate=options.slip_rate, things=1
    )
    held = grid_world.rows("heldout", options.eval_count, seed, things=1)

    def measured(policy: Policy, seen: bool = True) -> Numbers:
        answer = make_answer_fn(policy, max_new_tokens=2)

        def act(rows: list[dict[str, Any]]) -> list[str]:
            return answer(rows if seen else shapes.text_only(rows))

        nearer = grid_world.nearer([], act(held), actions=[row["actions"] for row in held])
        success = grid_world.success_rate(act, options.eval_count, seed, things=1)
        return {"steps": float(np.mean(nearer)), "episodes": success}

    blind = imitate(options, shapes.text_only(demonstrations), seed)
    policy = imitate(options, demonstrations, seed)
    prompts = grid_world.rows("train", 4_000, seed + 1, things=1)
    improved = reinforce(options, policy, prompts, grid_world.nearer, seed)
    return {
        "SFT without images": measured(blind, seen=False),
        "SFT": measured(policy),
        "SFT, GRPO": measured(improved),
    }


PARTS: dict[Part, Callable[[Options, int], dict[str, Numbers]]] = {
    "shapes": shapes_part,
    "hallucination": hallucination_part,
    "grid": grid_part,
}
TITLES: dict[Part, str] = {
    "shapes": "Right answers, sampled",
    "hallucination": "Things named that are not there (CHAIR), sampled",
    "grid": "A grid world from pixels and an instruction",
}


# Table ----------------------------------------------------------------------------------------------


def table(part: Part, cells: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, with 95 % t intervals where there are several, in percent."""
    arms: dict[str, list[Numbers]] = {}
    for cell in cells:
        for arm, numbers in cell["found"].items():
            arms.setdefault(arm, []).append(numbers)
    names = list(next(iter(arms.values()))[0])
    lines = [f"| {TITLES[part]} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, found in arms.items():
        columns = [_shown([100 * numbers[name] for numbers in found]) for name in names]
        lines.append(f"| {arm} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _shown(percent: Sequence[float]) -> str:
    if len(percent) == 1:
        return f"{percent[0]:.0f} %"
    interval = mean_interval(np.asarray(percent))
    return f"{interval.mean:.0f} % [{max(interval.low, 0):.0f}, {min(interval.high, 100):.0f}]"


def run(options: Options) -> None:
    """Does what is missing, then writes the tables."""
    path = options.out / "cells.jsonl"
    ours = {k: v for k, v in option_checks.to_json(options).items() if k not in WATCHING}
    describe_run(options.out, option_checks.to_json(options), stage="vision_study")
    held = files.read_lines(path, keys=("part", "seed", "options", "found"))
    done: dict[Cell, dict[str, Any]] = {
        (cell["part"], cell["seed"]): cell for cell in held if cell["options"] == ours
    }
    grid: list[Cell] = [(part, seed) for part in options.parts for seed in range(options.seeds)]
    with Progress("vision", len(grid), quiet=options.quiet) as progress:
        for number, (part, seed) in enumerate(grid):
            if (part, seed) not in done:
                found = PARTS[part](options, seed)
                done[part, seed] = {"part": part, "seed": seed, "options": ours, "found": found}
                files.append_lines(path, [done[part, seed]])
            progress.update(number + 1, {})
    texts = [
        table(part, [cell for key, cell in done.items() if key[0] == part])
        for part in PARTS
        if any(key[0] == part for key in done)
    ]
    note = made(options.out)
    files.write_text(options.out / "vision.md", "\n".join([*texts, f"{when_and_with([note])}\n"]))
    if not options.quiet:
        print("\n".join(texts))


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
