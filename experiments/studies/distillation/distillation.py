"""Distillation, eight ways: by whom the answers are written, what is compared, and who teaches.

    python experiments/studies/distillation/distillation.py --out runs/distillation
    python experiments/studies/distillation/distillation.py --out runs/distillation --seeds 1 --steps 20

A small student has learnt sums from writers who forget carries. It learns on from a larger teacher whose
writers forget none, in its own tokens or in those of another tokenizer, or from itself with a demonstration
in its prompt. Each way takes the best of three learning rates on a seed of the search's own; all see the same
prompts for as many steps. Runs that are finished are not run again; the folder gets `table.md`,
`results.json` and `scores.svg`. About three quarters of an hour on one CPU core.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.evaluation.statistics import Interval, mean_interval
from rlhf_jax.metrics import read_metrics
from rlhf_jax.metrics.pictures import picture
from rlhf_jax.stages import distill, option_checks, option_groups, sft
from rlhf_jax.tasks import arithmetic

EXACT_MATCH = "rlhf_jax.rewards.verifiers:exact_answer_reward"
LEVEL = arithmetic.LEVELS[1]
SHOWN = "{prompt}\n\n{context}"
RATES = (1e-4, 3e-4, 1e-3)
SEARCH_SEED = 100
NEW_TOKENS = 48

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence": ("imitates the teacher's answers (SFT on them)", {"loss": "sequence"}),
    "forward_kl": ("the teacher's distributions, on its own answers", {"loss": "forward_kl"}),
    "js": ("GKD: Jensen-Shannon, on the student's answers", {"loss": "js", "lmbda": 1.0}),
    "sampled_reverse_kl": ("one token each, on the student's answers", {"loss": "sampled_reverse_kl"}),
    "sequence_reverse_kl": ("MiniLLM", {"loss": "sequence_reverse_kl"}),
    "gold": ("spans, teacher with another tokenizer", {"loss": "gold", "lmbda": 0.5}),
    "uld": (
        "sorted probabilities, teacher with another tokenizer, 0.4 of the teacher's answers themselves",
        {"loss": "uld", "hard_label_weight": 0.4},
    ),
    "self_distillation": (
        "SDFT: its own moving average, which sees a demonstration",
        {"loss": "reverse_kl", "self_teacher": "ema", "teacher_context": "demonstration"},
    ),
}
OTHER_TOKENIZER = ("gold", "uld")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared.

    Attributes:
      out: folder of all runs.
      ways: names of those that are run; none for all.
      seeds: of the student, and of each way.
      steps: of distillation.
      batch_size: prompts a step.
      student_steps: of its SFT.
      teacher_steps: of theirs.
      eval_prompts: held out, of which the greedy and the sampled answers are scored.
      search: choose the learning rate on a seed of its own; 3e-4 without.
      quiet: show no progress.
    """

    out: Path = Path("runs/distillation")
    ways: tuple[str, ...] = ()
    seeds: int = 3
    steps: int = 60
    batch_size: int = 32
    student_steps: int = 300
    teacher_steps: int = 900
    eval_prompts: int = 512
    search: bool = True
    quiet: bool = False


# Data ------------------------------------------------------------------------------------------------


def texts(split: arithmetic.Split, count: int, seed: int, slip_rate: float) -> list[tuple[str, str, str]]:
    """(problem, solution, true answer) of writers who forget this share of the carries."""
    rows = arithmetic.demonstration_rows(LEVEL, count, seed, slip_rate=slip_rate, split=split)
    return [(*(message["content"] for message in row["messages"]), row["answer"]) for row in rows]


def conversation(prompt: str, answer: str) -> dict[str, Any]:
    """A row of SFT."""
    said = {"user": prompt, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in said.items()]}


def student_rows(seed: int) -> list[dict[str, Any]]:
    """Careless solutions, and as many that follow a demonstration in the prompt."""
    plain = [conversation(asked, said) for asked, said, _ in texts("train", 8_000, seed, 0.5)]
    shown = [
        conversation(SHOWN.format(prompt=asked, context=said), said)
        for asked, said, _ in texts("train", 8_000, seed + 1, 0.0)
    ]
    return plain + shown


def write_data(options: Options) -> None:
    """Rows of the teachers, and prompts with their demonstrations, for training and held out."""
    faultless = texts("train", 16_000, 7, 0.0)
    files.write_lines(options.out / "teacher.jsonl", [conversation(*row[:2]) for row in faultless])
    names = "prompt", "demonstration", "answer"
    prompts = {
        "prompts": texts("train", 4_000, 8, 0.0),
        "held_out": texts("heldout", options.eval_prompts, 9, 0.0),
    }
    for name, rows in prompts.items():
        lines = [dict(zip(names, row, strict=True)) for row in rows]
        files.write_lines(options.out / f"{name}.jsonl", lines)


# Runs ------------------------------------------------------------------------------------------------


def run_options(
    options: Options, folder: Path, seed: int, steps: int, **others: Any
) -> option_groups.RunOptions:
    """Those of a run that goes on where it was stopped."""
    kept = {"resume": True, "save_every": steps, "report": False, "quiet": options.quiet}
    return option_groups.RunOptions(folder, seed=seed, steps=steps, **kept, **others)


def learnt(options: Options, name: str, data: Path, seed: int, steps: int, **others: Any) -> Path:
    """A new model after SFT, unless it is finished."""
    folder = options.out / name
    if not is_finished(folder, steps):
        optimizer = OptimizerConfig(schedule="cosine", warmup_steps=20, end_lr_ratio=0.02)
        stage = sft.Options(
            run=run_options(options, folder, seed, steps),
            data=str(data),
            optimizer=optimizer,
            learning_rate=3e-3,
            **others,
        )
        sft.run(option_checks.brief(stage))
    return folder


def is_finished(folder: Path, steps: int) -> bool:
    """True if the run has taken its last step."""
    return folder.exists() and any(line["step"] == steps for line in read_metrics(folder))


def teachers(options: Options) -> dict[str, Path]:
    """One that reads bytes, as the student does, and one with a vocabulary of its own."""
    arch = option_groups.ArchOptions(width=96, layers=3)
    shared: dict[str, Any] = {
        "data": options.out / "teacher.jsonl",
        "seed": 0,
        "steps": options.teacher_steps,
    }
    return {
        "bytes": learnt(options, "teacher", arch=arch, **shared),
        "bpe": learnt(options, "teacher_bpe", arch=arch, train_tokenizer=320, **shared),
    }


def student(options: Options, seed: int) -> Path:
    """The policy that all ways of a seed begin from."""
    data = options.out / f"student_{seed}.jsonl"
    if not data.exists():
        files.write_lines(data, student_rows(1_000 * (seed + 1)))
    arch = option_groups.ArchOptions(width=64, layers=2)
    return learnt(options, f"student_{seed}", data, seed, options.student_steps, arch=arch)


def distilled(options: Options, way: str, seed: int, rate: float) -> dict[str, float]:
    """One run of distillation, unless it is finished: its held-out scores before and after."""
    folder = options.out / f"{way}_{seed}_{rate:g}"
    if not is_finished(folder, options.steps):
        own = WAYS[way][1]
        teacher = teachers(options)["bpe" if way in OTHER_TOKENIZER else "bytes"]
        stage = distill.Options(
            run=run_options(options, folder, seed, options.steps, eval_every=options.steps),
            model=str(student(options, seed)),
            teacher=() if "self_teacher" in own else (str(teacher),),
            prompts=option_groups.PromptOptions(
                data=str(options.out / "prompts.jsonl"),
                eval_data=str(options.out / "held_out.jsonl"),
                eval_count=options.eval_prompts,
                rewards=(EXACT_MATCH,),
                max_new_tokens=NEW_TOKENS,
            ),
            optimizer=OptimizerConfig("linear", warmup_steps=5, b2=0.99),
            batch_size=options.batch_size,
            learning_rate=rate,
            **own,
        )
        distill.run(option_checks.brief(stage))
    lines = [line for line in read_metrics(folder) if "eval/score" in line]
    first, last = lines[0], lines[-1]
    names = {"greedy": "eval/score", "sampled": "eval/sampled_score"}
    found = {name: last[key] for name, key in names.items()}
    return {**found, **{f"start_{name}": first[key] for name, key in names.items()}, "rate": rate}


def best_rate(options: Options, way: str) -> float:
    """The learning rate whose sampled answers are right most often, on the seed of the search."""
    if not options.search:
        return RATES[1]
    return max(RATES, key=lambda rate: distilled(options, way, SEARCH_SEED, rate)["sampled"])


# What comes out --------------------------------------------------------------------------------------


def percent(interval: Interval) -> str:
    """Mean with its interval, in percent."""
    return f"{100 * interval.mean:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def draw(intervals: dict[str, dict[str, Interval]], path: Path) -> None:
    """Greedy and sampled scores of each way with their intervals, the start as a line."""
    names = list(intervals)
    with picture(path, 1, 2, height=0.3 * len(names) + 0.8) as panels:
        for axes, kind in zip(panels, ("greedy", "sampled"), strict=True):
            for row, name in enumerate(names):
                found = intervals[name][kind]
                axes.plot([100 * found.low, 100 * found.high], [row, row], color="C0")
                axes.plot(100 * found.mean, row, "o", color="C0", markersize=4)
            axes.axvline(100 * intervals[names[0]][kind].mean, color="0.6", linewidth=0.8)
            axes.set(xlabel=f"held-out exact match, {kind} answers, %", ylim=(len(names) - 0.4, -0.6))
            axes.set_yticks(range(len(names)), names if kind == "greedy" else [""] * len(names))


def run(options: Options) -> None:
    """All runs, then the table and the picture."""
    for way in options.ways:
        if way not in WAYS:
            raise UserError(f"--ways {way}: choose among {', '.join(WAYS)}")
    files.hold(options.out, "--out")
    write_data(options)
    runs = {}
    for way in options.ways or WAYS:
        rate = best_rate(options, way)
        runs[way] = [distilled(options, way, seed, rate) for seed in range(options.seeds)]
    starts = next(iter(runs.values()))
    intervals = {
        "student": {
            kind: mean_interval([run[f"start_{kind}"] for run in starts]) for kind in ("greedy", "sampled")
        }
    }
    lines = ["| | greedy, % | sampled, % | learning rate | |", "|---|---|---|---|---|"]
    lines.append(
        f"| student | {' | '.join(map(percent, intervals['student'].values()))} | - | to begin from |"
    )
    for way, of_way in runs.items():
        intervals[way] = {
            kind: mean_interval([run[kind] for run in of_way]) for kind in ("greedy", "sampled")
        }
        shown = " | ".join(map(percent, intervals[way].values()))
        lines.append(f"| {way} | {shown} | {of_way[0]['rate']:g} | {WAYS[way][0]} |")
    table = "\n".join(lines) + "\n"
    files.write_text(options.out / "table.md", table)
    files.write_json(
        options.out / "results.json", {"config": option_checks.to_json(options), "runs": cast(Any, runs)}
    )
    draw(intervals, options.out / "scores.svg")
    print(table)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
