"""Supervised fine-tuning on conversations.

    python experiments/sft.py --out runs/sft
    python experiments/sft.py --out runs/lora --init runs/llama --data my.jsonl --adapter.kind lora
    python experiments/sft.py --out runs/mine --data my.jsonl --train-tokenizer 4096 \\
        --packing --max-length 512

The first trains a new model on the embedded arithmetic task: about 75 s on two CPU cores, then 44 to 45 %
of held-out problems right over three seeds. The second trains an adapter beside the frozen policy of a run.
Rows of the others hold `messages`, or `prompt` and `completion`,
or `question` and `answer`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapting
import command_line
import common
import inputs
import jax
import tyro

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.optimization import OptimizerConfig
from rlhf_jax.core.types import Params, ScoreFn, Sequences
from rlhf_jax.data import packing
from rlhf_jax.data.arithmetic import Level, demonstration_rows
from rlhf_jax.data.examples import SupervisedExample, TooLong, supervised_examples
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer, train_bpe
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.training import run_loop
from rlhf_jax.training.runs import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of supervised fine-tuning.

    Attributes:
      data: rows to imitate: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out rows whose loss is logged; empty for none (the embedded task brings its own).
      tokenizer: folder or tokenizer.json; empty for the embedded task's own, or for bytes.
      train_tokenizer: learn a byte-level BPE vocabulary of this size from the data; 0 for none.
      init: run folder of a stage to start from; empty for a new model.
      batch_size: rows a step.
      micro_batches: parts in which a batch is computed, to save memory.
      max_length: tokens a row; 0 for the longest conversation.
      too_long: whether longer conversations are an error, or dropped and counted.
      packing: put several conversations in a row.
      learning_rate: at its peak.
      demonstrations: how many conversations of the embedded task.
      slip_rate: how careless its writers are: the share of carries they forget.
      late_slip_rate: the same in the second half of a solution, where they are tired.
      eval_count: how many held-out conversations are evaluated at most.
    """

    run: tyro.conf.OmitArgPrefixes[common.RunOptions] = common.RunOptions(Path("runs/sft"), steps=600)
    model: common.ModelOptions = common.ModelOptions()
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = OptimizerConfig(schedule="cosine", warmup_steps=20, final_share=0.02)
    auxiliary: common.AuxiliaryOptions = common.AuxiliaryOptions()
    data: str = "arithmetic:1"
    eval_data: str = ""
    tokenizer: str = ""
    train_tokenizer: int = 0
    init: str = ""
    batch_size: int = 64
    micro_batches: int = 1
    max_length: int = 0
    too_long: TooLong = "error"
    packing: bool = False
    learning_rate: float = 3e-3
    demonstrations: int = 32_000
    slip_rate: float = 0.3
    late_slip_rate: float = 0.7
    eval_count: int = 256


def load_rows(options: Options, *, held_out: bool) -> list[Row]:
    """Conversations for training, or the held-out ones."""

    def make(level: Level) -> list[dict[str, Any]]:
        split, count = ("heldout", options.eval_count) if held_out else ("train", options.demonstrations)
        rates = {"slip_rate": options.slip_rate, "late_slip_rate": options.late_slip_rate}
        return demonstration_rows(level, count, options.run.seed, split=split, **rates)

    spec = (options.eval_data or options.data) if held_out else options.data
    rows = inputs.load_rows(spec, make)
    return rows[: options.eval_count] if held_out else rows


def choose_tokenizer(options: Options, rows: list[Row]) -> str | Tokenizer:
    """The tokenizer that the options name, or one learnt from the rows."""
    if not options.train_tokenizer:
        return options.tokenizer
    if options.tokenizer or options.init:
        raise UserError(
            "--train-tokenizer excludes --tokenizer and --init, which bring one: give one of them"
        )
    return train_bpe(inputs.texts(rows), options.train_tokenizer)


def make_examples(options: Options, rows: list[Row], tokenizer: Tokenizer) -> list[SupervisedExample]:
    """Rows as tokens."""
    longest = options.max_length or inputs.UNBOUNDED
    return supervised_examples(rows, tokenizer, max_length=longest, too_long=options.too_long)


def lay_out(options: Options, examples: list[SupervisedExample]) -> Sequences:
    """All examples as rows of one length."""
    length = options.max_length or max(len(example.ids) for example in examples)
    return (packing.pack_rows if options.packing else packing.pad_rows)(examples, length)


def held_out_loss(
    options: Options, model: Model, score_fn: ScoreFn
) -> Callable[[sft.State], dict[str, float]] | None:
    """Evaluates the loss on held-out conversations, where there are any."""
    if not (options.eval_data or common.embedded_level(options.data)):
        return None
    rows = lay_out(options, make_examples(options, load_rows(options, held_out=True), model.tokenizer))
    size, total = options.batch_size, int(rows.mask.sum())

    def part(first: int) -> Sequences:
        return packing.pad_batch(jax.tree.map(lambda x: x[first : first + size], rows), size)

    @jax.jit
    def loss(params: Params, some: Sequences) -> jax.Array:
        return cross_entropy_loss(score_fn(params, some).logp, some.mask, denominator=total)[0]

    def evaluate(state: sft.State) -> dict[str, float]:
        params = state.learner.all_params
        firsts = range(0, len(rows.tokens), size)
        return {"loss": sum(float(loss(params, part(first))) for first in firsts)}

    return evaluate


def run(options: Options) -> None:
    """Trains, and leaves a run folder."""
    common.check(options, options.run, "sft")
    common.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    data = load_rows(options, held_out=False)
    tokenizer = choose_tokenizer(options, data)
    model = common.starting_model(options.init, tokenizer, options.data, options.model, options.run.seed)
    examples = make_examples(options, data, model.tokenizer)
    rows = lay_out(options, examples)
    sampler = BatchSampler(len(rows.tokens), options.batch_size, options.run.seed)
    common.announce(options.run, model, f"{len(examples):,} conversations in {len(rows.tokens):,} rows")
    common.show_sample(options.run, model.tokenizer, examples[0])

    parts = adapting.take_apart(options.adapter, model, seed=options.run.seed, steps=options.run.steps)
    score_fn = models.make_likelihood_fn(model.config)
    tx = parts.optimizer(common.with_total_steps(options.optimizer, options.run.steps))
    state = adapting.new_state(
        lambda *x: sft.init(x[0], tx, x[1]),
        parts.trained,
        parts.frozen,
        jax.random.key(options.run.seed),
    )
    adapting.say_what_trains(options.run, state.learner)
    update = sft.make_update(sft.Config(options.micro_batches), score_fn, tx, models.rebalance)
    update = common.jit_update(update, state)
    evaluate = held_out_loss(options, model, score_fn)
    hyper = options.auxiliary.hyper(options.learning_rate)
    common.start(options, options.run, "sft", model, "policy", parts.adaptation)

    length = rows.tokens.shape[1]
    meter = options.run.meter(models.training_flops(model.config, rows=options.batch_size, length=length))

    def batch(number: int) -> Sequences:
        indices = common.local_indices(sampler, number)
        return distributed.shard_batch(jax.tree.map(lambda x: x[indices], rows))

    def step(state: sft.State, number: int):
        return meter.timed("update", update, state, hyper, meter.timed("data", batch, number))

    run_loop(
        state,
        step,
        options.run.loop(),
        stage="sft",
        folder=options.run.out,
        resume=options.run.resume,
        run_config=common.to_json(options),
        data_fingerprint=fingerprint(jax.tree.leaves(rows)),
        eval_fn=evaluate,
        meter=meter,
    )
    common.finish(options.run)


if __name__ == "__main__":
    command_line.main(run, Options, __doc__)
