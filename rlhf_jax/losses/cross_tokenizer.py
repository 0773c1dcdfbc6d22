"""Distillation from a teacher with another tokenizer: losses on spans of equal text.

Student and teacher cut a text at different places and write it in different vocabularies. Tokens between
two places at which both cut are a span, on either side; `merge_spans` makes one distribution of each, and
`uld_loss` and `gold_loss` compare distributions over vocabularies V and W.

Shared arguments are those of `losses.distillation`; vocabularies may differ. `mask` marks the columns that
hold a span.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import full_precision
from rlhf_jax.losses.distillation import Divergence, generalized_js_loss, prepared_pair
from rlhf_jax.losses.reductions import Reduction, token_mean


def span_starts(spans: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """The student's columns at which a span begins: the mask of the losses.

    Args:
      spans: of the student's tokens, as `merge_spans` takes them.
    """
    return spans == jnp.arange(spans.shape[1])


def merge_spans(
    logp: Float[Array, "B N V"], tokens: Int[Array, "B N"], spans: Int[Array, "B N"], *, length: int
) -> Float[Array, "B T V"]:
    """One distribution for each span of tokens, by the chain rule (GOLD, Hugging Face 2025).

        log P(v) = log p_s(v) + sum_{s < j <= e} log p_j(y_j),    a span of the tokens s ... e

    True of the tokens that stand there, v = y_s; of any other v it is the distribution at s, scaled by how
    likely the rest of the span is. It sums to that, not to 1, where a span has several tokens.

    Args:
      logp: log-probabilities in nats, at the temperature of the loss.
      tokens: what stands there.
      spans: of each token the column, in [0, T), in which its span is to stand, the student's first of that
        span; -1 for tokens of none. Tokens of a span stand side by side.
      length: T, columns of the student.

    Returns:
      Zeros or anything in columns that hold no span (`span_starts`).
    """
    logp, tokens, spans = check_shapes(
        "merge_spans", logp=(logp, "B N V"), tokens=(tokens, "B N"), spans=(spans, "B N")
    )
    logp = full_precision(logp)
    before = jnp.pad(spans[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    inside, first = spans >= 0, (spans >= 0) & (spans != before)
    rows, columns = jnp.arange(len(spans))[:, None], jnp.arange(spans.shape[1])
    nowhere = jnp.full_like(spans, length)  # out of bounds: dropped

    starts = jnp.zeros((len(spans), length), spans.dtype)
    starts = starts.at[rows, jnp.where(first, spans, nowhere)].set(columns, mode="drop")
    taken = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    later = inside & ~first
    rest = jnp.zeros((len(spans), length), logp.dtype)
    rest = rest.at[rows, jnp.where(later, spans, nowhere)].add(jnp.where(later, taken, 0), mode="drop")
    return logp[rows, starts] + rest[..., None]


def uld_loss(
    student_logp: Float[Array, "B T V"],
    teacher_logp: Float[Array, "B T W"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Universal logit distillation (ULD, Boizard et al. 2024, arXiv 2402.12030): the Wasserstein distance of
    two distributions whose outcomes have no names in common, each as far from every other.

        sum_i |p_S,(i) - p_T,(i)|,    p_(1) >= p_(2) >= ..., the shorter one filled up with zeros

    Blind to which token is which. The paper adds it to the cross-entropy: `with_hard_labels`, whose weight w
    stands for a lambda of (1 - w) / w.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "uld_loss",
        student_logp=(student_logp, "B T V"),
        teacher_logp=(teacher_logp, "B T W"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    loss = reduce(_sorted_distance(student, teacher), mask, denominator=denominator)
    return loss, {"loss": jax.lax.stop_gradient(loss)}


def _sorted_distance(logp: Float[Array, "B T V"], other: Float[Array, "B T W"]) -> Float[Array, "B T"]:
    width = max(logp.shape[-1], other.shape[-1])
    ascending = [
        jnp.pad(jnp.sort(jnp.exp(side), axis=-1), ((0, 0), (0, 0), (width - side.shape[-1], 0)))
        for side in (logp, other)
    ]
    return jnp.sum(jnp.abs(ascending[0] - ascending[1]), axis=-1)


def gold_loss(
    student_logp: Float[Array, "B T V"],
    teacher_logp: Float[Array, "B T W"],
    mask: Bool[Array, "B T"],
    *,
    student_ids: Int[np.ndarray, " M"],
    teacher_ids: Int[np.ndarray, " M"],
    matched_weight: Scalar | None = None,
    divergence_fn: Divergence = generalized_js_loss,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """General online logit distillation (GOLD, Hugging Face 2025, "Unlocking On-Policy Distillation for Any
    Model Family"), the hybrid loss: a divergence over the tokens that both vocabularies have, and `uld_loss`
    over those that only one of them has.

        w D(p_T, p_S on matched tokens) + (1 - w) sum_i |p_S,(i) - p_T,(i)| on the others

    Neither part is normalized to 1, as in TRL's `GOLDTrainer`, so that the divergence of a part may be
    negative. With one vocabulary it is the divergence itself. Where only one side has tokens of its own their
    mass counts; TRL leaves the second part out there.

    Args:
      student_ids: of the matched tokens, in [0, V), each once.
      teacher_ids: of the same tokens, in the same order, in [0, W).
      matched_weight: w in [0, 1]; None for the share of the teacher's tokens that are matched, M / W.
      divergence_fn: D, of `losses.distillation`.

    Raises:
      UserError: no token is matched.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "gold_loss",
        student_logp=(student_logp, "B T V"),
        teacher_logp=(teacher_logp, "B T W"),
        mask=(mask, "B T"),
    )
    if not len(student_ids):
        raise UserError("gold_loss: the vocabularies have no token in common: take uld_loss")
    shared = {"reduce": reduce, "denominator": denominator}
    sides = (student_logp, student_ids), (teacher_logp, teacher_ids)
    matched, _ = divergence_fn(*(logp[..., ids] for logp, ids in sides), mask, **shared)
    own, theirs = (logp[..., np.setdiff1d(np.arange(logp.shape[-1]), ids)] for logp, ids in sides)
    unmatched, _ = uld_loss(own, theirs, mask, **shared)
    weight = len(teacher_ids) / teacher_logp.shape[-1] if matched_weight is None else matched_weight
    loss = weight * matched + (1 - weight) * unmatched
    metrics = {"loss": loss, "matched_loss": matched, "unmatched_loss": unmatched}
    return loss, jax.lax.stop_gradient(metrics)
