"""Distillation: a student learns what a teacher, the policy of another run or itself, says of answers.

    rlhf distill --out runs/soft --model runs/small --teacher runs/large --data my.jsonl
    rlhf distill --out runs/gkd --model runs/small --teacher runs/large --data my.jsonl --loss js --lmbda 1
    rlhf distill --out runs/texts --model runs/small --teacher runs/large --data my.jsonl --loss sequence
    rlhf distill --out runs/other --model runs/small --teacher runs/other_family --data my.jsonl --loss gold
    rlhf distill --out runs/self --model runs/small --self-teacher ema --teacher-context demonstration \\
        --data shown.jsonl --loss reverse_kl

Soft labels on the teacher's answers (`forward_kl`), on-policy distillation on the student's (GKD,
`--lmbda 1`), a mixture of the two, or the teacher's answers alone (`sequence`), worked steps
included. Without --model the student is a new model (--arch.width ...) with the tokenizer of the teacher.
Rows hold `prompt`, `question` or `messages`. `forward_kl`, `reverse_kl` and `js` hold the log-probs of the
whole vocabulary at every token; with --top-k, of the teacher's likeliest tokens and of all others as one.
A teacher with another tokenizer needs `gold` or `uld`.
With --self-teacher the policy learns from itself as it answers where a field of the row, a demonstration or
feedback, stands in its prompt. With --rewards, what answers are worth is looked at, and never learned from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed, losses
from rlhf_jax.algorithms import distillation
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, LearningRate, Positive, PositiveInt, Share
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Params, Rollout
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.losses.distillation import Average, Divergence
from rlhf_jax.models import Policy
from rlhf_jax.rollout.completions import LastCompletions, describe_rows
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.stages import adapting, defaults, edges, inputs, option_checks, option_groups, starting
from rlhf_jax.stages.distill_teachers import (
    SelfTeacher,
    count_parameters,
    load_teachers,
    make_teacher_context,
    make_teacher_params_fn,
)
from rlhf_jax.stages.distill_tokenizers import (
    ALIGNMENT,
    Alignment,
    BothTokenizers,
    Matched,
    check_tokenizer_options,
    cross_tokenizer_loss,
    prompts_of_teacher,
)
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.reward_specs import check_same_vocabulary
from rlhf_jax.stages.session import Session

Loss = Literal[
    "forward_kl", "reverse_kl", "js", "sequence", "sampled_reverse_kl", "sequence_reverse_kl", "uld", "gold"
]
WHOLE: dict[Loss, Divergence] = {
    "forward_kl": losses.forward_kl_loss,
    "reverse_kl": losses.reverse_kl_loss,
    "js": losses.generalized_js_loss,
}
"""Over the whole vocabulary."""
SAMPLED: dict[Loss, Divergence] = {
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
      teacher: the policies to learn from, each as `model`, of any architecture, and of one vocabulary unless
        the loss is gold or uld. Of several, the mean is learned, and they take turns in writing answers.
      teacher_weights: of several teachers in their mean; none for equal ones.
      teacher_average: of what the mean of several teachers is taken.
      self_teacher: the policy teaches itself, in the place of --teacher: as it is, as its moving average
        (ema), or as it was; it sees what the student does not. None for --teacher.
      teacher_context: field of the rows that the teacher sees beside the prompt: a demonstration, a hint,
        feedback; empty for none.
      teacher_template: the teacher's last user message, of `{prompt}` and `{context}`.
      teacher_update_rate: share of the policy in a step of --self-teacher ema.
      model: the student to start from: a run folder, a Hugging Face folder, a GGUF file or a name in the hub
        cache; empty for a new model.
      prompts: which prompts; what answers are worth is only looked at, where --rewards says so.
      loss: forward_kl, reverse_kl or js over the vocabulary; sequence (imitates the teacher's answers),
        sampled_reverse_kl or sequence_reverse_kl (MiniLLM) on the tokens that were sampled; gold or uld of a
        teacher with another tokenizer.
      alignment: of gold and uld, which tokens of student and teacher are compared: spans of equal text, or
        tokens at equal positions; None for what the loss is published with, spans for gold and positions for
        uld.
      gold_divergence: of gold, on the tokens that both vocabularies have; None for js.
      gold_matched_weight: of gold, weight of that divergence, from 0 to 1; the rest is that of the other
        tokens. None for the share of the teacher's tokens that both have.
      lmbda: share of steps in which the student writes the answers (GKD's lambda); None for what
        the loss and the teacher need, and 0 where either may write.
      top_k: tokens of the teacher that a divergence tells apart, the likeliest; what is left is one outcome
        more. 0 for the whole vocabulary.
      temperature: of both softmaxes in a divergence, whose loss is multiplied by its square; answers are
        sampled at 1.
      hard_label_weight: of the cross-entropy on the teacher's answers, from 0 to 1; the divergence has the
        rest.
      batch_size: prompts a step, one answer to each.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one (2e-5, with an adapter 2e-4).
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/distill"))
    teacher: tuple[str, ...] = ()
    teacher_weights: tuple[Positive, ...] = ()
    teacher_average: Average = "probabilities"
    self_teacher: SelfTeacher | None = None
    teacher_context: str = ""
    teacher_template: str = "{prompt}\n\n{context}"
    teacher_update_rate: Share = 0.05
    model: str = ""
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    completions: tyro.conf.OmitArgPrefixes[option_groups.CompletionOptions] = (
        option_groups.CompletionOptions()
    )
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.COSINE
    loss: Loss = "forward_kl"
    alignment: Alignment | None = None
    gold_divergence: Matched | None = None
    gold_matched_weight: Share | None = None
    lmbda: Share | None = None
    top_k: Count = 0
    temperature: Positive = 1.0
    hard_label_weight: Share = 0.0
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    learning_rate: LearningRate | None = None


def check(options: Options, teachers: int) -> float:
    """The share of steps in which the student writes.

    Args:
      teachers: how many there are beside the policy.

    Raises:
      UserError: the options do not fit each other.
    """
    option_checks.check(options, options.run, "distill")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    check_teachers(options, teachers)
    check_tokenizer_options(options, teachers)
    needed, given = STUDENT_SHARE.get(options.loss, 1.0 if options.self_teacher else None), options.lmbda
    if needed is not None and given not in (None, needed):
        writer = "student" if needed else "teacher"
        what = f"--loss {options.loss}" if options.loss in STUDENT_SHARE else "--self-teacher"
        raise UserError(f"{what} needs answers of the {writer}: give --lmbda {needed:g}")
    share = given if given is not None else needed or 0.0
    check_labels(options, share)
    return share


def check_teachers(options: Options, count: int) -> None:
    """Raises: UserError where it is not clear who teaches what."""
    if bool(count) == bool(options.self_teacher):
        raise UserError("give either --teacher, or --self-teacher for the policy itself")
    if options.self_teacher and not options.teacher_context:
        raise UserError(
            "--self-teacher: a teacher that sees what the student sees has nothing to tell: give "
            "--teacher-context"
        )
    if options.self_teacher and options.loss == "sequence":
        raise UserError("--self-teacher scores the student's answers: give another --loss than sequence")
    if options.teacher_template.count("{prompt}") != 1 or "{context}" not in options.teacher_template:
        raise UserError("--teacher-template must hold {prompt} once, and {context}")
    weights = options.teacher_weights
    if weights and len(weights) != count:
        raise UserError(f"--teacher-weights: give a number for each of the {count} teachers")
    if count > 1 and options.top_k:
        raise UserError("--top-k: several teachers have no likeliest tokens in common: give 0")
    if count > 1 and options.teacher_average != "probabilities" and options.loss not in WHOLE:
        raise UserError(f"--loss {options.loss} of several teachers: give --teacher-average probabilities")


def check_labels(options: Options, share: float) -> None:
    """Raises: UserError where temperature, hard labels or top k do not fit the loss and who writes."""
    weight = options.hard_label_weight
    if weight and share:
        raise UserError("--hard-label-weight: labels are what the teacher writes: give --lmbda 0")
    if options.loss in SAMPLED and (options.temperature != 1 or weight or options.top_k):
        raise UserError(
            f"--loss {options.loss} is of sampled tokens, without --temperature, --hard-label-weight and "
            f"--top-k: leave them out, or give one of {', '.join(WHOLE)}"
        )


def start_from(options: Options, teachers: Sequence[Policy], given: Given) -> Policy:
    """The student."""
    if given.policy is not None:
        student = given.policy
    elif options.model or not teachers:
        student = starting.starting_model(options.model, "", "", options.arch, options.run)
    else:
        return starting.starting_model("", teachers[0].tokenizer, "", options.arch, options.run)
    for teacher in teachers[:1] if options.loss not in ALIGNMENT else ():
        check_same_vocabulary(
            teacher.tokenizer,
            student.tokenizer,
            Path("teacher"),
            "teacher",
            remedy="give --loss gold or uld, which learn from a teacher with another tokenizer",
        )
    return student


def make_sample_completions_fn(
    session: Session,
    teachers: Sequence[Policy],
    prompts: inputs.Prompts,
    teacher_prompts: inputs.Prompts,
    share: float,
) -> Callable[[Params, int], tuple[Answers, Policy, dict[str, float]]]:
    """`write(student's params, number) -> (answers, who wrote, metrics)`; who is one of the number."""
    seed, size, rewards = session.run.seed, session.options.batch_size, session.rewards
    ours, *theirs = (
        session.make_answer_fn(asked, writer, batch_size=size, group_size=1)
        for asked, writer in [(prompts, session.policy), *((teacher_prompts, one) for one in teachers)]
    )

    def write(params: Params, number: int) -> tuple[Answers, Policy, dict[str, float]]:
        by_student = np.random.default_rng((seed, number)).random() < share
        turn = number % max(len(teachers), 1)
        writer = session.policy if by_student else teachers[turn]
        answers = ours(params, number) if by_student else theirs[turn](writer.params, number)
        described = {"student_writes": float(by_student)}
        if rewards:
            described |= {"reward": answers.mean_reward(), "unscorable": int(answers.scored.unscorable.sum())}
        return answers, writer, described

    return write


def make_label_fn(options: Options, model: Policy) -> distillation.SoftLabelFn:
    """Soft labels of a model, as the loss takes them."""
    if options.loss in SAMPLED:
        return distillation.on_tokens(model.make_logprob_fn())
    if not options.top_k:
        return distillation.over_vocabulary(model.make_distribution_fn())
    if options.top_k >= model.tokenizer.vocab_size:
        raise UserError(
            f"--top-k {options.top_k} is not below the {model.tokenizer.vocab_size} tokens of the "
            "vocabulary: give 0 for all of them"
        )
    return distillation.over_top_k(model.make_top_k_fn(options.top_k), model.make_candidate_fn())


def make_teacher_fn(options: Options, teachers: Sequence[Policy]) -> distillation.SoftLabelFn:
    """Soft labels of all teachers, whose parameters come as a sequence."""
    label_fns = [make_label_fn(options, teacher) for teacher in teachers]
    if len(label_fns) > 1:
        return distillation.of_several(label_fns, options.teacher_weights or None, options.teacher_average)
    return lambda params, *args: label_fns[0](params[0], *args)


def hyper_of(options: Options) -> distillation.Hyper:
    """Numbers of the update."""
    return distillation.Hyper(
        learning_rate=jnp.float32(options.learning_rate),
        temperature=jnp.float32(options.temperature),
        hard_label_weight=jnp.float32(options.hard_label_weight),
        teacher_update_rate=jnp.float32(options.teacher_update_rate),
    )


def loss_of(options: Options, student: Policy, teachers: Sequence[Policy]) -> Divergence:
    """Divergence that distillation minimizes."""
    if options.loss not in ALIGNMENT:
        return (WHOLE | SAMPLED)[options.loss]
    gold = options.gold_divergence, options.gold_matched_weight
    return cross_tokenizer_loss(options.loss, student, teachers[0], *gold)


def make_train_step(
    options: Options, model: Policy, teachers: Sequence[Policy], split: adapting.TrainableSplit, length: int
) -> Callable[..., tuple[distillation.State, dict[str, Any]]]:
    """`learn(state, held, rollout, seen) -> (state, metrics)`: soft labels and the update.

    `seen` is what the teacher sees: prompts of its own, the same texts in tokens of its own, or None.

    Args:
      length: columns of the student's prompts.
    """
    config = distillation.Config(options.micro_batches, loss_of(options, model, teachers))
    update = distillation.make_update(config, make_label_fn(options, model), split.tx)
    teacher_fn, hyper = make_teacher_fn(options, teachers or [model]), hyper_of(options)
    teacher_params_fn = make_teacher_params_fn(options.self_teacher, split)

    def learn(state: distillation.State, held: Any, rollout: Rollout, seen: Any) -> Any:
        sequences, params = rollout.sequences, teacher_params_fn(state, held)
        if isinstance(seen, distillation.TwoTokenizations):
            batch = distillation.make_cross_tokenizer_batch(teacher_fn, params, seen, hyper)
        else:
            batch = distillation.make_batch(
                teacher_fn, params, sequences, hyper, teacher_prompts=seen, prompt_length=length
            )
        state, metrics = update(state, hyper, batch)
        length_of, finished = jnp.mean(jnp.sum(sequences.mask, axis=1)), jnp.mean(rollout.finished)
        theirs = batch.token_logp if options.temperature == 1 else None
        of_rows = describe_rows(None, rollout.logp, theirs, sequences.mask)
        return state, {**metrics, "length": length_of, "finished": finished, **of_rows}

    return learn


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "distill")
    teachers = load_teachers(options.teacher if given.teacher is None else (), given)
    share = check(options, len(teachers))
    model = start_from(options, teachers, given)
    session = Session(options, given, "distill", model)
    prompts = session.load_prompts()
    refuse_images(prompts.train, "distillation")
    context = None
    if options.teacher_context:
        shown = options.teacher_context, options.teacher_template
        context = make_teacher_context(prompts, model.tokenizer, *shown)
    session.decide_steps(len(prompts))
    size = f"teachers of {count_parameters(teachers):,} parameters" if teachers else "its own teacher"
    session.announce(f"{len(prompts):,} prompts; {size}")
    teacher_prompts, both = prompts, None
    if alignment := options.alignment or ALIGNMENT.get(options.loss):
        teacher_prompts = prompts_of_teacher(prompts, teachers[0].tokenizer)
        both = BothTokenizers(
            (model.tokenizer, prompts),
            (teachers[0].tokenizer, teacher_prompts),
            alignment=alignment,
            max_new_tokens=options.prompts.max_new_tokens,
        )
    write = make_sample_completions_fn(session, teachers, prompts, teacher_prompts, share)

    split, ema = session.split_trainable(), options.self_teacher == "ema"
    learn = make_train_step(options, model, teachers, split, prompts.length)
    evaluate, meter = prompts.evaluate, options.run.meter()
    completions = LastCompletions(model.tokenizer)
    state = session.init_state(
        lambda *x: distillation.init(x[0], split.tx, x[1], ema=ema), split.trained, split.frozen
    )
    learn = edges.jit_update(learn, state)
    held = distributed.shard_params([teacher.params for teacher in teachers]) if teachers else split.original

    def step(state: distillation.State, number: int):
        with meter.timing("rollout"):
            answers, writer, described = write(state.learner.all_params, number)
        seen = context and context.prompts(answers.prompts)
        if both is not None:
            seen = both(answers, by_student=writer is model)
        state, metrics = meter.timed("update", learn, state, held, answers.rollout, seen)
        scored = answers.scored if session.rewards else None
        fields = {"writer": ["student" if writer is model else "teacher"] * len(answers.prompts)}
        more = {"fields": fields, "tokenizer": writer.tokenizer}
        metrics = completions.keep(answers.prompts, answers.rollout, scored, metrics, **more)
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
        data_fingerprint=prompts.fingerprint() + (context.fingerprint() if context else ""),
        adaptation=split.adaptation,
        evaluate=evaluate and held_out,
        completions=completions,
    )
    after = prompts.answer(state.learner.all_params)
    samples = inputs.before_and_after("distill", before, after)
    return session.finish(state.learner.all_params, state, samples)
