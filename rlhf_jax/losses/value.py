"""Losses of value functions: scalar, expectile, quantile, categorical, conservative.

All take `(prediction, ..., target, mask, *, reduce=, denominator=)` and return `(loss, metrics)`. Targets
carry no gradient; masked entries may hold anything. Computation is in at least float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, cleaned_constant, full_precision
from rlhf_jax.losses.reductions import Reduction, token_mean


def _reduced(
    per_step: dict[str, Array], mask: Bool[Array, "B T"], reduce: Reduction, denominator: Scalar | None
) -> tuple[Float[Array, ""], Metrics]:
    """`per_step["value_loss"]` as the loss, and all of them as metrics, reduced alike."""
    loss = reduce(per_step["value_loss"], mask, denominator=denominator)
    metrics = {name: reduce(x, mask, denominator=denominator) for name, x in per_step.items()}
    return loss, lax.stop_gradient(metrics)


def squared_value_loss(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Squared error: loss_t = (V_t - R_t)^2 / 2.

    Args:
      values: V of the value function in training.
      returns: targets R, in units of reward.
      mask: steps that count.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_error` (mean of V - R), `value_mean`.
    """
    values, returns, mask = check_shapes(
        "squared_value_loss", values=(values, "B T"), returns=(returns, "B T"), mask=(mask, "B T")
    )
    values, returns = cleaned(values, mask), cleaned_constant(returns, mask)
    error = values - returns
    per_step = {"value_loss": 0.5 * jnp.square(error), "value_error": error, "value_mean": values}
    return _reduced(per_step, mask, reduce, denominator)


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip: Scalar = 0.2,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped value loss, of its authors' code rather than of the paper.

        V^clip_t = clip(V_t, V^old_t - clip, V^old_t + clip)
        loss_t   = max((V_t - R_t)^2, (V^clip_t - R_t)^2) / 2

    Args:
      values: V of the value function in training.
      old_values: V at the start of the update.
      returns: targets R, in units of reward.
      mask: steps that count.
      clip: how far a value may move in one update, in units of reward; `jnp.inf` for no clipping.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_clip_fraction`, `value_error` (mean of V - R), `value_mean`.
    """
    values, old_values, returns, mask = check_shapes(
        "clipped_value_loss",
        values=(values, "B T"),
        old_values=(old_values, "B T"),
        returns=(returns, "B T"),
        mask=(mask, "B T"),
    )
    values = cleaned(values, mask)
    old_values, returns = cleaned_constant(old_values, mask), cleaned_constant(returns, mask)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    plain_error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    per_step = {
        "value_loss": 0.5 * jnp.maximum(plain_error, clipped_error),
        "value_clip_fraction": (clipped_error > plain_error).astype(values.dtype),
        "value_error": values - returns,
        "value_mean": values,
    }
    return _reduced(per_step, mask, reduce, denominator)


def huber(errors: Float[Array, "..."], delta: Scalar) -> Float[Array, "..."]:
    """x^2 / 2 within delta, delta (|x| - delta / 2) beyond (Huber 1964); gradient clip(x, -delta, delta)."""
    size = jnp.abs(errors)
    inside = jnp.minimum(size, delta)
    return 0.5 * jnp.square(inside) + delta * (size - inside)


def rescale_values(values: Float[Array, "..."], *, epsilon: float = 1e-3) -> Float[Array, "..."]:
    """Rescaled values (Pohlen et al. 2018), small where returns are large: sums of rewards need no clipping.

    h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x
    """
    return jnp.sign(values) * (jnp.sqrt(jnp.abs(values) + 1) - 1) + epsilon * values


def unrescale_values(values: Float[Array, "..."], *, epsilon: float = 1e-3) -> Float[Array, "..."]:
    """The inverse of `rescale_values`.

        h^-1(x) = sign(x) (((sqrt(1 + 4 epsilon (|x| + 1 + epsilon)) - 1) / (2 epsilon))^2 - 1)

    The difference of the root and 1 is computed as a quotient, which does not cancel for small x.
    """
    size = jnp.abs(values) + 1 + epsilon
    root = 2 * size / (jnp.sqrt(1 + 4 * epsilon * size) + 1)
    return jnp.sign(values) * (jnp.square(root) - 1)


def huber_value_loss(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    delta: Scalar = 1.0,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Huber's loss of V_t - R_t: quadratic within `delta`, linear beyond.

    Args:
      values: V of the value function in training.
      returns: targets R, in units of reward.
      mask: steps that count.
      delta: where the loss turns linear, in units of reward, > 0.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_error` (mean of V - R), `value_mean`.
    """
    values, returns, mask = check_shapes(
        "huber_value_loss", values=(values, "B T"), returns=(returns, "B T"), mask=(mask, "B T")
    )
    values, returns = cleaned(values, mask), cleaned_constant(returns, mask)
    error = values - returns
    per_step = {"value_loss": huber(error, delta), "value_error": error, "value_mean": values}
    return _reduced(per_step, mask, reduce, denominator)


def expectile_value_loss(
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    expectile: Scalar = 0.7,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Expectile regression (implicit Q-learning, Kostrikov et al. 2022, eq. 5).

        loss_t = |tau - [R_t < V_t]| (R_t - V_t)^2

    tau = 1/2 is `squared_value_loss`. With R = Q(s, a) for the actions of a log, V(s) goes from their mean
    (tau = 1/2) towards the best of them (tau -> 1), and no other action is ever looked at.

    Args:
      values: V of the value function in training.
      returns: targets R, in units of reward.
      mask: steps that count.
      expectile: tau, in (0, 1).
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_error` (mean of V - R), `value_mean`.
    """
    values, returns, mask = check_shapes(
        "expectile_value_loss", values=(values, "B T"), returns=(returns, "B T"), mask=(mask, "B T")
    )
    values, returns = cleaned(values, mask), cleaned_constant(returns, mask)
    error = values - returns
    weight = jnp.where(error > 0, 1 - expectile, expectile)
    per_step = {"value_loss": weight * jnp.square(error), "value_error": error, "value_mean": values}
    return _reduced(per_step, mask, reduce, denominator)


def conservative_penalty(
    action_values: Float[Array, "B T A"],
    actions: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Conservative Q-learning's regularizer, CQL(H) (Kumar et al. 2020, eq. 4).

        penalty_t = log sum_a exp Q(s_t, a) - Q(s_t, a_t)

    It keeps the values of actions that a log lacks low. It is the cross-entropy of the actions taken under
    softmax(Q); add it, times a weight, to any loss of Q(s_t, a_t).

    Args:
      action_values: Q of every action, in units of reward.
      actions: those taken in the log.
      mask: steps that count.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (penalty, metrics): `conservative_penalty`.
    """
    action_values, actions, mask = check_shapes(
        "conservative_penalty",
        action_values=(action_values, "B T A"),
        actions=(actions, "B T"),
        mask=(mask, "B T"),
    )
    action_values = cleaned(action_values, mask)
    taken = jnp.arange(action_values.shape[-1]) == actions[..., None]
    # A comparison rather than a gather: its gradient is no scatter, which CPUs and TPUs are slow at.
    penalties = -jnp.sum(jnp.where(taken, jax.nn.log_softmax(action_values), 0), axis=-1)
    penalty = reduce(penalties, mask, denominator=denominator)
    return penalty, {"conservative_penalty": lax.stop_gradient(penalty)}


def quantile_value_loss(
    quantiles: Float[Array, "B T N"],
    targets: Float[Array, "B T M"],
    mask: Bool[Array, "B T"],
    *,
    levels: Float[Array, "B T N"] | None = None,
    delta: Scalar = 1.0,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Quantile Huber loss (QR-DQN, Dabney et al. 2018, eq. 10; IQN, Dabney et al. 2018b, eq. 3).

        loss_t = sum_i mean_j |tau_i - [u_ij < 0]| huber(u_ij),  u_ij = target_j - quantile_i
        tau_i  = (i + 1/2) / N, or as given

    Args:
      quantiles: predicted values at the N levels tau_i.
      targets: M samples (or quantiles) of the return; M = 1 for plain returns.
      mask: steps that count.
      levels: tau_i of each step, in (0, 1), such as random ones; None for the midpoints.
      delta: where the loss turns linear, in units of reward, > 0.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_error` (mean of prediction - target), `value_mean`.
    """
    quantiles, targets, mask, levels = check_shapes(
        "quantile_value_loss",
        quantiles=(quantiles, "B T N"),
        targets=(targets, "B T M"),
        mask=(mask, "B T"),
        levels=(levels, "B T N"),
    )
    quantiles, targets = cleaned(quantiles, mask), cleaned_constant(targets, mask)
    levels = midpoints(quantiles.shape[-1]) if levels is None else cleaned_constant(levels, mask)
    errors = targets[..., None, :] - quantiles[..., :, None]
    tilt = jnp.abs(levels[..., :, None] - (errors < 0))
    mean = jnp.mean(quantiles, axis=-1)
    per_step = {
        "value_loss": jnp.sum(jnp.mean(tilt * huber(errors, delta), axis=-1), axis=-1),
        "value_error": mean - jnp.mean(targets, axis=-1),
        "value_mean": mean,
    }
    return _reduced(per_step, mask, reduce, denominator)


def midpoints(count: int) -> Float[Array, " N"]:
    """Levels (i + 1/2) / N of N quantiles of equal mass."""
    return (jnp.arange(count) + 0.5) / count


def project_categorical(
    positions: Float[Array, "... M"], probs: Float[Array, "... M"], atoms: Float[Array, " N"]
) -> Float[Array, "... N"]:
    """Projects a distribution onto fixed, evenly spaced atoms (C51, Bellemare et al. 2017, eq. 7).

    Each position's mass is shared between its two neighbours in proportion to nearness; positions beyond
    the ends go to the ends. The mean is kept within the support. Shift and scale the atoms for the
    Bellman update: positions = r + gamma atoms.

    Args:
      positions: where the mass lies; M = 1 with probability 1 gives the two-hot code of a return.
      probs: mass of each position.
      atoms: ascending, evenly spaced.
    """
    positions, probs, atoms = check_shapes(
        "project_categorical", positions=(positions, "*S M"), probs=(probs, "*S M"), atoms=(atoms, "N")
    )
    positions, probs, atoms = map(full_precision, (positions, probs, atoms))
    spacing = (atoms[-1] - atoms[0]) / (atoms.shape[0] - 1)
    clipped = jnp.clip(positions, atoms[0], atoms[-1])
    share = jnp.clip(1 - jnp.abs(clipped[..., None] - atoms) / spacing, 0, 1)
    return jnp.sum(probs[..., None] * share, axis=-2)


def gaussian_histogram(
    returns: Float[Array, "..."], edges: Float[Array, " N_plus_1"], *, sigma: Scalar
) -> Float[Array, "... N"]:
    """Mass of a normal around each return in each bin (HL-Gauss, Farebrother et al. 2024, section 3.1).

        p_i proportional to Phi((e_{i+1} - y) / sigma) - Phi((e_i - y) / sigma)

    Args:
      returns: y; taken to the nearest end where it lies outside the edges.
      edges: N + 1 ascending bin edges, in units of reward.
      sigma: of the normal; three quarters of a bin's width in the paper.
    """
    returns, edges = check_shapes("gaussian_histogram", returns=(returns, "*S"), edges=(edges, "N_plus_1"))
    inside = jnp.clip(full_precision(returns), edges[0], edges[-1])
    below = jax.scipy.special.ndtr((edges - inside[..., None]) / sigma)
    return jnp.diff(below) / (below[..., -1:] - below[..., :1])


def categorical_value_loss(
    logits: Float[Array, "B T N"],
    target_probs: Float[Array, "B T N"],
    atoms: Float[Array, " N"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduction = token_mean,
    denominator: Scalar | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy to a categorical target: loss_t = -sum_i p_i log softmax(logits)_i.

    With `project_categorical` targets it is C51 (Bellemare et al. 2017, Algorithm 1); with
    `gaussian_histogram` targets HL-Gauss (Imani & White 2018), whose atoms are the centres of the bins.

    Args:
      logits: of the categorical value distribution.
      target_probs: sum to 1 over the last axis.
      atoms: the value of each category, for the metrics.
      mask: steps that count.
      reduce: how steps become one number.
      denominator: of the whole batch, when this is a part of it.

    Returns:
      (loss, metrics): `value_loss`, `value_error` (mean of prediction - target), `value_mean`.
    """
    logits, target_probs, atoms, mask = check_shapes(
        "categorical_value_loss",
        logits=(logits, "B T N"),
        target_probs=(target_probs, "B T N"),
        atoms=(atoms, "N"),
        mask=(mask, "B T"),
    )
    logits, target_probs = cleaned(logits, mask), cleaned_constant(target_probs, mask)
    mean = jnp.sum(jax.nn.softmax(logits) * atoms, axis=-1)
    per_step = {
        "value_loss": -jnp.sum(target_probs * jax.nn.log_softmax(logits), axis=-1),
        "value_error": mean - jnp.sum(target_probs * atoms, axis=-1),
        "value_mean": mean,
    }
    return _reduced(per_step, mask, reduce, denominator)
