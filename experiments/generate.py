"""Answers of a policy: to a prompt, to every prompt of a file, or in a chat.

    python experiments/generate.py --model runs/sft --prompt "5+4+3+0+5=?"
    python experiments/generate.py --model runs/sft --prompt "5+4+3+0+5=?" --n 4 sample --temperature 0.7
    python experiments/generate.py --model runs/grpo --file problems.jsonl --json beam --beams 8
    python experiments/generate.py --model ~/Llama-3.2-1B-Instruct speculative --draft prompt

`--model` is a run folder or a Hugging Face folder. Without `--prompt` or `--file` it chats; in a terminal,
a sampled answer is shown as it comes. The decoder is named last, with options of its own.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import generation, models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.sources import read_rows
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.generation import Sampling, row_keys
from rlhf_jax.models import hf
from rlhf_jax.training.runs import Model, load_policy

Decode = Callable[..., tuple[Rollout, np.ndarray | None]]


# Decoders ------------------------------------------------------------------------------------------


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

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dola: tuple[int, ...] = ()

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

    beams: int = 4
    groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool = False


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Takes likely tokens that are unlike what stands before them.

    Attributes:
      top_k: tokens considered at each step.
      alpha: weight of the likeness; 0 is greedy.
    """

    top_k: int = 4
    alpha: float = 0.6


@dataclasses.dataclass(frozen=True)
class Speculative:
    """Draws tokens like `sample`, several a pass: guesses are checked.

    Attributes:
      draft: a run or Hugging Face folder of a smaller model; `prompt` for what the row has said before;
        `lookahead` for the model's own passes.
      count: tokens guessed at a time.
      temperature: divides the logits; 0 takes the most likely token.
    """

    draft: str = "prompt"
    count: int = 4
    temperature: float = 1.0


Decoder = (
    Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Beam, tyro.conf.subcommand("beam")]
    | Annotated[Contrastive, tyro.conf.subcommand("contrastive")]
    | Annotated[Speculative, tyro.conf.subcommand("speculative")]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to answer, and how.

    Attributes:
      model: run folder or Hugging Face folder of the policy.
      prompt: a user's message.
      file: rows with `prompt`, `question` or `messages`: a path, or tfds:NAME[:SPLIT].
      raw: give the model the prompt as it stands, without the chat template.
      n: answers to each prompt.
      max_new_tokens: tokens of an answer.
      seed: decides what is drawn.
      stop: texts at which an answer ends, which they are cut from.
      regex: regular expression that an answer must match as a whole.
      json_schema: file with a JSON schema that an answer must satisfy.
      logprobs: show the log-probs of tokens.
      json: write one JSON object a prompt to standard output.
      decoder: how answers are found.
    """

    model: Path
    prompt: str = ""
    file: str = ""
    raw: bool = False
    n: int = 1
    max_new_tokens: int = 128
    seed: int = 0
    stop: tuple[str, ...] = ()
    regex: str = ""
    json_schema: str = ""
    logprobs: bool = False
    json: bool = False
    decoder: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Decoder]] = Sample()


def load_model(folder: Path) -> Model:
    """A policy from a run folder or a Hugging Face folder.

    Raises:
      UserError: it is neither.
    """
    if (folder / "model.json").is_file():
        return load_policy(folder)
    if (folder / "config.json").is_file():
        tokenizer = load_tokenizer(folder)
        return Model(*hf.load(folder), tokenizer)
    raise UserError(f"--model {folder}: neither a run (model.json) nor a Hugging Face folder (config.json)")


def check(options: Options) -> None:
    """Raises: UserError where options contradict each other."""
    if options.prompt and options.file:
        raise UserError("--prompt and --file exclude each other: give one of them")
    if options.regex and options.json_schema:
        raise UserError("--regex and --json-schema exclude each other: give one of them")
    for flag, value in (("--n", options.n), ("--max-new-tokens", options.max_new_tokens)):
        if value < 1:
            raise UserError(f"{flag} {value} is below 1: raise it")
    decoder = options.decoder
    if isinstance(decoder, Beam) and options.n > decoder.beams * decoder.groups:
        raise UserError(
            f"--n {options.n} is more than the {decoder.beams * decoder.groups} beams: raise --beams"
        )
    if isinstance(decoder, Contrastive) and options.n > 1:
        raise UserError(f"--n {options.n}: contrastive search finds one answer a prompt: give --n 1")
    if options.raw and not (options.prompt or options.file):
        raise UserError("--raw has no meaning in a chat: give --prompt or --file")


def rules(options: Options, model: Model) -> Sampling:
    """What answers must look like and where they end, apart from how they are found."""
    constraint = stop = None
    if options.json_schema:
        path = Path(options.json_schema)
        try:
            schema = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json-schema {path}: cannot be read ({error.strerror}): give a file"
            ) from error
        constraint = generation.json_automaton(model.tokenizer, schema)
    if options.regex:
        constraint = generation.regex_automaton(model.tokenizer, options.regex)
    if options.stop:
        stop = generation.stop_automaton(model.tokenizer, options.stop)
    return Sampling(constraint=constraint, stop=stop)


def make_decode(options: Options, model: Model) -> Decode:
    """`decode(tokens, mask, key) -> (rollout, scores or None)`, `options.n` rows a prompt."""
    decoder, config, eos_id = options.decoder, model.config, model.tokenizer.eos_id
    ends = {"max_new_tokens": options.max_new_tokens, "eos_id": eos_id, "pad_id": model.tokenizer.pad_id}
    held = rules(options, model)
    prefill, decode = models.make_decode_fns(config)
    extend = models.make_extend_fn(config)

    def repeated(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tokens.repeat(options.n, axis=0), mask.repeat(options.n, axis=0)

    if isinstance(decoder, Beam):
        chosen = {**dataclasses.asdict(decoder), "best": options.n, "sampling": held, **ends}
        beams = jax.jit(functools.partial(generation.beam_search, prefill, decode, **chosen))
        return lambda tokens, mask, key: beams(model.params, tokens, mask)
    if isinstance(decoder, Contrastive):
        chosen = {**dataclasses.asdict(decoder), "sampling": held, **ends}
        fns = models.make_hidden_decode_fns(config)
        search = jax.jit(functools.partial(generation.contrastive_search, *fns, **chosen))
        return lambda tokens, mask, key: (search(model.params, tokens, mask), None)
    if isinstance(decoder, Speculative):
        sampling = dataclasses.replace(held, temperature=decoder.temperature)
        chosen = {"drafter": make_drafter(decoder, model), "sampling": sampling, **ends}
        speculate = functools.partial(generation.generate_speculatively, prefill, extend, **chosen)
        compiled = jax.jit(speculate)
        return lambda tokens, mask, key: (compiled(model.params, *repeated(tokens, mask), key)[0], None)
    prefill, decode = sampler_fns(decoder, config)
    sampling = dataclasses.replace(decoder.sampling(), constraint=held.constraint, stop=held.stop)
    chosen = {"group_size": options.n, "sampling": sampling, **ends}
    sample = jax.jit(functools.partial(generation.generate, prefill, decode, **chosen))
    return lambda tokens, mask, key: (sample(model.params, tokens, mask, key), None)


def sampler_fns(decoder: Sample, config: models.ModelConfig) -> tuple[Callable, Callable]:
    """(prefill, decode), contrasted where DoLa is wanted."""
    if not decoder.dola:
        return models.make_decode_fns(config)
    if not all(0 <= layer < config.num_repeats for layer in decoder.dola):
        raise UserError(f"--dola {decoder.dola}: the model has layers 0 to {config.num_repeats - 1}")
    return generation.dola_fns(*models.make_layer_decode_fns(config, decoder.dola))


def make_drafter(decoder: Speculative, model: Model) -> generation.Drafter:
    """Where guesses come from.

    Raises:
      UserError: the draft model has another vocabulary.
    """
    if decoder.count < 1:
        raise UserError(f"--count {decoder.count} is below 1: raise it")
    if decoder.draft == "prompt":
        return generation.prompt_drafter(count=decoder.count)
    if decoder.draft == "lookahead":
        return generation.lookahead_drafter(count=decoder.count)
    draft = load_model(Path(decoder.draft))
    if draft.tokenizer.backend.get_vocab() != model.tokenizer.backend.get_vocab():
        raise UserError(f"--draft {decoder.draft}: its tokenizer is not that of the model: choose another")
    return generation.model_drafter(
        models.make_decode_fns(draft.config)[0],
        models.make_extend_fn(draft.config),
        draft.params,
        count=decoder.count,
        eos_id=model.tokenizer.eos_id,
    )


# Answers -------------------------------------------------------------------------------------------


def bucket(length: int) -> int:
    """The next power of two from 16 on, so that prompts of many lengths compile few programs."""
    return max(16, 1 << (length - 1).bit_length())


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def describe(
    options: Options, model: Model, rollout: Rollout, scores: np.ndarray | None
) -> list[dict[str, Any]]:
    """Every row as JSON types."""
    rollout = jax.device_get(rollout)
    found = []
    for row, mask in enumerate(np.asarray(rollout.sequences.mask)):
        ids = np.asarray(rollout.sequences.tokens)[row][mask].tolist()
        logp = np.asarray(rollout.logp)[row][mask].astype(float)
        answer = {
            "text": cut(model.tokenizer.decode(ids), options.stop),
            "finished": bool(rollout.finished[row]),
            "tokens": len(ids),
            "logp": float(logp.sum()),
        }
        if scores is not None:
            score = float(np.asarray(scores).reshape(-1)[row])
            answer["score"] = score if math.isfinite(score) else None
        if options.logprobs:
            answer["ids"] = ids
            answer["logprobs"] = logp.tolist()
            if rollout.filtered_logp is not None:
                filtered = np.asarray(rollout.filtered_logp)[row][mask].astype(float)
                answer["filtered_logprobs"] = filtered.tolist()
        found.append(answer)
    return found


def show(options: Options, model: Model, prompt: str, answers: Sequence[dict[str, Any]]) -> None:
    """Prints the answers to one prompt."""
    if options.json:
        print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False), flush=True)
        return
    for answer in answers:
        score = f", score {answer['score']:.3f}" if answer.get("score") is not None else ""
        end = "" if answer["finished"] else ", cut at --max-new-tokens"
        print(f"> {prompt}\n{answer['text']}")
        print(f"[{answer['tokens']} tokens, log-prob {answer['logp']:.2f}{score}{end}]")
        if options.logprobs:
            for token, logp in zip(answer["ids"], answer["logprobs"], strict=True):
                print(f"{logp:9.3f}  {model.tokenizer.token(token)!r}")


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may turn out to begin a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
    )


def make_stream(options: Options, model: Model, decoder: Sample) -> Callable[[Sequence[int], Any], str]:
    """`answer(ids, key)` prints an answer as it is sampled and returns it."""
    held = rules(options, model)
    sampling = dataclasses.replace(decoder.sampling(), constraint=held.constraint, stop=held.stop)
    ends = {"eos_id": model.tokenizer.eos_id, "pad_id": model.tokenizer.pad_id}
    fns = sampler_fns(decoder, model.config)
    stream = generation.make_stream(*fns, max_new_tokens=options.max_new_tokens, **ends)

    def answer(ids: Sequence[int], key: Any) -> str:
        inputs = map(jnp.asarray, left_pad([ids], bucket(len(ids)), pad_id=model.tokenizer.pad_id))
        text, shown = "", 0
        for rollout in stream(model.params, *inputs, key, sampling):
            kept = np.asarray(rollout.sequences.mask[0])
            whole = model.tokenizer.decode(np.asarray(rollout.sequences.tokens[0])[kept])
            text = cut(whole, options.stop)
            # A token may end within a character.
            end = 0 if text.endswith("\ufffd") else len(text) - held_back(text, options.stop)
            if end > shown:
                print(text[shown:end], end="", flush=True)
                shown = end
        print(text[shown:])
        return text

    return answer


def chat(options: Options, model: Model) -> None:
    """Answers line by line until the input ends."""
    messages: list[dict[str, str]] = []
    decoder = options.decoder
    answer = make_stream(options, model, decoder) if isinstance(decoder, Sample) else None
    decode = make_decode(options, model)
    interactive = sys.stdin.isatty()
    if interactive:
        print("A line is a message; an empty line begins anew; Ctrl-D ends.")
    for turn, line in enumerate(iter(lambda: read_line(interactive), None)):
        if not line.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        ids = encode_prompt(model.tokenizer, messages)
        key = jax.random.fold_in(jax.random.key(options.seed), turn)
        if answer is not None:
            text = answer(ids, key)
        else:
            tokens, mask = left_pad([ids], bucket(len(ids)), pad_id=model.tokenizer.pad_id)
            text = describe(options, model, *decode(tokens, mask, key))[0]["text"]
            print(text)
        messages.append({"role": "assistant", "content": text})


def read_line(interactive: bool) -> str | None:
    """The next line of the input; None at its end."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None


def read_prompts(options: Options, model: Model) -> list[tuple[str, list[int]]]:
    """(text, ids) of every prompt."""
    if options.file:
        rows = read_rows(options.file)
        if options.raw:
            texts = [row.fields.get("prompt") for row in rows]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{options.file}: --raw needs a text `prompt` in every row")
            return [(text, model.tokenizer.encode(text)) for text in texts if isinstance(text, str)]
        found = prompt_examples(rows, model.tokenizer, max_length=1 << 30)
        return [(example.text, example.ids.tolist()) for example in found]
    if options.raw:
        return [(options.prompt, model.tokenizer.encode(options.prompt))]
    return [(options.prompt, encode_prompt(model.tokenizer, options.prompt))]


def run(options: Options) -> None:
    """Answers, and prints."""
    check(options)
    model = load_model(options.model)
    if not (options.prompt or options.file):
        chat(options, model)
        return
    prompts = read_prompts(options, model)
    decoder, plain = options.decoder, not (options.json or options.logprobs)
    if isinstance(decoder, Sample) and options.n == len(prompts) == 1 and plain and sys.stdout.isatty():
        make_stream(options, model, decoder)(prompts[0][1], jax.random.key(options.seed))
        return
    decode, key = make_decode(options, model), jax.random.key(options.seed)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place][1]))
    answers: dict[int, list[dict[str, Any]]] = {}
    # Prompts of like lengths go together, in batches of one size.
    for places in batches(order, [bucket(len(ids)) for _, ids in prompts], size=min(32, len(prompts))):
        width = bucket(max(len(prompts[place][1]) for place in places))
        ids = [prompts[place][1] for place in places]
        tokens, mask = left_pad(ids, width, pad_id=model.tokenizer.pad_id)
        # What is drawn for a prompt does not depend on the batch that it is in.
        keys = [row_keys(key, options.n, first=place * options.n) for place in places]
        found = describe(options, model, *decode(tokens, mask, jnp.concatenate(keys)))
        for row, place in enumerate(places):
            answers[place] = found[row * options.n : (row + 1) * options.n]
    for place, (text, _) in enumerate(prompts):
        show(options, model, text, answers[place])


def batches(order: Sequence[int], buckets: Sequence[int], *, size: int) -> list[list[int]]:
    """Places in batches of exactly `size`, all of one bucket; the last of a bucket repeats its last place."""
    found = []
    for width in sorted(set(buckets)):
        places = [place for place in order if buckets[place] == width]
        for start in range(0, len(places), size):
            part = places[start : start + size]
            found.append(part + part[-1:] * (size - len(part)))
    return found


if __name__ == "__main__":
    common.main(run, Options, __doc__)
