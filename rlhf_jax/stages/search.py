"""More compute at inference: votes, best-of-n and searches over steps, compared at equal tokens generated.

    rlhf search --out runs/search --model runs/sft --data arithmetic:1 \\
        --process-reward runs/prm --outcome-reward runs/orm
    rlhf search --out runs/gsm8k --model runs/my_policy --data gsm8k/test.jsonl \\
        --max-new-tokens 300 --prompts 64
    rlhf search --out runs/search --model runs/sft --data arithmetic:1 --resume

The run folder gets `results.json`, `search.svg` (accuracy against samples and against tokens) and `pool.npz`.
Without reward models, what needs none is compared. A run that was stopped goes on with --resume.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import search
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Length, LengthOrZero, PositiveInt, Seed, Temperature
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.examples import Overlength, PromptExample, prompt_examples
from rlhf_jax.data.pipeline import fingerprint
from rlhf_jax.data.sources import reference_of
from rlhf_jax.evaluation import pass_at_k
from rlhf_jax.evaluation.statistics import Interval, stratified_bootstrap_interval
from rlhf_jax.generation import Sampling
from rlhf_jax.metrics.pictures import name_ends, picture
from rlhf_jax.metrics.progress import Progress, final_table
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.rewards.verifiers import exact_answer, final_number, gsm8k_answer
from rlhf_jax.rollout.sampler import completion_texts, make_generate_fn
from rlhf_jax.stages import embedded, inputs, option_checks, search_methods
from rlhf_jax.stages.search_methods import METHODS, Judges, SearchOptions
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, load_reward_model

CURVES = {
    "pass@k (some sample is right)": "any",
    "best-of-n, process reward": "process",
    "best-of-n, outcome reward": "outcome",
    "best-of-n, likelihood": "likelihood",
    "majority vote": "vote",
    "vote weighted by likelihood": "chain",
    "vote weighted by process reward": "weighted",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the comparison.

    Attributes:
      out: the run folder.
      model: the policy: a run folder, a Hugging Face folder, a GGUF file or a name in the hub cache.
      process_reward: run folder of a process reward model; empty for none.
      outcome_reward: run folder of an outcome reward model; empty for none.
      data: problems with an `answer`: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL (held-out ones).
      prompts: how many of them.
      max_prompt_length: tokens of a prompt; 0 for the longest.
      overlength: whether longer prompts are an error, or dropped and counted.
      samples: N, of each prompt, for votes and best-of-n.
      temperature: of all samples, of whole answers and of steps.
      max_new_tokens: tokens of an answer.
      resamples: orders of the pool that the votes' accuracy is a mean of.
      batch_size: prompts at a time.
      seed: decides problems and samples.
      resume: go on with the run in the folder.
      quiet: show no progress.
    """

    out: Path = Path("runs/search")
    model: str
    process_reward: str = ""
    outcome_reward: str = ""
    data: str
    prompts: PositiveInt = 256
    max_prompt_length: LengthOrZero = 0
    overlength: Overlength = "error"
    samples: PositiveInt = 32
    temperature: Temperature = 1.0
    max_new_tokens: Length = 40
    resamples: PositiveInt = 50
    batch_size: PositiveInt = 64
    seed: Seed = 0
    resume: bool = False
    quiet: bool = False
    search: SearchOptions = SearchOptions()


@dataclasses.dataclass(frozen=True)
class Pool:
    """N samples of each prompt, [prompts, N] each.

    Attributes:
      answers: ids of the numbers they end with, equal within a prompt where the numbers are.
      answered: whether there is a number.
      correct: whether the sample is right.
      tokens: sampled.
      likelihood: mean logp of a token, in nats.
      process: score by the process reward model; 0 where there is none.
      outcome: score by the outcome reward model; 0 where there is none.
    """

    answers: np.ndarray
    answered: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    likelihood: np.ndarray
    process: np.ndarray
    outcome: np.ndarray


# The problems and the pool -------------------------------------------------------------------------


def load_problems(options: Options, policy: Policy) -> list[PromptExample]:
    """The problems, each with an answer."""
    rows = inputs.load_rows(
        options.data, lambda level: embedded.prompt_rows(level, "heldout", options.prompts, options.seed)
    )[: options.prompts]
    for row in rows:
        if reference_of(row, "answer") is None:
            raise UserError(
                f"{row.where}: field 'answer' is missing: add the right answer, or remove the row"
            )
    longest = options.max_prompt_length or inputs.UNBOUNDED
    return prompt_examples(rows, policy.tokenizer, max_length=longest, overlength=options.overlength)


def is_right(options: Options, prompt: PromptExample, text: str, finished: bool) -> bool:
    """Strict on the embedded task; by the final number elsewhere."""
    answer = prompt.fields["answer"]
    if embedded.find_level(options.data):
        return exact_answer(text, answer, finished=finished)
    return gsm8k_answer(text, answer)


def batches(options: Options, count: int) -> list[np.ndarray]:
    """Indices of prompts, in parts of one size."""
    return inputs.parts(count, min(options.batch_size, count))


def make_score_fn(policy: Policy, judges: Judges) -> Callable[[Rollout], dict[str, np.ndarray]]:
    """Scores of whole samples, by name as in `Pool`."""
    newline = jnp.asarray(search_methods.step_end_ids(policy.tokenizer))

    def logits(judge: ScalarModel, params: Any, rollout: Rollout) -> jax.Array:
        return judge.body.make_process_reward_fn()(params, rollout.sequences)

    @jax.jit
    def score(rollout: Rollout, process_params: Any, outcome_params: Any) -> dict[str, jax.Array]:
        mask, tokens = rollout.sequences.mask, rollout.sequences.tokens
        found = {
            "likelihood": search.likelihood_scores(rollout.logp, mask),
            "tokens": jnp.sum(mask, axis=1),
            "process": jnp.zeros(len(tokens)),
            "outcome": jnp.zeros(len(tokens)),
        }
        if judges.process:
            ends = mask & jnp.isin(tokens, newline)
            found["process"] = search.process_scores(logits(judges.process, process_params, rollout), ends)
        if judges.outcome:
            last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
            odds = logits(judges.outcome, outcome_params, rollout)
            chances = jax.nn.sigmoid(jnp.take_along_axis(odds, last[:, None], axis=1)[:, 0])
            found["outcome"] = jnp.where(rollout.finished, chances, 0)
        return found

    params = [judge.params if judge else None for judge in (judges.process, judges.outcome)]
    return lambda rollout: jax.device_get(score(rollout, *params))


def sample_pool(
    options: Options, policy: Policy, judges: Judges, problems: Sequence[PromptExample]
) -> tuple[Pool, np.ndarray, np.ndarray]:
    """The pool, and of greedy answers which are right, and their tokens."""
    generate = make_generate_fn(
        policy,
        prompt_length=max(len(problem.ids) for problem in problems),
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(temperature=options.temperature),
    )
    score = make_score_fn(policy, judges)
    columns: list[dict[str, np.ndarray]] = []
    greedy: list[dict[str, np.ndarray]] = []
    numbers: list[dict[Any, int]] = [{} for _ in problems]

    def judged(rollout: Rollout, indices: np.ndarray) -> dict[str, np.ndarray]:
        texts, finished = completion_texts(policy.tokenizer, rollout), np.asarray(rollout.finished)
        found: list[tuple[int, bool, bool]] = []
        for index, text, ended in zip(indices, texts, finished, strict=True):
            number, known = final_number(text), numbers[index]
            right = is_right(options, problems[index], text, bool(ended))
            found.append((known.setdefault(number, len(known)), number is not None, right))
        answers, answered, correct = map(np.asarray, zip(*found, strict=True))
        return score(rollout) | {"answers": answers, "answered": answered, "correct": correct}

    parts = batches(options, len(problems))
    with Progress("sample", len(parts) * (options.samples + 1), quiet=options.quiet) as progress:
        for start, indices in enumerate(parts):
            part = [problems[index] for index in indices]
            key = jax.random.fold_in(jax.random.key(options.seed), start)
            done = start * (options.samples + 1)
            greedy.append(judged(generate(policy.params, part, key, Sampling(temperature=0.0)), indices))
            rows = []
            for sample in range(options.samples):
                rows.append(judged(generate(policy.params, part, jax.random.fold_in(key, sample)), indices))
                progress.update(done + sample + 2)
            columns.append({name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]})

    def joined(of: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in of])[: len(problems)] for name in of[0]}

    first = joined(greedy)
    return Pool(**joined(columns)), first["correct"], first["tokens"]


def accuracy_curves(options: Options, pool: Pool, judges: Judges) -> dict[str, np.ndarray]:
    """For each method [prompts, N]: expected accuracy with n = 1 ... N samples."""
    key = jax.random.key(options.seed)

    def vote(weights: np.ndarray | None) -> np.ndarray:
        given = None if weights is None else jnp.asarray(weights, jnp.float32)
        return np.asarray(
            pass_at_k.vote_accuracy(
                jnp.asarray(pool.answers),
                jnp.asarray(pool.correct),
                key,
                weights=given,
                mask=jnp.asarray(pool.answered),
                resamples=options.resamples,
            )
        )

    def best(scores: np.ndarray) -> np.ndarray:
        return np.asarray(pass_at_k.best_of_n_accuracy(jnp.asarray(scores), jnp.asarray(pool.correct)))

    curves = {
        "any": np.asarray(pass_at_k.pass_at_k(jnp.asarray(pool.correct))),
        "likelihood": best(pool.likelihood),
        "vote": vote(None),
        "chain": vote(np.exp(pool.likelihood)),
    }
    if judges.process:
        curves |= {"process": best(pool.process), "weighted": vote(pool.process)}
    if judges.outcome:
        curves["outcome"] = best(pool.outcome)
    return curves


# Searches and what comes out -----------------------------------------------------------------------


def run_search(
    options: Options, policy: Policy, judges: Judges, problems: Sequence[PromptExample], name: str
) -> dict[str, Any]:
    """Result of a search over problems: which it solves, and the tokens it generates for each."""
    run = search_methods.make_run(
        METHODS[name][0],
        options.search,
        policy,
        judges,
        temperature=options.temperature,
        prompt_length=max(len(problem.ids) for problem in problems),
        max_new_tokens=options.max_new_tokens,
    )
    correct, tokens, texts = [], [], []
    parts = batches(options, len(problems))
    with Progress(name, len(parts), quiet=options.quiet) as progress:
        for number, indices in enumerate(parts):
            part = [problems[index] for index in indices]
            found, finished, cost = run(part, jax.random.fold_in(jax.random.key(options.seed + 1), number))
            rows = zip(part, found, finished, strict=True)
            correct += [is_right(options, problem, text, bool(end)) for problem, text, end in rows]
            tokens += cost.tolist()
            texts += found
            progress.update(number + 1)
    count = len(problems)
    return {"correct": correct[:count], "tokens": tokens[:count], "completions": texts[:4]}


def interval(values: Any) -> Interval:
    """Mean over prompts with a 95 % bootstrap interval."""
    column = np.asarray(values, np.float64)[:, None]
    return stratified_bootstrap_interval(column, statistic_fn=np.mean)


def at_tokens(curve: np.ndarray, sample_tokens: float, tokens: float) -> np.ndarray:
    """[prompts]: a curve at the number of samples that cost so many tokens, between whole n by a line."""
    place = min(max(tokens / sample_tokens, 1), curve.shape[1]) - 1
    low = int(place)
    high = min(low + 1, curve.shape[1] - 1)
    return curve[:, low] + (place - low) * (curve[:, high] - curve[:, low])


def table_rows(
    methods: dict[str, dict[str, Any]], curves: dict[str, np.ndarray], sample_tokens: float
) -> list[dict[str, Any]]:
    """Each method beside votes and best-of-n (both by process reward) for as many tokens."""
    rows = []
    for name, found in methods.items():
        tokens = float(np.mean(found["tokens"]))
        beside = {"vote": "vote", "best_of_n": "process", "weighted_vote": "weighted"}
        rows.append({"method": name, "tokens": tokens, "accuracy": interval(found["correct"])})
        rows[-1] |= {
            column: interval(at_tokens(curves[curve], sample_tokens, tokens))
            for column, curve in beside.items()
            if curve in curves
        }
    return rows


def plot(
    path: Path, curves: dict[str, np.ndarray], methods: dict[str, dict[str, Any]], sample_tokens: float
) -> None:
    """Accuracy against samples, and against tokens with the searches as points."""
    with picture(path, 2, 1, height=3.0, sharey=True) as (above, below):
        lines = {}
        for label, name in CURVES.items():
            if name not in curves:
                continue
            mean = curves[name].mean(axis=0)
            count = np.arange(1, len(mean) + 1)
            style: Any = {"linestyle": ":", "color": "grey"} if name == "any" else {}
            (lines[label],) = above.plot(count, mean, **style)
            style = {"color": lines[label].get_color(), "alpha": 0.4, **style}
            below.plot(count * sample_tokens, mean, **style)
        for marker, (name, found) in zip("osD^v*Px", methods.items(), strict=False):
            accuracy, tokens = interval(found["correct"]), float(np.mean(found["tokens"]))
            error = [[accuracy.mean - accuracy.low], [accuracy.high - accuracy.mean]]
            below.errorbar(tokens, accuracy.mean, yerr=error, fmt=marker, color="0.25", capsize=3)
            below.annotate(name, (tokens, accuracy.mean), (5, 4), textcoords="offset points")
        above.set(xlabel="samples, n", ylabel="accuracy", title="One pool of samples")
        below.set(xlabel="tokens generated a prompt", ylabel="accuracy", title="Equal compute")
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        below.margins(x=0.03)
        name_ends(above, lines)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    names = {"vote": "vote", "best_of_n": "best-of-n", "weighted_vote": "weighted vote"}
    beside = [column for column in names if column in rows[0]]
    final_table(
        "Accuracy with 95 % bootstrap intervals over prompts; beside it that of samples for as many tokens",
        ["method", "tokens", "accuracy", *(names[column] for column in beside)],
        [
            [row["method"], f"{row['tokens']:.0f}", f"{row['accuracy']:.1%}"]
            + [f"{row[column]:.1%}" for column in beside]
            for row in rows
        ],
    )


def check(options: Options, held: dict[str, Any]) -> None:
    """Raises: UserError where the options make no sense, or the folder holds another comparison."""
    chosen = options.search
    option_checks.check_numbers(options)
    if chosen.num_thoughts % 2:
        raise UserError(
            f"--search.num-thoughts {chosen.num_thoughts} is odd, and two are merged: give an even number"
        )
    if held and not options.resume:
        raise UserError(f"{options.out} already holds a comparison: add --resume, or choose another --out")
    ours = option_checks.to_json(options)
    for name in ours.keys() - {"out", "resume", "quiet"}:
        if held and held["config"].get(name) != ours[name]:
            raise UserError(
                f"{options.out}: its comparison has another {name.replace('_', '-')}: give --resume the same "
                "options, or choose another --out"
            )


def read_pool(path: Path) -> Pool | None:
    """The pool that was sampled before; None where it is not there, or damaged."""
    names = [field.name for field in dataclasses.fields(Pool)]
    try:
        arrays = files.read_arrays(path, keys=names, remedy="the pool is sampled again")
    except files.DamagedFile as error:
        if files.exists(path):
            files.made_again(error)
        return None
    return Pool(**{name: arrays[name] for name in names})


def run(options: Options) -> None:
    """Samples, searches, and writes what came out; what was done before is kept."""
    path, pool_path = options.out / "results.json", options.out / "pool.npz"
    held = files.read_json(path, otherwise={}, keys=("config", "methods"))
    check(options, held)
    policy = load(options.model)
    judges = Judges(
        *(load_reward_model(Path(f)) if f else None for f in (options.process_reward, options.outcome_reward))
    )
    problems = load_problems(options, policy)
    found = fingerprint([np.asarray(p.ids) for p in problems], [p.fields["answer"] for p in problems])
    option_checks.check_same_data(options.out, found, begun=bool(held))
    describe_run(options.out, option_checks.to_json(options), stage="search")
    results = held or {"config": option_checks.to_json(options), "methods": {}}
    pool = read_pool(pool_path) if "greedy" in results["methods"] else None
    if pool is None:
        pool, correct, tokens = sample_pool(options, policy, judges, problems)
        files.write_arrays(pool_path, dataclasses.asdict(pool))
        results["methods"]["greedy"] = {"correct": correct.tolist(), "tokens": tokens.tolist()}
        files.write_json(path, results)
    present = {"": True} | vars(options) | vars(options.search)
    for name, (_, needed) in METHODS.items():
        if name not in results["methods"] and present[needed]:
            results["methods"][name] = run_search(options, policy, judges, problems, name)
            files.write_json(path, results)
            jax.clear_caches()  # each search is a program of its own, and large
    curves = accuracy_curves(options, pool, judges)
    sample_tokens = float(pool.tokens.mean())
    rows = table_rows(results["methods"], curves, sample_tokens)
    means = {label: curves[name].mean(axis=0).tolist() for label, name in CURVES.items() if name in curves}
    results |= {"tokens_a_sample": sample_tokens, "accuracy_against_n": means}
    results["table"] = [
        {k: dataclasses.asdict(v) if isinstance(v, Interval) else v for k, v in row.items()} for row in rows
    ]
    files.write_json(path, results)
    plot(options.out / "search.svg", curves, results["methods"], sample_tokens)
    if not options.quiet:
        show(rows)
        print(f"Figure: {options.out / 'search.png'}")
