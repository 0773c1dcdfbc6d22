"""Pre-training on plain text: next tokens, and on request middles, further tokens and longer contexts.

    rlhf pretrain --out runs/pretrain --data shakespeare/input.txt
    rlhf pretrain --out runs/fill --data code.jsonl --train-tokenizer 4096 --intra-document-masking \\
        --fim-rate 0.5 --arch.mtp-depth 1 --optimizer.schedule wsd --decay-data textbooks.jsonl
    rlhf pretrain --out runs/long --model runs/pretrain --data shakespeare/input.txt \\
        --max-seq-length 1024 --batch-size 4 --rope.scaling yarn --steps 50 --learning-rate 3e-4
    rlhf sft --out runs/sft --model runs/pretrain --data my.jsonl

`--data` is a .txt file, a folder of them, rows with a field `text` (JSONL, JSON, Parquet, tfds:NAME), or
arithmetic:LEVEL. The first trains a new decoder on 1.1 MB of Shakespeare, byte by byte. Every
evaluation gives bits a byte on held-out text and leaves a page of samples in the run folder.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import sft
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.ranges import Count, LearningRate, Length, LengthOrZero, PositiveInt, Share, Weight
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data import documents as texts, packing
from rlhf_jax.data.documents import Document, FillInTheMiddle
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.tokenizers import Tokenizer, train_bpe
from rlhf_jax.generation import Sampling
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.models import LinearScaling, Policy, Rope, YarnScaling, ntk_theta
from rlhf_jax.rollout.sampler import completion_texts, make_generate_fn
from rlhf_jax.stages import defaults, edges, embedded, option_checks, option_groups, starting
from rlhf_jax.training import run_loop


@dataclasses.dataclass(frozen=True)
class RopeOptions:
    """Rotations for a longer context than the model of --model was trained with.

    Attributes:
      theta: base of the wavelengths; 0 for the model's own.
      scaling: how they are stretched by the ratio of --max-seq-length to the length that the model was made
        for: position interpolation, a larger base, or YaRN.
    """

    theta: Weight = 0.0
    scaling: Literal["none", "linear", "ntk", "yarn"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of pre-training.

    Attributes:
      fim_rate: share of the pieces that are rearranged to fill in the middle (FIM).
      fim_spm_rate: share of these in which the suffix stands first.
      fim_chunk: tokens of a piece; 0 for whole documents.
      data: plain text: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out text; empty for the last --eval-share of the data.
      eval_share: share of the data that is held out where there is no --eval-data.
      eval_rows: held-out rows that are evaluated at most.
      separator: what stands between the documents of a text file; empty where a file is one document.
      decay_data: further text for the last part of the run, in which the learning rate decays
        (--optimizer.schedule wsd); empty for none.
      decay_data_share: its share of a batch there.
      tokenizer: folder or tokenizer.json; empty for bytes.
      train_tokenizer: learn a byte-level BPE vocabulary of this size from the data; 0 for none.
      model: the policy to start from: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache; empty for a new model.
      max_seq_length: tokens a row.
      intra_document_masking: keep documents in a row apart: attention and positions begin anew with each.
      batch_size: rows a step.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one (3e-4).
      demonstrations: how many texts of the embedded task.
      prompts: what samples go on from, beside the beginning of the held-out text.
      sample_tokens: tokens of a sample; 0 for no samples.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(
        Path("runs/pretrain"), steps=400, eval_every=200
    )
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    optimizer: OptimizerConfig = OptimizerConfig(schedule="cosine", end_lr_ratio=0.1)
    fim_rate: Share = 0.0
    fim_spm_rate: Share = 0.5
    fim_chunk: Count = 0
    rope: RopeOptions = RopeOptions()
    aux: option_groups.AuxiliaryOptions = option_groups.AuxiliaryOptions()
    data: str
    eval_data: str = ""
    eval_share: Share = 0.1
    eval_rows: PositiveInt = 256
    separator: str = ""
    decay_data: str = ""
    decay_data_share: Share = 0.5
    tokenizer: str = ""
    train_tokenizer: LengthOrZero = 0
    model: str = ""
    max_seq_length: Length = 256
    intra_document_masking: bool = False
    batch_size: PositiveInt = 16
    micro_batches: PositiveInt = 1
    learning_rate: LearningRate | None = None
    demonstrations: PositiveInt = 8_000
    prompts: tuple[str, ...] = ()
    sample_tokens: LengthOrZero = 200


def check(options: Options) -> None:
    """Raises: UserError where options contradict each other."""
    option_checks.check(options, options.run, "pretrain")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    if options.decay_data and options.optimizer.schedule != "wsd":
        raise UserError("--decay-data is for the decay of --optimizer.schedule wsd: give both, or neither")
    if options.rope != RopeOptions() and not options.model:
        raise UserError("--rope changes the rotations of a model that was trained: give one by --model")


# Data ----------------------------------------------------------------------------------------------


def read(options: Options, spec: str) -> list[Document]:
    """The documents that `spec` names."""
    level = embedded.find_level(spec)
    if level is None:
        return texts.read_documents(spec, separator=options.separator)
    sums = embedded.document_texts(level, options.demonstrations, options.run.seed)
    return [Document(text, f"{spec}:{number}") for number, text in enumerate(sums, start=1)]


def split(options: Options) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and held-out ones."""
    documents = read(options, options.data)
    if options.eval_data:
        return documents, read(options, options.eval_data)
    kept, held_out = texts.hold_out(documents, options.eval_share)
    if not kept:
        raise UserError(f"--eval-share {options.eval_share} leaves nothing to train on: lower it")
    return kept, held_out


def choose_tokenizer(options: Options, documents: list[Document]) -> str | Tokenizer:
    """The tokenizer that the options name, or one learnt from the documents."""
    if not options.train_tokenizer:
        return options.tokenizer
    if options.tokenizer or options.model:
        raise UserError(
            "--train-tokenizer excludes --tokenizer and --model, which bring one: give one of them"
        )
    return train_bpe((document.text for document in documents), options.train_tokenizer)


def starting_model(options: Options, documents: list[Document]) -> Policy:
    """A new model, or that of `--model` with its rotations changed, told the length of its rows."""
    chosen = choose_tokenizer(options, documents)
    if options.fim_rate and not options.model:
        chosen = starting.find_tokenizer(chosen, options.data).with_special(texts.FILL_MARKS)
    model = starting.starting_model(options.model, chosen, options.data, options.arch, options.run)
    lacking = [mark for mark in texts.FILL_MARKS if mark not in model.tokenizer.special_tokens]
    if options.fim_rate and lacking:
        raise UserError(
            f"--model {options.model}: its tokenizer has no {lacking[0]}: leave --fim-rate out, or start "
            "from a run that was trained with it"
        )
    config = models.map_rope(
        model.architecture, lambda rope, width: _stretched(options, model.architecture, rope, width)
    )
    config = dataclasses.replace(
        config, context_length=max(options.max_seq_length, config.context_length or 0)
    )
    return models.make_policy(config, model.params, model.tokenizer, source=model.source)


def _stretched(options: Options, config: models.ModelConfig, rope: Rope, width: int) -> Rope:
    theta, kind = options.rope.theta or rope.theta, options.rope.scaling
    if kind == "none":
        return dataclasses.replace(rope, theta=theta)
    original = config.context_length
    if not original or original >= options.max_seq_length:
        raise UserError(
            f"--rope.scaling {kind} stretches a context of {original or 'unknown'} tokens to "
            f"--max-seq-length {options.max_seq_length}: give a longer one, or --rope.scaling none"
        )
    factor = options.max_seq_length / original
    match kind:
        case "linear":
            return dataclasses.replace(rope, theta=theta, scaling=LinearScaling(factor))
        case "ntk":
            return dataclasses.replace(rope, theta=ntk_theta(theta, factor=factor, head_dim=width))
        case "yarn":
            return dataclasses.replace(rope, theta=theta, scaling=YarnScaling(factor, original))


class Batches:
    """Rows by step: of the data, and from the decay on also of `decay_data`."""

    def __init__(self, options: Options, tokenizer: Tokenizer, documents: list[Document], decay_start: int):
        key, self._decay_start = jax.random.key(options.run.seed), decay_start
        self.documents, self.rows, self._samplers = documents, [], []
        mixed = round(options.decay_data_share * options.batch_size)
        sizes, sources = [options.batch_size], [documents]
        if options.decay_data:
            sizes, sources = [options.batch_size, mixed], [documents, read(options, options.decay_data)]
        fill = FillInTheMiddle(options.fim_rate, options.fim_spm_rate, options.fim_chunk)
        for number, (size, source) in enumerate(zip(sizes, sources, strict=True)):
            runs = texts.token_runs(source, tokenizer, fill, jax.random.fold_in(key, number))
            rows = texts.full_rows(runs, options.max_seq_length, apart=options.intra_document_masking)
            self.rows.append(rows)
            if size:
                self._samplers.append(BatchSampler(len(rows.tokens), size, options.run.seed))

    def at(self, number: int) -> Sequences:
        """The batch of a step."""
        indices = self._samplers[0].indices(number)
        batch = jax.tree.map(lambda x: x[indices], self.rows[0])
        if number >= self._decay_start and len(self._samplers) > 1:
            # The others of this step's rows wait for a later epoch.
            others = self._samplers[1].indices(number - self._decay_start)
            kept = len(indices) - len(others)
            batch = jax.tree.map(lambda x, y: np.concatenate([x[:kept], y[others]]), batch, self.rows[1])
        mine = distributed.local_rows(len(indices))
        return jax.tree.map(lambda x: x[mine], batch)


# Evaluation ----------------------------------------------------------------------------------------


def make_evaluate_fn(
    options: Options, model: Policy, logprob_fn: LogprobFn, held_out: list[Document]
) -> Callable[[Params], dict[str, float]]:
    """Loss in nats a token and bits a byte of held-out text, as it stands, without middles moved."""
    rows = texts.full_rows(
        texts.token_runs(held_out, model.tokenizer),
        options.max_seq_length,
        apart=options.intra_document_masking,
    )
    rows = jax.tree.map(lambda x: x[: options.eval_rows], rows)
    size, total = options.batch_size, int(rows.mask.sum())
    shown = rows.tokens[rows.mask].tolist()
    # The bytes of what is predicted: special tokens cost bits and bring no bytes.
    count = len(model.tokenizer.decode(shown).encode("utf-8"))

    @jax.jit
    def loss(params: Params, some: Sequences) -> jax.Array:
        return cross_entropy_loss(logprob_fn(params, some).logp, some.mask, denominator=total)[0]

    def evaluate(params: Params) -> dict[str, float]:
        nats = 0.0
        for first in range(0, len(rows.tokens), size):
            part = jax.tree.map(lambda x, first=first: x[first : first + size], rows)
            nats += float(loss(params, packing.pad_batch(part, size)))
        return {"loss": nats, "bits_per_byte": nats * total / math.log(2) / count}

    return evaluate


def make_sample_fn(
    options: Options, model: Policy, held_out: list[Document]
) -> Callable[[Params], list[tuple[str, str]]]:
    """`sample(params) -> [(prompt, continuation)]`, and a middle where these were trained."""
    tokenizer, start = model.tokenizer, texts.start_id(model.tokenizer)
    given = [held_out[0].text[: min(64, len(held_out[0].text) // 2 + 1)], *options.prompts]
    prompts = [PromptExample(np.array([start, *tokenizer.encode(t)], np.int32), t, {}, t) for t in given]
    if options.fim_rate:
        text = held_out[0].text[:256]
        cuts = (len(text) // 3, 2 * len(text) // 3)
        ids = texts.fill_in_the_middle(tokenizer, text[: cuts[0]] + text[cuts[1] :], (cuts[0], cuts[0]))
        shown = f"{text[: cuts[0]]}[...]{text[cuts[1] :]}"
        prompts.append(PromptExample(np.array([start, *ids], np.int32), shown, {}, shown))
    generate = make_generate_fn(
        model,
        prompt_length=max(len(prompt.ids) for prompt in prompts),
        max_new_tokens=options.sample_tokens,
        sampling=Sampling(temperature=0.8),
    )

    def sample(params: Params) -> list[tuple[str, str]]:
        rollout = generate(params, prompts, jax.random.key(options.run.seed))
        answers = completion_texts(tokenizer, rollout, of_all=True)[: len(prompts)]
        return [(prompt.text, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    return sample


def write_samples(folder: Path, step: int, samples: list[tuple[str, str]]) -> None:
    """`folder/samples/STEP.txt`: the same after a resume as without one."""
    path = folder / "samples" / f"{step:07d}.txt"
    files.write_text(path, "\n\n".join(f"--- {p}\n>>> {answer}" for p, answer in samples) + "\n")


# The run -------------------------------------------------------------------------------------------


def run(options: Options) -> None:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "pretrain")
    check(options)
    documents, held_out = split(options)
    model = starting_model(options, documents)
    optimizer = with_total_steps(options.optimizer, options.run.num_steps)
    batches = Batches(options, model.tokenizer, documents, optimizer.decay_start)
    tokens = sum(int(rows.mask.sum()) for rows in batches.rows)
    edges.announce(
        options.run,
        model,
        f"{len(documents):,} documents, {tokens:,} tokens in rows of {options.max_seq_length}",
    )
    tx = make_optimizer(optimizer)
    state = distributed.init_sharded(
        lambda params, key: sft.init(params, tx, key), model.params, jax.random.key(options.run.seed)
    )
    logprob_fn = model.make_logprob_fn_with_auxiliaries()
    update = sft.make_update(sft.Config(options.micro_batches), logprob_fn, tx, models.rebalance)
    update = edges.jit_update(update, state)
    hyper = options.aux.hyper(options.learning_rate)
    edges.start(options, options.run, "pretrain", model, "policy")
    measure = make_evaluate_fn(options, model, model.make_logprob_fn(), held_out) if held_out else None
    sample = make_sample_fn(options, model, held_out or documents) if options.sample_tokens else None
    meter = options.run.meter(model.training_flops(rows=options.batch_size, length=options.max_seq_length))

    def step(state: sft.State, number: int):
        batch = meter.timed("data", lambda: distributed.shard_batch(batches.at(number)))
        return meter.timed("update", update, state, hyper, batch)

    def evaluate(state: sft.State, done: int) -> dict[str, float]:
        params = state.learner.all_params
        if sample is not None:
            samples = sample(params)
            if distributed.is_main_process():
                write_samples(options.run.out, done, samples)
        return measure(params) if measure is not None else {}

    run_loop(
        state,
        step,
        options.run.loop(),
        stage="pretrain",
        folder=options.run.out,
        resume=options.run.resume,
        run_config=option_checks.to_json(options),
        loggers=edges.loggers(options, "pretrain"),
        data_fingerprint=fingerprint(jax.tree.leaves(batches.rows)),
        eval_fn=evaluate,
        meter=meter,
    )
    edges.finish(options.run)
