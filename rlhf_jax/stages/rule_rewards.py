"""Rule-based rewards: what propositions about an answer are worth, fitted to ranked answers (Mu et al. 2024).

    rlhf rule-rewards --out runs/rules --grader runs/judge --data ranked.jsonl --propositions rules.jsonl
    rlhf rule-rewards --out runs/safety --grader runs/judge --data ranked.jsonl --propositions rules.jsonl \\
        --reward-model runs/reward_model
    rlhf rule-rewards --out runs/wide --data ranked.jsonl --propositions functions.jsonl --margin 2

then, with `--rewards runs/rules/rules.json` (beside `runs/reward_model`, where there is one), `rlhf grpo` or
`rlhf ppo`. Propositions are questions that the grader answers by yes or no, or functions by path; rows of the
data hold `prompt`, `completions` and their `ranks`, 0 the best. Weights are fitted by the hinge on margins of
the total score, that of the reward model included; held-out rows say how many pairs it puts in order.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms import rule_reward
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, LearningRate, PositiveInt, Weight
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.data.examples import supervised_examples
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.feedback.judges import Proposition, check_propositions, make_features_fn
from rlhf_jax.metrics import final_table
from rlhf_jax.models import Policy
from rlhf_jax.stages import option_checks
from rlhf_jax.stages.inputs import UNBOUNDED
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, load_reward_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Rule-based reward options: what is graded, and by whom.

    Attributes:
      out: folder of the weights.
      grader: run folder of a model that says yes or no; empty where all propositions are functions.
      propositions: JSONL rows of `name` and `question` or `function`.
      data: JSONL rows of `prompt`, `completions` and `ranks`.
      reward_model: run folder of a reward model that the rules are added to; empty for rules alone.
      count: rows to fit to; 0 for half of them.
      held_out: rows behind those to measure on, at most; 0 for all.
      steps: of the fit.
      learning_rate: of the fit.
      margin: by how much the total score of the better answer is to lead.
      quiet: print nothing.
    """

    out: Path
    grader: str = ""
    propositions: str
    data: str
    reward_model: str = ""
    count: Count = 0
    held_out: Count = 0
    steps: PositiveInt = 1000
    learning_rate: LearningRate = 0.05
    margin: Weight = 1.0
    quiet: bool = False


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other."""
    for name, least in (("count", 0), ("held_out", 0), ("steps", 1)):
        if getattr(options, name) < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(options, name)}: give at least {least}")
    if files.exists(options.out / "rules.json"):
        raise UserError(f"{options.out} already holds rules: choose another --out")


def load_propositions(path: str) -> list[Proposition]:
    """Propositions of a file.

    Raises:
      UserError: a row is none.
    """
    rows, found = read_rows(path), []
    for row in rows:
        unknown = row.fields.keys() - {"name", "question", "function"}
        if unknown or not all(isinstance(value, str) for value in row.fields.values()):
            raise UserError(f"{row.where}: a proposition has `name`, and `question` or `function`, as text")
        if "name" not in row.fields:
            raise UserError(f"{row.where}: the proposition has no `name`: give it one")
        found.append(Proposition(**row.fields))
    return check_propositions(found, Path(path))


def load_ranked(options: Options) -> tuple[list[Row], list[Row]]:
    """Rows to fit to, and others to measure on.

    Raises:
      UserError: a row is not ranked, or none is left to measure on.
    """
    rows = read_rows(options.data)
    for row in rows:
        texts, ranks = row.fields.get("completions"), row.fields.get("ranks")
        if not (isinstance(texts, list) and isinstance(ranks, list) and len(texts) == len(ranks) > 1):
            raise UserError(f"{row.where}: give `completions` and as many `ranks`, two at least")
        if not all(isinstance(text, str) for text in [row.fields.get("prompt"), *texts]):
            raise UserError(f"{row.where}: `prompt` and `completions` are texts: write them so")
        if not all(type(rank) is int for rank in ranks):
            raise UserError(f"{row.where}: `ranks` are whole numbers, 0 the best: write them so")
    count = options.count or -(-len(rows) // 2)
    if len(rows) <= count:
        raise UserError(f"--count {count} leaves none of {len(rows)} rows to measure on: lower it")
    return rows[:count], rows[count:][: options.held_out or None]


def graded(
    rows: Sequence[Row], propositions: Sequence[Proposition], grader: Policy | None, reward_model: str
) -> rule_reward.Rankings:
    """The rows' answers as numbers."""
    places = [
        (number, place) for number, row in enumerate(rows) for place in range(len(row.fields["completions"]))
    ]
    prompts = [rows[number].fields["prompt"] for number, _ in places]
    texts = [rows[number].fields["completions"][place] for number, place in places]
    others = sorted({name for row in rows for name in row.fields} - {"prompt", "completions", "ranks"})
    fields = {name: [rows[number].fields.get(name) for number, _ in places] for name in others}
    fields["finished"] = [True] * len(texts)
    shape = len(rows), max(len(row.fields["completions"]) for row in rows)
    where = tuple(np.array(places).T)
    features = np.zeros((*shape, len(propositions)), np.float32)
    features[where] = make_features_fn(propositions, grader)(prompts, texts, fields)
    base, ranks, mask = np.zeros(shape, np.float32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    ranks[where] = [rows[number].fields["ranks"][place] for number, place in places]
    mask[where] = True
    if reward_model:
        base[where] = _scores(reward_model, prompts, texts)
    return rule_reward.Rankings(*map(jnp.asarray, (features, base, ranks, mask)))


def _scores(folder: str, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    model = load_reward_model(Path(folder))
    rows = [
        Row({"prompt": prompt, "completion": text}, f"answer {number}")
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    examples = supervised_examples(rows, model.tokenizer, max_length=UNBOUNDED)
    padded, size = pad_rows(examples, max(len(example.ids) for example in examples)), 256
    score = jax.jit(model.body.make_reward_fn())
    parts = [
        score(model.params, jax.tree.map(lambda x, s=start: x[s : s + size], padded))
        for start in range(0, len(rows), size)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


def run(options: Options) -> None:
    """Grades, fits, and writes `rules.json` and `fit.json`."""
    check(options)
    propositions = load_propositions(options.propositions)
    fit, held_out = load_ranked(options)
    grader = load(options.grader) if options.grader else None
    describe_run(options.out, option_checks.to_json(options), stage="rule_rewards")
    rankings, others = (graded(rows, propositions, grader, options.reward_model) for rows in (fit, held_out))
    config = rule_reward.Config(steps=options.steps)
    tx = make_optimizer(OptimizerConfig("linear", warmup_steps=0, total_steps=options.steps))
    hyper = rule_reward.Hyper(jnp.float32(options.learning_rate), jnp.float32(options.margin))
    state, _ = jax.jit(rule_reward.make_train(config, tx))(rankings, hyper)
    weights = np.asarray(state.learner.params["weights"]).tolist()

    entries: list[dict[str, Any]] = []
    for proposition, weight in zip(propositions, weights, strict=True):
        entry = dataclasses.asdict(proposition) | {"weight": weight}
        entries.append({name: value for name, value in entry.items() if value != ""})
    numbers = {
        name: {
            side: float(rule_reward.evaluate({"weights": jnp.asarray(some)}, part, hyper)["accuracy"])
            for side, part in (("fitted", rankings), ("held_out", others))
        }
        for name, some in (("without_rules", [0.0] * len(weights)), ("with_rules", weights))
    }
    files.write_json(options.out / "fit.json", numbers | {"reward_model": options.reward_model})
    where = options.grader
    if options.grader and files.exists(options.grader):  # not a name in the hub cache
        where = files.relative(options.out, files.as_path(options.grader))
    files.write_json(options.out / "rules.json", {"kind": "rules", "grader": where, "propositions": entries})
    if not options.quiet:
        rows: list[tuple[str, str]] = [
            (f"weight of {entry['name']}", f"{entry['weight']:.3f}") for entry in entries
        ]
        rows += [
            (f"pairs in order, {name.replace('_', ' ')}, {side.replace('_', ' ')}", f"{value:.1%}")
            for name, sides in numbers.items()
            for side, value in sides.items()
        ]
        final_table(f"rules: {options.out / 'rules.json'}", ["what", "value"], rows)
