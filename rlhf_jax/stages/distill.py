"""Distillation: a student learns what a teacher, the policy of another run, says of answers.

    rlhf distill --out runs/soft --model runs/small --teacher runs/large --data my.jsonl \\
        --rewards my_rewards:exact
    rlhf distill --out runs/gkd --model runs/small --teacher runs/large --data my.jsonl \\
        --rewards my_rewards:exact --loss js --lmbda 1
    rlhf distill --out runs/texts --model runs/small --teacher runs/large --data my.jsonl \\
        --rewards my_rewards:exact --loss sequence

The rewards are only looked at.

Soft labels on the teacher's answers (`forward_kl`), on-policy distillation on the student's (GKD,
`--lmbda 1`), a mixture of the two, or the teacher's answers alone (`sequence`), worked steps
included. Without --model the student is a new model (--arch.width ...) with the tokenizer of the teacher.
Rows hold `prompt`, `question` or `messages`. `forward_kl`, `reverse_kl` and `js` hold the log-probs of the
whole vocabulary at every token.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed, losses
from rlhf_jax.algorithms import distillation
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import LearningRate, PositiveInt, Share
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Array, Float, Params, Rollout
from rlhf_jax.models import Policy
from rlhf_jax.stages import adapting, defaults, edges, inputs, option_checks, option_groups, starting
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.reward_specs import check_same_vocabulary
from rlhf_jax.stages.session import Session
from rlhf_jax.training.loading import load

Loss = Literal["forward_kl", "reverse_kl", "js", "sequence", "sampled_reverse_kl", "sequence_reverse_kl"]
WHOLE: dict[Loss, distillation.DivergenceFn] = {
    "forward_kl": losses.forward_kl_loss,
    "reverse_kl": losses.reverse_kl_loss,
    "js": losses.generalized_js_loss,
}
"""Over the whole vocabulary."""
SAMPLED: dict[Loss, distillation.DivergenceFn] = {
    "sequence": losses.sampled_forward_kl_loss,
    "sampled_reverse_kl": losses.sampled_reverse_kl_loss,
    "sequence_reverse_kl": losses.sequence_reverse_kl_loss,
}
"""On the tokens that stand there."""
STUDENT_SHARE: dict[Loss, float] = {"sequence": 0.0, "sampled_reverse_kl": 1.0, "sequence_reverse_kl": 1.0}
"""Who must write the answers, for the losses that are true of that writer only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of distillation.

    Attributes:
      teacher: run folder of the policy to learn from, of any architecture.
      model: run folder of the student to start from; empty for a new model.
      prompts: which prompts; what answers are worth is only looked at.
      loss: forward_kl, reverse_kl or js over the vocabulary; sequence (imitates the teacher's answers),
        sampled_reverse_kl or sequence_reverse_kl (MiniLLM) on the tokens that were sampled.
      lmbda: share of steps in which the student writes the answers (GKD's lambda); None for what
        the loss needs, and 0 where either may write.
      batch_size: prompts a step, one answer to each.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one (2e-5, with an adapter 2e-4).
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/distill"))
    teacher: str
    model: str = ""
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.COSINE
    loss: Loss = "forward_kl"
    lmbda: Share | None = None
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    learning_rate: LearningRate | None = None


def check(options: Options) -> float:
    """The share of steps in which the student writes.

    Raises:
      UserError: the options do not fit each other.
    """
    option_checks.check(options, options.run, "distill")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    needed, given = STUDENT_SHARE.get(options.loss), options.lmbda
    if needed is not None and given not in (None, needed):
        writer = "student" if needed else "teacher"
        raise UserError(f"--loss {options.loss} needs answers of the {writer}: give --lmbda {needed:g}")
    return given if given is not None else needed or 0.0


def start_from(options: Options, teacher: Policy, given: Given) -> Policy:
    """The student."""
    if given.policy is not None:
        check_same_vocabulary(teacher.tokenizer, given.policy.tokenizer, Path("teacher"), "teacher")
        return given.policy
    if options.model:
        student = starting.starting_model(options.model, "", "", options.arch, options.run)
        check_same_vocabulary(teacher.tokenizer, student.tokenizer, Path(options.teacher), "teacher")
        return student
    return starting.starting_model("", teacher.tokenizer, "", options.arch, options.run)


def make_sample_completions_fn(
    session: Session, teacher: Policy, prompts: inputs.Prompts, share: float
) -> Callable[[Params, int], tuple[Rollout, dict[str, float]]]:
    """`write(student's params, number) -> (answers, metrics)`; who writes is a function of the number."""
    seed, size = session.run.seed, session.options.batch_size
    ours, theirs = (
        session.make_answer_fn(prompts, writer, batch_size=size, group_size=1)
        for writer in (session.policy, teacher)
    )

    def write(params: Params, number: int) -> tuple[Rollout, dict[str, float]]:
        by_student = np.random.default_rng((seed, number)).random() < share
        answers = ours(params, number) if by_student else theirs(teacher.params, number)
        return answers.rollout, {
            "student_writes": float(by_student),
            "reward": answers.mean_reward(),
            "unscorable": int(answers.scored.unscorable.sum()),
        }

    return write


def make_logp_fn(options: Options, model: Policy) -> distillation.LogpFn:
    """(params, sequences) -> log-probs as the loss takes them."""
    if options.loss in WHOLE:
        return model.make_distribution_fn()
    logprob_fn = model.make_logprob_fn()

    def logp(params: Params, sequences: Any) -> Float[Array, "B T"]:
        return logprob_fn(params, sequences).logp

    return logp


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "distill")
    share = check(options)
    option_checks.check_rewards(inputs.rewards_of(options.prompts, given))
    teacher = given.teacher if given.teacher is not None else load(options.teacher)
    model = start_from(options, teacher, given)
    session = Session(options, given, "distill", model)
    prompts = session.load_prompts()
    size = sum(leaf.size for leaf in jax.tree.leaves(teacher.params))
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts; a teacher of {size:,} parameters")
    write = make_sample_completions_fn(session, teacher, prompts, share)

    split = session.split_trainable()
    config = distillation.Config(options.micro_batches, (WHOLE | SAMPLED)[options.loss])
    student_fn, teacher_fn = make_logp_fn(options, model), make_logp_fn(options, teacher)
    update = distillation.make_update(config, student_fn, split.tx)
    hyper = distillation.Hyper(jnp.float32(options.learning_rate))
    evaluate = prompts.evaluate

    def learn(state: distillation.State, teacher_params: Params, rollout: Rollout) -> Any:
        sequences = rollout.sequences
        batch = distillation.Batch(sequences, teacher_fn(teacher_params, sequences))
        state, metrics = update(state, hyper, batch)
        length, finished = jnp.mean(jnp.sum(sequences.mask, axis=1)), jnp.mean(rollout.finished)
        return state, {**metrics, "length": length, "finished": finished}

    state = session.init_state(
        lambda *x: distillation.init(x[0], split.tx, x[1]), split.trained, split.frozen
    )
    learn = edges.jit_update(learn, state)
    teacher_params, meter = distributed.shard_params(teacher.params), options.run.meter()

    def step(state: distillation.State, number: int):
        with meter.timing("rollout"):
            rollout, described = write(state.learner.all_params, number)
        state, metrics = meter.timed("update", learn, state, teacher_params, rollout)
        return state, {**metrics, **described}

    def held_out(state: distillation.State, _: int) -> dict[str, float]:
        assert evaluate is not None
        numbers = evaluate(state.learner.all_params, None).metrics()
        return {name: value for name, value in numbers.items() if name != "kl"}

    before = prompts.answer(model.params)
    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=prompts.fingerprint(),
        adaptation=split.adaptation,
        evaluate=evaluate and held_out,
    )
    after = prompts.answer(state.learner.all_params)
    samples = inputs.before_and_after("distill", before, after)
    return session.finish(state.learner.all_params, state, samples)
