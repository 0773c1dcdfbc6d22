"""A process or outcome reward model: is each step of a solution right, or is its answer?

    rlhf process-reward --out runs/prm --model runs/sft --data judged.jsonl
    rlhf process-reward --out runs/orm --model runs/sft --data judged.jsonl --outcome
    rlhf process-reward --out runs/prm_rollouts --model runs/sft --data solutions.jsonl \\
        --labels rollouts --label-reward my_rewards:exact
    rlhf process-reward --out runs/gsm8k_prm --data gsm8k/test_socratic.jsonl \\
        --arch.width 128 --steps 400

Rows hold `prompt`, `completions` (the steps) and `labels` (true, false, a share, or null for a step nobody
judged), or are GSM8K's socratic solutions, whose results are made wrong here and there. Where there are no
held-out rows, an eighth of the data is held out. With `--labels rollouts` nobody needs to judge: a step is
right where the policy still reaches the right `answer` from it; the labels go to `labelled.jsonl`. With
--outcome only the last step counts, the answer, by its own label or by --label-reward: an outcome model
scores whole answers, so that `rlhf ppo --reward-model` and `rlhf grpo --rewards` take its folder. That of a
process model goes to --process-reward of `rlhf grpo`, `rlhf ppo` and `rlhf search`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed
from rlhf_jax.algorithms import process_reward
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import LearningRate, Length, LengthOrZero, PositiveInt, Share
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.types import Params, PRNGKeyArray
from rlhf_jax.data import packing
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.process_rewards import (
    ProcessExample,
    is_socratic,
    outcome_row,
    pad_labels,
    process_examples,
    socratic_rows,
    solution_of,
    until_first_mistake,
)
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer, train_bpe
from rlhf_jax.evaluation.classification import brier_score, reliability, roc_auc
from rlhf_jax.feedback.step_labels import label_by_rollouts
from rlhf_jax.models import Policy
from rlhf_jax.rewards.functions import call_reward, load_reward
from rlhf_jax.stages import defaults, edges, embedded, inputs, option_checks, option_groups, starting
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.stages.session import Session

HELD_OUT_PART = 8
LABELLED, MAKERS = "labelled.jsonl", "labelled.json"
"""Labels by rollouts, and what made them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of process reward modelling.

    Attributes:
      data: judged solutions: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out ones; empty for an eighth of the data (the embedded task brings its own).
      outcome: judge only the answer, which is the last step: by its label, or by `label_reward`.
      tokenizer: folder or tokenizer.json; empty for that of `model`, of the embedded task, or for bytes.
      labels: `given` by the rows, or made by `rollouts` of the policy `model`.
      rollouts: continuations of each step, of which one that is right makes it right.
      label_reward: which continuations, or with `outcome` which solutions, are right: a reward function by
        path, above 0.5.
      max_new_tokens: tokens of a continuation.
      train_tokenizer: learn a byte-level BPE vocabulary of this size from the data; 0 for none.
      model: the policy whose body is taken: a run folder, a Hugging Face folder, a GGUF file or a name in the
        hub cache; empty for a new model.
      batch_size: solutions a step.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one (1e-5).
      slip_rate: share of carries that the writers of the embedded solutions forget.
      row_count: how many solutions of the embedded task.
      eval_count: how many held-out solutions are evaluated at most.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(
        Path("runs/process_reward")
    )
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    data: str
    eval_data: str = ""
    outcome: bool = False
    labels: Literal["given", "rollouts"] = "given"
    rollouts: PositiveInt = 8
    label_reward: str = ""
    max_new_tokens: Length = 256
    tokenizer: str = ""
    train_tokenizer: LengthOrZero = 0
    model: str = ""
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    learning_rate: LearningRate | None = None
    slip_rate: Share = 0.5
    row_count: PositiveInt = 8_000
    eval_count: PositiveInt = 512


# Data ----------------------------------------------------------------------------------------------


def load_rows(options: Options, given: Given = NOTHING) -> tuple[list[Row], list[Row]]:
    """Judged solutions to train on, and held-out ones."""
    seed = options.run.seed

    def read(spec: str, split: embedded.Split, count: int, rows: Any) -> list[Row]:
        def make(level: embedded.Level) -> list[dict[str, Any]]:
            return embedded.judged_rows(
                level, split, count, seed, slip_rate=options.slip_rate, outcome=options.outcome
            )

        rows = inputs.load_rows(spec, make, rows)
        judged = socratic_rows(rows, seed) if all(map(is_socratic, rows)) else rows
        return outcomes(judged, options.label_reward) if options.outcome else judged

    train = read(options.data, "train", options.row_count, given.rows)
    if given.eval_rows is not None or options.eval_data or embedded.find_level(options.data):
        spec = options.eval_data or options.data
        held_out = read(spec, "heldout", options.eval_count, given.eval_rows)
    else:
        train, held_out = _split(train)
    return train, held_out[: options.eval_count]


def outcomes(rows: list[Row], label_reward: str) -> list[Row]:
    """The rows with their outcomes as the only labels.

    Args:
      label_reward: path of a reward function that says which are right; empty for the rows' own last labels.
    """
    if not label_reward:
        return [outcome_row(row) for row in rows]
    prompts, solutions = zip(*map(solution_of, rows), strict=True)
    names = sorted({name for row in rows for name in row.fields} - {"prompt", "completions", "labels"})
    fields = {name: [row.fields.get(name) for row in rows] for name in names}
    fields["finished"] = [True] * len(rows)
    where = [row.where for row in rows]
    right = call_reward(load_reward(label_reward), prompts, solutions, fields, where=where) > 0.5
    return [outcome_row(row, verdict) for row, verdict in zip(rows, right.tolist(), strict=True)]


def label(options: Options, policy: Policy, rows: tuple[list[Row], list[Row]]) -> tuple[list[Row], list[Row]]:
    """Rows labelled by rollouts. Held-out rows of the embedded task keep the truth, of whole beginnings."""
    train, held_out = rows
    reward_fn = make_reward_fn([options.label_reward], policy.tokenizer)

    def by_rollouts(rows: list[Row], seed: int) -> list[Row]:
        return label_by_rollouts(
            rows,
            policy,
            reward_fn,
            rollouts=options.rollouts,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            seed=seed,
            quiet=options.run.quiet,
        )

    if distributed.is_main_process():
        files.hold(options.run.out, "--out")
    seed, makers = options.run.seed, makers_of(options, policy, train)
    labelled = held_labels(options.run.out, makers) if options.run.resume else None
    if labelled is None:
        labelled = by_rollouts(train, seed)
        if distributed.is_main_process():
            files.remove_file(options.run.out / MAKERS)  # or a kill would leave them with others' labels
            files.write_lines(options.run.out / LABELLED, (row.fields for row in labelled))
            files.write_json(options.run.out / MAKERS, makers)
    train = labelled
    if embedded.find_level(options.eval_data or options.data):
        return train, list(map(until_first_mistake, held_out))
    return train, by_rollouts(held_out, seed + 1)


def makers_of(options: Options, policy: Policy, rows: list[Row]) -> dict[str, Any]:
    """Settings that decide labels by rollouts."""
    asked = json.dumps([row.fields for row in rows], sort_keys=True, default=str)
    names = ("label_reward", "rollouts", "max_new_tokens", "batch_size")
    return {
        **{name: getattr(options, name) for name in names},
        "seed": options.run.seed,
        "policy": policy.source and policy.source.digest,
        "rows": hashlib.sha256(asked.encode()).hexdigest(),
    }


def held_labels(folder: Path, makers: dict[str, Any]) -> list[Row] | None:
    """Labels that the same makers made before; None where there are none, or they are damaged."""
    path, again = folder / LABELLED, "the labels are made again"
    try:
        if files.read_json(folder / MAKERS, otherwise=None, remedy=again) != makers:
            return None
        rows = files.read_lines(path, keys=("prompt", "completions", "labels"), remedy=again)
    except files.DamagedFile as error:
        files.made_again(error)
        return None
    return [Row(fields, f"{path}:{number}") for number, fields in enumerate(rows, start=1)] or None


def _split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    if len(rows) < HELD_OUT_PART:
        raise UserError(f"{len(rows)} rows leave nothing to hold out: give {HELD_OUT_PART}, or --eval-data")
    held_out = rows[::HELD_OUT_PART]
    return [row for number, row in enumerate(rows) if number % HELD_OUT_PART], held_out


class Solutions:
    """Judged solutions as padded rows."""

    def __init__(self, examples: list[ProcessExample], length: int) -> None:
        self._rows = packing.pad_rows(examples, length)
        self._labels = pad_labels(examples, length)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self._labels.shape[1]

    def fingerprint(self) -> str:
        """Changes with any token or label of any solution."""
        return fingerprint([*jax.tree.leaves(self._rows), self._labels])

    def batch(self, indices: np.ndarray) -> process_reward.Batch:
        """Some of them: this process's rows of a batch."""
        rows = jax.tree.map(lambda x: x[indices], self._rows)
        return process_reward.Batch(*distributed.shard_batch((rows, self._labels[indices])))


def load(options: Options, tokenizer: Tokenizer, rows: list[list[Row]]) -> list[Solutions]:
    """Both parts in rows of one length."""
    examples = [process_examples(part, tokenizer) for part in rows]
    length = max(len(example.ids) for part in examples for example in part)
    return [Solutions(part, length) for part in examples]


def choose_tokenizer(options: Options, rows: list[Row]) -> str | Tokenizer:
    """The tokenizer that the options name, or one learnt from the rows."""
    if not options.train_tokenizer:
        return options.tokenizer
    if options.tokenizer or options.model:
        raise UserError(
            "--train-tokenizer excludes --tokenizer and --model, which bring one: give one of them"
        )
    return train_bpe(inputs.texts(rows), options.train_tokenizer)


# Evaluation ----------------------------------------------------------------------------------------


def make_eval_fn(
    options: Options, step_reward_fn: process_reward.StepRewardFn, held_out: Solutions
) -> Callable[[process_reward.State, int], dict[str, float]]:
    """Accuracy, ranking and calibration on the judged steps of the held-out solutions.

    The curve of calibration goes to `calibration.json`.
    """
    score = jax.jit(step_reward_fn)

    def evaluate(state: process_reward.State, _: int) -> dict[str, float]:
        logits, labels = [], []
        for indices in inputs.parts(len(held_out), options.batch_size):
            # The last part repeats its last row to fill up: each row counts once.
            first = np.unique(indices, return_index=True)[1]
            batch = held_out.batch(indices[distributed.local_rows(len(indices))])
            judged = distributed.all_values(batch.sequences.mask)[first]
            scores = distributed.all_values(score(state.learner.params, batch.sequences))
            logits.append(scores[first][judged])
            labels.append(distributed.all_values(batch.labels)[first][judged])
        chances = 1 / (1 + np.exp(-np.concatenate(logits).astype(np.float64)))
        truth = np.concatenate(labels) > 0.5
        curve = reliability(chances, truth)
        if distributed.is_main_process():
            files.write_json(
                options.run.out / "calibration.json",
                {name: values.tolist() for name, values in dataclasses.asdict(curve).items()},
            )
        return {
            "step_accuracy": float(np.mean((chances > 0.5) == truth)),
            "right_share": float(np.mean(truth)),
            "auc": roc_auc(chances, truth),
            "brier": brier_score(chances, truth),
            "calibration_error": curve.error,
        }

    return evaluate


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "process_reward")
    seed = options.run.seed
    option_checks.check(options, options.run, "process_reward")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    if options.labels == "rollouts" and (options.outcome or not options.model):
        raise UserError("--labels rollouts is of steps and by a policy: give --model, and no --outcome")
    if options.labels == "rollouts" and not options.label_reward:
        raise UserError("--labels rollouts asks which answers are right: name a function with --label-reward")
    if options.label_reward and options.labels != "rollouts" and not options.outcome:
        raise UserError(
            "--label-reward means nothing here: add --labels rollouts or --outcome, or leave it out"
        )
    rows = load_rows(options, given)
    tokenizer = choose_tokenizer(options, rows[0])
    model = starting.starting_model(
        options.model, tokenizer, options.data, options.arch, options.run, given.policy
    )
    if options.labels == "rollouts":
        rows = label(options, model, rows)
    train, held_out = load(options, model.tokenizer, list(rows))
    sampler = BatchSampler(len(train), options.batch_size, seed)
    session = Session(options, given, "process_reward", model)
    session.decide_steps(len(train))
    session.announce(f"{len(train):,} solutions, {len(held_out):,} held out")

    step_reward_fn = model.make_process_reward_fn()
    tx = make_optimizer(with_total_steps(options.optimizer, session.run.num_steps))
    init_key, state_key = jax.random.split(jax.random.key(seed))

    def init(params: Params, init_key: PRNGKeyArray, state_key: PRNGKeyArray) -> process_reward.State:
        return process_reward.init(model.init_scalar_model(init_key, params), tx, state_key)

    state = distributed.init_sharded(init, model.params, init_key, state_key)
    update = edges.jit_update(
        process_reward.make_update(process_reward.Config(options.micro_batches), step_reward_fn, tx), state
    )
    meter = options.run.meter(model.training_flops(rows=options.batch_size, length=train.length))
    hyper = process_reward.Hyper(jnp.float32(options.learning_rate))

    def step(state: process_reward.State, number: int):
        batch = meter.timed("data", train.batch, edges.local_indices(sampler, number))
        return meter.timed("update", update, state, hyper, batch)

    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=train.fingerprint(),
        kind="reward_model",
        evaluate=make_eval_fn(options, step_reward_fn, held_out),
    )
    return session.finish_reward_model(state)
