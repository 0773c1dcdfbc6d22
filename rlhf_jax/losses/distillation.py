"""Distillation: divergences between a teacher's and a student's next-token distributions.

Shared arguments, beside those of each function:

  student_logp, teacher_logp: log-probabilities in nats, normalized over the last axis (use a log-softmax
    at the temperature wanted). The teacher's carry no gradient. -inf, a token that a truncated
    distribution rules out, counts as -1e4, so that every divergence stays finite.
  mask: tokens that count; the others may hold NaN.
  reduce: how tokens become one number (`token_mean` by default).
  denominator: replaces the reduction's own, for micro-batches and shards.

The forms of the literature, by composition: over the whole vocabulary, pass [B, T, V]; over the top k, pass
what `top_k_distributions` returns; on sampled tokens and whole sequences, the functions on [B, T] below.
At a temperature, pass what `at_temperature` returns, and mix in hard labels with `with_hard_labels`.
Sequence-level distillation on the teacher's own outputs (Kim and Rush 2016) is `cross_entropy_loss` on them.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, cleaned_constant, full_precision
from rlhf_jax.losses.reductions import Reduction, token_mean

Divergence = Callable[..., tuple[Float[Array, ""], Metrics]]
"""`divergence(student_logp, teacher_logp, mask, reduce=, denominator=) -> (loss, metrics)`."""
Average = Literal["probabilities", "log_probabilities"]
"""Of what several teachers' mean is taken."""


def prepared_pair(
    student_logp: Float[Array, "B T *V"], teacher_logp: Float[Array, "B T *W"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T *V"], Float[Array, "B T *W"]]:
    """Student and teacher in full precision, 0 where masked, at least -1e4; the teacher without gradient."""
    student = jnp.maximum(cleaned(student_logp, mask), -1e4)
    return student, jnp.maximum(cleaned_constant(teacher_logp, mask), -1e4)


def _reduced(
    values: Float[Array, "B T"], mask: Bool[Array, "B T"], reduce: Reduction, denominator: Scalar | None
) -> tuple[Float[Array, ""], Metrics]:
    loss = reduce(values, mask, denominator=denominator)
    return loss, {"loss": jax.lax.stop_gradient(loss)}


def _kl(logp: Float[Array, "... V"], other: Float[Array, "... V"]) -> Float[Array, "..."]:
    return jnp.sum(jnp.exp(logp) * (logp - other), axis=-1)


def forward_kl_loss(
    student_logp: Float[Array, "B T V"],
    teacher_logp: Float[Array, "B T V"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """KL(teacher || student) per token (Hinton et al. 2015): the student covers what the teacher does.

    sum_v p_T(v) [log p_T(v) - log p_S(v)]
    """
    student_logp, teacher_logp, mask = check_shapes(
        "forward_kl_loss",
        student_logp=(student_logp, "B T V"),
        teacher_logp=(teacher_logp, "B T V"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    return _reduced(_kl(teacher, student), mask, reduce, denominator)


def reverse_kl_loss(
    student_logp: Float[Array, "B T V"],
    teacher_logp: Float[Array, "B T V"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """KL(student || teacher) per token: the student keeps to what the teacher finds likely.

    sum_v p_S(v) [log p_S(v) - log p_T(v)]
    """
    student_logp, teacher_logp, mask = check_shapes(
        "reverse_kl_loss",
        student_logp=(student_logp, "B T V"),
        teacher_logp=(teacher_logp, "B T V"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    return _reduced(_kl(student, teacher), mask, reduce, denominator)


def generalized_js_loss(
    student_logp: Float[Array, "B T V"],
    teacher_logp: Float[Array, "B T V"],
    mask: Bool[Array, "B T"],
    *,
    beta: Scalar = 0.5,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Generalized Jensen-Shannon divergence per token (GKD, Agarwal et al. 2024, eq. 1).

        b KL(p_T || m) + (1 - b) KL(p_S || m),    m = b p_T + (1 - b) p_S

    As b -> 0, the divergence over b tends to forward KL; as b -> 1, over 1 - b, to reverse KL. At the ends
    themselves it is 0, as in the paper; TRL switches to the two KLs there, for which there are functions.

    Args:
      beta: weight b of the teacher, in (0, 1); may be traced.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "generalized_js_loss",
        student_logp=(student_logp, "B T V"),
        teacher_logp=(teacher_logp, "B T V"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    weight = jnp.asarray(beta, student.dtype)
    mixture = jnp.logaddexp(jnp.log(weight) + teacher, jnp.log1p(-weight) + student)
    divergence = weight * _kl(teacher, mixture) + (1 - weight) * _kl(student, mixture)
    return _reduced(divergence, mask, reduce, denominator)


def top_k_distributions(
    student_logp: Float[Array, "B T K"],
    teacher_logp: Float[Array, "B T K"],
    mask: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T K+1"], Float[Array, "B T K+1"]]:
    """Student and teacher on K tokens and one more outcome, the tail: "any other token".

        (p(v_1), ..., p(v_K), 1 - sum_k p(v_k))

    Both stay distributions, so every divergence above applies; by merging outcomes it becomes a lower
    bound of the one over the vocabulary, and is 0 only where the two agree on the K tokens.

    Args:
      student_logp: log-probabilities of K distinct tokens, *not* renormalized.
      teacher_logp: the teacher's of the same tokens, usually its K likeliest.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "top_k_distributions",
        student_logp=(student_logp, "B T K"),
        teacher_logp=(teacher_logp, "B T K"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    return _with_tail(student), _with_tail(teacher)


def top_k_kl(
    student_logp: Float[Array, "B T K"], teacher_logp: Float[Array, "B T K"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Reverse KL of `top_k_distributions` at each place, in nats: sum_k p_S(k) log(p_S(k) / p_T(k)).

    Exact where the K tokens are the vocabulary, else a lower bound of KL(student || teacher). Its gradient is
    that of the KL of the next token, with what stands before it as it is.

    Args:
      student_logp: log-probabilities of K distinct tokens, *not* renormalized.
      teacher_logp: the teacher's of the same tokens.
    """
    student, teacher = top_k_distributions(student_logp, teacher_logp, mask)
    return _kl(student, teacher)


def _with_tail(logp: Float[Array, "B T K"]) -> Float[Array, "B T K+1"]:
    total = jax.scipy.special.logsumexp(logp, axis=-1, keepdims=True)
    # Rounding may sum the K to 1 or more; the rest then has the least mass that tells the total from 1.
    total = jnp.minimum(total, -jnp.finfo(logp.dtype).eps)
    return jnp.concatenate([logp, jnp.log(-jnp.expm1(total))], axis=-1)


def sampled_forward_kl_loss(
    student_logp: Float[Array, "B T"],
    teacher_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Forward KL estimated on tokens sampled from the *teacher*: unbiased in value and gradient.

        log p_T(y_t) - log p_S(y_t)

    Args:
      student_logp: log-probability of each sampled token, in nats.
      teacher_logp: the teacher's.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "sampled_forward_kl_loss",
        student_logp=(student_logp, "B T"),
        teacher_logp=(teacher_logp, "B T"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    return _reduced(teacher - student, mask, reduce, denominator)


def sampled_reverse_kl_loss(
    student_logp: Float[Array, "B T"],
    teacher_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Reverse KL of each token estimated on tokens sampled from the *student* (on-policy distillation).

        value: log p_S(y_t) - log p_T(y_t) = k_t;    gradient: k_t d log p_S(y_t)

    Both unbiased for the KL at each visited prefix. Differentiating the value would give d log p_S, whose
    mean is 0.

    Args:
      student_logp: log-probability of each sampled token, in nats.
      teacher_logp: the teacher's.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "sampled_reverse_kl_loss",
        student_logp=(student_logp, "B T"),
        teacher_logp=(teacher_logp, "B T"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    log_ratio = jax.lax.stop_gradient(student - teacher)
    surrogate = log_ratio * (student - jax.lax.stop_gradient(student))
    return _reduced(log_ratio + surrogate, mask, reduce, denominator)


def sequence_reverse_kl_loss(
    student_logp: Float[Array, "B T"],
    teacher_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Reverse KL of whole sequences sampled from the *student* (MiniLLM, Gu et al. 2024, policy gradient).

        value: sum_t k_t;    gradient: sum_t (sum_{u >= t} k_u) d log p_S(y_t);    k_t = log p_S - log p_T

    Beside `sampled_reverse_kl_loss`, a token answers for where it leads. Under `constant_length(1)` value
    and gradient are unbiased for the KL between the distributions of sequences.

    Args:
      student_logp: log-probability of each sampled token, in nats.
      teacher_logp: the teacher's.
    """
    student_logp, teacher_logp, mask = check_shapes(
        "sequence_reverse_kl_loss",
        student_logp=(student_logp, "B T"),
        teacher_logp=(teacher_logp, "B T"),
        mask=(mask, "B T"),
    )
    student, teacher = prepared_pair(student_logp, teacher_logp, mask)
    log_ratio = jax.lax.stop_gradient(student - teacher)
    to_go = jnp.cumsum(log_ratio[:, ::-1], axis=1)[:, ::-1]
    surrogate = to_go * (student - jax.lax.stop_gradient(student))
    return _reduced(log_ratio + surrogate, mask, reduce, denominator)


# Temperature and hard labels -------------------------------------------------------------------------


def at_temperature(
    logp: Float[Array, "B T V"], mask: Bool[Array, "B T"], *, temperature: Scalar
) -> Float[Array, "B T V"]:
    """Softmax with temperature (Hinton et al. 2015, eq. 1): log softmax(z / T) from log softmax(z).

    The logits are known but for a constant, which the softmax takes away. Over the whole vocabulary only:
    what is left out of a top k has no temperature of its own.

    Args:
      logp: log-probabilities at temperature 1.
      temperature: T > 0; may be traced.
    """
    return jax.nn.log_softmax(cleaned(logp, mask) / temperature, axis=-1)


def mean_of_teachers(
    teacher_logp: Float[Array, "N B T *V"],
    *,
    weights: Float[Array, " N"] | None = None,
    average: Average = "probabilities",
) -> Float[Array, "B T *V"]:
    """Ensemble of N teachers: the weighted mean of their probabilities, or of their log-probabilities.

        log sum_n w_n p_n(v)    or    log softmax_v(sum_n w_n log p_n(v))

    Args:
      teacher_logp: over the whole vocabulary; of sampled tokens alone, only probabilities can be averaged.
      weights: of the teachers, normalized here; None for equal ones.

    Raises:
      UserError: log-probabilities of sampled tokens alone.
    """
    count = teacher_logp.shape[0]
    weights = jnp.ones(count) if weights is None else jnp.asarray(weights)
    weights = (weights / jnp.sum(weights)).reshape(count, *(1,) * (teacher_logp.ndim - 1))
    if average == "probabilities":
        return jax.nn.logsumexp(full_precision(teacher_logp), axis=0, b=weights)
    if teacher_logp.ndim < 4:
        raise UserError(
            "mean_of_teachers: a mean of log-probabilities needs the whole vocabulary: average probabilities"
        )
    return jax.nn.log_softmax(jnp.sum(weights * full_precision(teacher_logp), axis=0), axis=-1)


def with_hard_labels(
    soft_loss: Float[Array, ""],
    token_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: Scalar = 1.0,
    hard_label_weight: Scalar = 0.0,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Knowledge distillation objective (Hinton et al. 2015, sec. 2): soft and hard labels, averaged.

        (1 - w) T^2 D(p_T, p_S at temperature T) + w CE(labels, p_S at temperature 1)

    Gradients of the soft part shrink as 1 / T^2; the factor keeps both parts' shares when T changes.

    Args:
      soft_loss: D, reduced as the hard part is.
      token_logp: the student's log-probability of each label, in nats, at temperature 1.
      temperature: T, at which `soft_loss` was computed.
      hard_label_weight: w in [0, 1]; at 0 the labels count for nothing.
    """
    token_logp, mask = check_shapes("with_hard_labels", token_logp=(token_logp, "B T"), mask=(mask, "B T"))
    hard_loss = reduce(-cleaned(token_logp, mask), mask, denominator=denominator)
    loss = (1 - hard_label_weight) * temperature**2 * soft_loss + hard_label_weight * hard_loss
    metrics = {"loss": loss, "soft_loss": soft_loss, "hard_loss": hard_loss}
    return loss, jax.lax.stop_gradient(metrics)
