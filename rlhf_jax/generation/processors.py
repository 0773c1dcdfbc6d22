"""Logits processors, applied before a token is drawn: pure functions `(logits [B, V], ...) -> logits`.

Each takes the logits as the one before it left them, so that a filter sees the distribution that the filters
before it made. A token that may not be drawn has the logit -inf; a filter leaves at least one token.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar


@pytree_dataclass
class Context:
    """Prompt and completion of each row so far, and the states of its automata.

    Attributes:
      tokens: the prompt in the first P columns, then what was generated.
      prompt: where in them there is a prompt.
      length: number of generated tokens.
      constraint: state of the automaton that says what may come next, where there is one.
      stop: state of the automaton that looks for stop strings, where there is one.
    """

    tokens: Int[Array, "B S"]
    prompt: Bool[Array, "B P"]
    length: Int[Array, "B"]
    constraint: Int[Array, "B"] | None = None
    stop: Int[Array, "B"] | None = None

    def generated(self) -> Bool[Array, "B S"]:
        """Mask of generated tokens."""
        place = jnp.arange(self.tokens.shape[1]) - self.prompt.shape[1]
        return (place >= 0) & (place < self.length[:, None])


# Filters -------------------------------------------------------------------------------------------


def _keep(
    logits: Float[Array, "B V"], order: Int[Array, "B V"], kept: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Logits of the kept ones among tokens that stand in `order`; the first always stays."""
    rows = jnp.arange(logits.shape[0])[:, None]
    kept = jnp.zeros_like(kept).at[rows, order].set(kept.at[:, 0].set(True))
    return jnp.where(kept, logits, -jnp.inf)


def _ordered(logits: Float[Array, "B V"]) -> tuple[Int[Array, "B V"], Float[Array, "B V"]]:
    """Tokens from the most likely down, and their probabilities; of equals the smaller id comes first."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    return order, jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)


def _mass_before(probs: Float[Array, "B V"]) -> Float[Array, "B V"]:
    return jnp.cumsum(probs, axis=-1) - probs


def top_k(logits: Float[Array, "B V"], k: Int[Array, ""] | int) -> Float[Array, "B V"]:
    """Keeps the k most likely tokens (Fan et al. 2018); of equally likely ones the smaller ids."""
    order, _ = _ordered(logits)
    return _keep(logits, order, jnp.broadcast_to(jnp.arange(logits.shape[-1]) < k, logits.shape))


def top_p(logits: Float[Array, "B V"], p: Scalar) -> Float[Array, "B V"]:
    """Keeps the fewest most likely tokens whose probability reaches p (Holtzman et al. 2020)."""
    order, probs = _ordered(logits)
    return _keep(logits, order, _mass_before(probs) < p)


def min_p(logits: Float[Array, "B V"], p: Scalar) -> Float[Array, "B V"]:
    """Keeps tokens at least p times as likely as the most likely one (Nguyen et al. 2024)."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= best + jnp.log(jnp.minimum(p, 1.0)), logits, -jnp.inf)


def typical_p(logits: Float[Array, "B V"], p: Scalar) -> Float[Array, "B V"]:
    """Keeps the tokens whose surprise is nearest to the entropy, until they reach mass p
    (locally typical sampling, Meister et al. 2023).
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logp)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * logp, 0), axis=-1, keepdims=True)
    order = jnp.argsort(jnp.abs(-logp - entropy), axis=-1, stable=True)
    return _keep(logits, order, _mass_before(jnp.take_along_axis(probs, order, axis=-1)) < p)


# Penalties -----------------------------------------------------------------------------------------


def _counts(tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], vocab_size: int) -> Int[Array, "B V"]:
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), jnp.int32).at[rows, tokens].add(mask)


def repetition_penalty(logits: Float[Array, "B V"], context: Context, penalty: Scalar) -> Float[Array, "B V"]:
    """Divides positive logits of tokens that the prompt or the answer holds by `penalty`, and multiplies
    negative ones (Keskar et al. 2019).
    """
    width = context.tokens.shape[1] - context.prompt.shape[1]
    seen = jnp.pad(context.prompt, ((0, 0), (0, width))) | context.generated()
    seen = _counts(context.tokens, seen, logits.shape[-1]) > 0
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def frequency_penalty(logits: Float[Array, "B V"], context: Context, penalty: Scalar) -> Float[Array, "B V"]:
    """Takes `penalty` nats from a token for every time that the answer holds it."""
    return logits - penalty * _counts(context.tokens, context.generated(), logits.shape[-1])


def presence_penalty(logits: Float[Array, "B V"], context: Context, penalty: Scalar) -> Float[Array, "B V"]:
    """Takes `penalty` nats from every token that the answer holds."""
    return logits - penalty * (_counts(context.tokens, context.generated(), logits.shape[-1]) > 0)


# Rules ---------------------------------------------------------------------------------------------


def token_bias(
    vocab_size: int, biases: dict[int, float] | None = None, *, banned: tuple[int, ...] = ()
) -> Float[Array, "V"]:
    """Logit bias of each token: `biases` by id, -inf for `banned` ids."""
    bias = jnp.zeros(vocab_size)
    for token, value in {**(biases or {}), **dict.fromkeys(banned, -jnp.inf)}.items():
        bias = bias.at[token].set(value)
    return bias


def forced_tokens(
    logits: Float[Array, "B V"], context: Context, forced: Int[Array, "F"]
) -> Float[Array, "B V"]:
    """Leaves only `forced[t]` as the t-th generated token; -1 leaves a place free, as are those after F."""
    token = jnp.take(forced, context.length, mode="fill", fill_value=-1)[:, None]
    chosen = jnp.arange(logits.shape[-1]) == token
    return jnp.where(token < 0, logits, jnp.where(chosen, 0, -jnp.inf))


def min_new_tokens(
    logits: Float[Array, "B V"], context: Context, least: Int[Array, ""] | int, *, eos_id: int
) -> Float[Array, "B V"]:
    """Keeps an answer from ending before it has `least` tokens, the end-of-sequence token not counted."""
    too_short = (context.length < least)[:, None]
    return jnp.where(too_short & (jnp.arange(logits.shape[-1]) == eos_id), -jnp.inf, logits)
