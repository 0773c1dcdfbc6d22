"""Supervised fine-tuning on conversations.

    rlhf sft --out runs/sft --model runs/llama --data my.jsonl
    rlhf sft --out runs/lora --model runs/llama --data my.jsonl --adapter.kind lora
    rlhf sft --out runs/mine --data my.jsonl --train-tokenizer 4096 \\
        --packing --max-length 512
    rlhf sft --out runs/mixed --model runs/llama --data chat.jsonl=0.7,math.jsonl=0.3

The second trains an adapter beside the frozen policy of a run, the third a new model. Rows hold `messages`,
or `prompt` and `completion`, or `question` and `answer`. `--data arithmetic:1` is a built-in example.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.ranges import Count, LearningRate, LengthOrZero, Positive, PositiveInt, Share
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data import packing
from rlhf_jax.data.examples import Overlength, SupervisedExample, supervised_examples
from rlhf_jax.data.mixing import MixtureSampler, mixing_shares
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer, train_bpe
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.metrics import final_table
from rlhf_jax.models import Policy
from rlhf_jax.planning.steps import Step, shapes_of
from rlhf_jax.stages import (
    adapting,
    defaults,
    edges,
    embedded,
    inputs,
    option_checks,
    option_groups,
    planned_runs,
    starting,
)
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of supervised fine-tuning.

    Attributes:
      data: rows to imitate: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL; several with commas between them,
        each with =WEIGHT behind it, or none for by size.
      mixture_temperature: several sources without weights: shares are sizes to the power of 1 over this.
      mixture_cap: several sources without weights: rows above this count for nothing in a source's share; 0
        for no cap.
      eval_data: held-out rows whose loss is logged; empty for none (the embedded task brings its own).
      tokenizer: folder or tokenizer.json; empty for the embedded task's own, or for bytes.
      train_tokenizer: learn a byte-level BPE vocabulary of this size from the data; 0 for none.
      model: the policy to start from: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache; empty for a new model.
      batch_size: rows a step.
      micro_batches: parts in which a batch is computed, to save memory.
      max_length: tokens a row; 0 for the longest conversation.
      overlength: whether longer conversations are an error, or dropped and counted.
      packing: put several conversations in a row.
      learning_rate: at its peak; None for the published one (2e-5, with an adapter 2e-4).
      demonstrations: how many conversations of the embedded task.
      slip_rate: how careless its writers are: the share of carries they forget.
      late_slip_rate: the same in the second half of a solution, where they are tired.
      eval_count: how many held-out conversations are evaluated at most.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/sft"))
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.COSINE
    aux: option_groups.AuxiliaryOptions = option_groups.AuxiliaryOptions()
    data: str
    mixture_temperature: Positive = 1.0
    mixture_cap: Count = 0
    eval_data: str = ""
    tokenizer: str = ""
    train_tokenizer: LengthOrZero = 0
    model: str = ""
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    max_length: LengthOrZero = 0
    overlength: Overlength = "error"
    packing: bool = False
    learning_rate: LearningRate | None = None
    demonstrations: PositiveInt = 32_000
    slip_rate: Share = 0.3
    late_slip_rate: Share = 0.7
    eval_count: PositiveInt = 256


def load_rows(options: Options, *, held_out: bool, source: str = "", given: Given = NOTHING) -> list[Row]:
    """Conversations for training, or the held-out ones.

    Args:
      source: one of several in `options.data`; empty for the only one.
    """

    def make(level: embedded.Level) -> list[dict[str, Any]]:
        split, count = ("heldout", options.eval_count) if held_out else ("train", options.demonstrations)
        rates = {"slip_rate": options.slip_rate, "late_slip_rate": options.late_slip_rate}
        return embedded.demonstration_rows(level, count, options.run.seed, split=split, **rates)

    source = source or options.data
    spec = (options.eval_data or source) if held_out else source
    rows = inputs.load_rows(spec, make, given.eval_rows if held_out else given.rows)
    return rows[: options.eval_count] if held_out else rows


def choose_tokenizer(options: Options, rows: list[Row]) -> str | Tokenizer:
    """The tokenizer that the options name, or one learnt from the rows."""
    if not options.train_tokenizer:
        return options.tokenizer
    if options.tokenizer or options.model:
        raise UserError(
            "--train-tokenizer excludes --tokenizer and --model, which bring one: give one of them"
        )
    return train_bpe(inputs.texts(rows), options.train_tokenizer)


def make_examples(options: Options, rows: list[Row], tokenizer: Tokenizer) -> list[SupervisedExample]:
    """Rows as tokens."""
    longest = options.max_length or inputs.UNBOUNDED
    return supervised_examples(rows, tokenizer, max_length=longest, overlength=options.overlength)


def lay_out(options: Options, examples: list[SupervisedExample], length: int = 0) -> Sequences:
    """All examples as rows of one length, which is that of the longest where none is given."""
    length = length or options.max_length or max(len(example.ids) for example in examples)
    return (packing.pack_rows if options.packing else packing.pad_rows)(examples, length)


def make_batches(
    options: Options, sources: Mapping[str, float | None], sizes: Sequence[int]
) -> edges.Batches:
    """Batches of rows, step by step; says what a mixture comes to.

    Args:
      sources: of `inputs.split_mixture`.
      sizes: rows of each.
    """
    if len(sizes) == 1:
        if options.mixture_temperature != 1 or options.mixture_cap:
            raise UserError("--mixture-temperature and --mixture-cap are for several sources in --data")
        return BatchSampler(sizes[0], options.batch_size, options.run.seed)
    weights = [weight for weight in sources.values() if weight is not None]
    how = {"temperature": options.mixture_temperature, "cap": options.mixture_cap}
    shares = mixing_shares(sizes, weights=weights or None, **how)
    sampler = MixtureSampler(tuple(sizes), tuple(shares.tolist()), options.batch_size, options.run.seed)
    if not options.run.quiet and distributed.is_main_process():
        seen = sampler.epochs(options.run.num_steps)
        columns = ["source", "rows", "share of batches", "times seen"]
        cells = zip(sources, sizes, shares.tolist(), seen.tolist(), strict=True)
        final_table(
            "mixture", columns, [(name, size, f"{share:.1%}", time) for name, size, share, time in cells]
        )
    return sampler


def source_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Sources as metrics name them: files without their folders, where that tells them apart."""
    short = tuple(Path(source).name for source in sources)
    return short if len(set(short)) == len(sources) else tuple(sources)


def held_out_loss(
    options: Options, model: Policy, logprob_fn: LogprobFn, given: Given = NOTHING
) -> Callable[[sft.State, int], dict[str, float]] | None:
    """Evaluates the loss on held-out conversations, where there are any."""
    alone = len(inputs.split_mixture(options.data)) == 1
    named = options.eval_data or (alone and embedded.find_level(options.data))
    if not named and given.eval_rows is None:
        return None
    held_out = load_rows(options, held_out=True, given=given)
    rows = lay_out(options, make_examples(options, held_out, model.tokenizer))
    size, total = options.batch_size, int(rows.mask.sum())

    def part(first: int) -> Sequences:
        return packing.pad_batch(jax.tree.map(lambda x: x[first : first + size], rows), size)

    @jax.jit
    def loss(params: Params, some: Sequences) -> jax.Array:
        return cross_entropy_loss(logprob_fn(params, some).logp, some.mask, denominator=total)[0]

    def evaluate(state: sft.State, _: int) -> dict[str, float]:
        params = state.learner.all_params
        firsts = range(0, len(rows.tokens), size)
        return {"loss": sum(float(loss(params, part(first))) for first in firsts)}

    return evaluate


@dataclasses.dataclass(frozen=True)
class Conversations:
    """All conversations as rows of one length, and which of them make up each step's batch.

    Attributes:
      rows: of NumPy.
      sampler: of the batches.
      names: of the sources as metrics name them; empty where there is one.
    """

    rows: Sequences
    sampler: edges.Batches
    names: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.rows.tokens.shape[1]

    def batch(self, number: int) -> tuple[Any, ...]:
        """The rows of a step, of NumPy; of a mixture with the number of each row's source."""
        indices = edges.local_indices(self.sampler, number)
        chosen = (jax.tree.map(lambda x: x[indices], self.rows),)
        own = (self.sampler.source_of(indices),) if isinstance(self.sampler, MixtureSampler) else ()
        return chosen + own


def prepare(options: Options, given: Given = NOTHING) -> tuple[Session, Conversations]:
    """The run and its data, after everything is checked."""
    options = defaults.fill_published(options, "sft")
    option_checks.check(options, options.run, "sft")
    adapting.check_base(options.adapter, exists=bool(options.model) or given.policy is not None)
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    sources = inputs.split_mixture(options.data)
    data = [load_rows(options, held_out=False, source=source, given=given) for source in sources]
    tokenizer = choose_tokenizer(options, [row for rows in data for row in rows])
    model = starting.starting_model(
        options.model, tokenizer, next(iter(sources)), options.arch, options.run, given.policy
    )
    if options.packing and not model.takes_packed_rows:
        raise UserError(
            "--packing puts several conversations in a row, and this model takes one alone: leave it out"
        )
    by_source = [make_examples(options, rows, model.tokenizer) for rows in data]
    examples = [example for some in by_source for example in some]
    length = options.max_length or max(len(example.ids) for example in examples)
    # Each source is packed by itself, so that a row has one source.
    parts_of_rows = [lay_out(options, some, length) for some in by_source]
    rows = packing.concatenate_rows(parts_of_rows)
    session = Session(options, given, "sft", model)
    session.decide_steps(len(rows.tokens))
    options = session.options
    sampler = make_batches(options, sources, [len(part.tokens) for part in parts_of_rows])
    session.announce(f"{len(examples):,} conversations in {len(rows.tokens):,} rows")
    if not options.run.plan:
        edges.show_sample(options.run, model.tokenizer, examples[0])
    names = source_names(list(sources)) if len(sources) > 1 else ()
    return session, Conversations(rows, sampler, names)


def make_learner(
    session: Session, names: tuple[str, ...], split: adapting.TrainableSplit
) -> tuple[sft.State, Callable[..., Any]]:
    """(state at step 0, `learn(state, rows, ...)`, which is to be compiled).

    Args:
      names: of several sources.
    """
    options: Options = session.options
    logprob_fn = session.policy.make_logprob_fn_with_auxiliaries()
    config = sft.Config(options.micro_batches, sources=names)
    update = sft.make_update(config, logprob_fn, split.tx, models.rebalance)
    hyper = options.aux.hyper(options.learning_rate)
    state = session.init_state(lambda *x: sft.init(x[0], split.tx, x[1]), split.trained, split.frozen)
    return state, lambda state, *data: update(state, hyper, *data)


def plan(options: Options) -> None:
    """Prints what a step needs, and runs none."""
    planned_runs.show_plan(options, planned_step)


def planned_step(options: Options) -> tuple[Session, Step]:
    """The run, and its step in shapes."""
    session, data = prepare(options)
    state, learn = make_learner(session, data.names, session.split_trainable())
    return session, Step(learn, state, (), shapes_of(data.batch(0)))


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    session, data = prepare(options, given)
    options, model = session.options, session.policy
    split = session.split_trainable()
    state, learn = make_learner(session, data.names, split)
    learn = edges.jit_update(learn, state)
    evaluate = held_out_loss(options, model, model.make_logprob_fn_with_auxiliaries(), given)
    meter = options.run.meter(model.training_flops(rows=options.batch_size, length=data.length))

    def batch(number: int) -> tuple[Any, ...]:
        return distributed.shard_batch(data.batch(number))

    def step(state: sft.State, number: int):
        return meter.timed("update", learn, state, *meter.timed("data", batch, number))

    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=fingerprint(jax.tree.leaves(data.rows)),
        adaptation=split.adaptation,
        evaluate=evaluate,
    )
    return session.finish(state.learner.all_params, state)
