"""Models as the callables that updates and samplers know: score, reward, prefill, decode.

This is the one place where tokens are shifted against hidden states: the hidden state at t-1 predicts the
token at t, and is the state in which that token is chosen.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import last_unmasked_index
from rlhf_jax.core.trees import merge
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Int,
    LogprobFn,
    Params,
    Scalar,
    Sequences,
    Shaped,
    TokenLogprobs,
)
from rlhf_jax.kernels.logprobs import token_logprobs
from rlhf_jax.models import decoder as decoders
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import apply_scalar_head
from rlhf_jax.models.mtp import further_hidden_states
from rlhf_jax.models.router_stats import has_routers, routed_hidden_states


def _hidden(config: ModelConfig, params: Params, sequences: Sequences) -> Float[Array, "B T D"]:
    return decoders.hidden_states(
        config, params, sequences.tokens, sequences.positions, sequences.segment_ids
    )


def _delay(values: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """Moves column t-1 to column t; column 0 has no state before it and gets 0."""
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def make_logprob_fn(config: ModelConfig, *, temperature: Scalar = 1.0, chunk_size: int = 512) -> LogprobFn:
    """`score(params, sequences) -> TokenLogprobs` of a policy without a value head (values are 0).

    Args:
      temperature: the one that rollouts were sampled at, so that scores are the sampler's.
      chunk_size: tokens whose logits are held at once.
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        hidden = _hidden(config, params, sequences)
        return _score_hidden(config, params, hidden, sequences, temperature, chunk_size)

    return score


def make_logprob_fn_with_auxiliaries(config: ModelConfig, *, chunk_size: int = 512) -> LogprobFn:
    """`make_logprob_fn` that also says what only training by likelihood wants to know: `further_logp` where
    the model has modules for it, `routing` where it has mixtures of experts.
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        routing = None
        if has_routers(config):
            hidden, routing = routed_hidden_states(config, params, sequences)
        else:
            hidden = _hidden(config, params, sequences)
        scored = _score_hidden(config, params, hidden, sequences, 1.0, chunk_size)
        scored = dataclasses.replace(scored, routing=routing)
        if not config.further_depth:
            return scored
        further = []
        states = further_hidden_states(config, params, hidden, sequences)
        for depth, foreseeing in enumerate(states, start=1):
            # The state of depth k at t - 1 foresees t + k: told to `_score_hidden` by moving tokens.
            moved = dataclasses.replace(sequences, tokens=jnp.roll(sequences.tokens, -depth, axis=1))
            logp = _score_hidden(config, params, foreseeing, moved, 1.0, chunk_size).logp
            further.append(jnp.pad(logp[:, :-depth], ((0, 0), (depth, 0))))
        return dataclasses.replace(scored, further_logp=jnp.stack(further))

    return score


def make_greedy_match_fn(
    config: ModelConfig, *, chunk_size: int = 512
) -> Callable[[Params, Sequences], tuple[Float[Array, "B T"], Bool[Array, "B T"]]]:
    """`likelihood(params, sequences) -> (logp, likeliest)`: log-probs in nats, as those of `make_logprob_fn`,
    and whether each token is the most likely one where it stands.

    Args:
      chunk_size: tokens whose logits are held at once.
    """

    def likelihood(params: Params, sequences: Sequences) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
        hidden = _hidden(config, params, sequences)
        scored = _score_hidden(config, params, hidden, sequences, 1.0, chunk_size)

        def most_likely(state: Float[Array, "D"]) -> Int[Array, ""]:
            return jnp.argmax(decoders.logits(config, params, state[None])[0])

        states = hidden.reshape(-1, hidden.shape[-1])
        guesses = jax.lax.map(most_likely, states, batch_size=chunk_size).reshape(sequences.tokens.shape)
        return scored.logp, _delay(guesses) == sequences.tokens

    return likelihood


def make_distribution_fn(
    config: ModelConfig, *, temperature: Scalar = 1.0
) -> Callable[[Params, Sequences], Float[Array, "B T V"]]:
    """`logp(params, sequences)`: log-probs of all tokens at each place, in nats; column 0 is uniform.

    Holds [B, T, V]; for distillation with small vocabularies.
    """

    def logp(params: Params, sequences: Sequences) -> Float[Array, "B T V"]:
        hidden = _hidden(config, params, sequences)
        logits = decoders.logits(config, params, hidden[:, :-1]) / temperature
        logp = jnp.pad(logits, ((0, 0), (1, 0), (0, 0)))
        return jax.nn.log_softmax(logp, axis=-1)

    return logp


def _score_hidden(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    sequences: Sequences,
    temperature: Scalar,
    chunk_size: int,
) -> TokenLogprobs:
    # The last state predicts nothing that is there: its number is dropped by the delay. Columns stay as
    # many as they are, so that they can be split evenly.
    logp, entropy = token_logprobs(
        hidden,
        decoders.unembedding(config, params),
        jnp.roll(sequences.tokens, -1, axis=1),
        temperature=temperature,
        softcap=config.logit_softcap,
        chunk_size=chunk_size,
    )
    return TokenLogprobs(_delay(logp), _delay(entropy), jnp.zeros_like(logp))


def make_value_fn(
    config: ModelConfig,
) -> Callable[[Params, Sequences], Float[Array, "B T"]]:
    """`value(params, sequences)`: value of the state in which each token was chosen.

    `params` is a scalar model (`models.heads.init_scalar_model`).
    """

    def value(params: Params, sequences: Sequences) -> Float[Array, "B T"]:
        hidden = _hidden(config, params["decoder"], sequences)
        return _delay(apply_scalar_head(params["head"], hidden))

    return value


def make_actor_critic_fn(
    config: ModelConfig, *, temperature: Scalar = 1.0, chunk_size: int = 512
) -> LogprobFn:
    """`score(params, sequences)` of a policy and a separate value model.

    `params` is `{"policy": decoder, "value": scalar model}`; with a `"base"` beside them, each holds what is
    its own, and the base the rest of both (`on_base`).
    """
    policy = make_logprob_fn(config, temperature=temperature, chunk_size=chunk_size)
    value = make_value_fn(config)

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        scored = policy(on_base(params, "policy"), sequences)
        value_model = {**params["value"], "decoder": on_base(params, "value", "decoder")}
        return TokenLogprobs(scored.logp, scored.entropy, value(value_model, sequences))

    return score


def make_shared_trunk_actor_critic_fn(
    config: ModelConfig, *, temperature: Scalar = 1.0, chunk_size: int = 512
) -> LogprobFn:
    """`score(params, sequences)` of a policy and a value that read the same hidden states.

    `params` is `{"policy": decoder, "value": {"head": scalar head}}`, with or without a `"base"`.
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        decoder = on_base(params, "policy")
        hidden = _hidden(config, decoder, sequences)
        scored = _score_hidden(config, decoder, hidden, sequences, temperature, chunk_size)
        value = _delay(apply_scalar_head(params["value"]["head"], hidden))
        return TokenLogprobs(scored.logp, scored.entropy, value)

    return score


def on_base(params: Params, *names: str) -> Params:
    """The whole of one of several models on one base: `params["base"]` and what the model has of its own."""
    own = params
    for name in names:
        own = own[name]
    return merge(params.get("base", {}), own)


def reference_of(params: Params, original: Params) -> Params:
    """The policy as it was, adapters off: the base itself, with the originals of leaves that are trained.

    Args:
      params: several models on one base.
      original: what the base lacks because it is trained; nothing where all that is trained are adapters,
        and everything where there is no base.
    """
    return merge(params.get("base", {}), original)


def make_reward_fn(config: ModelConfig) -> Callable[[Params, Sequences], Float[Array, "B"]]:
    """`reward(params, sequences)`: the head's output after the last token that is not padding, one a row.

    `params` is a scalar model. Rows hold one sample each.
    """

    def reward(params: Params, sequences: Sequences) -> Float[Array, "B"]:
        scores = apply_scalar_head(params["head"], _hidden(config, params["decoder"], sequences))
        last = last_unmasked_index(sequences.segment_ids > 0)
        return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]

    return reward


def make_shared_reward_fn(config: ModelConfig) -> Callable[[Params, Sequences], Float[Array, "B"]]:
    """`make_reward_fn` for `params["reward"]`, a scalar model on the `"base"` beside it."""
    reward = make_reward_fn(config)

    def shared(params: Params, sequences: Sequences) -> Float[Array, "B"]:
        own = {**params["reward"], "decoder": on_base(params, "reward", "decoder")}
        return reward(own, sequences)

    return shared


def make_process_reward_fn(
    config: ModelConfig,
) -> Callable[[Params, Sequences], Float[Array, "B T"]]:
    """`score(params, sequences)`: the head's output after each token, that token read.

    `params` is a scalar model. At the last token of a step it is the log-odds that the step is right.
    """

    def score(params: Params, sequences: Sequences) -> Float[Array, "B T"]:
        return apply_scalar_head(params["head"], _hidden(config, params["decoder"], sequences))

    return score


def make_decode_fns(config: ModelConfig) -> tuple[Callable, Callable]:
    """(prefill, decode) for `generation.generate`.

    prefill(params, tokens [B, P], positions, segment_ids, length) -> (logits [B, V], cache) reads whole
    prompts and leaves room for `length` columns; decode(params, cache, token [B], position [B]) ->
    (logits [B, V], cache) reads one token a row.
    """

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "B V"], decoders.Cache]:
        cache = decoders.init_cache(config, tokens.shape[0], length)
        hidden, cache = decoders.cached_hidden_states(
            config, params, tokens, positions, segment_ids, cache, fresh=True
        )
        return decoders.logits(config, params, hidden[:, -1]), cache

    def decode(
        params: Params,
        cache: decoders.Cache,
        token: Int[Array, "B"],
        position: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], decoders.Cache]:
        hidden, cache = decoders.cached_hidden_states(
            config, params, token[:, None], position[:, None], jnp.ones_like(token)[:, None], cache
        )
        return decoders.logits(config, params, hidden[:, 0]), cache

    return prefill, decode


def make_hidden_decode_fns(config: ModelConfig) -> tuple[Callable, Callable]:
    """(prefill, extend) as of `make_decode_fns` and `make_extend_fn`, which also give the final hidden
    states: (logits, hidden [B, T, D], cache).
    """

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B P D"], decoders.Cache]:
        cache = decoders.init_cache(config, tokens.shape[0], length)
        hidden, cache = decoders.cached_hidden_states(
            config, params, tokens, positions, segment_ids, cache, fresh=True
        )
        return decoders.logits(config, params, hidden[:, -1]), hidden, cache

    def extend(
        params: Params,
        cache: decoders.Cache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B n V"], Float[Array, "B n D"], decoders.Cache]:
        segment_ids = jnp.ones_like(tokens)
        shortened = dataclasses.replace(cache, length=columns)
        hidden, extended = decoders.cached_hidden_states(
            config, params, tokens, positions, segment_ids, shortened
        )
        extended = dataclasses.replace(extended, length=cache.length)
        return decoders.logits(config, params, hidden), hidden, extended

    return prefill, extend


def make_extend_fn(config: ModelConfig) -> Callable:
    """extend(params, cache, tokens [B, n], positions [B, n], columns [B]) -> (logits [B, n, V], cache).

    Reads several tokens a row after the first `columns` columns of the cache of `make_decode_fns`, whatever
    stands behind them. So nothing need be undone when tokens turn out wrong: the next call writes over them.
    """
    _, hidden_extend = make_hidden_decode_fns(config)

    def extend(
        params: Params,
        cache: decoders.Cache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
    ) -> tuple[Float[Array, "B n V"], decoders.Cache]:
        logits, _, cache = hidden_extend(params, cache, tokens, positions, columns)
        return logits, cache

    return extend


def make_layer_decode_fns(config: ModelConfig, layers: tuple[int, ...]) -> tuple[Callable, Callable]:
    """(prefill, decode) as of `make_decode_fns`, with logits [L, B, V] of several layers, the last one last.

    Args:
      layers: how many repeats of the pattern of blocks come before each early prediction; the output matrix
        is applied to what they leave as it is. 0 is the embedding.
    """
    unrolled = dataclasses.replace(config, scan_layers=False, remat="none")

    def read(
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: decoders.Cache,
    ) -> tuple[Float[Array, "L B V"], decoders.Cache]:
        if config.scan_layers:
            params = decoders.unstack_layers(config, params)
        hidden, between, cache = decoders.layer_hidden_states(
            unrolled, params, tokens, positions, segment_ids, cache
        )
        last = jnp.stack([*(between[layer][:, -1] for layer in layers), hidden[:, -1]])
        return decoders.logits(unrolled, params, last), cache

    def prefill(
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
    ) -> tuple[Float[Array, "L B V"], decoders.Cache]:
        cache = decoders.init_cache(unrolled, tokens.shape[0], length)
        return read(params, tokens, positions, segment_ids, cache)

    def decode(
        params: Params, cache: decoders.Cache, token: Int[Array, "B"], position: Int[Array, "B"]
    ) -> tuple[Float[Array, "L B V"], decoders.Cache]:
        return read(params, token[:, None], position[:, None], jnp.ones_like(token)[:, None], cache)

    return prefill, decode
