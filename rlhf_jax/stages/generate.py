"""Answers of a policy: to a prompt, to every prompt of a file, or in a chat.

    rlhf generate --model runs/sft --prompt "5+4+3+0+5=?"
    rlhf generate --model runs/sft --prompt "5+4+3+0+5=?" --n 4 sample --temperature 0.7
    rlhf generate --model runs/grpo --file problems.jsonl --json beam --beams 8
    rlhf generate --model ~/Llama-3.2-1B-Instruct speculative --draft prompt
    rlhf generate --model ~/SmolVLM-256M-Instruct --image cat.png --prompt "What is this?"

`--model` is a run folder or a Hugging Face folder. Without `--prompt` or `--file` it chats; in a terminal,
a sampled answer is shown as it comes. The decoder is named last, with options of its own.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import generation
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Length, PositiveInt, Seed
from rlhf_jax.core.types import Images, Rollout
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.content_parts import load_images, refuse_images
from rlhf_jax.data.examples import PromptExample, prompt_examples
from rlhf_jax.data.packing import bucket_batches, left_pad, length_bucket, stack_images
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.generation import Sampling, row_keys
from rlhf_jax.models import Policy
from rlhf_jax.rewards.verifiers import final_number
from rlhf_jax.rollout.sampler import most_images
from rlhf_jax.search import majority_vote
from rlhf_jax.stages import decoders, option_checks
from rlhf_jax.stages.decoders import Beam, Contrastive, Decode, Decoder, Sample
from rlhf_jax.training.loading import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Generation options.

    Attributes:
      model: the policy: a run folder, a Hugging Face folder, a GGUF file or a name in the hub cache.
      prompt: a user's message.
      image: images that stand before it, or before the first message of a chat: files, data URLs or base64.
      file: rows with `prompt`, `question` or `messages`: a path, or tfds:NAME[:SPLIT].
      raw: give the model the prompt as it stands, without the chat template.
      n: answers to each prompt.
      majority_vote: of these show the one that most agree with in their last number (self-consistency).
      max_new_tokens: tokens of an answer.
      seed: decides what is drawn.
      stop: texts at which an answer ends, which they are cut from.
      regex: regular expression that an answer must match as a whole.
      json_schema: file with a JSON schema that an answer must satisfy.
      logprobs: show the log-probs of tokens.
      json: write one JSON object a prompt to standard output.
      decoder: how answers are found.
    """

    model: str
    prompt: str = ""
    image: tuple[str, ...] = ()
    file: str = ""
    raw: bool = False
    n: PositiveInt = 1
    majority_vote: bool = False
    max_new_tokens: Length = 128
    seed: Seed = 0
    stop: tuple[str, ...] = ()
    regex: str = ""
    json_schema: str = ""
    logprobs: bool = False
    json: bool = False
    decoder: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Decoder]] = Sample()


def check(options: Options) -> None:
    """Raises: UserError where options contradict each other."""
    option_checks.check_numbers(options)
    if options.prompt and options.file:
        raise UserError("--prompt and --file exclude each other: give one of them")
    if options.image and (options.file or options.raw):
        other = "--file" if options.file else "--raw"
        raise UserError(
            f"--image and {other} exclude each other: rows bring their own images, and raw text has none"
        )
    if options.image and not decoders.sees(options.decoder):
        raise UserError("--image is read by sample (without --dola) and beam: choose one of them")
    if options.regex and options.json_schema:
        raise UserError("--regex and --json-schema exclude each other: give one of them")
    decoder = options.decoder
    if isinstance(decoder, Beam) and options.n > decoder.beams * decoder.groups:
        raise UserError(
            f"--n {options.n} is more than the {decoder.beams * decoder.groups} beams: raise --beams"
        )
    if isinstance(decoder, Contrastive) and options.n > 1:
        raise UserError(f"--n {options.n}: contrastive search finds one answer a prompt: give --n 1")
    if options.majority_vote and options.n < 3:
        raise UserError(f"--majority-vote among {options.n} answers says nothing: give --n 3 or more")
    if options.raw and not (options.prompt or options.file):
        raise UserError("--raw has no meaning in a chat: give --prompt or --file")


def rules(options: Options, model: Policy) -> Sampling:
    """Constraints of answers."""
    return decoders.answer_rules(
        model, stop=options.stop, regex=options.regex, json_schema=options.json_schema
    )


def make_decode(options: Options, model: Policy) -> Decode:
    """The decoder that the options name."""
    shape = {"count": options.n, "max_new_tokens": options.max_new_tokens}
    return decoders.make_decode(options.decoder, model, rules(options, model), **shape)


# Answers -------------------------------------------------------------------------------------------


def describe(
    options: Options, model: Policy, rollout: Rollout, scores: np.ndarray | None
) -> list[dict[str, Any]]:
    """Every row as JSON types."""
    rollout = jax.device_get(rollout)
    found = []
    for row, mask in enumerate(np.asarray(rollout.sequences.mask)):
        ids = np.asarray(rollout.sequences.tokens)[row][mask].tolist()
        logp = np.asarray(rollout.logp)[row][mask].astype(float)
        answer = {
            "text": generation.cut_at_stop(model.tokenizer.decode(ids), options.stop),
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


def voted(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of the answers that most agree with in their last number, and the share that does.

    Self-consistency (Wang et al. 2023). Those without a number have no vote; all are returned if none has.
    """
    numbers = [final_number(answer["text"]) for answer in answers]
    known = {number: place for place, number in reversed(list(enumerate(numbers)))}
    places = np.array([known[number] for number in numbers])
    votes = np.array([number is not None for number in numbers])
    if not votes.any():
        return answers
    chosen = int(majority_vote(jnp.asarray(places), jnp.asarray(votes)))
    return [{**answers[chosen], "votes": float(np.mean(votes & (places == places[chosen])))}]


def show(options: Options, model: Policy, prompt: str, answers: Sequence[dict[str, Any]]) -> None:
    """Prints the answers to one prompt."""
    if options.json:
        print(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False), flush=True)
        return
    for answer in answers:
        score = f", score {answer['score']:.3f}" if answer.get("score") is not None else ""
        end = "" if answer["finished"] else ", cut at --max-new-tokens"
        end += f", {answer['votes']:.0%} of the votes" if "votes" in answer else ""
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


def make_stream(
    options: Options, model: Policy, decoder: Sample
) -> Callable[[Sequence[int], Any, Images | None], str]:
    """`answer(ids, key, images)` prints an answer as it is sampled and returns it."""
    sampling = decoders.sampling_of(decoder, rules(options, model))
    ends = {"eos_id": model.tokenizer.eos_id, "pad_id": model.tokenizer.pad_id}
    fns = decoders.sampler_fns(decoder, model)
    stream = generation.make_stream(*fns, max_new_tokens=options.max_new_tokens, **ends)

    def answer(ids: Sequence[int], key: Any, images: Images | None) -> str:
        inputs = map(jnp.asarray, left_pad([ids], length_bucket(len(ids)), pad_id=model.tokenizer.pad_id))
        text, shown = "", 0
        for rollout in stream(model.params, *inputs, key, sampling, images):
            kept = np.asarray(rollout.sequences.mask[0])
            whole = model.tokenizer.decode(np.asarray(rollout.sequences.tokens[0])[kept])
            text = generation.cut_at_stop(whole, options.stop)
            # A token may end within a character.
            end = 0 if text.endswith("\ufffd") else len(text) - held_back(text, options.stop)
            if end > shown:
                print(text[shown:end], end="", flush=True)
                shown = end
        print(text[shown:])
        return text

    return answer


def chat(options: Options, model: Policy) -> None:
    """Answers line by line until the input ends."""
    messages: list[dict[str, Any]] = []
    seen = None
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
        if options.image and len(messages) == 1:
            messages, seen = load_images(model.tokenizer, messages, {"images": list(options.image)})
        ids, images = encode_prompt(model.tokenizer, messages), stack_images([[seen]])
        key = jax.random.fold_in(jax.random.key(options.seed), turn)
        if answer is not None:
            text = answer(ids, key, images)
        else:
            tokens, mask = left_pad([ids], length_bucket(len(ids)), pad_id=model.tokenizer.pad_id)
            text = describe(options, model, *decode(tokens, mask, key, images))[0]["text"]
            print(text)
        messages.append({"role": "assistant", "content": text})


def read_line(interactive: bool) -> str | None:
    """The next line of the input; None at its end."""
    try:
        return input("> " if interactive else "")
    except EOFError:
        return None


def read_prompts(options: Options, model: Policy) -> list[PromptExample]:
    """The prompts, with their images."""
    rows = read_rows(options.file) if options.file else [Row({"prompt": options.prompt}, "--prompt")]
    if options.raw:
        return [_raw_prompt(row, model) for row in rows]
    if options.image:
        rows = [Row({**row.fields, "images": list(options.image)}, "--image") for row in rows]
    found = prompt_examples(rows, model.tokenizer, max_length=1 << 30)
    if not decoders.sees(options.decoder):
        refuse_images(found, "a decoder other than beam, and than sample without --dola,")
    return found


def _raw_prompt(row: Row, model: Policy) -> PromptExample:
    text = row.fields.get("prompt")
    if not isinstance(text, str):
        raise UserError(f"{row.where}: --raw needs a text `prompt` in every row")
    return PromptExample(np.array(model.tokenizer.encode(text), np.int32), text, row.fields, row.where)


def run(options: Options) -> None:
    """Answers, and prints."""
    check(options)
    model = load(options.model)
    if not (options.prompt or options.file):
        chat(options, model)
        return
    prompts = read_prompts(options, model)
    decoder, plain = options.decoder, not (options.json or options.logprobs)
    if isinstance(decoder, Sample) and options.n == len(prompts) == 1 and plain and sys.stdout.isatty():
        images = stack_images([[prompts[0].images]])
        make_stream(options, model, decoder)(prompts[0].ids.tolist(), jax.random.key(options.seed), images)
        return
    decode, key = make_decode(options, model), jax.random.key(options.seed)
    answers: dict[int, list[dict[str, Any]]] = {}
    processor = model.tokenizer.image_processor
    room = {"number": most_images(prompts), "size": processor and processor.size}
    lengths = [len(prompt.ids) for prompt in prompts]
    for columns, places in bucket_batches(lengths, size=min(32, len(prompts))):
        chosen = [prompts[place] for place in places]
        tokens, mask = left_pad([p.ids.tolist() for p in chosen], columns, pad_id=model.tokenizer.pad_id)
        images = stack_images([[p.images] for p in chosen], **room)
        # What is drawn for a prompt does not depend on the batch that it is in.
        keys = [row_keys(key, options.n, first=place * options.n) for place in places]
        found = describe(options, model, *decode(tokens, mask, jnp.concatenate(keys), images))
        for row, place in enumerate(places):
            answers[place] = found[row * options.n : (row + 1) * options.n]
    for place, prompt in enumerate(prompts):
        voters = answers[place]
        show(options, model, prompt.text, voted(voters) if options.majority_vote else voters)
