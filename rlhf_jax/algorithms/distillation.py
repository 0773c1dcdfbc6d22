"""Distillation: a student learns the distribution of a teacher, on whatever sequences it is shown.

soft labels                 sequences of data,            `forward_kl_loss`
sequence level              what the teacher wrote,       `sft` on it (Kim and Rush 2016)
on policy (GKD)             what the student wrote,       `generalized_js_loss` or `reverse_kl_loss`
on policy, sampled tokens   what the student wrote,       `sampled_reverse_kl_loss` on [B, T] log-probs

A model is a `SoftLabelFn` here: `over_vocabulary`, `over_top_k`, or `on_tokens` for the sampled forms. A
teacher with another tokenizer reads the same texts in tokens of its own (`make_cross_tokenizer_batch`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.protocols import DistributionFn, LogprobFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses.cross_tokenizer import merge_spans, span_starts
from rlhf_jax.losses.distillation import (
    Average,
    Divergence,
    at_temperature,
    forward_kl_loss,
    mean_of_teachers,
    top_k_distributions,
    with_hard_labels,
)
from rlhf_jax.losses.reductions import Reduction, token_mean


@pytree_dataclass
class SoftLabels:
    """Log-probs of next tokens, in nats.

    Attributes:
      logp: of every token of the vocabulary, of K candidates, or [B, T] of those that stand there.
      token_logp: of the tokens that stand there, at temperature 1; None where nobody asks.
      candidates: which K tokens; None where they are all, or the ones that stand there.
    """

    logp: Float[Array, "B T *V"]
    token_logp: Float[Array, "B T"] | None = None
    candidates: Int[Array, "B T K"] | None = None


SoftLabelFn = Callable[[Params, Sequences, Int[Array, "B T K"] | None, Scalar], SoftLabels]
"""(params, sequences, candidates, temperature) -> `SoftLabels`; without candidates, a teacher of the top k
chooses its own.
"""


def over_vocabulary(distribution_fn: DistributionFn) -> SoftLabelFn:
    """Soft labels over the whole vocabulary; holds [B, T, V]."""

    def label(params: Params, sequences: Sequences, _: Any, temperature: Scalar) -> SoftLabels:
        logp = distribution_fn(params, sequences)
        token_logp = jnp.take_along_axis(logp, sequences.tokens[..., None], axis=-1)[..., 0]
        return SoftLabels(at_temperature(logp, sequences.mask, temperature=temperature), token_logp)

    return label


def over_top_k(top_k_fn: Callable[..., Any], candidate_fn: Callable[..., Any]) -> SoftLabelFn:
    """Soft labels on the K likeliest tokens of the teacher; what is left is one outcome more in the loss.

    Args:
      top_k_fn: of `Policy.make_top_k_fn`.
      candidate_fn: of `Policy.make_candidate_fn`.
    """

    def label(
        params: Params, sequences: Sequences, candidates: Int[Array, "B T K"] | None, temperature: Scalar
    ) -> SoftLabels:
        if candidates is None:
            logp, candidates = top_k_fn(params, sequences, temperature)
            return SoftLabels(logp, candidates=candidates)
        return SoftLabels(*candidate_fn(params, sequences, candidates, temperature))

    return label


def on_tokens(logprob_fn: LogprobFn) -> SoftLabelFn:
    """Soft labels on the tokens that stand there, for sampled forms; they have no temperature."""

    def label(params: Params, sequences: Sequences, _: Any, __: Scalar) -> SoftLabels:
        logp = logprob_fn(params, sequences).logp
        return SoftLabels(logp, logp)

    return label


def of_several(
    label_fns: Sequence[SoftLabelFn],
    weights: Sequence[float] | None = None,
    average: Average = "probabilities",
) -> SoftLabelFn:
    """Soft labels of several teachers, whose parameters come as a sequence: `losses.mean_of_teachers`.

    Args:
      label_fns: over the vocabulary, or on tokens where probabilities are averaged.
      weights: None for equal ones.
    """

    def label(
        params: Sequence[Params], sequences: Sequences, candidates: Any, temperature: Scalar
    ) -> SoftLabels:
        pairs = zip(label_fns, params, strict=True)
        logps = [label_fn(own, sequences, candidates, temperature).logp for label_fn, own in pairs]
        shares = None if weights is None else jnp.array(weights)
        return SoftLabels(mean_of_teachers(jnp.stack(logps), weights=shares, average=average))

    return label


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      loss_fn: a loss of `losses.distillation`.
      reduce: how tokens become one number.
    """

    micro_batches: int = 1
    loss_fn: Divergence = forward_kl_loss
    reduce: Reduction = token_mean


@pytree_dataclass
class Hyper:
    """Hyperparameters of distillation that a sweep may vary (array leaves).

    Attributes:
      temperature: of both softmaxes in the divergence, whose loss is multiplied by its square.
      hard_label_weight: of the cross-entropy on the tokens that stand there; the divergence has the rest.
      teacher_update_rate: share of the policy in a step of the teacher that is its moving average.
    """

    learning_rate: Scalar = 1e-4
    temperature: Scalar = 1.0
    hard_label_weight: Scalar = 0.0
    teacher_update_rate: Scalar = 0.05


@pytree_dataclass
class State:
    """All that a resume needs; a teacher that is another model is not in it.

    Attributes:
      ema_params: moving average of what is trained, where that is the teacher (self-distillation); else None.
    """

    learner: TrainState
    key: PRNGKeyArray
    ema_params: Params = None

    @property
    def teacher_params(self) -> Params:
        """The policy as its own teacher: its moving average, or as it is where none is kept."""
        if self.ema_params is None:
            return self.learner.all_params
        return dataclasses.replace(self.learner, params=self.ema_params).all_params


@pytree_dataclass
class Batch:
    """Sequences with what the teacher says of them.

    Attributes:
      sequences: `mask` marks the tokens that count.
      teacher_logp: as `SoftLabels.logp`, at the temperature of `Hyper`.
      candidates: which tokens the teacher names; None for all, or for those that stand there.
      spans: of the student's tokens, where the teacher has another tokenizer, and `teacher_logp` speaks of
        spans (`losses.merge_spans`); else None.
    """

    sequences: Sequences
    teacher_logp: Float[Array, "B T *V"]
    candidates: Int[Array, "B T K"] | None = None
    spans: Int[Array, "B T"] | None = None

    @property
    def token_logp(self) -> Float[Array, "B T"] | None:
        """Log-probs that the teacher gives the tokens that stand there; None where labels may lack them."""
        if self.candidates is not None or self.spans is not None:
            return None
        if self.teacher_logp.ndim == 2:
            return self.teacher_logp
        return jnp.take_along_axis(self.teacher_logp, self.sequences.tokens[..., None], axis=-1)[..., 0]


@pytree_dataclass
class TeacherPrompts:
    """Prompts of the teacher's own, which hold what the student does not see.

    Attributes:
      tokens: left-padded, one prompt a row.
      mask: where they stand.
    """

    tokens: Int[Array, "B Q"]
    mask: Bool[Array, "B Q"]


def behind_prompts(sequences: Sequences, prompts: TeacherPrompts, *, prompt_length: int) -> Sequences:
    """The same completions, column for column, behind other prompts.

    Args:
      prompt_length: P; completions stand from column P on, and from column Q of the result.
    """
    completions = jax.tree.map(lambda x: x[:, prompt_length:], sequences)
    lengths = jnp.sum(prompts.mask, axis=1, keepdims=True)
    own_lengths = jnp.sum(sequences.segment_ids[:, :prompt_length] > 0, axis=1, keepdims=True)
    positions = jnp.where(
        completions.segment_ids > 0, completions.positions - own_lengths + lengths, completions.positions
    )
    parts = Sequences(
        prompts.tokens,
        jnp.maximum(jnp.cumsum(prompts.mask, axis=1) - 1, 0),
        prompts.mask.astype(sequences.segment_ids.dtype),
        jnp.zeros_like(prompts.mask),
    )
    completions = dataclasses.replace(completions, positions=positions)
    return jax.tree.map(lambda *x: jnp.concatenate([*x], axis=1, dtype=x[1].dtype), parts, completions)


def make_batch(
    label_fn: SoftLabelFn,
    teacher_params: Params,
    sequences: Sequences,
    hyper: Hyper,
    *,
    teacher_prompts: TeacherPrompts | None = None,
    prompt_length: int = 0,
) -> Batch:
    """The sequences with the teacher's soft labels, without gradient.

    Args:
      teacher_prompts: behind which the teacher sees the completions, where it is shown a demonstration or
        feedback (on-policy self-distillation: SDFT, arXiv 2601.19897; SDPO, arXiv 2601.20802).
      prompt_length: columns of the student's prompts, with `teacher_prompts`.
    """
    seen = sequences
    if teacher_prompts is not None:
        seen = behind_prompts(sequences, teacher_prompts, prompt_length=prompt_length)
    labels = jax.lax.stop_gradient(label_fn(teacher_params, seen, None, hyper.temperature))

    def aligned(values: Array) -> Array:
        rows, rest = values.shape[0], values.shape[2:]
        missing = jnp.zeros((rows, prompt_length, *rest), values.dtype)
        # Completions are the last columns of both.
        return jnp.concatenate([missing, values[:, prompt_length - sequences.tokens.shape[1] :]], axis=1)

    if teacher_prompts is not None:
        labels = jax.tree.map(aligned, labels)
    return Batch(sequences, labels.logp, labels.candidates)


@pytree_dataclass
class TwoTokenizations:
    """The same texts in the tokens of the student and of a teacher with another tokenizer.

    Attributes:
      student: rows of the student; `mask` marks the tokens that count.
      teacher: rows of the teacher, in the same order.
      student_spans: which tokens stand for the same text on both sides, as `losses.merge_spans` takes it.
      teacher_spans: the same of the teacher's tokens, in columns of the student.
    """

    student: Sequences
    teacher: Sequences
    student_spans: Int[Array, "B T"]
    teacher_spans: Int[Array, "B U"]


def make_cross_tokenizer_batch(
    label_fn: SoftLabelFn, teacher_params: Params, texts: TwoTokenizations, hyper: Hyper
) -> Batch:
    """The student's rows with the teacher's soft labels of each span, without gradient.

    Args:
      label_fn: the teacher's, over its whole vocabulary.
    """
    labels = label_fn(teacher_params, texts.teacher, None, hyper.temperature)
    length = texts.student.tokens.shape[1]
    merged = merge_spans(labels.logp, texts.teacher.tokens, texts.teacher_spans, length=length)
    return Batch(texts.student, jax.lax.stop_gradient(merged), spans=texts.student_spans)


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    frozen: Params = None,
    *,
    ema: bool = False,
) -> State:
    """The state at step 0.

    Args:
      frozen: the part of the model that does not train.
      ema: keep a moving average of what is trained, as a teacher.
    """
    average = jax.tree.map(jnp.copy, params) if ema else None
    return State(init_train_state(params, tx, frozen), key, average)


def _soft_mask(batch: Batch) -> Bool[Array, "B T"]:
    """Where distributions are compared: at every token that counts, or once a span."""
    return batch.sequences.mask if batch.spans is None else span_starts(batch.spans)


def make_update(
    config: Config, label_fn: SoftLabelFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step.

    Args:
      label_fn: the student's soft labels, of the teacher's kind: `over_vocabulary`, `over_top_k` or
        `on_tokens`.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        total = config.reduce.total(batch.sequences.mask)
        soft_total = config.reduce.total(_soft_mask(batch))

        def loss_fn(params: Params, part: Batch) -> tuple[Float[Array, ""], Metrics]:
            sequences, mask = part.sequences, part.sequences.mask
            labels = label_fn(params, sequences, part.candidates, hyper.temperature)
            assert labels.token_logp is not None
            pair = labels.logp, part.teacher_logp
            if part.candidates is not None:
                pair = top_k_distributions(*pair, mask)
            if part.spans is not None:
                length = mask.shape[1]
                pair = merge_spans(labels.logp, sequences.tokens, part.spans, length=length), pair[1]
            soft_loss, parts = config.loss_fn(
                *pair, _soft_mask(part), reduce=config.reduce, denominator=soft_total
            )
            loss, metrics = with_hard_labels(
                soft_loss,
                labels.token_logp,
                mask,
                temperature=hyper.temperature,
                hard_label_weight=hyper.hard_label_weight,
                reduce=config.reduce,
                denominator=total,
            )
            return loss, {**parts, **metrics}

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        metrics = {**metrics, **guard, "tokens": jnp.sum(batch.sequences.mask)}
        if batch.spans is not None:
            metrics["spans"] = jnp.sum(_soft_mask(batch))
        average = state.ema_params
        if average is not None:
            average = optax.incremental_update(learner.params, average, hyper.teacher_update_rate)
        return dataclasses.replace(state, learner=learner, ema_params=average), metrics

    return update
