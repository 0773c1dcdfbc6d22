"""What the experiment scripts share: options, data by path, and the edge where errors become sentences."""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.optimization import OptimizerConfig
from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data import arithmetic, packing
from rlhf_jax.data.examples import (
    PreferenceExample,
    PromptExample,
    SupervisedExample,
    TooLong,
    preference_examples,
    prompt_examples,
)
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer
from rlhf_jax.training import Interrupted, LoopConfig
from rlhf_jax.training.rollouts import Evaluation, make_evaluate_fn, make_reward_fn
from rlhf_jax.training.runs import Model, load_policy

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run writes, and how it goes on.

    Attributes:
      out: the run folder.
      seed: decides initial weights, order of the data, and sampling.
      resume: go on from the newest whole checkpoint in the run folder, if there is one.
      steps: steps in all.
      save_every: steps between checkpoints.
      eval_every: steps between evaluations on the held-out data; 0 for one at the end.
      keep: newest checkpoints that are kept.
      quiet: show no progress.
    """

    out: Path
    seed: int = 0
    resume: bool = False
    steps: int = 200
    save_every: int = 100
    eval_every: int = 0
    keep: int = 2
    quiet: bool = False

    def loop(self) -> LoopConfig:
        """The part of it that the training loop knows."""
        return LoopConfig(self.steps, self.save_every, self.eval_every, self.keep, quiet=self.quiet)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """A new decoder, for runs that do not start from another one.

    Attributes:
      width: of the residual stream.
      layers: number of blocks.
      heads: query heads; divide the width.
      kv_heads: key-value heads; divide the heads.
      hidden: width of the feed-forward; 0 for 8/3 of the width.
      tied: use the input embedding as output matrix.
      scan_layers: run the blocks as one scan: compile time independent of depth.
      remat: what the backward pass computes again, to save memory.
      param_dtype: dtype of the parameters.
      compute_dtype: dtype of matmuls and activations.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 0
    tied: bool = True
    scan_layers: bool = False
    remat: models.Remat = "none"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"

    def config(self, tokenizer: Tokenizer) -> models.ModelConfig:
        """The architecture for this tokenizer's vocabulary."""
        return models.dense_config(
            vocab_size=tokenizer.vocab_size,
            width=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            hidden_dim=self.hidden or None,
            tied_embeddings=self.tied,
            scan_layers=self.scan_layers,
            remat=self.remat,
            param_dtype=self.param_dtype,
            compute_dtype=self.compute_dtype,
        )


# Data ----------------------------------------------------------------------------------------------

EMBEDDED = "arithmetic:"
UNBOUNDED = 1 << 30


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Preference pairs.

    Attributes:
      data: rows with `prompt`, `chosen`, `rejected`: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out pairs; empty for none (the embedded task brings its own).
      max_length: tokens of a prompt with its response; 0 for the longest.
      too_long: whether longer pairs are an error, or dropped and counted.
      pair_count: how many pairs of the embedded task.
    """

    data: str = "arithmetic:1"
    eval_data: str = ""
    max_length: int = 0
    too_long: TooLong = "error"
    pair_count: int = 8_000


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Prompts, and what an answer is worth.

    Attributes:
      data: rows with `prompt`, `question` or `messages`: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out prompts; empty for none (the embedded task brings its own).
      rewards: functions by path (`module:function`) or run folders of reward models, each with =WEIGHT
        behind it where the weight is not 1.
      eval_reward: the reward function of the evaluation; empty for the first of `rewards`.
      max_prompt_length: tokens of a prompt; 0 for the longest.
      too_long: whether longer prompts are an error, or dropped and counted.
      max_new_tokens: tokens of an answer.
      prompt_count: how many prompts of the embedded task.
      eval_count: how many held-out prompts are evaluated.
    """

    data: str = "arithmetic:1"
    eval_data: str = ""
    rewards: tuple[str, ...] = ("rlhf_jax.rewards.verifiers:exact_answer_reward",)
    eval_reward: str = ""
    max_prompt_length: int = 0
    too_long: TooLong = "error"
    max_new_tokens: int = 32
    prompt_count: int = 8_000
    eval_count: int = 256


def embedded_level(spec: str) -> arithmetic.Level | None:
    """The level that `arithmetic:LEVEL` names; None for the data of others.

    Raises:
      UserError: there is no such level.
    """
    if not spec.startswith(EMBEDDED):
        return None
    number = spec.removeprefix(EMBEDDED)
    if not number.isdecimal() or int(number) not in arithmetic.LEVELS:
        known = ", ".join(f"{EMBEDDED}{level}" for level in arithmetic.LEVELS)
        raise UserError(f"data {spec!r}: there is no such level: choose one of {known}")
    return arithmetic.LEVELS[int(number)]


def load_rows(spec: str, make_rows: Callable[[arithmetic.Level], list[dict[str, Any]]]) -> list[Row]:
    """Rows of a file, of a tfds data set, or of the embedded task.

    Args:
      spec: a path, `tfds:NAME[:SPLIT]` or `arithmetic:LEVEL`.
      make_rows: makes the rows of a level of the embedded task.
    """
    level = embedded_level(spec)
    if level is None:
        return read_rows(spec)
    return [Row(row, f"{spec}:{number}") for number, row in enumerate(make_rows(level), start=1)]


class Pairs:
    """Preference pairs as padded rows; `rows(indices)` gives (chosen, rejected)."""

    def __init__(self, examples: Sequence[PreferenceExample], length: int) -> None:
        self._count = len(examples)
        if examples:
            self._chosen = packing.pad_rows([example.chosen for example in examples], length)
            self._rejected = packing.pad_rows([example.rejected for example in examples], length)

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: np.ndarray) -> tuple[Sequences, Sequences]:
        """Some of the pairs."""
        chosen, rejected = (
            jax.tree.map(lambda x: x[indices], side) for side in (self._chosen, self._rejected)
        )
        return chosen, rejected


def load_pairs(options: PairOptions, tokenizer: Tokenizer, seed: int) -> tuple[Pairs, Pairs]:
    """Training pairs and held-out pairs, in rows of one length."""

    def examples(spec: str, split: arithmetic.Split, count: int) -> list[PreferenceExample]:
        rows = load_rows(spec, lambda level: arithmetic.preference_rows(level, split, count, seed))
        longest = options.max_length or UNBOUNDED
        return preference_examples(rows, tokenizer, max_length=longest, too_long=options.too_long)

    train, held_out = examples(options.data, "train", options.pair_count), []
    if options.eval_data or embedded_level(options.data):
        held_out = examples(options.eval_data or options.data, "heldout", EVAL_PAIRS)
    sizes = [len(side.ids) for pair in train + held_out for side in (pair.chosen, pair.rejected)]
    length = options.max_length or max(sizes)
    return Pairs(train, length), Pairs(held_out, length)


EVAL_PAIRS = 512


def parts(count: int, size: int) -> list[np.ndarray]:
    """Indices 0 ... count - 1 in parts of one size; the last repeats the last index to fill up."""
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


def load_prompts(
    options: PromptOptions, model: Model, seed: int
) -> tuple[list[PromptExample], Callable[[Params, Params | None], Evaluation] | None]:
    """Training prompts, and an evaluation on held-out prompts where there are any."""

    def examples(spec: str, split: arithmetic.Split, count: int) -> list[PromptExample]:
        rows = load_rows(spec, lambda level: arithmetic.prompt_rows(level, split, count, seed))
        longest = options.max_prompt_length or UNBOUNDED
        return prompt_examples(rows, model.tokenizer, max_length=longest, too_long=options.too_long)

    prompts = examples(options.data, "train", options.prompt_count)
    if not (options.eval_data or embedded_level(options.data)):
        return prompts, None
    held_out = examples(options.eval_data or options.data, "heldout", options.eval_count)
    reward_fn = make_reward_fn([options.eval_reward or options.rewards[0]], model.tokenizer)
    evaluate = make_evaluate_fn(
        model.config,
        model.tokenizer,
        held_out[: options.eval_count],
        reward_fn,
        max_new_tokens=options.max_new_tokens,
    )
    return prompts, evaluate


# Models --------------------------------------------------------------------------------------------


def starting_model(init: str, tokenizer: str, data: str, options: ModelOptions, seed: int) -> Model:
    """The policy of the run `init`, or a new one.

    Args:
      tokenizer: where to find it; empty for that of `init`, of the embedded task, or for bytes.
    """
    if init:
        if tokenizer:
            raise UserError("--tokenizer and --init exclude each other: a policy brings its own tokenizer")
        return load_policy(Path(init))
    if tokenizer:
        chosen = load_tokenizer(tokenizer)
    else:
        chosen = arithmetic.arithmetic_tokenizer() if embedded_level(data) else byte_tokenizer()
    config = options.config(chosen)
    return Model(config, models.init_params(config, jax.random.key(seed)), chosen)


def copied(params: Params) -> Params:
    """Parameters whose buffers may be donated while the originals stay (as the frozen reference)."""
    return jax.tree.map(jnp.copy, params)


def check_same_architecture(config: models.ModelConfig, other: models.ModelConfig, where: str) -> None:
    """Raises: UserError where a model read from `where` is not built as the policy is."""
    if config != other:
        raise UserError(
            f"{where}: its architecture is not that of the policy: train it with --init of the same run"
        )


def with_total_steps(optimizer: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The optimizer's schedule stretched over the run, unless its length was given."""
    return optimizer if optimizer.total_steps else dataclasses.replace(optimizer, total_steps=steps)


def check_divides(part: int, whole: int, part_name: str, whole_name: str) -> None:
    """Raises: UserError where `part` does not divide `whole`."""
    if part < 1 or whole % part:
        raise UserError(f"{whole_name} {whole} is not divisible by {part_name} {part}: change one of them")


# Edges ---------------------------------------------------------------------------------------------


def to_json(options: Any) -> Any:
    """Options as JSON types."""
    if dataclasses.is_dataclass(options):
        return {f.name: to_json(getattr(options, f.name)) for f in dataclasses.fields(options)}
    if isinstance(options, list | tuple):
        return [to_json(item) for item in options]
    return options if isinstance(options, bool | int | float | str | None) else str(options)


def announce(options: RunOptions, model: Model, data: str) -> None:
    """Says what is about to run."""
    if not options.quiet:
        size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        print(f"{options.out}: {data}; a decoder of {size:,} parameters; {options.steps} steps")


def show_sample(options: RunOptions, tokenizer: Tokenizer, example: SupervisedExample) -> None:
    """The first sample as the model sees it: ids beside tokens, those that count marked."""
    if not options.quiet:
        print(f"First sample ({example.where}); * marks the tokens that count:")
        print(tokenizer.table(example.ids[:40].tolist(), example.mask[:40].tolist()))


def use_compile_cache() -> None:
    """Keeps compiled programs on disk, so that a second run starts at once.

    The folder is $JAX_COMPILATION_CACHE_DIR, or .cache/jax under the current folder.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(run: Callable[[Options], Any], options_type: type[Options], description: str | None) -> None:
    """Parses the command line, runs, and turns what went wrong into one sentence and an exit status.

    Status 2 for a mistake of the user, 130 after Ctrl-C, 0 after SIGTERM (the run was saved either way).
    """
    options = tyro.cli(options_type, description=_first_paragraph(description))
    use_compile_cache()
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interrupted:
        again = [word for word in sys.argv if word != "--resume"] + ["--resume"]
        print(
            f"Stopped after step {interrupted.step}, which is saved. To go on: python {shlex.join(again)}",
            file=sys.stderr,
        )
        sys.exit(0 if interrupted.signal_number == signal.SIGTERM else 130)
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):
            print("Interrupted before there was a step to save.", file=sys.stderr)
        sys.exit(130)


def _first_paragraph(text: str | None) -> str:
    return (text or "").strip().split("\n\n")[0]
