"""Prompts in, sampled completions and their rewards out: the part of RL that touches text."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.axes import constrain
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.protocols import DecodeFn, ExtendFn, PrefillFn
from rlhf_jax.core.types import Array, Key, Params, PRNGKeyArray, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.packing import left_pad, stack_images
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling, continuous_batching_generate, generate, row_keys
from rlhf_jax.models import Policy
from rlhf_jax.rollout.token_rows import describe_completions


@runtime_checkable
class GenerateFn(Protocol):
    """Completions of prompts; see `make_generate_fn`."""

    def __call__(
        self,
        params: Params,
        prompts: Sequence[PromptExample],
        key: PRNGKeyArray | Key[Array, "B"],
        sampling: Sampling = ...,
        /,
    ) -> Rollout:
        """One completion for each prompt."""
        ...


FILTERS = ("top_k", "top_p", "min_p", "typical_p")
"""Rules of sampling after which some tokens cannot be drawn."""


def check_full_support(sampling: Sampling) -> None:
    """Raises: UserError where `sampling` draws from a part of the distribution."""
    given = [name for name in FILTERS if getattr(sampling, name) is not None]
    if given:
        raise UserError(
            f"sampling: {', '.join(given)} leaves tokens out that the policy gives probability to, so that "
            "no ratio corrects for how answers were drawn: sample at a temperature alone, or give "
            "allow_filters=True where nothing is learned from the sampler's log-probs"
        )


def make_generate_fn(
    policy: Policy,
    *,
    prompt_length: int,
    max_new_tokens: int,
    num_images: int = 0,
    group_size: int = 1,
    max_num_seqs: int | None = None,
    sampling: Sampling = Sampling(),
    allow_filters: bool = False,
    decode_fns: tuple[PrefillFn, DecodeFn | ExtendFn] | None = None,
) -> GenerateFn:
    """`generate(params, prompts, key) -> Rollout`, compiled once for each number of prompts.

    Where the devices of the entered mesh do not divide the prompts, the last one is repeated for them.

    Args:
      policy: its callables and tokenizer; parameters come with each call.
      prompt_length: P; longer prompts are refused.
      num_images: of the prompt with most; more are refused.
      group_size: how often each prompt stands in `prompts`, one after the other; it is read once.
      max_num_seqs: answers on their way at a time; where one ends, the next prompt is read (continuous
        batching). All by default. With it, prompts are read once for every answer.
      sampling: unless the call says otherwise, which compiles nothing anew while the same filters are on.
      allow_filters: samples with top-k, top-p and their like, which are refused otherwise: log-probs of a
        rollout are of the whole distribution, and policy gradients take answers for draws from it.
      decode_fns: (prefill, decode), or with `max_num_seqs` (prefill, extend), where they are not the model's.
    """
    group_size = group_size if max_num_seqs is None else 1
    if num_images and max_num_seqs is not None:
        raise UserError("max_num_seqs: continuous batching reads no images yet: leave it out")

    processor = policy.tokenizer.image_processor
    image_size = processor and processor.size

    @functools.cache
    def compiled(group_size: int) -> Callable[..., Rollout]:
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "group_size": group_size,
            "max_num_seqs": max_num_seqs,
            "decode_fns": decode_fns,
        }
        return jax.jit(make_completion_fn(policy, **options))

    def run(
        params: Params,
        prompts: Sequence[PromptExample],
        key: PRNGKeyArray | Key[Array, "B"],
        sampling: Sampling = sampling,
        /,
    ) -> Rollout:
        if not allow_filters:
            check_full_support(sampling)
        if any(prompt is not prompts[row - row % group_size] for row, prompt in enumerate(prompts)):
            raise ValueError(f"prompts do not come in groups of {group_size} equal ones")
        mesh = distributed.current_mesh()
        parts = len(distributed.local_rows(distributed.shards_of_batch(mesh), mesh=mesh))
        size = read_at_once(len(prompts), group_size, parts)
        ids = [prompt.ids for prompt in prompts[::size]]
        missing = -len(ids) % parts
        if missing and jax.process_count() > 1:
            raise ValueError(f"{len(ids)} rows cannot be split over the {parts} parts of this process")
        batch = left_pad(ids + ids[-1:] * missing, prompt_length, pad_id=policy.tokenizer.pad_id)
        seen = [[prompt.images] for prompt in prompts[::size]]
        images = stack_images(seen + seen[-1:] * missing, number=num_images, size=image_size)
        inputs = {} if images is None else {"images": distributed.shard_batch(images)}
        rollout = compiled(size)(params, *distributed.shard_batch(batch), key, sampling=sampling, **inputs)
        return jax.tree.map(lambda x: x[: len(prompts)], rollout) if missing else rollout

    return run


def read_at_once(rows: int, group_size: int, parts: int) -> int:
    """For how many answers a prompt is read: its group, or 1 where only the answers can be split evenly."""
    return 1 if rows % parts == 0 and rows // group_size % parts else group_size


def answer_all(
    generate: GenerateFn,
    reward_fn: Callable[[Rollout, Sequence[PromptExample]], np.ndarray],
    params: Params,
    prompts: Sequence[PromptExample],
    sampling: Sampling,
    *,
    first: int = 0,
    key: PRNGKeyArray | None = None,
) -> tuple[Rollout, np.ndarray]:
    """Answers to prompts that every process holds, of which each answers and judges its own.

    Args:
      first: number of the first prompt, which decides what is drawn for it.
      key: of all prompts; None for a fixed one.

    Returns:
      (rollout, rewards) of all prompts; in the rollout, repeats may follow to fill up the mesh.
    """
    rows = len(prompts) + -len(prompts) % distributed.shards_of_batch(distributed.current_mesh())
    padded = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    mine = [padded[row] for row in distributed.local_rows(rows)]
    key = jax.random.key(0) if key is None else key
    rollout = generate(params, mine, row_keys(key, rows, first=first), sampling)
    rewards = np.asarray(reward_fn(rollout, mine))
    if jax.process_count() > 1:
        rewards = distributed.all_values(distributed.shard_batch(rewards))
    return rollout, rewards[: len(prompts)]


def make_completion_fn(
    policy: Policy,
    *,
    max_new_tokens: int,
    group_size: int = 1,
    max_num_seqs: int | None = None,
    decode_fns: tuple[PrefillFn, DecodeFn | ExtendFn] | None = None,
) -> Callable[..., Rollout]:
    """`complete(params, prompts [N, P], prompt_mask, key, sampling=...) -> Rollout`, to be compiled.

    Args:
      group_size: answers to each prompt, which is read once.
      max_num_seqs: answers on their way at a time; with it, prompts are read for every answer.
      decode_fns: (prefill, decode), or with `max_num_seqs` (prefill, extend), where they are not the model's.
    """
    own = policy.decode if max_num_seqs is None else policy.extend
    prefill, decode = decode_fns or (policy.prefill, own)
    tokenizer = policy.tokenizer
    ends = {"max_new_tokens": max_new_tokens, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    if max_num_seqs is None:
        sample = functools.partial(generate, prefill, decode, group_size=group_size, **ends)
    elif decode is None:
        raise UserError(
            "the model has no continuous batching: give wrap(..., extend=...), or leave max_num_seqs out"
        )
    else:
        sample = functools.partial(
            continuous_batching_generate, prefill, decode, max_num_seqs=max_num_seqs, **ends
        )

    def complete(params: Params, *args: Any, **options: Any) -> Rollout:
        laid_out = distributed.reshard_for_sampling(params, policy.compute_dtype, table=policy.axes)
        rollout = sample(laid_out, *args, **options)
        # Each process finds its own rows in every array, whatever the compiler would have chosen.
        return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), rollout)

    return complete


def completion_texts(tokenizer: Tokenizer, rollout: Rollout, *, of_all: bool = False) -> list[str]:
    """Completions as texts, without the end-of-sequence token.

    Args:
      of_all: the rows of every process rather than of this one.
    """
    values = distributed.all_values if of_all else distributed.local_values
    tokens, mask = map(values, (rollout.sequences.tokens, rollout.sequences.mask))
    return [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)]


@dataclasses.dataclass(frozen=True)
class RolloutFns:
    """Rollout functions, from prompts to texts: one completion each, or several turns.

    Attributes:
      make_generate_fn: (tokens of the longest prompt, sampling, images of the prompt with most) ->
        `GenerateFn`.
      tools: JSON schemas that the prompts offer to the policy.
      answer_texts_fn: (tokenizer, rollout) -> what rewards get as completions, of this process's rows.
      shown_texts_fn: (tokenizer, rollout) -> what people read, of the rows of every process.
      fields_fn: (tokenizer, rollout) -> further fields for rewards, a list each.
      describe_fn: rollout -> numbers of each row, whose means are logged.
    """

    make_generate_fn: Callable[..., GenerateFn]
    tools: Sequence[Mapping[str, Any]] = ()
    answer_texts_fn: Callable[[Tokenizer, Rollout], list[str]] = completion_texts
    shown_texts_fn: Callable[[Tokenizer, Rollout], list[str]] = functools.partial(
        completion_texts, of_all=True
    )
    fields_fn: Callable[[Tokenizer, Rollout], Mapping[str, list[Any]]] = lambda *_: {}
    describe_fn: Callable[[Rollout], Mapping[str, np.ndarray]] = lambda _: {}


def most_images(prompts: Sequence[PromptExample]) -> int:
    """Images of the prompt with most."""
    return max((0 if prompt.images is None else len(prompt.images) for prompt in prompts), default=0)


def single_turn(policy: Policy, *, max_new_tokens: int) -> RolloutFns:
    """One completion of each prompt."""

    def make(prompt_length: int, sampling: Sampling, num_images: int = 0) -> GenerateFn:
        room: dict[str, Any] = {"prompt_length": prompt_length, "num_images": num_images}
        return make_generate_fn(policy, **room, max_new_tokens=max_new_tokens, sampling=sampling)

    return RolloutFns(make)


# Evaluation ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation of a policy on held-out prompts.

    Attributes:
      score: mean reward of the most likely completions; NaN where nothing says what they are worth.
      sampled_score: mean reward of completions sampled at temperature 1.
      kl: KL(policy || reference) in nats per completion, estimated from the sampled ones.
      length: mean tokens of the most likely completions.
      finished: share of them that ended by themselves.
      completions: their texts, in the order of the prompts.
      rewards: their rewards.
      described: means of what `RolloutFns.describe_fn` says of them.
      numbers: of the first of them, as of `token_rows.describe_completions`.
    """

    score: float
    sampled_score: float
    kl: float
    length: float
    finished: float
    completions: list[str]
    rewards: np.ndarray
    described: Mapping[str, float] = dataclasses.field(default_factory=dict)
    numbers: Sequence[Mapping[str, Any]] = ()

    def metrics(self) -> dict[str, float]:
        """The numbers, for the log; without scores where there are none."""
        scores = {"score": self.score, "sampled_score": self.sampled_score}
        return {
            **({} if math.isnan(self.score) else scores),
            "kl": self.kl,
            "length": self.length,
            "finished": self.finished,
            **self.described,
        }


def make_evaluate_fn(
    policy: Policy,
    prompts: Sequence[PromptExample],
    reward_fn: Callable[[Rollout, Sequence[PromptExample]], np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
    rollout_fns: RolloutFns | None = None,
) -> Callable[..., Evaluation]:
    """`evaluate(params, ref_params, num_described=0) -> Evaluation` on fixed prompts, with fixed keys.

    With `num_described`, so many of the first most likely completions are described token by token.

    Args:
      batch_size: prompts at a time.
      rollout_fns: how they are answered; None for by one completion each.
    """
    fns = rollout_fns or single_turn(policy, max_new_tokens=max_new_tokens)
    longest, num_images = max(len(prompt.ids) for prompt in prompts), most_images(prompts)
    sample = fns.make_generate_fn(longest, Sampling(), num_images)
    logprob_fn = policy.make_logprob_fn()

    @jax.jit
    def log_ratio(params: Params, ref_params: Params, rollout: Rollout) -> tuple[jax.Array, jax.Array]:
        by_token = logprob_fn(params, rollout.sequences).logp - logprob_fn(ref_params, rollout.sequences).logp
        return by_token, jnp.sum(jnp.where(rollout.sequences.mask, by_token, 0), axis=1)

    def describe(params: Params, ref_params: Params | None, rollout: Rollout, count: int):
        by_token = None
        if ref_params is not None:
            by_token = distributed.all_values(log_ratio(params, ref_params, rollout)[0])
        return describe_completions(policy.tokenizer, rollout, by_token, count)

    def evaluate(params: Params, ref_params: Params | None, num_described: int = 0) -> Evaluation:
        numbers: list[dict[str, Any]] = []
        texts, rewards, sampled_rewards, kl, lengths, finished = [], [], [], [], [], []
        described: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(prompts), batch_size):
            part = list(prompts[start : start + batch_size])
            kept = len(part)
            part += [part[-1]] * (min(batch_size, len(prompts)) - kept)  # one shape for every batch
            ask = functools.partial(answer_all, sample, reward_fn, params, part, first=start)
            (greedy, worth), (sampled, sampled_worth) = (ask(Sampling(temperature=t)) for t in (0.0, 1.0))
            texts += fns.shown_texts_fn(policy.tokenizer, greedy)[:kept]
            for name, values in fns.describe_fn(greedy).items():
                described.setdefault(name, []).append(values[:kept])
            if missing := min(num_described - len(numbers), kept):
                numbers += describe(params, ref_params, greedy, missing)
            rewards.append(worth[:kept])
            sampled_rewards.append(sampled_worth[:kept])
            lengths.append(distributed.all_values(greedy.sequences.mask).sum(axis=1)[:kept])
            finished.append(distributed.all_values(greedy.finished)[:kept])
            if ref_params is not None:
                kl.append(distributed.all_values(log_ratio(params, ref_params, sampled)[1])[:kept])
        return Evaluation(
            score=float(np.mean(np.concatenate(rewards))),
            sampled_score=float(np.mean(np.concatenate(sampled_rewards))),
            kl=float(np.mean(np.concatenate(kl))) if kl else 0.0,
            length=float(np.mean(np.concatenate(lengths))),
            finished=float(np.mean(np.concatenate(finished))),
            completions=texts,
            rewards=np.concatenate(rewards),
            described={name: float(np.mean(np.concatenate(found))) for name, found in described.items()},
            numbers=numbers,
        )

    return evaluate
