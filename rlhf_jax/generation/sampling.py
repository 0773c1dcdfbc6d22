"""From logits to the next token, with the log-probs that training needs."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Key, PRNGKeyArray, Scalar
from rlhf_jax.generation import processors
from rlhf_jax.generation.automata import Automaton, allowed_tokens
from rlhf_jax.generation.processors import Context


@pytree_dataclass
class Sampling:
    """Sampling parameters. Every field may be traced; `None` turns a rule off.

    They are applied in this order: penalties, bias, minimum length, forced tokens, constraint; temperature;
    top-k, top-p, min-p, typical (see `generation.processors` for each).

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens.
      top_p: keep the fewest most likely tokens whose probability reaches p.
      min_p: keep tokens at least p times as likely as the most likely one.
      typical_p: keep the most typical tokens, until they reach mass p.
      repetition_penalty: divides positive logits of tokens already seen, multiplies negative ones.
      frequency_penalty: nats for every time that the answer holds a token.
      presence_penalty: nats if the answer holds a token.
      bias: added to the logits (`processors.token_bias`); -inf bans a token.
      min_new_tokens: tokens before an answer may end.
      forced_tokens: what an answer begins with; -1 leaves a place free.
      constraint: what texts may look like (`automata.regex_automaton`, `automata.json_automaton`).
      stop: ends an answer in its final states (`automata.stop_automaton`).
    """

    temperature: Scalar = 1.0
    top_k: Int[Array, ""] | int | None = None
    top_p: Scalar | None = None
    min_p: Scalar | None = None
    typical_p: Scalar | None = None
    repetition_penalty: Scalar | None = None
    frequency_penalty: Scalar | None = None
    presence_penalty: Scalar | None = None
    bias: Float[Array, "V"] | None = None
    min_new_tokens: Int[Array, ""] | int | None = None
    forced_tokens: Int[Array, "F"] | None = None
    constraint: Automaton | None = None
    stop: Automaton | None = None


def process_logits(
    logits: Float[Array, "B V"], sampling: Sampling, context: Context, *, eos_id: int
) -> Float[Array, "B V"]:
    """Logits of the distribution that `sampling` draws from, or at temperature 0 takes the best of.

    Args:
      eos_id: the token that ends an answer; it is all that is left where the rules forbid every token.
    """
    if sampling.repetition_penalty is not None:
        logits = processors.repetition_penalty(logits, context, sampling.repetition_penalty)
    if sampling.frequency_penalty is not None:
        logits = processors.frequency_penalty(logits, context, sampling.frequency_penalty)
    if sampling.presence_penalty is not None:
        logits = processors.presence_penalty(logits, context, sampling.presence_penalty)
    if sampling.bias is not None:
        logits = logits + sampling.bias
    if sampling.min_new_tokens is not None:
        logits = processors.min_new_tokens(logits, context, sampling.min_new_tokens, eos_id=eos_id)
    if sampling.forced_tokens is not None:
        logits = processors.forced_tokens(logits, context, sampling.forced_tokens)
    if sampling.constraint is not None and context.constraint is not None:
        allowed = allowed_tokens(sampling.constraint, context.constraint, eos_id=eos_id)
        # A vocabulary may be padded beyond the tokenizer's: no text has those ids.
        padding = logits.shape[-1] - allowed.shape[-1]
        logits = jnp.where(jnp.pad(allowed, ((0, 0), (0, padding))), logits, -jnp.inf)
    rules = (sampling.bias, sampling.min_new_tokens, sampling.forced_tokens, sampling.constraint)
    if any(rule is not None for rule in rules):
        stuck = jnp.all(logits == -jnp.inf, axis=-1, keepdims=True)
        logits = jnp.where(stuck & (jnp.arange(logits.shape[-1]) == eos_id), 0, logits)
    logits = logits / _divisor(logits, sampling)
    if sampling.top_k is not None:
        logits = processors.top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = processors.top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = processors.min_p(logits, sampling.min_p)
    if sampling.typical_p is not None:
        logits = processors.typical_p(logits, sampling.typical_p)
    return logits


def _divisor(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, ""]:
    temperature = jnp.asarray(sampling.temperature, logits.dtype)
    return jnp.where(temperature > 0, temperature, 1)


def full_logp(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """The model's own log-probs at the sampling temperature (at temperature 0: at 1), whatever the rules."""
    return jax.nn.log_softmax(logits / _divisor(logits, sampling), axis=-1)


def target_logp(processed: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Log-probs of the distribution drawn from; at temperature 0 all mass is on the most likely token."""
    best = jnp.arange(processed.shape[-1]) == jnp.argmax(processed, axis=-1)[..., None]
    greedy = jnp.where(best, 0.0, -jnp.inf).astype(processed.dtype)
    drawn = jax.nn.log_softmax(processed, axis=-1)
    return jnp.where(jnp.asarray(sampling.temperature) > 0, drawn, greedy)


def sample_token(
    keys: Key[Array, "B"], logits: Float[Array, "B V"], processed: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Draws one token a row.

    Args:
      keys: one a row, [B].
      logits: of the model.
      processed: what `process_logits` made of them.

    Returns:
      (token, logp, filtered_logp), in nats. `logp` is of the full support at the sampling temperature (at
      temperature 0: at 1), whatever the rules, so that ratios against a rescoring are ratios of one
      distribution. `filtered_logp` is of the distribution that the token was drawn from.
    """
    filtered = target_logp(processed, sampling)
    token = jax.vmap(jax.random.categorical)(keys, filtered)
    logp = full_logp(logits, sampling)
    rows = jnp.arange(token.shape[0])
    return token, logp[rows, token], filtered[rows, token]


def row_keys(key: PRNGKeyArray, rows: int, *, first: int = 0) -> Key[Array, "B"]:
    """A key for each row, by its number, so that what a row draws does not depend on its neighbours."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(first, first + rows))


def step_keys(keys: Key[Array, "B"], length: Int[Array, "B"]) -> Key[Array, "B"]:
    """The keys with which rows draw their next token after `length` of them."""
    return jax.vmap(jax.random.fold_in)(keys, length)
