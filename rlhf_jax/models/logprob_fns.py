"""Models as the callables that updates know: log-probs, values, rewards.

The hidden state at t-1 predicts the token at t, and is the state in which that token is chosen
(`from_logits.shift`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.masks import last_unmasked_index
from rlhf_jax.core.protocols import (
    CandidateFn,
    DistributionFn,
    GreedyMatchFn,
    HiddenFn,
    LogitsFn,
    LogprobFn,
    RewardFn,
    TopKFn,
    ValueFn,
)
from rlhf_jax.core.trees import merge
from rlhf_jax.core.types import Array, Bool, Float, Images, Int, Params, Scalar, Sequences, TokenLogprobs
from rlhf_jax.kernels.logprobs import (
    candidate_logprobs,
    collision_probabilities,
    token_logprobs,
    top_k_logprobs,
)
from rlhf_jax.models import decoder as decoders
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.from_logits import distribution_from_logits_fn, shift
from rlhf_jax.models.heads import apply_scalar_head
from rlhf_jax.models.mtp import mtp_hidden_states
from rlhf_jax.models.router_stats import has_routers, routed_hidden_states
from rlhf_jax.models.routing_replay import replayed_hidden_states


def make_hidden_fn(config: ModelConfig) -> HiddenFn:
    """`hidden(params, tokens, positions, segment_ids) -> [B, T, D]`: final hidden states of whole rows."""
    return functools.partial(decoders.hidden_states, config)


def make_logits_fn(config: ModelConfig) -> LogitsFn:
    """`logits(params, tokens, positions, segment_ids) -> [B, T, V]`, float32; meaningless at padding."""

    def logits(params: Params, *inputs: Array, images: Images | None = None) -> Float[Array, "B T V"]:
        return decoders.logits(config, params, decoders.hidden_states(config, params, *inputs, images=images))

    return logits


def _hidden(model: ModelConfig | HiddenFn, params: Params, sequences: Sequences) -> Float[Array, "B T D"]:
    if sequences.experts is not None and isinstance(model, ModelConfig):
        return replayed_hidden_states(model, params, sequences)
    hidden_fn = make_hidden_fn(model) if isinstance(model, ModelConfig) else model
    rows = sequences.tokens, sequences.positions, sequences.segment_ids
    return hidden_fn(params, *rows, **sequences.image_inputs)


def make_logprob_fn(
    config: ModelConfig, *, temperature: Scalar = 1.0, chunk_size: int = 512, collision: bool = False
) -> LogprobFn:
    """`score(params, sequences) -> TokenLogprobs` of a policy without a value head (values are 0).

    Args:
      temperature: the one that rollouts were sampled at, so that scores are the sampler's.
      chunk_size: tokens whose logits are held at once.
      collision: give collision probabilities, too (`kernels.collision_probabilities`).
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        hidden = _hidden(config, params, sequences)
        scored = _score_hidden(config, params, hidden, sequences, temperature, chunk_size)
        if sequences.candidates is not None:
            asked = sequences.tokens, sequences.candidates
            of_candidates, _ = _candidates(config, params, hidden, *asked, temperature, chunk_size)
            scored = dataclasses.replace(scored, candidate_logp=of_candidates)
        if not collision:
            return scored
        squares = collision_probabilities(
            hidden,
            decoders.unembedding(config, params),
            temperature=temperature,
            softcap=config.logit_softcap,
            chunk_size=chunk_size,
        )
        return dataclasses.replace(scored, collision=shift(squares))

    return score


def make_logprob_fn_with_auxiliaries(config: ModelConfig, *, chunk_size: int = 512) -> LogprobFn:
    """`make_logprob_fn` that also says what only training by likelihood wants to know: `mtp_logp` where
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
        if not config.mtp_depth:
            return scored
        further = []
        states = mtp_hidden_states(config, params, hidden, sequences)
        for depth, foreseeing in enumerate(states, start=1):
            # The state of depth k at t - 1 foresees t + k: told to `_score_hidden` by moving tokens.
            tokens, mask = (jnp.roll(x, -depth, axis=1) for x in (sequences.tokens, sequences.mask))
            moved = dataclasses.replace(sequences, tokens=tokens, mask=mask)
            logp = _score_hidden(config, params, foreseeing, moved, 1.0, chunk_size).logp
            further.append(jnp.pad(logp[:, :-depth], ((0, 0), (depth, 0))))
        return dataclasses.replace(scored, mtp_logp=jnp.stack(further))

    return score


def make_greedy_match_fn(config: ModelConfig, *, chunk_size: int = 512) -> GreedyMatchFn:
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
        return scored.logp, shift(guesses) == sequences.tokens

    return likelihood


def make_distribution_fn(config: ModelConfig, *, temperature: Scalar = 1.0) -> DistributionFn:
    """`logp(params, sequences)`: log-probs of all tokens at each place, in nats; column 0 is uniform.

    Holds [B, T, V]; for distillation with small vocabularies.
    """
    return distribution_from_logits_fn(make_logits_fn(config), temperature=temperature)


def make_top_k_fn(config: ModelConfig, k: int, *, chunk_size: int = 512) -> TopKFn:
    """`top_k(params, sequences, temperature) -> (logp, ids)`, [B, T, K] each: the likeliest tokens at each
    place, without gradient.

    Args:
      chunk_size: tokens whose logits are held at once.
    """

    def top_k(params: Params, sequences: Sequences, temperature: Scalar = 1.0) -> tuple[Array, Array]:
        hidden = _hidden(config, params, sequences)
        return _in_chunks(
            top_k_logprobs, config, params, hidden, k, temperature=temperature, chunk_size=chunk_size
        )

    return top_k


def make_candidate_fn(config: ModelConfig, *, chunk_size: int = 512) -> CandidateFn:
    """`candidates(params, sequences, token_ids, temperature) -> (logp [B, T, K], token_logp [B, T])`.

    Log-probs of K given tokens at each place, and of the one that stands there at temperature 1.

    Args:
      chunk_size: tokens whose logits are held at once.
    """

    def candidates(
        params: Params, sequences: Sequences, token_ids: Int[Array, "B T K"], temperature: Scalar = 1.0
    ) -> tuple[Array, Array]:
        hidden = _hidden(config, params, sequences)
        return _candidates(config, params, hidden, sequences.tokens, token_ids, temperature, chunk_size)

    return candidates


def _candidates(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    token_ids: Int[Array, "B T K"],
    temperature: Scalar,
    chunk_size: int,
) -> tuple[Array, Array]:
    following = [jnp.roll(ids, -1, axis=1) for ids in (tokens, token_ids)]
    return _in_chunks(
        candidate_logprobs, config, params, hidden, *following, temperature=temperature, chunk_size=chunk_size
    )


def _score_hidden(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    sequences: Sequences,
    temperature: Scalar,
    chunk_size: int,
) -> TokenLogprobs:
    following, counted = (jnp.roll(x, -1, axis=1) for x in (sequences.tokens, sequences.mask))
    score = functools.partial(token_logprobs, counted=counted)
    logp, entropy = _in_chunks(
        score, config, params, hidden, following, temperature=temperature, chunk_size=chunk_size
    )
    return TokenLogprobs(logp, entropy, jnp.zeros_like(logp))


def _in_chunks(
    score_fn: Callable[..., tuple[Array, Array]],
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    *args: Any,
    temperature: Scalar,
    chunk_size: int,
) -> tuple[Array, Array]:
    """What a function of `kernels.logprobs` says of the states, moved to the tokens that are chosen in them.

    The last state predicts nothing that is there, and the shift drops what is said of it. Columns stay as
    many as they are, so that they can be split evenly.
    """
    unembedding, softcap = decoders.unembedding(config, params), config.logit_softcap
    scaling = {"temperature": temperature, "softcap": softcap, "chunk_size": chunk_size}
    return jax.tree.map(shift, score_fn(hidden, unembedding, *args, **scaling))


def make_value_fn(model: ModelConfig | HiddenFn) -> ValueFn:
    """`value(params, sequences)`: value of the state in which each token was chosen.

    `params` is a scalar model (`models.heads.init_scalar_model`).

    Args:
      model: a description of ours, or the hidden states of any model.
    """

    def value(params: Params, sequences: Sequences) -> Float[Array, "B T"]:
        hidden = _hidden(model, params["decoder"], sequences)
        return shift(apply_scalar_head(params["head"], hidden))

    return value


def make_actor_critic_fn(
    config: ModelConfig, *, temperature: Scalar = 1.0, chunk_size: int = 512
) -> LogprobFn:
    """`score(params, sequences)` of a policy and a separate value model (`actor_critic_of`)."""
    policy = make_logprob_fn(config, temperature=temperature, chunk_size=chunk_size)
    return actor_critic_of(policy, make_value_fn(config))


def actor_critic_of(logprob_fn: LogprobFn, value_fn: ValueFn) -> LogprobFn:
    """Log-probs of a policy with the values of a separate value model.

    `params` is `{"policy": decoder, "value": scalar model}`; with a `"base"` beside them, each holds what is
    its own, and the base the rest of both (`merge_with_base`).
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        scored = logprob_fn(merge_with_base(params, "policy"), sequences)
        value_model = {**params["value"], "decoder": merge_with_base(params, "value", "decoder")}
        return dataclasses.replace(scored, value=value_fn(value_model, sequences))

    return score


def shared_trunk_actor_critic_of(logprob_fn: LogprobFn, value_fn: ValueFn) -> LogprobFn:
    """Log-probs of a policy with the values of a head on the policy's own hidden states.

    `params` is `{"policy": decoder, "value": {"head": scalar head}}`, with or without a `"base"`. The model
    runs twice unless the compiler finds that both are one; `make_shared_trunk_actor_critic_fn` runs it once.
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        decoder = merge_with_base(params, "policy")
        value_model = {"decoder": decoder, "head": params["value"]["head"]}
        return dataclasses.replace(logprob_fn(decoder, sequences), value=value_fn(value_model, sequences))

    return score


def make_shared_trunk_actor_critic_fn(
    config: ModelConfig, *, temperature: Scalar = 1.0, chunk_size: int = 512
) -> LogprobFn:
    """`score(params, sequences)` of a policy and a value that read the same hidden states.

    `params` is `{"policy": decoder, "value": {"head": scalar head}}`, with or without a `"base"`.
    """

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        decoder = merge_with_base(params, "policy")
        hidden = _hidden(config, decoder, sequences)
        scored = _score_hidden(config, decoder, hidden, sequences, temperature, chunk_size)
        value = shift(apply_scalar_head(params["value"]["head"], hidden))
        return TokenLogprobs(scored.logp, scored.entropy, value)

    return score


def merge_with_base(params: Params, *names: str) -> Params:
    """The whole of one of several models on one base: `params["base"]` and what the model has of its own."""
    own = params
    for name in names:
        own = own[name]
    return merge(params.get("base", {}), own)


def reference_params(params: Params, original: Params) -> Params:
    """The policy as it was, adapters off: the base itself, with the originals of leaves that are trained.

    Args:
      params: several models on one base.
      original: what the base lacks because it is trained; nothing where all that is trained are adapters,
        and everything where there is no base.
    """
    return merge(params.get("base", {}), original)


def make_reward_fn(model: ModelConfig | HiddenFn) -> RewardFn:
    """`reward(params, sequences)`: the head's output after the last token that is not padding, one a row.

    `params` is a scalar model. Rows hold one sample each.
    """

    def reward(params: Params, sequences: Sequences) -> Float[Array, "B"]:
        scores = apply_scalar_head(params["head"], _hidden(model, params["decoder"], sequences))
        last = last_unmasked_index(sequences.segment_ids > 0)
        return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]

    return reward


def make_shared_reward_fn(model: ModelConfig | HiddenFn) -> RewardFn:
    """`make_reward_fn` for `params["reward"]`, a scalar model on the `"base"` beside it."""
    reward = make_reward_fn(model)

    def shared(params: Params, sequences: Sequences) -> Float[Array, "B"]:
        own = {**params["reward"], "decoder": merge_with_base(params, "reward", "decoder")}
        return reward(own, sequences)

    return shared


def make_process_reward_fn(model: ModelConfig | HiddenFn) -> ValueFn:
    """`score(params, sequences)`: the head's output after each token, that token read.

    `params` is a scalar model. At the last token of a step it is the log-odds that the step is right.
    """

    def score(params: Params, sequences: Sequences) -> Float[Array, "B T"]:
        return apply_scalar_head(params["head"], _hidden(model, params["decoder"], sequences))

    return score
