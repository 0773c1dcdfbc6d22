"""The decoders that `rlhf generate` offers: their options, and each as one compiled function of a model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from rlhf_jax import generation, models
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.protocols import DecodeFn, PrefillFn
from rlhf_jax.core.ranges import Count, Finite, GreedyTemperature, PositiveInt, Range, Share, Weight
from rlhf_jax.core.types import Rollout
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy
from rlhf_jax.training.loading import load

Decode = Callable[..., tuple[Rollout, np.ndarray | None]]
"""(prompts, mask, key, images or None) -> rollout of `count` rows a prompt, and their scores where the search
has any."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws tokens.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 for all.
      top_p: keep the fewest most likely tokens whose probability reaches p.
      min_p: keep tokens at least p times as likely as the most likely one.
      typical_p: keep the most typical tokens, until they reach mass p.
      repetition_penalty: divides positive logits of tokens already seen.
      frequency_penalty: nats for every time that the answer holds a token.
      presence_penalty: nats if the answer holds a token.
      dola: contrast the last layer with those after so many blocks, such as 0 2; none for plain logits.
    """

    temperature: GreedyTemperature = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    min_p: Share = 0.0
    typical_p: Annotated[float, Range(0, 1, above=True)] = 1.0
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0
    frequency_penalty: Annotated[float, Range(-100, 100)] = 0.0
    presence_penalty: Annotated[float, Range(-100, 100)] = 0.0
    dola: tuple[Count, ...] = ()

    def sampling(self) -> Sampling:
        """The rules that differ from doing nothing."""
        neutral = Sample()
        names = [field.name for field in dataclasses.fields(self) if field.name != "dola"]
        changed = {name: getattr(self, name) for name in names}
        return Sampling(**{k: v for k, v in changed.items() if v != getattr(neutral, k)})


@dataclasses.dataclass(frozen=True)
class Beam:
    """Searches for the likeliest answers.

    Attributes:
      beams: open answers in each group.
      groups: groups of beams, which take different ways.
      diversity_penalty: nats for a token that another group took at the same step.
      length_penalty: above 0 it favours long answers.
      early_stopping: stop once so many answers are complete as there are beams.
    """

    beams: PositiveInt = 4
    groups: PositiveInt = 1
    diversity_penalty: Weight = 0.0
    length_penalty: Finite = 1.0
    early_stopping: bool = False


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Takes likely tokens that are unlike what stands before them.

    Attributes:
      top_k: tokens considered at each step.
      alpha: weight of the likeness; 0 is greedy.
    """

    top_k: PositiveInt = 4
    alpha: Share = 0.6


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Draws tokens like `sample`, several a pass: guesses are checked.

    Attributes:
      draft: a smaller model, as `model`; `prompt` for what the row has said before;
        `lookahead` for the model's own passes.
      num_speculative_tokens: tokens guessed at a time.
      temperature: divides the logits; 0 takes the most likely token.
    """

    draft: str = "prompt"
    num_speculative_tokens: PositiveInt = 4
    temperature: GreedyTemperature = 1.0


Decoder = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Beam, tyro.conf.subcommand("beam")]
    | Annotated[Contrastive, tyro.conf.subcommand("contrastive")]
    | Annotated[Speculative, tyro.conf.subcommand("speculative")]
)


def answer_rules(model: Policy, *, stop: Sequence[str], regex: str, json_schema: str) -> Sampling:
    """Constraints of answers and where they end, apart from how they are found.

    Args:
      stop: texts at which an answer ends.
      regex: expression that an answer must match; empty for any answer.
      json_schema: file with a schema that an answer must satisfy; empty for any answer.
    """
    constraint = None
    if json_schema:
        path = Path(json_schema)
        try:
            schema = files.read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--json-schema {path}: cannot be read ({error}): give a file") from error
        constraint = generation.json_automaton(model.tokenizer, schema)
    if regex:
        constraint = generation.regex_automaton(model.tokenizer, regex)
    return Sampling(
        constraint=constraint, stop=generation.stop_automaton(model.tokenizer, stop) if stop else None
    )


def make_decode(
    decoder: Decoder, model: Policy, rules: Sampling, *, count: int, max_new_tokens: int
) -> Decode:
    """`decode(tokens, mask, key, images) -> (rollout, scores or None)`, `count` rows a prompt."""
    tokenizer = model.tokenizer
    ends = {"max_new_tokens": max_new_tokens, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    if isinstance(decoder, Sample):
        sample = functools.partial(generation.generate, *sampler_fns(decoder, model))
        sampling = sampling_of(decoder, rules)
        compiled = jax.jit(functools.partial(sample, group_size=count, sampling=sampling, **ends))
        return lambda *inputs: (compiled(model.params, *inputs[:3], images=inputs[3]), None)
    if isinstance(decoder, Contrastive):
        fns = models.make_hidden_decode_fns(model.architecture)
        search = functools.partial(generation.contrastive_search, *fns, sampling=rules, **ends)
        compiled = jax.jit(functools.partial(search, **dataclasses.asdict(decoder)))
        return lambda tokens, mask, key, images: (compiled(model.params, tokens, mask), None)
    prefill, decode = model.prefill, model.decode
    if isinstance(decoder, Beam):
        search = functools.partial(generation.beam_search, prefill, decode, sampling=rules, **ends)
        compiled = jax.jit(functools.partial(search, best=count, **dataclasses.asdict(decoder)))
        return lambda tokens, mask, key, images: compiled(model.params, tokens, mask, images=images)
    speculate = functools.partial(
        generation.speculative_decode,
        prefill,
        model.extend,
        proposer=make_proposer(decoder, model),
        sampling=dataclasses.replace(rules, temperature=decoder.temperature),
        **ends,
    )
    compiled = jax.jit(speculate)

    def repeated(tokens: np.ndarray, mask: np.ndarray, key: Any, images: None) -> tuple[Rollout, None]:
        rows = tokens.repeat(count, axis=0), mask.repeat(count, axis=0)
        return compiled(model.params, *rows, key)[0], None

    return repeated


def sees(decoder: Decoder) -> bool:
    """True where the decoder reads images of prompts."""
    return isinstance(decoder, Beam) or (isinstance(decoder, Sample) and not decoder.dola)


def sampling_of(decoder: Sample, rules: Sampling) -> Sampling:
    """Sampling settings of `sample`, under the constraints of answers."""
    return dataclasses.replace(decoder.sampling(), constraint=rules.constraint, stop=rules.stop)


def sampler_fns(decoder: Sample, model: Policy) -> tuple[PrefillFn, DecodeFn]:
    """(prefill, decode), contrasted where DoLa is wanted."""
    if not decoder.dola:
        return model.prefill, model.decode
    config = model.architecture
    if not all(0 <= layer < config.num_repeats for layer in decoder.dola):
        raise UserError(f"--dola {decoder.dola}: the model has layers 0 to {config.num_repeats - 1}")
    return generation.dola_fns(*models.make_layer_decode_fns(config, decoder.dola))


def make_proposer(decoder: Speculative, model: Policy) -> generation.Proposer:
    """Proposer of draft tokens.

    Raises:
      UserError: the draft model has another vocabulary.
    """
    if model.architecture.is_recurrent:
        raise UserError("speculative: a recurrent model cannot take back guesses: choose another decoder")
    if decoder.draft == "prompt":
        return generation.prompt_lookup_proposer(num_speculative_tokens=decoder.num_speculative_tokens)
    if decoder.draft == "lookahead":
        return generation.lookahead_proposer(num_speculative_tokens=decoder.num_speculative_tokens)
    draft = load(decoder.draft)
    if draft.architecture.is_recurrent:
        raise UserError(
            f"--draft {decoder.draft}: a recurrent model cannot take back guesses: choose another"
        )
    if draft.tokenizer.backend.get_vocab() != model.tokenizer.backend.get_vocab():
        raise UserError(f"--draft {decoder.draft}: its tokenizer is not that of the model: choose another")
    assert draft.extend is not None  # decoders of ours have one
    return generation.draft_model_proposer(
        draft.prefill,
        draft.extend,
        draft.params,
        num_speculative_tokens=decoder.num_speculative_tokens,
        eos_id=model.tokenizer.eos_id,
    )
