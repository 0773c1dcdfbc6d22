"""Rounds of answering and learning: RAFT, best-of-n, expert iteration, iterated DPO, distillation of texts.

    rlhf rounds --out runs/raft --model runs/sft --data my.jsonl --rewards my_rewards:exact
    rlhf rounds --out runs/best_of_16 --model runs/sft --data my.jsonl --rewards my_rewards:exact \\
        --rounds 1 --samples-per-prompt 16
    rlhf rounds --out runs/iterated --model runs/sft --data my.jsonl --rewards my_rewards:exact --method dpo

With `--method expert_iteration --reinit-each-round` it is STaR, with `--generator` the distillation of texts.

In each round a policy answers prompts, rewards say which answers are good, and `sft.py` or `dpo.py` trains on
them. The rows are kept beside the rounds' run folders, so they can be read, and what was done is not
done again by --resume. Rows hold `prompt`, `question` or `messages`; other fields go to
the rewards by name.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from rlhf_jax.algorithms import selection
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, Finite, LearningRate, Positive, PositiveInt, Temperature
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Bool, Params, Sequences
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.row_messages import prompt_messages
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.metrics import JSONLLogger, as_logger, final_table
from rlhf_jax.metrics.completions import COMPLETIONS, read_completions
from rlhf_jax.metrics.loggers import TableLogger
from rlhf_jax.models import Policy
from rlhf_jax.rollout.completions import LastCompletions, describe_rows
from rlhf_jax.rollout.dynamic_sampling import Answers, concatenate, term_means
from rlhf_jax.stages import adapting, defaults, dpo, edges, inputs, option_checks, option_groups, sft
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.reward_specs import check_same_vocabulary
from rlhf_jax.stages.session import Session
from rlhf_jax.training.loading import load
from rlhf_jax.training.loop import log_completions
from rlhf_jax.training.run_folder import describe_run, load_policy

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of learning in rounds; --steps and --save-every are those of a round.

    Attributes:
      model: the policy to start from: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache.
      generator: the model, as `model`, that answers in every round, such as a larger teacher; empty for the
        policy that the round before left.
      prompts: which prompts, and what their answers are worth.
      adapter: what each round trains; the next starts from the policy with it merged.
      method: raft imitates the best answer to each prompt, expert_iteration all that are good enough, and dpo
        learns from the best and the worst as a pair, against the policy that the round starts from.
      rounds: how many.
      reinit_each_round: train each round from `model`, not from the policy of the round before.
      prompts_per_round: different ones in the next round, as long as there are any.
      samples_per_prompt: answers to each.
      reward_threshold: reward of an answer that is worth imitating; None for more than the mean of its round.
      batch_size: rows of a training step; prompts that are answered at a time.
      learning_rate: at its peak, in each round; None for the published one (2e-5, of DPO 1e-6).
      beta: strength of DPO's constraint, per nat; None for the published 0.1.
      temperature: of sampling.
      engine: what writes the answers: local (this process), or the server vllm:URL, sglang:URL or openai:URL,
        with #NAME behind it where it does not call the model default. openai servers keep their weights.
      num_completions_to_print: rows that are printed of the table of each round's answers.
      extra_data: more rows of the same kind that are learned from in every round, such as general
        conversations beside those that rewards chose; empty for none.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/raft"))
    model: str
    generator: str = ""
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.COSINE
    method: Literal["raft", "expert_iteration", "dpo"] = "raft"
    rounds: PositiveInt = 3
    reinit_each_round: bool = False
    prompts_per_round: PositiveInt = 512
    samples_per_prompt: PositiveInt = 4
    reward_threshold: Finite | None = None
    batch_size: PositiveInt = 64
    learning_rate: LearningRate | None = None
    beta: Positive | None = None
    temperature: Temperature = 1.0
    engine: str = "local"
    num_completions_to_print: Count = 3
    extra_data: str = ""


def check(options: Options, given: Given) -> None:
    """Raises: UserError where the options do not fit each other."""
    option_checks.check(options, options.run, options.method)
    option_checks.check_rewards(inputs.rewards_of(options.prompts, given))
    option_checks.check_divides(
        "--batch-size", options.batch_size, "--prompts-per-round", options.prompts_per_round
    )
    if options.method == "dpo" and options.samples_per_prompt < 2:
        raise UserError("--method dpo compares answers to one prompt: give --samples-per-prompt 2 or more")
    if options.method == "dpo" and options.reward_threshold is not None:
        raise UserError(
            "--reward-threshold means nothing to --method dpo, which takes the best and the worst"
        )
    if jax.process_count() > 1:
        raise UserError("rounds are run by one process: run without --coordinator")
    check_held(options, options.run)


def check_held(options: Any, run: option_groups.RunOptions) -> None:
    """Raises: UserError where the folder holds a run, and this one does not go on with it."""
    held = run.out / "config.json"
    if files.exists(held):
        if not run.resume:
            raise UserError(f"{run.out} already holds a run: add --resume, or choose another --out")
        theirs = files.read_json(held, keys=("config",), remedy=f"remove {run.out}, or choose another --out")
        option_checks.check_same_options(options, theirs["config"], run.out)


# Answers to rows ------------------------------------------------------------------------------------


def why_none(options: Options, answers: Answers) -> str:
    """The reason why no answer is worth training on, and how to mend it."""
    count, finished = len(answers.prompts), np.asarray(answers.rollout.finished)
    if not finished.any():
        return f"all {count} answers were cut at --max-new-tokens: raise it, or start from a policy that ends"
    bar = "" if options.method == "dpo" else "give --reward-threshold, "
    low, high = answers.rewards.min(), answers.rewards.max()
    return (
        f"none of {count} answers stands out (rewards from {low:g} to {high:g}, {np.sum(~finished)} cut at "
        f"--max-new-tokens): answer more prompts, {bar}or start from another policy"
    )


def selected(options: Options, answers: Answers) -> dict[str, tuple[Sequences, Bool[np.ndarray, " N"]]]:
    """Selected answers, by the name of their field in the rows, and which of them count.

    An answer that was cut at its limit is never taken, for it would teach to end there; nor is one that no
    reward could score.
    """
    usable = np.asarray(answers.rollout.finished) & ~answers.scored.unscorable
    sequences, size = answers.rollout.sequences, options.samples_per_prompt
    bar = options.reward_threshold
    if bar is None:
        mean = np.mean(answers.rewards, where=usable) if usable.any() else np.float32(np.inf)
        bar = float(np.nextafter(mean, np.float32(np.inf)))
    rewards = jnp.where(usable, answers.rewards, -jnp.inf).reshape(-1, size)
    if options.method == "dpo":
        pairs = selection.best_and_worst(sequences, rewards)
        counts = np.asarray(pairs.mask)
        return {"chosen": (pairs.chosen, counts), "rejected": (pairs.rejected, counts)}
    select = selection.best_of_group if options.method == "raft" else selection.all_above
    chosen, counts = select(sequences, rewards, reward_threshold=bar)
    return {"completion": (chosen, np.asarray(counts))}


def to_rows(options: Options, answers: Answers, tokenizer: Tokenizer) -> Rows:
    """Rows to train on: prompts with the texts of what was selected, each of them once."""
    sides = selected(options, answers)
    count = len(next(iter(sides.values()))[1])
    prompts = answers.prompts[:: len(answers.prompts) // count]
    rows: dict[str, dict[str, Any]] = {}
    texts = {name: _texts(tokenizer, *side) for name, side in sides.items()}
    for place, prompt in enumerate(prompts):
        said = {name: side[place] for name, side in texts.items()}
        # Torn bytes do not come back from a file as they were, and two equal texts are no pair.
        is_whole = all(text and text.strip() and "\ufffd" not in text for text in said.values())
        if is_whole and len(set(said.values())) == len(said):
            row = {"prompt": prompt_of(prompt), **said}
            rows[json.dumps(row, sort_keys=True)] = row
    return list(rows.values())


def _texts(tokenizer: Tokenizer, sequences: Sequences, counts: np.ndarray) -> list[str | None]:
    tokens, mask = np.asarray(sequences.tokens), np.asarray(sequences.mask)
    return [
        tokenizer.decode(row[kept].tolist()) if counted else None
        for row, kept, counted in zip(tokens, mask, counts, strict=True)
    ]


def prompt_of(example: PromptExample) -> Any:
    """The prompt as a row holds it: the words of a lone user's message, else messages."""
    messages = prompt_messages(Row(example.fields, example.where))
    plain = len(messages) == 1 and messages[0].keys() == {"role", "content"}
    return messages[0]["content"] if plain and messages[0]["role"] == "user" else messages


def folder_of(policy: Policy) -> str:
    """Folder that a given policy was read from, as each round starts from a folder.

    Raises:
      UserError: it comes from none.
    """
    if policy.source is None:
        raise UserError("the policy comes from no folder, and rounds start from one: save and load it first")
    return str(policy.source.folder)


# Rounds ---------------------------------------------------------------------------------------------


def make_round_fn(
    session: Session, generator: Policy, prompts: inputs.Prompts
) -> Callable[[Params, int], Answers]:
    """`answer(params, round) -> Answers` to the prompts of a round, counted from 0."""
    options: Options = session.options
    draws = options.prompts_per_round // options.batch_size
    answer = session.make_answer_fn(
        prompts,
        generator,
        batch_size=options.batch_size,
        group_size=options.samples_per_prompt,
        engine=options.engine,
        temperature=options.temperature,
    )

    def answer_all(params: Params, number: int) -> Answers:
        return concatenate([answer(params, number * draws + draw) for draw in range(draws)])

    return answer_all


def train(options: Options, data: Path, folder: Path, start: Path) -> None:
    """Trains on the rows of a round, from where it stopped."""
    rows = len(files.read_lines(data, keys=("prompt",)))
    batch = min(options.batch_size, rows)
    begun = files.is_folder(folder / "checkpoints")
    run = dataclasses.replace(options.run, out=folder, report=False, resume=begun)
    shared: dict[str, Any] = {
        "adapter": options.adapter,
        "optimizer": options.optimizer,
        "learning_rate": options.learning_rate,
    }
    if options.method == "dpo":
        pairs = option_groups.PairOptions(data=str(data))
        dpo.run(
            dpo.Options(run=run, model=str(start), pairs=pairs, batch_size=batch, beta=options.beta, **shared)
        )
    else:
        sft.run(sft.Options(run=run, model=str(start), data=str(data), batch_size=batch, **shared))


def rounds(session: Session, prompts: inputs.Prompts) -> Iterator[dict[str, float]]:
    """Metrics of each round, and of the policy that it leaves; past ones are looked up."""
    options, model = session.options, session.policy
    out, generator = options.run.out, load(options.generator) if options.generator else None
    if generator is not None:
        check_same_vocabulary(generator.tokenizer, model.tokenizer, Path(options.generator), "generator")
    answer = make_round_fn(session, generator or model, prompts)
    for number in range(options.rounds):
        folder, data = out / f"round_{number + 1}", out / f"rows_{number + 1}.jsonl"
        result = out / f"result_{number + 1}.json"
        before = out / f"round_{number}" if number else Path(options.model)
        if files.exists(result):
            yield files.read_json(result, keys=("reward", "kept"))
            continue
        answered = out / f"answered_{number + 1}.json"
        if not (files.exists(data) and files.exists(answered)):
            answers = answer((generator or load(before)).params, number)
            keep_answers(options, answers, (generator or model).tokenizer, number + 1)
            rows = to_rows(options, answers, model.tokenizer)
            if not rows:
                raise UserError(f"round {number + 1}: {why_none(options, answers)}")
            files.write_json(answered, describe(answers, rows))
            more = read_rows(options.extra_data) if options.extra_data else []
            files.write_lines(data, [*rows, *(dict(row.fields) for row in more)])
        train(options, data, folder, Path(options.model) if options.reinit_each_round else before)
        found = files.read_json(answered, keys=("reward", "kept"))
        if prompts.evaluate is not None:
            params = load_policy(folder).params
            found |= {f"eval/{k}": v for k, v in prompts.evaluate(params, model.params).metrics().items()}
        files.write_json(result, found)
        yield found


def keep_answers(options: Options, answers: Answers, tokenizer: Tokenizer, number: int) -> None:
    """Writes the table of completions of a round, and shows its first rows."""
    rollout, completions = answers.rollout, LastCompletions(tokenizer)
    of_rows = describe_rows(None, rollout.logp, None, rollout.sequences.mask)
    completions.keep(answers.prompts, rollout, answers.scored, of_rows)
    count = 0 if options.run.quiet else options.num_completions_to_print
    show = Console(stderr=True).print
    log_completions(completions(), number, options.run.out, (), show, count=count)


def log_round(session: Session, number: int, found: Mapping[str, float]) -> None:
    """Numbers and completions of a round, for loggers; those that --log names are opened for it alone, as the
    training within a round has its own.
    """
    resume = session.run.resume or number > 1
    run = dataclasses.replace(session.run, resume=resume)
    named = edges.loggers(dataclasses.replace(session.options, run=run), session.stage)
    rows = read_completions(session.run.out).get(number, [])
    with contextlib.ExitStack() as stack:
        for logger in named:
            stack.callback(logger.close)
        for logger in (*named, *map(as_logger, session.given.loggers)):
            logger.log(found, number)
            if rows and isinstance(logger, TableLogger):
                logger.log_table(COMPLETIONS, rows, number)


def describe(answers: Answers, rows: Sequence[Any]) -> dict[str, float]:
    """A round's answers in numbers."""
    mask = np.asarray(answers.rollout.sequences.mask)
    return {
        "reward": answers.mean_reward(),
        "length": float(np.mean(mask.sum(axis=1))),
        "finished": float(np.mean(answers.rollout.finished)),
        "kept": len(rows),
        "kept_share": len(rows) / len(answers.prompts),
        "tokens": int(mask.sum()),
        "unscorable": int(answers.scored.unscorable.sum()),
        **term_means(answers.scored),
    }


def run(options: Options, given: Given = NOTHING) -> Trained:
    """All rounds; leaves a run folder with one in it for each."""
    options = dataclasses.replace(options, model=folder_of(given.policy) if given.policy else options.model)
    options = defaults.fill_published(options, "dpo" if options.method == "dpo" else "sft")
    check(options, given)
    session = Session(options, given, options.method)
    model, prompts = session.policy, session.load_prompts()
    refuse_images(prompts.train, "rounds")
    if options.prompts_per_round > len(prompts):
        raise UserError(
            f"--prompts-per-round {options.prompts_per_round} is more than the {len(prompts):,} prompts that "
            "there are: give a smaller one"
        )
    session.announce(f"{len(prompts):,} prompts, {options.rounds} rounds")
    before = prompts.answer(model.params)
    describe_run(options.run.out, option_checks.to_json(options), stage=options.method)
    begun = files.exists(options.run.out / "answered_1.json")
    option_checks.check_same_data(options.run.out, prompts.fingerprint(), begun=begun)
    results = []
    past = [files.exists(options.run.out / f"result_{n}.json") for n in range(1, options.rounds + 1)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(JSONLLogger(options.run.out, stage=options.method, resume_step=-1))
        for logger in given.loggers:
            stack.callback(as_logger(logger).close)
        for number, found in enumerate(rounds(session, prompts), start=1):
            log.log(found, number)
            if not past[number - 1]:
                log_round(session, number, found)
            results.append(
                [number, *(found.get(name) for name in ("reward", "kept", "eval/score", "eval/kl"))]
            )
    last = load_policy(options.run.out / f"round_{options.rounds}")
    after = prompts.answer(last.params)
    edges.finish(options.run, inputs.before_and_after(options.method, before, after))
    if not options.run.quiet:
        columns = ["round", "reward of its answers", "rows kept", "held-out score", "KL to the start, nats"]
        final_table(f"{options.method}: {options.run.out / f'round_{options.rounds}'}", columns, results)
    return Trained(Path(options.run.out), last)
