"""Log-likelihood of continuations of contexts: requests of any length, in batches of like length."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.types import Array, Bool, Float, Params, Sequences
from rlhf_jax.data.examples import SupervisedExample
from rlhf_jax.data.packing import bucket_batches, pad_rows
from rlhf_jax.data.tokenizers import Tokenizer

ContinuationFn = Callable[[Params, Sequences], tuple[Float[Array, " B"], Bool[Array, " B"]]]


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of a continuation under a model.

    Attributes:
      logp: log-probability of all its tokens, in nats.
      tokens: how many they are.
      greedy: whether each is the likeliest one where it stands.
    """

    logp: float
    tokens: int
    greedy: bool


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Most likely choice; the earliest of those that tie.

    Attributes:
      raw: by the log-probability.
      tokens: by its mean over tokens.
      bytes: by log-probability a byte of the answer's text (UTF-8), which no tokenizer decides.
    """

    raw: int
    tokens: int
    bytes: int


def choose(likelihoods: Sequence[Likelihood], answers: Sequence[str]) -> Chosen:
    """The choice that a model makes.

    Args:
      likelihoods: of each choice.
      answers: the texts that were scored, none empty.
    """
    logp = np.array([each.logp for each in likelihoods])
    tokens = np.array([each.tokens for each in likelihoods])
    sizes = np.array([len(answer.encode()) for answer in answers])
    return Chosen(*(int(np.argmax(logp / length)) for length in (np.ones_like(logp), tokens, sizes)))


# Requests ------------------------------------------------------------------------------------------


def opening_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Special tokens that the tokenizer puts before a text: `<s>`, or none.

    Nothing either where the text begins with it.
    """
    usual = tokenizer.backend.encode("", add_special_tokens=True).ids[:1]
    return usual if usual == [tokenizer.bos_id] and list(ids[:1]) != usual else []


def plain_request(
    tokenizer: Tokenizer, context: str, continuation: str, where: str = "request", *, special: bool = False
) -> SupervisedExample:
    """Tokens of a context with what follows it; the mask marks what follows.

    The text is encoded as a whole, as a model has read such texts. White space at the end of the context
    belongs to what follows, and so does a token that spans both. An empty context is the opening, or else
    what ends a text.

    Args:
      special: read special tokens in the text as such, as in conversations that a template has laid out.

    Raises:
      UserError: nothing follows.
    """
    ids = tokenizer.encode(context + continuation, special=special)
    alone = tokenizer.encode(context.rstrip(), special=special)
    pairs = enumerate(zip(ids, alone, strict=False))
    shared = next((place for place, (ours, theirs) in pairs if ours != theirs), len(alone))
    if shared >= len(ids):
        raise UserError(f"{where}: the continuation has no tokens: give it text")
    opening = opening_ids(tokenizer, ids)
    if not opening and not shared:
        opening = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]
    whole = np.array([*opening, *ids], np.int32)
    return SupervisedExample(whole, np.arange(len(whole)) >= len(opening) + shared, where)


def cut_request(request: SupervisedExample, length: int) -> SupervisedExample:
    """The last `length` tokens."""
    return dataclasses.replace(request, ids=request.ids[-length:], mask=request.mask[-length:])


def rolling_requests(tokenizer: Tokenizer, text: str, length: int) -> list[SupervisedExample]:
    """A text in windows, each of which goes on where the one before ended: every token counts once.

    Args:
      length: tokens of a window. The first token of a window is the last of the one before, or the opening.

    Raises:
      UserError: the text has no tokens.
    """
    whole = plain_request(tokenizer, "", text, "text")
    begin = int(np.argmax(whole.mask)) - 1
    windows = [whole.ids[place : place + length] for place in range(begin, len(whole.ids) - 1, length - 1)]
    return [
        SupervisedExample(ids, np.arange(len(ids)) > 0, f"window {number}")
        for number, ids in enumerate(windows)
    ]


# Scoring -------------------------------------------------------------------------------------------


def make_continuation_fn(
    likelihood_fn: Callable[[Params, Sequences], tuple[Float[Array, "B T"], Bool[Array, "B T"]]],
) -> ContinuationFn:
    """`score(params, sequences) -> (logp, greedy)` of each row's masked tokens, in nats.

    Args:
      likelihood_fn: `Policy.make_greedy_match_fn()`.
    """

    def score(params: Params, sequences: Sequences) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        logp, likeliest = likelihood_fn(params, sequences)
        mask = sequences.mask
        return masked_sum(logp, mask, axis=1), jnp.all(likeliest | ~mask, axis=1)

    return score


def score_requests(
    score_fn: ContinuationFn,
    params: Params,
    requests: Sequence[SupervisedExample],
    *,
    batch_size: int,
    wanted: Callable[[int], bool] = lambda place: True,
) -> Iterator[dict[int, Likelihood]]:
    """Log-likelihood of each request, batch after batch, by the request's place.

    Which requests share a batch depends on their lengths alone, so that a run that was stopped gives, to the
    bit, what one in a piece gives.

    Args:
      score_fn: of `make_continuation_fn`, compiled; it meets one shape for each bucket of lengths.
      batch_size: rows at a time.
      wanted: whether a place is still to be scored; batches without any are passed over.
    """
    lengths = [len(request.ids) for request in requests]
    for columns, places in bucket_batches(lengths, size=min(batch_size, max(len(requests), 1))):
        if not any(map(wanted, places)):
            continue
        rows = pad_rows([requests[place] for place in places], columns)
        logp, greedy = jax.device_get(score_fn(params, rows))
        yield {
            place: Likelihood(float(logp[row]), int(requests[place].mask.sum()), bool(greedy[row]))
            for row, place in enumerate(places)
        }
