"""Preference pairs: prompts answered by a policy, judged, cleaned, and written as rows to train on.

    rlhf preferences --out runs/pairs --model runs/sft --data my.jsonl --rewards runs/reward_model
    rlhf preferences --out runs/pairs --model runs/sft --data my.jsonl --judge my_judges:shorter
    rlhf preferences --out runs/ai --model runs/constitutional/skills --data arithmetic:0 \\
        --judge-model runs/constitutional/skills --constitution runs/constitutional/constitution.jsonl
    rlhf preferences --out runs/pairs --solutions gsm8k/model_solutions.jsonl

then, with `--data runs/pairs/pairs.jsonl --eval-data runs/pairs/held_out.jsonl`, `rlhf dpo` or
`rlhf reward-model`. Rewards pair the best answer to a prompt with the worst; a judge compares two at a time,
in both orders. A judge's preference, averaged over both, is kept as the soft label of the pair
(`--soft-labels` of these commands); `counts.json` says how far the two orders are apart and, where rows have
answers, how often the judge agrees with `--eval-reward`. What was judged is kept in `judged.jsonl`, batch by
batch: a run that was stopped goes on from there, and other settings of the cleaning sample nothing anew.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt, Seed, ShareBelow1, Temperature, Weight
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.pairs import Pair, best_vs_worst, clean, describe_judge, solution_pairs
from rlhf_jax.data.sources import read_rows
from rlhf_jax.feedback.constitution import read_constitution
from rlhf_jax.feedback.judges import make_model_judge
from rlhf_jax.feedback.pairwise import compare_by_judge
from rlhf_jax.generation import Sampling, row_keys
from rlhf_jax.metrics import Progress, final_table
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import completion_texts
from rlhf_jax.stages import inputs, option_checks, option_groups
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.stages.rounds import prompt_of
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run

PairFn = Callable[[Sequence[PromptExample], Rollout], list[Pair]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Preference-data options: where pairs come from, and which are kept.

    Attributes:
      out: folder of the pairs.
      model: the policy that answers: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache.
      solutions: instead of that, rows with `question` and objects of `solution` and `is_correct`.
      prompts: which prompts, and what their answers are worth.
      judge: function `module:function` that says which of two answers is preferred, instead of rewards: it
        takes `opponents`, the other answers, and returns probabilities.
      judge_model: a model, as `model`, that is asked instead, by the principles of `constitution` (RLAIF).
      constitution: text file with a principle a line, or JSONL, for `judge_model`.
      samples_per_prompt: answers to each prompt.
      pairs_per_prompt: of them, at most; a judge compares as many.
      batch_size: prompts that are answered at a time.
      temperature: of sampling.
      engine: what writes the answers: local (this process), or the server vllm:URL, sglang:URL or openai:URL,
        with #NAME behind it where it does not call the model default. openai servers keep their weights.
      min_margin: least difference of rewards, or of a judge's probabilities, that is no tie.
      held_out_share: share of the prompts whose pairs go to `held_out.jsonl` instead.
      seed: decides what is sampled and which prompts are held out.
      quiet: show no progress.
    """

    out: Path
    model: str = ""
    solutions: str = ""
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions] = option_groups.PromptOptions(data="")
    judge: str = ""
    judge_model: str = ""
    constitution: str = ""
    samples_per_prompt: PositiveInt = 4
    pairs_per_prompt: PositiveInt = 1
    batch_size: PositiveInt = 64
    temperature: Temperature = 1.0
    engine: str = "local"
    min_margin: Weight = 0.0
    held_out_share: ShareBelow1 = 0.1
    seed: Seed = 0
    quiet: bool = False


CLEANING = ("out", "min_margin", "held_out_share", "quiet")
"""Options that change nothing of what was judged."""


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other, or the folder holds other pairs."""
    if bool(options.model) == bool(options.solutions):
        raise UserError("give either --model, a policy that answers, or --solutions that are there already")
    if options.model and not options.prompts.data:
        raise UserError("--model answers prompts: give their rows with --data")
    option_checks.check_numbers(options)
    if options.model and options.samples_per_prompt < 2 * options.pairs_per_prompt:
        raise UserError(
            f"--pairs-per-prompt {options.pairs_per_prompt} needs twice as many answers: give "
            f"--samples-per-prompt {2 * options.pairs_per_prompt}, or fewer pairs"
        )
    if options.judge and options.judge_model:
        raise UserError("--judge excludes --judge-model: give one of them")
    if bool(options.judge_model) != bool(options.constitution):
        raise UserError("--judge-model and --constitution go together: a judge is asked by principles")
    judged = options.judge or options.judge_model
    if options.model and not judged:
        option_checks.check_rewards(options.prompts.rewards, ", --judge or --judge-model")
    if judged and options.prompts.rewards:
        raise UserError("--judge and --judge-model exclude --rewards: give one of them")
    held = options.out / "config.json"
    if files.exists(held):
        again = f"remove {options.out}, or choose another --out"
        ours, theirs = (
            option_checks.to_json(options),
            files.read_json(held, keys=("config",), remedy=again)["config"],
        )
        changed = [name for name in ours if name not in CLEANING and ours[name] != theirs.get(name)]
        if changed:
            raise UserError(
                f"{options.out} holds pairs made with other {', '.join(changed)}: choose another --out"
            )


# Judging ----------------------------------------------------------------------------------------------


def make_pair_fn(options: Options, model: Policy) -> PairFn:
    """`pairs(prompts, rollout)` of answers that stand together in groups, a prompt a row."""
    size, most = options.samples_per_prompt, options.pairs_per_prompt
    if options.judge or options.judge_model:
        return _judged_pairs(options, model)
    calls = options.prompts.reward_calls
    reward_fn = make_reward_fn(options.prompts.rewards, model.tokenizer, calls=calls)

    def pairs(prompts: Sequence[PromptExample], rollout: Rollout) -> list[Pair]:
        scored = reward_fn.score(rollout, prompts)
        # An answer that was cut at its limit, or that no reward could score, stands for nothing.
        counts = np.asarray(rollout.finished) & ~scored.unscorable
        rewards = np.where(counts, scored.rewards, np.nan).tolist()
        answers = list(zip(completion_texts(model.tokenizer, rollout), rewards, strict=True))
        starts = range(0, len(prompts), size)
        found = [
            best_vs_worst(prompt_of(prompts[i]), answers[i : i + size], most) or [_nothing(prompts[i])]
            for i in starts
        ]
        return [pair for group in found for pair in group]

    return pairs


def _judged_pairs(options: Options, model: Policy) -> PairFn:
    size, most = options.samples_per_prompt, options.pairs_per_prompt
    judge = options.judge
    if options.judge_model:
        judge = make_model_judge(load(options.judge_model), read_constitution(options.constitution))
    compare = compare_by_judge(judge, model.tokenizer)
    verified = options.prompts.eval_reward
    calls = options.prompts.reward_calls
    verifier = make_reward_fn([verified], model.tokenizer, calls=calls) if verified else None

    def pairs(prompts: Sequence[PromptExample], rollout: Rollout) -> list[Pair]:
        texts, finished = completion_texts(model.tokenizer, rollout), np.asarray(rollout.finished)
        found = []
        for number in range(most):
            first = np.arange(2 * number, len(prompts), size)
            second = first + 1
            sides = [jax.tree.map(lambda x, rows=rows: x[rows], rollout) for rows in (first, second)]
            asked = prompts[2 * number :: size]
            compared = compare(asked, *sides)
            counts = finished[first] & finished[second] & compared.scored
            preference = np.where(counts, compared.preference, np.nan)
            lead = np.zeros(len(asked))
            if verifier is not None:
                lead = verifier(sides[0], asked) - verifier(sides[1], asked)
            rows = zip(asked, first, second, preference, compared.position_bias, lead, strict=True)
            for prompt, a, b, p, gap, ahead in rows:
                sides_of = ((texts[a], float(p)), (texts[b], 1 - float(p)))
                (better, high), (worse, low) = sides_of if not p < 0.5 else sides_of[::-1]
                agrees = bool((ahead > 0) == (p >= 0.5)) if ahead else None
                found.append(Pair(prompt_of(prompt), better, worse, high, low, high, float(gap), agrees))
        return found

    return pairs


def _nothing(prompt: PromptExample) -> Pair:
    """Stands, in the counts, for a prompt whose answers could not be judged."""
    return Pair(prompt_of(prompt), "", "", float("nan"), float("nan"))


def sampled(options: Options, model: Policy) -> list[Pair]:
    """Pairs of all prompts, judged now or before."""
    prompts = inputs.load_prompts(options.prompts, model, options.seed).train
    refuse_images(prompts, "the preferences stage")
    size, pair_fn = options.samples_per_prompt, make_pair_fn(options, model)
    generate = inputs.make_sampler(
        options.engine,
        model,
        prompt_length=max(len(prompt.ids) for prompt in prompts),
        max_new_tokens=options.prompts.max_new_tokens,
        folder=options.out,
        group_size=size,
        sampling=Sampling(temperature=options.temperature),
    )
    parts = inputs.parts(len(prompts), options.batch_size)
    path = options.out / "judged.jsonl"
    done = list(_held(path))
    with Progress("preferences", len(parts), quiet=options.quiet) as progress:
        for number, part in enumerate(parts):
            if number >= len(done):
                chosen = [prompts[index] for index in np.repeat(part, size)]
                keys = row_keys(jax.random.key(options.seed), len(chosen), first=number * len(chosen))
                fresh = np.unique(part, return_index=True)[1].size * size  # the last part repeats its last
                rollout = generate(model.params, chosen, keys)
                judged = pair_fn(chosen[:fresh], jax.tree.map(lambda x, n=fresh: x[:n], rollout))
                files.append_lines(path, [[pair.row() for pair in judged]])
                done.append(judged)
            progress.update(number + 1)
    return [pair for batch in done for pair in batch]


def _held(path: Path) -> Iterator[list[Pair]]:
    """Batches that were judged before."""
    for number, batch in enumerate(files.read_lines(path), start=1):
        try:
            yield [Pair(**row) for row in batch]
        except TypeError as error:
            raise UserError(f"{path}:{number}: no judged pairs ({error}): remove the file") from error


# Rows ---------------------------------------------------------------------------------------------------


def is_held_out(pair: Pair, options: Options) -> bool:
    """True if the pair's prompt is one of those held out; the same for all of its pairs."""
    text = f"{options.seed} {json.dumps(pair.prompt, sort_keys=True)}"
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number / 2**64 < options.held_out_share


def run(options: Options) -> None:
    """Samples and judges what is missing, then cleans and writes."""
    check(options)
    model = load(options.model) if options.model else None
    describe_run(options.out, option_checks.to_json(options), stage="preferences")
    if model is None:
        pairs = solution_pairs(read_rows(options.solutions), most=options.pairs_per_prompt, seed=options.seed)
    else:
        pairs = sampled(options, model)
    kept, counts = clean(pairs, min_margin=options.min_margin)
    if not kept:
        left = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        raise UserError(f"none of {len(pairs)} pairs can be learned from ({left}): judge them in another way")
    held_out = [pair for pair in kept if is_held_out(pair, options)]
    sides = {"pairs": [p for p in kept if not is_held_out(p, options)], "held_out": held_out}
    for name, side in sides.items():
        files.write_lines(options.out / f"{name}.jsonl", [pair.row() for pair in side])
    found = {"judged": len(pairs), **counts, **{name: len(side) for name, side in sides.items()}}
    judge = describe_judge(pairs)
    files.write_json(options.out / "counts.json", found | ({"judge": judge} if judge else {}))
    if not options.quiet:
        margin = float(np.mean([pair.margin for pair in kept]))
        judged = [(f"judge: {name}", f"{value:.3g}") for name, value in judge.items()]
        rows = [*found.items(), ("mean margin", f"{margin:.3g}"), *judged]
        final_table("preferences", ["pairs", "count"], rows)
