"""Overoptimisation: gold and proxy reward against the distance to the start, for best-of-n, PPO and DPO.

    python experiments/studies/overoptimization/overoptimization.py --out runs/overoptimisation

On the style task the gold reward is known in closed form. Reward models of several sizes learn from several
amounts of noisy preferences; answers are then chosen, and policies trained, against them. The forms of Gao et
al. 2022 are fitted to what comes of it, and ensembles (Coste et al. 2023) are compared with single models.
All seeds of a stage run side by side in one program. What is done is kept in --out, and not done again.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import overoptimization_page
import overoptimization_study

from rlhf_jax.algorithms import ppo, preference, reward
from rlhf_jax.cli import command_line
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.evaluation import pass_at_k
from rlhf_jax.jitted import reward_models as reward_models
from rlhf_jax.jitted.algorithms import ppo_algorithm
from rlhf_jax.jitted.reward_models import JudgedPairs, RewardModel
from rlhf_jax.jitted.train import RewardFn, SeedState, TaskSetup, make_train_with_eval
from rlhf_jax.metrics.pages import PLAN, held_summary
from rlhf_jax.models import Policy
from rlhf_jax.rewards import ensembles
from rlhf_jax.stages import option_checks
from rlhf_jax.sweep import product, sweep
from rlhf_jax.tasks.base import Prompts
from rlhf_jax.training.run_folder import describe_run

sys.path.append(str(Path(__file__).resolve().parents[1] / "post_training"))
import post_training
import post_training_rows


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the study.

    Attributes:
      out: folder of what is done.
      page: where the page goes, with its pictures beside it; None for the folder of what is done.
      seeds: policies to start from, each with preferences and reward models of its own.
      sizes: widths of the reward models, each of them two layers; the last is also that of ensembles.
      pairs: amounts of preferences, least first; the middle one is that of ensembles.
      held_out_pairs: to choose the step of a reward model by, and to standardise its scores on.
      members: reward models of an ensemble, which differ in their head's weights and the order of the data.
      noise: of those who prefer: P = sigmoid(difference in gold reward / noise).
      uncertainty_coef: weight of the variance between members.
      width: of the policy, two layers.
      base_steps: supervised steps before everything, of policies and of the bodies of reward models.
      reward_steps: of a reward model, 32 pairs each.
      reward_learning_rate: at its peak, as the others.
      num_samples: answers to each held-out prompt for best-of-n.
      prompts: held-out prompts at most.
      ppo_steps: of 64 answers each.
      ppo_learning_rate: of policy and value.
      kl_coef: weight of the KL to the start in PPO's reward, in standard deviations of the proxy per nat.
      dpo_steps: of 32 pairs each.
      dpo_learning_rate: of the policy.
      beta: of DPO.
      num_evals: times that a policy is looked at while it trains.
      chunk: runs at once, in one program.
      quiet: show no progress.
    """

    out: Path | None = None
    page: Path | None = None
    seeds: int = 4
    sizes: tuple[int, ...] = (8, 16, 32)
    pairs: tuple[int, ...] = (256, 1024, 4096)
    held_out_pairs: int = 256
    members: int = 3
    noise: float = 0.5
    uncertainty_coef: float = 0.5
    width: int = 32
    base_steps: int = 1200
    reward_steps: int = 600
    reward_learning_rate: float = 3e-3
    num_samples: int = 128
    prompts: int = 64
    ppo_steps: int = 64
    ppo_learning_rate: float = 1e-3
    kl_coef: float = 0.0
    dpo_steps: int = 240
    dpo_learning_rate: float = 1e-3
    beta: float = 0.1
    num_evals: int = 16
    chunk: int = 4
    quiet: bool = False


@pytree_dataclass
class Seed:
    """What sets one seed apart in the training of policies.

    Attributes:
      models: reward models of one size: of each amount of data, or the members of an ensemble.
      pairs: preferences; None where a reward model is all that is needed.
    """

    start: SeedState
    models: RewardModel
    pairs: JudgedPairs | None = None


@dataclasses.dataclass(frozen=True)
class Proxy:
    """What stands for the gold reward.

    Attributes:
      name: its width, or `ensemble`.
      policy: the decoder that they stand on.
      models: [seeds, amounts of data or members] in every leaf.
    """

    name: str
    policy: Policy
    models: RewardModel

    @property
    def is_ensemble(self) -> bool:
        """Whether the models are members of one."""
        return self.name == "ensemble"


@pytree_dataclass
class Setting:
    """What a sweep varies.

    Attributes:
      which: number of the amount of data.
      rule: number of the rule (`overoptimization_study.RULES`) of an ensemble.
    """

    which: Int[Array, ""] | int = 0
    rule: Int[Array, ""] | int = 0


# Policies, preferences, reward models ------------------------------------------------------------------


def style_row() -> post_training_rows.TaskRow:
    """The style task of the table."""
    return next(row for row in post_training_rows.TASKS if row.name == "style")


def make_starts(options: Options, width: int, out: Path) -> tuple[TaskSetup, SeedState]:
    """The world of a width, and each seed's policy after supervised training."""
    row = style_row()
    same = post_training.Options(out=out / "base" / str(width), width=width, base_steps=options.base_steps)
    task_setup = dataclasses.replace(post_training.make_task_setup(row, same), heldout=options.prompts)
    return task_setup, post_training.make_starts(row, task_setup, same, np.arange(options.seeds))


def on_seeds(path: Path, function: Callable[..., Any], *trees: Any) -> Any:
    """All seeds side by side, unless `path` holds what comes of it, where it is kept."""
    together = jax.vmap(function)
    compute = jax.jit(together, compiler_options=compiler_options())
    return post_training.kept(path, lambda: compute(*trees), jax.eval_shape(together, *trees))


def judged_pairs(
    options: Options, path: Path, task_setup: TaskSetup, starts: SeedState
) -> tuple[JudgedPairs, JudgedPairs]:
    """Preferences to learn from, and held-out ones, [seeds] each."""

    def draw(start: SeedState) -> tuple[JudgedPairs, JudgedPairs]:
        keys = jax.random.split(jax.random.fold_in(start.key, 2))
        counts = max(options.pairs), options.held_out_pairs
        first, second = (
            reward_models.draw_pairs(task_setup, start.params, key, count, noise=options.noise)
            for key, count in zip(keys, counts, strict=True)
        )
        return first, second

    return on_seeds(path, draw, starts)


def train_rewards(
    options: Options,
    path: Path,
    policy: Policy,
    starts: SeedState,
    pairs: tuple[JudgedPairs, JudgedPairs],
    count: int,
    salt: int,
) -> tuple[RewardModel, dict[str, Array]]:
    """A reward model of each seed from the first `count` pairs, and what is known of it, [seeds]."""
    steps = options.reward_steps
    train = reward_models.make_reward_train(
        policy, post_training.schedule(steps), steps=steps, batch_size=32, every=steps // 20
    )
    hyper = reward.Hyper(learning_rate=options.reward_learning_rate)

    def one_seed(
        start: SeedState, learned: JudgedPairs, held_out: JudgedPairs, count: Array, salt: Array
    ) -> Any:
        begin = reward_models.RewardSeedState(
            jax.random.fold_in(start.key, salt), start.params, learned, held_out
        )
        return train(begin, reward_models.RewardHyper(count, post_training.as_floats(hyper)))

    numbers = (jnp.full(options.seeds, number) for number in (count, salt))  # traced: one program for all
    return on_seeds(path, one_seed, starts, *pairs, *numbers)


def train_reward_models(options: Options, folder: Path, name: str, size: int, pairs: Any, out: Path) -> Proxy:
    """Reward models of one size, of each amount of data or as members of an ensemble."""
    own_setup, own = make_starts(options, size, out)
    middle = options.pairs[len(options.pairs) // 2]
    counts = [middle] * options.members if name == "ensemble" else options.pairs
    found = []
    for number, count in enumerate(counts):
        salt = number + (200 if name == "ensemble" else 100)
        path = folder / f"{name}-{number}.npz"
        found.append(train_rewards(options, path, own_setup.policy, own, pairs, count, salt)[0])
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *found)
    return Proxy(name, own_setup.policy, together)


# Best of n ---------------------------------------------------------------------------------------------


def combined(options: Options, scores: Float[Array, "N *B"]) -> Float[Array, "R *B"]:
    """Rewards by each rule, in the order of `RULES`, from the scores of an ensemble's members."""
    careful = ensembles.ensemble_uncertainty_weighted(scores, coef=options.uncertainty_coef)
    return jnp.stack(
        [scores[0], ensembles.ensemble_mean(scores), ensembles.ensemble_worst_case(scores), careful]
    )


def best_of_n(
    options: Options, path: Path, task_setup: TaskSetup, starts: SeedState, proxy: Proxy
) -> dict[str, Array]:
    """Gold and proxy reward of best-of-n for every n, from one pool of answers a prompt.

    Returns:
      `gold` and `proxy`, [seeds, amounts or rules, pool], and `deviation`, the standard deviation of gold
      reward over all answers, [seeds]. The pool is the same for all reward models.
    """
    prompts = jax.tree.map(lambda leaf: jnp.asarray(leaf[: options.prompts]), task_setup.task.heldout)

    def one_seed(start: SeedState, several: RewardModel) -> dict[str, Array]:
        def one_prompt(item: tuple[Prompts, Array]) -> dict[str, Array]:
            row, number = item
            row = jax.tree.map(lambda x: jnp.repeat(x[None], options.num_samples, axis=0), row)
            rollout = task_setup.answer(start.params, row, jax.random.fold_in(start.key, 1000 + number))

            def score(model: RewardModel) -> Float[Array, " B"]:
                return reward_models.score_sequences(proxy.policy, model, rollout.sequences)

            scores = jax.vmap(score)(several)
            scores = combined(options, scores) if proxy.is_ensemble else scores
            gold = task_setup.gold(rollout, row)
            return {
                "gold": pass_at_k.best_of_n_value(scores, jnp.broadcast_to(gold, scores.shape)),
                "proxy": pass_at_k.best_of_n_value(scores, scores),
                "answers": gold,
            }

        seen = jax.lax.map(one_prompt, (prompts, jnp.arange(prompts.tokens.shape[0])))
        answers = seen.pop("answers")
        return {**{name: jnp.mean(x, axis=0) for name, x in seen.items()}, "deviation": jnp.std(answers)}

    return on_seeds(path, one_seed, starts, proxy.models)


# Policies against reward models ------------------------------------------------------------------------


def with_eval(
    options: Options,
    task_setup: TaskSetup,
    steps: int,
    method_fn: Callable[[TaskSetup, Seed, Setting], tuple[Any, Any]],
    reward_fn: Callable[[Seed, Setting], RewardFn],
) -> Callable[[Seed, Setting], Any]:
    """`train(seed, setting)` whose world is made inside, around the reward models of its seed."""

    def train(seed: Seed, setting: Setting) -> Any:
        learned = dataclasses.replace(task_setup, reward_fn=reward_fn(seed, setting))
        method, hyper = method_fn(learned, seed, setting)
        run = make_train_with_eval(learned, method, steps=steps, eval_every=steps // options.num_evals)
        return run(seed.start, hyper)

    return train


def ppo_fn(options: Options) -> Callable[[TaskSetup, Seed, Setting], tuple[Any, Any]]:
    """PPO as `with_eval` takes it."""

    def make(task_setup: TaskSetup, seed: Seed, setting: Setting) -> tuple[Any, Any]:
        del seed, setting
        config = ppo.Config(num_ppo_epochs=1, num_minibatches=1)
        # An answer that does not end is the reward model's to judge, as all others.
        hyper = ppo.Hyper(
            learning_rate=options.ppo_learning_rate, kl_coef=options.kl_coef, missing_eos_penalty=0.0
        )
        method = ppo_algorithm(task_setup, config, post_training.schedule(options.ppo_steps))
        return method, post_training.as_floats(hyper)

    return make


def dpo_fn(options: Options) -> Callable[[TaskSetup, Seed, Setting], tuple[Any, Any]]:
    """DPO on the noisy preferences as `with_eval` takes it."""

    def make(task_setup: TaskSetup, seed: Seed, setting: Setting) -> tuple[Any, Any]:
        count = jnp.asarray(options.pairs)[setting.which]
        hyper = preference.Hyper(learning_rate=options.dpo_learning_rate, beta=options.beta)
        optimizer = post_training.schedule(options.dpo_steps)
        assert seed.pairs is not None
        method = reward_models.stored_pairs_algorithm(
            task_setup, preference.Config(), optimizer, seed.pairs, count=count
        )
        return method, post_training.as_floats(hyper)

    return make


def reward_fn_of(options: Options, proxy: Proxy) -> Callable[[Seed, Setting], RewardFn]:
    """The reward model of the setting's amount of data, or all members by the setting's rule."""

    def make(seed: Seed, setting: Setting) -> RewardFn:
        if not proxy.is_ensemble:
            model = jax.tree.map(lambda x: x[setting.which], seed.models)
            return reward_models.learned_reward_fn(proxy.policy, model)

        def combine(scores: Float[Array, "N B"]) -> Float[Array, " B"]:
            return combined(options, scores)[setting.rule]

        return reward_models.ensemble_reward_fn(proxy.policy, seed.models, combine)

    return make


def settings(**axes: Sequence[int]) -> Setting:
    """Settings as a sweep takes them."""
    return product(Setting(jnp.int32(0), jnp.int32(0)), **axes)


# All of it ---------------------------------------------------------------------------------------------


def plan(options: Options) -> dict[str, Any]:
    """What decides the numbers."""
    leave = ("out", "page", "chunk", "quiet")
    return {name: value for name, value in option_checks.to_json(options).items() if name not in leave}


def check(options: Options) -> Path:
    """The folder of the study.

    Raises:
      UserError: options that are out of range, or a folder that holds another study.
    """
    if options.out is None:
        raise UserError("--out is missing: name the folder of the study")
    for name in ("seeds", "members", "num_evals", "chunk", "num_samples", "reward_steps"):
        least = {"members": 2, "reward_steps": 20, "num_samples": 4}.get(name, 1)
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give at least {least}")
    if not options.sizes or not options.pairs or sorted(options.pairs) != list(options.pairs):
        raise UserError("--sizes and --pairs: name at least one of each, the least amount of pairs first")
    option_checks.check_divides("20 looks at held-out pairs,", 20, "--reward-steps", options.reward_steps)
    for name in ("ppo_steps", "dpo_steps"):
        option_checks.check_divides(
            "--num-evals", options.num_evals, f"--{name.replace('_', '-')}", getattr(options, name)
        )
    for count in (max(options.pairs), options.held_out_pairs):
        if count > 256 and count % 256:
            raise UserError(f"{count} pairs: the largest amount and the held-out one are multiples of 256")
    held_summary(options.out, plan(options))
    return options.out


def run(options: Options) -> None:
    """Every stage that is not done, and the page after each."""
    out = check(options)
    files.hold(out, "--out")
    if not files.exists(out / PLAN):
        files.write_json(out / PLAN, plan(options))
    describe_run(out, option_checks.to_json(options), stage="overoptimisation")
    page = options.page or out / "OVEROPTIMISATION.md"
    for done in stages(options, out):
        if not options.quiet:
            print(f"Done: {done}", flush=True)
        overoptimization_page.write(page, out)
        jax.clear_caches()
    print(f"Page: {page}")


def stages(options: Options, out: Path) -> Iterator[str]:
    """The study part by part, the largest reward models first; names what is done."""
    task_setup, starts = make_starts(options, options.width, out)
    pairs = judged_pairs(options, out / "pairs.npz", task_setup, starts)
    largest, *others = reversed(options.sizes)
    for name, size in [(str(largest), largest), ("ensemble", largest), *((str(x), x) for x in others)]:
        proxy = train_reward_models(options, out / "rewards", name, size, pairs, out)
        yield f"reward models, {name}"
        best_of_n(options, out / "best_of_n" / f"{name}.npz", task_setup, starts, proxy)
        yield f"best-of-n, {name}"
        rules, amounts = range(len(overoptimization_study.RULES)), range(len(options.pairs))
        axis = {"rule": rules} if proxy.is_ensemble else {"which": amounts}
        train = with_eval(
            options, task_setup, options.ppo_steps, ppo_fn(options), reward_fn_of(options, proxy)
        )
        sweep_policies(options, train, Seed(starts, proxy.models), settings(**axis), out / "ppo" / name)
        yield f"PPO, {name}"
        if size == largest and not proxy.is_ensemble:
            train = with_eval(
                options, task_setup, options.dpo_steps, dpo_fn(options), reward_fn_of(options, proxy)
            )
            seeds = Seed(starts, proxy.models, pairs[0])
            sweep_policies(options, train, seeds, settings(**axis), out / "dpo")
            yield "DPO"


def sweep_policies(options: Options, train: Any, seeds: Seed, hypers: Setting, folder: Path) -> None:
    """Every setting with every seed, chunk by chunk."""
    sweep(train, seeds, hypers, chunk_size=options.chunk, folder=folder, quiet=options.quiet)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__, side_by_side=True)
