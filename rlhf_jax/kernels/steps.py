"""Steps of answers: where they end, and advantages from a reward for each of them (process supervision)."""

import jax.numpy as jnp
from jax import lax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.kernels.advantages import ScaleFn, group_relative_advantages, group_std
from rlhf_jax.kernels.prepare import cleaned_constant


def step_ends(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    closing: Bool[Array, " V"],
    blank: Bool[Array, " V"],
) -> Bool[Array, "B T"]:
    """Mask of the last token of each step.

    A step is closed by a token of `closing`, and holds a token that is not `blank`: an empty line is no step,
    and earns nothing. What an answer that was cut leaves open is no step either.

    Args:
      tokens: of whole rows.
      mask: tokens of the answers.
      closing: of the vocabulary, tokens that close a step, such as those that end in a new line.
      blank: of the vocabulary, tokens without content, such as whitespace and what ends the answer.
    """
    tokens, mask, closing, blank = check_shapes(
        "step_ends", tokens=(tokens, "B T"), mask=(mask, "B T"), closing=(closing, "V"), blank=(blank, "V")
    )
    closes = closing[tokens] & mask
    content = jnp.cumsum(~blank[tokens] & mask, axis=1)
    closed = lax.cummax(jnp.where(closes, content, 0), axis=1)
    before = jnp.pad(closed[:, :-1], ((0, 0), (1, 0)))
    return closes & (content > before)


def process_supervision_advantages(
    rewards: Float[Array, "B T"],
    ends: Bool[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    group_size: int,
    scale_fn: ScaleFn = group_std,
) -> Float[Array, "B T"]:
    """Advantages of GRPO with process supervision (DeepSeekMath, Shao et al. 2024, section 4.1.3).

        A_t = sum_{steps j that end at t or later} (r_j - mean(R)) / std(R)

    R are the rewards of all steps of all answers of a group, however many each of them has.

    Args:
      rewards: of each step, at its last token; the other entries may hold anything.
      ends: the last token of each step.
      mask: tokens that count; a step that ends in another one does not count.
      group_size: answers to each prompt, in rows that stand together.
      scale_fn: as of `group_relative_advantages`.

    Returns:
      Advantages, 0 where masked; no gradient.
    """
    rewards, ends, mask = check_shapes(
        "process_supervision_advantages", rewards=(rewards, "B T"), ends=(ends, "B T"), mask=(mask, "B T")
    )
    ends = ends & mask
    groups = (-1, group_size * mask.shape[1])
    flat = cleaned_constant(rewards, ends).reshape(groups)
    normalized = group_relative_advantages(flat, ends.reshape(groups), scale_fn=scale_fn).reshape(mask.shape)
    return clean(jnp.flip(jnp.cumsum(jnp.flip(normalized, axis=1), axis=1), axis=1), mask)
