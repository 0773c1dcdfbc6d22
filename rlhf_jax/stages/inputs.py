"""Preference pairs and prompts, from the embedded task or by path, as the scripts take them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data import packing
from rlhf_jax.data.examples import (
    LabelledExample,
    PreferenceExample,
    PromptExample,
    SupervisedExample,
    labeled_examples,
    preference_examples,
    prompt_examples,
)
from rlhf_jax.data.images import FIELDS as IMAGE_FIELDS
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.sources import Row, as_rows, read_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy
from rlhf_jax.models.adapters import merge_adapter
from rlhf_jax.rollout.dynamic_sampling import Answers, without_failed
from rlhf_jax.rollout.engines import failed_rows, make_engine, parse_engine
from rlhf_jax.rollout.sampler import (
    Evaluation,
    GenerateFn,
    RolloutFns,
    make_evaluate_fn,
    make_generate_fn,
    most_images,
)
from rlhf_jax.rollout.samples import Sample, make_samples_fn
from rlhf_jax.stages import edges, embedded, option_groups
from rlhf_jax.stages.entry import NOTHING, Given
from rlhf_jax.stages.reward_specs import make_optional_reward_fn
from rlhf_jax.training import Meter

UNBOUNDED = 1 << 30


def load_rows(
    spec: str, make_rows: Callable[[embedded.Level], list[dict[str, Any]]], given: Any = None
) -> list[Row]:
    """Rows of a file, of a tfds data set, or of the embedded task.

    Args:
      given: rows that were given as an object, and take the place of all that.
      spec: a path, `tfds:NAME[:SPLIT]` or `arithmetic:LEVEL`.
      make_rows: makes the rows of a level of the embedded task.
    """
    if given is not None:
        return as_rows(given)
    level = embedded.find_level(spec)
    if level is None:
        return read_rows(spec)
    return [Row(row, f"{spec}:{number}") for number, row in enumerate(make_rows(level), start=1)]


def _is_here(path: str) -> bool:
    """True if there is such a local file; the first of several addresses is none."""
    return not files.is_remote(path) and files.exists(path)


def split_mixture(spec: str) -> dict[str, float | None]:
    """The sources that `a.jsonl=0.7,b.jsonl=0.3` names, with their weights, or None for by size.

    Raises:
      UserError: a source stands twice, a weight is no number, or only some sources have one.
    """
    found: dict[str, float | None] = {}
    for part in [spec] if "," not in spec or _is_here(spec) else spec.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            weight = float(number) if equals and "," in spec else None
        except ValueError:
            raise UserError(f"--data {part}: {number!r} is no weight: write SOURCE=0.5") from None
        name = part.strip() if weight is None else name
        if name in found or not name:
            raise UserError(f"--data {spec}: a source is empty or stands twice: name each of them once")
        found[name] = weight
    if len({weight is None for weight in found.values()}) > 1:
        raise UserError(
            f"--data {spec}: some sources have a weight and some have none: give all or none of them"
        )
    return found


def texts(rows: Sequence[Row]) -> list[str]:
    """Every text in the rows, messages included, for a tokenizer to learn from."""

    def find(value: Any) -> list[str]:
        if isinstance(value, list | dict):
            inner = value.values() if isinstance(value, dict) else value
            return [text for item in inner for text in find(item)]
        return [value] if isinstance(value, str) else []

    return [text for row in rows for text in find(row.fields)]


# Preference pairs ----------------------------------------------------------------------------------


class Pairs:
    """Two samples to each number, as padded rows; `rows(indices)` gives both sides.

    Attributes:
      labels: one to each pair; None where the sides say it all.
    """

    def __init__(
        self,
        first: Sequence[SupervisedExample],
        second: Sequence[SupervisedExample],
        length: int,
        labels: np.ndarray | None = None,
    ) -> None:
        self._count, self.labels = len(first), labels
        if first:
            self._sides = packing.pad_rows(first, length), packing.pad_rows(second, length)

    def __len__(self) -> int:
        return self._count

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self._sides[0].tokens.shape[1]

    def fingerprint(self) -> str:
        """Changes with any token of any pair, and with any label."""
        return fingerprint(jax.tree.leaves((self._sides, self.labels)))

    def rows(self, indices: np.ndarray) -> tuple[Sequences, Sequences]:
        """Some of the pairs."""
        first, second = (jax.tree.map(lambda x: x[indices], side) for side in self._sides)
        return first, second


Example = TypeVar("Example")


def pair_examples(
    options: option_groups.PairOptions,
    tokenizer: Tokenizer,
    seed: int,
    make: Callable[..., list[Example]],
    given: Given,
) -> tuple[list[Example], list[Example]]:
    """Examples for training, and held-out ones, of rows that hold pairs."""

    def examples(spec: str, split: embedded.Split, count: int, rows: Any) -> list[Example]:
        read = load_rows(spec, lambda level: embedded.preference_rows(level, split, count, seed), rows)
        longest = options.max_length or UNBOUNDED
        return make(read, tokenizer, max_length=longest, overlength=options.overlength)

    train, held_out = examples(options.data, "train", options.pair_count, given.rows), []
    if given.eval_rows is not None or options.eval_data or embedded.find_level(options.data):
        spec = options.eval_data or options.data
        held_out = examples(spec, "heldout", options.eval_count, given.eval_rows)
    return train, held_out[: options.eval_count]


def soft_labels(options: option_groups.PairOptions, preferences: Sequence[float]) -> np.ndarray | None:
    """Probabilities that the chosen ones are better, if asked for. Raises: UserError where all are 1."""
    labels = np.array(preferences, np.float32) if options.soft_labels else None
    if labels is not None and np.all(labels == 1):
        raise UserError(
            f"--soft-labels: no row of {options.data} has a `preference` below 1: make the pairs "
            "with a judge (preferences.py --judge-model), or leave the option out"
        )
    return labels


def load_pairs(
    options: option_groups.PairOptions, tokenizer: Tokenizer, seed: int, given: Given = NOTHING
) -> tuple[Pairs, Pairs]:
    """Training pairs, with `soft_labels`, and held-out pairs (chosen, rejected), in rows of one length."""
    train, held_out = pair_examples(options, tokenizer, seed, preference_examples, given)
    labels = soft_labels(options, [pair.preference for pair in train])
    sizes = [len(side.ids) for pair in train + held_out for side in (pair.chosen, pair.rejected)]
    length = options.max_length or max(sizes)

    def padded(pairs: list[PreferenceExample], labels: np.ndarray | None = None) -> Pairs:
        return Pairs([pair.chosen for pair in pairs], [pair.rejected for pair in pairs], length, labels)

    return padded(train, labels), padded(held_out)


def load_labeled(
    options: option_groups.PairOptions, tokenizer: Tokenizer, seed: int, given: Given = NOTHING
) -> tuple[Pairs, Pairs]:
    """Completions beside mismatched ones, which stand after another's prompt, labelled as desirable or not.

    The other is half the data set away, so that it is never the other side of the same pair.
    """
    train, held_out = pair_examples(options, tokenizer, seed, labeled_examples, given)
    sizes = [len(e.prompt_ids) + len(e.completion_ids) for e in train + held_out]
    length = options.max_length or max(sizes)

    def padded(examples: list[LabelledExample]) -> Pairs:
        half = len(examples) // 2
        mismatched = [
            examples[(place + half) % len(examples)].after(example) for place, example in enumerate(examples)
        ]
        cut = [dataclasses.replace(e, ids=e.ids[:length], mask=e.mask[:length]) for e in mismatched]
        own = [example.after(example) for example in examples]
        return Pairs(own, cut, length, np.array([example.desirable for example in examples]))

    return padded(train), padded(held_out)


def parts(count: int, size: int) -> list[np.ndarray]:
    """Indices 0 ... count - 1 in parts of one size; the last repeats the last index to fill up."""
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


# Prompts -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to train on, and how to look at what comes of it.

    Attributes:
      train: the prompts.
      evaluate: (params, reference) -> Evaluation on held-out prompts; None where there are none.
      answer: params -> most likely answers to a few prompts, held-out ones where there are any.
      rollout_fns: how they are answered; None for by one completion each.
    """

    train: list[PromptExample]
    evaluate: Callable[[Params, Params | None], Evaluation] | None
    answer: Callable[[Params], list[Sample]]
    rollout_fns: RolloutFns | None = None

    def __len__(self) -> int:
        return len(self.train)

    def fingerprint(self) -> str:
        """Changes with any token of any prompt to train on, and with any field that rewards are given."""
        seen = [p.images for p in self.train if p.images is not None]
        fields = [{k: v for k, v in p.fields.items() if k not in IMAGE_FIELDS} for p in self.train]
        return fingerprint([*(np.asarray(p.ids) for p in self.train), *seen], fields)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt to train on."""
        return max(len(prompt.ids) for prompt in self.train)

    @property
    def num_images(self) -> int:
        """Images of the prompt with most."""
        return most_images(self.train)


def load_prompts(
    options: option_groups.PromptOptions,
    model: Policy,
    seed: int,
    given: Given = NOTHING,
    rollout_fns: RolloutFns | None = None,
) -> Prompts:
    """The prompts that the options name, or that were given.

    What answers are worth when they are looked at is `options.eval_reward`, else the first reward; without
    any, they are looked at without a score.
    """

    def examples(spec: str, split: embedded.Split, count: int, rows: Any) -> list[PromptExample]:
        read = load_rows(spec, lambda level: embedded.prompt_rows(level, split, count, seed), rows)
        longest = options.max_prompt_length or UNBOUNDED
        tools = rollout_fns.tools if rollout_fns else ()
        limits = {"max_length": longest, "overlength": options.overlength}
        return prompt_examples(read, model.tokenizer, **limits, tools=tools)

    train, held_out = examples(options.data, "train", options.prompt_count, given.rows), []
    if given.eval_rows is not None or options.eval_data or embedded.find_level(options.data):
        spec = options.eval_data or options.data
        held_out = examples(spec, "heldout", options.eval_count, given.eval_rows)
        held_out = held_out[: options.eval_count]
    looked_at = [options.eval_reward] if options.eval_reward else rewards_of(options, given)[:1]
    look: dict[str, Any] = {
        "reward_fn": make_optional_reward_fn(
            looked_at, model.tokenizer, rollout_fns, calls=options.reward_calls
        ),
        "max_new_tokens": options.max_new_tokens,
        "rollout_fns": rollout_fns,
    }
    shown = (held_out or train)[: options.samples]
    return Prompts(
        train,
        make_evaluate_fn(model, held_out, **look) if held_out else None,
        make_samples_fn(model, shown, **look),
        rollout_fns,
    )


def rewards_of(options: option_groups.PromptOptions, given: Given) -> list[Any]:
    """Reward functions, as given or by name."""
    return list(given.rewards or options.rewards)


def make_sampler(
    engine: str,
    model: Policy,
    *,
    prompt_length: int,
    max_new_tokens: int,
    folder: Path,
    num_images: int = 0,
    group_size: int = 1,
    max_num_seqs: int = 0,
    routing_replay: bool = False,
    sampling: Sampling = Sampling(),
) -> GenerateFn:
    """Sampler of answers: our own, or the server that --engine names.

    Args:
      engine: local, vllm:URL, sglang:URL or openai:URL.
      folder: the run folder, in which weights for a server are written.
      num_images: of the prompt with most.
      max_num_seqs: answers on their way at a time, of the own sampler; 0 for all.
      routing_replay: record experts, in the own sampler.
    """
    shared: dict[str, Any] = {
        "prompt_length": prompt_length,
        "max_new_tokens": max_new_tokens,
        "group_size": group_size,
        "sampling": sampling,
    }
    if parse_engine(engine)[0] == "local":
        decode_fns = None
        if routing_replay:
            prefill, decode, extend = model.make_recording_fns()
            decode_fns = prefill, extend if max_num_seqs else decode
        own = {"max_num_seqs": max_num_seqs or None, "num_images": num_images}
        return make_generate_fn(model, decode_fns=decode_fns, **own, **shared)
    if max_num_seqs:
        raise UserError(f"--max-num-seqs is for --engine local: the server of {engine} has its own way")
    if parse_engine(engine)[0] != "openai":
        folder = files.as_local(folder, f"weights for --engine {engine} are written")
    logprob_fn = model.make_logprob_fn()

    def write(path: Path, params: Params) -> None:
        model.with_params(merge_adapter(params)).save(path)

    return make_engine(
        engine, model.tokenizer, logprob_fn=logprob_fn, write=write, folder=folder / "weights", **shared
    )


def make_answer_fn(
    options: option_groups.PromptOptions,
    model: Policy,
    prompts: Prompts,
    *,
    batch_size: int,
    group_size: int,
    seed: int,
    engine: str = "local",
    folder: Path = Path(),
    max_num_seqs: int = 0,
    routing_replay: bool = False,
    temperature: float = 1.0,
    meter: Meter | None = None,
    given: Given = NOTHING,
) -> Callable[[Params, int], Answers]:
    """`answer(params, number) -> Answers` to the prompts of one draw, which are a function of its number.

    Args:
      batch_size: prompts in a draw.
      group_size: answers to each.
      engine: what writes them, and `folder`, `max_num_seqs`, `routing_replay`: see `make_sampler`.
      meter: takes the time of answers and rewards.
    """
    meter = meter or Meter()
    sampler = BatchSampler(len(prompts), batch_size, seed)
    fns, sampling = prompts.rollout_fns, Sampling(temperature=temperature)
    reward_fn = make_optional_reward_fn(
        rewards_of(options, given), model.tokenizer, fns, calls=options.reward_calls
    )
    reward_fn.check_kinds(prompts.train)
    generate = (
        fns.make_generate_fn(prompts.length, sampling, prompts.num_images)
        if fns
        else make_sampler(
            engine,
            model,
            prompt_length=prompts.length,
            num_images=prompts.num_images,
            max_new_tokens=options.max_new_tokens,
            folder=folder,
            group_size=group_size,
            max_num_seqs=max_num_seqs,
            routing_replay=routing_replay,
            sampling=sampling,
        )
    )
    key = jax.random.key(seed + 1)

    def answer(params: Params, number: int) -> Answers:
        chosen = [prompts.train[i] for i in edges.local_indices(sampler, number, group_size)]
        rollout = meter.timed("rollout", generate, params, chosen, jax.random.fold_in(key, number))
        scored = meter.timed("reward", reward_fn.score, rollout, chosen)
        if engine != "local":
            scored = without_failed(scored, failed_rows(rollout))
        return Answers(chosen, rollout, scored)

    return answer


def before_and_after(stage: str, before: Sequence[Sample], after: Sequence[Sample]) -> list[dict[str, Any]]:
    """Entries of samples.json."""
    return [
        {
            "prompt": first.prompt,
            "answer": first.answer,
            "completions": {"before": first.completion(), stage: second.completion()},
        }
        for first, second in zip(before, after, strict=True)
    ]
