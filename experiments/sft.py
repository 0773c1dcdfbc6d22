"""Supervised fine-tuning on conversations.

    python experiments/sft.py --out runs/sft
    python experiments/sft.py --out runs/mine --data my.jsonl --packing --max-length 512

The first trains a new model on the embedded arithmetic task; rows of the second hold `messages`, or
`prompt` and `completion`, or `question` and `answer`.
"""

import dataclasses
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import tyro

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.optimization import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Params, ScoreFn, Sequences
from rlhf_jax.data import packing
from rlhf_jax.data.arithmetic import demonstration_rows
from rlhf_jax.data.examples import SupervisedExample, TooLong, supervised_examples
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.training import run_loop
from rlhf_jax.training.runs import Model, describe_run, write_model_files


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of supervised fine-tuning.

    Attributes:
      data: rows to imitate: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out rows whose loss is logged; empty for none (the embedded task brings its own).
      tokenizer: folder or tokenizer.json; empty for the embedded task's own, or for bytes.
      init: run folder of a stage to start from; empty for a new model.
      batch_size: rows a step.
      micro_batches: parts in which a batch is computed, to save memory.
      max_length: tokens a row; 0 for the longest conversation.
      too_long: whether longer conversations are an error, or dropped and counted.
      packing: put several conversations in a row.
      learning_rate: at its peak.
      demonstrations: how many conversations of the embedded task.
      slip_rate: how careless its writers are: the share of carries they forget.
    """

    run: tyro.conf.OmitArgPrefixes[common.RunOptions]
    model: common.ModelOptions = common.ModelOptions()
    optimizer: OptimizerConfig = OptimizerConfig(schedule="cosine", warmup_steps=20, final_share=0.1)
    data: str = "arithmetic:1"
    eval_data: str = ""
    tokenizer: str = ""
    init: str = ""
    batch_size: int = 64
    micro_batches: int = 1
    max_length: int = 0
    too_long: TooLong = "error"
    packing: bool = False
    learning_rate: float = 2e-3
    demonstrations: int = 16_000
    slip_rate: float = 0.6


def load_examples(options: Options, model: Model, *, held_out: bool) -> list[SupervisedExample]:
    """Conversations for training, or the held-out ones."""
    spec = (options.eval_data or options.data) if held_out else options.data
    rows = common.load_rows(
        spec,
        lambda level: demonstration_rows(
            level,
            256 if held_out else options.demonstrations,
            options.run.seed,
            slip_rate=options.slip_rate,
            split="heldout" if held_out else "train",
        ),
    )
    longest = options.max_length or common.UNBOUNDED
    return supervised_examples(rows, model.tokenizer, max_length=longest, too_long=options.too_long)


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
    rows = lay_out(options, load_examples(options, model, held_out=True))

    @jax.jit
    def loss(params: Params) -> jax.Array:
        return cross_entropy_loss(score_fn(params, rows).logp, rows.mask)[0]

    return lambda state: {"loss": float(loss(state.learner.params))}


def run(options: Options) -> None:
    """Trains, and leaves a run folder."""
    model = common.starting_model(
        options.init, options.tokenizer, options.data, options.model, options.run.seed
    )
    common.check_divides(options.micro_batches, options.batch_size, "micro-batches", "batch size")
    examples = load_examples(options, model, held_out=False)
    rows = lay_out(options, examples)
    sampler = BatchSampler(len(rows.tokens), options.batch_size, options.run.seed)
    common.announce(options.run, model, f"{len(examples):,} conversations in {len(rows.tokens):,} rows")
    common.show_sample(options.run, model.tokenizer, examples[0])
    describe_run(options.run.out, common.to_json(options))
    write_model_files(options.run.out, model.config, model.tokenizer, "policy")

    score_fn = models.make_score_fn(model.config)
    tx = make_optimizer(common.with_total_steps(options.optimizer, options.run.steps))
    update = jax.jit(sft.make_update(sft.Config(options.micro_batches), score_fn, tx), donate_argnums=0)
    hyper = sft.Hyper(learning_rate=jnp.float32(options.learning_rate))

    def step(state: sft.State, number: int):
        return update(state, hyper, jax.tree.map(lambda x: x[sampler.indices(number)], rows))

    run_loop(
        sft.init(common.copied(model.params), tx, jax.random.key(options.run.seed)),
        step,
        options.run.loop(),
        stage="sft",
        folder=options.run.out,
        resume=options.run.resume,
        run_config=common.to_json(options),
        eval_fn=held_out_loss(options, model, score_fn),
    )


if __name__ == "__main__":
    common.main(run, Options, __doc__)
